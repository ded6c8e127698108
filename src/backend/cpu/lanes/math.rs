//! Functions of one vector, the same for every lane position and close to the same on every tier.

use super::Simd;

/// e^x within about 1 ulp: 0 below -87.33 (and at -inf), e^88.37 above 88.37, NaN of NaN.
///
/// x = n ln 2 + r with |r| <= ln(2)/2; e^r by the minimax polynomial of Cephes' `expf` (Moshier), 2^n by its bits.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
    let lo = s.splat(-87.336_54);
    let c = s.min(s.splat(88.376_26), s.max(lo, x));
    let t = s.fma(c, s.splat(std::f32::consts::LOG2_E), s.splat(MAGIC));
    let n = s.sub(t, s.splat(MAGIC));
    // ln 2 in two parts; n times the first is exact, so that this also works without fused multiply-add.
    let r = s.fnma(n, s.splat(0.693_359_375), c);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.000_000_1e-1] {
        p = s.fma(p, r, s.splat(k));
    }
    let y = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    s.zero_below(s.mul(y, s.pow2(t)), x, lo)
}

/// e^x of one number, bit-equal to a lane of [`exp`].
#[inline(always)]
pub fn exp1<S: Simd>(s: S, x: f32) -> f32 {
    let mut b = [0.0; 16];
    s.store(exp(s, s.splat(x)), &mut b);
    b[0]
}

/// x / (1 + e^-x).
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.div(x, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x))))
}

/// x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), written as x / (1 + e^-2u).
#[inline(always)]
pub fn gelu_tanh<S: Simd>(s: S, x: S::V) -> S::V {
    const A: f32 = -1.595_769_1; // -2 sqrt(2/pi)
    let cubic = s.mul(s.mul(x, x), s.splat(A * 0.044_715));
    let u = s.mul(x, s.add(cubic, s.splat(A)));
    s.div(x, s.add(s.splat(1.0), exp(s, u)))
}
