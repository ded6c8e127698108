//! Which answers to show: two that are worth comparing, or one that is safe.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use super::one_pass::OnePass;
use super::vector::{argmax, rows};
use crate::error::{Result, ensure};
use crate::rng::Rng;

/// Which answer is shown beside the one of the highest reward.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Second {
    /// The one that could be best: highest reward + 2β‖F_j - F_first‖ in the norm of P. That may be the first itself, and then nothing
    /// is asked (algorithm 4 of the paper).
    Optimistic,
    /// The same among all others: always asks, and pays for it with a regret that grows linearly.
    Forced,
    /// The second best.
    Runnerup,
    /// The worst.
    Worst,
    /// The one of this rank by reward, 2 being the best beside the first; the worst where there are fewer.
    Rank(usize),
    /// Any of the top 1/q of all, the published rejection sampling; the second best where those are the best alone.
    Quantile(f64),
    /// Any other.
    Random,
    /// Both at random: no reward is looked at.
    Pair,
}

/// What is shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// The answer to show first.
    pub first: usize,
    /// The answer to compare it with; none where it is shown alone and nothing is asked.
    pub second: Option<usize>,
    /// 2β‖F_second - F_first‖ in the norm of P, 0 without a second.
    pub bonus: f64,
    /// F_jᵀθ + 2β‖F_j - F_first‖ of every answer.
    pub scores: Vec<f64>,
}

/// The most uncertain pair i < j of k answers by their `gram[k, k]` ([`OnePass::gram`]): the largest M_ii + M_jj - 2 M_ij, among
/// equals the first. Of fewer than two answers (0, 0).
///
/// # Panics
/// If `gram` has not k² numbers.
pub fn pair_of(gram: &[f64], k: usize) -> (usize, usize) {
    assert_eq!(gram.len(), k * k, "a gram matrix of {k} answers");
    let (mut best, mut pair) = (f64::NEG_INFINITY, (0, 0));
    for i in 0..k {
        for j in i + 1..k {
            let distance = gram[i * k + i] + gram[j * k + j] - 2.0 * gram[i * k + j];
            if distance > best {
                (best, pair) = (distance, (i, j));
            }
        }
    }
    pair
}

/// Chooses what to show of `answers[k, d]`, all to one prompt. `beta` is the radius of the confidence ellipsoid, see
/// [`radius_calibrated`](super::radius_calibrated). Only the random rules draw from `rng`.
///
/// # Errors
/// `Shape`: no answers, or rows that are not whole. `Usage`: a β below 0, a rank below 2, a quantile q below 1. `Diverged`: a
/// feature that is not finite. What the inverse says.
pub fn deploy(reward: &OnePass, answers: &[f64], beta: f64, second: Second, rng: &mut Rng) -> Result<Shown> {
    let (d, rewards) = (reward.width(), rewards(reward, answers, beta)?);
    let k = rewards.len();
    let first = if second == Second::Pair { rng.below(k) } else { argmax(&rewards) };
    let offset = &answers[first * d..][..d];
    let bonuses: Vec<f64> = norms(reward, answers, offset)?.iter().map(|n| 2.0 * beta * n).collect();
    let scores: Vec<f64> = rewards.iter().zip(&bonuses).map(|(r, b)| r + b).collect();

    // The others by reward, the best first and equals in their order.
    let mut others: Vec<usize> = (0..k).filter(|&j| j != first).collect();
    others.sort_by(|&i, &j| rewards[j].partial_cmp(&rewards[i]).unwrap_or(Ordering::Equal));
    let second = match second {
        // An answer that is only as good is no reason to ask.
        Second::Optimistic => Some(argmax(&scores)).filter(|&j| scores[j] > scores[first]),
        Second::Forced => (0..k).filter(|&j| j != first).reduce(|a, j| if scores[j] > scores[a] { j } else { a }),
        Second::Runnerup => others.first().copied(),
        Second::Worst => (0..k).filter(|&j| j != first).reduce(|a, j| if rewards[j] < rewards[a] { j } else { a }),
        Second::Rank(rank) => {
            ensure!(rank > 1, Usage, "a second answer of rank {rank}: 2 is the best beside the first");
            others.get(rank - 2).or(others.last()).copied()
        }
        Second::Quantile(q) => {
            ensure!(q >= 1.0 && q.is_finite(), Usage, "a second answer from the top 1/{q}");
            let top = (k as f64 / q).ceil() as usize - 1;
            (k > 1).then(|| others[rng.below(top.max(1))])
        }
        Second::Random | Second::Pair => (k > 1).then(|| others[rng.below(k - 1)]),
    };
    Ok(Shown { first, second, bonus: second.map_or(0.0, |j| bonuses[j]), scores })
}

/// The answer of `answers[k, d]` with the highest lower confidence bound (φ - ν)ᵀθ - β‖φ - ν‖ in the norm of P, and the bounds of all.
/// `centred` takes ν as the answers' mean, else ν = 0. Comparisons say nothing of what all answers to a prompt share, so only the
/// centred rule is free of it (Zhu, Jordan & Jiao 2023, arXiv:2301.11270).
///
/// # Errors
/// Those of [`deploy`].
pub fn pessimistic(reward: &OnePass, answers: &[f64], beta: f64, centred: bool) -> Result<(usize, Vec<f64>)> {
    let (d, mut bounds) = (reward.width(), rewards(reward, answers, beta)?);
    let mut offset = vec![0.0; d];
    if centred {
        answers.chunks_exact(d).for_each(|a| offset.iter_mut().zip(a).for_each(|(o, a)| *o += a));
        offset.iter_mut().for_each(|o| *o /= bounds.len() as f64);
    }
    let shift = reward.reward(&offset);
    let norms = norms(reward, answers, &offset)?;
    bounds.iter_mut().zip(norms).for_each(|(r, n)| *r -= shift + beta * n);
    Ok((argmax(&bounds), bounds))
}

fn rewards(reward: &OnePass, answers: &[f64], beta: f64) -> Result<Vec<f64>> {
    let d = reward.width();
    ensure!(rows("answers", answers, d)? > 0, Shape, "no answers to choose from");
    ensure!(beta >= 0.0 && beta.is_finite(), Usage, "beta = {beta}: a radius is not below 0");
    Ok(answers.chunks_exact(d).map(|a| reward.reward(a)).collect())
}

/// ‖F_j - offset‖ in the norm of P. Differences first: from a gram matrix they would cancel.
fn norms(reward: &OnePass, answers: &[f64], offset: &[f64]) -> Result<Vec<f64>> {
    let differences: Vec<f64> =
        answers.chunks_exact(offset.len()).flat_map(|a| a.iter().zip(offset).map(|(a, o)| a - o)).collect();
    Ok(reward.variances(&differences)?.iter().map(|v| v.sqrt()).collect())
}
