//! The operations.

use std::fmt;

use super::super::ops::{grouped, part};
use crate::backend::{AttnSpec, Ranks, TreeMask, Update, Visible, Write};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::config::Activation;

/// The rules of [`Visible`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum See {
    Causal,
    Window(usize),
    Full,
    Blocks(usize),
    /// One tree of all rows in which row i hangs below row (i - 1) / 2.
    Tree,
}

/// Attention among the rows of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SelfAttn {
    /// Heads and scale.
    pub spec: AttnSpec,
    /// Rows of each packed sequence.
    pub lens: &'static [usize],
    /// Who sees whom in a sequence.
    pub see: See,
}

impl SelfAttn {
    /// Rows of all sequences.
    pub fn rows(&self) -> usize {
        self.lens.iter().sum()
    }

    /// Which rows each row sees.
    ///
    /// # Errors
    /// None for the trees made here.
    pub fn visible(&self) -> Result<Visible> {
        Ok(match self.see {
            See::Causal => Visible::causal(self.lens),
            See::Window(w) => {
                let positions: Vec<u32> = self.lens.iter().flat_map(|&n| 0..n as u32).collect();
                Visible::causal(self.lens).windowed(&positions, w)?
            }
            See::Full => Visible::full(self.lens),
            See::Blocks(n) => Visible::blocks(self.lens, n),
            See::Tree => {
                let parent = |i: u32| if i == 0 { TreeMask::ROOT } else { (i - 1) / 2 };
                Visible::tree(&TreeMask::new(&(0..self.rows() as u32).map(parent).collect::<Vec<_>>())?)
            }
        })
    }
}

/// [`Target`](crate::backend::Target) without its numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Loss {
    Hard,
    Soft,
    ForwardKl,
    ReverseKl,
    TotalVariation,
    TopK { k: usize, tail: bool },
    Entropy,
}

/// A rule of optimisation and what goes with it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Rule {
    pub update: Update,
    pub reference: bool,
    pub l1: bool,
}

/// An operation of training with its sizes. Groups of adapters are given by their rows; the part of a shrunk matrix that an
/// operation takes is its [`Ranks`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum TrainOp {
    SetWeight {
        input: usize,
        output: usize,
    },
    Copy {
        n: usize,
    },
    Zero {
        n: usize,
    },
    Axpy {
        n: usize,
    },
    SqNorm {
        n: usize,
    },
    LinearFwd {
        dtype: DType,
        rows: usize,
        input: usize,
        output: usize,
        bias: bool,
        write: Write,
    },
    LinearBwdX {
        dtype: DType,
        rows: usize,
        input: usize,
        output: usize,
        write: Write,
    },
    /// With a module of an adapter of rank `part.n`.
    LinearLoraFwd {
        dtype: DType,
        rows: usize,
        input: usize,
        output: usize,
        part: Ranks,
        write: Write,
    },
    /// Of `linears` linears that share a matrix here, and `ranks` ranks of adapters, 0 for none.
    LinearsBwdX {
        dtype: DType,
        rows: usize,
        input: usize,
        output: usize,
        linears: usize,
        ranks: usize,
    },
    LinearBwdW {
        rows: usize,
        input: usize,
        output: usize,
    },
    ColumnSums {
        rows: usize,
        d: usize,
    },
    RmsNormBwd {
        rows: usize,
        d: usize,
        dw: bool,
        write: Write,
    },
    GluBwd {
        rows: usize,
        d: usize,
        act: Activation,
    },
    /// A product of a matrix `[m, n]` with `b` vectors.
    MulRows {
        m: usize,
        n: usize,
        b: usize,
    },
    /// A matrix `[n, n]` loses `b` squares.
    SubtractOuter {
        n: usize,
        b: usize,
    },
    /// Means of runs of `each` rows, one after another.
    MeanRows {
        means: usize,
        each: usize,
        d: usize,
    },
    LayerNorm {
        rows: usize,
        d: usize,
    },
    LayerNormBwd {
        rows: usize,
        d: usize,
        dw: bool,
        write: Write,
    },
    Gelu {
        n: usize,
    },
    GeluBwd {
        n: usize,
    },
    AddScaled {
        rows: usize,
        d: usize,
    },
    AddScaledBwd {
        rows: usize,
        d: usize,
        dw: bool,
    },
    Attend(SelfAttn),
    AttendBwd(SelfAttn),
    ScatterRows {
        into: usize,
        rows: usize,
        d: usize,
    },
    EmbedBwd {
        vocab: usize,
        rows: usize,
        d: usize,
    },
    LoraShrink {
        groups: &'static [usize],
        input: usize,
        ranks: usize,
    },
    LoraExpand {
        groups: &'static [usize],
        output: usize,
        part: Ranks,
    },
    LoraExpandBwd {
        groups: &'static [usize],
        output: usize,
        part: Ranks,
    },
    LoraShrinkBwd {
        groups: &'static [usize],
        input: usize,
        ranks: usize,
    },
    LoraBwdB {
        rows: usize,
        output: usize,
        part: Ranks,
    },
    LoraBwdA {
        rows: usize,
        input: usize,
        ranks: usize,
    },
    LossRows {
        rows: usize,
        vocab: usize,
        loss: Loss,
    },
    SoftmaxRows {
        rows: usize,
        vocab: usize,
    },
    SmoothL1 {
        rows: usize,
        d: usize,
    },
    Optimize {
        n: usize,
        rule: Rule,
    },
}

use TrainOp::*;

impl TrainOp {
    /// Name of the trait's method.
    pub fn name(&self) -> &'static str {
        match self {
            SetWeight { .. } => "set_weight",
            Copy { .. } => "copy",
            Zero { .. } => "zero",
            Axpy { .. } => "axpy",
            SqNorm { .. } => "sq_norm",
            LinearFwd { .. } => "linear_fwd",
            LinearBwdX { .. } => "linear_bwd_x",
            LinearLoraFwd { .. } => "linear_lora_fwd",
            LinearsBwdX { .. } => "linears_bwd_x",
            LinearBwdW { .. } => "linear_bwd_w",
            ColumnSums { .. } => "column_sums",
            RmsNormBwd { .. } => "rms_norm_bwd",
            GluBwd { .. } => "glu_bwd",
            MulRows { .. } => "mul_rows",
            SubtractOuter { .. } => "subtract_outer",
            MeanRows { .. } => "mean_rows",
            LayerNorm { .. } => "layer_norm",
            LayerNormBwd { .. } => "layer_norm_bwd",
            Gelu { .. } => "gelu",
            GeluBwd { .. } => "gelu_bwd",
            AddScaled { .. } => "add_scaled",
            AddScaledBwd { .. } => "add_scaled_bwd",
            Attend(_) => "attend",
            AttendBwd(_) => "attend_bwd",
            ScatterRows { .. } => "scatter_rows",
            EmbedBwd { .. } => "embed_bwd",
            LoraShrink { .. } => "lora_shrink",
            LoraExpand { .. } => "lora_expand",
            LoraExpandBwd { .. } => "lora_expand_bwd",
            LoraShrinkBwd { .. } => "lora_shrink_bwd",
            LoraBwdB { .. } => "lora_bwd_b",
            LoraBwdA { .. } => "lora_bwd_a",
            LossRows { .. } => "loss_rows",
            SoftmaxRows { .. } => "softmax_rows",
            SmoothL1 { .. } => "smooth_l1",
            Optimize { .. } => "optimize",
        }
    }

    /// The same with weights of another type, where there are weights.
    pub fn with_weights(mut self, to: DType) -> Self {
        if let LinearFwd { dtype, .. }
        | LinearBwdX { dtype, .. }
        | LinearLoraFwd { dtype, .. }
        | LinearsBwdX { dtype, .. } = &mut self
        {
            *dtype = to;
        }
        self
    }

    /// Whether it is, in the main, a product of large matrices.
    pub fn multiplies_matrices(&self) -> bool {
        let fused = matches!(self, LinearLoraFwd { .. } | LinearsBwdX { .. });
        fused || matches!(self, LinearFwd { .. } | LinearBwdX { .. } | LinearBwdW { .. }) || self.attn().is_some()
    }

    /// The part of attention, where there is one.
    pub fn attn(&self) -> Option<&SelfAttn> {
        match self {
            Attend(a) | AttendBwd(a) => Some(a),
            _ => None,
        }
    }

    /// Length of the longest sum behind one output: rounding errors grow with its root.
    pub fn reduction(&self) -> usize {
        // Behind every exponential or quotient: a few roundings count as a short sum.
        const FEW: usize = 9;
        match *self {
            SetWeight { input, .. } | LinearFwd { input, .. } | LoraShrink { input, .. } => input,
            LinearBwdX { output, .. } | LoraExpandBwd { output, .. } => output,
            LinearLoraFwd { input, part, .. } => input + part.n,
            LinearsBwdX { output, linears, ranks, .. } => output * linears + ranks,
            LinearBwdW { rows, .. } | LoraBwdB { rows, .. } | LoraBwdA { rows, .. } => rows,
            ColumnSums { rows, .. } | EmbedBwd { rows, .. } => rows,
            LoraExpand { part, .. } => part.n,
            LoraShrinkBwd { ranks, .. } => ranks,
            RmsNormBwd { rows, d, .. } | LayerNormBwd { rows, d, .. } => FEW + rows.max(d),
            MulRows { n, .. } => n,
            SubtractOuter { b, .. } => b,
            MeanRows { each, .. } => each,
            LayerNorm { d, .. } => FEW + d,
            Attend(a) => FEW + a.spec.head_dim + a.rows(),
            AttendBwd(a) => FEW + a.spec.head_dim + a.rows() * a.spec.heads / a.spec.kv_heads,
            LossRows { vocab, .. } | SoftmaxRows { vocab, .. } => FEW + vocab,
            SmoothL1 { d, .. } => d,
            SqNorm { n } => n,
            GluBwd { .. } | Gelu { .. } | GeluBwd { .. } | Optimize { .. } => FEW,
            AddScaledBwd { rows, dw: true, .. } => rows,
            Copy { .. } | Zero { .. } | Axpy { .. } | ScatterRows { .. } | AddScaled { .. } | AddScaledBwd { .. } => 1,
        }
    }
}

fn sign(write: Write) -> &'static str {
    if write == Write::Add { " +=" } else { "" }
}

/// The sizes, as a table shows them.
impl fmt::Display for TrainOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            SetWeight { input, output } => write!(f, "{output}x{input}"),
            Copy { n } | Zero { n } | Axpy { n } | SqNorm { n } | Gelu { n } | GeluBwd { n } => write!(f, "{n}"),
            LinearFwd { dtype, rows, input, output, bias, write } => {
                let bias = if bias { " bias" } else { "" };
                write!(f, "{dtype} {rows}x{input}>{output}{bias}{}", sign(write))
            }
            LinearBwdX { dtype, rows, input, output, write } => {
                write!(f, "{dtype} {rows}x{input}<{output}{}", sign(write))
            }
            LinearLoraFwd { dtype, rows, input, output, part: p, write } => {
                write!(f, "{dtype} {rows}x{input}>{output} rank {}{}", part(p), sign(write))
            }
            LinearsBwdX { dtype, rows, input, output, linears, ranks } => {
                write!(f, "{dtype} {rows}x{input}<{linears}x{output}+{ranks}")
            }
            LinearBwdW { rows, input, output } => write!(f, "{output}x{input} of {rows}"),
            ColumnSums { rows, d } | SmoothL1 { rows, d } | LayerNorm { rows, d } | AddScaled { rows, d } => {
                write!(f, "{rows}x{d}")
            }
            MulRows { m, n, b } => write!(f, "{m}x{n} by {b}"),
            SubtractOuter { n, b } => write!(f, "{n}x{n} by {b}"),
            MeanRows { means, each, d } => write!(f, "{means} of {each}x{d}"),
            AddScaledBwd { rows, d, dw } => write!(f, "{rows}x{d}{}", if dw { " dw" } else { "" }),
            RmsNormBwd { rows, d, dw, write } | LayerNormBwd { rows, d, dw, write } => {
                write!(f, "{rows}x{d}{}{}", if dw { " dw" } else { "" }, sign(write))
            }
            GluBwd { rows, d, act } => write!(f, "{act:?} {rows}x{d}"),
            Attend(a) | AttendBwd(a) => {
                let s = a.spec;
                write!(f, "{}/{}x{} {:?}", s.heads, s.kv_heads, s.head_dim, a.see)?;
                a.lens.iter().try_for_each(|n| write!(f, " {n}"))
            }
            ScatterRows { into, rows, d } => write!(f, "{rows} into {into}x{d}"),
            EmbedBwd { vocab, rows, d } => write!(f, "{rows} into {vocab}x{d}"),
            LoraShrink { groups, input, ranks } => write!(f, "{}x{input}>{ranks}", grouped(groups)),
            LoraExpand { groups, output, part: p } => write!(f, "{}x{}>{output}", grouped(groups), part(p)),
            LoraExpandBwd { groups, output, part: p } => write!(f, "{}x{}<{output}", grouped(groups), part(p)),
            LoraShrinkBwd { groups, input, ranks } => write!(f, "{}x{input}<{ranks}", grouped(groups)),
            LoraBwdB { rows, output, part: p } => write!(f, "{output}x{} of {rows}", part(p)),
            LoraBwdA { rows, input, ranks } => write!(f, "{ranks}x{input} of {rows}"),
            LossRows { rows, vocab, loss: Loss::TopK { k, tail } } => {
                write!(f, "Top{k}{} {rows}x{vocab}", if tail { "+tail" } else { "" })
            }
            LossRows { rows, vocab, loss } => write!(f, "{loss:?} {rows}x{vocab}"),
            SoftmaxRows { rows, vocab } => write!(f, "{rows}x{vocab}"),
            Optimize { n, rule } => {
                let name = match rule.update {
                    Update::Sgd => "Sgd",
                    Update::Momentum { .. } => "Momentum",
                    Update::AdamW { .. } => "AdamW",
                    Update::Optimistic => "Optimistic",
                    Update::OptimisticAdam { .. } => "OptimisticAdam",
                };
                let (l1, reference) =
                    (if rule.l1 { " l1" } else { "" }, if rule.reference { " reference" } else { "" });
                write!(f, "{name}{l1}{reference} {n}")
            }
        }
    }
}
