//! Which model a reward belongs to.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::engine::Engine;
use crate::error::{Error, Result};

/// Files up to this size are read whole, of larger ones so many bytes at each end and in between.
const WHOLE: u64 = 4 << 20;
const PIECES: u64 = 256;
const PIECE: u64 = 4096;

impl Engine {
    /// What tells this model, with its tokenizer, template and adapter, from any other: a hash of its files, large ones by samples
    /// that no training leaves as they were. Hexadecimal. A model that came from no file has that of its configuration.
    ///
    /// # Errors
    /// A file that can no longer be read, by name.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Sha256::new();
        match &self.0.path {
            Some(path) => add(&mut hash, path)?,
            None => hash.update(format!("{:?}", self.config())),
        }
        if let Some(adapter) = &self.0.adapter {
            add(&mut hash, adapter)?;
        }
        Ok(hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect())
    }
}

fn add(hash: &mut Sha256, path: &Path) -> Result<()> {
    let io = |e| Error::io(path.display(), e);
    if !path.is_dir() {
        return sample(hash, path).map_err(io);
    }
    let entries = fs::read_dir(path).map_err(io)?.map(|e| e.map(|e| e.path()));
    let mut files: Vec<PathBuf> = entries.collect::<std::io::Result<_>>().map_err(io)?;
    files.retain(|f| f.extension().is_some_and(|e| ["json", "safetensors", "jinja"].iter().any(|x| e == *x)));
    files.sort();
    for file in files {
        hash.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        sample(hash, &file).map_err(|e| Error::io(file.display(), e))?;
    }
    Ok(())
}

fn sample(hash: &mut Sha256, path: &Path) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    hash.update(size.to_le_bytes());
    let mut buffer = Vec::new();
    if size <= 2 * WHOLE {
        file.read_to_end(&mut buffer)?;
        hash.update(&buffer);
        return Ok(());
    }
    let between = (0..PIECES).map(|i| (WHOLE + i * ((size - 2 * WHOLE) / PIECES), PIECE));
    // Headers of GGUF files hold the tokenizer, which may be larger than a piece.
    for (at, n) in std::iter::once((0, WHOLE)).chain(between).chain([(size - WHOLE, WHOLE)]) {
        file.seek(SeekFrom::Start(at))?;
        buffer.clear();
        (&mut file).take(n).read_to_end(&mut buffer)?;
        hash.update(&buffer);
    }
    Ok(())
}
