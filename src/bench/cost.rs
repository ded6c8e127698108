//! What each operation must move and compute.

use super::ops::{Attn, Op, Verify};
use crate::backend::Mask;
use crate::perf::Cost;

/// Bytes of one element where activations, sums and cached rows are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub act: usize,
    pub acc: usize,
    pub kv: usize,
}

/// Pairs of a query and a key it sees, over all sequences.
fn visible_pairs(a: &Attn, masks: &[Mask<'_>]) -> usize {
    let in_window = |pos: usize, key: usize| a.spec.window.is_none_or(|w| key + w > pos);
    let mut pairs = 0;
    for (&(past, rows), mask) in a.segments.iter().zip(masks) {
        for i in a.staged..a.staged + rows {
            let pos = mask.position(past, i);
            pairs += (0..past).filter(|&j| in_window(pos, j)).count();
            pairs +=
                (0..a.staged + rows).filter(|&j| mask.sees(i, j) && in_window(pos, mask.position(past, j))).count();
        }
    }
    pairs
}

/// Rows of all groups, and how many groups have any.
fn grouped(groups: &[usize]) -> (usize, usize) {
    (groups.iter().sum(), groups.iter().filter(|n| **n > 0).count())
}

/// `weights`: bytes of one set of the operation's matrices. Transcendental functions count as eight operations.
pub(super) fn cost(op: &Op, weights: usize, s: Sizes, masks: &[Mask<'_>]) -> Cost {
    let Sizes { act, acc, kv } = s;
    let (bytes, flops) = match *op {
        Op::Embed { vocab, d, rows, .. } => (weights / vocab * rows + rows * d * acc, rows * d),
        Op::GatherRows { rows, d, .. } => (2 * rows * d * acc, 0),
        Op::Add { rows, d } => (3 * rows * d * acc, rows * d),
        Op::AddActivated { rows, d, .. } => (3 * rows * d * acc, 12 * rows * d),
        Op::Operand { rows, d } => (rows * d * (acc + act), 0),
        Op::RmsNorm { rows, d } => (rows * d * (acc + act) + d * acc, 4 * rows * d),
        Op::AddRmsNorm { rows, d } => (rows * d * (3 * acc + act) + d * acc, 5 * rows * d),
        Op::AddNormed { rows, d } => (3 * rows * d * acc + d * acc, 5 * rows * d),
        Op::HeadNorm { rows, heads, head_dim } => (2 * rows * heads * head_dim * acc, 4 * rows * heads * head_dim),
        Op::Linear { rows, input, output, .. } => {
            (weights + rows * (input * act + output * acc), 2 * rows * input * output)
        }
        Op::Qkv { rows, input, q, kv, .. } => {
            let output = q + 2 * kv;
            (weights + rows * (input * act + output * acc), 2 * rows * input * output)
        }
        Op::Glu { rows, d, .. } => (rows * d * (2 * acc + act), 12 * rows * d),
        Op::LinearGlu { rows, input, output, .. } => {
            (weights + rows * (input + output) * act, rows * output * (4 * input + 12))
        }
        Op::Rope { rows, heads, head_dim } => ((2 * heads + 1) * rows * head_dim * acc, 3 * rows * heads * head_dim),
        Op::RopeStage(a) => {
            let (q, k, rows) = (a.spec.q_dim(), a.spec.kv_dim(), a.rows());
            (rows * ((2 * q + 2 * k + a.spec.head_dim) * acc + 2 * k * kv), 3 * rows * (q + k))
        }
        Op::KvStage(a) => (a.rows() * 2 * a.spec.kv_dim() * (acc + kv), 0),
        Op::KvCommit(a) | Op::KvCommitBatch(a) => {
            let kept: usize = a.segments.iter().map(|s| s.1.div_ceil(2)).sum();
            (2 * kept * 2 * a.spec.kv_dim() * kv, 0)
        }
        Op::KvCopy(a) => {
            let rows: usize = a.segments.iter().map(|s| s.0 + s.1).sum();
            (2 * rows * 2 * a.spec.kv_dim() * kv, 0)
        }
        Op::Attention(a) => {
            let rows: usize = a.segments.iter().map(|s| s.0 + a.staged + s.1).sum();
            let pairs = visible_pairs(&a, masks);
            (
                rows * 2 * a.spec.kv_dim() * kv + a.rows() * a.spec.q_dim() * (acc + act),
                pairs * (4 * a.spec.q_dim() + 10 * a.spec.heads),
            )
        }
        // A row is read once, whatever an algorithm does; what the host sends is left out.
        Op::LogitsStats { rows, vocab } => (rows * (vocab * acc + 3 * acc + 4), 12 * rows * vocab),
        Op::TopK { rows, vocab, k } => (rows * (vocab * acc + k * (acc + 4)), rows * vocab),
        Op::Sample { rows, vocab, n, .. } => (rows * (vocab * acc + 4 * n), 11 * rows * vocab),
        Op::Distribution { rows, vocab, .. } => (2 * rows * vocab * acc, 12 * rows * vocab),
        Op::Forbid { rows, each, .. } => (rows * each * acc, 0),
        Op::Penalize { rows, each, .. } => (rows * each * 2 * acc, rows * each),
        // Few are taken and written; all tokens are looked at for an end.
        Op::Unmask { sequences, rows, length, .. } => (sequences * (rows * (3 * acc + 12) + 4 * length), 0),
        Op::VerifyTree { sequences, nodes, by: Verify::Match, .. } => (12 * sequences * nodes, 0),
        // One rejection in a sequence, and one draw.
        Op::VerifyTree { sequences, vocab, .. } => (2 * sequences * vocab * acc, 6 * sequences * vocab),
        // Each adapter that has rows is read once, whatever their number.
        Op::ShrinkRows { groups, input, ranks } => {
            let (rows, used) = grouped(groups);
            (rows * (input * act + ranks * acc) + used * input * ranks * acc, 2 * rows * input * ranks)
        }
        Op::ExpandRows { groups, output, part } => {
            let (rows, used) = grouped(groups);
            ((rows * (2 * output + part.n) + used * output * part.n) * acc, 2 * rows * output * part.n)
        }
    };
    Cost { bytes: bytes as f64, flops: flops as f64 }
}
