//! Every operation of training on every backend, at odd sizes, against the f64 specification. The rule is that of
//! `tests/kernels.rs`: the greatest error is at most twice that of the specification re-run on inputs (and outputs) rounded to
//! the types in which the backend keeps them, plus a term of f32 rounding that grows with the root of the longest sum.

mod common;

use std::collections::BTreeMap;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Ranks, Train, Write};
use quadriga::bench::Storage;
use quadriga::bench::training::{PreparedTrain, TrainOp, TrainSetup, lists};
use quadriga::dtype::DType;

/// In which types a backend keeps the operands of its products.
#[derive(Clone, Copy)]
struct Kept {
    /// Both operands of `linear_*`: activations or their gradients, and the matrix.
    linear: Storage,
    /// Both operands of `lora_*`.
    lora: Storage,
    /// Queries, keys, values and the gradient of what attention gives; probabilities too, where it is bf16.
    attention: Storage,
}

fn output<B: Train>(be: &B, op: TrainOp, setup: TrainSetup) -> Vec<Vec<f64>> {
    let mut p = PreparedTrain::new(be, op, setup).unwrap();
    p.run().unwrap();
    p.output().unwrap()
}

fn size(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}

fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    // A NaN must not pass as a small error.
    let errors = a.iter().zip(b).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    errors.fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
}

/// What is wrong with one operation on `be`, and its greatest error in parts of the bound.
fn compare<B: Train>(be: &B, op: TrainOp, seed: u64, kept: Kept) -> (Vec<String>, f64) {
    let exact = TrainSetup { seed, act: Storage::of::<B::Act>(), ..TrainSetup::default() };
    let rounded = TrainSetup { linear: kept.linear, lora: kept.lora, attention: kept.attention, ..exact };
    let (want, got, again) = (output(&Naive, op, exact), output(be, op, exact), output(&Naive, op, rounded));
    let (mut failed, mut most) = (Vec::new(), 0.0f64);
    let greatest = want.iter().map(|w| size(w)).fold(0.0, f64::max);
    let zero = matches!(op, TrainOp::Zero { .. });
    assert!(want.len() == got.len() && (zero || greatest > 0.0), "{} {op} gives nothing to compare", op.name());
    for (i, ((want, got), again)) in want.iter().zip(&got).zip(&again).enumerate() {
        let mut stored: Vec<f32> = again.iter().map(|&x| x as f32).collect();
        // These results, of attention the second, are operands of products to come.
        let operand = matches!(op, TrainOp::LayerNorm { .. } | TrainOp::Gelu { .. });
        if operand || (matches!(op, TrainOp::Attend(_)) && i == 1) {
            exact.act.round(&mut stored, 1);
        }
        let again: Vec<f64> = stored.into_iter().map(f64::from).collect();
        // Some gradients are differences of terms that are as large as the other results.
        let norm = matches!(op, TrainOp::RmsNormBwd { dw: true, .. } | TrainOp::LayerNormBwd { dw: true, .. });
        let cancels = norm || matches!(op, TrainOp::AttendBwd(_));
        // Few values may all be small by chance, as sums of terms that are not: inputs are of size 1.
        let size = match size(want) {
            _ if cancels => greatest,
            s if want.len() < 8 => s.max(1.0),
            s => s,
        };
        let ulps = 8.0 * (op.reduction() as f64).sqrt() * f64::from(f32::EPSILON) * size;
        // Probabilities, and what becomes of them, are multiplied in the type of queries; the specification cannot be asked to
        // round them.
        let p = if op.attn().is_some() && kept.attention == Storage::BF16 { size / 512.0 } else { 0.0 };
        let (error, bound) = (worst(want, got), 2.0 * worst(want, &again) + ulps + p);
        if error.is_nan() || error > bound {
            let name = op.name();
            failed.push(format!("{name} {op} [{i}]: error {error:.3e}, bound {bound:.3e}, greatest {size:.3e}"));
        }
        if error > 0.0 {
            most = most.max(error / bound);
        }
    }
    (failed, most)
}

/// Checks the whole table on `be`; the greatest error of each operation, in parts of its bound, is printed.
fn check<B: Train>(name: &str, be: &B, kept: Kept) {
    let (mut failed, mut most_of) = (Vec::new(), BTreeMap::<&str, f64>::new());
    for (i, op) in lists::odd().into_iter().enumerate() {
        let (wrong, most) = compare(be, op, i as u64, kept);
        failed.extend(wrong);
        let of = most_of.entry(op.name()).or_default();
        *of = of.max(most);
    }
    let all: Vec<String> = most_of.iter().map(|(op, most)| format!("{op} {most:.2}")).collect();
    println!("{name}: errors in parts of their bounds: {}", all.join(", "));
    assert!(failed.is_empty(), "{name}: {} results fail\n{}", failed.len(), failed.join("\n"));
}

const F32: Kept = Kept { linear: Storage::F32, lora: Storage::F32, attention: Storage::F32 };

const BF16: Kept = Kept { linear: Storage::BF16, lora: Storage::BF16, attention: Storage::BF16 };

/// Every backend under test with what it keeps. Further backends are listed here.
#[test]
fn backends_meet_the_specification() {
    check("naive", &Naive, F32);
    // Threads change no bit (tests/backward.rs), so one number of them is enough.
    for tier in Tier::available() {
        check(&format!("cpu {tier} exact"), &Cpu::with(3, tier, Compute::Exact), F32);
        // There are instructions for bf16 where there is AVX-512; all products are made of them.
        let kept = if tier == Tier::Avx512 { BF16 } else { F32 };
        check(&format!("cpu {tier} fast"), &Cpu::with(3, tier, Compute::Fast), kept);
    }
}

#[test]
fn cuda_meets_the_specification_of_training() {
    let Some(cuda) = common::gpu() else { return };
    check("cuda", &cuda, Kept { linear: Storage::BF16, lora: Storage::F32, attention: Storage::BF16 });
}

/// The table has every operation of the trait, in both lists, and its rows run.
#[test]
fn the_table_is_whole() {
    let names = |ops: &[TrainOp]| ops.iter().map(TrainOp::name).collect::<std::collections::BTreeSet<_>>();
    let real: Vec<TrainOp> = lists::realistic().into_iter().map(|c| c.op).collect();
    assert_eq!((names(&lists::odd()).len(), names(&lists::odd())), (36, names(&real)));
    // The specification takes its time with the rest.
    for op in real {
        if matches!(op, TrainOp::Zero { .. } | TrainOp::GluBwd { .. } | TrainOp::Optimize { .. }) {
            let mut p = PreparedTrain::new(&Naive, op, TrainSetup::default()).unwrap();
            p.run().unwrap();
            assert!(p.output().unwrap().concat().iter().all(|x| x.is_finite()), "{} {op}", op.name());
            assert!(p.cost().bytes > 0.0);
        }
    }
}

/// Rounded operands change results by about as much as the type's spacing: that is what `check` allows.
#[test]
fn what_is_kept_decides_the_bound() {
    let bf16 =
        TrainSetup { linear: Storage::BF16, lora: Storage::BF16, attention: Storage::BF16, ..TrainSetup::default() };
    let mut changed = std::collections::BTreeSet::new();
    for op in lists::odd() {
        let (want, rounded) = (output(&Naive, op, TrainSetup::default()), output(&Naive, op, bf16));
        let error = want.iter().zip(&rounded).map(|(w, r)| worst(w, r) / size(w).max(1.0)).fold(0.0, f64::max);
        assert!(error < 0.05, "{} {op}: {error}", op.name());
        if error > 0.0 {
            changed.insert(op.name());
        }
    }
    let products = |name: &str| ["linear", "lora", "attend", "set_weight"].iter().any(|p| name.starts_with(p));
    assert!(changed.iter().all(|name| products(name)), "{changed:?}");
    assert_eq!(changed.len(), 14, "{changed:?}");
}

/// Known costs of known sizes; the specification keeps everything in f64.
#[test]
fn costs_are_those_of_the_definition() {
    let cost = |op| {
        let c = PreparedTrain::new(&Naive, op, TrainSetup::default()).unwrap().cost();
        (c.bytes, c.flops)
    };
    assert_eq!(cost(TrainOp::Axpy { n: 5 }), (120.0, 10.0));
    let dw = TrainOp::LinearBwdW { rows: 3, input: 10, output: 20 };
    assert_eq!(cost(dw), (8.0 * (400.0 + 30.0 + 60.0), 1200.0));
    let (dtype, rows, input, output) = (DType::F32, 3, 10, 20);
    let (part, write) = (Ranks { stride: 9, first: 4, n: 5 }, Write::Set);
    let fused = TrainOp::LinearLoraFwd { dtype, rows, input, output, part, write };
    assert_eq!(cost(fused), (8.0 * (200.0 + 30.0 + 60.0 + 15.0 + 100.0), 2.0 * (600.0 + 300.0)));
    let fused = TrainOp::LinearsBwdX { dtype, rows, input, output, linears: 2, ranks: 5 };
    assert_eq!(cost(fused), (8.0 * (400.0 + 30.0 + 120.0 + 15.0 + 50.0), 2.0 * (1200.0 + 150.0)));
    let shrink = TrainOp::LoraShrink { groups: &[2, 3], input: 10, ranks: 4 };
    assert_eq!(cost(shrink), (8.0 * (50.0 + 20.0 + 80.0), 400.0));
}
