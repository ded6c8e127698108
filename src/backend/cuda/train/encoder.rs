//! What encoders add: LayerNorm, GELU without tanh, LayerScale.

use half::bf16;

use super::add;
use crate::backend::cuda::device::{Slot, Small};
use crate::backend::cuda::memory::{CudaBuf, Dst, Src};
use crate::backend::cuda::ops::{THREADS, rows_of, spread};
use crate::backend::cuda::{Cuda, args, kernels as k};
use crate::backend::{Buffer, Write};
use crate::error::Result;

impl Cuda {
    pub(super) fn run_layer_norm(
        &self,
        y: Dst<'_, bf16>,
        x: Src<'_, f32>,
        w: &CudaBuf<f32>,
        b: &CudaBuf<f32>,
        eps: f32,
    ) -> Result<()> {
        let (d, rows) = (w.len(), rows_of("layer_norm", x.len(), w.len())?);
        if rows == 0 {
            return Ok(());
        }
        let args = args::LayerNorm::new(x, w.all(), b.all(), y, rows as u32, d as u32, eps)?;
        self.rows_launch(k::LAYER_NORM, args, rows)
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn run_layer_norm_bwd(
        &self,
        dx: Dst<'_, f32>,
        dw: Option<Dst<'_, f32>>,
        dy: Src<'_, f32>,
        x: Src<'_, f32>,
        w: &CudaBuf<f32>,
        eps: f32,
        write: Write,
    ) -> Result<()> {
        let (d, rows) = (w.len(), rows_of("layer_norm_bwd", x.len(), w.len())?);
        if rows == 0 {
            return Ok(());
        }
        let mut small = self.small();
        let stats = small.room::<f32>(&self.stream, Slot::Stats, 2 * rows)?;
        let at = stats.address();
        let args = args::LayerNormBwd::new(dx, stats, dy, x, w.all(), rows as u32, d as u32, eps, add(write))?;
        self.rows_launch(k::LAYER_NORM_BWD, args, rows)?;
        dw.map_or(Ok(()), |dw| self.column_dots(&mut small, dw, dy, x, Some(Src::at(at, 2 * rows))))
    }

    /// dw += the sums over rows of dy x, or of dy times what the statistics make of x.
    fn column_dots(
        &self,
        small: &mut Small,
        dw: Dst<'_, f32>,
        dy: Src<'_, f32>,
        x: Src<'_, f32>,
        stats: Option<Src<'_, f32>>,
    ) -> Result<()> {
        let (d, rows) = (dw.len(), rows_of("the gradient of a row's weights", x.len(), dw.len())?);
        let chunks = rows.div_ceil(64);
        let parts = small.room::<f32>(&self.stream, Slot::Parts, chunks * d)?;
        let (at, has) = (parts.address(), u32::from(stats.is_some()));
        let stats = stats.unwrap_or(Src::EMPTY);
        let args = args::ColumnDots::new(dy, x, stats, parts, rows as u32, d as u32, has)?;
        self.launch(k::COLUMN_DOTS, args, [d.div_ceil(THREADS), chunks, 1], THREADS, 0)?;
        self.fold(at, dw, chunks)
    }

    pub(super) fn run_gelu(&self, y: Dst<'_, bf16>, x: Src<'_, f32>) -> Result<()> {
        let n = x.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::GELU, args::Gelu::new(x, y, n as u32)?, spread(n), THREADS, 0)
    }

    pub(super) fn run_gelu_bwd(&self, dx: Dst<'_, f32>, dy: Src<'_, f32>, x: Src<'_, f32>) -> Result<()> {
        let n = x.len();
        if n == 0 {
            return Ok(());
        }
        self.launch(k::GELU_BWD, args::GeluBwd::new(dx, dy, x, n as u32)?, spread(n), THREADS, 0)
    }

    pub(super) fn run_add_scaled(&self, y: Dst<'_, f32>, x: Src<'_, f32>, w: &CudaBuf<f32>) -> Result<()> {
        let (d, rows) = (w.len(), rows_of("add_scaled", x.len(), w.len())?);
        if rows == 0 {
            return Ok(());
        }
        self.rows_launch(k::ADD_SCALED, args::AddScaled::new(y, x, w.all(), rows as u32, d as u32)?, rows)
    }

    pub(super) fn run_add_scaled_bwd(
        &self,
        dx: Dst<'_, f32>,
        dw: Option<Dst<'_, f32>>,
        dy: Src<'_, f32>,
        x: Src<'_, f32>,
        w: &CudaBuf<f32>,
    ) -> Result<()> {
        let (d, rows) = (w.len(), rows_of("add_scaled_bwd", x.len(), w.len())?);
        if rows == 0 {
            return Ok(());
        }
        self.rows_launch(k::SCALE_COLUMNS, args::ScaleColumns::new(dx, dy, w.all(), rows as u32, d as u32)?, rows)?;
        dw.map_or(Ok(()), |dw| self.column_dots(&mut self.small(), dw, dy, x, None))
    }
}
