//! [`OnePass`]: a reward that follows comparisons, one at a time, and keeps none.

use serde::{Deserialize, Serialize};

use super::inverse::{Host, Inverse};
use super::link::{proximal, sigmoid, slope};
use super::project::project;
use super::settings::{Rule, Settings};
use super::vector::{axpy, dot, labels, norm, rows};
use crate::error::{Result, ensure};

/// What one comparison was worth.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// zᵀθ before.
    pub margin: f64,
    /// σ of it: what was predicted before the label was seen.
    pub probability: f64,
    /// q = zᵀPz before: the variance of the margin.
    pub uncertainty: f64,
    /// m' = zᵀθ behind the step.
    pub after: f64,
    /// w' = σ'(m'): what zzᵀ weighs in the curvature.
    pub weight: f64,
    /// Whether θ had left its ball and was brought back.
    pub projected: bool,
}

/// All that a learner knows: plain numbers, in whatever file their owner likes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// How it learns.
    pub settings: Settings,
    /// Comparisons learnt from.
    pub steps: u64,
    /// How often θ had to be brought back into its ball.
    pub projections: u64,
    /// θ, `[d]`.
    pub theta: Vec<f64>,
    /// Sum of all iterates after the first, which is 0, `[d]`.
    pub sum: Vec<f64>,
    /// P, `[d, d]`, exactly: an f32 widened.
    pub inverse: Vec<f64>,
    /// log det H.
    pub log_det: f64,
}

/// The one-pass learner of Li et al. 2025 (arXiv:2502.07193): online mirror descent in the norm of H = λI + Σ σ'(z_iᵀθ_{i+1}) z_i z_iᵀ.
///
/// Of a comparison it keeps θ and P = H⁻¹ and nothing else: one product with P and one update of rank 1, in O(d²) whatever came before.
/// With η = 1 the explicit rule is the extended Kalman filter of a logistic regression whose θ* stands still.
pub struct OnePass {
    pub(super) settings: Settings,
    pub(super) inverse: Box<dyn Inverse>,
    pub(super) theta: Vec<f64>,
    pub(super) sum: Vec<f64>,
    pub(super) log_det: f64,
    pub(super) steps: u64,
    pub(super) projections: u64,
    pub(super) removed: Vec<f64>,
    pub(super) multiply_adds: u64,
}

impl OnePass {
    /// θ = 0 and P = I/λ in f64, on features of `width` numbers.
    ///
    /// # Errors
    /// `Config`: an impossible setting; `Shape`: no width.
    pub fn new(width: usize, settings: Settings) -> Result<Self> {
        Self::with(Box::new(Host::<f64>::new(width)), settings)
    }

    /// The same with P where `inverse` keeps it; what it held is lost.
    ///
    /// # Errors
    /// Those of [`OnePass::new`], and what `inverse` says.
    pub fn with(mut inverse: Box<dyn Inverse>, settings: Settings) -> Result<Self> {
        settings.validate()?;
        let d = inverse.width();
        ensure!(d > 0, Shape, "features of 0 numbers");
        let mut p = vec![0.0; d * d];
        p.iter_mut().step_by(d + 1).for_each(|p| *p = 1.0 / settings.lambda);
        inverse.write(&p)?;
        let log_det = d as f64 * settings.lambda.ln();
        Ok(Self {
            settings,
            inverse,
            theta: vec![0.0; d],
            sum: vec![0.0; d],
            log_det,
            steps: 0,
            projections: 0,
            removed: Vec::new(),
            multiply_adds: 0,
        })
    }

    /// d, the numbers of a feature vector.
    pub fn width(&self) -> usize {
        self.theta.len()
    }

    /// How it learns.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Comparisons learnt from; one of an answer with its equal is none.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// How often θ had to be brought back into its ball.
    pub fn projections(&self) -> u64 {
        self.projections
    }

    /// The last iterate.
    pub fn theta(&self) -> &[f64] {
        &self.theta
    }

    /// The mean of all iterates, the first one included (algorithm 3, line 7): steadier than the last while little was seen, behind it
    /// later.
    pub fn average(&self) -> Vec<f64> {
        self.sum.iter().map(|s| s / (self.steps + 1) as f64).collect()
    }

    /// Learns from one comparison: `z[d]` is φ of the first answer minus φ of the second, `y` how much the first was preferred, in
    /// \[0, 1\], 1/2 for a tie. z = 0 teaches nothing, and is no step.
    ///
    /// # Errors
    /// `Shape`: z has not d numbers. `Usage`: a label outside \[0, 1\]. `Diverged`: z is not finite, or its variance or θ would leave
    /// the finite numbers. Nothing has changed then. What the inverse says.
    pub fn update(&mut self, z: &[f64], y: f64) -> Result<Step> {
        let d = self.width();
        ensure!(z.len() == d, Shape, "a comparison of {} numbers, not {d}", z.len());
        rows("a comparison", z, d)?;
        labels(&[y])?;
        let margin = dot(z, &self.theta);
        let probability = sigmoid(margin);
        if z.iter().all(|&z| z == 0.0) {
            self.removed.clear();
            let weight = slope(margin);
            return Ok(Step { margin, probability, uncertainty: 0.0, after: margin, weight, projected: false });
        }
        let mut u = vec![0.0; d];
        self.inverse.times(z, &mut u)?;
        let q = dot(z, &u);
        ensure!(q.is_finite(), Diverged, "comparison {}: zᵀPz = {q}", self.steps + 1);
        // Rounding in f32 can take it below.
        let q = q.max(0.0);

        let eta = self.settings.eta;
        // What of σ' the step saw, and how far it goes along u.
        let (seen, stride) = match self.settings.rule {
            Rule::Explicit => {
                let w = slope(margin);
                (w, eta * (probability - y) / (1.0 + eta * w * q))
            }
            Rule::Implicit => {
                let after = proximal(margin, eta * q, y);
                (slope(after), eta * (sigmoid(after) - y))
            }
        };
        let mut theta = self.theta.clone();
        axpy(-stride, &u, &mut theta);
        ensure!(theta.iter().all(|t| t.is_finite()), Diverged, "comparison {}: θ is not finite", self.steps + 1);
        let mut after = margin - stride * q;
        let outside = self.settings.bound.filter(|&b| norm(&theta) > b);
        if let Some(bound) = outside {
            // For the implicit rule a second-order model around its minimum: exact where σ is straight.
            let root = (eta * seen / (1.0 + eta * seen * q)).sqrt();
            let v: Vec<f64> = u.iter().map(|u| root * u).collect();
            let nearest = project(&*self.inverse, &v, &theta, bound)?;
            theta = nearest.theta;
            after = dot(z, &theta);
            self.multiply_adds += nearest.products * (d * (d + 2)) as u64;
        }
        let weight = slope(after);
        let root = (weight / (1.0 + weight * q)).sqrt();
        u.iter_mut().for_each(|u| *u *= root);
        self.inverse.subtract(&u, 1.0 / self.settings.forget)?;

        self.log_det += (weight * q).ln_1p() + d as f64 * self.settings.forget.ln();
        axpy(1.0, &theta, &mut self.sum);
        self.theta = theta;
        self.removed = u;
        self.steps += 1;
        self.projections += u64::from(outside.is_some());
        self.multiply_adds += (2 * d * d + 5 * d) as u64;
        Ok(Step { margin, probability, uncertainty: q, after, weight, projected: outside.is_some() })
    }

    /// φᵀθ. Comparable among answers to one prompt only: what all of them share was never compared.
    ///
    /// # Panics
    /// If `phi` has not d numbers.
    pub fn reward(&self, phi: &[f64]) -> f64 {
        assert_eq!(phi.len(), self.width(), "features of another width");
        dot(phi, &self.theta)
    }

    /// zᵀPz, the variance of the margin of `z[d]`; never below 0.
    ///
    /// # Errors
    /// Those of [`OnePass::variances`], and `Shape`: not one row.
    pub fn variance(&self, z: &[f64]) -> Result<f64> {
        ensure!(z.len() == self.width(), Shape, "a vector of {} numbers, not {}", z.len(), self.width());
        Ok(self.variances(z)?[0])
    }

    /// The variance of each row of `rows[n, d]`, `[n]`.
    ///
    /// # Errors
    /// `Shape`: rows that are not whole. `Diverged`: one that is not finite. What the inverse says.
    pub fn variances(&self, rows: &[f64]) -> Result<Vec<f64>> {
        let d = self.width();
        let mut out = Vec::with_capacity(rows.len() / d);
        // So many at once that reading P is no cost, and so few that they stay near.
        for chunk in rows.chunks(64 * d) {
            let u = self.times(chunk)?;
            out.extend(chunk.chunks_exact(d).zip(u.chunks_exact(d)).map(|(x, u)| dot(x, u).max(0.0)));
        }
        Ok(out)
    }

    /// F P Fᵀ of `rows[k, d]`, `[k, k]`, symmetric to the bit. ‖F_i - F_j‖² in the norm of P is M_ii + M_jj - 2 M_ij.
    ///
    /// # Errors
    /// Those of [`OnePass::variances`].
    pub fn gram(&self, rows: &[f64]) -> Result<Vec<f64>> {
        let d = self.width();
        let u = self.times(rows)?;
        let k = rows.len() / d;
        let mut m = vec![0.0; k * k];
        for (i, x) in rows.chunks_exact(d).enumerate() {
            for (j, u) in u.chunks_exact(d).enumerate().skip(i) {
                m[i * k + j] = dot(x, u);
                m[j * k + i] = m[i * k + j];
            }
        }
        Ok(m)
    }

    /// X P of `x[n, d]`.
    ///
    /// # Errors
    /// Those of [`OnePass::variances`].
    pub fn times(&self, x: &[f64]) -> Result<Vec<f64>> {
        rows("a vector", x, self.width())?;
        let mut y = vec![0.0; x.len()];
        self.inverse.times(x, &mut y)?;
        Ok(y)
    }

    /// What the last update took from P: the rows of `V[b, d]` in P - VᵀV, before it forgot. Empty where it taught nothing.
    pub fn removed(&self) -> &[f64] {
        &self.removed
    }

    /// log det H = d log λ + Σ log(1 + w'q), and d log γ for each step.
    pub fn log_det(&self) -> f64 {
        self.log_det
    }

    /// Multiplications with an addition since it was made or restored. A comparison takes 2d² + 5d of them, whatever came before, and a
    /// projection d² + 2d for each of its products with P.
    pub fn multiply_adds(&self) -> u64 {
        self.multiply_adds
    }

    /// What its state occupies.
    pub fn bytes(&self) -> usize {
        self.inverse.bytes() + size_of_val(&self.theta[..]) + size_of_val(&self.sum[..])
    }

    /// A copy of all it knows.
    ///
    /// # Errors
    /// What the inverse says.
    pub fn state(&self) -> Result<State> {
        Ok(State {
            settings: self.settings.clone(),
            steps: self.steps,
            projections: self.projections,
            theta: self.theta.clone(),
            sum: self.sum.clone(),
            inverse: self.inverse.read()?,
            log_det: self.log_det,
        })
    }

    /// The learner that `state` is of, with P in `inverse` or, without one, in f64 on the host. In an inverse of the kind it came from
    /// it goes on to the same bits as if it had never stopped.
    ///
    /// # Errors
    /// `Config`: an impossible setting. `Shape`: lengths that do not fit. `Diverged`: a number that is not finite.
    pub fn restore(state: State, inverse: Option<Box<dyn Inverse>>) -> Result<Self> {
        let State { settings, steps, projections, theta, sum, inverse: p, log_det } = state;
        settings.validate()?;
        let d = theta.len();
        ensure!(d > 0, Shape, "features of 0 numbers");
        let mut inverse = inverse.unwrap_or_else(|| Box::new(Host::<f64>::new(d)));
        let width = inverse.width();
        ensure!(width == d && sum.len() == d, Shape, "θ of {d} numbers, a sum of {}, P of {width}", sum.len());
        ensure!(p.len() == d * d, Shape, "P has {} numbers, not {}", p.len(), d * d);
        rows("a saved θ", &theta, d)?;
        rows("a saved sum", &sum, d)?;
        rows("a saved P", &p, d)?;
        ensure!(log_det.is_finite(), Diverged, "a saved log det of {log_det}");
        inverse.write(&p)?;
        Ok(Self { settings, inverse, theta, sum, log_det, steps, projections, removed: Vec::new(), multiply_adds: 0 })
    }
}
