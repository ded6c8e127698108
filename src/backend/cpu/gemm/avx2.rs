//! f32 on AVX2: tiles of sums of 4 rows by 24 columns are twelve registers.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::Block;
use super::pack::{LANES, Out, Tile};

/// Rows of a tile of sums.
const ROWS: usize = 4;
/// Lanes of a register.
const N: usize = 8;
/// Registers of a row of sums.
const WIDE: usize = 3;

pub(super) fn multiply(block: &Block<'_>, out: &Out<'_>) {
    // SAFETY: the tier is available (a rule of `GemmCx`); `multiply` of the parent has checked the block.
    unsafe { inner(block, out) }
}

/// # Safety
/// AVX2 and FMA; all panels of the block are there.
#[target_feature(enable = "avx2,fma")]
unsafe fn inner(block: &Block<'_>, out: &Out<'_>) {
    let panel = block.steps * LANES * LANES;
    block.each(ROWS, WIDE * N, |i, j| {
        let mut sums = [[0.0; WIDE * N]; ROWS];
        // SAFETY: row i and column j are the block's, so their panels are; of the columns' registers those beyond its
        // panels are left out.
        unsafe {
            let a = block.a.as_ptr().cast::<f32>().add(i / LANES * panel + i % LANES * LANES);
            let b = |v: usize| {
                let j = j + v * N;
                block.b.as_ptr().cast::<f32>().wrapping_add(j / LANES * panel + j % LANES)
            };
            match (block.cols - j).div_ceil(N) {
                1 => tile(a, [b(0)], block.steps, &mut sums),
                2 => tile(a, [b(0), b(1)], block.steps, &mut sums),
                _ => tile(a, [b(0), b(1), b(2)], block.steps, &mut sums),
            }
        }
        out.put::<{ WIDE * N }>(block, i, j, sums.as_flattened());
    });
}

/// Sums of four rows, tiles behind `a`, with W registers of columns, tiles behind each of `b`.
///
/// # Safety
/// AVX2 and FMA; `steps` tiles are readable.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const W: usize>(a: *const f32, b: [*const f32; W], steps: usize, sums: &mut [[f32; WIDE * N]; ROWS]) {
    let mut acc = [[_mm256_setzero_ps(); W]; ROWS];
    // SAFETY: by this function's contract; W is at most three.
    unsafe {
        for step in 0..steps {
            for k in 0..LANES {
                let at = step * LANES * LANES;
                let b = b.map(|b| b.add(at + k * LANES));
                let mut right = [_mm256_setzero_ps(); W];
                right.iter_mut().zip(b).for_each(|(right, b)| *right = _mm256_load_ps(b));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let left = _mm256_broadcast_ss(&*a.add(at + r * LANES + k));
                    acc.iter_mut().zip(right).for_each(|(acc, right)| *acc = _mm256_fmadd_ps(left, right, *acc));
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            for (w, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(sums.as_mut_ptr().add(w * N), acc);
            }
        }
    }
}

/// As `portable::words`.
pub(super) fn words(x: &[f32], stride: usize, transpose: bool, tile: &mut Tile) {
    assert!(stride >= LANES && x.len() >= (LANES - 1) * stride + LANES);
    // SAFETY: the tier is available; sixteen lines are there.
    unsafe {
        match transpose {
            true => words_of::<true>(x.as_ptr(), stride, tile),
            false => words_of::<false>(x.as_ptr(), stride, tile),
        }
    }
}

/// # Safety
/// AVX2; 16 lines of 16 words are readable.
#[target_feature(enable = "avx2,fma")]
unsafe fn words_of<const TRANSPOSE: bool>(x: *const f32, stride: usize, tile: &mut Tile) {
    let out = tile.0.as_mut_ptr();
    for (l, w) in [(0, 0), (0, N), (N, 0), (N, N)] {
        let mut v = [_mm256_setzero_ps(); N];
        // SAFETY: by this function's contract; eight lines of eight words of a tile.
        unsafe {
            for (i, v) in v.iter_mut().enumerate() {
                *v = _mm256_loadu_ps(x.add((l + i) * stride + w));
            }
            let at = if TRANSPOSE {
                v = transposed(v);
                w * LANES + l
            } else {
                l * LANES + w
            };
            for (i, v) in v.into_iter().enumerate() {
                _mm256_store_ps(out.add(at + i * LANES), v);
            }
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn transposed(v: [__m256; N]) -> [__m256; N] {
    let (mut t, mut u, mut out) = (v, v, v);
    for i in [0, 2, 4, 6] {
        t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for i in [0, 4] {
        u[i] = _mm256_shuffle_ps::<0x44>(t[i], t[i + 2]);
        u[i + 1] = _mm256_shuffle_ps::<0xEE>(t[i], t[i + 2]);
        u[i + 2] = _mm256_shuffle_ps::<0x44>(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_shuffle_ps::<0xEE>(t[i + 1], t[i + 3]);
    }
    for i in 0..4 {
        out[i] = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
        out[i + 4] = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
    }
    out
}
