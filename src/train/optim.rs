//! An optimiser over a set of tensors: settings, clipping by the global norm, states.

use serde::{Deserialize, Serialize};

use super::checkpoint::NamedTensor;
use super::{Schedule, flat};
use crate::backend::{Buffer, Step, Train, Update};
use crate::error::{Result, bail, ensure};
use crate::model::Param;

/// Which rule; [`Update`] says what each does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Kind {
    Sgd,
    Momentum,
    #[serde(rename = "adamw")]
    AdamW,
    Optimistic,
    OptimisticAdam,
}

/// Settings of an optimiser.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Rule.
    pub kind: Kind,
    /// Learning rate at the schedule's height.
    pub lr: f32,
    /// Of the first moment.
    pub beta1: f32,
    /// Of the second.
    pub beta2: f32,
    /// Below Adam's root.
    pub eps: f32,
    /// Of the velocity of `momentum`.
    pub momentum: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Longest gradient, as the norm over all tensors; 0: any length.
    pub clip: f32,
    /// L1 penalty: after each step weights move by lr times this towards 0.
    pub l1: f32,
    /// Learning rate over the steps.
    pub schedule: Schedule,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kind: Kind::AdamW,
            lr: 2e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            momentum: 0.9,
            weight_decay: 0.0,
            clip: 1.0,
            l1: 0.0,
            schedule: Schedule::constant(),
        }
    }
}

impl Settings {
    /// Refuses what no optimiser can use.
    ///
    /// # Errors
    /// `Usage`, naming the setting.
    pub fn validate(&self) -> Result<()> {
        let unit = |x: f32| (0.0..1.0).contains(&x);
        let checks = [
            ("lr", self.lr, self.lr.is_finite() && self.lr > 0.0),
            ("beta1", self.beta1, unit(self.beta1)),
            ("beta2", self.beta2, unit(self.beta2)),
            ("eps", self.eps, self.eps > 0.0 && self.eps.is_finite()),
            ("momentum", self.momentum, unit(self.momentum)),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0 && self.lr * self.weight_decay < 1.0),
            ("clip", self.clip, self.clip >= 0.0),
            ("l1", self.l1, self.l1 >= 0.0 && self.l1.is_finite()),
        ];
        for (name, value, good) in checks {
            ensure!(good, Usage, "optimiser: {name} = {value} is impossible");
        }
        self.schedule.validate()
    }

    /// The rule with its constants.
    pub fn rule(&self) -> Update {
        let Self { beta1, beta2, eps, momentum, .. } = *self;
        match self.kind {
            Kind::Sgd => Update::Sgd,
            Kind::Momentum => Update::Momentum { mu: momentum },
            Kind::AdamW => Update::AdamW { beta1, beta2, eps },
            Kind::Optimistic => Update::Optimistic,
            Kind::OptimisticAdam => Update::OptimisticAdam { beta1, beta2, eps },
        }
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stepped {
    /// Norm of the gradient over all tensors, before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
}

/// An optimiser and its states. The tensors that train must be the same ones in the same order at every call.
pub struct Optimizer<B: Train> {
    settings: Settings,
    states: Vec<Vec<B::Buf<B::Acc>>>,
    steps: u64,
    /// Where a pull goes, for each tensor that trains; none before the first pull.
    references: Vec<B::Buf<B::Acc>>,
}

/// Sees the loss and the values of a step and adds to the gradient, all as one vector, tensor after tensor.
pub type OnGradient<'a> = &'a mut dyn FnMut(f64, &[f32], &mut [f32]) -> Result<()>;

/// What a step does besides descending its loss.
#[derive(Default)]
pub struct Penalty<'a> {
    /// Adds the gradient of a penalty, before the gradient is clipped.
    pub gradient: Option<OnGradient<'a>>,
    /// Pulls each value towards its reference behind the update, in place of the optimiser's own L1 penalty: theta = ref +
    /// soft(theta - ref, rate times this).
    pub pull: Option<(&'a [f32], f32)>,
}

/// An optimiser's states by name.
pub type Moments = Vec<(String, Vec<f32>)>;

impl<B: Train> Optimizer<B> {
    /// For the tensors among `params` that have gradients.
    ///
    /// # Errors
    /// Settings that are impossible; no memory.
    pub fn new<'p>(be: &B, settings: Settings, params: impl Iterator<Item = &'p Param<B>>) -> Result<Self> {
        settings.validate()?;
        let rule = settings.rule();
        let of = |p: &Param<B>| {
            let mut states: Vec<_> = (0..rule.states()).map(|_| be.alloc(p.len())).collect::<Result<_>>()?;
            if let Some(anchor) = rule.anchor() {
                be.copy(states[anchor].head_mut(p.len()), p.values())?;
            }
            Ok(states)
        };
        let states = params.filter(|p| p.g.is_some()).map(of).collect::<Result<_>>()?;
        Ok(Self { settings, states, steps: 0, references: Vec::new() })
    }

    /// Its settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Moves every tensor that has a gradient and clears the gradients.
    ///
    /// # Errors
    /// `Diverged` where the gradient is not finite: no weight has changed then, and gradients are cleared.
    pub fn step<'p>(&mut self, be: &B, params: impl Iterator<Item = &'p mut Param<B>>) -> Result<Stepped> {
        self.advance(be, params, self.settings.l1, false)
    }

    /// Ends a step whose gradients have been gathered: adds the penalty's, moves the tensors and clears the gradients.
    ///
    /// # Errors
    /// `Diverged` where the loss or the gradient is not finite: no weight has changed then, and gradients are cleared. A reference of
    /// other values than all tensors have; those of the penalty.
    pub fn conclude(
        &mut self,
        be: &B,
        params: &mut [&mut Param<B>],
        loss: f64,
        penalty: Penalty<'_>,
    ) -> Result<Stepped> {
        if !loss.is_finite() {
            flat::clear(be, params.iter_mut().map(|p| &mut **p))?;
            bail!(Diverged, "step {}: the loss is {loss}; lower the learning rate", self.steps + 1);
        }
        if let Some(add) = penalty.gradient {
            let values = flat::values(be, params.iter().map(|p| &**p))?;
            let mut gradient = flat::gradients(be, params.iter().map(|p| &**p))?;
            add(loss, &values, &mut gradient)?;
            flat::set_gradients(be, params.iter_mut().map(|p| &mut **p), &gradient)?;
        }
        let Some((reference, strength)) = penalty.pull else {
            return self.step(be, params.iter_mut().map(|p| &mut **p));
        };
        if self.references.is_empty() {
            let trained = params.iter().filter(|p| p.g.is_some());
            self.references = trained.map(|p| be.alloc(p.len())).collect::<Result<_>>()?;
        }
        let mut own = self.references.iter_mut();
        flat::split(params.iter_mut().map(|p| &mut **p), reference, |p, values| {
            match if p.g.is_some() { own.next() } else { None } {
                Some(r) => be.upload_acc(r.head_mut(values.len()), values),
                None => Ok(()),
            }
        })?;
        self.advance(be, params.iter_mut().map(|p| &mut **p), strength, true)
    }

    /// Moves by the gradients, and by an L1 penalty of strength `l1` towards the references, or towards 0.
    fn advance<'p>(
        &mut self,
        be: &B,
        params: impl Iterator<Item = &'p mut Param<B>>,
        l1: f32,
        towards: bool,
    ) -> Result<Stepped> {
        let mut params: Vec<&mut Param<B>> = params.filter(|p| p.g.is_some()).collect();
        ensure!(params.len() == self.states.len(), Shape, "{} tensors train, not {}", params.len(), self.states.len());
        let grads: Vec<_> = params.iter().filter_map(|p| p.g.as_ref().map(|g| g.head(p.len()))).collect();
        let square = be.sq_norm(&grads)?;
        drop(grads);
        let Settings { clip, weight_decay, .. } = self.settings;
        let lr = self.settings.lr * self.settings.schedule.factor(self.steps) as f32;
        let grad_norm = square.sqrt();
        let finite = grad_norm.is_finite();
        let scale = if clip > 0.0 && grad_norm > f64::from(clip) { clip / grad_norm as f32 } else { 1.0 };
        let (rule, number) = (self.settings.rule(), self.steps + 1);
        let step = Step { rule, lr, decay: weight_decay, scale, number, l1: lr * l1 };
        let references = &self.references;
        let reference = |i: usize| references.get(i).filter(|_| towards);
        for (i, (p, states)) in params.iter_mut().zip(&mut self.states).enumerate() {
            let n = p.len();
            let Some(g) = &mut p.g else { continue };
            if finite {
                be.optimize(p.w.head_mut(n), g.head(n), states, reference(i).map(|r| r.head(n)), &step)?;
            }
            be.zero(g.head_mut(n))?;
        }
        if !finite {
            bail!(Diverged, "step {number}: the gradient's norm is {grad_norm}; lower the learning rate");
        }
        self.steps = number;
        Ok(Stepped { grad_norm, lr: f64::from(lr) })
    }

    /// Takes over the states of an optimiser of the same tensors.
    ///
    /// # Errors
    /// The device's.
    pub fn copy_from(&mut self, be: &B, from: &Self) -> Result<()> {
        let pairs = self.states.iter_mut().zip(&from.states).flat_map(|(to, from)| to.iter_mut().zip(from));
        for (to, from) in pairs {
            let n = from.len();
            be.copy(to.head_mut(n), from.head(n))?;
        }
        self.steps = from.steps;
        Ok(())
    }

    /// Begins anew: no step done, states as at first.
    ///
    /// # Errors
    /// The device's.
    pub fn restart<'p>(&mut self, be: &B, params: impl Iterator<Item = &'p Param<B>>) -> Result<()>
    where
        B: 'p,
    {
        let anchor = self.settings.rule().anchor();
        for (p, states) in params.filter(|p| p.g.is_some()).zip(&mut self.states) {
            for (i, s) in states.iter_mut().enumerate() {
                if anchor == Some(i) {
                    be.copy(s.head_mut(p.len()), p.values())?;
                } else {
                    be.zero(s.head_mut(p.len()))?;
                }
            }
        }
        self.steps = 0;
        Ok(())
    }

    /// Multiplies the learning rate from now on.
    pub fn scale_rate(&mut self, by: f32) {
        self.settings.lr *= by;
    }

    /// Takes an optimistic rule's hint back: the anchor is played. Others have none.
    ///
    /// # Errors
    /// The device's.
    pub fn forget_hint<'p>(&self, be: &B, params: impl Iterator<Item = &'p mut Param<B>>) -> Result<()> {
        let Some(anchor) = self.settings.rule().anchor() else { return Ok(()) };
        for (p, states) in params.filter(|p| p.g.is_some()).zip(&self.states) {
            let n = p.len();
            be.copy(p.w.head_mut(n), states[anchor].head(n))?;
        }
        Ok(())
    }

    /// Every state as f32 with a name that goes with its tensor's.
    pub fn to_host<'p>(&self, be: &B, params: impl Iterator<Item = &'p Param<B>>) -> Result<Vec<NamedTensor>> {
        let mut all = Vec::new();
        for (p, states) in params.filter(|p| p.g.is_some()).zip(&self.states) {
            for (i, s) in states.iter().enumerate() {
                let mut v = vec![0.0; p.len()];
                be.download_acc(s.head(p.len()), &mut v)?;
                all.push((format!("{}#{i}", p.name), p.shape.to_vec(), v));
            }
        }
        Ok(all)
    }

    /// Steps done, and every state by name.
    ///
    /// # Errors
    /// The device's.
    pub fn moments<'p>(&self, be: &B, params: impl Iterator<Item = &'p Param<B>>) -> Result<(u64, Moments)> {
        Ok((self.steps, self.to_host(be, params)?.into_iter().map(|(name, _, v)| (name, v)).collect()))
    }

    /// Goes on with what [`Optimizer::moments`] gave.
    ///
    /// # Errors
    /// `Weights` for a state that is missing or of another size.
    pub fn set_moments<'p>(
        &mut self,
        be: &B,
        params: impl Iterator<Item = &'p Param<B>>,
        steps: u64,
        moments: &Moments,
    ) -> Result<()>
    where
        B: 'p,
    {
        self.restore(be, params, steps, |name, n| match moments.iter().find(|s| s.0 == name) {
            Some((_, v)) if v.len() == n => Ok(v),
            Some((_, v)) => bail!(Weights, "{name} has {} values, {n} here", v.len()),
            None => bail!(Weights, "no state {name} of the optimiser"),
        })
    }

    /// Goes on with states that [`Optimizer::to_host`] gave after `steps` steps; `find` gives each by name.
    pub fn restore<'p, 'v>(
        &mut self,
        be: &B,
        params: impl Iterator<Item = &'p Param<B>>,
        steps: u64,
        find: impl Fn(&str, usize) -> Result<&'v [f32]>,
    ) -> Result<()> {
        for (p, states) in params.filter(|p| p.g.is_some()).zip(&mut self.states) {
            for (i, s) in states.iter_mut().enumerate() {
                be.upload_acc(s.head_mut(p.len()), find(&format!("{}#{i}", p.name), p.len())?)?;
            }
        }
        self.steps = steps;
        Ok(())
    }
}
