//! f32 products on AVX2: weights widened from a quantised format, and plain weights row by row.
//!
//! Plain weights are row-major: a (row, channel) pair is one register of eight partial sums, reduced in a fixed order.
//! Tiles are 4 channels by up to 3 rows, or 8 channels by one row: at least eight independent chains, which is what two
//! FMA units of latency four need.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::layout::{Aligned, BLOCK, Layout, PANEL};
use super::unpack_avx2::widen;
use super::weight::PackedWeight;
use super::{Sums, TILE_ROWS};
use crate::dtype::DType;

/// Blocks widened at a time.
const WIDEN: usize = 8;
/// Inputs of four plain rows widened at a time.
const CHUNK: usize = 1024;
/// Rows up to which every tile widens plain weights anew.
const DIRECT: usize = 12;
/// Rows of a tile, a compromise of registers and loads.
const ROWS: usize = 3;

const F32: u8 = DType::F32 as u8;
const F16: u8 = DType::F16 as u8;
const BF16: u8 = DType::BF16 as u8;

/// Rows of the next tile, of `left`: no tile of one row where two of two will do.
fn group(left: usize) -> usize {
    if left == ROWS + 1 { 2 } else { left.min(ROWS) }
}

/// As `portable::exact`. Inputs with even and odd numbers are summed apart: twice the independent chains.
pub(super) fn exact(w: &PackedWeight, p: usize, x: &[f32], first: usize, n: usize, out: &mut Sums) {
    let (panel, cols, layout) = (w.panel(p), w.cols_len(), Layout::of(w.dtype() as u8));
    let x = &x[first * cols..(first + n) * cols];
    assert!(panel.len() == layout.panel(cols) && n <= TILE_ROWS);
    let mut weights = MaybeUninit::<Aligned<[f32; WIDEN * BLOCK * PANEL]>>::uninit();
    let weights = weights.as_mut_ptr().cast::<f32>();
    let mut parts = Aligned([0.0f32; TILE_ROWS * 2 * PANEL]);
    let parts = &mut parts.0[..n * 2 * PANEL];
    for k in (0..w.blocks()).step_by(WIDEN) {
        let count = WIDEN.min(w.blocks() - k);
        // SAFETY: the tier is available; blocks k.. lie in the panel, and the buffer holds WIDEN of them; rows and parts are
        // n of `cols` inputs and of 32 sums.
        unsafe {
            for j in 0..count {
                let (head, block) = layout.block(k + j);
                let at = panel.as_ptr();
                widen(w.dtype(), at.add(head), at.add(block), weights.add(j * BLOCK * PANEL), PANEL);
            }
            let mut r = 0;
            while r < n {
                let (x, sums) = (x.as_ptr().add(r * cols + k * BLOCK), parts.as_mut_ptr().add(r * 2 * PANEL));
                let rows = group(n - r);
                match rows {
                    1 => exact_tile::<1>(weights, count * BLOCK, x, cols, sums),
                    2 => exact_tile::<2>(weights, count * BLOCK, x, cols, sums),
                    _ => exact_tile::<3>(weights, count * BLOCK, x, cols, sums),
                }
                r += rows;
            }
        }
    }
    for (out, parts) in out.as_chunks_mut::<PANEL>().0.iter_mut().zip(parts.chunks_exact(2 * PANEL)) {
        for (c, o) in out.iter_mut().enumerate() {
            *o = parts[c] + parts[PANEL + c];
        }
    }
}

/// Adds an even number of inputs of 16 channels, `[input][channel]`, to R rows' sums `[parity][channel]`.
///
/// # Safety
/// AVX2, FMA; `w` holds `inputs` inputs, `x` R rows of as many, `stride` apart, `sums` R times 32 values.
#[target_feature(enable = "avx2,fma")]
unsafe fn exact_tile<const R: usize>(w: *const f32, inputs: usize, x: *const f32, stride: usize, sums: *mut f32) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); 4]; R];
        for (r, a) in acc.iter_mut().enumerate() {
            *a = std::array::from_fn(|i| _mm256_loadu_ps(sums.add(r * 2 * PANEL + i * 8)));
        }
        for i in (0..inputs).step_by(2) {
            for parity in 0..2 {
                let at = w.add((i + parity) * PANEL);
                let weights = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))];
                for (r, a) in acc.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*x.add(r * stride + i + parity));
                    for h in 0..2 {
                        a[parity * 2 + h] = _mm256_fmadd_ps(weights[h], x, a[parity * 2 + h]);
                    }
                }
            }
        }
        for (r, a) in acc.iter().enumerate() {
            for (i, &a) in a.iter().enumerate() {
                _mm256_storeu_ps(sums.add(r * 2 * PANEL + i * 8), a);
            }
        }
    }
}

/// As `portable::dense`.
pub(super) fn dense(w: &PackedWeight, p: usize, x: &[f32], first: usize, n: usize, out: &mut Sums) {
    let (panel, cols) = (w.panel(p), w.cols_len());
    let x = &x[first * cols..(first + n) * cols];
    let channels = panel.len() / w.row_bytes().max(1);
    assert!(channels <= PANEL && panel.len() == channels * w.row_bytes() && n <= TILE_ROWS);
    // SAFETY: the tier is available; the panel is `channels` rows of `cols` weights, x n rows of as many inputs.
    unsafe {
        match w.dtype() {
            DType::F32 => dense_of::<F32>(panel, channels, x, cols, n, out),
            DType::F16 => dense_of::<F16>(panel, channels, x, cols, n, out),
            _ => dense_of::<BF16>(panel, channels, x, cols, n, out),
        }
    }
}

/// # Safety
/// AVX2, FMA, F16C; sizes as in [`dense`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dense_of<const T: u8>(w: &[u8], channels: usize, x: &[f32], cols: usize, n: usize, out: &mut Sums) {
    let row_bytes = cols * size(T);
    let mut c = 0;
    while c < channels {
        let left = channels - c;
        let width = if n == 1 && left >= 8 {
            8
        } else if left >= 4 {
            4
        } else {
            1
        };
        let w = &w[c * row_bytes..(c + width) * row_bytes];
        let mut lanes = MaybeUninit::<Aligned<[f32; TILE_ROWS * 4 * 8]>>::uninit();
        let lanes = lanes.as_mut_ptr().cast::<f32>();
        // SAFETY: `width` rows of weights, n rows of inputs; n * width registers fit into `lanes`, since eight channels
        // come with one row only.
        unsafe {
            lanes.write_bytes(0, n * width * 8);
            if T == F32 || n <= DIRECT {
                rows_of::<T>(w.as_ptr(), cols, width, x.as_ptr(), cols, cols, n, lanes, true);
            } else {
                let mut wide = MaybeUninit::<Aligned<[f32; 4 * CHUNK]>>::uninit();
                let wide = wide.as_mut_ptr().cast::<f32>();
                for k in (0..cols).step_by(CHUNK) {
                    let inputs = CHUNK.min(cols - k);
                    for j in 0..width {
                        widen_row::<T>(w.as_ptr().add(j * row_bytes + k * size(T)), inputs, wide.add(j * CHUNK));
                    }
                    rows_of::<F32>(wide.cast(), CHUNK, width, x.as_ptr().add(k), cols, inputs, n, lanes, false);
                }
            }
            for r in 0..n {
                for j in 0..width {
                    out[r * PANEL + c + j] = reduce(_mm256_loadu_ps(lanes.add((r * width + j) * 8)));
                }
            }
        }
        c += width;
    }
}

const fn size(t: u8) -> usize {
    if t == F32 { 4 } else { 2 }
}

/// All rows with `width` (1, 4 or, for one row, 8) channels of `w`, `w_stride` weights apart.
///
/// # Safety
/// As [`dense_tile`] for n rows.
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of<const T: u8>(
    w: *const u8,
    w_stride: usize,
    width: usize,
    x: *const f32,
    x_stride: usize,
    inputs: usize,
    n: usize,
    lanes: *mut f32,
    ahead: bool,
) {
    let mut r = 0;
    while r < n {
        let rows = group(n - r);
        // SAFETY: by this function's contract.
        unsafe {
            let (x, lanes, first) = (x.add(r * x_stride), lanes.add(r * width * 8), r == 0);
            match (width, rows) {
                (8, _) => dense_tile::<T, 8, 1>(w, w_stride, x, x_stride, inputs, lanes, ahead && first),
                (4, 1) => dense_tile::<T, 4, 1>(w, w_stride, x, x_stride, inputs, lanes, ahead && first),
                (4, 2) => dense_tile::<T, 4, 2>(w, w_stride, x, x_stride, inputs, lanes, ahead && first),
                (4, _) => dense_tile::<T, 4, 3>(w, w_stride, x, x_stride, inputs, lanes, ahead && first),
                (_, 1) => dense_tile::<T, 1, 1>(w, w_stride, x, x_stride, inputs, lanes, ahead && first),
                (_, 2) => dense_tile::<T, 1, 2>(w, w_stride, x, x_stride, inputs, lanes, ahead && first),
                (..) => dense_tile::<T, 1, 3>(w, w_stride, x, x_stride, inputs, lanes, ahead && first),
            }
        }
        r += rows;
    }
}

/// Adds `inputs` inputs of C channels and R rows to the eight partial sums of each pair, `[row][channel][8]`.
///
/// With `ahead` it asks for the C rows of weights behind these, in their order in memory: C short streams are more than the
/// processor follows by itself.
///
/// # Safety
/// AVX2, FMA, F16C; `w` holds C rows, `x` R rows of `inputs` values, their strides apart; `lanes` 8 C R values.
#[allow(clippy::needless_range_loop)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dense_tile<const T: u8, const C: usize, const R: usize>(
    w: *const u8,
    w_stride: usize,
    x: *const f32,
    x_stride: usize,
    inputs: usize,
    lanes: *mut f32,
    ahead: bool,
) {
    // SAFETY: by this function's contract; prefetches may go anywhere; the tail is copied to eight values first.
    unsafe {
        let mut acc = [[_mm256_setzero_ps(); C]; R];
        for (r, a) in acc.iter_mut().enumerate() {
            *a = std::array::from_fn(|c| _mm256_loadu_ps(lanes.add((r * C + c) * 8)));
        }
        let whole = inputs / 8 * 8;
        for k in (0..whole).step_by(8) {
            if ahead {
                for line in 0..(C * 8 * size(T)).div_ceil(64) {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add((w_stride + k) * C * size(T) + line * 64).cast());
                }
            }
            let x: [__m256; R] = std::array::from_fn(|r| _mm256_loadu_ps(x.add(r * x_stride + k)));
            for c in 0..C {
                let w = eight::<T>(w.add((c * w_stride + k) * size(T)));
                for r in 0..R {
                    acc[r][c] = _mm256_fmadd_ps(w, x[r], acc[r][c]);
                }
            }
        }
        if whole < inputs {
            let x: [__m256; R] =
                std::array::from_fn(|r| eight_of::<F32>(x.add(r * x_stride + whole).cast(), inputs - whole));
            for c in 0..C {
                let w = eight_of::<T>(w.add((c * w_stride + whole) * size(T)), inputs - whole);
                for r in 0..R {
                    acc[r][c] = _mm256_fmadd_ps(w, x[r], acc[r][c]);
                }
            }
        }
        for (r, a) in acc.iter().enumerate() {
            for (c, &a) in a.iter().enumerate() {
                _mm256_storeu_ps(lanes.add((r * C + c) * 8), a);
            }
        }
    }
}

/// Eight values of type T.
///
/// # Safety
/// They are readable; AVX2, F16C.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn eight<const T: u8>(at: *const u8) -> __m256 {
    // SAFETY: by this function's contract.
    unsafe {
        match T {
            F32 => _mm256_loadu_ps(at.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
            _ => {
                let v = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v))
            }
        }
    }
}

/// Fewer than eight values of type T, then zeros.
///
/// # Safety
/// As [`eight`], for `n` values.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn eight_of<const T: u8>(at: *const u8, n: usize) -> __m256 {
    let mut padded = [0u8; 32];
    // SAFETY: n < 8 values are readable and fit.
    unsafe {
        padded.as_mut_ptr().copy_from_nonoverlapping(at, n * size(T));
        eight::<T>(padded.as_ptr())
    }
}

/// `n` values of type T as f32.
///
/// # Safety
/// As [`eight`], for `n` values; `out` has room for n, rounded up to eight.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_row<const T: u8>(at: *const u8, n: usize, out: *mut f32) {
    // SAFETY: by this function's contract.
    unsafe {
        for k in (0..n).step_by(8) {
            let at = at.add(k * size(T));
            let v = if n - k >= 8 { eight::<T>(at) } else { eight_of::<T>(at, n - k) };
            _mm256_storeu_ps(out.add(k), v);
        }
    }
}

/// The sum of eight lanes, as halves of halves.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn reduce(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}
