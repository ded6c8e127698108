//! From logits to a token: greedy, or temperature with top-k, top-p and min-p.

use crate::error::{Result, bail, ensure};
use crate::rng::Rng;

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

    /// Divides or multiplies the logits of recent tokens, each once.
    fn penalize(&self, logits: &mut [f32], history: &[u32]) {
        if self.repeat_penalty == 1.0 {
            return;
        }
        let recent = &history[history.len().saturating_sub(Self::PENALTY_WINDOW)..];
        for (i, &t) in recent.iter().enumerate() {
            if let (Some(x), false) = (logits.get_mut(t as usize), recent[..i].contains(&t)) {
                *x = if *x > 0.0 { *x / self.repeat_penalty } else { *x * self.repeat_penalty };
            }
        }
    }

    /// The candidates and their probabilities (they sum to 1), most likely first. `logits` are changed by the penalty.
    ///
    /// # Errors
    /// `Diverged` if a logit is NaN or none is finite.
    pub fn distribution(&self, logits: &mut [f32], history: &[u32]) -> Result<Vec<(u32, f32)>> {
        self.penalize(logits, history);
        let best = argmax(logits)?;
        if self.is_greedy() {
            return Ok(vec![(best as u32, 1.0)]);
        }
        let (max, t) = (logits[best], self.temperature);
        let weight = |x: f32| ((x - max) / t).exp();
        let mut c: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, &x)| (i as u32, weight(x))).collect();
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.top_k > 0 && self.top_k < c.len() {
            c.select_nth_unstable_by(self.top_k - 1, order);
            c.truncate(self.top_k);
        }
        let total: f64 = c.iter().map(|x| x.1 as f64).sum();
        // Most of a vocabulary is far below any threshold: leave it out before sorting, by a bound that cannot drop a keeper.
        let negligible = (1.0 - self.top_p as f64) * total / c.len() as f64 * 0.5;
        if self.top_p < 1.0 {
            c.retain(|x| x.1 as f64 >= negligible);
        }
        c.retain(|x| x.1 >= self.min_p);
        c.sort_unstable_by(order);
        if self.top_p < 1.0 {
            let mut mass = 0.0;
            let enough = c.iter().position(|x| {
                mass += x.1 as f64;
                mass >= self.top_p as f64 * total
            });
            c.truncate(enough.map_or(c.len(), |i| i + 1));
        }
        let total: f64 = c.iter().map(|x| x.1 as f64).sum();
        c.iter_mut().for_each(|x| x.1 = (x.1 as f64 / total) as f32);
        Ok(c)
    }

    /// Draws a token: by inversion of the candidates' cumulative distribution with one uniform number.
    pub fn sample(&self, logits: &mut [f32], history: &[u32], rng: &mut Rng) -> Result<u32> {
        if self.is_greedy() {
            self.penalize(logits, history);
            return Ok(argmax(logits)? as u32);
        }
        let c = self.distribution(logits, history)?;
        let (u, mut sum) = (rng.uniform() as f64, 0.0);
        let hit = c.iter().find(|x| {
            sum += x.1 as f64;
            u < sum
        });
        Ok(hit.or(c.last()).map_or(0, |x| x.0))
    }
}

/// The place of the largest value, the lowest of equals.
///
/// # Errors
/// `Diverged` on NaN, or where nothing is finite: a model that has left the numbers must not look as if it spoke.
pub fn argmax(logits: &[f32]) -> Result<usize> {
    let mut best = 0;
    let mut nan = false;
    for (i, &x) in logits.iter().enumerate() {
        nan |= x.is_nan();
        if x > logits[best] {
            best = i;
        }
    }
    if nan || !logits.get(best).is_some_and(|x| x.is_finite()) {
        bail!(Diverged, "the logits are not finite: the weights are damaged, or the computation overflowed");
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(s: Sampler, logits: &[f32], n: usize) -> Vec<usize> {
        let mut rng = Rng::new(7);
        let mut count = vec![0; logits.len()];
        for _ in 0..n {
            count[s.sample(&mut logits.to_vec(), &[], &mut rng).unwrap() as usize] += 1;
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
    fn filters_keep_what_they_say() {
        let l = |p: [f32; 4]| p.map(f32::ln);
        let ids =
            |s: Sampler, p| -> Vec<u32> { s.distribution(&mut l(p), &[]).unwrap().into_iter().map(|x| x.0).collect() };
        let one = Sampler { temperature: 1.0, ..Sampler::greedy() };
        let p = [0.1, 0.4, 0.3, 0.2];
        assert_eq!(ids(one, p), [1, 2, 3, 0]);
        assert_eq!(ids(Sampler { top_k: 2, ..one }, p), [1, 2]);
        assert_eq!(ids(Sampler { top_p: 0.65, ..one }, p), [1, 2]);
        assert_eq!(ids(Sampler { top_p: 0.75, ..one }, p), [1, 2, 3]);
        assert_eq!(ids(Sampler { min_p: 0.6, ..one }, p), [1, 2]);
        assert_eq!(ids(Sampler { top_k: 3, ..one }, [0.25; 4]), [0, 1, 2]);
        let d = Sampler { top_k: 2, ..one }.distribution(&mut l(p), &[]).unwrap();
        assert!((d[0].1 - 4.0 / 7.0).abs() < 1e-6);
    }

    #[test]
    fn penalty_counts_each_token_once() {
        let s = Sampler { repeat_penalty: 2.0, ..Sampler::greedy() };
        let mut l = [4.0, 3.0, -1.0];
        s.penalize(&mut l, &[0, 0, 2]);
        assert_eq!(l, [2.0, 3.0, -2.0]);
    }

    #[test]
    fn not_finite_is_an_error_and_ties_go_low() {
        let mut r = Rng::new(0);
        for bad in [[f32::NAN, 1.0], [f32::NEG_INFINITY; 2], [1.0, f32::INFINITY]] {
            assert!(Sampler::greedy().sample(&mut bad.to_vec(), &[], &mut r).is_err());
        }
        assert_eq!(argmax(&[1.0, 3.0, 3.0]).unwrap(), 1);
    }
}
