//! [`Backend::unmask`]: which masked positions of a text get their tokens, and what becomes of the text behind its end.

use std::ops::Range;

use super::{Backend, In, NO_TOKEN};
use crate::dtype::Real;
use crate::error::{Result, ensure};

/// What R rows of logits say of the masked positions that they stand for, those of all sequences one after another.
pub struct Candidates<'a, B: Backend> {
    /// `[R]`: the token for each position, its best or a draw ([`Backend::sample`]).
    pub picks: In<'a, B, u32>,
    /// `[R]`: the best token ([`Backend::logits_stats`]), which a forced position gets whatever was drawn for it.
    pub argmax: In<'a, B, u32>,
    /// `[R, 3]`, as [`Backend::logits_stats`] gives them.
    pub stats: In<'a, B, B::Acc>,
}

/// How sure the model is of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// By the entropy of the distribution in nats: lower is surer (d3LLM, arXiv:2601.07568; dParallel, arXiv:2509.26488).
    Entropy,
    /// By the probability of the best token, e^(max - lse): higher is surer (Fast-dLLM, arXiv:2505.22618).
    Confidence,
}

/// Which of a sequence's rows are taken. Rows are ranked by their score, the surest first and the lowest position first among equals;
/// a row whose pick or best token is [`NO_TOKEN`] is not among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Unmasking {
    /// What rows are ranked by.
    pub score: Score,
    /// Taken is what is at least this sure. In nats or a probability; not NaN.
    pub threshold: f32,
    /// Whether it must be surer than the threshold.
    pub strict: bool,
    /// The first so many are taken in any case.
    pub best: u32,
    /// If nothing is taken at these positions so far, the first there is, and gets its best token.
    pub forced: Range<u32>,
}

/// A sequence and its rows. Positions are counted from the first of its tokens.
#[derive(Clone, Debug)]
pub struct Masked<'a> {
    /// Its tokens among those of all sequences.
    pub tokens: Range<usize>,
    /// Of each row; ascending strictly.
    pub positions: &'a [u32],
    /// Which of them are taken.
    pub rule: Unmasking,
    /// Then all behind the first end token at these positions becomes the first of the end tokens, up to the end of this range.
    pub fill: Range<u32>,
}

impl Unmasking {
    /// The greatest [`Score::cost`] that passes.
    pub(super) fn limit(&self) -> f32 {
        match self.score {
            Score::Entropy => self.threshold,
            Score::Confidence => -f64::from(self.threshold.max(0.0)).ln() as f32,
        }
    }
}

impl Score {
    /// Of a row's statistics: the less, the surer.
    fn cost<T: Real>(self, stats: &[T]) -> f64 {
        let [max, lse, entropy] = [0, 1, 2].map(|i| stats[i].to_f64());
        match self {
            Score::Entropy => entropy,
            Score::Confidence => lse - max,
        }
    }
}

impl Masked<'_> {
    /// [`Backend::unmask`] of one sequence, on the host; everything is its own part.
    fn unmask<T: Real>(
        &self,
        tokens: &mut [u32],
        taken: &mut [u32],
        [picks, argmax]: [&[u32]; 2],
        stats: &[T],
        eos: &[u32],
    ) {
        let Unmasking { score, strict, best, ref forced, .. } = self.rule;
        let limit = f64::from(self.rule.limit());
        // Zeros of both signs are equal.
        let cost: Vec<f64> = stats.chunks_exact(3).map(|s| score.cost(s) + 0.0).collect();
        let known = |i: &usize| picks[*i] != NO_TOKEN && argmax[*i] != NO_TOKEN && !cost[*i].is_nan();
        let mut ranked: Vec<usize> = (0..taken.len()).filter(known).collect();
        ranked.sort_by(|a, b| cost[*a].total_cmp(&cost[*b]));
        let passing = ranked.partition_point(|i| if strict { cost[*i] < limit } else { cost[*i] <= limit });
        let (sure, rest) = ranked.split_at(passing.max(best as usize).min(ranked.len()));
        taken.fill(NO_TOKEN);
        sure.iter().for_each(|i| taken[*i] = picks[*i]);
        let there = |i: &&usize| forced.contains(&self.positions[**i]);
        if !sure.iter().any(|i| there(&i))
            && let Some(i) = rest.iter().find(there)
        {
            taken[*i] = argmax[*i];
        }
        for (p, t) in self.positions.iter().zip(taken).filter(|(_, t)| **t != NO_TOKEN) {
            tokens[*p as usize] = *t;
        }
        let text = &mut tokens[self.fill.start as usize..self.fill.end as usize];
        if let Some(end) = text.iter().position(|t| eos.contains(t)) {
            text[end + 1..].fill(eos[0]);
        }
    }
}

/// [`Backend::unmask`] on the host: `picks` and `argmax`, then the statistics.
pub(super) fn on_host<T: Real>(
    tokens: &mut [u32],
    taken: &mut [u32],
    [picks, argmax]: [&[u32]; 2],
    stats: &[T],
    texts: &[Masked<'_>],
    eos: &[u32],
) -> Result<()> {
    if check(texts, tokens.len(), [taken.len(), picks.len(), argmax.len(), stats.len()], eos)? == 0 {
        return Ok(());
    }
    let mut first = 0;
    for text in texts {
        let r = first..first + text.positions.len();
        first = r.end;
        let (tokens, stats) = (&mut tokens[text.tokens.clone()], &stats[3 * r.start..3 * r.end]);
        text.unmask(tokens, &mut taken[r.clone()], [&picks[r.clone()], &argmax[r]], stats, eos);
    }
    Ok(())
}

/// Checks that sequences and rows fit together; says how many rows there are.
pub(super) fn check(texts: &[Masked<'_>], tokens: usize, rows: [usize; 4], eos: &[u32]) -> Result<usize> {
    let n: usize = texts.iter().map(|t| t.positions.len()).sum();
    ensure!(
        rows == [n, n, n, 3 * n],
        Shape,
        "{n} masked positions, and {rows:?} tokens taken, picks, best and statistics"
    );
    let mut from = 0;
    for Masked { tokens: own, positions, rule, fill } in texts {
        ensure!(
            from <= own.start && own.start <= own.end && own.end <= tokens,
            Shape,
            "tokens {own:?} of a sequence, behind {from} of {tokens}"
        );
        from = own.end;
        let ascend = positions.windows(2).all(|w| w[0] < w[1]);
        let inside = positions.last().is_none_or(|p| (*p as usize) < own.len());
        ensure!(ascend && inside, Shape, "masked positions {positions:?} in a sequence of {}", own.len());
        ensure!(!rule.threshold.is_nan(), Usage, "a threshold that is not a number");
        ensure!(
            fill.start <= fill.end && fill.end as usize <= own.len(),
            Shape,
            "positions {fill:?} to be filled in a sequence of {}",
            own.len()
        );
        ensure!(
            fill.is_empty() || !eos.is_empty(),
            Usage,
            "a sequence to be filled behind its end, without an end token"
        );
    }
    Ok(n)
}
