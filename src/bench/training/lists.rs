//! The table.

use super::ops::{Loss, Rule, See, SelfAttn, TrainOp};
use crate::backend::{AttnSpec, Ranks, Update, Write};
use crate::bench::Case;
use crate::bench::shapes::Shape;
use crate::dtype::DType::{self, *};
use crate::model::config::Activation::{GeluTanh, Silu};
use TrainOp::*;

/// Every rule, with settings that are no defaults.
pub const UPDATES: [Update; 5] = [
    Update::Sgd,
    Update::Momentum { mu: 0.9 },
    Update::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 },
    Update::Optimistic,
    Update::OptimisticAdam { beta1: 0.8, beta2: 0.99, eps: 1e-6 },
];

/// Every loss, with `k` tokens in those that have some.
pub fn losses(k: usize) -> [Loss; 8] {
    let top = |tail| Loss::TopK { k, tail };
    use Loss::*;
    [Hard, Soft, ForwardKl, ReverseKl, TotalVariation, top(false), top(true), Entropy]
}

fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> AttnSpec {
    AttnSpec { heads, kv_heads, head_dim, scale: (head_dim as f32).powf(-0.5), window: None }
}

/// Small sizes off every multiple that a kernel may like.
pub fn odd() -> Vec<TrainOp> {
    let mut v = Vec::new();
    for n in [1, 7, 33, 1000, 4099] {
        v.extend([Copy { n }, Zero { n }, Axpy { n }, SqNorm { n }]);
        for update in UPDATES {
            v.extend(
                [(false, false), (false, true), (true, true)]
                    .map(|(reference, l1)| Optimize { n, rule: Rule { update, reference, l1 } }),
            );
        }
    }
    linears(&mut v);
    for (rows, d) in [(1, 1), (1, 576), (3, 7), (5, 33), (2, 65), (130, 40)] {
        v.extend([
            ColumnSums { rows, d },
            SmoothL1 { rows, d },
            GluBwd { rows, d, act: Silu },
            GluBwd { rows, d, act: GeluTanh },
            ScatterRows { into: rows + 3, rows, d },
            EmbedBwd { vocab: 5, rows, d },
            RmsNormBwd { rows, d, dw: true, write: Write::Add },
            RmsNormBwd { rows, d, dw: true, write: Write::Set },
        ]);
        // One column cancels: its gradient is nothing beside its terms.
        if d > 1 {
            let of = |write| RmsNormBwd { rows, d, dw: false, write };
            v.extend([of(Write::Add), of(Write::Set)]);
        }
    }
    for spec in [spec(1, 1, 8), spec(4, 2, 24), spec(9, 3, 64), spec(3, 1, 96), spec(2, 2, 128)] {
        let lens: [&'static [usize]; 5] = [&[1], &[5], &[3, 1, 9], &[33, 40], &[130]];
        for (i, lens) in lens.into_iter().enumerate() {
            let see = [See::Causal, See::Window(1 + 3 * i), See::Full, See::Blocks(4), See::Tree];
            for see in see {
                let a = SelfAttn { spec, lens, see };
                v.extend([Attend(a), AttendBwd(a)]);
            }
        }
    }
    loras(&mut v);
    for (rows, vocab) in [(1, 2), (3, 7), (9, 64), (5, 203), (130, 33), (2, 1030), (1, 4100)] {
        v.push(SoftmaxRows { rows, vocab });
        for k in [1, 5, 64] {
            v.extend([false, true].map(|tail| LossRows { rows, vocab, loss: Loss::TopK { k: k.min(vocab), tail } }));
        }
        v.extend(losses(1).into_iter().filter(|l| !matches!(l, Loss::TopK { .. })).map(|loss| LossRows {
            rows,
            vocab,
            loss,
        }));
    }
    encoders(&mut v);
    for (m, n, b) in [(1, 1, 1), (7, 33, 1), (65, 576, 1), (40, 131, 5), (3, 1030, 2)] {
        v.extend([MulRows { m, n, b }, SubtractOuter { n: m, b }, MeanRows { means: m, each: b, d: n }]);
    }
    v
}

fn encoders(v: &mut Vec<TrainOp>) {
    for (rows, d) in [(1, 1), (1, 576), (3, 7), (5, 33), (2, 65), (130, 40)] {
        let bwd = |dw, write| LayerNormBwd { rows, d, dw, write };
        v.extend([
            LayerNorm { rows, d },
            bwd(true, Write::Add),
            bwd(true, Write::Set),
            AddScaled { rows, d },
            AddScaledBwd { rows, d, dw: true },
            AddScaledBwd { rows, d, dw: false },
        ]);
        // One column is its own mean.
        if d > 1 {
            v.extend([bwd(false, Write::Add), bwd(false, Write::Set)]);
        }
    }
    v.extend([1, 7, 33, 1000, 4099].into_iter().flat_map(|n| [Gelu { n }, GeluBwd { n }]));
}

fn linears(v: &mut Vec<TrainOp>) {
    for dtype in DType::ALL {
        // Block types need whole blocks; plain types may end anywhere.
        let widths: &[usize] = match dtype.block_len() {
            256 => &[256, 768],
            32 => &[32, 96, 288],
            _ => &[1, 7, 33, 130],
        };
        for (i, &input) in widths.iter().enumerate() {
            for (j, rows) in [1, 3, 17, 130].into_iter().enumerate() {
                let output = [1, 5, 16, 31, 67, 100][(i + j) % 6];
                let (write, other) = if j % 2 == 0 { (Write::Set, Write::Add) } else { (Write::Add, Write::Set) };
                v.push(LinearFwd { dtype, rows, input, output, bias: j % 3 == 1, write });
                v.push(LinearBwdX { dtype, rows, input, output, write: other });
                let n = [1, 3, 8][(i + j) % 3];
                let part = [Ranks::all(n), Ranks { stride: 2 * n + 3, first: n + 3, n }][j % 2];
                v.push(LinearLoraFwd { dtype, rows, input, output, part, write });
                v.push(LinearsBwdX { dtype, rows, input, output, linears: 1 + j % 3, ranks: [n, 0][(i + j) / 2 % 2] });
            }
        }
    }
    v.push(LinearFwd { dtype: F32, rows: 5, input: 40, output: 48, bias: true, write: Write::Set });
    for (i, rows) in [1, 3, 17, 64, 130].into_iter().enumerate() {
        for (input, output) in [(1, 1), (7, 33), (96, 40), (130, 67)] {
            v.push(LinearBwdW { rows: rows + i % 2, input, output });
        }
    }
    v.extend([(1, 1), (33, 7), (64, 48), (130, 67)].map(|(input, output)| SetWeight { input, output }));
}

fn loras(v: &mut Vec<TrainOp>) {
    const GROUPS: [&[usize]; 5] = [&[1], &[130], &[1, 1, 1, 1], &[5, 0, 17, 3], &[64, 66]];
    for (i, groups) in GROUPS.into_iter().enumerate() {
        let rows = groups.iter().sum();
        for (j, n) in [1, 3, 8].into_iter().enumerate() {
            let (input, output) = ([1, 33, 130, 96][(i + j) % 4], [40, 7, 67, 1, 128][(i + j) % 5]);
            // Alone, first of two, and last of three modules with one input.
            let parts =
                [Ranks::all(n), Ranks { stride: n + 5, first: 0, n }, Ranks { stride: 2 * n + 3, first: n + 3, n }];
            for part in parts {
                v.extend([
                    LoraExpand { groups, output, part },
                    LoraExpandBwd { groups, output, part },
                    LoraBwdB { rows, output, part },
                ]);
            }
            for ranks in [n, 3 * n] {
                v.extend([
                    LoraShrink { groups, input, ranks },
                    LoraShrinkBwd { groups, input, ranks },
                    LoraBwdA { rows, input, ranks },
                ]);
            }
        }
    }
}

/// What a step over 8 images of a ViT-B/16 does beside products and attention.
fn encoder() -> [TrainOp; 8] {
    let (rows, d, n) = (8 * 197, 768, 8 * 197 * 3072);
    [
        LayerNorm { rows, d },
        LayerNormBwd { rows, d, dw: true, write: Write::Add },
        LayerNormBwd { rows, d, dw: false, write: Write::Add },
        Gelu { n },
        GeluBwd { n },
        AddScaled { rows, d },
        AddScaledBwd { rows, d, dw: true },
        AddScaledBwd { rows, d, dw: false },
    ]
}

/// Rows of a step in [`realistic`].
const ROWS: usize = 512;
/// Rows whose logits are there at one time.
const TILE: usize = 64;
/// What an adapter of rank 8 on all matrices of SmolLM2-135M has, about.
const VALUES: usize = 2_400_000;

/// The operations of a step over 512 rows of real models.
pub fn realistic() -> Vec<Case<TrainOp>> {
    let mut v = Vec::new();
    for name in ["SmolLM2-135M", "Llama-3.2-1B"] {
        let Ok(&Shape { d, ffn, heads, kv_heads, head_dim, vocab, large, name: model, .. }) = Shape::named(name) else {
            continue;
        };
        let (dtype, rows) = (BF16, ROWS);
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let mut ops = Vec::new();
        for (input, output) in [(d, q), (d, kv), (q, d), (d, ffn), (ffn, d)] {
            ops.extend([
                LinearFwd { dtype, rows, input, output, bias: false, write: Write::Set },
                LinearBwdX { dtype, rows, input, output, write: Write::Set },
                LinearBwdW { rows, input, output },
                SetWeight { input, output },
            ]);
        }
        for (lens, see) in [(&[512][..], See::Causal), (&[128; 4], See::Causal), (&[512], See::Blocks(32))] {
            let a = SelfAttn { spec: spec(heads, kv_heads, head_dim), lens, see };
            ops.extend([Attend(a), AttendBwd(a)]);
        }
        ops.extend([
            RmsNormBwd { rows, d, dw: true, write: Write::Add },
            RmsNormBwd { rows, d, dw: false, write: Write::Add },
            GluBwd { rows, d: ffn, act: Silu },
            ScatterRows { into: rows, rows: TILE, d },
            SmoothL1 { rows, d },
            LinearFwd { dtype, rows: TILE, input: d, output: vocab, bias: false, write: Write::Set },
            LinearBwdX { dtype, rows: TILE, input: d, output: vocab, write: Write::Set },
            SoftmaxRows { rows: TILE, vocab },
        ]);
        ops.extend(losses(32).map(|loss| LossRows { rows: TILE, vocab, loss }));
        let stacked = Ranks { stride: 24, first: 0, n: 8 };
        for (input, output, part, write, linears, ranks) in [
            (d, q, stacked, Write::Set, 3, 24),
            (d, ffn, Ranks { stride: 16, first: 8, n: 8 }, Write::Set, 2, 16),
            (ffn, d, Ranks::all(8), Write::Add, 1, 8),
        ] {
            ops.push(LinearLoraFwd { dtype, rows, input, output, part, write });
            ops.push(LinearsBwdX { dtype, rows, input, output, linears, ranks });
        }
        if !large {
            ops.push(EmbedBwd { vocab, rows, d });
            ops.push(LinearBwdW { rows: TILE, input: d, output: vocab });
        }
        // q, k and v stack their A.
        let (part, stacked) = (Ranks { stride: 24, first: 0, n: 8 }, 24);
        for groups in [&[512][..], &[64; 8]] {
            ops.extend([
                LoraShrink { groups, input: d, ranks: stacked },
                LoraShrinkBwd { groups, input: d, ranks: stacked },
                LoraExpand { groups, output: q, part },
                LoraExpandBwd { groups, output: q, part },
                LoraExpand { groups, output: ffn, part: Ranks::all(8) },
                LoraExpandBwd { groups, output: ffn, part: Ranks::all(8) },
                LoraShrink { groups, input: ffn, ranks: 8 },
                LoraShrinkBwd { groups, input: ffn, ranks: 8 },
            ]);
        }
        ops.extend([
            LoraBwdA { rows, input: d, ranks: stacked },
            LoraBwdA { rows, input: ffn, ranks: 8 },
            LoraBwdB { rows, output: q, part },
            LoraBwdB { rows, output: ffn, part: Ranks::all(8) },
        ]);
        if !large {
            let n = VALUES;
            ops.extend([Copy { n }, Zero { n }, Axpy { n }, SqNorm { n }, ColumnSums { rows, d }]);
            ops.extend(UPDATES.map(|update| Optimize { n, rule: Rule { update, reference: false, l1: false } }));
            let update = UPDATES[2];
            ops.push(Optimize { n, rule: Rule { update, reference: true, l1: true } });
        }
        // A reward's inverse for features of this width, and the pooling of 16 answers of 32 tokens.
        ops.extend([
            MulRows { m: d, n: d, b: 1 },
            MulRows { m: d, n: d, b: 8 },
            SubtractOuter { n: d, b: 1 },
            MeanRows { means: 16, each: 32, d },
        ]);
        if !large {
            ops.extend(encoder());
        }
        for op in ops {
            let case = Case { op, model, large };
            // Matrices of equal sizes are one row.
            if !v.contains(&case) {
                v.push(case);
            }
        }
    }
    v
}
