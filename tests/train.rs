//! Training against PyTorch (`scripts/train_reference.py`): gradients of every tensor, ten steps of LoRA and of full
//! fine-tuning.

mod common;

use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Buffer, Train};
use quadriga::format::Checkpoint;
use quadriga::model::lora::{ModuleSpec, ModuleValues};
use quadriga::model::roles::{LayerRole, Role};
use quadriga::model::{Adapter, Full, Model, ModelConfig, Pass, Recompute};
use quadriga::train::optim::Kind;
use quadriga::train::{Batch, Settings, Trainable, Trainer};
use serde_json::Value;

const FAMILIES: [&str; 6] = ["tiny-llama", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"];

fn golden() -> Value {
    let path = common::root().join("tests/golden/train.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&common::root().join("models").join(name)).unwrap()
}

/// All of both sequences but their first tokens are labels.
fn batch(model: &Value) -> Batch {
    let mut batch = Batch::default();
    for s in model["sequences"].as_array().unwrap() {
        let (first, tokens) = (batch.tokens.len() as u32, floats(s));
        batch.labels.extend((1..tokens.len()).map(|i| (first + i as u32 - 1, tokens[i] as u32)));
        batch.lens.push(tokens.len());
        batch.tokens.extend(tokens.iter().map(|&t| t as u32));
    }
    batch
}

fn module(role: LayerRole) -> &'static str {
    use LayerRole::*;
    match role {
        Q => "self_attn.q_proj",
        K => "self_attn.k_proj",
        V => "self_attn.v_proj",
        O => "self_attn.o_proj",
        Gate => "mlp.gate_proj",
        Up => "mlp.up_proj",
        Down => "mlp.down_proj",
        other => panic!("{other} is no linear"),
    }
}

/// The name of a tensor in files.
fn hugging_face(role: Role, gemma: bool) -> String {
    use LayerRole::*;
    let (i, role) = match role {
        Role::Embed => return "model.embed_tokens.weight".into(),
        Role::FinalNorm => return "model.norm.weight".into(),
        Role::Head => return "lm_head.weight".into(),
        Role::Layer(i, role) => (i, role),
    };
    let name = match role {
        AttnNorm => "input_layernorm.weight",
        MlpNorm if gemma => "pre_feedforward_layernorm.weight",
        MlpNorm | PostAttnNorm => "post_attention_layernorm.weight",
        PostMlpNorm => "post_feedforward_layernorm.weight",
        QBias => "self_attn.q_proj.bias",
        KBias => "self_attn.k_proj.bias",
        VBias => "self_attn.v_proj.bias",
        QNorm => "self_attn.q_norm.weight",
        KNorm => "self_attn.k_norm.weight",
        linear => return format!("model.layers.{i}.{}.weight", module(linear)),
    };
    format!("model.layers.{i}.{name}")
}

/// Norm, sum and some entries of a tensor, relative to its norm.
fn same(what: &str, got: &[f64], want: &Value, bound: f64) {
    let norm = want["norm"].as_f64().unwrap();
    let mine = got.iter().map(|x| x * x).sum::<f64>().sqrt();
    assert!((mine - norm).abs() <= bound * norm.max(1e-3), "{what}: norm {mine}, not {norm}");
    let (sum, scale) = (got.iter().sum::<f64>(), norm.max(1e-3) * (got.len() as f64).sqrt());
    assert!((sum - want["sum"].as_f64().unwrap()).abs() <= bound * scale, "{what}: sum {sum}, not {}", want["sum"]);
    for (at, value) in floats(&want["at"]).iter().zip(floats(&want["values"])) {
        let x = got[*at as usize];
        assert!((x - value).abs() <= bound * norm.max(1e-3), "{what}[{at}]: {x}, not {value}");
    }
}

fn host<B: Train>(be: &B, b: &B::Buf<B::Acc>, n: usize) -> Vec<f64> {
    let mut v = vec![0.0; n];
    be.download_acc(b.head(n), &mut v).unwrap();
    v.into_iter().map(f64::from).collect()
}

fn full<B: Train>(be: B, name: &str) -> (Model<B>, Full<B>) {
    Model::load_trainable(Arc::new(be), &open(name), |_, _| {}).unwrap()
}

fn gradients<B: Train>(be: impl Fn() -> B, bound: f64) {
    let golden = golden();
    for name in FAMILIES {
        let want = &golden["models"][name];
        let (model, full) = full(be(), name);
        let gemma = name.contains("gemma");
        let batch = batch(want);
        let mut t = Trainer::new(model, Trainable::Full(full), Settings::default(), 64, Recompute::Pointwise).unwrap();
        let (rows, ids): (Vec<u32>, Vec<u32>) = batch.labels.iter().copied().unzip();
        let pass = Pass::causal(t.model().config(), batch.tokens.clone(), &batch.lens, rows).unwrap();
        let weights = vec![1.0 / ids.len() as f32; ids.len()];
        let target = |r: std::ops::Range<usize>| quadriga::backend::Target::Hard(&ids[r]);
        let losses = t.accumulate(&pass, target, &weights, true).unwrap();
        let (loss, known) = (losses.iter().sum::<f64>() / losses.len() as f64, want["grads"]["loss"].as_f64().unwrap());
        assert!((loss - known).abs() < bound * known, "{name}: loss {loss}, not {known}");
        let tensors = want["grads"]["tensors"].as_object().unwrap();
        let Trainable::Full(full) = t.trainable() else { unreachable!() };
        assert_eq!(tensors.len(), full.params().count());
        for (role, p) in full.params() {
            let key = hugging_face(role, gemma);
            let g = host(t.model().backend(), p.g.as_ref().unwrap(), p.len());
            same(&format!("{name} {key}"), &g, &tensors[&key], bound);
        }
    }
}

#[test]
fn gradients_are_pytorchs() {
    gradients(|| Naive, 2e-5);
    for tier in Tier::available() {
        gradients(|| Cpu::with(2, tier, Compute::Exact), 5e-5);
    }
}

fn adapter(cfg: &ModelConfig) -> Vec<ModuleValues> {
    let mut all = Vec::new();
    for layer in 0..cfg.layers {
        for (index, role) in LayerRole::LINEARS.into_iter().enumerate() {
            let [out, input] = Role::Layer(layer, role).shape(cfg).unwrap();
            let value = |i: usize, j: usize| {
                0.05 * (1.0 + 0.37 * i as f64 + 0.11 * j as f64 + 0.5 * layer as f64 + index as f64).sin()
            };
            let a = (0..4).flat_map(|i| (0..input).map(move |j| value(i, j) as f32)).collect();
            let spec = ModuleSpec { role, layer, rank: 4, scale: 2.0 };
            all.push(ModuleValues { spec, a, b: vec![0.0; out * 4] });
        }
    }
    all
}

fn settings(kind: Kind, lr: f32, weight_decay: f32) -> Settings {
    Settings { kind, lr, weight_decay, ..Settings::default() }
}

/// Ten steps; losses within 1e-4, norms of gradients and weights within 1e-3. In f32, losses above 1 within 1e-4 of
/// themselves, or as far as PyTorch's weights in f32 are from its own in f64, where that is more: where gradients are
/// nearly 0, Adam's first steps go where rounding points.
fn ten_steps<B: Train>(what: &str, t: &mut Trainer<B>, batch: &Batch, want: &Value) {
    let (exact, noise) = (size_of::<B::Acc>() == 8, want["float64"]["tensor"].as_f64().unwrap());
    let (losses, norms) = (floats(&want["losses"]), floats(&want["grad_norms"]));
    for (i, (loss, norm)) in losses.iter().zip(norms).enumerate() {
        // In two halves, which must be the step that the whole is.
        let r = t.step(&halves(batch)).unwrap();
        let bound = if exact { 1e-4 } else { noise.max(1e-4) * loss.max(1.0) };
        assert!((r.loss - loss).abs() < bound, "{what}, step {i}: loss {}, not {loss}", r.loss);
        let got = r.stepped.grad_norm;
        assert!((got / norm - 1.0).abs() < 1e-3, "{what}, step {i}: norm {got}, not {norm}");
    }
    assert_eq!(losses.len(), 10);
}

fn halves(batch: &Batch) -> [Batch; 2] {
    let n = batch.lens[0];
    let part = |rows: std::ops::Range<usize>, lens: &[usize]| Batch {
        tokens: batch.tokens[rows.clone()].to_vec(),
        lens: lens.to_vec(),
        ids: Vec::new(),
        labels: batch
            .labels
            .iter()
            .filter(|l| rows.contains(&(l.0 as usize)))
            .map(|&(r, t)| (r - rows.start as u32, t))
            .collect(),
    };
    [part(0..n, &batch.lens[..1]), part(n..batch.tokens.len(), &batch.lens[1..])]
}

fn lora_steps<B: Train>(be: impl Fn() -> B) {
    let golden = golden();
    for name in FAMILIES {
        let want = &golden["models"][name];
        let model = Model::load(Arc::new(be()), &open(name), |_, _| {}).unwrap();
        let mut a = Adapter::new(model.backend(), model.config(), &adapter(model.config())).unwrap();
        a.train(model.backend(), |_| true).unwrap();
        let settings = settings(Kind::AdamW, 1e-2, 0.01);
        let mut t = Trainer::new(model, Trainable::Adapter(a), settings, 64, Recompute::Layer).unwrap();
        ten_steps(name, &mut t, &batch(want), &want["lora"]);
        let Trainable::Adapter(a) = t.trainable() else { unreachable!() };
        for m in a.to_host(t.model().backend()).unwrap() {
            let key = format!("model.layers.{}.{}", m.spec.layer, module(m.spec.role));
            for (side, values) in [("A", m.a), ("B", m.b)] {
                let key = format!("{key}.lora_{side}.weight");
                let values: Vec<f64> = values.into_iter().map(f64::from).collect();
                same(&format!("{name} {key}"), &values, &want["lora"]["tensors"][&key], 1e-3);
            }
        }
    }
}

#[test]
fn ten_steps_of_lora_are_pytorchs() {
    lora_steps(|| Naive);
    for tier in Tier::available() {
        lora_steps(|| Cpu::with(2, tier, Compute::Exact));
    }
}

fn full_steps<B: Train>(be: impl Fn() -> B) {
    let golden = golden();
    for (name, run, settings) in [
        ("tiny-llama", "full_adamw", settings(Kind::AdamW, 1e-3, 0.01)),
        ("tiny-qwen3", "full_adamw", settings(Kind::AdamW, 1e-3, 0.01)),
        ("tiny-llama", "full_sgd", settings(Kind::Momentum, 0.05, 0.0)),
    ] {
        let want = &golden["models"][name];
        let (model, full) = full(be(), name);
        let mut t = Trainer::new(model, Trainable::Full(full), settings, 64, Recompute::Nothing).unwrap();
        ten_steps(&format!("{name} {run}"), &mut t, &batch(want), &want[run]);
        let Trainable::Full(full) = t.trainable() else { unreachable!() };
        for (role, p) in full.params() {
            let (key, w) = (hugging_face(role, false), host(t.model().backend(), &p.w, p.len()));
            same(&format!("{name} {run} {key}"), &w, &want[run]["tensors"][&key], 1e-3);
        }
    }
}

#[test]
fn ten_steps_of_full_fine_tuning_are_pytorchs() {
    full_steps(|| Naive);
    for tier in Tier::available() {
        full_steps(|| Cpu::with(2, tier, Compute::Exact));
    }
}
