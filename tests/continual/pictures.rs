//! Classes of pictures in tasks: drawn bars, and a transformer from nothing.

use std::sync::Arc;

use quadriga::backend::Train;
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::continual::vision::{Pictures, split_classes};
use quadriga::continual::{Grouped, Learner, Method, Plan, Route, Sample, Split, State, Stream};
use quadriga::model::lora::ModuleSpec;
use quadriga::model::roles::LayerRole;
use quadriga::rng::Rng;
use quadriga::train::Settings;
use quadriga::vision::{
    Examples, Fresh, Images, TrainedVit, Trains, VisionTrainer, Vit, VitConfig, VitSource, adapter,
};

const CLASSES: usize = 6;

fn cpu() -> Cpu {
    Cpu::with(2, Tier::detect(), Compute::Exact)
}

/// A bar in column c, for class c, on noise.
fn bars(each: usize, seed: u64) -> Examples {
    let mut rng = Rng::new(seed);
    let labels: Vec<u32> = (0..each * CLASSES).map(|i| (i % CLASSES) as u32).collect();
    let pixel = |c: u32, i: usize, rng: &mut Rng| 0.3 * rng.normal() + if i % 8 == c as usize { 1.5 } else { 0.0 };
    let pixels =
        labels.iter().flat_map(|&c| (0..64).map(move |i| (c, i))).map(|(c, i)| pixel(c, i, &mut rng)).collect();
    Examples::new(Images::new([1, 8, 8], pixels).unwrap(), labels).unwrap()
}

fn fresh() -> Fresh {
    let mut config = VitConfig::new(8, 2, 16, 2, 2, CLASSES);
    (config.channels, config.mlp) = (1, 32);
    Fresh::new(config, 1).unwrap()
}

fn learner<B: Train>(be: B, rank: usize) -> Pictures<B> {
    of(Arc::new(be), rank, &fresh())
}

/// The same on a model that has learnt to see bars, but for its head.
fn trained(rank: usize) -> Pictures<Cpu> {
    let be = Arc::new(cpu());
    let (vit, masters) = Vit::load(be.clone(), &fresh(), Trains::All).unwrap();
    let settings = Settings { lr: 5e-3, ..Settings::default() };
    let mut trainer = VisionTrainer::new(vit, masters, None, settings, 30).unwrap();
    let data = bars(40, 7);
    for step in 0..120 {
        let which: Vec<usize> = (0..30).map(|i| (step * 30 + i) % data.labels.len()).collect();
        trainer.step(&data.pick(&which).unwrap(), &[]).unwrap();
    }
    assert!(trainer.evaluate(&bars(5, 8), &[]).unwrap().correct > 28);
    let n = trainer.span("head.w").unwrap().len();
    trainer.set("head.w", &vec![0.0; n]).unwrap();
    trainer.set("head.b", &[0.0; CLASSES]).unwrap();
    of(be, rank, &TrainedVit { vit: trainer.vit(), masters: trainer.masters(), rest: &fresh() })
}

fn of<B: Train>(be: Arc<B>, rank: usize, source: &dyn VitSource) -> Pictures<B> {
    let (vit, masters) = Vit::load(be.clone(), source, Trains::Head).unwrap();
    let specs: Vec<ModuleSpec> = (0..2)
        .flat_map(|layer| [LayerRole::Q, LayerRole::V].map(|role| ModuleSpec { role, layer, rank, scale: 2.0 }))
        .collect();
    let mut lora = adapter(&vit, &specs, 3).unwrap();
    lora.train(&*be, |_| true).unwrap();
    let settings = Settings { lr: 1e-2, ..Settings::default() };
    let trainer = VisionTrainer::new(vit, masters, Some(lora), settings, 16).unwrap();
    Pictures::new(trainer, split_classes(&bars(12, 5), &bars(6, 6), CLASSES, 2).unwrap(), 1).unwrap()
}

fn run<B: Train>(l: &mut Pictures<B>, method: Method, plan: Plan) -> State {
    let state = State::new(method, plan, 3, l.values().unwrap()).unwrap();
    let mut stream = Stream::new(state, l).unwrap();
    while stream.advance(l).unwrap().is_some() {}
    stream.state().clone()
}

fn plan() -> Plan {
    Plan { epochs: 8, batch: 8, ..Plan::default() }
}

#[test]
fn one_head_forgets_and_routed_adapters_do_not() {
    let alone = run(&mut trained(2), Method::Sequential, plan()).scores.measures().unwrap();
    let routed = run(&mut trained(2), Method::Isolated(Route::Router), plan());
    let m = routed.scores.measures().unwrap();
    assert!(alone.learning > 0.9 && alone.bwt < -0.2, "{alone:?}");
    assert!(m.average > 0.9 && m.average > alone.average + 0.1, "{m:?} {alone:?}");
    assert!(routed.reports[2].routed.iter().enumerate().all(|(j, c)| c[j] >= 11), "{:?}", routed.reports[2].routed);
}

#[test]
fn signatures_of_other_classes_are_far() {
    let mut l = trained(2);
    let state = run(&mut l, Method::Tree(Grouped { probe: 0, gate: 0.0, ..Grouped::default() }), plan());
    let apart = &state.reports[2].distances;
    assert!(apart.iter().all(|d| *d > 0.4), "{apart:?}");
    assert!(state.scores.measures().unwrap().average > 0.8);
    // The gradient comes through a head that is not 0.
    let (_, g) = l.gradient(&[Sample { task: 0, index: 0 }]).unwrap();
    let module = &l.layout().modules[0];
    assert!(g[module.b.clone()].iter().any(|x| *x != 0.0));
}

#[test]
fn losses_know_the_classes_seen_so_far() {
    let mut l = learner(Naive, 2);
    let loss = |l: &mut Pictures<Naive>, task| l.gradient(&[Sample { task, index: 0 }]).unwrap().0;
    // With a head that is nearly 0 all known classes are equally likely.
    for (task, classes) in [(0, 2.0f64), (1, 4.0), (2, 6.0)] {
        let got = loss(&mut l, task);
        assert!((got - classes.ln()).abs() < 0.2, "{got} {classes}");
    }
    assert!(l.predict(2, &[0, 1], &[1]).unwrap() == [1, 1] && l.predict(0, &[0], &[]).is_err());
}

#[test]
fn every_method_runs_on_pictures_and_resumes_to_the_same_bits() {
    for name in Method::NAMES {
        let method = Method::named(name).unwrap();
        let fresh = || learner(cpu(), if method.blocks() { 6 } else { 2 });
        let plan = Plan { epochs: 1, ..plan() };
        let (mut whole, mut l) = (fresh(), fresh());
        let expected = run(&mut whole, method.clone(), plan.clone());
        let state = State::new(method.clone(), plan, 3, l.values().unwrap()).unwrap();
        let mut stream = Stream::new(state, &l).unwrap();
        let mut calls = 0;
        while stream.advance(&mut l).unwrap().is_some() {
            calls += 1;
            if calls % 3 > 0 {
                continue;
            }
            let json = serde_json::to_string(stream.state()).unwrap();
            let (tensors, values, (steps, moments)) =
                (stream.state().tensors(), l.values().unwrap(), l.moments().unwrap());
            let mut state: State = serde_json::from_str(&json).unwrap();
            state.restore(&tensors, l.layout().modules.len()).unwrap();
            l = fresh();
            l.set_values(&values).unwrap();
            l.set_moments(steps, &moments).unwrap();
            stream = Stream::new(state, &l).unwrap();
        }
        assert_eq!(stream.state(), &expected, "{name}");
        assert_eq!(l.values().unwrap(), whole.values().unwrap(), "{name}");
    }
}

#[test]
fn features_are_of_the_bare_model() {
    let mut l = learner(cpu(), 2);
    let before = l.features(1, Split::Test).unwrap();
    run(&mut l, Method::Sequential, Plan { epochs: 1, ..plan() });
    let mut fresh = learner(cpu(), 2);
    fresh.set_values(&l.values().unwrap()).unwrap();
    assert_eq!(fresh.features(1, Split::Test).unwrap(), before);
}

#[test]
fn classes_that_do_not_fit_are_refused() {
    let (train, test) = (bars(2, 1), bars(2, 2));
    assert!(split_classes(&train, &test, CLASSES, 4).is_err());
    assert!(split_classes(&train, &test, 8, 2).unwrap_err().to_string().contains("6..8"));
}
