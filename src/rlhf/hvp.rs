//! [`Hvp`]: the paper's approximation for large models, Newton steps on one batch's curvature by conjugate gradients, for a
//! linear head.

use super::cg::{conjugate_gradients, released_gradients};
use super::link::{sigmoid, slope};
use super::vector::{axpy, dot, labels, norm, rows};
use crate::error::{Result, ensure};

/// Whose version of the algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Algorithm 5 of the paper.
    Paper,
    /// As the released code has it, for comparison only: directions that are not conjugate; a damping that does not grow; the direction
    /// damping · g + (1 - damping) · v where K > 1; plain gradients once the schedule has ended.
    Released,
}

/// Settings of [`Hvp`]; the default are the paper's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HvpSettings {
    /// Step size.
    pub eta: f64,
    /// K: steps of conjugate gradients.
    pub steps: usize,
    /// λ₀: the damping at the end of the schedule.
    pub damping: f64,
    /// T: batches over which the damping grows from 0, linearly. It stands for the curvature of all batches before.
    pub growth: u64,
    /// ε: conjugate gradients end where the residual is below this share of the gradient.
    pub tolerance: f64,
    /// Version.
    pub variant: Variant,
}

impl Default for HvpSettings {
    fn default() -> Self {
        Self { eta: 1e-3, steps: 3, damping: 0.8, growth: 100, tolerance: 1e-10, variant: Variant::Paper }
    }
}

/// A head that knows only the curvature of its last batch: O(d) memory, K passes over the batch a step.
#[derive(Clone, Debug)]
pub struct Hvp {
    settings: HvpSettings,
    theta: Vec<f64>,
    batches: u64,
}

impl Hvp {
    /// θ = 0 on features of `width` numbers.
    ///
    /// # Errors
    /// `Shape`: no width. `Config`: an impossible setting.
    pub fn new(width: usize, settings: HvpSettings) -> Result<Self> {
        let HvpSettings { eta, steps, damping, growth, tolerance, .. } = settings;
        ensure!(width > 0, Shape, "features of 0 numbers");
        ensure!(eta > 0.0 && eta.is_finite(), Config, "eta = {eta}: a step size is positive");
        ensure!(steps > 0, Config, "steps = 0: no conjugate gradients");
        ensure!(damping > 0.0 && damping.is_finite(), Config, "damping = {damping}: it is positive");
        ensure!(growth > 0, Config, "growth = 0: a schedule has batches");
        ensure!((0.0..1.0).contains(&tolerance), Config, "tolerance = {tolerance}: in [0, 1)");
        Ok(Self { settings, theta: vec![0.0; width], batches: 0 })
    }

    /// Where it is.
    pub fn theta(&self) -> &[f64] {
        &self.theta
    }

    /// Learns from the b comparisons `z[b, d]` with labels `y[b]`: θ -= η v with (ZᵀWZ/b + λ_t) v = the mean gradient. Gives v.
    ///
    /// # Errors
    /// `Shape`, `Usage`, `Diverged` as [`OnePass::update_batch`](super::OnePass::update_batch).
    pub fn update(&mut self, z: &[f64], y: &[f64]) -> Result<Vec<f64>> {
        let d = self.theta.len();
        let b = rows("comparisons", z, d)?;
        ensure!(b > 0 && y.len() == b, Shape, "{} labels of {b} comparisons", y.len());
        labels(y)?;
        let HvpSettings { eta, steps, damping, growth, tolerance, variant } = self.settings;
        let mut gradient = vec![0.0; d];
        let mut weights = Vec::with_capacity(b);
        for (z, y) in z.chunks_exact(d).zip(y) {
            let m = dot(z, &self.theta);
            axpy((sigmoid(m) - y) / b as f64, z, &mut gradient);
            weights.push(slope(m) / b as f64);
        }
        let grown = ((self.batches + 1) as f64 / growth as f64).min(1.0);
        let hessian = |shift: f64| {
            let (z, weights) = (z, &weights);
            move |p: &[f64], out: &mut [f64]| {
                out.iter_mut().zip(p).for_each(|(o, p)| *o = shift * p);
                z.chunks_exact(d).zip(weights).for_each(|(z, w)| axpy(w * dot(z, p), z, out));
                Ok(())
            }
        };
        let direction = match variant {
            _ if norm(&gradient) == 0.0 => gradient,
            Variant::Paper => conjugate_gradients(hessian(damping * grown), &gradient, steps, tolerance)?.0,
            Variant::Released if grown >= 1.0 => gradient,
            Variant::Released => {
                let (mut v, _) = released_gradients(hessian(damping), &gradient, steps, tolerance)?;
                if steps > 1 {
                    v.iter_mut().zip(&gradient).for_each(|(v, g)| *v = damping * g + (1.0 - damping) * *v);
                }
                v
            }
        };
        axpy(-eta, &direction, &mut self.theta);
        self.batches += 1;
        Ok(direction)
    }
}
