//! Products of 1 to many rows of activations with weights in the file's own precision: what an LLM spends its time on.
//!
//! A weight is read once for all rows of a pass and unpacked once for every few of them, so that a pass of eight rows costs
//! little more than one row, whose cost is the reading. Weights are cut into panels of 16 outputs; a job's panels, of all
//! its matrices, are dealt out to the pool's threads. For each row and output there is one chain of additions, whose
//! order does not depend on the number of rows or threads: results are equal bit for bit.
//!
//! With [`Compute::Fast`] quantised weights are multiplied as integers: activations are rounded to int8 with a scale s_x
//! for every 32 inputs (to i16 for Q8_0), and y += s_w s_x (q_w . q_x) + m_w s_x sum(q_x). With [`Compute::Exact`] they are widened to f32.
//! Plain types are multiplied in f32 either way, but for bf16 with [`Compute::Fast`] on AVX-512, whose activations are rounded
//! to bf16 too.

// What only the vector tiers read.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

mod acts;
#[cfg(target_arch = "x86_64")]
mod dense_avx2;
#[cfg(target_arch = "x86_64")]
mod dense_avx512;
mod glu;
#[cfg(target_arch = "x86_64")]
mod kernel_avx2;
#[cfg(target_arch = "x86_64")]
mod kernel_avx512;
mod layout;
mod pack;
mod portable;
mod schedule;
#[cfg(test)]
pub(super) mod tests;
#[cfg(target_arch = "x86_64")]
mod unpack_avx2;
mod weight;

use std::sync::Mutex;

pub(super) use glu::glu as gated;
pub use weight::PackedWeight;

use super::pool::Pool;
use super::{Compute, Tier};
use crate::backend::WeightInfo;
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::model::config::Activation;
use acts::{Acts, Quantized};

/// Rows that a panel is multiplied with at a time; their activations stay in the core's second-level cache.
const TILE_ROWS: usize = 64;

/// Results of one panel: `[row][channel]`, room for the rows that are multiplied at a time.
type Sums = [f32];

/// Buffers that are reused from call to call, so that no token allocates.
#[derive(Default)]
pub struct Scratch(Mutex<Acts>);

/// What a product runs on.
#[derive(Clone, Copy)]
pub struct MatmulCx<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Instructions; must be one of [`Tier::available`].
    pub tier: Tier,
    /// How quantised weights are multiplied.
    pub compute: Compute,
    /// Reused buffers.
    pub scratch: &'a Scratch,
}

/// One product of [`linear_many`].
pub struct Job<'a> {
    /// `[out, in]`.
    pub w: &'a PackedWeight,
    /// `[out]`.
    pub bias: Option<&'a [f32]>,
    /// `[rows, out]`.
    pub y: &'a mut [f32],
}

/// y\[r, o\] = sum_i w\[o, i\] x\[r, i\] (+ bias\[o\]); y is `[rows, out]`, x `[rows, in]`.
///
/// # Errors
/// Lengths that do not fit the weight.
pub fn linear(cx: &MatmulCx<'_>, y: &mut [f32], x: &[f32], w: &PackedWeight, bias: Option<&[f32]>) -> Result<()> {
    linear_many(cx, x, [Job { w, bias, y }])
}

/// y += W x: [`linear`] onto a residual.
///
/// # Errors
/// Lengths that do not fit the weight.
pub fn linear_add(cx: &MatmulCx<'_>, y: &mut [f32], x: &[f32], w: &PackedWeight) -> Result<()> {
    schedule::linear(cx, x, [Job { w, bias: None, y }], true)
}

/// Several [`linear`] of one x, such as q, k and v: activations are quantised once, and one parallel region does all.
///
/// # Errors
/// Lengths that do not fit the weights.
pub fn linear_many<const N: usize>(cx: &MatmulCx<'_>, x: &[f32], jobs: [Job<'_>; N]) -> Result<()> {
    schedule::linear(cx, x, jobs, false)
}

/// y = act(W_gate x) * (W_up x), panel by panel; y is `[rows, out]`.
///
/// # Errors
/// Lengths that do not fit the weights, or weights of different shapes.
pub fn linear_glu(
    cx: &MatmulCx<'_>,
    y: &mut [f32],
    x: &[f32],
    gate: &PackedWeight,
    up: &PackedWeight,
    act: Activation,
) -> Result<()> {
    ensure!(
        gate.rows() == up.rows() && gate.cols() == up.cols(),
        Shape,
        "gate is [{}, {}], up is [{}, {}]",
        gate.rows(),
        gate.cols(),
        up.rows(),
        up.cols()
    );
    schedule::glu(cx, y, x, gate, up, act)
}

/// The inputs of a pass, in the forms that its weights need.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    f32s: &'a [f32],
    quantized: Option<Quantized<'a>>,
    bf16s: Option<&'a [u16]>,
}

/// Sums of panel `p` of `w` with rows `first..first + n` (at most [`TILE_ROWS`]).
fn panel_sums(tier: Tier, w: &PackedWeight, p: usize, x: Inputs<'_>, first: usize, n: usize, out: &mut Sums) {
    debug_assert!(n <= TILE_ROWS);
    let quantized = x.quantized.filter(|_| w.dtype().is_quantized());
    match tier {
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 | Tier::Avx512 => match quantized {
            Some(q) if tier == Tier::Avx512 => kernel_avx512::fast(w, p, q, first, n, out),
            Some(q) => kernel_avx2::fast(w, p, q, first, n, out),
            None if w.dtype().is_quantized() => dense_avx2::exact(w, p, x.f32s, first, n, out),
            None if tier == Tier::Avx512 => match x.bf16s.filter(|_| w.dtype() == DType::BF16) {
                Some(x) => dense_avx512::dense_bf16(w, p, x, first, n, out),
                None => dense_avx512::dense(w, p, x.f32s, first, n, out),
            },
            None => dense_avx2::dense(w, p, x.f32s, first, n, out),
        },
        _ => match quantized {
            Some(q) => portable::fast(w, p, q, first, n, out),
            None if w.dtype().is_quantized() => portable::exact(w, p, x.f32s, first, n, out),
            None => portable::dense(w, p, x.f32s, first, n, out),
        },
    }
}
