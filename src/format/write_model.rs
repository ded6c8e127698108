//! A model with new weights as a Hugging Face folder.

use std::path::Path;

use crate::error::{Context, Error, Result, bail, ensure};
use crate::files::{F32Tensor, TensorBytes, write_folder, write_tensors};
use crate::format::Checkpoint;
use crate::format::checkpoint::Store;
use crate::format::diffusion_config::with_diffusion;
use crate::format::roles::slots;
use crate::model::config::{Diffusion, Family, ModelConfig};
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
    write(weights, like, None, out)
}

/// The same of a masked diffusion model that was made from `like`, autoregressive or not: its `config.json` is that of `like` with
/// `diffusion` in it. What the configuration of `weights` says of diffusion does not count.
///
/// # Errors
/// As [`write_model`]; a `diffusion` that `like` cannot have.
pub fn write_diffusion_model(
    weights: &dyn TensorSource,
    like: &Checkpoint,
    diffusion: Diffusion,
    out: &Path,
) -> Result<()> {
    write(weights, like, Some(diffusion), out)
}

fn write(weights: &dyn TensorSource, like: &Checkpoint, new: Option<Diffusion>, out: &Path) -> Result<()> {
    can_write(like)?;
    let (mut given, mut config) = (weights.config().clone(), like.config().clone());
    if new.is_some() {
        (given.diffusion, config.diffusion) = (new, new);
        config = config.validate().context(|| like.path().display().to_string())?;
    }
    ensure!(given == config, Config, "weights of another model than {}", like.path().display());
    let tensors = tensors(weights, &config)?;
    write_folder(out, |folder| {
        let all: Vec<_> = tensors.iter().map(|(n, s, v)| TensorBytes::f32(n, s, v)).collect();
        folder.write("model.safetensors", |to| write_tensors(to, &all, Some(("format", "pt"))))?;
        let dir = like.path();
        let names =
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
        for name in names.into_iter().filter(|n| dir.join(n).is_file()) {
            let from = dir.join(name);
            let mut bytes = std::fs::read(&from).map_err(|e| Error::io(from.display(), e))?;
            if let (Some(d), "config.json") = (&new, name) {
                let text = String::from_utf8_lossy(&bytes);
                bytes = with_diffusion(&text, d).context(|| from.display().to_string())?.into_bytes();
            }
            folder.write(name, |to| to.write_all(&bytes))?;
        }
        Ok(())
    })
}

/// Name, shape and values of every tensor, as files have them.
fn tensors(weights: &dyn TensorSource, config: &ModelConfig) -> Result<Vec<F32Tensor>> {
    let mut tensors = Vec::new();
    for slot in slots(config) {
        let mut values = weights.tensor(slot.role)?.to_f32();
        // As the files have it: Gemma's norms multiply by 1 + w.
        if config.family == Family::Gemma3 && slot.role.is_vector() {
            values.iter_mut().for_each(|w| *w -= 1.0);
        }
        tensors.push((slot.hf, slot.shape, values));
    }
    Ok(tensors)
}
