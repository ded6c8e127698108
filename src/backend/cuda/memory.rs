//! Device memory: typed buffers, and the views that kernels' arguments are made of.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::CudaSlice;

use super::device::Stream;
use crate::backend::Buffer;
use crate::dtype::Elem;
use crate::error::Result;

/// Elements on the device, freed in the stream's order.
pub struct CudaBuf<T> {
    address: u64,
    len: usize,
    _memory: CudaSlice<u8>,
    stream: Arc<Stream>,
    _type: PhantomData<T>,
}

impl<T: Elem> CudaBuf<T> {
    /// `n` zeros.
    pub(super) fn zeros(stream: &Arc<Stream>, n: usize) -> Result<Self> {
        let (memory, address) = stream.zeros(n * size_of::<T>())?;
        Ok(Self { address, len: n, _memory: memory, stream: stream.clone(), _type: PhantomData })
    }

    /// A copy of `host`.
    pub(super) fn of(stream: &Arc<Stream>, host: &[T]) -> Result<Self> {
        let mut b = Self::zeros(stream, host.len())?;
        stream.upload(b.all_mut(), host)?;
        Ok(b)
    }

    /// All of it.
    pub(super) fn all(&self) -> Src<'_, T> {
        self.head(self.len)
    }

    /// All of it, to write.
    pub(super) fn all_mut(&mut self) -> Dst<'_, T> {
        self.head_mut(self.len)
    }

    /// Where it begins.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl<T> Drop for CudaBuf<T> {
    fn drop(&mut self) {
        // Launches that use it may still be on the tape. What they meet is told by whoever waits for them.
        self.stream.flush_later_told();
    }
}

impl<T: Elem> Buffer<T> for CudaBuf<T> {
    type View<'a> = Src<'a, T>;
    type ViewMut<'a> = Dst<'a, T>;

    fn len(&self) -> usize {
        self.len
    }

    fn view(&self, r: Range<usize>) -> Src<'_, T> {
        assert!(r.start <= r.end && r.end <= self.len, "elements {r:?} of {}", self.len);
        Src { address: self.address + (r.start * size_of::<T>()) as u64, len: r.len(), _of: PhantomData }
    }

    fn view_mut(&mut self, r: Range<usize>) -> Dst<'_, T> {
        assert!(r.start <= r.end && r.end <= self.len, "elements {r:?} of {}", self.len);
        Dst { address: self.address + (r.start * size_of::<T>()) as u64, len: r.len(), _of: PhantomData }
    }
}

/// Device elements that a kernel reads.
#[derive(Debug)]
pub struct Src<'a, T> {
    address: u64,
    len: usize,
    _of: PhantomData<&'a T>,
}

impl<T> Clone for Src<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Src<'_, T> {}

impl<T> Src<'_, T> {
    /// No elements.
    pub(super) const EMPTY: Self = Self { address: 0, len: 0, _of: PhantomData };

    /// Memory whose owner outlives the work that is queued on it.
    pub(super) fn at(address: u64, len: usize) -> Self {
        Self { address, len, _of: PhantomData }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

/// Device elements that a kernel writes.
#[derive(Debug)]
pub struct Dst<'a, T> {
    address: u64,
    len: usize,
    _of: PhantomData<&'a mut T>,
}

impl<'a, T> Dst<'a, T> {
    /// As [`Src::at`].
    pub(super) fn at(address: u64, len: usize) -> Self {
        Self { address, len, _of: PhantomData }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}
