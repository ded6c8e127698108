//! Alignment over real forward passes of tiny models: features, answers, the file of a reward, the loop.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quadriga::backend::Train;
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::decode::Sampler;
use quadriga::engine::align::{
    Answering, BestOf, Features, Form, Item, RewardModel, RewardOptions, read_pairs, read_prompts,
};
use quadriga::engine::{Device, DraftKind, Engine, EngineOptions, Generate, Speculation};
use quadriga::format::Checkpoint;
use quadriga::model::Model;
use quadriga::rlhf::{Extractor, FeatureSpec, Pooling, Tokens};
use quadriga::rng::Rng;

fn path(name: &str) -> PathBuf {
    common::root().join("models").join(name)
}

fn model<B: Train>(be: B) -> Arc<Model<B>> {
    Arc::new(Model::load(Arc::new(be), &Checkpoint::open(&path("tiny-llama")).unwrap(), |_, _| {}).unwrap())
}

fn engine(device: Device) -> Engine {
    Engine::open_with(path("tiny-llama"), EngineOptions::default().device(device).threads(2)).unwrap()
}

fn ids(rng: &mut Rng, n: usize) -> Vec<u32> {
    (0..n).map(|_| 3 + rng.below(200) as u32).collect()
}

fn answers(rng: &mut Rng, lengths: &[usize]) -> Vec<Tokens> {
    lengths.iter().map(|&n| Tokens { ids: ids(rng, n), end: Some(2) }).collect()
}

fn spec(pool: Pooling, layer: Option<usize>) -> FeatureSpec {
    FeatureSpec { pool, layer, unit: false }
}

/// A feature depends on prompt and answer alone: not on the answers beside it, their order, what was read before, or whether the
/// answer has a pass of its own.
fn features_are_those_of_the_text<B: Train>(be: B, bound: f32) {
    let model = model(be);
    let mut rng = Rng::new(1);
    let (prompt, other) = (ids(&mut rng, 20), ids(&mut rng, 9));
    let all = answers(&mut rng, &[5, 1, 40, 0, 12, 150, 5]);
    let mut worst = 0f32;
    for pool in [Pooling::Last, Pooling::Mean] {
        for layer in [None, Some(0), Some(1)] {
            let extractor = || Extractor::new(model.clone(), spec(pool, layer), 220).unwrap();
            let together = extractor().of(&prompt, &all).unwrap();
            let mut used = extractor();
            used.of(&other, &all[..2]).unwrap();
            for (i, a) in all.iter().enumerate().rev() {
                let alone = used.of(&prompt, std::slice::from_ref(a)).unwrap().remove(0);
                let off = alone.iter().zip(&together[i]).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                worst = worst.max(off);
                assert!(off <= bound, "{pool:?} {layer:?} answer {i}: off by {off}");
            }
        }
    }
    println!("greatest difference {worst:e}");
    let unit = FeatureSpec { unit: true, ..FeatureSpec::default() };
    let feature = Extractor::new(model.clone(), unit, 64).unwrap().of(&prompt, &all[..1]).unwrap().remove(0);
    assert!((feature.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
    let mut small = Extractor::new(model, FeatureSpec::default(), 24).unwrap();
    let e = small.of(&prompt, &answers(&mut rng, &[230])).unwrap_err().to_string();
    assert!(e.contains("have 251 tokens"), "{e}");
    assert!(small.of(&[], &all[..1]).is_err());
    assert!(small.of(&prompt, &[Tokens::default()]).unwrap_err().to_string().contains("an empty answer"));
}

#[test]
fn features_are_those_of_the_text_on_the_cpu() {
    for compute in [Compute::Fast, Compute::Exact] {
        features_are_those_of_the_text(Cpu::with(2, Tier::detect(), compute), 0.0);
    }
}

#[test]
fn features_are_those_of_the_text_in_f64() {
    features_are_those_of_the_text(Naive, 1e-5);
}

#[test]
fn cuda_features_are_those_of_the_text() {
    if let Some(gpu) = common::gpu() {
        // Operands are bf16, and a tensor core sums keys in the order in which they lie: branches of one tree lie otherwise than a branch alone.
        features_are_those_of_the_text(gpu, 0.1);
    }
}

/// The last layer's state behind the final norm is what the vocabulary matrix multiplies: its product is the logits of a session.
#[test]
fn the_last_feature_gives_the_logits() {
    let engine = engine(Device::Naive);
    let (prompt, answer) = (vec![5, 9, 11, 5], Tokens { ids: vec![7, 8], end: Some(2) });
    let mut features = Features::new(&engine, spec(Pooling::Last, None), None).unwrap();
    let feature = features.of(&prompt, &[&answer]).unwrap().remove(0);
    let mut session = engine.session(16, 0).unwrap();
    session.push_ids(&[5, 9, 11, 5, 7, 8, 2]).unwrap();
    session.prefill().unwrap();
    let logits = session.logits().unwrap().to_vec();
    let checkpoint = Checkpoint::open(&path("tiny-llama")).unwrap();
    let model = Model::load(Arc::new(Naive), &checkpoint, |_, _| {}).unwrap();
    let (vocab, d) = (model.config().vocab, model.config().hidden);
    let table: Vec<f64> = {
        use quadriga::backend::{Backend, Buffer};
        let x: Vec<f32> = feature.clone();
        let be = model.backend();
        let (mut h, mut y) = (be.alloc::<f64>(d).unwrap(), be.alloc::<f64>(vocab).unwrap());
        be.upload_acc(h.head_mut(d), &x).unwrap();
        be.linear(y.head_mut(vocab), h.head(d), model.vocabulary(), None).unwrap();
        let mut out = vec![0f64; vocab];
        be.download(y.head(vocab), &mut out).unwrap();
        out
    };
    assert!(logits.iter().zip(table).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-4));
}

fn hot(max_tokens: usize) -> Generate {
    Generate::default().sampler(Sampler { temperature: 0.9, ..Sampler::greedy() }).max_tokens(max_tokens)
}

fn items(engine: &Engine, n: usize) -> Vec<Item> {
    let mut rng = Rng::new(4);
    let item = |i: usize| Item { prompt: format!("prompt {i}"), ids: ids(&mut rng, 3 + 7 * i), ..Item::default() };
    assert!(engine.config().context >= 128);
    (0..n).map(item).collect()
}

/// Answers do not depend on how many are in the making, on drafts, or on what a file had of them; the first one to prompt 0 is what plain
/// sampling says; features made while writing are those of reading.
fn answers_are_those_of_the_seed(device: Device) {
    let engine = engine(device);
    let answering = Answering { how: hot(12), each: 3, width: 1, seed: 5 };
    let run = |a: &Answering, file: Option<&Path>| {
        let (mut items, mut features) =
            (items(&engine, 3), Features::new(&engine, FeatureSpec::default(), None).unwrap());
        a.run(&engine, &mut items, 0, &mut features, file, &mut |_| {}).unwrap();
        items
    };
    let expected = run(&answering, None);
    for item in &expected {
        assert_eq!(item.answers.len(), 3);
        assert!(item.answers[0].tokens != item.answers[1].tokens, "two draws are the same");
    }
    let mut session = engine.session(64, 5).unwrap();
    session.push_ids(&expected[0].ids).unwrap();
    let plain: Vec<u32> = session.generate(hot(12)).unwrap().filter_map(|p| p.unwrap().id).collect();
    let first = &expected[0].answers[0];
    assert_eq!(plain, [&first.tokens.ids[..], if first.cut { &[] } else { first.tokens.end.as_slice() }].concat());

    // What writing gave against reading.
    let mut reading = Features::new(&engine, FeatureSpec::default(), None).unwrap();
    for item in &expected {
        let tokens: Vec<&Tokens> = item.answers.iter().map(|a| &a.tokens).collect();
        let read = reading.of(&item.ids, &tokens).unwrap();
        for (a, b) in item.answers.iter().zip(&read) {
            let near = |(x, y): (&f32, &f32)| if device == Device::Cpu { x == y } else { (x - y).abs() < 1e-4 };
            assert!(a.feature.iter().zip(b).all(near), "a feature of writing is not that of reading");
        }
    }
    let texts = |items: &[Item]| -> Vec<Vec<Tokens>> {
        items.iter().map(|i| i.answers.iter().map(|a| a.tokens.clone()).collect()).collect()
    };
    assert_eq!(run(&Answering { width: 4, ..answering.clone() }, None), expected);
    let draft = engine.draft(&DraftKind::Lookup).unwrap();
    let how =
        hot(12).speculative(Sampler { temperature: 0.9, ..Sampler::greedy() }, &draft, Speculation::default().nodes(4));
    assert_eq!(texts(&run(&Answering { how, width: 4, ..answering.clone() }, None)), texts(&expected));

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("answers.jsonl");
    assert_eq!(run(&answering, Some(&file)), expected);
    let text = fs::read_to_string(&file).unwrap();
    // Killed in the middle of a line.
    fs::write(&file, &text[..text.len() * 2 / 3]).unwrap();
    assert_eq!(run(&answering, Some(&file)), expected);
}

#[test]
fn answers_are_those_of_the_seed_on_the_cpu() {
    answers_are_those_of_the_seed(Device::Cpu);
}

#[test]
fn answers_are_those_of_the_seed_in_f64() {
    answers_are_those_of_the_seed(Device::Naive);
}

/// Comparisons by a hidden linear judge over features of texts.
fn teach(reward: &mut RewardModel, features: &mut Features, from: usize, to: usize) {
    let mut rng = Rng::new(8);
    let d = reward.engine().config().hidden;
    let taste: Vec<f32> = (0..d).map(|_| rng.normal()).collect();
    let prompt = ids(&mut rng, 6);
    let all: Vec<Vec<Tokens>> = (0..to).map(|_| answers(&mut rng, &[4, 7])).collect();
    for pair in &all[from..] {
        let f = features.of(&prompt, &pair.iter().collect::<Vec<_>>()).unwrap();
        let score = |f: &Vec<f32>| f.iter().zip(&taste).map(|(a, b)| a * b).sum::<f32>();
        let y = f64::from(u8::from(score(&f[0]) > score(&f[1])));
        reward.learn(&f, Some((&f[0], &f[1], y))).unwrap();
    }
}

fn weights(reward: &RewardModel) -> Vec<u64> {
    reward.learner().theta().iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_reward_goes_on_to_the_same_bits_after_any_end() {
    let engine = engine(Device::Cpu);
    let options = RewardOptions { warmup: 30, ..RewardOptions::default() };
    let mut features = Features::new(&engine, options.features, None).unwrap();
    let mut whole = RewardModel::new(&engine, options.clone()).unwrap();
    teach(&mut whole, &mut features, 0, 100);
    assert_eq!((whole.comparisons(), whole.rounds()), (100, 100));
    assert!(whole.progress().accuracy() > 0.6, "{}", whole.progress().accuracy());

    // Dropped without being saved: in the warm-up, where it ends, behind it, and behind a snapshot with a log.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("taste.safetensors");
    let log = dir.path().join("taste.safetensors.log");
    for (from, to) in [(0, 7), (7, 15), (15, 16), (16, 40), (40, 80), (80, 100)] {
        let mut reward = RewardModel::open(&engine, &file, Some(options.clone())).unwrap();
        assert_eq!(reward.comparisons(), from as u64);
        teach(&mut reward, &mut features, from, to);
        let e = RewardModel::open(&engine, &file, None).map(drop).unwrap_err().to_string();
        assert!(e.contains("in use by another process"), "{e}");
    }
    let read = RewardModel::read(&engine, &file).unwrap();
    assert_eq!((weights(&read), read.progress()), (weights(&whole), whole.progress()));

    // Killed within a line of the log: that comparison was never acknowledged, those before it were.
    let lines = fs::read(&log).unwrap();
    fs::write(&log, &lines[..lines.len() - 9]).unwrap();
    assert_eq!(RewardModel::read(&engine, &file).unwrap().comparisons(), 99);
    // Killed between the snapshot and the emptying of the log.
    fs::write(&log, &lines).unwrap();
    let mut reward = RewardModel::open(&engine, &file, None).unwrap();
    reward.save().unwrap();
    drop(reward);
    fs::write(&log, &lines).unwrap();
    assert_eq!(weights(&RewardModel::read(&engine, &file).unwrap()), weights(&whole));
    // Damage that is no torn end.
    let mut bad = lines.clone();
    bad[40] ^= 1;
    fs::write(&log, &bad).unwrap();
    let e = RewardModel::read(&engine, &file).map(drop).unwrap_err().to_string();
    assert!(e.contains("taste.safetensors.log: line 1 is damaged"), "{e}");
    fs::remove_file(&log).unwrap();

    let bytes = fs::read(&file).unwrap();
    for at in (0..bytes.len()).step_by(211) {
        let mut bad = bytes.clone();
        bad[at] ^= 4;
        fs::write(&file, &bad).unwrap();
        if let Ok(read) = RewardModel::read(&engine, &file) {
            // A letter of a name of the header, say.
            assert_eq!(weights(&read), weights(&whole), "byte {at}");
        }
        fs::write(&file, &bytes[..at]).unwrap();
        assert!(RewardModel::read(&engine, &file).is_err(), "cut at {at}");
    }
    fs::write(&file, &bytes).unwrap();
    let other = Engine::open_with(path("tiny-text"), EngineOptions::default().device(Device::Cpu)).unwrap();
    let e = RewardModel::read(&other, &file).map(drop).unwrap_err().to_string();
    assert!(e.contains("taste.safetensors") && e.contains("of another model"), "{e}");
    let e = RewardModel::open(&engine, &file, Some(RewardOptions::default())).map(drop).unwrap_err().to_string();
    assert!(e.contains("made with"), "{e}");
}

#[test]
fn more_answers_never_lower_the_best_reward() {
    let engine = engine(Device::Cpu);
    let options = RewardOptions { warmup: 20, ..RewardOptions::default() };
    let mut features = Features::new(&engine, options.features, None).unwrap();
    let mut reward = RewardModel::new(&engine, options).unwrap();
    teach(&mut reward, &mut features, 0, 40);
    let answering = Answering { how: hot(10), each: 1, width: 4, seed: 9 };
    let (mut last, mut first) = (f64::NEG_INFINITY, None);
    for most in [1, 2, 5, 9] {
        let mut item = items(&engine, 1).remove(0);
        let best = BestOf { most, ..BestOf::default() };
        let chosen = best.run(&reward, &answering, &mut features, &mut item, 0).unwrap();
        let value = reward.rewards(&item.features())[chosen.answer];
        assert!(value >= last, "{most}");
        assert_eq!(item.answers[0].tokens, *first.get_or_insert_with(|| item.answers[0].tokens.clone()));
        let kl = (most as f64).ln() - (most as f64 - 1.0) / most as f64;
        assert!((chosen.kl - kl).abs() < 1e-12 && item.answers.len() == most);
        last = value;
    }
    let stop = |gain| {
        let mut item = items(&engine, 1).remove(0);
        let best = BestOf { most: 16, gain, ..BestOf::default() };
        best.run(&reward, &answering, &mut features_of(&engine), &mut item, 0).unwrap();
        item.answers.len()
    };
    assert!(stop(1e9) == 4 && stop(1e-12) == 16 && stop(0.05) <= 16);
}

fn features_of(engine: &Engine) -> Features {
    Features::new(engine, FeatureSpec::default(), None).unwrap()
}

#[test]
fn bad_rows_are_named() {
    let engine = engine(Device::Naive);
    let form = Form::new(&engine, false, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pairs.jsonl");
    let refused = |row: &str| {
        let good = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
        fs::write(&file, format!("{good}\n{row}\n")).unwrap();
        let e = read_pairs(&file, &form, 0).map(|_| ()).unwrap_err();
        assert_eq!(e.kind(), quadriga::ErrorKind::Usage);
        let e = e.to_string();
        assert!(e.contains("pairs.jsonl, line 2"), "{e}");
        e
    };
    assert!(refused("{").contains("EOF"));
    assert!(refused(r#"{"prompt": "a", "chosen": "b"}"#).contains("rejected"));
    assert!(refused(r#"{"prompt": "a", "chosen": "b", "rejected": " "}"#).contains("an empty answer"));
    assert!(refused(r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#).contains("the same text"));
    assert!(refused(r#"{"prompt": "", "chosen": "b", "rejected": "c"}"#).contains("an empty prompt"));
    let long = "x ".repeat(9000);
    assert!(refused(&format!(r#"{{"prompt": "a", "chosen": "b", "rejected": "{long}"}}"#)).contains("context"));
    fs::write(&file, "").unwrap();
    assert!(read_pairs(&file, &form, 0).map(|_| ()).unwrap_err().to_string().contains("no pairs"));
    assert!(read_prompts(&file, &form, 0).map(|_| ()).unwrap_err().to_string().contains("no prompts"));
    // Rows of one prompt are one item; an answer that comes twice is one answer.
    let rows = [("a", "b", "c"), ("a", "d", "b"), ("e", "b", "c")];
    let text: String =
        rows.map(|(p, c, r)| format!("{{\"prompt\": \"{p}\", \"chosen\": \"{c}\", \"rejected\": \"{r}\"}}\n")).concat();
    fs::write(&file, text).unwrap();
    let (items, pairs) = read_pairs(&file, &form, 0).unwrap();
    assert_eq!(items.iter().map(|i| i.answers.len()).collect::<Vec<_>>(), [3, 2]);
    assert_eq!(pairs.iter().map(|c| (c.item, c.answers)).collect::<Vec<_>>(), [(0, [0, 1]), (0, [2, 0]), (1, [0, 1])]);
}
