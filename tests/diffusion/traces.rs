//! The published decoder's traces on a scripted model, under `authors`, and what correct behaviour makes of them.

use quadriga::diffusion::{Cache, Settings};

use super::script::*;

/// NFE under both rules, `[Dream's, LLaDA's]`, with the text checked.
fn passes(change: impl Fn(Settings) -> Settings, authors: bool) -> [u64; 2] {
    [(false, true), (true, false)].map(|(best, shift)| {
        let s = change(Settings { authors, ..settings(best) });
        let text = run(s, shift, 64, &mut Scripted::new(easy), |_, _| {});
        let intended: Vec<u32> = (0..64).map(|i| easy(i).0).collect();
        assert_eq!(text.tokens()[PROMPT..], intended);
        text.counts().passes
    })
}

fn delayed(delay: u64) -> Cache {
    Cache::Delayed { delay, refresh: None }
}

#[test]
fn passes_are_counted_as_published() {
    for authors in [true, false] {
        let is = |expected: [u64; 2], change: &dyn Fn(Settings) -> Settings| {
            assert_eq!(passes(change, authors), expected, "authors: {authors}");
        };
        // Cases A to F.
        is([49, 49], &|s| s);
        is([50, 50], &|s| Settings { add: 100, activate: 100, ..s });
        is([64, 56], &|s| threshold(s, -1.0));
        is([64, 64], &|s| Settings { add: 100, activate: 100, ..threshold(s, -1.0) });
        is([12, 12], &|s| threshold(s, 0.6));
        is([2, 2], &|s| threshold(s, 99.0));
    }
}

/// Case G. Under the published shift the cached passes are wrong (case K), but the count of passes is right.
#[test]
fn a_delayed_cache_takes_the_published_passes() {
    for delay in [1, 2] {
        assert_eq!(passes(|s| Settings { cache: delayed(delay), ..s }, false), [49, 49]);
    }
    // Unshifted, the first passes are those that were published.
    let queries = |delay| {
        let mut model = Scripted::new(easy);
        let text =
            run(Settings { cache: delayed(delay), authors: true, ..settings(true) }, false, 64, &mut model, |_, _| {});
        assert_eq!(text.counts().passes, 49);
        model.passes
    };
    let one = queries(1);
    assert_eq!(one[0], (0, 68, 0, 4), "the first pass admits the prompt");
    assert_eq!(one[1], (4, 68, 4, 0));
    let full = 1 + one[1..].iter().position(|p| p.2 == 0 && p.3 > 0).unwrap();
    assert_eq!(one[full].0..one[full].1, 0..68, "one full pass when block 1 is complete");
    assert_eq!(one[full + 1], (4, 68, 4, 32), "then its 32 rows are admitted");
    assert_eq!(one[full + 2], (36, 68, 36, 0));
    let two = queries(2);
    assert_eq!(two[0], (0, 68, 0, 0), "the first pass stores nothing");
    assert_eq!(two[1], (0, 68, 0, 4), "the second admits the prompt");
}

fn ends(from: usize) -> impl Fn(usize) -> (u32, f64) {
    move |i| (if i >= from { EOS } else { easy(i).0 }, easy(i).1)
}

/// Cases H to J.
#[test]
fn the_end_stops_early_as_published() {
    for (best, shift) in [(false, true), (true, false)] {
        for authors in [true, false] {
            let s = Settings { authors, ..settings(best) };
            let stop = Settings { early_stop: true, ..s };
            let count = |s, from| {
                let mut model = Scripted::new(ends(from));
                let text = run(s, shift, 64, &mut model, |_, _| {});
                assert_eq!(text.text().len(), from);
                assert!(text.tokens()[PROMPT + from..].iter().all(|&t| t == EOS));
                (text.counts().passes, model.passes.len())
            };
            assert_eq!(count(s, 40), (49, 49));
            assert_eq!(count(stop, 40), (31, 31));
            // The published count has a pass that never ran.
            let reported = if authors { 2 } else { 1 };
            assert_eq!(count(threshold(stop, 99.0), 20), (reported, 1));
        }
    }
}

/// Case K: behind a cached prefix the published shifted decoder takes the prediction meant for the right neighbour.
#[test]
fn the_first_position_behind_a_cache_is_predicted_by_the_row_before_it() {
    let script = |i: usize| (10 + i as u32 % 7, if i % 4 == 1 { 0.01 } else { 0.55 + 0.001 * i as f64 });
    let first = |authors| {
        let s = Settings { cache: delayed(1), authors, ..settings(false) };
        let text = run(s, true, 64, &mut Scripted::new(script), |_, _| {});
        (text.counts().passes, text.tokens()[PROMPT])
    };
    assert_eq!(first(true), (49, 11));
    assert_eq!(first(false), (49, 10));
}
