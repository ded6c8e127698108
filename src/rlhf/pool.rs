//! [`Pool`]: which of many comparisons to ask for next.

use serde::{Deserialize, Serialize};

use super::link::slope;
use super::one_pass::OnePass;
use super::vector::{argmax, axpy, dot, rows};
use crate::error::{Result, ensure};
use crate::rng::Rng;

/// By what a comparison is chosen; among equals the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choose {
    /// Largest zᵀPz: algorithm 3 of the paper.
    Uncertainty,
    /// Largest σ'(zᵀθ) zᵀPz: what this label is expected to tell.
    Fisher,
    /// Smallest |zᵀθ|.
    Margin,
    /// Largest ‖z‖.
    Norm,
    /// Any.
    Random,
}

/// Comparisons that may be asked for, with the variances of their margins: P z is taken once for each, and after a label all
/// variances follow in O(N d), since P lost a square.
pub struct Pool {
    z: Vec<f64>,
    width: usize,
    variances: Vec<f64>,
    open: Vec<bool>,
}

impl Pool {
    /// Of the rows of `z[n, d]`, as uncertain as `reward` is now.
    ///
    /// # Errors
    /// Those of [`OnePass::variances`].
    pub fn new(z: Vec<f64>, reward: &OnePass) -> Result<Self> {
        let width = reward.width();
        let open = vec![true; rows("a pool", &z, width)?];
        let variances = reward.variances(&z)?;
        Ok(Self { z, width, variances, open })
    }

    /// Comparison `k`, `[d]`.
    ///
    /// # Panics
    /// If there is none.
    pub fn z(&self, k: usize) -> &[f64] {
        &self.z[k * self.width..][..self.width]
    }

    /// Variances of all comparisons, those already asked for too.
    pub fn variances(&self) -> &[f64] {
        &self.variances
    }

    /// How many can still be asked for.
    pub fn open(&self) -> usize {
        self.open.iter().filter(|o| **o).count()
    }

    /// The comparison to ask for; none where all were.
    ///
    /// # Panics
    /// If `reward` is of another width.
    pub fn next(&self, reward: &OnePass, rule: Choose, rng: &mut Rng) -> Option<usize> {
        self.best(&self.variances, &self.open, reward, rule, rng)
    }

    /// `b` comparisons to ask for before any of their labels is known, fewer where fewer are left. Each is chosen as if those before it
    /// had been learnt from with the weight σ' that they have now: a label changes θ, but P only through that weight.
    ///
    /// # Errors
    /// What the inverse says.
    ///
    /// # Panics
    /// If `reward` is of another width.
    pub fn batch(&self, reward: &OnePass, b: usize, rule: Choose, rng: &mut Rng) -> Result<Vec<usize>> {
        let (mut variances, mut open) = (self.variances.clone(), self.open.clone());
        let (mut chosen, mut lost) = (Vec::new(), Vec::<Vec<f64>>::new());
        while chosen.len() < b {
            let Some(k) = self.best(&variances, &open, reward, rule, rng) else { break };
            open[k] = false;
            chosen.push(k);
            if matches!(rule, Choose::Uncertainty | Choose::Fisher) {
                let z = self.z(k);
                let mut v = reward.times(z)?;
                lost.iter().for_each(|l| axpy(-dot(l, z), l, &mut v));
                let (w, q) = (slope(reward.reward(z)), dot(z, &v).max(0.0));
                let root = (w / (1.0 + w * q)).sqrt();
                v.iter_mut().for_each(|v| *v *= root);
                self.subtract(&mut variances, &v);
                lost.push(v);
            }
        }
        Ok(chosen)
    }

    /// Comparison `k` was learnt from by the last [`OnePass::update`] of `reward`: it is not asked for again, and all variances follow.
    ///
    /// # Errors
    /// `Usage`: there is no comparison `k`. `Shape`: `reward` is of another width.
    pub fn learned(&mut self, k: usize, reward: &OnePass) -> Result<()> {
        ensure!(k < self.open.len(), Usage, "comparison {k} of a pool of {}", self.open.len());
        self.observe(reward)?;
        self.open[k] = false;
        Ok(())
    }

    /// `reward` learnt once more, from something that is not of this pool: all variances follow.
    ///
    /// # Errors
    /// `Shape`: `reward` is of another width.
    pub fn observe(&mut self, reward: &OnePass) -> Result<()> {
        ensure!(reward.width() == self.width, Shape, "a reward of width {}, not {}", reward.width(), self.width);
        let mut variances = std::mem::take(&mut self.variances);
        let removed = reward.removed();
        removed.chunks_exact(self.width).for_each(|v| self.subtract(&mut variances, v));
        let forget = reward.settings().forget.powi((removed.len() / self.width) as i32);
        if forget != 1.0 {
            variances.iter_mut().for_each(|s| *s /= forget);
        }
        self.variances = variances;
        Ok(())
    }

    /// Comparison `k` will not be asked for.
    ///
    /// # Errors
    /// `Usage`: there is none.
    pub fn close(&mut self, k: usize) -> Result<()> {
        ensure!(k < self.open.len(), Usage, "comparison {k} of a pool of {}", self.open.len());
        self.open[k] = false;
        Ok(())
    }

    /// Takes all variances from `reward` anew.
    ///
    /// # Errors
    /// Those of [`OnePass::variances`].
    pub fn refresh(&mut self, reward: &OnePass) -> Result<()> {
        self.variances = reward.variances(&self.z)?;
        Ok(())
    }

    fn subtract(&self, variances: &mut [f64], v: &[f64]) {
        for (s, z) in variances.iter_mut().zip(self.z.chunks_exact(self.width)) {
            *s = (*s - dot(z, v).powi(2)).max(0.0);
        }
    }

    fn best(&self, variances: &[f64], open: &[bool], reward: &OnePass, rule: Choose, rng: &mut Rng) -> Option<usize> {
        let left: Vec<usize> = (0..open.len()).filter(|&k| open[k]).collect();
        if left.is_empty() {
            return None;
        }
        let score = |&k: &usize| match rule {
            Choose::Uncertainty => variances[k],
            Choose::Fisher => slope(reward.reward(self.z(k))) * variances[k],
            Choose::Margin => -reward.reward(self.z(k)).abs(),
            Choose::Norm => dot(self.z(k), self.z(k)),
            Choose::Random => 0.0,
        };
        let place = match rule {
            Choose::Random => rng.below(left.len()),
            _ => argmax(&left.iter().map(score).collect::<Vec<_>>()),
        };
        Some(left[place])
    }
}
