//! Drafting by steps: what stands of a draft's steps, what judges see, what rejected steps teach.

#[path = "../common/mod.rs"]
mod common;
mod preferences;

use std::sync::{Arc, Mutex};

use common::cpus;
use preferences::{pairs, trainer};
use quadriga::ErrorKind;
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Buffer, Train};
use quadriga::decode::{Autoregressive, Decoder, Sampler, Session};
use quadriga::dtype::DType;
use quadriga::engine::{Device, DraftKind, Engine, EngineOptions, Generate, Speculation, StepJudge, Steps};
use quadriga::format::Checkpoint;
use quadriga::model::lora::ModuleSpec;
use quadriga::model::roles::{LayerRole, Role, TensorSource};
use quadriga::model::{Adapter, Model, ModelConfig, Recompute};
use quadriga::speculative::steps::*;
use quadriga::speculative::{Budget, Speculative};
use quadriga::tensor::HostTensor;
use quadriga::train::{Batch, Example, Settings, Trainable, Trainer};

const PROMPTS: [&[u32]; 3] = [&[17, 4, 99], &[5, 6, 7, 5, 6, 7, 5], &[200, 3, 44, 9, 200, 3]];
const TOKENS: usize = 30;
const CAPACITY: usize = 120;
const SETTINGS: StepSettings = StepSettings { ahead: 3, max_tokens: 6 };

fn checkpoint() -> Checkpoint {
    Checkpoint::open(&common::root().join("models/tiny-llama")).unwrap()
}

fn load<B: Backend>(be: B) -> Arc<Model<B>> {
    Arc::new(Model::load(Arc::new(be), &checkpoint(), |_, _| {}).unwrap())
}

/// Another model with the target's tokens.
fn part<B: Backend>(model: &Arc<Model<B>>) -> Arc<Model<B>> {
    Arc::new(model.of_layers(&[0]).unwrap())
}

/// A step ends with every fifth token of the vocabulary.
fn ends(step: &[u32]) -> End {
    if step[step.len() - 1].is_multiple_of(5) { End::Step } else { End::Open }
}

fn session<B: Backend>(model: &Arc<Model<B>>, text: &[u32], seed: u64, taps: &[usize]) -> Session<B> {
    let mut s = Session::with_taps(model.clone(), CAPACITY, seed, taps).unwrap();
    s.push(text);
    s
}

/// Text of at least `tokens` tokens more than `prompt`.
fn says<B: Backend>(
    model: &Arc<Model<B>>,
    prompt: &[u32],
    tokens: usize,
    taps: &[usize],
    decoder: &mut dyn Decoder<B>,
) -> Vec<u32> {
    let mut s = session(model, prompt, 3, taps);
    while s.tokens().len() < prompt.len() + tokens {
        let before = s.tokens().len();
        assert_eq!(decoder.step(&mut s).unwrap(), s.tokens().len() - before);
    }
    s.tokens()[..prompt.len() + tokens].to_vec()
}

fn plain<B: Backend>(model: &Arc<Model<B>>, prompt: &[u32], tokens: usize, sampler: Sampler) -> Vec<u32> {
    says(model, prompt, tokens, &[], &mut Autoregressive::new(sampler))
}

fn samplers() -> [Sampler; 3] {
    let warm = Sampler { temperature: 0.9, top_k: 20, top_p: 0.95, min_p: 0.01, ..Sampler::greedy() };
    [Sampler::greedy(), warm, Sampler { repeat_penalty: 1.3, ..warm }]
}

fn decoder<B: Backend>(draft: Arc<Model<B>>, judge: impl Judge<B> + 'static, sampler: Sampler) -> StepDecoder<B> {
    StepDecoder::new(draft, Box::new(judge), sampler, SETTINGS, ends).unwrap()
}

fn exactness<B: Backend>(be: B, prompts: &[&[u32]]) {
    let target = load(be);
    let (mut accepted, mut rejected) = (0, 0);
    for &prompt in prompts {
        for sampler in samplers() {
            let want = plain(&target, prompt, TOKENS, sampler);
            // The target as its own draft is never rejected.
            let mut own = decoder(target.clone(), Exact::tokens(), sampler);
            assert_eq!(says(&target, prompt, TOKENS, &[], &mut own), want, "{sampler:?}");
            let StepCounts { written, judged, accepted: stood } = own.counts();
            assert!(written > 0 && (judged, stood) == (written, written) && own.preferences().is_empty());
            // Whatever another draft says, tokens that must be equal are the target's.
            let mut other = decoder(part(&target), Exact::tokens(), sampler);
            assert_eq!(says(&target, prompt, TOKENS, &[], &mut other), want, "{sampler:?}");
            let counts = other.counts();
            assert_eq!(counts.judged - counts.accepted, other.preferences().len() as u64);
            accepted += counts.accepted;
            for p in other.preferences().take() {
                rejected += 1;
                assert_ne!(p.chosen, p.rejected);
                let known = [&p.prompt[..], &p.chosen].concat();
                assert!(known.iter().zip(&want).all(|(a, b)| a == b), "{p:?} is not of {want:?}");
            }
            // The lossless option: steps verified token by token, in pieces where they are long.
            for (draft, always) in [(target.clone(), true), (part(&target), false)] {
                for (most, budget) in [(6, Budget::new(8, 8, 1)), (20, Budget::new(4, 4, 1))] {
                    let longest = move |step: &[u32]| if most == 20 { End::Open } else { ends(step) };
                    let chain = StepChain::new(draft.clone(), sampler, most, longest);
                    let mut d = Speculative::new(Box::new(chain), sampler, budget);
                    assert_eq!(says(&target, prompt, TOKENS, &[], &mut d), want, "{sampler:?}, {budget:?}");
                    let stats = d.stats();
                    assert!(stats.drafted > 0);
                    if always {
                        assert_eq!(stats.drafted, stats.verified - stats.verifications, "{sampler:?}, {budget:?}");
                    }
                }
            }
        }
    }
    assert!(rejected > 5, "{accepted} steps accepted, {rejected} rejected");
}

#[test]
fn exactness_naive() {
    exactness(Naive, &PROMPTS);
}

#[test]
fn exactness_cpus() {
    cpus().for_each(|be| exactness(be, &PROMPTS));
}

#[test]
fn exactness_cuda() {
    if let Some(gpu) = common::gpu() {
        // Kernels that are emulated take their time.
        exactness(gpu, &PROMPTS[..1]);
    }
}

/// A judge of a fixed mind that notes what it is shown.
struct Fixed {
    accept: bool,
    taps: [usize; 2],
    seen: Arc<Mutex<Vec<[Vec<u32>; 3]>>>,
}

impl Fixed {
    fn new(accept: bool) -> Self {
        Self { accept, taps: [1, 2], seen: Arc::default() }
    }
}

impl<B: Backend> Judge<B> for Fixed {
    fn name(&self) -> &str {
        "fixed"
    }

    fn taps(&self) -> &[usize] {
        &self.taps
    }

    fn accepts(&mut self, case: &Case<'_, B>) -> quadriga::Result<bool> {
        for (s, step) in case.sessions.into_iter().zip([case.draft, case.own]) {
            // Texts and features reach to the end of the step.
            let text = [case.prefix, step].concat();
            assert_eq!(&s.tokens()[..text.len()], text);
            let d = s.model().config().hidden;
            let mut fresh = session(s.model(), &text, 3, &self.taps);
            fresh.advance().unwrap();
            for tap in 0..2 {
                let of = |s: &Session<B>| {
                    let mut v = vec![0.0; text.len() * d];
                    let rows = s.feature_rows(tap, 0..text.len()).unwrap();
                    s.model().backend().download_acc(rows, &mut v).unwrap();
                    v
                };
                assert_eq!(of(s), of(&fresh));
            }
            assert!(s.feature_rows(0, 0..s.cache().len() + 1).is_err());
        }
        self.seen.lock().unwrap().push([case.prefix, case.draft, case.own].map(<[u32]>::to_vec));
        Ok(self.accept)
    }
}

/// What one model says behind a text, up to the end of a step.
fn one_step<B: Backend>(model: &Arc<Model<B>>, text: &[u32]) -> Vec<u32> {
    let all = plain(model, text, SETTINGS.max_tokens, Sampler::greedy());
    let step = &all[text.len()..];
    let n = (1..=step.len()).find(|&n| ends(&step[..n]) != End::Open).unwrap_or(step.len());
    step[..n].to_vec()
}

#[test]
fn accepted_steps_are_the_drafts_words() {
    let target = load(Naive);
    let draft = part(&target);
    for prompt in PROMPTS {
        let judge = Fixed::new(true);
        let seen = judge.seen.clone();
        let mut d = decoder(draft.clone(), judge, Sampler::greedy());
        let mut s = session(&target, prompt, 3, &[1, 2]);
        let mut want = prompt.to_vec();
        for _ in 0..2 {
            d.step(&mut s).unwrap();
            // Three of the draft's steps, and one of the target's behind them.
            let mut cases = Vec::new();
            for _ in 0..SETTINGS.ahead {
                let (theirs, own) = (one_step(&draft, &want), one_step(&target, &want));
                if theirs != own {
                    cases.push([want.clone(), theirs.clone(), own]);
                }
                want.extend(theirs);
            }
            want.extend(one_step(&target, &want));
            assert_eq!(s.tokens(), want);
            assert_eq!(std::mem::take(&mut *seen.lock().unwrap()), cases);
        }
        assert!(d.preferences().is_empty() && d.counts().accepted == 6);
        assert_ne!(want, plain(&target, prompt, want.len() - prompt.len(), Sampler::greedy()), "not lossless");
        let mut never = decoder(draft.clone(), Fixed::new(false), Sampler::greedy());
        let want = plain(&target, prompt, TOKENS, Sampler::greedy());
        assert_eq!(says(&target, prompt, TOKENS, &[1, 2], &mut never), want);
        assert!(!never.preferences().is_empty());
    }
    // A session that does not keep what the judge reads.
    let mut d = decoder(draft, Fixed::new(true), Sampler::greedy());
    assert_eq!(d.taps(), [1, 2]);
    let mut s = session(&target, PROMPTS[0], 3, &[]);
    assert_eq!(d.step(&mut s).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(s.tokens(), PROMPTS[0]);
}

#[test]
fn texts_end_and_contexts_fill() {
    let target = load(Naive);
    for draft in [target.clone(), part(&target)] {
        // Every step ends the text: one is drafted, and nothing comes behind it.
        let all = |_: &[u32]| End::Text;
        let judge: Box<dyn Judge<Naive>> = Box::new(Fixed::new(true));
        let mut d = StepDecoder::new(draft.clone(), judge, Sampler::greedy(), SETTINGS, all).unwrap();
        let mut s = session(&target, PROMPTS[0], 3, &[1, 2]);
        assert_eq!((d.step(&mut s).unwrap(), d.counts().written), (1, 1));
        // As far as plain decoding goes, and then an error that leaves the text.
        let mut d = decoder(draft, Exact::tokens(), Sampler::greedy());
        let mut s = session(&target, PROMPTS[1], 3, &[]);
        while s.tokens().len() < CAPACITY {
            d.step(&mut s).unwrap();
        }
        let n = s.tokens().len() - PROMPTS[1].len();
        assert_eq!(s.tokens(), plain(&target, PROMPTS[1], n, Sampler::greedy()));
        let end = loop {
            let before = s.tokens().to_vec();
            if let Err(e) = d.step(&mut s) {
                assert_eq!(s.tokens(), before);
                break e;
            }
        };
        assert_eq!(end.kind(), ErrorKind::Capacity);
    }
    let settings = StepSettings { ahead: 0, ..SETTINGS };
    let judge: Box<dyn Judge<Naive>> = Box::new(Exact::tokens());
    assert!(StepDecoder::new(target, judge, Sampler::greedy(), settings, ends).is_err());
}

fn case<'a>(prefix: &'a [u32], draft: &'a [u32], own: &'a [u32], s: [&'a Session<Naive>; 2]) -> Case<'a, Naive> {
    Case { prefix, draft, own, sessions: s }
}

#[test]
fn judges_judge() {
    let target = load(Naive);
    let (prefix, draft, own) = (PROMPTS[1], [11, 12, 13], [11, 14]);
    let held = |step: &[u32]| {
        let mut s = session(&target, &[prefix, step].concat(), 3, &[2]);
        s.advance().unwrap();
        s
    };
    let sessions = [held(&draft), held(&own)];
    let case = case(prefix, &draft, &own, [&sessions[0], &sessions[1]]);
    let accepts = |judge: &mut dyn Judge<Naive>| judge.accepts(&case).unwrap();

    assert!(!accepts(&mut Exact::tokens()));
    assert!(accepts(&mut Exact::text(|t| format!(" {}\n\n", t[0]))));
    assert!(!accepts(&mut Exact::text(|t| t.len().to_string())));

    let d = target.config().hidden;
    let mean = |s: &Session<Naive>| {
        let mut v = vec![0.0; s.tokens().len() * d];
        Naive.download_acc(s.features(0), &mut v).unwrap();
        let rows = v[prefix.len() * d..].chunks(d);
        let n = rows.len() as f64;
        rows.fold(vec![0.0; d], |m, row| m.iter().zip(row).map(|(m, x)| m + f64::from(*x) / n).collect())
    };
    let (a, b) = (mean(&sessions[0]), mean(&sessions[1]));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = dot(&a, &b) / (dot(&a, &a).sqrt() * dot(&b, &b).sqrt());
    assert!(cosine < 0.999, "{cosine}");
    assert!(accepts(&mut Similarity::new(2, cosine - 1e-9).unwrap()));
    assert!(!accepts(&mut Similarity::new(2, cosine + 1e-9).unwrap()));
    assert!(Similarity::new(2, 1.5).is_err() && Similarity::new(2, f64::NAN).is_err());

    // The answer is the model's: with yes and no exchanged it is the opposite.
    let question = [prefix, &[1], &draft, &[2], &own].concat();
    let mut asked = session(&target, &question, 0, &[]);
    asked.advance().unwrap();
    let logits = asked.logits().unwrap();
    let yes = logits[30] > logits[31];
    let ask = |p: &[u32], a: &[u32], b: &[u32]| Ok([p, &[1], a, &[2], b].concat());
    for (answers, want) in [([30, 31], yes), ([31, 30], !yes)] {
        let mut judge = Prompted::new(target.clone(), 64, ask, answers).unwrap();
        assert_eq!([accepts(&mut judge), accepts(&mut judge)], [want; 2]);
    }
    assert!(Prompted::new(target.clone(), 64, ask, [7, 7]).is_err());
    assert!(Prompted::new(target, 64, ask, [7, u32::MAX]).is_err());
}

#[test]
fn judges_decide_in_the_decoder() {
    let target = load(Naive);
    let want = plain(&target, PROMPTS[2], TOKENS, Sampler::greedy());
    let run = |threshold| {
        let judge = Similarity::new(2, threshold).unwrap();
        says(&target, PROMPTS[2], TOKENS, &[2], &mut decoder(part(&target), judge, Sampler::greedy()))
    };
    assert_eq!(run(1.0), want);
    assert_ne!(run(-1.0), want);
}

#[test]
fn through_the_engine() {
    let models = common::root().join("models");
    let options = EngineOptions::default().device(Device::Cpu).threads(2);
    let engine = Engine::open_with(models.join("tiny-llama"), options).unwrap();
    let (own, other) = (models.join("tiny-llama"), models.join("tiny-llama3"));
    let settings = StepSettings { ahead: 2, max_tokens: 8 };
    for sampler in samplers() {
        let say = |how: Generate, steps: Option<&Steps>| {
            let mut s = match steps {
                Some(steps) => engine.session_for_steps(steps, CAPACITY, 3).unwrap(),
                None => engine.session(CAPACITY, 3).unwrap(),
            };
            s.push_ids(PROMPTS[1]).unwrap();
            let how = how.max_tokens(TOKENS).ignore_eos(true);
            let ids: Vec<u32> = s.generate(how).unwrap().flat_map(|p| p.unwrap().id).collect();
            assert_eq!((ids.len(), s.stats().tokens as usize), (TOKENS, TOKENS));
            (ids, s.steps())
        };
        let (plain, none) = say(Generate::default().sampler(sampler), None);
        assert!(none.is_none());
        let judged = |path: &std::path::Path, judge| {
            let steps = engine.steps(path, judge, settings).unwrap();
            let (ids, counts) = say(Generate::default().steps(sampler, &steps), Some(&steps));
            (ids, counts.unwrap())
        };
        for path in [&own, &other] {
            let draft = engine.draft(&DraftKind::Steps(path.clone())).unwrap();
            for how in [Speculation::default(), Speculation::default().nodes(6)] {
                assert_eq!(say(Generate::default().speculative(sampler, &draft, how), None).0, plain);
            }
            let (ids, (counts, rejected)) = judged(path, StepJudge::Tokens);
            assert_eq!(ids, plain, "{}", path.display());
            assert_eq!(rejected.is_empty(), path == &own);
            assert_eq!(counts.judged - counts.accepted, rejected.len() as u64);
            // Of its own steps a model accepts all, whoever judges.
            if path == &own {
                for judge in [StepJudge::Text, StepJudge::Similarity(1.0), StepJudge::Ask] {
                    assert_eq!(judged(path, judge).0, plain, "{judge:?}");
                }
            }
        }
        assert_ne!(judged(&other, StepJudge::Similarity(-1.0)).0, plain, "not lossless");
        let (_, (counts, rejected)) = judged(&other, StepJudge::Ask);
        assert!(counts.judged > 0 && counts.judged - counts.accepted == rejected.len() as u64);
    }
    let steps = engine.steps(&own, StepJudge::Similarity(0.5), settings).unwrap();
    let mut untapped = engine.session(CAPACITY, 3).unwrap();
    untapped.push_ids(PROMPTS[0]).unwrap();
    let first = untapped.generate(Generate::default().steps(Sampler::greedy(), &steps)).unwrap().next();
    assert!(first.unwrap().unwrap_err().to_string().contains("taps"));
    let bad = StepSettings { ahead: 0, ..settings };
    assert!(engine.steps(&own, StepJudge::Text, bad).is_err());
    assert!(engine.steps(&own, StepJudge::Similarity(2.0), settings).is_err());
    assert!(engine.steps(&models.join("tiny-mistral"), StepJudge::Text, settings).is_err());
}

/// The tiny model with a table of embeddings that is NaN.
struct Damaged(Checkpoint);

impl TensorSource for Damaged {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn tensor(&self, role: Role) -> quadriga::Result<HostTensor> {
        let t = self.0.tensor(role)?;
        if role != Role::Embed {
            return Ok(t);
        }
        let nan = vec![f32::NAN; t.rows * t.cols];
        HostTensor::new(DType::F32, t.rows, t.cols, bytemuck::cast_slice(&nan).to_vec().into())
    }
}

#[test]
fn what_is_not_finite_is_refused() {
    let (good, source) = (load(Naive), Damaged(checkpoint()));
    let bad = Arc::new(Model::load(Arc::new(Naive), &source, |_, _| {}).unwrap());
    for (target, draft) in [(&good, &bad), (&bad, &good)] {
        let mut d = decoder(draft.clone(), Exact::tokens(), Sampler::greedy());
        let mut s = session(target, PROMPTS[0], 3, &[]);
        assert_eq!(d.step(&mut s).unwrap_err().kind(), ErrorKind::Diverged);
        assert_eq!(s.tokens(), PROMPTS[0]);
    }
    let mut s = session(&bad, &[1, 2, 3], 3, &[2]);
    s.advance().unwrap();
    let case = case(&[1], &[2, 3], &[2], [&s, &s]);
    let mut judges: [Box<dyn Judge<Naive>>; 2] = [
        Box::new(Similarity::new(2, -1.0).unwrap()),
        Box::new(Prompted::new(bad.clone(), 64, |_, _, _| Ok(vec![1]), [1, 2]).unwrap()),
    ];
    for judge in &mut judges {
        assert_eq!(judge.accepts(&case).unwrap_err().kind(), ErrorKind::Diverged, "{}", judge.name());
    }
    let (model, full) = Model::load_trainable(Arc::new(Naive), &source, |_, _| {}).unwrap();
    let mut t = trainer(model, Trainable::Full(full), 1e-3);
    for learn in [learn_preferences::<Naive>, learn_chosen::<Naive>] {
        assert_eq!(learn(&mut t, &pairs(), &Dpo::default()).unwrap_err().kind(), ErrorKind::Diverged);
    }
    assert_eq!(t.steps(), 0);
}
