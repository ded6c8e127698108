//! Sixteen lanes of AVX-512.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2::{self, Avx2};
use super::{Kernel, Simd};

/// Proof that the machine has AVX-512 F, BW, VL and DQ, and all that AVX2 machines have.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// Runs `k` in a function compiled for the tier.
///
/// # Safety
/// The machine has the features named here.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(k: K) -> K::Out {
    k.run(Avx512(()))
}

/// Calls intrinsics; every use is inside a method of `Avx512`, a value of which exists only where the features do.
macro_rules! x86 {
    ($e:expr) => {
        // SAFETY: the features are there (see above), and pointers are good by the method's own contract.
        #[allow(clippy::multiple_unsafe_ops_per_block)]
        unsafe {
            $e
        }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    const N: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        x86!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> __m512 {
        x86!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        x86!(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        x86!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))))
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: __m512, p: *mut f32) {
        x86!(_mm512_storeu_ps(p, v));
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: __m512, p: *mut f16) {
        x86!(_mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)));
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        x86!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        x86!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        x86!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        x86!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        x86!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn fnma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        x86!(_mm512_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        x86!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        x86!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn zero_below(self, v: __m512, x: __m512, limit: __m512) -> __m512 {
        x86!(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), v))
    }
    #[inline(always)]
    fn pow2(self, t: __m512) -> __m512 {
        x86!({
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(t));
            _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(127 << 23)))
        })
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        // SAFETY: a machine of this tier has AVX2, FMA and F16C.
        let s = unsafe { Avx2::new() };
        avx2::sum(s, x86!(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))))
    }
    #[inline(always)]
    fn greatest(self, v: __m512) -> f32 {
        // SAFETY: as in `sum`.
        let s = unsafe { Avx2::new() };
        avx2::greatest(s, x86!(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))))
    }
}
