//! [`Backend::unmask`] on every backend against its definition, word by word.

use crate::common::{self, cpus};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Buffer, Candidates, Masked, NO_TOKEN, Score, Unmasking};
use quadriga::error::ErrorKind;
use quadriga::rng::Rng;

/// A sequence with what its rows say.
#[derive(Clone, Debug)]
struct Text {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    picks: Vec<u32>,
    argmax: Vec<u32>,
    stats: Vec<[f32; 3]>,
    rule: Unmasking,
    fill: std::ops::Range<u32>,
}

const RULE: Unmasking =
    Unmasking { score: Score::Entropy, threshold: f32::NEG_INFINITY, strict: false, best: 0, forced: 0..0 };
/// Stands for a mask in these texts.
const MASK: u32 = 99;

/// What becomes of a text and of its rows.
fn definition(text: &Text, eos: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let rows = text.positions.len();
    let usable = |i: usize| text.picks[i] != NO_TOKEN && text.argmax[i] != NO_TOKEN;
    let probability = |i: usize| (f64::from(text.stats[i][0]) - f64::from(text.stats[i][1])).exp();
    let surer = |i: usize, j: usize| match text.rule.score {
        Score::Entropy if text.stats[i][2] == text.stats[j][2] => i < j,
        Score::Entropy => text.stats[i][2] < text.stats[j][2],
        Score::Confidence if probability(i) == probability(j) => i < j,
        Score::Confidence => probability(i) > probability(j),
    };
    let (threshold, strict) = (text.rule.threshold, text.rule.strict);
    let passes = |i: usize| match text.rule.score {
        Score::Entropy if strict => text.stats[i][2] < threshold,
        Score::Entropy => text.stats[i][2] <= threshold,
        Score::Confidence if strict => probability(i) > f64::from(threshold),
        Score::Confidence => probability(i) >= f64::from(threshold),
    };
    let surer_ones = |i: usize, of: &[usize]| of.iter().filter(|j| surer(**j, i)).count();
    let all: Vec<usize> = (0..rows).filter(|i| usable(*i)).collect();
    let mut taken = vec![NO_TOKEN; rows];
    for &i in &all {
        if passes(i) || surer_ones(i, &all) < text.rule.best as usize {
            taken[i] = text.picks[i];
        }
    }
    let forced: Vec<usize> = all.into_iter().filter(|i| text.rule.forced.contains(&text.positions[*i])).collect();
    if forced.iter().all(|i| taken[*i] == NO_TOKEN) {
        let best = forced.iter().find(|i| surer_ones(**i, &forced) == 0);
        best.iter().for_each(|i| taken[**i] = text.argmax[**i]);
    }
    let mut tokens = text.tokens.clone();
    (0..rows).filter(|i| taken[*i] != NO_TOKEN).for_each(|i| tokens[text.positions[i] as usize] = taken[i]);
    let mut ended = false;
    for i in text.fill.clone() {
        if ended {
            tokens[i as usize] = eos[0];
        }
        ended |= eos.contains(&tokens[i as usize]);
    }
    (tokens, taken)
}

/// All texts in one call, with some tokens between them that belong to none.
fn unmask<B: Backend>(be: &B, texts: &[Text], eos: &[u32]) -> quadriga::error::Result<Vec<(Vec<u32>, Vec<u32>)>> {
    let (mut tokens, mut masked) = (vec![], vec![]);
    for t in texts {
        tokens.push(7);
        let from = tokens.len();
        tokens.extend(&t.tokens);
        let (tokens, rule, fill) = (from..tokens.len(), t.rule.clone(), t.fill.clone());
        masked.push(Masked { tokens, positions: &t.positions, rule, fill });
    }
    let upload = |ids: Vec<u32>| {
        let mut buf = be.alloc::<u32>(ids.len()).unwrap();
        be.upload(buf.head_mut(ids.len()), &ids).unwrap();
        buf
    };
    let picks = upload(texts.iter().flat_map(|t| t.picks.clone()).collect());
    let argmax = upload(texts.iter().flat_map(|t| t.argmax.clone()).collect());
    let (mut on_device, rows) = (upload(tokens.clone()), picks.len());
    let stats: Vec<f32> = texts.iter().flat_map(|t| t.stats.as_flattened().to_vec()).collect();
    let (mut s, mut taken) = (be.alloc::<B::Acc>(stats.len()).unwrap(), be.alloc::<u32>(rows).unwrap());
    be.upload_acc(s.head_mut(stats.len()), &stats).unwrap();
    let found = Candidates { picks: picks.head(rows), argmax: argmax.head(argmax.len()), stats: s.head(stats.len()) };
    be.unmask(on_device.head_mut(tokens.len()), taken.head_mut(rows), found, &masked, eos)?;
    let mut took = vec![0; rows];
    be.download(taken.head(rows), &mut took).unwrap();
    be.download(on_device.head(tokens.len()), &mut tokens).unwrap();
    let mut took = &took[..];
    Ok(masked
        .iter()
        .map(|m| {
            let (own, rest) = took.split_at(m.positions.len());
            took = rest;
            assert_eq!(tokens[m.tokens.start - 1], 7, "written outside of the texts");
            (tokens[m.tokens.clone()].to_vec(), own.to_vec())
        })
        .collect())
}

/// Statistics on a coarse grid make ties, and thresholds that are hit exactly.
fn random(rng: &mut Rng) -> Text {
    let length = [1 + rng.below(12), 1 + rng.below(90), 600 + rng.below(300)][[0, 1, 1, 1, 0, 2][rng.below(6)]];
    let mut tokens: Vec<u32> = (0..length).map(|_| 1 + rng.below(40) as u32).collect();
    let density = rng.uniform();
    let positions: Vec<u32> = (0..length as u32).filter(|_| rng.uniform() < density).collect();
    positions.iter().for_each(|p| tokens[*p as usize] = MASK);
    let coarse = 1 + rng.below(60);
    let rows = positions.len();
    let mut text = Text {
        tokens,
        positions,
        picks: (0..rows).map(|_| 1 + rng.below(40) as u32).collect(),
        argmax: (0..rows).map(|_| 1 + rng.below(40) as u32).collect(),
        stats: vec![],
        rule: Unmasking {
            score: [Score::Entropy, Score::Confidence][rng.below(2)],
            strict: rng.below(2) == 1,
            best: [0, 0, 1, 1, 2, 5][rng.below(6)],
            ..RULE
        },
        fill: 0..0,
    };
    for _ in 0..rows {
        let max = (rng.normal() * 500.0).round() / 64.0;
        let entropy = rng.below(coarse) as f32 / 8.0 * [1.0, -0.0][rng.below(2) * (rng.below(9) / 8)];
        text.stats.push([max, max + rng.below(coarse) as f32 / 8.0, entropy]);
    }
    for i in 0..rows {
        match rng.below(12) {
            0 => (text.picks[i], text.argmax[i], text.stats[i]) = (NO_TOKEN, NO_TOKEN, [f32::NAN; 3]),
            1 => text.picks[i] = NO_TOKEN,
            _ => {}
        }
    }
    // Probabilities lie between the grid's, but for the last.
    text.rule.threshold = match (text.rule.score, rng.below(4)) {
        (Score::Entropy, 0) => [f32::NEG_INFINITY, f32::INFINITY][rng.below(2)],
        (Score::Entropy, _) => rng.below(coarse) as f32 / 8.0,
        (_, 0) => [0.0, 1.0, 1.5][rng.below(3)],
        (..) => (-(rng.below(coarse) as f32 + 0.5) / 8.0).exp(),
    };
    let range = |rng: &mut Rng| {
        let (a, b) = (rng.below(length + 1) as u32, rng.below(length + 1) as u32);
        a.min(b)..a.max(b)
    };
    (text.rule.forced, text.fill) = (range(rng), [0..0, range(rng), 0..length as u32][rng.below(3)].clone());
    text
}

fn follows_its_definition<B: Backend>(name: &str, be: &B) {
    let mut rng = Rng::new(31);
    let (mut seen, rounds) = ([0; 4], if cfg!(feature = "emu") { 120 } else { 400 });
    for round in 0..rounds {
        let texts: Vec<Text> = (0..1 + rng.below(4)).map(|_| random(&mut rng)).collect();
        let eos = [&[5][..], &[5, 6, 31], &[40, 3]][rng.below(3)];
        for (text, (tokens, taken)) in texts.iter().zip(unmask(be, &texts, eos).unwrap()) {
            let want = definition(text, eos);
            let rows = texts.iter().map(|t| t.positions.len()).sum::<usize>();
            let want = if rows == 0 { (text.tokens.clone(), vec![]) } else { want };
            assert_eq!((&tokens, &taken), (&want.0, &want.1), "{name}, round {round}: {text:?}, end {eos:?}");
            // What the comparison has met.
            let took = taken.iter().filter(|t| **t != NO_TOKEN).count();
            let behind = tokens.iter().zip(&text.tokens).filter(|(a, b)| a != b).count() > took;
            for (n, met) in seen.iter_mut().zip([took == 0, took == 1, took > 1, behind]) {
                *n += i32::from(met);
            }
        }
    }
    assert!(seen.iter().all(|n| *n > rounds / 20), "{name}: none, one, several taken, and filled: {seen:?}");
}

/// Worked by hand.
fn takes_what_it_says<B: Backend>(be: &B) {
    let text = Text {
        tokens: vec![1, 2, MASK, MASK, MASK, 3, MASK, MASK],
        positions: vec![2, 3, 4, 6, 7],
        picks: vec![10, 11, 12, 13, 14],
        argmax: vec![20, 21, 22, 23, 24],
        stats: [0.5, 0.3, 0.7, 0.3, 0.4].map(|h| [0.0, h, h]).to_vec(),
        rule: RULE,
        fill: 0..8,
    };
    const N: u32 = NO_TOKEN;
    let taken = |rule: Unmasking| unmask(be, &[Text { rule, ..text.clone() }], &[9]).unwrap().remove(0).1;
    assert_eq!(taken(RULE), [N; 5]);
    assert_eq!(taken(Unmasking { threshold: 0.4, ..RULE }), [N, 11, N, 13, 14]);
    assert_eq!(taken(Unmasking { threshold: 0.4, strict: true, ..RULE }), [N, 11, N, 13, N]);
    // Of the equals at 3 and 6 the lower position.
    assert_eq!(taken(Unmasking { best: 1, ..RULE }), [N, 11, N, N, N]);
    assert_eq!(taken(Unmasking { best: 4, threshold: 0.4, ..RULE }), [10, 11, N, 13, 14]);
    assert_eq!(taken(Unmasking { best: 9, ..RULE }), text.picks[..]);
    // Forced is the best there, and gets its best token; not where something is taken already.
    assert_eq!(taken(Unmasking { forced: 4..8, ..RULE }), [N, N, N, 23, N]);
    assert_eq!(taken(Unmasking { forced: 4..8, best: 1, ..RULE }), [N, 11, N, 23, N]);
    assert_eq!(taken(Unmasking { forced: 2..5, threshold: 0.3, ..RULE }), [N, 11, N, 13, N]);
    assert_eq!(taken(Unmasking { forced: 5..6, ..RULE }), [N; 5]);
    // e^-0.5 = 0.607, e^-0.4 = 0.670, e^-0.3 = 0.741.
    let sure = Unmasking { score: Score::Confidence, ..RULE };
    assert_eq!(taken(Unmasking { threshold: 0.65, ..sure.clone() }), [N, 11, N, 13, 14]);
    assert_eq!(taken(Unmasking { threshold: 0.9, best: 1, ..sure.clone() }), [N, 11, N, N, N]);
    assert_eq!(taken(Unmasking { threshold: 0.0, ..sure }), text.picks[..]);
    // The end at 3 stays, the mask before it too; what was there and what was taken behind it is gone.
    let all = Text { rule: Unmasking { threshold: 0.4, ..RULE }, ..text.clone() };
    let ended = |eos: &[u32], fill| unmask(be, &[Text { fill, ..all.clone() }], eos).unwrap().remove(0).0;
    assert_eq!(ended(&[11], 0..8), [1, 2, MASK, 11, 11, 11, 11, 11]);
    assert_eq!(ended(&[50, 13, 11], 4..8), [1, 2, MASK, 11, MASK, 3, 13, 50]);
    assert_eq!(ended(&[1, 13], 2..7), [1, 2, MASK, 11, MASK, 3, 13, 14]);
    assert_eq!(ended(&[11], 0..0), [1, 2, MASK, 11, MASK, 3, 13, 14]);
    assert_eq!(ended(&[], 0..0), [1, 2, MASK, 11, MASK, 3, 13, 14]);
    assert!(unmask(be, &[], &[]).unwrap().is_empty());

    let refused = |change: &dyn Fn(&mut Text), eos: &[u32]| {
        let mut text = text.clone();
        change(&mut text);
        unmask(be, &[text], eos).unwrap_err().kind()
    };
    assert_eq!(refused(&|t| t.positions[4] = 6, &[9]), ErrorKind::Shape);
    assert_eq!(refused(&|t| t.positions[4] = 8, &[9]), ErrorKind::Shape);
    assert_eq!(refused(&|t| t.fill = 2..9, &[9]), ErrorKind::Shape);
    assert_eq!(refused(&|t| t.picks.truncate(4), &[9]), ErrorKind::Shape);
    assert_eq!(refused(&|t| t.stats.truncate(4), &[9]), ErrorKind::Shape);
    assert_eq!(refused(&|t| t.rule.threshold = f32::NAN, &[9]), ErrorKind::Usage);
    assert_eq!(refused(&|_| {}, &[]), ErrorKind::Usage);
}

fn all<B: Backend>(name: &str, be: &B) {
    takes_what_it_says(be);
    follows_its_definition(name, be);
}

#[test]
fn naive_unmasks() {
    all("naive", &Naive);
}

#[test]
fn cpu_unmasks() {
    // Its tiers and threads have no part in it.
    cpus().take(1).for_each(|cpu| all("cpu", &cpu));
}

#[test]
fn cuda_unmasks() {
    if let Some(cuda) = common::gpu() {
        all("cuda", &cuda);
    }
}
