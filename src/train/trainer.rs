//! [`Trainer`]: a model, what of it trains, an optimiser, and the room for passes.

use std::ops::Range;

use super::flat;
use super::optim::{Moments, Optimizer, Penalty, Settings, Stepped};
use super::{Batch, Checkpoint, Cursor};
use crate::backend::{Target, Train};
use crate::error::{Result, ensure};
use crate::model::{Adapter, Full, Head, Model, Param, Pass, Recompute, Saved, Term};

/// Rows of logits that exist at a time.
const TILE: usize = 256;

/// What a run changes.
pub enum Trainable<B: Train> {
    /// A LoRA adapter; the model's weights stay.
    Adapter(Adapter<B>),
    /// The model's own weights.
    Full(Full<B>),
}

impl<B: Train> Trainable<B> {
    /// Every tensor, in a fixed order.
    pub fn params(&self) -> Box<dyn Iterator<Item = &Param<B>> + '_> {
        match self {
            Trainable::Adapter(a) => Box::new(a.params()),
            Trainable::Full(f) => Box::new(f.params().map(|(_, p)| p)),
        }
    }

    fn params_mut(&mut self) -> Box<dyn Iterator<Item = &mut Param<B>> + '_> {
        match self {
            Trainable::Adapter(a) => Box::new(a.params_mut()),
            Trainable::Full(f) => Box::new(f.params_mut()),
        }
    }

    fn adapter(&self) -> Option<&Adapter<B>> {
        match self {
            Trainable::Adapter(a) => Some(a),
            Trainable::Full(_) => None,
        }
    }
}

/// What one step of training did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Mean loss over the labels, before the step, nats.
    pub loss: f64,
    /// Tokens that went through the model.
    pub tokens: usize,
    /// Tokens that were learnt.
    pub labels: usize,
    /// The optimiser's part.
    pub stepped: Stepped,
}

/// A model that trains.
pub struct Trainer<B: Train> {
    model: Model<B>,
    trainable: Trainable<B>,
    optimizer: Optimizer<B>,
    saved: Saved<B>,
    head: Head<B>,
}

impl<B: Train> Trainer<B> {
    /// Passes of up to `rows` tokens. An adapter trains where it has gradients ([`Adapter::train`]).
    ///
    /// # Errors
    /// Impossible settings; no memory.
    pub fn new(
        model: Model<B>,
        trainable: Trainable<B>,
        settings: Settings,
        rows: usize,
        recompute: Recompute,
    ) -> Result<Self> {
        let be = model.backend();
        let lowest = match &trainable {
            Trainable::Adapter(a) => a.lowest().unwrap_or(0),
            Trainable::Full(_) => 0,
        };
        let optimizer = Optimizer::new(be, settings, trainable.params())?;
        let saved = Saved::new(be, model.config(), rows, rows, trainable.adapter(), lowest, recompute)?;
        let head = Head::new(&model, rows, TILE)?;
        Ok(Self { model, trainable, optimizer, saved, head })
    }

    /// The model.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// What trains.
    pub fn trainable(&self) -> &Trainable<B> {
        &self.trainable
    }

    /// The model and what was trained.
    pub fn into_parts(self) -> (Model<B>, Trainable<B>) {
        (self.model, self.trainable)
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// The losses of a pass's wanted rows; adds the gradient of their sum, each times its weight, where `grad`.
    ///
    /// # Errors
    /// A pass larger than planned; the device's errors.
    pub fn accumulate<'t>(
        &mut self,
        pass: &Pass,
        target: impl Fn(Range<usize>) -> Target<'t, B>,
        weights: &[f32],
        grad: bool,
    ) -> Result<Vec<f64>> {
        self.forward(pass)?;
        Ok(self.backward(pass, &[Term { target: &target, weights }], grad)?.swap_remove(0))
    }

    /// Runs a pass, for [`Trainer::likeliest`] and [`Trainer::backward`].
    ///
    /// # Errors
    /// A pass larger than planned; the device's errors.
    pub fn forward(&mut self, pass: &Pass) -> Result<()> {
        let Self { model, trainable, saved, .. } = self;
        model.forward_saved(pass, trainable.adapter(), saved)
    }

    /// [`Trainer::forward`] from the input of a layer on, as [`Trainer::hidden_at`] gave it.
    ///
    /// # Errors
    /// As [`Model::forward_from`].
    pub fn forward_from(&mut self, pass: &Pass, layer: usize, hidden: &[f32]) -> Result<()> {
        let Self { model, trainable, saved, .. } = self;
        model.forward_from(pass, layer, hidden, trainable.adapter(), saved)
    }

    /// The residual stream of the model without what trains, at the inputs of `layers`.
    ///
    /// # Errors
    /// As [`Model::hidden_at`].
    pub fn hidden_at(&mut self, pass: &Pass, layers: &[usize]) -> Result<Vec<Vec<f32>>> {
        self.model.hidden_at(pass, None, layers, &mut self.saved)
    }

    /// Shows `visit` the logits of each wanted row of the last forward pass.
    ///
    /// # Errors
    /// The device's.
    pub fn logits(&mut self, pass: &Pass, visit: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.model.logits(pass, &self.saved, &mut self.head, visit)
    }

    /// The input of a layer's q, k and v in the last forward pass, `[rows, hidden]`.
    ///
    /// # Errors
    /// The device's.
    pub fn attention_input(&mut self, layer: usize, pass: &Pass) -> Result<Vec<f32>> {
        self.model.attention_input(layer, pass, &mut self.saved)
    }

    /// All that trains, one tensor after another in the order of [`Trainable::params`].
    ///
    /// # Errors
    /// The device's.
    pub fn values(&self) -> Result<Vec<f32>> {
        flat::values(self.model.backend(), self.trainable.params())
    }

    /// Sets all that trains; the optimiser stays.
    ///
    /// # Errors
    /// Another number of values; the device's.
    pub fn set_values(&mut self, values: &[f32]) -> Result<()> {
        flat::set_values(self.model.backend(), self.trainable.params_mut(), values)?;
        self.refresh()
    }

    /// The gradients gathered since the last time, as [`Trainer::values`] lists, 0 for what is frozen; they are forgotten.
    ///
    /// # Errors
    /// The device's.
    pub fn take_gradients(&mut self) -> Result<Vec<f32>> {
        let gradients = flat::gradients(self.model.backend(), self.trainable.params())?;
        self.clear()?;
        Ok(gradients)
    }

    /// Lets the optimiser begin anew.
    ///
    /// # Errors
    /// The device's.
    pub fn restart(&mut self) -> Result<()> {
        let Self { model, trainable, optimizer, .. } = self;
        optimizer.restart(model.backend(), trainable.params())
    }

    /// Steps and states of the optimiser.
    ///
    /// # Errors
    /// The device's.
    pub fn moments(&self) -> Result<(u64, Moments)> {
        self.optimizer.moments(self.model.backend(), self.trainable.params())
    }

    /// Sets them.
    ///
    /// # Errors
    /// A state that is missing or of another size.
    pub fn set_moments(&mut self, steps: u64, moments: &Moments) -> Result<()> {
        let Self { model, trainable, optimizer, .. } = self;
        optimizer.set_moments(model.backend(), trainable.params(), steps, moments)
    }

    /// The likeliest token of each wanted row of the last forward pass.
    ///
    /// # Errors
    /// The device's.
    pub fn likeliest(&mut self, pass: &Pass) -> Result<Vec<u32>> {
        self.model.likeliest(pass, &self.saved, &mut self.head)
    }

    /// The losses of the wanted rows of the last forward pass under each term; adds the gradient of their sum, where `grad`.
    ///
    /// # Errors
    /// The device's.
    pub fn backward(&mut self, pass: &Pass, terms: &[Term<'_, '_, B>], grad: bool) -> Result<Vec<Vec<f64>>> {
        let Self { model, trainable, saved, head, .. } = self;
        let (adapter, mut full) = match trainable {
            Trainable::Adapter(a) => (Some(a), None),
            Trainable::Full(f) => (None, Some(f)),
        };
        let losses = model.head_terms(pass, saved, head, terms, grad, full.as_deref_mut())?;
        if grad {
            model.backward(pass, saved, head, adapter, full)?;
        }
        Ok(losses)
    }

    /// Moves the weights by the gradients accumulated since the last time.
    ///
    /// # Errors
    /// `Diverged` where they are not finite; nothing has changed then.
    pub fn update(&mut self) -> Result<Stepped> {
        let be = self.model.backend();
        let stepped = self.optimizer.step(be, self.trainable.params_mut())?;
        self.refresh()?;
        Ok(stepped)
    }

    /// One step on the cross-entropy of `batches` together: the mean over all their labels, however they are divided.
    ///
    /// # Errors
    /// `Diverged` where loss or gradient is not finite: no weight has changed then.
    pub fn step(&mut self, batches: &[Batch]) -> Result<Report> {
        let labels: usize = batches.iter().map(|b| b.labels.len()).sum();
        ensure!(labels > 0, Usage, "a step without a token to learn");
        let (mut loss, mut tokens) = (0.0, 0);
        for batch in batches {
            loss += self.cross_entropy(batch, 1.0 / labels as f32, true)?;
            tokens += batch.tokens.len();
        }
        self.conclude(Report { loss: loss / labels as f64, tokens, labels, ..Report::default() })
    }

    /// Ends a step: moves the weights by what [`Trainer::accumulate`] gathered.
    ///
    /// # Errors
    /// `Diverged` where loss or gradient is not finite: no weight has changed then, and the gradient is forgotten.
    pub fn conclude(&mut self, report: Report) -> Result<Report> {
        self.conclude_with(report, Penalty::default())
    }

    /// [`Trainer::conclude`] with a penalty on the values.
    ///
    /// # Errors
    /// As [`Optimizer::conclude`].
    pub fn conclude_with(&mut self, report: Report, penalty: Penalty<'_>) -> Result<Report> {
        let Self { model, trainable, optimizer, .. } = self;
        let mut params: Vec<_> = trainable.params_mut().collect();
        let stepped = optimizer.conclude(model.backend(), &mut params, report.loss, penalty)?;
        drop(params);
        self.refresh()?;
        Ok(Report { stepped, ..report })
    }

    /// Mean cross-entropy over the labels of `batches`, nats; nothing is learnt.
    ///
    /// # Errors
    /// The device's.
    pub fn evaluate<'b>(&mut self, batches: impl IntoIterator<Item = &'b Batch>) -> Result<f64> {
        let (mut loss, mut labels) = (0.0, 0);
        for batch in batches {
            loss += self.cross_entropy(batch, 0.0, false)?;
            labels += batch.labels.len();
        }
        Ok(loss / labels.max(1) as f64)
    }

    /// Summed loss over the labels of one batch.
    fn cross_entropy(&mut self, batch: &Batch, weight: f32, grad: bool) -> Result<f64> {
        let (rows, ids): (Vec<u32>, Vec<u32>) = batch.labels.iter().copied().unzip();
        let pass = Pass::causal(self.model.config(), batch.tokens.clone(), &batch.lens, rows)?;
        let weights = vec![weight; ids.len()];
        let losses = self.accumulate(&pass, |r| Target::Hard(&ids[r]), &weights, grad)?;
        Ok(losses.iter().sum())
    }

    fn clear(&mut self) -> Result<()> {
        flat::clear(self.model.backend(), self.trainable.params_mut())
    }

    /// Gives the model what its masters have become.
    fn refresh(&mut self) -> Result<()> {
        match &self.trainable {
            Trainable::Full(full) => self.model.refresh(full),
            Trainable::Adapter(_) => Ok(()),
        }
    }

    /// All that the run needs to go on: the caller knows the data's place and the settings.
    ///
    /// # Errors
    /// The device's.
    pub fn checkpoint(&self, cursor: Cursor, seed: u64, tokens: u64, config: serde_json::Value) -> Result<Checkpoint> {
        let (be, params) = (self.model.backend(), self.trainable.params().collect::<Vec<_>>());
        Checkpoint::take(be, &params, &self.optimizer, cursor, seed, tokens, config)
    }

    /// Goes on from a checkpoint, to the last bit where the device keeps f32.
    ///
    /// # Errors
    /// A tensor that the checkpoint lacks or has in another size.
    pub fn restore(&mut self, from: &Checkpoint) -> Result<()> {
        let be = self.model.backend();
        from.give(be, &mut self.trainable.params_mut().collect::<Vec<_>>(), &mut self.optimizer)?;
        self.refresh()
    }
}
