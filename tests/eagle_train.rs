//! Training of EAGLE-3 heads: the gradient of the whole loss against central differences in f64, every backend against the
//! specification, what a row learns from, and runs from files to files.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;
use quadriga::backend::Train;
use quadriga::backend::naive::Naive;
use quadriga::engine::{Device, DraftRun, EngineOptions};
use quadriga::format::Checkpoint;
use quadriga::model::{Model, ModelConfig};
use quadriga::rng::Rng;
use quadriga::speculative::train::{
    DraftVocab, EagleHead, HeadConfig, HeadPass, HeadSaved, Sequence, Teacher, Tensors, extent, step_weights,
};
use quadriga::train::Plan;

const TAPS: usize = 3;
const VOCAB: usize = 23;
const K: usize = 3;
const STEPS: usize = 3;

fn source() -> Checkpoint {
    Checkpoint::open(&common::root().join("models/tiny-llama")).unwrap()
}

fn vocab(target: usize) -> DraftVocab {
    DraftVocab::new((0..VOCAB as u32).map(|i| 2 * i + u32::from(i > 9)).collect(), target).unwrap()
}

/// A prompt of `prompt` tokens and as many more as make `n`, with features and a teacher of no model. The teacher knows tokens that the
/// head does not.
fn sequence(cfg: &ModelConfig, prompt: usize, n: usize, seed: u64) -> Sequence {
    let mut rng = Rng::new(seed);
    let [rows, slots] = extent(prompt, n).unwrap();
    let tokens = (0..n).map(|_| rng.below(cfg.vocab) as u32).collect();
    let features = (0..TAPS * rows * cfg.hidden).map(|_| bf16::from_f32(rng.normal())).collect();
    let k = 6;
    let (mut ids, mut p) = (Vec::new(), Vec::new());
    for _ in 0..slots {
        let first = rng.below(30) as u32;
        ids.extend((0..k as u32).map(|j| first + j * if first.is_multiple_of(3) { 1 } else { 2 }));
        p.extend((0..k).map(|j| 0.4 / (1 << j) as f32));
    }
    Sequence { prompt, tokens, features, teacher: Teacher { k, ids, p } }
}

/// A head and a packed pass of two sequences.
struct Case<B: Train> {
    target: Model<B>,
    head: EagleHead<B>,
    pass: HeadPass,
    saved: HeadSaved<B>,
    weights: Vec<f32>,
}

impl<B: Train> Case<B> {
    fn new(be: B) -> Self {
        let source = source();
        let target = Model::load(Arc::new(be), &source, |_, _| {}).unwrap();
        let cfg = target.config().clone();
        let head_cfg = HeadConfig::new(&cfg, TAPS, VOCAB);
        let vocab = vocab(cfg.vocab);
        // Values that every backend's type of weights holds; norms are about 1.
        let mut rng = Rng::new(7);
        let mut value = |norm: bool, cols: usize| {
            let x = rng.normal();
            bf16::from_f32(if norm { 1.0 + 0.2 * x } else { x / (cols as f32).sqrt() }).to_f32()
        };
        let tensors: Tensors = head_cfg
            .tensors()
            .map(|(name, [r, c])| (name.to_owned(), (0..r * c).map(|_| value(r == 1, c)).collect()))
            .into();
        let head = EagleHead::new(target.backend(), head_cfg.clone(), &tensors).unwrap();
        let sequences = [sequence(&cfg, 4, 15, 1), sequence(&cfg, 2, 9, 2)];
        let pass = HeadPass::new(&head_cfg, &sequences.iter().collect::<Vec<_>>(), &vocab, K).unwrap();
        let saved = HeadSaved::new(target.backend(), &head_cfg, pass.rows() + 3, STEPS).unwrap();
        let weights = step_weights(STEPS, 0.8).iter().enumerate().map(|(i, w)| w / pass.active(i) as f32).collect();
        Self { target, head, pass, saved, weights }
    }

    fn loss(&mut self, grad: bool) -> f64 {
        let Self { target, head, pass, saved, weights } = self;
        let be = target.backend();
        head.forward(be, target.embedding(), pass, saved).unwrap();
        let said = head.say(be, pass, saved, weights, grad, false).unwrap();
        if grad {
            head.backward(be, pass, saved).unwrap();
        }
        said.loss.iter().zip(weights).map(|(l, w)| f64::from(*w) * l.iter().sum::<f64>()).sum()
    }

    fn grads(&self) -> Vec<(String, Vec<f32>)> {
        let be = self.target.backend();
        let of = |p: &quadriga::model::Param<B>| {
            let mut v = vec![0.0; p.len()];
            be.download_acc(quadriga::backend::Buffer::head(p.g.as_ref().unwrap(), p.len()), &mut v).unwrap();
            (p.name.clone(), v)
        };
        self.head.params().map(of).collect()
    }
}

#[test]
fn the_gradient_of_the_whole_loss_is_its_difference() {
    const H: f64 = 1e-5;
    let mut case = Case::new(Naive);
    case.loss(true);
    let grads: Vec<(String, Vec<f64>)> =
        case.head.params().map(|p| (p.name.clone(), p.g.as_ref().unwrap().to_vec())).collect();
    assert_eq!(grads.len(), TAPS + 6 + 5 + 4);
    for (i, (name, grad)) in grads.iter().enumerate() {
        let n = grad.len();
        let mut rng = Rng::new(i as u64);
        let unit = 1.0 / (n as f64).sqrt();
        let mut directions: Vec<Vec<f64>> =
            (0..2).map(|_| (0..n).map(|_| if rng.below(2) == 0 { unit } else { -unit }).collect()).collect();
        for _ in 0..4 {
            let mut one = vec![0.0; n];
            one[rng.below(n)] = 1.0;
            directions.push(one);
        }
        let size = grad.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        assert!(size > 1e-6, "{name} has no gradient");
        for d in directions {
            let nudge = |case: &mut Case<Naive>, by: f64| {
                let p = case.head.params_mut().nth(i).unwrap();
                p.w.iter_mut().zip(&d).for_each(|(w, d)| *w += by * d);
                case.head.refresh(&Naive).unwrap();
            };
            let mut at = |h: f64| {
                nudge(&mut case, h);
                let loss = case.loss(false);
                nudge(&mut case, -h);
                loss
            };
            let numeric = (at(H) - at(-H)) / (2.0 * H);
            let analytic: f64 = grad.iter().zip(&d).map(|(g, d)| g * d).sum();
            let error = (numeric - analytic).abs() / size;
            assert!(error < 1e-6, "{name}: {analytic:.9e}, and {numeric:.9e} by differences");
        }
    }
}

/// Loss and every gradient of a backend, as a part of the specification's.
fn compare<B: Train>(name: &str, be: B, tolerance: f64) {
    let (mut want, mut got) = (Case::new(Naive), Case::new(be));
    let losses = [want.loss(true), got.loss(true)];
    assert!((losses[0] - losses[1]).abs() < tolerance * losses[0], "{name}: losses {losses:?}");
    let mut most = 0.0f64;
    for ((tensor, w), (_, g)) in want.grads().into_iter().zip(got.grads()) {
        let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let error = norm(&mut w.iter().zip(&g).map(|(a, b)| a - b)) / norm(&mut w.iter().copied());
        assert!(error < tolerance, "{name}: {tensor} is off by {error:.2e}");
        most = most.max(error);
    }
    println!("{name}: greatest error {most:.2e}");
}

#[test]
fn every_backend_gives_the_specifications_gradients() {
    for cpu in common::cpus() {
        compare(&format!("cpu {}", cpu.tier()), cpu, 2e-5);
    }
    if let Some(gpu) = common::gpu() {
        compare("cuda", gpu, 0.03);
    }
}

#[test]
fn steps_read_and_are_asked_what_drafting_would() {
    let source = source();
    let cfg = quadriga::model::roles::TensorSource::config(&source).clone();
    let vocab = vocab(cfg.vocab);
    let s = sequence(&cfg, 4, 9, 3);
    let pass = HeadPass::new(&HeadConfig::new(&cfg, TAPS, VOCAB), &[&s], &vocab, K).unwrap();
    // Rows read tokens 1 to 7; slots are those that read tokens 4 to 7, with the teacher behind them.
    assert_eq!((pass.rows(), pass.slots()), (7, 4));
    for (slot, step) in (0..4).flat_map(|s| (0..STEPS).map(move |i| (s, i))) {
        let want = (slot + step < 4).then(|| vocab.t2d()[s.teacher.ids[(slot + step) * s.teacher.k] as usize]);
        assert_eq!(pass.wanted(slot, step), want, "slot {slot}, step {step}");
    }
    let sum: f32 = step_weights(7, 0.8).iter().sum();
    assert!((sum - 3.951424).abs() < 1e-6);
}

#[test]
fn a_vocabulary_is_the_most_frequent_tokens() {
    let v = DraftVocab::most_frequent([7, 3, 7, 9, 3, 7, 1].into_iter(), 3, 10).unwrap();
    assert_eq!(v.d2t(), [1, 3, 7]);
    assert_eq!((v.t2d()[7], v.t2d()[9]), (2, DraftVocab::NONE));
    assert!(DraftVocab::most_frequent([10].into_iter(), 3, 10).is_err());
    assert!(DraftVocab::new(vec![4, 4], 10).is_err());
}

/// What a target might have said: numbers that count up, from prompts of their own.
fn data(dir: &Path) -> PathBuf {
    let row = |n: u32| {
        let first = 20 + n * 7 % 40;
        let ids: Vec<u32> = (0..14).map(|i| first + i).collect();
        format!("{{\"n\": {n}, \"kind\": \"count\", \"prompt_ids\": [1, {first}, 3], \"ids\": {ids:?}}}\n")
    };
    let path = dir.join("said.jsonl");
    // The last line is still being written.
    std::fs::write(&path, (0..40).map(row).collect::<String>() + "{\"n\": 40, \"prom").unwrap();
    path
}

fn files(folder: &Path) -> [Vec<u8>; 2] {
    ["draft/model.safetensors", "loss.csv"].map(|name| std::fs::read(folder.join(name)).unwrap())
}

#[test]
fn a_run_learns_and_goes_on_from_a_checkpoint_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let model = common::root().join("models/tiny-llama");
    let features = dir.path().join("features");
    let mut run = DraftRun {
        data: vec![data(dir.path())],
        held_out: 8,
        taps: vec![0, 1, 2],
        vocab: 60,
        unroll: 3,
        teacher: 4,
        features: Some(features.clone()),
        keep_features: true,
        ..DraftRun::default()
    };
    run.optimizer.lr = 0.01;
    run.optimizer.schedule.warmup = 2;
    run.plan = Plan { steps: 24, batch_tokens: 96, accumulate: 2, save_every: 8, eval_every: 8, ..Plan::default() };
    let start = |run: &DraftRun, out: &Path, resume: bool| {
        run.start(&model, out, resume, EngineOptions::default().device(Device::Cpu).threads(2), &mut |_| {})
    };
    let whole = dir.path().join("whole");
    let outcome = start(&run, &whole, false).unwrap();
    let (first, last) = (&outcome.held_out[0], outcome.held_out.last().unwrap());
    // A target that knows nothing can be copied only so far.
    assert!(last.1 < 0.95 * first.1 && outcome.loss < last.1, "{} of {:?}", outcome.loss, outcome.held_out);

    let broken = dir.path().join("broken");
    run.plan.minutes = 1e-9;
    assert!(start(&run, &broken, false).unwrap_err().to_string().contains("first step"));
    run.plan.minutes = 0.0;
    run.plan.keep = 9;
    let kept = dir.path().join("kept");
    start(&run, &kept, false).unwrap();
    std::fs::rename(kept.join("checkpoints/step-00000016"), dir.path().join("step-00000016")).unwrap();
    for entry in std::fs::read_dir(kept.join("checkpoints")).unwrap() {
        std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    std::fs::rename(dir.path().join("step-00000016"), kept.join("checkpoints/step-00000016")).unwrap();
    std::fs::remove_dir_all(kept.join("draft")).unwrap();
    assert!(start(&run, &kept, false).unwrap_err().to_string().contains("--resume"));
    start(&run, &kept, true).unwrap();
    assert!(files(&whole) == files(&kept), "a run that goes on differs from one in one piece");

    // From a head on: where the first run ended, the next begins.
    let mut more = DraftRun { init: Some(whole.join("draft")), ..run.clone() };
    more.plan.steps = 2;
    more.optimizer.schedule.warmup = 0;
    more.keep_features = false;
    let next = start(&more, &dir.path().join("next"), false).unwrap();
    assert!((next.held_out[0].1 - last.1).abs() < 1e-2 * last.1, "{} after {}", next.held_out[0].1, last.1);
    assert!(!features.exists());

    run.taps = vec![0, 9];
    assert!(start(&run, &dir.path().join("bad"), false).unwrap_err().to_string().contains("taps"));
    run.vocab = 0;
    assert!(start(&run, &dir.path().join("bad"), false).unwrap_err().to_string().contains("vocabulary"));
}
