//! The operations on logits and on drafted trees: their inputs beside the accumulator buffers, and their calls.

use super::ops::{Op, Verify};
use crate::backend::{
    Accepted, Backend, Buffer, Candidates, Draw, Masked, NO_TOKEN, Penalty, Rule, Score, Trees, Unmasking,
};
use crate::error::Result;
use crate::rng::{Key, Rng};

/// Most nodes of a path that is kept.
const STRIDE: usize = 8;

/// What the host sends with a call.
#[derive(Default)]
pub(super) struct Decoding {
    draws: Vec<Draw>,
    penalties: Vec<Penalty>,
    sizes: Vec<u32>,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    parents: Vec<u32>,
    drafts: Vec<u32>,
    keys: Vec<Key>,
}

/// Turns rows of `vocab` normal values into distributions.
pub(super) fn normalize(values: &mut [f32], vocab: usize) {
    for row in values.chunks_exact_mut(vocab) {
        row.iter_mut().for_each(|x| *x = (1.5 * *x).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|x| *x /= sum);
    }
}

impl Decoding {
    /// Of `op`, whose drafted tokens are drawn from rows of `q`; and the id buffers it works on.
    pub fn new(op: &Op, rng: &mut Rng, q: &[f32]) -> (Self, Vec<Vec<u32>>) {
        let mut d = Self::default();
        let zeros = |n: usize| vec![0; n];
        let ids = match *op {
            Op::LogitsStats { rows, .. } => vec![zeros(rows)],
            Op::TopK { rows, k, .. } => vec![zeros(rows * k)],
            Op::Sample { rows, n, top_k, top_p, .. } => {
                d.draw(rng, rows, top_k, top_p);
                vec![zeros(rows * n)]
            }
            Op::Distribution { rows, top_k, top_p, .. } => {
                d.draw(rng, rows, top_k, top_p);
                vec![]
            }
            Op::Penalize { rows, vocab, each } => {
                let apart = vocab / each;
                let penalty = |i: usize| Penalty {
                    row: (i / each) as u32,
                    token: (i % each * apart + i / each % apart) as u32,
                    factor: 1.1 + 0.1 * (i / each) as f32,
                };
                d.penalties = (0..rows * each).map(penalty).collect();
                vec![]
            }
            Op::Forbid { vocab, each, .. } => {
                d.tokens = (0..each).map(|i| (i * (vocab / each)) as u32).collect();
                vec![]
            }
            Op::Unmask { sequences, rows, length, .. } => {
                let apart = length / rows;
                d.positions = (0..rows).map(|i| (i * apart + i % apart) as u32).collect();
                let mut some = |n: usize| Vec::from_iter((0..n).map(|_| rng.below(1000) as u32));
                let (mut text, mut picks, argmax) =
                    (some(sequences * length), some(sequences * rows), some(sequences * rows));
                picks.iter_mut().step_by(5).for_each(|t| *t = NO_TOKEN);
                d.tokens = text[..1].to_vec();
                text[3 * length / 4] = text[0];
                vec![text, zeros(sequences * rows), picks, argmax]
            }
            Op::VerifyTree { sequences, nodes, vocab, by } => {
                d.sizes = vec![nodes as u32; sequences];
                d.keys = keys(rng, sequences);
                for node in 0..sequences * nodes {
                    // Binary trees.
                    let (i, first) = (node % nodes, node - node % nodes);
                    let parent = i.saturating_sub(1) / 2;
                    let token = match by {
                        Verify::Match => (i % 3) as u32,
                        Verify::Reject { replacement, .. } => {
                            let sibling = (i > 0 && i % 2 == 0 && !replacement).then(|| d.tokens[node - 1]);
                            pick(rng, &q[(first + parent) * vocab..][..vocab], sibling)
                        }
                    };
                    d.tokens.push(token);
                    d.parents.push(parent as u32);
                    d.drafts.push(node as u32);
                }
                let picks = (0..sequences * nodes).map(|_| rng.below(3) as u32).collect();
                vec![zeros(sequences * STRIDE.min(nodes)), zeros(sequences), zeros(sequences), picks]
            }
            Op::KvCommitBatch(a) => {
                let stride = a.segments.iter().map(|s| s.1).max().unwrap_or(0);
                let path = |n: usize| (0..stride).map(move |i| if 2 * i < n { 2 * i as u32 } else { u32::MAX });
                let kept = a.segments.iter().map(|s| s.1.div_ceil(2) as u32).collect();
                vec![a.segments.iter().flat_map(|s| path(s.1)).collect(), kept]
            }
            _ => vec![],
        };
        (d, ids)
    }

    fn draw(&mut self, rng: &mut Rng, rows: usize, top_k: u32, top_p: f32) {
        let draw = |key| Draw { temperature: 0.8, top_k, top_p, min_p: 0.0, key };
        self.draws = keys(rng, rows).into_iter().map(draw).collect();
    }

    /// Calls the operation, which is one of those above and works on no cache.
    pub fn step<B: Backend>(&self, be: &B, op: &Op, acc: &mut [B::Buf<B::Acc>], ids: &mut [B::Buf<u32>]) -> Result<()> {
        let trees = Trees { sizes: &self.sizes, tokens: &self.tokens, parents: &self.parents };
        match (*op, acc, ids) {
            (Op::LogitsStats { rows, vocab }, [x, stats], [argmax]) => {
                be.logits_stats(stats.head_mut(3 * rows), argmax.head_mut(rows), x.head(rows * vocab), vocab)
            }
            (Op::TopK { rows, vocab, k }, [x, values], [ids]) => {
                be.top_k(values.head_mut(rows * k), ids.head_mut(rows * k), x.head(rows * vocab), vocab, k)
            }
            (Op::Sample { rows, vocab, n, .. }, [x], [tokens]) => {
                be.sample(tokens.head_mut(rows * n), x.head(rows * vocab), &self.draws)
            }
            (Op::Distribution { rows, vocab, .. }, [x, p], []) => {
                be.distribution(p.head_mut(rows * vocab), x.head(rows * vocab), &self.draws)
            }
            (Op::Penalize { rows, vocab, .. }, [x], []) => {
                be.penalize(x.head_mut(rows * vocab), vocab, &self.penalties)
            }
            (Op::Forbid { rows, vocab, .. }, [x], []) => be.forbid(x.head_mut(rows * vocab), vocab, &self.tokens),
            (Op::Unmask { sequences, rows, length, score }, [stats], [tokens, taken, picks, argmax]) => {
                let n = sequences * rows;
                // Statistics are normal numbers, of which one in six passes.
                let threshold = if score == Score::Entropy { -1.0 } else { 1f32.exp() };
                let (half, whole) = (length as u32 / 2, length as u32);
                let rule = Unmasking { score, threshold, strict: false, best: 1, forced: 0..half };
                let text = |s: usize| Masked {
                    tokens: s * length..(s + 1) * length,
                    positions: &self.positions,
                    rule: rule.clone(),
                    fill: half..whole,
                };
                let texts: Vec<Masked<'_>> = (0..sequences).map(text).collect();
                let (picks, argmax, stats) = (picks.head(n), argmax.head(n), stats.head(3 * n));
                let found = Candidates { picks, argmax, stats };
                be.unmask(tokens.head_mut(sequences * length), taken.head_mut(n), found, &texts, &self.tokens)
            }
            (Op::VerifyTree { by, .. }, [p, q], [path, counts, next, picks]) => {
                let rule = match by {
                    Verify::Match => Rule::Match(picks.head(picks.len())),
                    Verify::Reject { replacement, order } => {
                        let (p, q) = (p.head(p.len()), q.head(q.len()));
                        Rule::Reject { p, q, drafts: &self.drafts, keys: &self.keys, replacement, order }
                    }
                };
                let (all, n) = (path.len(), counts.len());
                let path = path.head_mut(all);
                let (counts, next) = (counts.head_mut(n), next.head_mut(n));
                be.verify_tree(Accepted { path, counts, next }, &trees, rule)
            }
            (op, ..) => unreachable!("{} has no such buffers", op.name()),
        }
    }
}

fn keys(rng: &mut Rng, n: usize) -> Vec<Key> {
    (0..n as u64).map(|stream| Key { seed: rng.next_u64(), stream, counter: 100 }).collect()
}

/// A token drawn from q, other than `without`.
fn pick(rng: &mut Rng, q: &[f32], without: Option<u32>) -> u32 {
    loop {
        let (u, mut sum) = (rng.uniform(), 0.0);
        let hit = q.iter().position(|q| {
            sum += q;
            sum > u
        });
        let token = hit.unwrap_or(0) as u32;
        if Some(token) != without {
            return token;
        }
    }
}
