//! [`PackedWeight`]: a matrix in the form in which the kernels read it.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::layout::{BLOCK, Block, Layout, PANEL};
use super::pack;
use crate::backend::WeightInfo;
use crate::backend::cpu::Tier;
use crate::backend::cpu::lanes::{Kernel, Simd, dispatch};
use crate::backend::cpu::memory::{AlignedBytes, Arena};
use crate::backend::cpu::pool::Pool;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result, ensure};
use crate::tensor::{Bytes, HostTensor};

/// Bytes packed by one task, and between two releases of source pages.
const CHUNK: usize = 256 << 10;
/// From so many bytes on a plain matrix moves to huge pages: page walks cost a fifth of the speed of one row, a copy is
/// made once. Smaller ones, of tiny models, stay in the file's map: beside large ones they would keep their neighbours'
/// pages there too, since the system maps pages around the one that is asked for.
const COPY: usize = 128 << 10;

/// A weight matrix `[rows, cols]`: plain types row-major, quantised ones repacked into panels of 16 outputs.
pub struct PackedWeight {
    dtype: DType,
    rows: usize,
    cols: usize,
    store: Store,
}

/// Rows of 32 halves, those of the matrix so far apart, in f32.
struct Widen<'a>(&'a [f16], usize, &'a mut [f32]);

impl Kernel for Widen<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (out, x) in self.2.chunks_exact_mut(BLOCK).zip(self.0.chunks(self.1)) {
            for i in (0..BLOCK).step_by(S::N) {
                s.store(s.load(&x[i..]), &mut out[i..]);
            }
        }
    }
}

enum Store {
    /// Row-major, small, in the file's map.
    Shared(Bytes),
    /// Row-major or in panels.
    Own(AlignedBytes),
}

impl PackedWeight {
    /// Brings `t` into the kernels' form, in parallel. The source's pages are released where they were copied.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn pack(t: HostTensor, pool: &Pool, arena: &Arena) -> Result<Self> {
        let HostTensor { dtype, rows, cols, data } = t;
        let store = if dtype.is_quantized() {
            let packed = Self::panels(dtype, rows, cols, &data, pool, arena)?;
            data.release();
            Store::Own(packed)
        } else if data.len() < COPY && (data.as_ptr() as usize).is_multiple_of(dtype.block_bytes()) {
            Store::Shared(data)
        } else {
            let mut copy = arena.alloc(data.len())?;
            pool.run_chunks(&mut copy, CHUNK, |i, c| c.copy_from_slice(&data[i * CHUNK..i * CHUNK + c.len()]));
            data.release();
            Store::Own(copy)
        };
        Ok(Self { dtype, rows, cols, store })
    }

    /// A plain matrix of zeros that [`PackedWeight::set`] can change: in the type to which fast products round their
    /// operands, where they do.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn zeros(rows: usize, cols: usize, bf16s: bool, arena: &Arena) -> Result<Self> {
        let dtype = if bf16s { DType::BF16 } else { DType::F32 };
        let bytes = dtype.row_bytes(cols)?.checked_mul(rows);
        let bytes = bytes.ok_or_else(|| Error::new(ErrorKind::Capacity, format!("a matrix [{rows}, {cols}]")))?;
        Ok(Self { dtype, rows, cols, store: Store::Own(arena.alloc(bytes)?) })
    }

    /// Takes the values of another matrix, rounded to nearest.
    ///
    /// # Errors
    /// Another shape; a matrix that was read from a file.
    pub fn set(&mut self, values: &[f32], pool: &Pool) -> Result<()> {
        let (n, dtype) = (self.rows * self.cols, self.dtype);
        ensure!(values.len() == n, Shape, "{} values for a matrix [{}, {}]", values.len(), self.rows, self.cols);
        let Store::Own(bytes) = &mut self.store else {
            return Err(Error::new(ErrorKind::Unsupported, "a matrix in a file's map cannot be changed"));
        };
        match dtype {
            DType::F32 => pool.run_chunks(bytemuck::cast_slice_mut(bytes), CHUNK, |i, to: &mut [f32]| {
                to.copy_from_slice(&values[i * CHUNK..][..to.len()]);
            }),
            DType::BF16 => pool.run_chunks(bytemuck::cast_slice_mut(bytes), CHUNK, |i, to: &mut [bf16]| {
                to.convert_from_f32_slice(&values[i * CHUNK..][..to.len()]);
            }),
            other => return Err(Error::new(ErrorKind::Unsupported, format!("a {other} matrix cannot be changed"))),
        }
        Ok(())
    }

    fn panels(dtype: DType, rows: usize, cols: usize, data: &[u8], pool: &Pool, arena: &Arena) -> Result<AlignedBytes> {
        let (row, panel) = (dtype.row_bytes(cols)?, Layout::of(dtype as u8).panel(cols));
        let mut packed = arena.alloc(rows.div_ceil(PANEL) * panel)?;
        if row > 0 {
            let panels = (CHUNK / panel).max(1);
            pool.run_chunks(&mut packed, panels * panel, |i, chunk| {
                for (p, out) in chunk.chunks_exact_mut(panel).enumerate() {
                    let first = (i * panels + p) * PANEL;
                    let mut source: [&[u8]; PANEL] = [&[]; PANEL];
                    let mut n = 0;
                    for (s, r) in source.iter_mut().zip(data[first * row..].chunks_exact(row)) {
                        *s = r;
                        n += 1;
                    }
                    pack::panel(dtype, &source[..n], out);
                }
            });
        }
        Ok(packed)
    }

    /// Stored type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Row `r` as f32, bit-equal to [`DType::to_f32`] of the file's row.
    ///
    /// # Panics
    /// If `r` is not a row or `out` is not `cols` long.
    pub fn row_f32(&self, r: usize, out: &mut [f32]) {
        assert!(r < self.rows && out.len() == self.cols, "row {r} of [{}, {}]", self.rows, self.cols);
        if self.dtype.is_quantized() {
            let panel = self.panel(r / PANEL);
            for (k, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                Block::new(self.dtype, panel, k).channel(r % PANEL, out);
            }
        } else {
            let n = self.row_bytes();
            self.dtype.to_f32(&self.data()[r * n..(r + 1) * n], out);
        }
    }

    /// What [`row_f32`](Self::row_f32) gives of rows `row..row + 32` and columns `col..col + 32`, both multiples of 32,
    /// as far as they exist (but for the sign of zeros): of plain types `out[row][col]`, of quantised ones
    /// `out[col][row]`.
    pub(in crate::backend::cpu) fn square(&self, tier: Tier, row: usize, col: usize, out: &mut [f32; BLOCK * BLOCK]) {
        let (rows, cols) = (BLOCK.min(self.rows - row), BLOCK.min(self.cols - col));
        if !self.dtype.is_quantized() {
            let (size, n) = (self.dtype.block_bytes(), self.row_bytes());
            let data = &self.data()[row * n + col * size..];
            match self.dtype {
                DType::F16 if cols == BLOCK => {
                    dispatch(tier, Widen(bytemuck::cast_slice(data), n / 2, &mut out[..rows * BLOCK]))
                }
                DType::BF16 => {
                    let data: &[u16] = bytemuck::cast_slice(data);
                    for (out, x) in out.chunks_exact_mut(BLOCK).take(rows).zip(data.chunks(n / 2)) {
                        out.iter_mut().zip(&x[..cols]).for_each(|(o, &x)| *o = f32::from_bits((x as u32) << 16));
                    }
                }
                _ => {
                    for (out, r) in out.chunks_exact_mut(BLOCK).zip(0..rows) {
                        self.dtype.to_f32(&data[r * n..r * n + cols * size], &mut out[..cols]);
                    }
                }
            }
            return;
        }
        for (p, at) in (row / PANEL..self.panels_len()).zip([0, PANEL]) {
            let panel = self.panel(p);
            match tier {
                #[cfg(target_arch = "x86_64")]
                Tier::Avx2 | Tier::Avx512 => {
                    super::unpack_avx2::widen_block(self.dtype, panel, col / BLOCK, &mut out[at..], BLOCK);
                }
                _ => {
                    let (block, mut channel) = (Block::new(self.dtype, panel, col / BLOCK), [0.0; BLOCK]);
                    for c in 0..PANEL {
                        block.channel(c, &mut channel);
                        out.chunks_exact_mut(BLOCK).zip(channel).for_each(|(out, w)| out[at + c] = w);
                    }
                }
            }
        }
    }

    /// The weights as they lie in memory, row-major, if they are of the plain type `dtype`, whose element is `T`.
    pub(in crate::backend::cpu) fn plain<T: bytemuck::Pod>(&self, dtype: DType) -> Option<&[T]> {
        (self.dtype == dtype).then(|| bytemuck::cast_slice(self.data()))
    }

    pub(super) fn data(&self) -> &[u8] {
        match &self.store {
            Store::Shared(b) => b,
            Store::Own(b) => b,
        }
    }

    /// Panels of 16 outputs, the last one perhaps with fewer.
    pub(super) fn panels_len(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Inputs.
    pub(in crate::backend::cpu) fn cols_len(&self) -> usize {
        self.cols
    }

    /// Blocks of 32 inputs in a row.
    pub(super) fn blocks(&self) -> usize {
        self.cols / BLOCK
    }

    /// Bytes of a row of a plain type.
    pub(super) fn row_bytes(&self) -> usize {
        self.cols * self.dtype.block_bytes()
    }

    /// Panel `p`: packed blocks, or 16 rows (fewer at the end) of a plain type.
    pub(super) fn panel(&self, p: usize) -> &[u8] {
        let data = self.data();
        if self.dtype.is_quantized() {
            let n = Layout::of(self.dtype as u8).panel(self.cols);
            &data[p * n..(p + 1) * n]
        } else {
            let n = self.row_bytes();
            &data[p * PANEL * n..((p + 1) * PANEL).min(self.rows) * n]
        }
    }
}

impl WeightInfo for PackedWeight {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn bytes(&self) -> usize {
        self.data().len()
    }
}
