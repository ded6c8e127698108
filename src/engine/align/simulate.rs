//! Deployment over answers that are there already, judged by a rule: what a rule of choosing would have cost.

use serde::Serialize;

use super::study::order;
use crate::error::Result;
use crate::rlhf::{OnePass, Second, deploy};
use crate::rng::Rng;

/// How a rule of choosing did.
#[derive(Clone, Debug, Serialize)]
pub struct Deployed {
    /// Of the rule.
    pub name: String,
    /// Regret of each round: the best answer's score less the mean of the shown ones'.
    #[serde(skip)]
    pub regrets: Vec<f64>,
    /// Score of the first answer of each round.
    #[serde(skip)]
    pub firsts: Vec<f64>,
    /// Whether a comparison was asked.
    #[serde(skip)]
    pub asked: Vec<bool>,
}

impl Deployed {
    /// Mean regret, mean score of the first answer and share of rounds in which something was asked, in a part of the rounds.
    pub fn part(&self, rounds: std::ops::Range<usize>) -> [f64; 3] {
        let n = rounds.len().max(1) as f64;
        let mean = |v: &[f64]| v[rounds.clone()].iter().sum::<f64>() / n;
        let asked = self.asked[rounds.clone()].iter().filter(|a| **a).count() as f64 / n;
        [mean(&self.regrets), mean(&self.firsts), asked]
    }

    /// Cumulative regret by rounds.
    pub fn curve(&self) -> Vec<(f64, f64)> {
        let mut sum = 0.0;
        let add = |(t, r): (usize, &f64)| {
            sum += r;
            ((t + 1) as f64, sum)
        };
        self.regrets.iter().enumerate().map(add).collect()
    }
}

/// A prompt's answers: scaled features one after another, and scores by the judge.
pub struct Scored {
    /// `[answers, width]`.
    pub rows: Vec<f64>,
    /// One for each answer.
    pub scores: Vec<f64>,
}

/// Rounds over `prompts`, in an order of the seed, round after round: choose, ask `prefer` (round and the two scores: 1, 0 or 1/2), learn.
///
/// # Errors
/// Those of the learner.
pub fn simulate(
    name: &str,
    mut learner: OnePass,
    prompts: &[Scored],
    (second, beta): (Second, f64),
    rounds: usize,
    seed: u64,
    prefer: &dyn Fn(u64, [f64; 2]) -> f64,
) -> Result<Deployed> {
    let (d, order, mut rng) = (learner.width(), order(prompts.len(), seed), Rng::stream(seed, 7));
    let mut out = Deployed { name: name.into(), regrets: Vec::new(), firsts: Vec::new(), asked: Vec::new() };
    for t in 0..rounds {
        let Scored { rows, scores } = &prompts[order[t % prompts.len()]];
        let shown = deploy(&learner, rows, beta, second, &mut rng)?;
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (first, other) = (scores[shown.first], scores[shown.second.unwrap_or(shown.first)]);
        out.regrets.push(best - (first + other) / 2.0);
        out.firsts.push(first);
        out.asked.push(shown.second.is_some());
        if let Some(second) = shown.second {
            let (a, b) = (&rows[shown.first * d..][..d], &rows[second * d..][..d]);
            let z: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
            learner.update(&z, prefer(t as u64, [first, other]))?;
        }
    }
    Ok(out)
}
