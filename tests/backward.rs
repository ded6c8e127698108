//! The backward pass of whole decoders: against central differences in f64, between recompute levels, and between backends.

mod common;

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Buffer, Target, Train, TreeMask, Visible};
use quadriga::dtype::Real;
use quadriga::format::Checkpoint;
use quadriga::model::lora::{ModuleSpec, ModuleValues};
use quadriga::model::roles::{LayerRole, Role};
use quadriga::model::{Adapter, Full, Head, Model, ModelConfig, Param, Pass, Recompute, Saved};
use quadriga::rng::Rng;

const FAMILIES: [&str; 6] = ["tiny-llama", "tiny-llama3", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"];

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&common::root().join("models").join(name)).unwrap()
}

/// Adapters of odd ranks on some linears of each layer, none of them 0.
fn modules(cfg: &ModelConfig) -> Vec<ModuleValues> {
    let mut rng = Rng::new(3);
    let mut all = Vec::new();
    for layer in 0..cfg.layers {
        for (i, role) in LayerRole::LINEARS.into_iter().enumerate().filter(|(i, _)| (i + layer) % 4 != 3) {
            let [out, input] = Role::Layer(layer, role).shape(cfg).unwrap();
            let rank = 1 + (i + layer) % 3;
            let mut values = |n: usize| (0..n).map(|_| 0.1 * rng.normal()).collect();
            let spec = ModuleSpec { role, layer, rank, scale: 0.5 + i as f32 / 4.0 };
            all.push(ModuleValues { spec, a: values(rank * input), b: values(out * rank) });
        }
    }
    all
}

/// A model that trains in every way, with one batch.
struct Case<B: Backend> {
    model: Model<B>,
    full: Full<B>,
    adapter: Adapter<B>,
    pass: Pass,
    labels: Vec<u32>,
    weights: Vec<f32>,
    saved: Saved<B>,
    head: Head<B>,
}

impl<B: Train> Case<B> {
    fn new(be: B, name: &str, visible: impl Fn(usize) -> Visible, recompute: Recompute) -> Self {
        let source = checkpoint(name);
        let (mut model, mut full) = Model::load_trainable(Arc::new(be), &source, |_, _| {}).unwrap();
        // Values that every backend's type of weights holds: what it rounds is activations.
        for p in full.params_mut() {
            let mut values = p.to_host(model.backend()).unwrap();
            values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
            let n = p.len();
            model.backend().upload_acc(p.w.head_mut(n), &values).unwrap();
        }
        model.refresh(&full).unwrap();
        let cfg = model.config().clone();
        let mut adapter = Adapter::new(model.backend(), &cfg, &modules(&cfg)).unwrap();
        adapter.train(model.backend(), |_| true).unwrap();
        let n = 17;
        let tokens: Vec<u32> = (0..n).map(|i| (i * 37 + 11) % cfg.vocab as u32).collect();
        let positions = (0..11).chain(0..6).collect();
        let wanted: Vec<u32> = (0..n).filter(|i| i % 4 != 2).collect();
        let labels = wanted.iter().map(|i| (i * 53 + 7) % cfg.vocab as u32).collect();
        let weights: Vec<f32> = wanted.iter().map(|&i| if i == 5 { 0.0 } else { 0.05 + i as f32 / 60.0 }).collect();
        let pass = Pass::new(&cfg, tokens, positions, visible(n as usize), wanted).unwrap();
        let be = model.backend();
        let saved = Saved::new(be, &cfg, n as usize, weights.len(), Some(&adapter), 0, recompute).unwrap();
        let head = Head::new(&model, weights.len(), 5).unwrap();
        Self { model, full, adapter, pass, labels, weights, saved, head }
    }

    /// The weighted loss, with gradients if wanted.
    fn loss(&mut self, grad: bool) -> f64 {
        let Self { model, full, adapter, pass, labels, weights, saved, head } = self;
        model.forward_saved(pass, Some(adapter), saved).unwrap();
        let target = |r: Range<usize>| Target::Hard(&labels[r]);
        let some = grad.then_some(&mut *full);
        let losses = model.head(pass, saved, head, target, weights, grad, some).unwrap();
        if grad {
            model.backward(pass, saved, head, Some(adapter), Some(full)).unwrap();
        }
        losses.iter().zip(weights).map(|(l, w)| l * f64::from(*w)).sum()
    }

    fn params(&mut self) -> Vec<&mut Param<B>> {
        self.full.params_mut().chain(self.adapter.params_mut()).collect()
    }

    /// Every gradient by name.
    fn grads(&mut self) -> Vec<(String, Vec<f64>)> {
        let be = self.model.backend();
        let all = self.full.params().map(|(_, p)| p).chain(self.adapter.params());
        all.map(|p| {
            let mut g = vec![B::Acc::default(); p.len()];
            be.download(p.g.as_ref().unwrap().head(p.len()), &mut g).unwrap();
            (p.name.clone(), g.iter().map(|g| g.to_f64()).collect())
        })
        .collect()
    }
}

fn packed(_: usize) -> Visible {
    Visible::causal(&[11, 6])
}

/// Along a random direction of each tensor, and along one entry of it, the loss changes as the gradient says.
fn against_differences(name: &str, visible: impl Fn(usize) -> Visible) {
    let mut case = Case::new(Naive, name, visible, Recompute::Pointwise);
    case.loss(true);
    let grads = case.grads();
    let mut rng = Rng::new(9);
    for (i, (tensor, g)) in grads.iter().enumerate() {
        let n = g.len();
        let one = g.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).unwrap().0;
        for single in [false, true] {
            let direction: Vec<f64> =
                (0..n).map(|j| if single { f64::from(j == one) } else { f64::from(rng.normal()) }).collect();
            let want: f64 = g.iter().zip(&direction).map(|(g, d)| g * d).sum();
            let h = 1e-5 / direction.iter().map(|d| d * d).sum::<f64>().sqrt();
            let base = case.params()[i].values().to_vec();
            // Five points: an error of h^4.
            let mut at = |k: f64| {
                let moved: Vec<f64> = base.iter().zip(&direction).map(|(w, d)| w + k * h * 50.0 * d).collect();
                case.params()[i].w.copy_from_slice(&moved);
                case.model.refresh(&case.full).unwrap();
                case.loss(false)
            };
            let got = (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * 50.0 * h);
            case.params()[i].w.copy_from_slice(&base);
            let size = g.iter().map(|g| g * g).sum::<f64>().sqrt();
            let error = (got - want).abs() / want.abs().max(0.01 * size).max(1e-9);
            assert!(error < 1e-6, "{name} {tensor} {single}: difference {got:.12e}, gradient {want:.12e}, {error:.1e}");
        }
        case.model.refresh(&case.full).unwrap();
    }
}

#[test]
fn gradients_of_every_family_are_differences() {
    for name in FAMILIES {
        against_differences(name, packed);
    }
}

#[test]
fn gradients_under_every_mask_are_differences() {
    against_differences("tiny-qwen3", |_| Visible::full(&[11, 6]));
    against_differences("tiny-qwen3", |_| Visible::blocks(&[11, 6], 4));
    against_differences("tiny-gemma3", |n| {
        let parents: Vec<u32> = (0..n as u32).map(|i| if i == 0 { TreeMask::ROOT } else { (i - 1) / 2 }).collect();
        Visible::tree(&TreeMask::new(&parents).unwrap())
    });
}

/// What is computed again is the same to the last bit, and so is what ends early.
#[test]
fn recompute_levels_give_the_same_bits() {
    for name in ["tiny-llama", "tiny-gemma3"] {
        let mut want = None;
        for level in [Recompute::Nothing, Recompute::Pointwise, Recompute::Layer] {
            let mut case = Case::new(Naive, name, packed, level);
            let got = (case.loss(true), case.grads());
            assert!(*want.get_or_insert_with(|| got.clone()) == got, "{name} {level:?}");
        }
    }
}

#[test]
fn a_backward_pass_ends_at_the_lowest_layer_that_trains() {
    let mut all = Case::new(Naive, "tiny-qwen3", packed, Recompute::Pointwise);
    all.loss(true);
    let want = all.grads();
    for level in [Recompute::Nothing, Recompute::Pointwise, Recompute::Layer] {
        let mut case = Case::new(Naive, "tiny-qwen3", packed, level);
        let Case { model, adapter, pass, labels, weights, head, .. } = &mut case;
        let be = model.backend();
        adapter.train(be, |layer| layer >= 1).unwrap();
        assert_eq!(adapter.lowest(), Some(1));
        let mut saved = Saved::new(be, model.config(), 17, weights.len(), Some(adapter), 1, level).unwrap();
        model.forward_saved(pass, Some(adapter), &mut saved).unwrap();
        model.head(pass, &saved, head, |r| Target::Hard(&labels[r]), weights, true, None).unwrap();
        model.backward(pass, &mut saved, head, Some(adapter), None).unwrap();
        let mut seen = 0;
        for p in adapter.params() {
            let layer_0 = p.name.starts_with("layers.0.");
            assert_eq!(p.g.is_none(), layer_0, "{}", p.name);
            if let Some(g) = &p.g {
                let (_, want) = want.iter().find(|(name, _)| *name == p.name).unwrap();
                assert!(g.head(p.len()) == &want[..], "{level:?} {}", p.name);
                seen += 1;
            }
        }
        assert!(seen > 4);
        // Layer 0 was not kept.
        adapter.train(be, |_| true).unwrap();
        let error = model.backward(pass, &mut saved, head, Some(adapter), None).unwrap_err();
        assert!(error.to_string().contains("layer 0 trains"), "{error}");
    }
}

/// A mix of adapters is their weighted sum, exactly but for rounding.
#[test]
fn mixed_adapters_add_up() {
    let mut case = Case::new(Naive, "tiny-qwen2", packed, Recompute::Pointwise);
    let (be, cfg) = (Naive, case.model.config().clone());
    let mut half = modules(&cfg);
    half.retain(|m| m.spec.layer != 1);
    half.iter_mut().for_each(|m| m.a.reverse());
    let second = Adapter::new(&be, &cfg, &half).unwrap();
    let mixed = Adapter::mix(&be, &cfg, &[(&case.adapter, 0.5), (&second, -2.0)]).unwrap();
    let mut saved = Saved::new(&be, &cfg, 17, 20, Some(&mixed), 0, Recompute::Layer).unwrap();
    case.model.forward_saved(&case.pass, Some(&mixed), &mut saved).unwrap();
    let losses = |case: &mut Case<Naive>, saved: &Saved<Naive>| {
        let Case { model, pass, labels, weights, head, .. } = case;
        model.head(pass, saved, head, |r| Target::Hard(&labels[r]), weights, false, None).unwrap()
    };
    let got = losses(&mut case, &saved);
    // The same by hand: both products added to the dense weights.
    for (part, weight) in [(case.adapter.to_host(&be).unwrap(), 0.5), (half, -2.0)] {
        for m in part {
            let name = Role::Layer(m.spec.layer, m.spec.role).to_string();
            let p = case.full.params_mut().find(|p| p.name == name).unwrap();
            let (rank, input) = (m.spec.rank, p.shape[1]);
            for (i, w) in p.w.iter_mut().enumerate() {
                let ba: f64 = (0..rank)
                    .map(|r| f64::from(m.b[i / input * rank + r]) * f64::from(m.a[r * input + i % input]))
                    .sum();
                *w += weight * f64::from(m.spec.scale) * ba;
            }
        }
    }
    case.model.refresh(&case.full).unwrap();
    case.model.forward_saved(&case.pass, None, &mut saved).unwrap();
    let want = losses(&mut case, &saved);
    for (got, want) in got.iter().zip(&want) {
        assert!((got - want).abs() < 1e-5, "{got} {want}");
    }
}

/// How far a backend's gradients are from the specification's, tensor by tensor: the norm of the difference over the
/// norm, with gradients that are small beside the whole judged by the whole.
fn distance(want: &[(String, Vec<f64>)], got: &[(String, Vec<f64>)]) -> (f64, String) {
    let norm = |g: &[f64]| g.iter().map(|g| g * g).sum::<f64>().sqrt();
    let whole = want.iter().map(|w| norm(&w.1).powi(2)).sum::<f64>().sqrt();
    let mut worst = (0.0, String::new());
    for ((name, w), (_, g)) in want.iter().zip(got) {
        let difference: Vec<f64> = w.iter().zip(g).map(|(w, g)| w - g).collect();
        let error = norm(&difference) / norm(w).max(1e-3 * whole);
        // A NaN must not pass.
        if error.is_nan() || error > worst.0 {
            worst = (error, name.clone());
        }
    }
    worst
}

fn agrees<B: Train>(name: &str, backend: &str, be: impl Fn() -> B, bound: f64) {
    for visible in [packed, |_| Visible::blocks(&[11, 6], 4)] {
        let mut naive = Case::new(Naive, name, visible, Recompute::Pointwise);
        let mut other = Case::new(be(), name, visible, Recompute::Pointwise);
        let (want, got) = (naive.loss(true), other.loss(true));
        assert!((want - got).abs() < bound * want, "{name} on {backend}: loss {got}, not {want}");
        let (want, got) = (naive.grads(), other.grads());
        let all = |grads: &[(String, Vec<f64>)]| {
            [("all".to_owned(), grads.iter().flat_map(|g| g.1.clone()).collect())].to_vec()
        };
        let ((error, tensor), (whole, _)) = (distance(&want, &got), distance(&all(&want), &all(&got)));
        println!("{name} on {backend}: {whole:.1e}, {error:.1e} at {tensor}");
        assert!(whole < bound, "{name} on {backend}: the gradient is off by {whole:.1e}");
        assert!(error < 3.0 * bound, "{name} on {backend}: gradient of {tensor} off by {error:.1e}");
    }
}

#[test]
fn cpu_gradients_agree_with_the_specification() {
    for name in FAMILIES {
        for tier in Tier::available() {
            for threads in [1, 3] {
                agrees(name, &format!("{tier} exact"), || Cpu::with(threads, tier, Compute::Exact), 1e-4);
            }
            agrees(name, &format!("{tier} fast"), || Cpu::with(2, tier, Compute::Fast), 0.05);
        }
    }
}

#[test]
fn cuda_gradients_agree_with_the_specification() {
    for name in FAMILIES {
        if common::gpu().is_none() {
            return;
        }
        agrees(name, "cuda", || common::gpu().unwrap(), 0.05);
    }
}

#[test]
fn threads_and_recompute_levels_change_no_bit_on_the_cpu() {
    for compute in [Compute::Exact, Compute::Fast] {
        let mut want = None;
        for (threads, level) in [(1, Recompute::Nothing), (3, Recompute::Pointwise), (2, Recompute::Layer)] {
            let mut case = Case::new(Cpu::with(threads, Tier::detect(), compute), "tiny-qwen3", packed, level);
            let got = (case.loss(true), case.grads());
            assert!(*want.get_or_insert_with(|| got.clone()) == got, "{threads} threads, {level:?}");
        }
    }
}
