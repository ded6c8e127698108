//! Rules that are special cases of one another, and what takes a version back.

use quadriga::online::Rule;
use quadriga::train::optim::Kind;

use super::toy::{class, follow, naive, plain};
use super::*;

const TARGETS: [f32; 8] = [1.0, 1.0, 0.5, -1.0, 2.0, 2.0, 0.0, 1.0];

#[track_caller]
fn near(a: &[f32], b: &[f32], bound: f32) {
    assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= bound), "{a:?}, not {b:?}");
}

#[test]
fn special_cases_are_plain_descent() {
    let sgd = follow(&plain("sgd"), &TARGETS);
    let mut w = 0.0;
    let by_hand: Vec<f32> = TARGETS
        .iter()
        .map(|c| {
            w -= 0.1 * (w - c);
            w
        })
        .collect();
    near(&sgd, &by_hand, 1e-6);
    // No momentum.
    let mut ball = plain("momentum");
    assert_ne!(follow(&ball, &TARGETS), sgd);
    ball.optimizer.momentum = 0.0;
    assert_eq!(follow(&ball, &TARGETS), sgd);
    // One expert, or equals.
    for epsilon in [0.1, 10.0, 80.0] {
        let meta = Rule::Hedge { epsilon };
        assert_eq!(follow(&Learning { meta, ..plain("sgd") }, &TARGETS), sgd);
        near(&follow(&Learning { meta, experts: vec![1.0; 3], ..plain("sgd") }, &TARGETS), &sgd, 1e-6);
        let other = follow(&Learning { meta, experts: vec![0.5, 1.0, 2.0], ..plain("sgd") }, &TARGETS);
        assert!(other.iter().zip(&sgd).any(|(a, b)| (a - b).abs() > 1e-3));
    }
}

#[test]
fn optimistic_descent_follows_its_trace() {
    // The specification's, 7.4.
    let steady = [1.0; 5];
    let trace = [0.2, 0.26, 0.328, 0.3884, 0.44352];
    let trusting = Learning { check_hints: false, ..plain("optimistic") };
    near(&follow(&trusting, &steady), &trace, 1e-6);
    // Hints that are right are trusted from the first, also where a gradient in between was none.
    near(&follow(&plain("optimistic"), &steady), &trace, 1e-6);
    let broken = [1.0, 1.0, f32::NAN, 1.0, 1.0, 1.0];
    assert_eq!(follow(&plain("optimistic"), &broken), follow(&trusting, &broken));
    near(&follow(&trusting, &broken)[3..], &trace[2..], 1e-6);
    // Hints that are wrong are not: plain descent from the anchor on.
    let turns: Vec<f32> = (0..12).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let (checked, sgd) = (follow(&plain("optimistic"), &turns), follow(&plain("sgd"), &turns));
    let off = |all: &[f32]| all.iter().zip(&sgd).skip(4).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off(&checked) < 0.03 && off(&follow(&trusting, &turns)) > 0.06, "{checked:?}, {sgd:?}");
}

/// A2 with hint 0 is A1, bit by bit.
#[test]
fn optimistic_descent_without_hints_is_plain_descent() {
    use quadriga::backend::Buffer;
    let world = World::new(cpu());
    let be = world.model.backend();
    let run = |kind: Kind| {
        let mut rng = Rng::new(5);
        let mut p = quadriga::model::Param::new(be, "w".into(), [4, 64], &[0.25; 256]).unwrap();
        p.train(be, true).unwrap();
        let settings = quadriga::train::Settings { kind, lr: 0.05, ..Default::default() };
        let mut optimizer = quadriga::train::Optimizer::new(be, settings, [&p].into_iter()).unwrap();
        for _ in 0..20 {
            let g: Vec<f32> = (0..256).map(|_| rng.normal()).collect();
            be.upload_acc(p.g.as_mut().unwrap().head_mut(256), &g).unwrap();
            optimizer.step(be, [&mut p].into_iter()).unwrap();
            optimizer.forget_hint(be, [&mut p].into_iter()).unwrap();
        }
        p.to_host(be).unwrap()
    };
    assert!(run(Kind::Optimistic) == run(Kind::Sgd) && run(Kind::OptimisticAdam) == run(Kind::AdamW));
}

/// Nothing to learn, nothing that is finite, or no learning rate: weights and states stay, bit by bit.
#[test]
fn nothing_changes_without_a_reason() {
    let (world, dir) = (naive(), tempfile::tempdir().unwrap());
    for rule in Learning::NAMES {
        let (class, script) = class(&world, &Learning { guard: (1, 1e9), ..plain(rule) }, 3);
        let saved = |name: &str| {
            let path = dir.path().join(name);
            class.with(|l| l.save(&path, None).unwrap());
            state::tensors(&path)
        };
        for _ in 0..3 {
            class.with(|l| l.update().unwrap());
            pulse(&world, &class, 2);
        }
        let (before, versions) = (saved("a"), class.published.lock().unwrap().len());
        script.lock().unwrap().rows = 0;
        class.with(|l| l.update().unwrap());
        *script.lock().unwrap() = toy::Script { rows: 1, target: f32::NAN, ..Default::default() };
        class.with(|l| l.update().unwrap());
        class.with(|l| l.update().unwrap());
        pulse(&world, &class, 2);
        let stats = class.with(|l| l.stats().clone());
        assert_eq!((stats.updates, stats.refused, stats.rows), (5, 2, 5), "{rule}");
        assert!(saved("b") == before && class.published.lock().unwrap().len() == versions, "{rule}");
        script.lock().unwrap().target = 1.0;
        class.with(|l| l.update().unwrap());
        pulse(&world, &class, 2);
        assert!(saved("c") != before, "{rule}");
    }
    let world = World::new(cpu());
    for kind in KINDS {
        let mut how = eager("sgd");
        how.optimizer.lr = f32::from_bits(1);
        let class = world.class(kind, &how);
        let path = dir.path().join("d");
        class.with(|l| l.save(&path, None).unwrap());
        let begun = state::tensors(&path);
        for n in 0..4 {
            world.say(&class, &text(n), true, &mut |_| {});
        }
        class.with(|l| l.save(&path, None).unwrap());
        let now = state::tensors(&path);
        assert!(class.with(|l| l.stats().updates) > 2, "{kind}");
        let weights = begun.iter().filter(|(name, _)| name.starts_with("expert"));
        assert!(weights.count() > 0 && begun.iter().all(|t| t.0.starts_with("fresh") || now.contains(t)), "{kind}");
    }
}

/// A version that is worse is taken back: weights, states and experts' weights as they were, half the learning rate.
#[test]
fn a_worse_version_is_taken_back() {
    let (world, dir) = (naive(), tempfile::tempdir().unwrap());
    for rule in Learning::NAMES {
        let (class, script) = class(&world, &plain(rule), 3);
        let saved = |name: &str| {
            let path = dir.path().join(name);
            class.with(|l| l.save(&path, None).unwrap());
            (state::tensors(&path), state::header(&path))
        };
        script.lock().unwrap().goal = 1.0;
        for _ in 0..4 {
            class.with(|l| l.update().unwrap());
            (0..32).for_each(|_| pulse(&world, &class, 3));
            script.lock().unwrap().goal = class.newest()[0];
        }
        let ((tensors, header), good) = (saved("a"), class.slot.newest().1);
        // Poison: far away, and longer runs nowhere near.
        script.lock().unwrap().target = 1e6;
        // More before it is found out: the version to go back to is still the good one.
        (0..30).for_each(|_| class.with(|l| l.update().unwrap()));
        assert!(!Arc::ptr_eq(&good, &class.slot.newest().1), "{rule}");
        let rounds = (1..=32).find(|_| {
            pulse(&world, &class, 1);
            class.with(|l| l.stats().rollbacks) > 0
        });
        assert_eq!(rounds, Some(8), "{rule}");
        assert!(Arc::ptr_eq(&good, &class.slot.newest().1), "{rule}");
        let (now, after) = saved("b");
        assert!(now == tensors, "{rule}: {now:?}, not {tensors:?}");
        assert_eq!((&after["meta"], &after["steps"]), (&header["meta"], &header["steps"]), "{rule}");
        let rates = |h: &serde_json::Value| -> Vec<f64> {
            h["rates"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect()
        };
        assert_eq!(rates(&after), rates(&header).iter().map(|r| r / 2.0).collect::<Vec<_>>(), "{rule}");
        // It goes on as one that begins with the file does.
        let (other, again) = self::class(&world, &plain(rule), 3);
        other.with(|l| l.restore(&dir.path().join("b"), &mut |_| Ok(())).unwrap());
        for s in [&script, &again] {
            s.lock().unwrap().target = 0.5;
        }
        for c in [&class, &other] {
            c.with(|l| l.update().unwrap());
        }
        // Hints are of other weights.
        let hinted = rule.starts_with("optimistic");
        if !hinted {
            // The file is f32, the specification's numbers are f64.
            near(&class.newest(), &other.newest(), 2e-7);
        }
    }
}
