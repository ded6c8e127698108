//! Adapters by name: loaded beside decoding, used in one batch, bounded, counted, and gone when they are gone.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use quadriga::decode::Sampler;
use quadriga::engine::{
    AdapterStats, Adapters, Device, DraftKind, Engine, EngineOptions, Generate, PoolOptions, ServingOptions,
    Speculation,
};
use quadriga::format::peft::{PeftAdapter, PeftTensor};
use quadriga::model::config::ModelConfig;
use quadriga::model::roles::{LayerRole, Role};
use quadriga::rng::Rng;

const TOKENS: usize = 12;

fn model() -> PathBuf {
    common::root().join("models/tiny-llama")
}

fn engine(device: Device) -> Engine {
    Engine::open_with(model(), EngineOptions::default().device(device).threads(2)).unwrap()
}

/// A folder of an adapter of this rank on q, v and down.
fn write(folder: &Path, cfg: &ModelConfig, rank: usize, seed: u64) {
    let mut rng = Rng::new(seed);
    let roles = [LayerRole::Q, LayerRole::V, LayerRole::Down];
    let tensor = |(layer, module): (usize, LayerRole)| {
        let [out, input] = Role::Layer(layer, module).shape(cfg).unwrap();
        let mut draw = |n: usize| (0..n).map(|_| rng.normal() * 0.4).collect::<Vec<f32>>();
        PeftTensor { layer, module, rank, alpha: rank as f32, a: draw(rank * input), b: draw(out * rank) }
    };
    let tensors = (0..cfg.layers).flat_map(|l| roles.map(|r| (l, r))).map(tensor).collect();
    let (alpha, base_model) = (rank as f32, Some("tiny-llama".into()));
    PeftAdapter { rank, alpha, rank_stabilized: false, base_model, diffusion: None, tensors }
        .write(folder, cfg)
        .unwrap();
}

/// Folders of adapters of these ranks.
fn folders(cfg: &ModelConfig, ranks: &[usize]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = (0..ranks.len()).map(|i| dir.path().join(format!("adapter-{i}"))).collect();
    paths.iter().zip(ranks).enumerate().for_each(|(i, (p, rank))| write(p, cfg, *rank, i as u64));
    (dir, paths)
}

fn how(adapters: Option<&Adapters>) -> Generate {
    let how = Generate::default().max_tokens(TOKENS).ignore_eos(true);
    adapters.map_or(how.clone(), |a| how.adapters(a))
}

const PROMPT: [u32; 4] = [5, 9, 11, 5];

fn alone(engine: &Engine, how: Generate) -> Vec<u32> {
    let mut session = engine.session(40, 1).unwrap();
    session.push_ids(&PROMPT).unwrap();
    session.generate(how).unwrap().filter_map(|p| p.unwrap().id).collect()
}

#[test]
fn a_batch_of_many_adapters_gives_each_its_own_text() {
    let engine = engine(Device::Cpu);
    let (_dir, paths) = folders(engine.config(), &[1, 3, 8, 16, 64]);
    let pool = engine.adapter_pool(PoolOptions::default()).unwrap();
    paths.iter().enumerate().for_each(|(i, p)| pool.register(&i.to_string(), p));
    let layers = engine.config().layers;
    let mut all: Vec<Option<Adapters>> = (0..5).map(|i| Some(pool.get(&i.to_string()).unwrap())).collect();
    all.push(None);
    all.push(Some(pool.layers(&[(0..1, "4"), (1..layers, "2")]).unwrap()));
    all.push(Some(pool.mix(&[("0", 0.5), ("3", 0.75)]).unwrap()));
    let want: Vec<_> = all.iter().map(|a| alone(&engine, how(a.as_ref()))).collect();
    assert!((0..want.len()).all(|i| (0..i).all(|j| want[i] != want[j])), "{want:?}");
    // Merged into the weights it says the same.
    for i in [2, 4] {
        let options = EngineOptions::default().device(Device::Cpu).threads(2).adapter(&paths[i]);
        assert_eq!(alone(&Engine::open_with(model(), options).unwrap(), how(None)), want[i]);
    }
    let lookup = engine.draft(&DraftKind::Lookup).unwrap();
    let mut serving = engine.serving(ServingOptions::default().sequences(6).rows(24).context(40)).unwrap();
    let (mut of, mut got) = (BTreeMap::new(), vec![Vec::new(); 16]);
    for i in 0..16 {
        // Every other one speculates.
        let mut how = how(all[i % 8].as_ref());
        if i % 2 == 1 {
            how = how.speculative(Sampler::greedy(), &lookup, Speculation::default().nodes(3));
        }
        of.insert(serving.submit(&PROMPT, how, 1).unwrap(), i);
    }
    while serving.pending() != (0, 0) {
        for reply in serving.step().unwrap() {
            got[of[&reply.request]].extend(reply.pieces.iter().filter_map(|p| p.id));
        }
    }
    (0..16).for_each(|i| assert_eq!(got[i], want[i % 8], "request {i}"));
    // Alone, in the batch twice; 0 is also in the sum, which was used as often.
    let tokens = 3 * TOKENS as u64;
    let stats = pool.stats("1").unwrap();
    assert_eq!(stats, AdapterStats { requests: 1, hits: 0, loads: 1, evictions: 0, tokens });
    assert_eq!(pool.stats("0").unwrap().tokens, 2 * tokens);
    assert!(pool.stats("nobody").is_none());
}

#[test]
fn sessions_change_adapters_and_refuse_others() {
    let (one, other) = (engine(Device::Naive), engine(Device::Naive));
    let (_dir, paths) = folders(one.config(), &[2, 2]);
    let pool = one.adapter_pool(PoolOptions::default()).unwrap();
    pool.register("a", &paths[0]);
    let a = pool.get("a").unwrap();
    let mut s = one.session(64, 1).unwrap();
    s.push_ids(&PROMPT).unwrap();
    s.prefill().unwrap();
    let base = s.logits().unwrap().to_vec();
    s.set_adapters(Some(&a)).unwrap();
    s.prefill().unwrap();
    let with = s.logits().unwrap().to_vec();
    s.set_adapters(None).unwrap();
    s.prefill().unwrap();
    assert!(base == s.logits().unwrap() && base != with);
    let e = other.session(8, 1).unwrap().set_adapters(Some(&a)).unwrap_err().to_string();
    assert!(e.contains("another engine"), "{e}");
    assert!(other.serving(ServingOptions::default()).unwrap().submit(&PROMPT, how(Some(&a)), 0).is_err());
}

#[test]
fn the_least_recently_used_leaves_and_what_is_used_stays() {
    let engine = engine(Device::Cpu);
    let (_dir, paths) = folders(engine.config(), &[4, 4, 4, 4]);
    let pool = engine.adapter_pool(PoolOptions::default().count(2)).unwrap();
    ["a", "b", "c", "d"].iter().zip(&paths).for_each(|(n, p)| pool.register(n, p));
    let loads = |n: &str| pool.stats(n).unwrap().loads;
    let a = pool.get("a").unwrap();
    let size = pool.usage().bytes;
    drop(pool.get("b").unwrap());
    drop(pool.get("c").unwrap());
    assert_eq!((loads("a"), pool.stats("b").unwrap().evictions, pool.usage().loaded), (1, 1, 2));
    assert_eq!(pool.usage().bytes, 2 * size);
    // a is in use, c was used last, but nobody holds it.
    let d = pool.get("d").unwrap();
    assert_eq!((pool.stats("a").unwrap().evictions, pool.stats("c").unwrap().evictions), (0, 1));
    let e = pool.get("b").unwrap_err().to_string();
    assert!(e.contains("no room") && e.contains("the adapter b"), "{e}");
    assert!(pool.unload("a").unwrap_err().to_string().contains("in use"));
    // A session holds what it uses, too.
    let mut s = engine.session(32, 1).unwrap();
    s.set_adapters(Some(&a)).unwrap();
    drop((a, d));
    assert!(pool.unload("a").is_err());
    drop(pool.get("b").unwrap());
    assert_eq!(pool.stats("d").unwrap().evictions, 1);
    drop(s);
    assert!(pool.unload("a").unwrap() && !pool.unload("a").unwrap());
    pool.remove("b").unwrap();
    assert_eq!((pool.usage().loaded, pool.usage().bytes), (0, 0));
    assert!(pool.get("b").unwrap_err().to_string().contains("no adapter is called b"));
    let bytes = engine.adapter_pool(PoolOptions::default().bytes(size - 1)).unwrap();
    bytes.register("a", &paths[0]);
    assert!(bytes.get("a").unwrap_err().to_string().contains("no room"));
}

#[test]
fn callers_wait_or_do_not() {
    let engine = engine(Device::Cpu);
    let (_dir, paths) = folders(engine.config(), &[4]);
    let pool = engine.adapter_pool(PoolOptions::default()).unwrap();
    pool.register("a", &paths[0]);
    assert!(pool.try_get("a").unwrap().is_none(), "nothing was read before");
    let (start, mut asked) = (Instant::now(), 1);
    while pool.try_get("a").unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
        asked += 1;
    }
    let stats = pool.stats("a").unwrap();
    assert_eq!((stats.requests, stats.hits, stats.loads), (asked + 1, 1, 1));
    // Many wait for one load.
    pool.unload("a").unwrap();
    std::thread::scope(|s| {
        let waits: Vec<_> = (0..8).map(|_| s.spawn(|| pool.get("a").map(drop))).collect();
        waits.into_iter().for_each(|w| w.join().unwrap().unwrap());
    });
    assert_eq!(pool.stats("a").unwrap().loads, 2);
}

#[test]
fn adapters_of_another_base_are_named() {
    let engine = engine(Device::Cpu);
    let mut other = engine.config().clone();
    let dir = tempfile::tempdir().unwrap();
    let [wide, deep, none] = ["wide", "deep", "none"].map(|n| dir.path().join(n));
    other.layers += 1;
    write(&deep, &other, 2, 0);
    other = engine.config().clone();
    other.ffn += 32;
    write(&wide, &other, 2, 0);
    let pool = engine.adapter_pool(PoolOptions::default()).unwrap();
    for (path, tensor) in [(&wide, "layers.0.mlp.down_proj.lora_A"), (&deep, "layers."), (&none, "adapter_config")] {
        pool.register("x", path);
        let e = pool.get("x").unwrap_err().to_string();
        assert!(e.contains(path.to_str().unwrap()) && e.contains(tensor), "{e}");
        // And again, since the folder may have been mended.
        assert!(pool.try_get("x").unwrap().is_none());
        let start = Instant::now();
        while pool.try_get("x").is_ok() {
            assert!(start.elapsed() < Duration::from_secs(60));
        }
    }
    write(&none, engine.config(), 2, 0);
    pool.get("x").unwrap();
    assert_eq!(pool.usage().loaded, 1);
}

#[test]
fn a_thousand_adapters() {
    let engine = engine(Device::Cpu);
    let (_dir, paths) = folders(engine.config(), &[1, 2, 3, 4, 5]);
    let pool = engine.adapter_pool(PoolOptions::default().count(100)).unwrap();
    let name = |i: usize| format!("adapter {i}");
    (0..1000).for_each(|i| pool.register(&name(i), &paths[i % 5]));
    (0..1000).for_each(|i| drop(pool.get(&name(i)).unwrap()));
    assert_eq!(pool.usage().loaded, 100);
    let evictions: u64 = (0..1000).map(|i| pool.stats(&name(i)).unwrap().evictions).sum();
    assert_eq!(evictions, 900);
    // Those that are there are found without a load, however many others there are or were.
    let before: u64 = (900..1000).map(|i| pool.stats(&name(i)).unwrap().hits).sum();
    let start = Instant::now();
    (0..2000).for_each(|i| drop(pool.try_get(&name(900 + i % 100)).unwrap().unwrap()));
    eprintln!("found 2,000 times in {:?}", start.elapsed());
    let after: u64 = (900..1000).map(|i| pool.stats(&name(i)).unwrap().hits).sum();
    assert_eq!((after - before, pool.usage().loaded), (2000, 100));
    assert_eq!(pool.stats(&name(950)).unwrap().loads, 1);
    let texts: Vec<_> = (995..1000).map(|i| alone(&engine, how(Some(&pool.get(&name(i)).unwrap())))).collect();
    let again: Vec<_> = (0..5).map(|i| alone(&engine, how(Some(&pool.get(&name(i)).unwrap())))).collect();
    assert_eq!(texts, again);
}

/// Resident memory of this process in bytes.
#[cfg(target_os = "linux")]
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[cfg(target_os = "linux")]
#[test]
fn memory_comes_back() {
    let engine = engine(Device::Cpu);
    let (_dir, paths) = folders(engine.config(), &[4096, 4096]);
    let pool = engine.adapter_pool(PoolOptions::default().count(1)).unwrap();
    ["a", "b"].iter().zip(&paths).for_each(|(n, p)| pool.register(n, p));
    drop(pool.get("a").unwrap());
    let size = pool.usage().bytes;
    assert!(size > 4 << 20, "{size}");
    drop(pool.get("b").unwrap());
    let before = resident();
    for i in 0..40 {
        drop(pool.get(["a", "b"][i % 2]).unwrap());
        assert!(pool.unload("a").is_ok() || i % 2 == 1);
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 8 * size, "{grown} bytes more after 40 adapters of {size}");
}
