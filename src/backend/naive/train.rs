//! The specification of training.

use super::{Matrix, Naive, activate, dot, encoder, rms};
use crate::backend::host::HostBuf;
use crate::backend::sampling::width;
use crate::backend::{AttnSpec, Group, Ranks, Step, TAIL, Target, Train, Update, Visible, Write};
use crate::error::{Result, ensure};
use crate::model::config::Activation;

pub(super) fn put(write: Write, to: &mut f64, x: f64) {
    match write {
        Write::Set => *to = x,
        Write::Add => *to += x,
    }
}

/// Derivative of [`activate`].
fn slope(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            s * (1.0 + x * (1.0 - s))
        }
        Activation::GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let t = (c * (x + 0.044715 * x * x * x)).tanh();
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * x * x)
        }
    }
}

fn softmax(z: &[f64], tau: f64) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = z.iter().map(|z| ((z - max) / tau).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

/// x ln(x / y), 0 where x is.
fn relative(x: f64, y: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x * (x / y).ln() }
}

/// A row's loss and its gradient by the logits z.
fn loss(target: &Target<'_, Naive>, row: usize, z: &[f64]) -> (f64, Vec<f64>) {
    let vocab = z.len();
    let q = softmax(z, 1.0);
    let at = |p: &[f64]| p[row * vocab..][..vocab].to_vec();
    let cross = |p: &[f64]| -> (f64, Vec<f64>) {
        let total: f64 = p.iter().sum();
        let value = p.iter().zip(&q).map(|(p, q)| if *p == 0.0 { 0.0 } else { -p * q.ln() }).sum();
        (value, q.iter().zip(p).map(|(q, p)| total * q - p).collect())
    };
    match *target {
        Target::Hard(ids) => {
            let mut p = vec![0.0; vocab];
            p[ids[row] as usize] = 1.0;
            cross(&p)
        }
        Target::Soft(p) => cross(&at(p)),
        Target::ForwardKl(p) => {
            let p = at(p);
            (p.iter().zip(&q).map(|(p, q)| relative(*p, *q)).sum(), cross(&p).1)
        }
        Target::ReverseKl(p) => {
            let ratio: Vec<f64> = q.iter().zip(at(p)).map(|(q, p)| (q / p).ln()).collect();
            let kl = dot(&q, &ratio);
            (kl, q.iter().zip(ratio).map(|(q, l)| q * (l - kl)).collect())
        }
        Target::TotalVariation(p) => {
            let p = at(p);
            let half = |q: f64, p: f64| if q == p { 0.0 } else { 0.5 * (q - p).signum() };
            let s: Vec<f64> = q.iter().zip(&p).map(|(q, p)| half(*q, *p)).collect();
            let mean = dot(&q, &s);
            let value = q.iter().zip(&p).map(|(q, p)| 0.5 * (q - p).abs()).sum();
            (value, q.iter().zip(s).map(|(q, s)| q * (s - mean)).collect())
        }
        Target::TopK { ids, p, k, tail } => {
            let (ids, p) = (&ids[row * k..][..k], &p[row * k..][..k]);
            let mut full = vec![0.0; vocab];
            ids.iter().zip(p).for_each(|(&id, &p)| full[id as usize] = p as f64);
            let (mut value, mut grad) = cross(&full);
            let rest = |j: usize| !ids.contains(&(j as u32));
            let (p_tail, q_tail) =
                (1.0 - full.iter().sum::<f64>(), (0..vocab).filter(|&j| rest(j)).map(|j| q[j]).sum::<f64>());
            if tail && p_tail >= TAIL.1 {
                value -= p_tail * q_tail.max(TAIL.0).ln();
                // A tail at its floor is a constant.
                if q_tail > TAIL.0 {
                    for (j, g) in grad.iter_mut().enumerate() {
                        *g += p_tail * q[j] - if rest(j) { p_tail * q[j] / q_tail } else { 0.0 };
                    }
                }
            }
            (value, grad)
        }
        Target::Entropy { tau, labels } => {
            let best = (0..vocab).fold(0, |best, j| if z[j] > z[best] { j } else { best });
            if best != labels[row] as usize {
                return (0.0, vec![0.0; vocab]);
            }
            let p = softmax(z, tau as f64);
            let h = -p.iter().map(|&p| relative(p, 1.0)).sum::<f64>();
            let grad = p.iter().map(|&p| -(relative(p, 1.0) + p * h) / tau as f64).collect();
            (h, grad)
        }
    }
}

impl Train for Naive {
    fn trainable(&self, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix { rows, cols, data: vec![0.0; rows * cols] })
    }

    fn set_weight(&self, w: &mut Matrix, values: &[f64]) -> Result<()> {
        w.data.copy_from_slice(values);
        Ok(())
    }

    fn copy(&self, y: &mut [f64], x: &[f64]) -> Result<()> {
        y.copy_from_slice(x);
        Ok(())
    }

    fn zero(&self, x: &mut [f64]) -> Result<()> {
        x.fill(0.0);
        Ok(())
    }

    fn axpy(&self, y: &mut [f64], a: f32, x: &[f64]) -> Result<()> {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += a as f64 * x);
        Ok(())
    }

    fn sq_norm(&self, tensors: &[&[f64]]) -> Result<f64> {
        Ok(tensors.iter().map(|x| dot(x, x)).sum())
    }

    fn linear_fwd(
        &self,
        y: &mut [f64],
        x: &[f64],
        w: &Matrix,
        bias: Option<&HostBuf<f64>>,
        write: Write,
    ) -> Result<()> {
        for (y, x) in y.chunks_exact_mut(w.rows).zip(x.chunks_exact(w.cols)) {
            for (o, y) in y.iter_mut().enumerate() {
                put(write, y, dot(&w.data[o * w.cols..][..w.cols], x) + bias.map_or(0.0, |b| b[o]));
            }
        }
        Ok(())
    }

    fn linear_bwd_x(&self, dx: &mut [f64], dy: &[f64], w: &Matrix, write: Write) -> Result<()> {
        for (dx, dy) in dx.chunks_exact_mut(w.cols).zip(dy.chunks_exact(w.rows)) {
            for (i, dx) in dx.iter_mut().enumerate() {
                put(write, dx, dy.iter().enumerate().map(|(o, dy)| dy * w.data[o * w.cols + i]).sum());
            }
        }
        Ok(())
    }

    fn linear_bwd_w(&self, dw: &mut [f64], dy: &[f64], x: &[f64], rows: usize) -> Result<()> {
        let (out, input) = (width("linear_bwd_w", dy.len(), rows)?, width("linear_bwd_w", x.len(), rows)?);
        for (dy, x) in dy.chunks_exact(out).zip(x.chunks_exact(input)) {
            for (dw, dy) in dw.chunks_exact_mut(input).zip(dy) {
                dw.iter_mut().zip(x).for_each(|(dw, x)| *dw += dy * x);
            }
        }
        Ok(())
    }

    fn column_sums(&self, db: &mut [f64], dy: &[f64]) -> Result<()> {
        for dy in dy.chunks_exact(db.len()) {
            db.iter_mut().zip(dy).for_each(|(db, dy)| *db += dy);
        }
        Ok(())
    }

    fn rms_norm_bwd(
        &self,
        dx: &mut [f64],
        mut dw: Option<&mut [f64]>,
        dy: &[f64],
        x: &[f64],
        w: &HostBuf<f64>,
        eps: f32,
        write: Write,
    ) -> Result<()> {
        let d = w.len();
        for ((dx, dy), x) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)) {
            let s = 1.0 / rms(x, eps);
            let mean = (0..d).map(|i| w[i] * dy[i] * x[i]).sum::<f64>() / d as f64;
            for i in 0..d {
                put(write, &mut dx[i], s * (w[i] * dy[i] - x[i] * s * s * mean));
            }
            if let Some(dw) = &mut dw {
                (0..d).for_each(|i| dw[i] += dy[i] * x[i] * s);
            }
        }
        Ok(())
    }

    fn layer_norm(&self, y: &mut [f64], x: &[f64], w: &HostBuf<f64>, b: &HostBuf<f64>, eps: f32) -> Result<()> {
        encoder::layer_norm(y, x, w, b, eps);
        Ok(())
    }

    fn layer_norm_bwd(
        &self,
        dx: &mut [f64],
        dw: Option<&mut [f64]>,
        dy: &[f64],
        x: &[f64],
        w: &HostBuf<f64>,
        eps: f32,
        write: Write,
    ) -> Result<()> {
        encoder::layer_norm_bwd(dx, dw, dy, x, w, eps, write);
        Ok(())
    }

    fn gelu(&self, y: &mut [f64], x: &[f64]) -> Result<()> {
        encoder::gelu(y, x);
        Ok(())
    }

    fn gelu_bwd(&self, dx: &mut [f64], dy: &[f64], x: &[f64]) -> Result<()> {
        encoder::gelu_bwd(dx, dy, x);
        Ok(())
    }

    fn add_scaled(&self, y: &mut [f64], x: &[f64], w: &HostBuf<f64>) -> Result<()> {
        encoder::add_scaled(y, x, w);
        Ok(())
    }

    fn add_scaled_bwd(
        &self,
        dx: &mut [f64],
        dw: Option<&mut [f64]>,
        dy: &[f64],
        x: &[f64],
        w: &HostBuf<f64>,
    ) -> Result<()> {
        encoder::add_scaled_bwd(dx, dw, dy, x, w);
        Ok(())
    }

    fn glu_bwd(
        &self,
        dgate: &mut [f64],
        dup: &mut [f64],
        dz: &[f64],
        gate: &[f64],
        up: &[f64],
        act: Activation,
    ) -> Result<()> {
        for i in 0..dz.len() {
            dgate[i] = dz[i] * up[i] * slope(act, gate[i]);
            dup[i] = dz[i] * activate(act, gate[i]);
        }
        Ok(())
    }

    fn attend(
        &self,
        y: &mut [f64],
        lse: &mut [f64],
        q: &[f64],
        k: &[f64],
        v: &[f64],
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        let (rows, d) = (lse.len() / spec.heads, spec.head_dim);
        visible.check(rows)?;
        for i in 0..rows {
            for h in 0..spec.heads {
                let at = i * spec.q_dim() + h * d;
                let key = |j: usize| j * spec.kv_dim() + h * spec.kv_heads / spec.heads * d;
                let seen: Vec<usize> = (0..rows).filter(|&j| visible.sees(i, j)).collect();
                let score: Vec<f64> =
                    seen.iter().map(|&j| spec.scale as f64 * dot(&q[at..][..d], &k[key(j)..][..d])).collect();
                let max = score.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let l = max + score.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
                lse[i * spec.heads + h] = l;
                let y = &mut y[at..][..d];
                y.fill(0.0);
                for (s, &j) in score.iter().zip(&seen) {
                    y.iter_mut().zip(&v[key(j)..][..d]).for_each(|(y, v)| *y += (s - l).exp() * v);
                }
            }
        }
        Ok(())
    }

    fn attend_bwd(
        &self,
        dq: &mut [f64],
        dk: &mut [f64],
        dv: &mut [f64],
        dy: &[f64],
        y: &[f64],
        lse: &[f64],
        q: &[f64],
        k: &[f64],
        v: &[f64],
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        let (rows, d, scale) = (lse.len() / spec.heads, spec.head_dim, spec.scale as f64);
        visible.check(rows)?;
        [&mut *dq, &mut *dk, &mut *dv].into_iter().for_each(|g| g.fill(0.0));
        for i in 0..rows {
            for h in 0..spec.heads {
                let at = i * spec.q_dim() + h * d;
                let (dy, y) = (&dy[at..][..d], &y[at..][..d]);
                for j in (0..rows).filter(|&j| visible.sees(i, j)) {
                    let key = j * spec.kv_dim() + h * spec.kv_heads / spec.heads * d;
                    let p = (scale * dot(&q[at..][..d], &k[key..][..d]) - lse[i * spec.heads + h]).exp();
                    let s = scale * p * (dot(dy, &v[key..][..d]) - dot(dy, y));
                    for c in 0..d {
                        dq[at + c] += s * k[key + c];
                        dk[key + c] += s * q[at + c];
                        dv[key + c] += p * dy[c];
                    }
                }
            }
        }
        Ok(())
    }

    fn scatter_rows(&self, dx: &mut [f64], dy: &[f64], rows: &[u32], d: usize) -> Result<()> {
        for (dy, &r) in dy.chunks_exact(d).zip(rows) {
            dx[r as usize * d..][..d].iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
        }
        Ok(())
    }

    fn embed_bwd(&self, dtable: &mut [f64], dx: &[f64], tokens: &[u32], scale: f32) -> Result<()> {
        let d = dx.len() / tokens.len().max(1);
        for (dx, &t) in dx.chunks_exact(d.max(1)).zip(tokens) {
            dtable[t as usize * d..][..d].iter_mut().zip(dx).for_each(|(g, dx)| *g += scale as f64 * dx);
        }
        Ok(())
    }

    fn lora_shrink(&self, h: &mut [f64], x: &[f64], ranks: usize, groups: &[Group<'_, Self>]) -> Result<()> {
        for ((r, h), a) in h.chunks_exact_mut(ranks).enumerate().zip(each_row(groups)) {
            let d = a.matrix.len() / ranks;
            h.iter_mut().enumerate().for_each(|(i, h)| *h = dot(&a.matrix[i * d..][..d], &x[r * d..][..d]));
        }
        Ok(())
    }

    fn lora_expand(&self, y: &mut [f64], h: &[f64], part: Ranks, groups: &[Group<'_, Self>]) -> Result<()> {
        let rows = h.len() / part.stride;
        let out = width("lora_expand", y.len(), rows)?;
        for ((r, y), b) in y.chunks_exact_mut(out).enumerate().zip(each_row(groups)) {
            let h = &h[r * part.stride + part.first..][..part.n];
            y.iter_mut()
                .enumerate()
                .for_each(|(o, y)| *y += b.scale as f64 * dot(&b.matrix[o * part.n..][..part.n], h));
        }
        Ok(())
    }

    fn lora_expand_bwd(&self, dh: &mut [f64], dy: &[f64], part: Ranks, groups: &[Group<'_, Self>]) -> Result<()> {
        let rows = dh.len() / part.stride;
        let out = width("lora_expand_bwd", dy.len(), rows)?;
        for ((r, dy), b) in dy.chunks_exact(out).enumerate().zip(each_row(groups)) {
            let dh = &mut dh[r * part.stride + part.first..][..part.n];
            for (i, dh) in dh.iter_mut().enumerate() {
                *dh = b.scale as f64 * dy.iter().enumerate().map(|(o, dy)| dy * b.matrix[o * part.n + i]).sum::<f64>();
            }
        }
        Ok(())
    }

    fn lora_shrink_bwd(&self, dx: &mut [f64], dh: &[f64], ranks: usize, groups: &[Group<'_, Self>]) -> Result<()> {
        for ((r, dh), a) in dh.chunks_exact(ranks).enumerate().zip(each_row(groups)) {
            let d = a.matrix.len() / ranks;
            for (i, dx) in dx[r * d..][..d].iter_mut().enumerate() {
                *dx += dh.iter().enumerate().map(|(k, dh)| dh * a.matrix[k * d + i]).sum::<f64>();
            }
        }
        Ok(())
    }

    fn lora_bwd_b(&self, db: &mut [f64], dy: &[f64], h: &[f64], part: Ranks, scale: f32) -> Result<()> {
        let out = db.len() / part.n;
        for (dy, h) in dy.chunks_exact(out).zip(h.chunks_exact(part.stride)) {
            for (db, dy) in db.chunks_exact_mut(part.n).zip(dy) {
                db.iter_mut().zip(&h[part.first..]).for_each(|(db, h)| *db += scale as f64 * dy * h);
            }
        }
        Ok(())
    }

    fn lora_bwd_a(&self, da: &mut [f64], dh: &[f64], x: &[f64], ranks: usize) -> Result<()> {
        self.linear_bwd_w(da, dh, x, dh.len() / ranks)
    }

    fn loss_rows(
        &self,
        losses: &mut [f64],
        logits: &mut [f64],
        target: &Target<'_, Self>,
        weights: &[f32],
    ) -> Result<()> {
        let vocab = width("loss_rows", logits.len(), losses.len())?;
        ensure!(weights.len() == losses.len(), Shape, "loss_rows: {} weights of rows", weights.len());
        for (r, (z, l)) in logits.chunks_exact_mut(vocab).zip(losses).enumerate() {
            let (value, grad) = loss(target, r, z);
            *l = value;
            z.iter_mut().zip(grad).for_each(|(z, g)| *z = if weights[r] == 0.0 { 0.0 } else { weights[r] as f64 * g });
        }
        Ok(())
    }

    fn softmax_rows(&self, x: &mut [f64], vocab: usize, tau: f32) -> Result<()> {
        for x in x.chunks_exact_mut(vocab) {
            let p = softmax(x, tau as f64);
            x.copy_from_slice(&p);
        }
        Ok(())
    }

    fn smooth_l1(&self, loss: &mut [f64], dx: &mut [f64], x: &[f64], target: &[f64], weights: &[f32]) -> Result<()> {
        let d = width("smooth_l1", x.len(), loss.len())?;
        for (r, loss) in loss.iter_mut().enumerate() {
            *loss = 0.0;
            for i in r * d..(r + 1) * d {
                let e = x[i] - target[i];
                *loss += if e.abs() < 1.0 { 0.5 * e * e } else { e.abs() - 0.5 } / d as f64;
                dx[i] = weights[r] as f64 * e.clamp(-1.0, 1.0) / d as f64;
            }
        }
        Ok(())
    }

    fn optimize(
        &self,
        w: &mut [f64],
        g: &[f64],
        states: &mut [HostBuf<f64>],
        reference: Option<&[f64]>,
        step: &Step,
    ) -> Result<()> {
        let (lr, decay, l1) = (step.lr as f64, step.decay as f64, step.l1 as f64);
        let adam = |states: &mut [HostBuf<f64>], i: usize, g: f64, beta1: f32, beta2: f32, eps: f32| {
            let (b1, b2, n) = (beta1 as f64, beta2 as f64, step.number as i32);
            states[0][i] = b1 * states[0][i] + (1.0 - b1) * g;
            states[1][i] = b2 * states[1][i] + (1.0 - b2) * g * g;
            let (m, v) = (states[0][i] / (1.0 - b1.powi(n)), states[1][i] / (1.0 - b2.powi(n)));
            m / (v.sqrt() + eps as f64)
        };
        let prox = |i: usize, w: f64| {
            let r = reference.map_or(0.0, |r| r[i]);
            r + (w - r).signum() * ((w - r).abs() - l1).max(0.0)
        };
        for i in 0..w.len() {
            let g = step.scale as f64 * g[i];
            let moved = |w: f64, direction: f64| prox(i, w - lr * (direction + decay * w));
            w[i] = match step.rule {
                Update::Sgd => moved(w[i], g),
                Update::Momentum { mu } => {
                    states[0][i] = mu as f64 * states[0][i] + g;
                    moved(w[i], states[0][i])
                }
                Update::AdamW { beta1, beta2, eps } => moved(w[i], adam(states, i, g, beta1, beta2, eps)),
                Update::Optimistic => {
                    states[0][i] = moved(states[0][i], g);
                    states[0][i] - lr * g
                }
                Update::OptimisticAdam { beta1, beta2, eps } => {
                    let u = adam(states, i, g, beta1, beta2, eps);
                    states[2][i] = moved(states[2][i], u);
                    states[2][i] - lr * u
                }
            };
        }
        Ok(())
    }
}

/// The group of each row.
fn each_row<'s, 'a>(groups: &'s [Group<'a, Naive>]) -> impl Iterator<Item = &'s Group<'a, Naive>> {
    groups.iter().flat_map(|g| std::iter::repeat_n(g, g.rows))
}
