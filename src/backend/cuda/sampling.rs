//! From logits to tokens, and which drafted tokens stand: each one launch.

use super::device::Slot;
use super::memory::{Dst, Src};
use super::{Cuda, args, kernels as k};
use crate::backend::sampling::{check_forbidden, check_penalties, width};
use crate::backend::{Accepted, Candidates, Draw, Masked, Order, Penalty, Rule, Score, Segment, Trees, unmask};
use crate::error::{Result, ensure};
use crate::rng::Key;

impl From<&Draw> for args::Draw {
    fn from(d: &Draw) -> Self {
        let Draw { temperature, top_k, top_p, min_p, key: Key { seed, stream, counter } } = *d;
        Self { seed, stream, counter, temperature, top_p, min_p, top_k }
    }
}

/// Threads of a block that owns a row: not more than quads in it, at most `most`. The results do not depend on it, but for the
/// last bits of statistics.
pub(super) fn threads(vocab: usize, most: usize) -> usize {
    (vocab / 4).next_power_of_two().clamp(32, most)
}

impl Cuda {
    pub(super) fn run_logits_stats(
        &self,
        stats: Dst<'_, f32>,
        argmax: Dst<'_, u32>,
        logits: Src<'_, f32>,
        vocab: usize,
    ) -> Result<()> {
        let rows = argmax.len();
        if rows == 0 {
            return Ok(());
        }
        let args = args::LogitsStats::new(logits, stats, argmax, rows as u32, vocab as u32)?;
        self.launch(k::LOGITS_STATS, args, [rows, 1, 1], threads(vocab, 1024), 0)
    }

    pub(super) fn run_top_k(
        &self,
        values: Dst<'_, f32>,
        ids: Dst<'_, u32>,
        logits: Src<'_, f32>,
        vocab: usize,
        n: usize,
    ) -> Result<()> {
        ensure!((1..=vocab).contains(&n), Shape, "the {n} largest of {vocab} logits");
        let rows = logits.len() / vocab;
        if rows == 0 {
            return Ok(());
        }
        let args = args::TopK::new(logits, values, ids, rows as u32, vocab as u32, n as u32)?;
        self.launch(k::TOP_K, args, [rows, 1, 1], threads(vocab, 1024), 0)
    }

    pub(super) fn run_penalize(&self, logits: Dst<'_, f32>, vocab: usize, penalties: &[Penalty]) -> Result<()> {
        check_penalties(penalties, logits.len(), vocab)?;
        if penalties.is_empty() {
            return Ok(());
        }
        let (count, n) = (logits.len() as u32, penalties.len() as u32);
        let record = |p: &Penalty| args::Penalty { at: p.row * vocab as u32 + p.token, factor: p.factor };
        let mut small = self.small();
        let penalties = small.put(&self.stream, Slot::Penalties, &penalties.iter().map(record).collect::<Vec<_>>())?;
        let args = args::Penalize::new(logits, penalties, count, n)?;
        self.launch(k::PENALIZE, args, [(n as usize).div_ceil(128), 1, 1], 128, 0)
    }

    pub(super) fn run_forbid(&self, logits: Dst<'_, f32>, vocab: usize, tokens: &[u32]) -> Result<()> {
        check_forbidden(tokens, vocab)?;
        let (rows, n) = (logits.len() / vocab, tokens.len());
        if rows * n == 0 {
            return Ok(());
        }
        let mut small = self.small();
        let tokens = small.put(&self.stream, Slot::Forbidden, tokens)?;
        let args = args::Forbid::new(logits, tokens, rows as u32, vocab as u32, n as u32)?;
        self.launch(k::FORBID, args, [(rows * n).div_ceil(128), 1, 1], 128, 0)
    }

    pub(super) fn run_sample(&self, tokens: Dst<'_, u32>, logits: Src<'_, f32>, draws: &[Draw]) -> Result<()> {
        let rows = draws.len();
        if rows == 0 {
            return Ok(());
        }
        let (vocab, n) = (width("sample", logits.len(), rows)?, width("sample", tokens.len(), rows)?);
        let mut small = self.small();
        let draws = small.put(&self.stream, Slot::Draws, &draws.iter().map(args::Draw::from).collect::<Vec<_>>())?;
        let args = args::Sample::new(logits, draws, tokens, rows as u32, vocab as u32, n as u32)?;
        self.launch(k::SAMPLE, args, [rows, 1, 1], threads(vocab, 1024), 0)
    }

    pub(super) fn run_distribution(&self, p: Dst<'_, f32>, logits: Src<'_, f32>, draws: &[Draw]) -> Result<()> {
        let rows = draws.len();
        if rows == 0 {
            return Ok(());
        }
        let vocab = width("distribution", logits.len(), rows)?;
        let mut small = self.small();
        let draws = small.put(&self.stream, Slot::Draws, &draws.iter().map(args::Draw::from).collect::<Vec<_>>())?;
        let args = args::Distribution::new(logits, draws, p, rows as u32, vocab as u32)?;
        self.launch(k::DISTRIBUTION, args, [rows, 1, 1], threads(vocab, 1024), 0)
    }

    pub(super) fn run_verify_tree(
        &self,
        to: Accepted<'_, Self>,
        trees: &Trees<'_>,
        rule: Rule<'_, Self>,
    ) -> Result<()> {
        let Accepted { path, counts, next } = to;
        let (sequences, nodes) = (counts.len(), trees.tokens.len());
        trees.check(sequences)?;
        if sequences == 0 {
            return Ok(());
        }
        let stride = width("verify_tree", path.len(), sequences)? as u32;
        let (s, n) = (sequences as u32, nodes as u32);
        let records: Vec<args::Tree> =
            trees.iter().map(|t| args::Tree { first: t.first as u32, nodes: t.tokens.len() as u32 }).collect();
        let mut small = self.small();
        let table = small.put(&self.stream, Slot::Trees, &records)?;
        let tokens = small.put(&self.stream, Slot::TreeTokens, trees.tokens)?;
        let parents = small.put(&self.stream, Slot::TreeParents, trees.parents)?;
        match rule {
            Rule::Match(picks) => {
                let args = args::VerifyWalk::new(table, tokens, parents, picks, path, counts, next, s, n, stride)?;
                self.launch(k::VERIFY_WALK, args, [sequences.div_ceil(4), 1, 1], 128, 0)
            }
            Rule::Reject { p, q, drafts, keys, replacement, order } => {
                let vocab = width("verify_tree", p.len(), nodes)?;
                let drafted = q.len() / vocab;
                trees.check_reject(drafts, keys, drafted, vocab, order)?;
                let chances: Vec<args::Chance> =
                    keys.iter().map(|&Key { seed, stream, counter }| args::Chance { seed, stream, counter }).collect();
                let drafts = small.put(&self.stream, Slot::Drafts, drafts)?;
                let chances = small.put(&self.stream, Slot::Chances, &chances)?;
                let (d, v, r) = (drafted as u32, vocab as u32, u32::from(replacement));
                let args = args::VerifySiblings::new(
                    table, tokens, parents, drafts, p, q, chances, path, counts, next, s, n, d, v, stride, r,
                )?;
                let kernel = match order {
                    Order::RootFirst => k::VERIFY_SIBLINGS,
                    Order::LeavesFirst => k::VERIFY_TRAVERSAL,
                };
                self.launch(kernel, args, [sequences, 1, 1], threads(vocab, 512), 0)
            }
        }
    }

    pub(super) fn run_unmask(
        &self,
        tokens: Dst<'_, u32>,
        taken: Dst<'_, u32>,
        rows: Candidates<'_, Self>,
        texts: &[Masked<'_>],
        eos: &[u32],
    ) -> Result<()> {
        let Candidates { picks, argmax, stats } = rows;
        let sizes = [taken.len(), picks.len(), argmax.len(), stats.len()];
        let n = unmask::check(texts, tokens.len(), sizes, eos)?;
        if n == 0 {
            return Ok(());
        }
        let (mut first, mut positions) = (0, Vec::with_capacity(n));
        let record = |m: &Masked<'_>| {
            positions.extend_from_slice(m.positions);
            let limit = m.rule.limit();
            let own = args::Masked {
                first,
                rows: m.positions.len() as u32,
                text: m.tokens.start as u32,
                score: u32::from(m.rule.score == Score::Confidence),
                // What is at most the limit is below the next number.
                limit: if m.rule.strict { limit } else { limit.next_up() },
                best: m.rule.best,
                forced_from: m.rule.forced.start,
                forced_to: m.rule.forced.end,
                fill_from: m.fill.start,
                fill_to: m.fill.end,
            };
            first += own.rows;
            own
        };
        let table: Vec<args::Masked> = texts.iter().map(record).collect();
        let mut small = self.small();
        let table = small.put(&self.stream, Slot::Texts, &table)?;
        let positions = small.put(&self.stream, Slot::Positions, &positions)?;
        let ends = small.put(&self.stream, Slot::Ends, eos)?;
        let (s, n, len, e) = (texts.len() as u32, n as u32, tokens.len() as u32, eos.len() as u32);
        let args = args::Unmask::new(table, picks, argmax, stats, positions, ends, tokens, taken, s, n, len, e)?;
        self.launch(k::UNMASK, args, [texts.len(), 1, 1], 256, 0)
    }

    pub(super) fn run_kv_commit_batch(
        &self,
        segments: &[Segment<'_, Self>],
        path: Src<'_, u32>,
        counts: Src<'_, u32>,
        stride: usize,
    ) -> Result<()> {
        let Some((layers, kv_dim)) = segments.first().map(|s| (s.kv.layers, s.kv.kv_dim)) else { return Ok(()) };
        for s in segments {
            ensure!(s.rows > 0, Shape, "a sequence without staged rows has nothing to commit");
            let (l, d) = (s.kv.layers, s.kv.kv_dim);
            ensure!((l, d) == (layers, kv_dim), Shape, "caches of [{l}, {d}] and [{layers}, {kv_dim}] in one commit");
        }
        let mut small = self.small();
        let segs = self.segments(&mut small, segments)?;
        let (n, stride) = (segments.len() as u32, stride as u32);
        let args = args::KvCommitBatch::new(segs, path, counts, n, stride, layers as u32, kv_dim as u32)?;
        self.launch(k::KV_COMMIT_BATCH, args, [(layers * kv_dim / 4).div_ceil(128), segments.len(), 1], 128, 0)
    }
}
