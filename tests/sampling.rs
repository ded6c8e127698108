//! Sampling on every backend: what the filters keep, and the law of the tokens by exact enumeration of the random numbers.

mod common;

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
    let (mut stats, mut argmax) = (be.alloc::<B::Acc>(15).unwrap(), be.alloc::<u32>(5).unwrap());
    let x = upload(be, &rows);
    be.logits_stats(stats.head_mut(15), argmax.head_mut(5), x.head(15), 3).unwrap();
    let (mut s, mut a) = ([0.0; 15], [0; 5]);
    be.download_acc(stats.head(15), &mut s).unwrap();
    be.download(argmax.head(5), &mut a).unwrap();
    assert!(s[..12].iter().all(|s| s.is_nan()) && s[12..] == [2.0, 2.0, 0.0], "{s:?}");
    assert_eq!(a, [NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, 1]);
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
