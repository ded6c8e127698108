//! Keys and values of one sequence on the device.

use super::device::Stream;
use super::memory::CudaBuf;
use crate::backend::{Buffer, Mask, Segment};
use crate::error::{Result, ensure};
use half::bf16;
use std::sync::Arc;

use super::Cuda;
use super::args::Seg;

/// bf16, layer after layer: keys `[capacity, kv_dim]`, then values alike.
pub struct CudaKv {
    pub(super) data: CudaBuf<bf16>,
    pub(super) layers: usize,
    pub(super) capacity: usize,
    pub(super) kv_dim: usize,
}

impl CudaKv {
    pub(super) fn alloc(stream: &Arc<Stream>, layers: usize, capacity: usize, kv_dim: usize) -> Result<Self> {
        let n = [2, layers, capacity, kv_dim].into_iter().try_fold(1usize, usize::checked_mul);
        let n = n.filter(|n| *n <= usize::MAX / 4).ok_or_else(|| {
            let says =
                format!("a cache of {layers} layers, {capacity} rows and {kv_dim} columns exceeds the address space");
            crate::error::Error::new(crate::error::ErrorKind::Capacity, says)
        })?;
        Ok(Self { data: CudaBuf::zeros(stream, n)?, layers, capacity, kv_dim })
    }

    /// The first `len` rows of side `side` (0 keys, 1 values) of a layer.
    fn rows(&self, layer: usize, side: usize, len: usize) -> std::ops::Range<usize> {
        let at = (2 * layer + side) * self.capacity * self.kv_dim;
        at..at + len * self.kv_dim
    }

    pub(super) fn copy_from(&mut self, stream: &Stream, src: &Self, len: usize) -> Result<()> {
        ensure!(
            (self.layers, self.kv_dim) == (src.layers, src.kv_dim) && len <= self.capacity.min(src.capacity),
            Shape,
            "{len} rows of a cache [{}, {}, {}] do not fit one of [{}, {}, {}]",
            src.layers,
            src.capacity,
            src.kv_dim,
            self.layers,
            self.capacity,
            self.kv_dim
        );
        for layer in 0..self.layers {
            for side in 0..2 {
                let to = self.rows(layer, side, len);
                stream.copy(self.data.view_mut(to), src.data.view(src.rows(layer, side, len)))?;
            }
        }
        Ok(())
    }
}

/// The table of a pass's segments as the kernels read it, and its trees' ancestor words one after another; addresses of the
/// words are filled in by the caller, who knows where they lie.
pub(super) fn table(segments: &[Segment<'_, Cuda>]) -> Result<(Vec<Seg>, Vec<u32>)> {
    let (mut table, mut bits, mut first) = (Vec::with_capacity(segments.len()), Vec::new(), 0);
    for s in segments {
        let (kv, rows, all) = (&*s.kv, s.rows, s.staged + s.rows);
        let (at, end) = (s.range().start, s.range().end);
        ensure!(end <= kv.capacity, Capacity, "{rows} rows behind {at} exceed a cache of {}", kv.capacity);
        s.mask.check(all)?;
        let (mask, block, words) = match s.mask {
            Mask::Causal => (0, 0, 0),
            Mask::Full => (1, 0, 0),
            Mask::Tree(_) => (2, 0, all.div_ceil(64)),
            Mask::Blocks { block, offset } => (3, block, offset),
        };
        // The offset for now; never 0 once the address is added.
        let at = bits.len() * 4;
        if let Mask::Tree(t) = s.mask {
            bits.extend((0..all).flat_map(|i| t.row(i)).flat_map(|w| [*w as u32, (*w >> 32) as u32]));
        }
        if rows > 0 {
            table.push(Seg {
                kv: kv.data.address(),
                bits: at as u64,
                past: s.past as u32,
                staged: s.staged as u32,
                rows: rows as u32,
                first,
                mask,
                capacity: kv.capacity as u32,
                block: block as u32,
                words: words as u32,
            });
        }
        first += rows as u32;
    }
    Ok((table, bits))
}
