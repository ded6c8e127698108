//! Temperature, top-k, top-p, min-p and penalties, the same for what is accepted, for residuals and for the last token: on the
//! backend from logits on, by exact enumeration.

use quadriga::backend::Backend;
use quadriga::backend::naive::Naive;
use quadriga::bench::ops::Verify;
use quadriga::decode::Sampler;

use super::book::Mutant;
use super::case::{Case, Logits, at_length};
use super::{ORDERS, check, common};

fn rows(seed: u64) -> Vec<Vec<f32>> {
    let mut rng = quadriga::rng::Rng::new(seed);
    (0..4).map(|_| (0..4).map(|_| 1.5 * rng.normal()).collect()).collect()
}

/// A tree of two paths under samplers of everything. Penalties follow each node's own path.
fn case() -> Case {
    let p = Sampler { temperature: 0.8, top_k: 3, top_p: 0.97, min_p: 0.05, repeat_penalty: 1.5 };
    let q = Sampler { temperature: 1.3, top_k: 0, top_p: 0.99, min_p: 0.02, repeat_penalty: 1.2 };
    let logits = [Logits { rows: rows(3), sampler: p }, Logits { rows: rows(4), sampler: q }];
    let [p, q] = logits.each_ref().map(|l| l.law(|text| text.to_vec()));
    Case { logits: Some(logits), ..Case::new(p, q, &[0, 0, 1, 0]) }
}

fn everything_is_processed_alike<B: Backend>(be: &B) {
    for order in ORDERS {
        let sums = check("processed", &case(), Verify::Reject { replacement: false, order }, be);
        assert!((1.2..2.9).contains(&sums.mean), "{} tokens", sums.mean);
    }
}

#[test]
fn naive_processes_everything_alike() {
    everything_is_processed_alike(&Naive);
}

#[test]
fn cpu_processes_everything_alike() {
    common::cpus().for_each(|cpu| everything_is_processed_alike(&cpu));
}

#[test]
fn cuda_processes_everything_alike() {
    if let Some(cuda) = common::gpu() {
        everything_is_processed_alike(&cuda);
    }
}

#[test]
fn what_is_processed_otherwise_is_seen() {
    let case = case();
    let [p, q] = case.logits.clone().unwrap();
    let plain = Logits { sampler: Sampler { top_k: 0, top_p: 1.0, min_p: 0.0, ..p.sampler }, ..p.clone() };
    let own = |text: &[u32]| text.to_vec();
    for (what, told) in [
        ("one penalty for the whole tree", [p.law(|_| Vec::new()), case.draft.clone()]),
        ("a penalty of the draft for the whole tree", [case.target.clone(), q.law(|_| Vec::new())]),
        ("a last token without filters", [at_length(&case.target, 2, plain.law(own)), case.draft.clone()]),
        ("acceptance without filters", [at_length(&case.target, 0, plain.law(own)), case.draft.clone()]),
    ] {
        for order in ORDERS {
            let case = Case { told: told.clone(), ..case.clone() };
            let by = Verify::Reject { replacement: false, order };
            let error = case.deviation(&case.by_the_book(&case.drafts(), by, Mutant::None));
            assert!(error > 1e-3, "{what} passes: off by {error:.1e} only");
        }
    }
}
