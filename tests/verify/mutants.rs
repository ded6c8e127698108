//! The check of the law sees every rule and every use of the rules that is not lossless.

use quadriga::backend::Order;
use quadriga::backend::naive::Naive;
use quadriga::bench::ops::Verify;

use super::book::Mutant;
use super::case::{Case, Draft, Law, always, at_length, powered};
use super::{ORDERS, chain, four, siblings, toy};

fn tokens_by(replacement: bool, order: Order) -> Verify {
    Verify::Reject { replacement, order }
}

/// How far the law is off, by the book and where `Naive` does the same.
fn off(what: &str, case: &Case, drafts: &[Draft], by: Verify) -> f64 {
    let laws = [case.by_the_book(drafts, by, Mutant::None), case.on(&Naive, drafts, by)];
    let errors = laws.map(|sums| case.deviation(&sums));
    assert!(errors[0] > 1e-3 && (errors[0] - errors[1]).abs() < 1e-12, "{what} passes: off by {errors:?} only");
    errors[0]
}

fn seen(what: &str, case: &Case, by: Verify) {
    off(what, case, &case.drafts(), by);
}

fn told(case: Case, p: Option<Law>, q: Option<Law>) -> Case {
    let [own_p, own_q] = case.told.clone();
    Case { told: [p.unwrap_or(own_p), q.unwrap_or(own_q)], ..case }
}

#[test]
fn wrong_distributions_are_seen() {
    // Softmax of the logits (2, 1, 0) at temperatures 0.7 and 1.
    let cold = powered(&always([2.0, 1.0, 0.0].map(f64::exp)), 1.0 / 0.7);
    let hot = powered(&cold, 0.7);
    for order in ORDERS {
        let by = tokens_by(false, order);
        // The last token at another temperature: where all drafted ones stand, the law is off by just that.
        let case = told(Case::new(cold.clone(), cold.clone(), &[0, 0]), Some(at_length(&cold, 1, hot.clone())), None);
        seen("a bonus at temperature 1", &case, by);
        let gap: f64 = cold(&[]).iter().zip(hot(&[])).map(|(a, b)| (a - b).abs() / 2.0).sum();
        assert!((gap - 0.1057).abs() < 1e-4, "total variation {gap}");
        let sums = case.by_the_book(&case.drafts(), by, Mutant::None);
        let second = |x: u32| sums.law.iter().filter(|(text, _)| text[1] == x).map(|(_, w)| w).sum::<f64>();
        let found: f64 = (0..).zip(cold(&[])).map(|(x, p)| (second(x) - p).abs() / 2.0).sum();
        assert!((found - gap).abs() < 1e-12, "{found}, not {gap}");

        // The q of other weights, of an updated draft say.
        let [_, q] = toy();
        seen("acceptance by another q", &told(chain(2), None, Some(always([0.6, 0.2, 0.2]))), by);
        // Drawn at a temperature, verified by the q without it.
        let case = Case { draft: powered(&q, 1.0 / 0.7), ..chain(2) };
        seen("temperature in p alone", &case, by);
        // And the same where it is right.
        let case = told(case.clone(), None, Some(case.draft));
        assert!(case.deviation(&case.by_the_book(&case.drafts(), by, Mutant::None)) < 1e-12);
    }
}

#[test]
fn wrong_siblings_are_seen() {
    for order in ORDERS {
        seen("a rejected sibling that stays in q", &four(), tokens_by(true, order));
        let twice = Case { replacement: true, ..four() };
        seen("a rejected sibling that leaves q", &twice, tokens_by(false, order));
        // Of two children that were drawn the likelier one alone.
        let (two, q) = (siblings(2, false), (siblings(2, false).draft)(&[]));
        let likelier = |t: &Vec<u32>| if q[t[1] as usize] > q[t[2] as usize] { t[1] } else { t[2] };
        let drafts: Vec<Draft> = two.drafts().iter().map(|(t, w)| (vec![0, likelier(t)], *w)).collect();
        off("children pruned by their probability", &siblings(1, false), &drafts, tokens_by(false, order));
    }
}

#[test]
fn wrong_rules_are_seen() {
    let error = |case: &Case, order, mutant| {
        case.deviation(&case.by_the_book(&case.drafts(), tokens_by(case.replacement, order), mutant))
    };
    for order in ORDERS {
        for case in [chain(2), siblings(1, false), siblings(2, true)] {
            assert!(error(&case, order, Mutant::DrawsFromTarget) > 1e-3, "p for the residual passes");
        }
        // Where r can be 0, r q <= p accepts what the target never says.
        let zero = Case::new(always([0.0, 0.75, 0.25]), always([0.5, 0.25, 0.25]), &[0, 0]);
        assert!(error(&zero, order, Mutant::Coarse) < 1e-12);
        assert!(error(&zero, order, Mutant::AcceptsEqual) > 1e-3, "r q <= p passes");
    }
}
