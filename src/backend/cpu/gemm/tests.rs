//! Every kernel and kind of operand against f64, and elements against themselves in other company.

use half::bf16;

use super::super::matmul::tests::{inputs, pack, tensor};
use super::*;
use crate::dtype::DType;
use crate::error::ErrorKind;
use crate::rng::Rng;

/// The kernels that this machine runs.
fn paths() -> Vec<Path> {
    let mut paths: Vec<Path> =
        Tier::available().flat_map(|t| [Compute::Exact, Compute::Fast].map(|c| Path::of(t, c))).collect();
    if Tier::detect() == Tier::Avx512 {
        paths.push(Path::Bf16);
    }
    paths.dedup();
    paths
}

/// `f(kernel, pool)` for every kernel, on one thread and on three.
fn settings(mut f: impl FnMut(Path, GemmCx<'_>)) {
    let scratch = GemmScratch::default();
    for pool in [Pool::new(1), Pool::new(3)] {
        for path in paths() {
            f(path, GemmCx { pool: &pool, tier: path.tier(), compute: Compute::Exact, scratch: &scratch });
        }
    }
}

/// A value as the kernel sees it.
fn seen(path: Path, x: f32) -> f64 {
    if path.halves() { bf16::from_f32(x).to_f64() } else { x as f64 }
}

/// An operand of `[lanes, k]` and its values, row-major.
enum Kept {
    Plain(Vec<f32>, usize, bool),
    Weight(Box<PackedWeight>, bool),
}

impl Kept {
    fn plain(lanes: usize, k: usize, cols: bool, seed: u64) -> (Self, Vec<f32>) {
        let (lines, width) = if cols { (k, lanes) } else { (lanes, k) };
        let stride = width + 3;
        let mut x = inputs(lines, stride, seed);
        x.truncate((lines - 1) * stride + width);
        let value = |at: usize| if cols { x[at % k * stride + at / k] } else { x[at / k * stride + at % k] };
        let values = (0..lanes * k).map(value).collect();
        (Self::Plain(x, stride, cols), values)
    }

    fn weight(dtype: DType, lanes: usize, k: usize, transposed: bool) -> (Self, Vec<f32>) {
        let (rows, cols) = if transposed { (k, lanes) } else { (lanes, k) };
        let t = tensor(dtype, rows, cols, 3);
        let w = t.to_f32();
        let values = (0..lanes * k).map(|at| if transposed { w[at % k * cols + at / k] } else { w[at] }).collect();
        (Self::Weight(Box::new(pack(&t)), transposed), values)
    }

    fn operand(&self) -> Operand<'_> {
        match self {
            Self::Plain(x, stride, false) => Operand::Rows { x, stride: *stride },
            Self::Plain(x, stride, true) => Operand::Cols { x, stride: *stride },
            Self::Weight(w, false) => Operand::Weight(w),
            Self::Weight(w, true) => Operand::WeightT(w),
        }
    }
}

/// Both stores, with a stride and a scale, against sums in f64.
fn agrees(what: &str, (m, n, k): (usize, usize, usize), (a, av): &(Kept, Vec<f32>), (b, bv): &(Kept, Vec<f32>)) {
    let stride = n + 2;
    settings(|path, cx| {
        let (av, bv): (Vec<f64>, Vec<f64>) =
            (av.iter().map(|&x| seen(path, x)).collect(), bv.iter().map(|&x| seen(path, x)).collect());
        for (write, scale) in [(Write::Set, 1.0f32), (Write::Add, -0.75)] {
            let before = inputs(m, stride, 5);
            let mut c = before.clone();
            let term = Term { a: a.operand(), b: b.operand(), k };
            product(&cx, path, [m, n], &mut c[..(m - 1) * stride + n], stride, write, scale, &[term]);
            for (at, (&c, &before)) in c.iter().zip(&before).enumerate() {
                let (i, j) = (at / stride, at % stride);
                if j >= n {
                    assert!(c == before, "{what}, {path:?}: something between rows was overwritten");
                    continue;
                }
                let products = av[i * k..(i + 1) * k].iter().zip(&bv[j * k..]).map(|(a, b)| a * b);
                let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
                let old = if write == Write::Add { before as f64 } else { 0.0 };
                let (want, bound) = (old + scale as f64 * sum, 2e-6 * (size + old.abs()));
                assert!(
                    (c as f64 - want).abs() <= bound,
                    "{what}, {path:?}, {write:?}, {m} {n} {k}, ({i}, {j}): {c}, want {want} of size {size}"
                );
            }
        }
    });
}

const SHAPES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (5, 3, 2), (16, 48, 32), (33, 17, 65), (61, 130, 31), (70, 49, 400), (19, 35, 801)];

#[test]
fn products_of_activations_agree_with_f64() {
    for (m, n, k) in SHAPES {
        for cols in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b) = (Kept::plain(m, k, cols.0, 1), Kept::plain(n, k, cols.1, 2));
            agrees(&format!("columns {cols:?}"), (m, n, k), &a, &b);
        }
    }
}

#[test]
fn products_with_weights_agree_with_f64() {
    for dtype in DType::ALL {
        let shapes = match dtype.block_len() {
            1 => [(33, 17, 65), (70, 49, 31)],
            32 => [(33, 37, 96), (9, 70, 416)],
            _ => [(33, 37, 256), (9, 70, 512)],
        };
        for (m, out, inputs) in shapes {
            let (w, x) = (Kept::weight(dtype, out, inputs, false), Kept::plain(m, inputs, false, 1));
            agrees(&format!("{dtype}"), (m, out, inputs), &x, &w);
            agrees(&format!("{dtype} on the left"), (out, m, inputs), &w, &x);
            let (w, dy) = (Kept::weight(dtype, inputs, out, true), Kept::plain(m, out, false, 1));
            agrees(&format!("{dtype}, transposed"), (m, inputs, out), &dy, &w);
            agrees(&format!("{dtype}, transposed, on the left"), (inputs, m, out), &w, &dy);
        }
    }
}

#[test]
fn elements_do_not_depend_on_their_company() {
    let (m, n, k) = (301, 83, 1000);
    let (a, b) = (Kept::plain(m, k, false, 1).0, Kept::plain(n, k, true, 2).0);
    let Operand::Cols { x, stride } = b.operand() else { unreachable!() };
    let mut known: Vec<(Path, Vec<u32>)> = Vec::new();
    settings(|path, cx| {
        let mut c = vec![0.0; m * n];
        product(&cx, path, [m, n], &mut c, n, Write::Set, 0.3, &[Term { a: a.operand(), b: b.operand(), k }]);
        let bits: Vec<u32> = c.iter().map(|c| c.to_bits()).collect();
        match known.iter().find(|(p, _)| *p == path) {
            Some((_, known)) => assert!(*known == bits, "{path:?}: threads change the result"),
            None => known.push((path, bits.clone())),
        }
        // Fewer rows, other columns: another operand is shared, tiles begin elsewhere.
        for (m, first, n) in [(1, 0, n), (9, 40, 43), (40, 5, 33), (300, 1, 1), (65, 0, 64)] {
            let mut part = vec![0.0; m * n];
            let b = Operand::Cols { x: &x[first..], stride };
            product(&cx, path, [m, n], &mut part, n, Write::Set, 0.3, &[Term { a: a.operand(), b, k }]);
            for (at, c) in part.iter().enumerate() {
                let whole = bits[at / n * 83 + first + at % n];
                assert!(c.to_bits() == whole, "{path:?}: {m} rows, {n} columns from {first}, element {at}");
            }
        }
    });
}

#[test]
fn operands_are_rounded_to_the_nearest_even() {
    let x = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.0 / 256.0 + 1e-6, -1.0 - 5.0 / 256.0, 3e38, 1e-30];
    let want = [1.0, 1.0 + 4.0 / 256.0, 1.0 + 2.0 / 256.0, -1.0 - 4.0 / 256.0, bf16::from_f32(3e38).to_f32()];
    settings(|path, cx| {
        for b in [Operand::Rows { x: &x, stride: 1 }, Operand::Cols { x: &x, stride: 6 }] {
            let mut c = [0.0; 6];
            let one = Operand::Rows { x: &[1.0], stride: 1 };
            product(&cx, path, [1, 6], &mut c, 6, Write::Set, 1.0, &[Term { a: one, b, k: 1 }]);
            let same = if path.halves() { c[..5] == want } else { c == x };
            assert!(same, "{path:?}: {c:?}");
        }
    });
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (pool, scratch) = (Pool::new(1), GemmScratch::default());
    let cx = GemmCx { pool: &pool, tier: Tier::detect(), compute: Compute::Fast, scratch: &scratch };
    let w = pack(&tensor(DType::Q4_0, 8, 64, 1));
    let x = [0.0; 128];
    let rows = |n: usize, stride: usize| Operand::Rows { x: &x[..n], stride };
    let run = |n: usize, k: usize, c: usize, stride: usize, a, b| {
        let e = gemm(&cx, Shape { m: 2, n, k }, &mut [0.0; 16][..c], stride, Write::Set, 1.0, a, b).err()?;
        assert_eq!(e.kind(), ErrorKind::Shape);
        Some(e.to_string())
    };
    assert_eq!(run(8, 64, 16, 8, rows(128, 64), Operand::Weight(&w)), None);
    for (error, name) in [
        (run(8, 64, 15, 8, rows(128, 64), Operand::Weight(&w)), "c has 15 values"),
        (run(8, 64, 16, 7, rows(128, 64), Operand::Weight(&w)), "c has 16 values"),
        (run(8, 64, 16, 8, rows(127, 64), Operand::Weight(&w)), "a has 127 values"),
        (run(8, 64, 16, 8, rows(128, 63), Operand::Weight(&w)), "a has 128 values"),
        (run(8, 64, 16, 8, rows(128, 64), Operand::WeightT(&w)), "b is a weight (8, 64)"),
        (run(8, 0, 16, 8, rows(128, 64), Operand::Weight(&w)), "a product of 2 by 8"),
    ] {
        assert!(error.as_ref().is_some_and(|e| e.contains(name)), "{error:?}, expected {name}");
    }
}

/// Terms side by side are their sum: one after the other, within rounding; whatever the threads, the same bits.
#[test]
fn terms_add_up() {
    let mut rng = Rng::new(17);
    let (m, n) = (70, 45);
    let mut values = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
    let ks = [100, 8, 3, 900];
    let sides: Vec<_> = ks.iter().map(|k| (values(m * k), values(n * k))).collect();
    let terms: Vec<Term<'_>> = ks
        .iter()
        .zip(&sides)
        .map(|(&k, (a, b))| Term { a: Operand::Rows { x: a, stride: k }, b: Operand::Cols { x: b, stride: n }, k })
        .collect();
    let scratch = GemmScratch::default();
    for tier in Tier::available() {
        for compute in [Compute::Exact, Compute::Fast] {
            let mut all = Vec::new();
            for threads in [1, 3] {
                let pool = Pool::new(threads);
                let cx = GemmCx { pool: &pool, tier, compute, scratch: &scratch };
                let (mut together, mut apart) = (vec![f32::NAN; m * n], vec![0.0; m * n]);
                gemm_sum(&cx, [m, n], &mut together, n, Write::Set, &terms).unwrap();
                for t in &terms {
                    gemm(&cx, Shape { m, n, k: t.k }, &mut apart, n, Write::Add, 1.0, t.a, t.b).unwrap();
                }
                let worst = together.iter().zip(&apart).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(worst < 1e-3, "{tier} {compute:?}: {worst}");
                all.push(together);
            }
            assert!(all[0] == all[1], "{tier} {compute:?}: threads change bits");
        }
    }
    let pool = Pool::new(1);
    let cx = GemmCx { pool: &pool, tier: Tier::Portable, compute: Compute::Exact, scratch: &scratch };
    assert!(gemm_sum(&cx, [m, n], &mut vec![0.0; m * n], n, Write::Set, &[]).is_err());
}
