//! Training on the CPU: [`Train`] for [`Cpu`].

mod attention;
mod encoder;
mod loss;
mod optim;
mod rows;

use super::gemm::{GemmCx, Operand, Shape, Term, gemm, gemm_sum};
use super::matmul::PackedWeight;
use super::rows::check_equal;
use super::{Compute, Cpu, Tier};
use crate::backend::host::HostBuf;
use crate::backend::sampling::width;
use crate::backend::{AttnSpec, Group, Ranks, Step, Target, Train, Visible, WeightInfo, Write};
use crate::error::{Result, ensure};
use crate::model::config::Activation;

fn rows_of(x: &[f32], stride: usize) -> Operand<'_> {
    Operand::Rows { x, stride }
}

fn cols_of(x: &[f32], stride: usize) -> Operand<'_> {
    Operand::Cols { x, stride }
}

impl Cpu {
    pub(super) fn gemm_cx(&self) -> GemmCx<'_> {
        GemmCx { pool: &self.pool, tier: self.tier, compute: self.compute, scratch: &self.gemm }
    }

    /// c\[rows, n\] = or += scale A B.
    #[allow(clippy::too_many_arguments)]
    fn matmul(
        &self,
        c: &mut [f32],
        [m, n, k]: [usize; 3],
        write: Write,
        scale: f32,
        a: Operand<'_>,
        b: Operand<'_>,
    ) -> Result<()> {
        gemm(&self.gemm_cx(), Shape { m, n, k }, c, n, write, scale, a, b)
    }

    fn add_bias(&self, y: &mut [f32], bias: Option<&HostBuf<f32>>, out: usize) -> Result<()> {
        let Some(b) = bias else { return Ok(()) };
        check_equal("linear_fwd: bias", b.len(), out)?;
        self.pool.run_chunks(y, 16 * out, |_, y| {
            y.chunks_exact_mut(out).for_each(|y| y.iter_mut().zip(b.iter()).for_each(|(y, b)| *y += b));
        });
        Ok(())
    }

    /// Calls `f(first row, rows, group)` for each group, having seen that they are `rows` rows.
    fn groups<'g>(
        &self,
        rows: usize,
        groups: &[Group<'g, Self>],
        mut f: impl FnMut(usize, usize, &Group<'g, Self>) -> Result<()>,
    ) -> Result<()> {
        check_equal("lora: rows of all groups", groups.iter().map(|g| g.rows).sum(), rows)?;
        let mut at = 0;
        for g in groups.iter().filter(|g| g.rows > 0) {
            f(at, g.rows, g)?;
            at += g.rows;
        }
        Ok(())
    }
}

impl Train for Cpu {
    fn trainable(&self, rows: usize, cols: usize) -> Result<PackedWeight> {
        let bf16s = self.compute == Compute::Fast && self.tier == Tier::Avx512;
        PackedWeight::zeros(rows, cols, bf16s, &self.arena)
    }

    fn set_weight(&self, w: &mut PackedWeight, values: &[f32]) -> Result<()> {
        w.set(values, &self.pool)
    }

    fn copy(&self, y: &mut [f32], x: &[f32]) -> Result<()> {
        check_equal("copy", y.len(), x.len())?;
        self.pool.run_chunks(y, 1 << 16, |i, y| y.copy_from_slice(&x[i << 16..][..y.len()]));
        Ok(())
    }

    fn zero(&self, x: &mut [f32]) -> Result<()> {
        self.pool.run_chunks(x, 1 << 16, |_, x| x.fill(0.0));
        Ok(())
    }

    fn axpy(&self, y: &mut [f32], a: f32, x: &[f32]) -> Result<()> {
        self.axpy(y, a, x)
    }

    fn sq_norm(&self, tensors: &[&[f32]]) -> Result<f64> {
        Ok(tensors.iter().map(|x| self.squares(x)).sum())
    }

    fn linear_fwd(
        &self,
        y: &mut [f32],
        x: &[f32],
        w: &PackedWeight,
        bias: Option<&HostBuf<f32>>,
        write: Write,
    ) -> Result<()> {
        let (out, input) = (w.rows(), w.cols());
        let m = y.len() / out;
        self.matmul(y, [m, out, input], write, 1.0, rows_of(x, input), Operand::Weight(w))?;
        self.add_bias(y, bias, out)
    }

    fn linear_bwd_x(&self, dx: &mut [f32], dy: &[f32], w: &PackedWeight, write: Write) -> Result<()> {
        let (out, input) = (w.rows(), w.cols());
        let m = dx.len() / input;
        self.matmul(dx, [m, input, out], write, 1.0, rows_of(dy, out), Operand::WeightT(w))
    }

    fn linear_bwd_w(&self, dw: &mut [f32], dy: &[f32], x: &[f32], rows: usize) -> Result<()> {
        let (out, input) = (width("linear_bwd_w", dy.len(), rows)?, width("linear_bwd_w", x.len(), rows)?);
        check_equal("linear_bwd_w", dw.len(), out * input)?;
        self.matmul(dw, [out, input, rows], Write::Add, 1.0, cols_of(dy, out), cols_of(x, input))
    }

    fn column_sums(&self, db: &mut [f32], dy: &[f32]) -> Result<()> {
        self.column_sums(db, dy)
    }

    fn rms_norm_bwd(
        &self,
        dx: &mut [f32],
        dw: Option<&mut [f32]>,
        dy: &[f32],
        x: &[f32],
        w: &HostBuf<f32>,
        eps: f32,
        write: Write,
    ) -> Result<()> {
        self.rms_norm_bwd(dx, dw, dy, x, w, eps, write)
    }

    fn layer_norm(&self, y: &mut [f32], x: &[f32], w: &HostBuf<f32>, b: &HostBuf<f32>, eps: f32) -> Result<()> {
        self.layer_norm(y, x, w, b, eps)
    }

    fn layer_norm_bwd(
        &self,
        dx: &mut [f32],
        dw: Option<&mut [f32]>,
        dy: &[f32],
        x: &[f32],
        w: &HostBuf<f32>,
        eps: f32,
        write: Write,
    ) -> Result<()> {
        self.layer_norm_bwd(dx, dw, dy, x, w, eps, write)
    }

    fn gelu(&self, y: &mut [f32], x: &[f32]) -> Result<()> {
        self.gelu(y, x)
    }

    fn gelu_bwd(&self, dx: &mut [f32], dy: &[f32], x: &[f32]) -> Result<()> {
        self.gelu_bwd(dx, dy, x)
    }

    fn add_scaled(&self, y: &mut [f32], x: &[f32], w: &HostBuf<f32>) -> Result<()> {
        self.add_scaled(y, x, w)
    }

    fn add_scaled_bwd(
        &self,
        dx: &mut [f32],
        dw: Option<&mut [f32]>,
        dy: &[f32],
        x: &[f32],
        w: &HostBuf<f32>,
    ) -> Result<()> {
        self.add_scaled_bwd(dx, dw, dy, x, w)
    }

    fn glu_bwd(
        &self,
        dgate: &mut [f32],
        dup: &mut [f32],
        dz: &[f32],
        gate: &[f32],
        up: &[f32],
        act: Activation,
    ) -> Result<()> {
        self.glu_bwd(dgate, dup, dz, gate, up, act)
    }

    fn attend(
        &self,
        y: &mut [f32],
        lse: &mut [f32],
        q: &[f32],
        k: &[f32],
        v: &[f32],
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        self.attend_rows(y, lse, q, k, v, visible, spec)
    }

    fn attend_bwd(
        &self,
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
        dy: &[f32],
        y: &[f32],
        lse: &[f32],
        q: &[f32],
        k: &[f32],
        v: &[f32],
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        self.attend_rows_bwd(dq, dk, dv, dy, y, lse, q, k, v, visible, spec)
    }

    fn linear_lora_fwd(
        &self,
        y: &mut HostBuf<f32>,
        x: &[f32],
        w: &PackedWeight,
        bias: Option<&HostBuf<f32>>,
        write: Write,
        h: &[f32],
        part: Ranks,
        group: Group<'_, Self>,
    ) -> Result<()> {
        let (out, input, rank, rows) = (w.rows(), w.cols(), part.n, group.rows);
        let y = &mut y[..rows * out];
        // Little beside the products, so that the scale may be put into a copy of it.
        let mut scaled = Vec::with_capacity(rows * rank);
        for h in h.chunks_exact(part.stride).take(rows) {
            scaled.extend(h[part.first..part.first + rank].iter().map(|h| h * group.scale));
        }
        let adapter = Term { a: rows_of(&scaled, rank), b: rows_of(group.matrix, rank), k: rank };
        let terms = [Term { a: rows_of(x, input), b: Operand::Weight(w), k: input }, adapter];
        gemm_sum(&self.gemm_cx(), [rows, out], y, out, write, &terms)?;
        self.add_bias(y, bias, out)
    }

    fn linears_bwd_x(
        &self,
        dx: &mut HostBuf<f32>,
        rows: usize,
        linears: &[(&[f32], &PackedWeight)],
        lora: Option<(&[f32], usize, &[f32])>,
    ) -> Result<()> {
        let d = linears.first().map_or(0, |l| l.1.cols());
        let term = |&(dy, w)| Term { a: rows_of(dy, PackedWeight::rows(w)), b: Operand::WeightT(w), k: w.rows() };
        let mut terms: Vec<Term<'_>> = linears.iter().map(term).collect();
        if let Some((dh, ranks, a)) = lora {
            terms.push(Term { a: rows_of(dh, ranks), b: cols_of(a, d), k: ranks });
        }
        gemm_sum(&self.gemm_cx(), [rows, d], &mut dx[..rows * d], d, Write::Set, &terms)
    }

    fn scatter_rows(&self, dx: &mut [f32], dy: &[f32], rows: &[u32], d: usize) -> Result<()> {
        self.scatter(dx, dy, rows, 1.0, d)
    }

    fn embed_bwd(&self, dtable: &mut [f32], dx: &[f32], tokens: &[u32], scale: f32) -> Result<()> {
        self.scatter(dtable, dx, tokens, scale, dx.len() / tokens.len().max(1))
    }

    fn lora_shrink(&self, h: &mut [f32], x: &[f32], ranks: usize, groups: &[Group<'_, Self>]) -> Result<()> {
        let rows = width("lora_shrink", h.len(), ranks)?;
        self.groups(rows, groups, |at, n, g| {
            let d = g.matrix.len() / ranks;
            let (h, x) = (&mut h[at * ranks..][..n * ranks], rows_of(&x[at * d..], d));
            self.matmul(h, [n, ranks, d], Write::Set, 1.0, x, rows_of(g.matrix, d))
        })
    }

    fn lora_expand(&self, y: &mut [f32], h: &[f32], part: Ranks, groups: &[Group<'_, Self>]) -> Result<()> {
        let Ranks { stride, first, n: rank } = part;
        self.groups(h.len() / stride, groups, |at, n, g| {
            let out = g.matrix.len() / rank;
            let (y, h) = (&mut y[at * out..][..n * out], rows_of(&h[at * stride + first..], stride));
            self.matmul(y, [n, out, rank], Write::Add, g.scale, h, rows_of(g.matrix, rank))
        })
    }

    fn lora_expand_bwd(&self, dh: &mut [f32], dy: &[f32], part: Ranks, groups: &[Group<'_, Self>]) -> Result<()> {
        let Ranks { stride, first, n: rank } = part;
        self.groups(dh.len() / stride, groups, |at, n, g| {
            let out = g.matrix.len() / rank;
            let (dh, dy) = (&mut dh[at * stride + first..], rows_of(&dy[at * out..], out));
            let shape = Shape { m: n, n: rank, k: out };
            gemm(&self.gemm_cx(), shape, dh, stride, Write::Set, g.scale, dy, cols_of(g.matrix, rank))
        })
    }

    fn lora_shrink_bwd(&self, dx: &mut [f32], dh: &[f32], ranks: usize, groups: &[Group<'_, Self>]) -> Result<()> {
        let rows = width("lora_shrink_bwd", dh.len(), ranks)?;
        self.groups(rows, groups, |at, n, g| {
            let d = g.matrix.len() / ranks;
            let (dx, dh) = (&mut dx[at * d..][..n * d], rows_of(&dh[at * ranks..], ranks));
            self.matmul(dx, [n, d, ranks], Write::Add, 1.0, dh, cols_of(g.matrix, d))
        })
    }

    fn lora_bwd_b(&self, db: &mut [f32], dy: &[f32], h: &[f32], part: Ranks, scale: f32) -> Result<()> {
        let (out, rows) = (db.len() / part.n, h.len() / part.stride);
        check_equal("lora_bwd_b", dy.len(), rows * out)?;
        let h = cols_of(&h[part.first..], part.stride);
        self.matmul(db, [out, part.n, rows], Write::Add, scale, cols_of(dy, out), h)
    }

    fn lora_bwd_a(&self, da: &mut [f32], dh: &[f32], x: &[f32], ranks: usize) -> Result<()> {
        self.linear_bwd_w(da, dh, x, width("lora_bwd_a", dh.len(), ranks)?)
    }

    fn loss_rows(
        &self,
        losses: &mut [f32],
        logits: &mut [f32],
        target: &Target<'_, Self>,
        weights: &[f32],
    ) -> Result<()> {
        self.losses(losses, logits, target, weights)
    }

    fn softmax_rows(&self, x: &mut [f32], vocab: usize, tau: f32) -> Result<()> {
        let usable = tau > 0.0;
        ensure!(usable, Shape, "softmax at temperature {tau}");
        self.softmaxes(x, vocab, tau);
        Ok(())
    }

    fn smooth_l1(&self, loss: &mut [f32], dx: &mut [f32], x: &[f32], target: &[f32], weights: &[f32]) -> Result<()> {
        self.smooth_l1_rows(loss, dx, x, target, weights)
    }

    fn optimize(
        &self,
        w: &mut [f32],
        g: &[f32],
        states: &mut [HostBuf<f32>],
        reference: Option<&[f32]>,
        step: &Step,
    ) -> Result<()> {
        self.step(w, g, states, reference, step)
    }
}
