//! `quadriga bench decode`: prefill, decode and the cost of n rows, beside the bandwidth that bounds them.

use std::time::Instant;

use serde_json::{Map, json};

use super::flags::{BenchDecodeArgs, Common};
use super::out::{self, median, round};
use crate::backend::cpu::bandwidth::read_bandwidth;
use crate::backend::cpu::pool::Pool;
use crate::backend::cuda::Cuda;
use crate::engine::Generate;
use crate::error::{Result, bail};
use crate::rng::Rng;

/// Row counts of the passes that are timed.
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

pub(super) fn run(common: &Common, args: &BenchDecodeArgs) -> Result<()> {
    let most = args.prompt_tokens.max(args.new_tokens + 1).max(args.depth + 64);
    if args.reps == 0 || args.prompt_tokens == 0 || args.new_tokens == 0 || args.depth == 0 || most > args.context {
        bail!(Usage, "every count must be at least 1, and {most} tokens must fit into --context {}", args.context);
    }
    let (engine, name) = match &args.shape {
        Some(shape) => (common.engine_of_shape(shape, &args.weights)?, format!("{shape} in {}, random", args.weights)),
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
    let mut rows: Vec<Vec<f64>> = vec![Vec::new(); ROWS.len()];
    for _ in 0..args.reps.max(3) * 2 {
        // Sizes alternate, so that a slow moment of the machine hits all alike.
        for (i, &n) in ROWS.iter().enumerate() {
            let tokens = random(n);
            rows[i].push(time(&mut || session.pass(&tokens))? * 1e3);
        }
    }
    let peak = out::peak_rss_mb();
    // Last, since its half gigabyte must not count as ours.
    let read = match engine.threads() {
        0 => Cuda::open(0)?.peaks(1 << 30, 1 << 10)?.memory,
        threads => read_bandwidth(&Pool::new(threads), 512 << 20)?,
    };

    let (prefill, decode) = (median(prefill), median(decode));
    let roof = decode * engine.bytes_per_token() as f64 / read;
    let ms: Vec<f64> = rows.into_iter().map(median).collect();
    if common.json {
        let forward: Map<_, _> = ROWS.iter().zip(&ms).map(|(n, t)| (n.to_string(), json!(round(*t, 4)))).collect();
        return out::print_json(&json!({
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
        }));
    }
    let mut text = format!(
        "{} on {}\nload {:.3} s, peak memory {:.0} MB, weights {:.1} MB, memory reads at {:.1} GB/s\n\
         prefill {} tokens  {prefill:8.1} tok/s\ndecode {} tokens   {decode:8.1} tok/s  ({:.0} % of the bandwidth)\n",
        name,
        engine.device(),
        engine.load_seconds(),
        peak.unwrap_or(f64::NAN),
        engine.weight_bytes() as f64 / 1e6,
        read / 1e9,
        args.prompt_tokens,
        args.new_tokens,
        100.0 * roof,
    );
    for (n, t) in ROWS.iter().zip(&ms) {
        text += &format!("pass of {n:2} rows at {}  {t:8.2} ms  {:5.2}x one row\n", args.depth, t / ms[0]);
    }
    out::print(&text)
}
