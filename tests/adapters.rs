//! Adapters beside the weights: what a merged model gives, whoever stands beside a row, to the same bits.

mod common;

use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Group, Mask, Ranks, Train};
use quadriga::decode::{Autoregressive, Decoder, Sampler, Session};
use quadriga::dtype::Real;
use quadriga::format::Checkpoint;
use quadriga::model::config::ModelConfig;
use quadriga::model::lora::{ModuleSpec, ModuleValues};
use quadriga::model::roles::{LayerRole, Role, TensorSource};
use quadriga::model::{Adapter, AdapterMap, KvCache, Model, Sequence, Want, Workspace};
use quadriga::rng::Rng;
use quadriga::speculative::{Budget, Lookup, Speculative};
use quadriga::tensor::HostTensor;

const RANKS: [usize; 5] = [1, 3, 8, 16, 64];

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&common::root().join("models").join(name)).unwrap()
}

/// Adapter number `n`: each of its own rank, not all of them on all modules, with B that is not 0.
fn values(cfg: &ModelConfig, n: usize) -> Vec<ModuleValues> {
    let mut rng = Rng::new(100 + n as u64);
    let specs = (0..cfg.layers).flat_map(|layer| LayerRole::LINEARS.map(|role| (layer, role)));
    let some = specs.enumerate().filter(|(i, _)| n == 3 || !(i + n).is_multiple_of(4)).map(|(_, m)| m);
    let value = |(layer, role): (usize, LayerRole)| {
        let [out, input] = Role::Layer(layer, role).shape(cfg).unwrap();
        // One module has a rank of its own.
        let rank = RANKS[n] + usize::from(layer == 1 && role == LayerRole::K);
        let spec = ModuleSpec { role, layer, rank, scale: 0.5 + 0.25 * n as f32 };
        let mut draw = |n: usize, scale: f32| (0..n).map(|_| grid(scale * rng.normal(), 6)).collect::<Vec<f32>>();
        let a = draw(rank * input, (input as f32).powf(-0.5));
        ModuleValues { spec, a, b: draw(out * rank, 0.3 * (rank as f32).powf(-0.5)) }
    };
    some.map(value).collect()
}

/// To a multiple of 2^-bits: sums of a few products of such numbers are exact in f32, so that merging rounds nothing.
fn grid(x: f32, bits: i32) -> f32 {
    (x * 2f32.powi(bits)).round() / 2f32.powi(bits)
}

/// W + scale B A of these modules, entry by entry: the other way to say it. W is on a grid.
struct Sum<'a> {
    base: &'a Checkpoint,
    modules: Vec<ModuleValues>,
}

impl TensorSource for Sum<'_> {
    fn config(&self) -> &ModelConfig {
        self.base.config()
    }

    fn tensor(&self, role: Role) -> quadriga::Result<HostTensor> {
        let t = self.base.tensor(role)?;
        let Role::Layer(_, at) = role else { return Ok(t) };
        if !LayerRole::LINEARS.contains(&at) {
            return Ok(t);
        }
        let mut w: Vec<f32> = t.to_f32().into_iter().map(|w| grid(w, 12)).collect();
        for m in self.modules.iter().filter(|m| Role::Layer(m.spec.layer, m.spec.role) == role) {
            for (i, w) in w.iter_mut().enumerate() {
                let (o, c, rank) = (i / t.cols, i % t.cols, m.spec.rank);
                let sum: f64 = (0..rank).map(|j| m.b[o * rank + j] as f64 * m.a[j * t.cols + c] as f64).sum();
                let exact = *w as f64 + m.spec.scale as f64 * sum;
                *w = exact as f32;
                assert_eq!(*w as f64, exact);
            }
        }
        HostTensor::from_f32(t.rows, t.cols, &w)
    }
}

struct Bench<B: Train> {
    model: Arc<Model<B>>,
    ws: Workspace<B>,
    maps: Vec<Arc<AdapterMap<B>>>,
}

fn prompt(n: usize, seed: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| ((seed * 37 + i * i % 11 + i * 5) % vocab) as u32).collect()
}

impl<B: Train> Bench<B> {
    /// Of five adapters; map 5 has the layers of two.
    fn new(be: B, source: &dyn TensorSource) -> Self {
        let model = Arc::new(Model::load(Arc::new(be), source, |_, _| {}).unwrap());
        let (be, cfg) = (model.backend(), model.config());
        let adapter = |n| Arc::new(Adapter::new(be, cfg, &values(cfg, n)).unwrap());
        let all: Vec<_> = (0..RANKS.len()).map(adapter).collect();
        let mut maps: Vec<_> = all.iter().map(|a| Arc::new(AdapterMap::one(a.clone()))).collect();
        let parts = [(0..1, all[2].clone()), (1..cfg.layers, all[0].clone())];
        maps.push(Arc::new(AdapterMap::of_ranges(cfg.layers, &parts).unwrap()));
        let ws = Workspace::new(be, cfg, 64, 64).unwrap();
        Self { model, ws, maps }
    }

    /// Logits of all rows of each of these sequences (adapter, prompt), read in one pass and then, where `more`, one token behind.
    fn pass(&mut self, seqs: &[(Option<usize>, Vec<u32>)], more: bool) -> Vec<Vec<Vec<f64>>> {
        let (be, cfg) = (self.model.backend(), self.model.config());
        let mut caches: Vec<_> = seqs.iter().map(|_| KvCache::new(be, cfg, 64).unwrap()).collect();
        let mut out = vec![Vec::new(); seqs.len()];
        for round in 0..1 + usize::from(more) {
            let tokens: Vec<Vec<u32>> =
                seqs.iter().map(|s| if round == 0 { s.1.clone() } else { vec![s.1[0]] }).collect();
            let parts = caches.iter_mut().zip(seqs).zip(&tokens);
            let mut parts: Vec<_> = parts
                .map(|((cache, (adapter, _)), tokens)| {
                    let map = adapter.map(|n| &*self.maps[n]);
                    Sequence::new(cache, tokens, Mask::Causal, Want::All).adapted(map)
                })
                .collect();
            let rows = self.model.forward(&mut parts, &mut self.ws).unwrap();
            let mut logits = vec![B::Acc::of(0.0); rows * cfg.vocab];
            be.download(self.ws.logit_rows(rows), &mut logits).unwrap();
            let mut logits = logits.chunks(cfg.vocab).map(|row| row.iter().map(|x| x.to_f64()).collect());
            for ((out, tokens), cache) in out.iter_mut().zip(&tokens).zip(&mut caches) {
                out.extend(logits.by_ref().take(tokens.len()));
                cache.commit_first(tokens.len()).unwrap();
            }
        }
        out
    }
}

/// Eight sequences, of five adapters, of none, and of one adapter's layers beside another's.
fn eight(vocab: usize) -> Vec<(Option<usize>, Vec<u32>)> {
    let which = [Some(3), None, Some(0), Some(0), Some(4), Some(1), Some(5), Some(2)];
    which.into_iter().enumerate().map(|(i, a)| (a, prompt(1 + i * 3 % 7, i, vocab))).collect()
}

fn modules_of(cfg: &ModelConfig, adapter: Option<usize>) -> Vec<ModuleValues> {
    match adapter {
        None => Vec::new(),
        Some(5) => {
            let below = values(cfg, 2).into_iter().filter(|m| m.spec.layer == 0);
            below.chain(values(cfg, 0).into_iter().filter(|m| m.spec.layer > 0)).collect()
        }
        Some(n) => values(cfg, n),
    }
}

fn equals_merged<B: Train>(be: impl Fn() -> B, name: &str, tolerance: f64) {
    let source = checkpoint(name);
    let mut bench = Bench::new(be(), &Sum { base: &source, modules: Vec::new() });
    let cfg = bench.model.config().clone();
    let seqs = eight(cfg.vocab);
    let got = bench.pass(&seqs, true);
    let base = bench.pass(&seqs.iter().map(|s| (None, s.1.clone())).collect::<Vec<_>>(), true);
    for (i, (seq, got)) in seqs.iter().zip(&got).enumerate() {
        let merged = Sum { base: &source, modules: modules_of(&cfg, seq.0) };
        let mut merged = Bench {
            model: Arc::new(Model::load(Arc::new(be()), &merged, |_, _| {}).unwrap()),
            ws: Workspace::new(bench.model.backend(), &cfg, 64, 64).unwrap(),
            maps: Vec::new(),
        };
        let want = merged.pass(&[(None, seq.1.clone())], true).remove(0);
        let (mut off, mut size, mut moved) = (0f64, 0f64, 0f64);
        for ((g, w), b) in got.iter().flatten().zip(want.iter().flatten()).zip(base[i].iter().flatten()) {
            off = off.max((g - w).abs());
            size = size.max(w.abs());
            moved = moved.max((g - b).abs());
        }
        assert!(off <= tolerance * size, "{name}, sequence {i}, {:?}: {off} of {size}", seq.0);
        // On a GPU gate and up are rounded otherwise where they are computed apart.
        let same = if tolerance > 1e-3 { moved <= tolerance * size } else { moved == 0.0 };
        assert!(if seq.0.is_none() { same } else { moved > 0.02 * size }, "{name}, sequence {i}: {moved} of {size}");
    }
}

#[test]
fn naive_equals_merged_weights() {
    equals_merged(|| Naive, "tiny-llama", 1e-10);
}

#[test]
fn cpu_equals_merged_weights() {
    for tier in Tier::available() {
        for name in ["tiny-llama", "tiny-gemma3"] {
            equals_merged(|| Cpu::with(2, tier, Compute::Exact), name, 1e-4);
        }
    }
}

#[test]
fn cuda_equals_merged_weights() {
    if common::gpu().is_some() {
        equals_merged(|| common::gpu().unwrap(), "tiny-llama", 0.05);
    }
}

/// The same sum in f64 throughout: only the order of additions differs.
#[test]
fn naive_ops_equal_the_dense_product() {
    let (rows, input, out) = (7, 12, 9);
    let mut rng = Rng::new(4);
    let mut draw = |n: usize| (0..n).map(|_| f64::from(rng.normal())).collect::<Vec<f64>>();
    let x = draw(rows * input);
    let adapters: Vec<_> = [3, 3, 3].map(|r| (r, draw(r * input), draw(out * r))).into();
    let sizes = [2, 4, 1];
    let groups = |of: usize| -> Vec<Group<'_, Naive>> {
        let matrix = |i: usize| if of == 0 { &adapters[i].1[..] } else { &adapters[i].2[..] };
        (0..3).map(|i| Group { rows: sizes[i], matrix: matrix(i), scale: 0.5 }).collect()
    };
    let (mut h, mut y) = (vec![0.0; rows * 3], draw(rows * out));
    let before = y.clone();
    Naive.shrink_rows(&mut h, &x, 3, &groups(0)).unwrap();
    Naive.expand_rows(&mut y, &h, Ranks::all(3), &groups(1)).unwrap();
    let owner = [0, 0, 1, 1, 1, 1, 2];
    for r in 0..rows {
        let (rank, a, b) = &adapters[owner[r]];
        for o in 0..out {
            let dense = |i: usize| (0..*rank).map(|j| b[o * rank + j] * a[j * input + i]).sum::<f64>();
            let want = before[r * out + o] + 0.5 * (0..input).map(|i| dense(i) * x[r * input + i]).sum::<f64>();
            assert!((y[r * out + o] - want).abs() < 1e-10 * want.abs().max(1.0));
        }
    }
}

/// Every rank, every tier: against the specification, and however rows are grouped.
#[test]
fn cpu_ops_follow_the_specification() {
    let (rows, input, out) = (6, 75, 41);
    for tier in Tier::available() {
        for rank in [1, 2, 3, 7, 8, 15, 16, 33, 64, 130, 256] {
            let cpus = [1, 3].map(|threads| Cpu::with(threads, tier, Compute::Fast));
            let mut rng = Rng::new(rank as u64);
            let mut draw = |n: usize| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
            let (x, y0) = (draw(rows * input), draw(rows * out));
            let part = Ranks { stride: rank + 3, first: 2, n: rank };
            let (a, b) = (draw(part.stride * input), draw(out * rank));
            let run = |cpu: &Cpu, sizes: &[usize]| {
                let group = |matrix| move |&rows: &usize| Group { rows, matrix, scale: 0.75 };
                let (mut h, mut y) = (vec![0.0; rows * part.stride], y0.clone());
                cpu.shrink_rows(&mut h, &x, part.stride, &sizes.iter().map(group(&a[..])).collect::<Vec<_>>()).unwrap();
                cpu.expand_rows(&mut y, &h, part, &sizes.iter().map(group(&b[..])).collect::<Vec<_>>()).unwrap();
                y
            };
            let got = run(&cpus[0], &[6]);
            for sizes in [&[6][..], &[1; 6], &[2, 0, 3, 1]] {
                assert_eq!(run(&cpus[1], sizes), got, "{tier}, rank {rank}, {sizes:?}");
            }
            let wide = |v: &[f32]| v.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
            let (a, b, mut h, mut y) = (wide(&a), wide(&b), vec![0.0; rows * part.stride], wide(&y0));
            let group = |matrix| [Group { rows, matrix, scale: 0.75 }];
            Naive.shrink_rows(&mut h, &wide(&x), part.stride, &group(&a[..])).unwrap();
            Naive.expand_rows(&mut y, &h, part, &group(&b[..])).unwrap();
            for (g, w) in got.iter().zip(&y) {
                assert!(
                    (f64::from(*g) - w).abs() < 2e-5 * (rank as f64 * input as f64).sqrt(),
                    "{tier} {rank}: {g} {w}"
                );
            }
        }
    }
}

/// Bits: alone, in any order, beside any others, on any number of threads; and without an adapter those of the plain model.
#[test]
fn cpu_rows_do_not_know_their_neighbours() {
    for (name, compute) in
        [("tiny-llama", Compute::Fast), ("tiny-gemma3", Compute::Exact), ("tiny-gguf/legacy.gguf", Compute::Fast)]
    {
        let source = checkpoint(name);
        for tier in Tier::available() {
            let mut bench = Bench::new(Cpu::with(2, tier, compute), &source);
            let seqs = eight(bench.model.config().vocab);
            let together = bench.pass(&seqs, true);
            let mut one = Bench::new(Cpu::with(1, tier, compute), &source);
            for (i, seq) in seqs.iter().enumerate() {
                assert_eq!(one.pass(std::slice::from_ref(seq), true)[0], together[i], "{name} {tier}: sequence {i}");
            }
            for turn in 0..4 {
                let order: Vec<usize> = (0..seqs.len()).map(|i| (i * [3, 5, 7, 1][turn] + turn) % seqs.len()).collect();
                let turned: Vec<_> = order.iter().map(|&i| seqs[i].clone()).collect();
                for (row, &i) in bench.pass(&turned, true).iter().zip(&order) {
                    assert_eq!(*row, together[i], "{name} {tier}: sequence {i} in {order:?}");
                }
            }
        }
    }
}

#[test]
fn speculation_keeps_the_text() {
    let source = checkpoint("tiny-llama");
    let bench = Bench::new(Cpu::with(2, Tier::detect(), Compute::Exact), &source);
    let text = |map: Option<usize>, speculate: bool| {
        let mut s = Session::new(bench.model.clone(), 60, 3).unwrap();
        s.set_adapters(map.map(|n| bench.maps[n].clone()));
        s.push(&[5, 9, 11, 5, 9, 11, 5]);
        let mut plain = Autoregressive::new(Sampler::greedy());
        let mut spec = Speculative::new(Box::new(Lookup::default()), Sampler::greedy(), Budget::new(4, 4, 1));
        while s.tokens().len() < 48 {
            if speculate {
                spec.step(&mut s).unwrap()
            } else {
                plain.step(&mut s).unwrap()
            };
        }
        s.tokens()[..48].to_vec()
    };
    let texts: Vec<_> = [None, Some(3), Some(5)].map(|map| (text(map, false), text(map, true))).into();
    assert!(texts.iter().all(|(plain, spec)| plain == spec));
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2]);
}

#[test]
fn a_session_changes_its_adapters() {
    let source = checkpoint("tiny-llama");
    let bench = Bench::new(Cpu::with(2, Tier::detect(), Compute::Exact), &source);
    let mut s = Session::new(bench.model.clone(), 40, 3).unwrap();
    s.push(&[5, 9, 11]);
    s.advance().unwrap();
    let base = s.logits().unwrap().to_vec();
    s.set_adapters(Some(bench.maps[3].clone()));
    assert!(s.logits().is_err() && s.cache().is_empty() && s.tokens().len() == 3);
    s.advance().unwrap();
    let with = s.logits().unwrap().to_vec();
    let mut other = Session::new(bench.model.clone(), 40, 3).unwrap();
    other.follow(&s, 3).unwrap();
    other.advance().unwrap();
    assert!(base != with && with == other.logits().unwrap());
    s.set_adapters(Some(bench.maps[3].clone()));
    assert_eq!(s.cache().len(), 3);
    s.set_adapters(None);
    s.advance().unwrap();
    assert_eq!(s.logits().unwrap(), base);
}

#[test]
fn maps_that_do_not_fit_are_refused() {
    let source = checkpoint("tiny-llama");
    let mut bench = Bench::new(Naive, &source);
    let cfg = bench.model.config().clone();
    let adapter = Arc::new(Adapter::new(&Naive, &cfg, &values(&cfg, 0)).unwrap());
    let layers = cfg.layers;
    for ranges in [&[(0, 0)][..], &[(0, layers + 1)], &[(0, 1), (0, 2)]] {
        let parts: Vec<_> = ranges.iter().map(|&(from, to)| (from..to, adapter.clone())).collect();
        assert!(AdapterMap::of_ranges(layers, &parts).is_err());
    }
    assert!(AdapterMap::of_ranges(layers + 1, &[(0..1, adapter.clone())]).is_err());
    let mut other = cfg.clone();
    other.layers += 1;
    let alien = AdapterMap::one(Arc::new(Adapter::new(&Naive, &other, &values(&cfg, 0)).unwrap()));
    let mut cache = KvCache::new(&Naive, &cfg, 8).unwrap();
    let seq = Sequence::new(&mut cache, &[1], Mask::Causal, Want::Last).adapted(Some(&alien));
    let e = bench.model.forward(&mut [seq], &mut bench.ws).unwrap_err().to_string();
    assert!(e.contains("layers") && bench.ws.max_rows() == 64, "{e}");
}
