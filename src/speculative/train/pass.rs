//! What a head is trained on: sequences with the target's features and what the target would have said, packed into passes.

use std::ops::Range;

use half::bf16;

use super::weights::HeadConfig;
use crate::backend::Visible;
use crate::error::{Result, ensure};

/// The target's likeliest tokens behind each position of a continuation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Teacher {
    /// Tokens a position.
    pub k: usize,
    /// `[positions, k]`, likeliest first.
    pub ids: Vec<u32>,
    /// Their probabilities among all tokens.
    pub p: Vec<f32>,
}

/// A prompt with a continuation of N tokens in all, P of them the prompt's.
///
/// Slot t reads the features of position t and the token at t + 1. Slots P-1 to N-3 are trained, the slots before them are context: the
/// first has read the target's first token, and behind the last there is a token that it could have proposed. So there are N - 2 rows,
/// N - P - 1 of them trained, and the first of these has the teacher's position P.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequence {
    /// P.
    pub prompt: usize,
    /// N tokens.
    pub tokens: Vec<u32>,
    /// The target's residual streams, `[taps, N - 2, hidden]`.
    pub features: Vec<bf16>,
    /// Of positions P to N - 2.
    pub teacher: Teacher,
}

/// Rows and trained slots of a sequence of `tokens` tokens with a prompt of `prompt`; `None` where it has nothing to train on.
pub fn extent(prompt: usize, tokens: usize) -> Option<[usize; 2]> {
    (prompt > 0 && tokens > prompt + 1).then(|| [tokens - 2, tokens - prompt - 1])
}

/// Neighbours of these sizes in as few groups as hold up to `most` each.
pub(super) fn within(sizes: impl Iterator<Item = usize>, most: usize) -> Result<Vec<Range<usize>>> {
    let (mut groups, mut total) = (Vec::<Range<usize>>::new(), 0);
    for (i, n) in sizes.enumerate() {
        ensure!(n <= most, Capacity, "a sequence of {n} rows in a training pass; {most} are planned");
        match groups.last_mut() {
            Some(last) if total + n <= most => last.end += 1,
            _ => {
                groups.push(i..i + 1);
                total = 0;
            }
        }
        total += n;
    }
    Ok(groups)
}

/// The tokens that a head knows.
#[derive(Clone, Debug, PartialEq)]
pub struct DraftVocab {
    d2t: Vec<u32>,
    t2d: Vec<u32>,
}

impl DraftVocab {
    /// No token of the head.
    pub const NONE: u32 = u32::MAX;

    /// From the target's tokens, ascending.
    ///
    /// # Errors
    /// Tokens that are not ascending, or outside the target's vocabulary.
    pub fn new(d2t: Vec<u32>, target: usize) -> Result<Self> {
        let sound = d2t.windows(2).all(|w| w[0] < w[1]) && d2t.last().is_some_and(|&t| (t as usize) < target);
        ensure!(sound, Config, "a draft's tokens are {} of {target}, ascending", d2t.len());
        let mut t2d = vec![Self::NONE; target];
        d2t.iter().enumerate().for_each(|(d, &t)| t2d[t as usize] = d as u32);
        Ok(Self { d2t, t2d })
    }

    /// The `n` tokens that come most often; among equals, and where there are fewer, the lowest.
    ///
    /// # Errors
    /// `n` that is 0 or more than the target has.
    pub fn most_frequent(tokens: impl Iterator<Item = u32>, n: usize, target: usize) -> Result<Self> {
        ensure!(n > 0 && n <= target, Usage, "a draft vocabulary of {n} tokens of {target}");
        let mut counts = vec![0u64; target];
        for t in tokens {
            ensure!((t as usize) < target, Usage, "token {t} is outside the vocabulary of {target}");
            counts[t as usize] += 1;
        }
        let mut all: Vec<u32> = (0..target as u32).collect();
        all.sort_by_key(|&t| std::cmp::Reverse(counts[t as usize]));
        all.truncate(n);
        all.sort_unstable();
        Self::new(all, target)
    }

    /// All of the target's tokens.
    pub fn all(target: usize) -> Self {
        let same: Vec<u32> = (0..target as u32).collect();
        Self { d2t: same.clone(), t2d: same }
    }

    /// The target's token of each of the head's.
    pub fn d2t(&self) -> &[u32] {
        &self.d2t
    }

    /// The head's token of each of the target's, or [`DraftVocab::NONE`].
    pub fn t2d(&self) -> &[u32] {
        &self.t2d
    }
}

/// Sequences, one after another. Below, a row is any slot of them, a slot one that trains.
#[derive(Clone, Debug)]
pub struct HeadPass {
    /// Rows and slots of each sequence.
    lens: Vec<[usize; 2]>,
    /// The token that each row reads.
    pub(super) tokens: Vec<u32>,
    /// For each tap `[rows, hidden]`.
    pub(super) features: Vec<Vec<bf16>>,
    /// The row of each slot.
    pub(super) slots: Vec<u32>,
    /// Of each row in its sequence.
    pub(super) positions: Vec<u32>,
    /// How many slots of its sequence follow each slot.
    left: Vec<u32>,
    /// The teacher behind the token that each slot reads: `k` tokens of the head and their probabilities.
    pub(super) k: usize,
    ids: Vec<u32>,
    p: Vec<f32>,
    /// The teacher's likeliest, among the target's tokens as the head has them.
    best: Vec<u32>,
    /// Whether the head can learn this row.
    known: Vec<bool>,
}

/// What a slot reads and should say in one of the unrolled steps.
pub(super) struct StepRows {
    pub(super) tokens: Vec<u32>,
    pub(super) ids: Vec<u32>,
    pub(super) p: Vec<f32>,
    pub(super) weights: Vec<f32>,
}

impl HeadPass {
    /// Packs `sequences`. Of the teacher's tokens the `k` likeliest that the head knows are kept, with their probabilities among the
    /// tokens that it knows. A row is not learnt where it does not know the likeliest, or fewer than `k`.
    ///
    /// # Errors
    /// Parts of a sequence that do not fit one another or `cfg`.
    pub fn new(cfg: &HeadConfig, sequences: &[&Sequence], vocab: &DraftVocab, k: usize) -> Result<Self> {
        let mut pass = Self {
            lens: Vec::new(),
            tokens: Vec::new(),
            features: vec![Vec::new(); cfg.taps],
            slots: Vec::new(),
            positions: Vec::new(),
            left: Vec::new(),
            k,
            ids: Vec::new(),
            p: Vec::new(),
            best: Vec::new(),
            known: Vec::new(),
        };
        for s in sequences {
            let Some([rows, slots]) = extent(s.prompt, s.tokens.len()) else { continue };
            let fits = s.features.len() == cfg.taps * rows * cfg.hidden && s.teacher.ids.len() == slots * s.teacher.k;
            ensure!(fits && s.teacher.k >= k && k > 0, Shape, "features or teacher of {slots} slots do not fit");
            let at = pass.tokens.len() as u32;
            pass.tokens.extend(&s.tokens[1..=rows]);
            pass.positions.extend(0..rows as u32);
            for (all, one) in pass.features.iter_mut().zip(s.features.chunks(rows * cfg.hidden)) {
                all.extend_from_slice(one);
            }
            pass.slots.extend((rows - slots..rows).map(|r| at + r as u32));
            pass.left.extend((0..slots as u32).rev());
            pass.lens.push([rows, slots]);
            for (ids, p) in s.teacher.ids.chunks(s.teacher.k).zip(s.teacher.p.chunks(s.teacher.k)) {
                pass.teach(ids, p, vocab);
            }
        }
        Ok(pass)
    }

    /// `sequences` in passes of up to `rows` rows, in their order; those without a slot are left out.
    ///
    /// # Errors
    /// As [`HeadPass::new`]; a sequence of more rows.
    pub fn packed(
        cfg: &HeadConfig,
        sequences: &[&Sequence],
        vocab: &DraftVocab,
        k: usize,
        rows: usize,
    ) -> Result<Vec<Self>> {
        let size = |s: &Sequence| extent(s.prompt, s.tokens.len()).map_or(0, |[rows, _]| rows);
        let trained: Vec<&Sequence> = sequences.iter().copied().filter(|s| size(s) > 0).collect();
        within(trained.iter().map(|s| size(s)), rows)?
            .into_iter()
            .map(|r| Self::new(cfg, &trained[r], vocab, k))
            .collect()
    }

    fn teach(&mut self, ids: &[u32], p: &[f32], vocab: &DraftVocab) {
        let all = || ids.iter().map(|&t| vocab.t2d[t as usize]).zip(p);
        let outside: f32 = all().filter(|(d, _)| *d == DraftVocab::NONE).map(|(_, p)| p).sum();
        let kept: Vec<_> = all().filter(|(d, _)| *d != DraftVocab::NONE).take(self.k).collect();
        let best = vocab.t2d[ids[0] as usize];
        let known = best != DraftVocab::NONE && kept.len() == self.k;
        self.best.push(best);
        self.known.push(known);
        // A row that has no weight still needs tokens.
        let filler = (0..self.k as u32).map(|d| (d, 0.0));
        let rows: Vec<(u32, f32)> =
            if known { kept.iter().map(|&(d, &p)| (d, p / (1.0 - outside))).collect() } else { filler.collect() };
        self.ids.extend(rows.iter().map(|r| r.0));
        self.p.extend(rows.iter().map(|r| r.1));
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Slots that train.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Slots that have something to learn in step `i`.
    pub fn active(&self, i: usize) -> usize {
        (0..self.slots()).filter(|&s| self.active_slot(s, i)).count()
    }

    fn active_slot(&self, s: usize, i: usize) -> bool {
        i <= self.left[s] as usize && self.known[s + i]
    }

    /// Whether slot `s` has a step `i`, and the token of the head that it should propose there, if the head knows it.
    pub fn wanted(&self, s: usize, i: usize) -> Option<u32> {
        (i <= self.left[s] as usize).then(|| self.best[s + i])
    }

    /// Step `i`, each active slot with this weight.
    pub(super) fn step(&self, i: usize, weight: f32) -> StepRows {
        // What lies behind a sequence's end has no weight.
        let at = |s: usize| s + i.min(self.left[s] as usize);
        let slots = || 0..self.slots();
        StepRows {
            tokens: slots().map(|s| self.tokens[self.slots[s] as usize + at(s) - s]).collect(),
            ids: slots().flat_map(|s| &self.ids[at(s) * self.k..][..self.k]).copied().collect(),
            p: slots().flat_map(|s| &self.p[at(s) * self.k..][..self.k]).copied().collect(),
            weights: slots().map(|s| if self.active_slot(s, i) { weight } else { 0.0 }).collect(),
        }
    }

    /// Who sees whom in step `i`, as a table for all the keys until then: those of the rows, then those of each later step's slots. The
    /// queries are its last rows; the others see one key, and nobody asks what for.
    pub(super) fn visible(&self, i: usize) -> Result<Visible> {
        let (rows, slots) = (self.rows(), self.slots());
        let mut visible = Visible::new();
        for _ in 0..rows + i * slots - slots {
            visible.push(&[[0, 1]])?;
        }
        let (mut ranges, mut at, mut slot) = (Vec::with_capacity(i + 1), 0, 0);
        for &[n, trained] in &self.lens {
            for r in n - trained..n {
                ranges.clear();
                ranges.push([at as u32, (at + r + 1) as u32]);
                ranges.extend((0..i).map(|j| (rows + j * slots + slot) as u32).map(|key| [key, key + 1]));
                visible.push(&ranges)?;
                slot += 1;
            }
            at += n;
        }
        Ok(visible)
    }
}
