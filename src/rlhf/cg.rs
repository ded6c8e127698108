//! Conjugate gradients, and the defect of the released code, kept to be compared with.

use super::vector::{axpy, dot};
use crate::error::{Result, ensure};

/// Solves A x = b for a symmetric positive definite A, from x = 0 (Hestenes & Stiefel 1952); `times` writes A p. Ends after `steps`
/// steps, or where the residual is below `tolerance` of ‖b‖. Gives x and ‖b - Ax‖ / ‖b‖ after each step, as the recursion has it.
///
/// # Errors
/// `Diverged`: A is not positive definite along a direction. What `times` says.
pub fn conjugate_gradients(
    times: impl FnMut(&[f64], &mut [f64]) -> Result<()>,
    b: &[f64],
    steps: usize,
    tolerance: f64,
) -> Result<(Vec<f64>, Vec<f64>)> {
    descend(times, b, steps, tolerance, |new, old| new / old)
}

/// The same as the paper's released code has it: the coefficient of the old direction is new / new = 1, so directions are not
/// conjugate and the residual need not fall. For comparison only.
///
/// # Errors
/// Those of [`conjugate_gradients`].
pub fn released_gradients(
    times: impl FnMut(&[f64], &mut [f64]) -> Result<()>,
    b: &[f64],
    steps: usize,
    tolerance: f64,
) -> Result<(Vec<f64>, Vec<f64>)> {
    descend(times, b, steps, tolerance, |_, _| 1.0)
}

fn descend(
    mut times: impl FnMut(&[f64], &mut [f64]) -> Result<()>,
    b: &[f64],
    steps: usize,
    tolerance: f64,
    keep: impl Fn(f64, f64) -> f64,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let size = dot(b, b);
    let (mut x, mut r, mut p) = (vec![0.0; b.len()], b.to_vec(), b.to_vec());
    let (mut ap, mut old, mut residuals) = (vec![0.0; b.len()], size, Vec::new());
    while residuals.len() < steps && old > tolerance * tolerance * size {
        times(&p, &mut ap)?;
        let curvature = dot(&p, &ap);
        ensure!(curvature > 0.0 && curvature.is_finite(), Diverged, "conjugate gradients: pᵀAp = {curvature}");
        let alpha = old / curvature;
        axpy(alpha, &p, &mut x);
        axpy(-alpha, &ap, &mut r);
        let new = dot(&r, &r);
        let beta = keep(new, old);
        p.iter_mut().zip(&r).for_each(|(p, r)| *p = r + beta * *p);
        residuals.push((new / size).sqrt());
        old = new;
    }
    Ok((x, residuals))
}
