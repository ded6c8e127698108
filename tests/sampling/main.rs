//! From logits to tokens on every backend: what the filters keep, the law of the tokens by exact enumeration of the random numbers, entropies,
//! and how masked positions get theirs.

#[path = "../common/mod.rs"]
mod common;
mod unmask;

use common::{Cell, cpus, key_in};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Buffer, Draw, NO_TOKEN};
use quadriga::rng::Key;

fn upload<B: Backend>(be: &B, values: &[f32]) -> B::Buf<B::Acc> {
    let mut buf = be.alloc::<B::Acc>(values.len()).unwrap();
    be.upload_acc(buf.head_mut(values.len()), values).unwrap();
    buf
}

/// n tokens of each row.
fn sample<B: Backend>(be: &B, logits: &[f32], draws: &[Draw], n: usize) -> Vec<u32> {
    let (x, mut tokens) = (upload(be, logits), be.alloc::<u32>(draws.len() * n).unwrap());
    be.sample(tokens.head_mut(draws.len() * n), x.head(logits.len()), draws).unwrap();
    let mut out = vec![0; draws.len() * n];
    be.download(tokens.head(out.len()), &mut out).unwrap();
    out
}

fn distribution<B: Backend>(be: &B, logits: &[f32], draws: &[Draw]) -> Vec<f32> {
    let (x, mut p) = (upload(be, logits), be.alloc::<B::Acc>(logits.len()).unwrap());
    be.distribution(p.head_mut(logits.len()), x.head(logits.len()), draws).unwrap();
    let mut out = vec![0.0; logits.len()];
    be.download_acc(p.head(logits.len()), &mut out).unwrap();
    out
}

const ONE: Draw = Draw { temperature: 1.0, ..Draw::GREEDY };

fn filters_keep_what_they_say<B: Backend>(be: &B) {
    let keeps = |draw: Draw, p: [f32; 4]| {
        let got = distribution(be, &p.map(f32::ln), &[draw]);
        let kept: f32 = got.iter().zip(p).filter(|g| *g.0 > 0.0).map(|g| g.1).sum();
        for (got, p) in got.iter().zip(p) {
            assert!(*got == 0.0 || (got - p / kept).abs() < 1e-6, "{draw:?}: {got}, not {p} of {kept}");
        }
        (0..4).filter(|&i| got[i] > 0.0).collect::<Vec<_>>()
    };
    let p = [0.1, 0.4, 0.3, 0.2];
    assert_eq!(keeps(ONE, p), [0, 1, 2, 3]);
    assert_eq!(keeps(Draw { top_k: 2, ..ONE }, p), [1, 2]);
    assert_eq!(keeps(Draw { top_p: 0.65, ..ONE }, p), [1, 2]);
    assert_eq!(keeps(Draw { top_p: 0.75, ..ONE }, p), [1, 2, 3]);
    assert_eq!(keeps(Draw { min_p: 0.6, ..ONE }, p), [1, 2]);
    // top-p counts what top-k has left: 0.4 of 0.7 is enough.
    assert_eq!(keeps(Draw { top_k: 2, top_p: 0.55, ..ONE }, p), [1]);
    assert_eq!(keeps(Draw { top_k: 3, min_p: 0.6, ..ONE }, p), [1, 2]);
    // Of equals the lower ids.
    assert_eq!(keeps(Draw { top_k: 3, ..ONE }, [0.25; 4]), [0, 1, 2]);
    assert_eq!(keeps(Draw { top_p: 0.5, ..ONE }, [0.25; 4]), [0, 1]);
    let cold = distribution(be, &[1.0, 0.0, -1.0], &[Draw { temperature: 0.5, ..ONE }]);
    let z = 1.0 + (-2f32).exp() + (-4f32).exp();
    assert!((cold[1] - (-2f32).exp() / z).abs() < 1e-6, "{cold:?}");
    for greedy in [Draw::GREEDY, Draw { top_k: 1, ..ONE }] {
        assert_eq!(distribution(be, &[1.0, 3.0, 3.0], &[greedy]), [0.0, 1.0, 0.0]);
        assert_eq!(sample(be, &[1.0, 3.0, 3.0], &[greedy], 2), [1, NO_TOKEN]);
    }
}

fn rows_beyond_numbers_give_no_token<B: Backend>(be: &B) {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows = [[nan, 1.0, 0.0], [-inf; 3], [1.0, inf, 0.0], [0.0, 1.0, nan], [-inf, 2.0, -inf]].concat();
    for draw in [Draw::GREEDY, ONE, Draw { top_k: 2, ..ONE }, Draw { top_p: 0.5, ..ONE }] {
        assert_eq!(sample(be, &rows, &[draw; 5], 1), [NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, 1], "{draw:?}");
        let mut want = [0.0; 15];
        want[13] = 1.0;
        assert_eq!(distribution(be, &rows, &[draw; 5]), want, "{draw:?}");
        // Nothing is left behind the only token.
        assert_eq!(sample(be, &rows[12..], &[draw], 3), [1, NO_TOKEN, NO_TOKEN]);
    }
    let (s, a) = stats(be, &rows, 3);
    assert!(s[..4].as_flattened().iter().all(|s| s.is_nan()) && s[4] == [2.0, 2.0, 0.0], "{s:?}");
    assert_eq!(a, [NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, 1]);
}

/// Statistics of rows of `vocab` logits, and the ids of their largest.
fn stats<B: Backend>(be: &B, logits: &[f32], vocab: usize) -> (Vec<[f32; 3]>, Vec<u32>) {
    let rows = logits.len() / vocab;
    let (x, mut stats) = (upload(be, logits), be.alloc::<B::Acc>(3 * rows).unwrap());
    let mut argmax = be.alloc::<u32>(rows).unwrap();
    be.logits_stats(stats.head_mut(3 * rows), argmax.head_mut(rows), x.head(logits.len()), vocab).unwrap();
    let (mut s, mut a) = (vec![0.0; 3 * rows], vec![0; rows]);
    be.download_acc(stats.head(3 * rows), &mut s).unwrap();
    be.download(argmax.head(rows), &mut a).unwrap();
    (s.chunks(3).map(|s| [s[0], s[1], s[2]]).collect(), a)
}

/// Entropies in nats that were computed elsewhere to ten places, and what entropy is not changed by.
fn entropies_are_the_published_ones<B: Backend>(be: &B) {
    let table: [(&[f32], f32); 6] = [
        (&[2.0, 1.0, 0.0, -1.0], 0.947_536_96),
        (&[4.0, 2.0, 0.0, -2.0], 0.455_428_62),
        (&[0.0, 0.0, 0.0, 0.0], 1.386_294_4),
        (&[10.0, 0.0, 0.0, 0.0], 0.001_498_002_9),
        (&[3.0, 0.0, -2.0, 1.0, 0.5], 0.759_357_47),
        (&[6.0, 0.0, -4.0, 2.0, 1.0], 0.146_201_45),
    ];
    for (row, want) in table {
        let [max, lse, entropy] = stats(be, row, row.len()).0[0];
        assert!((entropy - want).abs() < 1e-6, "{row:?}: {entropy}, not {want}");
        assert_eq!(max, row[0]);
        assert!((lse - row.iter().map(|x| x.exp()).sum::<f32>().ln()).abs() < 2e-6, "{row:?}: {lse}");
    }
    let mut rng = quadriga::rng::Rng::new(21);
    for vocab in [2, 37, 1030] {
        for scale in [0.0, 0.5, 3.0, 40.0] {
            let row: Vec<f32> = (0..vocab).map(|_| scale * rng.normal()).collect();
            let mut permuted = row.clone();
            (1..vocab).for_each(|i| permuted.swap(i, rng.below(i + 1)));
            // Powers of two are added without rounding where the numbers are coarse.
            let coarse: Vec<f32> = row.iter().map(|x| (x * 64.0).round() / 64.0).collect();
            let shifted: Vec<f32> = coarse.iter().map(|x| x + 256.0).collect();
            let (s, _) = stats(be, &[&row[..], &permuted, &coarse, &shifted].concat(), vocab);
            let of = |i: usize| s[i][2];
            assert!((of(0) - of(1)).abs() < 1e-5, "{vocab} of {scale}, permuted: {} and {}", of(0), of(1));
            assert!((of(2) - of(3)).abs() < 1e-5, "{vocab} of {scale}, shifted: {} and {}", of(2), of(3));
            let most = (vocab as f32).ln();
            assert!(s.iter().all(|s| (-1e-6..most + 1e-5).contains(&s[2])), "{vocab} of {scale}: {s:?}");
            assert!(scale > 0.0 || (of(0) - most).abs() < 1e-5, "{vocab} equals: {}", of(0));
        }
    }
}

/// A row with forbidden tokens is to all ops the row that never had them.
fn forbidden_tokens_have_no_probability<B: Backend>(be: &B) {
    let mut rng = quadriga::rng::Rng::new(22);
    for (vocab, rows, forbidden) in [(6, 3, vec![2]), (203, 2, vec![0, 202, 77, 77]), (1030, 2, (0..900).collect())] {
        let mut logits: Vec<f32> = (0..rows * vocab).map(|_| 2.0 * rng.normal()).collect();
        // The best of all is forbidden in one row, the second best in another.
        logits[forbidden[0] as usize] = 50.0;
        let mut x = upload(be, &logits);
        be.forbid(x.head_mut(rows * vocab), vocab, &forbidden).unwrap();
        let mut got = vec![0.0; rows * vocab];
        be.download_acc(x.head(rows * vocab), &mut got).unwrap();
        let gone = |t: usize| forbidden.contains(&(t as u32));
        for (i, x) in logits.iter().enumerate() {
            assert_eq!(got[i], if gone(i % vocab) { f32::NEG_INFINITY } else { *x }, "logit {i} of {vocab}");
        }
        let allowed: Vec<usize> = (0..vocab).filter(|t| !gone(*t)).collect();
        let rest: Vec<f32> = logits.chunks(vocab).flat_map(|x| allowed.iter().map(|&t| x[t])).collect();
        let n = allowed.len();
        let ((s, best), (want, want_best)) = (stats(be, &got, vocab), stats(be, &rest, n));
        for r in 0..rows {
            assert_eq!(best[r] as usize, allowed[want_best[r] as usize]);
            let near = |i: usize| (s[r][i] - want[r][i]).abs() < 1e-5;
            assert!(near(0) && near(1) && near(2), "{vocab}: {:?}, not {:?}", s[r], want[r]);
        }
        let k = vocab.min(64);
        let (mut values, mut ids) = (be.alloc::<B::Acc>(rows * k).unwrap(), be.alloc::<u32>(rows * k).unwrap());
        be.top_k(values.head_mut(rows * k), ids.head_mut(rows * k), x.head(rows * vocab), vocab, k).unwrap();
        let (mut v, mut i) = (vec![0.0; rows * k], vec![0; rows * k]);
        be.download_acc(values.head(rows * k), &mut v).unwrap();
        be.download(ids.head(rows * k), &mut i).unwrap();
        for (id, v) in i.chunks(k).zip(v.chunks(k)).flat_map(|(i, v)| i.iter().zip(v).take(n)) {
            assert!(!gone(*id as usize) && v.is_finite(), "{id} of {vocab} is among the largest");
        }
        let filters = [
            Draw::GREEDY,
            ONE,
            Draw { top_k: vocab as u32 - 1, ..ONE },
            Draw { top_p: 0.9999, ..ONE },
            Draw { top_k: 40, top_p: 0.9, min_p: 0.01, temperature: 3.0, ..ONE },
        ];
        for filter in filters {
            let draws: Vec<Draw> =
                (0..rows as u64).map(|stream| Draw { key: Key { seed: 5, stream, counter: 0 }, ..filter }).collect();
            let (p, q) = (distribution(be, &got, &draws), distribution(be, &rest, &draws));
            for (p, q) in p.chunks(vocab).zip(q.chunks(n)) {
                let mut q = q.iter();
                let same =
                    |t: usize| if gone(t) { p[t] == 0.0 } else { q.next().is_some_and(|q| (p[t] - q).abs() < 1e-6) };
                assert!((0..vocab).all(same), "{filter:?} of {vocab}");
            }
            let m = vocab.min(64);
            for drawn in sample(be, &got, &draws, m).chunks(m) {
                assert!(drawn[0] != NO_TOKEN && drawn.iter().all(|t| !gone(*t as usize)), "{filter:?}: {drawn:?}");
            }
        }
    }
    // Nothing is left.
    let mut x = upload(be, &[1.0, 2.0, 3.0]);
    be.forbid(x.head_mut(3), 3, &[]).unwrap();
    be.forbid(x.head_mut(3), 3, &[2, 0, 1]).unwrap();
    let mut none = [0.0; 3];
    be.download_acc(x.head(3), &mut none).unwrap();
    let (s, best) = stats(be, &none, 3);
    assert!(s[0].iter().all(|s| s.is_nan()) && best == [NO_TOKEN], "{s:?}");
    let says = be.forbid(x.head_mut(3), 3, &[3]).unwrap_err().to_string();
    assert!(says.contains("token 3"), "{says}");
}

/// Two tokens of a row, by random numbers from both ends of each pair's cell: the law's steps are where they should be, and so each
/// pair comes exactly as often as the law says.
fn pairs_follow_the_law<B: Backend>(be: &B) {
    let p = [0.1f64, 0.4, 0.3, 0.2];
    let cells = |number, p: [f64; 4]| {
        let cell = move |x: usize| Cell { number, from: p[..x].iter().sum(), to: p[..=x].iter().sum() };
        (0..4).filter(move |x| p[*x] > 0.0).map(cell).enumerate()
    };
    let (mut keys, mut want) = (Vec::new(), Vec::new());
    for (x, first) in cells(0, p) {
        let mut left = p.map(|y| y / (1.0 - p[x]));
        left[x] = 0.0;
        let others = (0..4).filter(|y| *y != x as u32);
        for ((_, second), y) in cells(1, left).zip(others) {
            for high in [false, true] {
                keys.push(key_in(&[first, second], high));
                want.extend([x as u32, y]);
            }
        }
    }
    let draws: Vec<Draw> = keys.iter().map(|&key| Draw { key, ..ONE }).collect();
    let row = p.map(|p| p.ln() as f32);
    assert_eq!(sample(be, &row.repeat(keys.len()), &draws, 2), want);
}

/// Long rows, whose sums are taken in many pieces: the token is the first up to which the specification's law exceeds the number.
fn long_rows_follow_the_law<B: Backend>(be: &B) {
    // An emulated device takes its time.
    let (vocab, rows) = if cfg!(feature = "emu") { (9_011, 3) } else { (20_011, 40) };
    let mut rng = quadriga::rng::Rng::new(3);
    let fine: Vec<f32> = (0..vocab).map(|_| 2.0 * rng.normal()).collect();
    // With thousands of equals at every cut.
    let coarse: Vec<f32> = fine.iter().map(|x| x.round()).collect();
    let flat = Draw { temperature: 10.0, ..ONE };
    let filters = [
        ONE,
        Draw { min_p: 1e-3, ..ONE },
        Draw { top_p: 0.99, ..ONE },
        Draw { top_k: 3000, ..ONE },
        Draw { top_p: 0.7, ..flat },
        Draw { top_k: vocab as u32 / 2, top_p: 0.9, min_p: 0.5, ..flat },
    ];
    for (filter, row) in filters.iter().flat_map(|f| [(*f, &fine), (*f, &coarse)]) {
        let key = |stream| Key { seed: 8, stream, counter: 2 };
        let draws: Vec<Draw> = (0..rows).map(|i| Draw { key: key(i), ..filter }).collect();
        let mut p = vec![0.0; vocab];
        let wide: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        Naive.distribution(&mut p, &wide, &[filter]).unwrap();
        let got = sample(be, &row.repeat(rows as usize), &draws, 1);
        for (i, token) in got.into_iter().enumerate() {
            let (u, token) = (key(i as u64).uniform(), token as usize);
            let below: f64 = p[..token].iter().sum();
            assert!(below - 1e-6 < u && u < below + p[token] + 1e-6, "{filter:?}: {u} gave {token}");
        }
    }
}

fn all<B: Backend>(be: &B) {
    filters_keep_what_they_say(be);
    rows_beyond_numbers_give_no_token(be);
    entropies_are_the_published_ones(be);
    forbidden_tokens_have_no_probability(be);
    pairs_follow_the_law(be);
    long_rows_follow_the_law(be);
}

#[test]
fn naive_samples() {
    all(&Naive);
}

#[test]
fn cpu_samples() {
    cpus().for_each(|cpu| all(&cpu));
}

#[test]
fn cuda_samples() {
    if let Some(cuda) = common::gpu() {
        all(&cuda);
    }
}
