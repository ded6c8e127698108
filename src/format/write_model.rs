//! A model with new weights as a Hugging Face folder.

use std::path::Path;

use crate::error::{Error, Result, bail, ensure};
use crate::files::{TensorBytes, write_folder, write_tensors};
use crate::format::Checkpoint;
use crate::format::checkpoint::Store;
use crate::format::roles::slots;
use crate::model::config::Family;
use crate::model::roles::TensorSource;

/// Says whether [`write_model`] can write a model like this one.
///
/// # Errors
/// `Unsupported` where not.
pub fn can_write(like: &Checkpoint) -> Result<()> {
    let path = like.path().display();
    match like.store {
        Store::Hf(_) => Ok(()),
        Store::Gguf(_) => bail!(
            Unsupported,
            "{path}: new weights are written as a Hugging Face folder with the model's own tokenizer files; open such a folder"
        ),
    }
}

/// Writes `weights` in F32 as the folder `out`, with the configuration and the tokenizer of `like`; whole or not at all.
///
/// # Errors
/// Files that cannot be read or written, by name; tensors that do not fit the configuration.
pub fn write_model(weights: &dyn TensorSource, like: &Checkpoint, out: &Path) -> Result<()> {
    can_write(like)?;
    let config = like.config();
    ensure!(weights.config() == config, Config, "weights of another model than {}", like.path().display());
    let mut tensors = Vec::new();
    for slot in slots(config) {
        let mut values = weights.tensor(slot.role)?.to_f32();
        // As the files have it: Gemma's norms multiply by 1 + w.
        if config.family == Family::Gemma3 && slot.role.is_vector() {
            values.iter_mut().for_each(|w| *w -= 1.0);
        }
        tensors.push((slot.hf, slot.shape, values));
    }
    write_folder(out, |folder| {
        let all: Vec<_> = tensors.iter().map(|(n, s, v)| TensorBytes::f32(n, s, v)).collect();
        folder.write("model.safetensors", |to| write_tensors(to, &all, Some(("format", "pt"))))?;
        let dir = like.path();
        let names =
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
        for name in names.into_iter().filter(|n| dir.join(n).is_file()) {
            let from = dir.join(name);
            let bytes = std::fs::read(&from).map_err(|e| Error::io(from.display(), e))?;
            folder.write(name, |to| to.write_all(&bytes))?;
        }
        Ok(())
    })
}
