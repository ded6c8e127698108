//! Memory for repacked weights: cut one after another from large anonymous maps that the system backs with huge pages.
//!
//! A token reads every weight once, in order; with 4 KiB pages the page walks cost a good part of the bandwidth. One
//! matrix is often smaller than a huge page (2 MiB), so matrices share maps.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, ErrorKind, Result};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Address space taken at a time. Pages cost memory only once they are written.
const SLAB: usize = 64 << 20;
/// Alignment of every allocation: a cache line.
const LINE: usize = 64;

/// An anonymous map; freed when the last allocation in it is.
struct Slab {
    base: *mut u8,
    len: usize,
    map: memmap2::MmapMut,
}

// SAFETY: a slab never touches its memory; its parts belong to one `AlignedBytes` each.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    fn new(bytes: usize) -> Result<Arc<Self>> {
        let failed =
            |e| Error::with_source(ErrorKind::Capacity, format!("cannot reserve {bytes} bytes for weights"), e);
        let mut map = memmap2::MmapMut::map_anon(bytes + HUGE).map_err(failed)?;
        // Advice only: without huge pages the weights are read a little slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let skip = map.as_ptr().align_offset(HUGE).min(HUGE);
        let base = map[skip..].as_mut_ptr();
        Ok(Arc::new(Self { base, len: bytes, map }))
    }
}

/// Where allocations come from.
#[derive(Default)]
pub struct Arena(Mutex<Option<(Arc<Slab>, usize)>>);

impl Arena {
    /// `len` zero bytes, aligned to a cache line, on huge pages where the system has them.
    ///
    /// # Errors
    /// If the system has no memory left.
    pub fn alloc(&self, len: usize) -> Result<AlignedBytes> {
        let size = len.div_ceil(LINE) * LINE;
        if size > SLAB / 2 {
            let slab = Slab::new(size)?;
            return Ok(AlignedBytes { slab, at: 0, len });
        }
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (slab, at) = match open.take() {
            Some((slab, used)) if size <= slab.len - used => (slab, used),
            _ => (Slab::new(SLAB)?, 0),
        };
        *open = Some((slab.clone(), at + size));
        Ok(AlignedBytes { slab, at, len })
    }

    /// Gives the pages behind the last allocation back, most of a huge page. Later allocations take a fresh map.
    pub fn seal(&self) {
        let Some((slab, used)) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        #[cfg(target_os = "linux")]
        {
            let from = (slab.base as usize - slab.map.as_ptr() as usize + used).next_multiple_of(4096);
            let rest = slab.map.len().saturating_sub(from);
            // SAFETY: no allocation reaches behind `used`, and none will, since the slab is no longer open.
            let _ = unsafe { slab.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, rest) };
        }
    }
}

/// Bytes of an [`Arena`], aligned to a cache line.
pub struct AlignedBytes {
    slab: Arc<Slab>,
    at: usize,
    len: usize,
}

impl Deref for AlignedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the arena gave these bytes of a live, zero-initialised map to this value alone.
        unsafe { std::slice::from_raw_parts(self.slab.base.add(self.at), self.len) }
    }
}

impl DerefMut for AlignedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.slab.base.add(self.at), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_zero_and_disjoint() {
        let arena = Arena::default();
        let mut parts: Vec<_> = [1, 63, 64, 65, 1 << 20, SLAB, 5].map(|n| arena.alloc(n).unwrap()).into();
        for (i, p) in parts.iter_mut().enumerate() {
            assert!(p.as_ptr().is_aligned_to_line() && p.iter().all(|&b| b == 0));
            p.fill(i as u8 + 1);
        }
        arena.seal();
        let mut late = arena.alloc(1 << 20).unwrap();
        late.fill(9);
        drop(arena);
        assert!(late.iter().all(|&b| b == 9));
        assert!(parts.iter().enumerate().all(|(i, p)| p.iter().all(|&b| b == i as u8 + 1)));
    }

    trait Line {
        fn is_aligned_to_line(&self) -> bool;
    }
    impl Line for *const u8 {
        fn is_aligned_to_line(&self) -> bool {
            (*self as usize).is_multiple_of(LINE)
        }
    }
}
