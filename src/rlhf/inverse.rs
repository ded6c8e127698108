//! [`Inverse`]: where the inverse P of the accumulated curvature lives, and what is done with it.

use std::ops::{Mul, Sub};

use super::vector::rows;
use crate::error::{Result, ensure};

/// A symmetric matrix P = H⁻¹, `[d, d]` row-major, that only ever shrinks by squares and is scaled.
///
/// An implementation keeps P symmetric to the bit: it subtracts products v_i v_j, which commute, and never (c u_i) u_j, whose two
/// orders round apart and whose errors feed on themselves.
pub trait Inverse: Send {
    /// d.
    fn width(&self) -> usize;

    /// What P occupies.
    fn bytes(&self) -> usize;

    /// `y[b, d] = X P` for the b = x.len() / d rows of x.
    ///
    /// # Errors
    /// `Shape`: x is not whole rows, or y not as long. What the device says.
    fn times(&self, x: &[f64], y: &mut [f64]) -> Result<()>;

    /// P = scale (P - VᵀV) for the rows of `v[b, d]`; none only scales.
    ///
    /// # Errors
    /// `Shape`: v is not whole rows. What the device says.
    fn subtract(&mut self, v: &[f64], scale: f64) -> Result<()>;

    /// P, widened to f64.
    ///
    /// # Errors
    /// What the device says.
    fn read(&self) -> Result<Vec<f64>>;

    /// Sets P, rounded to the precision in which it is kept.
    ///
    /// # Errors
    /// `Shape`: not `[d, d]`. What the device says.
    fn write(&mut self, p: &[f64]) -> Result<()>;
}

/// A precision in which [`Host`] keeps P: f32 or f64.
pub trait Real: Copy + Default + Send + Into<f64> + Sub<Output = Self> + Mul<Output = Self> + 'static {
    /// The nearest value.
    fn nearest(x: f64) -> Self;
}

impl Real for f32 {
    fn nearest(x: f64) -> Self {
        x as f32
    }
}

impl Real for f64 {
    fn nearest(x: f64) -> Self {
        x
    }
}

/// P in this process's memory. Sums are in f64 whatever T is, in an order that depends on d alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Host<T> {
    width: usize,
    p: Vec<T>,
}

impl<T: Real> Host<T> {
    /// P = 0 of `width` rows and columns.
    pub fn new(width: usize) -> Self {
        Self { width, p: vec![T::default(); width * width] }
    }
}

impl<T: Real> Inverse for Host<T> {
    fn width(&self) -> usize {
        self.width
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.p[..])
    }

    fn times(&self, x: &[f64], y: &mut [f64]) -> Result<()> {
        let d = self.width;
        rows("a product with P", x, d)?;
        ensure!(y.len() == x.len(), Shape, "a product with P: {} numbers for {}", y.len(), x.len());
        // Some rows of x stay in a near cache while all of P passes by.
        for (x, y) in x.chunks(16 * d).zip(y.chunks_mut(16 * d)) {
            for (i, row) in self.p.chunks_exact(d).enumerate() {
                x.chunks_exact(d).zip(y.chunks_exact_mut(d)).for_each(|(x, y)| y[i] = dot(row, x));
            }
        }
        Ok(())
    }

    fn subtract(&mut self, v: &[f64], scale: f64) -> Result<()> {
        rows("what P loses", v, self.width)?;
        let v: Vec<T> = v.iter().map(|&v| T::nearest(v)).collect();
        for v in v.chunks_exact(self.width) {
            for (row, &a) in self.p.chunks_exact_mut(self.width).zip(v) {
                row.iter_mut().zip(v).for_each(|(p, &b)| *p = *p - a * b);
            }
        }
        if scale != 1.0 {
            let scale = T::nearest(scale);
            self.p.iter_mut().for_each(|p| *p = *p * scale);
        }
        Ok(())
    }

    fn read(&self) -> Result<Vec<f64>> {
        Ok(self.p.iter().map(|&p| p.into()).collect())
    }

    fn write(&mut self, p: &[f64]) -> Result<()> {
        let n = self.p.len();
        ensure!(p.len() == n, Shape, "P has {n} numbers, not {}", p.len());
        self.p.iter_mut().zip(p).for_each(|(to, &from)| *to = T::nearest(from));
        Ok(())
    }
}

/// Eight sums side by side, so that none waits for another.
fn dot<T: Real>(p: &[T], x: &[f64]) -> f64 {
    let (ps, xs) = (p.chunks_exact(8), x.chunks_exact(8));
    let rest: f64 = ps.remainder().iter().zip(xs.remainder()).map(|(&p, x)| p.into() * x).sum();
    let mut sums = [0.0; 8];
    for (p, x) in ps.zip(xs) {
        for (sum, (&p, x)) in sums.iter_mut().zip(p.iter().zip(x)) {
            *sum += p.into() * x;
        }
    }
    sums.iter().sum::<f64>() + rest
}
