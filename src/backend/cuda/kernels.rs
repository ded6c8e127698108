//! The kernels by name, each with the type of its arguments.

use std::marker::PhantomData;

use super::args;

/// A kernel that takes `A`.
#[derive(Clone, Copy)]
pub(super) struct Kernel<A> {
    pub name: &'static str,
    _args: PhantomData<A>,
}

/// The products with one weight format, by the rows that one reading of the weights serves.
pub(super) struct Family<A, G> {
    /// 8, 16, 32 and 64.
    pub few: [Kernel<A>; 4],
    /// 64 and 128, and their dynamic shared memory.
    pub many: [(Kernel<A>, usize); 2],
    /// Gate and up in one: 8, 16, 32 and 64.
    pub glu: [Kernel<G>; 4],
}

impl<A, G> Family<A, G> {
    fn names(&self) -> [(&'static str, &'static str); 10] {
        let (f, m, g) = (&self.few, &self.many, &self.glu);
        let [a, b, c, d] = [f[0].name, f[1].name, f[2].name, f[3].name].map(|name| ("gemv", name));
        let [i, j, k, l] = [g[0].name, g[1].name, g[2].name, g[3].name].map(|name| ("gemv", name));
        [a, b, c, d, i, j, k, l, ("gemm", m[0].0.name), ("gemm", m[1].0.name)]
    }
}

const fn kernel<A>(name: &'static str) -> Kernel<A> {
    Kernel { name, _args: PhantomData }
}

macro_rules! kernels {
    ($($file:literal { $($id:ident: $args:ident = $name:literal;)* })*) => {
        $($(pub(super) const $id: Kernel<args::$args> = kernel($name);)*)*
        /// Files and the entry points in them.
        const FILES: &[(&str, &[&str])] = &[$(($file, &[$($name),*])),*];
    };
}

macro_rules! families {
    ($($id:ident: $args:ident, $glu:ident = $name:literal, $shared:expr;)*) => {
        $(pub(super) const $id: Family<args::$args, args::$glu> = Family {
            few: [
                kernel(concat!("linear_", $name, "_8")),
                kernel(concat!("linear_", $name, "_16")),
                kernel(concat!("linear_", $name, "_32")),
                kernel(concat!("linear_", $name, "_64")),
            ],
            many: [
                (kernel(concat!("gemm_", $name, "_64")), $shared[0]),
                (kernel(concat!("gemm_", $name, "_128")), $shared[1]),
            ],
            glu: [
                kernel(concat!("linear_glu_", $name, "_8")),
                kernel(concat!("linear_glu_", $name, "_16")),
                kernel(concat!("linear_glu_", $name, "_32")),
                kernel(concat!("linear_glu_", $name, "_64")),
            ],
        };)*
        /// Every kernel's file and name.
        pub(super) fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
            let singles = FILES.iter().flat_map(|(file, names)| names.iter().map(move |name| (*file, *name)));
            singles.chain([$($id.names()),*].into_iter().flatten())
        }
    };
}

families! {
    BF16: Linear, LinearGlu = "bf16", [64 << 10, 96 << 10];
    Q8_0: LinearQ8_0, LinearGluQ8_0 = "q8_0", [32 << 10, 64 << 10];
    Q4_0: LinearQ4_0, LinearGluQ4_0 = "q4_0", [32 << 10, 64 << 10];
    Q4_1: LinearQ4_1, LinearGluQ4_1 = "q4_1", [32 << 10, 64 << 10];
    Q4_K: LinearQ4_K, LinearGluQ4_K = "q4_k", [32 << 10, 64 << 10];
    Q6_K: LinearQ6_K, LinearGluQ6_K = "q6_k", [32 << 10, 64 << 10];
}

kernels! {
    "rows" {
        EMBED_BF16: Embed = "embed_bf16";
        EMBED_F16: Embed = "embed_f16";
        EMBED_F32: Embed = "embed_f32";
        EMBED_Q8_0: EmbedBlocks = "embed_q8_0";
        EMBED_Q4_0: EmbedBlocks = "embed_q4_0";
        EMBED_Q4_1: EmbedBlocks = "embed_q4_1";
        EMBED_Q4_K: EmbedBlocks = "embed_q4_k";
        EMBED_Q6_K: EmbedBlocks = "embed_q6_k";
        GATHER_ROWS: GatherRows = "gather_rows";
        ADD: Add = "add";
        ADD_ACTIVATED: AddActivated = "add_activated";
        RMS_NORM: RmsNorm = "rms_norm";
        ADD_RMS_NORM: AddRmsNorm = "add_rms_norm";
        ADD_NORMED: AddNormed = "add_normed";
        HEAD_NORM: HeadNorm = "head_norm";
        GLU: Glu = "glu";
        ROPE: Rope = "rope";
        DENSE_F16: Dense = "dense_f16";
        DENSE_F32: Dense = "dense_f32";
    }
    "gemv" {
        LINEAR_BF16_ODD: LinearOdd = "linear_bf16_odd";
    }
    "peak" {
        MMA_PEAK: MmaPeak = "mma_peak";
    }
    "kv" {
        KV_STAGE: KvStage = "kv_stage";
        ROPE_STAGE: RopeStage = "rope_stage";
        KV_COMMIT: KvCommit = "kv_commit";
        KV_COMMIT_BATCH: KvCommitBatch = "kv_commit_batch";
    }
    "logits" {
        LOGITS_STATS: LogitsStats = "logits_stats";
        TOP_K: TopK = "top_k";
    }
    "sample" {
        SAMPLE: Sample = "sample";
        DISTRIBUTION: Distribution = "distribution";
        PENALIZE: Penalize = "penalize";
        FORBID: Forbid = "forbid";
    }
    "unmask" {
        UNMASK: Unmask = "unmask";
    }
    "verify" {
        VERIFY_WALK: VerifyWalk = "verify_walk";
        VERIFY_SIBLINGS: VerifySiblings = "verify_siblings";
        VERIFY_TRAVERSAL: VerifySiblings = "verify_traversal";
    }
    "attention" {
        ATTEND_64_M16: Attention = "attend_64_m16";
        ATTEND_64_M64: Attention = "attend_64_m64";
        ATTEND_96_M16: Attention = "attend_96_m16";
        ATTEND_96_M64: Attention = "attend_96_m64";
        ATTEND_128_M16: Attention = "attend_128_m16";
        ATTEND_128_M64: Attention = "attend_128_m64";
        ATTEND_256_M16: Attention = "attend_256_m16";
        ATTEND_256_M32: Attention = "attend_256_m32";
        ATTEND_ANY_M16: Attention = "attend_any_m16";
        ATTEND_MERGE: Attention = "attend_merge";
    }
    "attention_prefill" {
        PREFILL_64: Attention = "prefill_64";
        PREFILL_96: Attention = "prefill_96";
        PREFILL_128: Attention = "prefill_128";
        PREFILL_256: Attention = "prefill_256";
    }
    "train_rows" {
        RMS_NORM_BWD: RmsNormBwd = "rms_norm_bwd";
        COLUMN_SUMS: ColumnSums = "column_sums";
        FOLD: Fold = "fold";
        GLU_BWD: GluBwd = "glu_bwd";
        SCATTER_ROWS: ScatterRows = "scatter_rows";
        EMBED_BWD: EmbedBwd = "embed_bwd";
        COPY: Copy = "copy";
        ZERO: Zero = "zero";
        AXPY: Axpy = "axpy";
        SET_BF16: SetBf16 = "set_bf16";
        SQUARE_SUMS: SquareSums = "square_sums";
        SOFTMAX_ROWS: SoftmaxRows = "softmax_rows";
    }
    "encoder" {
        LAYER_NORM: LayerNorm = "layer_norm";
        LAYER_NORM_BWD: LayerNormBwd = "layer_norm_bwd";
        COLUMN_DOTS: ColumnDots = "column_dots";
        GELU: Gelu = "gelu";
        GELU_BWD: GeluBwd = "gelu_bwd";
        ADD_SCALED: AddScaled = "add_scaled";
        SCALE_COLUMNS: ScaleColumns = "scale_columns";
    }
    "curvature" {
        MUL_ROWS_F32: MulRowsF32 = "mul_rows_f32";
        MUL_ROWS_F64: MulRowsF64 = "mul_rows_f64";
        SUBTRACT_OUTER_F32: SubtractOuterF32 = "subtract_outer_f32";
        SUBTRACT_OUTER_F64: SubtractOuterF64 = "subtract_outer_f64";
        MEAN_ROWS: MeanRows = "mean_rows";
    }
    "optim" {
        OPTIMIZE: Optimize = "optimize";
    }
    "loss" {
        LOSS_ROWS: LossRows = "loss_rows";
        SMOOTH_L1: SmoothL1 = "smooth_l1";
    }
    "lora" {
        LORA_SHRINK: LoraShrink = "lora_shrink";
        LORA_EXPAND: LoraExpand = "lora_expand";
        LORA_EXPAND_BWD: LoraExpandBwd = "lora_expand_bwd";
        LORA_SHRINK_BWD: LoraShrinkBwd = "lora_shrink_bwd";
        LORA_BWD_A: LoraBwdA = "lora_bwd_a";
        LORA_BWD_B: LoraBwdB = "lora_bwd_b";
    }
    "train_gemm" {
        LINEAR_BWD_X_BF16_64: LinearBwdX = "linear_bwd_x_bf16_64";
        LINEAR_BWD_X_BF16_128: LinearBwdX = "linear_bwd_x_bf16_128";
        LINEAR_BWD_X_F16_64: LinearBwdX = "linear_bwd_x_f16_64";
        LINEAR_BWD_X_F16_128: LinearBwdX = "linear_bwd_x_f16_128";
        LINEAR_BWD_X_F32_64: LinearBwdX = "linear_bwd_x_f32_64";
        LINEAR_BWD_X_F32_128: LinearBwdX = "linear_bwd_x_f32_128";
        LINEAR_BWD_X_Q8_0_64: LinearBwdXBlocks = "linear_bwd_x_q8_0_64";
        LINEAR_BWD_X_Q8_0_128: LinearBwdXBlocks = "linear_bwd_x_q8_0_128";
        LINEAR_BWD_X_Q4_0_64: LinearBwdXBlocks = "linear_bwd_x_q4_0_64";
        LINEAR_BWD_X_Q4_0_128: LinearBwdXBlocks = "linear_bwd_x_q4_0_128";
        LINEAR_BWD_X_Q4_1_64: LinearBwdXBlocks = "linear_bwd_x_q4_1_64";
        LINEAR_BWD_X_Q4_1_128: LinearBwdXBlocks = "linear_bwd_x_q4_1_128";
        LINEAR_BWD_X_Q4_K_64: LinearBwdXBlocks = "linear_bwd_x_q4_k_64";
        LINEAR_BWD_X_Q4_K_128: LinearBwdXBlocks = "linear_bwd_x_q4_k_128";
        LINEAR_BWD_X_Q6_K_64: LinearBwdXBlocks = "linear_bwd_x_q6_k_64";
        LINEAR_BWD_X_Q6_K_128: LinearBwdXBlocks = "linear_bwd_x_q6_k_128";
        LINEAR_BWD_W_64: LinearBwdW = "linear_bwd_w_64";
        LINEAR_BWD_W_128: LinearBwdW = "linear_bwd_w_128";
    }
    "train_attention" {
        ATTEND_DELTA: TrainAttendBwd = "attend_delta";
        TRAIN_ATTEND_64: TrainAttend = "train_attend_64";
        ATTEND_DQ_64: TrainAttendBwd = "attend_dq_64";
        ATTEND_DKV_64: TrainAttendBwd = "attend_dkv_64";
        TRAIN_ATTEND_96: TrainAttend = "train_attend_96";
        ATTEND_DQ_96: TrainAttendBwd = "attend_dq_96";
        ATTEND_DKV_96: TrainAttendBwd = "attend_dkv_96";
        TRAIN_ATTEND_128: TrainAttend = "train_attend_128";
        ATTEND_DQ_128: TrainAttendBwd = "attend_dq_128";
        ATTEND_DKV_128: TrainAttendBwd = "attend_dkv_128";
        TRAIN_ATTEND_256: TrainAttend = "train_attend_256";
        ATTEND_DQ_256: TrainAttendBwd = "attend_dq_256";
        ATTEND_DKV_256: TrainAttendBwd = "attend_dkv_256";
        TRAIN_ATTEND_ANY: TrainAttend = "train_attend_any";
        ATTEND_DQ_ANY: TrainAttendBwd = "attend_dq_any";
        ATTEND_DKV_ANY: TrainAttendBwd = "attend_dkv_any";
    }
}
