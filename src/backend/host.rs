//! Host memory as a [`Buffer`]: what both CPU backends compute on.

use std::ops::Range;

use super::Buffer;
use crate::dtype::Elem;

/// Bytes of a cache line: a vector that straddles two costs twice.
const LINE: usize = 64;

/// A vector of elements that begins at a cache line; its pages are touched only as they are written.
#[derive(Debug)]
pub struct HostBuf<T> {
    data: Vec<T>,
    first: usize,
    len: usize,
}

impl<T: Elem> HostBuf<T> {
    /// `n` zeros, reserved but not yet touched.
    pub fn zeros(n: usize) -> Self {
        let data: Vec<T> = bytemuck::zeroed_vec(n + LINE / size_of::<T>().clamp(1, LINE));
        // An element's size that does not divide a line keeps its own alignment.
        let first = Some(data.as_ptr().align_offset(LINE)).filter(|&f| f + n <= data.len()).unwrap_or(0);
        Self { data, first, len: n }
    }
}

impl<T: Elem> Clone for HostBuf<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeros(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T> std::ops::Deref for HostBuf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data[self.first..self.first + self.len]
    }
}

impl<T> std::ops::DerefMut for HostBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.first..self.first + self.len]
    }
}

impl<T: Elem> Buffer<T> for HostBuf<T> {
    type View<'a> = &'a [T];
    type ViewMut<'a> = &'a mut [T];
    fn len(&self) -> usize {
        self.len
    }
    fn view(&self, r: Range<usize>) -> &[T] {
        &self[r]
    }
    fn view_mut(&mut self, r: Range<usize>) -> &mut [T] {
        &mut self[r]
    }
}
