//! Stored element types and quantised block formats, and what their bytes mean.
//!
//! The block formats are those of GGUF. [`DType::to_f32`] is their definition: plain, one value at a time, and bit-equal
//! to the reference dequantisation. Fast kernels are tested against it.

use std::fmt;
use std::ops::{Add, Mul, Sub};

use half::{bf16, f16};

use crate::error::{Result, ensure};

/// A plain element that a backend buffer can hold.
pub trait Elem: bytemuck::Pod + Default + Send + Sync + fmt::Debug + 'static {
    /// Name used in messages.
    const NAME: &'static str;
}

/// A real number.
pub trait Real: Elem {
    /// Widened, exactly.
    fn to_f64(self) -> f64;
    /// Rounded to the nearest.
    fn of(x: f32) -> Self;
}

/// A real number that is computed with as it is stored: f32 or f64.
pub trait Float: Real + Sub<Output = Self> + Mul<Output = Self> + Add<Output = Self> {
    /// Whether it is f64.
    const DOUBLE: bool;
    /// Rounded to the nearest.
    fn from_f64(x: f64) -> Self;
}

impl Float for f32 {
    const DOUBLE: bool = false;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }
}

impl Float for f64 {
    const DOUBLE: bool = true;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
}

macro_rules! elems { ($($t:ty => $n:literal),*) => { $(impl Elem for $t { const NAME: &'static str = $n; })* } }
macro_rules! reals {
    ($($t:ty: $of:expr),*) => {
        $(impl Real for $t {
            fn to_f64(self) -> f64 { self.into() }
            fn of(x: f32) -> Self { $of(x) }
        })*
    };
}
reals!(f32: f32::from, f64: f64::from, bf16: bf16::from_f32, f16: f16::from_f32);
elems!(f32 => "f32", f64 => "f64", bf16 => "bf16", f16 => "f16", u32 => "u32", i32 => "i32", i8 => "i8", u8 => "u8");

/// How weights are stored in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
#[non_exhaustive]
pub enum DType {
    F32,
    F16,
    BF16,
    /// 32 weights: f16 scale d, 16 bytes of nibbles; w = d (q - 8).
    Q4_0,
    /// 32 weights: f16 d, f16 m, nibbles; w = d q + m.
    Q4_1,
    /// 32 weights: f16 d, u32 of fifth bits, nibbles; w = d (q - 16).
    Q5_0,
    /// 32 weights: f16 d, f16 m, u32 of fifth bits, nibbles; w = d q + m.
    Q5_1,
    /// 32 weights: f16 d, 32 i8; w = d q.
    Q8_0,
    /// 256 weights: f16 d, f16 dmin, 8 six-bit (scale, min) pairs in 12 bytes, nibbles; w = d s q - dmin m.
    Q4_K,
    /// As Q4_K with 32 bytes of fifth bits before the nibbles.
    Q5_K,
    /// 256 weights: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 i8 scales, f16 d; w = d s (q - 32).
    Q6_K,
}

use DType::*;

impl DType {
    /// Every type, for tests and tables.
    pub const ALL: [DType; 11] = [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K];

    /// Weights in one block; 1 for plain types.
    pub const fn block_len(self) -> usize {
        match self {
            F32 | F16 | BF16 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 => 32,
            Q4_K | Q5_K | Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            F32 => 4,
            F16 | BF16 => 2,
            Q4_0 => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
        }
    }

    /// Whether weights are stored in blocks of small integers with shared scales.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of a row of `cols` weights; an error if blocks do not divide it or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Result<usize> {
        ensure!(
            cols.is_multiple_of(self.block_len()),
            Weights,
            "a {self} row of {cols} values is not a whole number of blocks of {}",
            self.block_len()
        );
        let bytes = (cols / self.block_len()).checked_mul(self.block_bytes());
        ensure!(bytes.is_some(), Weights, "a {self} row of {cols} values overflows");
        Ok(bytes.unwrap_or(0))
    }

    /// The values that `bytes` stand for.
    ///
    /// # Panics
    /// If `bytes` is not exactly the blocks of `out.len()` values.
    pub fn to_f32(self, bytes: &[u8], out: &mut [f32]) {
        let (len, size) = (self.block_len(), self.block_bytes());
        assert!(
            out.len().is_multiple_of(len) && bytes.len() == out.len() / len * size,
            "{self}: {} bytes do not hold {} values",
            bytes.len(),
            out.len()
        );
        let blocks = bytes.chunks_exact(size).zip(out.chunks_exact_mut(len));
        match self {
            F32 => blocks.for_each(|(b, o)| o[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            F16 => blocks.for_each(|(b, o)| o[0] = half_at(b, 0)),
            BF16 => blocks.for_each(|(b, o)| o[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            Q4_0 => blocks.for_each(|(b, o)| {
                let d = half_at(b, 0);
                nibbles(&b[2..], o, |q, _| (q as f32 - 8.0) * d);
            }),
            Q4_1 => blocks.for_each(|(b, o)| {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                nibbles(&b[4..], o, |q, _| q as f32 * d + m);
            }),
            Q5_0 => blocks.for_each(|(b, o)| {
                let (d, h) = (half_at(b, 0), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
                nibbles(&b[6..], o, |q, i| ((q | fifth(h, i)) as f32 - 16.0) * d);
            }),
            Q5_1 => blocks.for_each(|(b, o)| {
                let (d, m, h) = (half_at(b, 0), half_at(b, 2), u32::from_le_bytes([b[4], b[5], b[6], b[7]]));
                nibbles(&b[8..], o, |q, i| (q | fifth(h, i)) as f32 * d + m);
            }),
            Q8_0 => blocks.for_each(|(b, o)| {
                let d = half_at(b, 0);
                for (o, &q) in o.iter_mut().zip(&b[2..]) {
                    *o = q as i8 as f32 * d;
                }
            }),
            Q4_K | Q5_K => blocks.for_each(|(b, o)| k_block(b, o, self == Q5_K)),
            Q6_K => blocks.for_each(|(b, o)| q6_k_block(b, o)),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn fifth(bits: u32, i: usize) -> u8 {
    ((bits >> i & 1) << 4) as u8
}

/// Low nibbles are values 0..16 of a block, high nibbles 16..32.
fn nibbles(q: &[u8], o: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    for i in 0..16 {
        o[i] = value(q[i] & 15, i);
        o[i + 16] = value(q[i] >> 4, i + 16);
    }
}

/// The eight (scale, min) pairs, six bits each, of a Q4_K or Q5_K block; `s` is its 12 bytes.
pub fn k_scales(s: &[u8]) -> [(u8, u8); 8] {
    std::array::from_fn(|j| {
        if j < 4 {
            (s[j] & 63, s[j + 4] & 63)
        } else {
            (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4)
        }
    })
}

fn k_block(b: &[u8], o: &mut [f32], five: bool) {
    let (d, dmin, scales) = (half_at(b, 0), half_at(b, 2), k_scales(&b[4..16]));
    let (high, q) = if five { (&b[16..48], &b[48..]) } else { (&[][..], &b[16..]) };
    for (j, (s, m)) in scales.into_iter().enumerate() {
        let (scale, min) = (d * s as f32, dmin * m as f32);
        for i in 0..32 {
            let byte = q[j / 2 * 32 + i];
            let low = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
            let bit = if five { (high[i] >> j & 1) << 4 } else { 0 };
            o[j * 32 + i] = (low | bit) as f32 * scale - min;
        }
    }
}

fn q6_k_block(b: &[u8], o: &mut [f32]) {
    let (ql, qh, sc, d) = (&b[..128], &b[128..192], &b[192..208], half_at(b, 208));
    for (i, o) in o.iter_mut().enumerate() {
        let (half, quarter, at) = (i / 128, i / 32 % 4, i % 32);
        let low = ql[half * 64 + quarter % 2 * 32 + at] >> (quarter / 2 * 4) & 15;
        let high = qh[half * 32 + at] >> (quarter * 2) & 3;
        *o = ((low | high << 4) as f32 - 32.0) * (d * sc[i / 16] as i8 as f32);
    }
}
