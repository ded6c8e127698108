//! What rejected steps teach: [`Preferences`] for the target's own steps before the draft's, and direct preference optimisation
//! ([`train::preference`](crate::train::preference)) of a draft against itself at the beginning of the chunk.

use std::collections::VecDeque;

use crate::backend::Train;
use crate::error::{Result, ensure};
use crate::train::data::{Preference, Row};
use crate::train::optim::Kind;
use crate::train::preference::{LogProbs, Pairs, dpo_step, reference};
use crate::train::{Batch, Example, Packing, Settings, Trainer};

/// The latest rejected steps: where there is no more room the oldest goes.
#[derive(Clone, Debug)]
pub struct Preferences {
    kept: VecDeque<Preference>,
    most: usize,
    context: usize,
}

impl Default for Preferences {
    /// 4096 steps behind 2048 tokens.
    fn default() -> Self {
        Self::new(4096, 2048)
    }
}

impl Preferences {
    /// Room for `most` steps, each with the last `context` tokens (one at least) of its prompt.
    pub fn new(most: usize, context: usize) -> Self {
        Self { kept: VecDeque::new(), most, context: context.max(1) }
    }

    /// Keeps one.
    pub fn push(&mut self, mut preference: Preference) {
        preference.prompt.drain(..preference.prompt.len().saturating_sub(self.context));
        self.kept.push_back(preference);
        while self.kept.len() > self.most {
            self.kept.pop_front();
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// All of a chunk, oldest first: the buffer is empty then.
    pub fn take(&mut self) -> Vec<Preference> {
        std::mem::take(&mut self.kept).into()
    }
}

/// How a chunk's preferences are learnt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dpo {
    /// Strength β of the reference.
    pub beta: f64,
    /// Times that every pair is seen; 1 for the control, [`learn_chosen`].
    pub epochs: usize,
    /// Pairs of one update.
    pub batch: usize,
}

impl Default for Dpo {
    fn default() -> Self {
        Self { beta: 0.1, epochs: 3, batch: 16 }
    }
}

impl Dpo {
    /// The optimiser of Online-LR: AdamW with betas 0.9 and 0.95, a constant rate of 5e-7, gradients clipped at norm 1.
    pub fn optimizer() -> Settings {
        Settings { kind: Kind::AdamW, lr: 5e-7, beta1: 0.9, beta2: 0.95, clip: 1.0, ..Settings::default() }
    }

    fn validate(&self) -> Result<()> {
        let good = self.beta.is_finite() && self.beta > 0.0 && self.epochs > 0 && self.batch > 0;
        ensure!(good, Usage, "{self:?} is impossible");
        Ok(())
    }
}

/// What learning did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Learned {
    /// Mean loss of each epoch, each pair's taken before the update that it is part of, nats.
    pub losses: Vec<f64>,
    /// Updates.
    pub updates: u64,
}

/// Learns a chunk's preferences by direct preference optimisation. The reference is what the trainer holds at the call, the weights
/// of the chunk's beginning where nothing was learnt since: of it only the log-probabilities are kept.
///
/// # Errors
/// `Diverged` where losses or gradients are not finite: the update that they would have been is not done, those before it are.
/// Impossible settings; as [`reference()`].
pub fn learn_preferences<B: Train>(
    trainer: &mut Trainer<B>,
    preferences: &[Preference],
    settings: &Dpo,
) -> Result<Learned> {
    settings.validate()?;
    let mut learned = Learned::default();
    if preferences.is_empty() {
        return Ok(learned);
    }
    // A pass for each pair: a trainer has room for one.
    let longest = preferences.iter().map(Row::tokens).max().unwrap_or(0);
    let reference = reference(trainer, preferences, Packing { rows: longest, sequences: 1 }, &mut |_, _| {})?;
    let of = |(p, r): (&Preference, &LogProbs)| Ok((Pairs::new(trainer.model().config(), &Batch::new([p]))?, vec![*r]));
    let passes = preferences.iter().zip(&reference).map(of).collect::<Result<Vec<_>>>()?;
    for _ in 0..settings.epochs {
        let mut total = 0.0;
        for batch in passes.chunks(settings.batch) {
            total += dpo_step(trainer, batch, settings.beta)?.loss * batch.len() as f64;
            learned.updates += 1;
        }
        learned.losses.push(total / passes.len() as f64);
    }
    Ok(learned)
}

/// The control: learns the chosen steps alone, by cross-entropy, and nothing from the rejected ones.
///
/// # Errors
/// As [`Trainer::step`]; impossible settings.
pub fn learn_chosen<B: Train>(trainer: &mut Trainer<B>, preferences: &[Preference], settings: &Dpo) -> Result<Learned> {
    settings.validate()?;
    let example = |p: &Preference| {
        let loss = (0..p.prompt.len() + p.chosen.len()).map(|i| i > 0 && i >= p.prompt.len()).collect();
        Batch::new([&Example { tokens: [&p.prompt[..], &p.chosen].concat(), loss }])
    };
    let batches: Vec<Batch> = preferences.iter().map(example).collect();
    let mut learned = Learned::default();
    for _ in 0..if batches.is_empty() { 0 } else { settings.epochs } {
        let (mut total, mut labels) = (0.0, 0);
        for batch in batches.chunks(settings.batch) {
            let report = trainer.step(batch)?;
            total += report.loss * report.labels as f64;
            labels += report.labels;
            learned.updates += 1;
        }
        learned.losses.push(total / labels as f64);
    }
    Ok(learned)
}
