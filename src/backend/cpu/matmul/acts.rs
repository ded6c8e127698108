//! Activations rounded to int8, a scale for every 32 inputs, as the integer kernels read them; and to i16 for 8-bit weights,
//! beside whose own rounding that of int8 would show.

use bytemuck::{Pod, Zeroable};

use super::TILE_ROWS;
use super::layout::BLOCK;

/// Steps of the i16 form in one of the int8 form. Exact in f32, and 32 products with i8 weights fit into i32.
pub(super) const FINER: f32 = 128.0;

/// A block of one row.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct Record {
    /// `[s, s * sum(q), s * sum(q[..16]), s * sum(q[16..])]`.
    pub meta: [f32; 4],
    /// The int8 values.
    pub q: [i8; BLOCK],
}

/// i16 values of a block of one row, of scale s / [`FINER`]; of every four first inputs 0 and 2, then 1 and 3: what a
/// multiply-add of i16 pairs against packed i8 weights needs.
pub(super) type Wide = [i16; BLOCK];

/// Rows of quantised activations. Of every [`TILE_ROWS`] rows a block of all stands together, then the next block, so
/// that a kernel finds its rows a constant distance from each other, and in the order in which it wants them.
#[derive(Default)]
pub(super) struct Acts {
    records: Vec<Record>,
    wide: Vec<Wide>,
    blocks: usize,
    bf16s: Vec<u16>,
}

/// A shared view of [`Acts`].
#[derive(Clone, Copy)]
pub(super) struct Quantized<'a> {
    records: &'a [Record],
    wide: &'a [Wide],
    blocks: usize,
}

impl Acts {
    /// Room for `rows` rows of `cols` inputs, the i16 values only if `wide`.
    pub fn resize(&mut self, rows: usize, cols: usize, wide: bool) -> (&mut [Record], &mut [Wide]) {
        self.blocks = cols / BLOCK;
        let n = rows * self.blocks;
        let wides = if wide { n } else { 0 };
        if self.records.len() < n {
            self.records.resize(n, Record::default());
        }
        if self.wide.len() < wides {
            self.wide.resize(wides, [0; BLOCK]);
        }
        (&mut self.records[..n], &mut self.wide[..wides])
    }

    /// Room for `n` inputs in bf16.
    pub fn resize_bf16(&mut self, n: usize) -> &mut [u16] {
        if self.bf16s.len() < n {
            self.bf16s.resize(n, 0);
        }
        &mut self.bf16s[..n]
    }

    /// The inputs in bf16.
    pub fn bf16s(&self) -> &[u16] {
        &self.bf16s
    }

    pub fn view(&self) -> Quantized<'_> {
        Quantized { records: &self.records, wide: &self.wide, blocks: self.blocks }
    }
}

impl<'a> Quantized<'a> {
    /// The `n` rows from `first` on, all those of one tile: block k of row r is number `k * n + r`. Without i16 values the
    /// second is empty or of no meaning.
    pub fn tile(&self, first: usize, n: usize) -> (&'a [Record], &'a [Wide]) {
        debug_assert!(first.is_multiple_of(TILE_ROWS));
        let range = first * self.blocks..(first + n) * self.blocks;
        (&self.records[range.clone()], self.wide.get(range).unwrap_or_default())
    }
}

/// Writes blocks of the `n` rows of a tile, from `block` on. `x` begins with the tile's first row; rows have `cols` inputs.
///
/// The largest magnitude becomes 127; ties round to even. A NaN or an infinity makes the scale such, and so every product.
pub(super) fn quantize(x: &[f32], cols: usize, n: usize, block: usize, records: &mut [Record], wide: &mut [Wide]) {
    blocks_of(x, cols, n, block, records, wide, quantize_block);
}

/// [`quantize`] by way of `one`. Inlined, so that a tier compiles it for its own instructions.
#[inline(always)]
pub(super) fn blocks_of(
    x: &[f32],
    cols: usize,
    n: usize,
    block: usize,
    records: &mut [Record],
    wide: &mut [Wide],
    one: impl Fn(&[f32; BLOCK], &mut [i8; BLOCK], Option<&mut Wide>) -> [f32; 4],
) {
    let mut wide = wide.iter_mut();
    for (k, records) in records.chunks_exact_mut(n).enumerate() {
        for (r, record) in records.iter_mut().enumerate() {
            if let Some(x) = x[r * cols + (block + k) * BLOCK..].first_chunk() {
                record.meta = one(x, &mut record.q, wide.next());
            }
        }
    }
}

/// `x * factor`, rounded to the nearest integer, ties to even; at most 2^22 in magnitude.
#[inline(always)]
fn round(x: f32, factor: f32) -> i32 {
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    (x * factor + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32
}

#[inline(always)]
fn quantize_block(x: &[f32; BLOCK], q: &mut [i8; BLOCK], wide: Option<&mut Wide>) -> [f32; 4] {
    // Magnitudes order as their bit patterns do, NaN above infinity: unlike a maximum of floats it keeps a NaN.
    let mut lanes = [0i32; 8];
    for x in x.as_chunks::<8>().0 {
        for (l, x) in lanes.iter_mut().zip(x) {
            *l = (*l).max((x.to_bits() & 0x7FFF_FFFF) as i32);
        }
    }
    let max = f32::from_bits(lanes.into_iter().fold(0, i32::max) as u32);
    let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
    let mut integers = [0i32; BLOCK];
    for (i, x) in integers.iter_mut().zip(x) {
        *i = round(*x, inverse);
    }
    for (q, i) in q.iter_mut().zip(&integers) {
        *q = *i as i8;
    }
    if let Some(wide) = wide {
        let finer = |x: f32| round(x, inverse * FINER) as i16;
        for (x, w) in x.as_chunks::<4>().0.iter().zip(wide.as_chunks_mut::<4>().0) {
            *w = [finer(x[0]), finer(x[2]), finer(x[1]), finer(x[3])];
        }
    }
    let sum = |half: usize| q[16 * half..16 * half + 16].iter().map(|&q| q as i32).sum::<i32>() as f32;
    let (s, low, high) = (max / 127.0, sum(0), sum(1));
    [s, s * (low + high), s * low, s * high]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_the_nearest_and_keeps_what_is_not_finite() {
        let mut x: Vec<f32> = (0..64).map(|i| (i as f32 - 20.0) * 0.37).collect();
        let mut acts = Acts::default();
        let (records, wides) = acts.resize(1, 64, true);
        quantize(&x, 64, 1, 0, records, wides);
        let (records, wides) = acts.view().tile(0, 1);
        for ((record, wide), x) in records.iter().zip(wides).zip(x.chunks(32)) {
            let [s, scaled_sum, ..] = record.meta;
            let max = x.iter().fold(0f32, |a, x| a.max(x.abs()));
            assert_eq!(s, max / 127.0);
            for (x, q) in x.iter().zip(record.q) {
                assert_eq!(q as f32, (x * (127.0 / max)).round_ties_even());
            }
            for (x, w) in x.chunks(4).zip(wide.chunks(4)) {
                for (i, &w) in [0, 2, 1, 3].into_iter().zip(w) {
                    assert_eq!(w as f32, (x[i] * (127.0 / max * FINER)).round_ties_even());
                }
            }
            let sum: i32 = record.q.iter().map(|&q| q as i32).sum();
            assert_eq!(scaled_sum, s * sum as f32);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[40] = bad;
            let (records, wides) = acts.resize(1, 64, false);
            quantize(&x, 64, 1, 0, records, wides);
            assert!(records[0].meta[0].is_finite() && !records[1].meta[0].is_finite());
        }
        let (records, wides) = acts.resize(1, 32, false);
        quantize(&[0.0; 32], 32, 1, 0, records, wides);
        assert_eq!(records[0].meta, [0.0; 4]);
    }

    #[test]
    fn rows_of_a_tile_stand_block_by_block() {
        let x: Vec<f32> = (0..3 * 64).map(|i| (i * i % 37) as f32 - 18.0).collect();
        let mut acts = Acts::default();
        let (records, wides) = acts.resize(3, 64, true);
        // In two parts, as threads do it.
        quantize(&x, 64, 3, 0, &mut records[..3], &mut wides[..3]);
        quantize(&x, 64, 3, 1, &mut records[3..], &mut wides[3..]);
        let (together, together_wide) = acts.view().tile(0, 3);
        for (r, x) in x.chunks(64).enumerate() {
            let mut one = Acts::default();
            let (records, wides) = one.resize(1, 64, true);
            quantize(x, 64, 1, 0, records, wides);
            for k in 0..2 {
                assert!(bytemuck::bytes_of(&together[k * 3 + r]) == bytemuck::bytes_of(&records[k]));
                assert_eq!(together_wide[k * 3 + r], wides[k]);
            }
        }
    }
}
