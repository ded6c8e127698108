//! Backward of products with weights.

use half::bf16;

use super::super::kernels::{self as k, Kernel};
use super::super::memory::{Dst, Src};
use super::super::ops::{THREADS, rows_of};
use super::super::weight::{CudaWeight, Form};
use super::super::{Args, Cuda, args};
use super::add;
use crate::backend::sampling::width;
use crate::backend::{Buffer, WeightInfo, Write};
use crate::dtype::DType;
use crate::error::Result;

impl Cuda {
    /// By the tile of 64 or of 128 rows and columns of the result; the bits are the same.
    fn tiled<A: Args>(&self, kernels: [Kernel<A>; 2], args: A, rows: usize, cols: usize) -> Result<()> {
        let grid = |tile: usize| [rows.div_ceil(tile), cols.div_ceil(tile), 1];
        // The wide tile does most work for what it reads, but must not leave multiprocessors idle.
        let [x, y, _] = grid(128);
        let wide = usize::from(x * y >= self.stream.multiprocessors());
        self.launch(kernels[wide], args, grid([64, 128][wide]), THREADS, 0)
    }

    pub(super) fn run_linear_bwd_x(
        &self,
        dx: Dst<'_, f32>,
        dy: Src<'_, f32>,
        w: &CudaWeight,
        write: Write,
    ) -> Result<()> {
        let (outputs, inputs) = (w.rows(), w.cols());
        let rows = rows_of("linear_bwd_x", dy.len(), outputs)?;
        if rows == 0 {
            return Ok(());
        }
        let (r, i, o) = (rows as u32, inputs as u32, outputs as u32);
        let (kernels, bytes, size) = match &w.form {
            Form::Blocks(dtype, words, p) => {
                let kernels = match dtype {
                    DType::Q8_0 => [k::LINEAR_BWD_X_Q8_0_64, k::LINEAR_BWD_X_Q8_0_128],
                    DType::Q4_0 => [k::LINEAR_BWD_X_Q4_0_64, k::LINEAR_BWD_X_Q4_0_128],
                    DType::Q4_1 => [k::LINEAR_BWD_X_Q4_1_64, k::LINEAR_BWD_X_Q4_1_128],
                    DType::Q4_K => [k::LINEAR_BWD_X_Q4_K_64, k::LINEAR_BWD_X_Q4_K_128],
                    _ => [k::LINEAR_BWD_X_Q6_K_64, k::LINEAR_BWD_X_Q6_K_128],
                };
                let [q, h, s, u] = [words.quants, words.high, words.scales, words.supers].map(|n| n as u32);
                let (quants, high, scales, supers) = (p.quants.all(), p.high.all(), p.scales.all(), p.supers.all());
                let args =
                    args::LinearBwdXBlocks::new(dx, dy, quants, high, scales, supers, r, i, o, q, h, s, u, add(write))?;
                return self.tiled(kernels, args, rows, inputs);
            }
            Form::Bf16(b) => {
                ([k::LINEAR_BWD_X_BF16_64, k::LINEAR_BWD_X_BF16_128], Src::at(b.address(), 2 * b.len()), 2)
            }
            Form::Plain(b, 2) => ([k::LINEAR_BWD_X_F16_64, k::LINEAR_BWD_X_F16_128], b.all(), 2),
            Form::Plain(b, size) => ([k::LINEAR_BWD_X_F32_64, k::LINEAR_BWD_X_F32_128], b.all(), *size),
        };
        let args = args::LinearBwdX::new(dx, dy, bytes, r, i, o, size as u32, add(write))?;
        self.tiled(kernels, args, rows, inputs)
    }

    pub(super) fn run_linear_bwd_w(
        &self,
        dw: Dst<'_, f32>,
        dy: Src<'_, f32>,
        x: Src<'_, bf16>,
        rows: usize,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let (outputs, inputs) = (width("linear_bwd_w", dy.len(), rows)?, width("linear_bwd_w", x.len(), rows)?);
        let args = args::LinearBwdW::new(dw, dy, x, rows as u32, inputs as u32, outputs as u32)?;
        self.tiled([k::LINEAR_BWD_W_64, k::LINEAR_BWD_W_128], args, outputs, inputs)
    }
}
