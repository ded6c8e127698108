//! Folders of draft heads: `config.json` and safetensors, as EAGLE, Medusa and Hydra heads are published.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::dtype::DType;
use crate::error::{Context, Result, bail, ensure};
use crate::format::mmap::{Mapping, read_text};
use crate::format::safetensors::Shards;
use crate::format::{StoredType, hf_config};
use crate::model::config::ModelConfig;
use crate::model::roles::NamedTensors;
use crate::tensor::{ByteSource, HostTensor};

const CONFIG: &str = "config.json";
/// Upper bound of a configuration.
const MAX_CONFIG: u64 = 16 << 20;

/// A head's tensors and settings; which head it is, is for others to say.
pub struct DraftHead {
    folder: PathBuf,
    settings: Map<String, Value>,
    tensors: Shards,
}

impl DraftHead {
    /// Opens a folder. Weights are in `model.safetensors`, in what its index names, or in the only other `*.safetensors`.
    ///
    /// # Errors
    /// `Config` and `Weights` for what is missing or damaged, by file; `Weights` for pickled weights (`*.bin`, `*.pt`).
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG);
        let settings = hf_config::object(&read_text(&path, MAX_CONFIG)?).context(|| path.display().to_string())?;
        Ok(Self { folder: folder.into(), settings, tensors: weights(folder)? })
    }

    /// From the contents of the two files, for a head that is part of a program. `name` is for messages.
    ///
    /// # Errors
    /// As [`DraftHead::open`].
    pub fn parse(name: &str, config: &str, weights: &'static [u8]) -> Result<Self> {
        let settings = hf_config::object(config).context(|| name.into())?;
        let file: (String, Arc<dyn ByteSource>) = (name.into(), Arc::new(Static(weights)));
        Ok(Self { folder: name.into(), settings, tensors: Shards::parse(vec![file])? })
    }

    fn setting(&self, key: &str) -> Option<&Value> {
        let mut parts = key.split('.');
        let first = self.settings.get(parts.next()?);
        parts.try_fold(first?, |v, part| v.get(part)).filter(|v| !v.is_null())
    }

    /// A matrix of I8 with, beside it, `NAME.scale`, an F16 for each 32 columns of a row: Q8_0 in two tensors.
    fn blocks(&self, name: &str, [rows, cols]: [usize; 2], data: &[u8]) -> Result<HostTensor> {
        let block = DType::Q8_0.block_len();
        let scale = format!("{name}.scale");
        let found = self.tensors.tensor(&scale).filter(|(entry, _)| entry.stored.to_string() == "F16");
        let Some((_, scales)) = found.filter(|(entry, _)| entry.shape == [rows, cols / block]) else {
            bail!(
                Weights,
                "{}",
                self.place(&format!("{name} is I8: {scale} has to be F16 [{rows}, {}]", cols / block))
            );
        };
        ensure!(cols.is_multiple_of(block), Weights, "{}", self.place(&format!("{name}: {cols} columns in I8")));
        let pairs = scales.chunks_exact(2).zip(data.chunks_exact(block));
        let bytes: Vec<u8> = pairs.flat_map(|(scale, q)| scale.iter().chain(q)).copied().collect();
        HostTensor::new(DType::Q8_0, rows, cols, bytes.into()).context(|| self.place(name))
    }

    fn place(&self, what: &str) -> String {
        format!("{}: {what}", self.folder.display())
    }
}

/// Bytes of the program itself.
struct Static(&'static [u8]);

impl ByteSource for Static {
    fn bytes(&self) -> &[u8] {
        self.0
    }
}

fn weights(folder: &Path) -> Result<Shards> {
    if ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| folder.join(f).is_file()) {
        return Shards::open(folder);
    }
    let io = |e| crate::error::Error::io(folder.display(), e);
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        names.extend(entry.map_err(io)?.file_name().into_string());
    }
    names.sort();
    let of =
        |ends: &[&str]| -> Vec<&String> { names.iter().filter(|n| ends.iter().any(|end| n.ends_with(end))).collect() };
    let place = folder.display();
    match of(&[".safetensors"])[..] {
        [one] => Shards::parse(vec![(one.clone(), Mapping::open(&folder.join(one))?)]).context(|| place.to_string()),
        [] => match of(&[".bin", ".pt", ".pth"])[..] {
            [pickle, ..] => {
                bail!(Weights, "{place}: {pickle} is a pickle, which is not read: convert it to safetensors")
            }
            [] => bail!(Weights, "{place}: no *.safetensors is there"),
        },
        ref many => bail!(Weights, "{place}: {} files *.safetensors and none is model.safetensors", many.len()),
    }
}

impl NamedTensors for DraftHead {
    fn names(&self) -> Vec<&str> {
        self.tensors.tensors().map(|t| &t.name[..]).collect()
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.entry(name).map(|t| &t.shape[..])
    }

    fn tensor(&self, name: &str) -> Result<HostTensor> {
        let Some((entry, data)) = self.tensors.tensor(name) else {
            bail!(Weights, "{}", self.place(&format!("{name} is missing")));
        };
        let (rows, cols) = match entry.shape[..] {
            [n] => (1, n),
            [r, c] => (r, c),
            _ => bail!(Weights, "{}", self.place(&format!("{name}: shape {:?}", entry.shape))),
        };
        match &entry.stored {
            StoredType::Known(d) => HostTensor::new(*d, rows, cols, data).context(|| self.place(name)),
            StoredType::Other(d) if d == "I8" => self.blocks(name, [rows, cols], &data),
            StoredType::Other(d) => {
                bail!(Unsupported, "{}", self.place(&format!("{name}: element type {d} is not handled")))
            }
        }
    }

    fn integers(&self, name: &str) -> Result<Vec<i64>> {
        let Some((entry, data)) = self.tensors.tensor(name) else {
            bail!(Weights, "{}", self.place(&format!("{name} is missing")));
        };
        let wide = |n: usize| {
            data.chunks_exact(n).map(move |b| {
                let mut word = [if b[n - 1] & 0x80 == 0 { 0 } else { 0xff }; 8];
                word[..n].copy_from_slice(b);
                i64::from_le_bytes(word)
            })
        };
        match &entry.stored.to_string()[..] {
            "I64" => Ok(wide(8).collect()),
            "I32" => Ok(wide(4).collect()),
            "BOOL" | "U8" => Ok(data.iter().map(|&b| b.into()).collect()),
            other => bail!(Weights, "{}", self.place(&format!("{name}: expected integers, found {other}"))),
        }
    }

    /// What a published head's settings leave out is what its training code assumed: a rotary base of 10,000 and a context of 2048.
    fn layer(&self) -> Result<ModelConfig> {
        let mut settings = self.settings.clone();
        for (key, value) in [("rope_theta", 10_000), ("max_position_embeddings", 2048)] {
            if key != "rope_theta" || self.setting("rope_parameters").is_none() {
                settings.entry(key).or_insert(value.into());
            }
        }
        hf_config::parse_object(&settings).context(|| self.place(CONFIG))
    }

    fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let size = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let Some(value) = self.setting(key) else { return Ok(None) };
        let sizes = match value {
            Value::Array(all) => all.iter().map(size).collect(),
            one => size(one).map(|n| vec![n]),
        };
        ensure!(sizes.is_some(), Config, "{}: {key}: expected a size or a list of them", self.place(CONFIG));
        Ok(sizes)
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.setting(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => bail!(Config, "{}: {key}: expected true or false", self.place(CONFIG)),
        }
    }
}
