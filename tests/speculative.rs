//! Speculation end to end: with every draft that is no head, in batches, with penalties, through the engine, a session says what plain
//! decoding says.

mod common;

use std::sync::Arc;

use common::cpus;
use quadriga::backend::Backend;
use quadriga::backend::naive::Naive;
use quadriga::decode::{Autoregressive, Decoder, Sampler, Session};
use quadriga::engine::{Device, DraftKind, Engine, EngineOptions, Generate, Speculation};
use quadriga::format::Checkpoint;
use quadriga::model::Model;
use quadriga::speculative::{Budget, Draft, Lookup, Mixed, SmallModel, Speculative, SpeculativeBatch};

const PROMPTS: [&[u32]; 3] = [&[17, 4, 99], &[5, 6, 7, 5, 6, 7, 5], &[200, 3, 44, 9, 200, 3]];
const TOKENS: usize = 24;

fn samplers() -> [Sampler; 3] {
    let warm = Sampler { temperature: 0.9, top_k: 20, top_p: 0.95, min_p: 0.01, ..Sampler::greedy() };
    [Sampler::greedy(), warm, Sampler { repeat_penalty: 1.3, ..warm }]
}

/// What `decoder` says behind a prompt: at least [`TOKENS`] tokens.
fn says<B: Backend>(model: &Arc<Model<B>>, prompt: &[u32], seed: u64, decoder: &mut dyn Decoder<B>) -> Vec<u32> {
    let mut s = Session::new(model.clone(), 64, seed).unwrap();
    s.push(prompt);
    while s.tokens().len() < prompt.len() + TOKENS {
        decoder.step(&mut s).unwrap();
    }
    s.tokens()[..prompt.len() + TOKENS].to_vec()
}

fn drafts<B: Backend>(model: &Arc<Model<B>>) -> Vec<Box<dyn Draft<B>>> {
    let own = || Box::new(SmallModel::new(model.clone()));
    let part = || Box::new(SmallModel::new(Arc::new(model.of_layers(&[0]).unwrap())));
    vec![Box::new(Lookup::default()), own(), part(), Box::new(Mixed::new(Box::new(Lookup::default()), part()))]
}

fn speculation_says_what_plain_decoding_says<B: Backend>(be: impl Fn() -> B, name: &str) {
    let checkpoint = Checkpoint::open(&common::root().join("models").join(name)).unwrap();
    let model = Arc::new(Model::load(Arc::new(be()), &checkpoint, |_, _| {}).unwrap());
    for (i, prompt) in PROMPTS.into_iter().enumerate() {
        for sampler in samplers() {
            let plain = says(&model, prompt, i as u64, &mut Autoregressive::new(sampler));
            for budget in [Budget::new(4, 4, 1), Budget::new(11, 4, 3)] {
                for draft in drafts(&model) {
                    let what = format!("{name}, {} {budget:?}, {sampler:?}", draft.name());
                    let mut decoder = Speculative::new(draft, sampler, budget);
                    assert_eq!(says(&model, prompt, i as u64, &mut decoder), plain, "{what}");
                }
            }
        }
    }
    // The target itself is always right: every node of a chain stands.
    let own: Box<dyn Draft<B>> = Box::new(SmallModel::new(model.clone()));
    let mut decoder = Speculative::new(own, Sampler::greedy(), Budget::new(5, 5, 1));
    says(&model, PROMPTS[0], 0, &mut decoder);
    let stats = decoder.stats();
    assert_eq!(stats.verified, 6 * stats.verifications, "{name}");
}

fn a_batch_says_what_each_says_alone<B: Backend>(be: B, name: &str) {
    let checkpoint = Checkpoint::open(&common::root().join("models").join(name)).unwrap();
    let model = Arc::new(Model::load(Arc::new(be), &checkpoint, |_, _| {}).unwrap());
    let (mut sessions, mut decoders, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for (i, (prompt, sampler)) in PROMPTS.into_iter().zip(samplers()).enumerate() {
        plain.push(says(&model, prompt, i as u64, &mut Autoregressive::new(sampler)));
        let mut s = Session::new(model.clone(), 64, i as u64).unwrap();
        s.push(prompt);
        sessions.push(s);
        let draft = drafts(&model).swap_remove(i);
        decoders.push(Speculative::new(draft, sampler, Budget::new(5, 3, 2)));
    }
    let mut batch = SpeculativeBatch::new(model, 3, 16, &[]).unwrap();
    let mut together = 0;
    // The second session comes later, and each leaves when it has said enough.
    for step in 0.. {
        let mut now: Vec<_> = sessions
            .iter_mut()
            .zip(&mut decoders)
            .enumerate()
            .filter(|(i, (s, _))| (*i != 1 || step > 2) && s.tokens().len() < PROMPTS[*i].len() + TOKENS)
            .map(|(_, both)| both)
            .collect();
        if now.is_empty() {
            break;
        }
        together += usize::from(now.len() > 1);
        // Who reads a prompt may get nothing yet.
        assert!(batch.step(&mut now).unwrap().into_iter().sum::<usize>() > 0);
    }
    assert!(together > 3);
    for ((s, plain), prompt) in sessions.iter().zip(&plain).zip(PROMPTS) {
        assert_eq!(&s.tokens()[..prompt.len() + TOKENS], plain);
    }
}

#[test]
fn naive() {
    speculation_says_what_plain_decoding_says(|| Naive, "tiny-llama");
    a_batch_says_what_each_says_alone(Naive, "tiny-llama");
}

#[test]
fn cpu_tiers() {
    for name in ["tiny-llama", "tiny-gemma3", "tiny-mistral"] {
        for cpu in cpus() {
            let tier = cpu.tier();
            speculation_says_what_plain_decoding_says(
                || quadriga::backend::cpu::Cpu::with(2, tier, quadriga::backend::cpu::Compute::Fast),
                name,
            );
            a_batch_says_what_each_says_alone(cpu, name);
        }
    }
}

#[test]
fn cuda() {
    if common::gpu().is_some() {
        a_batch_says_what_each_says_alone(common::gpu().unwrap(), "tiny-llama");
    }
}

#[test]
fn through_the_engine() {
    let models = common::root().join("models");
    let options = || EngineOptions::default().device(Device::Cpu).threads(2);
    let engine = Engine::open_with(models.join("tiny-llama"), options()).unwrap();
    let say = |how: Generate, draft: Option<&quadriga::engine::Draft>| {
        let mut s = match draft {
            Some(draft) => engine.session_for(draft, 80, 3).unwrap(),
            None => engine.session(80, 3).unwrap(),
        };
        s.push_ids(PROMPTS[1]).unwrap();
        let ids: Vec<u32> =
            s.generate(how.max_tokens(TOKENS).ignore_eos(true)).unwrap().flat_map(|p| p.unwrap().id).collect();
        (ids, s.stats())
    };
    let sampler = samplers()[1];
    let (plain, _) = say(Generate::default().sampler(sampler), None);
    let head = |name: &str| DraftKind::at(&models.join("tiny-drafts").join(name));
    let kinds = [
        DraftKind::Lookup,
        DraftKind::at(&models.join("tiny-llama")),
        DraftKind::Layers(vec![1]),
        head("eagle3"),
        head("hydra"),
    ];
    for kind in kinds {
        let draft = engine.draft(&kind).unwrap();
        for draft in [engine.with_lookup(&draft).unwrap(), draft.clone()] {
            for how in [Speculation::default(), Speculation::default().nodes(6).width(2).depth(3)] {
                let (ids, stats) = say(Generate::default().speculative(sampler, &draft, how), Some(&draft));
                assert_eq!(ids, plain, "{kind:?}");
                // What is beyond the end is not counted.
                assert_eq!(stats.tokens as usize, TOKENS);
                assert!(stats.accept_length() >= 1.0 && stats.verified <= stats.tokens);
            }
        }
        let costs = draft.costs_json().unwrap();
        assert!(engine.draft(&kind).unwrap().set_costs(&costs).is_ok());
    }
    let refused = |path: &str| engine.draft(&DraftKind::at(&models.join(path))).err().unwrap().to_string();
    assert!(refused("tiny-mistral").contains("320 tokens, the target one of 384"), "{}", refused("tiny-mistral"));
    let draft = engine.draft(&head("eagle3")).unwrap();
    let mut plain = engine.session(80, 3).unwrap();
    let untapped = plain.generate(Generate::default().speculative(sampler, &draft, Speculation::default()));
    assert!(untapped.err().unwrap().to_string().contains("session_for"));
}
