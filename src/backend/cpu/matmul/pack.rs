//! From the block formats of a file to the panels of [`layout`](super::layout): a transposition of 32-bit lanes.

use super::layout::{Layout, PANEL, fmt};
use crate::dtype::{DType, k_scales};

/// Packs `rows` (at most 16 channels, their stored bytes) into `out`, a whole panel. Missing channels stay zero.
pub(super) fn panel(dtype: DType, rows: &[&[u8]], out: &mut [u8]) {
    let layout = Layout::of(dtype as u8);
    let size = dtype.block_bytes();
    for (c, row) in rows.iter().enumerate().take(PANEL) {
        let blocks = row.chunks_exact(size).zip(out.chunks_exact_mut(layout.superblock()));
        match dtype as u8 {
            fmt::Q4_0 => blocks.for_each(|(b, o)| {
                lanes(&b[2..18], c, o);
                copy(&b[..2], layout.scales, c, o);
            }),
            fmt::Q4_1 => blocks.for_each(|(b, o)| {
                lanes(&b[4..20], c, o);
                copy(&b[..2], layout.scales, c, o);
                copy(&b[2..4], layout.scales + 32, c, o);
            }),
            fmt::Q5_0 => blocks.for_each(|(b, o)| {
                lanes(&b[6..22], c, o);
                lanes(&fifth_bits(&b[2..6]), c, &mut o[256..320]);
                copy(&b[..2], layout.scales, c, o);
            }),
            fmt::Q5_1 => blocks.for_each(|(b, o)| {
                lanes(&b[8..24], c, o);
                lanes(&fifth_bits(&b[4..8]), c, &mut o[256..320]);
                copy(&b[..2], layout.scales, c, o);
                copy(&b[2..4], layout.scales + 32, c, o);
            }),
            fmt::Q4_K | fmt::Q5_K => blocks.for_each(|(b, o)| k_block(b, c, o, &layout)),
            fmt::Q6_K => blocks.for_each(|(b, o)| q6_k_block(b, c, o, &layout)),
            _ => blocks.for_each(|(b, o)| {
                lanes(&b[2..34], c, o);
                copy(&b[..2], layout.scales, c, o);
            }),
        }
    }
}

/// Lane `c` of 64-byte groups: 4 bytes of `src` to each.
#[inline(always)]
fn lanes(src: &[u8], c: usize, out: &mut [u8]) {
    let out = &mut out[..src.len() * 16];
    for (s, o) in src.chunks_exact(4).zip(out.chunks_exact_mut(64)) {
        o[4 * c..4 * c + 4].copy_from_slice(s);
    }
}

/// Channel `c` of 16 values that begin at `at`.
#[inline(always)]
fn copy(src: &[u8], at: usize, c: usize, out: &mut [u8]) {
    out[at + src.len() * c..][..src.len()].copy_from_slice(src);
}

/// Bit i of the file's word belongs to input i = 4g + b; packed it is bit g of byte b.
#[inline(always)]
fn fifth_bits(word: &[u8]) -> [u8; 4] {
    let h = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
    // The product puts bit b of a nibble at bit 8b, and nothing else there.
    let spread = |g: u32| (((h >> (4 * g) & 15) * 0x0020_4081) & 0x0101_0101) << g;
    (0..8).fold(0, |a, g| a | spread(g)).to_le_bytes()
}

/// 32 bytes, eight to a word: the shifts and masks below work on all bytes of a word at once.
type Words = [u64; 4];

/// A byte in every byte of a word.
const fn each(byte: u8) -> u64 {
    byte as u64 * 0x0101_0101_0101_0101
}

#[inline(always)]
fn words(b: &[u8]) -> Words {
    let mut words = [0; 4];
    for (w, b) in words.iter_mut().zip(b.as_chunks::<8>().0) {
        *w = u64::from_le_bytes(*b);
    }
    words
}

/// Lane `c` of a block of 32 integers of up to six bits, a byte each.
#[inline(always)]
fn integers(q: Words, bits: usize, c: usize, out: &mut [u8]) {
    let nibbles = [0, 1].map(|i| q[i] & each(15) | (q[i + 2] & each(15)) << 4);
    lanes(&nibbles[0].to_le_bytes(), c, out);
    lanes(&nibbles[1].to_le_bytes(), c, &mut out[128..]);
    // A word holds two groups: the upper one's bits go one place (or pair of places) higher.
    if bits == 5 {
        let both = (0..4).fold(0, |a, i| a | (q[i] >> 4 & each(1)) << (2 * i));
        let plane = both as u32 | ((both >> 32) as u32) << 1;
        lanes(&plane.to_le_bytes(), c, &mut out[256..320]);
    } else if bits == 6 {
        for half in 0..2 {
            let both = q[2 * half] >> 4 & each(3) | (q[2 * half + 1] >> 4 & each(3)) << 4;
            let plane = both as u32 | ((both >> 32) as u32) << 2;
            lanes(&plane.to_le_bytes(), c, &mut out[256 + half * 64..320 + half * 64]);
        }
    }
}

fn k_block(b: &[u8], c: usize, out: &mut [u8], layout: &Layout) {
    copy(&b[..2], 0, c, out);
    copy(&b[2..4], 32, c, out);
    let five = layout.bits == 5;
    let (high, low) = if five { (words(&b[16..48]), &b[48..176]) } else { ([0; 4], &b[16..144]) };
    let blocks = out[layout.header..].chunks_exact_mut(layout.stride);
    for ((j, (s, m)), o) in k_scales(&b[4..16]).into_iter().enumerate().zip(blocks) {
        let low = words(&low[j / 2 * 32..j / 2 * 32 + 32]);
        let q = [0, 1, 2, 3].map(|i| low[i] >> (j % 2 * 4) & each(15) | (high[i] >> j & each(1)) << 4);
        integers(q, layout.bits, c, o);
        copy(&[s], layout.scales, c, o);
        copy(&[m], layout.scales + 16, c, o);
    }
}

fn q6_k_block(b: &[u8], c: usize, out: &mut [u8], layout: &Layout) {
    copy(&b[208..210], 0, c, out);
    for (j, o) in out[layout.header..].chunks_exact_mut(layout.stride).enumerate() {
        let (half, quarter) = (j / 4, j % 4);
        let low = words(&b[half * 64 + quarter % 2 * 32..][..32]);
        let high = words(&b[128 + half * 32..][..32]);
        let q =
            [0, 1, 2, 3].map(|i| low[i] >> (quarter / 2 * 4) & each(15) | (high[i] >> (quarter * 2) & each(3)) << 4);
        integers(q, 6, c, o);
        let scales = &b[192 + 2 * j..194 + 2 * j];
        copy(&scales[..1], layout.scales, c, o);
        copy(&scales[1..], layout.scales + 16, c, o);
    }
}
