//! Whole decodings of tiny LLaDA and Dream models against an independent numpy implementation (`scripts/diffusion_decoders.py`).

use std::sync::Arc;

use quadriga::backend::Train;
use quadriga::backend::naive::Naive;
use quadriga::diffusion::{Cache, Choose, Denoise, Job, ModelDenoiser, Rank, RowStat, Schedule, Settings, decode};
use quadriga::format::Checkpoint;
use quadriga::model::Model;
use serde_json::Value;

use super::common;

/// Notes what each pass computes: its first position, and the rows that the cache has afterwards.
struct Watched<D> {
    inner: D,
    passes: Vec<(usize, usize, usize)>,
}

impl<D: Denoise> Denoise for Watched<D> {
    fn run(&mut self, jobs: &[Job<'_>]) -> quadriga::Result<Vec<Vec<RowStat>>> {
        for j in jobs {
            self.passes.push((j.pass.spans[0].start, j.pass.past, j.pass.past + j.pass.keep));
        }
        self.inner.run(jobs)
    }
}

fn settings(t: &Value) -> Settings {
    let number = |key: &str| t[key].as_f64().unwrap();
    let at = t["threshold"].as_f64().unwrap_or(0.0) as f32;
    let best = t["rule"] == "llada";
    let percent = |key: &str| (100.0 * number(key)).round() as u32;
    let sequential = Settings { add: 100, activate: 100, ..Settings::default() };
    let threshold = |by, best| Choose::Threshold { by, at, best, every: false };
    let base = match t["decoder"].as_str().unwrap() {
        "quota" => {
            let steps = t["steps"].as_u64().unwrap() as usize;
            Settings { choose: Choose::Quota { steps, by: Rank::Confidence }, ..sequential }
        }
        "confidence" => Settings { choose: threshold(Rank::Confidence, false), ..sequential },
        "entropy" => Settings { choose: threshold(Rank::Entropy, true), ..sequential },
        "multi_block" | "cached" => Settings {
            choose: threshold(Rank::Entropy, best),
            add: percent("add"),
            activate: percent("act"),
            ..Settings::default()
        },
        other => panic!("{other}"),
    };
    let cache = match t["delay"].as_u64() {
        Some(delay) => Cache::Delayed { delay, refresh: t["refresh"].as_u64().filter(|r| *r > 0) },
        None => Cache::None,
    };
    Settings { block: t["block"].as_u64().unwrap() as usize, cache, early_stop: t["eos"].is_u64(), ..base }
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

fn check<B: Train>(be: B, name: &str, least: f64) -> usize {
    let folder = common::root().join("models").join(name);
    let source = Checkpoint::open(&folder).unwrap();
    let golden: Value = serde_json::from_slice(&std::fs::read(folder.join("golden.json")).unwrap()).unwrap();
    let model = Arc::new(Model::load(Arc::new(be), &source, |_, _| {}).unwrap());
    let shift = usize::from(source.config().diffusion.unwrap().shift);
    let mut checked = 0;
    for (i, t) in golden["traces"].as_array().unwrap().iter().enumerate() {
        if t["margin"].as_f64().unwrap() < least {
            continue;
        }
        let place = format!("{name}, trace {i} ({} in blocks of {})", t["decoder"], t["block"]);
        let mut cfg = model.config().clone();
        cfg.eos = t["eos"].as_u64().map_or_else(|| cfg.eos.clone(), |e| vec![e as u32]);
        let prompt = ids(&golden["prompts"][t["prompt"].as_str().unwrap()]);
        let new = t["new"].as_u64().unwrap() as usize;
        let mut texts = [Schedule::new(&cfg, settings(t), &prompt, new).unwrap()];
        let inner = ModelDenoiser::new(model.clone(), 1, prompt.len() + new).unwrap();
        let (mut watched, mut said) = (Watched { inner, passes: Vec::new() }, Vec::new());
        decode(&mut watched, &mut texts, &mut |_, _, commits| {
            said.push(commits.iter().map(|c| [c.position as u64, u64::from(c.token)]).collect::<Vec<_>>());
            Ok(())
        })
        .unwrap();
        let expected: Vec<Vec<[u64; 2]>> = serde_json::from_value(t["passes"].clone()).unwrap();
        assert_eq!(said, expected, "{place}");
        assert_eq!(texts[0].tokens()[prompt.len()..], ids(&t["output"]), "{place}");
        for (q, pass) in t["queries"].as_array().into_iter().flatten().zip(&watched.passes) {
            let (kind, first, cached) =
                (q[0].as_str().unwrap(), q[1].as_u64().unwrap(), q[2].as_u64().unwrap() as usize);
            // Of a shifted model the last cached position's row is never kept.
            let rows = if cached > 0 { cached - shift } else { 0 };
            let kept = if kind == "cached" { pass.1 } else { pass.2 };
            assert_eq!((pass.0 as u64, kept), (first, rows), "{place}: {q}");
        }
        checked += 1;
    }
    checked
}

#[test]
fn decodings_are_those_of_the_reference() {
    for name in ["tiny-llada", "tiny-dream"] {
        assert_eq!(check(Naive, name, 0.0), 38);
    }
}

/// On every tier, where no decision is closer than the fast products' rounding.
#[test]
fn decodings_on_the_cpu_are_too() {
    for name in ["tiny-llada", "tiny-dream"] {
        for cpu in common::cpus() {
            assert!(check(cpu, name, 0.0) == 38);
        }
    }
}

#[test]
fn decodings_on_cuda_are_too() {
    if let Some(gpu) = common::gpu() {
        // Operands are bf16 there.
        assert!(check(gpu, "tiny-dream", 0.035) > 0);
    }
}
