//! Quantised weights on AVX2: 16 channels are two registers of eight.
//!
//! Fast: `vpmaddubsw` multiplies unsigned weights with int8 activations and adds pairs in i16. A pair of 4-bit products is
//! at most 2 * 15 * 127 = 3810, so that the 8 groups of a block fit into i16 (5 bits: 4 groups, 6 bits: 2) before
//! `vpmaddwd` widens them; 8-bit weights are widened to i16 first. Per row and 512 multiply-adds that is about 40 vector
//! operations, which bounds it at some 50 multiply-adds a cycle; one row is bound by reading the weights.
//!
//! Up to [`DIRECT_ROWS`] rows unpack weights in registers; more rows share weights unpacked into the first-level cache.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::acts::{Quantized, quantize_row};
use super::layout::{Aligned, Layout, PANEL, fmt::*};
use super::weight::PackedWeight;
use super::{Sums, glu::glu as glu_portable};
use crate::dtype::DType;
use crate::model::config::Activation;

/// Runs `$f!(g)` for g in 0..8, each a literal.
macro_rules! groups {
    ($f:ident) => {
        $f!(0);
        $f!(1);
        $f!(2);
        $f!(3);
        $f!(4);
        $f!(5);
        $f!(6);
        $f!(7);
    };
}

/// Rows up to which weights are unpacked in registers.
const DIRECT_ROWS: usize = 4;
/// Blocks unpacked at a time.
const CHUNK: usize = 16;
/// An unpacked block: 512 unsigned bytes or 1,024 bytes of i16, f32 scales, f32 minima of both halves, sub-scales of both
/// halves as pairs of i16; each for 16 channels.
const UNPACKED: usize = SCALE + 5 * 64;
const SCALE: usize = 1024;
const MIN: usize = SCALE + 64;
const SUB: usize = MIN + 128;

/// 16 channels.
type Ints = [__m256i; 2];
type Floats = [__m256; 2];

/// Rows of a tile: their records and their sums.
#[derive(Clone, Copy)]
struct Rows {
    x: *const u8,
    stride: usize,
    /// Offsets of the int8 and i16 values in a record.
    q: usize,
    wide: usize,
    sums: *mut f32,
}

impl Rows {
    /// Those from row `r`.
    unsafe fn from(self, r: usize) -> Self {
        // SAFETY: the caller's rows go beyond r.
        unsafe { Self { x: self.x.add(r * self.stride), sums: self.sums.add(r * PANEL), ..self } }
    }
}

/// [`quantize_row`] compiled for AVX2.
pub(super) fn quantize(x: &[f32], out: &mut [[f32; 4]]) {
    #[target_feature(enable = "avx2")]
    fn inner(x: &[f32], out: &mut [[f32; 4]]) {
        quantize_row(x, out);
    }
    // SAFETY: the tier is available (a rule of `MatmulCx`).
    unsafe { inner(x, out) }
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

/// One block of format `dtype` in f32, `[input][channel]`.
///
/// # Safety
/// AVX2, FMA, F16C; `head` and `w` are a block of 16 channels, `out` has room for 512 values.
pub(super) unsafe fn widen(dtype: DType, head: *const u8, w: *const u8, out: *mut f32) {
    // SAFETY: by this function's contract.
    unsafe {
        match dtype as u8 {
            Q4_0 => widen_of::<Q4_0>(head, w, out),
            Q4_1 => widen_of::<Q4_1>(head, w, out),
            Q5_0 => widen_of::<Q5_0>(head, w, out),
            Q5_1 => widen_of::<Q5_1>(head, w, out),
            Q4_K => widen_of::<Q4_K>(head, w, out),
            Q5_K => widen_of::<Q5_K>(head, w, out),
            Q6_K => widen_of::<Q6_K>(head, w, out),
            _ => widen_of::<Q8_0>(head, w, out),
        }
    }
}

/// # Safety
/// As [`widen`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_of<const F: u8>(head: *const u8, w: *const u8, out: *mut f32) {
    // SAFETY: by this function's contract.
    unsafe {
        let (scale, min) = scales::<F, false>(head, w);
        macro_rules! group {
            ($g:literal) => {
                let q = if F == Q8_0 { load(w.add($g * 64)) } else { group::<F, false, $g>(w) };
                for h in 0..2 {
                    let (s, m) = if F == Q6_K {
                        (_mm256_mul_ps(scale[h], sub_floats(w, $g / 4, h)), min[$g / 4][h])
                    } else {
                        (scale[h], min[0][h])
                    };
                    let ints = if F == Q8_0 { signed_bytes(q[h]) } else { unsigned_bytes(q[h]) };
                    for (i, q) in ints.into_iter().enumerate() {
                        let q = _mm256_cvtepi32_ps(q);
                        let v = if F == Q8_0 { _mm256_mul_ps(q, s) } else { _mm256_fmadd_ps(q, s, m) };
                        _mm256_storeu_ps(out.add(($g * 4 + i) * PANEL + h * 8), v);
                    }
                }
            };
        }
        groups!(group);
    }
}

/// The four bytes of every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unsigned_bytes(v: __m256i) -> [__m256i; 4] {
    let mask = _mm256_set1_epi32(255);
    [
        _mm256_and_si256(v, mask),
        _mm256_and_si256(_mm256_srli_epi32::<8>(v), mask),
        _mm256_and_si256(_mm256_srli_epi32::<16>(v), mask),
        _mm256_srli_epi32::<24>(v),
    ]
}

/// The four signed bytes of every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn signed_bytes(v: __m256i) -> [__m256i; 4] {
    [
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(v)),
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(v)),
        _mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(v)),
        _mm256_srai_epi32::<24>(v),
    ]
}

/// Q6_K's sub-scales of a half as f32, eight channels.
///
/// # Safety
/// As [`group`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn sub_floats(w: *const u8, half: usize, h: usize) -> __m256 {
    // SAFETY: by this function's contract.
    _mm256_cvtepi32_ps(unsafe { bytes::<true>(w.add(const { Layout::of(Q6_K).scales } + half * 16)) }[h])
}

/// As `portable::fast`.
pub(super) fn fast(w: &PackedWeight, p: usize, x: Quantized<'_>, first: usize, n: usize, out: &mut Sums) {
    let panel = w.panel(p);
    let blocks = w.blocks();
    let (records, stride) = x.records(first..first + n);
    assert!(panel.len() == Layout::of(w.dtype() as u8).panel(w.cols_len()) && n * PANEL <= out.len());
    let has_wide = stride >= blocks * 112;
    assert!(records.len() >= n * blocks * 48 && (w.dtype() as u8 != Q8_0 || has_wide));
    out[..n * PANEL].fill(0.0);
    let rows = Rows { x: records.as_ptr(), stride, q: blocks * 16, wide: blocks * 48, sums: out.as_mut_ptr() };
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
            _ => rows_of::<Q8_0, Q8_0>(panel.as_ptr(), blocks, rows, n),
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
        if n <= DIRECT_ROWS {
            return tiles::<F, false>(panel, 0, blocks, rows, n);
        }
        let layout = const { Layout::of(F) };
        let mut buffer = std::mem::MaybeUninit::<Aligned<[u8; CHUNK * UNPACKED]>>::uninit();
        let buffer = buffer.as_mut_ptr().cast::<u8>();
        for first in (0..blocks).step_by(CHUNK) {
            let count = CHUNK.min(blocks - first);
            for k in 0..count {
                let (head, block) = layout.block(first + k);
                unpack::<F>(panel.add(head), panel.add(block), buffer.add(k * UNPACKED));
            }
            let mut r = 0;
            while r < n {
                let group = DIRECT_ROWS.min(n - r);
                tiles::<C, true>(buffer, first, count, rows.from(r), group);
                r += group;
            }
        }
    }
}

/// One group of up to four rows.
///
/// # Safety
/// As [`tile`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tiles<const F: u8, const U: bool>(w: *const u8, first: usize, count: usize, rows: Rows, n: usize) {
    // SAFETY: by this function's contract.
    unsafe {
        match n {
            1 => tile::<F, U, 1>(w, first, count, rows),
            2 => tile::<F, U, 2>(w, first, count, rows),
            3 => tile::<F, U, 3>(w, first, count, rows),
            _ => tile::<F, U, 4>(w, first, count, rows),
        }
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
                let x: [*const u8; R] = std::array::from_fn(|r| rows.x.add(r * rows.stride));
                if !U && R <= 2 {
                    for line in 0..layout.stride.div_ceil(64) {
                        _mm_prefetch::<_MM_HINT_T0>(at.add(PREFETCH + line * 64).cast());
                    }
                }
                let dots = if layout.bits == 8 {
                    dot_i16::<U, R>(at, x.map(|x| x.add(rows.wide + k * 64)))
                } else {
                    dot_u8::<F, U, R>(at, x.map(|x| x.add(rows.q + k * 32)))
                };
                let (scale, min) = scales::<F, U>(head, at);
                for r in 0..R {
                    let meta = x[r].add(k * 16).cast::<f32>();
                    let s = _mm256_broadcast_ss(&*meta);
                    for h in 0..2 {
                        let dot = _mm256_cvtepi32_ps(dots[r][h]);
                        let mut sum = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale[h], s), sums[r][h]);
                        if F == Q6_K {
                            sum = _mm256_fmadd_ps(min[0][h], _mm256_broadcast_ss(&*meta.add(2)), sum);
                            sum = _mm256_fmadd_ps(min[1][h], _mm256_broadcast_ss(&*meta.add(3)), sum);
                        } else if F != Q8_0 {
                            sum = _mm256_fmadd_ps(min[0][h], _mm256_broadcast_ss(&*meta.add(1)), sum);
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

/// How far ahead of one or two rows the weights are asked for.
const PREFETCH: usize = 2048;

/// Integer dot products of a block of at most six bits with R rows (times the sub-scales, for Q6_K).
///
/// # Safety
/// As [`tile`]; `x` are the int8 values of the block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn dot_u8<const F: u8, const U: bool, const R: usize>(w: *const u8, x: [*const u8; R]) -> [Ints; R] {
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
                    let x = _mm256_set1_epi32(x[r].add(4 * $g).cast::<i32>().read_unaligned());
                    for h in 0..2 {
                        let product = _mm256_maddubs_epi16(weights[h], x);
                        let fresh = $g % widen_every == 0;
                        pairs[r][h] = if fresh { product } else { _mm256_add_epi16(pairs[r][h], product) };
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
/// As [`tile`]; `x` are the i16 values of the block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn dot_i16<const U: bool, const R: usize>(w: *const u8, x: [*const u8; R]) -> [Ints; R] {
    let mut dots = [[_mm256_setzero_si256(); 2]; R];
    // SAFETY: the groups of a block and the 64 bytes of each row.
    unsafe {
        for g in 0..8 {
            let weights: [Ints; 2] =
                if U { [load(w.add(g * 128)), load(w.add(g * 128 + 64))] } else { even_odd(load(w.add(g * 64))) };
            for (odd, weights) in weights.iter().enumerate() {
                for r in 0..R {
                    let x = _mm256_set1_epi32(x[r].add(8 * g + 4 * odd).cast::<i32>().read_unaligned());
                    for h in 0..2 {
                        dots[r][h] = _mm256_add_epi32(dots[r][h], _mm256_madd_epi16(weights[h], x));
                    }
                }
            }
        }
    }
    dots
}

/// # Safety
/// 64 readable bytes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn load(at: *const u8) -> Ints {
    // SAFETY: by this function's contract.
    unsafe { [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())] }
}

/// Inputs 0 and 2, and 1 and 3, of every lane of i8, as i16.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn even_odd(w: Ints) -> [Ints; 2] {
    [w.map(|w| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w))), w.map(|w| _mm256_srai_epi16::<8>(w))]
}

/// Bits of all lanes shifted so that bit `from` comes to bit 4, under `mask`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn bits_to_four(v: Ints, from: usize, mask: i8) -> Ints {
    v.map(|v| {
        let v = match from {
            0 => _mm256_slli_epi16::<4>(v),
            1 => _mm256_slli_epi16::<3>(v),
            2 => _mm256_slli_epi16::<2>(v),
            3 => _mm256_slli_epi16::<1>(v),
            4 => v,
            5 => _mm256_srli_epi16::<1>(v),
            6 => _mm256_srli_epi16::<2>(v),
            _ => _mm256_srli_epi16::<3>(v),
        };
        _mm256_and_si256(v, _mm256_set1_epi8(mask))
    })
}

/// Group G of a block of at most six bits, as unsigned bytes.
///
/// # Safety
/// AVX2; `w` is a block of format F, or (U) an unpacked one.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn group<const F: u8, const U: bool, const G: usize>(w: *const u8) -> Ints {
    // SAFETY: by this function's contract.
    unsafe {
        if U {
            return load(w.add(G * 64));
        }
        let nibbles = load(w.add(G % 4 * 64));
        let low = nibbles.map(|v| {
            let v = if G < 4 { v } else { _mm256_srli_epi16::<4>(v) };
            _mm256_and_si256(v, _mm256_set1_epi8(15))
        });
        let high = match const { Layout::of(F).bits } {
            4 => return low,
            5 => bits_to_four(load(w.add(256)), G, 0x10),
            _ => bits_to_four(load(w.add(256 + G / 4 * 64)), G % 4 * 2, 0x30),
        };
        [_mm256_or_si256(low[0], high[0]), _mm256_or_si256(low[1], high[1])]
    }
}

/// f32 of 16 halves.
///
/// # Safety
/// 32 readable bytes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn halves(at: *const u8) -> Floats {
    // SAFETY: by this function's contract.
    unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(at.cast())), _mm256_cvtph_ps(_mm_loadu_si128(at.add(16).cast()))] }
}

/// i32 of 16 bytes.
///
/// # Safety
/// 16 readable bytes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn bytes<const SIGNED: bool>(at: *const u8) -> Ints {
    // SAFETY: by this function's contract.
    let parts = unsafe { [_mm_loadl_epi64(at.cast()), _mm_loadl_epi64(at.add(8).cast())] };
    parts.map(|v| if SIGNED { _mm256_cvtepi8_epi32(v) } else { _mm256_cvtepu8_epi32(v) })
}

/// Q6_K's sub-scales of half `half`, as pairs of i16.
///
/// # Safety
/// As [`group`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn sub_scales<const U: bool>(w: *const u8, half: usize) -> Ints {
    // SAFETY: by this function's contract.
    unsafe {
        if U {
            return load(w.add(SUB + half * 64));
        }
        let v = bytes::<true>(w.add(const { Layout::of(Q6_K).scales } + half * 16));
        v.map(|v| _mm256_blend_epi16::<0b1010_1010>(v, _mm256_slli_epi32::<16>(v)))
    }
}

/// What integer dots are multiplied with, and minima (of both halves, where they differ).
///
/// # Safety
/// As [`group`]; `head` is the header.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn scales<const F: u8, const U: bool>(head: *const u8, w: *const u8) -> (Floats, [Floats; 2]) {
    let layout = const { Layout::of(F) };
    let times = |a: Floats, b: Floats| [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])];
    let zero = [_mm256_set1_ps(-(layout.zero as f32)); 2];
    let negative = |a: Floats| a.map(|a| _mm256_xor_ps(a, _mm256_set1_ps(-0.0)));
    let floats = |a: Ints| a.map(|a| _mm256_cvtepi32_ps(a));
    // SAFETY: by this function's contract.
    unsafe {
        if U {
            let f = |at: usize| load(w.add(at)).map(|v| _mm256_castsi256_ps(v));
            return (f(SCALE), [f(MIN), f(MIN + 64)]);
        }
        let at = w.add(layout.scales);
        match F {
            Q4_1 | Q5_1 => {
                let min = halves(at.add(32));
                (halves(at), [min, min])
            }
            Q4_K | Q5_K => {
                let scale = times(halves(head), floats(bytes::<false>(at)));
                let min = negative(times(halves(head.add(32)), floats(bytes::<false>(at.add(16)))));
                (scale, [min, min])
            }
            Q6_K => {
                let d = halves(head);
                let min = times(zero, d);
                let half = |at| floats(bytes::<true>(at));
                (d, [times(min, half(at)), times(min, half(at.add(16)))])
            }
            _ => {
                let d = halves(at);
                (d, [times(zero, d); 2])
            }
        }
    }
}

/// Unpacks a block into `out`.
///
/// # Safety
/// As [`group`]; `out` has room for [`UNPACKED`] bytes.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn unpack<const F: u8>(head: *const u8, w: *const u8, out: *mut u8) {
    // SAFETY: by this function's contract.
    unsafe {
        let store = |at: usize, v: Ints| {
            _mm256_storeu_si256(out.add(at).cast(), v[0]);
            _mm256_storeu_si256(out.add(at + 32).cast(), v[1]);
        };
        if F == Q8_0 {
            for g in 0..8 {
                let [even, odd] = even_odd(load(w.add(g * 64)));
                store(g * 128, even);
                store(g * 128 + 64, odd);
            }
        } else {
            macro_rules! group {
                ($g:literal) => {
                    store($g * 64, group::<F, false, $g>(w));
                };
            }
            groups!(group);
        }
        let (scale, min) = scales::<F, false>(head, w);
        store(SCALE, scale.map(|v| _mm256_castps_si256(v)));
        store(MIN, min[0].map(|v| _mm256_castps_si256(v)));
        store(MIN + 64, min[1].map(|v| _mm256_castps_si256(v)));
        if F == Q6_K {
            store(SUB, sub_scales::<false>(w, 0));
            store(SUB + 64, sub_scales::<false>(w, 1));
        }
    }
}
