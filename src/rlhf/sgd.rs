//! [`Sgd`]: one pass without curvature.

use super::link::sigmoid;
use super::vector::{axpy, dot, labels, rows};
use crate::error::{Result, ensure};
use crate::online::{Method, Optimizer, Settings};

/// How the step size goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// Stays.
    Constant(f64),
    /// This over √t at step t.
    Root(f64),
}

/// Stochastic gradient descent on the log-loss: θ -= rate · the mean gradient of a batch. The paper's baseline for comparisons
/// that come once.
#[derive(Clone, Debug)]
pub struct Sgd {
    optimizer: Optimizer,
    rate: Rate,
    batch: usize,
    theta: Vec<f64>,
    gradient: Vec<f64>,
    waiting: usize,
}

impl Sgd {
    /// Plain descent on features of `width` numbers, a step for each `batch` comparisons.
    ///
    /// # Errors
    /// `Usage`: a rate or a batch that is not positive; `Shape`: no width.
    pub fn new(width: usize, rate: Rate, batch: usize) -> Result<Self> {
        // The rate goes into the gradient, since it may change.
        Self::with(width, Settings::new(Method::Ogd, 1.0), rate, batch)
    }

    /// Adam (Kingma & Ba 2015) at a constant `rate`, β = (0.9, 0.999), eps = 1e-8.
    ///
    /// # Errors
    /// Those of [`Sgd::new`].
    pub fn adam(width: usize, rate: f64, batch: usize) -> Result<Self> {
        let method = Method::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        let mut sgd = Self::with(width, Settings::new(method, rate), Rate::Constant(rate), batch)?;
        sgd.rate = Rate::Constant(1.0);
        Ok(sgd)
    }

    fn with(width: usize, settings: Settings, rate: Rate, batch: usize) -> Result<Self> {
        let (Rate::Constant(size) | Rate::Root(size)) = rate;
        ensure!(width > 0, Shape, "features of 0 numbers");
        ensure!(size > 0.0 && size.is_finite(), Usage, "rate = {size}: a step size is positive");
        ensure!(batch > 0, Usage, "a step of 0 comparisons");
        let zeros = vec![0.0; width];
        let optimizer = Optimizer::new(settings, &zeros)?;
        Ok(Self { optimizer, rate, batch, theta: zeros.clone(), gradient: zeros, waiting: 0 })
    }

    /// Takes a comparison; see [`OnePass::update`](super::OnePass::update) for what it is. Says whether a step was made of it and
    /// those before it.
    ///
    /// # Errors
    /// `Shape`, `Usage`, `Diverged` as there.
    pub fn push(&mut self, z: &[f64], y: f64) -> Result<bool> {
        let d = self.theta.len();
        ensure!(z.len() == d, Shape, "a comparison of {} numbers, not {d}", z.len());
        rows("a comparison", z, d)?;
        labels(&[y])?;
        axpy(sigmoid(dot(z, &self.theta)) - y, z, &mut self.gradient);
        self.waiting += 1;
        if self.waiting < self.batch {
            return Ok(false);
        }
        let rate = match self.rate {
            Rate::Constant(rate) => rate,
            Rate::Root(rate) => rate / ((self.optimizer.steps() + 1) as f64).sqrt(),
        };
        let scale = rate / self.batch as f64;
        self.gradient.iter_mut().for_each(|g| *g *= scale);
        self.optimizer.step(&mut self.theta, &self.gradient)?;
        self.gradient.fill(0.0);
        self.waiting = 0;
        Ok(true)
    }

    /// Where it is.
    pub fn theta(&self) -> &[f64] {
        &self.theta
    }
}
