//! What is reported of a learner: predictions made before their labels were seen, and how figures grow.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// Predictions of about the same probability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// How many.
    pub count: u64,
    /// Sum of what was predicted.
    pub predicted: f64,
    /// Sum of the labels.
    pub observed: f64,
}

/// Progressive validation (Blum, Kalai & Langford 1999): every comparison tests the learner before it teaches, so that no data need be
/// held out. Ties count half where they are predicted or observed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    count: u64,
    right: f64,
    loss: f64,
    bins: [Bin; 5],
}

impl Progress {
    /// `probability` was predicted, then `y` was seen, both in \[0, 1\].
    ///
    /// # Errors
    /// `Usage`: one of them is not.
    pub fn push(&mut self, probability: f64, y: f64) -> Result<()> {
        for (what, x) in [("probability", probability), ("label", y)] {
            ensure!((0.0..=1.0).contains(&x), Usage, "progress: a {what} of {x}");
        }
        let side = |x: f64| (x - 0.5).partial_cmp(&0.0);
        self.count += 1;
        self.right += match (side(probability), side(y)) {
            (Some(a), Some(b)) if a.is_eq() || b.is_eq() => 0.5,
            (a, b) => f64::from(u8::from(a == b)),
        };
        // A sure prediction that is wrong costs much and not everything: the learner's margins are finite.
        let p = probability.clamp(f64::MIN_POSITIVE, 1.0 - f64::EPSILON / 2.0);
        self.loss -= y * p.ln() + (1.0 - y) * (-p).ln_1p();
        let bin = &mut self.bins[((probability * 5.0) as usize).min(4)];
        bin.count += 1;
        bin.predicted += probability;
        bin.observed += y;
        Ok(())
    }

    /// Predictions so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Share of labels on the side that was predicted; 0 before the first.
    pub fn accuracy(&self) -> f64 {
        self.right / self.count.max(1) as f64
    }

    /// Mean loss, nats; ln 2 is a coin's. 0 before the first.
    pub fn log_loss(&self) -> f64 {
        self.loss / self.count.max(1) as f64
    }

    /// Predictions in \[0, 0.2), \[0.2, 0.4) .. \[0.8, 1\].
    pub fn bins(&self) -> &[Bin; 5] {
        &self.bins
    }

    /// Expected calibration error: the mean distance of bins' predictions from their labels, by their counts.
    pub fn calibration_error(&self) -> f64 {
        self.bins.iter().map(|b| (b.predicted - b.observed).abs()).sum::<f64>() / self.count.max(1) as f64
    }
}

/// Pearson's correlation of two lists, of rewards with lengths say; 0 where one of them does not vary.
///
/// # Errors
/// `Shape`: different lengths.
pub fn correlation(a: &[f64], b: &[f64]) -> Result<f64> {
    ensure!(a.len() == b.len(), Shape, "a correlation of {} numbers with {}", a.len(), b.len());
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len().max(1) as f64;
    let (ma, mb) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(a, b)| f(a - ma, b - mb)).sum::<f64>();
    let scale = (sum(&|a, _| a * a) * sum(&|_, b| b * b)).sqrt();
    Ok(if scale > 0.0 { sum(&|a, b| a * b) / scale } else { 0.0 })
}

/// The exponent p of y ~ xᵖ: the slope of the line of least squares through (ln x, ln y). 0 for fewer than two points; points that are
/// not positive have no logarithm and are left out.
pub fn slope_loglog(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> =
        points.iter().filter(|p| p.0 > 0.0 && p.1 > 0.0).map(|p| (p.0.ln(), p.1.ln())).collect();
    let n = logs.len().max(1) as f64;
    let (mx, my) = (logs.iter().map(|p| p.0).sum::<f64>() / n, logs.iter().map(|p| p.1).sum::<f64>() / n);
    let spread: f64 = logs.iter().map(|p| (p.0 - mx).powi(2)).sum();
    let joint: f64 = logs.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum();
    if spread > 0.0 { joint / spread } else { 0.0 }
}
