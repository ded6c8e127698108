//! Features on disk, so that no answer is run through the model twice.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::engine::Engine;
use crate::error::{Error, Result, ensure};
use crate::rlhf::{FeatureSpec, Tokens};

/// Of a text's hash; two of a million texts share one with probability 1e-27.
const KEY: usize = 16;
/// Of a record's own hash.
const SUM: usize = 4;

type Key = [u8; KEY];

/// Features by model, text and layer. One file for each model, way of computing and way of making features; a record is the key of
/// prompt and answer, d f32, and a checksum. Records are only ever appended: what a killed process left torn is cut off.
pub struct FeatureCache {
    path: PathBuf,
    file: File,
    width: usize,
    at: HashMap<Key, u64>,
    end: u64,
    /// Features that were found and that were not.
    pub found: [u64; 2],
}

impl FeatureCache {
    /// The cache in `folder` for `engine`'s features made as `spec` says. It is made where it is missing.
    ///
    /// # Errors
    /// A file that cannot be read or written, or that is damaged elsewhere than at its end, by name.
    pub fn open(folder: &Path, engine: &Engine, spec: FeatureSpec) -> Result<Self> {
        let device = engine.device().split(',').next().unwrap_or_default();
        let name = Sha256::digest(format!("{} {device} {:?} {spec:?}", engine.fingerprint()?, engine.0.compute));
        let name: String = name.iter().take(8).map(|b| format!("{b:02x}")).collect();
        fs::create_dir_all(folder).map_err(|e| Error::io(folder.display(), e))?;
        Self::read(folder.join(format!("{name}.features")), engine.config().hidden)
    }

    fn read(path: PathBuf, width: usize) -> Result<Self> {
        let io = |e| Error::io(path.display(), e);
        let file = OpenOptions::new().read(true).append(true).create(true).open(&path).map_err(io)?;
        ensure!(file.try_lock().is_ok(), Usage, "{}: in use by another process", path.display());
        let record = (KEY + 4 * width + SUM) as u64;
        let whole = file.metadata().map_err(io)?.len() / record;
        let (mut at, mut end) = (HashMap::new(), 0);
        let mut reader = BufReader::with_capacity(1 << 20, &file);
        let mut bytes = vec![0; record as usize];
        for i in 0..whole {
            reader.read_exact(&mut bytes).map_err(io)?;
            let (body, sum) = bytes.split_at(bytes.len() - SUM);
            if check(body) != sum {
                ensure!(
                    i + 1 == whole,
                    Config,
                    "{}: record {i} is damaged; delete the file, features are computed anew",
                    path.display()
                );
                break;
            }
            at.insert(body[..KEY].try_into().unwrap_or_default(), end);
            end += record;
        }
        drop(reader);
        file.set_len(end).map_err(io)?;
        Ok(Self { file, width, at, end, found: [0; 2], path })
    }

    /// Features that it holds.
    pub fn len(&self) -> usize {
        self.at.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.at.is_empty()
    }

    /// The feature of an answer, if it is there.
    ///
    /// # Errors
    /// The file's.
    pub fn get(&mut self, prompt: &[u32], answer: &Tokens) -> Result<Option<Vec<f32>>> {
        let found = self.at.get(&key(prompt, answer)).copied();
        self.found[usize::from(found.is_none())] += 1;
        let Some(at) = found else { return Ok(None) };
        let mut values = vec![0f32; self.width];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        let io = |e| Error::io(self.path.display(), e);
        self.file.seek(SeekFrom::Start(at + KEY as u64)).map_err(io)?;
        self.file.read_exact(bytes).map_err(io)?;
        Ok(Some(values))
    }

    /// Keeps a feature.
    ///
    /// # Errors
    /// Another width; the file's, which is then as it was.
    pub fn put(&mut self, prompt: &[u32], answer: &Tokens, feature: &[f32]) -> Result<()> {
        let (n, d) = (feature.len(), self.width);
        ensure!(n == d, Shape, "a feature of width {n} for a cache of width {d}");
        let key = key(prompt, answer);
        if self.at.contains_key(&key) {
            return Ok(());
        }
        let mut record = [&key[..], bytemuck::cast_slice(feature)].concat();
        record.extend(check(&record));
        if let Err(e) = self.file.write_all(&record) {
            // Half a record would hide those behind it.
            let _ = self.file.set_len(self.end);
            return Err(Error::io(self.path.display(), e));
        }
        self.at.insert(key, self.end);
        self.end += record.len() as u64;
        Ok(())
    }
}

fn key(prompt: &[u32], answer: &Tokens) -> Key {
    let mut hash = Sha256::new();
    for part in [prompt, &answer.ids, answer.end.as_slice()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(bytemuck::cast_slice::<u32, u8>(part));
    }
    let mut key = Key::default();
    key.copy_from_slice(&hash.finalize()[..KEY]);
    key
}

fn check(body: &[u8]) -> [u8; SUM] {
    let mut sum = [0; SUM];
    sum.copy_from_slice(&Sha256::digest(body)[..SUM]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ids: &[u32]) -> Tokens {
        Tokens { ids: ids.into(), end: Some(2) }
    }

    #[test]
    fn features_come_back_and_a_torn_end_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.features");
        let mut cache = FeatureCache::read(path.clone(), 3).unwrap();
        cache.put(&[1, 2], &answer(&[3]), &[0.5, -0.0, f32::MIN_POSITIVE]).unwrap();
        cache.put(&[1], &answer(&[2, 3]), &[4.0; 3]).unwrap();
        cache.put(&[1], &answer(&[2, 3]), &[5.0; 3]).unwrap();
        assert!(cache.put(&[1], &answer(&[9]), &[5.0; 2]).is_err());
        let size = fs::metadata(&path).unwrap().len();
        drop(cache);
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(&[7; 20]).unwrap();
        let mut cache = FeatureCache::read(path.clone(), 3).unwrap();
        assert_eq!((cache.len(), fs::metadata(&path).unwrap().len()), (2, size));
        assert_eq!(cache.get(&[1], &answer(&[2, 3])).unwrap(), Some(vec![4.0; 3]));
        assert_eq!(cache.get(&[1, 2], &answer(&[3])).unwrap(), Some(vec![0.5, -0.0, f32::MIN_POSITIVE]));
        assert_eq!(cache.get(&[1, 2], &Tokens { ids: vec![3], end: None }).unwrap(), None);
        assert_eq!(cache.found, [2, 1]);
        drop(cache);
        // Damage in the middle is no torn end.
        let mut bytes = fs::read(&path).unwrap();
        bytes[20] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let e = FeatureCache::read(path, 3).map(drop).unwrap_err().to_string();
        assert!(e.contains("x.features: record 0 is damaged"), "{e}");
    }
}
