//! Where numbers end: no mass, no distribution, no sense.

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Accepted, Backend, Buffer, Draw, MAX_TRAVERSED, NO_TOKEN, Order, Penalty, Rule, Trees};
use quadriga::bench::ops::Verify;
use quadriga::decode::Sampler;
use quadriga::rng::Key;

use super::case::{Case, Logits, always};
use super::{ORDERS, chain, common};

fn numbers_end_well<B: Backend>(be: &B) {
    let keys: Vec<Key> = (0..32).map(|stream| Key { seed: 5, stream, counter: 0 }).collect();
    let verify = |case: &Case, tokens: &[u32], order| {
        let runs: Vec<(&[u32], Key)> = keys.iter().map(|key| (tokens, *key)).collect();
        case.verify(be, &runs, Verify::Reject { replacement: false, order })
    };
    for order in ORDERS {
        // p is q, and the drafted token has none of either: nothing is left of p, so p itself is drawn from.
        let same = Case::new(always([0.5, 0.5, 0.0]), always([0.5, 0.5, 0.0]), &[0, 0]);
        let number = u64::from(order == Order::RootFirst);
        for (key, found) in keys.iter().zip(verify(&same, &[0, 2], order)) {
            assert_eq!(found, (vec![0], u32::from(key.at(number).uniform() >= 0.5)), "{order:?}");
        }
        // A token that the draft says it never drew stands if the target may say it.
        let never = Case::new(always([0.0, 0.0, 1.0]), always([0.5, 0.5, 0.0]), &[0, 0]);
        assert!(verify(&never, &[0, 2], order).iter().all(|found| *found == (vec![0, 1], 2)), "{order:?}");

        // Logits that are not numbers behind token `bad`; drafted tokens stand for sure, or by half.
        let sampler = Sampler { temperature: 1.0, ..Sampler::greedy() };
        let broken = |bad: usize, sure: bool| {
            let mut rows = vec![vec![f32::NEG_INFINITY, 0.0, 0.0], vec![0.0; 3], vec![0.0; 3]];
            rows[bad][1] = f32::NAN;
            let other = if sure { 0.0 } else { f32::NEG_INFINITY };
            let q = vec![vec![f32::NEG_INFINITY, 0.0, other], vec![0.0; 3], vec![0.0; 3]];
            Case { logits: Some([rows, q].map(|rows| Logits { rows, sampler })), ..chain(2) }
        };
        for (bad, kept) in [(0, vec![0]), (1, vec![0, 1]), (2, vec![0, 1, 2])] {
            let found = verify(&broken(bad, true), &[0, 1, 2], order);
            assert!(found.iter().all(|found| *found == (kept.clone(), NO_TOKEN)), "{order:?} {bad}: {found:?}");
        }
        let found = verify(&broken(1, false), &[0, 1, 2], order);
        assert!(found.iter().all(|f| *f == (vec![0, 1], NO_TOKEN) || *f == (vec![0], 2)), "{order:?}: {found:?}");
        let failed = found.iter().filter(|f| f.1 == NO_TOKEN).count();
        assert!((6..27).contains(&failed), "{order:?}: {failed} of 32 fail");
    }
    // Neither has the target a token nor the draft.
    let mut picks = be.alloc::<u32>(2).unwrap();
    let mut logits = be.alloc::<B::Acc>(4).unwrap();
    let buffer = |n| be.alloc::<u32>(n).unwrap();
    be.upload_acc(logits.head_mut(4), &[f32::NAN; 4]).unwrap();
    be.sample(picks.head_mut(2), logits.head(4), &[Draw::GREEDY; 2]).unwrap();
    let (mut path, mut counts, mut next) = (buffer(2), buffer(1), buffer(1));
    let accepted = Accepted { path: path.head_mut(2), counts: counts.head_mut(1), next: next.head_mut(1) };
    let trees = Trees { sizes: &[2], tokens: &[0, NO_TOKEN], parents: &[0, 0] };
    be.verify_tree(accepted, &trees, Rule::Match(picks.head(2))).unwrap();
    let (mut kept, mut token) = ([0], [0]);
    be.download(counts.head(1), &mut kept).unwrap();
    be.download(next.head(1), &mut token).unwrap();
    assert_eq!((kept, token), ([1], [NO_TOKEN]));
}

#[test]
fn naive_ends_well() {
    numbers_end_well(&Naive);
}

#[test]
fn cpu_ends_well() {
    numbers_end_well(&Cpu::with(2, Tier::detect(), Compute::Exact));
}

#[test]
fn cuda_ends_well() {
    if let Some(cuda) = common::gpu() {
        numbers_end_well(&cuda);
    }
}

#[test]
fn misuse_is_an_error() {
    let mut out = ([0; 8], [0; 2], [0; 2]);
    let mut verify = |sizes: &[u32], tokens: &[u32], parents: &[u32], rule: Rule<'_, Naive>| {
        let (path, counts, next) = (&mut out.0[..], &mut out.1[..], &mut out.2[..]);
        let trees = Trees { sizes, tokens, parents };
        Naive.verify_tree(Accepted { path, counts, next }, &trees, rule).map_err(|e| e.to_string())
    };
    let says = |r: Result<(), String>, word: &str| assert!(r.as_ref().is_err_and(|e| e.contains(word)), "{r:?}");
    let picks = &[0; 4][..];
    says(verify(&[4], &[0; 4], &[0; 4], Rule::Match(picks)), "1 trees");
    says(verify(&[2, 1], &[0; 4], &[0; 4], Rule::Match(picks)), "3 nodes");
    says(verify(&[4, 0], &[0; 4], &[0; 4], Rule::Match(picks)), "without node 0");
    says(verify(&[2, 2], &[0; 4], &[0, 0, 0, 1], Rule::Match(picks)), "before their children");
    assert!(verify(&[2, 2], &[0; 4], &[9, 0, 9, 0], Rule::Match(picks)).is_ok());
    const N: usize = MAX_TRAVERSED + 2;
    let (p, keys, order) = (&[1.0; N][..], &[Key::default(); 2], Order::LeavesFirst);
    let rule = Rule::Reject { p, q: p, drafts: &[0; N], keys, replacement: false, order };
    says(verify(&[N as u32 - 1, 1], &[0; N], &[0; N], rule), "513 nodes exceeds 512");
    let (p, q, keys) = (&[0.25; 16][..], &[0.25; 8][..], [Key::default(); 2]);
    let mut reject = |tokens: &[u32], drafts: &[u32], keys: &[Key]| {
        let rule = Rule::Reject { p, q, drafts, keys, replacement: false, order: Order::RootFirst };
        verify(&[2, 2], tokens, &[0; 4], rule)
    };
    says(reject(&[0, 4, 0, 0], &[0; 4], &keys), "token 4");
    says(reject(&[0; 4], &[2, 0, 0, 0], &keys), "row 2");
    says(reject(&[0; 4], &[0; 4], &keys[..1]), "1 keys");
    // Tokens and rows that nothing looks at may be anything.
    assert!(reject(&[9, 0, 9, 0], &[1, 7, 1, 7], &keys).is_ok());
}

#[test]
fn penalties_have_logits() {
    let mut x = [0.0; 6];
    let mut says = |row, token, word: &str| {
        let error = Naive.penalize(&mut x, 3, &[Penalty { row, token, factor: 2.0 }]).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    says(2, 0, "row 2");
    says(0, 3, "token 3");
}
