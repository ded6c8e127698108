//! [`Distill`]: a student learns to say several tokens at once, in its teacher's order.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::layout::{Noisy, layout, sequences};
use super::masked::{Masked, MaskedSettings, NOISE};
use super::trajectory::Trajectory;
use crate::backend::{Target, Train};
use crate::error::{Result, ensure};
use crate::model::Term;
use crate::model::config::Diffusion;
use crate::rng::Key;
use crate::train::run::Objective;
use crate::train::{Batch, Report, Trainer};

/// Settings of [`Distill`]; the default is what d3LLM does with LLaDA.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillSettings {
    /// Mask ratio: each step draws one between a bound that rises linearly from the first to the second over the run, and the second.
    pub ratio: [f64; 2],
    /// Window of an answer that is masked in part: widths over equal shares of the run, interpolated; all behind it is masked.
    pub window: Vec<usize>,
    /// Weight of the entropy of predictions that are right (certainty forcing: dParallel 2025, arXiv:2509.26488).
    pub entropy: f64,
    /// Their temperature.
    pub tau: f32,
    /// A second copy with the complementary masks.
    pub complement: bool,
    /// The entropy counts in the second copy too.
    pub entropy_both: bool,
    /// Masks at random instead of in the teacher's order: the control.
    pub random: bool,
}

impl Default for DistillSettings {
    fn default() -> Self {
        Self {
            ratio: [0.0, 0.8],
            window: vec![16, 16, 24, 24, 32, 32],
            entropy: 2.0,
            tau: 0.5,
            complement: true,
            entropy_both: false,
            random: false,
        }
    }
}

impl DistillSettings {
    /// Mask ratio of step `step` of `total`, by a uniform number.
    pub fn ratio_at(&self, step: u64, total: u64, uniform: f64) -> f64 {
        let [low, high] = self.ratio;
        let floor = low + step as f64 / total.max(1) as f64 * (high - low);
        floor + uniform * (high - floor)
    }

    /// Window of step `step` of `total`.
    pub fn window_at(&self, step: u64, total: u64) -> usize {
        let at = step as f64 / total.max(1) as f64 * self.window.len() as f64;
        let (e, part) = ((at as usize).min(self.window.len() - 1), at.fract());
        let (a, b) = (self.window[e], self.window[(e + 1).min(self.window.len() - 1)]);
        let k = a as f64 + if at as usize > e { 0.0 } else { part * (b as f64 - a as f64) };
        (k as usize).max(1)
    }
}

/// Distillation of pseudo-trajectories (d3LLM 2026, arXiv:2601.07568): the answer of the data, masked as the teacher's was when it had
/// decoded all before a window and a share of the window.
pub struct Distill<'a> {
    model: Diffusion,
    settings: DistillSettings,
    /// Of each example of the data.
    order: &'a [Option<Trajectory>],
    eos: Vec<u32>,
    seed: u64,
    measure: Masked,
}

/// One example's window, and the masks in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Positions from..to of the sequence are masked in part, all behind are masked.
    pub from: usize,
    /// One behind.
    pub to: usize,
    /// Of from..to, what is masked in the first copy; the other copy masks the rest.
    pub masked: Vec<bool>,
}

impl<'a> Distill<'a> {
    /// `order` has the trajectory of each example of the data, where there is one; others are masked at random.
    ///
    /// # Errors
    /// `Usage` for impossible settings, by name.
    pub fn new(
        model: Diffusion,
        settings: DistillSettings,
        order: &'a [Option<Trajectory>],
        eos: &[u32],
        seed: u64,
    ) -> Result<Self> {
        let [low, high] = settings.ratio;
        ensure!(0.0 <= low && low <= high && high <= 1.0, Usage, "--ratio {low},{high}: expected two shares, rising");
        ensure!(!settings.window.is_empty() && !settings.window.contains(&0), Usage, "--window {:?}", settings.window);
        ensure!(
            settings.entropy >= 0.0 && settings.tau > 0.0,
            Usage,
            "--entropy {}, --tau {}",
            settings.entropy,
            settings.tau
        );
        let measure = Masked::new(model, MaskedSettings::default(), seed)?;
        Ok(Self { model, settings, order, eos: eos.to_vec(), seed, measure })
    }

    /// The window of a sequence whose answer, with what pads it, is at `span`; `answer` tokens of it are no padding. `stage` is the window's width and
    /// the mask ratio; `key` draws where it lies.
    pub fn window(
        &self,
        id: Option<usize>,
        span: Range<usize>,
        answer: usize,
        stage: (usize, f64),
        key: Key,
    ) -> Window {
        let (Range { start, end: len }, (k, t)) = (span, stage);
        // The last window swallows the padding; where there is none it would be empty.
        let most = (answer / k).min((len - start - 1) / k);
        let n = (key.uniform() * (most + 1) as f64) as usize;
        let from = start + n * k;
        let to = if n >= most { len } else { (from + k).min(len) };
        // As many tokens as the teacher has when all before the window and its share of the window are decoded.
        let decoded = from - start + ((1.0 - t) * (to - from) as f64) as usize;
        let own = id.and_then(|i| self.order.get(i)).and_then(Option::as_ref).filter(|_| !self.settings.random);
        let masked = (from..to).map(|i| match own {
            Some(order) => order.is_masked(i - start, decoded),
            None => key.at(1 + i as u64).uniform() < (1.0 - 1e-3) * t + 1e-3,
        });
        Window { from, to, masked: masked.collect() }
    }

    /// The copies of one sequence.
    fn copies(&self, clean: &[u32], start: usize, w: &Window) -> Vec<Noisy> {
        let copy = |flip: bool| {
            let mut noisy = clean.to_vec();
            noisy[w.to..].fill(self.model.mask);
            let learn: Vec<usize> = (w.from..w.to).filter(|&i| w.masked[i - w.from] != flip).collect();
            learn.iter().for_each(|&i| noisy[i] = self.model.mask);
            Noisy { clean: clean.to_vec(), start, noisy, learn }
        };
        if self.settings.complement { vec![copy(false), copy(true)] } else { vec![copy(false)] }
    }

    /// What step `step` of `total` learns of each batch: of every sequence one copy, or two.
    ///
    /// # Errors
    /// A batch whose answers have gaps.
    pub fn copies_of_step(&self, batches: &[Batch], step: u64, total: u64) -> Result<Vec<Vec<Noisy>>> {
        let key = Key { seed: self.seed, stream: NOISE + step, counter: 0 };
        let (t, k) = (self.settings.ratio_at(step, total, key.uniform()), self.settings.window_at(step, total));
        let (mut all, mut number) = (Vec::with_capacity(batches.len()), 0u64);
        for batch in batches {
            let mut copies = Vec::new();
            for (i, s) in sequences(batch).enumerate() {
                let (clean, start) = s?;
                number += 1;
                // The padding is no part of the answer but its first end token is.
                let answer = clean[start..].iter().position(|t| self.eos.contains(t));
                let answer = answer.map_or(clean.len() - start, |e| e + 1);
                if clean.len() > start {
                    let id = batch.ids.get(i).copied();
                    let w = self.window(id, start..clean.len(), answer, (k, t), key.at(number << 32));
                    copies.extend(self.copies(clean, start, &w));
                }
            }
            all.push(copies);
        }
        Ok(all)
    }

    /// A pass's loss over `share` passes of its step, and its gradient.
    fn pass<B: Train>(&self, trainer: &mut Trainer<B>, copies: &[Noisy], share: f64) -> Result<Report> {
        let key = Key { seed: self.seed, stream: 0, counter: 0 };
        let (pass, labels) = layout(trainer.model().config(), self.model, copies, (1.0, key))?;
        trainer.forward(&pass)?;
        let likeliest = if self.settings.entropy > 0.0 { trainer.likeliest(&pass)? } else { Vec::new() };
        let step = if self.settings.complement { 2 } else { 1 };
        // Of each row its copy, 0 or 1.
        let copy: Vec<usize> = copies.iter().enumerate().flat_map(|(i, c)| vec![i % step; c.learn.len()]).collect();
        let right: Vec<bool> = likeliest.iter().zip(&labels).map(|(a, b)| a == b).collect();
        let counts =
            |of: &dyn Fn(usize) -> bool| [0, 1].map(|c| (0..copy.len()).filter(|&i| copy[i] == c && of(i)).count());
        let (all, sure) = (counts(&|_| true), counts(&|i| right.get(i).is_some_and(|r| *r)));
        let part = 0.25 / share;
        let hard: Vec<f32> = copy.iter().map(|&c| (part / all[c] as f64) as f32).collect();
        let counted = |i: usize| right.get(i) == Some(&true) && (copy[i] == 0 || self.settings.entropy_both);
        let soft: Vec<f32> = (0..copy.len())
            .map(|i| if counted(i) { (part * self.settings.entropy / sure[copy[i]] as f64) as f32 } else { 0.0 })
            .collect();
        let tau = self.settings.tau;
        let terms = [
            Term { target: &|r| Target::Hard(&labels[r]), weights: &hard },
            Term { target: &|r| Target::Entropy { tau, labels: &labels[r] }, weights: &soft },
        ];
        let used = if self.settings.entropy > 0.0 { 2 } else { 1 };
        let losses = trainer.backward(&pass, &terms[..used], true)?;
        let sum = |l: &[f64], w: &[f32]| l.iter().zip(w).map(|(l, w)| l * f64::from(*w)).sum::<f64>();
        let loss = losses.iter().zip([&hard, &soft]).map(|(l, w)| sum(l, w)).sum();
        Ok(Report { loss, tokens: pass.rows(), labels: labels.len(), ..Report::default() })
    }
}

impl<B: Train> Objective<B> for Distill<'_> {
    fn step(&mut self, trainer: &mut Trainer<B>, batches: &[Batch], total: u64) -> Result<Report> {
        let mut report = Report::default();
        for copies in self.copies_of_step(batches, trainer.steps(), total)? {
            if copies.iter().any(|c| !c.learn.is_empty()) {
                let one = self.pass(trainer, &copies, batches.len() as f64)?;
                report.loss += one.loss;
                report.tokens += one.tokens;
                report.labels += one.labels;
            }
        }
        trainer.conclude(report)
    }

    /// As [`Masked`] measures.
    fn evaluate(&mut self, trainer: &mut Trainer<B>, batches: &[Batch]) -> Result<f64> {
        Objective::<B>::evaluate(&mut self.measure, trainer, batches)
    }
}
