//! Real (tiny, random) models under every cache: exactness where it is promised, batches, prompts and lengths.

use std::sync::Arc;

use quadriga::backend::Train;
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::diffusion::{Cache, Choose, Denoise, Job, ModelDenoiser, Rank, Schedule, Settings, decode};
use quadriga::format::Checkpoint;
use quadriga::model::config::Diffusion;
use quadriga::model::roles::{Role, TensorSource};
use quadriga::model::{Model, ModelConfig};
use quadriga::tensor::HostTensor;

use super::common;

pub const MASK: u32 = 100;

/// A tiny model as a diffusion model, with fewer layers where told.
pub struct As {
    inner: Checkpoint,
    cfg: ModelConfig,
}

impl As {
    pub fn new(name: &str, shift: bool, block: Option<usize>, layers: Option<usize>) -> Self {
        let inner = Checkpoint::open(&common::root().join("models").join(name)).unwrap();
        let mut cfg = inner.config().clone();
        cfg.diffusion = Some(Diffusion { mask: MASK, shift, block });
        cfg.layers = layers.unwrap_or(cfg.layers);
        cfg.eos = vec![2];
        Self { inner, cfg: cfg.validate().unwrap() }
    }
}

impl TensorSource for As {
    fn config(&self) -> &ModelConfig {
        &self.cfg
    }
    fn tensor(&self, role: Role) -> quadriga::Result<HostTensor> {
        self.inner.tensor(role)
    }
}

pub fn model<B: Train>(be: B, source: &As) -> Arc<Model<B>> {
    Arc::new(Model::load(Arc::new(be), source, |_, _| {}).unwrap())
}

fn cpu() -> Cpu {
    Cpu::with(2, Tier::detect(), Compute::Exact)
}

pub fn settings(block: usize, at: f32, shift: bool) -> Settings {
    let choose = Choose::Threshold { by: Rank::Entropy, at, best: !shift, every: false };
    Settings { block, choose, early_stop: false, ..Settings::default() }
}

/// What is said, and when.
type Said = (Vec<u32>, Vec<u32>, u64);

fn say<B: Train>(model: &Arc<Model<B>>, s: Settings, prompts: &[&[u32]], tokens: usize) -> Vec<Said> {
    let mut texts: Vec<Schedule> =
        prompts.iter().map(|p| Schedule::new(model.config(), s, p, tokens).unwrap()).collect();
    let longest = texts.iter().map(|t| t.tokens().len()).max().unwrap();
    let mut denoiser = ModelDenoiser::new(model.clone(), texts.len(), longest).unwrap();
    decode(&mut denoiser, &mut texts, &mut |_, _, _| Ok(())).unwrap();
    texts.iter().map(|t| (t.tokens().to_vec(), t.ranks().to_vec(), t.counts().passes)).collect()
}

const PROMPT: [u32; 6] = [17, 200, 33, 91, 5, 310];

fn middle<B: Train>(model: &Arc<Model<B>>, shift: bool) -> f32 {
    middle_in(model, 32, shift)
}

/// The median entropy of the first pass, so that thresholds divide.
fn middle_in<B: Train>(model: &Arc<Model<B>>, block: usize, shift: bool) -> f32 {
    let mut text = Schedule::new(model.config(), settings(block, 0.0, shift), &PROMPT, 24).unwrap();
    let pass = text.next_pass().unwrap();
    let mut denoiser = ModelDenoiser::new(model.clone(), 1, 30).unwrap();
    let mut h: Vec<f32> =
        denoiser.run(&[Job { place: 0, text: &text, pass: &pass }]).unwrap()[0].iter().map(|s| s.entropy).collect();
    h.sort_by(f32::total_cmp);
    h[h.len() / 2]
}

/// I5: a delay without end is no cache. I8: where keys depend on their own token only, every cache is exact; and with more layers it is not,
/// so that the test could fail.
#[test]
fn caches_are_exact_where_keys_know_only_themselves() {
    for (name, shift) in [("tiny-llama", false), ("tiny-qwen2", true)] {
        let one = model(cpu(), &As::new(name, shift, None, Some(1)));
        let deep = model(cpu(), &As::new(name, shift, None, None));
        let mut differs = 0;
        for block in [4, 8] {
            for part in [0.97, 1.0] {
                let s = settings(block, part * middle(&one, shift), shift);
                let without = say(&one, s, &[&PROMPT], 24);
                for cache in [(0, None), (1, None), (2, Some(3)), (1, Some(1))] {
                    let cache = Cache::Delayed { delay: cache.0, refresh: cache.1 };
                    assert_eq!(say(&one, Settings { cache, ..s }, &[&PROMPT], 24), without, "{name} {cache:?}");
                }
                let sequential = Settings { add: 100, activate: 100, ..s };
                let without = say(&one, sequential, &[&PROMPT], 24);
                for cache in [Cache::Prefix, Cache::Dual] {
                    // The other masks' keys are those of masks: what they become is seen a block later.
                    let with = say(&one, Settings { cache, ..sequential }, &[&PROMPT], 24);
                    assert_eq!(with, without, "{name} {cache:?}");
                }
                let s = settings(block, part * middle(&deep, shift), shift);
                let without = say(&deep, s, &[&PROMPT], 24);
                let never = Cache::Delayed { delay: u64::MAX, refresh: None };
                assert_eq!(say(&deep, Settings { cache: never, ..s }, &[&PROMPT], 24), without);
                let cache = Cache::Delayed { delay: 0, refresh: None };
                differs += usize::from(say(&deep, Settings { cache, ..s }, &[&PROMPT], 24) != without);
            }
        }
        assert!(differs > 0, "{name}: a stale cache changes nothing, so the tests above prove little");
    }
}

/// I7: block-causal models have an exact cache, at every delay.
#[test]
fn a_block_causal_cache_is_exact() {
    for (name, shift) in [("tiny-llama", false), ("tiny-qwen2", true), ("tiny-llama", true)] {
        for block in [3, 8] {
            let m = model(cpu(), &As::new(name, shift, Some(block), None));
            let at = middle_in(&m, block, shift);
            let s = Settings {
                choose: Choose::Threshold { by: Rank::Entropy, at, best: false, every: true },
                ..settings(block, at, shift)
            };
            let without = say(&m, s, &[&PROMPT], 22);
            assert!(without[0].2 > 3, "several passes");
            for (delay, refresh) in [(0, None), (1, None), (3, Some(2)), (0, Some(1))] {
                let cache = Cache::Delayed { delay, refresh };
                assert_eq!(say(&m, Settings { cache, ..s }, &[&PROMPT], 22), without, "{name} {cache:?}");
            }
        }
    }
}

/// I12: batches of equal and of different prompts are single texts, bit for bit; on all tiers.
#[test]
fn a_batch_is_its_texts_one_by_one() {
    for cpu in common::cpus() {
        let m = model(cpu, &As::new("tiny-llama", false, None, None));
        let at = middle(&m, false);
        let prompts: [&[u32]; 4] = [&PROMPT, &[9], &PROMPT, &[4, 8, 15, 16, 23, 42, 77, 3, 3, 3]];
        for cache in [Cache::None, Cache::Delayed { delay: 1, refresh: Some(3) }] {
            let s = Settings { cache, early_stop: true, ..settings(8, at, false) };
            let together = say(&m, s, &prompts, 24);
            for (prompt, said) in prompts.iter().zip(&together) {
                assert_eq!(say(&m, s, &[prompt], 24), std::slice::from_ref(said));
            }
        }
    }
}

/// Draws are by seed and position: the same whatever is cached in a one-layer model, others with another seed.
#[test]
fn draws_are_those_of_their_seed() {
    let m = model(cpu(), &As::new("tiny-llama", false, None, Some(1)));
    let s = Settings { temperature: 1.0, top_p: 0.9, seed: 3, ..settings(8, middle(&m, false), false) };
    let one = say(&m, s, &[&PROMPT], 24);
    assert_eq!(say(&m, s, &[&PROMPT], 24), one);
    assert_ne!(say(&m, Settings { seed: 4, ..s }, &[&PROMPT], 24)[0].0, one[0].0);
    assert_ne!(say(&m, Settings { temperature: 0.0, ..s }, &[&PROMPT], 24)[0].0, one[0].0);
}

/// I15 on models: MASK is never said, though it is as likely as others; the published decoder says it, and never ends of itself.
#[test]
fn the_mask_is_never_said() {
    let source = Checkpoint::open(&common::root().join("models/tiny-llada")).unwrap();
    let m = Arc::new(Model::load(Arc::new(Naive), &source, |_, _| {}).unwrap());
    let mask = m.config().diffusion.unwrap().mask;
    let mut published = 0;
    for prompt in 3..13u32 {
        let s = settings(8, 9.0, false);
        assert!(!say(&m, s, &[&[prompt]], 24)[0].0.contains(&mask));
        // One pass of it is enough to see.
        let mut text = Schedule::new(m.config(), Settings { authors: true, ..s }, &[prompt], 24).unwrap();
        let pass = text.next_pass().unwrap();
        let found = ModelDenoiser::new(m.clone(), 1, 25).unwrap().run(&[Job { place: 0, text: &text, pass: &pass }]);
        published += text.commit(&pass, &found.unwrap()[0]).unwrap().iter().filter(|c| c.token == mask).count();
    }
    assert!(published > 0);
}

#[test]
fn a_model_without_mask_is_refused() {
    let source = Checkpoint::open(&common::root().join("models/tiny-llama")).unwrap();
    let m = Arc::new(Model::load(Arc::new(Naive), &source, |_, _| {}).unwrap());
    let error = ModelDenoiser::new(m, 1, 8).map(drop).unwrap_err().to_string();
    assert!(error.contains("no mask token"), "{error}");
}

/// The probe finds nothing where a cache is exact, and something where it ages.
#[test]
fn staleness_is_nothing_where_a_cache_is_exact() {
    use quadriga::diffusion::Staleness;
    let measure = |shift: bool, block: Option<usize>| {
        let m = model(cpu(), &As::new("tiny-llama", shift, block, None));
        let cache = Cache::Delayed { delay: 0, refresh: Some(6) };
        let s = Settings { cache, ..settings(4, -1.0, true) };
        let mut texts = [Schedule::new(m.config(), s, &PROMPT, 24).unwrap()];
        let new = || ModelDenoiser::new(m.clone(), 1, 30).unwrap();
        let mut probe = Staleness::new(new(), new());
        decode(&mut probe, &mut texts, &mut |_, _, _| Ok(())).unwrap();
        assert!(probe.passes.len() > 8);
        probe.by_age()
    };
    for shift in [false, true] {
        assert!(measure(shift, Some(4)).iter().all(|a| a.2 == 0.0 && a.3 < 1e-4), "{:?}", measure(shift, Some(4)));
        let ages = measure(shift, None);
        // A cache that was taken from this very text, one pass ago, differs by a token.
        assert!(ages.iter().any(|a| a.3 > 1e-3), "{ages:?}");
        assert!(ages.len() > 3);
    }
}
