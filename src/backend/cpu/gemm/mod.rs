//! Products of two large matrices, blocked and packed: what training spends its time on.
//!
//! The inputs of a product are cut along k into blocks whose length depends on k alone. For each block the operand with fewer
//! rows is packed for all threads; then each task packs some rows of the other one into a buffer that stays in its core's
//! second-level cache, and multiplies them with all of the first. Packed, all kinds of operands are the same tiles, and
//! every kernel reads these.
//!
//! An element of c is, for each block of k, one chain of additions from zero; the blocks' sums are added to c in order. So it
//! does not depend on m, n, threads or where it stands: results are equal bit for bit.
//!
//! With [`Compute::Fast`] on [`Tier::Avx512`] operands are rounded to bf16 (to the nearest, ties to even; subnormals are
//! zero) and multiplied by AMX where the machine has it, else by `vdpbf16ps`. Everything else is f32.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod pack;
mod portable;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::matmul::PackedWeight;
use super::pool::Pool;
use super::{Compute, Tier};
use crate::backend::{WeightInfo, Write};
use crate::error::{Result, ensure};
use pack::{LANES, Out, Side, Source, Tile, UNIT};

/// One operand of a product, seen as a matrix (i, k) whose second index is summed over.
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    /// (i, k) = x[i * stride + k]
    Rows {
        /// The values.
        x: &'a [f32],
        /// From one row to the next.
        stride: usize,
    },
    /// (i, k) = x[k * stride + i]: the transpose of what lies in memory.
    Cols {
        /// The values.
        x: &'a [f32],
        /// From one k to the next.
        stride: usize,
    },
    /// (i, k) = W[i, k]
    Weight(&'a PackedWeight),
    /// (i, k) = W[k, i]
    WeightT(&'a PackedWeight),
}

/// Rows and columns of c, and the length of the sums; each at least 1.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of c.
    pub m: usize,
    /// Columns of c.
    pub n: usize,
    /// Products in a sum.
    pub k: usize,
}

/// Packing buffers that are reused from call to call.
#[derive(Default)]
pub struct GemmScratch {
    shared: Mutex<Vec<Vec<Tile>>>,
    tasks: Mutex<Vec<Vec<Tile>>>,
}

/// What a product runs on.
#[derive(Clone, Copy)]
pub struct GemmCx<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Instructions; must be one of [`Tier::available`].
    pub tier: Tier,
    /// Whether operands may be rounded to bf16.
    pub compute: Compute,
    /// Reused buffers.
    pub scratch: &'a GemmScratch,
}

/// The kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    Portable,
    Avx2,
    Avx512,
    Bf16,
    Amx,
}

impl Path {
    fn of(tier: Tier, compute: Compute) -> Self {
        match (tier, compute) {
            (Tier::Portable, _) => Path::Portable,
            (Tier::Avx2, _) => Path::Avx2,
            (Tier::Avx512, Compute::Exact) => Path::Avx512,
            #[cfg(target_arch = "x86_64")]
            (Tier::Avx512, Compute::Fast) if amx::available() => Path::Amx,
            (Tier::Avx512, Compute::Fast) => Path::Bf16,
        }
    }

    fn tier(self) -> Tier {
        match self {
            Path::Portable => Tier::Portable,
            Path::Avx2 => Tier::Avx2,
            _ => Tier::Avx512,
        }
    }

    /// Whether operands are rounded.
    fn halves(self) -> bool {
        matches!(self, Path::Bf16 | Path::Amx)
    }

    /// Values of k in a word of a tile.
    fn values(self) -> usize {
        if self.halves() { 2 } else { 1 }
    }

    /// The length of the blocks into which sums of `k` products are cut.
    fn depth(self, k: usize) -> usize {
        k.div_ceil(k.div_ceil(self.deepest())).next_multiple_of(UNIT)
    }

    /// The longest block.
    fn deepest(self) -> usize {
        384 * self.values()
    }
}

/// Whether operands are rounded to bf16.
pub fn rounds(tier: Tier, compute: Compute) -> bool {
    Path::of(tier, compute).halves()
}

/// Does what products on this tier do, in registers only, on this thread: the roof of what they may reach. Returns how many
/// operations; `None` where they are plain f32.
pub fn register_products(tier: Tier, compute: Compute) -> Option<f64> {
    match Path::of(tier, compute) {
        #[cfg(target_arch = "x86_64")]
        Path::Amx => Some(amx::register_products()),
        _ => None,
    }
}

/// Lanes of a task: enough to earn what reading the shared operand costs, few enough to stay in the core's cache.
const TASK: usize = 256;
/// Bytes of a core's second-level cache that the shared operand may fill.
const CACHE: usize = 1 << 20;
/// Tasks for each thread where there are enough lanes.
const TASKS_PER_THREAD: usize = 4;

/// c[i * stride + j] (= or +=) scale * sum_k a(i,k) b(j,k), i < m, j < n.
///
/// # Errors
/// An operand or c that does not fit the shape.
#[allow(clippy::too_many_arguments)]
pub fn gemm(
    cx: &GemmCx<'_>,
    shape: Shape,
    c: &mut [f32],
    stride: usize,
    write: Write,
    scale: f32,
    a: Operand<'_>,
    b: Operand<'_>,
) -> Result<()> {
    let Shape { m, n, k } = shape;
    check(m, n, c, stride, &[Term { a, b, k }])?;
    product(cx, Path::of(cx.tier, cx.compute), [m, n], c, stride, write, scale, &[Term { a, b, k }]);
    Ok(())
}

/// One of several products that are added up: sum_k a(i,k) b(j,k), k < `k`.
#[derive(Clone, Copy)]
pub struct Term<'a> {
    /// Rows of c.
    pub a: Operand<'a>,
    /// Columns of c.
    pub b: Operand<'a>,
    /// Products in a sum.
    pub k: usize,
}

/// c[i * stride + j] (= or +=) the sum of `terms`, i < m, j < n: as if their operands lay side by side along k, so that c is
/// written once where they are short.
///
/// # Errors
/// As [`gemm`].
pub fn gemm_sum(
    cx: &GemmCx<'_>,
    [m, n]: [usize; 2],
    c: &mut [f32],
    stride: usize,
    write: Write,
    terms: &[Term<'_>],
) -> Result<()> {
    check(m, n, c, stride, terms)?;
    product(cx, Path::of(cx.tier, cx.compute), [m, n], c, stride, write, 1.0, terms);
    Ok(())
}

fn check(m: usize, n: usize, c: &[f32], stride: usize, terms: &[Term<'_>]) -> Result<()> {
    ensure!(m > 0 && n > 0 && !terms.is_empty(), Shape, "a product of {m} by {n}, {} terms", terms.len());
    ensure!(
        stride >= n && c.len() >= span(m, stride, n),
        Shape,
        "c has {} values, too few for [{m}, {n}] with rows {stride} apart",
        c.len()
    );
    for Term { a, b, k } in terms {
        ensure!(*k > 0, Shape, "a product of {m} by {n} sums over 0");
        fits("a", a, m, *k)?;
        fits("b", b, n, *k)?;
    }
    Ok(())
}

/// Values from the first to the last of `[rows, cols]`.
fn span(rows: usize, stride: usize, cols: usize) -> usize {
    (rows - 1).saturating_mul(stride).saturating_add(cols)
}

fn fits(name: &str, operand: &Operand<'_>, lanes: usize, k: usize) -> Result<()> {
    let (x, stride, rows, cols) = match *operand {
        Operand::Rows { x, stride } => (x, stride, lanes, k),
        Operand::Cols { x, stride } => (x, stride, k, lanes),
        Operand::Weight(w) | Operand::WeightT(w) => {
            let (rows, cols) = if matches!(operand, Operand::Weight(_)) { (lanes, k) } else { (k, lanes) };
            let found = (w.rows(), w.cols());
            ensure!(found == (rows, cols), Shape, "{name} is a weight {found:?}, the product needs ({rows}, {cols})");
            return Ok(());
        }
    };
    ensure!(
        stride >= cols && x.len() >= span(rows, stride, cols),
        Shape,
        "{name} has {} values, too few for [{rows}, {cols}] with rows {stride} apart",
        x.len()
    );
    Ok(())
}

/// What a kernel multiplies: `rows` by `cols` lanes of c from (i, j) on; panels of 16 lanes have `steps` tiles each.
struct Block<'a> {
    a: &'a [Tile],
    b: &'a [Tile],
    steps: usize,
    i: usize,
    j: usize,
    rows: usize,
    cols: usize,
    /// Whether a panel of `a` is to be multiplied with all of `b` before the next one, or the other way round.
    rows_first: bool,
}

impl Block<'_> {
    /// The tiles of c: `f(row, column)` for the first of every `height` by `width` lanes.
    #[inline(always)]
    fn each(&self, height: usize, width: usize, mut f: impl FnMut(usize, usize)) {
        if self.rows_first {
            (0..self.rows).step_by(height).for_each(|i| (0..self.cols).step_by(width).for_each(|j| f(i, j)));
        } else {
            (0..self.cols).step_by(width).for_each(|j| (0..self.rows).step_by(height).for_each(|i| f(i, j)));
        }
    }

    /// Stops where the tiles are not all there, so that kernels may rely on it.
    fn check(&self) {
        let tiles = |lanes: usize| lanes.div_ceil(LANES) * self.steps;
        assert!(self.a.len() >= tiles(self.rows) && self.b.len() >= tiles(self.cols));
    }
}

fn multiply(path: Path, block: &Block<'_>, out: &Out<'_>) {
    block.check();
    match path {
        Path::Portable => portable::multiply(block, out),
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => avx2::multiply(block, out),
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => avx512::multiply::<false>(block, out),
        #[cfg(target_arch = "x86_64")]
        Path::Bf16 => avx512::multiply::<true>(block, out),
        #[cfg(target_arch = "x86_64")]
        Path::Amx => amx::multiply(block, out),
        #[cfg(not(target_arch = "x86_64"))]
        _ => unreachable!("no such tier here"),
    }
}

/// Runs `f` on a buffer of `tiles` tiles from `from`, which keeps its memory.
fn with_tiles<T>(from: &Mutex<Vec<Vec<Tile>>>, tiles: usize, f: impl FnOnce(&mut [Tile]) -> T) -> T {
    let lock = || from.lock().unwrap_or_else(PoisonError::into_inner);
    let mut buffer = lock().pop().unwrap_or_default();
    if buffer.len() < tiles {
        buffer.resize(tiles, Tile::default());
    }
    let r = f(&mut buffer[..tiles]);
    lock().push(buffer);
    r
}

/// The blocks of k: of which terms which values. Short neighbours share one.
fn blocks(path: Path, terms: &[Term<'_>]) -> Vec<Vec<(usize, Range<usize>)>> {
    let (mut blocks, mut room) = (Vec::new(), 0);
    for (t, term) in terms.iter().enumerate() {
        let depth = path.depth(term.k);
        for first in (0..term.k).step_by(depth) {
            let piece = first..(first + depth).min(term.k);
            let len = piece.len().next_multiple_of(UNIT);
            if len > room {
                blocks.push(Vec::new());
                room = path.deepest();
            }
            room -= len;
            blocks.last_mut().expect("one was pushed").push((t, piece));
        }
    }
    blocks
}

#[allow(clippy::too_many_arguments)]
fn product(
    cx: &GemmCx<'_>,
    path: Path,
    [m, n]: [usize; 2],
    c: &mut [f32],
    stride: usize,
    write: Write,
    scale: f32,
    terms: &[Term<'_>],
) {
    let sources: Vec<_> = terms.iter().map(|t| (Source::new(t.a, path), Source::new(t.b, path))).collect();
    // The larger operand is dealt out, so that nothing of it is packed twice or by another core.
    let rows_shared = m <= n;
    let ((shared, dealt), (of_shared, of_dealt)) =
        if rows_shared { ((m, n), (Side::A, Side::B)) } else { ((n, m), (Side::B, Side::A)) };
    let each = dealt.div_ceil(cx.pool.threads() * TASKS_PER_THREAD).next_multiple_of(UNIT).min(TASK);
    let mut out = Out::new(c, stride, write == Write::Add, scale, path.tier());
    let tiles_of = |values: usize| values.div_ceil(UNIT) * (UNIT / LANES / path.values());
    let blocks = blocks(path, terms);
    let steps_of = |block: &[(usize, Range<usize>)]| block.iter().map(|(_, ks)| tiles_of(ks.len())).sum::<usize>();
    let most = blocks.iter().map(|b| steps_of(b)).max().unwrap_or(0);
    with_tiles(&cx.scratch.shared, shared.div_ceil(LANES) * most, |tiles| {
        for block in &blocks {
            let steps = steps_of(block);
            // c is written row by row, unless a shared right operand would come from beyond the core's cache for every few rows.
            let rows_first = rows_shared || shared * steps * LANES * size_of::<f32>() <= CACHE;
            let pack_all = |side: Side, lanes: &Range<usize>, tiles: &mut [Tile]| {
                let mut first = 0;
                for (t, ks) in block {
                    let from = if side == Side::A { sources[*t].0 } else { sources[*t].1 };
                    pack::pack(path, from, side, lanes.clone(), ks.clone(), first, tiles);
                    first += tiles_of(ks.len());
                }
            };
            let tiles = &mut tiles[..shared.div_ceil(LANES) * steps];
            cx.pool.run_chunks(tiles, UNIT / LANES * steps, |u, tiles| {
                pack_all(of_shared, &(u * UNIT..((u + 1) * UNIT).min(shared)), tiles);
            });
            let tiles = &*tiles;
            cx.pool.run(dealt.div_ceil(each), |task| {
                let lanes = task * each..((task + 1) * each).min(dealt);
                with_tiles(&cx.scratch.tasks, lanes.len().div_ceil(LANES) * steps, |own| {
                    pack_all(of_dealt, &lanes, own);
                    let (i, j) = if rows_shared { (0, lanes.start) } else { (lanes.start, 0) };
                    let (a, b) = if rows_shared { (tiles, &*own) } else { (&*own, tiles) };
                    let (rows, cols) = if rows_shared { (m, lanes.len()) } else { (lanes.len(), n) };
                    multiply(path, &Block { a, b, steps, i, j, rows, cols, rows_first }, &out);
                });
            });
            out.add();
        }
    });
}
