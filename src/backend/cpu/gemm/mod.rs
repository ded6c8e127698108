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

use std::sync::{Mutex, PoisonError};

use super::matmul::PackedWeight;
use super::pool::Pool;
use super::{Compute, Tier};
use crate::backend::WeightInfo;
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

/// How a product is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// c = s p
    Set,
    /// c += s p
    Add,
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
        let most = 384 * self.values();
        k.div_ceil(k.div_ceil(most)).next_multiple_of(UNIT)
    }
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
    store: Store,
    scale: f32,
    a: Operand<'_>,
    b: Operand<'_>,
) -> Result<()> {
    let Shape { m, n, k } = shape;
    ensure!(m > 0 && n > 0 && k > 0, Shape, "a product of {m} by {n} sums over {k}");
    ensure!(
        stride >= n && c.len() >= span(m, stride, n),
        Shape,
        "c has {} values, too few for [{m}, {n}] with rows {stride} apart",
        c.len()
    );
    fits("a", &a, m, k)?;
    fits("b", &b, n, k)?;
    product(cx, Path::of(cx.tier, cx.compute), shape, c, stride, store, scale, a, b);
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

#[allow(clippy::too_many_arguments)]
fn product(
    cx: &GemmCx<'_>,
    path: Path,
    Shape { m, n, k }: Shape,
    c: &mut [f32],
    stride: usize,
    store: Store,
    scale: f32,
    a: Operand<'_>,
    b: Operand<'_>,
) {
    let (a, b) = (Source::new(a, path), Source::new(b, path));
    // The larger operand is dealt out, so that nothing of it is packed twice or by another core.
    let rows_shared = m <= n;
    let (shared, dealt) =
        if rows_shared { ((m, a, Side::A), (n, b, Side::B)) } else { ((n, b, Side::B), (m, a, Side::A)) };
    let each = dealt.0.div_ceil(cx.pool.threads() * TASKS_PER_THREAD).next_multiple_of(UNIT).min(TASK);
    let depth = path.depth(k);
    // c is written row by row, unless a shared right operand would come from beyond the core's cache for every few rows.
    let rows_first = rows_shared || shared.0 * depth / path.values() * size_of::<f32>() <= CACHE;
    let mut out = Out::new(c, stride, store == Store::Add, scale, path.tier());
    let most = depth / (LANES * path.values());
    with_tiles(&cx.scratch.shared, shared.0.div_ceil(LANES) * most, |tiles| {
        for first in (0..k).step_by(depth) {
            let ks = first..(first + depth).min(k);
            let steps = ks.len().div_ceil(UNIT) * (UNIT / LANES / path.values());
            let tiles = &mut tiles[..shared.0.div_ceil(LANES) * steps];
            cx.pool.run_chunks(tiles, UNIT / LANES * steps, |u, tiles| {
                let lanes = u * UNIT..((u + 1) * UNIT).min(shared.0);
                pack::pack(path, shared.1, shared.2, lanes, ks.clone(), tiles);
            });
            let tiles = &*tiles;
            cx.pool.run(dealt.0.div_ceil(each), |task| {
                let lanes = task * each..((task + 1) * each).min(dealt.0);
                with_tiles(&cx.scratch.tasks, lanes.len().div_ceil(LANES) * steps, |own| {
                    pack::pack(path, dealt.1, dealt.2, lanes.clone(), ks.clone(), own);
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
