//! Preferences: the gradient of their loss against differences in f64, passes of many pairs against passes of one, what training does to held-out
//! pairs, and the tokens that rows become.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use quadriga::ErrorKind;
use quadriga::backend::naive::Naive;
use quadriga::engine::{Device, Engine, EngineOptions, Message};
use quadriga::format::Checkpoint;
use quadriga::model::lora::ModuleSpec;
use quadriga::model::roles::LayerRole;
use quadriga::model::{Adapter, Model, Recompute};
use quadriga::rng::Rng;
use quadriga::train::data::{LongRows, Options, PreferenceText, Row, preferences};
use quadriga::train::objective::{Answers, bradley_terry};
use quadriga::train::preference::{LogProbs, Pairs, Preferring, dpo_step, reference};
use quadriga::train::run::Objective;
use quadriga::train::{Batch, Batches, Packing, Settings, Trainable, Trainer, data};

const BETA: f64 = 0.1;

fn model() -> PathBuf {
    common::root().join("models/tiny-llama")
}

/// An adapter that changes nothing yet, on linears of two layers.
fn trainer(lr: f32) -> Trainer<Naive> {
    let model = Model::load(Arc::new(Naive), &Checkpoint::open(&model()).unwrap(), |_, _| {}).unwrap();
    let spec = |(layer, role)| ModuleSpec { role, layer, rank: 3, scale: 2.0 };
    let specs = [(1, LayerRole::Q), (1, LayerRole::Up), (2, LayerRole::V), (2, LayerRole::Down)].map(spec);
    let mut adapter = Adapter::init(&Naive, model.config(), &specs, 1).unwrap();
    adapter.train(&Naive, |_| true).unwrap();
    let settings = Settings { lr, ..Settings::default() };
    Trainer::new(model, Trainable::Adapter(adapter), settings, 160, Recompute::Pointwise).unwrap()
}

fn pairs() -> Vec<data::Preference> {
    let pair = |prompt: &[u32], chosen: &[u32], rejected: &[u32]| data::Preference {
        prompt: prompt.to_vec(),
        chosen: chosen.to_vec(),
        rejected: rejected.to_vec(),
    };
    vec![
        pair(&[17, 4, 99], &[8, 9, 10, 2], &[50, 51, 2]),
        pair(&[5, 6, 7, 5, 6], &[60, 2], &[8, 70, 71, 5, 2]),
        pair(&[200], &[33, 80, 2], &[33, 81, 2]),
    ]
}

fn random(n: usize, size: f32, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| size * rng.normal()).collect()
}

fn together(t: &Trainer<Naive>, reference: &[LogProbs]) -> Vec<(Pairs, Vec<LogProbs>)> {
    vec![(Pairs::new(t.model().config(), &Batch::new(&pairs())).unwrap(), reference.to_vec())]
}

/// The mean loss, by the definition and from the log-probabilities of each pair alone.
fn loss(t: &mut Trainer<Naive>, reference: &[LogProbs]) -> f64 {
    let each = pairs().into_iter().zip(reference).map(|(p, r)| {
        let [c, j] = Pairs::new(t.model().config(), &Batch::new([&p])).unwrap().log_probs(t).unwrap()[0];
        bradley_terry(BETA * (c - r[0]), BETA * (j - r[1])).0
    });
    each.sum::<f64>() / reference.len() as f64
}

#[test]
fn the_gradient_is_that_of_differences() {
    let mut t = trainer(1e-3);
    let limits = Packing { rows: 40, sequences: 2 };
    let mut told = Vec::new();
    let before = reference(&mut t, &pairs(), limits, &mut |done, of| told.push((done, of))).unwrap();
    assert_eq!(told, [(2, 3), (3, 3)]);
    // Far from the reference, so that pairs have different slopes.
    let values = random(t.values().unwrap().len(), 0.3, 7);
    t.set_values(&values).unwrap();
    let passes = together(&t, &before);
    let answers = passes[0].0.accumulate(&mut t, &before, BETA, 1.0 / 3.0).unwrap();
    assert!(answers.iter().all(|a: &Answers| (a.policy[0] - a.reference[0]).abs() > 0.1), "{answers:?}");
    let gradient = t.take_gradients().unwrap();
    for seed in 0..6 {
        let step = random(values.len(), 1e-5, 100 + seed);
        let moved = |sign: f32| -> Vec<f32> { values.iter().zip(&step).map(|(v, s)| v + sign * s).collect() };
        let (up, down) = (moved(1.0), moved(-1.0));
        // What f32 made of the step.
        let along = |i: usize| f64::from(gradient[i]) * (f64::from(up[i]) - f64::from(down[i]));
        let want: f64 = (0..values.len()).map(along).sum();
        t.set_values(&up).unwrap();
        let above = loss(&mut t, &before);
        t.set_values(&down).unwrap();
        let got = above - loss(&mut t, &before);
        assert!((got - want).abs() < 1e-5 * got.abs().max(1e-6), "{got} by differences, {want} by the gradient");
    }
}

#[test]
fn pairs_in_one_pass_are_pairs_alone() {
    let mut t = trainer(1e-3);
    let n = t.values().unwrap().len();
    let before = reference(&mut t, &pairs(), Packing { rows: 160, sequences: 9 }, &mut |_, _| {}).unwrap();
    let single = reference(&mut t, &pairs(), Packing { rows: 20, sequences: 1 }, &mut |_, _| {}).unwrap();
    assert_eq!(before, single);
    t.set_values(&random(n, 0.3, 7)).unwrap();
    let passes = together(&t, &before);
    passes[0].0.accumulate(&mut t, &before, BETA, 1.0).unwrap();
    let whole = t.take_gradients().unwrap();
    for (p, r) in pairs().iter().zip(&before) {
        let one = Pairs::new(t.model().config(), &Batch::new([p])).unwrap();
        one.accumulate(&mut t, std::slice::from_ref(r), BETA, 1.0).unwrap();
    }
    let parts = t.take_gradients().unwrap();
    let size = whole.iter().map(|g| g.abs()).fold(0.0, f32::max);
    assert!(size > 0.0 && whole.iter().zip(&parts).all(|(a, b)| (a - b).abs() <= 1e-5 * size));
    // A step's loss is the one before it.
    let want = loss(&mut t, &before);
    let passes = together(&t, &before);
    let report = dpo_step(&mut t, &passes, BETA).unwrap();
    assert!((report.loss - want).abs() < 1e-12 && t.steps() == 1);
    assert_eq!((report.tokens, report.labels), (pairs().iter().map(Row::tokens).sum(), 20));
}

#[test]
fn training_raises_margins_and_nothing_else_is_taken_for_it() {
    let mut t = trainer(1e-2);
    let (all, limits) = (pairs(), Packing { rows: 60, sequences: 9 });
    let mut dpo = Preferring::new(&mut t, [&all, &all[..2]], BETA, limits, &mut |_, _| {}).unwrap();
    let batches = Batches::once(&all, limits).unwrap();
    let held_out = Batches::once(&all[..2], limits).unwrap();
    let first = dpo.evaluate(&mut t, &held_out).unwrap();
    assert!((first - std::f64::consts::LN_2).abs() < 1e-12);
    let m = dpo.measured.unwrap();
    assert_eq!((m.accuracy, m.margin, m.chosen, m.rejected, m.kl()), (0.0, 0.0, 0.0, 0.0, 0.0));
    for _ in 0..20 {
        dpo.step(&mut t, &batches, 20).unwrap();
    }
    let after = dpo.evaluate(&mut t, &held_out).unwrap();
    let m = dpo.measured.unwrap();
    assert!(after < 0.6 && m.loss == after && m.pairs == 2 && m.accuracy == 1.0 && m.margin > 0.2, "{m:?}");
    assert!((m.margin - BETA * (m.chosen - m.rejected)).abs() < 1e-12);
    assert!((m.kl() + (m.chosen + m.rejected) / 2.0).abs() < 1e-12);
    // What is not finite is no step, and leaves no gradient behind.
    let (steps, values) = (t.steps(), t.values().unwrap());
    let passes = together(&t, &[[f64::NAN; 2]; 3]);
    assert_eq!(dpo_step(&mut t, &passes, BETA).unwrap_err().kind(), ErrorKind::Diverged);
    assert!(t.steps() == steps && t.values().unwrap() == values);
    assert!(t.take_gradients().unwrap().iter().all(|g| *g == 0.0));
    for beta in [0.0, -1.0, f64::NAN] {
        assert!(Preferring::new(&mut t, [&all, &[]], beta, limits, &mut |_, _| {}).is_err());
    }
    let hollow = data::Preference { rejected: Vec::new(), ..all[0].clone() };
    assert!(reference(&mut t, &[hollow], limits, &mut |_, _| {}).is_err());
}

#[test]
fn rows_become_the_tokens_that_sessions_see() {
    let engine = Engine::open_with(model(), EngineOptions::default().device(Device::Naive)).unwrap();
    let (texts, tokenizer) = (engine.texts().unwrap(), engine.tokenizer().unwrap());
    let row =
        PreferenceText { prompt: "Why?\n".into(), chosen: "Because it is so.".into(), rejected: "No idea".into() };
    let chat = Options { pairs: data::Pairs::Chat, ..Options::default() };
    let p = row.tokens(&texts, &chat).unwrap().unwrap();
    let mut session = engine.session(128, 0).unwrap();
    session.push_chat(&[Message::new("user", "Why?\n")]).unwrap();
    assert_eq!(p.prompt, session.tokens());
    assert_eq!(tokenizer.decode(&p.chosen, false), "Because it is so.<|im_end|>");
    assert_eq!(tokenizer.decode(&p.rejected, false), "No idea<|im_end|>");

    let raw = Options::default();
    let p = row.tokens(&texts, &raw).unwrap().unwrap();
    let mut session = engine.session(128, 0).unwrap();
    session.push_text("Why?\n").unwrap();
    assert_eq!(p.prompt, session.tokens());
    assert_eq!(tokenizer.decode(&p.chosen, true), "Because it is so.");
    assert_eq!((p.chosen.last(), p.rejected.last()), (tokenizer.eos().first(), tokenizer.eos().first()));
    let batch = Batch::new([&p]);
    assert_eq!((batch.tokens.len(), batch.labels.len()), (p.tokens(), p.chosen.len() + p.rejected.len()));
    assert_eq!((batch.labels[0].0 as usize, batch.labels[0].1), (p.prompt.len() - 1, p.chosen[0]));

    // The longer of the two counts.
    let longest = p.prompt.len() + p.chosen.len();
    let at_most = |max_tokens, long_rows| Options { max_tokens, long_rows, ..Options::default() };
    assert_eq!(row.tokens(&texts, &at_most(longest, LongRows::Error)).unwrap(), Some(p.clone()));
    let long = row.tokens(&texts, &at_most(longest - 1, LongRows::Error)).unwrap_err().to_string();
    assert!(long.contains(&format!("{longest} tokens")), "{long}");
    assert_eq!(row.tokens(&texts, &at_most(longest - 1, LongRows::Skip)).unwrap(), None);
    let cut = row.tokens(&texts, &at_most(longest - 1, LongRows::Truncate)).unwrap().unwrap();
    assert_eq!((&cut.chosen[..], &cut.rejected), (&p.chosen[..p.chosen.len() - 1], &p.rejected));
    assert!(row.tokens(&texts, &at_most(p.prompt.len(), LongRows::Truncate)).is_err());

    // What is written is what is read, of its own part of the data.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.jsonl");
    let other = "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\", \"split\": \"test\"}";
    std::fs::write(&path, format!("{}\n{other}\n", serde_json::to_string(&row).unwrap())).unwrap();
    assert_eq!(preferences(&path, &texts, &raw).unwrap(), [p]);
}
