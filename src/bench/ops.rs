//! The table.

use std::fmt;

use super::shapes::{SHAPES, Shape};
use crate::backend::{AttnSpec, Order, Ranks, Score};
use crate::dtype::DType::{self, *};
use crate::model::config::Activation::{self, GeluTanh, Silu};

/// Which staged rows see which; the owned form of [`Mask`](crate::backend::Mask).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum MaskKind {
    Causal,
    Full,
    /// A tree in which row i hangs below row (i - 1) / 2.
    Tree,
    Blocks {
        block: usize,
        offset: usize,
    },
}

/// What the operations on caches share: the committed rows of each sequence and those of the pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attn {
    /// Heads, scale and window.
    pub spec: AttnSpec,
    /// (committed rows, rows of the pass) of each sequence.
    pub segments: &'static [(usize, usize)],
    /// Rows that every sequence has staged before.
    pub staged: usize,
    /// Of every sequence.
    pub mask: MaskKind,
}

impl Attn {
    /// Rows of the pass.
    pub fn rows(&self) -> usize {
        self.segments.iter().map(|s| s.1).sum()
    }
}

/// An operation of the backend with its sizes. `rows` are rows of activations, `d` their width; of texts to unmask the masked
/// positions of each. Trees to verify are binary; `Rule::Match` looks at no vocabulary. `groups` are rows that share an adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Op {
    Embed { dtype: DType, vocab: usize, d: usize, rows: usize },
    GatherRows { from: usize, rows: usize, d: usize },
    Add { rows: usize, d: usize },
    AddActivated { rows: usize, d: usize, act: Activation },
    Operand { rows: usize, d: usize },
    RmsNorm { rows: usize, d: usize },
    AddRmsNorm { rows: usize, d: usize },
    AddNormed { rows: usize, d: usize },
    HeadNorm { rows: usize, heads: usize, head_dim: usize },
    Linear { dtype: DType, rows: usize, input: usize, output: usize, bias: bool },
    Qkv { dtype: DType, rows: usize, input: usize, q: usize, kv: usize, bias: bool },
    Glu { rows: usize, d: usize, act: Activation },
    LinearGlu { dtype: DType, rows: usize, input: usize, output: usize, act: Activation },
    Rope { rows: usize, heads: usize, head_dim: usize },
    RopeStage(Attn),
    KvStage(Attn),
    KvCommit(Attn),
    KvCommitBatch(Attn),
    KvCopy(Attn),
    Attention(Attn),
    LogitsStats { rows: usize, vocab: usize },
    TopK { rows: usize, vocab: usize, k: usize },
    Sample { rows: usize, vocab: usize, n: usize, top_k: u32, top_p: f32 },
    Distribution { rows: usize, vocab: usize, top_k: u32, top_p: f32 },
    Penalize { rows: usize, vocab: usize, each: usize },
    Forbid { rows: usize, vocab: usize, each: usize },
    Unmask { sequences: usize, rows: usize, length: usize, score: Score },
    VerifyTree { sequences: usize, nodes: usize, vocab: usize, by: Verify },
    ShrinkRows { groups: &'static [usize], input: usize, ranks: usize },
    ExpandRows { groups: &'static [usize], output: usize, part: Ranks },
}

/// The form of [`Rule`](crate::backend::Rule) without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verify {
    Match,
    Reject { replacement: bool, order: Order },
}

impl Verify {
    /// All there are.
    pub const ALL: [Self; 5] = [
        Self::Match,
        Self::Reject { replacement: false, order: Order::RootFirst },
        Self::Reject { replacement: true, order: Order::RootFirst },
        Self::Reject { replacement: false, order: Order::LeavesFirst },
        Self::Reject { replacement: true, order: Order::LeavesFirst },
    ];
}

impl Op {
    /// Name of the trait's method.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::GatherRows { .. } => "gather_rows",
            Op::Add { .. } => "add",
            Op::AddActivated { .. } => "add_activated",
            Op::Operand { .. } => "operand",
            Op::RmsNorm { .. } => "rms_norm",
            Op::AddRmsNorm { .. } => "add_rms_norm",
            Op::AddNormed { .. } => "add_normed",
            Op::HeadNorm { .. } => "head_norm",
            Op::Linear { .. } => "linear",
            Op::Qkv { .. } => "qkv",
            Op::Glu { .. } => "glu",
            Op::LinearGlu { .. } => "linear_glu",
            Op::Rope { .. } => "rope",
            Op::RopeStage(_) => "rope_stage",
            Op::KvStage(_) => "kv_stage",
            Op::KvCommit(_) => "kv_commit",
            Op::KvCommitBatch(_) => "kv_commit_batch",
            Op::KvCopy(_) => "kv_copy",
            Op::Attention(_) => "attention",
            Op::LogitsStats { .. } => "logits_stats",
            Op::TopK { .. } => "top_k",
            Op::Sample { .. } => "sample",
            Op::Distribution { .. } => "distribution",
            Op::Penalize { .. } => "penalize",
            Op::Forbid { .. } => "forbid",
            Op::Unmask { .. } => "unmask",
            Op::VerifyTree { .. } => "verify_tree",
            Op::ShrinkRows { .. } => "shrink_rows",
            Op::ExpandRows { .. } => "expand_rows",
        }
    }

    /// The weights' type, where there are weights.
    pub fn dtype(&self) -> Option<DType> {
        match *self {
            Op::Embed { dtype, .. }
            | Op::Linear { dtype, .. }
            | Op::Qkv { dtype, .. }
            | Op::LinearGlu { dtype, .. } => Some(dtype),
            _ => None,
        }
    }

    /// The same with weights of another type.
    pub fn with_weights(mut self, to: DType) -> Self {
        if let Op::Embed { dtype, .. }
        | Op::Linear { dtype, .. }
        | Op::Qkv { dtype, .. }
        | Op::LinearGlu { dtype, .. } = &mut self
        {
            *dtype = to;
        }
        self
    }

    /// Whether it multiplies activations with a quantised matrix, so that a backend may round them to int8.
    pub fn multiplies_quantized(&self) -> bool {
        !matches!(self, Op::Embed { .. }) && self.dtype().is_some_and(DType::is_quantized)
    }

    /// Whether its result is an operand of a product to come, kept in the backend's type of those.
    pub fn gives_operands(&self) -> bool {
        let rows = matches!(self, Op::Operand { .. } | Op::RmsNorm { .. } | Op::AddRmsNorm { .. } | Op::Glu { .. });
        rows || matches!(self, Op::LinearGlu { .. }) || self.attn().is_some()
    }

    /// The caches' part, where there is one.
    pub fn attn(&self) -> Option<&Attn> {
        match self {
            Op::RopeStage(a) | Op::KvStage(a) | Op::Attention(a) => Some(a),
            Op::KvCommit(a) | Op::KvCommitBatch(a) | Op::KvCopy(a) => Some(a),
            _ => None,
        }
    }

    /// Length of the longest sum behind one output: rounding errors grow with its root.
    pub fn reduction(&self) -> usize {
        match *self {
            Op::RmsNorm { d, .. } | Op::AddRmsNorm { d, .. } | Op::AddNormed { d, .. } => d,
            Op::HeadNorm { head_dim, .. } => head_dim,
            Op::Linear { input, .. } | Op::Qkv { input, .. } | Op::LinearGlu { input, .. } => input,
            Op::LogitsStats { vocab, .. } => vocab,
            Op::ShrinkRows { input, .. } => input,
            Op::ExpandRows { part, .. } => part.n,
            // A weight's exponent is rounded three times before it is one.
            Op::Distribution { .. } => 9,
            _ => self
                .attn()
                .map_or(1, |a| a.spec.head_dim + a.segments.iter().map(|s| s.0 + a.staged + s.1).max().unwrap_or(0)),
        }
    }
}

/// The rank, and which of the columns it is.
pub(super) fn part(p: Ranks) -> String {
    if p == Ranks::all(p.n) { p.n.to_string() } else { format!("{}+{}/{}", p.first, p.n, p.stride) }
}

/// Rows, and how many groups share them.
pub(super) fn grouped(groups: &[usize]) -> String {
    let (rows, n) = (groups.iter().sum::<usize>(), groups.len());
    if n == 1 { rows.to_string() } else { format!("{rows} in {n}") }
}

/// The sizes, as a table shows them.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Embed { dtype, vocab, d, rows } => write!(f, "{dtype} {rows} of {vocab}x{d}"),
            Op::GatherRows { from, rows, d } => write!(f, "{rows} of {from}x{d}"),
            Op::Add { rows, d }
            | Op::Operand { rows, d }
            | Op::RmsNorm { rows, d }
            | Op::AddRmsNorm { rows, d }
            | Op::AddNormed { rows, d } => write!(f, "{rows}x{d}"),
            Op::HeadNorm { rows, heads, head_dim } | Op::Rope { rows, heads, head_dim } => {
                write!(f, "{rows}x{heads}x{head_dim}")
            }
            Op::Linear { dtype, rows, input, output, bias } => {
                write!(f, "{dtype} {rows}x{input}>{output}{}", if bias { " bias" } else { "" })
            }
            Op::Qkv { dtype, rows, input, q, kv, bias } => {
                write!(f, "{dtype} {rows}x{input}>{q}+2x{kv}{}", if bias { " bias" } else { "" })
            }
            Op::Glu { rows, d, act } | Op::AddActivated { rows, d, act } => write!(f, "{act:?} {rows}x{d}"),
            Op::LinearGlu { dtype, rows, input, output, act } => write!(f, "{dtype} {act:?} {rows}x{input}>2x{output}"),
            Op::LogitsStats { rows, vocab } => write!(f, "{rows}x{vocab}"),
            Op::TopK { rows, vocab, k } => write!(f, "{k} of {rows}x{vocab}"),
            Op::Sample { rows, vocab, top_k, top_p, n } => {
                write!(f, "{n} of {rows}x{vocab} top-k {top_k} top-p {top_p}")
            }
            Op::Distribution { rows, vocab, top_k, top_p } => write!(f, "{rows}x{vocab} top-k {top_k} top-p {top_p}"),
            Op::Penalize { rows, vocab, each } | Op::Forbid { rows, vocab, each } => {
                write!(f, "{each} in each of {rows}x{vocab}")
            }
            Op::Unmask { sequences, rows, length, score } => {
                write!(f, "{rows} of {sequences}x{length} by {score:?}")
            }
            Op::VerifyTree { sequences, nodes, vocab, by: Verify::Reject { replacement, order } } => {
                let of = if replacement { " replaced" } else { "" };
                write!(f, "{sequences} of {nodes}x{vocab} {order:?}{of}")
            }
            Op::VerifyTree { sequences, nodes, .. } => write!(f, "{sequences} of {nodes} match"),
            Op::ShrinkRows { groups, input, ranks } => write!(f, "{}x{input}>{ranks}", grouped(groups)),
            Op::ExpandRows { groups, output, part: p } => write!(f, "{}x{}>{output}", grouped(groups), part(p)),
            Op::RopeStage(a)
            | Op::KvStage(a)
            | Op::KvCommit(a)
            | Op::KvCommitBatch(a)
            | Op::KvCopy(a)
            | Op::Attention(a) => {
                let s = a.spec;
                write!(f, "{}/{}x{}", s.heads, s.kv_heads, s.head_dim)?;
                for (past, rows) in a.segments {
                    write!(f, " {past}+{rows}")?;
                }
                if a.staged > 0 {
                    write!(f, " behind {} staged", a.staged)?;
                }
                match a.mask {
                    MaskKind::Causal => {}
                    MaskKind::Blocks { block, offset } => write!(f, " blocks of {block} less {offset}")?,
                    mask => write!(f, " {mask:?}")?,
                }
                s.window.map_or(Ok(()), |w| write!(f, " window {w}"))
            }
        }
    }
}

/// An operation at the sizes of a real model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case<O = Op> {
    /// What and how large.
    pub op: O,
    /// The model with these sizes.
    pub model: &'static str,
    /// Too large for a test.
    pub large: bool,
}

fn spec(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttnSpec {
    AttnSpec { heads, kv_heads, head_dim, scale: (head_dim as f32).powf(-0.5), window }
}

/// The operations of a token, of a speculated tree and of a prompt in real models.
pub fn realistic() -> Vec<Case> {
    let mut v = Vec::new();
    for m in &SHAPES[1..] {
        let Shape { dtype, d, ffn, heads, kv_heads, head_dim, bias, .. } = *m;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let mut ops = Vec::new();
        for rows in [1, 8, 64, 512] {
            ops.extend([
                Op::Qkv { dtype, rows, input: d, q, kv, bias },
                Op::Linear { dtype, rows, input: q, output: d, bias: false },
                Op::LinearGlu { dtype, rows, input: d, output: ffn, act: Silu },
                Op::Linear { dtype, rows, input: ffn, output: d, bias: false },
                Op::AddRmsNorm { rows, d },
                Op::RmsNorm { rows, d },
                Op::Glu { rows, d: ffn, act: Silu },
                Op::AddActivated { rows, d, act: Silu },
                Op::Operand { rows, d },
                Op::Rope { rows, heads, head_dim },
            ]);
            if rows <= 8 {
                ops.push(Op::Linear { dtype: m.head, rows, input: d, output: m.vocab, bias: false });
            }
        }
        let mut attn = |segments, mask, f: fn(Attn) -> Op| {
            ops.push(f(Attn { spec: spec(heads, kv_heads, head_dim, None), segments, staged: 0, mask }))
        };
        attn(&[(128, 1)], MaskKind::Causal, Op::Attention);
        attn(&[(1024, 1)], MaskKind::Causal, Op::Attention);
        attn(&[(1024, 8)], MaskKind::Tree, Op::Attention);
        attn(&[(1024, 32)], MaskKind::Full, Op::Attention);
        attn(&[(1024, 96)], MaskKind::Blocks { block: 32, offset: 0 }, Op::Attention);
        attn(&[(0, 512)], MaskKind::Causal, Op::Attention);
        attn(&[(128, 1)], MaskKind::Causal, Op::RopeStage);
        attn(&[(0, 512)], MaskKind::Causal, Op::RopeStage);
        attn(&[(1024, 32)], MaskKind::Tree, Op::KvCommit);
        attn(&[(1024, 32); 4], MaskKind::Tree, Op::KvCommitBatch);
        let vocab = m.vocab;
        for rows in [1, 8] {
            ops.extend([
                Op::LogitsStats { rows, vocab },
                Op::TopK { rows, vocab, k: 32 },
                Op::Sample { rows, vocab, n: 1, top_k: 0, top_p: 1.0 },
                Op::Sample { rows, vocab, n: 1, top_k: 50, top_p: 0.95 },
                Op::Sample { rows, vocab, n: 4, top_k: 0, top_p: 0.95 },
                Op::Distribution { rows, vocab, top_k: 0, top_p: 0.95 },
            ]);
        }
        ops.extend([Op::Penalize { rows: 8, vocab, each: 64 }, Op::Forbid { rows: 64, vocab, each: 1 }]);
        ops.extend([1, 32].map(|sequences| Op::Unmask { sequences, rows: 64, length: 512, score: Score::Entropy }));
        ops.push(Op::VerifyTree { sequences: 32, nodes: 64, vocab, by: Verify::Match });
        ops.extend(Verify::ALL[1..].iter().map(|by| Op::VerifyTree { sequences: 4, nodes: 8, vocab, by: *by }));
        ops.push(Op::Embed { dtype: m.head, vocab: m.vocab, d, rows: 512 });
        ops.push(Op::GatherRows { from: 512, rows: 8, d });
        // A decoding pass of rows with one adapter, and with one each. q, k and v stack their A, gate and up theirs.
        for groups in [&[1][..], &[8], &[1; 8], &[64], &[1; 64]] {
            for n in [8, 64] {
                ops.extend([
                    Op::ShrinkRows { groups, input: d, ranks: 3 * n },
                    Op::ExpandRows { groups, output: q, part: Ranks { stride: 3 * n, first: 0, n } },
                    Op::ExpandRows { groups, output: ffn, part: Ranks { stride: 2 * n, first: n, n } },
                    Op::ShrinkRows { groups, input: ffn, ranks: n },
                    Op::ExpandRows { groups, output: d, part: Ranks::all(n) },
                ]);
            }
        }
        v.extend(ops.into_iter().map(|op| Case { op, model: m.name, large: m.large }));
    }
    // What a GPU's libraries are measured by: an 8B model in bf16, and long contexts.
    let long = |segments, mask| Op::Attention(Attn { spec: spec(32, 8, 128, None), segments, staged: 0, mask });
    let mut ops = vec![
        long(&[(4096, 1)], MaskKind::Causal),
        long(&[(4096, 32)], MaskKind::Tree),
        long(&[(0, 4096)], MaskKind::Causal),
    ];
    for rows in [1, 32, 512, 4096] {
        ops.extend([4096, 14336].map(|output| Op::Linear { dtype: BF16, rows, input: 4096, output, bias: false }));
    }
    v.extend(ops.into_iter().map(|op| Case { op, model: "Llama-3-8B", large: true }));
    // Every stored type at the size of one matrix.
    for dtype in DType::ALL {
        for rows in [1, 8] {
            let op = Op::Linear { dtype, rows, input: 1024, output: 3072, bias: false };
            v.push(Case { op, model: "Qwen3-0.6B", large: true });
        }
    }
    v
}

/// Small sizes off every multiple that a kernel may like.
pub fn odd() -> Vec<Op> {
    let mut v = Vec::new();
    for dtype in DType::ALL {
        // Block types need whole blocks; plain types may end anywhere.
        let widths: &[usize] = match dtype.block_len() {
            256 => &[256, 768],
            32 => &[32, 96, 288],
            _ => &[1, 7, 33, 130],
        };
        for (i, &input) in widths.iter().enumerate() {
            for (j, rows) in [1, 3, 8, 17].into_iter().enumerate() {
                let output = [1, 5, 16, 31, 67, 100][(i + j) % 6];
                v.push(Op::Linear { dtype, rows, input, output, bias: j % 2 == 1 });
            }
            v.push(Op::Embed { dtype, vocab: 37, d: input, rows: 5 });
            v.push(Op::Qkv { dtype, rows: 1 + 2 * i, input, q: 48, kv: 12, bias: i == 1 });
            v.push(Op::Qkv { dtype, rows: 5, input, q: 33, kv: 7, bias: i == 0 });
            v.push(Op::LinearGlu { dtype, rows: 1 + 3 * i, input, output: 29, act: Silu });
            v.push(Op::LinearGlu { dtype, rows: 9, input, output: 64, act: GeluTanh });
        }
    }
    // More rows than one tile of any kernel.
    v.push(Op::Linear { dtype: Q4_1, rows: 70, input: 64, output: 40, bias: true });
    v.push(Op::LinearGlu { dtype: Q8_0, rows: 131, input: 64, output: 40, act: Silu });
    for (rows, d) in [(1, 1), (1, 576), (3, 7), (5, 33), (2, 65), (17, 130)] {
        v.extend([
            Op::GatherRows { from: rows + 3, rows, d },
            Op::Add { rows, d },
            Op::RmsNorm { rows, d },
            Op::AddRmsNorm { rows, d },
            Op::AddNormed { rows, d },
            Op::Glu { rows, d, act: Silu },
            Op::Glu { rows, d, act: GeluTanh },
            Op::AddActivated { rows, d, act: Silu },
            Op::AddActivated { rows, d, act: GeluTanh },
            Op::Operand { rows, d },
        ]);
    }
    for (rows, heads, head_dim) in [(1, 1, 2), (3, 3, 6), (2, 5, 64), (7, 2, 80), (1, 3, 128)] {
        v.extend([Op::HeadNorm { rows, heads, head_dim }, Op::Rope { rows, heads, head_dim }]);
    }
    let specs = [spec(1, 1, 8, None), spec(9, 3, 64, None), spec(4, 1, 40, Some(5)), spec(6, 2, 16, Some(1))];
    let segments: [&'static [(usize, usize)]; 7] =
        [&[(0, 1)], &[(1, 1)], &[(0, 5)], &[(31, 9)], &[(130, 3)], &[(3, 2), (0, 4), (40, 1)], &[(7, 70)]];
    for spec in specs {
        for segments in segments {
            for mask in [MaskKind::Causal, MaskKind::Full, MaskKind::Tree] {
                v.extend([0, 70].map(|staged| Op::Attention(Attn { spec, segments, staged, mask })));
            }
            let a = Attn { spec, segments, staged: 0, mask: MaskKind::Causal };
            v.extend([Op::RopeStage(a), Op::KvStage(a), Op::KvCommit(a), Op::KvCommitBatch(a), Op::KvCopy(a)]);
            let a = Attn { staged: 3, ..a };
            v.extend([Op::RopeStage(a), Op::KvStage(a)]);
        }
    }
    for (rows, vocab) in [(1, 2), (3, 7), (2, 64), (5, 203), (2, 1030), (1, 4100)] {
        v.push(Op::LogitsStats { rows, vocab });
        v.push(Op::Penalize { rows, vocab, each: vocab.div_ceil(2) });
        for k in [1, 5, 64] {
            v.push(Op::TopK { rows, vocab, k: k.min(vocab) });
        }
        for (top_k, top_p) in [(0, 1.0), (5, 1.0), (0, 0.9), (40, 0.6), (0, 1e-6)] {
            v.push(Op::Distribution { rows, vocab, top_k, top_p });
            v.push(Op::Sample { rows, vocab, n: 1 + rows % 3, top_k, top_p });
        }
    }
    for (sequences, nodes, vocab) in [(1, 1, 3), (5, 2, 7), (9, 15, 64), (3, 40, 1030)] {
        v.extend(Verify::ALL.map(|by| Op::VerifyTree { sequences, nodes, vocab, by }));
    }
    // Further rows stand at the end: a row's number is the seed of its inputs.
    for (spec, segments) in specs.into_iter().flat_map(|spec| segments.map(|segments| (spec, segments))) {
        let mask = MaskKind::Blocks { block: 7, offset: 3 };
        v.extend([0, 70].map(|staged| Op::Attention(Attn { spec, segments, staged, mask })));
    }
    for (rows, vocab) in [(1, 2), (3, 7), (2, 64), (5, 203)] {
        v.push(Op::Forbid { rows, vocab, each: vocab / 2 });
    }
    for (sequences, rows, length) in [(1, 1, 1), (3, 7, 20), (2, 300, 700)] {
        v.extend([Score::Entropy, Score::Confidence].map(|score| Op::Unmask { sequences, rows, length, score }));
    }
    let groups: [&'static [usize]; 6] = [&[1], &[17], &[1; 5], &[0, 3, 0, 0, 9, 1], &[0, 2, 0], &[70, 1]];
    for (i, groups) in groups.into_iter().enumerate() {
        for (j, n) in [1, 3, 8, 16, 33, 100, 256].into_iter().enumerate() {
            // Inputs across one vector and across four, and outputs that no share of a thread divides.
            let (input, output) = ([1, 7, 75, 130, 576][(i + j) % 5], [5, 1, 41, 67, 515][(i + 2 * j) % 5]);
            let parts = [Ranks::all(n), Ranks { stride: 2 * n + 3, first: n + 1, n }];
            v.push(Op::ShrinkRows { groups, input, ranks: n });
            v.extend(parts.map(|part| Op::ExpandRows { groups, output, part }));
        }
    }
    v
}
