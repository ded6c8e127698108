//! Quantised weights on AVX-512 with VNNI: 16 channels are one register.
//!
//! `vpdpbusd` adds four products of unsigned weights and int8 activations to each i32 lane, exactly; the activations'
//! dword is broadcast from memory as its operand, so that a block of 32 inputs and one row are eight such instructions, a
//! conversion and two or three multiplications. 8-bit weights are widened to i16 and meet the activations' i16 form in
//! `vpdpwssd`. Registers hold the sums of twelve rows.
#![allow(unsafe_code)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::acts::{FINER, Quantized, Record, Wide};
use super::layout::{Aligned, Layout, PANEL, fmt::*};
use super::unpack_avx2::groups;
use super::weight::PackedWeight;
use super::{Sums, TILE_ROWS};

/// Rows of a tile.
const ROWS: usize = 12;
/// Blocks unpacked at a time.
const CHUNK: usize = 16;
/// How far ahead weights are asked for, in bytes: at a core's share of the bandwidth, what arrives within the time that
/// memory takes to answer. Half of it costs a fifth of the speed of one row on Emerald Rapids.
const PREFETCH: usize = 4096;
/// An unpacked block: 512 bytes, then f32 scales and minima, both of both halves, for 16 channels.
const UNPACKED: usize = 512 + 4 * 64;
const SCALE: usize = 512;
const MIN: usize = SCALE + 128;

/// Rows up to which every tile unpacks the weights anew; 8-bit weights are never unpacked.
const fn direct_rows(format: u8) -> usize {
    match Layout::of(format).bits {
        8 => TILE_ROWS,
        _ => ROWS,
    }
}

/// Halves of a block that have scales of their own.
const fn halves_of(format: u8) -> usize {
    if format == Q6_K { 2 } else { 1 }
}

/// Rows of a tile: their records and their sums.
#[derive(Clone, Copy)]
struct Rows {
    x: *const Record,
    wide: *const Wide,
    /// Records of a block: rows of the pass's tile.
    stride: usize,
    sums: *mut f32,
}

/// As `portable::fast`.
pub(super) fn fast(w: &PackedWeight, p: usize, x: Quantized<'_>, first: usize, n: usize, out: &mut Sums) {
    let (panel, blocks) = (w.panel(p), w.blocks());
    let (records, wide) = x.tile(first, n);
    assert!(panel.len() == Layout::of(w.dtype() as u8).panel(w.cols_len()) && n * PANEL <= out.len());
    assert!(records.len() == n * blocks && (w.dtype() as u8 != Q8_0 || wide.len() == records.len()));
    out[..n * PANEL].fill(0.0);
    let rows = Rows { x: records.as_ptr(), wide: wide.as_ptr(), stride: n, sums: out.as_mut_ptr() };
    // SAFETY: the tier is available; the panel holds `blocks` blocks of its format, the records n rows of as many, `out`
    // n rows of sums (all asserted above).
    unsafe {
        match w.dtype() as u8 {
            Q4_0 => rows_of::<Q4_0>(panel.as_ptr(), blocks, rows, n),
            Q4_1 => rows_of::<Q4_1>(panel.as_ptr(), blocks, rows, n),
            Q5_0 => rows_of::<Q5_0>(panel.as_ptr(), blocks, rows, n),
            Q5_1 => rows_of::<Q5_1>(panel.as_ptr(), blocks, rows, n),
            Q4_K => rows_of::<Q4_K>(panel.as_ptr(), blocks, rows, n),
            Q5_K => rows_of::<Q5_K>(panel.as_ptr(), blocks, rows, n),
            Q6_K => rows_of::<Q6_K>(panel.as_ptr(), blocks, rows, n),
            _ => rows_of::<Q8_0>(panel.as_ptr(), blocks, rows, n),
        }
    }
}

/// All rows of a panel of format F.
///
/// # Safety
/// AVX-512; `panel` holds `blocks` blocks, `rows` n rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn rows_of<const F: u8>(panel: *const u8, blocks: usize, rows: Rows, n: usize) {
    // SAFETY: by this function's contract; chunks stay inside `blocks`. Unpacked blocks are alike but for their halves.
    unsafe {
        if n <= direct_rows(F) {
            return tiles::<F, false>(panel, Ahead::new::<F>(panel.wrapping_add(PREFETCH)), 0, blocks, rows, n);
        }
        let layout = const { Layout::of(F) };
        let mut buffer = MaybeUninit::<Aligned<[u8; CHUNK * UNPACKED]>>::uninit();
        let buffer = buffer.as_mut_ptr().cast::<u8>();
        for first in (0..blocks).step_by(CHUNK) {
            let count = CHUNK.min(blocks - first);
            for k in 0..count {
                let (head, block) = layout.block(first + k);
                unpack::<F>(panel.add(head), panel.add(block), buffer.add(k * UNPACKED));
            }
            // The next chunk, which is unpacked after this one's products.
            let ahead = Ahead::new::<F>(panel.wrapping_add(layout.block(first + CHUNK).1));
            if halves_of(F) == 2 {
                tiles::<Q6_K, true>(buffer, ahead, first, count, rows, n);
            } else {
                tiles::<Q4_1, true>(buffer, ahead, first, count, rows, n);
            }
        }
    }
}

/// What to ask memory for while blocks are multiplied: as much for each as a packed block has. Spread over the products,
/// requests do not wait for each other.
#[derive(Clone, Copy)]
struct Ahead {
    at: *const u8,
    stride: usize,
}

impl Ahead {
    /// Blocks of format F from `at` on, which may be any address.
    fn new<const F: u8>(at: *const u8) -> Self {
        Self { at, stride: const { Layout::of(F).stride } }
    }

    /// Nothing.
    const NONE: Self = Self { at: std::ptr::null(), stride: 0 };

    /// Asks for the next block.
    #[inline(always)]
    fn ask(&mut self) {
        for line in (0..self.stride).step_by(64) {
            // SAFETY: a hint, which may name any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.at.wrapping_add(line).cast()) };
        }
        self.at = self.at.wrapping_add(self.stride);
    }
}

/// All rows, in tiles of about the same size.
///
/// # Safety
/// As [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn tiles<const F: u8, const U: bool>(
    w: *const u8,
    mut ahead: Ahead,
    first: usize,
    count: usize,
    rows: Rows,
    n: usize,
) {
    let mut r = 0;
    while r < n {
        let group = (n - r).div_ceil((n - r).div_ceil(ROWS));
        // SAFETY: by this function's contract; groups stay inside n.
        unsafe {
            let rows =
                Rows { x: rows.x.add(r), wide: rows.wide.wrapping_add(r), sums: rows.sums.add(r * PANEL), ..rows };
            match group {
                1 => tile::<F, U, 1>(w, ahead, first, count, rows),
                2 => tile::<F, U, 2>(w, ahead, first, count, rows),
                3 => tile::<F, U, 3>(w, ahead, first, count, rows),
                4 => tile::<F, U, 4>(w, ahead, first, count, rows),
                5 => tile::<F, U, 5>(w, ahead, first, count, rows),
                6 => tile::<F, U, 6>(w, ahead, first, count, rows),
                7 => tile::<F, U, 7>(w, ahead, first, count, rows),
                8 => tile::<F, U, 8>(w, ahead, first, count, rows),
                9 => tile::<F, U, 9>(w, ahead, first, count, rows),
                10 => tile::<F, U, 10>(w, ahead, first, count, rows),
                11 => tile::<F, U, 11>(w, ahead, first, count, rows),
                _ => tile::<F, U, 12>(w, ahead, first, count, rows),
            }
        }
        (r, ahead) = (r + group, Ahead::NONE);
    }
}

/// Adds `count` blocks, the first of which meets the activations' block `first`, to the sums of R rows. The blocks begin at
/// `w`, in format F or (U) unpacked.
///
/// # Safety
/// AVX-512; `w` holds `count` blocks from a superblock's begin on, `rows` R rows of `first + count` blocks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn tile<const F: u8, const U: bool, const R: usize>(
    w: *const u8,
    mut ahead: Ahead,
    first: usize,
    count: usize,
    rows: Rows,
) {
    let (layout, halves) = const { (Layout::of(F), halves_of(F)) };
    // SAFETY: every address below is inside a block or a record as the contract says; prefetches may go anywhere.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); R];
        for (r, s) in sums.iter_mut().enumerate() {
            *s = _mm512_loadu_ps(rows.sums.add(r * PANEL));
        }
        let (supers, sub) = if U { (count, 1) } else { (count / layout.sub, layout.sub) };
        let (mut at, mut k) = (w, first);
        for _ in 0..supers {
            let head = at;
            at = at.add(if U { 0 } else { layout.header });
            for _ in 0..sub {
                ahead.ask();
                let x = rows.x.add(k * rows.stride);
                let dots = if layout.bits == 8 {
                    [dot_i16::<R>(at, rows.wide.add(k * rows.stride)), [_mm512_setzero_si512(); R]]
                } else {
                    dot_u8::<F, U, R>(at, x)
                };
                let (scale, min) = scales::<F, U>(head, at);
                for (r, sum) in sums.iter_mut().enumerate() {
                    let meta = (*x.add(r)).meta;
                    let s = _mm512_set1_ps(if layout.bits == 8 { meta[0] / FINER } else { meta[0] });
                    for half in 0..halves {
                        let dot = _mm512_cvtepi32_ps(dots[half][r]);
                        *sum = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale[half], s), *sum);
                        if F != Q8_0 {
                            let x = meta[if halves == 2 { 2 + half } else { 1 }];
                            *sum = _mm512_fmadd_ps(min[half], _mm512_set1_ps(x), *sum);
                        }
                    }
                }
                at = at.add(if U { UNPACKED } else { layout.stride });
                k += 1;
            }
        }
        for (r, &s) in sums.iter().enumerate() {
            _mm512_storeu_ps(rows.sums.add(r * PANEL), s);
        }
    }
}

/// `acc` and the dot products of its lanes' weights with the dword of activations at `x + at`, by instruction `$op`.
///
/// As an intrinsic the compiler takes some for a multiplication and an addition, and finishes one row's chain before the
/// next: more waiting instructions than a core can look over, where rows side by side are independent chains.
macro_rules! dot {
    ($op:literal, $acc:expr, $weights:expr, $x:expr, $at:expr) => {
        std::arch::asm!(
            concat!($op, " {acc}, {w}, dword ptr [{x} + {at}]{{1to16}}"),
            acc = inout(zmm_reg) $acc,
            w = in(zmm_reg) $weights,
            x = in(reg) $x,
            at = const $at,
            options(nostack, preserves_flags, readonly),
        )
    };
}

/// `$m!(row)` for every row of the largest tile.
macro_rules! rows {
    ($m:ident) => {
        $m!(0);
        $m!(1);
        $m!(2);
        $m!(3);
        $m!(4);
        $m!(5);
        $m!(6);
        $m!(7);
        $m!(8);
        $m!(9);
        $m!(10);
        $m!(11);
    };
}

/// Integer dot products of (the halves of) a block of at most six bits with R rows.
///
/// # Safety
/// As [`tile`]; `x` are the R rows' records of the block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
unsafe fn dot_u8<const F: u8, const U: bool, const R: usize>(w: *const u8, x: *const Record) -> [[__m512i; R]; 2] {
    let halves = const { halves_of(F) };
    let mut dots = [[_mm512_setzero_si512(); R]; 2];
    // SAFETY: the groups of a block and the 32 bytes of each row.
    unsafe {
        macro_rules! group {
            ($g:literal) => {
                let weights = group::<F, U, $g>(w);
                let dots = &mut dots[$g / 4 * (halves - 1)];
                macro_rules! row {
                    ($r:literal) => {
                        if $r < R {
                            dot!("vpdpbusd", dots[$r], weights, x, $r * size_of::<Record>() + 16 + 4 * $g);
                        }
                    };
                }
                rows!(row);
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
unsafe fn dot_i16<const R: usize>(w: *const u8, x: *const Wide) -> [__m512i; R] {
    let mut dots = [_mm512_setzero_si512(); R];
    // SAFETY: the groups of a block and the 64 bytes of each row.
    unsafe {
        macro_rules! group {
            ($g:literal) => {
                let bytes = load(w.add($g * 64));
                let even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(bytes));
                let odd = _mm512_srai_epi16::<8>(bytes);
                macro_rules! row {
                    ($r:literal) => {
                        if $r < R {
                            dot!("vpdpwssd", dots[$r], even, x, $r * size_of::<Wide>() + 8 * $g);
                            dot!("vpdpwssd", dots[$r], odd, x, $r * size_of::<Wide>() + 8 * $g + 4);
                        }
                    };
                }
                rows!(row);
            };
        }
        groups!(group);
    }
    dots
}

/// # Safety
/// 64 readable bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
unsafe fn load(at: *const u8) -> __m512i {
    // SAFETY: by this function's contract.
    unsafe { _mm512_loadu_si512(at.cast()) }
}

/// Group G of a block of at most six bits, as unsigned bytes.
///
/// # Safety
/// `w` is a block of format F, or (U) an unpacked one.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
unsafe fn group<const F: u8, const U: bool, const G: usize>(w: *const u8) -> __m512i {
    // SAFETY: by this function's contract.
    unsafe {
        if U {
            return load(w.add(G * 64));
        }
        let nibbles = load(w.add(G % 4 * 64));
        let nibbles = if G < 4 { nibbles } else { _mm512_srli_epi16::<4>(nibbles) };
        let low = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
        match const { Layout::of(F).bits } {
            4 => low,
            5 => _mm512_or_si512(low, bits_to_four(load(w.add(256)), G, 0x10)),
            _ => _mm512_or_si512(low, bits_to_four(load(w.add(256 + G / 4 * 64)), G % 4 * 2, 0x30)),
        }
    }
}

/// Bits of all bytes moved from `from` to 4, under `mask`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn bits_to_four(v: __m512i, from: usize, mask: i8) -> __m512i {
    let v = match from {
        0 => _mm512_slli_epi16::<4>(v),
        1 => _mm512_slli_epi16::<3>(v),
        2 => _mm512_slli_epi16::<2>(v),
        3 => _mm512_slli_epi16::<1>(v),
        4 => v,
        5 => _mm512_srli_epi16::<1>(v),
        6 => _mm512_srli_epi16::<2>(v),
        _ => _mm512_srli_epi16::<3>(v),
    };
    _mm512_and_si512(v, _mm512_set1_epi8(mask))
}

/// Scales and minima of the halves of a block; where halves have the same, the second is not to be used.
///
/// # Safety
/// As [`group`]; `head` is the header.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
unsafe fn scales<const F: u8, const U: bool>(head: *const u8, w: *const u8) -> ([__m512; 2], [__m512; 2]) {
    let layout = const { Layout::of(F) };
    // SAFETY: by this function's contract: 16 halves are 32 bytes, 16 sub-scales 16 bytes.
    unsafe {
        if U {
            let at = w.cast::<f32>();
            let two = |from: usize| [_mm512_loadu_ps(at.add(from / 4)), _mm512_loadu_ps(at.add(from / 4 + 16))];
            return (two(SCALE), two(MIN));
        }
        let at = w.add(layout.scales);
        let (scale, min) = match F {
            Q4_1 | Q5_1 => (floats(at), floats(at.add(32))),
            Q4_K | Q5_K => {
                let [s, m] = [_mm_loadu_si128(at.cast()), _mm_loadu_si128(at.add(16).cast())];
                let [s, m] = [_mm512_cvtepu8_epi32(s), _mm512_cvtepu8_epi32(m)];
                let m = _mm512_sub_epi32(_mm512_setzero_si512(), m);
                let scale = _mm512_mul_ps(floats(head), _mm512_cvtepi32_ps(s));
                (scale, _mm512_mul_ps(floats(head.add(32)), _mm512_cvtepi32_ps(m)))
            }
            Q6_K => {
                let (d, zero) = (floats(head), _mm512_set1_ps(-32.0));
                let [low, high] = [_mm_loadu_si128(at.cast()), _mm_loadu_si128(at.add(16).cast())];
                let low = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)));
                let high = _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high)));
                return ([low, high], [_mm512_mul_ps(low, zero), _mm512_mul_ps(high, zero)]);
            }
            _ => {
                let d = floats(at);
                (d, _mm512_mul_ps(d, _mm512_set1_ps(-(layout.zero as f32))))
            }
        };
        ([scale; 2], [min; 2])
    }
}

/// f32 of 16 halves.
///
/// # Safety
/// 32 readable bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
unsafe fn floats(at: *const u8) -> __m512 {
    // SAFETY: by this function's contract.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
}

/// Unpacks a block into `out`.
///
/// # Safety
/// As [`group`]; `out` has room for [`UNPACKED`] bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn unpack<const F: u8>(head: *const u8, w: *const u8, out: *mut u8) {
    // SAFETY: by this function's contract.
    unsafe {
        macro_rules! group {
            ($g:literal) => {
                _mm512_storeu_si512(out.add($g * 64).cast(), group::<F, false, $g>(w));
            };
        }
        groups!(group);
        let (scale, min) = scales::<F, false>(head, w);
        for half in 0..2 {
            _mm512_storeu_ps(out.add(SCALE + half * 64).cast(), scale[half]);
            _mm512_storeu_ps(out.add(MIN + half * 64).cast(), min[half]);
        }
    }
}
