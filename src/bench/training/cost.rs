//! What each operation must move and compute.

use super::ops::{Loss, TrainOp};
use crate::perf::Cost;

/// Bytes of one element where activations and sums are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub act: usize,
    pub acc: usize,
}

/// Cost of `op` with a matrix of `weights` bytes; `pairs` are of a row and a row that it sees. Transcendental functions count as
/// eight operations; what is added to is read and written.
pub(super) fn cost(op: &TrainOp, weights: usize, pairs: usize, s: Sizes) -> Cost {
    use TrainOp::*;
    let Sizes { act, acc } = s;
    let added = |write| if write == crate::backend::Write::Add { 2 } else { 1 };
    let rows = |groups: &[usize]| groups.iter().sum::<usize>();
    let (bytes, flops) = match *op {
        SetWeight { input, output } => (weights + input * output * acc, 0),
        Copy { n } => (2 * n * acc, 0),
        Zero { n } => (n * acc, 0),
        Axpy { n } => (3 * n * acc, 2 * n),
        SqNorm { n } => (n * acc, 2 * n),
        LinearFwd { rows, input, output, write, .. } => {
            (weights + rows * (input * act + added(write) * output * acc), 2 * rows * input * output)
        }
        LinearBwdX { rows, input, output, write, .. } => {
            (weights + rows * (added(write) * input + output) * acc, 2 * rows * input * output)
        }
        LinearLoraFwd { rows, input, output, part, write, .. } => (
            weights + rows * (input * act + (added(write) * output + part.n) * acc) + output * part.n * acc,
            2 * rows * output * (input + part.n),
        ),
        LinearsBwdX { rows, input, output, linears, ranks, .. } => (
            weights * linears + (rows * (input + output * linears + ranks) + ranks * input) * acc,
            2 * rows * input * (output * linears + ranks),
        ),
        LinearBwdW { rows, input, output } => {
            (2 * input * output * acc + rows * (input * act + output * acc), 2 * rows * input * output)
        }
        ColumnSums { rows, d } => ((rows + 2) * d * acc, rows * d),
        RmsNormBwd { rows, d, dw, write } => {
            let (bytes, flops) = if dw { (2 * d, 3 * rows * d) } else { (0, 0) };
            (((2 + added(write)) * rows * d + d + bytes) * acc, 10 * rows * d + flops)
        }
        MulRows { m, n, b } => ((m * n + b * (m + n)) * acc, 2 * b * m * n),
        SubtractOuter { n, b } => ((2 * n * n + b * n) * acc, 2 * b * n * n),
        MeanRows { means, each, d } => (means * (each + 1) * d * acc, means * each * d),
        LayerNorm { rows, d } => ((rows * d + 2 * d) * acc + rows * d * act, 8 * rows * d),
        LayerNormBwd { rows, d, dw, write } => {
            let (bytes, flops) = if dw { (2 * d, 4 * rows * d) } else { (0, 0) };
            (((2 + added(write)) * rows * d + d + bytes) * acc, 15 * rows * d + flops)
        }
        Gelu { n } => (n * (acc + act), 10 * n),
        GeluBwd { n } => (3 * n * acc, 22 * n),
        AddScaled { rows, d } => ((3 * rows * d + d) * acc, 2 * rows * d),
        AddScaledBwd { rows, d, dw } => {
            let (bytes, flops) = if dw { (rows * d + 2 * d, 2 * rows * d) } else { (0, 0) };
            ((2 * rows * d + d + bytes) * acc, rows * d + flops)
        }
        GluBwd { rows, d, .. } => (5 * rows * d * acc, 16 * rows * d),
        Attend(a) => {
            let (q, kv, n) = (a.spec.q_dim(), a.spec.kv_dim(), a.rows());
            (n * (q * (acc + act) + (2 * kv + a.spec.heads) * acc), pairs * (4 * q + 10 * a.spec.heads))
        }
        AttendBwd(a) => {
            let (q, kv, n) = (a.spec.q_dim(), a.spec.kv_dim(), a.rows());
            (n * (q * (3 * acc + act) + (4 * kv + a.spec.heads) * acc), pairs * (10 * q + 12 * a.spec.heads))
        }
        ScatterRows { rows, d, .. } | EmbedBwd { rows, d, .. } => (3 * rows * d * acc, 2 * rows * d),
        LoraShrink { groups, input, ranks } => {
            let n = rows(groups);
            (n * (input * act + ranks * acc) + groups.len() * input * ranks * acc, 2 * n * input * ranks)
        }
        LoraExpand { groups, output, part } => {
            let n = rows(groups);
            ((n * (2 * output + part.n) + groups.len() * output * part.n) * acc, 2 * n * output * part.n)
        }
        LoraExpandBwd { groups, output, part } => {
            let n = rows(groups);
            ((n * (output + part.n) + groups.len() * output * part.n) * acc, 2 * n * output * part.n)
        }
        LoraShrinkBwd { groups, input, ranks } => {
            let n = rows(groups);
            ((n * (2 * input + ranks) + groups.len() * input * ranks) * acc, 2 * n * input * ranks)
        }
        LoraBwdB { rows, output, part } => {
            ((rows * (output + part.n) + 2 * output * part.n) * acc, 2 * rows * output * part.n)
        }
        LoraBwdA { rows, input, ranks } => {
            (rows * (ranks * acc + input * act) + 2 * ranks * input * acc, 2 * rows * input * ranks)
        }
        // Read for the softmax, read again and written: no pass over a vocabulary stays in registers.
        LossRows { rows, vocab, loss } => match loss {
            Loss::Hard | Loss::TopK { .. } | Loss::Entropy => (3 * rows * vocab * acc, 20 * rows * vocab),
            _ => (5 * rows * vocab * acc, 40 * rows * vocab),
        },
        SoftmaxRows { rows, vocab } => (3 * rows * vocab * acc, 20 * rows * vocab),
        SmoothL1 { rows, d } => (3 * rows * d * acc, 8 * rows * d),
        Optimize { n, rule } => {
            let arrays = 3 + 2 * rule.update.states() + usize::from(rule.reference);
            (arrays * n * acc, 4 * n * (1 + rule.update.states()))
        }
    };
    Cost { bytes: bytes as f64, flops: flops as f64 }
}
