//! Seeded inputs: activations, and matrices of every stored type.

use half::{bf16, f16};

use crate::dtype::{DType, Elem, Real};
use crate::error::Result;
use crate::rng::Rng;
use crate::tensor::HostTensor;

/// A type that values are rounded to on their way through a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Storage {
    F32,
    F16,
    BF16,
    /// int8 with one f32 scale, greatest / 127, for each block of 32 values of a row.
    Int8,
}

impl Storage {
    /// That of an element type; f64 counts as [`Storage::F32`], since inputs start as f32.
    pub fn of<T: Elem>() -> Self {
        match T::NAME {
            "bf16" => Storage::BF16,
            "f16" => Storage::F16,
            _ => Storage::F32,
        }
    }

    /// Rounds rows of width `d`.
    pub fn round(self, values: &mut [f32], d: usize) {
        match self {
            Storage::F32 => {}
            Storage::F16 => values.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
            Storage::BF16 => values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            Storage::Int8 => {
                for block in values.chunks_mut(d.max(1)).flat_map(|row| row.chunks_mut(32)) {
                    let scale = block.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                    if scale > 0.0 {
                        block.iter_mut().for_each(|x| *x = (*x / scale).round() * scale);
                    }
                }
            }
        }
    }
}

/// Values in the element type of a backend's buffer.
///
/// # Panics
/// For element types that hold no real numbers.
pub fn to_elems<T: Elem>(values: &[f32]) -> Vec<T> {
    match T::NAME {
        "f32" => bytemuck::cast_slice(values).to_vec(),
        "f64" => bytemuck::cast_slice(&values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()).to_vec(),
        "bf16" => bytemuck::cast_slice(&values.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()).to_vec(),
        "f16" => bytemuck::cast_slice(&values.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()).to_vec(),
        other => panic!("{other} holds no activations"),
    }
}

/// The inverse of [`to_elems`], in f64 so that nothing is lost.
pub fn from_elems<T: Real>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// `n` standard normal values.
pub fn normals(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.normal()).collect()
}

/// Values that are drawn for a matrix. A larger one repeats its first rows: billions of random numbers would take minutes.
const DRAWN: usize = 1 << 18;

/// A matrix of random valid blocks whose values have magnitudes of about 1 / sqrt(cols), as a trained layer's have.
///
/// # Errors
/// If blocks of `dtype` do not divide `cols`.
pub fn matrix(rng: &mut Rng, dtype: DType, rows: usize, cols: usize) -> Result<HostTensor> {
    let bytes = rows * dtype.row_bytes(cols)?;
    let mut data = Vec::with_capacity(bytes);
    let size = 1.0 / (cols as f32).sqrt();
    for _ in 0..rows.min(DRAWN / cols + 1) * cols / dtype.block_len() {
        block(rng, dtype, size, &mut data);
    }
    while data.len() < bytes {
        data.extend_from_within(..data.len().min(bytes - data.len()));
    }
    HostTensor::new(dtype, rows, cols, data.into())
}

fn block(rng: &mut Rng, dtype: DType, size: f32, out: &mut Vec<u8>) {
    let start = out.len();
    match dtype {
        DType::F32 => return out.extend((rng.normal() * size).to_le_bytes()),
        DType::F16 => return out.extend(f16::from_f32(rng.normal() * size).to_le_bytes()),
        DType::BF16 => return out.extend(bf16::from_f32(rng.normal() * size).to_le_bytes()),
        _ => {}
    }
    while out.len() < start + dtype.block_bytes() {
        out.extend(rng.next_u32().to_le_bytes());
    }
    out.truncate(start + dtype.block_bytes());
    // Every bit pattern of the quants is valid; only the scales must be sane.
    let spread = 1.0 + rng.uniform();
    let mut put = |at: usize, x: f32| out[start + at..start + at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
    match dtype {
        DType::Q4_0 => put(0, size * spread / 8.0),
        DType::Q5_0 => put(0, size * spread / 16.0),
        DType::Q8_0 => put(0, size * spread / 128.0),
        DType::Q4_1 => (put(0, size * spread / 8.0), put(2, -size * spread)).0,
        DType::Q5_1 => (put(0, size * spread / 16.0), put(2, -size * spread)).0,
        DType::Q4_K => (put(0, size * spread / 256.0), put(2, size * spread / 32.0)).0,
        DType::Q5_K => (put(0, size * spread / 512.0), put(2, size * spread / 32.0)).0,
        DType::Q6_K => put(208, size * spread / 2048.0),
        DType::F32 | DType::F16 | DType::BF16 => {}
    }
}
