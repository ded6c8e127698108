//! What rejected steps teach: [`Preferences`], and direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) of a draft
//! against itself at the beginning of the chunk.

use std::collections::VecDeque;

use crate::backend::{Target, Train};
use crate::error::{Result, ensure};
use crate::model::{ModelConfig, Pass};
use crate::train::objective::{Answers, dpo};
use crate::train::optim::Kind;
use crate::train::{Batch, Example, Settings, Trainer};

/// One rejected step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preference {
    /// The text before the step.
    pub prompt: Vec<u32>,
    /// The target's own step.
    pub chosen: Vec<u32>,
    /// The draft's.
    pub rejected: Vec<u32>,
}

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

/// A preference as one training pass: the prompt with the chosen answer, and with the rejected one.
pub struct Pair {
    pass: Pass,
    ids: Vec<u32>,
    chosen: usize,
}

impl Pair {
    /// For a model of this configuration.
    ///
    /// # Errors
    /// A prompt or an answer without tokens; tokens outside the vocabulary.
    pub fn new(cfg: &ModelConfig, preference: &Preference) -> Result<Self> {
        let Preference { prompt, chosen, rejected } = preference;
        let whole = ![prompt, chosen, rejected].into_iter().any(Vec::is_empty);
        ensure!(whole, Usage, "a preference needs a prompt and two answers");
        let (mut tokens, mut rows, mut lens) = (Vec::new(), Vec::new(), Vec::new());
        for answer in [chosen, rejected] {
            let first = tokens.len() + prompt.len() - 1;
            rows.extend((first..first + answer.len()).map(|r| r as u32));
            tokens.extend(prompt.iter().chain(answer));
            lens.push(prompt.len() + answer.len());
        }
        let pass = Pass::causal(cfg, tokens, &lens, rows)?;
        Ok(Self { pass, ids: [&chosen[..], rejected].concat(), chosen: chosen.len() })
    }

    /// Log-probabilities of the chosen and of the rejected answer under what `trainer` holds now, nats.
    ///
    /// # Errors
    /// `Diverged` where they are not finite; a pair that is longer than the trainer's passes.
    pub fn log_probs<B: Train>(&self, trainer: &mut Trainer<B>) -> Result<[f64; 2]> {
        let losses = self.run(trainer, [0.0; 2], false)?;
        let (chosen, rejected) = losses.split_at(self.chosen);
        let both = [chosen, rejected].map(|l| -l.iter().sum::<f64>());
        ensure!(both.iter().all(|l| l.is_finite()), Diverged, "the answers' log-probabilities are {both:?}");
        Ok(both)
    }

    /// Adds to the trainer's gradients that of a loss with these derivatives by the two log-probabilities.
    ///
    /// # Errors
    /// As [`Pair::log_probs`], without the check.
    pub fn accumulate<B: Train>(&self, trainer: &mut Trainer<B>, by: [f64; 2]) -> Result<()> {
        self.run(trainer, by, true).map(|_| ())
    }

    fn run<B: Train>(&self, trainer: &mut Trainer<B>, by: [f64; 2], grad: bool) -> Result<Vec<f64>> {
        // Rows have cross-entropies, which are the log-probabilities' negatives.
        let weight = |i: usize| -by[usize::from(i >= self.chosen)] as f32;
        let weights: Vec<f32> = (0..self.ids.len()).map(weight).collect();
        trainer.accumulate(&self.pass, |r| Target::Hard(&self.ids[r]), &weights, grad)
    }
}

/// Learns a chunk's preferences by direct preference optimisation. The reference is what the trainer holds at the call, the weights
/// of the chunk's beginning where nothing was learnt since: of it only the log-probabilities are kept.
///
/// # Errors
/// `Diverged` where losses or gradients are not finite: the update that they would have been is not done, those before it are.
/// Impossible settings; as [`Pair::new`] and [`Pair::log_probs`].
pub fn learn_preferences<B: Train>(
    trainer: &mut Trainer<B>,
    preferences: &[Preference],
    settings: &Dpo,
) -> Result<Learned> {
    settings.validate()?;
    let mut learned = Learned::default();
    let of = |p: &Preference| Pair::new(trainer.model().config(), p);
    let pairs = preferences.iter().map(of).collect::<Result<Vec<_>>>()?;
    let reference = pairs.iter().map(|p| p.log_probs(trainer)).collect::<Result<Vec<_>>>()?;
    let both: Vec<_> = pairs.iter().zip(&reference).collect();
    for _ in 0..if pairs.is_empty() { 0 } else { settings.epochs } {
        let mut total = 0.0;
        for batch in both.chunks(settings.batch) {
            // All values first: nothing is accumulated where one of them is not finite.
            let mut by = Vec::with_capacity(batch.len());
            for &(pair, &reference) in batch {
                let (loss, slopes) = dpo(&Answers { policy: pair.log_probs(trainer)?, reference }, settings.beta);
                total += loss;
                by.push(slopes.map(|s| s / batch.len() as f64));
            }
            for ((pair, _), by) in batch.iter().zip(by) {
                pair.accumulate(trainer, by)?;
            }
            trainer.update()?;
            learned.updates += 1;
        }
        learned.losses.push(total / pairs.len() as f64);
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
