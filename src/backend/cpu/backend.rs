//! [`Cpu`]: the ops of [`Backend`] on this machine's cores.

use super::attention::{SegView, attention};
use super::kv::CpuKv;
use super::matmul::{Job, MatmulCx, PackedWeight, Scratch, linear, linear_glu, linear_many};
use super::memory::Arena;
use super::pool::Pool;
use super::rows;
use super::{Compute, Tier};
use crate::backend::host::HostBuf;
use crate::backend::{AttnSpec, Backend, Linear, Segment};
use crate::dtype::Elem;
use crate::error::Result;
use crate::model::config::Activation;
use crate::tensor::HostTensor;

/// The native backend. Results do not depend on the number of threads, nor a row's on the number of rows in the pass.
pub struct Cpu {
    pool: Pool,
    tier: Tier,
    compute: Compute,
    scratch: Scratch,
    arena: Arena,
}

impl Cpu {
    /// A backend of `threads` threads that uses `tier`, which must be among [`Tier::available`].
    pub fn with(threads: usize, tier: Tier, compute: Compute) -> Self {
        assert!(tier <= Tier::detect(), "this machine has no {tier} instructions");
        Self { pool: Pool::new(threads), tier, compute, scratch: Scratch::default(), arena: Arena::default() }
    }

    /// Its threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Its instructions.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    fn cx(&self) -> MatmulCx<'_> {
        MatmulCx { pool: &self.pool, tier: self.tier, compute: self.compute, scratch: &self.scratch }
    }
}

impl Backend for Cpu {
    type Act = f32;
    type Acc = f32;
    type Buf<T: Elem> = HostBuf<T>;
    type Weight = PackedWeight;
    type Kv = CpuKv;

    fn alloc<T: Elem>(&self, n: usize) -> Result<HostBuf<T>> {
        Ok(HostBuf::zeros(n))
    }

    fn upload<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        dst.copy_from_slice(src);
        Ok(())
    }

    fn download<T: Elem>(&self, src: &[T], dst: &mut [T]) -> Result<()> {
        dst.copy_from_slice(src);
        Ok(())
    }

    fn upload_acc(&self, dst: &mut [f32], src: &[f32]) -> Result<()> {
        self.upload(dst, src)
    }

    fn download_acc(&self, src: &[f32], dst: &mut [f32]) -> Result<()> {
        self.download(src, dst)
    }

    fn weight(&self, t: HostTensor) -> Result<PackedWeight> {
        PackedWeight::pack(t, &self.pool, &self.arena)
    }

    fn weights_done(&self) {
        self.arena.seal();
    }

    fn embed(&self, y: &mut [f32], table: &PackedWeight, tokens: &[u32], scale: f32) -> Result<()> {
        let d = y.len() / tokens.len().max(1);
        for (y, &t) in y.chunks_exact_mut(d.max(1)).zip(tokens) {
            table.row_f32(t as usize, y);
            if scale != 1.0 {
                y.iter_mut().for_each(|y| *y *= scale);
            }
        }
        Ok(())
    }

    fn gather_rows(&self, y: &mut [f32], x: &[f32], rows: &[u32], d: usize) -> Result<()> {
        rows::gather_rows(y, x, rows, d)
    }

    fn add(&self, x: &mut [f32], r: &[f32]) -> Result<()> {
        rows::add(&self.pool, self.tier, x, r)
    }

    fn rms_norm(&self, y: &mut [f32], x: &[f32], w: &HostBuf<f32>, eps: f32) -> Result<()> {
        rows::rms_norm(&self.pool, self.tier, y, x, w, eps)
    }

    fn add_rms_norm(
        &self,
        y: &mut [f32],
        x: &mut HostBuf<f32>,
        r: &[f32],
        w: &HostBuf<f32>,
        rows: usize,
        eps: f32,
    ) -> Result<()> {
        let n = rows * w.len();
        rows::add_rms_norm(&self.pool, self.tier, y, &mut x[..n], r, w, eps)
    }

    fn add_normed(&self, x: &mut [f32], r: &[f32], w: &HostBuf<f32>, eps: f32) -> Result<()> {
        rows::add_normed(&self.pool, self.tier, x, r, w, eps)
    }

    fn head_norm(&self, x: &mut [f32], w: &HostBuf<f32>, eps: f32) -> Result<()> {
        rows::head_norm(&self.pool, self.tier, x, w, eps)
    }

    fn linear(&self, y: &mut [f32], x: &[f32], w: &PackedWeight, bias: Option<&HostBuf<f32>>) -> Result<()> {
        linear(&self.cx(), y, x, w, bias.map(|b| &b[..]))
    }

    fn qkv(&self, q: &mut [f32], k: &mut [f32], v: &mut [f32], x: &[f32], w: [&Linear<Self>; 3]) -> Result<()> {
        let [wq, wk, wv] = w;
        let jobs = [
            Job { w: &wq.w, bias: wq.bias.as_deref(), y: q },
            Job { w: &wk.w, bias: wk.bias.as_deref(), y: k },
            Job { w: &wv.w, bias: wv.bias.as_deref(), y: v },
        ];
        linear_many(&self.cx(), x, jobs)
    }

    fn glu(&self, y: &mut [f32], gate: &[f32], up: &[f32], act: Activation) -> Result<()> {
        rows::glu(&self.pool, self.tier, y, gate, up, act)
    }

    fn linear_glu(
        &self,
        y: &mut [f32],
        x: &[f32],
        gate: &PackedWeight,
        up: &PackedWeight,
        act: Activation,
        _scratch: &mut HostBuf<f32>,
        _rows: usize,
    ) -> Result<()> {
        linear_glu(&self.cx(), y, x, gate, up, act)
    }

    fn rope(&self, x: &mut [f32], table: &[f32], head_dim: usize) -> Result<()> {
        rows::rope(&self.pool, self.tier, x, table, head_dim)
    }

    fn kv_alloc(&self, layers: usize, capacity: usize, kv_dim: usize) -> Result<CpuKv> {
        CpuKv::alloc(layers, capacity, kv_dim, self.compute)
    }

    fn kv_stage(&self, segments: &mut [Segment<'_, Self>], layer: usize, k: &[f32], v: &[f32]) -> Result<()> {
        let mut at = 0;
        for s in segments {
            let r = at..at + s.rows * s.kv.kv_dim();
            s.kv.stage(&self.pool, self.tier, layer, s.past, &k[r.clone()], &v[r.clone()])?;
            at = r.end;
        }
        Ok(())
    }

    fn kv_commit(&self, kv: &mut CpuKv, past: usize, rows: &[u32]) -> Result<()> {
        kv.commit(past, rows)
    }

    fn kv_copy(&self, dst: &mut CpuKv, src: &CpuKv, len: usize) -> Result<()> {
        dst.copy_from(src, len)
    }

    fn rope_stage(
        &self,
        q: &mut HostBuf<f32>,
        k: &mut HostBuf<f32>,
        v: &HostBuf<f32>,
        table: &[f32],
        segments: &mut [Segment<'_, Self>],
        layer: usize,
        spec: &AttnSpec,
    ) -> Result<()> {
        let rows: usize = segments.iter().map(|s| s.rows).sum();
        let (nq, nk) = (rows * spec.q_dim(), rows * spec.kv_dim());
        let sinks = segments.iter_mut().map(|s| (&mut *s.kv, s.past, s.rows));
        rows::rope_stage(
            &self.pool,
            self.tier,
            &mut q[..nq],
            &mut k[..nk],
            &v[..nk],
            table,
            spec.head_dim,
            layer,
            sinks,
        )
    }

    fn attention(
        &self,
        y: &mut [f32],
        q: &[f32],
        segments: &[Segment<'_, Self>],
        layer: usize,
        spec: &AttnSpec,
    ) -> Result<()> {
        let views: Vec<SegView<'_>> =
            segments.iter().map(|s| SegView { kv: &*s.kv, past: s.past, rows: s.rows, mask: s.mask }).collect();
        attention(&self.pool, self.tier, y, q, &views, layer, spec)
    }
}
