//! Losses of rows of logits, which become their gradients in place. Sums are f64.

use super::super::lanes::math::exp;
use super::super::lanes::{Kernel, Simd, dispatch};
use super::super::logits::{greatest, logits_stats};
use super::super::rows::each_vector;
use super::super::{Cpu, Tier};
use super::rows::each_row;
use crate::backend::sampling::width;
use crate::backend::{TAIL, Target};
use crate::error::{Result, ensure};

/// z = e^(z - max) scale.
struct Exp<'a> {
    z: &'a mut [f32],
    max: f32,
    scale: f32,
}

impl Kernel for Exp<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (z, max, scale) = (self.z, s.splat(self.max), s.splat(self.scale));
        each_vector!(s, z, [z], s.mul(exp(s, s.sub(z, max)), scale));
    }
}

/// z = e^(z - max); returns max and the sum, in f64 over runs that are short enough for f32.
struct Weigh<'a>(&'a mut [f32]);

impl Kernel for Weigh<'_> {
    type Out = (f32, f64);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f64) {
        let max = greatest(s, self.0);
        let (top, mut sum) = (s.splat(max), 0.0f64);
        for z in self.0.chunks_mut(16 * S::N) {
            let mut acc = s.splat(0.0);
            for z in z.chunks_mut(S::N) {
                if z.len() == S::N {
                    let e = exp(s, s.sub(s.load(z), top));
                    acc = s.add(acc, e);
                    s.store(e, z);
                } else {
                    let e = exp(s, s.sub(s.load_part(z, f32::NEG_INFINITY), top));
                    acc = s.add(acc, e);
                    s.store_part(e, z);
                }
            }
            sum += f64::from(s.sum(acc));
        }
        (max, sum)
    }
}

struct Scale<'a>(&'a mut [f32], f32);

impl Kernel for Scale<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (z, by) = (self.0, s.splat(self.1));
        each_vector!(s, z, [z], s.mul(z, by));
    }
}

/// Cross-entropy with one right token, which most rows of most runs ask for: two passes over the row.
fn hard(tier: Tier, id: usize, z: &mut [f32], weight: f32) -> f64 {
    let right = f64::from(z[id]);
    let (max, sum) = dispatch(tier, Weigh(z));
    dispatch(tier, Scale(z, (f64::from(weight) / sum) as f32));
    z[id] -= weight;
    f64::from(max) + sum.ln() - right
}

/// z = softmax(z / tau).
fn softmax(tier: Tier, z: &mut [f32], tau: f32) {
    if tau != 1.0 {
        z.iter_mut().for_each(|z| *z /= tau);
    }
    let (_, sum) = dispatch(tier, Weigh(z));
    dispatch(tier, Scale(z, (1.0 / sum) as f32));
}

fn sum(n: usize, f: impl Fn(usize) -> f64) -> f64 {
    (0..n).map(f).sum()
}

/// x ln(x / y), 0 where x is.
fn relative(x: f64, y: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x * (x / y).ln() }
}

/// What makes probabilities of a row's logits.
struct Normal {
    tier: Tier,
    max: f32,
    lse: f64,
}

impl Normal {
    fn of(tier: Tier, z: &[f32]) -> Self {
        let stats = logits_stats(tier, z);
        Self { tier, max: stats.max, lse: stats.lse }
    }

    fn log_q(&self, z: f32) -> f64 {
        f64::from(z) - self.lse
    }

    /// z = softmax(z) factor.
    fn weigh(&self, z: &mut [f32], factor: f64) {
        let scale = (factor * (f64::from(self.max) - self.lse).exp()) as f32;
        dispatch(self.tier, Exp { z, max: self.max, scale });
    }
}

/// Loss of row `row`; z becomes the gradient times `weight`.
fn loss(tier: Tier, target: &Target<'_, Cpu>, row: usize, z: &mut [f32], weight: f32) -> f64 {
    let n = z.len();
    let at = row * n..(row + 1) * n;
    let w = f64::from(weight);
    match *target {
        Target::Hard(ids) => hard(tier, ids[row] as usize, z, weight),
        Target::Soft(p) | Target::ForwardKl(p) => {
            let (p, q) = (&p[at], Normal::of(tier, z));
            let total = p.iter().map(|&p| f64::from(p)).sum::<f64>();
            let mut value = sum(n, |j| if p[j] == 0.0 { 0.0 } else { -f64::from(p[j]) * q.log_q(z[j]) });
            if matches!(target, Target::ForwardKl(_)) {
                value += sum(n, |j| relative(f64::from(p[j]), 1.0));
            }
            q.weigh(z, w * total);
            z.iter_mut().zip(p).for_each(|(z, p)| *z -= weight * p);
            value
        }
        Target::ReverseKl(p) => {
            let (p, q) = (&p[at], Normal::of(tier, z));
            let ratio = |z: f32, p: f32| q.log_q(z) - f64::from(p).ln();
            let kl = sum(n, |j| q.log_q(z[j]).exp() * ratio(z[j], p[j]));
            for (z, &p) in z.iter_mut().zip(p) {
                *z = (w * q.log_q(*z).exp() * (ratio(*z, p) - kl)) as f32;
            }
            kl
        }
        Target::TotalVariation(p) => {
            let p = &p[at];
            Normal::of(tier, z).weigh(z, 1.0);
            let half = |q: f32, p: f32| if q == p { 0.0 } else { 0.5f64.copysign(f64::from(q - p)) };
            let mean = sum(n, |j| f64::from(z[j]) * half(z[j], p[j]));
            let value = sum(n, |j| 0.5 * f64::from((z[j] - p[j]).abs()));
            z.iter_mut().zip(p).for_each(|(z, p)| *z = (w * f64::from(*z) * (half(*z, *p) - mean)) as f32);
            value
        }
        Target::TopK { ids, p, k, tail } => {
            let (ids, p, q) = (&ids[row * k..][..k], &p[row * k..][..k], Normal::of(tier, z));
            let kept: f64 = p.iter().map(|&p| f64::from(p)).sum();
            let log_q = |j: usize| q.log_q(z[j]);
            let mut value = -ids.iter().zip(p).map(|(&j, &p)| f64::from(p) * log_q(j as usize)).sum::<f64>();
            let kept_q: Vec<f64> = ids.iter().map(|&j| log_q(j as usize).exp()).collect();
            let (p_tail, mut factor) = (1.0 - kept, kept);
            let mut tail_q = 0.0;
            if tail && p_tail >= TAIL.1 {
                // The sum over the others, not one less the sum over these: that would cancel.
                let mut others = z.to_vec();
                ids.iter().for_each(|&j| others[j as usize] = f32::NEG_INFINITY);
                tail_q = (logits_stats(tier, &others).lse - q.lse).exp();
                value -= p_tail * tail_q.max(TAIL.0).ln();
                if tail_q > TAIL.0 {
                    factor = kept + p_tail - p_tail / tail_q;
                }
            }
            q.weigh(z, w * factor);
            let in_tail = tail && p_tail >= TAIL.1 && tail_q > TAIL.0;
            for ((&j, &p), kept_q) in ids.iter().zip(p).zip(kept_q) {
                let all = if in_tail { kept + p_tail } else { kept };
                z[j as usize] = (w * (all * kept_q - f64::from(p))) as f32;
            }
            value
        }
        Target::Entropy { tau, labels } => {
            if logits_stats(tier, z).argmax != labels[row] {
                z.fill(0.0);
                return 0.0;
            }
            softmax(tier, z, tau);
            let h = -sum(n, |j| relative(f64::from(z[j]), 1.0));
            z.iter_mut().for_each(|z| {
                let p = f64::from(*z);
                *z = (-w * (relative(p, 1.0) + p * h) / f64::from(tau)) as f32;
            });
            h
        }
    }
}

impl Cpu {
    pub(super) fn losses(
        &self,
        losses: &mut [f32],
        logits: &mut [f32],
        target: &Target<'_, Cpu>,
        weights: &[f32],
    ) -> Result<()> {
        let (vocab, rows) = (width("loss_rows", logits.len(), losses.len())?, losses.len());
        ensure!(weights.len() == rows, Shape, "loss_rows: {} weights of {rows} rows", weights.len());
        let inside = |ids: &[u32], n: usize| ids.len() == n && ids.iter().all(|&id| (id as usize) < vocab);
        let fits = match *target {
            Target::Hard(ids) | Target::Entropy { labels: ids, .. } => inside(ids, rows),
            Target::Soft(p) | Target::ForwardKl(p) | Target::ReverseKl(p) | Target::TotalVariation(p) => {
                p.len() == rows * vocab
            }
            Target::TopK { ids, p, k, .. } => inside(ids, rows * k) && p.len() == rows * k,
        };
        ensure!(fits, Shape, "loss_rows: targets for {rows} rows of {vocab} logits do not fit");
        let mut all: Vec<_> = losses.iter_mut().zip(logits.chunks_exact_mut(vocab)).collect();
        each_row(self.pool(), &mut all, |r, (l, z)| {
            **l = loss(self.tier(), target, r, z, weights[r]) as f32;
            if weights[r] == 0.0 {
                z.fill(0.0);
            }
        });
        Ok(())
    }

    pub(super) fn softmaxes(&self, x: &mut [f32], vocab: usize, tau: f32) {
        self.pool().run_chunks(x, vocab, |_, x| softmax(self.tier(), x, tau));
    }

    pub(super) fn smooth_l1_rows(
        &self,
        loss: &mut [f32],
        dx: &mut [f32],
        x: &[f32],
        target: &[f32],
        weights: &[f32],
    ) -> Result<()> {
        let d = width("smooth_l1", x.len(), loss.len())?;
        let fits = dx.len() == x.len() && target.len() == x.len() && weights.len() == loss.len();
        ensure!(fits, Shape, "smooth_l1: {} rows of {d} do not fit their targets", loss.len());
        let mut all: Vec<_> = loss.iter_mut().zip(dx.chunks_exact_mut(d)).collect();
        each_row(self.pool(), &mut all, |r, (loss, dx)| {
            let at = r * d..(r + 1) * d;
            let factor = weights[r] / d as f32;
            let mut total = 0.0f64;
            for ((dx, x), t) in dx.iter_mut().zip(&x[at.clone()]).zip(&target[at]) {
                let e = x - t;
                total += f64::from(if e.abs() < 1.0 { 0.5 * e * e } else { e.abs() - 0.5 });
                *dx = factor * e.clamp(-1.0, 1.0);
            }
            **loss = (total / d as f64) as f32;
        });
        Ok(())
    }
}
