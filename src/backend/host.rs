//! Host memory as a [`Buffer`]: what both CPU backends compute on.

use std::ops::Range;

use super::Buffer;
use crate::dtype::Elem;

/// A vector of elements; its pages are touched only as they are written.
#[derive(Clone, Debug)]
pub struct HostBuf<T>(Vec<T>);

impl<T: Elem> HostBuf<T> {
    /// `n` zeros, reserved but not yet touched.
    pub fn zeros(n: usize) -> Self {
        Self(bytemuck::zeroed_vec(n))
    }
}

impl<T> std::ops::Deref for HostBuf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> std::ops::DerefMut for HostBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: Elem> Buffer<T> for HostBuf<T> {
    type View<'a> = &'a [T];
    type ViewMut<'a> = &'a mut [T];
    fn len(&self) -> usize {
        self.0.len()
    }
    fn view(&self, r: Range<usize>) -> &[T] {
        &self.0[r]
    }
    fn view_mut(&mut self, r: Range<usize>) -> &mut [T] {
        &mut self.0[r]
    }
}
