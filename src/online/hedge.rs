//! [`Meta`]: weights over experts that learn from the experts' losses.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// How losses become weights.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Rule {
    /// Exponential weights on cumulative losses (Freund & Schapire 1997): p ∝ exp(-ε L).
    Hedge {
        /// Learning rate ε of the weights; [`tuned_epsilon`] where the rounds are known.
        epsilon: f64,
    },
    /// The same, and after each round p = (1 - λ) p + λ / N (Herbster & Warmuth 1998): an expert that was bad can come back.
    FixedShare {
        /// As of `Hedge`.
        epsilon: f64,
        /// Share λ that is dealt out evenly.
        lambda: f64,
    },
    /// Adapt-ML-Prod (Gaillard, Stoltz & van Erven 2014, arXiv:1402.2044): second order, nothing to tune.
    AdaptMlProd,
    /// p = softmax(-ℓ / temperature) of the last round's losses alone: what OnlineSpec's released scripts do. No regret bound.
    LastLoss {
        /// Temperature of the softmax.
        temperature: f64,
    },
}

/// Weights over N experts and the account of what they cost. Losses are in [0, 1]; what lies outside is clipped, NaN counts as 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Meta {
    rule: Rule,
    /// Logarithms of weights, up to a constant (of ω for Adapt-ML-Prod).
    scores: Vec<f64>,
    /// Sum of each expert's squared regrets.
    squares: Vec<f64>,
    /// Cumulative loss of each expert.
    losses: Vec<f64>,
    /// Cumulative loss of the mixture.
    mixture: f64,
    rounds: u64,
}

impl Meta {
    /// Equal weights for `experts` experts.
    ///
    /// # Errors
    /// `Usage`: no experts, or a constant of the rule that is impossible.
    pub fn new(rule: Rule, experts: usize) -> Result<Self> {
        let zeros = vec![0.0; experts];
        let meta = Self { rule, scores: zeros.clone(), squares: zeros.clone(), losses: zeros, mixture: 0.0, rounds: 0 };
        meta.validate()?;
        Ok(meta)
    }

    /// Refuses a state (read from a file, say) that no sequence of rounds leads to.
    ///
    /// # Errors
    /// `Usage`, naming what is wrong.
    pub fn validate(&self) -> Result<()> {
        let n = self.scores.len();
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let rule = match self.rule {
            Rule::Hedge { epsilon } => epsilon.is_finite() && epsilon >= 0.0,
            Rule::FixedShare { epsilon, lambda } => {
                epsilon.is_finite() && epsilon >= 0.0 && (0.0..=1.0).contains(&lambda)
            }
            Rule::AdaptMlProd => true,
            Rule::LastLoss { temperature } => positive(temperature),
        };
        ensure!(rule, Usage, "meta-weights: {:?} is impossible", self.rule);
        ensure!(n > 0, Usage, "meta-weights: there are no experts");
        let lengths = self.squares.len() == n && self.losses.len() == n;
        let sums = self.squares.iter().chain(&self.losses).chain([&self.mixture]);
        let sane = sums.into_iter().all(|&x| (0.0..=self.rounds as f64 + 1e-6).contains(&x));
        let finite = self.scores.iter().all(|s| s.is_finite());
        ensure!(lengths && sane && finite, Usage, "meta-weights: the state of {n} experts is damaged");
        Ok(())
    }

    /// The rule.
    pub fn rule(&self) -> Rule {
        self.rule
    }

    /// Rounds observed.
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Weights for the round to come, one for each expert: not negative, in sum 1.
    pub fn weights(&self) -> Vec<f64> {
        let log = |i: usize| match self.rule {
            Rule::AdaptMlProd => self.scores[i] + self.rate(i).ln(),
            _ => self.scores[i],
        };
        softmax((0..self.scores.len()).map(log).collect())
    }

    /// The expert of the greatest weight, the first of equals.
    pub fn best(&self) -> usize {
        let w = self.weights();
        (1..w.len()).fold(0, |best, i| if w[i] > w[best] { i } else { best })
    }

    /// A round in which the experts' losses were `losses`, in the order of the weights.
    ///
    /// # Errors
    /// `Shape`: not one loss for each expert.
    pub fn observe(&mut self, losses: &[f64]) -> Result<()> {
        let n = self.scores.len();
        ensure!(losses.len() == n, Shape, "{} losses of {n} experts", losses.len());
        let losses: Vec<f64> = losses.iter().map(|&l| if l.is_nan() { 1.0 } else { l.clamp(0.0, 1.0) }).collect();
        let mixture: f64 = self.weights().iter().zip(&losses).map(|(p, l)| p * l).sum();
        let rates: Vec<f64> = (0..n).map(|i| self.rate(i)).collect();
        for i in 0..n {
            let regret = mixture - losses[i];
            self.squares[i] += regret * regret;
            self.scores[i] = match self.rule {
                Rule::Hedge { epsilon } | Rule::FixedShare { epsilon, .. } => self.scores[i] - epsilon * losses[i],
                Rule::AdaptMlProd => (self.scores[i] + (rates[i] * regret).ln_1p()) * (self.rate(i) / rates[i]),
                Rule::LastLoss { temperature } => -losses[i] / temperature,
            };
            self.losses[i] += losses[i];
        }
        if let Rule::FixedShare { lambda, .. } = self.rule
            && lambda > 0.0
        {
            let shared = |p: f64| ((1.0 - lambda) * p + lambda / n as f64).ln();
            self.scores = softmax(std::mem::take(&mut self.scores)).into_iter().map(shared).collect();
        }
        self.mixture += mixture;
        self.rounds += 1;
        Ok(())
    }

    /// Cumulative loss of the mixture: Σ over rounds of ⟨p, ℓ⟩.
    pub fn mixture_loss(&self) -> f64 {
        self.mixture
    }

    /// Cumulative loss of the best expert in hindsight.
    pub fn best_loss(&self) -> f64 {
        self.losses.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// What the mixture lost beyond the best expert.
    pub fn regret(&self) -> f64 {
        self.mixture - self.best_loss()
    }

    /// The most that [`Meta::regret`] can be by now, where the rule has such a bound: ln N / ε + ε T / 8 for Hedge, for a fixed
    /// share also (T - 1) ln(1 / (1 - λ)) / ε, and that of corollary 4 of its paper for Adapt-ML-Prod.
    pub fn bound(&self) -> Option<f64> {
        let (n, t) = (self.scores.len() as f64, self.rounds as f64);
        if n == 1.0 {
            return Some(0.0);
        }
        let hedge = |epsilon: f64| n.ln() / epsilon + epsilon * t / 8.0;
        match self.rule {
            Rule::Hedge { epsilon } => Some(hedge(epsilon)),
            Rule::FixedShare { epsilon, lambda } => {
                Some(hedge(epsilon) - (t - 1.0).max(0.0) * (-lambda).ln_1p() / epsilon)
            }
            Rule::AdaptMlProd => {
                let c = 3.0 * n.ln() + (n / (2.0 * std::f64::consts::E) * (1.0 + (t + 1.0).ln())).ln_1p();
                let best = (0..self.losses.len()).min_by(|&i, &j| self.losses[i].total_cmp(&self.losses[j]))?;
                Some(c / n.ln().sqrt() * (1.0 + self.squares[best]).sqrt() + 2.0 * c)
            }
            Rule::LastLoss { .. } => None,
        }
    }

    /// Adapt-ML-Prod's learning rate of expert `i`. One expert has no regret, so any rate that is not 0 does.
    fn rate(&self, i: usize) -> f64 {
        let n = self.scores.len().max(2) as f64;
        (n.ln() / (1.0 + self.squares[i])).sqrt().min(0.5)
    }
}

/// ε = √(8 ln N / T), for which Hedge's regret after T rounds is at most √(T ln N / 2).
pub fn tuned_epsilon(experts: usize, rounds: u64) -> f64 {
    (8.0 * (experts as f64).ln() / rounds.max(1) as f64).sqrt()
}

/// Σ of weight times parameters: the deployed draft of an ensemble. Expert by expert, so the order of sums is fixed.
///
/// # Panics
/// If there is not one weight for each expert, or the experts' lengths differ.
pub fn average(weights: &[f64], experts: &[&[f64]]) -> Vec<f64> {
    assert_eq!(weights.len(), experts.len());
    let mut sum = vec![0.0; experts.first().map_or(0, |e| e.len())];
    for (p, expert) in weights.iter().zip(experts) {
        assert_eq!(expert.len(), sum.len());
        sum.iter_mut().zip(*expert).for_each(|(s, w)| *s += p * w);
    }
    sum
}

fn softmax(mut logs: Vec<f64>) -> Vec<f64> {
    let max = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    logs.iter_mut().for_each(|s| *s = (*s - max).exp());
    let sum: f64 = logs.iter().sum();
    logs.iter_mut().for_each(|s| *s /= sum);
    logs
}
