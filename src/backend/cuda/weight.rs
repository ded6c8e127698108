//! Matrices on the device.

use std::sync::Arc;

use half::bf16;

use super::device::Stream;
use super::memory::CudaBuf;
use super::pack::{self, Planes, Words};
use crate::backend::{Buffer, WeightInfo};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::HostTensor;

/// A matrix `[rows, cols]`.
pub struct CudaWeight {
    pub(super) form: Form,
    rows: usize,
    cols: usize,
    bytes: usize,
}

/// How a matrix lies in memory.
pub(super) enum Form {
    /// Row-major.
    Bf16(CudaBuf<bf16>),
    /// Row-major, elements of 2 (f16) or 4 (f32) bytes.
    Plain(CudaBuf<u8>, usize),
    /// Planes of small integers and of their scales.
    Blocks(DType, Words, Box<Planes<CudaBuf<u32>>>),
}

impl CudaWeight {
    /// Brings `t` to the device. Formats without kernels of their own (Q5_0, Q5_1, Q5_K) are widened to f32.
    pub(super) fn new(stream: &Arc<Stream>, t: HostTensor) -> Result<Self> {
        let (rows, cols) = (t.rows, t.cols);
        let form = match (t.dtype, pack::words(t.dtype)) {
            (dtype, Some(words)) => {
                let p = pack::pack(dtype, rows, cols, &t.data, words);
                let of = |plane: Vec<u32>| CudaBuf::of(stream, &plane);
                let planes =
                    Planes { quants: of(p.quants)?, high: of(p.high)?, scales: of(p.scales)?, supers: of(p.supers)? };
                Form::Blocks(dtype, words, Box::new(planes))
            }
            (DType::BF16, _) => Form::Bf16(CudaBuf::of(stream, &bytemuck::pod_collect_to_vec::<u8, bf16>(&t.data))?),
            (DType::F16, _) => Form::Plain(CudaBuf::of(stream, &t.data)?, 2),
            (DType::F32, _) => Form::Plain(CudaBuf::of(stream, &t.data)?, 4),
            _ => Form::Plain(CudaBuf::of(stream, bytemuck::cast_slice(&t.to_f32()))?, 4),
        };
        t.data.release();
        let bytes = match &form {
            Form::Bf16(b) => b.len() * 2,
            Form::Plain(b, _) => b.len(),
            Form::Blocks(_, _, p) => {
                [&p.quants, &p.high, &p.scales, &p.supers].map(Buffer::len).iter().sum::<usize>() * 4
            }
        };
        Ok(Self { form, rows, cols, bytes })
    }

    /// A matrix of zeros in bf16.
    pub(super) fn trainable(stream: &Arc<Stream>, rows: usize, cols: usize) -> Result<Self> {
        let form = Form::Bf16(CudaBuf::zeros(stream, rows * cols)?);
        Ok(Self { form, rows, cols, bytes: 2 * rows * cols })
    }
}

impl WeightInfo for CudaWeight {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn bytes(&self) -> usize {
        self.bytes
    }
}
