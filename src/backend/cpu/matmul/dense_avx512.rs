//! Plain weights on AVX-512, row-major: a (row, channel) pair is one register of 16 partial sums, reduced in
//! a fixed order.
//!
//! Weights are widened to f32, one instruction for 16; or, bf16 with bf16 activations, multiplied as they are by
//! `vdpbf16ps`, two products to a lane. Tiles are 4 channels by up to 6 rows, or 8 channels by one row.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::Sums;
use super::dense_avx2::reduce;
use super::layout::PANEL;
use super::weight::PackedWeight;
use crate::dtype::DType;

/// Rows of a tile.
const ROWS: usize = 6;

/// Kinds of products: of f32 with each plain type, and of bf16 with bf16.
const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;
const BF16_DOT: u8 = 3;

/// Inputs of one step.
const fn step(kind: u8) -> usize {
    if kind == BF16_DOT { 32 } else { 16 }
}

/// Bytes of a weight.
const fn weight_size(kind: u8) -> usize {
    if kind == F32 { 4 } else { 2 }
}

/// Bytes of an input.
const fn input_size(kind: u8) -> usize {
    if kind == BF16_DOT { 2 } else { 4 }
}

/// Rounds to bf16, to the nearest, ties to even.
pub(super) fn round_bf16(x: &[f32], out: &mut [u16]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn inner(x: &[f32], out: &mut [u16]) {
        for (x, out) in x.chunks(16).zip(out.chunks_mut(16)) {
            let mask = mask16(x.len().min(out.len()));
            // SAFETY: masked to the chunks; both types are 256 bits.
            unsafe {
                let v = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x.as_ptr()));
                let v = std::mem::transmute::<__m256bh, __m256i>(v);
                _mm256_mask_storeu_epi16(out.as_mut_ptr().cast(), mask, v);
            }
        }
    }
    // SAFETY: the tier is available (a rule of `MatmulCx`).
    unsafe { inner(x, out) }
}

/// As `portable::dense`.
pub(super) fn dense(w: &PackedWeight, p: usize, x: &[f32], first: usize, n: usize, out: &mut Sums) {
    let x = bytemuck::cast_slice(&x[first * w.cols_len()..(first + n) * w.cols_len()]);
    // SAFETY: the tier is available.
    unsafe {
        match w.dtype() {
            DType::F32 => panel::<F32>(w, p, x, n, out),
            DType::F16 => panel::<F16>(w, p, x, n, out),
            _ => panel::<BF16>(w, p, x, n, out),
        }
    }
}

/// As [`dense`], of bf16 weights and activations.
pub(super) fn dense_bf16(w: &PackedWeight, p: usize, x: &[u16], first: usize, n: usize, out: &mut Sums) {
    let x = bytemuck::cast_slice(&x[first * w.cols_len()..(first + n) * w.cols_len()]);
    assert!(w.dtype() == DType::BF16);
    // SAFETY: the tier is available.
    unsafe { panel::<BF16_DOT>(w, p, x, n, out) }
}

/// # Safety
/// AVX-512 with BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn panel<const K: u8>(w: &PackedWeight, p: usize, x: &[u8], n: usize, out: &mut Sums) {
    let (weights, cols) = (w.panel(p), w.cols_len());
    let (w_stride, x_stride) = (cols * weight_size(K), cols * input_size(K));
    let channels = weights.len() / w_stride.max(1);
    assert!(channels <= PANEL && weights.len() == channels * w_stride && x.len() == n * x_stride);
    assert!(w_stride == w.row_bytes() && n * PANEL <= out.len());
    let mut r = 0;
    while r < n {
        let rows = (n - r).div_ceil((n - r).div_ceil(ROWS));
        let mut c = 0;
        while c < channels {
            let left = channels - c;
            let width = if rows == 1 && left >= 8 {
                8
            } else if left >= 4 {
                4
            } else {
                1
            };
            // SAFETY: `width` rows of weights and `rows` rows of inputs from here on, and as many sums.
            unsafe {
                let (w, x) = (weights.as_ptr().add(c * w_stride), x.as_ptr().add(r * x_stride));
                let out = out.as_mut_ptr().add(r * PANEL + c);
                macro_rules! tiles {
                    ($($c:literal $r:literal),*) => {
                        match (width, rows) {
                            $(($c, $r) => tile::<K, $c, $r>(w, x, cols, out, r == 0),)*
                            _ => unreachable!("tiles have 1, 4 or 8 channels and up to 6 rows"),
                        }
                    };
                }
                tiles!(8 1, 4 1, 4 2, 4 3, 4 4, 4 5, 4 6, 1 1, 1 2, 1 3, 1 4, 1 5, 1 6);
            }
            c += width;
        }
        r += rows;
    }
}

/// Products of C channels and R rows, whole. With `ahead` it asks for the C rows of weights behind these.
///
/// # Safety
/// AVX-512 with BF16; `w` holds C rows of `cols` weights, `x` R rows of `cols` inputs; `out` is the first of R times C
/// sums, rows [`PANEL`] apart.
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn tile<const K: u8, const C: usize, const R: usize>(
    w: *const u8,
    x: *const u8,
    cols: usize,
    out: *mut f32,
    ahead: bool,
) {
    let mut acc = [[_mm512_setzero_ps(); C]; R];
    for k in (0..cols).step_by(step(K)) {
        let left = cols - k;
        let mut inputs = [_mm512_setzero_ps(); R];
        if ahead {
            for line in 0..(C * step(K) * weight_size(K)).div_ceil(64) {
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add((cols + k) * C * weight_size(K) + line * 64).cast());
            }
        }
        // SAFETY: by this function's contract; loads are masked to what is left.
        unsafe {
            for r in 0..R {
                let at = x.add((r * cols + k) * input_size(K));
                inputs[r] = if K == BF16_DOT { load::<BF16_DOT>(at, left) } else { load::<F32>(at, left) };
            }
            for c in 0..C {
                let weight = load::<K>(w.add((c * cols + k) * weight_size(K)), left);
                for r in 0..R {
                    acc[r][c] = if K == BF16_DOT {
                        let [a, b] = [weight, inputs[r]].map(|v| std::mem::transmute::<__m512, __m512bh>(v));
                        _mm512_dpbf16_ps(acc[r][c], a, b)
                    } else {
                        _mm512_fmadd_ps(weight, inputs[r], acc[r][c])
                    };
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            let half = _mm256_add_ps(_mm512_castps512_ps256(acc[r][c]), _mm512_extractf32x8_ps::<1>(acc[r][c]));
            // SAFETY: by this function's contract.
            unsafe { *out.add(r * PANEL + c) = reduce(half) };
        }
    }
}

/// The low `n` of 16 bits.
fn mask16(n: usize) -> __mmask16 {
    if n >= 16 { !0 } else { (1 << n) - 1 }
}

/// The inputs of a step, or the `left` that there are and then zeros.
///
/// # Safety
/// AVX-512; they are readable.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
unsafe fn load<const K: u8>(at: *const u8, left: usize) -> __m512 {
    // SAFETY: by this function's contract; masked lanes are not read.
    unsafe {
        match K {
            F32 => _mm512_maskz_loadu_ps(mask16(left), at.cast()),
            F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask16(left), at.cast())),
            BF16 => {
                let v = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask16(left), at.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v))
            }
            _ => {
                let mask = if left >= 32 { !0 } else { (1 << left) - 1 };
                _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, at.cast()))
            }
        }
    }
}
