//! [`Curvature`]: what a one-pass reward does with the inverse of its curvature, and the pooling of its features.

use std::ops::Range;

use super::{Backend, In, Out};
use crate::dtype::Float;
use crate::error::Result;

/// Products with, and updates of, a large symmetric matrix in f32 or f64 (Li et al. 2025, arXiv:2502.07193; Sherman & Morrison 1950), and
/// means of rows. All are bound by memory. A result does not depend on the rows beside it.
pub trait Curvature: Backend {
    /// Y = X A^T: y is `[b, m]`, a `[m, n]`, x `[b, n]`. A is read once.
    ///
    /// # Errors
    /// Lengths that are no such matrices; the device's.
    fn mul_rows<T: Float>(&self, y: Out<'_, Self, T>, a: In<'_, Self, T>, x: In<'_, Self, T>, n: usize) -> Result<()>;

    /// A = scale (A - V^T V): a is `[n, n]`, v `[b, n]`. a\[i, j\] loses v\[k, i\] v\[k, j\] for k = 0, 1, ..: products that commute, so
    /// that a symmetric A stays symmetric to the bit.
    ///
    /// # Errors
    /// As [`Curvature::mul_rows`].
    fn subtract_outer<T: Float>(&self, a: Out<'_, Self, T>, v: In<'_, Self, T>, n: usize, scale: f64) -> Result<()>;

    /// y\[i\] = the mean of the rows `ranges[i]` of x, rows of width `d`.
    ///
    /// # Errors
    /// An empty range, or one beyond the rows; the device's.
    fn mean_rows(
        &self,
        y: Out<'_, Self, Self::Acc>,
        x: In<'_, Self, Self::Acc>,
        ranges: &[Range<usize>],
        d: usize,
    ) -> Result<()>;
}

/// Fails unless these are the lengths of y, a and x; b and m.
pub(super) fn check_mul(y: usize, a: usize, x: usize, n: usize) -> Result<(usize, usize)> {
    let whole = n > 0 && a.is_multiple_of(n) && x.is_multiple_of(n);
    crate::error::ensure!(whole && y == (x / n) * (a / n), Shape, "mul_rows: y {y}, a {a}, x {x} values, rows of {n}");
    Ok((x / n, a / n))
}

/// Fails unless these are the lengths of a and v; b.
pub(super) fn check_outer(a: usize, v: usize, n: usize) -> Result<usize> {
    let whole = n > 0 && a == n * n && v.is_multiple_of(n);
    crate::error::ensure!(whole, Shape, "subtract_outer: a {a}, v {v} values, rows of {n}");
    Ok(v / n)
}

/// Fails unless the ranges are of `x` values in rows of `d`, and `y` has a row for each.
pub(super) fn check_mean(y: usize, x: usize, ranges: &[Range<usize>], d: usize) -> Result<()> {
    let rows = if d > 0 && x.is_multiple_of(d) { x / d } else { 0 };
    crate::error::ensure!(y == ranges.len() * d, Shape, "mean_rows: {y} values for {} means of {d}", ranges.len());
    let bad = ranges.iter().find(|r| r.is_empty() || r.end > rows);
    crate::error::ensure!(bad.is_none(), Shape, "mean_rows: range {:?} of {rows} rows", bad.cloned().unwrap_or(0..0));
    Ok(())
}
