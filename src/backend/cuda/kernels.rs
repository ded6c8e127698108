//! The kernels by name, each with the type of its arguments.

use std::marker::PhantomData;

use super::args;

/// A kernel that takes `A`.
#[derive(Clone, Copy)]
pub(super) struct Kernel<A> {
    pub name: &'static str,
    _args: PhantomData<A>,
}

macro_rules! kernels {
    ($($file:literal { $($id:ident: $args:ident = $name:literal;)* })*) => {
        $($(pub(super) const $id: Kernel<args::$args> = Kernel { name: $name, _args: PhantomData };)*)*
        /// Files and the entry points in them.
        pub(super) const FILES: &[(&str, &[&str])] = &[$(($file, &[$($name),*])),*];
    };
}

kernels! {
    "rows" {
        EMBED_BF16: Embed = "embed_bf16";
        EMBED_F16: Embed = "embed_f16";
        EMBED_F32: Embed = "embed_f32";
        GATHER_ROWS: GatherRows = "gather_rows";
        ADD: Add = "add";
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
        LINEAR_BF16_8: Linear = "linear_bf16_8";
        LINEAR_BF16_16: Linear = "linear_bf16_16";
        LINEAR_BF16_32: Linear = "linear_bf16_32";
        LINEAR_BF16_64: Linear = "linear_bf16_64";
        LINEAR_BF16_ODD: LinearOdd = "linear_bf16_odd";
    }
    "kv" {
        KV_STAGE: KvStage = "kv_stage";
        ROPE_STAGE: RopeStage = "rope_stage";
        KV_COMMIT: KvCommit = "kv_commit";
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
}
