//! The two inner loops of attention, over the blocked cache of one layer (see [`super::super::kv`]).
//!
//! A tile is up to [`TILE`] query heads that read one key and value head. Every score is one chain of multiply-adds over
//! the head's columns in order, every output one chain over the keys in order; how many queries, keys or columns are
//! computed side by side changes neither.

use std::ops::Range;

use super::{Element, Simd};

/// Rows of a cache block.
pub const BLOCK: usize = 16;
/// Queries of a tile: with two vectors of keys (or columns) it fills the sixteen registers of AVX2.
pub const TILE: usize = 6;

/// Keys and values of one head in one layer of a cache.
#[derive(Clone, Copy)]
pub struct Panel<'a, E> {
    data: &'a [E],
    kv_dim: usize,
    column: usize,
    head_dim: usize,
}

impl<'a, E: Element> Panel<'a, E> {
    /// Head `head` of `head_dim` columns in a layer's blocks, behind which at least [`BLOCK`] more elements can be read.
    pub fn new(data: &'a [E], kv_dim: usize, head: usize, head_dim: usize) -> Self {
        assert!((head + 1) * head_dim <= kv_dim, "head {head} of {head_dim} columns outside of {kv_dim}");
        Self { data, kv_dim, column: head * head_dim, head_dim }
    }

    /// Columns of the head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn block_len(&self) -> usize {
        2 * BLOCK * self.kv_dim
    }

    /// Where the head's keys of block 0 begin, having checked that all blocks below `end` are there.
    #[inline(always)]
    fn keys(&self, end: usize) -> *const E {
        assert!(end * self.block_len() <= self.data.len(), "block outside the cache");
        self.data[self.column * BLOCK..].as_ptr()
    }

    /// Where the head's values of row 0 begin, having checked that all rows below `end` are there, and what a vector may
    /// read behind the last column.
    #[inline(always)]
    fn values(&self, end: usize) -> *const E {
        assert!(end.div_ceil(BLOCK) * self.block_len() + BLOCK <= self.data.len(), "row outside the cache");
        self.data[self.kv_dim * BLOCK + self.column..].as_ptr()
    }
}

macro_rules! by_queries {
    ($m:expr, $f:ident, $($arg:expr),*) => {
        match $m {
            1 => $f::<S, E, 1>($($arg),*),
            2 => $f::<S, E, 2>($($arg),*),
            3 => $f::<S, E, 3>($($arg),*),
            4 => $f::<S, E, 4>($($arg),*),
            5 => $f::<S, E, 5>($($arg),*),
            _ => $f::<S, E, TILE>($($arg),*),
        }
    };
}

/// `out[i * stride + j] = q[i].k[j]` for the `m` (at most [`TILE`]) queries of a tile and the keys j of `blocks`, counted from
/// their first. `q` is `[head_dim, m]`.
#[inline(always)]
pub fn scores<S: Simd, E: Element>(
    s: S,
    panel: Panel<'_, E>,
    blocks: Range<usize>,
    q: &[f32],
    m: usize,
    out: &mut [f32],
    stride: usize,
) {
    assert!((1..=TILE).contains(&m) && q.len() >= m * panel.head_dim);
    assert!(blocks.is_empty() || (m - 1) * stride + blocks.len() * BLOCK <= out.len());
    let keys = panel.keys(blocks.end);
    // SAFETY: the blocks, the queries and the places of the results are there, by the three checks.
    unsafe { by_queries!(m, score_rows, s, panel, keys, blocks, q.as_ptr(), out.as_mut_ptr(), stride) }
}

/// # Safety
/// As checked in [`scores`].
#[inline(always)]
unsafe fn score_rows<S: Simd, E: Element, const M: usize>(
    s: S,
    panel: Panel<'_, E>,
    keys: *const E,
    blocks: Range<usize>,
    q: *const f32,
    out: *mut f32,
    stride: usize,
) {
    let (len, dim) = (panel.block_len(), panel.head_dim);
    let mut b = blocks.start;
    // As many key vectors at a time as registers hold, so that few queries still have enough chains in flight.
    macro_rules! step {
        ($vectors:literal) => {
            let n = $vectors * S::N / BLOCK;
            while n > 0 && b + n <= blocks.end {
                // SAFETY: blocks b..b+n are there and so is the place of their results.
                unsafe {
                    let at = out.add((b - blocks.start) * BLOCK);
                    score_tile::<S, E, M, $vectors>(s, keys.add(b * len), len, dim, q, at, stride);
                }
                b += n;
            }
        };
    }
    if S::N == 16 {
        step!(4);
        step!(1);
    } else {
        if M == 1 {
            step!(8);
        }
        if M <= 3 {
            step!(4);
        }
        step!(2);
    }
}

/// # Safety
/// V vectors of keys from `keys` on, M queries at `q` and the places of the results can be accessed.
#[inline(always)]
unsafe fn score_tile<S: Simd, E: Element, const M: usize, const V: usize>(
    s: S,
    keys: *const E,
    block_len: usize,
    dim: usize,
    q: *const f32,
    out: *mut f32,
    stride: usize,
) {
    let mut acc = [[s.splat(0.0); V]; M];
    for d in 0..dim {
        let mut k = [s.splat(0.0); V];
        for (i, k) in k.iter_mut().enumerate() {
            let (block, lane) = (i * S::N / BLOCK, i * S::N % BLOCK);
            // SAFETY: column d of the block's keys, by this function's contract.
            *k = unsafe { E::load(s, keys.add(block * block_len + d * BLOCK + lane)) };
        }
        for (m, acc) in acc.iter_mut().enumerate() {
            // SAFETY: q is [dim, M].
            let x = s.splat(unsafe { *q.add(d * M + m) });
            for (acc, &k) in acc.iter_mut().zip(&k) {
                *acc = s.fma(x, k, *acc);
            }
        }
    }
    for (m, acc) in acc.iter().enumerate() {
        for (i, &acc) in acc.iter().enumerate() {
            // SAFETY: by this function's contract.
            unsafe { s.store_f32(acc, out.add(m * stride + i * S::N)) };
        }
    }
}

/// `acc[i * width + c] += sum_j p[i * stride + j] v[rows.start + j, c]`, key after key, for the `m` (at most [`TILE`]) queries of
/// a tile and the columns c of `columns`, whose ends are multiples of [`BLOCK`]. Columns beyond the head's are padding,
/// to be ignored.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub fn weigh<S: Simd, E: Element>(
    s: S,
    panel: Panel<'_, E>,
    rows: Range<usize>,
    columns: Range<usize>,
    p: &[f32],
    stride: usize,
    m: usize,
    acc: &mut [f32],
    width: usize,
) {
    assert!((1..=TILE).contains(&m) && columns.end <= width && m * width <= acc.len());
    assert!(columns.start.is_multiple_of(BLOCK) && columns.end.is_multiple_of(BLOCK));
    assert!(columns.end < panel.head_dim + BLOCK && (m - 1) * stride + rows.len() <= p.len());
    let values = panel.values(rows.end);
    // SAFETY: rows, columns (with what vectors read beyond the head), weights and sums are there, by the four checks.
    unsafe { by_queries!(m, weigh_rows, s, panel, values, rows, columns, p.as_ptr(), stride, acc.as_mut_ptr(), width) }
}

/// # Safety
/// As checked in [`weigh`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn weigh_rows<S: Simd, E: Element, const M: usize>(
    s: S,
    panel: Panel<'_, E>,
    values: *const E,
    rows: Range<usize>,
    columns: Range<usize>,
    p: *const f32,
    stride: usize,
    acc: *mut f32,
    width: usize,
) {
    let mut c = columns.start;
    macro_rules! step {
        ($vectors:literal) => {
            while c + $vectors * S::N <= columns.end {
                // SAFETY: columns c..c + V * N of all rows and sums are there.
                unsafe {
                    let (values, acc) = (values.add(c), acc.add(c));
                    weigh_tile::<S, E, M, $vectors>(s, values, panel.kv_dim, rows.clone(), p, stride, acc, width);
                }
                c += $vectors * S::N;
            }
        };
    }
    if S::N == 16 {
        step!(4);
        step!(1);
    } else {
        if M == 1 {
            step!(8);
        }
        if M <= 3 {
            step!(4);
        }
        step!(2);
    }
}

/// # Safety
/// V vectors of columns of `rows` from `values` on, M weights for each row, and the sums can be accessed.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn weigh_tile<S: Simd, E: Element, const M: usize, const V: usize>(
    s: S,
    values: *const E,
    kv_dim: usize,
    rows: Range<usize>,
    p: *const f32,
    stride: usize,
    out: *mut f32,
    width: usize,
) {
    let mut acc = [[s.splat(0.0); V]; M];
    for (m, acc) in acc.iter_mut().enumerate() {
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: by this function's contract.
            *acc = unsafe { s.load_f32(out.add(m * width + i * S::N)) };
        }
    }
    let mut j = rows.start;
    while j < rows.end {
        let stop = rows.end.min((j / BLOCK + 1) * BLOCK);
        // SAFETY: row j is there.
        let mut row = unsafe { values.add((j / BLOCK * 2 * BLOCK + j % BLOCK) * kv_dim) };
        for j in j..stop {
            let mut v = [s.splat(0.0); V];
            for (i, v) in v.iter_mut().enumerate() {
                // SAFETY: as above.
                *v = unsafe { E::load(s, row.add(i * S::N)) };
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                // SAFETY: by this function's contract.
                let x = s.splat(unsafe { *p.add(m * stride + (j - rows.start)) });
                for (acc, &v) in acc.iter_mut().zip(&v) {
                    *acc = s.fma(x, v, *acc);
                }
            }
            // Wrapping, since it may end behind the last row, where it is not read.
            row = row.wrapping_add(kv_dim);
        }
        j = stop;
    }
    for (m, acc) in acc.iter().enumerate() {
        for (i, &acc) in acc.iter().enumerate() {
            // SAFETY: by this function's contract.
            unsafe { s.store_f32(acc, out.add(m * width + i * S::N)) };
        }
    }
}
