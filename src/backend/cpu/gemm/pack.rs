//! From operands to tiles, and from sums to c.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{Block, Operand, Path, portable};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::backend::cpu::Tier;
use crate::backend::cpu::lanes::{Kernel, Simd, dispatch};
use crate::backend::cpu::matmul::PackedWeight;
use crate::backend::cpu::pool::Shards;
use crate::dtype::DType;

/// Lanes (rows of an operand) of a panel, and words of k of a tile.
pub(super) const LANES: usize = 16;
/// Lanes and values of k that are packed at a time.
pub(super) const UNIT: usize = 32;

/// 16 lanes by 16 words of k, a word being an f32 or a pair of bf16: `[lane][word]` of the left operand, `[word][lane]` of
/// the right one.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Tile(pub [f32; LANES * LANES]);

impl Default for Tile {
    fn default() -> Self {
        bytemuck::Zeroable::zeroed()
    }
}

/// Which operand is packed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    A,
    B,
}

/// Where an operand's values come from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    data: Data<'a>,
    stride: usize,
    /// Whether neighbours in memory are neighbouring lanes rather than neighbours along k.
    cols: bool,
}

#[derive(Clone, Copy)]
enum Data<'a> {
    F32(&'a [f32]),
    Bf16(&'a [u16]),
    /// To be widened to f32 first.
    Coded(&'a PackedWeight),
}

impl<'a> Source<'a> {
    pub fn new(operand: Operand<'a>, path: Path) -> Self {
        let (w, cols) = match operand {
            Operand::Rows { x, stride } => return Self { data: Data::F32(x), stride, cols: false },
            Operand::Cols { x, stride } => return Self { data: Data::F32(x), stride, cols: true },
            Operand::Weight(w) => (w, false),
            Operand::WeightT(w) => (w, true),
        };
        let plain = w.plain(DType::F32).map(Data::F32);
        let halves = || w.plain(DType::BF16).filter(|_| path.halves()).map(Data::Bf16);
        Self { data: plain.or_else(halves).unwrap_or(Data::Coded(w)), stride: w.cols_len(), cols }
    }
}

/// What becomes of a tile: rounded pairs of f32, or words as they are; or pairs of bf16.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    Words(&'a [f32]),
    Round(&'a [f32]),
    Pairs(&'a [u16]),
}

/// The first `lines` by `width` of `x` in lines of 32, zeros behind them.
fn padded<T: Copy + Default>(x: &[T], stride: usize, lines: usize, width: usize, out: &mut [T; UNIT * UNIT]) {
    out.fill(T::default());
    for (l, out) in out.chunks_exact_mut(UNIT).take(lines).enumerate() {
        out[..width].copy_from_slice(&x[l * stride..l * stride + width]);
    }
}

/// Lanes `lanes` (from a multiple of 32 on) and values `ks` (likewise) of k as panels of 16 lanes, zeros where there are none: in each
/// panel of `out` the tiles from `first` on.
pub(super) fn pack(
    path: Path,
    from: Source<'_>,
    side: Side,
    lanes: Range<usize>,
    ks: Range<usize>,
    first: usize,
    out: &mut [Tile],
) {
    let (panels, steps) = (lanes.len().div_ceil(LANES), out.len() / lanes.len().div_ceil(LANES));
    let (across, along) = (lanes.len().div_ceil(UNIT), ks.len().div_ceil(UNIT));
    let mut floats = [0.0f32; UNIT * UNIT];
    let mut halves = [0u16; UNIT * UNIT];
    for unit in 0..across * along {
        // In the order of memory.
        let (l, s) = if from.cols { (unit % across, unit / across) } else { (unit / along, unit % along) };
        let (lane, k) = (lanes.start + l * UNIT, ks.start + s * UNIT);
        let (wide, deep) = (UNIT.min(lanes.end - lane), UNIT.min(ks.end - k));
        let full = wide == UNIT && deep == UNIT;
        let (lines, width) = if from.cols { (deep, wide) } else { (wide, deep) };
        let at = if from.cols { k * from.stride + lane } else { lane * from.stride + k };
        let (mut cols, mut stride) = (from.cols, from.stride);
        if !full || matches!(from.data, Data::Coded(_)) {
            stride = UNIT;
        }
        let round = |x| if path.halves() { Values::Round(x) } else { Values::Words(x) };
        let values = match from.data {
            Data::F32(x) if full => round(&x[at..]),
            Data::Bf16(x) if full => Values::Pairs(&x[at..]),
            Data::F32(x) => {
                padded(&x[at..], from.stride, lines, width, &mut floats);
                round(&floats)
            }
            Data::Bf16(x) => {
                padded(&x[at..], from.stride, lines, width, &mut halves);
                Values::Pairs(&halves)
            }
            Data::Coded(w) => {
                if !full {
                    floats.fill(0.0);
                }
                let (row, col) = if from.cols { (k, lane) } else { (lane, k) };
                w.square(path.tier(), row, col, &mut floats);
                cols ^= w.dtype().is_quantized();
                round(&floats)
            }
        };
        let transpose = cols != (side == Side::B);
        let deep = UNIT / LANES / path.values();
        for (p, step) in (0..2.min(panels - 2 * l)).flat_map(|p| (0..deep).map(move |s| (p, s))) {
            let at = if cols { step * LANES * stride + p * LANES } else { p * LANES * stride + step * LANES };
            let tile = &mut out[(2 * l + p) * steps + first + s * deep + step];
            match values {
                Values::Words(x) => words(path, &x[at..], stride, transpose, tile),
                #[cfg(target_arch = "x86_64")]
                Values::Round(x) => avx512::round(&x[at..], stride, cols, transpose, tile),
                #[cfg(target_arch = "x86_64")]
                Values::Pairs(x) => avx512::pairs(&x[at..], stride, cols, transpose, tile),
                #[cfg(not(target_arch = "x86_64"))]
                _ => unreachable!("only AVX-512 rounds"),
            }
        }
    }
}

/// 16 lines of 16 words, `stride` apart, as they are or transposed.
fn words(path: Path, x: &[f32], stride: usize, transpose: bool, tile: &mut Tile) {
    match path.tier() {
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512 => avx512::words(x, stride, transpose, tile),
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 => avx2::words(x, stride, transpose, tile),
        _ => portable::words(x, stride, transpose, tile),
    }
}

/// c, and how sums are stored in it.
pub(super) struct Out<'a> {
    c: Shards<'a, f32>,
    stride: usize,
    add: bool,
    scale: f32,
    tier: Tier,
}

impl<'a> Out<'a> {
    pub fn new(c: &'a mut [f32], stride: usize, add: bool, scale: f32, tier: Tier) -> Self {
        Self { c: Shards::new(c), stride, add, scale, tier }
    }

    /// From now on sums are added.
    pub fn add(&mut self) {
        self.add = true;
    }

    /// Stores `sums`, whose rows are `W` long, from (i, j) of the block on, as far as it goes.
    pub fn put<const W: usize>(&self, block: &Block<'_>, i: usize, j: usize, sums: &[f32]) {
        dispatch(self.tier, Put::<W> { out: self, block, i, j, sums });
    }
}

struct Put<'a, const W: usize> {
    out: &'a Out<'a>,
    block: &'a Block<'a>,
    i: usize,
    j: usize,
    sums: &'a [f32],
}

impl<const W: usize> Kernel for Put<'_, W> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { out, block, i, j, sums } = self;
        let (add, scale, width) = (out.add, out.scale, W.min(block.cols - j));
        for (sums, i) in sums.as_chunks::<W>().0.iter().zip(i..block.rows) {
            // SAFETY: the blocks of tasks that run at a time are disjoint, and this reference ends before the next begins.
            let c = unsafe { out.c.slice((block.i + i) * out.stride + block.j + j, width) };
            let whole = width - width % S::N;
            for at in (0..whole).step_by(S::N) {
                let p = s.mul(s.splat(scale), s.load(&sums[at..]));
                s.store(if add { s.add(s.load(&c[at..]), p) } else { p }, &mut c[at..]);
            }
            for (c, sum) in c[whole..].iter_mut().zip(&sums[whole..]) {
                *c = if add { *c + scale * sum } else { scale * sum };
            }
        }
    }
}
