//! Every operation of the table on every backend, at odd sizes, against the f64 specification.
//!
//! The rule: the greatest error is at most twice that of the specification re-run on inputs (and outputs) rounded to the
//! types in which the backend keeps them, plus a term of f32 rounding that grows with the root of the longest sum. "Kept"
//! includes int8 activations per block of 32 where a fast CPU product rounds them so, and f16 keys and values.

mod common;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Ranks};
use quadriga::bench::{Op, Output, Prepared, Setup, Storage, ops};
use quadriga::dtype::DType;

/// In which types a backend keeps what it works on.
#[derive(Clone, Copy)]
struct Kept {
    /// Operands of products with quantised matrices.
    quantized: Storage,
    /// Operands of products with BF16 matrices.
    bf16: Storage,
    /// Keys and values.
    kv: Storage,
    /// Queries in the products of attention.
    q: Storage,
}

fn output<B: Backend>(be: &B, op: Op, setup: Setup) -> Output {
    let mut p = Prepared::new(be, op, setup).unwrap();
    p.run().unwrap();
    p.output().unwrap()
}

fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    // A NaN must not pass as a small error.
    a.iter()
        .zip(b)
        .map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() })
        .fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
}

fn nmse(want: &[f64], got: &[f64]) -> f64 {
    let error: f64 = want.iter().zip(got).filter(|(a, b)| a != b).map(|(a, b)| (a - b).powi(2)).sum();
    error / finite(want).map(|x| x * x).sum::<f64>().max(f64::MIN_POSITIVE)
}

/// Without -inf, which logits may be and must then be everywhere.
fn finite(x: &[f64]) -> impl Iterator<Item = &f64> {
    x.iter().filter(|x| **x != f64::NEG_INFINITY)
}

/// Checks the whole table on `be`; the greatest NMSE of each operation is printed.
fn check<B: Backend>(name: &str, be: &B, kept: Kept) {
    let act = Storage::of::<B::Act>();
    let mut nmse_of: std::collections::BTreeMap<&str, f64> = Default::default();
    let mut failed = Vec::new();
    for (i, op) in ops::odd().into_iter().enumerate() {
        let exact = Setup { seed: i as u64, act, ..Setup::default() };
        let rounded = Setup {
            act: match op {
                _ if op.multiplies_quantized() => kept.quantized,
                _ if op.dtype() == Some(DType::BF16) => kept.bf16,
                _ => act,
            },
            kv: kept.kv,
            q: kept.q,
            ..exact
        };
        let (want, got) = (output(&Naive, op, exact), output(be, op, exact));
        let again = output(&Naive, op, rounded);
        assert!(!(want.values.is_empty() && want.ids.is_empty()), "{} {op} gives nothing to compare", op.name());
        if want.ids != got.ids {
            failed.push(format!("{} {op}: {:?}, not {:?}", op.name(), got.ids, want.ids));
        }
        for ((want, got), mut again) in want.values.into_iter().zip(got.values).zip(again.values) {
            let mut stored: Vec<f32> = again.iter().map(|&x| x as f32).collect();
            if op.gives_operands() {
                act.round(&mut stored, 1);
            }
            again = stored.into_iter().map(f64::from).collect();

            let size = finite(&want).fold(0.0f64, |m, x| m.max(x.abs()));
            let ulps = 8.0 * (op.reduction() as f64).sqrt() * f64::from(f32::EPSILON) * size;
            // Probabilities are multiplied in the type of queries; the specification cannot be asked to round them.
            let weights = if op.attn().is_some() && kept.q == Storage::BF16 { size / 512.0 } else { 0.0 };
            let (error, bound) = (worst(&want, &got), 2.0 * worst(&want, &again) + ulps + weights);
            assert!(size > 0.0, "{} {op} gives nothing to compare", op.name());
            if error.is_nan() || error > bound {
                let name = op.name();
                failed.push(format!("{name} {op}: error {error:.3e}, bound {bound:.3e}, greatest value {size:.3e}"));
            }
            let n = nmse_of.entry(op.name()).or_default();
            *n = n.max(nmse(&want, &got));
        }
    }
    println!("{name}: NMSE {}", nmse_of.iter().map(|(k, v)| format!("{k} {v:.1e}")).collect::<Vec<_>>().join(", "));
    assert!(failed.is_empty(), "{name}: {} rows fail\n{}", failed.len(), failed.join("\n"));
}

/// A fused operation gives the bits of the operations it stands for; a gated product may take its activation function from
/// another implementation, so it has the last bits free.
fn fused_equals_composed<B: Backend>(name: &str, be: &B) {
    for (i, op) in ops::odd().into_iter().enumerate() {
        let fused = matches!(op, Op::AddRmsNorm { .. } | Op::Qkv { .. } | Op::LinearGlu { .. } | Op::RopeStage(_));
        if !fused && !matches!(op, Op::KvCommitBatch(_)) {
            continue;
        }
        let setup = Setup { seed: i as u64, act: Storage::of::<B::Act>(), ..Setup::default() };
        let mut p = Prepared::new(be, op, setup).unwrap();
        p.run_composed().unwrap();
        let (fused, composed) = (output(be, op, setup).values.concat(), p.output().unwrap().values.concat());
        let size = composed.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let free = if matches!(op, Op::LinearGlu { .. }) { 4.0 * f64::from(f32::EPSILON) * size } else { 0.0 };
        let error = worst(&composed, &fused);
        assert!(error <= free, "{name}: {} {op} differs from its composition by {error:.3e}", op.name());
    }
}

/// Every backend under test with its name and what it keeps. Further backends are listed here.
fn cpus(compute: Compute) -> impl Iterator<Item = (String, Cpu)> {
    let both = Tier::available().flat_map(|tier| [1, 3].map(|threads| (tier, threads)));
    both.map(move |(tier, threads)| {
        (format!("cpu {tier} {compute:?} {threads} threads"), Cpu::with(threads, tier, compute))
    })
}

#[test]
fn cpu_exact_meets_the_specification() {
    for (name, cpu) in cpus(Compute::Exact) {
        let kept = Kept { quantized: Storage::F32, bf16: Storage::F32, kv: Storage::F32, q: Storage::F32 };
        check(&name, &cpu, kept);
    }
}

#[test]
fn cpu_fast_meets_the_specification() {
    for (name, cpu) in cpus(Compute::Fast) {
        // There are instructions for bf16 where there is AVX-512.
        let bf16 = if cpu.tier() == Tier::Avx512 { Storage::BF16 } else { Storage::F32 };
        check(&name, &cpu, Kept { quantized: Storage::Int8, bf16, kv: Storage::F16, q: Storage::F32 });
    }
}

#[test]
fn cuda_meets_the_specification() {
    let Some(cuda) = common::gpu() else { return };
    let kept = Kept { quantized: Storage::BF16, bf16: Storage::BF16, kv: Storage::BF16, q: Storage::BF16 };
    check("cuda", &cuda, kept);
    fused_equals_composed("cuda", &cuda);
    check("cuda, fastest", &cuda.fastest(), kept);
}

/// The generated checks name the kernel, the argument and the rule.
#[test]
fn cuda_refuses_what_breaks_a_contract() {
    use quadriga::backend::Buffer;
    let Some(cuda) = common::gpu() else { return };
    let (x, w) = (cuda.alloc::<f32>(24).unwrap(), cuda.alloc::<f32>(8).unwrap());
    let mut y = cuda.alloc(24).unwrap();
    let short = cuda.rms_norm(y.head_mut(16), x.head(24), &w, 1e-5).unwrap_err().to_string();
    assert_eq!(short, "RmsNorm: y must be 24 elements long, and is 16");
    let negative = cuda.rms_norm(y.head_mut(24), x.head(24), &w, -1.0).unwrap_err().to_string();
    assert_eq!(negative, "RmsNorm: eps must be >= 0, and is -1");
    cuda.rms_norm(y.head_mut(24), x.head(24), &w, 1e-5).unwrap();
}

/// The roofs and a timed row on the GPU: small on an emulated one, whose times mean nothing.
#[test]
fn cuda_is_timed() {
    let Some(cuda) = common::gpu() else { return };
    let peaks = cuda.peaks(1 << 20, 4).unwrap();
    assert!(peaks.memory > 0.0 && peaks.bf16 > 0.0 && peaks.bf16.is_finite());
    // Three copies of the matrix; all batches but the first two are graphs, so that even a busy machine, where a batch is one call,
    // has some.
    let op = Op::Linear { dtype: DType::BF16, rows: 1, input: 64, output: 64, bias: false };
    let mut p = Prepared::new(&cuda, op, Setup { working_set: 3 * 64 * 64 * 2, ..Setup::default() }).unwrap();
    assert!(p.time(8, 5e-3).unwrap().iter().all(|s| *s > 0.0));
    assert!(cuda.graph_stats().replayed >= 3);
}

#[test]
fn fused_operations_equal_their_compositions() {
    fused_equals_composed("naive", &Naive);
    for (name, cpu) in cpus(Compute::Exact).chain(cpus(Compute::Fast)) {
        fused_equals_composed(&name, &cpu);
    }
}

#[test]
fn realistic_operations_run_and_cost_something() {
    let cpu = Cpu::with(2, Tier::detect(), Compute::Fast);
    for case in ops::realistic().into_iter().filter(|c| !c.large) {
        let mut p = Prepared::new(&cpu, case.op, Setup { kv_bytes: 2, ..Setup::default() }).unwrap();
        p.run().unwrap();
        let infinite = p.output().unwrap().values.concat().iter().filter(|x| !x.is_finite()).count();
        let want = if let Op::Forbid { rows, each, .. } = case.op { rows * each } else { 0 };
        assert_eq!(infinite, want, "{} {}", case.op.name(), case.op);
        assert!(p.cost().bytes > 0.0);
    }
}

/// The table itself: known costs of known sizes.
#[test]
fn costs_are_those_of_the_definition() {
    let cost = |op| Prepared::new(&Naive, op, Setup::default()).unwrap().cost();
    let linear = cost(Op::Linear { dtype: DType::F32, rows: 3, input: 10, output: 20, bias: false });
    // The specification keeps everything in f64.
    assert_eq!((linear.bytes, linear.flops), (8.0 * (200.0 + 30.0 + 60.0), 1200.0));
    let add = cost(Op::Add { rows: 2, d: 5 });
    assert_eq!((add.bytes, add.flops), (240.0, 10.0));
    // The group without rows reads nothing.
    let groups = &[2, 0, 1];
    let shrink = cost(Op::ShrinkRows { groups, input: 10, ranks: 4 });
    assert_eq!((shrink.bytes, shrink.flops), (8.0 * (30.0 + 12.0 + 2.0 * 40.0), 240.0));
    // y is read and written, and only the part of h is read.
    let expand = cost(Op::ExpandRows { groups, output: 10, part: Ranks { stride: 9, first: 3, n: 4 } });
    assert_eq!((expand.bytes, expand.flops), (8.0 * (60.0 + 12.0 + 2.0 * 40.0), 240.0));
}
