//! Unpacking blocks of 16 channels on AVX2, into bytes, i16 or f32; 16 channels are two registers of eight.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::layout::{BLOCK, Layout, PANEL, fmt::*};
use crate::dtype::DType;

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

/// An expression of each half of some registers: closures would not be inlined, since they cannot have target features.
macro_rules! both {
    (|$($v:ident),+| $e:expr) => {
        [{ $(let $v = $v[0];)+ $e }, { $(let $v = $v[1];)+ $e }]
    };
}

pub(super) use groups;

/// An unpacked block of at most six bits: 512 unsigned bytes, f32 scales, f32 minima of both halves, sub-scales of both
/// halves as pairs of i16; each for 16 channels.
pub(super) const UNPACKED: usize = SCALE + 5 * 64;
pub(super) const SCALE: usize = 512;
pub(super) const MIN: usize = SCALE + 64;
pub(super) const SUB: usize = MIN + 128;

/// 16 channels.
pub(super) type Ints = [__m256i; 2];
pub(super) type Floats = [__m256; 2];

/// Block `k` of a panel in f32, `[input][channel]`, inputs `stride` apart.
pub(super) fn widen_block(dtype: DType, panel: &[u8], k: usize, out: &mut [f32], stride: usize) {
    let layout = Layout::of(dtype as u8);
    let (head, block) = layout.block(k);
    assert!(block + layout.stride <= panel.len() && stride >= PANEL && out.len() >= (BLOCK - 1) * stride + PANEL);
    // SAFETY: the tier is available; the block lies in the panel, and there is room.
    unsafe { widen(dtype, panel.as_ptr().add(head), panel.as_ptr().add(block), out.as_mut_ptr(), stride) }
}

/// One block of format `dtype` in f32, `[input][channel]`, inputs `stride` apart.
///
/// # Safety
/// AVX2, FMA, F16C; `head` and `w` are a block of 16 channels, `out` has room for 32 rows of 16 values.
pub(super) unsafe fn widen(dtype: DType, head: *const u8, w: *const u8, out: *mut f32, stride: usize) {
    // SAFETY: by this function's contract.
    unsafe {
        match dtype as u8 {
            Q4_0 => widen_of::<Q4_0>(head, w, out, stride),
            Q4_1 => widen_of::<Q4_1>(head, w, out, stride),
            Q5_0 => widen_of::<Q5_0>(head, w, out, stride),
            Q5_1 => widen_of::<Q5_1>(head, w, out, stride),
            Q4_K => widen_of::<Q4_K>(head, w, out, stride),
            Q5_K => widen_of::<Q5_K>(head, w, out, stride),
            Q6_K => widen_of::<Q6_K>(head, w, out, stride),
            _ => widen_of::<Q8_0>(head, w, out, stride),
        }
    }
}

/// # Safety
/// As [`widen`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen_of<const F: u8>(head: *const u8, w: *const u8, out: *mut f32, stride: usize) {
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
                        _mm256_storeu_ps(out.add(($g * 4 + i) * stride + h * 8), v);
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

/// # Safety
/// 64 readable bytes.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) unsafe fn load(at: *const u8) -> Ints {
    // SAFETY: by this function's contract.
    unsafe { [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())] }
}

/// Inputs 0 and 2, and 1 and 3, of every lane of i8, as i16.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn even_odd(w: Ints) -> [Ints; 2] {
    [both!(|w| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w))), both!(|w| _mm256_srai_epi16::<8>(w))]
}

/// Bits of all bytes moved from `FROM` to 4, under `mask`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn bits_to_four<const FROM: usize>(v: Ints, mask: i8) -> Ints {
    let v = match FROM {
        0 => both!(|v| _mm256_slli_epi16::<4>(v)),
        1 => both!(|v| _mm256_slli_epi16::<3>(v)),
        2 => both!(|v| _mm256_slli_epi16::<2>(v)),
        3 => both!(|v| _mm256_slli_epi16::<1>(v)),
        4 => v,
        5 => both!(|v| _mm256_srli_epi16::<1>(v)),
        6 => both!(|v| _mm256_srli_epi16::<2>(v)),
        _ => both!(|v| _mm256_srli_epi16::<3>(v)),
    };
    both!(|v| _mm256_and_si256(v, _mm256_set1_epi8(mask)))
}

/// Group G of a block of at most six bits, as unsigned bytes.
///
/// # Safety
/// AVX2; `w` is a block of format F, or (U) an unpacked one.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) unsafe fn group<const F: u8, const U: bool, const G: usize>(w: *const u8) -> Ints {
    // SAFETY: by this function's contract.
    unsafe {
        if U {
            return load(w.add(G * 64));
        }
        let nibbles = load(w.add(G % 4 * 64));
        let shifted = if G < 4 { nibbles } else { both!(|nibbles| _mm256_srli_epi16::<4>(nibbles)) };
        let low = both!(|shifted| _mm256_and_si256(shifted, _mm256_set1_epi8(15)));
        let high = match const { Layout::of(F).bits } {
            4 => return low,
            5 => bits_to_four::<G>(load(w.add(256)), 0x10),
            _ => {
                let plane = load(w.add(256 + G / 4 * 64));
                match G % 4 {
                    0 => bits_to_four::<0>(plane, 0x30),
                    1 => bits_to_four::<2>(plane, 0x30),
                    2 => bits_to_four::<4>(plane, 0x30),
                    _ => bits_to_four::<6>(plane, 0x30),
                }
            }
        };
        both!(|low, high| _mm256_or_si256(low, high))
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
    both!(|parts| if SIGNED { _mm256_cvtepi8_epi32(parts) } else { _mm256_cvtepu8_epi32(parts) })
}

/// Q6_K's sub-scales of half `half`, as pairs of i16.
///
/// # Safety
/// As [`group`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) unsafe fn sub_scales<const U: bool>(w: *const u8, half: usize) -> Ints {
    // SAFETY: by this function's contract.
    unsafe {
        if U {
            return load(w.add(SUB + half * 64));
        }
        let v = bytes::<true>(w.add(const { Layout::of(Q6_K).scales } + half * 16));
        both!(|v| _mm256_blend_epi16::<0b1010_1010>(v, _mm256_slli_epi32::<16>(v)))
    }
}

/// What integer dots are multiplied with, and minima (of both halves, where they differ).
///
/// # Safety
/// As [`group`]; `head` is the header.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) unsafe fn scales<const F: u8, const U: bool>(head: *const u8, w: *const u8) -> (Floats, [Floats; 2]) {
    let layout = const { Layout::of(F) };
    let zero = _mm256_set1_ps(-(layout.zero as f32));
    // SAFETY: by this function's contract.
    unsafe {
        if U {
            let [scale, low, high] = [load(w.add(SCALE)), load(w.add(MIN)), load(w.add(MIN + 64))];
            let cast = [both!(|low| _mm256_castsi256_ps(low)), both!(|high| _mm256_castsi256_ps(high))];
            return (both!(|scale| _mm256_castsi256_ps(scale)), cast);
        }
        let at = w.add(layout.scales);
        match F {
            Q4_1 | Q5_1 => {
                let min = halves(at.add(32));
                (halves(at), [min, min])
            }
            Q4_K | Q5_K => {
                let (d, s) = (halves(head), bytes::<false>(at));
                let (dmin, m) = (halves(head.add(32)), bytes::<false>(at.add(16)));
                let min =
                    both!(|dmin, m| _mm256_mul_ps(dmin, _mm256_xor_ps(_mm256_cvtepi32_ps(m), _mm256_set1_ps(-0.0))));
                (both!(|d, s| _mm256_mul_ps(d, _mm256_cvtepi32_ps(s))), [min, min])
            }
            Q6_K => {
                let d = halves(head);
                let (low, high) = (bytes::<true>(at), bytes::<true>(at.add(16)));
                let min = both!(|d| _mm256_mul_ps(d, zero));
                let low = both!(|min, low| _mm256_mul_ps(min, _mm256_cvtepi32_ps(low)));
                let high = both!(|min, high| _mm256_mul_ps(min, _mm256_cvtepi32_ps(high)));
                (d, [low, high])
            }
            _ => {
                let d = halves(at);
                let min = both!(|d| _mm256_mul_ps(d, zero));
                (d, [min, min])
            }
        }
    }
}

/// Unpacks a block into `out`.
///
/// # Safety
/// As [`group`]; `out` has room for [`UNPACKED`] bytes.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn unpack<const F: u8>(head: *const u8, w: *const u8, out: *mut u8) {
    // SAFETY: by this function's contract.
    unsafe {
        macro_rules! store {
            ($at:expr, $v:expr) => {
                let (at, v): (usize, Ints) = ($at, $v);
                _mm256_storeu_si256(out.add(at).cast(), v[0]);
                _mm256_storeu_si256(out.add(at + 32).cast(), v[1]);
            };
        }
        macro_rules! group {
            ($g:literal) => {
                store!($g * 64, group::<F, false, $g>(w));
            };
        }
        groups!(group);
        let (scale, min) = scales::<F, false>(head, w);
        let [low, high] = min;
        store!(SCALE, both!(|scale| _mm256_castps_si256(scale)));
        store!(MIN, both!(|low| _mm256_castps_si256(low)));
        store!(MIN + 64, both!(|high| _mm256_castps_si256(high)));
        if F == Q6_K {
            store!(SUB, sub_scales::<false>(w, 0));
            store!(SUB + 64, sub_scales::<false>(w, 1));
        }
    }
}
