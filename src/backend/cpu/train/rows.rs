//! Backward of the ops that go row by row, and sums over rows. A sum over rows is one of sums over runs of [`RUN`] rows, in order:
//! the same on any number of threads.

use super::super::Cpu;
use super::super::lanes::math::exp;
use super::super::lanes::{Kernel, Simd, dispatch};
use super::super::pool::Pool;
use super::super::rows::{check_equal, check_rows, each_vector, inverse_rms};
use crate::backend::Write;
use crate::error::{Result, ensure};
use crate::model::config::Activation;

/// Rows that are summed by one task.
pub(super) const RUN: usize = 64;
/// Elements of one task of an elementwise op.
pub(super) const PART: usize = 16 * 1024;

/// to\[i\] += the i-th of the sums over runs, `[runs, to.len()]`.
pub(super) fn fold(to: &mut [f32], runs: &[f32]) {
    for run in runs.chunks_exact(to.len()) {
        to.iter_mut().zip(run).for_each(|(t, r)| *t += r);
    }
}

/// One task for each `n` elements of two slices of one length.
fn run_pairs(pool: &Pool, n: usize, y: &mut [f32], z: &mut [f32], f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync) {
    let mut parts: Vec<_> = y.chunks_mut(n).zip(z.chunks_mut(n)).collect();
    pool.run_chunks(&mut parts, 1, |i, p| p.iter_mut().for_each(|(y, z)| f(i * n, y, z)));
}

impl Cpu {
    pub(super) fn column_sums(&self, db: &mut [f32], dy: &[f32]) -> Result<()> {
        check_rows("column_sums", dy.len(), db.len())?;
        let d = db.len();
        let mut runs = vec![0.0; dy.len().div_ceil(RUN * d) * d];
        self.pool().run_chunks(&mut runs, d, |i, sum| {
            let dy = &dy[i * RUN * d..dy.len().min((i + 1) * RUN * d)];
            dispatch(self.tier(), Columns { sum, dy });
        });
        fold(db, &runs);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn rms_norm_bwd(
        &self,
        dx: &mut [f32],
        dw: Option<&mut [f32]>,
        dy: &[f32],
        x: &[f32],
        w: &[f32],
        eps: f32,
        write: Write,
    ) -> Result<()> {
        check_rows("rms_norm_bwd", x.len(), w.len())?;
        check_equal("rms_norm_bwd: dy and x", dy.len(), x.len())?;
        check_equal("rms_norm_bwd: dx and x", dx.len(), x.len())?;
        self.with_sums(dx, dw, w.len(), |at, dx, dw| {
            let r = at..at + dx.len();
            dispatch(self.tier(), NormBackward { dx, dw, dy: &dy[r.clone()], x: &x[r], w, eps, write });
        })
    }

    /// `f(first element, dx, sums)` for runs of rows of width `d`; the sums of all runs are added to `dw`, in order. They are empty
    /// where none are wanted.
    pub(super) fn with_sums(
        &self,
        dx: &mut [f32],
        dw: Option<&mut [f32]>,
        d: usize,
        f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
    ) -> Result<()> {
        let n = RUN * d;
        let mut runs = vec![0.0; if dw.is_some() { dx.len().div_ceil(n) * d } else { 0 }];
        let mut parts: Vec<_> = dx.chunks_mut(n).map(|dx| (dx, &mut [][..])).collect();
        parts.iter_mut().zip(runs.chunks_mut(d)).for_each(|(p, run)| p.1 = run);
        self.pool().run_chunks(&mut parts, 1, |i, p| p.iter_mut().for_each(|(dx, sums)| f(i * n, dx, sums)));
        if let Some(dw) = dw {
            check_equal("the gradient of a row's weights", dw.len(), d)?;
            fold(dw, &runs);
        }
        Ok(())
    }

    pub(super) fn glu_bwd(
        &self,
        dgate: &mut [f32],
        dup: &mut [f32],
        dz: &[f32],
        gate: &[f32],
        up: &[f32],
        act: Activation,
    ) -> Result<()> {
        for n in [dgate.len(), dup.len(), gate.len(), up.len()] {
            check_equal("glu_bwd", n, dz.len())?;
        }
        run_pairs(self.pool(), PART, dgate, dup, |at, dgate, dup| {
            let r = at..at + dgate.len();
            let (dz, gate, up) = (&dz[r.clone()], &gate[r.clone()], &up[r]);
            dispatch(self.tier(), GluBackward { dgate, dup, dz, gate, up, act });
        });
        Ok(())
    }

    pub(super) fn scatter(&self, dx: &mut [f32], dy: &[f32], rows: &[u32], scale: f32, d: usize) -> Result<()> {
        check_rows("scatter_rows", dx.len(), d)?;
        check_equal("scatter_rows", dy.len(), rows.len() * d)?;
        for (dy, &r) in dy.chunks_exact(d).zip(rows) {
            let at = r as usize * d;
            ensure!(at < dx.len(), Shape, "scatter_rows: row {r} of {}", dx.len() / d);
            dx[at..at + d].iter_mut().zip(dy).for_each(|(dx, dy)| *dx += scale * dy);
        }
        Ok(())
    }

    pub(super) fn axpy(&self, y: &mut [f32], a: f32, x: &[f32]) -> Result<()> {
        check_equal("axpy", y.len(), x.len())?;
        self.pool().run_chunks(y, PART, |i, y| {
            let x = &x[i * PART..][..y.len()];
            dispatch(self.tier(), Axpy { y, a, x });
        });
        Ok(())
    }

    /// Sums of runs in f64, then of those.
    pub(super) fn squares(&self, x: &[f32]) -> f64 {
        let mut sums = vec![0.0f64; x.len().div_ceil(PART)];
        let tier = self.tier();
        self.pool()
            .run_chunks(&mut sums, 1, |i, s| s[0] = dispatch(tier, Squares(&x[i * PART..x.len().min((i + 1) * PART)])));
        sums.iter().sum()
    }
}

struct Columns<'a> {
    sum: &'a mut [f32],
    dy: &'a [f32],
}

impl Kernel for Columns<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let y = self.sum;
        for x in self.dy.chunks_exact(y.len()) {
            each_vector!(s, y, [y, x], s.add(y, x));
        }
    }
}

struct Axpy<'a> {
    y: &'a mut [f32],
    a: f32,
    x: &'a [f32],
}

impl Kernel for Axpy<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (y, x, a) = (self.y, self.x, s.splat(self.a));
        each_vector!(s, y, [y, x], s.fma(a, x, y));
    }
}

struct Squares<'a>(&'a [f32]);

impl Kernel for Squares<'_> {
    type Out = f64;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        let mut sums = [0.0f64; 16];
        for x in self.0.chunks(16) {
            sums.iter_mut().zip(x).for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x));
        }
        sums.iter().sum()
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

/// sum w dy x of one row.
#[inline(always)]
fn dot3<S: Simd>(s: S, w: &[f32], dy: &[f32], x: &[f32]) -> f32 {
    let mut acc = [s.splat(0.0); 2];
    let each = w.chunks(2 * S::N).zip(dy.chunks(2 * S::N)).zip(x.chunks(2 * S::N));
    for ((w, dy), x) in each {
        let halves = w.chunks(S::N).zip(dy.chunks(S::N)).zip(x.chunks(S::N));
        for (acc, ((w, dy), x)) in acc.iter_mut().zip(halves) {
            let load = |v: &[f32]| if v.len() == S::N { s.load(v) } else { s.load_part(v, 0.0) };
            *acc = s.fma(s.mul(load(w), load(dy)), load(x), *acc);
        }
    }
    s.sum(s.add(acc[0], acc[1]))
}

impl Kernel for NormBackward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { dx, dw, dy, x, w, eps, write } = self;
        let d = w.len();
        for ((y, dy), x) in dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)) {
            let inv = inverse_rms(s, x, eps);
            let mean = dot3(s, w, dy, x) / d as f32;
            let (r, c) = (s.splat(inv), s.splat(inv * inv * inv * mean));
            match write {
                Write::Set => each_vector!(s, y, [w, dy, x], s.fnma(x, c, s.mul(r, s.mul(w, dy)))),
                Write::Add => each_vector!(s, y, [y, w, dy, x], s.add(y, s.fnma(x, c, s.mul(r, s.mul(w, dy))))),
            }
            if !dw.is_empty() {
                let y = &mut *dw;
                each_vector!(s, y, [y, dy, x], s.fma(s.mul(dy, x), r, y));
            }
        }
    }
}

struct GluBackward<'a> {
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
    dz: &'a [f32],
    gate: &'a [f32],
    up: &'a [f32],
    act: Activation,
}

impl Kernel for GluBackward<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { dgate, dup, dz, gate, up, act } = self;
        let one = s.splat(1.0);
        // Both activations are x sigmoid(t): t = x, or t = 2 sqrt(2/pi) (x + 0.044715 x^3) with slope t'.
        const C: f32 = 1.595_769;
        for i in (0..dz.len()).step_by(S::N) {
            let r = i..dz.len().min(i + S::N);
            let whole = r.len() == S::N;
            let load = |v: &[f32]| if whole { s.load(&v[r.clone()]) } else { s.load_part(&v[r.clone()], 0.0) };
            let (dz, x, up) = (load(dz), load(gate), load(up));
            let (t, slope) = match act {
                Activation::Silu => (x, one),
                Activation::GeluTanh => {
                    let square = s.mul(x, x);
                    let t = s.mul(x, s.fma(square, s.splat(C * 0.044_715), s.splat(C)));
                    (t, s.fma(square, s.splat(3.0 * C * 0.044_715), s.splat(C)))
                }
            };
            let sig = s.div(one, s.add(one, exp(s, s.sub(s.splat(0.0), t))));
            let value = s.mul(x, sig);
            let inner = s.mul(s.mul(value, s.sub(one, sig)), slope);
            let (g, u) = (s.mul(s.mul(dz, up), s.add(sig, inner)), s.mul(dz, value));
            if whole {
                s.store(g, &mut dgate[r.clone()]);
                s.store(u, &mut dup[r]);
            } else {
                s.store_part(g, &mut dgate[r.clone()]);
                s.store_part(u, &mut dup[r]);
            }
        }
    }
}

/// One task for each row.
pub(super) fn each_row<T: Send>(pool: &Pool, rows: &mut [T], f: impl Fn(usize, &mut T) + Sync) {
    pool.run_chunks(rows, 1, |i, row| row.iter_mut().for_each(|r| f(i, r)));
}
