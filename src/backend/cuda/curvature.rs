//! [`Curvature`] on a GPU.

use std::ops::Range;

use super::device::Slot;
use super::memory::{Dst, Src};
use super::ops::THREADS;
use super::{Cuda, args, kernels as k};
use crate::backend::Curvature;
use crate::backend::curvature::{check_mean, check_mul, check_outer};
use crate::dtype::Float;
use crate::error::Result;

/// Rows of a block of `subtract_outer`.
const ROWS: usize = 16;

/// A view of what is known to be of this type.
fn src<T, U>(x: Src<'_, T>) -> Src<'_, U> {
    Src::at(x.address(), x.len())
}

fn dst<'a, T, U>(x: &Dst<'a, T>) -> Dst<'a, U> {
    Dst::at(x.address(), x.len())
}

impl Curvature for Cuda {
    fn mul_rows<T: Float>(&self, y: Dst<'_, T>, a: Src<'_, T>, x: Src<'_, T>, n: usize) -> Result<()> {
        let (b, m) = check_mul(y.len(), a.len(), x.len(), n)?;
        if b * m == 0 {
            return Ok(());
        }
        let (grid, [rows, outputs, inputs]) = ([m.div_ceil(8), 1, 1], [b, m, n].map(|x| x as u32));
        if T::DOUBLE {
            let args = args::MulRowsF64::new(dst(&y), src(a), src(x), rows, outputs, inputs)?;
            self.launch(k::MUL_ROWS_F64, args, grid, THREADS, 0)
        } else {
            let args = args::MulRowsF32::new(dst(&y), src(a), src(x), rows, outputs, inputs)?;
            self.launch(k::MUL_ROWS_F32, args, grid, THREADS, 0)
        }
    }

    fn subtract_outer<T: Float>(&self, a: Dst<'_, T>, v: Src<'_, T>, n: usize, scale: f64) -> Result<()> {
        let b = check_outer(a.len(), v.len(), n)?;
        let (grid, rows, width) = ([n.div_ceil(THREADS), n.div_ceil(ROWS), 1], b as u32, n as u32);
        if T::DOUBLE {
            let args = args::SubtractOuterF64::new(dst(&a), src(v), scale, rows, width)?;
            self.launch(k::SUBTRACT_OUTER_F64, args, grid, THREADS, 0)
        } else {
            let args = args::SubtractOuterF32::new(dst(&a), src(v), scale, rows, width)?;
            self.launch(k::SUBTRACT_OUTER_F32, args, grid, THREADS, 0)
        }
    }

    fn mean_rows(&self, y: Dst<'_, f32>, x: Src<'_, f32>, ranges: &[Range<usize>], d: usize) -> Result<()> {
        check_mean(y.len(), x.len(), ranges, d)?;
        if ranges.is_empty() {
            return Ok(());
        }
        let bounds: Vec<u32> = ranges.iter().flat_map(|r| [r.start as u32, r.end as u32]).collect();
        let mut small = self.small();
        let table = small.put(&self.stream, Slot::Ranges, &bounds)?;
        let (count, rows) = (ranges.len(), x.len() / d);
        self.rows_launch(k::MEAN_ROWS, args::MeanRows::new(y, x, table, count as u32, rows as u32, d as u32)?, count)
    }
}
