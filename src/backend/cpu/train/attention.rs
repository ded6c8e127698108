//! Attention of a training pass, by blocks of queries (Dao 2023, arXiv:2307.08691): all scores of a block's queries and the keys they
//! may see are one product, and so is each gradient. The query heads that share a key head are rows of one product.

use std::cell::RefCell;
use std::sync::PoisonError;

use half::bf16;

use super::super::Cpu;
use super::super::gemm::{Operand, Shape, gemm, rounds};
use super::super::lanes::math::exp;
use super::super::lanes::{Kernel, Simd, dispatch};
use super::super::logits::greatest;
use super::super::rows::{check_equal, each_vector};
use crate::backend::{AttnSpec, Visible, Write};
use crate::error::{Result, ensure};

/// Rows of a block.
const BLOCK: usize = 64;
/// Sums that the gradients of keys and values are made of, at most.
const PARTS: usize = 8;

#[derive(Default)]
struct Room {
    q: Vec<f32>,
    dy: Vec<f32>,
    p: Vec<f32>,
    s: Vec<f32>,
    y: Vec<f32>,
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// The first `n` elements of a buffer that grows.
fn first(v: &mut Vec<f32>, n: usize) -> &mut [f32] {
    if v.len() < n {
        v.resize(n, 0.0);
    }
    &mut v[..n]
}

/// The rows that any row of `block` sees.
fn hull(visible: &Visible, block: std::ops::Range<usize>) -> std::ops::Range<usize> {
    let seen = || block.clone().map(|i| visible.row(i));
    let first = seen().filter_map(|r| r.first()).map(|r| r[0]).min().unwrap_or(0);
    let end = seen().filter_map(|r| r.last()).map(|r| r[1]).max().unwrap_or(0);
    first as usize..end as usize
}

/// Which queries of a key head and which keys a block's products are about.
struct Block<'a> {
    spec: &'a AttnSpec,
    visible: &'a Visible,
    /// First row and rows.
    at: usize,
    rows: usize,
    kv_head: usize,
    keys: std::ops::Range<usize>,
}

impl Block<'_> {
    fn group(&self) -> usize {
        self.spec.heads / self.spec.kv_heads
    }

    /// Rows of the products: the group's heads, one after the other.
    fn m(&self) -> usize {
        self.group() * self.rows
    }

    fn n(&self) -> usize {
        self.keys.len()
    }

    /// Where head g of the group stands in row i of the block, in a matrix that begins with the block's rows.
    fn column(&self, g: usize, i: usize) -> usize {
        i * self.spec.q_dim() + (self.kv_head * self.group() + g) * self.spec.head_dim
    }

    /// The group's heads of the block's rows, head after head.
    fn gather(&self, to: &mut [f32], from: &[f32]) {
        let d = self.spec.head_dim;
        for (r, to) in to.chunks_exact_mut(d).enumerate() {
            to.copy_from_slice(&from[self.column(r / self.rows, r % self.rows)..][..d]);
        }
    }

    fn scatter(&self, to: &mut [f32], from: &[f32]) {
        let d = self.spec.head_dim;
        for (r, from) in from.chunks_exact(d).enumerate() {
            to[self.column(r / self.rows, r % self.rows)..][..d].copy_from_slice(from);
        }
    }

    /// Keys or values of the block from their first on; rows are `kv_dim` apart.
    fn of<'x>(&self, x: &'x [f32]) -> &'x [f32] {
        &x[self.keys.start * self.spec.kv_dim() + self.kv_head * self.spec.head_dim..]
    }

    /// What row i of the block sees, counted from the block's first key.
    fn seen(&self, i: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
        let first = self.keys.start;
        self.visible.row(self.at + i).iter().map(move |r| r[0] as usize - first..r[1] as usize - first)
    }
}

impl Cpu {
    fn check_attention(
        &self,
        rows: usize,
        q: usize,
        k: usize,
        v: usize,
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        visible.check(rows)?;
        ensure!(spec.kv_heads > 0 && spec.heads.is_multiple_of(spec.kv_heads), Shape, "attend: {spec:?}");
        check_equal("attend: queries", q, rows * spec.q_dim())?;
        check_equal("attend: keys", k, rows * spec.kv_dim())?;
        check_equal("attend: values", v, rows * spec.kv_dim())
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn attend_rows(
        &self,
        y: &mut [f32],
        lse: &mut [f32],
        q: &[f32],
        k: &[f32],
        v: &[f32],
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        let (rows, d, kv) = (lse.len() / spec.heads, spec.head_dim, spec.kv_dim());
        self.check_attention(rows, q.len(), k.len(), v.len(), visible, spec)?;
        check_equal("attend: outputs", y.len(), q.len())?;
        let width = spec.q_dim();
        let mut blocks: Vec<_> = y.chunks_mut(BLOCK * width).zip(lse.chunks_mut(BLOCK * spec.heads)).collect();
        self.pool().run_chunks(&mut blocks, 1, |i, b| {
            for (y, lse) in b {
                let (at, n) = (i * BLOCK, lse.len() / spec.heads);
                let keys = hull(visible, at..at + n);
                for kv_head in 0..spec.kv_heads {
                    let b = Block { spec, visible, at, rows: n, kv_head, keys: keys.clone() };
                    ROOM.with_borrow_mut(|room| {
                        let (m, n) = (b.m(), b.n());
                        let queries = first(&mut room.q, m * d);
                        b.gather(queries, &q[at * width..]);
                        let p = first(&mut room.p, m * n);
                        let (a, keys) =
                            (Operand::Rows { x: queries, stride: d }, Operand::Rows { x: b.of(k), stride: kv });
                        self.product([m, n, d], p, n, Write::Set, spec.scale, a, keys);
                        for (r, p) in p.chunks_exact_mut(n).enumerate() {
                            let l = dispatch(self.tier(), Softmax { p, block: &b, row: r % b.rows });
                            lse[r % b.rows * spec.heads + kv_head * b.group() + r / b.rows] = l;
                        }
                        let out = first(&mut room.y, m * d);
                        let (a, values) = (Operand::Rows { x: p, stride: n }, Operand::Cols { x: b.of(v), stride: kv });
                        self.product([m, d, n], out, d, Write::Set, 1.0, a, values);
                        b.scatter(y, out);
                    });
                }
            }
        });
        Ok(())
    }

    /// A product of known shapes inside of a task.
    #[allow(clippy::too_many_arguments)]
    fn product(
        &self,
        [m, n, k]: [usize; 3],
        c: &mut [f32],
        stride: usize,
        write: Write,
        scale: f32,
        a: Operand<'_>,
        b: Operand<'_>,
    ) {
        gemm(&self.gemm_cx(), Shape { m, n, k }, c, stride, write, scale, a, b).expect("shapes that were checked");
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn attend_rows_bwd(
        &self,
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
        dy: &[f32],
        y: &[f32],
        lse: &[f32],
        q: &[f32],
        k: &[f32],
        v: &[f32],
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        let (rows, width, kv) = (lse.len() / spec.heads, spec.q_dim(), spec.kv_dim());
        self.check_attention(rows, q.len(), k.len(), v.len(), visible, spec)?;
        for n in [dq.len(), dy.len(), y.len()] {
            check_equal("attend_bwd: queries", n, q.len())?;
        }
        check_equal("attend_bwd: keys", dk.len(), k.len())?;
        check_equal("attend_bwd: values", dv.len(), k.len())?;
        // Block i adds to part i mod PARTS of the sums over queries; parts are added in order, so that threads change nothing.
        let parts = rows.div_ceil(BLOCK).min(PARTS);
        let mut buffer = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = first(&mut buffer, 2 * parts * k.len());
        type Blocks<'a> = Vec<(usize, &'a mut [f32])>;
        let mut work: Vec<(Blocks<'_>, &mut [f32])> =
            sums.chunks_mut(2 * k.len().max(1)).map(|s| (Vec::new(), s)).collect();
        for (i, dq) in dq.chunks_mut(BLOCK * width).enumerate() {
            work[i % parts].0.push((i * BLOCK, dq));
        }
        self.pool().run_chunks(&mut work, 1, |_, w| {
            for (blocks, sums) in w {
                sums.fill(0.0);
                let (dk, dv) = sums.split_at_mut(k.len());
                for (at, dq) in blocks {
                    let (at, n) = (*at, dq.len() / width);
                    let keys = hull(visible, at..at + n);
                    for kv_head in 0..spec.kv_heads {
                        let b = Block { spec, visible, at, rows: n, kv_head, keys: keys.clone() };
                        let first = b.keys.start * kv + kv_head * spec.head_dim;
                        let rest = [&q[at * width..], &dy[at * width..], &y[at * width..], &lse[at * spec.heads..]];
                        self.block_bwd(&b, dq, &mut dk[first..], &mut dv[first..], rest, k, v);
                    }
                }
            }
        });
        for (to, side) in [(dk, 0), (dv, 1)] {
            let n = to.len();
            self.pool().run_chunks(to, 16 * 1024, |i, to| {
                to.fill(0.0);
                for part in 0..parts {
                    let from = &sums[(2 * part + side) * n + i * 16 * 1024..][..to.len()];
                    to.iter_mut().zip(from).for_each(|(t, f)| *t += f);
                }
            });
        }
        Ok(())
    }

    /// `rest`: q, dy, y and lse from the block's first row on.
    #[allow(clippy::too_many_arguments)]
    fn block_bwd(
        &self,
        b: &Block<'_>,
        dq: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
        rest: [&[f32]; 4],
        k: &[f32],
        v: &[f32],
    ) {
        let [q, dy, y, lse] = rest;
        let (m, n, d, kv, spec) = (b.m(), b.n(), b.spec.head_dim, b.spec.kv_dim(), b.spec);
        ROOM.with_borrow_mut(|room| {
            let Room { q: qs, dy: dys, p, s, y: ys } = room;
            let (qs, dys, ys) = (first(qs, m * d), first(dys, m * d), first(ys, m * d));
            b.gather(qs, q);
            b.gather(dys, dy);
            b.gather(ys, y);
            // As its products round it: else what must cancel in a row's sum of gradients would not.
            if rounds(self.tier(), self.compute()) {
                dys.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
            }
            let (p, s) = (first(p, m * n), first(s, m * n));
            let (qs, dys) = (Operand::Rows { x: qs, stride: d }, &*dys);
            let dy = Operand::Rows { x: dys, stride: d };
            self.product([m, n, d], p, n, Write::Set, spec.scale, qs, Operand::Rows { x: b.of(k), stride: kv });
            self.product([m, n, d], s, n, Write::Set, 1.0, dy, Operand::Rows { x: b.of(v), stride: kv });
            for (r, (p, s)) in p.chunks_exact_mut(n).zip(s.chunks_exact_mut(n)).enumerate() {
                let lse = lse[r % b.rows * spec.heads + b.kv_head * b.group() + r / b.rows];
                let (y, dy) = (&ys[r * d..][..d], &dys[r * d..][..d]);
                dispatch(self.tier(), Gradient { p, s, y, dy, lse, scale: spec.scale, block: b, row: r % b.rows });
            }
            let (ds, transposed) = (Operand::Rows { x: s, stride: n }, Operand::Cols { x: s, stride: n });
            self.product([m, d, n], ys, d, Write::Set, 1.0, ds, Operand::Cols { x: b.of(k), stride: kv });
            b.scatter(dq, ys);
            let Operand::Rows { x: qs, .. } = qs else { unreachable!("made above") };
            self.product([n, d, m], dk, kv, Write::Add, 1.0, transposed, Operand::Cols { x: qs, stride: d });
            let (p, dys) = (Operand::Cols { x: p, stride: n }, Operand::Cols { x: dys, stride: d });
            self.product([n, d, m], dv, kv, Write::Add, 1.0, p, dys);
        });
    }
}

/// Scores to probabilities; returns the logarithm of the denominator.
struct Softmax<'a> {
    p: &'a mut [f32],
    block: &'a Block<'a>,
    row: usize,
}

impl Kernel for Softmax<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let Self { p, block, row } = self;
        let mut max = f32::NEG_INFINITY;
        for r in block.seen(row) {
            max = max.max(greatest(s, &p[r]));
        }
        let (mut at, mut acc, top) = (0, s.splat(0.0), s.splat(max));
        for r in block.seen(row) {
            p[at..r.start].fill(0.0);
            at = r.end;
            let y = &mut p[r];
            each_vector!(s, y, [y], exp(s, s.sub(y, top)));
            for x in y.chunks(S::N) {
                acc = s.add(acc, if x.len() == S::N { s.load(x) } else { s.load_part(x, 0.0) });
            }
        }
        p[at..].fill(0.0);
        let sum = s.sum(acc);
        let inverse = s.splat(1.0 / sum);
        let y = p;
        each_vector!(s, y, [y], s.mul(y, inverse));
        max + sum.ln()
    }
}

/// From scores p and products s = dy.v: p becomes probabilities, s the scores' gradients.
struct Gradient<'a> {
    p: &'a mut [f32],
    s: &'a mut [f32],
    y: &'a [f32],
    dy: &'a [f32],
    lse: f32,
    scale: f32,
    block: &'a Block<'a>,
    row: usize,
}

impl Kernel for Gradient<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { p, s: ds, y, dy, lse, scale, block, row } = self;
        let mut products = s.splat(0.0);
        for (y, dy) in y.chunks(S::N).zip(dy.chunks(S::N)) {
            let load = |v: &[f32]| if v.len() == S::N { s.load(v) } else { s.load_part(v, 0.0) };
            products = s.fma(load(y), load(dy), products);
        }
        let delta = s.sum(products);
        let (lse, delta, scale) = (s.splat(lse), s.splat(delta), s.splat(scale));
        let mut at = 0;
        for r in block.seen(row) {
            p[at..r.start].fill(0.0);
            ds[at..r.start].fill(0.0);
            at = r.end;
            let (y, x) = (&mut p[r.clone()], &mut ds[r]);
            each_vector!(s, y, [y], exp(s, s.sub(y, lse)));
            let (y, p) = (x, &*y);
            each_vector!(s, y, [y, p], s.mul(s.mul(p, s.sub(y, delta)), scale));
        }
        p[at..].fill(0.0);
        ds[at..].fill(0.0);
    }
}
