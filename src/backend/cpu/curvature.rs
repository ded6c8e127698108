//! [`Curvature`] on the CPU. Loops over arrays of lanes, compiled once per tier: the compiler makes vectors of them.

use std::ops::Range;

use super::Cpu;
use super::lanes::{Kernel, Simd, dispatch};
use crate::backend::Curvature;
use crate::backend::curvature::{check_mean, check_mul, check_outer};
use crate::dtype::Float;
use crate::error::Result;

/// Sums of a product that run abreast; their order is that of the columns, whatever the tier.
const LANES: usize = 32;
/// Bytes of the matrix in one task: enough to be worth handing out, few enough that threads end together.
const TASK: usize = 128 << 10;

/// Rows of a task.
fn rows_of_task<T>(n: usize) -> usize {
    (TASK / (n * size_of::<T>())).max(1)
}

impl Curvature for Cpu {
    fn mul_rows<T: Float>(&self, y: &mut [T], a: &[T], x: &[T], n: usize) -> Result<()> {
        let (b, m) = check_mul(y.len(), a.len(), x.len(), n)?;
        let rows = rows_of_task::<T>(n);
        let run = |y: &mut [T]| {
            self.pool().run_chunks(y, rows * b, |i, y| {
                let a = &a[i * rows * n..][..y.len() / b * n];
                dispatch(self.tier(), MulRows { y, a, x, n });
            });
        };
        match b {
            0 => {}
            1 => run(y),
            _ => {
                // A row of A meets all of X while it is in the cache; the results are turned afterwards.
                let mut turned = vec![T::default(); m * b];
                run(&mut turned);
                y.chunks_exact_mut(m.max(1)).enumerate().for_each(|(k, y)| {
                    y.iter_mut().zip(turned[k..].iter().step_by(b)).for_each(|(y, t)| *y = *t);
                });
            }
        }
        Ok(())
    }

    fn subtract_outer<T: Float>(&self, a: &mut [T], v: &[T], n: usize, scale: f64) -> Result<()> {
        check_outer(a.len(), v.len(), n)?;
        let rows = rows_of_task::<T>(n);
        self.pool().run_chunks(a, rows * n, |i, a| {
            dispatch(self.tier(), SubtractOuter { a, v, n, first: i * rows, scale });
        });
        Ok(())
    }

    fn mean_rows(&self, y: &mut [f32], x: &[f32], ranges: &[Range<usize>], d: usize) -> Result<()> {
        check_mean(y.len(), x.len(), ranges, d)?;
        self.pool().run_chunks(y, d, |i, y| {
            let r = &ranges[i];
            let mut sums = vec![0.0f64; d];
            for row in x[r.start * d..r.end * d].chunks_exact(d) {
                sums.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x));
            }
            y.iter_mut().zip(sums).for_each(|(y, s)| *y = (s / r.len() as f64) as f32);
        });
        Ok(())
    }
}

/// y\[row, k\] = a\[row\] . x\[k\].
struct MulRows<'a, T> {
    y: &'a mut [T],
    a: &'a [T],
    x: &'a [T],
    n: usize,
}

impl<T: Float> Kernel for MulRows<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let b = self.x.len() / self.n;
        for (y, a) in self.y.chunks_exact_mut(b).zip(self.a.chunks_exact(self.n)) {
            for (y, x) in y.iter_mut().zip(self.x.chunks_exact(self.n)) {
                *y = dot(a, x);
            }
        }
    }
}

#[inline(always)]
fn dot<T: Float>(a: &[T], x: &[T]) -> T {
    let mut sums = [T::default(); LANES];
    let (whole, tail) = a.as_chunks::<LANES>();
    let (others, rest) = x.as_chunks::<LANES>();
    for (a, x) in whole.iter().zip(others) {
        for l in 0..LANES {
            sums[l] = sums[l] + a[l] * x[l];
        }
    }
    for (l, (a, x)) in tail.iter().zip(rest).enumerate() {
        sums[l] = sums[l] + *a * *x;
    }
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            sums[l] = sums[l] + sums[l + half];
        }
        half /= 2;
    }
    sums[0]
}

struct SubtractOuter<'a, T> {
    a: &'a mut [T],
    v: &'a [T],
    n: usize,
    /// Number of the first row of `a`.
    first: usize,
    scale: f64,
}

impl<T: Float> Kernel for SubtractOuter<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (i, a) in (self.first..).zip(self.a.chunks_exact_mut(self.n)) {
            for v in self.v.chunks_exact(self.n) {
                let vi = v[i];
                a.iter_mut().zip(v).for_each(|(a, &vj)| *a = *a - vi * vj);
            }
            if self.scale != 1.0 {
                let scale = T::from_f64(self.scale);
                a.iter_mut().for_each(|a| *a = scale * *a);
            }
        }
    }
}
