//! Drafts that learn while they serve: texts stay what they are, what is learnt from is what the target said, rules and rollbacks are exact,
//! files are whole or refused.

#[path = "../common/mod.rs"]
mod common;

mod cli;
mod feedback;
mod learns;
mod rules;
mod state;
mod texts;
mod toy;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::{Backend, Train};
use quadriga::decode::{Autoregressive, Decoder, Sampler, Session};
use quadriga::error::Result;
use quadriga::format::peft::tensor_names;
use quadriga::format::{Checkpoint, DraftHead};
use quadriga::model::lora::{ModuleSpec, ModuleValues};
use quadriga::model::roles::{LayerRole, NamedTensors};
use quadriga::model::{Adapter, Model, ModelConfig};
use quadriga::rng::Rng;
use quadriga::speculative::adapt::{Ear, Learner, Learning, Live, Pupil, Slot, Verified};
use quadriga::speculative::heads::{Make, load};
use quadriga::speculative::train::{Eagle1, Eagle3, Hydra, SmallModelLora, Trainable, step_weights};
use quadriga::speculative::{Budget, SmallModel, Speculative};
use quadriga::tensor::HostTensor;
use quadriga::train::checkpoint::NamedTensor;

const KINDS: [&str; 4] = ["eagle3", "eagle", "hydra", "model"];

fn folder(name: &str) -> PathBuf {
    common::root().join("models").join(name)
}

fn cpu() -> Cpu {
    Cpu::with(2, Tier::detect(), Compute::Exact)
}

/// An update for every few tokens, whatever that costs; a version is watched for one pass.
fn eager(rule: &str) -> Learning {
    let base = Learning::named(rule).unwrap();
    Learning { rows: 16, context: 16, teacher: 4, unroll: 2, spending: None, guard: (1, 1e9), rank: 4, ..base }
}

/// A head with other values. An EAGLE-3 head knows all tokens, so that it has something to learn of any text.
struct Renewed<'a> {
    base: &'a DraftHead,
    tensors: &'a [NamedTensor],
}

impl NamedTensors for Renewed<'_> {
    fn names(&self) -> Vec<&str> {
        self.base.names()
    }
    fn shape(&self, name: &str) -> Option<&[usize]> {
        if ["d2t", "t2d"].contains(&name) {
            return None;
        }
        self.tensors.iter().find(|t| t.0 == name).map(|t| &t.1[..]).or_else(|| self.base.shape(name))
    }
    fn tensor(&self, name: &str) -> Result<HostTensor> {
        match self.tensors.iter().find(|t| t.0 == name) {
            Some((_, shape, values)) => {
                let cols = *shape.last().unwrap();
                HostTensor::from_f32(values.len() / cols, cols, values)
            }
            None => self.base.tensor(name),
        }
    }
    fn integers(&self, name: &str) -> Result<Vec<i64>> {
        self.base.integers(name)
    }
    fn layer(&self) -> Result<ModelConfig> {
        self.base.layer()
    }
    fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>> {
        if key == "draft_vocab_size" { Ok(None) } else { self.base.sizes(key) }
    }
    fn flag(&self, key: &str) -> Result<bool> {
        self.base.flag(key)
    }
}

type Parts = [(f32, Vec<NamedTensor>)];
type Published = Mutex<Vec<Vec<(f32, Vec<NamedTensor>)>>>;
type Maker<B> = Arc<dyn Fn(&Parts) -> Result<Make<B>> + Send + Sync>;

/// A learner and what it has published.
struct Class<B: Train> {
    learner: Arc<Mutex<Learner<B>>>,
    slot: Arc<Slot<B>>,
    published: Arc<Published>,
    make: Maker<B>,
    /// The next publication panics.
    panics: Arc<AtomicBool>,
}

impl<B: Train> Class<B> {
    fn new(
        model: &Arc<Model<B>>,
        bench: Box<dyn Trainable<B>>,
        first: Make<B>,
        make: Maker<B>,
        how: &Learning,
    ) -> Self {
        let (slot, published) = (Arc::new(Slot::new(first)), Arc::new(Mutex::new(Vec::new())));
        let panics = Arc::new(AtomicBool::new(false));
        let (to, with, falls) = (published.clone(), make.clone(), panics.clone());
        let publisher = Box::new(move |parts: &Parts| {
            assert!(!falls.swap(false, Ordering::SeqCst), "as planned");
            to.lock().unwrap().push(parts.to_vec());
            with(parts)
        });
        let learner = Learner::new(model.clone(), bench, publisher, slot.clone(), how.clone()).unwrap();
        Self { learner: Arc::new(Mutex::new(learner)), slot, published, make, panics }
    }

    fn with<T>(&self, what: impl FnOnce(&mut Learner<B>) -> T) -> T {
        what(&mut self.learner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn ear(&self, model: &Model<B>) -> Ear<B> {
        Ear::new(self.learner.clone(), model.backend(), model.config().vocab).unwrap()
    }

    /// Values of the newest version's tensors, one after another.
    fn newest(&self) -> Vec<f32> {
        let all = self.published.lock().unwrap();
        all.last().map_or(Vec::new(), |parts| parts.iter().flat_map(|p| &p.1).flat_map(|t| t.2.clone()).collect())
    }

    /// Another version than any that was learnt; whether there is one yet.
    fn swap(&self, seed: u64) -> bool {
        let Some(mut parts) = self.published.lock().unwrap().last().cloned() else { return false };
        let mut rng = Rng::new(seed);
        for x in parts.iter_mut().flat_map(|p| &mut p.1).flat_map(|t| &mut t.2) {
            *x += 0.3 * rng.normal();
        }
        self.slot.publish(Arc::new((self.make)(&parts).unwrap()));
        true
    }
}

/// A target for which drafts learn.
struct World<B: Train> {
    model: Arc<Model<B>>,
    checkpoint: Arc<Checkpoint>,
}

impl<B: Train> World<B> {
    fn new(be: B) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(&folder("tiny-llama")).unwrap());
        Self { model: Arc::new(Model::load(Arc::new(be), &*checkpoint, |_, _| {}).unwrap()), checkpoint }
    }

    fn class(&self, kind: &str, how: &Learning) -> Class<B> {
        let (rows, k, m) = (how.rows.min(1024) + how.context + 64, how.teacher, self.model.clone());
        if kind == "model" {
            return self.small_model(how, rows);
        }
        let head = Arc::new(DraftHead::open(&folder("tiny-drafts").join(kind)).unwrap());
        let mut rng = Rng::new(8);
        let wide = (0..384 * 32).map(|_| 0.1 * rng.normal()).collect();
        let all = if kind == "eagle3" { vec![("lm_head.weight".into(), vec![384, 32], wide)] } else { Vec::new() };
        let bench: Box<dyn Trainable<B>> = match kind {
            "eagle3" => Box::new(
                Eagle3::new(m, &Renewed { base: &head, tensors: &all }, rows, k, step_weights(how.unroll, how.decay))
                    .unwrap(),
            ),
            "eagle" => Box::new(Eagle1::new(m, &*head, rows, k, how.unroll).unwrap()),
            _ => Box::new(Hydra::new(m, &*head, rows, k).unwrap()),
        };
        let (model, target) = (self.model.clone(), self.checkpoint.clone());
        let make: Maker<B> =
            Arc::new(move |parts| load(model.clone(), &*target, &Renewed { base: &head, tensors: &parts[0].1 }, false));
        Class::new(&self.model, bench, make(&[(1.0, all)]).unwrap(), make, how)
    }

    fn small_model(&self, how: &Learning, rows: usize) -> Class<B> {
        let small = Arc::new(self.model.of_layers(&[1]).unwrap());
        let (rank, scale) = (how.rank, how.scale);
        let specs = LayerRole::LINEARS.map(|role| ModuleSpec { role, layer: 0, rank, scale });
        let adapter = Adapter::init(small.backend(), small.config(), &specs, 1).unwrap();
        let bench = SmallModelLora::new(small.clone(), adapter, rows, how.teacher, how.unroll, tensor_names).unwrap();
        let drafts = |small: Arc<Model<B>>| -> Make<B> { Box::new(move || Box::new(SmallModel::new(small.clone()))) };
        let first = drafts(small.clone());
        let make: Maker<B> = Arc::new(move |parts| {
            let (be, cfg) = (small.backend(), small.config());
            let adapter = |tensors: &[NamedTensor]| {
                let find = |name: &str| tensors.iter().find(|t| t.0 == name).unwrap().2.clone();
                let module = |spec: ModuleSpec| {
                    let [a, b] = tensor_names(cfg, 0, spec.role).unwrap();
                    ModuleValues { spec, a: find(&a), b: find(&b) }
                };
                Adapter::new(be, cfg, &specs.map(module)).unwrap()
            };
            let all: Vec<_> = parts.iter().map(|(share, t)| (adapter(t), *share)).collect();
            let mixed = Adapter::mix(be, cfg, &all.iter().map(|(a, share)| (a, *share)).collect::<Vec<_>>())?;
            Ok(drafts(Arc::new(small.merged(&mixed)?)))
        });
        Class::new(&self.model, Box::new(bench), first, make, how)
    }

    fn session(&self, taps: &[usize], prompt: &[u32], seed: u64) -> Session<B> {
        let mut s = Session::with_taps(self.model.clone(), 160, seed, taps).unwrap();
        s.push(prompt);
        s
    }

    /// What the target says.
    fn plain(&self, prompt: &[u32], sampler: Sampler, seed: u64, tokens: usize) -> Vec<u32> {
        let (mut s, mut decoder) = (self.session(&[], prompt, seed), Autoregressive::new(sampler));
        while s.tokens().len() < prompt.len() + tokens {
            decoder.step(&mut s).unwrap();
        }
        s.tokens()[prompt.len()..].to_vec()
    }

    fn decoder(&self, class: &Class<B>, sampler: Sampler, budget: Budget<'static>) -> (Vec<usize>, Speculative<B>) {
        let draft = Box::new(Live::new(class.slot.clone()));
        let taps = quadriga::speculative::Draft::taps(&*draft).to_vec();
        (taps, Speculative::new(draft, sampler, budget))
    }

    /// What a text with the class's draft becomes, learning or not, and its tokens a pass. `between` comes after each step.
    fn say(&self, class: &Class<B>, text: &Text, learn: bool, between: &mut dyn FnMut(usize)) -> (Vec<u32>, f64) {
        let (taps, mut decoder) = self.decoder(class, text.sampler, text.budget);
        if learn {
            decoder = decoder.taught(Box::new(class.ear(&self.model)));
        }
        let mut s = self.session(&taps, &text.prompt, text.seed);
        let end = text.prompt.len() + text.tokens;
        for step in 0.. {
            if s.tokens().len() >= end {
                break;
            }
            decoder.step(&mut s).unwrap();
            between(step);
        }
        s.truncate(end);
        decoder.finish(&s);
        let stats = decoder.stats();
        (s.tokens()[text.prompt.len()..].to_vec(), stats.verified as f64 / stats.verifications as f64)
    }
}

struct Text {
    prompt: Vec<u32>,
    sampler: Sampler,
    budget: Budget<'static>,
    seed: u64,
    tokens: usize,
}

/// Of many short texts one: chains and trees, greedy and sampled.
fn text(n: u64) -> Text {
    let mut rng = Rng::new(n);
    let prompt = (0..3 + rng.below(6)).map(|_| rng.below(384) as u32).collect();
    let warm = Sampler { temperature: 0.8, top_p: 0.95, ..Sampler::greedy() };
    let sampler = if n.is_multiple_of(2) { Sampler::greedy() } else { warm };
    let budget = if n % 4 < 2 { Budget::new(4, 4, 1) } else { Budget::new(11, 4, 3) };
    Text { prompt, sampler, budget, seed: n, tokens: 24 }
}

/// A pass that kept `kept` tokens, told to the class behind a text of its own.
fn pulse<B: Train>(world: &World<B>, class: &Class<B>, kept: usize) {
    let (taps, _) = world.decoder(class, Sampler::greedy(), Budget::new(1, 1, 1));
    let mut s = world.session(&taps, &[5, 6, 7, 8, 9, 10, 11, 12], 0);
    s.advance().unwrap();
    let token = s.sample(&Sampler::greedy()).unwrap();
    s.push(&[token]);
    let path = vec![0; kept];
    let what = Verified { session: &s, logits: s.workspace(), first: 0, path: &path, drafted: true, seconds: 0.0 };
    class.ear(&world.model).verified(&what);
}
