//! What LoRA adapters beside the weights cost: `quadriga bench decode --adapters N`.

use std::fmt;
use std::time::Instant;

use serde_json::{Map, Value, json};

use super::flags::BenchDecodeArgs;
use super::out::{median, round};
use crate::engine::{Adapters, Engine, Generate, Lora, PoolOptions, ServingOptions};
use crate::error::Result;
use crate::model::lora::ModuleValues;
use crate::model::roles::Role;
use crate::rng::Rng;

/// Sequences of a batch.
const SEQUENCES: [usize; 3] = [1, 4, 8];
/// Who uses what, as the report calls it.
const WAYS: [&str; 3] = ["base", "one", "own"];

/// Tokens per second of all sequences together.
pub(super) struct Measured {
    adapters: usize,
    rank: usize,
    bytes: usize,
    rates: Vec<[f64; 3]>,
}

/// Decodes from contexts of one token: without adapters, all with the first, each with the next in turn.
///
/// # Errors
/// A rank that is impossible; no room; the device's.
pub(super) fn measure(engine: &Engine, args: &BenchDecodeArgs, seed: u64) -> Result<Measured> {
    let (cfg, rank) = (engine.config(), args.adapter_rank);
    let specs = Lora { rank, alpha: rank as f32, ..Lora::default() }.modules(cfg)?;
    let pool = engine.adapter_pool(PoolOptions::default())?;
    let mut rng = Rng::new(seed);
    let mut all = Vec::with_capacity(args.adapters);
    for number in 0..args.adapters {
        let values = |spec: &_| random(spec, cfg, &mut rng);
        let name = number.to_string();
        pool.insert(&name, &specs.iter().map(values).collect::<Vec<_>>())?;
        all.push(pool.get(&name)?);
    }
    let mut times = vec![[(); 3].map(|()| Vec::new()); SEQUENCES.len()];
    for rep in 0..=args.reps {
        // Ways alternate, so that a slow moment of the machine hits all alike; the first round warms caches and clocks.
        for (n, times) in SEQUENCES.into_iter().zip(&mut times) {
            for (way, times) in WAYS.iter().zip(times) {
                let own = |i: usize| match *way {
                    "base" => None,
                    "one" => all.first(),
                    _ => all.get(i % all.len()),
                };
                let rate = decode(engine, n, args.new_tokens, seed, own)?;
                if rep > 0 {
                    times.push(rate);
                }
            }
        }
    }
    let rates = times.into_iter().map(|t| t.map(median)).collect();
    Ok(Measured { adapters: args.adapters, rank, bytes: pool.usage().bytes, rates })
}

fn random(spec: &crate::model::lora::ModuleSpec, cfg: &crate::model::ModelConfig, rng: &mut Rng) -> ModuleValues {
    let [out, input] = Role::Layer(spec.layer, spec.role).shape(cfg).unwrap_or([0, 0]);
    let mut draw = |n: usize| (0..n).map(|_| 0.02 * (rng.uniform() - 0.5)).collect();
    ModuleValues { spec: *spec, a: draw(spec.rank * input), b: draw(out * spec.rank) }
}

/// Tokens per second of `n` sequences, of which number i uses `own(i)`.
fn decode<'a>(
    engine: &Engine,
    n: usize,
    tokens: usize,
    seed: u64,
    own: impl Fn(usize) -> Option<&'a Adapters>,
) -> Result<f64> {
    let mut serving = engine.serving(ServingOptions::default().sequences(n).context(tokens + 2))?;
    let vocab = engine.config().vocab;
    for i in 0..n {
        let how = Generate::default().max_tokens(tokens + 1).ignore_eos(true);
        let how = own(i).map_or(how.clone(), |a| how.adapters(a));
        serving.submit(&[(7 * i + 1) as u32 % vocab as u32], how, seed)?;
    }
    // The first token comes with reading the prompt.
    serving.step()?;
    let (start, mut made) = (Instant::now(), 0);
    while serving.pending() != (0, 0) {
        made += serving.step()?.iter().flat_map(|r| &r.pieces).filter(|p| p.id.is_some()).count();
    }
    Ok(made as f64 / start.elapsed().as_secs_f64())
}

impl Measured {
    /// For `--json`: tokens per second for each number of sequences.
    pub fn json(&self) -> Value {
        let row = |r: &[f64; 3]| WAYS.iter().zip(r).map(|(w, x)| (w.to_string(), json!(round(*x, 2)))).collect();
        let rates = SEQUENCES.iter().zip(&self.rates).map(|(n, r)| (n.to_string(), Value::Object(row(r))));
        json!({
            "count": self.adapters,
            "rank": self.rank,
            "bytes": self.bytes,
            "tokens_per_s": rates.collect::<Map<_, _>>(),
        })
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n, mb) = (self.adapters, self.bytes as f64 / 1e6);
        writeln!(f, "{n} adapters of rank {} on all linears, {mb:.1} MB", self.rank)?;
        for (n, [base, one, own]) in SEQUENCES.iter().zip(&self.rates) {
            writeln!(
                f,
                "{n:2} sequences  base {base:8.1} tok/s  one adapter {one:8.1} ({:.2}x)  each its own {own:8.1} ({:.2}x)",
                one / base,
                own / base
            )?;
        }
        Ok(())
    }
}
