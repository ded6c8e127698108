//! Quantised weights on AVX2: 16 channels are two registers of eight.
//!
//! Fast: `vpmaddubsw` multiplies unsigned weights with int8 activations and adds pairs in i16. A pair of 4-bit products is
//! at most 2 * 15 * 127 = 3810, so that the 8 groups of a block fit into i16 (5 bits: 4 groups, 6 bits: 2) before
//! `vpmaddwd` widens them; 8-bit weights are widened to i16 first. Per row and 512 multiply-adds that is about 40 vector
//! operations, which bounds it at some 50 multiply-adds a cycle; one row is bound by reading the weights.
//!
//! Few rows unpack weights in registers; many rows share weights unpacked into the first-level cache.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::acts::{FINER, Quantized, Record, Wide, blocks_of};
use super::layout::{Aligned, BLOCK, Layout, PANEL, fmt::*};
use super::unpack_avx2::{Ints, UNPACKED, even_odd, group, groups, load, scales, sub_scales, unpack};
use super::weight::PackedWeight;
use super::{Sums, TILE_ROWS, glu::glu as glu_portable};
use crate::model::config::Activation;

/// Rows of a tile: their 16-bit sums, two weights, an activation and a product fill the 16 registers.
const ROWS: usize = 4;
/// Rows up to which every tile unpacks the weights anew, in registers, as measured: the shuffles of 5 and 6 bits are worth
/// saving soonest, those of 8 bits never.
const fn direct_rows(format: u8) -> usize {
    match Layout::of(format).bits {
        4 => 24,
        8 => TILE_ROWS,
        _ => ROWS,
    }
}
/// Blocks unpacked at a time.
const CHUNK: usize = 16;
/// Rows of a tile: their records and their sums.
#[derive(Clone, Copy)]
struct Rows {
    x: *const Record,
    wide: *const Wide,
    /// Records of a block: rows of the pass's tile.
    stride: usize,
    sums: *mut f32,
}

impl Rows {
    /// Those from row `r`.
    unsafe fn from(self, r: usize) -> Self {
        // SAFETY: the caller's rows go beyond r.
        unsafe { Self { x: self.x.add(r), wide: self.wide.wrapping_add(r), sums: self.sums.add(r * PANEL), ..self } }
    }
}

/// [`quantize`](super::acts::quantize) on AVX2, with the same results.
pub(super) fn quantize(x: &[f32], cols: usize, n: usize, block: usize, records: &mut [Record], wide: &mut [Wide]) {
    #[target_feature(enable = "avx2")]
    fn inner(x: &[f32], cols: usize, n: usize, block: usize, records: &mut [Record], wide: &mut [Wide]) {
        blocks_of(x, cols, n, block, records, wide, |x, q, wide| quantize_block(x, q, wide));
    }
    // SAFETY: the tier is available (a rule of `MatmulCx`).
    unsafe { inner(x, cols, n, block, records, wide) }
}

/// One block: `[s, s * sum, s * first half's sum, s * second half's sum]`.
#[target_feature(enable = "avx2")]
#[inline]
fn quantize_block(x: &[f32; BLOCK], q: &mut [i8; BLOCK], wide: Option<&mut Wide>) -> [f32; 4] {
    // SAFETY: loads and stores of whole arrays.
    unsafe {
        let at = x.as_ptr();
        let x =
            [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8)), _mm256_loadu_ps(at.add(16)), _mm256_loadu_ps(at.add(24))];
        let magnitude = |v| _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFF_FFFF));
        let max = _mm256_max_epi32(
            _mm256_max_epi32(magnitude(x[0]), magnitude(x[1])),
            _mm256_max_epi32(magnitude(x[2]), magnitude(x[3])),
        );
        let max = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
        let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b01_00_11_10>(max));
        let max = _mm_max_epi32(max, _mm_shuffle_epi32::<0b10_11_00_01>(max));
        let max = f32::from_bits(_mm_cvtsi128_si32(max) as u32);
        let inverse = _mm256_set1_ps(if max > 0.0 { 127.0 / max } else { 0.0 });
        let rounded = |v| _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));
        // Packing works in 128-bit halves; the permutation puts the dwords back in order.
        let bytes = _mm256_packs_epi16(
            _mm256_packs_epi32(rounded(x[0]), rounded(x[1])),
            _mm256_packs_epi32(rounded(x[2]), rounded(x[3])),
        );
        let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes);
        let ones = _mm256_set1_epi8(1);
        let sums = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, bytes), _mm256_set1_epi16(1));
        let sums = _mm256_hadd_epi32(sums, sums);
        let sums = _mm256_hadd_epi32(sums, sums);
        if let Some(wide) = wide {
            let finer = _mm256_mul_ps(inverse, _mm256_set1_ps(FINER));
            let rounded = |v| _mm256_cvtps_epi32(_mm256_mul_ps(v, finer));
            // Of every four inputs 0, 2, 1, 3.
            let pairs =
                _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
            for (i, x) in x.as_chunks::<2>().0.iter().enumerate() {
                let words = _mm256_packs_epi32(rounded(x[0]), rounded(x[1]));
                let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                _mm256_storeu_si256(wide.as_mut_ptr().cast::<__m256i>().add(i), _mm256_shuffle_epi8(words, pairs));
            }
        }
        let low = _mm256_cvtsi256_si32(sums) as f32;
        let high = _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(sums)) as f32;
        let s = max / 127.0;
        [s, s * (low + high), s * low, s * high]
    }
}

/// [`glu_portable`] compiled for AVX2.
pub(super) fn glu(y: &mut [f32], gate: &[f32], up: &[f32], act: Activation) {
    #[target_feature(enable = "avx2")]
    fn inner(y: &mut [f32], gate: &[f32], up: &[f32], act: Activation) {
        glu_portable(y, gate, up, act);
    }
    // SAFETY: the tier is available (a rule of `MatmulCx`).
    unsafe { inner(y, gate, up, act) }
}

/// As `portable::fast`.
pub(super) fn fast(w: &PackedWeight, p: usize, x: Quantized<'_>, first: usize, n: usize, out: &mut Sums) {
    let panel = w.panel(p);
    let blocks = w.blocks();
    let (records, wide) = x.tile(first, n);
    assert!(panel.len() == Layout::of(w.dtype() as u8).panel(w.cols_len()) && n * PANEL <= out.len());
    assert!(records.len() == n * blocks && (w.dtype() as u8 != Q8_0 || wide.len() == records.len()));
    out[..n * PANEL].fill(0.0);
    let rows = Rows { x: records.as_ptr(), wide: wide.as_ptr(), stride: n, sums: out.as_mut_ptr() };
    // SAFETY: the tier is available; the panel holds `blocks` blocks of its format, the records n rows of as many, `out`
    // n rows of sums (all asserted above).
    unsafe {
        match w.dtype() as u8 {
            Q4_0 => rows_of::<Q4_0, Q4_1>(panel.as_ptr(), blocks, rows, n),
            Q4_1 => rows_of::<Q4_1, Q4_1>(panel.as_ptr(), blocks, rows, n),
            Q5_0 => rows_of::<Q5_0, Q5_1>(panel.as_ptr(), blocks, rows, n),
            Q5_1 => rows_of::<Q5_1, Q5_1>(panel.as_ptr(), blocks, rows, n),
            Q4_K => rows_of::<Q4_K, Q4_1>(panel.as_ptr(), blocks, rows, n),
            Q5_K => rows_of::<Q5_K, Q5_1>(panel.as_ptr(), blocks, rows, n),
            Q6_K => rows_of::<Q6_K, Q6_K>(panel.as_ptr(), blocks, rows, n),
            _ => rows_of::<Q8_0, Q4_1>(panel.as_ptr(), blocks, rows, n),
        }
    }
}

/// All rows of a panel of format F, whose unpacked blocks are of the form of C.
///
/// # Safety
/// AVX2, FMA, F16C; `panel` holds `blocks` blocks, `rows` n rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of<const F: u8, const C: u8>(panel: *const u8, blocks: usize, rows: Rows, n: usize) {
    // SAFETY: by this function's contract; chunks stay inside `blocks` and row groups inside n.
    unsafe {
        if n <= direct_rows(F) {
            return tiles::<F, false>(panel, 0, blocks, rows, n);
        }
        let layout = const { Layout::of(F) };
        let mut buffer = std::mem::MaybeUninit::<Aligned<[u8; CHUNK * UNPACKED]>>::uninit();
        let buffer = buffer.as_mut_ptr().cast::<u8>();
        for first in (0..blocks).step_by(CHUNK) {
            let count = CHUNK.min(blocks - first);
            for k in 0..count {
                let (head, block) = layout.block(first + k);
                prefetch::<F>(panel.add(block), CHUNK * layout.stride);
                unpack::<F>(panel.add(head), panel.add(block), buffer.add(k * UNPACKED));
            }
            tiles::<C, true>(buffer, first, count, rows, n);
        }
    }
}

/// Asks for a block's bytes `ahead` bytes from here.
#[inline]
fn prefetch<const F: u8>(at: *const u8, ahead: usize) {
    for line in 0..const { Layout::of(F).stride.div_ceil(64) } {
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(ahead + line * 64).cast()) };
    }
}

/// All rows, in tiles of about the same size.
///
/// # Safety
/// As [`tile`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tiles<const F: u8, const U: bool>(w: *const u8, first: usize, count: usize, rows: Rows, n: usize) {
    let mut r = 0;
    while r < n {
        let group = (n - r).div_ceil((n - r).div_ceil(ROWS));
        // SAFETY: by this function's contract; groups stay inside n.
        unsafe {
            let rows = rows.from(r);
            match group {
                1 => tile::<F, U, 1>(w, first, count, rows),
                2 => tile::<F, U, 2>(w, first, count, rows),
                3 => tile::<F, U, 3>(w, first, count, rows),
                _ => tile::<F, U, 4>(w, first, count, rows),
            }
        }
        r += group;
    }
}

/// Adds `count` blocks, the first of which meets the activations' block `first`, to the sums of R rows. The blocks begin at
/// `w`, in format F or (U) unpacked.
///
/// # Safety
/// AVX2, FMA, F16C; `w` holds `count` blocks from a superblock's begin on, `rows` R rows of `first + count` blocks.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const F: u8, const U: bool, const R: usize>(w: *const u8, first: usize, count: usize, rows: Rows) {
    let layout = const { Layout::of(F) };
    // SAFETY: every address below is inside a block or a record as the contract says; prefetches may go anywhere.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        for (r, s) in sums.iter_mut().enumerate() {
            *s = std::array::from_fn(|h| _mm256_loadu_ps(rows.sums.add(r * PANEL + h * 8)));
        }
        let (supers, sub) = if U { (count, 1) } else { (count / layout.sub, layout.sub) };
        let (mut at, mut k) = (w, first);
        for _ in 0..supers {
            let head = at;
            at = at.add(if U { 0 } else { layout.header });
            for _ in 0..sub {
                let x = rows.x.add(k * rows.stride);
                if !U {
                    prefetch::<F>(at, PREFETCH);
                }
                let dots = if layout.bits == 8 {
                    dot_i16::<R>(at, rows.wide.add(k * rows.stride))
                } else {
                    dot_u8::<F, U, R>(at, x)
                };
                let (scale, min) = scales::<F, U>(head, at);
                for r in 0..R {
                    let meta = (*x.add(r)).meta;
                    let s = _mm256_set1_ps(if layout.bits == 8 { meta[0] / FINER } else { meta[0] });
                    for h in 0..2 {
                        let dot = _mm256_cvtepi32_ps(dots[r][h]);
                        let mut sum = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale[h], s), sums[r][h]);
                        if F == Q6_K {
                            sum = _mm256_fmadd_ps(min[0][h], _mm256_broadcast_ss(&meta[2]), sum);
                            sum = _mm256_fmadd_ps(min[1][h], _mm256_broadcast_ss(&meta[3]), sum);
                        } else if F != Q8_0 {
                            sum = _mm256_fmadd_ps(min[0][h], _mm256_broadcast_ss(&meta[1]), sum);
                        }
                        sums[r][h] = sum;
                    }
                }
                at = at.add(if U { UNPACKED } else { layout.stride });
                k += 1;
            }
        }
        for (r, s) in sums.iter().enumerate() {
            for (h, &s) in s.iter().enumerate() {
                _mm256_storeu_ps(rows.sums.add(r * PANEL + h * 8), s);
            }
        }
    }
}

/// How far ahead weights are asked for, in bytes.
const PREFETCH: usize = 2048;

/// `v`, in a register, now. Left to itself the compiler regroups the additions of a block and interleaves its groups until
/// most of them are spilled, which halves the speed.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn pin(mut v: __m256i) -> __m256i {
    // SAFETY: no instruction.
    unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) v, options(nostack, preserves_flags)) };
    v
}

/// Integer dot products of a block of at most six bits with R rows (times the sub-scales, for Q6_K).
///
/// # Safety
/// As [`tile`]; `x` are the R rows' records of the block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn dot_u8<const F: u8, const U: bool, const R: usize>(w: *const u8, x: *const Record) -> [Ints; R] {
    let zero = _mm256_setzero_si256();
    let mut dots = [[zero; 2]; R];
    let mut pairs = [[zero; 2]; R];
    let widen_every = const {
        if Layout::of(F).bits == 4 {
            8
        } else if Layout::of(F).bits == 5 {
            4
        } else {
            2
        }
    };
    // SAFETY: the groups of a block and the 32 bytes of each row.
    unsafe {
        macro_rules! group {
            ($g:literal) => {
                let weights = group::<F, U, $g>(w);
                for r in 0..R {
                    let x = _mm256_set1_epi32((&raw const (*x.add(r)).q[4 * $g]).cast::<i32>().read_unaligned());
                    for h in 0..2 {
                        let product = _mm256_maddubs_epi16(weights[h], x);
                        let fresh = $g % widen_every == 0;
                        pairs[r][h] = pin(if fresh { product } else { _mm256_add_epi16(pairs[r][h], product) });
                    }
                }
                if $g % widen_every == widen_every - 1 {
                    let factor = if F == Q6_K { sub_scales::<U>(w, $g / 4) } else { [_mm256_set1_epi16(1); 2] };
                    for r in 0..R {
                        for h in 0..2 {
                            let wide = _mm256_madd_epi16(pairs[r][h], factor[h]);
                            let fresh = $g + 1 == widen_every;
                            dots[r][h] = if fresh { wide } else { _mm256_add_epi32(dots[r][h], wide) };
                        }
                    }
                }
            };
        }
        groups!(group);
    }
    dots
}

/// Dot products of a block of i8 weights, as i16, with R rows of i16.
///
/// # Safety
/// As [`tile`]; `x` are the R rows' i16 values of the block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn dot_i16<const R: usize>(w: *const u8, x: *const Wide) -> [Ints; R] {
    let mut dots = [[_mm256_setzero_si256(); 2]; R];
    // SAFETY: the groups of a block and the 64 bytes of each row.
    unsafe {
        for g in 0..8 {
            for (odd, weights) in even_odd(load(w.add(g * 64))).iter().enumerate() {
                for (r, dots) in dots.iter_mut().enumerate() {
                    let x = _mm256_set1_epi32(x.add(r).cast::<i32>().add(2 * g + odd).read_unaligned());
                    for h in 0..2 {
                        dots[h] = pin(_mm256_add_epi32(dots[h], _mm256_madd_epi16(weights[h], x)));
                    }
                }
            }
        }
    }
    dots
}
