//! [`BestOf`]: the best of several answers, by a learnt reward.

use super::items::{Answering, Features, Item};
use super::reward::RewardModel;
use crate::error::{Result, ensure};
use crate::rlhf::pessimistic;

/// How many answers are written before one is chosen, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BestOf {
    /// At most so many.
    pub most: usize,
    /// Go on while one more answer is expected to raise the best reward by more than this (in log-odds of being preferred); 0: always
    /// write all.
    pub gain: f64,
    /// Standard deviations by which a reward's own uncertainty counts against an answer (lower confidence
    /// bounds of features centred on the mean answer); 0: the highest reward.
    pub pessimism: f64,
}

impl Default for BestOf {
    fn default() -> Self {
        Self { most: 8, gain: 0.0, pessimism: 0.0 }
    }
}

/// What was chosen.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// Which of the item's answers.
    pub answer: usize,
    /// Rewards of all, or their lower bounds.
    pub scores: Vec<f64>,
    /// At most so many nats of KL divergence from plain sampling: ln n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879).
    pub kl: f64,
}

impl BestOf {
    /// Fewest answers from which a spread can be told.
    const LEAST: usize = 4;

    /// Answers `item` until another answer is not worth it, and chooses. With one answer it is plain sampling; with more, by the same
    /// seed, the first ones are the same.
    ///
    /// # Errors
    /// Impossible settings; as [`Answering::run`].
    pub fn run(
        &self,
        reward: &RewardModel,
        answering: &Answering,
        features: &mut Features,
        item: &mut Item,
        number: u64,
    ) -> Result<Chosen> {
        let Self { most, gain, pessimism } = *self;
        ensure!(most > 0, Usage, "--best-of 0 is impossible: expected 1 or more");
        ensure!(
            gain >= 0.0 && pessimism >= 0.0,
            Usage,
            "--gain {gain} and --pessimism {pessimism}: expected 0 or more"
        );
        item.answers.clear();
        let engine = reward.engine();
        while item.answers.len() < most {
            let have = item.answers.len();
            let new = if gain == 0.0 { most } else { Self::LEAST }.min(most - have);
            answering.more(engine, item, number, new, features)?;
            if gain > 0.0 && expected_gain(&reward.rewards(&item.features())) < gain {
                break;
            }
        }
        let (answer, scores) = pessimistic(reward.learner(), &reward.rows(&item.features()), pessimism, true)?;
        // Where it stops depends on the rewards, so that only the most there could have been bounds what was chosen.
        let n = most as f64;
        Ok(Chosen { answer, scores, kl: n.ln() - (n - 1.0) / n })
    }
}

/// By how much one more draw is expected to exceed the largest of these, were they draws of a normal law: s (f(u) - u (1 - F(u))) with
/// u = (max - mean) / s, the index of search with recall (Weitzman 1979).
pub fn expected_gain(rewards: &[f64]) -> f64 {
    let n = rewards.len() as f64;
    if rewards.len() < 2 {
        return f64::INFINITY;
    }
    let mean = rewards.iter().sum::<f64>() / n;
    let s = (rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    if s == 0.0 {
        return 0.0;
    }
    let u = (rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max) - mean) / s;
    let density = (-0.5 * u * u).exp() / std::f64::consts::TAU.sqrt();
    s * (density - u * upper_tail(u)).max(0.0)
}

/// 1 - F(u) of the standard normal law, to 1e-7 (Abramowitz & Stegun 26.2.17).
fn upper_tail(u: f64) -> f64 {
    if u < 0.0 {
        return 1.0 - upper_tail(-u);
    }
    let t = 1.0 / (1.0 + 0.231_641_9 * u);
    let poly = [0.319_381_530, -0.356_563_782, 1.781_477_937, -1.821_255_978, 1.330_274_429];
    let sum = poly.iter().rev().fold(0.0, |sum, c| (sum + c) * t);
    sum * (-0.5 * u * u).exp() / std::f64::consts::TAU.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_gain_is_that_of_a_normal_law() {
        for (u, tail) in [(0.0, 0.5), (1.0, 0.158_655_254), (-1.0, 0.841_344_746), (2.5, 0.006_209_665)] {
            assert!((upper_tail(u) - tail).abs() < 1e-7);
        }
        let rewards = [-1.0, 0.2, 0.7, 0.1, 1.3];
        let n = rewards.len() as f64;
        let mean = rewards.iter().sum::<f64>() / n;
        let s = (rewards.iter().map(|r| (r - mean) * (r - mean)).sum::<f64>() / (n - 1.0)).sqrt();
        let mut rng = Rng::new(1);
        let draws = 400_000;
        let gains = (0..draws).map(|_| (mean + s * f64::from(rng.normal()) - 1.3).max(0.0)).sum::<f64>();
        assert!((gains / f64::from(draws) - expected_gain(&rewards)).abs() < 2e-3);
        assert_eq!((expected_gain(&[1.0]), expected_gain(&[2.0; 3])), (f64::INFINITY, 0.0));
    }
}
