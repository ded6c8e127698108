//! What a learner has learnt, as a file: one safetensors file, written whole or not at all.

use std::path::Path;

use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::learner::Learner;
use super::settings::Learning;
use crate::backend::{Buffer, Train};
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::files::{TensorBytes, write_file, write_tensors};
use crate::online::Meta;
use crate::speculative::train::{Sequence, Teacher};

/// Of the layout; a reader refuses another.
const VERSION: u32 = 1;
/// Key of the header that holds the rest as JSON.
const KEY: &str = "quadriga-draft-state";
/// Tensor of what lookup remembers.
const MEMORY: &str = "memory";

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    /// SHA-256 of the weights that learning began with.
    base: String,
    /// When it was written, seconds since 1970.
    written: u64,
    settings: Learning,
    meta: Meta,
    /// Steps of each expert's optimiser, and its learning rate.
    steps: Vec<u64>,
    rates: Vec<f32>,
    updates: u64,
    rows: u64,
    /// Prompt lengths and teacher widths of the sequences that are not learnt yet.
    fresh: Vec<[usize; 2]>,
}

/// The parts of the settings that say what the tensors are.
fn shape(how: &Learning) -> impl PartialEq + use<> {
    (how.optimizer.kind, how.experts.clone(), how.meta)
}

impl<B: Train> Learner<B> {
    /// Writes the last version that proved no worse, with its optimisers and the experts' weights, the rows that wait to be learnt, and
    /// what else the draft remembers.
    ///
    /// # Errors
    /// More bytes than the settings allow; the disk's. A file that was there stays as it was then.
    pub fn save(&self, path: &Path, memory: Option<&[u8]>) -> Result<()> {
        let be = self.target.backend();
        let (experts, meta) = self.good();
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        for (i, e) in experts.iter().enumerate() {
            for (p, w) in self.bench().params().iter().zip(&e.weights) {
                let mut values = vec![0.0; p.len()];
                be.download_acc(w.head(p.len()), &mut values)?;
                tensors.push((format!("expert{i}/{}", p.name), p.shape.to_vec(), values));
            }
            let states = e.optimizer.to_host(be, self.bench().params().into_iter())?;
            tensors
                .extend(states.into_iter().map(|(name, shape, values)| (format!("expert{i}/{name}"), shape, values)));
        }
        let fresh: Vec<_> = self.fresh().collect();
        for (i, s) in fresh.iter().enumerate() {
            let mut push =
                |name: &str, values: Vec<f32>| tensors.push((format!("fresh{i}/{name}"), vec![values.len()], values));
            // Token numbers are far below 2^24.
            push("tokens", s.tokens.iter().map(|&t| t as f32).collect());
            push("features", s.features.iter().map(|x| x.to_f32()).collect());
            push("ids", s.teacher.ids.iter().map(|&t| t as f32).collect());
            push("p", s.teacher.p.clone());
        }
        let (limit, bytes) =
            (self.settings().state_mb << 20, tensors.iter().map(|t| 4 * t.2.len() as u64).sum::<u64>());
        ensure!(bytes <= limit, Capacity, "{}: {bytes} bytes of what was learnt, {limit} are allowed", path.display());
        let written = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let header = Header {
            version: VERSION,
            base: self.fingerprint().into(),
            written,
            settings: self.settings().clone(),
            meta: meta.clone(),
            steps: experts.iter().map(|e| e.optimizer.steps()).collect(),
            rates: experts.iter().map(|e| e.optimizer.settings().lr).collect(),
            updates: self.stats().updates,
            rows: self.stats().rows,
            fresh: fresh.iter().map(|s| [s.prompt, s.teacher.k]).collect(),
        };
        let json = serde_json::to_string(&header).map_err(|e| Error::with_source(ErrorKind::Config, "state", e))?;
        let sum = sum(&json, memory, tensors.iter().map(|t| &t.2[..]));
        let mut all: Vec<TensorBytes<'_>> = tensors.iter().map(|(n, s, v)| TensorBytes::f32(n.clone(), s, v)).collect();
        all.extend(memory.map(|bytes| TensorBytes {
            name: MEMORY.into(),
            dtype: Dtype::U8,
            shape: vec![bytes.len()],
            bytes,
        }));
        write_file(path, |to| write_tensors(to, &all, Some((KEY, &(sum + &json)))))
    }

    /// Goes on from a file of [`Learner::save`], and publishes what it holds. Gives what else the draft remembered to `memory` first.
    ///
    /// # Errors
    /// A file that is damaged, of another layout, draft or rule, or older than the settings allow: nothing has changed then.
    pub fn restore(&mut self, path: &Path, memory: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let place = path.display();
        let bytes = std::fs::read(path).map_err(|e| Error::io(&place, e))?;
        let damaged = |e: safetensors::SafeTensorError| Error::with_source(ErrorKind::Weights, place.to_string(), e);
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
        let json = metadata.metadata().as_ref().and_then(|m| m.get(KEY));
        let Some((sha256, json)) = json.and_then(|j| j.split_at_checked(64)) else {
            bail!(Weights, "{place}: not the state of a draft that learns")
        };
        let header: Header = serde_json::from_str(json)
            .map_err(|e| Error::with_source(ErrorKind::Config, format!("{place}: {KEY}"), e))?;
        ensure!(header.version == VERSION, Unsupported, "{place}: version {}, not {VERSION}", header.version);
        ensure!(header.base == self.fingerprint(), Config, "{place}: learnt from another draft than this one");
        let same = shape(&header.settings) == shape(self.settings());
        ensure!(same, Config, "{place}: learnt by another rule: {:?}", header.settings.optimizer.kind);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (age, most) = (now.saturating_sub(header.written) / 86_400, self.settings().state_days);
        ensure!(age <= most, Config, "{place}: {age} days old, {most} are allowed: remove it to begin anew");
        header.meta.validate().context(|| place.to_string())?;
        let n = self.settings().experts.len();
        let counts = [header.steps.len(), header.rates.len(), header.meta.weights().len()];
        ensure!(counts == [n; 3], Config, "{place}: {counts:?} entries for {n} experts");

        let file = SafeTensors::deserialize(&bytes).map_err(damaged)?;
        let find = |name: &str| -> Result<Vec<f32>> {
            let t = file.tensor(name).map_err(damaged)?;
            ensure!(t.dtype() == Dtype::F32, Weights, "{place}: {name} is {:?}", t.dtype());
            Ok(t.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let all = file.names().iter().filter(|n| **n != MEMORY).count();
        let mut read = Vec::new();
        let mut take = |name: String, n: Option<usize>| -> Result<Vec<f32>> {
            let values = find(&name)?;
            let fits = n.is_none_or(|n| n == values.len()) && values.iter().all(|x| x.is_finite());
            ensure!(fits, Weights, "{place}: {name}: {} values, or one that is not finite", values.len());
            read.push(values.clone());
            Ok(values)
        };
        let params: Vec<(String, usize)> = self.bench().params().iter().map(|p| (p.name.clone(), p.len())).collect();
        let states = self.settings().optimizer.rule().states();
        let mut experts = Vec::new();
        for i in 0..n {
            let mut values = Vec::new();
            for (name, n) in &params {
                values.push((name.clone(), take(format!("expert{i}/{name}"), Some(*n))?));
            }
            for (name, n) in &params {
                for s in 0..states {
                    values.push((format!("{name}#{s}"), take(format!("expert{i}/{name}#{s}"), Some(*n))?));
                }
            }
            experts.push(values);
        }
        let mut fresh = Vec::new();
        for (i, &[prompt, k]) in header.fresh.iter().enumerate() {
            let mut part = |name: &str| take(format!("fresh{i}/{name}"), None);
            let tokens = part("tokens")?.iter().map(|&t| t as u32).collect();
            let features = part("features")?.iter().map(|&x| bf16::from_f32(x)).collect();
            let ids = part("ids")?.iter().map(|&t| t as u32).collect();
            fresh.push(Sequence { prompt, tokens, features, teacher: Teacher { k, ids, p: part("p")? } });
        }
        ensure!(read.len() == all, Weights, "{place}: {all} tensors, {} were expected", read.len());
        let kept = file.tensor(MEMORY).ok();
        let sum = sum(json, kept.as_ref().map(|t| t.data()), read.iter().map(|v| &v[..]));
        ensure!(sum == sha256, Weights, "{place}: damaged: its checksum is another");

        if let Some(t) = kept {
            memory(t.data()).context(|| place.to_string())?;
        }
        self.set(&experts, &header.steps, &header.rates, header.meta, fresh)?;
        (self.stats.updates, self.stats.rows) = (header.updates, header.rows);
        Ok(())
    }
}

/// SHA-256 of all that a file says: it stands in front of the JSON.
fn sum<'a>(json: &str, memory: Option<&[u8]>, tensors: impl Iterator<Item = &'a [f32]>) -> String {
    let parts = [json.as_bytes(), memory.unwrap_or_default()].map(|bytes| Sha256::digest(bytes).to_vec());
    hashed(Sha256::new_with_prefix(parts.concat()), tensors)
}

/// SHA-256 of values, in hexadecimal.
pub(super) fn hash<'a>(values: impl Iterator<Item = &'a [f32]>) -> String {
    hashed(Sha256::new(), values)
}

fn hashed<'a>(mut hash: Sha256, values: impl Iterator<Item = &'a [f32]>) -> String {
    values.for_each(|v| hash.update(bytemuck::cast_slice::<f32, u8>(v)));
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
