//! A language model that learns a stream: what is kept of frozen layers, resuming, and what each method does to the adapter.

use std::path::Path;
use std::sync::Arc;

use crate::common;
use quadriga::backend::Train;
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::continual::language::{Language, LanguageSettings, TextExample, TextStream, TextTask};
use quadriga::continual::{
    Grouped, Layout, Learner, Method, Paper, Plan, Released, Route, Sample, Split, State, Stream,
};
use quadriga::format::Checkpoint;
use quadriga::model::lora::ModuleSpec;
use quadriga::model::roles::LayerRole;
use quadriga::model::{Adapter, Head, Model, Pass, Recompute, Saved};
use quadriga::rng::Rng;
use quadriga::train::{Settings, Trainable, Trainer};

const END: u32 = 1;

fn cpu() -> Cpu {
    Cpu::with(2, Tier::detect(), Compute::Exact)
}

/// Three tasks over five labels, two of which share a beginning: the prompt's middle token says which.
fn tasks() -> (Vec<TextTask>, Vec<Vec<u32>>) {
    let labels = vec![vec![20], vec![21], vec![22, 23], vec![22, 24], vec![25]];
    let mut rng = Rng::new(3);
    let mut task = |name: &str, classes: [usize; 2], opening: u32| {
        let mut examples = |n: usize| -> Vec<TextExample> {
            let example = |i: usize| {
                let noise = 40 + rng.below(10) as u32;
                TextExample { prompt: vec![opening, 60 + (i % 2) as u32, noise, 5], class: classes[i % 2] }
            };
            (0..n).map(example).collect()
        };
        TextTask { name: name.into(), classes: classes.into(), examples: [examples(16), examples(10)] }
    };
    (vec![task("a", [0, 1], 30), task("b", [2, 3], 31), task("c", [4, 0], 32)], labels)
}

fn learner<B: Train>(be: B, ranks: usize, top: usize, settings: LanguageSettings) -> Language<B> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-llama");
    let model = Model::load(Arc::new(be), &Checkpoint::open(&path).unwrap(), |_, _| {}).unwrap();
    let (cfg, (tasks, labels)) = (model.config().clone(), tasks());
    let specs: Vec<ModuleSpec> = (cfg.layers - top..cfg.layers)
        .flat_map(|layer| [LayerRole::Q, LayerRole::V].map(|role| ModuleSpec { role, layer, rank: ranks, scale: 2.0 }))
        .collect();
    let mut adapter = Adapter::init(model.backend(), &cfg, &specs, 1).unwrap();
    adapter.train(model.backend(), |_| true).unwrap();
    let stream = TextStream::new(tasks, labels, END).unwrap();
    let rows = settings.rows.max(stream.longest());
    let optimizer = Settings { lr: 1e-2, ..Settings::default() };
    let trainer = Trainer::new(model, Trainable::Adapter(adapter), optimizer, rows, Recompute::Pointwise).unwrap();
    Language::new(trainer, stream, settings).unwrap()
}

fn settings() -> LanguageSettings {
    LanguageSettings { router_layer: 1, cache: true, end: true, rows: 40 }
}

fn run<B: Train>(l: &mut Language<B>, method: Method, plan: Plan) -> State {
    let state = State::new(method, plan, 3, l.values().unwrap()).unwrap();
    let mut stream = Stream::new(state, l).unwrap();
    while stream.advance(l).unwrap().is_some() {}
    stream.state().clone()
}

fn plan() -> Plan {
    Plan { epochs: 6, batch: 4, ..Plan::default() }
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn what_is_kept_of_frozen_layers_changes_no_bit() {
    let all = |cache| {
        let mut l = learner(cpu(), 2, 1, LanguageSettings { cache, ..settings() });
        let state = run(&mut l, Method::Sequential, plan());
        assert_eq!(l.cached_bytes() > 0, cache);
        (state, bits(&l.values().unwrap()))
    };
    assert_eq!(all(true), all(false));
}

#[test]
fn a_gradient_is_that_of_differences_and_changes_nothing() {
    let mut l = learner(Naive, 2, 2, LanguageSettings { end: false, ..settings() });
    // B is not 0, or A would have no gradient.
    let mut rng = Rng::new(5);
    let values: Vec<f32> = (0..l.layout().len).map(|_| 0.3 * rng.normal()).collect();
    l.set_values(&values).unwrap();
    let samples: Vec<Sample> = (0..7).map(|index| Sample { task: 1, index }).collect();
    let (_, g) = l.gradient(&samples).unwrap();
    assert_eq!(l.values().unwrap(), values);
    assert_eq!(l.gradient(&samples).unwrap().1, g);
    for i in (0..values.len()).step_by(37) {
        let mut at = |h: f32| {
            let mut v = values.clone();
            v[i] += h;
            l.set_values(&v).unwrap();
            (l.gradient(&samples).unwrap().0, f64::from(v[i]))
        };
        let ((up, x), (down, y)) = (at(1e-3), at(-1e-3));
        let d = (up - down) / (x - y);
        assert!((d - f64::from(g[i])).abs() < 1e-5 + 1e-3 * d.abs(), "{i}: {d} {}", g[i]);
    }
}

/// Log-probability of each label's tokens where nothing but labels can follow, from passes of one causal sequence each.
fn alone(l: &Language<Naive>, prompt: &[u32], labels: &[Vec<u32>]) -> Vec<f64> {
    let (model, be) = (l.trainer().model(), l.trainer().model().backend());
    let Trainable::Adapter(adapter) = l.trainer().trainable() else { panic!("no adapter") };
    let cfg = model.config();
    let logits = |tokens: &[u32]| -> Vec<f64> {
        let last = tokens.len() as u32 - 1;
        let pass = Pass::causal(cfg, tokens.to_vec(), &[tokens.len()], vec![last]).unwrap();
        let mut saved = Saved::new(be, cfg, tokens.len(), 1, Some(adapter), 0, Recompute::Layer).unwrap();
        model.forward_saved(&pass, Some(adapter), &mut saved).unwrap();
        let mut row = Vec::new();
        let mut head = Head::new(model, 1, 1).unwrap();
        model.logits(&pass, &saved, &mut head, &mut |_, z| row = z.iter().map(|z| f64::from(*z)).collect()).unwrap();
        row
    };
    let whole: Vec<Vec<u32>> = labels.iter().map(|x| [&x[..], &[END]].concat()).collect();
    let one = |label: &Vec<u32>| {
        let step = |i: usize| {
            // What may stand here: the successors of this beginning among all labels.
            let mut ways: Vec<u32> = whole.iter().filter(|o| o.starts_with(&label[..i])).map(|o| o[i]).collect();
            ways.sort_unstable();
            ways.dedup();
            let z = logits(&[prompt, &label[..i]].concat());
            let total = ways.iter().map(|&t| z[t as usize].exp()).sum::<f64>().ln();
            z[label[i] as usize] - total
        };
        (0..label.len()).map(step).sum()
    };
    whole.iter().map(one).collect()
}

#[test]
fn predictions_are_those_of_every_label_computed_alone() {
    let mut l = learner(Naive, 2, 2, settings());
    let mut rng = Rng::new(6);
    let values: Vec<f32> = (0..l.layout().len).map(|_| 0.5 * rng.normal()).collect();
    l.set_values(&values).unwrap();
    let (tasks, labels) = tasks();
    let mut seen = std::collections::HashSet::new();
    for (task, t) in tasks.iter().enumerate() {
        let got = l.predict(task, &[0, 1, 2, 3, 4, 5], &[0, 1, 2, 3, 4]).unwrap();
        for (i, &p) in got.iter().enumerate() {
            let all = alone(&l, &t.examples[1][i].prompt, &labels);
            assert!((all.iter().map(|x| x.exp()).sum::<f64>() - 1.0).abs() < 1e-6, "{all:?}");
            let best = (0..labels.len()).max_by(|&a, &b| all[a].total_cmp(&all[b])).unwrap();
            let clear = (0..labels.len()).all(|o| o == best || all[best] - all[o] > 1e-4);
            assert!(p == best || !clear, "task {task} example {i}: {p}, {all:?}");
            seen.insert(p);
        }
        assert_eq!(l.predict(task, &[3], &[2]).unwrap(), [2]);
    }
    assert!(seen.len() > 1);
}

#[test]
fn adapters_keep_tasks_apart_that_one_adapter_forgets() {
    let plan = Plan { epochs: 20, batch: 4, ..Plan::default() };
    let mut l = learner(cpu(), 4, 2, settings());
    let alone = run(&mut l, Method::Sequential, plan.clone()).scores.measures().unwrap();
    let mut l = learner(cpu(), 4, 2, settings());
    let ours = run(&mut l, Method::Tree(Grouped { probe: 0, ..Grouped::default() }), plan);
    let m = ours.scores.measures().unwrap();
    assert!(m.learning > 0.9 && m.average > 0.9 && m.average > alone.average + 0.1, "{m:?} {alone:?}");
    assert!(ours.reports[2].routed.iter().enumerate().all(|(j, c)| c[j] == 10), "{:?}", ours.reports[2].routed);
}

#[test]
fn every_method_runs_and_its_penalty_acts() {
    let plan = Plan { epochs: 2, ..plan() };
    for method in [
        Method::Ewc { lambda: 10.0 },
        Method::Olora { lambda: 0.5 },
        Method::Inflora { energy: 0.5 },
        Method::Anchor { tau: 0.3 },
        Method::Random { tau: 0.3 },
        Method::Paper(Paper { query: 2, ..Paper::default() }),
        Method::Released(Released::default()),
        Method::Isolated(Route::Router),
    ] {
        let ranks = if method.blocks() { 6 } else { 2 };
        let mut l = learner(cpu(), ranks, 2, settings());
        let before = l.values().unwrap();
        let state = run(&mut l, method.clone(), plan.clone());
        assert_eq!((state.scores.rows.len(), state.reports.len()), (3, 3));
        let penalized = !matches!(method, Method::Isolated(_) | Method::Inflora { .. });
        assert_eq!(state.reports[1].penalty.abs() > 1e-6, penalized, "{method:?} {:?}", state.reports[1].penalty);
        assert_ne!(bits(&before), bits(&l.values().unwrap()), "{method:?}");
    }
}

#[test]
fn tasks_with_ranks_of_their_own_leave_those_of_others_alone() {
    for method in [Method::Olora { lambda: 0.5 }, Method::Inflora { energy: 0.5 }] {
        let mut l = learner(cpu(), 6, 2, settings());
        let state = State::new(method.clone(), Plan { epochs: 1, ..plan() }, 3, l.values().unwrap()).unwrap();
        let mut stream = Stream::new(state, &l).unwrap();
        let layout = l.layout().clone();
        // Ranks of A and of B in which the adapter moved during task 1.
        let mut before = Vec::new();
        while let Some(event) = stream.advance(&mut l).unwrap() {
            use quadriga::continual::Event::*;
            match event {
                Began { task: 1, .. } => before = l.values().unwrap(),
                Finished { task: 1 } => break,
                _ => {}
            }
        }
        let after = l.values().unwrap();
        for m in &layout.modules {
            for r in 0..6 {
                let a = m.a.start + r * m.input..m.a.start + (r + 1) * m.input;
                let a_moved = before[a.clone()] != after[a];
                let b_moved = (0..m.output).any(|o| before[m.b.start + o * 6 + r] != after[m.b.start + o * 6 + r]);
                let own = (2..4).contains(&r);
                assert_eq!(b_moved, own, "{method:?} {} rank {r}", m.name);
                assert_eq!(a_moved, own && matches!(method, Method::Olora { .. }), "{method:?} {} rank {r}", m.name);
            }
        }
    }
}

#[test]
fn a_killed_stream_goes_on_to_the_same_bits() {
    for method in [Method::Tree(Grouped::default()), Method::Paper(Paper::default()), Method::Inflora { energy: 0.5 }] {
        let fresh = || learner(cpu(), if method.blocks() { 6 } else { 2 }, 1, settings());
        let plan = Plan { epochs: 1, ..plan() };
        let mut whole = fresh();
        let expected = run(&mut whole, method.clone(), plan.clone());
        let mut l = fresh();
        let state = State::new(method.clone(), plan, 3, l.values().unwrap()).unwrap();
        let mut stream = Stream::new(state, &l).unwrap();
        let mut calls = 0;
        while stream.advance(&mut l).unwrap().is_some() {
            calls += 1;
            if calls % 4 > 0 {
                continue;
            }
            let json = serde_json::to_string(stream.state()).unwrap();
            let (tensors, values) = (stream.state().tensors(), l.values().unwrap());
            let (steps, moments) = l.moments().unwrap();
            let mut state: State = serde_json::from_str(&json).unwrap();
            state.restore(&tensors, l.layout().modules.len()).unwrap();
            l = fresh();
            l.set_values(&values).unwrap();
            l.set_moments(steps, &moments).unwrap();
            stream = Stream::new(state, &l).unwrap();
        }
        assert_eq!(stream.state(), &expected, "{method:?}");
        assert_eq!(bits(&l.values().unwrap()), bits(&whole.values().unwrap()), "{method:?}");
    }
}

#[test]
fn features_are_of_the_frozen_model() {
    let mut l = learner(cpu(), 2, 2, settings());
    let before = l.features(0, Split::Train).unwrap();
    run(&mut l, Method::Sequential, Plan { epochs: 1, ..plan() });
    assert_eq!(l.features(0, Split::Train).unwrap(), before);
    let hidden = l.trainer().model().config().hidden;
    assert!(before.len() == 16 && before.iter().all(|f| f.len() == 2 * hidden));
    let mut fresh = learner(Naive, 2, 2, settings());
    let naive = fresh.features(0, Split::Train).unwrap();
    let worst = before.iter().flatten().zip(naive.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
}

#[test]
fn places_are_where_values_are() {
    let be = Naive;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-llama");
    let cfg = Checkpoint::open(&path).unwrap().config().clone();
    let all: Vec<ModuleSpec> = LayerRole::LINEARS
        .into_iter()
        .enumerate()
        .map(|(i, role)| ModuleSpec { role, layer: i % cfg.layers, rank: 1 + i, scale: 1.0 })
        .collect();
    let adapter = Adapter::init(&be, &cfg, &all, 9).unwrap();
    let flat: Vec<f32> = adapter.params().flat_map(|p| p.to_host(&be).unwrap()).collect();
    let layout = Layout::of_adapter(&adapter);
    layout.check().unwrap();
    assert_eq!(layout.len, flat.len());
    for (m, values) in layout.modules.iter().zip(adapter.to_host(&be).unwrap()) {
        assert_eq!(flat[m.a.clone()], values.a, "{}", m.name);
        assert_eq!(flat[m.b.clone()], values.b, "{}", m.name);
    }
}

#[test]
fn streams_on_cuda_give_the_scores_of_the_cpu() {
    for method in [
        Method::Tree(Grouped { tau: 0.1, share: 0.9, ..Grouped::default() }),
        Method::Anchor { tau: 0.3 },
        Method::Olora { lambda: 0.5 },
    ] {
        let Some(gpu) = common::gpu() else { return };
        let plan = Plan { epochs: 2, batch: 8, ..plan() };
        let ranks = if method.blocks() { 6 } else { 2 };
        let mut here = learner(cpu(), ranks, 1, settings());
        let mut there = learner(gpu, ranks, 1, settings());
        let (a, b) = (run(&mut here, method.clone(), plan.clone()), run(&mut there, method.clone(), plan));
        assert_eq!(a.members.len(), b.members.len(), "{method:?}");
        // Operands of products are bf16 there: one of the ten test examples of a cell may fall on the other side.
        for (x, y) in a.scores.rows.iter().flatten().zip(b.scores.rows.iter().flatten()) {
            assert!((x - y).abs() < 0.11, "{method:?}: {:?} {:?}", a.scores, b.scores);
        }
        for (x, y) in a.reports.iter().flat_map(|r| &r.losses).zip(b.reports.iter().flat_map(|r| &r.losses)) {
            assert!((x - y).abs() < 0.05 * x.abs().max(1.0), "{method:?}: loss {x} {y}");
        }
        assert!(b.reports[1].penalty > 0.0, "{method:?}");
    }
}
