//! What rows of numbers need everywhere here.

use crate::error::{Result, bail, ensure};

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(super) fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// y += a x.
pub(super) fn axpy(a: f64, x: &[f64], y: &mut [f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// The first index of the largest value; 0 of none.
pub(super) fn argmax(values: &[f64]) -> usize {
    (1..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// The number of rows of `width` in `x`, all of whose values are finite.
///
/// # Errors
/// `Shape`: a row that is not whole. `Diverged`: a value that is not finite, by its place.
pub(super) fn rows(what: &str, x: &[f64], width: usize) -> Result<usize> {
    ensure!(width > 0 && x.len().is_multiple_of(width), Shape, "{what}: {} numbers are no rows of {width}", x.len());
    if let Some(i) = x.iter().position(|x| !x.is_finite()) {
        bail!(Diverged, "{what}: number {} of row {} is {}", i % width, i / width, x[i]);
    }
    Ok(x.len() / width)
}

/// Refuses labels outside \[0, 1\].
pub(super) fn labels(y: &[f64]) -> Result<()> {
    match y.iter().find(|y| !(0.0..=1.0).contains(*y)) {
        Some(y) => bail!(Usage, "a label of {y}: 1 is the first answer, 0 the second, 0.5 a tie"),
        None => Ok(()),
    }
}
