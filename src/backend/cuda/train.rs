//! The ops of [`Train`]: rows and whole tensors here, the others in the modules below.

mod attention;
mod encoder;
mod lora;
mod loss;
mod products;

pub(super) use attention::Sight;

use half::bf16;

use super::device::Slot;
use super::memory::{CudaBuf, Dst, Src};
use super::ops::{THREADS, number, rows_of, spread};
use super::weight::{CudaWeight, Form};
use super::{Cuda, args, kernels as k};
use crate::backend::{AttnSpec, Backend, Buffer, Group, Ranks, Step, Target, Train, Update, Visible, Write};
use crate::error::{Result, bail, ensure};
use crate::model::config::Activation;

fn add(write: Write) -> u32 {
    u32::from(write == Write::Add)
}

impl Cuda {
    /// y += the sum of `chunks` parts that scratch holds.
    fn fold(&self, parts: u64, y: Dst<'_, f32>, chunks: usize) -> Result<()> {
        let n = y.len();
        let parts = Src::at(parts, chunks * n);
        self.launch(k::FOLD, args::Fold::new(parts, y, chunks as u32, n as u32)?, spread(n), THREADS, 0)
    }

    /// y += the sums over rows of dy, or of dy x inverse.
    fn sum_columns(
        &self,
        small: &mut super::device::Small,
        y: Dst<'_, f32>,
        dy: Src<'_, f32>,
        norm: Option<(Src<'_, f32>, u64)>,
        rows: usize,
    ) -> Result<()> {
        let (d, chunks) = (y.len(), rows.div_ceil(64));
        let parts = small.room(&self.stream, Slot::Parts, chunks * d)?;
        let at = parts.address();
        let (x, inverse) = norm.map_or((Src::EMPTY, Src::EMPTY), |(x, s)| (x, Src::at(s, rows)));
        let has_x = u32::from(norm.is_some());
        let args = args::ColumnSums::new(dy, x, inverse, parts, rows as u32, d as u32, has_x)?;
        self.launch(k::COLUMN_SUMS, args, [d.div_ceil(THREADS), chunks, 1], THREADS, 0)?;
        self.fold(at, y, chunks)
    }
}

impl Train for Cuda {
    fn trainable(&self, rows: usize, cols: usize) -> Result<CudaWeight> {
        CudaWeight::trainable(&self.stream, rows, cols)
    }

    fn set_weight(&self, w: &mut CudaWeight, values: Src<'_, f32>) -> Result<()> {
        let Form::Bf16(w) = &mut w.form else { bail!(Shape, "set_weight: a matrix in a type that is not trained") };
        let n = w.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::SET_BF16, args::SetBf16::new(w.all_mut(), values, n as u32)?, spread(n), THREADS, 0)
    }

    fn copy(&self, y: Dst<'_, f32>, x: Src<'_, f32>) -> Result<()> {
        let n = y.len();
        ensure!(x.len() == n, Shape, "copy: {} elements to {n}", x.len());
        if n == 0 {
            return Ok(());
        }
        self.launch(k::COPY, args::Copy::new(y, x, n as u32)?, spread(n), THREADS, 0)
    }

    fn zero(&self, x: Dst<'_, f32>) -> Result<()> {
        let n = x.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::ZERO, args::Zero::new(x, n as u32)?, spread(n), THREADS, 0)
    }

    fn axpy(&self, y: Dst<'_, f32>, a: f32, x: Src<'_, f32>) -> Result<()> {
        let n = y.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::AXPY, args::Axpy::new(y, x, n as u32, a)?, spread(n), THREADS, 0)
    }

    fn sq_norm(&self, tensors: &[Src<'_, f32>]) -> Result<f64> {
        let blocks = |n: usize| n.div_ceil(16 * THREADS).min(1024);
        let all: usize = tensors.iter().map(|x| blocks(x.len())).sum();
        if all == 0 {
            return Ok(0.0);
        }
        let mut small = self.small();
        let mut at = small.room::<f32>(&self.stream, Slot::Parts, all)?.address();
        let parts = Src::at(at, all);
        for &x in tensors.iter().filter(|x| x.len() > 0) {
            let n = blocks(x.len());
            let args = args::SquareSums::new(x, Dst::at(at, n), x.len() as u32, n as u32)?;
            self.launch(k::SQUARE_SUMS, args, [n, 1, 1], THREADS, 0)?;
            at += (n * size_of::<f32>()) as u64;
        }
        let mut sums = vec![0f32; all];
        self.download(parts, &mut sums)?;
        Ok(sums.into_iter().map(f64::from).sum())
    }

    fn linear_fwd(
        &self,
        y: Dst<'_, f32>,
        x: Src<'_, bf16>,
        w: &CudaWeight,
        bias: Option<&CudaBuf<f32>>,
        write: Write,
    ) -> Result<()> {
        if write == Write::Set {
            return self.linear(y, x, w, bias);
        }
        let mut small = self.small();
        let part = small.room(&self.stream, Slot::Parts, y.len())?;
        let sum = Src::at(part.address(), part.len());
        self.linear(part, x, w, bias)?;
        self.add(y, sum)
    }

    fn linear_bwd_x(&self, dx: Dst<'_, f32>, dy: Src<'_, f32>, w: &CudaWeight, write: Write) -> Result<()> {
        self.run_linear_bwd_x(dx, dy, w, write)
    }

    fn linear_bwd_w(&self, dw: Dst<'_, f32>, dy: Src<'_, f32>, x: Src<'_, bf16>, rows: usize) -> Result<()> {
        self.run_linear_bwd_w(dw, dy, x, rows)
    }

    fn column_sums(&self, db: Dst<'_, f32>, dy: Src<'_, f32>) -> Result<()> {
        let rows = rows_of("column_sums", dy.len(), db.len())?;
        if rows == 0 {
            return Ok(());
        }
        self.sum_columns(&mut self.small(), db, dy, None, rows)
    }

    fn rms_norm_bwd(
        &self,
        dx: Dst<'_, f32>,
        dw: Option<Dst<'_, f32>>,
        dy: Src<'_, f32>,
        x: Src<'_, f32>,
        w: &CudaBuf<f32>,
        eps: f32,
        write: Write,
    ) -> Result<()> {
        let (d, rows) = (w.len(), rows_of("rms_norm_bwd", x.len(), w.len())?);
        if rows == 0 {
            return Ok(());
        }
        let mut small = self.small();
        let inverse = small.room(&self.stream, Slot::Stats, rows)?;
        let at = inverse.address();
        let args = args::RmsNormBwd::new(dx, inverse, dy, x, w.all(), rows as u32, d as u32, eps, add(write))?;
        self.rows_launch(k::RMS_NORM_BWD, args, rows)?;
        dw.map_or(Ok(()), |dw| self.sum_columns(&mut small, dw, dy, Some((x, at)), rows))
    }

    fn layer_norm(
        &self,
        y: Dst<'_, bf16>,
        x: Src<'_, f32>,
        w: &CudaBuf<f32>,
        b: &CudaBuf<f32>,
        eps: f32,
    ) -> Result<()> {
        self.run_layer_norm(y, x, w, b, eps)
    }

    fn layer_norm_bwd(
        &self,
        dx: Dst<'_, f32>,
        dw: Option<Dst<'_, f32>>,
        dy: Src<'_, f32>,
        x: Src<'_, f32>,
        w: &CudaBuf<f32>,
        eps: f32,
        write: Write,
    ) -> Result<()> {
        self.run_layer_norm_bwd(dx, dw, dy, x, w, eps, write)
    }

    fn gelu(&self, y: Dst<'_, bf16>, x: Src<'_, f32>) -> Result<()> {
        self.run_gelu(y, x)
    }

    fn gelu_bwd(&self, dx: Dst<'_, f32>, dy: Src<'_, f32>, x: Src<'_, f32>) -> Result<()> {
        self.run_gelu_bwd(dx, dy, x)
    }

    fn add_scaled(&self, y: Dst<'_, f32>, x: Src<'_, f32>, w: &CudaBuf<f32>) -> Result<()> {
        self.run_add_scaled(y, x, w)
    }

    fn add_scaled_bwd(
        &self,
        dx: Dst<'_, f32>,
        dw: Option<Dst<'_, f32>>,
        dy: Src<'_, f32>,
        x: Src<'_, f32>,
        w: &CudaBuf<f32>,
    ) -> Result<()> {
        self.run_add_scaled_bwd(dx, dw, dy, x, w)
    }

    fn glu_bwd(
        &self,
        dgate: Dst<'_, f32>,
        dup: Dst<'_, f32>,
        dz: Src<'_, f32>,
        gate: Src<'_, f32>,
        up: Src<'_, f32>,
        act: Activation,
    ) -> Result<()> {
        let n = dz.len();
        if n == 0 {
            return Ok(());
        }
        let args = args::GluBwd::new(dgate, dup, dz, gate, up, n as u32, number(act))?;
        self.launch(k::GLU_BWD, args, spread(n), THREADS, 0)
    }

    fn attend(
        &self,
        y: Dst<'_, bf16>,
        lse: Dst<'_, f32>,
        q: Src<'_, f32>,
        k: Src<'_, f32>,
        v: Src<'_, f32>,
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        self.run_attend(y, lse, q, k, v, visible, spec)
    }

    fn attend_bwd(
        &self,
        dq: Dst<'_, f32>,
        dk: Dst<'_, f32>,
        dv: Dst<'_, f32>,
        dy: Src<'_, f32>,
        y: Src<'_, bf16>,
        lse: Src<'_, f32>,
        q: Src<'_, f32>,
        k: Src<'_, f32>,
        v: Src<'_, f32>,
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        self.run_attend_bwd([dq, dk, dv], dy, y, lse, [q, k, v], visible, spec)
    }

    fn scatter_rows(&self, dx: Dst<'_, f32>, dy: Src<'_, f32>, rows: &[u32], d: usize) -> Result<()> {
        let (into, n) = (rows_of("scatter_rows", dx.len(), d)?, rows.len());
        ensure!(rows.iter().all(|&r| (r as usize) < into), Shape, "scatter_rows: a row behind the last of {into}");
        if n == 0 {
            return Ok(());
        }
        let mut small = self.small();
        let index = small.table(&self.stream, rows)?;
        let args = args::ScatterRows::new(dx, dy, index, into as u32, n as u32, d as u32)?;
        self.rows_launch(k::SCATTER_ROWS, args, n)
    }

    fn embed_bwd(&self, dtable: Dst<'_, f32>, dx: Src<'_, f32>, tokens: &[u32], scale: f32) -> Result<()> {
        let rows = tokens.len();
        if rows == 0 {
            return Ok(());
        }
        let d = dx.len() / rows;
        let vocab = rows_of("embed_bwd", dtable.len(), d)?;
        ensure!(tokens.iter().all(|&t| (t as usize) < vocab), Shape, "embed_bwd: a token behind the last of {vocab}");
        let mut order: Vec<u32> = (0..rows as u32).collect();
        order.sort_by_key(|&r| tokens[r as usize]);
        let token = |&r: &u32| tokens[r as usize];
        let first = |i: &usize| *i == 0 || token(&order[*i - 1]) != token(&order[*i]);
        let mut starts: Vec<u32> = (0..rows).filter(first).map(|i| i as u32).collect();
        let distinct: Vec<u32> = starts.iter().map(|&i| token(&order[i as usize])).collect();
        starts.push(rows as u32);
        let mut small = self.small();
        let [ids, starts, order] = [&distinct, &starts, &order].map(|table| small.table(&self.stream, table));
        let (v, r, n, width) = (vocab as u32, rows as u32, distinct.len(), d as u32);
        let args = args::EmbedBwd::new(dtable, dx, ids?, starts?, order?, v, r, n as u32, width, scale)?;
        self.launch(k::EMBED_BWD, args, [n, d.div_ceil(THREADS), 1], THREADS, 0)
    }

    fn lora_shrink(&self, h: Dst<'_, f32>, x: Src<'_, bf16>, ranks: usize, groups: &[Group<'_, Self>]) -> Result<()> {
        self.run_lora_shrink(h, x, ranks, groups)
    }

    fn lora_expand(&self, y: Dst<'_, f32>, h: Src<'_, f32>, part: Ranks, groups: &[Group<'_, Self>]) -> Result<()> {
        self.run_lora_expand(y, h, part, groups)
    }

    fn lora_expand_bwd(
        &self,
        dh: Dst<'_, f32>,
        dy: Src<'_, f32>,
        part: Ranks,
        groups: &[Group<'_, Self>],
    ) -> Result<()> {
        self.run_lora_expand_bwd(dh, dy, part, groups)
    }

    fn lora_shrink_bwd(
        &self,
        dx: Dst<'_, f32>,
        dh: Src<'_, f32>,
        ranks: usize,
        groups: &[Group<'_, Self>],
    ) -> Result<()> {
        self.run_lora_shrink_bwd(dx, dh, ranks, groups)
    }

    fn lora_bwd_b(&self, db: Dst<'_, f32>, dy: Src<'_, f32>, h: Src<'_, f32>, part: Ranks, scale: f32) -> Result<()> {
        self.run_lora_bwd_b(db, dy, h, part, scale)
    }

    fn lora_bwd_a(&self, da: Dst<'_, f32>, dh: Src<'_, f32>, x: Src<'_, bf16>, ranks: usize) -> Result<()> {
        self.run_lora_bwd_a(da, dh, x, ranks)
    }

    fn loss_rows(
        &self,
        loss: Dst<'_, f32>,
        logits: Dst<'_, f32>,
        target: &Target<'_, Self>,
        weights: &[f32],
    ) -> Result<()> {
        self.run_loss_rows(loss, logits, target, weights)
    }

    fn softmax_rows(&self, x: Dst<'_, f32>, vocab: usize, tau: f32) -> Result<()> {
        let rows = rows_of("softmax_rows", x.len(), vocab)?;
        if rows == 0 {
            return Ok(());
        }
        self.rows_launch(k::SOFTMAX_ROWS, args::SoftmaxRows::new(x, rows as u32, vocab as u32, tau)?, rows)
    }

    fn smooth_l1(
        &self,
        loss: Dst<'_, f32>,
        dx: Dst<'_, f32>,
        x: Src<'_, f32>,
        target: Src<'_, f32>,
        weights: &[f32],
    ) -> Result<()> {
        self.run_smooth_l1(loss, dx, x, target, weights)
    }

    fn optimize(
        &self,
        w: Dst<'_, f32>,
        g: Src<'_, f32>,
        states: &mut [CudaBuf<f32>],
        reference: Option<Src<'_, f32>>,
        step: &Step,
    ) -> Result<()> {
        let (n, found, rule) = (w.len(), states.len(), step.rule);
        ensure!(found == rule.states(), Shape, "optimize: {found} states for {rule:?}");
        if n == 0 {
            return Ok(());
        }
        let (beta1, beta2, eps) = match rule {
            Update::Sgd | Update::Optimistic => (0.0, 0.0, 0.0),
            Update::Momentum { mu } => (mu, 0.0, 0.0),
            Update::AdamW { beta1, beta2, eps } | Update::OptimisticAdam { beta1, beta2, eps } => (beta1, beta2, eps),
        };
        let correct = |beta: f32| (1.0 / (1.0 - f64::from(beta).powf(step.number as f64))) as f32;
        // The anchor comes last; before it m, or m and v.
        let has_anchor = u32::from(rule.anchor().is_some());
        let moments = found as u32 - has_anchor;
        let mut states = states.iter_mut().map(|s| s.all_mut());
        let mut take = |has: u32| (has > 0).then(|| states.next()).flatten().unwrap_or(Dst::at(0, 0));
        let (has_m, has_v) = (moments.min(1), moments / 2);
        let (m, v, anchor) = (take(has_m), take(has_v), take(has_anchor));
        let (has_reference, reference) = (u32::from(reference.is_some()), reference.unwrap_or(Src::EMPTY));
        let Step { lr, decay, scale, l1, .. } = *step;
        let args = args::Optimize::new(
            w,
            g,
            m,
            v,
            anchor,
            reference,
            n as u32,
            has_m,
            has_v,
            has_anchor,
            has_reference,
            lr,
            decay,
            scale,
            l1,
            beta1,
            beta2,
            eps,
            correct(beta1),
            correct(beta2),
        )?;
        self.launch(k::OPTIMIZE, args, spread(n), THREADS, 0)
    }
}

#[cfg(all(test, feature = "emu"))]
mod tests {
    use super::*;
    use crate::backend::cuda::GraphStats;

    /// Tables that differ from op to op are not sent again: else they would cut the step into pieces too short for a graph.
    #[test]
    fn a_step_that_comes_again_is_a_graph() {
        let cuda = Cuda::emulated().unwrap();
        let (rows, d, ranks, layers) = (5, 8, 2, 4);
        let mut adapters = cuda.alloc::<f32>(2 * layers * ranks * d).unwrap();
        let ones = vec![1.0; adapters.len()];
        cuda.upload(adapters.all_mut(), &ones).unwrap();
        let mut x = cuda.alloc::<bf16>(rows * d).unwrap();
        cuda.upload(x.all_mut(), &vec![bf16::ONE; rows * d]).unwrap();
        let (mut h, mut y) = (cuda.alloc::<f32>(rows * ranks).unwrap(), cuda.alloc::<f32>(rows * d).unwrap());
        for _ in 0..4 {
            for layer in 0..layers {
                let matrix = |i: usize| adapters.view((2 * layer + i) * ranks * d..(2 * layer + i + 1) * ranks * d);
                let groups = [(2, matrix(0), 0.5), (3, matrix(1), 0.25)];
                let groups = groups.map(|(rows, matrix, scale)| Group { rows, matrix, scale });
                cuda.lora_shrink(h.all_mut(), x.all(), ranks, &groups).unwrap();
                cuda.lora_expand(y.all_mut(), h.all(), Ranks::all(ranks), &groups).unwrap();
            }
            cuda.synchronize().unwrap();
        }
        // The first step sends the tables, the second is seen for the first time.
        assert_eq!(cuda.graph_stats(), GraphStats { captured: 1, replayed: 2, refused: 0 });
        let mut got = vec![0.0; rows * d];
        cuda.download(y.all(), &mut got).unwrap();
        let each = (4 * layers * ranks * d) as f32;
        let want: Vec<f32> = (0..rows * d).map(|i| each * if i < 2 * d { 0.5 } else { 0.25 }).collect();
        assert_eq!(got, want);
    }
}
