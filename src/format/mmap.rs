//! Read-only file maps: how weights reach memory without being copied.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Context, Error, Result, ensure};
use crate::tensor::ByteSource;

/// A whole file, mapped read-only; pages are read when first touched.
///
/// The file must stay as it is while the map lives. If another process overwrites it in place, the weights change under
/// the engine; if it is cut shorter, touching the lost pages kills this process (`SIGBUS` on Unix). Replace model files by
/// writing a new one and renaming it: the map then keeps the old contents. Headers are parsed from the map as well, so
/// everything taken from one is checked once and then remembered, never read again to size or index anything.
pub struct Mapping {
    map: memmap2::Mmap,
}

impl Mapping {
    /// Maps the file at `path`.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let io = |e| Error::io(path.display(), e);
        let file = File::open(path).map_err(io)?;
        ensure!(file.metadata().map_err(io)?.is_file(), Io, "{} is not a regular file", path.display());
        // SAFETY: the map is private and read-only. That nobody changes the file meanwhile is the user's part of the bargain,
        // stated above; no reference derived from the map is relied upon to keep a value once checked.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Ok(Arc::new(Self { map }))
    }
}

impl ByteSource for Mapping {
    fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Drops the whole pages inside `range`; they are read again from the file if touched.
    fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            // SAFETY: a plain query without pointers.
            let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(1);
            let (from, to) = (range.start.next_multiple_of(page), range.end.min(self.map.len()) / page * page);
            if from < to {
                // SAFETY: DONTNEED on a private map that was never written to only forgets clean pages: the next read brings
                // the same bytes back from the file. The range is whole pages inside the map.
                let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from) };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// The text of a small file such as `config.json`; refuses more than `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    use std::io::Read;
    let io = |e| Error::io(path.display(), e);
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    ensure!(bytes.len() as u64 <= limit, Config, "{} is larger than {limit} bytes", path.display());
    String::from_utf8(bytes)
        .map_err(|e| Error::with_source(crate::ErrorKind::Config, "not UTF-8", e))
        .context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w");
        let bytes: Vec<u8> = (0..50_000u32).map(|i| (i * 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = Mapping::open(&path).unwrap();
        assert!(map.bytes() == bytes);
        for range in [0..50_000, 1..49_999, 5000..5001, 4096..8192, 0..0] {
            map.release(range);
            assert!(map.bytes() == bytes);
        }
        assert!(Mapping::open(dir.path()).is_err());
    }
}
