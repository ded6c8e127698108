//! From logits to a token: greedy, or temperature with top-k, top-p and min-p.

use crate::backend::cpu::{Tier, sampling::sample};
use crate::backend::{Draw, NO_TOKEN, Penalty};
use crate::error::{Result, bail, ensure};
use crate::rng::Key;

/// How the next token is drawn. Plain data.
///
/// The order is that of the field's serving engines: repetition penalty, temperature, top-k, top-p, min-p. Ties are broken
/// towards the lower id everywhere, so that the same logits always give the same candidates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// Logits are divided by it; 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of the most likely whose mass reaches p; 1 keeps all.
    pub top_p: f32,
    /// Keep those at least this fraction as likely as the best; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens among the last [`Sampler::PENALTY_WINDOW`] are divided (if positive) or multiplied by it
    /// (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing.
    pub repeat_penalty: f32,
}

impl Default for Sampler {
    fn default() -> Self {
        Self::greedy()
    }
}

impl Sampler {
    /// How far back the repetition penalty looks.
    pub const PENALTY_WINDOW: usize = 64;

    /// The most likely token, always.
    pub const fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repeat_penalty: 1.0 }
    }

    /// Refuses parameters that mean nothing, by the name of their flag.
    pub fn validate(self) -> Result<Self> {
        let ok = |name: &str, v: f32, good: bool, range: &str| -> Result<()> {
            ensure!(good, Usage, "--{name} {v} is impossible: expected {range}");
            Ok(())
        };
        let t = self.temperature;
        ok("temperature", t, t.is_finite() && t >= 0.0, "0 or more")?;
        ok("top-p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "more than 0, at most 1")?;
        ok("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1")?;
        let r = self.repeat_penalty;
        ok("repeat-penalty", r, r.is_finite() && r > 0.0, "more than 0")?;
        Ok(self)
    }

    /// Whether it always takes the most likely token.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    /// What [`Backend::penalize`](crate::backend::Backend::penalize) takes for logits of `row`: a penalty on each token among those
    /// before it, which come last first. For a node of a tree these are the tokens on its path, up to the root, and then those of the
    /// text.
    pub fn penalties(&self, row: u32, before: impl Iterator<Item = u32>) -> Vec<Penalty> {
        if self.repeat_penalty == 1.0 {
            return Vec::new();
        }
        let mut recent: Vec<u32> = before.take(Self::PENALTY_WINDOW).collect();
        recent.sort_unstable();
        recent.dedup();
        recent.into_iter().map(|token| Penalty { row, token, factor: self.repeat_penalty }).collect()
    }

    /// What the backends take: this sampler, but for its penalty, with the random number of `key`.
    pub fn draw(&self, key: Key) -> Draw {
        let top_k = u32::try_from(self.top_k).unwrap_or(0);
        Draw { temperature: self.temperature, top_k, top_p: self.top_p, min_p: self.min_p, key }
    }

    /// Draws a token on the host. `logits` are changed by the penalty.
    ///
    /// # Errors
    /// `Diverged` if a logit is NaN or none is finite.
    pub fn sample(&self, logits: &mut [f32], history: &[u32], key: Key) -> Result<u32> {
        for p in self.penalties(0, history.iter().rev().copied()) {
            if let Some(x) = logits.get_mut(p.token as usize) {
                *x = p.on(*x);
            }
        }
        let mut token = [NO_TOKEN];
        sample(Tier::detect(), logits, &self.draw(key), &mut token);
        drawn(token[0])
    }
}

/// A token that a backend drew.
///
/// # Errors
/// `Diverged` where there is none: a model that has left the numbers must not look as if it spoke.
pub(super) fn drawn(token: u32) -> Result<u32> {
    if token == NO_TOKEN {
        bail!(Diverged, "the logits are not finite: the weights are damaged, or the computation overflowed");
    }
    Ok(token)
}

/// The place of the largest value, the lowest of equals.
///
/// # Errors
/// `Diverged` on NaN, or where nothing is finite.
pub fn argmax(logits: &[f32]) -> Result<usize> {
    Sampler::greedy().sample(&mut logits.to_vec(), &[], Key::default()).map(|id| id as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(s: Sampler, logits: &[f32], n: usize) -> Vec<usize> {
        let mut count = vec![0; logits.len()];
        for i in 0..n {
            let key = Key { seed: 7, stream: 0, counter: i as u64 };
            count[s.sample(&mut logits.to_vec(), &[], key).unwrap() as usize] += 1;
        }
        count
    }

    #[test]
    fn frequencies_match_the_softmax() {
        let logits = [1.0, 0.0, -1.0, 0.5];
        let s = Sampler { temperature: 0.7, ..Sampler::greedy() };
        let w: Vec<f64> = logits.iter().map(|x| (*x as f64 / 0.7).exp()).collect();
        let (n, total) = (40_000, w.iter().sum::<f64>());
        let chi2: f64 = draw(s, &logits, n)
            .iter()
            .zip(&w)
            .map(|(&o, w)| (o as f64 - w / total * n as f64).powi(2) / (w / total * n as f64))
            .sum();
        assert!(chi2 < 16.3, "chi-square {chi2} with 3 degrees of freedom"); // p = 0.001
    }

    #[test]
    fn penalty_counts_each_token_once() {
        let s = Sampler { repeat_penalty: 2.0, ..Sampler::greedy() };
        let mut l = [4.0, 3.0, -1.0];
        assert_eq!(s.sample(&mut l, &[0, 0, 2], Key::default()).unwrap(), 1);
        assert_eq!(l, [2.0, 3.0, -2.0]);
        // The oldest are out of sight.
        let text = [vec![7], vec![3; Sampler::PENALTY_WINDOW]].concat();
        let of = |n: usize| s.penalties(4, text[..n].iter().rev().copied());
        assert_eq!(of(64).iter().map(|p| (p.row, p.token)).collect::<Vec<_>>(), [(4, 3), (4, 7)]);
        assert_eq!(of(65).len(), 1);
    }

    #[test]
    fn not_finite_is_an_error_and_ties_go_low() {
        for bad in [[f32::NAN, 1.0], [f32::NEG_INFINITY; 2], [1.0, f32::INFINITY]] {
            assert!(argmax(&bad).is_err());
        }
        assert_eq!(argmax(&[1.0, 3.0, 3.0]).unwrap(), 1);
    }
}
