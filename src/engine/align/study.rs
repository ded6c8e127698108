//! What a reward learns from comparisons that are there already: in passing, beside the baselines, and by choosing what to ask.

use std::collections::HashSet;
use std::time::Instant;

use serde::Serialize;

use super::items::{Comparison, Item};
use super::reward::RewardModel;
use crate::error::{Result, ensure};
use crate::rlhf::{
    Choose, Hvp, HvpSettings, Mle, OnePass, Pool, Progress, Rate, Rule, Settings, Sgd, Step, Variant, log_loss, sigmoid,
};
use crate::rng::Rng;

/// Where a learner stands after so many comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mark {
    /// Comparisons learnt.
    pub comparisons: u64,
    /// Share of held-out comparisons that it decides rightly; a tie counts half.
    pub accuracy: f64,
    /// Mean held-out log-loss, nats.
    pub log_loss: f64,
    /// Seconds that learning took so far.
    pub seconds: f64,
    /// Median microseconds of the updates since the mark before.
    pub update_us: f64,
    /// Milliseconds until its weights could be read: those of a refit.
    pub weights_ms: f64,
    /// Mean score, by the judge, of the answer with the highest reward, over held-out prompts; where a judge scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best: Option<f64>,
}

/// A learner's way through the comparisons.
#[derive(Clone, Debug, Serialize)]
pub struct Curve {
    /// Of the learner.
    pub name: String,
    /// In order.
    pub marks: Vec<Mark>,
    /// Bytes of what it keeps, at the end.
    pub bytes: usize,
}

/// What is held out, as a learner of scaled features sees it.
pub struct HeldOut {
    /// Differences of compared answers, the preferred one first.
    pairs: Vec<Vec<f64>>,
    /// Differences in length of the same, in tokens.
    lengths: Vec<f64>,
    /// For each prompt with scores the scaled features of its answers, and the scores.
    scored: Vec<(Vec<Vec<f64>>, Vec<f64>)>,
}

impl HeldOut {
    /// From items that nothing is learnt of; `scores` of all answers of some of them, by a judge.
    pub fn new(reward: &RewardModel, items: &[Item], pairs: &[Comparison], scores: &[(usize, Vec<f64>)]) -> Self {
        let answer = |c: &Comparison, k: usize| &items[c.item].answers[c.answers[k]];
        let z = |c: &Comparison| reward.scale().difference(&answer(c, 0).feature, &answer(c, 1).feature);
        let length = |c: &Comparison| answer(c, 0).tokens.ids.len() as f64 - answer(c, 1).tokens.ids.len() as f64;
        let scored = scores.iter().map(|(i, s)| {
            let rows = items[*i].answers.iter().map(|a| reward.scaled(&a.feature)).collect();
            (rows, s.clone())
        });
        Self {
            pairs: pairs.iter().map(z).collect(),
            lengths: pairs.iter().map(length).collect(),
            scored: scored.collect(),
        }
    }

    /// Accuracy, log-loss and mean score of the best by these weights.
    pub fn measure(&self, theta: &[f64]) -> (f64, f64, Option<f64>) {
        let dot = |z: &Vec<f64>| z.iter().zip(theta).map(|(a, b)| a * b).sum::<f64>();
        // Of nothing there is no share.
        let n = if self.pairs.is_empty() { f64::NAN } else { self.pairs.len() as f64 };
        let (mut right, mut loss) = (0.0, 0.0);
        for m in self.pairs.iter().map(dot) {
            right += if m > 0.0 {
                1.0
            } else if m == 0.0 {
                0.5
            } else {
                0.0
            };
            loss += log_loss(m, 1.0);
        }
        let best = |(rows, scores): &(Vec<Vec<f64>>, Vec<f64>)| {
            let values = rows.iter().map(dot);
            let best = values.enumerate().fold((0, f64::NEG_INFINITY), |b, (i, v)| if v > b.1 { (i, v) } else { b });
            scores[best.0]
        };
        let k = self.scored.len();
        let best = (k > 0).then(|| self.scored.iter().map(best).sum::<f64>() / k as f64);
        (right / n, loss / n, best)
    }

    /// Mean score of an answer at random, and of the best by the judge itself.
    pub fn bounds(&self) -> Option<[f64; 2]> {
        let n = self.scored.len() as f64;
        let mean = |s: &Vec<f64>| s.iter().sum::<f64>() / s.len().max(1) as f64;
        let most = |s: &Vec<f64>| s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum = |f: &dyn Fn(&Vec<f64>) -> f64| self.scored.iter().map(|(_, s)| f(s)).sum::<f64>() / n;
        (n > 0.0).then(|| [sum(&mean), sum(&most)])
    }

    /// How well the probabilities hold: predictions of the held-out comparisons, every other one seen from its other side.
    pub fn calibration(&self, theta: &[f64]) -> Result<Progress> {
        let mut progress = Progress::default();
        for (i, z) in self.pairs.iter().enumerate() {
            let m: f64 = z.iter().zip(theta).map(|(a, b)| a * b).sum();
            let (m, y) = if i % 2 == 0 { (m, 1.0) } else { (-m, 0.0) };
            progress.push(sigmoid(m), y)?;
        }
        Ok(progress)
    }

    /// Correlation of the differences in reward with those in length, over held-out comparisons: whether it is length that is rewarded.
    pub fn length_correlation(&self, theta: &[f64]) -> f64 {
        let margins: Vec<f64> =
            self.pairs.iter().map(|z| z.iter().zip(theta).map(|(a, b)| a * b).sum::<f64>()).collect();
        // Both are odd in the order of the two answers, so their means over both orders are zero.
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let (l, m) = (&self.lengths, &margins);
        dot(l, m) / (dot(l, l) * dot(m, m)).sqrt().max(f64::MIN_POSITIVE)
    }
}

/// The numbers of comparisons at which learners are looked at: 10, 20, 50, 100, ... and the last.
pub fn marks(n: u64) -> Vec<u64> {
    let mut marks: Vec<u64> = (1..9).flat_map(|e| [1, 2, 5].map(|m| m * 10u64.pow(e))).take_while(|&m| m < n).collect();
    marks.push(n);
    marks
}

/// Splits comparisons by prompts, so that no prompt is on both sides: those learnt and those held out.
pub fn split(items: usize, pairs: &[Comparison], share: f64, seed: u64) -> (Vec<Comparison>, Vec<Comparison>) {
    let mut order: Vec<usize> = (0..items).collect();
    Rng::stream(seed, SPLIT).shuffle(&mut order);
    let n = (share * items as f64).round() as usize;
    let held: HashSet<usize> = order.into_iter().take(n).collect();
    pairs.iter().partition(|c| !held.contains(&c.item))
}

const SPLIT: u64 = u64::MAX - 2;
const ORDER: u64 = u64::MAX - 3;

/// The order in which comparisons come.
pub fn order(n: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    Rng::stream(seed, ORDER).shuffle(&mut order);
    order
}

/// Names of [`baselines`].
pub const BASELINES: [&str; 7] = ["mle", "explicit", "implicit", "sgd", "adam", "hvp", "released"];

/// Something that learns comparisons one at a time.
trait Learner {
    /// Learns; what costs time.
    fn push(&mut self, z: &[f64], y: f64) -> Result<()>;
    /// The weights after what was pushed, with whatever work that takes.
    fn weights(&mut self) -> Result<Vec<f64>>;
    fn bytes(&self) -> usize;
}

impl Learner for OnePass {
    fn push(&mut self, z: &[f64], y: f64) -> Result<()> {
        self.update(z, y).map(|_: Step| ())
    }
    fn weights(&mut self) -> Result<Vec<f64>> {
        Ok(self.theta().to_vec())
    }
    fn bytes(&self) -> usize {
        OnePass::bytes(self)
    }
}

impl Learner for Mle {
    fn push(&mut self, z: &[f64], y: f64) -> Result<()> {
        Mle::push(self, z, y)
    }
    fn weights(&mut self) -> Result<Vec<f64>> {
        self.fit(true)?;
        Ok(self.theta().to_vec())
    }
    fn bytes(&self) -> usize {
        Mle::bytes(self)
    }
}

impl Learner for Sgd {
    fn push(&mut self, z: &[f64], y: f64) -> Result<()> {
        Sgd::push(self, z, y).map(|_| ())
    }
    fn weights(&mut self) -> Result<Vec<f64>> {
        Ok(self.theta().to_vec())
    }
    fn bytes(&self) -> usize {
        8 * self.theta().len()
    }
}

/// Batches of 32, as published.
struct Batches {
    hvp: Hvp,
    z: Vec<f64>,
    y: Vec<f64>,
}

impl Learner for Batches {
    fn push(&mut self, z: &[f64], y: f64) -> Result<()> {
        self.z.extend_from_slice(z);
        self.y.push(y);
        if self.y.len() == 32 {
            self.hvp.update(&self.z, &self.y)?;
            (self.z, self.y) = Default::default();
        }
        Ok(())
    }
    fn weights(&mut self) -> Result<Vec<f64>> {
        Ok(self.hvp.theta().to_vec())
    }
    fn bytes(&self) -> usize {
        8 * (self.hvp.theta().len() + self.z.capacity())
    }
}

/// The baselines of the paper and of its code, on the very comparisons, in their order, that a reward has learnt; and where the reward
/// itself stood at the same marks: `of` has its curve.
///
/// # Errors
/// Those of the learners.
pub fn baselines(
    reward: &RewardModel,
    zs: &[Vec<f64>],
    held: &HeldOut,
    names: &[&str],
    on: &mut dyn FnMut(&str, u64),
) -> Result<Vec<Curve>> {
    let (d, settings) = (reward.scale().width(), reward.options().learner.clone());
    let mut curves = Vec::new();
    for &name in names {
        let mut learner: Box<dyn Learner> = match name {
            "explicit" | "implicit" => {
                let rule = if name == "explicit" { Rule::Explicit } else { Rule::Implicit };
                Box::new(reward.untaught(Settings { rule, ..settings.clone() })?)
            }
            "mle" => Box::new(Mle::new(d, settings.lambda, settings.bound)?),
            "sgd" => Box::new(Sgd::new(d, Rate::Constant(1e-3), 32)?),
            "adam" => Box::new(Sgd::adam(d, 1e-3, 32)?),
            "hvp" | "released" => {
                let variant = if name == "hvp" { Variant::Paper } else { Variant::Released };
                let hvp = Hvp::new(d, HvpSettings { variant, ..HvpSettings::default() })?;
                Box::new(Batches { hvp, z: Vec::new(), y: Vec::new() })
            }
            other => crate::error::bail!(Usage, "no baseline is called {other}"),
        };
        curves.push(curve(name, &mut *learner, zs, held, on)?);
    }
    Ok(curves)
}

fn curve(
    name: &str,
    learner: &mut dyn Learner,
    zs: &[Vec<f64>],
    held: &HeldOut,
    on: &mut dyn FnMut(&str, u64),
) -> Result<Curve> {
    let (mut out, mut seconds, mut since) = (Vec::new(), 0.0, Vec::new());
    let mut wanted = marks(zs.len() as u64).into_iter().peekable();
    for (t, z) in (1u64..).zip(zs) {
        let start = Instant::now();
        learner.push(z, 1.0)?;
        let mut took = start.elapsed().as_secs_f64();
        if wanted.next_if_eq(&t).is_some() {
            let start = Instant::now();
            since.push(took);
            let theta = learner.weights()?;
            let weights = start.elapsed().as_secs_f64();
            took += weights;
            seconds += took;
            let mark = mark(t, &theta, held, seconds, &mut since);
            out.push(Mark { weights_ms: 1e3 * weights, ..mark });
            on(name, t);
        } else {
            since.push(took);
            seconds += took;
        }
    }
    Ok(Curve { name: name.into(), marks: out, bytes: learner.bytes() })
}

/// What is measured after `t` comparisons; empties the times since the mark before.
pub fn mark(t: u64, theta: &[f64], held: &HeldOut, seconds: f64, since: &mut Vec<f64>) -> Mark {
    let (accuracy, log_loss, best) = held.measure(theta);
    since.sort_by(f64::total_cmp);
    let update_us = since.get(since.len() / 2).map_or(f64::NAN, |s| 1e6 * s);
    since.clear();
    Mark { comparisons: t, accuracy, log_loss, seconds, update_us, weights_ms: 0.0, best }
}

/// Which comparison of a pool is asked next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ask {
    /// By a rule over all pairs of the pool.
    Pool(Choose),
    /// The answers of the highest and of the lowest reward to the next prompt: the published rejection sampling (section 6.2 of the
    /// paper).
    BestWorst,
}

impl Ask {
    /// Names, for flags.
    pub const NAMES: [&str; 6] = ["uncertainty", "fisher", "margin", "norm", "random", "best-worst"];

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "uncertainty" => Ask::Pool(Choose::Uncertainty),
            "fisher" => Ask::Pool(Choose::Fisher),
            "margin" => Ask::Pool(Choose::Margin),
            "norm" => Ask::Pool(Choose::Norm),
            "random" => Ask::Pool(Choose::Random),
            "best-worst" => Ask::BestWorst,
            _ => return None,
        })
    }
}

/// How an active run went.
#[derive(Clone, Debug, Serialize)]
pub struct Active {
    /// Of its last iterate.
    pub last: Curve,
    /// Of the average of all iterates.
    pub average: Curve,
    /// Comparisons in the order in which they were asked, by their numbers in the pool.
    pub asked: Vec<usize>,
    /// The learner's weights at the end.
    #[serde(skip)]
    pub theta: Vec<f64>,
}

/// A pool of comparisons, and how they are asked.
#[derive(Clone, Copy)]
pub struct Questions<'a> {
    /// Scaled differences.
    pub zs: &'a [Vec<f64>],
    /// Those of each prompt, by their numbers.
    pub groups: &'a [Vec<usize>],
    /// Which comes next.
    pub ask: Ask,
    /// At most so many.
    pub budget: usize,
    /// Of what is left to chance.
    pub seed: u64,
}

/// Asks comparisons of a pool, each chosen by what was learnt before. `label` says 1 where the first answer was preferred.
///
/// # Errors
/// An empty pool; those of the learner.
pub fn active(
    mut learner: OnePass,
    questions: Questions<'_>,
    label: &mut dyn FnMut(usize) -> Result<f64>,
    held: &HeldOut,
    on: &mut dyn FnMut(u64),
) -> Result<Active> {
    let Questions { zs, groups, ask, budget, seed } = questions;
    let n = zs.len();
    ensure!(n > 0, Usage, "a pool of no comparisons");
    let mut rng = Rng::stream(seed, SPLIT);
    let budget = budget.min(n);
    let mut wanted = marks(budget as u64).into_iter().peekable();
    let (mut last, mut average, mut asked, mut seconds, mut since) =
        (Vec::new(), Vec::new(), Vec::new(), 0.0, Vec::new());
    let mut pool = match ask {
        Ask::Pool(rule) => Some((Pool::new(zs.concat(), &learner)?, rule)),
        Ask::BestWorst => None,
    };
    let mut order = order(groups.len(), seed).into_iter().cycle();
    let mut used = vec![false; n];
    while asked.len() < budget {
        let start = Instant::now();
        let k = match &mut pool {
            Some((pool, rule)) => pool.next(&learner, *rule, &mut rng),
            None => {
                let group = order.next().map_or(&[][..], |g| &groups[g]);
                // Among the prompt's pairs that of the largest predicted difference: its best and its worst answer.
                let free = group.iter().copied().filter(|&k| !used[k]);
                free.max_by(|&a, &b| learner.reward(&zs[a]).abs().total_cmp(&learner.reward(&zs[b]).abs()))
            }
        };
        let Some(k) = k else {
            if pool.is_some() || used.iter().all(|u| *u) {
                break;
            }
            continue;
        };
        used[k] = true;
        let choosing = start.elapsed().as_secs_f64();
        let y = label(k)?;
        let start = Instant::now();
        learner.update(&zs[k], y)?;
        if let Some((pool, _)) = &mut pool {
            pool.learned(k, &learner)?;
        }
        since.push(choosing + start.elapsed().as_secs_f64());
        seconds += since.last().copied().unwrap_or(0.0);
        asked.push(k);
        let t = asked.len() as u64;
        if wanted.next_if_eq(&t).is_some() {
            average.push(mark(t, &learner.average(), held, seconds, &mut since.clone()));
            last.push(mark(t, learner.theta(), held, seconds, &mut since));
        }
        on(t);
    }
    let (bytes, theta) = (learner.bytes(), learner.theta().to_vec());
    let [last, average] =
        [("last iterate", last), ("average", average)].map(|(name, marks)| Curve { name: name.into(), marks, bytes });
    Ok(Active { last, average, asked, theta })
}
