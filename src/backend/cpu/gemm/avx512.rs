//! AVX-512: f32, or pairs of bf16 by `vdpbf16ps`; tiles of sums of 8 rows by 48 columns are 24 registers.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::mem::transmute;

use super::Block;
use super::pack::{LANES, Out, Tile};

/// Rows of a tile of sums.
const ROWS: usize = 8;
/// Registers of a row of sums.
const WIDE: usize = 3;

type V16 = [__m512i; LANES];

pub(super) fn multiply<const BF16: bool>(block: &Block<'_>, out: &Out<'_>) {
    // SAFETY: the tier is available (a rule of `GemmCx`); `multiply` of the parent has checked the block.
    unsafe { inner::<BF16>(block, out) }
}

/// # Safety
/// AVX-512 with BF16; all panels of the block are there.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn inner<const BF16: bool>(block: &Block<'_>, out: &Out<'_>) {
    let panel = block.steps * LANES * LANES;
    block.each(ROWS, WIDE * LANES, |i, j| {
        let mut sums = [[0.0; WIDE * LANES]; ROWS];
        // SAFETY: row i and column j are the block's, so their panels are, and as many of columns as are asked for.
        unsafe {
            let a = block.a.as_ptr().cast::<f32>().add(i / LANES * panel + i % LANES * LANES);
            let b = block.b.as_ptr().cast::<f32>().add(j / LANES * panel);
            match (block.cols - j).div_ceil(LANES) {
                1 => tile::<BF16, 1>(a, b, block.steps, &mut sums),
                2 => tile::<BF16, 2>(a, b, block.steps, &mut sums),
                _ => tile::<BF16, 3>(a, b, block.steps, &mut sums),
            }
        }
        out.put::<{ WIDE * LANES }>(block, i, j, sums.as_flattened());
    });
}

/// Sums of eight rows, tiles behind `a`, with W panels of columns behind `b`.
///
/// # Safety
/// AVX-512 with BF16; `steps` tiles of `a` and W times as many of `b` are readable.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn tile<const BF16: bool, const W: usize>(
    a: *const f32,
    b: *const f32,
    steps: usize,
    sums: &mut [[f32; WIDE * LANES]; ROWS],
) {
    let mut acc = [[_mm512_setzero_ps(); W]; ROWS];
    // SAFETY: by this function's contract; both operands of a product of pairs are 512 bits.
    unsafe {
        for step in 0..steps {
            for k in 0..LANES {
                let at = step * LANES * LANES;
                let mut right = [_mm512_setzero_ps(); W];
                for (w, right) in right.iter_mut().enumerate() {
                    *right = _mm512_load_ps(b.add(w * steps * LANES * LANES + at + k * LANES));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let left = _mm512_set1_epi32(*a.add(at + r * LANES + k).cast::<i32>());
                    for (acc, right) in acc.iter_mut().zip(right) {
                        *acc = if BF16 {
                            _mm512_dpbf16_ps(
                                *acc,
                                transmute::<__m512i, __m512bh>(left),
                                transmute::<__m512, __m512bh>(right),
                            )
                        } else {
                            _mm512_fmadd_ps(_mm512_castsi512_ps(left), right, *acc)
                        };
                    }
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            for (w, acc) in acc.into_iter().enumerate() {
                _mm512_storeu_ps(sums.as_mut_ptr().add(w * LANES), acc);
            }
        }
    }
}

/// What a tile is made of: f32 as they are, f32 to be rounded to pairs, pairs.
const WORDS: u8 = 0;
const ROUND: u8 = 1;
const PAIRS: u8 = 2;

/// As `portable::words`.
pub(super) fn words(x: &[f32], stride: usize, transpose: bool, tile: &mut Tile) {
    assert!(stride >= LANES && x.len() >= (LANES - 1) * stride + LANES);
    // SAFETY: the tier is available; sixteen lines are there.
    unsafe {
        match transpose {
            true => store::<true>(lines::<WORDS, false>(x.as_ptr().cast(), stride), tile),
            false => store::<false>(lines::<WORDS, false>(x.as_ptr().cast(), stride), tile),
        }
    }
}

/// 16 lanes by 32 values of k, rounded to bf16: lines are lanes, or (`cols`) values of k; words are pairs along k either way.
pub(super) fn round(x: &[f32], stride: usize, cols: bool, transpose: bool, tile: &mut Tile) {
    check(x, stride, cols);
    // SAFETY: the tier is available; the lines are there.
    unsafe {
        let x = x.as_ptr().cast();
        match (cols, transpose) {
            (false, false) => store::<false>(lines::<ROUND, false>(x, stride), tile),
            (false, true) => store::<true>(lines::<ROUND, false>(x, stride), tile),
            (true, false) => store::<false>(lines::<ROUND, true>(x, stride), tile),
            (true, true) => store::<true>(lines::<ROUND, true>(x, stride), tile),
        }
    }
}

/// As [`round`], of bf16.
pub(super) fn pairs(x: &[u16], stride: usize, cols: bool, transpose: bool, tile: &mut Tile) {
    check(x, stride, cols);
    // SAFETY: the tier is available; the lines are there.
    unsafe {
        let x = x.as_ptr().cast();
        match (cols, transpose) {
            (false, false) => store::<false>(lines::<PAIRS, false>(x, stride), tile),
            (false, true) => store::<true>(lines::<PAIRS, false>(x, stride), tile),
            (true, false) => store::<false>(lines::<PAIRS, true>(x, stride), tile),
            (true, true) => store::<true>(lines::<PAIRS, true>(x, stride), tile),
        }
    }
}

fn check<T>(x: &[T], stride: usize, cols: bool) {
    let (lines, width) = if cols { (2 * LANES, LANES) } else { (LANES, 2 * LANES) };
    assert!(stride >= width && x.len() >= (lines - 1) * stride + width);
}

/// 16 lines of words.
///
/// # Safety
/// AVX-512 with BF16; 16 lines of 16 f32 (WORDS), of 32 values, or (COLS) 32 lines of 16 values are readable.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
#[inline]
unsafe fn lines<const KIND: u8, const COLS: bool>(x: *const u8, stride: usize) -> V16 {
    let mut v = [_mm512_setzero_si512(); LANES];
    // Word i of a line of pairs: value i of the first of two lines, and of the second.
    let zip = _mm512_add_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_slli_epi32::<16>(_mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)),
    );
    for (i, v) in v.iter_mut().enumerate() {
        // SAFETY: by this function's contract; both types are 512 bits.
        unsafe {
            let float = |line: usize, at: usize| _mm512_loadu_ps(x.cast::<f32>().add(line * stride + at));
            let halves = |line: usize| x.cast::<u16>().add(line * stride);
            let round = |low, high| transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            *v = match (KIND, COLS) {
                (WORDS, _) => _mm512_castps_si512(float(i, 0)),
                (ROUND, false) => round(float(i, 0), float(i, LANES)),
                (ROUND, true) => _mm512_permutexvar_epi16(zip, round(float(2 * i, 0), float(2 * i + 1, 0))),
                (_, false) => _mm512_loadu_si512(halves(i).cast()),
                (_, true) => {
                    let [low, high] = [halves(2 * i), halves(2 * i + 1)].map(|p| _mm256_loadu_si256(p.cast()));
                    _mm512_permutexvar_epi16(zip, _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high))
                }
            };
        }
    }
    v
}

/// # Safety
/// AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
unsafe fn store<const TRANSPOSE: bool>(v: V16, tile: &mut Tile) {
    let v = if TRANSPOSE { transposed(v) } else { v };
    for (v, out) in v.into_iter().zip(tile.0.as_chunks_mut::<LANES>().0) {
        // SAFETY: 64 bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), v) };
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn transposed(v: V16) -> V16 {
    let (mut t, mut u) = (v, v);
    for i in (0..16).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    // u[4g + c], quarter q: word 4q + c of lines 4g..4g + 4.
    for i in (0..16).step_by(4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    let mut out = v;
    for c in 0..4 {
        let low = [_mm512_shuffle_i32x4::<0x88>(u[c], u[4 + c]), _mm512_shuffle_i32x4::<0xDD>(u[c], u[4 + c])];
        let high =
            [_mm512_shuffle_i32x4::<0x88>(u[8 + c], u[12 + c]), _mm512_shuffle_i32x4::<0xDD>(u[8 + c], u[12 + c])];
        for odd in 0..2 {
            out[4 * odd + c] = _mm512_shuffle_i32x4::<0x88>(low[odd], high[odd]);
            out[8 + 4 * odd + c] = _mm512_shuffle_i32x4::<0xDD>(low[odd], high[odd]);
        }
    }
    out
}
