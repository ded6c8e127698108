//! Activations rounded to int8, a scale for every 32 inputs, as the integer kernels read them; and to i16 for 8-bit weights,
//! beside whose own rounding that of int8 would show.

use super::layout::BLOCK;

/// Steps of the i16 form in one of the int8 form. Exact in f32, and 32 products with i8 weights fit into i32.
pub(super) const FINER: f32 = 128.0;

/// 16 bytes, the unit of a record.
type Unit = [f32; 4];

/// Rows of quantised activations, one record each: for every block `[s, s * sum(q), s * sum(q[..16]), s * sum(q[16..])]`,
/// then the int8 values q, then (if wanted) i16 values of scale s / [`FINER`], of every four first inputs 0 and 2, then 1
/// and 3: what a multiply-add of i16 pairs against packed i8 weights needs.
#[derive(Default)]
pub(super) struct Acts {
    units: Vec<Unit>,
    blocks: usize,
    wide: bool,
    bf16s: Vec<u16>,
}

/// A shared view of [`Acts`].
#[derive(Clone, Copy)]
pub(super) struct Quantized<'a> {
    units: &'a [Unit],
    blocks: usize,
    stride: usize,
}

impl Acts {
    /// Makes room for `rows` rows of `cols` inputs; returns the records and the units of one.
    pub fn resize(&mut self, rows: usize, cols: usize, wide: bool) -> (&mut [Unit], usize) {
        (self.blocks, self.wide) = (cols / BLOCK, wide);
        let n = rows * self.stride();
        if self.units.len() < n {
            self.units.resize(n, Unit::default());
        }
        let stride = self.stride();
        (&mut self.units[..n], stride)
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

    fn stride(&self) -> usize {
        self.blocks * if self.wide { 7 } else { 3 }
    }

    pub fn view(&self) -> Quantized<'_> {
        Quantized { units: &self.units, blocks: self.blocks, stride: self.stride() }
    }
}

impl<'a> Quantized<'a> {
    /// Scale and scaled sums of each block of row `r`.
    pub fn meta(&self, r: usize) -> &'a [Unit] {
        &self.units[r * self.stride..][..self.blocks]
    }

    /// The int8 values of row `r`.
    pub fn q(&self, r: usize) -> &'a [i8] {
        bytemuck::cast_slice(&self.units[r * self.stride + self.blocks..][..2 * self.blocks])
    }

    /// The i16 values of row `r`, in their order.
    pub fn wide(&self, r: usize) -> &'a [i16] {
        bytemuck::cast_slice(&self.units[r * self.stride + 3 * self.blocks..][..4 * self.blocks])
    }

    /// Where the records of `rows` begin, and the bytes from one to the next.
    pub fn records(&self, rows: std::ops::Range<usize>) -> (&'a [u8], usize) {
        (bytemuck::cast_slice(&self.units[rows.start * self.stride..rows.end * self.stride]), self.stride * 16)
    }
}

/// Writes the record of one row; `out` says by its length whether the i16 form is wanted.
///
/// The largest magnitude becomes 127; ties round to even. A NaN or an infinity makes the scale such, and so every product.
/// Inlined, so that each tier compiles it for its own instructions; the results are the same.
#[inline(always)]
pub(super) fn quantize_row(x: &[f32], out: &mut [Unit]) {
    let blocks = x.len() / BLOCK;
    let (meta, rest) = out.split_at_mut(blocks);
    let (q, wide) = rest.split_at_mut(2 * blocks);
    let q: &mut [[i8; BLOCK]] = bytemuck::cast_slice_mut(q);
    let mut wide = bytemuck::cast_slice_mut::<_, [[i16; 4]; 8]>(wide).iter_mut();
    for ((x, q), meta) in x.as_chunks::<BLOCK>().0.iter().zip(q).zip(meta) {
        *meta = quantize_block(x, q, wide.next());
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
fn quantize_block(x: &[f32; BLOCK], q: &mut [i8; BLOCK], wide: Option<&mut [[i16; 4]; 8]>) -> Unit {
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
        for (x, w) in x.as_chunks::<4>().0.iter().zip(wide) {
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
        let (out, _) = acts.resize(1, 64, true);
        quantize_row(&x, out);
        let view = acts.view();
        for (b, x) in x.chunks(32).enumerate() {
            let s = view.meta(0)[b][0];
            let q = &view.q(0)[b * 32..b * 32 + 32];
            let max = x.iter().fold(0f32, |a, x| a.max(x.abs()));
            assert_eq!(s, max / 127.0);
            for (x, &q) in x.iter().zip(q) {
                assert_eq!(q as f32, (x * (127.0 / max)).round_ties_even());
            }
            for (x, w) in x.chunks(4).zip(view.wide(0)[b * 32..].chunks(4)) {
                for (i, &w) in [0, 2, 1, 3].into_iter().zip(w) {
                    assert_eq!(w as f32, (x[i] * (127.0 / max * FINER)).round_ties_even());
                }
            }
            let sum: i32 = q.iter().map(|&q| q as i32).sum();
            assert_eq!(view.meta(0)[b][1], s * sum as f32);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[40] = bad;
            let (out, _) = acts.resize(1, 64, false);
            quantize_row(&x, out);
            assert!(acts.view().meta(0)[0][0].is_finite() && !acts.view().meta(0)[1][0].is_finite());
        }
        let (out, _) = acts.resize(1, 32, false);
        quantize_row(&[0.0; 32], out);
        assert_eq!(acts.view().meta(0)[0], [0.0; 4]);
    }
}
