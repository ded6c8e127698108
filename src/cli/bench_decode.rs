//! `quadriga bench decode`: prefill, decode and the cost of n rows, beside the bandwidth and the arithmetic that bound them.

use std::time::Instant;

use serde_json::{Map, json};

use super::bench_adapters;
use super::flags::{BenchDecodeArgs, Common, DeviceFlag, weights_type};
use super::out::{self, median, round};
use crate::backend::cpu::bandwidth::read_bandwidth;
use crate::backend::cpu::{Compute, Cpu, Tier};
use crate::backend::cuda::{self, Cuda};
use crate::backend::{Mask, TreeMask};
use crate::bench::peaks::fma_peak;
use crate::bench::shapes::{RandomModel, Shape};
use crate::engine::{Engine, Generate};
use crate::error::{Context, Result, bail};
use crate::model::ModelConfig;
use crate::rng::Rng;

/// Row counts of the passes that are timed.
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Nodes of the binary tree whose verification is timed.
const TREE: usize = 32;

/// The engine of a model of known sizes with random weights of one type.
fn of_shape(common: &Common, shape: &str, args: &BenchDecodeArgs) -> Result<Engine> {
    let (shape, dtype) = (Shape::named(shape)?, weights_type(&args.weights)?);
    let model = RandomModel::new(shape.config(), [dtype; 2], common.seed).context(|| shape.name.into())?;
    let on_gpu = match common.device {
        DeviceFlag::Auto => common.tier.is_none() && cuda::available(),
        DeviceFlag::Cuda => true,
        DeviceFlag::Cpu => false,
        DeviceFlag::Naive => bail!(Unsupported, "--shape runs on --device cpu or cuda"),
    };
    let kv_bytes = if on_gpu || common.compute() == Compute::Fast { 2.0 } else { 4.0 };
    let c = shape.config();
    let kv = kv_bytes * (2 * c.layers * c.kv_dim()) as f64 * args.context as f64 / 1e9;
    let weights = model.bytes()? as f64 / 1e9;
    let (free, whose) =
        if on_gpu { (Some(cuda::free_memory(0)?), "the GPU's ") } else { (out::available_memory(), "") };
    if let Some(free) = free.map(|n| n as f64 / 1e9).filter(|free| weights + kv > *free) {
        bail!(
            Capacity,
            "{} needs {weights:.1} GB for weights in {dtype} and {kv:.1} GB for a context of {}; {free:.1} GB of {whose}memory are free",
            shape.name,
            args.context
        );
    }
    Engine::from_tensors(&model, common.options()?)
}

/// Floating-point operations of one token of a prompt: all matrices but the vocabulary's, attention's own left out.
fn prompt_flops(c: &ModelConfig) -> f64 {
    2.0 * (c.macs_per_token() - (c.hidden * c.vocab) as f64)
}

pub(super) fn run(common: &Common, args: &BenchDecodeArgs) -> Result<()> {
    let most = args.prompt_tokens.max(args.new_tokens + 1).max(args.depth + 64);
    if args.reps == 0 || args.prompt_tokens == 0 || args.new_tokens == 0 || args.depth == 0 || most > args.context {
        bail!(Usage, "every count must be at least 1, and {most} tokens must fit into --context {}", args.context);
    }
    let (engine, name) = match &args.shape {
        Some(shape) => (of_shape(common, shape, args)?, format!("{shape} in {}, random", args.weights)),
        None => (common.engine()?, common.model.clone()),
    };
    let vocab = engine.config().vocab;
    let mut session = engine.session(args.context, common.seed)?;
    let mut rng = Rng::new(common.seed);
    let mut random = |n: usize| -> Vec<u32> { (0..n).map(|_| rng.below(vocab) as u32).collect() };

    let time = |f: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        let start = Instant::now();
        f()?;
        Ok(start.elapsed().as_secs_f64())
    };
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for rep in 0..=args.reps {
        session.truncate(0);
        session.push_ids(&random(args.prompt_tokens))?;
        let p = time(&mut || session.prefill())?;
        session.truncate(0);
        session.push_ids(&random(1))?;
        session.prefill()?;
        let how = Generate::default().max_tokens(args.new_tokens + 1).ignore_eos(true);
        let mut running = session.generate(how)?;
        // The first token costs no pass: it falls out of the prompt.
        running.next().transpose()?;
        let d = time(&mut || running.try_for_each(|p| p.map(drop)))?;
        // The first round warms caches and clocks.
        if rep > 0 {
            prefill.push(args.prompt_tokens as f64 / p);
            decode.push(args.new_tokens as f64 / d);
        }
    }
    session.truncate(0);
    session.push_ids(&random(args.depth))?;
    session.prefill()?;
    let parents: Vec<u32> = (0..TREE as u32).map(|i| if i == 0 { TreeMask::ROOT } else { (i - 1) / 2 }).collect();
    let tree = TreeMask::new(&parents)?;
    let passes: Vec<(usize, Mask<'_>)> =
        ROWS.map(|n| (n, Mask::Causal)).into_iter().chain([(TREE, Mask::Tree(&tree))]).collect();
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); passes.len()];
    for _ in 0..args.reps.max(3) * 2 {
        // Sizes alternate, so that a slow moment of the machine hits all alike.
        for (&(n, mask), times) in passes.iter().zip(&mut times) {
            let tokens = random(n);
            times.push(time(&mut || session.pass(&tokens, mask))? * 1e3);
        }
    }
    let adapted = match args.adapters {
        0 => None,
        _ => Some(bench_adapters::measure(&engine, args, common.seed)?),
    };
    let peak = out::peak_rss_mb();
    // Last, since its half gigabyte must not count as ours.
    let (read, products, kind) = match engine.threads() {
        0 => {
            let roofs = Cuda::open(0)?.roofs()?;
            (roofs.memory, roofs.bf16, "bf16")
        }
        threads => {
            let cpu = Cpu::with(threads, common.tier().unwrap_or_else(Tier::detect), common.compute());
            (read_bandwidth(cpu.pool(), 512 << 20)?, fma_peak(&cpu), "f32")
        }
    };

    let (prefill, decode) = (median(prefill), median(decode));
    let roof = decode * engine.bytes_per_token() as f64 / read;
    let prefill_flops = prefill * prompt_flops(engine.config());
    let mut ms: Vec<f64> = times.into_iter().map(median).collect();
    let tree_ms = ms.pop().unwrap_or(f64::NAN);
    if common.json {
        let forward: Map<_, _> = ROWS.iter().zip(&ms).map(|(n, t)| (n.to_string(), json!(round(*t, 4)))).collect();
        let mut report = json!({
            "model": name,
            "device": engine.device(),
            "threads": engine.threads(),
            "load_s": round(engine.load_seconds(), 4),
            "peak_rss_mb": peak.map(|m| round(m, 1)),
            "weights_bytes": engine.weight_bytes(),
            "read_gb_s": round(read / 1e9, 2),
            "prefill_tokens_per_s": round(prefill, 1),
            "decode_tokens_per_s": round(decode, 2),
            "decode_roof_fraction": round(roof, 4),
            "forward_ms": forward,
            "tree_ms": {TREE.to_string(): round(tree_ms, 4)},
            "prefill_tflop_s": round(prefill_flops / 1e12, 4),
            "matrix_tflop_s": {kind: round(products / 1e12, 4)},
        });
        if let (Some(adapted), Some(report)) = (&adapted, report.as_object_mut()) {
            report.insert("adapters".into(), adapted.json());
        }
        return out::print_json(&report);
    }
    let mut text = format!(
        "{} on {}\nload {:.3} s, peak memory {:.0} MB, weights {:.1} MB\n\
         memory reads at {:.1} GB/s, {kind} multiplies and adds at {:.3} TFLOP/s\n\
         prefill {} tokens  {prefill:8.1} tok/s  ({:.3} TFLOP/s)\ndecode {} tokens   {decode:8.1} tok/s  ({:.0} % of the bandwidth)\n",
        name,
        engine.device(),
        engine.load_seconds(),
        peak.unwrap_or(f64::NAN),
        engine.weight_bytes() as f64 / 1e6,
        read / 1e9,
        products / 1e12,
        args.prompt_tokens,
        prefill_flops / 1e12,
        args.new_tokens,
        100.0 * roof,
    );
    for (n, t) in ROWS.iter().zip(&ms) {
        text += &format!("pass of {n:2} rows at {}  {t:8.2} ms  {:5.2}x one row\n", args.depth, t / ms[0]);
    }
    text += &format!("tree of {TREE:2} rows at {}  {tree_ms:8.2} ms  {:5.2}x one row\n", args.depth, tree_ms / ms[0]);
    text += &adapted.map_or(String::new(), |a| a.to_string());
    out::print(&text)
}
