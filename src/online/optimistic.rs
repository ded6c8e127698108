//! [`Optimizer`]: the rules by which a vector of parameters follows a stream of gradients.
//!
//! The rules are those of the optimiser that trains models, where both have them; here they can also be confined to a ball, and
//! an optimistic rule can doubt its hint.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// Which rule. g is the gradient at the parameters w that were played, η the learning rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Method {
    /// Online gradient descent (Zinkevich 2003): w -= η g.
    Ogd,
    /// Optimistic descent with the last gradient as the hint h (Rakhlin & Sridharan 2013, arXiv:1208.3728): the anchor a -= η g,
    /// and a - η h is played. In one step, w -= 2 η g - η (the g before).
    Optimistic,
    /// Polyak's heavy ball: m = μ m + g; w -= η m. What OnlineSpec's released code runs as its optimistic variant; it is not.
    HeavyBall {
        /// Share of the velocity that stays.
        mu: f64,
    },
    /// Loshchilov & Hutter 2019, arXiv:1711.05101.
    AdamW {
        /// Of the first moment.
        beta1: f64,
        /// Of the second.
        beta2: f64,
        /// Below the root.
        eps: f64,
    },
    /// Optimistic along AdamW's direction u = m̂ / (√v̂ + eps): anchor and hint move by u for g.
    OptimisticAdam {
        /// Of the first moment.
        beta1: f64,
        /// Of the second.
        beta2: f64,
        /// Below the root.
        eps: f64,
    },
}

impl Method {
    fn optimistic(self) -> bool {
        matches!(self, Method::Optimistic | Method::OptimisticAdam { .. })
    }
}

/// The feasible set: all points within `radius` of `centre`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ball {
    /// The weights that the learner began with, say.
    pub centre: Vec<f64>,
    /// Euclidean.
    pub radius: f64,
}

impl Ball {
    /// Moves `w` to the nearest point of the ball.
    pub fn project(&self, w: &mut [f64]) {
        let distance = w.iter().zip(&self.centre).map(|(w, c)| (w - c) * (w - c)).sum::<f64>().sqrt();
        if distance > self.radius {
            let shrink = self.radius / distance;
            w.iter_mut().zip(&self.centre).for_each(|(w, c)| *w = c + shrink * (*w - c));
        }
    }
}

/// How good hints are: the running ratio of ‖h - g‖ to ‖g‖.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintGauge {
    /// Share of what was measured before that stays with each round: 0.9 looks about ten rounds back.
    pub keep: f64,
    missed: f64,
    size: f64,
    squares: f64,
}

impl HintGauge {
    /// One that has seen nothing.
    pub fn new(keep: f64) -> Self {
        Self { keep, missed: 0.0, size: 0.0, squares: 0.0 }
    }

    /// The hint was `h`, the gradient came out as `g`.
    pub fn observe(&mut self, h: &[f64], g: &[f64]) {
        let square: f64 = h.iter().zip(g).map(|(h, g)| (h - g) * (h - g)).sum();
        self.missed = self.keep * self.missed + square.sqrt();
        self.size = self.keep * self.size + g.iter().map(|g| g * g).sum::<f64>().sqrt();
        self.squares += square;
    }

    /// Mean of ‖h - g‖ over that of ‖g‖, later rounds counting more; 0 before the first.
    pub fn ratio(&self) -> f64 {
        if self.missed == 0.0 { 0.0 } else { self.missed / self.size }
    }

    /// Σ‖h - g‖² over all rounds: δ in the regret bound of optimistic descent.
    pub fn delta(&self) -> f64 {
        self.squares
    }

    /// Whether the hint is nearer to the gradient than 0 is. Where it is not, h = 0 does better.
    pub fn trusted(&self) -> bool {
        self.ratio() < 1.0
    }
}

/// Settings of an [`Optimizer`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Rule.
    pub method: Method,
    /// Learning rate η.
    pub lr: f64,
    /// Decoupled weight decay d: w -= η d w, of an optimistic rule the anchor.
    #[serde(default)]
    pub decay: f64,
    /// Where parameters (and the anchor) must stay.
    #[serde(default)]
    pub ball: Option<Ball>,
    /// Looks after the hints of an optimistic rule: without one they are always played.
    #[serde(default)]
    pub gauge: Option<HintGauge>,
}

impl Settings {
    /// `method` at rate `lr`, unconfined.
    pub fn new(method: Method, lr: f64) -> Self {
        Self { method, lr, decay: 0.0, ball: None, gauge: None }
    }

    fn validate(&self, n: usize) -> Result<()> {
        let unit = |x: f64| (0.0..1.0).contains(&x);
        let method = match self.method {
            Method::Ogd | Method::Optimistic => true,
            Method::HeavyBall { mu } => unit(mu),
            Method::AdamW { beta1, beta2, eps } | Method::OptimisticAdam { beta1, beta2, eps } => {
                unit(beta1) && unit(beta2) && eps > 0.0 && eps.is_finite()
            }
        };
        ensure!(method, Usage, "optimiser: {:?} is impossible", self.method);
        ensure!(self.lr.is_finite() && self.lr >= 0.0, Usage, "optimiser: lr = {} is impossible", self.lr);
        ensure!(self.decay.is_finite() && self.decay >= 0.0, Usage, "optimiser: decay = {} is impossible", self.decay);
        if let Some(ball) = &self.ball {
            let sane = ball.centre.len() == n && ball.radius > 0.0 && ball.centre.iter().all(|c| c.is_finite());
            ensure!(sane, Usage, "optimiser: the ball has no radius, or its centre is no vector of {n} numbers");
        }
        if let Some(gauge) = &self.gauge {
            ensure!(unit(gauge.keep), Usage, "optimiser: keep = {} is impossible", gauge.keep);
        }
        Ok(())
    }
}

/// A rule and its state, for one vector of parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    settings: Settings,
    /// First moment or velocity, and second moment: as many as the rule has, else empty.
    m: Vec<f64>,
    v: Vec<f64>,
    /// Of an optimistic rule.
    anchor: Vec<f64>,
    /// The direction of the last step, of an optimistic rule; empty where there is none to guess by.
    hint: Vec<f64>,
    steps: u64,
}

impl Optimizer {
    /// For parameters that are `w` now.
    ///
    /// # Errors
    /// `Usage`: a setting that is impossible.
    pub fn new(settings: Settings, w: &[f64]) -> Result<Self> {
        settings.validate(w.len())?;
        let zeros = |needed: bool| vec![0.0; if needed { w.len() } else { 0 }];
        let adam = matches!(settings.method, Method::AdamW { .. } | Method::OptimisticAdam { .. });
        let ball = matches!(settings.method, Method::HeavyBall { .. });
        let optimistic = settings.method.optimistic();
        let anchor = if optimistic { w.to_vec() } else { Vec::new() };
        Ok(Self { settings, m: zeros(adam || ball), v: zeros(adam), anchor, hint: Vec::new(), steps: 0 })
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The anchor of an optimistic rule; empty for others.
    pub fn anchor(&self) -> &[f64] {
        &self.anchor
    }

    /// What was measured of the hints, where a gauge was set.
    pub fn gauge(&self) -> Option<&HintGauge> {
        self.settings.gauge.as_ref()
    }

    /// Moves `w`, which was played, against its gradient `g` to what is played next.
    ///
    /// # Errors
    /// `Shape`: lengths that differ. `Diverged`: a gradient that is not finite; nothing has changed then.
    pub fn step(&mut self, w: &mut [f64], g: &[f64]) -> Result<()> {
        let optimistic = self.settings.method.optimistic();
        let n = [&self.anchor, &self.m].into_iter().map(Vec::len).max().filter(|&n| n > 0).unwrap_or(w.len());
        ensure!(w.len() == n && g.len() == n, Shape, "{} weights and {} gradients, not {n}", w.len(), g.len());
        ensure!(g.iter().all(|g| g.is_finite()), Diverged, "step {}: the gradient is not finite", self.steps + 1);
        self.steps += 1;
        let directions: Vec<f64> = (0..n).map(|i| self.direction(i, g[i])).collect();
        let Settings { lr, decay, ball, gauge, .. } = &mut self.settings;
        let moved = if optimistic { &mut self.anchor[..] } else { &mut *w };
        moved.iter_mut().zip(&directions).for_each(|(w, u)| *w -= *lr * (u + *decay * *w));
        if let Some(ball) = ball {
            ball.project(moved);
        }
        if optimistic {
            // A hint of 0 for want of a better is no guess to be measured.
            if let (Some(gauge), false) = (&mut *gauge, self.hint.is_empty()) {
                gauge.observe(&self.hint, &directions);
            }
            let reach = if gauge.is_none_or(|gauge| gauge.trusted()) { *lr } else { 0.0 };
            w.iter_mut().zip(&self.anchor).zip(&directions).for_each(|((w, a), u)| *w = a - reach * u);
            if let Some(ball) = ball {
                ball.project(w);
            }
            self.hint = directions;
        }
        Ok(())
    }

    /// Forgets the last gradient: after a rollback or a change of weights from outside it is no guess of the next. `w` is played
    /// next, and the anchor.
    pub fn restart_hint(&mut self, w: &[f64]) {
        if self.settings.method.optimistic() {
            self.anchor.copy_from_slice(w);
            self.hint.clear();
        }
    }

    fn direction(&mut self, i: usize, g: f64) -> f64 {
        match self.settings.method {
            Method::Ogd | Method::Optimistic => g,
            Method::HeavyBall { mu } => {
                self.m[i] = mu * self.m[i] + g;
                self.m[i]
            }
            Method::AdamW { beta1, beta2, eps } | Method::OptimisticAdam { beta1, beta2, eps } => {
                self.m[i] = beta1 * self.m[i] + (1.0 - beta1) * g;
                self.v[i] = beta2 * self.v[i] + (1.0 - beta2) * g * g;
                let rest = |beta: f64| 1.0 - beta.powf(self.steps as f64);
                self.m[i] / rest(beta1) / ((self.v[i] / rest(beta2)).sqrt() + eps)
            }
        }
    }
}
