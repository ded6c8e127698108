//! Drafts that need no model: what they propose, and that whatever is proposed, speculation says what plain decoding says.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::cpus;
use quadriga::backend::Backend;
use quadriga::backend::naive::Naive;
use quadriga::decode::{Autoregressive, Decoder, Sampler, Session};
use quadriga::engine::{Device, DraftKind, Engine, EngineOptions, Generate, Speculation};
use quadriga::error::Result;
use quadriga::format::Checkpoint;
use quadriga::model::Model;
use quadriga::rng::Rng;
use quadriga::speculative::{Budget, CostModel, Curve, Draft, DraftTree, Lookup, Memory, Mixed, Plan, Speculative};

const BUDGET: Budget = Budget::new(12, 6, 3);

fn proposed(lookup: &mut Lookup, text: &[u32], budget: Budget) -> DraftTree {
    let mut tree = DraftTree::new(*text.last().unwrap());
    lookup.follow(text);
    lookup.grow(budget, 3, &mut tree);
    tree
}

#[test]
fn what_followed_before_is_proposed() {
    let text: Vec<u32> = [5, 6, 7, 8, 9, 1, 2, 5, 6, 7].to_vec();
    let chain = Budget { width: 1, ..BUDGET };
    let mut lookup = Lookup::default();
    let tree = proposed(&mut lookup, &text, chain);
    assert_eq!(tree.tokens(), [7, 8, 9, 1, 2, 5, 6]);
    assert!(tree.sources()[1..].iter().all(|s| *s == 3));
    // Behind a match of three the fourth is likelier than the first behind a match of one.
    let one = proposed(&mut Lookup::new(1, 1), &text, chain);
    assert_eq!(one.tokens()[1], 8);
    assert!(one.scores()[1] < tree.scores()[1]);
    assert_eq!(proposed(&mut Lookup::new(4, 9), &text, chain).len(), 1, "no match so long");
    // Two continuations: the commoner first; the other in a tree.
    let text = [1, 2, 3, 8, 1, 2, 4, 8, 1, 2, 3, 9, 1, 2].to_vec();
    assert_eq!(proposed(&mut lookup, &text, chain).tokens()[1], 3);
    let tree = proposed(&mut lookup, &text, Budget { depth: 1, ..BUDGET });
    assert_eq!(tree.tokens(), [2, 3, 4]);
    let q: Vec<f32> = tree.scores().iter().map(|s| s.exp()).collect();
    assert!((q[1] / q[2] - 2.0).abs() < 1e-5 && q[1] + q[2] < 1.0, "{q:?}");
    // A period goes on beyond the end of what is known.
    let text = [1, 2, 3, 1, 2, 3, 1, 2, 3].to_vec();
    let tree = proposed(&mut lookup, &text, Budget { depth: 9, ..chain });
    assert_eq!(tree.tokens(), [3, 1, 2, 3, 1, 2, 3, 1, 2, 3]);
}

#[test]
fn the_text_may_change_and_rates_are_learnt() {
    let mut rng = Rng::new(1);
    let mut lookup = Lookup::default();
    let mut text: Vec<u32> = Vec::new();
    for _ in 0..30 {
        text.truncate(rng.below(text.len() + 1));
        text.extend((0..1 + rng.below(40)).map(|_| rng.below(6) as u32));
        let tree = proposed(&mut lookup, &text, BUDGET);
        // What it proposes depends on rates learnt before; which tokens a chain may hold is the text's alone.
        for i in 1..tree.len() {
            assert!(text.contains(&tree.tokens()[i]) && tree.scores()[i] >= 0.02f32.ln());
        }
        assert!(tree.len() <= 13 && tree.depths().iter().all(|d| *d <= 6));
    }
    // Text without order teaches that a match of one means little; a text that repeats itself, that it means much.
    let noise: Vec<u32> = (0..400).map(|_| rng.below(300) as u32).chain([7, 8, 9, 7]).collect();
    let order: Vec<u32> = (0..400).map(|i| i % 40).chain([107, 108, 109, 107]).collect();
    let after = |text: &[u32]| {
        let tree = proposed(&mut Lookup::default(), text, BUDGET);
        let named = (1..tree.len()).find(|&i| tree.parents()[i] == 0 && tree.tokens()[i] % 100 == 8);
        named.map_or(0.0, |i| tree.scores()[i].exp())
    };
    assert!(after(&noise) < 0.1 && after(&order) >= 0.2, "{} and {}", after(&noise), after(&order));
}

/// Proposes trees of random tokens, and claims to be sure of them. Checks what it is told about them.
struct Noise {
    rng: Rng,
    told: Vec<u32>,
    asked: Arc<AtomicUsize>,
}

impl Noise {
    fn new() -> Self {
        Self { rng: Rng::new(6), told: Vec::new(), asked: Arc::default() }
    }
}

impl<B: Backend> Draft<B> for Noise {
    fn name(&self) -> &str {
        "noise"
    }

    fn propose(&mut self, s: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let told = std::mem::take(&mut self.told);
        assert!(s.tokens().windows(told.len().max(1)).any(|w| told.is_empty() || w == told), "{told:?}");
        for _ in 0..self.rng.below(budget.nodes + 1) {
            let parent = self.rng.below(tree.len());
            if (tree.depths()[parent] as usize) < budget.depth {
                // A few tokens only, so that some stand.
                tree.push(parent as u32, self.rng.below(s.model().config().vocab.min(24)) as u32, -0.1, 0);
            }
        }
        Ok(())
    }

    fn verdict(&mut self, tree: &DraftTree, path: &[u32], next: u32) {
        assert!(path[0] == 0 && path.windows(2).all(|w| tree.parents()[w[1] as usize] == w[0]));
        self.told = path.iter().map(|&i| tree.tokens()[i as usize]).chain([next]).collect();
    }
}

/// Tokens that drafts had right, after every draft and sampler said what plain decoding says.
fn speculates<B: Backend>(be: B, name: &str, tokens: usize) -> usize {
    let path = common::root().join("models").join(name);
    let m = Arc::new(Model::load(Arc::new(be), &Checkpoint::open(&path).unwrap(), |_, _| {}).unwrap());
    let prompts: [&[u32]; 2] = [&[5, 9, 11, 5, 9], &[7]];
    let mut stood = 0;
    for sampler in [Sampler::greedy(), Sampler { temperature: 0.7, top_k: 6, ..Sampler::greedy() }] {
        for prompt in prompts {
            let run = |decoder: &mut dyn Decoder<B>| {
                let mut s = Session::new(m.clone(), prompt.len() + tokens, 3).unwrap();
                s.push(prompt);
                while s.tokens().len() < s.capacity() {
                    decoder.step(&mut s).unwrap();
                }
                s.tokens()[..s.capacity()].to_vec()
            };
            let plain = run(&mut Autoregressive::new(sampler));
            let mixed = || Box::new(Mixed::new(Box::new(Lookup::default()), Box::new(Noise::new())));
            let cost = CostModel { pass: Curve::new(&[(1, 1.0), (9, 1.3)]), ..CostModel::default() };
            let drafts: [(Box<dyn Draft<B>>, Option<Plan>); 6] = [
                (Box::new(Lookup::default()), None),
                (Box::new(Lookup::new(2, 3)), Some(Plan::new(cost.clone()))),
                (Box::new(Noise::new()), None),
                (Box::new(Noise::new()), Some(Plan::reproducible(cost.clone()))),
                (mixed(), None),
                (mixed(), Some(Plan::reproducible(cost))),
            ];
            for (draft, plan) in drafts {
                let who = format!("{name}, {}, {sampler:?}", draft.name());
                let mut speculative = Speculative::new(draft, sampler, BUDGET);
                if let Some(plan) = plan {
                    speculative = speculative.planned(plan);
                }
                assert_eq!(run(&mut speculative), plain, "{who}");
                stood += speculative.stats().tokens as usize - speculative.stats().forwards as usize;
            }
        }
    }
    stood
}

const MODELS: [&str; 3] = ["tiny-llama", "tiny-qwen3", "tiny-text"];

#[test]
fn naive_says_what_plain_decoding_says() {
    for name in MODELS {
        assert!(speculates(Naive, name, 24) > 0);
    }
}

#[test]
fn cpu_says_what_plain_decoding_says() {
    for name in MODELS {
        for cpu in cpus() {
            let stood = speculates(cpu, name, 90);
            assert!(stood > 30, "{name}: only {stood} drafted tokens stood");
        }
    }
}

#[test]
fn cuda_says_what_plain_decoding_says() {
    if let Some(gpu) = common::gpu() {
        speculates(gpu, "tiny-qwen3", 20);
    }
}

/// Tokens of each step.
fn steps<B: Backend>(m: &Arc<Model<B>>, mut speculative: Speculative<B>) -> Vec<usize> {
    let mut s = Session::new(m.clone(), 120, 3).unwrap();
    s.push(&[5, 9, 11, 5, 9]);
    let mut steps = Vec::new();
    while s.tokens().len() < s.capacity() {
        steps.push(speculative.step(&mut s).unwrap());
    }
    steps
}

#[test]
fn costs_are_measured_and_steps_are_reproducible() {
    let path = common::root().join("models/tiny-text");
    let cpu = cpus().last().unwrap();
    let m = Arc::new(Model::load(Arc::new(cpu), &Checkpoint::open(&path).unwrap(), |_, _| {}).unwrap());
    let mut s = Session::new(m.clone(), 100, 3).unwrap();
    s.push(&[5, 9, 11]);
    s.advance().unwrap();
    let token = s.sample(&Sampler::greedy()).unwrap();
    s.push(&[token]);
    let start = std::time::Instant::now();
    let mut cost = CostModel::measure(&mut s).unwrap();
    cost.measure_draft(&mut Lookup::default(), &s).unwrap();
    assert!(start.elapsed().as_secs_f64() < 2.0, "a tiny model in {:?}", start.elapsed());
    assert!(cost.pass.at(1) > 0.0 && cost.pass.at(64) > cost.pass.at(1) && cost.draft_fixed < 0.01);
    assert_eq!((s.tokens(), s.cache().len()), (&[5, 9, 11, token][..], 3));
    s.truncate(3);
    s.advance().unwrap();
    assert_eq!(s.sample(&Sampler::greedy()).unwrap(), token);
    let run = |plan| {
        let noise = Noise::new();
        let asked = noise.asked.clone();
        let mixed = Mixed::new(Box::new(Lookup::default()), Box::new(noise));
        let steps = steps(&m, Speculative::new(Box::new(mixed), Sampler::greedy(), BUDGET).planned(plan));
        (steps, asked.load(Ordering::Relaxed))
    };
    let first = run(Plan::reproducible(cost.clone()));
    assert_eq!(first, run(Plan::reproducible(cost.clone())));
    // A draft that costs more than it brings is asked once and then rarely; lookup goes on.
    let cost = CostModel { pass: Curve::new(&[(1, 1.0), (13, 1.2)]), draft_fixed: 1.0, ..CostModel::default() };
    let (steps, asked) = run(Plan::reproducible(cost));
    assert!(asked <= 2 && steps.iter().max() > Some(&2), "{asked}, {steps:?}");
}

/// Steps that it takes to say `text` behind its first `given` tokens, and tokens of the longest; then the text is over.
fn replayed(lookup: &mut Lookup, text: &[u32], given: usize) -> (usize, usize) {
    let (mut at, mut steps, mut longest) = (given, 0, 0);
    while at < text.len() {
        let tree = proposed(lookup, &text[..at], Budget::new(16, 16, 4));
        let (mut node, before) = (0, at);
        while let Some(child) =
            (1..tree.len()).find(|&i| tree.parents()[i] == node && text.get(at) == Some(&tree.tokens()[i]))
        {
            (node, at) = (child as u32, at + 1);
        }
        (at, steps, longest) = (at + 1, steps + 1, longest.max(at - before));
    }
    <Lookup as Draft<Naive>>::finish(lookup, text);
    (steps, longest)
}

#[test]
fn earlier_texts_are_remembered() {
    let mut rng = Rng::new(5);
    let memory = Arc::new(Memory::default());
    let texts: Vec<Vec<u32>> = (0..3).map(|_| (0..1500).map(|_| rng.below(5000) as u32).collect()).collect();
    let now = || Lookup::with_memory(memory.clone());
    for text in &texts {
        assert!(replayed(&mut now(), text, 40).0 > 1000, "noise that nobody has seen");
    }
    let held = memory.len();
    for text in &texts {
        let (steps, longest) = replayed(&mut now(), text, 40);
        assert!(steps < 120 && longest == 16, "{steps} steps, longest {longest}");
        // Without it nothing has been learnt.
        assert!(replayed(&mut Lookup::default(), text, 40).0 > 1000);
    }
    assert_eq!(memory.len(), held, "nothing was new");
    // One lookup that follows several texts, and a second turn.
    let mut one = now();
    let turns = [&texts[1][..], &texts[0][..700]].concat();
    assert!(replayed(&mut one, &turns, 1500).0 < 80 && memory.len() > held);
    assert!(replayed(&mut now(), &turns, 1490).0 < 80);
    memory.forget();
    assert!(replayed(&mut now(), &texts[0], 40).0 > 1000);
}

#[test]
fn the_same_texts_give_the_same_drafts_also_when_saved() {
    let text = |seed| (0..400).scan(Rng::new(seed), |r, _| Some(r.below(12) as u32)).collect::<Vec<u32>>();
    let taught = || {
        let memory = Arc::new(Memory::new(900));
        for seed in [1, 2, 3, 1] {
            replayed(&mut Lookup::with_memory(memory.clone()), &text(seed), 10);
        }
        memory
    };
    let (first, second) = (taught(), taught());
    assert_eq!(first.to_bytes(), second.to_bytes());
    let third = Arc::new(Memory::from_bytes(&first.to_bytes()).unwrap());
    let mut lookups = [first, second, third].map(Lookup::with_memory);
    let (text, mut drafted) = (text(3), 0);
    for n in (50..400).step_by(7) {
        let [a, b, c] = lookups.each_mut().map(|l| proposed(l, &text[..n], BUDGET));
        assert!(a == b && a == c, "{a:?}, {b:?}, {c:?}");
        drafted += a.len() - 1;
    }
    assert!(drafted > 100);
}

#[test]
fn two_threads_share_a_memory() {
    let memory = Arc::new(Memory::new(20_000));
    let text = |seed| (0..1300).scan(Rng::new(seed), |r, _| Some(r.below(4000) as u32)).collect::<Vec<u32>>();
    std::thread::scope(|s| {
        for thread in 0..2 {
            let memory = &memory;
            s.spawn(move || {
                for round in 0..20 {
                    // Each says what both say, in another order, and something of its own.
                    for seed in [(round + thread) % 2, 10 + thread] {
                        replayed(&mut Lookup::with_memory(memory.clone()), &text(seed), 20);
                    }
                    assert!(Memory::from_bytes(&memory.to_bytes()).is_ok());
                }
            });
        }
    });
    assert!(memory.len() <= 20_000);
    for seed in [0, 1, 10, 11] {
        assert!(replayed(&mut Lookup::with_memory(memory.clone()), &text(seed), 20).0 < 120);
    }
}

#[test]
fn generations_fill_the_memory_and_say_the_same() {
    let options = || EngineOptions::default().device(Device::Cpu).threads(2);
    let open = |name: &str| Engine::open_with(common::root().join("models").join(name), options()).unwrap();
    for name in ["tiny-llama", "tiny-text"] {
        let engine = open(name);
        let memory = Arc::new(Memory::default());
        let own = engine.draft(&DraftKind::Layers(vec![0])).unwrap();
        let draft = [engine.lookup_with(&memory).unwrap(), engine.with_memory(&own, &memory).unwrap()];
        for sampler in [Sampler::greedy(), Sampler { temperature: 0.8, ..Sampler::greedy() }] {
            let say = |how: Generate| {
                let mut s = engine.session(120, 3).unwrap();
                s.push_ids(&[5, 9, 11]).unwrap();
                let mut passes = 0;
                for turn in [&[7, 8][..], &[5]] {
                    s.push_ids(turn).unwrap();
                    let how = how.clone().max_tokens(40).ignore_eos(true);
                    assert_eq!(s.generate(how).unwrap().map(|p| p.unwrap().id.iter().count()).sum::<usize>(), 40);
                    passes += s.stats().forwards;
                }
                (s.tokens().to_vec(), passes)
            };
            let (plain, _) = say(Generate::default().sampler(sampler));
            for draft in &draft {
                let how = Generate::default().speculative(sampler, draft, Speculation::default().nodes(12));
                let (first, _) = say(how.clone());
                let held = memory.len();
                let (second, passes) = say(how);
                assert!(first == plain && second == plain, "{name}, {sampler:?}");
                assert!(passes < 20, "{name}, {sampler:?}: {passes} passes for a text that it knows");
                assert_eq!(memory.len(), held);
            }
        }
        assert!(memory.len() >= 80);
    }
    let memory = Memory::default();
    memory.add(&[3, 100_000]);
    let e = open("tiny-llama").lookup_with(&Arc::new(memory)).err().unwrap().to_string();
    assert!(e.contains("token 100000") && e.contains("384"), "{e}");
}
