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
    let r = s.fnma(n, s.splat(355.0 / 512.0), c);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
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
    const A: f32 = -1.595_769; // -2 sqrt(2/pi)
    let cubic = s.mul(s.mul(x, x), s.splat(A * 0.044_715));
    let u = s.mul(x, s.add(cubic, s.splat(A)));
    s.div(x, s.add(s.splat(1.0), exp(s, u)))
}

/// Phi(-|x|), the tail of the normal distribution, and e^(-x^2/2), for |x| up to 40 and as for 40 beyond.
///
/// The tail is e^(-x^2/2) t P(t) with t = 1 / (1 + 0.35 |x|), P of degree 8 fitted by us to the least greatest relative error: 1.6e-7.
#[inline(always)]
pub fn normal_tail<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let z = s.min(s.max(x, s.sub(s.splat(0.0), x)), s.splat(40.0));
    let t = s.div(s.splat(1.0), s.fma(z, s.splat(0.35), s.splat(1.0)));
    let mut p = s.splat(P8[8]);
    for k in P8[..8].iter().rev() {
        p = s.fma(p, t, s.splat(*k));
    }
    let e = exp(s, s.mul(s.mul(z, z), s.splat(-0.5)));
    (s.mul(s.mul(t, p), e), e)
}

const P8: [f32; 9] = [
    0.139_627_43,
    0.139_720_87,
    0.121_156_46,
    0.098_971_49,
    -0.004_390_793_4,
    0.127_080_59,
    -0.223_293_63,
    0.126_204_7,
    -0.025_077_032,
];

/// x Phi(x) as max(x, 0) - |x| Phi(-|x|): no digits of a small tail are lost beside 1.
#[inline(always)]
pub fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let (tail, _) = normal_tail(s, x);
    let z = s.min(s.max(x, s.sub(s.splat(0.0), x)), s.splat(40.0));
    s.fnma(z, tail, s.max(s.splat(0.0), x))
}

/// Phi(x) + x Phi'(x).
#[inline(always)]
pub fn gelu_slope<S: Simd>(s: S, x: S::V) -> S::V {
    const DENSITY: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
    let (tail, e) = normal_tail(s, x);
    let above = s.zero_below(s.fnma(s.splat(2.0), tail, s.splat(1.0)), x, s.splat(0.0));
    // e is 0 long before |x| is cut off.
    let x = s.max(s.splat(-40.0), s.min(s.splat(40.0), x));
    s.fma(s.mul(x, e), s.splat(DENSITY), s.add(tail, above))
}
