//! The native CPU backend: f32 activations, weights in the file's own precision, kernels chosen at run time.

pub mod attention;
mod backend;
pub mod bandwidth;
mod curvature;
pub mod gemm;
pub mod kv;
pub mod lanes;
pub mod logits;
mod lora;
pub mod matmul;
pub mod memory;
pub mod pool;
pub mod rows;
pub mod sampling;
mod train;

pub use backend::Cpu;

use std::fmt;

/// Instruction sets the kernels are written for; the same binary holds all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Plain Rust; uses nothing of x86 beyond what the compiler's baseline target has.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ with VNNI and BF16 (Zen 4 and later, Sapphire Rapids and later).
    Avx512,
}

impl Tier {
    /// The best tier that this machine runs.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("avx512bf16");
            if avx2 && avx512 {
                return Tier::Avx512;
            }
            if avx2 {
                return Tier::Avx2;
            }
        }
        Tier::Portable
    }

    /// All tiers that this machine runs, for tests.
    pub fn available() -> impl Iterator<Item = Self> {
        let best = Self::detect();
        [Tier::Portable, Tier::Avx2, Tier::Avx512].into_iter().filter(move |t| *t <= best)
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Portable => "portable",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
        })
    }
}

/// How products with quantised weights are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    /// Activations rounded to int8 per block of 32; integer products. Keys and values in f16.
    #[default]
    Fast,
    /// Weights widened to f32, f32 arithmetic throughout. Keys and values in f32.
    Exact,
}
