//! Verification of drafted trees on every backend: the law of what it emits, by exact enumeration of drafts and decisions; the same
//! check on rules that are wrong; and whole rounds of speculation against plain decoding.

mod book;
mod case;
#[path = "../common/mod.rs"]
mod common;
mod edges;
mod mutants;
mod processed;
mod rounds;

use book::Mutant;
use case::{Case, Law, Sums, always, bigram};
use common::cpus;
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Order};
use quadriga::bench::ops::Verify;

const ORDERS: [Order; 2] = [Order::RootFirst, Order::LeavesFirst];

/// That what comes out, by the book and on a backend, is the target's.
fn check<B: Backend>(what: &str, case: &Case, by: Verify, be: &B) -> Sums {
    let drafts = case.drafts();
    let sums = case.on(be, &drafts, by);
    for (whose, sums) in [("the book's", &case.by_the_book(&drafts, by, Mutant::None)), ("the backend's", &sums)] {
        let error = case.deviation(sums);
        assert!(error < 1e-12, "{what}, {by:?}: {whose} law is off by {error:.1e}");
    }
    sums
}

/// In a language of three tokens, that knows the one before. The root is token 0.
fn toy() -> [Law; 2] {
    [
        bigram(&[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [0.5, 0.3, 0.2]]),
        bigram(&[[0.4, 0.4, 0.2], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5], [0.4, 0.4, 0.2]]),
    ]
}

/// Drafted tokens one behind the other.
fn chain(n: u32) -> Case {
    let [target, draft] = toy();
    Case::new(target, draft, &[vec![0], (0..n).collect()].concat())
}

/// Children of the root.
fn siblings(n: usize, replacement: bool) -> Case {
    Case { replacement, ..Case::new(always([0.5, 0.3, 0.2]), always([0.2, 0.5, 0.3]), &vec![0; n + 1]) }
}

/// Two siblings in a language of four tokens, of which several are rejected by parts.
fn four() -> Case {
    Case::new(always([0.4, 0.3, 0.2, 0.1]), always([0.1, 0.2, 0.3, 0.4]), &[0; 3])
}

/// Siblings at two depths.
fn bush() -> Case {
    Case::new(
        always([0.6, 0.1, 0.3]),
        bigram(&[[0.2, 0.5, 0.3], [0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [0.3, 0.5, 0.2]]),
        &[0, 0, 0, 1, 1],
    )
}

/// Paths of one, two and three tokens, of two that there are.
fn deep() -> Case {
    let target = bigram(&[[0.3, 0.7], [0.8, 0.2], [0.45, 0.55]]);
    Case::new(target, bigram(&[[0.6, 0.4], [0.5, 0.5], [0.7, 0.3]]), &[0, 0, 1, 2, 1, 0])
}

/// Children that are fixed beforehand.
fn fixed(target: Law, parents: &[u32], tokens: &[u32]) -> Case {
    Case { fixed: Some(tokens.to_vec()), ..Case::new(target.clone(), target, parents) }
}

fn laws_are_the_targets<B: Backend>(be: &B) {
    let near = |what: &str, got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{what}: {got}, not {want}");
    for replacement in [false, true] {
        let by = |order| Verify::Reject { replacement, order };
        let either = |what: &str, case: Case| {
            let [tokens, sequences] = ORDERS.map(|order| check(what, &case, by(order), be));
            // Whole sequences keep at least as much as their tokens one by one.
            assert!(sequences.mean > tokens.mean - 1e-12, "{what}: {} tokens, not {}", sequences.mean, tokens.mean);
            [tokens, sequences]
        };
        let chains = either("chain", chain(2));
        near("tokens of a chain", chains[0].mean, 2.72);
        // 1 + .9 + sum q(x) q(y|x) min(1, min(1, p(x) / q(x)) p(y|x) / q(y|x)), and that is .36 + .3 + .19.
        near("tokens of a chain as a whole", chains[1].mean, 2.75);
        for (n, with, without) in [(1, 0.7, 0.7), (2, 0.76, 0.808571), (3, 0.808, 1.0)] {
            for sums in either("siblings", siblings(n, replacement)) {
                near("one of the siblings", sums.any, if replacement { with } else { without });
            }
        }
        either("four tokens", Case { replacement, ..four() });
        either("two depths", Case { replacement, ..bush() });
        let paths = either("paths", Case { replacement, ..deep() });
        assert!(paths[1].mean > paths[0].mean + 0.01, "{} and {} tokens", paths[0].mean, paths[1].mean);
        either("no room for the second token", Case { stride: 2, ..chain(2) });
        // A draft that is the target: every token stands.
        let [target, _] = toy();
        for sums in either("own draft", Case::new(target.clone(), target, &[0, 0, 1])) {
            near("tokens of the target's own draft", sums.mean, 3.0);
        }
        // A draft that only says what the target never does: none stands, and the law is still the target's.
        for sums in either("wrong draft", Case::new(always([0.0, 0.7, 0.3]), always([1.0, 0.0, 0.0]), &[0, 0])) {
            near("tokens of a draft that is never right", sums.mean, 1.0);
        }
    }
    let tree = fixed(toy()[0].clone(), &[0, 0, 0, 1, 1, 2], &[0, 0, 1, 0, 1, 1]);
    near("tokens of a fixed tree", check("fixed tree", &tree, Verify::Match, be).mean, 2.38);
    for (n, want) in [(1, 0.3), (2, 0.5), (3, 1.0)] {
        let case = fixed(always([0.5, 0.3, 0.2]), &[0; 4][..n + 1], &[0, 1, 2, 0][..n + 1]);
        near("one of the fixed children", check("fixed children", &case, Verify::Match, be).any, want);
    }
}

#[test]
fn naive_emits_the_targets_law() {
    laws_are_the_targets(&Naive);
}

#[test]
fn cpu_emits_the_targets_law() {
    cpus().for_each(|cpu| laws_are_the_targets(&cpu));
}

#[test]
fn cuda_emits_the_targets_law() {
    if let Some(cuda) = common::gpu() {
        laws_are_the_targets(&cuda);
    }
}
