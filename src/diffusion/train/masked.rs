//! [`Masked`]: the loss of masked diffusion.

use serde::{Deserialize, Serialize};

use super::layout::{Noisy, layout, sequences};
use crate::backend::{Target, Train};
use crate::error::{Result, ensure};
use crate::model::Term;
use crate::model::config::Diffusion;
use crate::rng::Key;
use crate::train::run::Objective;
use crate::train::{Batch, Report, Trainer};

/// Random numbers of a seed that decide noise: one stream for each step from here on.
pub(super) const NOISE: u64 = 0x4e4f_4953 << 32;
/// And for measurements.
const MEASURE: u64 = 0x4d45_4153 << 32;
/// And for who sees whom.
const SEE: u64 = 0x5345_4552 << 32;
/// Noise levels stay this far from 0.
const EPS: f64 = 1e-3;

/// How much a masked row counts at noise level p, the probability of a mask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weighting {
    /// 1/p over each answer's length, then the mean of answers: the bound on the negative log-likelihood, and LLaDA's fine-tuning.
    #[default]
    Bound,
    /// 1/p over the number of masks of the step: DiffuLLaMA's.
    Inverse,
    /// 1 over the number of masks of the step.
    Uniform,
}

/// Settings of [`Masked`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MaskedSettings {
    /// Weight of a row.
    pub weighting: Weighting,
    /// Share of the run in which attention goes from causal to full; 0: full from the start. Only without blocks.
    pub anneal: f64,
    /// Block-causal models: widths of blocks, each for an equal share of the run; the last is the model's.
    pub grow: Vec<usize>,
}

/// Cross-entropy of masked answer tokens, at noise levels drawn uniformly and stratified over the sequences of a step; prompts are
/// never masked, and what pads an answer is learnt like the rest (Sahoo et al. 2024, arXiv:2406.07524; Nie et al. 2025, arXiv:2502.09992).
pub struct Masked {
    /// The model.
    pub model: Diffusion,
    /// How it learns.
    pub settings: MaskedSettings,
    /// Of all noise.
    pub seed: u64,
}

impl Masked {
    /// Refuses settings that are impossible.
    ///
    /// # Errors
    /// `Usage`, naming the setting.
    pub fn new(model: Diffusion, settings: MaskedSettings, seed: u64) -> Result<Self> {
        ensure!(
            (0.0..=1.0).contains(&settings.anneal),
            Usage,
            "--anneal {}: expected a share, 0 to 1",
            settings.anneal
        );
        ensure!(
            model.block.is_none() || settings.anneal == 0.0,
            Usage,
            "--anneal is for full attention; blocks grow by --grow"
        );
        let grow = settings.grow.is_empty() || settings.grow.last().copied() == model.block;
        ensure!(
            grow && !settings.grow.contains(&0),
            Usage,
            "--grow {:?} must end at the model's blocks",
            settings.grow
        );
        Ok(Self { model, settings, seed })
    }

    /// One sequence at noise level `p`.
    fn noise(&self, clean: &[u32], start: usize, p: f64, key: Key) -> Noisy {
        let learn: Vec<usize> = (start..clean.len()).filter(|&i| key.at(i as u64).uniform() < p).collect();
        let mut noisy = clean.to_vec();
        learn.iter().for_each(|&i| noisy[i] = self.model.mask);
        Noisy { clean: clean.to_vec(), start, noisy, learn }
    }

    /// The noisy sequences of `batches`, each with its noise level.
    fn corrupt(&self, batches: &[Batch], stream: u64) -> Result<Vec<Vec<(Noisy, f64)>>> {
        let n: usize = batches.iter().map(|b| b.lens.len()).sum();
        let key = Key { seed: self.seed, stream, counter: 0 };
        // Levels are spread evenly over the step; which sequence gets which is chance too.
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| key.at(a as u64).uniform().total_cmp(&key.at(b as u64).uniform()));
        let mut at = 0;
        let mut one = |tokens: &[u32], start: usize| {
            let t = (order[at] as f64 + key.at((n + at) as u64).uniform()) / n as f64;
            let p = (1.0 - EPS) * t + EPS;
            let own = key.at(((at + 1) as u64) << 32);
            at += 1;
            (self.noise(tokens, start, p, own), p)
        };
        batches.iter().map(|b| sequences(b).map(|s| s.map(|(t, start)| one(t, start))).collect()).collect()
    }

    fn weights(&self, batches: &[Vec<(Noisy, f64)>], how: Weighting) -> Vec<Vec<f32>> {
        let all = || batches.iter().flatten();
        let (samples, masks) = (all().count(), all().map(|s| s.0.learn.len()).sum::<usize>());
        let weight = |(s, p): &(Noisy, f64)| match how {
            Weighting::Bound => 1.0 / (p * (s.clean.len() - s.start).max(1) as f64 * samples as f64),
            Weighting::Inverse => 1.0 / (p * masks as f64),
            Weighting::Uniform => 1.0 / masks as f64,
        };
        let of = |b: &Vec<(Noisy, f64)>| b.iter().flat_map(|s| vec![weight(s) as f32; s.0.learn.len()]).collect();
        batches.iter().map(of).collect()
    }

    /// The sum of all weights of a step: what the loss is of a model whose cross-entropy is 1 everywhere. Its mean over steps is 1 for a bound.
    ///
    /// # Errors
    /// A batch whose answers have gaps.
    pub fn mass(&self, batches: &[Batch], step: u64) -> Result<f64> {
        let noisy = self.corrupt(batches, NOISE + step)?;
        Ok(self.weights(&noisy, self.settings.weighting).iter().flatten().map(|w| f64::from(*w)).sum())
    }

    /// The weighted loss of noisy sequences and, where `grad`, its gradient.
    fn run<B: Train>(
        &self,
        trainer: &mut Trainer<B>,
        model: Diffusion,
        noisy: &[Vec<(Noisy, f64)>],
        weights: &[Vec<f32>],
        see: (f64, Key),
        grad: bool,
    ) -> Result<Report> {
        let mut report = Report::default();
        for (batch, weights) in noisy.iter().zip(weights).filter(|(_, w)| !w.is_empty()) {
            let sequences: Vec<Noisy> = batch.iter().map(|s| s.0.clone()).collect();
            let (pass, labels) = layout(trainer.model().config(), model, &sequences, see)?;
            trainer.forward(&pass)?;
            let term = Term { target: &|r| Target::Hard(&labels[r]), weights };
            let losses = trainer.backward(&pass, &[term], grad)?;
            report.loss += losses[0].iter().zip(weights).map(|(l, w)| l * f64::from(*w)).sum::<f64>();
            report.tokens += pass.rows();
            report.labels += labels.len();
        }
        Ok(report)
    }
}

impl<B: Train> Objective<B> for Masked {
    fn step(&mut self, trainer: &mut Trainer<B>, batches: &[Batch], total: u64) -> Result<Report> {
        let step = trainer.steps();
        let noisy = self.corrupt(batches, NOISE + step)?;
        let weights = self.weights(&noisy, self.settings.weighting);
        let ramp = self.settings.anneal * total as f64;
        let see = if ramp > 0.0 { ((step + 1) as f64 / ramp).min(1.0) } else { 1.0 };
        let grow = &self.settings.grow;
        let phase = (step as usize * grow.len() / (total as usize).max(1)).min(grow.len().saturating_sub(1));
        let model = Diffusion { block: grow.get(phase).copied().or(self.model.block), ..self.model };
        let key = Key { seed: self.seed, stream: SEE + step, counter: 0 };
        let report = self.run(trainer, model, &noisy, &weights, (see, key), true)?;
        trainer.conclude(report)
    }

    /// The bound on the negative log-likelihood of an answer token, nats, at noise that is the same each time.
    fn evaluate(&mut self, trainer: &mut Trainer<B>, batches: &[Batch]) -> Result<f64> {
        let noisy = self.corrupt(batches, MEASURE)?;
        let weights = self.weights(&noisy, Weighting::Bound);
        let key = Key { seed: self.seed, stream: SEE, counter: 0 };
        Ok(self.run(trainer, self.model, &noisy, &weights, (1.0, key), false)?.loss)
    }
}
