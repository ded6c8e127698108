//! The cache of keys and values of one sequence: a committed prefix and a staged tail.
//!
//! One contract serves every decoder. Autoregressive decoding stages a token and commits it; speculation stages a tree, at once
//! or level by level, and commits a path; diffusion stages a block and commits none, a few or all of it. A forward pass never changes the
//! committed part, so a step can be abandoned for free.

use super::config::ModelConfig;
use crate::backend::{Backend, Buffer, Mask, Segment};
use crate::error::{Result, ensure};

/// Keys and values of all layers of one sequence.
pub struct KvCache<B: Backend> {
    pub(super) kv: B::Kv,
    pub(super) staged: usize,
    len: usize,
    capacity: usize,
    layers: usize,
    dim: usize,
}

impl<B: Backend> KvCache<B> {
    /// Room for `capacity` rows; memory is touched as they arrive.
    pub fn new(be: &B, cfg: &ModelConfig, capacity: usize) -> Result<Self> {
        let (layers, dim) = (cfg.layers, cfg.kv_dim());
        Ok(Self { kv: be.kv_alloc(layers, capacity, dim)?, staged: 0, len: 0, capacity, layers, dim })
    }

    /// Committed rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is committed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Rows the last forward pass wrote, and those before it that it [extended](super::Sequence::extend), not yet kept.
    pub fn staged(&self) -> usize {
        self.staged
    }

    /// The most rows it can hold, committed and staged together.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Keeps these staged rows, in this order, and drops the rest.
    ///
    /// # Errors
    /// Rows that are not staged, or not strictly ascending (a path down a tree always is).
    pub fn commit(&mut self, be: &B, rows: &[u32]) -> Result<()> {
        let ascending = rows.windows(2).all(|w| w[0] < w[1]);
        let known = rows.last().is_none_or(|&r| (r as usize) < self.staged);
        ensure!(ascending && known, Shape, "cannot commit rows {rows:?} of {} staged ones", self.staged);
        if rows.iter().enumerate().any(|(i, &r)| i != r as usize) {
            be.kv_commit(&mut self.kv, self.len, rows)?;
        }
        self.len += rows.len();
        self.staged = 0;
        Ok(())
    }

    /// Keeps in each cache the staged rows that verification found, at one go: those of `path[s * stride..][..counts[s]]`, as
    /// [`Backend::verify_tree`] wrote them. Returns the counts, which had to come to the host.
    ///
    /// # Errors
    /// The device's.
    pub fn commit_batch(
        be: &B,
        caches: &mut [&mut Self],
        path: &B::Buf<u32>,
        counts: &B::Buf<u32>,
        stride: usize,
    ) -> Result<Vec<u32>> {
        let n = caches.len();
        let mut segments: Vec<Segment<'_, B>> = caches
            .iter_mut()
            .map(|c| Segment { past: c.len, staged: 0, rows: c.staged, kv: &mut c.kv, mask: Mask::Causal })
            .collect();
        be.kv_commit_batch(&mut segments, path.head(n * stride), counts.head(n), stride)?;
        let mut kept = vec![0; n];
        be.download(counts.head(n), &mut kept)?;
        for (c, n) in caches.iter_mut().zip(&kept) {
            c.commit_first(*n as usize)?;
        }
        Ok(kept)
    }

    /// Keeps the first `n` staged rows: nothing moves.
    pub fn commit_first(&mut self, n: usize) -> Result<()> {
        ensure!(n <= self.staged, Shape, "cannot commit {n} rows of {} staged ones", self.staged);
        self.len += n;
        self.staged = 0;
        Ok(())
    }

    /// Forgets all committed rows from `len` on, and all staged ones.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.staged = 0;
    }

    /// A second cache with the same committed rows and capacity: several continuations of one prompt.
    pub fn fork(&self, be: &B) -> Result<Self> {
        let mut kv = be.kv_alloc(self.layers, self.capacity, self.dim)?;
        be.kv_copy(&mut kv, &self.kv, self.len)?;
        Ok(Self { kv, staged: 0, ..*self })
    }

    /// Takes over the first `len` committed rows of `other` in place of its own.
    ///
    /// # Errors
    /// Rows that `other` has not, or that do not fit; a cache of another shape.
    pub fn follow(&mut self, be: &B, other: &Self, len: usize) -> Result<()> {
        let fits = len <= other.len && len <= self.capacity && (self.layers, self.dim) == (other.layers, other.dim);
        ensure!(fits, Shape, "cannot take over {len} rows of {} into {}", other.len, self.capacity);
        be.kv_copy(&mut self.kv, &other.kv, len)?;
        (self.len, self.staged) = (len, 0);
        Ok(())
    }
}
