//! The ops that go row by row: norms, gates, sums, rotations, gathers.
//!
//! A row is computed by one thread, and no row looks at another, so neither the number of rows nor that of threads can
//! change a result. Small jobs stay on the calling thread: a barrier costs more than a few thousand elements.

use std::ops::Range;

use super::Tier;
use super::kv::CpuKv;
use super::lanes::math::{gelu_tanh, silu};
use super::lanes::{Kernel, Simd, dispatch};
use super::matmul::gated;
use super::pool::Pool;
use crate::error::{Result, ensure};
use crate::model::config::Activation;

/// Elements below which a job is not worth waking another thread, and the least that one task gets.
const SMALL: usize = 16 * 1024;

/// Rows for one task, such that several tasks come to each thread; all of them if the job is small.
fn rows_per_task(pool: &Pool, rows: usize, width: usize) -> usize {
    if pool.threads() == 1 || rows * width < SMALL {
        return rows.max(1);
    }
    rows.div_ceil(4 * pool.threads()).max((SMALL / 4).div_ceil(width.max(1)))
}

/// Whether `n` values are rows of `width`.
pub(super) fn check_rows(what: &str, n: usize, width: usize) -> Result<()> {
    ensure!(width > 0 && n.is_multiple_of(width), Shape, "{what}: {n} values are not rows of {width}");
    Ok(())
}

pub(super) fn check_equal(what: &str, a: usize, b: usize) -> Result<()> {
    ensure!(a == b, Shape, "{what}: {a} values on one side and {b} on the other");
    Ok(())
}

/// y = x w / sqrt(mean(x^2) + eps) for each row of width `w.len()`.
///
/// # Errors
/// Lengths that do not fit.
pub fn rms_norm(pool: &Pool, tier: Tier, y: &mut [f32], x: &[f32], w: &[f32], eps: f32) -> Result<()> {
    check_rows("rms_norm", x.len(), w.len())?;
    check_equal("rms_norm", y.len(), x.len())?;
    let n = rows_per_task(pool, x.len() / w.len(), w.len()) * w.len();
    pool.run_chunks(y, n, |i, y| {
        let x = &x[i * n..i * n + y.len()];
        dispatch(tier, Norm { y, x, w, eps });
    });
    Ok(())
}

/// x += r, then y = [`rms_norm`] of x.
///
/// # Errors
/// Lengths that do not fit.
pub fn add_rms_norm(
    pool: &Pool,
    tier: Tier,
    y: &mut [f32],
    x: &mut [f32],
    r: &[f32],
    w: &[f32],
    eps: f32,
) -> Result<()> {
    check_rows("add_rms_norm", x.len(), w.len())?;
    check_equal("add_rms_norm", r.len(), x.len())?;
    check_equal("add_rms_norm", y.len(), x.len())?;
    let n = rows_per_task(pool, x.len() / w.len(), w.len()) * w.len();
    let each = |x: &mut [f32], y: &mut [f32], r: &[f32]| {
        dispatch(tier, Add { x, r });
        dispatch(tier, Norm { y, x, w, eps });
    };
    if x.len() <= n {
        each(x, y, r);
        return Ok(());
    }
    let mut parts: Vec<_> = x.chunks_mut(n).zip(y.chunks_mut(n)).zip(r.chunks(n)).collect();
    pool.run_chunks(&mut parts, 1, |_, p| p.iter_mut().for_each(|((x, y), r)| each(x, y, r)));
    Ok(())
}

/// x += [`rms_norm`] of r.
///
/// # Errors
/// Lengths that do not fit.
pub fn add_normed(pool: &Pool, tier: Tier, x: &mut [f32], r: &[f32], w: &[f32], eps: f32) -> Result<()> {
    check_rows("add_normed", x.len(), w.len())?;
    check_equal("add_normed", r.len(), x.len())?;
    let n = rows_per_task(pool, x.len() / w.len(), w.len()) * w.len();
    pool.run_chunks(x, n, |i, x| {
        let r = &r[i * n..i * n + x.len()];
        dispatch(tier, AddNormed { x, r, w, eps });
    });
    Ok(())
}

/// Each head of `w.len()` columns of x is RMS-normalised in place.
///
/// # Errors
/// Lengths that do not fit.
pub fn head_norm(pool: &Pool, tier: Tier, x: &mut [f32], w: &[f32], eps: f32) -> Result<()> {
    check_rows("head_norm", x.len(), w.len())?;
    let n = rows_per_task(pool, x.len() / w.len(), w.len()) * w.len();
    pool.run_chunks(x, n, |_, x| dispatch(tier, HeadNorm { x, w, eps }));
    Ok(())
}

/// x += r.
///
/// # Errors
/// Different lengths.
pub fn add(pool: &Pool, tier: Tier, x: &mut [f32], r: &[f32]) -> Result<()> {
    check_equal("add", x.len(), r.len())?;
    let n = rows_per_task(pool, x.len(), 1);
    pool.run_chunks(x, n, |i, x| {
        let r = &r[i * n..i * n + x.len()];
        dispatch(tier, Add { x, r });
    });
    Ok(())
}

/// x += act(r), elementwise.
///
/// # Errors
/// Different lengths.
pub fn add_activated(pool: &Pool, tier: Tier, x: &mut [f32], r: &[f32], act: Activation) -> Result<()> {
    check_equal("add_activated", x.len(), r.len())?;
    let n = rows_per_task(pool, x.len(), 1);
    pool.run_chunks(x, n, |i, x| {
        let r = &r[i * n..i * n + x.len()];
        dispatch(tier, AddActivated { x, r, act });
    });
    Ok(())
}

/// y = act(gate) * up, elementwise.
///
/// # Errors
/// Different lengths.
pub fn glu(pool: &Pool, tier: Tier, y: &mut [f32], gate: &[f32], up: &[f32], act: Activation) -> Result<()> {
    check_equal("glu", y.len(), gate.len())?;
    check_equal("glu", y.len(), up.len())?;
    let n = rows_per_task(pool, y.len(), 1);
    pool.run_chunks(y, n, |i, y| {
        let r = i * n..i * n + y.len();
        dispatch(tier, Glu { y, gate: &gate[r.clone()], up: &up[r], act });
    });
    Ok(())
}

/// y\[i\] = x\[rows\[i\]\], rows of width `d`.
///
/// # Errors
/// A row that x does not have, or lengths that do not fit.
pub fn gather_rows(y: &mut [f32], x: &[f32], rows: &[u32], d: usize) -> Result<()> {
    check_rows("gather_rows", x.len(), d)?;
    check_equal("gather_rows", y.len(), rows.len() * d)?;
    for (y, &row) in y.chunks_exact_mut(d).zip(rows) {
        let at = row as usize * d;
        ensure!(at < x.len(), Shape, "gather_rows: row {row} of {}", x.len() / d);
        y.copy_from_slice(&x[at..at + d]);
    }
    Ok(())
}

/// Rotates every head of x in place: pair (i, i + head_dim/2) of row r by the angle whose cosine and sine are
/// `table[r * head_dim + i]` and `table[r * head_dim + head_dim/2 + i]`.
///
/// # Errors
/// Lengths that do not fit, or an odd `head_dim`.
pub fn rope(pool: &Pool, tier: Tier, x: &mut [f32], table: &[f32], head_dim: usize) -> Result<()> {
    let width = check_rope(x.len(), table, head_dim)?;
    let rows = rows_per_task(pool, table.len() / head_dim, width);
    if width > 0 {
        pool.run_chunks(x, rows * width, |i, x| {
            let table = &table[i * rows * head_dim..];
            dispatch(tier, Rope { x, table, width, head_dim });
        });
    }
    Ok(())
}

/// Width of the rows of `n` values that `table` rotates.
fn check_rope(n: usize, table: &[f32], head_dim: usize) -> Result<usize> {
    check_rows("rope: table", table.len(), head_dim)?;
    ensure!(head_dim.is_multiple_of(2), Shape, "rope: a head of {head_dim} columns has no pairs");
    let rows = table.len() / head_dim;
    ensure!(
        n.is_multiple_of((rows * head_dim).max(1)) && (rows > 0 || n == 0),
        Shape,
        "rope: {n} values are not {rows} rows of heads of {head_dim} columns"
    );
    Ok(n / rows.max(1))
}

/// Where a segment's keys and values go: the first row, its cache, and how many rows.
pub type Sink<'a> = (usize, &'a mut CpuKv, usize);

/// [`rope`] of q and of k, then [`CpuKv::stage`] of k and v into the caches, segment after segment.
///
/// # Errors
/// Lengths that do not fit, or a full cache.
#[allow(clippy::too_many_arguments)]
pub fn rope_stage<'a>(
    pool: &Pool,
    tier: Tier,
    q: &mut [f32],
    k: &mut [f32],
    v: &[f32],
    table: &[f32],
    head_dim: usize,
    layer: usize,
    sinks: impl IntoIterator<Item = Sink<'a>>,
) -> Result<()> {
    let (q_width, k_width) = (check_rope(q.len(), table, head_dim)?, check_rope(k.len(), table, head_dim)?);
    check_equal("rope_stage: keys and values", k.len(), v.len())?;
    let rows = rows_per_task(pool, table.len() / head_dim, q_width + k_width);
    let each = |q: &mut [f32], k: &mut [f32], table: &[f32]| {
        dispatch(tier, Rope { x: q, table, width: q_width, head_dim });
        dispatch(tier, Rope { x: k, table, width: k_width, head_dim });
    };
    if rows * head_dim >= table.len() || q_width == 0 || k_width == 0 {
        each(q, k, table);
    } else {
        let split = q.chunks_mut(rows * q_width).zip(k.chunks_mut(rows * k_width));
        let mut parts: Vec<_> = split.zip(table.chunks(rows * head_dim)).collect();
        pool.run_chunks(&mut parts, 1, |_, p| p.iter_mut().for_each(|((q, k), t)| each(q, k, t)));
    }
    let mut at = 0;
    for (first, kv, rows) in sinks {
        let r = at..at + rows * k_width;
        ensure!(
            r.end <= k.len(),
            Shape,
            "rope_stage: segments of more rows than the {} of k",
            k.len() / k_width.max(1)
        );
        ensure!(kv.kv_dim() == k_width, Shape, "keys of {k_width} columns for a cache of {}", kv.kv_dim());
        kv.stage(pool, tier, layer, first, &k[r.clone()], &v[r.clone()])?;
        at = r.end;
    }
    Ok(())
}

struct Norm<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
    w: &'a [f32],
    eps: f32,
}

/// 1 / sqrt(mean(x^2) + eps); four sums at a time, so that the additions overlap.
#[inline(always)]
pub(super) fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut acc = [s.splat(0.0); 4];
    let mut quads = x.chunks_exact(4 * S::N);
    for quad in &mut quads {
        for (acc, x) in acc.iter_mut().zip(quad.chunks_exact(S::N)) {
            let x = s.load(x);
            *acc = s.fma(x, x, *acc);
        }
    }
    for (acc, x) in acc.iter_mut().zip(quads.remainder().chunks(S::N)) {
        let x = if x.len() == S::N { s.load(x) } else { s.load_part(x, 0.0) };
        *acc = s.fma(x, x, *acc);
    }
    let sum = s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

/// `$y = $e` for all lanes of one row or run, where the operands of `$e` are vectors of the slices named before it.
macro_rules! each_vector {
    ($s:ident, $y:ident, [$($x:ident),*], $e:expr) => {{
        let (n, end) = ($y.len() / S::N * S::N, $y.len());
        for i in (0..n).step_by(S::N) {
            let v = {
                $(let $x = $s.load(&$x[i..i + S::N]);)*
                $e
            };
            $s.store(v, &mut $y[i..i + S::N]);
        }
        if n < end {
            let v = {
                $(let $x = $s.load_part(&$x[n..end], 0.0);)*
                $e
            };
            $s.store_part(v, &mut $y[n..]);
        }
    }};
}

pub(super) use each_vector;

impl Kernel for Norm<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = self.w;
        for (y, x) in self.y.chunks_exact_mut(w.len()).zip(self.x.chunks_exact(w.len())) {
            let inv = s.splat(inverse_rms(s, x, self.eps));
            each_vector!(s, y, [x, w], s.mul(s.mul(x, inv), w));
        }
    }
}

struct HeadNorm<'a> {
    x: &'a mut [f32],
    w: &'a [f32],
    eps: f32,
}

impl Kernel for HeadNorm<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = self.w;
        for x in self.x.chunks_exact_mut(w.len()) {
            let inv = s.splat(inverse_rms(s, x, self.eps));
            each_vector!(s, x, [x, w], s.mul(s.mul(x, inv), w));
        }
    }
}

struct AddNormed<'a> {
    x: &'a mut [f32],
    r: &'a [f32],
    w: &'a [f32],
    eps: f32,
}

impl Kernel for AddNormed<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = self.w;
        for (x, r) in self.x.chunks_exact_mut(w.len()).zip(self.r.chunks_exact(w.len())) {
            let inv = s.splat(inverse_rms(s, r, self.eps));
            each_vector!(s, x, [x, r, w], s.add(x, s.mul(s.mul(r, inv), w)));
        }
    }
}

struct Add<'a> {
    x: &'a mut [f32],
    r: &'a [f32],
}

impl Kernel for Add<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (x, r) = (self.x, self.r);
        each_vector!(s, x, [x, r], s.add(x, r));
    }
}

struct AddActivated<'a> {
    x: &'a mut [f32],
    r: &'a [f32],
    act: Activation,
}

impl Kernel for AddActivated<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (x, r) = (self.x, self.r);
        match self.act {
            Activation::Silu => each_vector!(s, x, [x, r], s.add(x, silu(s, r))),
            Activation::GeluTanh => each_vector!(s, x, [x, r], s.add(x, gelu_tanh(s, r))),
        }
    }
}

struct Glu<'a> {
    y: &'a mut [f32],
    gate: &'a [f32],
    up: &'a [f32],
    act: Activation,
}

impl Kernel for Glu<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        // The function of the fused product: a pass that needs gate and up apart gives the same bits.
        gated(self.y, self.gate, self.up, self.act);
    }
}

struct Rope<'a> {
    x: &'a mut [f32],
    table: &'a [f32],
    width: usize,
    head_dim: usize,
}

impl Kernel for Rope<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (dim, half) = (self.head_dim, self.head_dim / 2);
        for (row, table) in self.x.chunks_exact_mut(self.width.max(1)).zip(self.table.chunks_exact(dim)) {
            let (cos, sin) = table.split_at(half);
            for head in row.chunks_exact_mut(dim) {
                let (a, b) = head.split_at_mut(half);
                for i in (0..half).step_by(S::N) {
                    let r: Range<usize> = i..half.min(i + S::N);
                    if r.len() == S::N {
                        let (x, y) = (s.load(&a[r.clone()]), s.load(&b[r.clone()]));
                        let (c, d) = (s.load(&cos[r.clone()]), s.load(&sin[r.clone()]));
                        s.store(s.fnma(y, d, s.mul(x, c)), &mut a[r.clone()]);
                        s.store(s.fma(x, d, s.mul(y, c)), &mut b[r]);
                    } else {
                        let (x, y) = (s.load_part(&a[r.clone()], 0.0), s.load_part(&b[r.clone()], 0.0));
                        let (c, d) = (s.load_part(&cos[r.clone()], 0.0), s.load_part(&sin[r.clone()], 0.0));
                        s.store_part(s.fnma(y, d, s.mul(x, c)), &mut a[r.clone()]);
                        s.store_part(s.fma(x, d, s.mul(y, c)), &mut b[r]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
