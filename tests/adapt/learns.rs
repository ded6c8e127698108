//! Drafts get better at what they serve.

use super::*;

fn chain(n: u64) -> Text {
    Text { sampler: Sampler::greedy(), budget: Budget::new(4, 4, 1), tokens: 40, ..text(n) }
}

/// Mean tokens a pass over `rounds` rounds of `texts`, learning.
fn mean<B: Train>(world: &World<B>, class: &Class<B>, texts: &[u64], rounds: usize, learn: bool) -> f64 {
    let all = (0..rounds).flat_map(|_| texts);
    let sum: f64 = all.map(|&n| world.say(class, &chain(n), learn, &mut |_| {}).1).sum();
    sum / (rounds * texts.len()) as f64
}

fn better(rule: &str, lr: f32) -> Learning {
    let mut how = Learning { context: 48, replay: 0.0, ..eager(rule) };
    how.optimizer.lr = lr;
    how
}

/// One prompt again and again.
#[test]
fn one_text_is_learnt_by_heart() {
    let world = World::new(cpu());
    for (kind, rule) in KINDS.into_iter().zip(["ensemble", "adam", "optimistic-adam", "adam"]) {
        let class = world.class(kind, &better(rule, 0.01));
        let before = mean(&world, &class, &[1], 1, false);
        mean(&world, &class, &[1], 1, true);
        let first = class.with(|l| l.stats().clone());
        mean(&world, &class, &[1], 24, true);
        let middle = class.with(|l| l.stats().clone());
        mean(&world, &class, &[1], 2, true);
        let last = class.with(|l| l.stats().clone());
        let after = mean(&world, &class, &[1], 1, false);
        let loss = |to: &quadriga::speculative::adapt::LearnStats, loss: f64, rows: u64| {
            (to.loss - loss) / (to.rows - rows) as f64
        };
        let (begun, ended) = (loss(&first, 0.0, 0), loss(&last, middle.loss, middle.rows));
        println!("{kind}: {before:.2} to {after:.2} tokens a pass, loss {begun:.3} to {ended:.3}");
        assert!(after > before + 0.8, "{kind}: {before} to {after}");
        assert!(ended < begun - 0.1, "{kind}: loss {begun} to {ended}");
    }
}

/// Some texts, then others: with learning both parts go better than without, and hardly anything is taken back.
#[test]
fn a_stream_that_changes_is_followed() {
    let world = World::new(cpu());
    let (x, y) = ([3, 5], [11, 13]);
    let fixed = world.class("hydra", &better("adam", 0.01));
    for rule in ["optimistic-adam", "ensemble"] {
        let class = world.class("hydra", &Learning { guard: (8, 1.5), ..better(rule, 0.01) });
        for texts in [x, y] {
            let without = mean(&world, &fixed, &texts, 1, false);
            mean(&world, &class, &texts, 8, true);
            let with = mean(&world, &class, &texts, 1, false);
            println!("{rule}: {without:.2} without, {with:.2} with learning");
            assert!(with > without + 0.4, "{rule}: {with}, without learning {without}");
        }
        let stats = class.with(|l| l.stats().clone());
        assert!(stats.rollbacks < 1 + stats.updates / 10, "{rule}: {stats:?}");
    }
}
