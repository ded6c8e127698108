//! The way back into the ball ‖θ‖ <= B, in the norm of the step.

use super::cg::conjugate_gradients;
use super::inverse::Inverse;
use super::vector::{axpy, dot, norm, rows};
use crate::error::{Result, bail, ensure};

/// Where a projection ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    /// The nearest point of the ball.
    pub theta: Vec<f64>,
    /// The multiplier of the constraint: 0 where θ was inside.
    pub mu: f64,
    /// Products with P that it took.
    pub products: u64,
}

/// argmin of (x - θ)ᵀ P̃⁻¹ (x - θ) over ‖x‖ <= `bound`, where P̃ = P - VᵀV with the rows of `v[b, d]`.
///
/// The minimum is x(μ) = (I + μP̃)⁻¹θ with μ >= 0 and ‖x(μ)‖ = B. As in trust regions (Moré & Sorensen 1983), 1/‖x(μ)‖ is concave and
/// nearly linear in μ, so Newton's method on 1/‖x‖ = 1/B climbs from μ = 0 and never past the root. Each x(μ) is conjugate
/// gradients on a matrix with eigenvalues in \[1, 1 + μ/λ\]. Shrinking θ is another point: it forgets which directions are known well.
///
/// # Errors
/// `Shape`: lengths that do not fit P. `Usage`: a bound that is not positive. `Diverged`: θ is not finite, or P̃ is not
/// positive definite.
pub fn project(inverse: &dyn Inverse, v: &[f64], theta: &[f64], bound: f64) -> Result<Projection> {
    let d = inverse.width();
    ensure!(theta.len() == d, Shape, "θ to project: {} numbers, not {d}", theta.len());
    rows("θ to project", theta, d)?;
    rows("rows that P lost", v, d)?;
    ensure!(bound > 0.0 && bound.is_finite(), Usage, "a ball of radius {bound}");
    let mut local = Local { inverse, v, products: 0 };
    let (mut x, mut mu) = (theta.to_vec(), 0.0);
    for _ in 0..100 {
        let length = norm(&x);
        if length <= bound * (1.0 + 1e-14) {
            break;
        }
        let mut px = vec![0.0; d];
        local.times(&x, &mut px)?;
        // d‖x‖/dμ = -xᵀ(I + μP̃)⁻¹P̃x / ‖x‖.
        let step = (length / bound - 1.0) * length * length / dot(&x, &local.solve(mu, &px)?);
        ensure!(step > 0.0 && step.is_finite(), Diverged, "a projection in a norm that is not positive definite");
        if mu + step == mu {
            break;
        }
        mu += step;
        x = local.solve(mu, theta)?;
    }
    let length = norm(&x);
    if length > bound * (1.0 + 1e-9) {
        bail!(Diverged, "the projection onto a ball of radius {bound} ended at a norm of {length}");
    }
    // The last rounding, so that nothing outside is ever played.
    let shrink = (bound / length).min(1.0);
    x.iter_mut().for_each(|x| *x *= shrink);
    Ok(Projection { theta: x, mu, products: local.products })
}

/// P̃, counting its products.
struct Local<'a> {
    inverse: &'a dyn Inverse,
    v: &'a [f64],
    products: u64,
}

impl Local<'_> {
    fn times(&mut self, x: &[f64], y: &mut [f64]) -> Result<()> {
        self.products += 1;
        self.inverse.times(x, y)?;
        self.v.chunks_exact(x.len()).for_each(|v| axpy(-dot(v, x), v, y));
        Ok(())
    }

    /// (I + μP̃)⁻¹ b. In exact arithmetic d steps are enough.
    fn solve(&mut self, mu: f64, b: &[f64]) -> Result<Vec<f64>> {
        if mu == 0.0 {
            return Ok(b.to_vec());
        }
        let shifted = |x: &[f64], y: &mut [f64]| {
            self.times(x, y)?;
            y.iter_mut().zip(x).for_each(|(y, x)| *y = x + mu * *y);
            Ok(())
        };
        Ok(conjugate_gradients(shifted, b, 4 * b.len() + 16, 1e-16)?.0)
    }
}
