//! `quadriga bench kernels`: every operation of the table beside the roof that bounds it.

use serde_json::json;

use super::flags::{BenchKernelsArgs, Common, DeviceFlag, weights_type};
use super::out::{self, round};
use crate::backend::cpu::{Compute, Cpu, Tier};
use crate::backend::cuda::{Cuda, CudaPeaks};
use crate::backend::{Backend, Train};
use crate::bench::peaks::CpuPeaks;
use crate::bench::training::{PreparedTrain, TrainOp, TrainSetup, lists};
use crate::bench::{Case, Op, Prepared, Setup, ops};
use crate::dtype::DType;
use crate::engine::default_threads;
use crate::error::{Result, bail, ensure};
use crate::perf::{Cost, Peaks};

/// Weights that rows rotate over, beyond any cache of a small machine, and several times that of a GPU.
const WORKING_SET: usize = 128 << 20;
const CUDA_WORKING_SET: usize = 256 << 20;
/// Below this a row is as much the start of a job on the pool as its work.
const SMALL_S: f64 = 2e-6;
/// Fraction of the roof below which a row is marked.
const GOOD: f64 = 0.6;

/// The roofs that an operation stands under on one device.
pub(super) trait Roofs {
    /// Those of an operation when its weights or cached rows are (`cold`) or are not read from memory, and what the
    /// first is called.
    fn of(&self, arithmetic: Arithmetic, cold: bool) -> (Peaks, &'static str);
}

/// What an operation may compute in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Arithmetic {
    F32,
    /// Its operands may be rounded to int8.
    Int8,
    /// It is a product of large matrices.
    Matrix,
}

/// [`CpuPeaks`] as they apply to the ways of computing.
struct CpuRoofs(CpuPeaks, Compute);

impl Roofs for CpuRoofs {
    fn of(&self, arithmetic: Arithmetic, cold: bool) -> (Peaks, &'static str) {
        let CpuRoofs(p, compute) = self;
        let (bytes_per_s, name) = if cold { (p.memory, "memory") } else { (p.cache, "cache") };
        let flops_per_s = match (compute, arithmetic) {
            (Compute::Fast, Arithmetic::Int8) => p.int8,
            (_, Arithmetic::Matrix) => p.matrix,
            _ => p.f32,
        };
        (Peaks { bytes_per_s, flops_per_s }, name)
    }
}

impl Roofs for CudaPeaks {
    fn of(&self, _: Arithmetic, _cold: bool) -> (Peaks, &'static str) {
        (Peaks { bytes_per_s: self.memory, flops_per_s: self.bf16 }, "memory")
    }
}

fn run_cuda(common: &Common, args: &BenchKernelsArgs) -> Result<()> {
    // Long passes by the attention that suits them: its figures are what other libraries' are compared with.
    let cuda = Cuda::open(0)?.fastest();
    let peaks = cuda.roofs()?;
    let device = format!("cuda {}", cuda.name());
    eprintln!("{device}: copies {:.1} GB/s, bf16 products {:.1} TFLOP/s", peaks.memory / 1e9, peaks.bf16 / 1e12);
    let setup = Setup { seed: common.seed, working_set: CUDA_WORKING_SET, kv_bytes: 2, ..Setup::default() };
    rows(inference(&cuda, setup, args)?, &device, &peaks, common.json, args)
}

pub(super) fn run(common: &Common, args: &BenchKernelsArgs) -> Result<()> {
    ensure!(args.samples > 0, Usage, "--samples must be at least 1");
    ensure!(common.threads <= 1024, Usage, "--threads {} is impossible: expected 0 to 1024", common.threads);
    match common.device {
        DeviceFlag::Cuda => return run_cuda(common, args),
        DeviceFlag::Naive => bail!(Unsupported, "bench kernels runs on --device cpu or cuda"),
        DeviceFlag::Auto | DeviceFlag::Cpu => {}
    }
    let tier = common.tier().unwrap_or_else(Tier::detect);
    ensure!(tier <= Tier::detect(), Unsupported, "this machine has no {tier} instructions");
    let threads = if common.threads == 0 { default_threads() } else { common.threads };
    let cpu = Cpu::with(threads, tier, common.compute());
    let peaks = CpuPeaks::measure(&cpu)?;
    let device = format!("cpu {tier} {threads} threads");
    eprintln!(
        "{device}: memory {:.1} GB/s, caches {:.1} GB/s, f32 {:.1} GFLOP/s, int8 {:.1} GOP/s (from f32), large products \
         {:.1} GFLOP/s",
        peaks.memory / 1e9,
        peaks.cache / 1e9,
        peaks.f32 / 1e9,
        peaks.int8 / 1e9,
        peaks.matrix / 1e9
    );
    if args.training {
        let setup = TrainSetup { seed: common.seed, working_set: WORKING_SET, ..TrainSetup::default() };
        return rows(training(&cpu, setup, args)?, &device, &CpuRoofs(peaks, common.compute()), common.json, args);
    }
    let kv_bytes = if common.compute() == Compute::Fast { 2 } else { 4 };
    let setup = Setup { seed: common.seed, working_set: WORKING_SET, kv_bytes, ..Setup::default() };
    rows(inference(&cpu, setup, args)?, &device, &CpuRoofs(peaks, common.compute()), common.json, args)
}

/// Seconds of some samples, the cost, and whether inputs were cold.
type Measured = (Vec<f64>, Cost, bool);

/// A row of either table, measured when its turn comes.
struct Entry<'a> {
    name: &'static str,
    shape: String,
    model: &'static str,
    arithmetic: Arithmetic,
    measure: Box<dyn FnOnce(usize) -> Result<Measured> + 'a>,
}

/// Seconds that a sample lasts.
const SAMPLE_S: f64 = 2e-3;

/// The cases that the flags ask for, with the types of weights that they ask for.
fn wanted<O: Copy + PartialEq>(
    cases: Vec<Case<O>>,
    args: &BenchKernelsArgs,
    name: fn(&O) -> &'static str,
    with_weights: fn(O, DType) -> O,
) -> Result<Vec<Case<O>>> {
    let named = |c: &Case<O>, f: &String| {
        let f = f.to_lowercase();
        name(&c.op).contains(&f) || c.model.to_lowercase().contains(&f)
    };
    let asked =
        |c: &Case<O>| (args.large || !c.large) && (args.filter.is_empty() || args.filter.iter().any(|f| named(c, f)));
    let mut cases: Vec<Case<O>> = cases.into_iter().filter(asked).collect();
    let (filter, large) = (args.filter.join(","), if args.large { "" } else { " (--large has more)" });
    ensure!(!cases.is_empty(), Usage, "no kernel or model has `{filter}` in its name{large}");
    if let Some(weights) = &args.weights {
        let dtype = weights_type(weights)?;
        cases.iter_mut().for_each(|c| c.op = with_weights(c.op, dtype));
        // What differed by its type alone is the same now.
        let all = std::mem::take(&mut cases);
        all.into_iter().for_each(|c| {
            if !cases.contains(&c) {
                cases.push(c)
            }
        });
    }
    Ok(cases)
}

/// The operations of [`Backend`].
fn inference<'a, B: Backend>(be: &'a B, setup: Setup, args: &BenchKernelsArgs) -> Result<Vec<Entry<'a>>> {
    let cases = wanted(ops::realistic(), args, Op::name, Op::with_weights)?;
    let entries = cases.into_iter().map(|Case { op, model, .. }| Entry {
        name: op.name(),
        shape: op.to_string(),
        model,
        arithmetic: if op.multiplies_quantized() { Arithmetic::Int8 } else { Arithmetic::F32 },
        measure: Box::new(move |samples| {
            let mut p = Prepared::new(be, op, setup)?;
            Ok((p.time(samples, SAMPLE_S)?, p.cost(), p.is_cold()))
        }),
    });
    Ok(entries.collect())
}

/// The operations of [`Train`].
fn training<'a, B: Train>(be: &'a B, setup: TrainSetup, args: &BenchKernelsArgs) -> Result<Vec<Entry<'a>>> {
    let cases = wanted(lists::realistic(), args, TrainOp::name, TrainOp::with_weights)?;
    let entries = cases.into_iter().map(|Case { op, model, .. }| Entry {
        name: op.name(),
        shape: op.to_string(),
        model,
        arithmetic: if op.multiplies_matrices() { Arithmetic::Matrix } else { Arithmetic::F32 },
        measure: Box::new(move |samples| {
            let mut p = PreparedTrain::new(be, op, setup)?;
            Ok((p.time(samples, SAMPLE_S)?, p.cost(), p.is_cold()))
        }),
    });
    Ok(entries.collect())
}

/// Measures and prints row by row, so that a reader sees that something happens.
fn rows(entries: Vec<Entry<'_>>, device: &str, roofs: &impl Roofs, json: bool, args: &BenchKernelsArgs) -> Result<()> {
    if !json {
        out::print(&format!(
            "{:14} {:32} {:>22} {:>8} {:>8}  {:8} {:>5}  verdict\n",
            "kernel", "shape", "µs (p10-p90)", "GB/s", "GFLOP/s", "bound", "roof"
        ))?;
    }
    let (mut model, mut best) = ("", 0.0f64);
    for Entry { name, shape, model: of, arithmetic, measure } in entries {
        if !json && of != model {
            model = of;
            out::print(&format!("{model}\n"))?;
        }
        let (mut seconds, cost, cold) = measure(args.samples)?;
        seconds.sort_by(f64::total_cmp);
        let (peaks, first) = roofs.of(arithmetic, cold);
        let row = Row::new(&seconds, cost, peaks, first);
        best = best.max(row.roof);
        out::print(&if json { row.json([name, &shape, of, device]) } else { row.text(name, &shape) })?;
    }
    if best > 1.1 {
        eprintln!(
            "a row reached {:.0} % of its roof: the machine was busier while the roofs were measured",
            100.0 * best
        );
    }
    Ok(())
}

/// One line of the table.
struct Row {
    seconds: [f64; 3],
    cost: Cost,
    bound: &'static str,
    roof: f64,
    floor: f64,
}

impl Row {
    fn new(sorted: &[f64], cost: Cost, peaks: Peaks, first: &'static str) -> Self {
        let at = |q: f64| sorted[((sorted.len() - 1) as f64 * q).round() as usize];
        let (floor, by_bytes) = peaks.floor(cost);
        let seconds = [at(0.1), at(0.5), at(0.9)];
        Self { seconds, cost, bound: if by_bytes { first } else { "compute" }, roof: floor / seconds[1], floor }
    }

    fn verdict(&self) -> &'static str {
        match self.roof {
            r if r >= GOOD => "",
            _ if self.floor < SMALL_S => "small",
            _ => "below 60 %",
        }
    }

    fn text(&self, name: &str, shape: &str) -> String {
        let [p10, median, p90] = self.seconds;
        let spread = format!("{:.1} ({:.1}-{:.1})", median * 1e6, p10 * 1e6, p90 * 1e6);
        let line = format!(
            "{name:14} {shape:32} {spread:>22} {:8.2} {:8.2}  {:8} {:4.0}%  {}",
            self.cost.bytes / median / 1e9,
            self.cost.flops / median / 1e9,
            self.bound,
            100.0 * self.roof,
            self.verdict()
        );
        format!("{}\n", line.trim_end())
    }

    fn json(&self, [kernel, shape, model, device]: [&str; 4]) -> String {
        let [p10, median, p90] = self.seconds.map(|s| round(s * 1e6, 3));
        let value = json!({
            "kernel": kernel,
            "shape": shape,
            "model": model,
            "device": device,
            "us": median,
            "p10": p10,
            "p90": p90,
            "gb_s": round(self.cost.bytes / self.seconds[1] / 1e9, 3),
            "gflop_s": round(self.cost.flops / self.seconds[1] / 1e9, 3),
            "bound": self.bound,
            "roof_fraction": round(self.roof, 4),
        });
        format!("{value}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::naive::Naive;

    #[test]
    fn a_row_knows_its_roof() {
        let peaks = Peaks { bytes_per_s: 1e9, flops_per_s: 1e9 };
        let row = Row::new(&[1e-3, 2e-3, 3e-3], Cost { bytes: 1e6, flops: 1e3 }, peaks, "memory");
        assert_eq!((row.bound, row.roof, row.verdict()), ("memory", 0.5, "below 60 %"));
        let row = Row::new(&[1e-6], Cost { bytes: 1.0, flops: 100.0 }, peaks, "memory");
        assert_eq!((row.bound, row.verdict()), ("compute", "small"));
    }

    #[test]
    fn operations_of_training_are_rows() {
        let filter = vec!["column_sums".into(), "zero".into(), "scatter".into()];
        let args = BenchKernelsArgs { filter, large: false, training: false, weights: None, samples: 2 };
        let entries = training(&Naive, TrainSetup::default(), &args).unwrap();
        assert_eq!(entries.iter().map(|e| e.name).collect::<Vec<_>>(), ["scatter_rows", "zero", "column_sums"]);
        for e in entries {
            let (seconds, cost, cold) = (e.measure)(args.samples).unwrap();
            assert!(seconds.len() == 2 && seconds.iter().all(|s| *s > 0.0) && cost.bytes > 0.0 && !cold);
            assert_eq!(e.model, "SmolLM2-135M");
        }
        let args = BenchKernelsArgs { filter: vec!["rope".into()], ..args };
        assert!(training(&Naive, TrainSetup::default(), &args).is_err(), "no such operation");
    }
}
