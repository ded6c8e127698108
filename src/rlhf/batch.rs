//! Several comparisons at once.

use nalgebra::{DMatrix, DVector};

use super::link::{log_loss, sigmoid, slope};
use super::one_pass::OnePass;
use super::project::project;
use super::settings::Rule;
use super::vector::{axpy, dot, labels, norm, rows};
use crate::error::{Error, ErrorKind, Result, ensure};

impl OnePass {
    /// Learns from the b comparisons `z[b, d]` with labels `y[b]` in one step: b d² + b² d + O(b³). All of them are seen from the
    /// same θ, so it is not the same as one after another. With one comparison it is [`OnePass::update`] up to rounding.
    ///
    /// # Errors
    /// Those of [`OnePass::update`], and `Shape`: not one label for each row. Nothing has changed then.
    pub fn update_batch(&mut self, z: &[f64], y: &[f64]) -> Result<()> {
        let (d, eta) = (self.width(), self.settings.eta);
        let b = rows("comparisons", z, d)?;
        ensure!(y.len() == b, Shape, "{} labels of {b} comparisons", y.len());
        labels(y)?;
        // An answer against its equal is no step, here as there.
        let told = |(z, _): &(&[f64], &f64)| z.iter().any(|&z| z != 0.0);
        let (z, y): (Vec<&[f64]>, Vec<f64>) = z.chunks_exact(d).zip(y).filter(told).unzip();
        let (z, b) = (z.concat(), y.len());
        if b == 0 {
            self.removed.clear();
            return Ok(());
        }
        let u = self.times(&z)?;
        let gram = DMatrix::from_fn(b, b, |i, j| {
            let (i, j) = (i.min(j), i.max(j));
            dot(&z[i * d..][..d], &u[j * d..][..d])
        });
        ensure!(gram.iter().all(|g| g.is_finite()), Diverged, "comparison {}: zᵀPz is not finite", self.steps + 1);
        let margins = DVector::from_iterator(b, z.chunks_exact(d).map(|z| dot(z, &self.theta)));
        // θ' = θ - η Uᵀa.
        let a = match self.settings.rule {
            Rule::Explicit => explicit(&gram, &margins, &y, eta)?,
            Rule::Implicit => implicit(&gram, &margins, &y, eta)?,
        };
        let mut theta = self.theta.clone();
        u.chunks_exact(d).zip(a.iter()).for_each(|(u, a)| axpy(-eta * a, u, &mut theta));
        ensure!(theta.iter().all(|t| t.is_finite()), Diverged, "comparison {}: θ is not finite", self.steps + 1);
        let outside = self.settings.bound.filter(|&b| norm(&theta) > b);
        if let Some(bound) = outside {
            let seen = match self.settings.rule {
                Rule::Explicit => margins.map(slope),
                Rule::Implicit => (margins - &gram * &a * eta).map(slope),
            };
            let (v, _) = shrink(&gram, &(seen * eta), &u)?;
            let nearest = project(&*self.inverse, &v, &theta, bound)?;
            theta = nearest.theta;
            self.multiply_adds += nearest.products * (d * (d + 2 * b)) as u64;
        }
        let weights = DVector::from_iterator(b, z.chunks_exact(d).map(|z| slope(dot(z, &theta))));
        let (v, log_det) = shrink(&gram, &weights, &u)?;
        self.inverse.subtract(&v, 1.0 / self.settings.forget.powi(b as i32))?;

        self.log_det += log_det + (b * d) as f64 * self.settings.forget.ln();
        // The iterate behind each of the comparisons is the same.
        axpy(b as f64, &theta, &mut self.sum);
        self.theta = theta;
        self.removed = v;
        self.steps += b as u64;
        self.projections += u64::from(outside.is_some());
        self.multiply_adds += (2 * b * d * d + b * b * d + b * b * b / 3 + 4 * b * d) as u64;
        Ok(())
    }
}

/// The step on the second-order model: a = (W⁻¹/η + G)⁻¹ W⁻¹/η c, written so that weights of 0 are no division.
fn explicit(gram: &DMatrix<f64>, margins: &DVector<f64>, y: &[f64], eta: f64) -> Result<DVector<f64>> {
    let residual = DVector::from_iterator(y.len(), margins.iter().zip(y).map(|(&m, y)| sigmoid(m) - y));
    newton(gram, &(margins.map(slope) * eta), &residual)
}

/// The root a = σ(m - ηGa) - y, by Newton's method on the convex F(a) = Σ loss(m - ηGa) + η/2 aᵀGa whose gradient is
/// ηG (a - σ + y), halving steps that do not go down.
fn implicit(gram: &DMatrix<f64>, margins: &DVector<f64>, y: &[f64], eta: f64) -> Result<DVector<f64>> {
    let behind = |a: &DVector<f64>| margins - gram * a * eta;
    let value = |a: &DVector<f64>| {
        let loss: f64 = behind(a).iter().zip(y).map(|(&m, &y)| log_loss(m, y)).sum();
        loss + 0.5 * eta * a.dot(&(gram * a))
    };
    let mut a = DVector::zeros(y.len());
    for _ in 0..100 {
        let m = behind(&a);
        let excess =
            DVector::from_iterator(y.len(), m.iter().zip(y).zip(a.iter()).map(|((&m, y), a)| sigmoid(m) - y - a));
        let mut step = newton(gram, &(m.map(slope) * eta), &excess)?;
        let before = value(&a);
        while value(&(&a + &step)) > before + 1e-12 * (1.0 + before.abs()) && step.amax() > 1e-12 {
            step *= 0.5;
        }
        a += &step;
        if step.amax() <= 1e-14 {
            break;
        }
    }
    Ok(a)
}

/// (I + WG)⁻¹ c = c - S (I + SGS)⁻¹ S G c with S = √W.
fn newton(gram: &DMatrix<f64>, weights: &DVector<f64>, c: &DVector<f64>) -> Result<DVector<f64>> {
    let s = weights.map(f64::sqrt);
    let inner = factor(gram, &s)?.solve(&s.component_mul(&(gram * c)));
    Ok(c - s.component_mul(&inner))
}

/// The rows V with VᵀV = Uᵀ(W⁻¹ + G)⁻¹U, and log det(I + WG).
fn shrink(gram: &DMatrix<f64>, weights: &DVector<f64>, u: &[f64]) -> Result<(Vec<f64>, f64)> {
    let s = weights.map(f64::sqrt);
    let l = factor(gram, &s)?.unpack();
    let d = u.len() / s.len();
    let scaled = DMatrix::from_fn(s.len(), d, |i, j| s[i] * u[i * d + j]);
    let Some(v) = l.solve_lower_triangular(&scaled) else { return Err(indefinite()) };
    let log_det = 2.0 * l.diagonal().iter().map(|l| l.ln()).sum::<f64>();
    Ok((v.transpose().as_slice().to_vec(), log_det))
}

fn factor(gram: &DMatrix<f64>, s: &DVector<f64>) -> Result<nalgebra::Cholesky<f64, nalgebra::Dyn>> {
    let b = s.len();
    let shifted = DMatrix::from_fn(b, b, |i, j| s[i] * gram[(i, j)] * s[j] + f64::from(u8::from(i == j)));
    shifted.cholesky().ok_or_else(indefinite)
}

fn indefinite() -> Error {
    Error::new(ErrorKind::Diverged, "the inverse curvature is no longer positive definite")
}
