//! [`Mle`]: the estimate that keeps every comparison and starts over, which the one-pass learner is held to.

use nalgebra::{DMatrix, DVector};

use super::link::{log_loss, sigmoid, slope};
use super::vector::{axpy, dot, labels, norm, rows};
use crate::error::{Result, bail, ensure};

/// argmin of Σ loss + ½λ‖θ‖² over ‖θ‖ <= B, by Newton's method on all data: O(t d²) a step (Zhu, Jordan & Jiao 2023; Saha et al. 2023;
/// Das et al. 2025 estimate so).
#[derive(Clone, Debug)]
pub struct Mle {
    lambda: f64,
    bound: Option<f64>,
    theta: Vec<f64>,
    z: Vec<f64>,
    y: Vec<f64>,
    multiply_adds: u64,
}

impl Mle {
    /// Of features of `width` numbers with the ridge `lambda`, in a ball where there is a `bound`.
    ///
    /// # Errors
    /// `Shape`: no width. `Config`: a ridge or a bound that is not positive; without a ridge labels that a plane separates have no
    /// estimate.
    pub fn new(width: usize, lambda: f64, bound: Option<f64>) -> Result<Self> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        ensure!(width > 0, Shape, "features of 0 numbers");
        ensure!(positive(lambda), Config, "lambda = {lambda}: a ridge is positive");
        ensure!(bound.is_none_or(positive), Config, "bound = {}: a radius is positive", bound.unwrap_or_default());
        Ok(Self { lambda, bound, theta: vec![0.0; width], z: Vec::new(), y: Vec::new(), multiply_adds: 0 })
    }

    /// Keeps a comparison; see [`OnePass::update`](super::OnePass::update) for what it is.
    ///
    /// # Errors
    /// `Shape`, `Usage`, `Diverged` as there.
    pub fn push(&mut self, z: &[f64], y: f64) -> Result<()> {
        let d = self.theta.len();
        ensure!(z.len() == d, Shape, "a comparison of {} numbers, not {d}", z.len());
        rows("a comparison", z, d)?;
        labels(&[y])?;
        self.z.extend_from_slice(z);
        self.y.push(y);
        Ok(())
    }

    /// Comparisons kept.
    pub fn len(&self) -> usize {
        self.y.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.y.is_empty()
    }

    /// The last estimate, 0 before the first.
    pub fn theta(&self) -> &[f64] {
        &self.theta
    }

    /// Bytes of what it keeps.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.z[..]) + size_of_val(&self.y[..]) + size_of_val(&self.theta[..])
    }

    /// Multiplications with an addition since it was made: t (d(d + 1)/2 + 2d) + d³/6 for a Newton step and t d for each look at
    /// the loss.
    pub fn multiply_adds(&self) -> u64 {
        self.multiply_adds
    }

    /// Estimates θ from all comparisons, beginning at the last estimate where `warm`, else at 0. Gives the Newton steps it took.
    ///
    /// # Errors
    /// `Diverged`: 100 steps were not enough.
    pub fn fit(&mut self, warm: bool) -> Result<usize> {
        if !warm {
            self.theta.fill(0.0);
        }
        let mut steps = self.newton(self.lambda)?;
        let Some(bound) = self.bound else { return Ok(steps) };
        // At the boundary the constraint is one more ridge: the one that makes ‖θ‖ = B, by bisection.
        let (mut low, mut high) = (self.lambda, self.lambda);
        while norm(&self.theta) > bound {
            (low, high) = (high, 2.0 * high);
            steps += self.newton(high)?;
        }
        while high - low > 1e-14 * high {
            let middle = 0.5 * (low + high);
            steps += self.newton(middle)?;
            if norm(&self.theta) > bound { low = middle } else { high = middle }
        }
        Ok(steps)
    }

    fn newton(&mut self, ridge: f64) -> Result<usize> {
        let (d, t) = (self.theta.len(), self.len());
        for step in 1..=100 {
            let (gradient, hessian) = self.derivatives(ridge);
            let Some(factor) = DMatrix::from_row_slice(d, d, &hessian).cholesky() else {
                bail!(Diverged, "the Hessian of {t} comparisons is not positive definite");
            };
            let direction = factor.solve(&DVector::from_column_slice(&gradient));
            self.multiply_adds += (t * (d * (d + 1) / 2 + 2 * d) + d * d * d / 6) as u64;
            // Far from the minimum a whole step can go up; near it, the loss's own rounding can.
            let decrease = dot(&gradient, direction.as_slice());
            let (loss, start) = (self.loss(&self.theta, ridge), self.theta.clone());
            self.multiply_adds += (t * d) as u64;
            let mut size = 1.0;
            loop {
                self.theta.copy_from_slice(&start);
                axpy(-size, direction.as_slice(), &mut self.theta);
                if decrease <= 1e-10 * (1.0 + loss) {
                    break;
                }
                self.multiply_adds += (t * d) as u64;
                if self.loss(&self.theta, ridge) <= loss - 1e-4 * size * decrease || size < 1e-10 {
                    break;
                }
                size *= 0.5;
            }
            // The error behind a Newton step is about the square of the step.
            if size * direction.norm() <= 1e-8 * (1.0 + norm(&self.theta)) {
                return Ok(step);
            }
        }
        bail!(Diverged, "no estimate of {t} comparisons after 100 Newton steps")
    }

    fn loss(&self, theta: &[f64], ridge: f64) -> f64 {
        let data = self.z.chunks_exact(theta.len()).zip(&self.y).map(|(z, &y)| log_loss(dot(z, theta), y)).sum::<f64>();
        data + 0.5 * ridge * dot(theta, theta)
    }

    /// The gradient, and the lower triangle of the Hessian, row-major.
    fn derivatives(&self, ridge: f64) -> (Vec<f64>, Vec<f64>) {
        let d = self.theta.len();
        let mut gradient: Vec<f64> = self.theta.iter().map(|t| ridge * t).collect();
        let mut hessian = vec![0.0; d * d];
        hessian.iter_mut().step_by(d + 1).for_each(|h| *h = ridge);
        for (z, y) in self.z.chunks_exact(d).zip(&self.y) {
            let m = dot(z, &self.theta);
            axpy(sigmoid(m) - y, z, &mut gradient);
            let w = slope(m);
            for (i, row) in hessian.chunks_exact_mut(d).enumerate() {
                axpy(w * z[i], &z[..=i], &mut row[..=i]);
            }
        }
        (gradient, hessian)
    }
}
