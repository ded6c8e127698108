//! Safetensors files, single or in shards, behind one table of names.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Component, Path};
use std::sync::Arc;

use safetensors::tensor::{Dtype, Metadata, SafeTensors};

use crate::dtype::DType;
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::mmap::{Mapping, read_text};
use crate::format::{Pairs, StoredType, TensorEntry};
use crate::tensor::{ByteSource, Bytes};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Upper bound of an index file, far above that of the largest models.
const MAX_INDEX: u64 = 256 << 20;

/// One file or all shards of a model.
pub struct Shards {
    files: Vec<(String, Arc<dyn ByteSource>)>,
    tensors: Vec<(usize, TensorEntry)>,
    by_name: HashMap<String, usize>,
}

impl Shards {
    /// Maps the weights of a Hugging Face folder: `model.safetensors`, else what `model.safetensors.index.json` names.
    pub fn open(folder: &Path) -> Result<Self> {
        let single = folder.join(SINGLE);
        if single.is_file() {
            return Self::parse(vec![(SINGLE.into(), Mapping::open(&single)?)])
                .context(|| folder.display().to_string());
        }
        let index = folder.join(INDEX);
        ensure!(index.is_file(), Weights, "{}: neither {SINGLE} nor {INDEX} is there", folder.display());
        let map = parse_index(&read_text(&index, MAX_INDEX)?).context(|| index.display().to_string())?;

        let (mut files, mut seen) = (Vec::new(), HashSet::new());
        for (tensor, file) in &map {
            if !seen.insert(file) {
                continue;
            }
            let path = folder.join(file);
            let there = path.is_file();
            ensure!(there, Weights, "{}: tensor {tensor:?} is in {file:?}, which is missing", index.display());
            files.push((file.clone(), Mapping::open(&path)? as Arc<dyn ByteSource>));
        }
        let shards = Self::parse(files).context(|| folder.display().to_string())?;
        for (tensor, file) in &map {
            let holder = shards.by_name.get(tensor).map(|&i| &shards.files[shards.tensors[i].0].0);
            ensure!(
                holder == Some(file),
                Weights,
                "{}: tensor {tensor:?} is not in {file:?}, where the index puts it",
                index.display()
            );
        }
        Ok(shards)
    }

    /// Parses files, each with the name to use in messages.
    pub fn parse(files: Vec<(String, Arc<dyn ByteSource>)>) -> Result<Self> {
        let (mut tensors, mut by_name) = (Vec::new(), HashMap::new());
        for (f, (file, source)) in files.iter().enumerate() {
            for entry in parse_header(source.bytes()).context(|| file.clone())? {
                if let Some(other) = by_name.insert(entry.name.clone(), tensors.len()) {
                    let (o, _) = &tensors[other];
                    let other: &(String, _) = &files[*o];
                    bail!(Weights, "tensor {:?} is in both {:?} and {file:?}", entry.name, other.0);
                }
                tensors.push((f, entry));
            }
        }
        Ok(Self { files, tensors, by_name })
    }

    /// All tensors, file after file.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorEntry> {
        self.tensors.iter().map(|(_, t)| t)
    }

    /// The entry of tensor `name`.
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.by_name.get(name).map(|&i| &self.tensors[i].1)
    }

    /// The entry and the stored bytes of tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<(&TensorEntry, Bytes)> {
        let (file, entry) = &self.tensors[*self.by_name.get(name)?];
        Some((entry, Bytes::new(self.files[*file].1.clone(), entry.range.clone())))
    }
}

fn parse_header(bytes: &[u8]) -> Result<Vec<TensorEntry>> {
    let damaged = |e: &dyn fmt::Display| Error::new(ErrorKind::Weights, format!("not a sound safetensors file: {e}"));
    // The library adds up offsets unchecked, so none may lie beyond the file before it sees them.
    let header = bytes.first_chunk::<8>().map(|n| u64::from_le_bytes(*n));
    let header = header.and_then(|n| bytes[8..].get(..usize::try_from(n).ok()?));
    let Some(header) = header else {
        return Err(damaged(&"its header is cut short"));
    };
    let loose: Metadata = serde_json::from_slice(header).map_err(|e| damaged(&e))?;
    for (name, info) in loose.tensors() {
        let (from, to) = info.data_offsets;
        let inside = from <= to && to <= bytes.len();
        ensure!(inside, Weights, "tensor {name:?} lies at {from}..{to} in a file of {} bytes", bytes.len());
    }
    let (n, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e))?;
    let data = 8 + n;
    let mut tensors: Vec<TensorEntry> = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let stored = match info.dtype {
                Dtype::F32 => StoredType::Known(DType::F32),
                Dtype::F16 => StoredType::Known(DType::F16),
                Dtype::BF16 => StoredType::Known(DType::BF16),
                other => StoredType::Other(format!("{other:?}")),
            };
            let range = data + info.data_offsets.0..data + info.data_offsets.1;
            TensorEntry { name, stored, shape: info.shape.clone(), range }
        })
        .collect();
    tensors.sort_unstable_by(|a, b| (a.range.start, &a.name).cmp(&(b.range.start, &b.name)));
    Ok(tensors)
}

/// The `weight_map` of an index in file order. Only plain file names pass: an index must not lead out of its folder.
fn parse_index(text: &str) -> Result<Vec<(String, String)>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Pairs<String>,
    }
    let index: Index =
        serde_json::from_str(text).map_err(|e| Error::with_source(ErrorKind::Weights, "not a weight index", e))?;
    let mut seen = HashSet::new();
    for (tensor, file) in &index.weight_map.0 {
        ensure!(seen.insert(tensor), Weights, "tensor {tensor:?} is listed twice");
        let mut parts = Path::new(file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        ensure!(plain && !file.contains(['/', '\\']), Weights, "{file:?} is not a plain file name");
    }
    Ok(index.weight_map.0)
}
