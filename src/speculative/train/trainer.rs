//! [`HeadTrainer`]: a head, its target's embeddings, an optimiser, and the room for passes.

use super::forward::Said;
use super::pass::HeadPass;
use super::saved::HeadSaved;
use super::trainable::{Measured, chain_length};
use super::weights::EagleHead;
use crate::backend::{Buffer, Train};
use crate::error::{Result, bail};
use crate::model::Model;
use crate::train::optim::{Optimizer, Settings, Stepped};
use crate::train::{Checkpoint, Cursor};

/// Weights of the unrolled steps: `decay^i`.
pub fn step_weights(steps: usize, decay: f32) -> Vec<f32> {
    (0..steps as i32).map(|i| decay.powi(i)).collect()
}

/// What one step of the optimiser did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct HeadReport {
    /// Mean loss, over the steps by their weights, before the update, nats.
    pub loss: f64,
    /// Rows that went through.
    pub rows: usize,
    /// Slots that were trained.
    pub slots: usize,
    /// The optimiser's part.
    pub stepped: Stepped,
}

/// How a head does on data that it has not seen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Mean loss, as [`HeadReport::loss`].
    pub loss: f64,
    /// Of the slots whose proposals were the target's in all steps before, how many are in step i.
    pub right: Vec<f64>,
}

impl Agreement {
    /// Tokens that a pass of the target would give with a chain of as many drafted ones as there are steps: 1 + a0 + a0 a1 + ...
    pub fn length(&self) -> f64 {
        chain_length(&self.right)
    }
}

/// A head that trains.
pub struct HeadTrainer<B: Train> {
    target: Model<B>,
    head: EagleHead<B>,
    optimizer: Optimizer<B>,
    saved: HeadSaved<B>,
    weights: Vec<f32>,
}

impl<B: Train> HeadTrainer<B> {
    /// Passes of up to `rows` rows; step i of `weights.len()` weighs `weights[i]`.
    ///
    /// # Errors
    /// Impossible settings; no memory.
    pub fn new(
        target: Model<B>,
        head: EagleHead<B>,
        settings: Settings,
        rows: usize,
        weights: Vec<f32>,
    ) -> Result<Self> {
        let be = target.backend();
        let optimizer = Optimizer::new(be, settings, head.params())?;
        let saved = HeadSaved::new(be, head.config(), rows, weights.len())?;
        Ok(Self { target, head, optimizer, saved, weights })
    }

    /// The head.
    pub fn head(&self) -> &EagleHead<B> {
        &self.head
    }

    /// Its target.
    pub fn target(&self) -> &Model<B> {
        &self.target
    }

    /// Steps of the optimiser done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// The weight of an active slot in each unrolled step such that `passes` together give the weighted sum of the steps' means.
    fn slot_weights(&self, passes: &[HeadPass]) -> Vec<f32> {
        let active = |i: usize| passes.iter().map(|p| p.active(i)).sum::<usize>();
        self.weights.iter().enumerate().map(|(i, w)| w / active(i).max(1) as f32).collect()
    }

    fn pass(&mut self, pass: &HeadPass, weights: &[f32], learn: bool, tokens: bool) -> Result<Said> {
        let Self { target, head, saved, .. } = self;
        let be = target.backend();
        head.forward(be, target.embedding(), pass, saved)?;
        let said = head.say(be, pass, saved, weights, learn, tokens)?;
        if learn {
            head.backward(be, pass, saved)?;
        }
        Ok(said)
    }

    fn mean(&self, said: &Said, weights: &[f32]) -> f64 {
        let of = |(losses, w): (&Vec<f64>, &f32)| f64::from(*w) * losses.iter().sum::<f64>();
        let total: f64 = self.weights.iter().copied().map(f64::from).sum();
        said.loss.iter().zip(weights).map(of).sum::<f64>() / total
    }

    /// One step on `passes` together.
    ///
    /// # Errors
    /// `Diverged` where loss or gradient is not finite: no weight has changed then.
    pub fn step(&mut self, passes: &[HeadPass]) -> Result<HeadReport> {
        let (weights, mut report) = (self.slot_weights(passes), HeadReport::default());
        for pass in passes {
            let said = self.pass(pass, &weights, true, false)?;
            report.loss += self.mean(&said, &weights);
            report.rows += pass.rows();
            report.slots += pass.slots();
        }
        let be = self.target.backend();
        if !report.loss.is_finite() {
            for p in self.head.params_mut() {
                let n = p.len();
                p.g.iter_mut().try_for_each(|g| be.zero(g.head_mut(n)))?;
            }
            bail!(Diverged, "step {}: the loss is {}; lower the learning rate", self.steps() + 1, report.loss);
        }
        report.stepped = self.optimizer.step(be, self.head.params_mut())?;
        self.head.refresh(be)?;
        Ok(report)
    }

    /// How the head does on `passes`; nothing is learnt.
    ///
    /// # Errors
    /// The device's.
    pub fn evaluate(&mut self, passes: &[HeadPass]) -> Result<Agreement> {
        let (weights, steps) = (self.slot_weights(passes), self.weights.len());
        let mut found = Measured::default();
        for pass in passes {
            let said = self.pass(pass, &weights, false, true)?;
            found.loss += self.mean(&said, &weights);
            found.count(pass.slots(), steps, |s, i| pass.wanted(s, i).map(|wanted| said.token[i][s] == wanted));
        }
        Ok(Agreement { loss: found.loss, right: found.rates() })
    }

    /// All that the run needs to go on: the caller knows the data's place and the settings.
    ///
    /// # Errors
    /// The device's.
    pub fn checkpoint(&self, cursor: Cursor, seed: u64, tokens: u64, config: serde_json::Value) -> Result<Checkpoint> {
        let (be, params) = (self.target.backend(), self.head.params().collect::<Vec<_>>());
        Checkpoint::take(be, &params, &self.optimizer, cursor, seed, tokens, config)
    }

    /// Goes on from a checkpoint, to the last bit where the device keeps f32.
    ///
    /// # Errors
    /// A tensor that the checkpoint lacks or has in another size.
    pub fn restore(&mut self, from: &Checkpoint) -> Result<()> {
        let be = self.target.backend();
        from.give(be, &mut self.head.params_mut().collect::<Vec<_>>(), &mut self.optimizer)?;
        self.head.refresh(be)
    }
}
