//! What holds for every decoder (spec 8.1), on scripted models and random scripts.

use quadriga::diffusion::{Cache, Choose, Rank, Schedule, Settings};
use quadriga::rng::Rng;

use super::script::*;

/// Random tokens, a few of them ends, and entropies of which some lie on either side of 1/2.
fn random(seed: u64, n: usize, ends: bool) -> Vec<(u32, f64)> {
    let mut rng = Rng::new(seed);
    let token = |rng: &mut Rng| if ends && rng.below(12) == 0 { EOS } else { 3 + rng.below(20) as u32 };
    (0..n).map(|_| (token(&mut rng), 0.69 * f64::from(rng.uniform()))).collect()
}

/// Ranks by a decoder written down as plainly as can be: one block after another, all below the threshold and at least the best.
fn plain(script: &[(u32, f64)], block: usize, at: f64, inclusive: bool) -> Vec<u32> {
    let (mut ranks, mut pass) = (vec![u32::MAX; script.len()], 0);
    for start in (0..script.len()).step_by(block) {
        let end = script.len().min(start + block);
        while let Some(best) =
            (start..end).filter(|&i| ranks[i] == u32::MAX).min_by(|&a, &b| script[a].1.total_cmp(&script[b].1))
        {
            for i in start..end {
                let below = if inclusive { script[i].1 <= at } else { script[i].1 < at };
                if ranks[i] == u32::MAX && (i == best || below) {
                    ranks[i] = pass;
                }
            }
            pass += 1;
        }
    }
    ranks
}

/// I1, I3, I4: one block after another is the plain decoder; with one block, the whole text's.
#[test]
fn sequential_blocks_are_the_plain_decoder() {
    for seed in 0..40 {
        let n = 1 + seed as usize * 3 % 70;
        let script = random(seed, n, false);
        for block in [1, 5, 32, n] {
            for at in [-1.0f32, 0.2, 0.5, 99.0] {
                for best in [false, true] {
                    let s = Settings { block, add: 100, activate: 100, ..threshold(settings(best), at) };
                    let own = script.clone();
                    let text = run(s, !best, n, &mut Scripted::new(move |i| own[i]), |_, _| {});
                    let expected = plain(&script, block, f64::from(at), best);
                    assert_eq!(text.ranks(), expected, "seed {seed}, block {block}, at {at}, best {best}");
                    if at < 0.0 {
                        assert_eq!(text.counts().passes, n as u64);
                    }
                    if at > 9.0 {
                        assert_eq!(text.counts().passes, n.div_ceil(block) as u64);
                    }
                }
            }
        }
    }
}

/// A threshold on confidence that all or nothing passes, and quotas, by their plain definitions.
#[test]
fn vanilla_takes_its_quota_by_confidence() {
    for seed in 0..20 {
        let script = random(seed, 48, false);
        let own = script.clone();
        let s = Settings { early_stop: false, ..Settings::vanilla(16, 48) };
        let one = run(s, false, 48, &mut Scripted::new(move |i| own[i]), |_, c| assert_eq!(c.len(), 1));
        assert_eq!(one.ranks(), plain(&script, 16, -1.0, false));
        // 20 passes in 3 blocks of 16: 6, 7 and 7 a block, the rest of the division first.
        let (own, mut sizes) = (script.clone(), Vec::new());
        let choose = Choose::Quota { steps: 20, by: Rank::Confidence };
        run(Settings { choose, ..s }, false, 48, &mut Scripted::new(move |i| own[i]), |_, c| sizes.push(c.len()));
        assert_eq!(sizes, [3, 3, 3, 3, 2, 2, 3, 3, 2, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, 2]);
    }
}

/// Dream's timetable over the whole text: 256 tokens in 64 steps.
#[test]
fn a_timetable_follows_its_times() {
    let (n, steps) = (256usize, 64usize);
    let script = random(3, n, false);
    let mut left = n;
    let times: Vec<f64> = (0..=steps).map(|k| 1.0 + (1e-3 - 1.0) * k as f64 / steps as f64).collect();
    let expected: Vec<usize> = (0..steps)
        .map(|k| {
            let take = if k + 1 == steps { left } else { (left as f64 * (1.0 - times[k + 1] / times[k])) as usize };
            left -= take;
            take
        })
        .filter(|&take| take > 0)
        .collect();
    for by in [Rank::Confidence, Rank::Margin, Rank::Entropy] {
        let (own, mut sizes) = (script.clone(), Vec::new());
        let s = Settings {
            block: n,
            choose: Choose::Timetable { steps, by },
            early_stop: false,
            ..Settings::vanilla(n, n)
        };
        let text = run(s, true, n, &mut Scripted::new(move |i| own[i]), |_, c| sizes.push(c.len()));
        assert_eq!(sizes, expected);
        // All three orders are those of entropy where there are two outcomes.
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| script[a].1.total_cmp(&script[b].1));
        let ranks: Vec<u32> = order.iter().map(|&i| text.ranks()[i]).collect();
        assert!(ranks.is_sorted());
    }
    let own = script.clone();
    let s = Settings {
        choose: Choose::Timetable { steps, by: Rank::Random },
        early_stop: false,
        ..Settings::vanilla(n, n)
    };
    let s = Settings { block: n, ..s };
    let text = run(s, true, n, &mut Scripted::new(move |i| own[i]), |_, _| {});
    assert!(text.counts().passes <= steps as u64 && text.counts().passes > 48);
}

/// As many steps as tokens: Dream's first pass takes nothing, since 256 (1 - t\[1\]) is just below 1. Published, it runs all the same.
#[test]
fn a_pass_that_takes_nothing_is_left_out() {
    let n = 256;
    let count = |authors| {
        let script = random(8, n, false);
        let choose = Choose::Timetable { steps: n, by: Rank::Entropy };
        let s = Settings { block: n, choose, early_stop: false, authors, ..Settings::vanilla(n, n) };
        let (mut taken, mut empty) = (0, 0);
        let text = run(s, false, n, &mut Scripted::new(move |i| script[i]), |_, c| {
            taken += c.len();
            empty += u64::from(c.is_empty());
        });
        assert_eq!(taken, n);
        (text.counts().passes, empty)
    };
    let (published, empty) = count(true);
    assert!(published == 256 && empty > 0);
    assert_eq!(count(false), (256 - empty, 0));
}

fn every_setting(seed: u64) -> Vec<Settings> {
    let mut rng = Rng::new(1000 + seed);
    let mut all = Vec::new();
    for best in [false, true] {
        for early_stop in [false, true] {
            for cache in [
                Cache::None,
                Cache::Delayed { delay: 0, refresh: None },
                Cache::Delayed { delay: 1, refresh: Some(3) },
                Cache::Delayed { delay: 2, refresh: Some(1) },
            ] {
                let (add, activate) = [(10, 95), (100, 100), (0, 0), (50, 50)][rng.below(4)];
                let at = [0.1, 0.3, 0.5][rng.below(3)];
                let block = [1, 4, 7, 32][rng.below(4)];
                all.push(Settings { block, early_stop, cache, add, activate, ..threshold(settings(best), at) });
            }
        }
    }
    all
}

/// I10, I11, I13 to I15, of every pass.
#[test]
fn every_pass_keeps_the_rules() {
    for seed in 0..60 {
        let n = 1 + seed as usize * 7 % 61;
        for s in every_setting(seed) {
            let script = random(seed, n, seed % 2 == 1);
            let (own, mut before): (_, Option<Vec<u32>>) = (script.clone(), None);
            let mut model = Scripted::new(move |i| own[i]);
            let text = run(s, seed % 3 == 0, n, &mut model, |text, commits| {
                let now = text.tokens();
                assert!(!commits.is_empty(), "every pass says something: {s:?}");
                assert!(commits.iter().all(|c| c.token != MASK));
                if let Some(before) = &before {
                    let end = now[PROMPT..].iter().position(|&t| t == EOS).map_or(now.len(), |e| e + PROMPT);
                    let kept = (0..end).all(|i| before[i] == MASK || before[i] == now[i]);
                    assert!(kept || s.early_stop, "what was said stays");
                    let masks = |x: &[u32]| x.iter().filter(|&&t| t == MASK).count();
                    assert!(masks(now) < masks(before));
                }
                before = Some(now.to_vec());
            });
            let done = text.tokens();
            assert!(!done.contains(&MASK), "{s:?}");
            assert_eq!(text.counts().passes, model.passes.len() as u64);
            if s.early_stop {
                let e = done[PROMPT..].iter().position(|&t| t == EOS);
                assert!(e.is_none_or(|e| done[PROMPT + e..].iter().all(|&t| t == EOS)));
            }
            // The cache ends where blocks end (a row earlier in shifted models), and only grows.
            let mut ends: Vec<usize> = model.passes.iter().map(|p| p.2 + p.3).filter(|&k| k > 0).collect();
            assert!(ends.is_sorted(), "{ends:?}");
            ends.dedup();
            let shift = usize::from(seed % 3 == 0);
            assert!(ends.iter().all(|k| k + shift == PROMPT
                || (k + shift - PROMPT).is_multiple_of(s.block)
                || k + shift == PROMPT + n));
            // At most one block begins each pass: no rank before its block can have begun.
            for (i, &r) in text.ranks().iter().enumerate().filter(|(_, r)| **r != u32::MAX) {
                assert!(r as usize + 1 >= i / s.block, "position {i} in pass {r}: {s:?}");
            }
        }
    }
}

/// I5 and, as the script does not look at the text, every cache: they change what is computed, never what is said.
#[test]
fn caches_change_no_schedule() {
    for seed in 0..30 {
        let n = 64;
        let script = random(seed, n, true);
        let say = |s: Settings, shift: bool| {
            let own = script.clone();
            let text = run(s, shift, n, &mut Scripted::new(move |i| own[i]), |_, _| {});
            (text.tokens().to_vec(), text.ranks().to_vec(), text.counts().passes)
        };
        for shift in [false, true] {
            for (add, activate) in [(10, 95), (100, 100)] {
                let s = Settings { block: 16, add, activate, early_stop: seed % 2 == 0, ..settings(!shift) };
                let without = say(s, shift);
                for delay in [0, 1, 2, 5, u64::MAX] {
                    for refresh in [None, Some(1), Some(4)] {
                        let cache = Cache::Delayed { delay, refresh };
                        assert_eq!(say(Settings { cache, ..s }, shift), without, "{cache:?}");
                    }
                }
                assert_eq!(say(Settings { look_ahead: Some(0), ..s }, shift), without);
                if add == 100 {
                    assert_eq!(say(Settings { cache: Cache::Prefix, ..s }, shift), without);
                    assert_eq!(say(Settings { cache: Cache::Dual, ..s }, shift), without);
                }
            }
        }
    }
}

/// I13: stopping early never takes more passes.
#[test]
fn an_early_stop_saves_passes() {
    for seed in 0..60 {
        let script = random(seed, 64, true);
        let count = |early_stop| {
            let own = script.clone();
            let text = run(
                Settings { early_stop, ..settings(seed % 2 == 0) },
                false,
                64,
                &mut Scripted::new(move |i| own[i]),
                |_, _| {},
            );
            (text.counts().passes, text.text().to_vec())
        };
        let (with, without) = (count(true), count(false));
        assert!(with.0 <= without.0, "seed {seed}");
        assert_eq!(with.1, without.1, "the script's text is the same");
    }
}

/// Fixed tokens stay, and an end token among them, or before them, ends nothing.
#[test]
fn infilling_keeps_what_was_given() {
    let mut text = vec![MASK; 24];
    (text[5], text[6], text[17]) = (7, EOS, 9);
    let script = |i: usize| if i == 3 { (EOS, 0.1) } else { easy(i) };
    for early_stop in [false, true] {
        let s = Settings { block: 8, early_stop, ..settings(false) };
        let mut texts = [Schedule::infill(&config(false), s, &[1; PROMPT], &text).unwrap()];
        quadriga::diffusion::decode(&mut Scripted::new(script), &mut texts, &mut |_, _, _| Ok(())).unwrap();
        for (i, &t) in texts[0].tokens()[PROMPT..].iter().enumerate() {
            assert_eq!(t, if text[i] == MASK { script(i).0 } else { text[i] });
        }
        assert_eq!(texts[0].text().len(), 24);
    }
}

/// A complete block gives back its doubtful tokens once, and the text still ends.
#[test]
fn doubtful_tokens_are_masked_again_once() {
    for seed in 0..20 {
        let script = random(seed, 40, false);
        let doubtful = script.iter().filter(|s| (probability(s.1) as f32) < 0.8).count();
        let own = script.clone();
        let mut again = 0;
        let s = Settings { block: 8, remask: 0.8, ..settings(false) };
        let text = run(s, false, 40, &mut Scripted::new(move |i| own[i]), |_, c| again += c.len());
        assert_eq!(again, 40 + doubtful);
        assert!(!text.tokens().contains(&MASK));
    }
}

#[test]
fn what_is_settled_stays() {
    for seed in 0..30 {
        let script = random(seed, 50, true);
        let mut said: Vec<u32> = Vec::new();
        let s =
            Settings { block: 8, early_stop: true, remask: if seed % 2 == 0 { 0.7 } else { 0.0 }, ..settings(true) };
        let text = run(s, false, 50, &mut Scripted::new(move |i| script[i]), |text, _| {
            let now = text.settled();
            assert!(now.starts_with(&said), "{said:?} became {now:?}");
            said = now.to_vec();
        });
        assert!(said.starts_with(text.text()) || text.text().starts_with(&said));
    }
}

#[test]
fn impossible_settings_are_refused_by_name() {
    let refused = |s: Settings| Schedule::new(&config(false), s, &[1; 4], 8).map(drop).unwrap_err().to_string();
    let s = settings(false);
    assert!(refused(Settings { block: 0, ..s }).contains("--block-size 0"));
    assert!(refused(Settings { add: 101, ..s }).contains("--add 101"));
    assert!(refused(threshold(s, f32::NAN)).contains("threshold"));
    assert!(refused(Settings::confident(8, 1.5)).contains("--confidence 1.5"));
    assert!(refused(Settings { cache: Cache::Dual, ..s }).contains("--cache"));
    assert!(refused(Settings { cache: Cache::Delayed { delay: 1, refresh: Some(0) }, ..s }).contains("--refresh 0"));
    assert!(refused(Settings { temperature: -1.0, ..s }).contains("--temperature -1"));
    assert!(refused(Settings { remask: 2.0, ..s }).contains("--remask 2"));

    let of = |cfg: &quadriga::model::ModelConfig, prompt: &[u32], text: &[u32]| {
        Schedule::infill(cfg, s, prompt, text).map(drop).unwrap_err().to_string()
    };
    let mut none = config(false);
    none.diffusion = None;
    assert!(of(&none, &[1], &[MASK]).contains("no mask token"));
    assert!(of(&config(true), &[], &[MASK]).contains("the prompt is empty"));
    assert!(of(&config(false), &[1; 2048], &[MASK]).contains("context of 2048"));
    assert!(of(&config(false), &[MASK], &[MASK]).contains("the prompt holds the mask token"));
    assert!(of(&config(false), &[1], &[1]).contains("no mask to fill"));
    assert!(of(&config(false), &[99], &[MASK]).contains("token 99"));
}
