//! Eight lanes in plain Rust.

use std::array::from_fn;

use half::{bf16, f16};

use super::Simd;

/// Always there.
#[derive(Clone, Copy)]
pub struct Portable;

/// Aligned, so that the compiler keeps it in vector registers.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub struct F8([f32; 8]);

impl Simd for Portable {
    type V = F8;
    const N: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> F8 {
        F8([x; 8])
    }
    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> F8 {
        // SAFETY: eight values are there, by this method's contract.
        F8(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> F8 {
        // SAFETY: as above.
        let x = unsafe { p.cast::<[f16; 8]>().read_unaligned() };
        F8(x.map(widen))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> F8 {
        // SAFETY: as above.
        let x = unsafe { p.cast::<[bf16; 8]>().read_unaligned() };
        F8(x.map(|x| f32::from_bits((x.to_bits() as u32) << 16)))
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: F8, p: *mut f32) {
        // SAFETY: eight places are there, by this method's contract.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v.0) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: F8, p: *mut f16) {
        // SAFETY: as above.
        unsafe { p.cast::<[f16; 8]>().write_unaligned(v.0.map(f16::from_f32_const)) }
    }
    #[inline(always)]
    fn add(self, a: F8, b: F8) -> F8 {
        F8(from_fn(|i| a.0[i] + b.0[i]))
    }
    #[inline(always)]
    fn sub(self, a: F8, b: F8) -> F8 {
        F8(from_fn(|i| a.0[i] - b.0[i]))
    }
    #[inline(always)]
    fn mul(self, a: F8, b: F8) -> F8 {
        F8(from_fn(|i| a.0[i] * b.0[i]))
    }
    #[inline(always)]
    fn div(self, a: F8, b: F8) -> F8 {
        F8(from_fn(|i| a.0[i] / b.0[i]))
    }
    #[inline(always)]
    fn fma(self, a: F8, b: F8, c: F8) -> F8 {
        F8(from_fn(|i| a.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    fn fnma(self, a: F8, b: F8, c: F8) -> F8 {
        F8(from_fn(|i| c.0[i] - a.0[i] * b.0[i]))
    }
    #[inline(always)]
    fn min(self, a: F8, b: F8) -> F8 {
        F8(from_fn(|i| if a.0[i] < b.0[i] { a.0[i] } else { b.0[i] }))
    }
    #[inline(always)]
    fn max(self, a: F8, b: F8) -> F8 {
        F8(from_fn(|i| if a.0[i] > b.0[i] { a.0[i] } else { b.0[i] }))
    }
    #[inline(always)]
    fn zero_below(self, v: F8, x: F8, limit: F8) -> F8 {
        F8(from_fn(|i| if x.0[i] < limit.0[i] { 0.0 } else { v.0[i] }))
    }
    #[inline(always)]
    fn pow2(self, t: F8) -> F8 {
        F8(t.0.map(|t| f32::from_bits((t.to_bits() << 23).wrapping_add(127 << 23))))
    }
    #[inline(always)]
    fn sum(self, v: F8) -> f32 {
        let h: [f32; 4] = from_fn(|i| v.0[i] + v.0[i + 4]);
        (h[0] + h[2]) + (h[1] + h[3])
    }
    #[inline(always)]
    fn greatest(self, v: F8) -> f32 {
        v.0[1..].iter().fold(v.0[0], |m, &x| if x > m { x } else { m })
    }
}

/// f16 to f32 without tables or branches (the compiler vectorises it): the exponent is moved by a multiplication, which
/// also normalises what is subnormal.
#[inline(always)]
fn widen(h: f16) -> f32 {
    let (sign, rest) = ((h.to_bits() as u32 & 0x8000) << 16, (h.to_bits() as u32 & 0x7FFF) << 13);
    let finite = f32::from_bits(rest) * f32::from_bits(0x7780_0000);
    let special = f32::from_bits(rest | 0x7F80_0000);
    let abs = if rest >= 0x0F80_0000 { special } else { finite };
    f32::from_bits(abs.to_bits() | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_exactly() {
        for b in 0..=u16::MAX {
            let h = f16::from_bits(b);
            let (w, t) = (widen(h), h.to_f32());
            assert!(w.to_bits() == t.to_bits() || (w.is_nan() && t.is_nan()), "{b:04x}: {w} for {t}");
        }
    }
}
