//! Which earlier task to pull towards: lower confidence bounds on a tree (the paper, Eq. (2), by its source Coquelin & Munos 2007,
//! for costs instead of rewards), and the released code's sampling rule.

use serde::{Deserialize, Serialize};

use super::tree::Tree;
use crate::rng::Rng;

/// How wide the bound of a node is that was visited n times in t rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Width {
    /// factor sqrt(ln t / n): for costs of unit scale.
    Fixed(f64),
    /// The same times the standard deviation of the costs within a leaf, as observed so far.
    Scaled(f64),
}

/// mean - width sqrt(ln t / n); minus infinity while n = 0.
pub fn lower_bound(mean: f64, n: u64, t: u64, width: f64) -> f64 {
    if n == 0 {
        return f64::NEG_INFINITY;
    }
    mean - width * ((t.max(1) as f64).ln() / n as f64).sqrt()
}

/// What was observed at each node of a tree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arms {
    /// Visits.
    pub n: Vec<u64>,
    /// Mean cost.
    pub mean: Vec<f64>,
    /// Sum of squared deviations of costs from their leaf's mean.
    spread: f64,
    rounds: u64,
    tried: u64,
}

impl Arms {
    /// For a tree of so many nodes.
    pub fn new(nodes: usize) -> Self {
        Self { n: vec![0; nodes], mean: vec![0.0; nodes], spread: 0.0, rounds: 0, tried: 0 }
    }

    /// Rounds so far.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Standard deviation of costs within a leaf; 1 until a leaf was visited twice.
    pub fn deviation(&self) -> f64 {
        let degrees = self.rounds.saturating_sub(self.tried);
        if degrees == 0 { 1.0 } else { (self.spread / degrees as f64).sqrt() }
    }

    /// The bound of every node: of a leaf its own; of an inner one the smaller of its children's, and no less than its own minus the
    /// node's threshold (within which the leaves below it lie).
    pub fn bounds(&self, tree: &Tree, width: Width) -> Vec<f64> {
        let width = match width {
            Width::Fixed(w) => w,
            Width::Scaled(w) => w * self.deviation(),
        };
        let own = |i: usize| lower_bound(self.mean[i], self.n[i], self.rounds, width);
        let mut bounds = vec![0.0; tree.nodes.len()];
        // Children come behind their parents.
        for i in (0..tree.nodes.len()).rev() {
            let node = &tree.nodes[i];
            let below = node.children.iter().map(|&c| bounds[c]).fold(f64::INFINITY, f64::min);
            bounds[i] = if node.children.is_empty() { own(i) } else { below.max(own(i) - node.threshold) };
        }
        bounds
    }

    /// The path from the root to the leaf that the bounds lead to, always into the child with the smaller one; equals are drawn
    /// by lot.
    pub fn choose(&self, tree: &Tree, width: Width, rng: &mut Rng) -> Vec<usize> {
        let bounds = self.bounds(tree, width);
        let mut path = vec![0];
        let mut at = 0;
        while !tree.nodes[at].children.is_empty() {
            let children = &tree.nodes[at].children;
            let least = children.iter().map(|&c| bounds[c]).fold(f64::INFINITY, f64::min);
            let equals: Vec<usize> = children.iter().copied().filter(|&c| bounds[c] <= least).collect();
            at = if equals.len() == 1 { equals[0] } else { equals[rng.below(equals.len())] };
            path.push(at);
        }
        path
    }

    /// The cost at the end of a path counts for all its nodes.
    pub fn observe(&mut self, path: &[usize], cost: f64) {
        self.rounds += 1;
        for (place, &i) in path.iter().enumerate() {
            self.n[i] += 1;
            let before = cost - self.mean[i];
            self.mean[i] += before / self.n[i] as f64;
            if place + 1 == path.len() {
                self.tried += u64::from(self.n[i] == 1);
                self.spread += before * (cost - self.mean[i]);
            }
        }
    }
}

/// The released code's counts: how often each task was chosen for each module in this epoch, and the sum of its negative distances.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Released {
    /// `[task][module]`.
    pub n: Vec<Vec<u64>>,
    /// `[task][module]`.
    pub sum: Vec<Vec<f64>>,
}

/// sqrt(ln(2 T (t+1) (t+2)) / (2 n + 1e-5)): the bonus of the released code at step t of T, from 0 on.
pub fn released_bonus(n: u64, t: u64, total: u64) -> f64 {
    let (t, total) = (t as f64, total as f64);
    ((2.0 * total * (t + 1.0) * (t + 2.0)).ln() / (2.0 * n as f64 + 1e-5)).sqrt()
}

impl Released {
    /// For so many earlier tasks.
    pub fn new(tasks: usize, modules: usize) -> Self {
        Self { n: vec![vec![0; modules]; tasks], sum: vec![vec![0.0; modules]; tasks] }
    }

    /// A task for each module at step `t` of `total` of an epoch, and what each task's score was. Mean distance **plus** bonus is
    /// the score: its sign is flipped in the code, so that farther tasks are chosen more often.
    pub fn choose(&self, tree: &Tree, t: u64, total: u64, rng: &mut Rng) -> Vec<usize> {
        let tasks = self.n.len();
        let modules = self.n.first().map_or(0, Vec::len);
        let mut score: Vec<Vec<f64>> = (0..tasks)
            .map(|k| {
                let one = |m: usize| {
                    let n = self.n[k][m];
                    let mean = if n > 0 { self.sum[k][m] / n as f64 } else { 0.0 };
                    -(mean - released_bonus(n, t, total))
                };
                (0..modules).map(one).collect()
            })
            .collect();
        let all = |score: &[Vec<f64>], f: fn(f64, f64) -> f64, from: f64| score.iter().flatten().copied().fold(from, f);
        let least = all(&score, f64::min, f64::INFINITY);
        score.iter_mut().flatten().for_each(|s| *s += least);
        let sums: Vec<f64> = score.iter().map(|s| s.iter().sum()).collect();
        let drawn = draw(&sums, rng);
        if let Some(child) =
            tree.nodes.first().and_then(|root| root.children.iter().find(|&&c| tree.nodes[c].tasks.contains(&drawn)))
        {
            let child = &tree.nodes[*child];
            let factor = if child.children.is_empty() { 1.0 } else { child.threshold.min(1.5) };
            child.tasks.iter().for_each(|&k| score[k].iter_mut().for_each(|s| *s *= factor));
        }
        let range = all(&score, f64::max, f64::NEG_INFINITY) - all(&score, f64::min, f64::INFINITY) + 1e-5;
        let of = |m: usize| score.iter().map(|s| s[m] / range).collect::<Vec<f64>>();
        (0..modules).map(|m| draw(&of(m), rng)).collect()
    }

    /// What choosing task `k` for module `m` cost.
    pub fn observe(&mut self, k: usize, m: usize, distance: f64) {
        self.n[k][m] += 1;
        self.sum[k][m] -= distance;
    }
}

/// An index by the softmax of its score.
fn draw(scores: &[f64], rng: &mut Rng) -> usize {
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let mut u = f64::from(rng.uniform()) * p.iter().sum::<f64>();
    for (i, p) in p.iter().enumerate() {
        u -= p;
        if u < 0.0 {
            return i;
        }
    }
    scores.len() - 1
}
