//! Texts are what they are without learning.

use quadriga::backend::naive::Naive;
use quadriga::speculative::SpeculativeBatch;

use super::*;

fn texts_stay<B: Train>(world: &World<B>, kind: &str, rule: &str, prompts: std::ops::Range<u64>, swaps: bool) {
    let class = world.class(kind, &eager(rule));
    let mut swapped = 0;
    for n in prompts {
        let text = text(n);
        let plain = world.plain(&text.prompt, text.sampler, text.seed, text.tokens);
        let mut swap = |step: usize| swapped += usize::from(swaps && step % 3 == 2 && class.swap(n + step as u64));
        let (said, _) = world.say(&class, &text, true, &mut swap);
        assert_eq!(said, plain, "{kind}, {rule}, text {n}");
        // Learnt weights, without learning.
        assert_eq!(world.say(&class, &text, false, &mut |_| {}).0, plain, "{kind}, {rule}, text {n}");
    }
    let stats = class.with(|l| l.stats().clone());
    let versions = class.published.lock().unwrap().len();
    assert!(stats.updates >= 2 && stats.refused == 0 && versions as u64 == stats.updates, "{kind}, {rule}: {stats:?}");
    assert!(swapped > 10 || !swaps, "{kind}, {rule}: {swapped}");
}

#[test]
fn cpu_texts_stay_with_every_rule() {
    let world = World::new(cpu());
    for kind in KINDS {
        for (i, rule) in Learning::NAMES.into_iter().enumerate() {
            texts_stay(&world, kind, rule, 0..if i < 2 { 20 } else { 8 }, false);
        }
    }
}

#[test]
fn cpu_texts_stay_while_versions_are_exchanged() {
    let world = World::new(cpu());
    KINDS.into_iter().for_each(|kind| texts_stay(&world, kind, "ensemble", 20..32, true));
}

#[test]
fn naive_texts_stay() {
    let world = World::new(Naive);
    for (kind, rule) in KINDS.into_iter().zip(["optimistic", "ensemble", "adam", "sgd"]) {
        texts_stay(&world, kind, rule, 0..4, false);
    }
}

#[test]
#[ignore = "long: cargo test --test adapt -- --ignored"]
fn naive_texts_stay_over_many() {
    let world = World::new(Naive);
    KINDS.into_iter().for_each(|kind| texts_stay(&world, kind, "auto", 100..300, true));
}

#[test]
fn cuda_texts_stay() {
    if let Some(gpu) = common::gpu() {
        let world = World::new(gpu);
        texts_stay(&world, "hydra", "adam", 0..3, false);
    }
}

fn batches_stay<B: Train>(world: &World<B>, kind: &str) {
    let class = world.class(kind, &eager("adam"));
    let mut sampled = 0;
    for first in [40, 43, 46] {
        let texts: Vec<Text> = (first..first + 3).map(text).collect();
        let (mut sessions, mut decoders, mut taps) = (Vec::new(), Vec::new(), Vec::new());
        for t in &texts {
            let (reads, decoder) = world.decoder(&class, t.sampler, t.budget);
            sessions.push(world.session(&reads, &t.prompt, t.seed));
            decoders.push(decoder.taught(Box::new(class.ear(&world.model))));
            sampled += usize::from(t.sampler.temperature > 0.0);
            taps = reads;
        }
        let mut batch = SpeculativeBatch::new(world.model.clone(), 3, 30, &taps).unwrap();
        loop {
            let left = |(i, (s, _)): &(usize, (&mut Session<B>, &mut Speculative<B>))| {
                s.tokens().len() < texts[*i].prompt.len() + texts[*i].tokens
            };
            let mut now: Vec<_> =
                sessions.iter_mut().zip(&mut decoders).enumerate().filter(left).map(|(_, both)| both).collect();
            if now.is_empty() {
                break;
            }
            batch.step(&mut now).unwrap();
        }
        for ((s, d), t) in sessions.iter_mut().zip(&mut decoders).zip(&texts) {
            s.truncate(t.prompt.len() + t.tokens);
            d.finish(s);
            let plain = world.plain(&t.prompt, t.sampler, t.seed, t.tokens);
            assert_eq!(s.tokens()[t.prompt.len()..], plain, "{kind}");
        }
    }
    assert!(sampled > 3 && class.with(|l| l.stats().updates) > 5, "{kind}");
}

#[test]
fn batches_of_texts_stay() {
    let world = World::new(cpu());
    KINDS.into_iter().for_each(|kind| batches_stay(&world, kind));
}

/// Two texts at once learn by one learner; one of them dies in an update, with the learner in its hands.
#[test]
fn threads_share_a_learner_and_outlive_a_panic() {
    let world = World::new(cpu());
    let class = world.class("hydra", &eager("adam"));
    let run = |from: u64| {
        for n in from..from + 8 {
            let text = text(n);
            let plain = world.plain(&text.prompt, text.sampler, text.seed, text.tokens);
            assert_eq!(world.say(&class, &text, true, &mut |_| {}).0, plain, "text {n}");
        }
    };
    std::thread::scope(|scope| [60, 80].map(|from| scope.spawn(move || run(from))).map(|t| t.join().unwrap()));
    let before = class.with(|l| l.stats().updates);
    class.panics.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let mut ended = [60, 80].map(|from| scope.spawn(move || run(from))).map(|t| t.join().is_ok());
        ended.sort();
        assert_eq!(ended, [false, true]);
    });
    run(60);
    assert!(class.learner.is_poisoned() && class.with(|l| l.stats().updates) > before + 8);
}
