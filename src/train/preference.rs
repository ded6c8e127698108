//! Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): [`Pairs`] of answers as training passes, and [`Preferring`], the
//! objective of a run. Of the reference only the answers' log-probabilities are kept.

use serde::Serialize;

use super::data::Preference;
use super::objective::{Answers, dpo};
use super::run::Objective;
use super::{Batch, Batches, Packing, Report, Trainer};
use crate::backend::{Target, Train};
use crate::error::{Result, ensure};
use crate::model::{ModelConfig, Pass, Term};

/// Log-probabilities of a chosen and of a rejected answer, nats.
pub type LogProbs = [f64; 2];

/// Pairs of answers as one training pass.
pub struct Pairs {
    pass: Pass,
    tokens: usize,
    ids: Vec<u32>,
    /// Labels of each answer: chosen, rejected, chosen, ...
    lens: Vec<usize>,
}

impl Pairs {
    /// A batch of [`Preference`]s, for a model of this configuration.
    ///
    /// # Errors
    /// An odd number of sequences, one without labels; tokens outside the vocabulary.
    pub fn new(cfg: &ModelConfig, batch: &Batch) -> Result<Self> {
        let (rows, ids): (Vec<u32>, Vec<u32>) = batch.labels.iter().copied().unzip();
        let (mut ends, mut lens) = (0, Vec::with_capacity(batch.lens.len()));
        for n in &batch.lens {
            let first = rows.partition_point(|r| (*r as usize) < ends);
            ends += n;
            lens.push(rows.partition_point(|r| (*r as usize) < ends) - first);
        }
        let whole = lens.len().is_multiple_of(2) && !lens.contains(&0);
        ensure!(whole, Usage, "{} sequences, not pairs of prompts with answers", lens.len());
        let pass = Pass::causal(cfg, batch.tokens.clone(), &batch.lens, rows)?;
        Ok(Self { pass, tokens: batch.tokens.len(), ids, lens })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.lens.len() / 2
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.lens.is_empty()
    }

    /// Log-probabilities of each pair's answers under what `trainer` holds now.
    ///
    /// # Errors
    /// `Diverged` where they are not finite; a pass that is longer than the trainer's.
    pub fn log_probs<B: Train>(&self, trainer: &mut Trainer<B>) -> Result<Vec<LogProbs>> {
        trainer.forward(&self.pass)?;
        let all = self.backward(trainer, &vec![[0.0; 2]; self.len()], false)?;
        for both in &all {
            ensure!(both.iter().all(|l| l.is_finite()), Diverged, "the answers' log-probabilities are {both:?}");
        }
        Ok(all)
    }

    /// Adds to the trainer's gradients that of the pairs' DPO losses, each times `weight`. Returns what policy and reference say of each.
    ///
    /// # Errors
    /// A pass that is longer than the trainer's; the device's. Log-probabilities that are not finite are no error here: [`dpo_step`] finds them.
    pub fn accumulate<B: Train>(
        &self,
        trainer: &mut Trainer<B>,
        reference: &[LogProbs],
        beta: f64,
        weight: f64,
    ) -> Result<Vec<Answers>> {
        trainer.forward(&self.pass)?;
        let policy = self.backward(trainer, &vec![[0.0; 2]; self.len()], false)?;
        let pairs = policy.into_iter().zip(reference);
        let pairs: Vec<Answers> = pairs.map(|(policy, &reference)| Answers { policy, reference }).collect();
        let by: Vec<LogProbs> = pairs.iter().map(|p| dpo(p, beta).1.map(|s| weight * s)).collect();
        self.backward(trainer, &by, true)?;
        Ok(pairs)
    }

    /// Log-probabilities in the last forward pass; with `grad` the gradient of a loss with the derivatives `by` is added.
    fn backward<B: Train>(&self, trainer: &mut Trainer<B>, by: &[LogProbs], grad: bool) -> Result<Vec<LogProbs>> {
        // Rows have cross-entropies, which are the log-probabilities' negatives.
        let weights = by.as_flattened().iter().zip(&self.lens);
        let weights: Vec<f32> = weights.flat_map(|(by, &n)| std::iter::repeat_n(-by as f32, n)).collect();
        let target = |r: std::ops::Range<usize>| Target::Hard(&self.ids[r]);
        let losses = trainer.backward(&self.pass, &[Term { target: &target, weights: &weights }], grad)?.swap_remove(0);
        let mut rest = &losses[..];
        let mut answers = self.lens.iter().map(|&n| {
            let (own, others) = rest.split_at(n);
            rest = others;
            -own.iter().sum::<f64>()
        });
        Ok((0..self.len()).map(|_| std::array::from_fn(|_| answers.next().unwrap_or_default())).collect())
    }
}

/// What a reference says of preferences: the log-probabilities of each one's answers under what `trainer` holds now. `on` hears how many are
/// done, of how many.
///
/// # Errors
/// As [`Preference::check`] and [`Pairs::log_probs`]; a pair that is longer than a pass.
pub fn reference<B: Train>(
    trainer: &mut Trainer<B>,
    preferences: &[Preference],
    limits: Packing,
    on: &mut dyn FnMut(usize, usize),
) -> Result<Vec<LogProbs>> {
    preferences.iter().try_for_each(Preference::check)?;
    let (mut out, mut done) = (vec![[0.0; 2]; preferences.len()], 0);
    for batch in Batches::once(preferences, limits)? {
        let both = Pairs::new(trainer.model().config(), &batch)?.log_probs(trainer)?;
        done += both.len();
        batch.ids.iter().zip(both).for_each(|(&i, both)| out[i] = both);
        on(done, preferences.len());
    }
    Ok(out)
}

/// One update by DPO on passes of pairs, each with what the reference says of them. The report's loss is the mean over the pairs.
///
/// # Errors
/// `Diverged` where a log-probability or the gradient is not finite: no weight has changed then, and the gradient is forgotten.
pub fn dpo_step<B: Train>(trainer: &mut Trainer<B>, passes: &[(Pairs, Vec<LogProbs>)], beta: f64) -> Result<Report> {
    let pairs: usize = passes.iter().map(|p| p.0.len()).sum();
    ensure!(pairs > 0, Usage, "a step without a pair");
    let (mut report, mut all) = (Report::default(), Margins::default());
    for (pass, reference) in passes {
        let answers = pass.accumulate(trainer, reference, beta, 1.0 / pairs as f64)?;
        answers.iter().for_each(|a| all.add(a, beta));
        report.tokens += pass.tokens;
        report.labels += pass.ids.len();
    }
    trainer.conclude(Report { loss: all.mean().loss, ..report })
}

/// What preferences say of a policy beside its reference; means over pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Margins {
    /// How many.
    pub pairs: usize,
    /// DPO's loss, nats; ln 2 where policy and reference are one.
    pub loss: f64,
    /// Share of the pairs whose margin is greater than 0.
    pub accuracy: f64,
    /// β (ln π/π_ref of the chosen answer - that of the rejected one): by how much the implicit reward tells them apart.
    pub margin: f64,
    /// ln π/π_ref of the chosen answers, nats an answer.
    pub chosen: f64,
    /// The same of the rejected ones.
    pub rejected: f64,
}

impl Margins {
    fn add(&mut self, a: &Answers, beta: f64) {
        let [chosen, rejected] = [0, 1].map(|i| a.policy[i] - a.reference[i]);
        let margin = beta * (chosen - rejected);
        // An answer of probability 0 may have a finite loss, and a gradient that is none.
        let loss = if margin.is_finite() { dpo(a, beta).0 } else { f64::NAN };
        self.pairs += 1;
        self.accuracy += f64::from(margin > 0.0);
        self.loss += loss;
        self.margin += margin;
        self.chosen += chosen;
        self.rejected += rejected;
    }

    fn mean(self) -> Self {
        let n = self.pairs.max(1) as f64;
        Self {
            loss: self.loss / n,
            accuracy: self.accuracy / n,
            margin: self.margin / n,
            chosen: self.chosen / n,
            rejected: self.rejected / n,
            ..self
        }
    }

    /// Mean ln π_ref/π over all answers, nats an answer. Where both answers of every pair were drawn from the reference (temperature 1, no filter,
    /// pairs kept whatever they said) this is an unbiased estimate of KL(π_ref ‖ π), which may come out negative; for other answers it is no more than how
    /// much less likely they have become. It is not KL(π ‖ π_ref): that takes answers of the policy's own.
    pub fn kl(&self) -> f64 {
        // 0 minus: no negative zero before anything was learnt.
        0.0 - (self.chosen + self.rejected) / 2.0
    }
}

/// DPO as the objective of a run over [`Preference`]s.
pub struct Preferring {
    /// Strength β of the reference.
    pub beta: f64,
    /// What the reference says of each pair that is learnt from.
    pub train: Vec<LogProbs>,
    /// And of each held-out one.
    pub held_out: Vec<LogProbs>,
    /// What held-out pairs said last.
    pub measured: Option<Margins>,
}

impl Preferring {
    /// The reference is what the trainer holds at the call.
    ///
    /// # Errors
    /// An impossible β; as [`reference()`].
    pub fn new<B: Train>(
        trainer: &mut Trainer<B>,
        [train, held_out]: [&[Preference]; 2],
        beta: f64,
        limits: Packing,
        on: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        ensure!(beta.is_finite() && beta > 0.0, Usage, "beta = {beta} is impossible");
        let all = train.len() + held_out.len();
        let of_train = reference(trainer, train, limits, &mut |done, _| on(done, all))?;
        let of_held_out = reference(trainer, held_out, limits, &mut |done, _| on(train.len() + done, all))?;
        Ok(Self { beta, train: of_train, held_out: of_held_out, measured: None })
    }
}

fn passes<B: Train>(trainer: &Trainer<B>, batch: &Batch, reference: &[LogProbs]) -> Result<(Pairs, Vec<LogProbs>)> {
    let pairs = Pairs::new(trainer.model().config(), batch)?;
    Ok((pairs, batch.ids.iter().map(|&i| reference[i]).collect()))
}

impl<B: Train> Objective<B> for Preferring {
    fn step(&mut self, trainer: &mut Trainer<B>, batches: &[Batch], _: u64) -> Result<Report> {
        let all: Vec<_> = batches.iter().map(|b| passes(trainer, b, &self.train)).collect::<Result<_>>()?;
        dpo_step(trainer, &all, self.beta)
    }

    fn evaluate(&mut self, trainer: &mut Trainer<B>, batches: &[Batch]) -> Result<f64> {
        let mut all = Margins::default();
        for batch in batches {
            let (pairs, reference) = passes(trainer, batch, &self.held_out)?;
            let policy = pairs.log_probs(trainer)?;
            let answers = policy.into_iter().zip(reference).map(|(policy, reference)| Answers { policy, reference });
            answers.for_each(|a| all.add(&a, self.beta));
        }
        let mean = all.mean();
        self.measured = Some(mean);
        Ok(mean.loss)
    }
}
