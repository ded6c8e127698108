//! [`Scale`]: features centred and scaled per dimension, learnt from the first ones and then frozen.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// phi <- (phi - mu) / (sd sqrt(d)), so that features have mean 0 and mean square norm 1. Hidden states of language models have a few
/// dimensions that are a hundred times larger than the others; without this a ridge term means nothing (the figures are in
/// docs/rlhf.md). Moments are Welford's (1962). The theory wants a fixed feature map: once so many were seen, mu and sd stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// Features that are waited for.
    pub wanted: u64,
    /// Features seen.
    pub seen: u64,
    mean: Vec<f64>,
    squares: Vec<f64>,
}

impl Scale {
    /// Of features of width `d`, frozen behind `wanted` of them.
    pub fn new(d: usize, wanted: u64) -> Self {
        Self { wanted, seen: 0, mean: vec![0.0; d], squares: vec![0.0; d] }
    }

    /// Width of a feature.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// Whether it changes no more.
    pub fn is_frozen(&self) -> bool {
        self.seen >= self.wanted
    }

    /// Learns from a feature, unless it is frozen.
    ///
    /// # Errors
    /// A feature of another width, or one that is not finite.
    pub fn observe(&mut self, feature: &[f32]) -> Result<()> {
        let (n, d) = (feature.len(), self.width());
        ensure!(n == d, Shape, "a feature of width {n}, expected {d}");
        ensure!(feature.iter().all(|x| x.is_finite()), Diverged, "a feature is not finite");
        if self.is_frozen() {
            return Ok(());
        }
        self.seen += 1;
        for ((m, s), &x) in self.mean.iter_mut().zip(&mut self.squares).zip(feature) {
            let x = f64::from(x);
            let before = x - *m;
            *m += before / self.seen as f64;
            *s += before * (x - *m);
        }
        Ok(())
    }

    /// What [`Scale::parts`] gave of one that had seen so many.
    pub fn of_parts(wanted: u64, seen: u64, mean: Vec<f64>, squares: Vec<f64>) -> Self {
        Self { wanted, seen, mean, squares }
    }

    /// Mean, and sum of squared distances from it, of each dimension.
    pub fn parts(&self) -> (&[f64], &[f64]) {
        (&self.mean, &self.squares)
    }

    /// Mean and standard deviation of each dimension.
    pub fn moments(&self) -> (&[f64], Vec<f64>) {
        let n = self.seen.max(1) as f64;
        (&self.mean, self.squares.iter().map(|s| (s / n).sqrt()).collect())
    }

    fn factor(&self, i: usize) -> f64 {
        let sd = (self.squares[i] / self.seen.max(1) as f64).sqrt();
        // A dimension that has not varied says nothing.
        if sd > 0.0 { 1.0 / (sd * (self.width() as f64).sqrt()) } else { 0.0 }
    }

    /// The scaled feature.
    pub fn apply(&self, feature: &[f32]) -> Vec<f64> {
        feature.iter().enumerate().map(|(i, &x)| (f64::from(x) - self.mean[i]) * self.factor(i)).collect()
    }

    /// The scaled difference of two: the mean cancels.
    pub fn difference(&self, first: &[f32], second: &[f32]) -> Vec<f64> {
        let of = |(i, (&a, &b)): (usize, (&f32, &f32))| (f64::from(a) - f64::from(b)) * self.factor(i);
        first.iter().zip(second).enumerate().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn scaled_features_have_mean_zero_and_mean_square_norm_one() {
        let (d, n) = (6, 400);
        let mut rng = Rng::new(3);
        let rows: Vec<Vec<f32>> =
            (0..n).map(|_| (0..d).map(|i| 10f32.powi(i - 2) * (rng.normal() + 5.0)).collect()).collect();
        let mut scale = Scale::new(d as usize, n);
        rows.iter().for_each(|r| scale.observe(r).unwrap());
        let all: Vec<Vec<f64>> = rows.iter().map(|r| scale.apply(r)).collect();
        let square: f64 = all.iter().flatten().map(|x| x * x).sum::<f64>() / n as f64;
        assert!((square - 1.0).abs() < 1e-9, "{square}");
        for i in 0..d as usize {
            assert!(all.iter().map(|r| r[i]).sum::<f64>().abs() < 1e-9);
        }
        let z = scale.difference(&rows[0], &rows[1]);
        assert!(z.iter().zip(all[0].iter().zip(&all[1])).all(|(z, (a, b))| (z - (a - b)).abs() < 1e-12));
        let frozen = scale.clone();
        scale.observe(&[1e6; 6]).unwrap();
        assert_eq!(scale, frozen);
        assert!(scale.observe(&[f32::NAN; 6]).is_err() && scale.observe(&[0.0; 5]).is_err());
    }

    #[test]
    fn a_dimension_that_never_varies_is_left_out() {
        let mut scale = Scale::new(2, 10);
        for x in [1.0, 2.0, 4.0] {
            scale.observe(&[x, 7.0]).unwrap();
        }
        assert_eq!(scale.apply(&[3.0, 9.0])[1], 0.0);
        assert!(scale.apply(&[3.0, 9.0])[0].is_finite());
    }
}
