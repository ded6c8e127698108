//! The specification of what encoders add: LayerNorm, GELU without tanh, LayerScale.

use super::train::put;
use crate::backend::Write;

/// Phi(x): by the series 1/2 + phi(x) sum_n x^(2n+1) / (2n+1)!! near 0, else by Laplace's continued fraction of the tail,
/// phi(z) / (z + 1 / (z + 2 / (z + ...))), so that no digits of a small tail are lost.
pub fn normal_cdf(x: f64) -> f64 {
    let z = x.abs();
    let tail = if z < 3.0 {
        let (mut term, mut sum, mut n) = (z, z, 1.0);
        while term > 1e-18 * sum {
            n += 2.0;
            term *= z * z / n;
            sum += term;
        }
        0.5 - normal_density(z) * sum
    } else {
        normal_density(z) / (1..200).rev().fold(z, |fraction, k| z + f64::from(k) / fraction)
    };
    if x > 0.0 { 1.0 - tail } else { tail }
}

fn normal_density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

pub(super) fn gelu(y: &mut [f64], x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = x * normal_cdf(x));
}

pub(super) fn gelu_bwd(dx: &mut [f64], dy: &[f64], x: &[f64]) {
    for ((dx, dy), &x) in dx.iter_mut().zip(dy).zip(x) {
        *dx = dy * (normal_cdf(x) + x * normal_density(x));
    }
}

/// (x - mean) s, and s.
fn normed(x: &[f64], eps: f32) -> (Vec<f64>, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / x.len() as f64;
    let s = 1.0 / (variance + f64::from(eps)).sqrt();
    (x.iter().map(|x| (x - mean) * s).collect(), s)
}

pub(super) fn layer_norm(y: &mut [f64], x: &[f64], w: &[f64], b: &[f64], eps: f32) {
    for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
        let (h, _) = normed(x, eps);
        (0..w.len()).for_each(|i| y[i] = w[i] * h[i] + b[i]);
    }
}

pub(super) fn layer_norm_bwd(
    dx: &mut [f64],
    mut dw: Option<&mut [f64]>,
    dy: &[f64],
    x: &[f64],
    w: &[f64],
    eps: f32,
    write: Write,
) {
    let d = w.len();
    for ((dx, dy), x) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)) {
        let (h, s) = normed(x, eps);
        let u: Vec<f64> = w.iter().zip(dy).map(|(w, dy)| w * dy).collect();
        let mean = u.iter().sum::<f64>() / d as f64;
        let along = u.iter().zip(&h).map(|(u, h)| u * h).sum::<f64>() / d as f64;
        for i in 0..d {
            put(write, &mut dx[i], s * (u[i] - mean - h[i] * along));
        }
        if let Some(dw) = &mut dw {
            (0..d).for_each(|i| dw[i] += dy[i] * h[i]);
        }
    }
}

pub(super) fn add_scaled(y: &mut [f64], x: &[f64], w: &[f64]) {
    for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
        (0..w.len()).for_each(|i| y[i] += w[i] * x[i]);
    }
}

pub(super) fn add_scaled_bwd(dx: &mut [f64], mut dw: Option<&mut [f64]>, dy: &[f64], x: &[f64], w: &[f64]) {
    let d = w.len();
    for ((dx, dy), x) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)) {
        for i in 0..d {
            dx[i] = w[i] * dy[i];
            if let Some(dw) = &mut dw {
                dw[i] += dy[i] * x[i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::normal_cdf;

    /// Values of mpmath 1.3.0's `ncdf`.
    #[test]
    fn the_distribution_function_is_right_to_the_last_bits() {
        let known = [
            (0.0, 0.5),
            (0.5, 0.691_462_461_274_013_1),
            (-1.0, 0.158_655_253_931_457_05),
            (2.5, 0.993_790_334_674_224),
            (-5.0, 2.866_515_718_791_939e-7),
            (-12.0, 1.776_482_112_077_679e-33),
        ];
        for (x, want) in known {
            let got = normal_cdf(x);
            assert!((got - want).abs() < 1e-14 * want, "{x}: {got}, not {want}");
        }
        assert_eq!([f64::INFINITY, f64::NEG_INFINITY, 10.0].map(normal_cdf), [1.0, 0.0, 1.0]);
        assert!(normal_cdf(f64::NAN).is_nan());
    }
}
