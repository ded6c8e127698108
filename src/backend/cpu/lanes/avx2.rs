//! Eight lanes of AVX2 with FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, Simd};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// Runs `k` in a function compiled for the tier.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(k: K) -> K::Out {
    k.run(Avx2(()))
}

/// Calls intrinsics; every use is inside a method of `Avx2`, a value of which exists only where the features do.
macro_rules! x86 {
    ($e:expr) => {
        // SAFETY: the features are there (see above), and pointers are good by the method's own contract.
        #[allow(clippy::multiple_unsafe_ops_per_block)]
        unsafe {
            $e
        }
    };
}

/// (0+4)+(2+6) + (1+5)+(3+7).
#[inline(always)]
pub(super) fn sum(_: Avx2, v: __m256) -> f32 {
    x86!({
        let h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps::<1>(h, h)))
    })
}

#[inline(always)]
pub(super) fn greatest(_: Avx2, v: __m256) -> f32 {
    x86!({
        let h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let h = _mm_max_ps(h, _mm_movehl_ps(h, h));
        _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps::<1>(h, h)))
    })
}

impl Avx2 {
    /// # Safety
    /// The machine has AVX2, FMA and F16C.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Simd for Avx2 {
    type V = __m256;
    const N: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        x86!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load_f32(self, p: *const f32) -> __m256 {
        x86!(_mm256_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m256 {
        x86!(_mm256_cvtph_ps(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        x86!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))))
    }
    #[inline(always)]
    unsafe fn store_f32(self, v: __m256, p: *mut f32) {
        x86!(_mm256_storeu_ps(p, v));
    }
    #[inline(always)]
    unsafe fn store_f16(self, v: __m256, p: *mut f16) {
        x86!(_mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)));
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        x86!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        x86!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        x86!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        x86!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        x86!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn fnma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        x86!(_mm256_fnmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        x86!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        x86!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn zero_below(self, v: __m256, x: __m256, limit: __m256) -> __m256 {
        x86!(_mm256_and_ps(v, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, limit)))
    }
    #[inline(always)]
    fn pow2(self, t: __m256) -> __m256 {
        x86!({
            let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(t));
            _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(127 << 23)))
        })
    }
    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        sum(self, v)
    }
    #[inline(always)]
    fn greatest(self, v: __m256) -> f32 {
        greatest(self, v)
    }
}
