//! Where a training run stands, on disk: `DIR/step-00000100/` with `state.json` and `state.safetensors`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Optimizer;
use super::data::Cursor;
use crate::backend::{Buffer, Train};
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::files::{Hashing, TensorBytes, find_folder, read_f32, write_folder, write_tensors};
use crate::model::Param;

const STATE: &str = "state.json";
const TENSORS: &str = "state.safetensors";
/// Of the layout of these files; a reader refuses another.
const VERSION: u32 = 1;

/// A tensor of a checkpoint: name, shape, values.
pub type NamedTensor = (String, Vec<usize>, Vec<f32>);

/// All that a run needs to go on as if it had never stopped.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Steps done.
    pub step: u64,
    /// The next batch.
    pub cursor: Cursor,
    /// Seed of the run.
    pub seed: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// The resolved settings of the run.
    pub config: serde_json::Value,
    /// Parameters and the optimiser's state: name, shape, values.
    pub tensors: Vec<NamedTensor>,
}

#[derive(Serialize, Deserialize)]
struct State {
    version: u32,
    step: u64,
    cursor: Cursor,
    seed: u64,
    tokens: u64,
    config: serde_json::Value,
    /// Of the file of tensors.
    bytes: u64,
    sha256: String,
}

impl Checkpoint {
    /// Of parameters and their optimiser.
    ///
    /// # Errors
    /// The device's.
    pub(crate) fn take<B: Train>(
        be: &B,
        params: &[&Param<B>],
        optimizer: &Optimizer<B>,
        cursor: Cursor,
        seed: u64,
        tokens: u64,
        config: serde_json::Value,
    ) -> Result<Self> {
        let mut tensors = Vec::new();
        for p in params {
            tensors.push((p.name.clone(), p.shape.to_vec(), p.to_host(be)?));
        }
        tensors.extend(optimizer.to_host(be, params.iter().copied())?);
        Ok(Self { step: optimizer.steps(), cursor, seed, tokens, config, tensors })
    }

    /// Sets parameters and their optimiser, to the last bit where the device keeps f32.
    ///
    /// # Errors
    /// A tensor that the checkpoint lacks or has in another size.
    pub(crate) fn give<B: Train>(
        &self,
        be: &B,
        params: &mut [&mut Param<B>],
        optimizer: &mut Optimizer<B>,
    ) -> Result<()> {
        let find = |name: &str, n: usize| -> Result<&[f32]> {
            let found = self.tensors.iter().find(|t| t.0 == name).map(|t| &t.2[..]);
            let missing = || Error::new(ErrorKind::Weights, format!("the checkpoint has no tensor {name}"));
            let values = found.ok_or_else(missing)?;
            ensure!(values.len() == n, Weights, "{name} has {} values in the checkpoint, {n} here", values.len());
            Ok(values)
        };
        for p in &mut *params {
            let n = p.len();
            be.upload_acc(p.w.head_mut(n), find(&p.name, n)?)?;
        }
        optimizer.restore(be, params.iter().map(|p| &**p), self.step, find).context(|| "optimiser".into())
    }

    /// The newest in `dir`, for a run that is to go on there; `None` where there is none.
    ///
    /// # Errors
    /// `Usage` where there is one and the run is not to go on with it; a damaged one.
    pub fn to_resume(dir: &Path, resume: bool) -> Result<Option<Self>> {
        let newest = Self::latest(dir)?;
        if let (Some(path), false) = (&newest, resume) {
            let at = path.display();
            bail!(Usage, "{at} is of an earlier run: --resume goes on with it, another --out begins anew");
        }
        newest.map(|p| Self::load(&p)).transpose()
    }

    /// Saves into `dir`, whole or not at all, then removes all but the `keep` newest (this one always stays). Returns the
    /// new folder.
    pub fn save(&self, dir: &Path, keep: usize) -> Result<PathBuf> {
        let folder = dir.join(format!("step-{:08}", self.step));
        write_folder(&folder, |files| {
            let mut written = (0, String::new());
            files.write(TENSORS, |out| {
                let tensors: Vec<_> = self.tensors.iter().map(|(n, s, v)| TensorBytes::f32(n, s, v)).collect();
                let mut out = Hashing::new(out);
                write_tensors(&mut out, &tensors, None)?;
                written = (out.bytes(), out.finish());
                Ok(())
            })?;
            let (bytes, sha256) = written;
            let (cursor, config) = (self.cursor, self.config.clone());
            let (step, seed, tokens) = (self.step, self.seed, self.tokens);
            let state = State { version: VERSION, step, cursor, seed, tokens, config, bytes, sha256 };
            files.write(STATE, |out| {
                serde_json::to_writer_pretty(&mut *out, &state)?;
                out.write_all(b"\n")
            })
        })?;
        let others = steps(dir)?.into_iter().rev().filter(|(step, _)| *step != self.step);
        for (_, path) in others.skip(keep.saturating_sub(1)) {
            fs::remove_dir_all(&path).map_err(|e| Error::io(path.display(), e))?;
        }
        Ok(folder)
    }

    /// Reads a folder that [`Checkpoint::save`] wrote, bit for bit.
    ///
    /// # Errors
    /// A file that is missing, cut short or changed since, by name.
    pub fn load(folder: &Path) -> Result<Self> {
        let folder = find_folder(folder);
        let state = read_state(&folder)?;
        let path = folder.join(TENSORS);
        let (tensors, sha256) = read_f32(&path)?;
        let same = sha256 == state.sha256;
        ensure!(same, Weights, "{}: damaged; its SHA-256 is not the one in {STATE}", path.display());
        let State { step, cursor, seed, tokens, config, .. } = state;
        Ok(Self { step, cursor, seed, tokens, config, tensors })
    }

    /// The newest complete checkpoint in `dir`; `None` where there is none. What a killed run left unfinished is passed over.
    pub fn latest(dir: &Path) -> Result<Option<PathBuf>> {
        let complete = |path: &PathBuf| {
            let bytes = fs::metadata(path.join(TENSORS)).map_or(0, |m| m.len());
            read_state(path).is_ok_and(|state| state.bytes == bytes)
        };
        Ok(steps(dir)?.into_iter().rev().map(|(_, path)| path).find(complete))
    }
}

fn read_state(folder: &Path) -> Result<State> {
    let path = folder.join(STATE);
    let text = fs::read(&path).map_err(|e| Error::io(path.display(), e))?;
    let damaged = |e| Error::with_source(ErrorKind::Config, "not the state of a training run", e);
    let state: State = serde_json::from_slice(&text).map_err(damaged).context(|| path.display().to_string())?;
    if state.version != VERSION {
        bail!(Unsupported, "{}: version {}; this build reads {VERSION}", path.display(), state.version);
    }
    Ok(state)
}

/// The folders `step-N` in `dir` by step; one that was being replaced counts under the name it had.
fn steps(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let io = |e| Error::io(dir.display(), e);
    let mut found = Vec::new();
    if !dir.exists() {
        return Ok(found);
    }
    for entry in fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix("step-"));
        let number =
            name.map(|n| n.strip_suffix(".old").unwrap_or(n)).filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
        if let Some(step) = number.and_then(|n| n.parse().ok()) {
            found.push((step, path));
        }
    }
    // "step-1.old" sorts behind "step-1": of the two, the newer is wanted first from the end.
    found.sort_by(|(a, x), (b, y)| a.cmp(b).then(y.cmp(x)));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn at(step: u64) -> Checkpoint {
        let mut rng = Rng::new(step);
        let mut values: Vec<f32> =
            (0..40_000).map(|_| f32::from_bits(rng.next_u32())).filter(|x| !x.is_nan()).collect();
        values.truncate(30_000);
        Checkpoint {
            step,
            cursor: Cursor { epoch: 3, position: 17 },
            seed: u64::MAX - 1,
            tokens: 1 << 60,
            config: serde_json::json!({"rate": 3e-4, "kind": "lora", "r": 8}),
            tensors: vec![("b".into(), vec![100, 300], values), ("a/m".into(), vec![2], vec![-0.0, 1e-42])],
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut v: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        v.sort();
        v
    }

    #[test]
    fn a_run_comes_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let folder = at(5).save(dir.path(), 2).unwrap();
        let (read, written) = (Checkpoint::load(&folder).unwrap(), at(5));
        assert_eq!(read, written);
        let bits =
            |c: &Checkpoint| -> Vec<u32> { c.tensors.iter().flat_map(|t| t.2.iter().map(|x| x.to_bits())).collect() };
        assert_eq!(bits(&read), bits(&written));
        assert_eq!(folder.file_name().unwrap(), "step-00000005");
    }

    #[test]
    fn the_last_n_stay_and_the_newest_complete_one_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let latest = || Checkpoint::latest(dir.path()).unwrap();
        let name = |path: Option<PathBuf>| path.unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(Checkpoint::latest(&dir.path().join("nowhere")).unwrap(), None);
        assert_eq!(latest(), None);
        for step in [1, 2, 10, 9, 100_000_000] {
            at(step).save(dir.path(), 3).unwrap();
        }
        assert_eq!(names(dir.path()), ["step-00000009", "step-00000010", "step-100000000"]);
        // Not checkpoints, or not complete ones.
        fs::create_dir(dir.path().join("step-200000000")).unwrap();
        fs::create_dir(dir.path().join("step-300000000.tmp-x")).unwrap();
        fs::write(dir.path().join("step-notes"), "x").unwrap();
        assert_eq!(name(latest()), "step-100000000");
        let tensors = dir.path().join("step-100000000").join(TENSORS);
        let bytes = fs::read(&tensors).unwrap();
        fs::write(&tensors, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(name(latest()), "step-00000010");
        // Killed between two renames while it wrote step 10 anew.
        fs::rename(dir.path().join("step-00000010"), dir.path().join("step-00000010.old")).unwrap();
        assert_eq!(name(latest()), "step-00000010.old");
        assert_eq!(Checkpoint::load(&dir.path().join("step-00000010")).unwrap(), at(10));
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = at(7).save(dir.path(), 1).unwrap();
        let says = |what: &[&str]| {
            let e = Checkpoint::load(&folder).unwrap_err().to_string();
            assert!(what.iter().all(|w| e.contains(w)), "{e}");
        };
        let path = folder.join(TENSORS);
        let bytes = fs::read(&path).unwrap();
        let mut flipped = bytes.clone();
        flipped[bytes.len() / 2] ^= 1;
        fs::write(&path, flipped).unwrap();
        says(&[TENSORS, "SHA-256"]);
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        says(&[TENSORS, "\"b\""]);
        fs::remove_file(&path).unwrap();
        says(&[TENSORS]);
        fs::write(&path, &bytes).unwrap();
        let state = fs::read_to_string(folder.join(STATE)).unwrap();
        fs::write(folder.join(STATE), state.replace("\"version\": 1", "\"version\": 2")).unwrap();
        says(&[STATE, "version 2"]);
        fs::write(folder.join(STATE), &state[..state.len() / 2]).unwrap();
        says(&[STATE]);
    }
}
