//! Optimisers: one pass over a weight, its gradient and their states.

use super::super::Cpu;
use super::super::lanes::{Kernel, Simd, dispatch};
use crate::backend::host::HostBuf;
use crate::backend::{Step, Update};
use crate::error::{Result, ensure};

/// Elements of one task.
const PART: usize = 16 * 1024;

/// What of every tensor one task works on.
struct Part<'a> {
    w: &'a mut [f32],
    g: &'a [f32],
    states: [&'a mut [f32]; 3],
    reference: &'a [f32],
}

/// r + soft(w - r, t).
#[inline(always)]
fn prox(w: f32, r: f32, t: f32) -> f32 {
    let d = w - r;
    r + (d - d.clamp(-t, t))
}

struct Run<'p, 'a>(&'p mut Part<'a>, &'p Step);

impl Kernel for Run<'_, '_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        step(self.0, self.1);
    }
}

#[inline(always)]
fn step(part: &mut Part<'_>, step: &Step) {
    let Part { w, g, states: [s0, s1, s2], reference } = part;
    let n = w.len();
    let (lr, keep, scale) = (step.lr, 1.0 - step.lr * step.decay, step.scale);
    let (g, w) = (&g[..n], &mut w[..n]);
    let bias = |beta: f32| (1.0 / (1.0 - f64::from(beta).powi(step.number.min(i32::MAX as u64) as i32))) as f32;
    let pull = |i: usize, w: f32| {
        if step.l1 == 0.0 { w } else { prox(w, if reference.is_empty() { 0.0 } else { reference[i] }, step.l1) }
    };
    macro_rules! adam {
        ($beta1:expr, $beta2:expr, $eps:expr, |$i:ident, $u:ident| $put:expr) => {{
            let (b1, b2, c1, c2) = ($beta1, $beta2, bias($beta1), bias($beta2));
            let (m, v) = (&mut s0[..n], &mut s1[..n]);
            for $i in 0..n {
                let g = scale * g[$i];
                m[$i] = b1 * m[$i] + (1.0 - b1) * g;
                v[$i] = b2 * v[$i] + (1.0 - b2) * g * g;
                let $u = m[$i] * c1 / ((v[$i] * c2).sqrt() + $eps);
                $put;
            }
        }};
    }
    match step.rule {
        Update::Sgd => (0..n).for_each(|i| w[i] = pull(i, keep * w[i] - lr * (scale * g[i]))),
        Update::Momentum { mu } => {
            let m = &mut s0[..n];
            for i in 0..n {
                m[i] = mu * m[i] + scale * g[i];
                w[i] = pull(i, keep * w[i] - lr * m[i]);
            }
        }
        Update::AdamW { beta1, beta2, eps } => {
            adam!(beta1, beta2, eps, |i, u| w[i] = pull(i, keep * w[i] - lr * u))
        }
        Update::Optimistic => {
            let a = &mut s0[..n];
            for i in 0..n {
                let g = scale * g[i];
                a[i] = pull(i, keep * a[i] - lr * g);
                w[i] = a[i] - lr * g;
            }
        }
        Update::OptimisticAdam { beta1, beta2, eps } => {
            let a = &mut s2[..n];
            adam!(beta1, beta2, eps, |i, u| {
                a[i] = pull(i, keep * a[i] - lr * u);
                w[i] = a[i] - lr * u;
            })
        }
    }
}

impl Cpu {
    pub(super) fn step(
        &self,
        w: &mut [f32],
        g: &[f32],
        states: &mut [HostBuf<f32>],
        reference: Option<&[f32]>,
        how: &Step,
    ) -> Result<()> {
        let n = w.len();
        let fits = states.len() == how.rule.states() && states.iter().all(|s| s.len() >= n);
        let reference_fits = reference.is_none_or(|r| r.len() == n);
        ensure!(g.len() == n && fits && reference_fits, Shape, "optimize: {n} weights, {} gradients", g.len());
        let mut states: Vec<_> = states.iter_mut().map(|s| s[..n].chunks_mut(PART)).collect();
        let mut parts: Vec<Part<'_>> = w
            .chunks_mut(PART)
            .zip(g.chunks(PART))
            .enumerate()
            .map(|(i, (w, g))| {
                let mut next = |k: usize| states.get_mut(k).and_then(Iterator::next).unwrap_or_default();
                let reference = reference.map_or(&[][..], |r| &r[i * PART..][..w.len()]);
                Part { w, g, states: [next(0), next(1), next(2)], reference }
            })
            .collect();
        self.pool().run_chunks(&mut parts, 1, |_, p| p.iter_mut().for_each(|p| dispatch(self.tier(), Run(p, how))));
        Ok(())
    }
}
