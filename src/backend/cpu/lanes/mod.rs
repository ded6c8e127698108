//! Vectors of f32 lanes: algorithms are written once over [`Simd`] and compiled once per [`Tier`].
//!
//! A value of a [`Simd`] type is the proof that the machine has its instructions, so that all its methods but the raw
//! loads are safe. [`dispatch`] makes such a value, inside a function compiled for the tier. A [`Kernel::run`] and all
//! that it calls on the way to the vectors must be `#[inline(always)]`, or the intrinsics stay calls.
//!
//! Operations are lane by lane: no lane's result depends on its number or on its neighbours, except in the horizontal
//! sums, whose order is fixed.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod math;
mod portable;
pub mod tiles;

use std::sync::LazyLock;

use half::{bf16, f16};

use super::Tier;

/// f32 lanes of one instruction set.
pub trait Simd: Copy + Send + Sync + 'static {
    /// A vector.
    type V: Copy;
    /// Lanes in it: 8 or 16.
    const N: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Lane i from `p[i]`.
    ///
    /// # Safety
    /// N values can be read at `p`; no alignment is needed.
    unsafe fn load_f32(self, p: *const f32) -> Self::V;
    /// Lane i from `p[i]`, widened.
    ///
    /// # Safety
    /// As [`Simd::load_f32`].
    unsafe fn load_f16(self, p: *const f16) -> Self::V;
    /// Lane i from `p[i]`, widened.
    ///
    /// # Safety
    /// As [`Simd::load_f32`].
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    /// Lane i to `p[i]`.
    ///
    /// # Safety
    /// N values can be written at `p`; no alignment is needed.
    unsafe fn store_f32(self, v: Self::V, p: *mut f32);
    /// Lane i to `p[i]`, rounded to nearest, ties to even.
    ///
    /// # Safety
    /// As [`Simd::store_f32`].
    unsafe fn store_f16(self, v: Self::V, p: *mut f16);
    /// a + b.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a - b.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a b + c, rounded once where the machine can and twice where it cannot.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// c - a b, rounded as [`Simd::fma`].
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a where a < b, else b: b where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// a where a > b, else b: b where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// 0 where x < limit, else v.
    fn zero_below(self, v: Self::V, x: Self::V, limit: Self::V) -> Self::V;
    /// 2^n, where n, in -126..=127, is the integer in the low mantissa bits of `t` = n + 1.5 * 2^23.
    fn pow2(self, t: Self::V) -> Self::V;
    /// The sum of the lanes, halves first: (0+4)+(2+6) and so on.
    fn sum(self, v: Self::V) -> f32;
    /// The greatest lane.
    fn greatest(self, v: Self::V) -> f32;

    /// Lane i from `x[i]`, widened.
    #[inline(always)]
    fn load<E: Element>(self, x: &[E]) -> Self::V {
        assert!(x.len() >= Self::N);
        // SAFETY: N values are there.
        unsafe { E::load(self, x.as_ptr()) }
    }

    /// Lane i to `y[i]`, rounded.
    #[inline(always)]
    fn store<E: Element>(self, v: Self::V, y: &mut [E]) {
        assert!(y.len() >= Self::N);
        // SAFETY: N places are there.
        unsafe { E::store(self, v, y.as_mut_ptr()) }
    }

    /// Lane i from `x[i]`, `pad` beyond its end.
    #[inline(always)]
    fn load_part(self, x: &[f32], pad: f32) -> Self::V {
        let mut b = [pad; 16];
        let n = x.len().min(16);
        b[..n].copy_from_slice(&x[..n]);
        self.load(&b)
    }

    /// Lane i to `y[i]` as far as it goes.
    #[inline(always)]
    fn store_part(self, v: Self::V, y: &mut [f32]) {
        let mut b = [0.0f32; 16];
        self.store(v, &mut b);
        let n = y.len().min(16);
        y[..n].copy_from_slice(&b[..n]);
    }
}

/// An element in memory that lanes are loaded from.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Widens N elements.
    ///
    /// # Safety
    /// N elements can be read at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
    /// Rounds N lanes.
    ///
    /// # Safety
    /// N elements can be written at `p`.
    unsafe fn store<S: Simd>(s: S, v: S::V, p: *mut Self);
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: by this function's contract.
        unsafe { s.load_f32(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, v: S::V, p: *mut Self) {
        // SAFETY: by this function's contract.
        unsafe { s.store_f32(v, p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: by this function's contract.
        unsafe { s.load_f16(p) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, v: S::V, p: *mut Self) {
        // SAFETY: by this function's contract.
        unsafe { s.store_f16(v, p) }
    }
}

/// A computation over lanes of any width.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// Does it. Implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// Runs `k` with the instructions of `tier`, or of the best tier that the machine has if that is less.
#[inline]
pub fn dispatch<K: Kernel>(tier: Tier, k: K) -> K::Out {
    static BEST: LazyLock<Tier> = LazyLock::new(Tier::detect);
    match tier.min(*BEST) {
        // SAFETY: the machine has the tier's features, as detected.
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 => unsafe { avx2::run(k) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512 => unsafe { avx512::run(k) },
        _ => k.run(portable::Portable),
    }
}

#[cfg(test)]
mod tests;
