//! Tensors at rest in host memory, as a file or a test hands them to a backend.
//!
//! quadriga has no general tensor type: activations are `[rows, features]`, row-major, and live in a backend's buffers.
//! What is here is the form in which weights arrive.

use std::ops::Range;
use std::sync::Arc;

use half::f16;

use crate::dtype::DType;
use crate::error::{Result, ensure};

/// Something that owns bytes and can be told that a range of them will not be read again soon (a file map drops its pages).
pub trait ByteSource: Send + Sync + 'static {
    /// All the bytes.
    fn bytes(&self) -> &[u8];
    /// Advice: `range` is not needed in memory for now. Its contents stay readable.
    fn release(&self, _range: Range<usize>) {}
}

impl ByteSource for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A cheap, shared range of bytes.
#[derive(Clone)]
pub struct Bytes {
    source: Arc<dyn ByteSource>,
    range: Range<usize>,
}

impl Bytes {
    /// `range` of `source`.
    ///
    /// # Panics
    /// If the range does not lie inside the source: callers check file headers first.
    pub fn new(source: Arc<dyn ByteSource>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= source.bytes().len(), "byte range outside its source");
        Self { source, range }
    }

    /// See [`ByteSource::release`].
    pub fn release(&self) {
        self.source.release(self.range.clone());
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(v: Vec<u8>) -> Self {
        let n = v.len();
        Self::new(Arc::new(v), 0..n)
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.source.bytes()[self.range.clone()]
    }
}

/// A matrix `[rows, cols]` (a vector is `[1, n]`) in its stored type; a row is one output of a linear layer.
#[derive(Clone)]
pub struct HostTensor {
    /// Stored element or block type.
    pub dtype: DType,
    /// Rows: outputs of a linear layer, vocabulary entries of an embedding.
    pub rows: usize,
    /// Columns: inputs of a linear layer. A multiple of the block length of `dtype`.
    pub cols: usize,
    /// `rows * dtype.row_bytes(cols)` bytes, row after row.
    pub data: Bytes,
}

impl HostTensor {
    /// Checks that the bytes are as many as the shape says.
    pub fn new(dtype: DType, rows: usize, cols: usize, data: Bytes) -> Result<Self> {
        let row = dtype.row_bytes(cols)?;
        let want = row.checked_mul(rows);
        ensure!(
            want == Some(data.len()),
            Weights,
            "a {dtype} matrix [{rows}, {cols}] needs {want:?} bytes, {} given",
            data.len()
        );
        Ok(Self { dtype, rows, cols, data })
    }

    /// From f32 values.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<Self> {
        Self::new(DType::F32, rows, cols, bytemuck::cast_slice(values).to_vec().into())
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.data.len() / self.rows.max(1)
    }

    /// The stored bytes of row `r`.
    pub fn row(&self, r: usize) -> &[u8] {
        let n = self.row_bytes();
        &self.data[r * n..(r + 1) * n]
    }

    /// Row `r` as f32; `out` has `cols` entries.
    pub fn row_f32(&self, r: usize, out: &mut [f32]) {
        self.dtype.to_f32(self.row(r), out);
    }

    /// Every value as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut v = vec![0.0; self.rows * self.cols];
        self.dtype.to_f32(&self.data, &mut v);
        v
    }

    /// The same values with row `i` taken from row `order(i)` of `self`: a copy of bytes, exact for block types too.
    pub fn permute_rows(&self, order: impl Fn(usize) -> usize) -> Result<Self> {
        self.pick_rows((0..self.rows).map(order))
    }

    /// These rows, one after another.
    pub fn pick_rows(&self, rows: impl ExactSizeIterator<Item = usize>) -> Result<Self> {
        let n = rows.len();
        let mut v = Vec::with_capacity(n * self.row_bytes());
        rows.for_each(|r| v.extend_from_slice(self.row(r)));
        Self::new(self.dtype, n, self.cols, v.into())
    }

    /// The same values rounded to [`DType::Q8_0`], each block by its largest.
    ///
    /// # Errors
    /// Columns that are not whole blocks.
    pub fn to_q8_0(&self) -> Result<Self> {
        // Adding it rounds a small number to a whole one, in the low bits of the sum: a rounding that every processor does side by side.
        const WHOLE: f32 = 12_582_912.0;
        let (block, size) = (DType::Q8_0.block_len(), DType::Q8_0.row_bytes(DType::Q8_0.block_len())?);
        let mut row = vec![0.0; self.cols];
        let mut v = vec![0u8; DType::Q8_0.row_bytes(self.cols)? * self.rows];
        for (r, to) in v.chunks_exact_mut(self.cols / block * size).enumerate() {
            self.row_f32(r, &mut row);
            for (x, to) in row.chunks_exact(block).zip(to.chunks_exact_mut(size)) {
                let d = f16::from_f32(x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0);
                let inverse = if d.to_f32() > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
                let (scale, q) = to.split_at_mut(2);
                scale.copy_from_slice(&d.to_le_bytes());
                // The scale was rounded: the largest may come to a little more than 127.
                q.iter_mut()
                    .zip(x)
                    .for_each(|(q, x)| *q = ((x * inverse).clamp(-127.0, 127.0) + WHOLE).to_bits() as u8);
            }
        }
        Self::new(DType::Q8_0, self.rows, self.cols, v.into())
    }
}
