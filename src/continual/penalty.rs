//! Penalties that hold an adapter near what earlier tasks left, on flat vectors.

use std::ops::Range;

use super::layout::Layout;
use super::signature::dot;

/// soft(x, a) = sign(x) max(|x| - a, 0): the proximal step of a |x|.
pub fn soft(x: f32, a: f32) -> f32 {
    x.signum() * (x.abs() - a).max(0.0)
}

/// What a quadratic penalty 1/2 lambda sum F (theta - anchor)^2 knows of finished tasks (EWC: Kirkpatrick et al. 2017, with the
/// Fisher information of all tasks in one sum).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fisher {
    /// Sum over tasks of mean squared gradients.
    pub weights: Vec<f32>,
    /// The adapter behind the last task.
    pub anchor: Vec<f32>,
}

impl Fisher {
    /// Takes in the gradient of one batch of a task that has ended, which is this share of its batches.
    pub fn add(&mut self, gradient: &[f32], share: f32) {
        self.weights.resize(gradient.len(), 0.0);
        self.weights.iter_mut().zip(gradient).for_each(|(w, g)| *w += share * g * g);
    }

    /// Adds the penalty's gradient to `grad`; returns its value.
    pub fn pull(&self, lambda: f32, values: &[f32], grad: &mut [f32]) -> f64 {
        let mut value = 0.0;
        for (((g, w), x), a) in grad.iter_mut().zip(&self.weights).zip(values).zip(&self.anchor) {
            let d = x - a;
            *g += lambda * w * d;
            value += 0.5 * f64::from(lambda * w * d * d);
        }
        value
    }
}

/// Which ranks of each module belong to which task, where every task has ranks of its own in one adapter: task k has ranks
/// k r .. (k + 1) r.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Ranks of a task.
    pub rank: usize,
}

impl Blocks {
    /// The ranks of a task.
    pub fn ranks(self, task: usize) -> Range<usize> {
        task * self.rank..(task + 1) * self.rank
    }

    /// Clears the gradients of all ranks but a task's; of A too only where `a` trains.
    pub fn keep(self, layout: &Layout, task: usize, a: bool, grad: &mut [f32]) {
        for m in &layout.modules {
            let own = self.ranks(task);
            for (r, row) in grad[m.a.clone()].chunks_exact_mut(m.input).enumerate() {
                if !a || !own.contains(&r) {
                    row.fill(0.0);
                }
            }
            for row in grad[m.b.clone()].chunks_exact_mut(m.rank) {
                row[..own.start].fill(0.0);
                row[own.end..].fill(0.0);
            }
        }
    }

    /// lambda sum over modules of sum |A_old A_new^T| (O-LoRA: Wang et al. 2023, arXiv:2310.14152), A_old the ranks of all tasks
    /// before `task`: adds its gradient by A_new, returns its value.
    pub fn orthogonal(self, layout: &Layout, task: usize, lambda: f32, values: &[f32], grad: &mut [f32]) -> f64 {
        let mut total = 0.0;
        for m in &layout.modules {
            let row = |r: usize| m.a.start + r * m.input..m.a.start + (r + 1) * m.input;
            for new in self.ranks(task) {
                for old in 0..task * self.rank {
                    let overlap = dot(&values[row(old)], &values[row(new)]);
                    total += f64::from(lambda) * overlap.abs();
                    let sign = if overlap == 0.0 { 0.0 } else { lambda * overlap.signum() as f32 };
                    let from = &values[row(old)];
                    grad[row(new)].iter_mut().zip(from).for_each(|(g, a)| *g += sign * a);
                }
            }
        }
        total
    }
}

/// The released code's penalty. With Q = sum over modules of A . G and raw = -Q, the loss becomes l - raw / (raw + 1e-5) l w, of
/// which the denominator and l count as constants; w is lambda t / T. `chosen` gives G of each module. Adds the gradient by A;
/// returns the new total.
pub fn ratio(layout: &Layout, chosen: &[&[f32]], loss: f64, weight: f64, values: &[f32], grad: &mut [f32]) -> f64 {
    let parts = layout.modules.iter().zip(chosen);
    let q: f64 = parts.clone().map(|(m, g)| dot(&values[m.a.clone()], g)).sum();
    let factor = (-loss * weight / (q - 1e-5)) as f32;
    for (m, g) in parts {
        grad[m.a.clone()].iter_mut().zip(*g).for_each(|(d, g)| *d += factor * g);
    }
    loss - (-q) / (-q + 1e-5) * loss * weight
}

#[cfg(test)]
mod tests {
    use super::super::Module;
    use super::*;
    use crate::rng::Rng;

    fn layout(modules: usize, rank: usize, input: usize, output: usize) -> Layout {
        let each = rank * (input + output);
        let module = |i: usize| {
            let (a, b) = (i * each, i * each + rank * input);
            Module { name: format!("m{i}"), layer: i, rank, input, output, a: a..b, b: b..(i + 1) * each }
        };
        Layout { modules: (0..modules).map(module).collect(), len: modules * each }
    }

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..n).map(|_| rng.normal()).collect()
    }

    /// Differences of `f` at `at`.
    fn differences(at: &[f32], f: impl Fn(&[f32]) -> f64) -> Vec<f64> {
        let moved = |i: usize, h: f32| {
            let mut v = at.to_vec();
            v[i] += h;
            (f(&v), v[i])
        };
        let of = |i: usize| {
            let ((up, a), (down, b)) = (moved(i, 1e-2), moved(i, -1e-2));
            (up - down) / f64::from(a - b)
        };
        (0..at.len()).map(of).collect()
    }

    #[test]
    fn soft_has_the_known_values() {
        assert_eq!([1.0, -0.2, 0.05].map(|x| soft(x, 0.1)), [0.9, -0.1, 0.0]);
    }

    #[test]
    fn the_released_ratio_has_the_known_values() {
        let m = Module { name: "x".into(), layer: 0, rank: 1, input: 2, output: 0, a: 0..2, b: 2..2 };
        let (layout, g, mut grad) = (Layout { modules: vec![m], len: 2 }, [3.0, 4.0], [0.0; 2]);
        let total = ratio(&layout, &[&g], 2.0, 0.5 * 0.5, &[1.0, 2.0], &mut grad);
        assert!((total - 1.499_999_55).abs() < 1e-8, "{total}");
        assert!((grad[0] + 0.136_363_8).abs() < 1e-7 && (grad[1] + 0.181_818_3).abs() < 1e-7, "{grad:?}");
    }

    #[test]
    fn the_quadratic_pull_is_its_gradient() {
        let (x, at) = (values(6, 1), values(6, 2));
        let mut f = Fisher::default();
        [(3, 0.5), (4, 0.5), (5, 1.0)].iter().for_each(|&(seed, share)| f.add(&values(6, seed), share));
        f.anchor = at.clone();
        let mut grad = vec![0.0; 6];
        assert!(f.pull(3.0, &x, &mut grad) > 0.0);
        let by_hand = differences(&x, |v| f.pull(3.0, v, &mut [0.0; 6]));
        grad.iter().zip(by_hand).for_each(|(g, d)| assert!((f64::from(*g) - d).abs() < 1e-3, "{g} {d}"));
        assert_eq!(f.pull(3.0, &at, &mut grad.clone()), 0.0);
    }

    #[test]
    fn the_orthogonal_penalty_is_its_gradient_and_is_not_zero_behind_the_first_task() {
        let (layout, blocks) = (layout(2, 6, 5, 3), Blocks { rank: 2 });
        let x = values(layout.len, 7);
        let value = |task, v: &[f32]| blocks.orthogonal(&layout, task, 0.5, v, &mut vec![0.0; layout.len]);
        assert_eq!(value(0, &x), 0.0);
        assert!(value(1, &x) > 0.1 && value(2, &x) > value(1, &x));
        let mut grad = vec![0.0; layout.len];
        blocks.orthogonal(&layout, 2, 0.5, &x, &mut grad);
        let mut by_hand: Vec<f32> = differences(&x, |v| value(2, v)).iter().map(|d| *d as f32).collect();
        // Old ranks are frozen.
        blocks.keep(&layout, 2, true, &mut by_hand);
        grad.iter().zip(&by_hand).for_each(|(g, d)| assert!((g - d).abs() < 1e-3, "{g} {d}"));
    }

    #[test]
    fn only_a_tasks_ranks_keep_their_gradient() {
        let (layout, blocks) = (layout(1, 3, 2, 2), Blocks { rank: 1 });
        let mut g = vec![1.0; layout.len];
        blocks.keep(&layout, 1, true, &mut g);
        assert_eq!(g, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]);
        blocks.keep(&layout, 1, false, &mut g);
        assert_eq!(g, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]);
    }
}
