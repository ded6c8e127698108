//! Sections 5.3 and 7.6: how far the inverse drifts, in both precisions.

use nalgebra::DMatrix;
use quadriga::rlhf::*;

use super::worlds::{Stream, dot, norm};

/// Updates of P as a learner makes them, with features whose scales spread over three orders of magnitude. `times` and `subtract` are
/// of a P that began as I/λ; `subtract` takes u and c of P - c u uᵀ. Gives H.
fn drift(d: usize, rounds: usize, lambda: f64, mut update: impl FnMut(&[f64], f64)) -> DMatrix<f64> {
    let mut s = Stream::new(11);
    let scales: Vec<f64> = (0..d).map(|i| 10f64.powf(-3.0 * i as f64 / (d - 1) as f64)).collect();
    let mut h = vec![0.0; d * d];
    h.iter_mut().step_by(d + 1).for_each(|h| *h = lambda);
    for _ in 0..rounds {
        let mut z: Vec<f64> = scales.iter().map(|scale| scale * s.normal()).collect();
        let length = norm(&z);
        z.iter_mut().for_each(|z| *z /= length);
        let w = 0.05 + 0.2 * s.uniform();
        for (row, a) in h.chunks_exact_mut(d).zip(&z) {
            row.iter_mut().zip(&z).for_each(|(h, b)| *h += w * a * b);
        }
        update(&z, w);
    }
    DMatrix::from_row_slice(d, d, &h)
}

fn identity(d: usize, lambda: f64) -> Vec<f64> {
    (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 / lambda } else { 0.0 }).collect()
}

/// max |PH - I| and the largest relative error of zᵀPz among unit vectors along coordinates, after updates by squares.
fn by_squares<T: Real>(d: usize, rounds: usize, lambda: f64) -> (f64, f64) {
    let mut inverse = Host::<T>::new(d);
    inverse.write(&identity(d, lambda)).unwrap();
    let mut u = vec![0.0; d];
    let h = drift(d, rounds, lambda, |z, w| {
        inverse.times(z, &mut u).unwrap();
        let root = (w / (1.0 + w * dot(z, &u))).sqrt();
        u.iter_mut().for_each(|u| *u *= root);
        inverse.subtract(&u, 1.0).unwrap();
    });
    let p = DMatrix::from_row_slice(d, d, &inverse.read().unwrap());
    assert!((0..d).all(|i| (0..i).all(|j| p[(i, j)].to_bits() == p[(j, i)].to_bits())), "P is not symmetric");
    let direct = h.clone().cholesky().unwrap().inverse();
    let variance = (0..d).map(|i| (p[(i, i)] / direct[(i, i)] - 1.0).abs()).fold(0.0, f64::max);
    ((p * h - DMatrix::identity(d, d)).amax(), variance)
}

/// The form that rounds its two triangles apart, in f32.
fn naively(d: usize, rounds: usize, lambda: f64) -> (f64, f64) {
    let mut p: Vec<f32> = identity(d, lambda).iter().map(|&x| x as f32).collect();
    let h = drift(d, rounds, lambda, |z, w| {
        let u: Vec<f32> = p
            .chunks_exact(d)
            .map(|row| row.iter().zip(z).map(|(&p, z)| f64::from(p) * z).sum::<f64>() as f32)
            .collect();
        let q: f64 = u.iter().zip(z).map(|(&u, z)| f64::from(u) * z).sum();
        let c = (w / (1.0 + w * q)) as f32;
        for (row, a) in p.chunks_exact_mut(d).zip(&u) {
            row.iter_mut().zip(&u).for_each(|(p, b)| *p -= (c * a) * b);
        }
    });
    let wide: Vec<f64> = p.iter().map(|&x| f64::from(x)).collect();
    let p = DMatrix::from_row_slice(d, d, &wide);
    ((&p * h - DMatrix::identity(d, d)).amax(), (&p - p.transpose()).amax())
}

#[test]
fn the_inverse_stays_an_inverse() {
    let (benign, _) = by_squares::<f64>(64, 20_000, 1.0);
    let (hard, variance) = by_squares::<f64>(64, 20_000, 1e-3);
    println!("f64: {benign:.1e} at lambda 1, {hard:.1e} and {variance:.1e} in variance at 1e-3");
    assert!(benign < 1e-12 && hard < 1e-10 && variance < 1e-11);
    let (benign, _) = by_squares::<f32>(64, 20_000, 1.0);
    let (hard, variance) = by_squares::<f32>(64, 20_000, 1e-3);
    let (naive, asymmetry) = naively(64, 20_000, 1e-3);
    println!("f32: {benign:.1e}, {hard:.1e} and {variance:.1e}; naive {naive:.1e}, asymmetric by {asymmetry:.1e}");
    assert!(benign < 1e-3 && hard < 1e-3 && variance < 1e-3);
    assert!(asymmetry > 0.0 && naive > 100.0 * hard);
}

#[test]
fn single_precision_follows_double() {
    let mut s = Stream::new(13);
    let settings = Settings { lambda: 0.1, ..Settings::default() };
    let mut double = OnePass::new(24, settings.clone()).unwrap();
    let mut single = OnePass::with(Box::new(Host::<f32>::new(24)), settings).unwrap();
    assert_eq!(double.bytes() - single.bytes(), 4 * 24 * 24);
    for _ in 0..3000 {
        let (z, y) = (s.normals(24), f64::from(u8::from(s.uniform() < 0.5)));
        let (a, b) = (double.update(&z, y).unwrap(), single.update(&z, y).unwrap());
        assert!((a.uncertainty / b.uncertainty - 1.0).abs() < 1e-3);
    }
    let apart = super::worlds::distance(double.theta(), single.theta());
    assert!(apart < 1e-4 * norm(double.theta()), "{apart}");
    assert!((double.log_det() / single.log_det() - 1.0).abs() < 1e-5);
}
