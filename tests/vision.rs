//! Vision transformers against goldens of timm, transformers and PyTorch (scripts/vision_reference.py), and their backward against differences.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use quadriga::backend::Train;
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::format::vit::{VitFolder, VitOptions, write_vit};
use quadriga::model::Adapter;
use quadriga::model::lora::{ModuleSpec, ModuleValues};
use quadriga::model::roles::LayerRole;
use quadriga::rng::Rng;
use quadriga::train::optim::Kind;
use quadriga::train::{Penalty, Settings};
use quadriga::vision::{
    Examples, Fresh, Images, Pool, TrainedVit, Trains, VisionTrainer, Vit, VitConfig, VitRole, VitSource, adapter,
    adapter_of,
};
use serde_json::Value;

const FOLDERS: [&str; 3] = ["tiny-vit-hf", "tiny-vit-timm", "tiny-dinov2"];
const SCALE: f32 = 1.5;

fn folder(name: &str) -> PathBuf {
    common::root().join("models").join(name)
}

fn golden(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder(name).join("golden.json")).unwrap()).unwrap()
}

/// All numbers of nested lists.
fn numbers(v: &Value) -> Vec<f64> {
    match v {
        Value::Array(a) => a.iter().flat_map(numbers).collect(),
        v => vec![v.as_f64().unwrap()],
    }
}

fn ids(v: &Value) -> Vec<u32> {
    numbers(v).into_iter().map(|x| x as u32).collect()
}

fn formula(n: usize, a: usize, b: usize, m: usize, scale: f64, shift: f64) -> Vec<f32> {
    (0..n).map(|i| (((a * i + b) % m) as f64 / scale - shift) as f32).collect()
}

/// The goldens' images and labels.
fn examples(golden: &Value) -> Examples {
    let shape: Vec<usize> = ids(&golden["image"]).into_iter().map(|n| n as usize).collect();
    let [n, c, h, w] = shape[..] else { panic!("{shape:?}") };
    let images = Images::new([c, h, w], formula(n * c * h * w, 7919, 104729, 1021, 510.5, 1.0)).unwrap();
    Examples::new(images, ids(&golden["labels"])).unwrap()
}

fn open(name: &str) -> VitFolder {
    let dino = VitOptions { image: Some([24, 20]), classes: Some(4) };
    VitFolder::open(&folder(name), if name == "tiny-dinov2" { dino } else { VitOptions::default() }).unwrap()
}

fn settings() -> Settings {
    Settings { kind: Kind::Sgd, lr: 0.05, clip: 0.0, ..Settings::default() }
}

/// The model of a folder with the goldens' head, and what trains of it.
fn trainer<B: Train>(be: Arc<B>, name: &str, trains: Trains, lora: bool, images: usize) -> VisionTrainer<B> {
    trainer_with(be, name, trains, lora, images, settings())
}

fn trainer_with<B: Train>(
    be: Arc<B>,
    name: &str,
    trains: Trains,
    lora: bool,
    images: usize,
    settings: Settings,
) -> VisionTrainer<B> {
    let source = open(name);
    let (vit, masters) = Vit::load(be.clone(), &source, trains).unwrap();
    let adapter = lora.then(|| {
        let mut a = golden_adapter(&vit, &golden(name));
        a.train(&*be, |_| true).unwrap();
        a
    });
    let mut t = VisionTrainer::new(vit, masters, adapter, settings, images).unwrap();
    if name == "tiny-dinov2" {
        let (w, b) = (formula(4 * 32, 53, 5, 97, 97.0, 0.5), formula(4, 29, 3, 31, 31.0, 0.5));
        t.set("head.w", &w).unwrap();
        t.set("head.b", &b).unwrap();
    }
    t
}

fn role(name: &str) -> (usize, LayerRole) {
    let mut parts = name.splitn(3, '.').skip(1);
    let block = parts.next().unwrap().parse().unwrap();
    let role = match parts.next().unwrap() {
        "attn.wq" => LayerRole::Q,
        "attn.wk" => LayerRole::K,
        "attn.wv" => LayerRole::V,
        "attn.wo" => LayerRole::O,
        "mlp.fc1.w" => LayerRole::Up,
        "mlp.fc2.w" => LayerRole::Down,
        other => panic!("{other}"),
    };
    (block, role)
}

/// The adapter that the goldens have.
fn golden_adapter<B: Train>(vit: &Vit<B>, golden: &Value) -> Adapter<B> {
    let names: Vec<&str> = golden["lora"]["modules"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
    let specs: Vec<ModuleSpec> = names
        .iter()
        .map(|name| {
            let (layer, role) = role(name);
            ModuleSpec { role, layer, rank: 2, scale: SCALE }
        })
        .collect();
    let fresh = adapter(vit, &specs, 0).unwrap();
    let be = vit.backend();
    let values: Vec<ModuleValues> = specs
        .iter()
        .enumerate()
        .map(|(m, spec)| {
            let of = |o: &ModuleValues| (o.spec.layer, o.spec.role) == (spec.layer, spec.role);
            let shape = fresh.to_host(be).unwrap().into_iter().find(of).unwrap();
            let fifth = |v: Vec<f32>| v.into_iter().map(|x| (f64::from(x) / 5.0) as f32).collect::<Vec<_>>();
            let a = fifth(formula(shape.a.len(), 37, 11 + 7 * m, 101, 101.0, 0.5));
            let b = fifth(formula(shape.b.len(), 41, 17 + 5 * m, 103, 103.0, 0.5));
            ModuleValues { spec: *spec, a, b }
        })
        .collect();
    adapter_of(vit, &values).unwrap()
}

fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * size, "{what} at {i}: {g}, not {w}, of size {size}");
    }
}

fn wide(v: &[f32]) -> Vec<f64> {
    v.iter().map(|&x| x.into()).collect()
}

/// A gradient against its record.
fn recorded(what: &str, got: &[f32], record: &Value, tolerance: f64) {
    let got = wide(got);
    let norm = got.iter().map(|x| x * x).sum::<f64>().sqrt();
    let want = record["norm"].as_f64().unwrap();
    // The bias of k moves no softmax: its gradient is 0, and what is left of it rounding.
    if want < 1e-12 {
        assert!(norm < 1e-4, "{what}: {norm}, not 0");
        return;
    }
    assert!((norm - want).abs() <= tolerance * want, "{what}: norm {norm}, not {want}");
    for (at, value) in ids(&record["at"]).into_iter().zip(numbers(&record["values"])) {
        assert!(
            (got[at as usize] - value).abs() <= tolerance * want,
            "{what} at {at}: {}, not {value}",
            got[at as usize]
        );
    }
    let sum: f64 = got.iter().sum();
    let error = (sum - record["sum"].as_f64().unwrap()).abs();
    assert!(error <= tolerance * want * (got.len() as f64).sqrt(), "{what}: sum {sum}");
}

/// Everything that the goldens have, within a tolerance; `grads` for the gradients.
fn check<B: Train>(be: Arc<B>, name: &str, tolerance: f64, grads: f64) {
    let g = golden(name);
    let (ex, allowed) = (examples(&g), ids(&g["allowed"]));
    // Two images a pass, so that examples are cut into passes.
    let mut t = trainer(be.clone(), name, Trains::All, false, 2);
    close(&format!("{name}: logits"), &wide(&t.logits(&ex.images, &[]).unwrap()), &numbers(&g["logits"]), tolerance);
    let features = wide(&t.features(&ex.images).unwrap());
    close(&format!("{name}: features"), &features, &numbers(&g["features"]), tolerance);
    for (i, want) in g["hidden"].as_array().unwrap().iter().enumerate() {
        let got = wide(&t.features_behind(&ex.images, i, false).unwrap());
        close(&format!("{name}: behind {i} blocks"), &got[..32], &numbers(want), tolerance);
    }
    let all = t.evaluate(&ex, &[]).unwrap().loss;
    close(&format!("{name}: loss"), &[all], &numbers(&g["loss"]), tolerance);
    let (score, gradient) = t.gradient(&ex, &allowed).unwrap();
    close(&format!("{name}: loss of allowed classes"), &[score.loss], &numbers(&g["loss_allowed"]), tolerance);
    let records = g["grads"].as_object().unwrap();
    for (role, record) in records {
        let at = t.span(role).unwrap_or_else(|| panic!("{name}: no {role}"));
        recorded(&format!("{name}: {role}"), &gradient[at], record, grads);
    }
    // All that trains has been compared, but for positions that were interpolated.
    let missing = t.params().filter(|p| !records.contains_key(&p.name)).map(|p| &p.name[..]).collect::<Vec<_>>();
    assert_eq!(missing, if name == "tiny-dinov2" { vec!["positions"] } else { vec![] }, "{name}");

    let mut t = trainer(be, name, Trains::Head, true, 8);
    let (score, gradient) = t.gradient(&ex, &allowed).unwrap();
    close(&format!("{name}: LoRA's loss"), &[score.loss], &numbers(&g["lora"]["loss"]), tolerance);
    let places = t.places();
    let mut compared = 0;
    for (key, record) in g["lora"]["grads"].as_object().unwrap() {
        let (module, side) = key.rsplit_once('.').unwrap();
        let (layer, role) = role(module);
        let m = places.iter().find(|m| (m.spec.layer, m.spec.role) == (layer, role)).unwrap();
        let values = &gradient[if side == "a" { m.a.clone() } else { m.b.clone() }];
        recorded(&format!("{name}: {key}"), values, record, grads);
        compared += 1;
    }
    assert_eq!(compared, 2 * places.len());
}

#[test]
fn the_specification_meets_the_goldens() {
    for name in FOLDERS {
        // transformers interpolates positions in f32; goldens have nine digits.
        let tolerance = if name == "tiny-dinov2" { 2e-6 } else { 1e-7 };
        check(Arc::new(Naive), name, tolerance, 2.0 * tolerance);
    }
}

#[test]
fn the_cpu_meets_the_goldens() {
    for name in FOLDERS {
        for tier in Tier::available() {
            check(Arc::new(Cpu::with(2, tier, Compute::Exact)), name, 2e-5, 1e-4);
        }
    }
    // Where there are instructions for bf16, operands are rounded to it.
    check(Arc::new(Cpu::with(2, Tier::detect(), Compute::Fast)), "tiny-vit-timm", 0.05, 0.1);
}

/// bf16 operands.
#[test]
fn cuda_meets_the_goldens() {
    let Some(cuda) = common::gpu() else { return };
    check(Arc::new(cuda), "tiny-vit-timm", 0.05, 0.1);
}

/// A tiny model with every kind of tensor: LayerScale, biases, class token or mean.
fn small(mean: bool) -> VitConfig {
    let mut c = VitConfig::new(8, 4, 8, 2, 2, 5);
    c.channels = 1;
    c.mlp = 12;
    c.layer_scale = true;
    if mean {
        c.pool = Pool::Mean;
    }
    c
}

/// Weights of a size at which every part of the model matters.
struct Rough(VitConfig);

impl VitSource for Rough {
    fn config(&self) -> &VitConfig {
        &self.0
    }
    fn values(&self, role: VitRole) -> quadriga::Result<Vec<f32>> {
        let [rows, cols] = role.shape(&self.0).unwrap();
        let place = VitRole::all(&self.0).position(|r| r == role).unwrap();
        let mut rng = Rng::stream(5, place as u64);
        let size = if role.is_matrix() { 1.5 / (cols as f32).sqrt() } else { 0.5 };
        Ok((0..rows * cols).map(|_| size * rng.normal() + if role.is_matrix() { 0.0 } else { 0.3 }).collect())
    }
}

fn small_examples() -> Examples {
    let images = Images::new([1, 8, 8], formula(3 * 64, 7919, 104729, 1021, 510.5, 1.0)).unwrap();
    Examples::new(images, vec![1, 4, 3]).unwrap()
}

/// The gradient of every tensor of a model and of its adapter against central differences of its loss, in f64, along directions that
/// see every element. Values pass as f32, so they and the steps are multiples of one power of two: all points are exact.
#[test]
fn gradients_are_differences() {
    const H: f32 = 1.0 / 8192.0;
    for (mean, trains) in [(false, Trains::All), (true, Trains::All), (false, Trains::Head)] {
        let (vit, masters) = Vit::load(Arc::new(Naive), &Rough(small(mean)), trains).unwrap();
        let roles = [LayerRole::Q, LayerRole::K, LayerRole::V, LayerRole::O, LayerRole::Up, LayerRole::Down];
        let specs: Vec<_> = roles
            .into_iter()
            .flat_map(|role| (0..2).map(move |layer| ModuleSpec { role, layer, rank: 2, scale: 1.25 }))
            .collect();
        let mut a = adapter(&vit, &specs, 3).unwrap();
        a.train(&Naive, |_| true).unwrap();
        let mut t = VisionTrainer::new(vit, masters, Some(a), settings(), 2).unwrap();
        let (ex, allowed) = (small_examples(), [1, 3, 4]);
        let mut rng = Rng::new(9);
        let spans: Vec<_> = t.params().map(|p| (p.name.clone(), t.span(&p.name).unwrap())).collect();
        let mut values = t.values().unwrap();
        for (name, at) in &spans {
            // B begins as 0, and A would have no gradient.
            let b = name.starts_with("layers") && name.ends_with(".b");
            let moved = |v: f32, rng: &mut Rng| v + if b { 0.3 * rng.normal() } else { 0.0 };
            values[at.clone()].iter_mut().for_each(|v| *v = (moved(*v, &mut rng) / H).round() * H);
        }
        t.set_values(&values).unwrap();
        let (_, gradient) = t.gradient(&ex, &allowed).unwrap();
        assert_eq!(gradient.len(), values.len());
        for (name, at) in spans {
            let (v, g) = (&values[at.clone()], &gradient[at]);
            for _ in 0..2 {
                let signs: Vec<f32> = v.iter().map(|_| if rng.below(2) == 0 { 1.0 } else { -1.0 }).collect();
                let loss = [-2.0, -1.0, 1.0, 2.0].map(|steps| {
                    let moved: Vec<f32> = v.iter().zip(&signs).map(|(v, s)| v + s * steps * H).collect();
                    t.set(&name, &moved).unwrap();
                    t.evaluate(&ex, &allowed).unwrap().loss
                });
                t.set(&name, v).unwrap();
                let numeric = (loss[0] - 8.0 * loss[1] + 8.0 * loss[2] - loss[3]) / (12.0 * f64::from(H));
                let analytic: f64 = g.iter().zip(&signs).map(|(g, s)| f64::from(*g) * f64::from(*s)).sum();
                // The bias of k has no gradient; others' are about as large as the loss.
                let size = g.iter().fold(1e-2, |m, x| f64::from(x.abs()).max(m)) * (g.len() as f64).sqrt();
                let error = (numeric - analytic).abs() / size;
                assert!(error < 1e-6, "{name}, mean {mean}: {analytic:.9e}, and {numeric:.9e} by differences");
            }
        }
    }
}

/// The gradients of what trains, by name.
fn named<B: Train>(t: &mut VisionTrainer<B>, ex: &Examples) -> Vec<(String, Vec<f32>)> {
    let (_, all) = t.gradient(ex, &[]).unwrap();
    t.params().filter(|p| p.g.is_some()).map(|p| (p.name.clone(), all[t.span(&p.name).unwrap()].to_vec())).collect()
}

/// What is packed with an image changes nothing of it, and the truncated backward nothing of what it keeps.
#[test]
fn images_are_independent_and_truncation_exact() {
    let be = Arc::new(Cpu::with(2, Tier::Portable, Compute::Exact));
    let g = golden("tiny-vit-hf");
    let ex = examples(&g);
    let mut together = trainer(be.clone(), "tiny-vit-hf", Trains::Head, true, 3);
    let all = together.logits(&ex.images, &[]).unwrap();
    let mut alone = trainer(be.clone(), "tiny-vit-hf", Trains::Head, true, 1);
    assert_eq!(alone.logits(&ex.images, &[]).unwrap(), all);

    // Only the last block's adapter trains: the same gradient, and no others.
    let whole = named(&mut together, &ex);
    let (vit, masters) = Vit::load(be.clone(), &open("tiny-vit-hf"), Trains::Head).unwrap();
    let mut a = golden_adapter(&vit, &g);
    a.train(&*be, |layer| layer == 1).unwrap();
    let mut upper = VisionTrainer::new(vit, masters, Some(a), settings(), 3).unwrap();
    let part = named(&mut upper, &ex);
    let kept: Vec<_> = whole.into_iter().filter(|p| !p.0.starts_with("layers.0")).collect();
    assert!(kept.len() < together.params().count() && kept == part);

    // Some of the model's own tensors: the same gradients as if all trained.
    let mut full = trainer(be.clone(), "tiny-vit-hf", Trains::All, false, 3);
    let whole = named(&mut full, &ex);
    let some: [fn(&str) -> bool; 4] = [
        |n| n.starts_with("blocks.1.norm1"),
        |n| n.starts_with("blocks.1.mlp") || n.starts_with("norm"),
        |n| n.starts_with("norm"),
        |n| n == "class" || n == "patch.b",
    ];
    for some in some {
        let (vit, mut masters) = Vit::load(be.clone(), &open("tiny-vit-hf"), Trains::All).unwrap();
        masters.train(&*be, |role| some(&role.to_string())).unwrap();
        let mut t = VisionTrainer::new(vit, masters, None, settings(), 3).unwrap();
        let part = named(&mut t, &ex);
        let kept: Vec<_> = whole.iter().filter(|p| some(&p.0)).cloned().collect();
        assert!(!part.is_empty() && part == kept, "{:?}", part.iter().map(|p| &p.0).collect::<Vec<_>>());
    }

    // Without an adapter only the head has a gradient.
    let mut head = trainer(be, "tiny-vit-hf", Trains::Head, false, 3);
    let names: Vec<String> = named(&mut head, &ex).into_iter().map(|p| p.0).collect();
    assert_eq!(names, ["head.w", "head.b"]);
}

#[test]
fn classes_that_are_not_allowed_are_out_of_it() {
    let be = Arc::new(Cpu::with(2, Tier::Portable, Compute::Exact));
    let g = golden("tiny-vit-hf");
    let (ex, allowed) = (examples(&g), ids(&g["allowed"]));
    let mut t = trainer(be, "tiny-vit-hf", Trains::Head, false, 2);
    let logits = t.logits(&ex.images, &allowed).unwrap();
    for (i, z) in logits.iter().enumerate() {
        assert_eq!(z.is_infinite(), !allowed.contains(&(i as u32 % 5)), "{i}: {z}");
    }
    assert!(t.predict(&ex.images, &[2]).unwrap() == [2, 2, 2]);
    assert!(t.predict(&ex.images, &allowed).unwrap().iter().all(|c| allowed.contains(c)));
    let (score, gradient) = t.gradient(&ex, &allowed).unwrap();
    assert!(score.loss.is_finite() && score.examples == 3);
    let db = &gradient[t.span("head.b").unwrap()];
    assert!((0..5).all(|c| (db[c as usize] == 0.0) != allowed.contains(&c)), "{db:?}");
    let says = |e: quadriga::Error, what: &str| assert!(e.to_string().contains(what), "{e}");
    says(t.evaluate(&ex, &[0, 2]).unwrap_err(), "class 3 is the label of an example, and is not allowed");
    says(t.logits(&ex.images, &[7]).unwrap_err(), "class 7 of 5");
    let other = Images::new([3, 12, 16], vec![0.0; 3 * 12 * 16]).unwrap();
    says(t.logits(&other, &[]).unwrap_err(), "images of [3, 12, 16] for a model of [3, 16, 16]");
    says(t.set("none", &[0.0]).unwrap_err(), "there is no parameter none");
    says(t.set("head.b", &[0.0]).unwrap_err(), "head.b: 1 values for [1, 5]");
    says(t.set_values(&[0.0]).unwrap_err(), "1 values for 165");
    let penalty = Penalty { gradient: None, pull: Some((&[0.0], 1.0)) };
    says(t.step_with(&ex, &allowed, penalty).unwrap_err(), "1 values for 165");
    says(t.features_behind(&ex.images, 3, false).unwrap_err(), "behind block 3 of 2");
    says(t.attention_input(&ex.images, 2).unwrap_err(), "block 2 of 2");
}

/// What a driver of a stream does: reads and sets everything, adds to gradients, pulls towards references, begins anew.
#[test]
fn a_driver_has_all_in_hand() {
    let be = Arc::new(Cpu::with(2, Tier::Portable, Compute::Exact));
    let g = golden("tiny-vit-hf");
    let ex = examples(&g);
    let mut t = trainer(be.clone(), "tiny-vit-hf", Trains::Head, true, 2);
    let start = t.values().unwrap();
    let bare = t.features_behind(&ex.images, 2, true).unwrap();
    // SGD: a step is the rate times the gradient, whatever it was made of.
    let (score, plain) = t.gradient(&ex, &[]).unwrap();
    let mut gradient = Vec::new();
    let mut twice = |loss: f64, values: &[f32], g: &mut [f32]| {
        assert_eq!((loss, values, &*g), (score.loss, &start[..], &plain[..]));
        g.iter_mut().for_each(|g| *g = 2.0 * *g + 0.5);
        gradient = g.to_vec();
        Ok(())
    };
    t.step_with(&ex, &[], Penalty { gradient: Some(&mut twice), pull: None }).unwrap();
    let moved = t.values().unwrap();
    let want: Vec<f64> = start.iter().zip(&gradient).map(|(v, g)| f64::from(*v) - 0.05 * f64::from(*g)).collect();
    close("a step", &wide(&moved), &want, 1e-6);
    // The adapter has moved what lies behind it, and not the model.
    assert_ne!(t.features_behind(&ex.images, 2, false).unwrap(), bare);
    assert_eq!(t.features_behind(&ex.images, 2, true).unwrap(), bare);
    // A pull that is stronger than any step.
    t.step_with(&ex, &[], Penalty { gradient: None, pull: Some((&start, 1e6)) }).unwrap();
    assert_eq!(t.values().unwrap(), start);
    assert_eq!(t.steps(), 2);
    // The same steps from the same state, also of the optimiser.
    let adam = Settings { lr: 0.01, ..Settings::default() };
    let mut t = trainer_with(be.clone(), "tiny-vit-hf", Trains::Head, true, 2, adam);
    let run = |t: &mut VisionTrainer<Cpu>| {
        (0..3).for_each(|_| {
            t.step(&ex, &[]).unwrap();
        })
    };
    run(&mut t);
    let (middle, (steps, moments)) = (t.values().unwrap(), t.moments().unwrap());
    run(&mut t);
    let end = t.values().unwrap();
    t.restart().unwrap();
    assert_eq!(t.steps(), 0);
    t.set_values(&middle).unwrap();
    t.set_moments(steps, &moments).unwrap();
    run(&mut t);
    assert!(t.values().unwrap() == end && t.steps() == 6 && end != start);
    // Inputs of q, k and v, of the lowest block too, which keeps no activations where only the upper one trains.
    let inputs = t.attention_input(&ex.images, 0).unwrap();
    let (vit, masters) = Vit::load(be, &open("tiny-vit-hf"), Trains::Head).unwrap();
    let mut head = VisionTrainer::new(vit, masters, None, settings(), 3).unwrap();
    assert_eq!((inputs.len(), head.attention_input(&ex.images, 0).unwrap()), (3 * 17 * 32, inputs));
}

#[test]
fn fresh_weights_are_the_seeds() {
    let values = |seed, role| Fresh::new(small(false), seed).unwrap().values(role).unwrap();
    let c = small(false);
    for role in VitRole::all(&c) {
        let (v, [rows, cols]) = (values(1, role), role.shape(&c).unwrap());
        assert_eq!((v.len(), &v), (rows * cols, &values(1, role)), "{role}");
        let (mean, most) = (v.iter().sum::<f32>() / v.len() as f32, v.iter().fold(0.0f32, |m, x| m.max(x.abs())));
        let random = v.iter().any(|x| *x != v[0]);
        assert_eq!(random, values(2, role) != v, "{role}");
        assert_eq!(random, role.is_matrix() && role != VitRole::Head || role == VitRole::Positions, "{role}");
        if random {
            let bound = if role == VitRole::Positions { 0.04 } else { 2.0 * (6.0 / (rows + cols) as f32).sqrt() };
            assert!(mean.abs() < most / 2.0 && most < bound && most > bound / 8.0, "{role}: {mean}, {most}");
        }
    }
}

/// A fresh model learns three images by heart, is written, read again, and still knows them.
#[test]
fn a_model_is_trained_written_and_read() {
    let be = Arc::new(Cpu::with(2, Tier::detect(), Compute::Exact));
    let mut config = small(false);
    config.hidden = 16;
    let fresh = Fresh::new(config, 4).unwrap();
    let (vit, masters) = Vit::load(be.clone(), &fresh, Trains::All).unwrap();
    let adam = Settings { lr: 0.01, ..Settings::default() };
    let mut t = VisionTrainer::new(vit, masters, None, adam, 4).unwrap();
    let ex = small_examples();
    let first = t.step(&ex, &[]).unwrap().score;
    assert!((first.loss - 5f64.ln()).abs() < 1e-6, "a head of zeros says nothing: {first:?}");
    for _ in 0..40 {
        t.step(&ex, &[]).unwrap();
    }
    let last = t.evaluate(&ex, &[]).unwrap();
    assert!(last.loss < 0.1 && last.correct == 3 && t.steps() == 41, "{last:?}");

    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model");
    write_vit(&TrainedVit { vit: t.vit(), masters: t.masters(), rest: &fresh }, &path).unwrap();
    let again = VitFolder::open(&path, VitOptions::default()).unwrap();
    assert!(!again.config().layer_scale && again.config().classes == 5);
    let (vit, masters) = Vit::load(be, &again, Trains::Head).unwrap();
    let mut read = VisionTrainer::new(vit, masters, None, settings(), 4).unwrap();
    let (a, b) = (t.logits(&ex.images, &[]).unwrap(), read.logits(&ex.images, &[]).unwrap());
    close("read again", &wide(&b), &wide(&a), 1e-5);
}
