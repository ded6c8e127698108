//! Drafts that learn: gradients against central differences in f64, every backend against the specification, what learning leaves alone, that
//! a few sequences are learnt by heart, and that what is handed to drafting drafts as it was trained.

mod common;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use half::bf16;
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Buffer, Step, Train, Update};
use quadriga::decode::{Sampler, Session};
use quadriga::error::Result;
use quadriga::format::peft::tensor_names;
use quadriga::format::{Checkpoint, DraftHead};
use quadriga::model::lora::{ModuleSpec, ModuleValues};
use quadriga::model::roles::{LayerRole, NamedTensors, Role, TensorSource};
use quadriga::model::{Adapter, Model, ModelConfig, Param};
use quadriga::rng::Rng;
use quadriga::speculative::heads::load;
use quadriga::speculative::train::{
    Continuation, Eagle1, FeatureSpec, Features, Hydra, Sequence, SmallModelLora, Teacher, Trainable, extent,
};
use quadriga::speculative::{Budget, Draft, DraftTree, SmallModel};
use quadriga::tensor::HostTensor;
use quadriga::train::optim::{Kind, Optimizer, Settings};

const KINDS: [&str; 3] = ["eagle", "hydra", "model"];
const HEADS: [&str; 2] = ["eagle", "hydra"];
const K: usize = 4;
const STEPS: usize = 3;

fn folder(name: &str) -> PathBuf {
    common::root().join("models").join(name)
}

fn head(kind: &str) -> DraftHead {
    DraftHead::open(&folder("tiny-drafts").join(kind)).unwrap()
}

fn checkpoint() -> Checkpoint {
    Checkpoint::open(&folder("tiny-llama")).unwrap()
}

fn target<B: Backend>(be: B) -> Arc<Model<B>> {
    Arc::new(Model::load(Arc::new(be), &checkpoint(), |_, _| {}).unwrap())
}

/// A checkpoint with matrices in Q8_0.
struct Quantized(Checkpoint);

impl TensorSource for Quantized {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }
    fn tensor(&self, role: Role) -> Result<HostTensor> {
        let t = self.0.tensor(role)?;
        if role.is_vector() { Ok(t) } else { t.to_q8_0() }
    }
}

/// A draft for `target` in passes of up to `rows` rows.
fn learner<B: Train>(
    kind: &str,
    target: &Arc<Model<B>>,
    head: &dyn NamedTensors,
    rows: usize,
) -> Box<dyn Trainable<B>> {
    match kind {
        "eagle" => Box::new(Eagle1::new(target.clone(), head, rows, K, STEPS).unwrap()),
        _ => Box::new(Hydra::new(target.clone(), head, rows, K).unwrap()),
    }
}

/// One of the target's layers as a smaller model, with an adapter that is not 0 any more.
fn small<B: Train>(target: &Arc<Model<B>>, rows: usize) -> SmallModelLora<B> {
    let model = Arc::new(target.of_layers(&[1]).unwrap());
    let adapter = Adapter::new(model.backend(), model.config(), &modules(model.config(), 1)).unwrap();
    SmallModelLora::new(model, adapter, rows, K, STEPS, tensor_names).unwrap()
}

/// Values of an adapter on all linears but one of layer 0.
fn modules(cfg: &ModelConfig, seed: u64) -> Vec<ModuleValues> {
    let mut rng = Rng::new(seed);
    let roles = LayerRole::LINEARS.into_iter().filter(|&r| r != LayerRole::K);
    let module = |role| {
        let ([out, input], rank) = (Role::Layer(0, role).shape(cfg).unwrap(), 3);
        let mut some = |n: usize| (0..n).map(|_| bf16::from_f32(0.2 * rng.normal()).to_f32()).collect();
        let (a, b) = (some(rank * input), some(out * rank));
        ModuleValues { spec: ModuleSpec { role, layer: 0, rank, scale: 0.5 }, a, b }
    };
    roles.map(module).collect()
}

fn fresh<B: Train>(kind: &str, target: &Arc<Model<B>>, rows: usize) -> Box<dyn Trainable<B>> {
    match kind {
        "model" => Box::new(small(target, rows)),
        _ => learner(kind, target, &head(kind), rows),
    }
}

/// A prompt of `prompt` tokens and as many more as make `n`, with features and a teacher of no model.
fn sequence(cfg: &ModelConfig, prompt: usize, n: usize, seed: u64) -> Sequence {
    let mut rng = Rng::new(seed);
    let [rows, slots] = extent(prompt, n).unwrap();
    let tokens = (0..n).map(|_| rng.below(cfg.vocab) as u32).collect();
    let features = (0..rows * cfg.hidden).map(|_| bf16::from_f32(rng.normal())).collect();
    let k = K + 1;
    let (mut ids, mut p) = (Vec::new(), Vec::new());
    for _ in 0..slots {
        let first = rng.below(300) as u32;
        ids.extend((0..k as u32).map(|j| first + 7 * j));
        p.extend((0..k).map(|j| 0.4 / (1 << j) as f32));
    }
    Sequence { prompt, tokens, features, teacher: Teacher { k, ids, p } }
}

fn sequences(cfg: &ModelConfig) -> [Sequence; 3] {
    [sequence(cfg, 4, 12, 1), sequence(cfg, 2, 8, 2), sequence(cfg, 3, 5, 3)]
}

fn refs(all: &[Sequence]) -> Vec<&Sequence> {
    all.iter().collect()
}

/// Values of all parameters, or their gradients.
fn values<B: Train>(be: &B, draft: &dyn Trainable<B>, grads: bool) -> Vec<(String, Vec<f32>)> {
    let of = |p: &Param<B>| {
        let mut v = vec![0.0; p.len()];
        let buf = if grads { p.g.as_ref().unwrap() } else { &p.w };
        be.download_acc(buf.head(p.len()), &mut v).unwrap();
        (p.name.clone(), v)
    };
    draft.params().into_iter().map(of).collect()
}

#[test]
fn gradients_are_differences() {
    const H: f64 = 1e-5;
    let target = target(Naive);
    let all = sequences(target.config());
    for kind in KINDS {
        // The gradient is that of one loss, in however many passes.
        for rows in [40, 11] {
            let mut draft = fresh(kind, &target, rows);
            let learnt = draft.pass(&refs(&all), true).unwrap();
            let grads: Vec<(String, Vec<f64>)> =
                draft.params().iter().map(|p| (p.name.clone(), p.g.as_ref().unwrap().to_vec())).collect();
            let counted = draft.pass(&refs(&all), false).unwrap();
            assert!((learnt.loss - counted.loss).abs() < 1e-12 && learnt.rows == 13 && counted.rows == 13, "{kind}");
            for (i, (name, grad)) in grads.iter().enumerate() {
                let n = grad.len();
                let mut rng = Rng::new(i as u64);
                let unit = 1.0 / (n as f64).sqrt();
                let mut directions: Vec<Vec<f64>> =
                    vec![(0..n).map(|_| if rng.below(2) == 0 { unit } else { -unit }).collect()];
                for _ in 0..2 {
                    let mut one = vec![0.0; n];
                    one[rng.below(n)] = 1.0;
                    directions.push(one);
                }
                let size = grad.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                assert!(size > 1e-7, "{kind}: {name} has no gradient");
                for d in directions {
                    let nudge = |draft: &mut dyn Trainable<Naive>, by: f64| {
                        let p = draft.params_mut().swap_remove(i);
                        p.w.iter_mut().zip(&d).for_each(|(w, d)| *w += by * d);
                        draft.refresh().unwrap();
                    };
                    let mut at = |h: f64| {
                        nudge(&mut *draft, h);
                        let loss = draft.pass(&refs(&all), false).unwrap().loss;
                        nudge(&mut *draft, -h);
                        loss
                    };
                    let numeric = (at(H) - at(-H)) / (2.0 * H);
                    let analytic: f64 = grad.iter().zip(&d).map(|(g, d)| g * d).sum();
                    let error = (numeric - analytic).abs() / size;
                    assert!(error < 1e-6, "{kind}: {name}: {analytic:.9e}, and {numeric:.9e} by differences");
                }
            }
        }
    }
}

/// Loss and every gradient of a backend, as a part of the specification's.
fn compare<B: Train>(name: &str, be: B, tolerance: f64) {
    compare_on(name, &target(Naive), &target(be), tolerance);
}

/// As [`compare`], where the target is quantised.
fn compare_quantized<B: Train>(name: &str, be: B, tolerance: f64) {
    let source = Quantized(checkpoint());
    let naive = Arc::new(Model::load(Arc::new(Naive), &source, |_, _| {}).unwrap());
    let target = Arc::new(Model::load(Arc::new(be), &source, |_, _| {}).unwrap());
    compare_on(&format!("{name}, Q8_0"), &naive, &target, tolerance);
}

fn compare_on<B: Train>(name: &str, naive: &Arc<Model<Naive>>, target: &Arc<Model<B>>, tolerance: f64) {
    let all = sequences(target.config());
    for kind in KINDS {
        let (mut want, mut got) = (fresh(kind, naive, 40), fresh(kind, target, 40));
        let losses = [want.pass(&refs(&all), true).unwrap().loss, got.pass(&refs(&all), true).unwrap().loss];
        assert!((losses[0] - losses[1]).abs() < tolerance * losses[0], "{name}, {kind}: losses {losses:?}");
        let mut most = 0.0f64;
        let grads = values(naive.backend(), &*want, true).into_iter().zip(values(target.backend(), &*got, true));
        for ((tensor, w), (_, g)) in grads {
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let error = norm(&mut w.iter().zip(&g).map(|(a, b)| a - b)) / norm(&mut w.iter().copied());
            assert!(error < tolerance, "{name}, {kind}: {tensor} is off by {error:.2e}");
            most = most.max(error);
        }
        println!("{name}, {kind}: greatest error {most:.2e}");
    }
}

#[test]
fn cpu_gives_the_specifications_gradients() {
    for cpu in common::cpus() {
        compare(&format!("cpu {}", cpu.tier()), cpu, 2e-5);
    }
    for cpu in common::cpus() {
        compare_quantized(&format!("cpu {}", cpu.tier()), cpu, 2e-5);
    }
}

#[test]
fn cuda_gives_the_specifications_gradients() {
    if let Some(gpu) = common::gpu() {
        compare("cuda", gpu, 0.05);
    }
    if let Some(gpu) = common::gpu() {
        compare_quantized("cuda", gpu, 0.05);
    }
}

/// A few prompts and what the target says behind them, greedily.
fn said<B: Backend>(target: &Arc<Model<B>>) -> Vec<Sequence> {
    let rows: Vec<Continuation> = (0..4u32)
        .map(|n| {
            let prompt_ids: Vec<u32> = (0..4).map(|i| 5 + n * 61 + i * 17).collect();
            let mut s = Session::with_taps(target.clone(), 64, 0, &[]).unwrap();
            s.push(&prompt_ids);
            for _ in 0..16 {
                s.advance().unwrap();
                let token = s.sample(&Sampler::greedy()).unwrap();
                s.push(&[token]);
            }
            Continuation { n: n.into(), ids: s.tokens()[4..].to_vec(), prompt_ids }
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let spec = FeatureSpec { taps: vec![target.config().layers], k: K };
    let features = Features::of(target, "tiny-llama", &rows, dir.path(), spec, &mut |_, _| {}).unwrap();
    (0..rows.len()).map(|i| features.read(i).unwrap()).collect()
}

fn train<B: Train>(be: &B, draft: &mut dyn Trainable<B>, all: &[Sequence], lr: f32, steps: usize) {
    let settings = Settings { kind: Kind::AdamW, lr, ..Settings::default() };
    let mut optimizer = Optimizer::new(be, settings, draft.params().into_iter()).unwrap();
    for _ in 0..steps {
        draft.pass(&refs(all), true).unwrap();
        optimizer.step(be, draft.params_mut().into_iter()).unwrap();
        draft.refresh().unwrap();
    }
}

#[test]
fn a_few_sequences_are_learnt_by_heart() {
    let target = target(Cpu::with(2, Tier::detect(), Compute::Exact));
    let all = said(&target);
    for kind in KINDS {
        let mut draft = fresh(kind, &target, 128);
        let before = draft.pass(&refs(&all), false).unwrap();
        train(target.backend(), &mut *draft, &all, 0.01, 150);
        let after = draft.pass(&refs(&all), false).unwrap();
        println!("{kind}: from {before:?} to {after:?}");
        assert!(after.loss < before.loss, "{kind}: {} after {}", after.loss, before.loss);
        assert!(after.right[0] as f64 > 0.9 * after.asked[0] as f64, "{kind}: {after:?}");
        assert!(after.length() > before.length(), "{kind}: {after:?}");
    }
}

#[test]
fn nothing_changes_without_a_reason() {
    let target = target(Cpu::with(2, Tier::detect(), Compute::Exact));
    let (be, all) = (target.backend(), sequences(target.config()));
    for kind in KINDS {
        let mut draft = fresh(kind, &target, 40);
        let before = values(be, &*draft, false);
        // No row to learn: prompts alone.
        let none = Sequence { prompt: 4, tokens: vec![1, 2, 3, 4, 5], ..Sequence::default() };
        for learn in [true, false] {
            let measured = draft.pass(&[&none], learn).unwrap();
            assert_eq!((measured.rows, measured.loss), (0, 0.0), "{kind}");
        }
        assert!(values(be, &*draft, true).iter().all(|(_, g)| g.iter().all(|&g| g == 0.0)), "{kind}");
        // A learning rate of 0.
        draft.pass(&refs(&all), true).unwrap();
        let step = Step { rule: Update::Sgd, lr: 0.0, decay: 0.0, scale: 1.0, number: 1, l1: 0.0 };
        for p in draft.params_mut() {
            let n = p.len();
            be.optimize(p.w.head_mut(n), p.g.as_ref().unwrap().head(n), &mut [], None, &step).unwrap();
        }
        draft.refresh().unwrap();
        assert!(values(be, &*draft, false) == before, "{kind}");
        let too_long = sequence(target.config(), 4, 60, 1);
        let error = draft.pass(&[&too_long], true).unwrap_err().to_string();
        assert!(error.contains("40 are planned"), "{error}");
    }
}

/// Weights that are no numbers are replaced, and nothing is left of them in the room for passes.
#[test]
fn a_diverged_pass_leaves_no_trace() {
    let target = target(Cpu::with(2, Tier::detect(), Compute::Exact));
    let (be, cfg) = (target.backend(), target.config());
    // The second has slots where the first has context.
    let [bad, good] = [sequence(cfg, 1, 12, 1), sequence(cfg, 9, 12, 2)];
    for kind in KINDS {
        let mut drafts = [fresh(kind, &target, 40), fresh(kind, &target, 40)];
        let before = values(be, &*drafts[0], false);
        let set = |draft: &mut dyn Trainable<Cpu>, of: &dyn Fn(usize, usize) -> f32| {
            for (i, p) in draft.params_mut().into_iter().enumerate() {
                let n = p.len();
                let values: Vec<f32> = (0..n).map(|j| of(i, j)).collect();
                be.upload_acc(p.w.head_mut(n), &values).unwrap();
                be.zero(p.g.as_mut().unwrap().head_mut(n)).unwrap();
            }
            draft.refresh().unwrap();
        };
        set(&mut *drafts[0], &|_, _| f32::NAN);
        assert!(drafts[0].pass(&[&bad], true).unwrap().loss.is_nan(), "{kind}");
        set(&mut *drafts[0], &|i, j| before[i].1[j]);
        let losses = drafts.each_mut().map(|d| d.pass(&[&good], true).unwrap().loss);
        assert_eq!(losses[0], losses[1], "{kind}");
        assert!(values(be, &*drafts[0], true) == values(be, &*drafts[1], true), "{kind}");
    }
}

#[test]
fn threads_do_not_matter() {
    for kind in KINDS {
        let run = |threads| {
            let target = target(Cpu::with(threads, Tier::detect(), Compute::Exact));
            let mut draft = fresh(kind, &target, 40);
            train(target.backend(), &mut *draft, &sequences(target.config()), 0.01, 2);
            values(target.backend(), &*draft, false)
        };
        assert!(run(1) == run(3), "{kind}");
    }
}

/// A head with what it has learnt in the place of its tensors.
struct Learnt {
    head: DraftHead,
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Learnt {
    fn new<B: Train>(kind: &str, draft: &dyn Trainable<B>) -> Self {
        let tensors = draft.to_host().unwrap().into_iter().map(|(name, shape, values)| (name, (shape, values)));
        Self { head: head(kind), tensors: tensors.collect() }
    }
}

impl NamedTensors for Learnt {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(|k| &k[..]).collect()
    }
    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| &t.0[..])
    }
    fn tensor(&self, name: &str) -> Result<HostTensor> {
        let (shape, values) = &self.tensors[name];
        let (rows, cols) = if shape.len() == 1 { (1, shape[0]) } else { (shape[0], shape[1]) };
        HostTensor::from_f32(rows, cols, values)
    }
    fn integers(&self, name: &str) -> Result<Vec<i64>> {
        self.head.integers(name)
    }
    fn layer(&self) -> Result<ModelConfig> {
        self.head.layer()
    }
    fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.head.sizes(key)
    }
    fn flag(&self, key: &str) -> Result<bool> {
        self.head.flag(key)
    }
}

/// Published files hold the residual block of a Hydra head as often as it is applied; it is one block for all that.
#[test]
fn copies_of_a_block_stay_one_block() {
    let target = target(Naive);
    let mut copies = Learnt::new("hydra", &*fresh("hydra", &target, 40));
    for (end, j) in [("weight", 5), ("bias", 5), ("weight", 7), ("bias", 7)] {
        let first = copies.tensors[&format!("hydra_mlp.1.3.linear.{end}")].clone();
        copies.tensors.insert(format!("hydra_mlp.1.{j}.linear.{end}"), first);
    }
    let drafts = [fresh("hydra", &target, 40), learner("hydra", &target, &copies, 40)].map(|mut draft| {
        train(&Naive, &mut *draft, &sequences(target.config()), 0.02, 2);
        draft
    });
    assert!(values(&Naive, &*drafts[0], false) == values(&Naive, &*drafts[1], false));
    let learnt = Learnt::new("hydra", &*drafts[1]).tensors;
    assert_eq!(learnt.len(), copies.tensors.len());
    assert!(learnt["hydra_mlp.1.7.linear.weight"] == learnt["hydra_mlp.1.3.linear.weight"]);
    assert!(learnt["hydra_mlp.1.5.linear.bias"] == learnt["hydra_mlp.1.3.linear.bias"]);
    assert!(learnt["hydra_mlp.1.3.linear.weight"] != copies.tensors["hydra_mlp.1.3.linear.weight"]);
}

/// A session that has read all of `text` but its last token.
fn session<B: Backend>(target: &Arc<Model<B>>, taps: &[usize], text: &[u32]) -> Session<B> {
    let (last, before) = text.split_last().unwrap();
    let mut s = Session::with_taps(target.clone(), 64, 0, taps).unwrap();
    s.push(before);
    s.advance().unwrap();
    s.push(&[*last]);
    s
}

/// The tokens that a draft proposes first, with the logarithms of their probabilities.
fn proposals<B: Backend>(draft: &mut dyn Draft<B>, s: &Session<B>) -> Vec<(u32, f64)> {
    let mut tree = DraftTree::new(*s.tokens().last().unwrap());
    draft.propose(s, Budget::new(8, 1, 8), &mut tree).unwrap();
    (1..tree.len()).map(|i| (tree.tokens()[i], f64::from(tree.ln_q(i)))).collect()
}

/// A sequence whose only row is the one that drafts behind `text`; its teacher is sure of `token`.
fn asks<B: Backend>(s: &Session<B>, token: u32) -> Sequence {
    let (be, d, n) = (s.model().backend(), s.model().config().hidden, s.cache().len());
    let mut values = vec![0.0; n * d];
    if s.workspace().taps().count() > 0 {
        be.download_acc(s.features(0), &mut values).unwrap();
    }
    let tokens = [s.tokens(), &[0]].concat();
    let features = values.into_iter().map(bf16::from_f32).collect();
    let mut ids = vec![token];
    ids.extend((0..).filter(|&t| t != token).take(K - 1));
    let p = (0..K).map(|i| if i == 0 { 1.0 } else { 0.0 }).collect();
    Sequence { prompt: n, tokens, features, teacher: Teacher { k: K, ids, p } }
}

#[test]
fn a_head_drafts_what_it_has_learnt() {
    let target = target(Naive);
    let checkpoint = checkpoint();
    let text: Vec<u32> = (0..12).map(|i| 7 + 13 * i).collect();
    for kind in HEADS {
        let mut draft = fresh(kind, &target, 40);
        let untouched = Learnt::new(kind, &*draft);
        let original = head(kind);
        for name in original.names() {
            // What is published in half the precision is whole in f32.
            let (shape, values) = &untouched.tensors[name];
            assert_eq!(original.shape(name).unwrap(), shape, "{name}");
            assert_eq!(&original.tensor(name).unwrap().to_f32(), values, "{name}");
        }
        assert_eq!(untouched.tensors.len(), original.names().len(), "{kind}");

        train(&Naive, &mut *draft, &sequences(target.config()), 0.02, 3);
        let learnt = Learnt::new(kind, &*draft);
        let drafts = [&untouched, &learnt].map(|head| {
            let mut draft = load(target.clone(), &checkpoint, head, false).unwrap()();
            let s = session(&target, draft.taps(), &text);
            (proposals(&mut *draft, &s), s)
        });
        assert!(drafts[0].0.iter().zip(&drafts[1].0).any(|(a, b)| a.0 != b.0 || (a.1 - b.1).abs() > 0.1), "{kind}");
        let (proposed, s) = &drafts[1];
        let mut again = learner(kind, &target, &learnt, 40);
        for &(token, ln_q) in proposed {
            let asked = asks(s, token);
            let measured = draft.pass(&[&asked], false).unwrap();
            assert_eq!(measured.rows, 1);
            // Nothing follows that an EAGLE head's output could be compared with.
            let loss = measured.loss / if kind == "eagle" { f64::from(0.1f32) } else { 1.0 };
            // Features are bf16 in training.
            assert!((loss + ln_q).abs() < 0.02, "{kind}: token {token} has {ln_q}, trained as {}", -loss);
            // The learner keeps f64 here, and its tensors are f32.
            let reloaded = again.pass(&[&asked], false).unwrap().loss;
            assert!((reloaded - measured.loss).abs() < 1e-5, "{kind}: {reloaded} after {}", measured.loss);
        }
    }
}

fn a_small_model_drafts_with_its_adapter<B: Train>(name: &str, be: B, bound: f64) {
    let target = target(be);
    let be = target.backend();
    let mut draft = small(&target, 40);
    train(be, &mut draft, &sequences(target.config()), 0.02, 3);
    let merged = Arc::new(draft.model().merged(draft.adapter()).unwrap());
    let text: Vec<u32> = (0..12).map(|i| 7 + 13 * i).collect();
    let s = session(&target, &[], &text);
    let plain = proposals(&mut SmallModel::new(draft.model().clone()), &s);
    let proposed = proposals(&mut SmallModel::new(merged), &s);
    assert!(plain.iter().zip(&proposed).any(|(a, b)| a.0 != b.0 || (a.1 - b.1).abs() > 0.1));
    // What is handed out is the adapter, by PEFT's names.
    let tensors: HashMap<_, _> = draft.to_host().unwrap().into_iter().map(|(n, s, v)| (n, (s, v))).collect();
    assert_eq!(tensors.len(), 12);
    let mut modules = modules(draft.model().config(), 2);
    for m in &mut modules {
        let path = match m.spec.role {
            LayerRole::Q => "self_attn.q_proj",
            LayerRole::V => "self_attn.v_proj",
            LayerRole::O => "self_attn.o_proj",
            LayerRole::Gate => "mlp.gate_proj",
            LayerRole::Up => "mlp.up_proj",
            _ => "mlp.down_proj",
        };
        let of = |matrix| &tensors[&format!("base_model.model.model.layers.0.{path}.lora_{matrix}.weight")].1;
        (m.a, m.b) = (of("A").clone(), of("B").clone());
    }
    let adapter = Adapter::new(be, draft.model().config(), &modules).unwrap();
    let mut again = SmallModelLora::new(draft.model().clone(), adapter, 40, K, STEPS, tensor_names).unwrap();
    for (token, ln_q) in proposed {
        let asked = asks(&s, token);
        let loss = draft.pass(&[&asked], false).unwrap().loss;
        assert!((loss + ln_q).abs() < bound, "{name}: token {token} has {ln_q}, trained as {}", -loss);
        assert!((again.pass(&[&asked], false).unwrap().loss - loss).abs() < 1e-5, "{name}");
    }
}

#[test]
fn naive_small_models_draft_with_their_adapters() {
    a_small_model_drafts_with_its_adapter("naive", Naive, 1e-4);
}

#[test]
fn cpu_small_models_draft_with_their_adapters() {
    common::cpus().for_each(|cpu| a_small_model_drafts_with_its_adapter(&format!("cpu {}", cpu.tier()), cpu, 1e-3));
}

#[test]
fn cuda_small_models_draft_with_their_adapters() {
    if let Some(gpu) = common::gpu() {
        // Operands are bf16.
        a_small_model_drafts_with_its_adapter("cuda", gpu, 0.1);
    }
}

/// Adapters with weights are one adapter: its products are the weighted sum of theirs.
#[test]
fn stacked_adapters_are_their_weighted_sum() {
    let target = target(Naive);
    let cfg = target.config();
    let (parts, weights) = ([1, 2, 3].map(|seed| modules(cfg, seed)), [0.5f32, 0.3, 0.2]);
    let adapters = parts.each_ref().map(|m| Adapter::new(&Naive, cfg, m).unwrap());
    let stacked = Adapter::mix(&Naive, cfg, &adapters.iter().zip(weights).collect::<Vec<_>>()).unwrap();
    let dense = |m: &ModuleValues, o: usize, i: usize| {
        let (rank, input) = (m.spec.rank, m.a.len() / m.spec.rank);
        let ba: f64 = (0..rank).map(|r| f64::from(m.b[o * rank + r]) * f64::from(m.a[r * input + i])).sum();
        f64::from(m.spec.scale) * ba
    };
    for (at, m) in stacked.to_host(&Naive).unwrap().iter().enumerate() {
        assert_eq!((m.spec.rank, m.spec.role), (9, parts[0][at].spec.role));
        let [out, input] = Role::Layer(0, m.spec.role).shape(cfg).unwrap();
        for (o, i) in (0..out).flat_map(|o| (0..input).map(move |i| (o, i))) {
            let want: f64 = parts.iter().zip(weights).map(|(p, w)| f64::from(w) * dense(&p[at], o, i)).sum();
            assert!((dense(m, o, i) - want).abs() < 1e-6, "{} [{o}, {i}]", m.spec.role);
        }
    }
}
