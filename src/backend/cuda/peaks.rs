//! The device's roofs, measured: what benchmarks stand beside.

use std::time::Instant;

use super::memory::CudaBuf;
use super::{Cuda, args, kernels};
use crate::backend::Buffer;
use crate::error::Result;

/// Roofs of a GPU.
#[derive(Clone, Copy, Debug)]
pub struct CudaPeaks {
    /// Bytes read and written by a copy within the device, per second.
    pub memory: f64,
    /// Operations per second of bf16 products on tensor cores (mma.sync).
    pub bf16: f64,
}

impl Cuda {
    /// Measures the roofs, in less than a second.
    ///
    /// # Errors
    /// `Capacity` where the device has no room for a gigabyte.
    pub fn roofs(&self) -> Result<CudaPeaks> {
        // On an emulated device the figures mean nothing, and must not take minutes.
        if cfg!(feature = "emu") { self.peaks(1 << 20, 4) } else { self.peaks(1 << 29, 1 << 12) }
    }

    /// Measures the roofs with copies of `bytes` bytes and products of `steps` steps.
    ///
    /// # Errors
    /// `Capacity` where the device has no room for two buffers of `bytes`.
    pub fn peaks(&self, bytes: usize, steps: u32) -> Result<CudaPeaks> {
        let source = CudaBuf::<u8>::zeros(&self.stream, bytes)?;
        let mut target = CudaBuf::<u8>::zeros(&self.stream, bytes)?;
        let copy = self.best(|| self.stream.copy(target.head_mut(bytes), source.all()))?;
        let blocks = self.stream.multiprocessors() * 8;
        let mut y = CudaBuf::<f32>::zeros(&self.stream, blocks * 256)?;
        let products = self.best(|| {
            let args = args::MmaPeak::new(y.all_mut(), blocks as u32, steps)?;
            self.launch(kernels::MMA_PEAK, args, [blocks, 1, 1], 256, 0)
        })?;
        let flops = (blocks * 8 * 8) as f64 * f64::from(steps) * (2 * 16 * 8 * 16) as f64;
        Ok(CudaPeaks { memory: 2.0 * bytes as f64 / copy, bf16: flops / products })
    }

    /// Seconds of one run, of the fastest of several rows of runs.
    fn best(&self, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
        const RUNS: u32 = 4;
        let mut best = f64::INFINITY;
        for _ in 0..6 {
            self.synchronize()?;
            let start = Instant::now();
            for _ in 0..RUNS {
                run()?;
            }
            self.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64() / f64::from(RUNS));
        }
        Ok(best)
    }
}
