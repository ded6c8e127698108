//! How quantised weights lie in memory once they are packed, and what one packed weight means.
//!
//! A panel is 16 output channels with all their inputs, in blocks of 32 inputs. In a block the weights stand in groups:
//! group g is 64 bytes, channel c's 4 inputs `4g..4g + 4` in bytes `4c..4c + 4`, so that one 32-bit lane holds what an
//! integer dot instruction reduces. Of 4-, 5- and 6-bit weights the low nibbles of groups g and g + 4 share 64 bytes;
//! above them lies a plane with the high bits:
//!
//! | bits | bytes | contents |
//! | --- | --- | --- |
//! | 4 | 256 | nibbles |
//! | 5 | 256 + 64 | byte b of channel c: bit g is the fifth bit of input 4g + b |
//! | 6 | 256 + 128 | of plane g / 4, byte b of channel c: bits 2(g % 4).. are the upper two bits of input 4g + b |
//! | 8 | 512 | i8 |
//!
//! Then the scales, each for 16 channels, exactly as the file has them: f16 d (and f16 m), or for K-quants the integer
//! sub-scales (and sub-minima); the K-quants' d (and dmin) in f16 stand before every eight blocks.

use half::f16;

use crate::dtype::DType;

/// Output channels of a panel.
pub(super) const PANEL: usize = 16;
/// Inputs of a block, and of one scale of the activations.
pub(super) const BLOCK: usize = 32;

/// A buffer that begins at a cache line.
#[repr(align(64))]
pub(super) struct Aligned<T>(pub T);

/// Formats as constants that kernels are generic over.
pub(super) mod fmt {
    use crate::dtype::DType;
    pub const Q4_0: u8 = DType::Q4_0 as u8;
    pub const Q4_1: u8 = DType::Q4_1 as u8;
    pub const Q5_0: u8 = DType::Q5_0 as u8;
    pub const Q5_1: u8 = DType::Q5_1 as u8;
    pub const Q8_0: u8 = DType::Q8_0 as u8;
    pub const Q4_K: u8 = DType::Q4_K as u8;
    pub const Q5_K: u8 = DType::Q5_K as u8;
    pub const Q6_K: u8 = DType::Q6_K as u8;
}

/// Offsets of one format, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Bits of a weight.
    pub bits: usize,
    /// What is subtracted from the stored unsigned integer; 0 where a minimum is added or the integer is signed.
    pub zero: i32,
    /// Blocks that share a header: 8 in K-quants, else 1.
    pub sub: usize,
    /// Header before `sub` blocks.
    pub header: usize,
    /// Where a block's scales begin.
    pub scales: usize,
    /// A block.
    pub stride: usize,
}

impl Layout {
    /// The layout of a quantised format.
    pub const fn of(format: u8) -> Self {
        use fmt::*;
        let (bits, zero, header, scale_bytes) = match format {
            Q4_0 => (4, 8, 0, 32),
            Q4_1 => (4, 0, 0, 64),
            Q5_0 => (5, 16, 0, 32),
            Q5_1 => (5, 0, 0, 64),
            Q4_K => (4, 0, 64, 32),
            Q5_K => (5, 0, 64, 32),
            Q6_K => (6, 32, 32, 32),
            _ => (8, 0, 0, 32),
        };
        let scales = match bits {
            4 => 256,
            5 => 320,
            6 => 384,
            _ => 512,
        };
        Self { bits, zero, sub: if header > 0 { 8 } else { 1 }, header, scales, stride: scales + scale_bytes }
    }

    /// Bytes of the header and its blocks.
    pub const fn superblock(&self) -> usize {
        self.header + self.sub * self.stride
    }

    /// Bytes of a panel of `cols` inputs.
    pub const fn panel(&self, cols: usize) -> usize {
        cols / (BLOCK * self.sub) * self.superblock()
    }

    /// Offset of block `k` of a panel and of its header.
    pub const fn block(&self, k: usize) -> (usize, usize) {
        let head = k / self.sub * self.superblock();
        (head, head + self.header + k % self.sub * self.stride)
    }
}

/// Header and block of 16 channels, in its format.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    format: u8,
    layout: Layout,
    head: &'a [u8],
    block: &'a [u8],
}

impl<'a> Block<'a> {
    /// Block `k` of `panel`.
    pub fn new(dtype: DType, panel: &'a [u8], k: usize) -> Self {
        let layout = Layout::of(dtype as u8);
        let (head, block) = layout.block(k);
        Self {
            format: dtype as u8,
            layout,
            head: &panel[head..head + layout.header],
            block: &panel[block..block + layout.stride],
        }
    }

    fn half(bytes: &[u8], at: usize, c: usize) -> f32 {
        f16::from_le_bytes([bytes[at + 2 * c], bytes[at + 2 * c + 1]]).to_f32()
    }

    /// The integer of input `i` of channel `c`, its zero subtracted.
    #[inline(always)]
    pub fn integer(&self, i: usize, c: usize) -> i32 {
        let (g, lane) = (i / 4, c * 4 + i % 4);
        if self.layout.bits == 8 {
            return self.block[g * 64 + lane] as i8 as i32;
        }
        let low = self.block[g % 4 * 64 + lane] >> (g / 4 * 4) & 15;
        let high = match self.layout.bits {
            5 => (self.block[256 + lane] >> g & 1) << 4,
            6 => (self.block[256 + g / 4 * 64 + lane] >> (g % 4 * 2) & 3) << 4,
            _ => 0,
        };
        (low | high) as i32 - self.layout.zero
    }

    /// Scale and minimum of inputs `16 half..16 half + 16` of channel `c`: w = integer * scale + minimum, without rounding
    /// in the product, as [`DType::to_f32`] has it.
    #[inline(always)]
    pub fn scale(&self, half: usize, c: usize) -> (f32, f32) {
        use fmt::*;
        let at = self.layout.scales;
        match self.format {
            Q4_1 | Q5_1 => (Self::half(self.block, at, c), Self::half(self.block, at + 32, c)),
            Q4_K | Q5_K => {
                let (s, m) = (self.block[at + c] as f32, self.block[at + 16 + c] as f32);
                (Self::half(self.head, 0, c) * s, -(Self::half(self.head, 32, c) * m))
            }
            Q6_K => (Self::half(self.head, 0, c) * self.block[at + 16 * half + c] as i8 as f32, 0.0),
            _ => (Self::half(self.block, at, c), 0.0),
        }
    }

    /// Whether weights have a minimum besides their scale.
    pub fn has_min(&self) -> bool {
        use fmt::*;
        matches!(self.format, Q4_1 | Q5_1 | Q4_K | Q5_K)
    }

    /// The 32 weights of channel `c`, bit-equal to [`DType::to_f32`].
    pub fn channel(&self, c: usize, out: &mut [f32]) {
        for (half, out) in out.chunks_exact_mut(16).enumerate() {
            let (s, m) = self.scale(half, c);
            for (i, o) in out.iter_mut().enumerate() {
                let w = self.integer(half * 16 + i, c) as f32 * s;
                // Adding a zero minimum would turn -0 into +0.
                *o = if self.has_min() { w + m } else { w };
            }
        }
    }
}
