//! [`Cpu`]: the ops of [`Backend`] on this machine's cores.

use std::sync::Mutex;

use super::attention::{SegView, attention};
use super::gemm::GemmScratch;
use super::kv::CpuKv;
use super::matmul::{Job, MatmulCx, PackedWeight, Scratch, linear, linear_glu, linear_many};
use super::memory::Arena;
use super::pool::Pool;
use super::{Compute, Tier};
use super::{logits, lora, rows, sampling};
use crate::backend::host::HostBuf;
use crate::backend::sampling::{check_forbidden, check_penalties, width};
use crate::backend::{
    Accepted, AttnSpec, Backend, Candidates, Draw, Group, Linear, Masked, Penalty, Ranks, Rule, Segment, Trees, unmask,
};
use crate::dtype::Elem;
use crate::error::{Result, ensure};
use crate::model::config::Activation;
use crate::tensor::HostTensor;

/// The native backend. Results do not depend on the number of threads, nor a row's on the number of rows in the pass.
pub struct Cpu {
    pub(super) pool: Pool,
    pub(super) tier: Tier,
    pub(super) compute: Compute,
    pub(super) gemm: GemmScratch,
    pub(super) arena: Arena,
    /// Sums of attention's gradients, kept from call to call.
    pub(super) sums: Mutex<Vec<f32>>,
    scratch: Scratch,
}

impl Cpu {
    /// A backend of `threads` threads that uses `tier`, which must be among [`Tier::available`].
    pub fn with(threads: usize, tier: Tier, compute: Compute) -> Self {
        assert!(tier <= Tier::detect(), "this machine has no {tier} instructions");
        let (gemm, arena, sums, scratch) = Default::default();
        Self { pool: Pool::new(threads), tier, compute, gemm, arena, sums, scratch }
    }

    /// Its threads.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// How it multiplies.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Its instructions.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// One task for each row.
    fn each<T: Send>(&self, rows: &mut [T], f: impl Fn(&mut T) + Sync) {
        self.pool.run_chunks(rows, 1, |_, row| row.iter_mut().for_each(&f));
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

    fn operand(&self, y: &mut [f32], x: &[f32]) -> Result<()> {
        ensure!(y.len() == x.len(), Shape, "operand: {} values for {}", x.len(), y.len());
        y.copy_from_slice(x);
        Ok(())
    }

    fn add_activated(&self, x: &mut [f32], r: &[f32], act: Activation) -> Result<()> {
        rows::add_activated(&self.pool, self.tier, x, r, act)
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

    fn shrink_rows(&self, h: &mut [f32], x: &[f32], ranks: usize, groups: &[Group<'_, Self>]) -> Result<()> {
        lora::shrink(&self.pool, self.tier, h, x, ranks, groups)
    }

    fn expand_rows(&self, y: &mut [f32], h: &[f32], part: Ranks, groups: &[Group<'_, Self>]) -> Result<()> {
        lora::expand(&self.pool, self.tier, y, h, part, groups)
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
            s.kv.stage(&self.pool, self.tier, layer, s.range().start, &k[r.clone()], &v[r.clone()])?;
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
        let sinks = segments.iter_mut().map(|s| (s.range().start, &mut *s.kv, s.rows));
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
        let views: Vec<SegView<'_>> = segments
            .iter()
            .map(|s| SegView { kv: &*s.kv, past: s.past, staged: s.staged, rows: s.rows, mask: s.mask })
            .collect();
        attention(&self.pool, self.tier, y, q, &views, layer, spec)
    }

    fn logits_stats(&self, stats: &mut [f32], argmax: &mut [u32], logits: &[f32], vocab: usize) -> Result<()> {
        let mut rows: Vec<_> = stats.chunks_exact_mut(3).zip(argmax).zip(logits.chunks_exact(vocab)).collect();
        self.each(&mut rows, |((stats, best), x)| **best = sampling::stats(self.tier, x, stats));
        Ok(())
    }

    fn top_k(&self, values: &mut [f32], ids: &mut [u32], logits: &[f32], vocab: usize, k: usize) -> Result<()> {
        ensure!((1..=vocab).contains(&k), Shape, "the {k} largest of {vocab} logits");
        let places = values.chunks_exact_mut(k).zip(ids.chunks_exact_mut(k));
        let mut rows: Vec<_> = places.zip(logits.chunks_exact(vocab)).collect();
        self.each(&mut rows, |((values, ids), x)| {
            let top = logits::top_k(self.tier, x, k);
            top.into_iter().zip(values.iter_mut().zip(ids.iter_mut())).for_each(|((i, x), to)| (*to.1, *to.0) = (i, x));
        });
        Ok(())
    }

    fn penalize(&self, logits: &mut [f32], vocab: usize, penalties: &[Penalty]) -> Result<()> {
        check_penalties(penalties, logits.len(), vocab)?;
        for p in penalties {
            let x = &mut logits[p.row as usize * vocab + p.token as usize];
            *x = p.on(*x);
        }
        Ok(())
    }

    fn forbid(&self, logits: &mut [f32], vocab: usize, tokens: &[u32]) -> Result<()> {
        check_forbidden(tokens, vocab)?;
        for x in logits.chunks_exact_mut(vocab) {
            tokens.iter().for_each(|t| x[*t as usize] = f32::NEG_INFINITY);
        }
        Ok(())
    }

    fn sample(&self, tokens: &mut [u32], logits: &[f32], draws: &[Draw]) -> Result<()> {
        if draws.is_empty() {
            return Ok(());
        }
        let (vocab, n) = (width("sample", logits.len(), draws.len())?, width("sample", tokens.len(), draws.len())?);
        let mut rows: Vec<_> = tokens.chunks_exact_mut(n).zip(logits.chunks_exact(vocab)).zip(draws).collect();
        self.each(&mut rows, |((tokens, x), draw)| sampling::sample(self.tier, x, draw, tokens));
        Ok(())
    }

    fn distribution(&self, p: &mut [f32], logits: &[f32], draws: &[Draw]) -> Result<()> {
        if draws.is_empty() {
            return Ok(());
        }
        let vocab = width("distribution", logits.len(), draws.len())?;
        let mut rows: Vec<_> = p.chunks_exact_mut(vocab).zip(logits.chunks_exact(vocab)).zip(draws).collect();
        self.each(&mut rows, |((p, x), draw)| sampling::distribution(self.tier, x, draw, p));
        Ok(())
    }

    fn unmask(
        &self,
        tokens: &mut [u32],
        taken: &mut [u32],
        rows: Candidates<'_, Self>,
        texts: &[Masked<'_>],
        eos: &[u32],
    ) -> Result<()> {
        unmask::on_host(tokens, taken, [rows.picks, rows.argmax], rows.stats, texts, eos)
    }

    fn verify_tree(&self, to: Accepted<'_, Self>, trees: &Trees<'_>, rule: Rule<'_, Self>) -> Result<()> {
        let Accepted { path, counts, next } = to;
        trees.check(counts.len())?;
        if counts.is_empty() {
            return Ok(());
        }
        let stride = width("verify_tree", path.len(), counts.len())?;
        let mut vocab = 0;
        if let Rule::Reject { p, q, drafts, keys, order, .. } = &rule {
            vocab = width("verify_tree", p.len(), trees.tokens.len())?;
            trees.check_reject(drafts, keys, q.len() / vocab, vocab, *order)?;
        }
        let found = counts.iter_mut().zip(next.iter_mut());
        let mut rows: Vec<_> = trees.iter().zip(path.chunks_exact_mut(stride)).zip(found).enumerate().collect();
        self.each(&mut rows, |(s, ((tree, path), (count, next)))| {
            (**count, **next) = match &rule {
                Rule::Match(picks) => tree.walk(picks, path),
                Rule::Reject { p, q, drafts, keys, replacement, order } => {
                    let open = |node: usize, r| {
                        let at = tree.first + node;
                        let q = if tree.has_children(node) { &q[drafts[at] as usize * vocab..][..vocab] } else { &[] };
                        sampling::Rest { p: &p[at * vocab..][..vocab], q, r, copies: None }
                    };
                    tree.reject(*replacement, *order, keys[*s], open, path)
                }
            }
        });
        Ok(())
    }
}
