//! What is learnt from is what a fresh pass of the target says about the same text.

use half::bf16;
use quadriga::backend::naive::Naive;
use quadriga::speculative::adapt::{Episode, Spend};
use quadriga::speculative::train::{Sequence, extent};

use super::*;

/// All that the target says about a text, read token by token: residual streams of each tap, and probabilities behind each position.
fn afresh<B: Train>(world: &World<B>, taps: &[usize], text: &[u32]) -> (Vec<Vec<bf16>>, Vec<Vec<f64>>) {
    let (mut s, mut all) = (world.session(taps, &[], 0), Vec::new());
    for &t in text {
        s.push(&[t]);
        s.advance().unwrap();
        let logits: Vec<f64> = s.logits().unwrap().iter().map(|&x| f64::from(x)).collect();
        let most = logits.iter().fold(f64::MIN, |m, x| m.max(*x));
        let sum: f64 = logits.iter().map(|x| (x - most).exp()).sum();
        all.push(logits.iter().map(|x| (x - most).exp() / sum).collect());
    }
    let features = (0..taps.len()).map(|tap| {
        let mut x = vec![0.0; text.len() * world.model.config().hidden];
        world.model.backend().download_acc(s.features(tap), &mut x).unwrap();
        x.into_iter().map(bf16::from_f32).collect()
    });
    (features.collect(), all)
}

/// `s` is what `text` teaches from position `from` on, behind `context` tokens.
#[track_caller]
fn check(
    s: &Sequence,
    from: usize,
    context: usize,
    text: &[u32],
    d: usize,
    (features, p): &(Vec<Vec<bf16>>, Vec<Vec<f64>>),
) {
    let [rows, slots] = extent(s.prompt, s.tokens.len()).unwrap();
    let start = from.saturating_sub(context);
    assert_eq!(s.prompt, from - start);
    assert_eq!(s.tokens, text[start..start + s.tokens.len()]);
    let want: Vec<bf16> = features.iter().flat_map(|f| &f[start * d..][..rows * d]).copied().collect();
    assert!(s.features == want, "features of position {from}");
    let k = s.teacher.k;
    assert_eq!((s.teacher.ids.len(), s.teacher.p.len()), (slots * k, slots * k));
    for (i, (ids, found)) in s.teacher.ids.chunks(k).zip(s.teacher.p.chunks(k)).enumerate() {
        let p = &p[from + i];
        let mut sorted = p.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for (j, (&id, &q)) in ids.iter().zip(found).enumerate() {
            let (own, best) = (p[id as usize], sorted[j]);
            let near = (f64::from(q) - own).abs() < 1e-4 && (own - best).abs() < 1e-4;
            assert!(near, "position {}: {q} for token {id}, not {own}, nor {best}", from + i);
        }
    }
}

/// Two turns of a text: with updates in between, or each cut where no pass ended.
fn feedback_is_what_the_target_says<B: Train>(world: &World<B>, context: usize, tokens: usize, cut: bool) {
    let rows = if cut { 1 << 20 } else { 16 };
    let how = Learning { rows, context, guard: (1, 1e9), ..toy::plain("sgd") };
    let drafts = world.class("eagle3", &eager("sgd"));
    let (mut rejected, mut branches) = (0, 0);
    for n in 0..4 {
        let (class, script) = toy::class(world, &how, 1);
        let Text { prompt, sampler, seed, .. } = text(n);
        let (taps, decoder) = world.decoder(&drafts, sampler, Budget::new(11, 4, 3));
        let mut decoder = decoder.taught(Box::new(class.ear(&world.model)));
        let (mut s, mut turns) = (world.session(&taps, &prompt, seed), Vec::new());
        for _ in 0..2 {
            let from = s.tokens().len();
            while s.tokens().len() < from + tokens {
                decoder.step(&mut s).unwrap();
            }
            if cut {
                s.truncate(from + tokens);
            }
            decoder.finish(&s);
            // The last token has nothing behind it.
            turns.push((from, s.tokens().len() - 1));
            s.push(&[9, 8, 7, 6]);
        }
        let stats = decoder.stats();
        rejected += stats.drafted + stats.verifications - stats.verified;
        branches += u64::from(stats.drafted > 4 * stats.verifications);
        class.with(|l| l.update().unwrap());
        let all = afresh(world, &taps, s.tokens());
        let seen = std::mem::take(&mut script.lock().unwrap().seen);
        let (mut from, mut end) = turns[0];
        for q in &seen {
            if from == end {
                (from, end) = turns[1];
            }
            check(q, from, context, s.tokens(), world.model.config().hidden, &all);
            from += q.tokens.len() - q.prompt - 1;
        }
        assert_eq!((from, end), (turns[1].1, turns[1].1), "all rows of both turns");
        assert!(if cut { seen.len() == 2 } else { seen.len() > 3 }, "{} sequences", seen.len());
    }
    assert!(rejected > 20 && branches > 2, "{rejected} nodes rejected");
}

#[test]
fn naive_feedback_is_what_the_target_says() {
    [false, true].into_iter().for_each(|cut| feedback_is_what_the_target_says(&World::new(Naive), 4, 30, cut));
}

#[test]
fn cpu_feedback_is_what_the_target_says() {
    for context in [1, 7, 96] {
        [false, true]
            .into_iter()
            .for_each(|cut| feedback_is_what_the_target_says(&World::new(cpu()), context, 45, cut));
    }
}

#[test]
fn rows_that_are_no_distribution_are_left_out() {
    let (half, nan) = (0.5f32.ln(), f32::NAN);
    let mut e = Episode::new(2);
    e.push(5, &[1, 2, 3, 4], &[half, half, half, half]);
    assert_eq!(e.len(), 2);
    for bad in [[half, nan], [nan, nan], [f32::INFINITY, half], [f32::NEG_INFINITY; 2], [0.0, half]] {
        let mut e = e.clone();
        e.push(7, &[1, 2, 3, 4], &[bad[0], bad[1], half, half]);
        // What comes behind the hole, alone.
        assert_eq!(e.len(), 1, "{bad:?}");
        let mut clean = Episode::new(2);
        clean.push(8, &[3, 4], &[half, half]);
        assert_eq!(e, clean, "{bad:?}");
    }
    e.push(9, &[1, 2], &[half, half]);
    assert_eq!(e.len(), 1);
}

/// A text that goes on while no update is due is learnt in parts that fit.
#[test]
fn long_texts_are_learnt_in_parts() {
    let world = World::new(cpu());
    for kind in KINDS {
        let class = world.class(kind, &Learning { guard: (10_000, 1e9), ..eager("adam") });
        world.say(&class, &Text { tokens: 140, ..text(2) }, true, &mut |_| {});
        let stats = class.with(|l| l.stats().clone());
        assert_eq!(stats.updates, 1, "{kind}");
        class.with(|l| l.update().unwrap());
        let more = class.with(|l| l.stats().rows) - stats.rows;
        assert!(more > 60, "{kind}: {more}");
    }
}

#[test]
fn a_text_is_heard_whole_though_time_runs_out() {
    let world = World::new(cpu());
    // Reading the first row already takes more time than there is.
    let how = Learning { spending: Some(Spend { floor: 0.0, most: 0.0 }), ..eager("adam") };
    let class = world.class("eagle3", &how);
    world.say(&class, &Text { tokens: 40, ..text(2) }, true, &mut |_| {});
    assert_eq!(class.with(|l| l.stats().updates), 0);
    class.with(|l| l.update().unwrap());
    let rows = class.with(|l| l.stats().rows);
    assert!(rows > 30, "{rows}");
}
