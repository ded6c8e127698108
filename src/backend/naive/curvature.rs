//! The specification of [`Curvature`].

use std::ops::Range;

use super::Naive;
use crate::backend::Curvature;
use crate::backend::curvature::{check_mean, check_mul, check_outer};
use crate::dtype::Float;
use crate::error::Result;

impl Curvature for Naive {
    fn mul_rows<T: Float>(&self, y: &mut [T], a: &[T], x: &[T], n: usize) -> Result<()> {
        let (_, m) = check_mul(y.len(), a.len(), x.len(), n)?;
        for (y, x) in y.chunks_exact_mut(m.max(1)).zip(x.chunks_exact(n)) {
            for (y, a) in y.iter_mut().zip(a.chunks_exact(n)) {
                *y = T::from_f64(a.iter().zip(x).map(|(a, x)| a.to_f64() * x.to_f64()).sum());
            }
        }
        Ok(())
    }

    fn subtract_outer<T: Float>(&self, a: &mut [T], v: &[T], n: usize, scale: f64) -> Result<()> {
        check_outer(a.len(), v.len(), n)?;
        for (i, row) in a.chunks_exact_mut(n).enumerate() {
            for (j, a) in row.iter_mut().enumerate() {
                let lost: f64 = v.chunks_exact(n).map(|v| v[i].to_f64() * v[j].to_f64()).sum();
                *a = T::from_f64(scale * (a.to_f64() - lost));
            }
        }
        Ok(())
    }

    fn mean_rows(&self, y: &mut [f64], x: &[f64], ranges: &[Range<usize>], d: usize) -> Result<()> {
        check_mean(y.len(), x.len(), ranges, d)?;
        for (y, r) in y.chunks_exact_mut(d.max(1)).zip(ranges) {
            for (i, y) in y.iter_mut().enumerate() {
                *y = r.clone().map(|row| x[row * d + i]).sum::<f64>() / r.len() as f64;
            }
        }
        Ok(())
    }
}
