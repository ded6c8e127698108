//! What encoders add, row by row: LayerNorm, GELU without tanh, LayerScale, and their backward.

use super::super::Cpu;
use super::super::lanes::math::{gelu, gelu_slope};
use super::super::lanes::{Kernel, Simd, dispatch};
use super::super::rows::{check_equal, check_rows, each_vector};
use super::rows::PART;
use crate::backend::Write;
use crate::error::Result;

impl Cpu {
    pub(super) fn layer_norm(&self, y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], eps: f32) -> Result<()> {
        check_rows("layer_norm", x.len(), w.len())?;
        check_equal("layer_norm", y.len(), x.len())?;
        check_equal("layer_norm: w and b", w.len(), b.len())?;
        let n = (PART / w.len()).max(1) * w.len();
        self.pool().run_chunks(y, n, |i, y| {
            let x = &x[i * n..i * n + y.len()];
            dispatch(self.tier(), Norm { y, x, w, b, eps });
        });
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn layer_norm_bwd(
        &self,
        dx: &mut [f32],
        dw: Option<&mut [f32]>,
        dy: &[f32],
        x: &[f32],
        w: &[f32],
        eps: f32,
        write: Write,
    ) -> Result<()> {
        check_rows("layer_norm_bwd", x.len(), w.len())?;
        check_equal("layer_norm_bwd: dy and x", dy.len(), x.len())?;
        check_equal("layer_norm_bwd: dx and x", dx.len(), x.len())?;
        self.with_sums(dx, dw, w.len(), |at, dx, dw| {
            let r = at..at + dx.len();
            dispatch(self.tier(), NormBackward { dx, dw, dy: &dy[r.clone()], x: &x[r], w, eps, write });
        })
    }

    pub(super) fn gelu(&self, y: &mut [f32], x: &[f32]) -> Result<()> {
        check_equal("gelu", y.len(), x.len())?;
        self.pool().run_chunks(y, PART, |i, y| {
            let x = &x[i * PART..][..y.len()];
            dispatch(self.tier(), Gelu { y, x });
        });
        Ok(())
    }

    pub(super) fn gelu_bwd(&self, dx: &mut [f32], dy: &[f32], x: &[f32]) -> Result<()> {
        check_equal("gelu_bwd: dx and x", dx.len(), x.len())?;
        check_equal("gelu_bwd: dy and x", dy.len(), x.len())?;
        self.pool().run_chunks(dx, PART, |i, dx| {
            let r = i * PART..i * PART + dx.len();
            dispatch(self.tier(), GeluBackward { dx, dy: &dy[r.clone()], x: &x[r] });
        });
        Ok(())
    }

    pub(super) fn add_scaled(&self, y: &mut [f32], x: &[f32], w: &[f32]) -> Result<()> {
        check_rows("add_scaled", x.len(), w.len())?;
        check_equal("add_scaled", y.len(), x.len())?;
        let n = (PART / w.len()).max(1) * w.len();
        self.pool().run_chunks(y, n, |i, y| {
            let x = &x[i * n..i * n + y.len()];
            dispatch(self.tier(), AddScaled { y, x, w });
        });
        Ok(())
    }

    pub(super) fn add_scaled_bwd(
        &self,
        dx: &mut [f32],
        dw: Option<&mut [f32]>,
        dy: &[f32],
        x: &[f32],
        w: &[f32],
    ) -> Result<()> {
        check_rows("add_scaled_bwd", x.len(), w.len())?;
        check_equal("add_scaled_bwd: dy and x", dy.len(), x.len())?;
        check_equal("add_scaled_bwd: dx and x", dx.len(), x.len())?;
        self.with_sums(dx, dw, w.len(), |at, dx, dw| {
            let r = at..at + dx.len();
            dispatch(self.tier(), AddScaledBackward { dx, dw, dy: &dy[r.clone()], x: &x[r], w });
        })
    }
}

/// sum f(vectors) over a row, two sums at a time, where f gives 0 beyond the row's end.
macro_rules! row_sum {
    ($s:ident, $n:expr, |$r:ident, $whole:ident| $e:expr) => {{
        let mut acc = [$s.splat(0.0); 2];
        for (k, i) in (0..$n).step_by(S::N).enumerate() {
            let $r = i..$n.min(i + S::N);
            let $whole = $r.len() == S::N;
            acc[k % 2] = $s.add(acc[k % 2], $e);
        }
        $s.sum($s.add(acc[0], acc[1]))
    }};
}

#[inline(always)]
fn load<S: Simd>(s: S, v: &[f32], whole: bool, pad: f32) -> S::V {
    if whole { s.load(v) } else { s.load_part(v, pad) }
}

/// Mean of a row, and 1 / sqrt(variance + eps).
#[inline(always)]
fn moments<S: Simd>(s: S, x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len();
    let mean = row_sum!(s, n, |r, whole| load(s, &x[r], whole, 0.0)) / n as f32;
    let m = s.splat(mean);
    let squares = row_sum!(s, n, |r, whole| {
        let d = s.sub(load(s, &x[r], whole, mean), m);
        s.mul(d, d)
    });
    (mean, 1.0 / (squares / n as f32 + eps).sqrt())
}

struct Norm<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
    w: &'a [f32],
    b: &'a [f32],
    eps: f32,
}

impl Kernel for Norm<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (w, b) = (self.w, self.b);
        for (y, x) in self.y.chunks_exact_mut(w.len()).zip(self.x.chunks_exact(w.len())) {
            let (mean, inv) = moments(s, x, self.eps);
            let (mean, inv) = (s.splat(mean), s.splat(inv));
            each_vector!(s, y, [x, w, b], s.fma(s.mul(s.sub(x, mean), inv), w, b));
        }
    }
}

struct NormBackward<'a> {
    dx: &'a mut [f32],
    /// Empty where it is not wanted.
    dw: &'a mut [f32],
    dy: &'a [f32],
    x: &'a [f32],
    w: &'a [f32],
    eps: f32,
    write: Write,
}

impl Kernel for NormBackward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { dx, dw, dy, x, w, eps, write } = self;
        let d = w.len();
        for ((y, dy), x) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)) {
            let (mean, inv) = moments(s, x, eps);
            let m = s.splat(mean);
            // Weights are 0 beyond the end.
            let total =
                row_sum!(s, d, |r, whole| s.mul(load(s, &w[r.clone()], whole, 0.0), load(s, &dy[r], whole, 0.0)));
            let along = row_sum!(s, d, |r, whole| {
                let u = s.mul(load(s, &w[r.clone()], whole, 0.0), load(s, &dy[r.clone()], whole, 0.0));
                s.mul(u, s.sub(load(s, &x[r], whole, 0.0), m))
            });
            let (inv, total) = (s.splat(inv), s.splat(total / d as f32));
            // h mean(u h) = (x - mean) inv^2 mean(u (x - mean))
            let along = s.mul(s.mul(inv, inv), s.splat(along / d as f32));
            match write {
                Write::Set => {
                    each_vector!(s, y, [w, dy, x], s.mul(inv, s.fnma(s.sub(x, m), along, s.sub(s.mul(w, dy), total))))
                }
                Write::Add => each_vector!(
                    s,
                    y,
                    [y, w, dy, x],
                    s.fma(inv, s.fnma(s.sub(x, m), along, s.sub(s.mul(w, dy), total)), y)
                ),
            }
            if !dw.is_empty() {
                let y = &mut *dw;
                each_vector!(s, y, [y, dy, x], s.fma(s.mul(dy, s.sub(x, m)), inv, y));
            }
        }
    }
}

struct Gelu<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
}

impl Kernel for Gelu<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (y, x) = (self.y, self.x);
        each_vector!(s, y, [x], gelu(s, x));
    }
}

struct GeluBackward<'a> {
    dx: &'a mut [f32],
    dy: &'a [f32],
    x: &'a [f32],
}

impl Kernel for GeluBackward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (y, dy, x) = (self.dx, self.dy, self.x);
        each_vector!(s, y, [dy, x], s.mul(dy, gelu_slope(s, x)));
    }
}

struct AddScaled<'a> {
    y: &'a mut [f32],
    x: &'a [f32],
    w: &'a [f32],
}

impl Kernel for AddScaled<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let w = self.w;
        for (y, x) in self.y.chunks_exact_mut(w.len()).zip(self.x.chunks_exact(w.len())) {
            each_vector!(s, y, [y, x, w], s.fma(x, w, y));
        }
    }
}

struct AddScaledBackward<'a> {
    dx: &'a mut [f32],
    /// Empty where it is not wanted.
    dw: &'a mut [f32],
    dy: &'a [f32],
    x: &'a [f32],
    w: &'a [f32],
}

impl Kernel for AddScaledBackward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { dx, dw, dy, x, w } = self;
        let d = w.len();
        for ((y, dy), x) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)) {
            each_vector!(s, y, [dy, w], s.mul(dy, w));
            if !dw.is_empty() {
                let y = &mut *dw;
                each_vector!(s, y, [y, dy, x], s.fma(dy, x, y));
            }
        }
    }
}
