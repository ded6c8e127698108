//! The operations on caches.

use super::super::inputs::{Storage, normals};
use super::super::ops::{Attn, MaskKind, Op};
use super::{LAYERS, Prepared, upload_acc};
use crate::backend::{Backend, Buffer, Mask, Segment, TreeMask};
use crate::error::Result;
use crate::rng::Rng;

impl<B: Backend> Prepared<'_, B> {
    /// Every layer of every cache gets the same random rows.
    pub(super) fn fill_caches(&mut self, a: &Attn, rng: &mut Rng, storage: Storage) -> Result<()> {
        let (layers, dim) = (self.copies.max(LAYERS), a.spec.kv_dim());
        for &(past, rows) in a.segments {
            let parents: Vec<u32> =
                (0..(a.staged + rows) as u32).map(|i| if i == 0 { TreeMask::ROOT } else { (i - 1) / 2 }).collect();
            self.tree.push(TreeMask::new(&parents)?);
            let n = past + a.staged + rows;
            let mut side = || {
                let mut x = normals(rng, n * dim);
                storage.round(&mut x, 1);
                upload_acc(self.be, &x)
            };
            let (k, v) = (side()?, side()?);
            let mut kv = self.be.kv_alloc(layers, n, dim)?;
            let spare = self.be.kv_alloc(layers, n, dim)?;
            for layer in 0..layers {
                let segment = Segment { kv: &mut kv, past: 0, staged: 0, rows: n, mask: Mask::Causal };
                self.be.kv_stage(&mut [segment], layer, k.head(n * dim), v.head(n * dim))?;
            }
            self.kv.push(kv);
            self.spare.push(spare);
        }
        Ok(())
    }

    pub(super) fn step_cached(&mut self, a: &Attn, layer: usize, composed: bool) -> Result<()> {
        let Self { be, acc, act, kv, spare, tree, id_buffers, .. } = self;
        let [q, k, v, table] = &mut acc[..] else { unreachable!("attention has four buffers") };
        let (nq, nk) = (q.len(), k.len());
        match self.op {
            Op::KvCommitBatch(_) if !composed => {
                let (path, n) = (&id_buffers[0], a.segments.len());
                let (all, stride) = (path.len(), path.len() / n);
                let mut s = segments(a, kv, tree);
                be.kv_commit_batch(&mut s, path.head(all), id_buffers[1].head(n), stride)
            }
            Op::KvCommit(_) | Op::KvCommitBatch(_) => {
                for (kv, &(past, rows)) in kv.iter_mut().zip(a.segments) {
                    let kept: Vec<u32> = (0..rows as u32).step_by(2).collect();
                    be.kv_commit(kv, past, &kept)?;
                }
                Ok(())
            }
            Op::KvCopy(_) => {
                for ((kv, spare), &(past, rows)) in kv.iter().zip(spare).zip(a.segments) {
                    be.kv_copy(spare, kv, past + rows)?;
                }
                Ok(())
            }
            _ => {
                let mut s = segments(a, kv, tree);
                match self.op {
                    Op::KvStage(_) => be.kv_stage(&mut s, layer, k.head(nk), v.head(nk)),
                    Op::RopeStage(_) if composed => {
                        let t = table.head(table.len());
                        be.rope(q.head_mut(nq), t, a.spec.head_dim)?;
                        be.rope(k.head_mut(nk), t, a.spec.head_dim)?;
                        be.kv_stage(&mut s, layer, k.head(nk), v.head(nk))
                    }
                    Op::RopeStage(_) => be.rope_stage(q, k, v, table.head(table.len()), &mut s, layer, &a.spec),
                    _ => be.attention(act[0].head_mut(nq), q.head(nq), &s, layer, &a.spec),
                }
            }
        }
    }
}

/// Of a sequence whose tree is this.
pub(super) fn mask(kind: MaskKind, tree: &TreeMask) -> Mask<'_> {
    match kind {
        MaskKind::Causal => Mask::Causal,
        MaskKind::Full => Mask::Full,
        MaskKind::Tree => Mask::Tree(tree),
        MaskKind::Blocks { block, offset } => Mask::Blocks { block, offset },
    }
}

/// Those of a pass.
pub(super) fn segments<'a, B: Backend>(a: &Attn, kv: &'a mut [B::Kv], tree: &'a [TreeMask]) -> Vec<Segment<'a, B>> {
    let parts = kv.iter_mut().zip(tree).zip(a.segments);
    let staged = a.staged;
    parts.map(|((kv, tree), &(past, rows))| Segment { kv, past, staged, rows, mask: mask(a.mask, tree) }).collect()
}
