//! Matrices on the device.

use std::sync::Arc;

use half::bf16;

use super::device::Stream;
use super::memory::CudaBuf;
use crate::backend::WeightInfo;
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
}

impl CudaWeight {
    pub(super) fn new(stream: &Arc<Stream>, t: HostTensor) -> Result<Self> {
        let (rows, cols) = (t.rows, t.cols);
        let form = match t.dtype {
            DType::BF16 => {
                let elements: Vec<bf16> = bytemuck::pod_collect_to_vec(&t.data[..]);
                Form::Bf16(CudaBuf::of(stream, &elements)?)
            }
            DType::F16 => Form::Plain(CudaBuf::of(stream, &t.data[..])?, 2),
            DType::F32 => Form::Plain(CudaBuf::of(stream, &t.data[..])?, 4),
            _ => Form::Plain(CudaBuf::of(stream, bytemuck::cast_slice(&t.to_f32()))?, 4),
        };
        t.data.release();
        let bytes = match &form {
            Form::Bf16(_) => rows * cols * 2,
            Form::Plain(_, size) => rows * cols * size,
        };
        Ok(Self { form, rows, cols, bytes })
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
