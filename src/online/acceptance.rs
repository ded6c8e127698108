//! What agreement is worth: from the distance of draft and target to tokens a round, to speed, to whether learning pays.
//!
//! `acc` is the probability that one drafted token is accepted, 1 less the total variation of the two distributions (Leviathan et
//! al. 2023, arXiv:2211.17192); `k` the length of the drafted chain; `alpha` the cost of one step of the draft in passes of the target.
//! A round commits what was accepted and one token more.

/// Tokens a round commits on average when positions are accepted independently: Σ accⁱ for i = 0..=k, 1 to k + 1.
pub fn tokens_per_round(acc: f64, k: usize) -> f64 {
    (0..k).fold(1.0, |sum, _| 1.0 + acc * sum)
}

/// How much faster than plain decoding that is, verification costing what one token costs.
pub fn speed_up(acc: f64, k: usize, alpha: f64) -> f64 {
    tokens_per_round(acc, k) / (alpha * k as f64 + 1.0)
}

/// The chain of at most `limit` tokens with the greatest [`speed_up`], and that; the shorter of equals, 0 where drafting does not pay.
pub fn best_chain(acc: f64, alpha: f64, limit: usize) -> (usize, f64) {
    let better = |best: (usize, f64), k| {
        let gain = speed_up(acc, k, alpha);
        if gain > best.1 { (k, gain) } else { best }
    };
    (1..=limit).fold((0, 1.0), better)
}

/// At least so many tokens a round on average, for chains of `k` and a mean total variation `tv` over the rounds: m / (1 + m tv)
/// with m = k + 1. It always holds (Bernoulli in each round, Jensen over rounds), however the rounds differ.
pub fn tokens_bound(tv: f64, k: usize) -> f64 {
    let m = (k + 1) as f64;
    m / (1.0 + m * tv)
}

/// The speed-up that [`tokens_bound`] guarantees.
pub fn speed_up_bound(tv: f64, k: usize, alpha: f64) -> f64 {
    tokens_bound(tv, k) / (alpha * k as f64 + 1.0)
}

/// ½ Σ |p - q|.
pub fn total_variation(p: &[f64], q: &[f64]) -> f64 {
    0.5 * p.iter().zip(q).map(|(p, q)| (p - q).abs()).sum::<f64>()
}

/// Σ p ln(p / q) in nats; infinite where q excludes what p allows.
pub fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q).ln()).sum()
}

/// Pinsker: the total variation is at most √(KL / 2), and at most 1.
pub fn pinsker(kl: f64) -> f64 {
    (kl / 2.0).sqrt().min(1.0)
}

/// The greatest mean total variation over `rounds` rounds that the learner's `regret` allows, where the comparators' own
/// divergences from the target sum to `gap`: √((regret + gap) / 2 T).
pub fn tv_from_regret(regret: f64, gap: f64, rounds: u64) -> f64 {
    pinsker((regret + gap).max(0.0) / rounds as f64)
}

/// By what factor tokens a round must rise for an update to pay that costs `update` and comes every `rounds` rounds of cost
/// `round` each (drafting and verifying), all in the same unit.
pub fn break_even(update: f64, rounds: u64, round: f64) -> f64 {
    1.0 + update / (rounds as f64 * round)
}
