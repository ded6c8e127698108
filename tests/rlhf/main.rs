//! The mathematics of online RLHF against the figures of its specification: small exact examples, numerics, and simulations.

mod baselines;
mod choices;
mod deployment;
mod exact;
mod numerics;
mod passive;
mod properties;
mod worlds;

use quadriga::rlhf::{Host, Inverse, OnePass, Rule, Settings};

/// Digits as printed, each within `bound`.
#[track_caller]
fn near(got: &[f64], want: &[f64], bound: f64) {
    let ok = got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() <= bound);
    assert!(ok, "{got:?}, not {want:?}");
}

fn settings(rule: Rule, eta: f64, lambda: f64) -> Settings {
    Settings { rule, eta, lambda, ..Settings::default() }
}

fn explicit(eta: f64, lambda: f64) -> Settings {
    settings(Rule::Explicit, eta, lambda)
}

/// A learner in a given state: P symmetric, `[d, d]`.
fn standing(theta: &[f64], p: &[f64]) -> OnePass {
    let mut state = OnePass::new(theta.len(), explicit(1.0, 1.0)).unwrap().state().unwrap();
    (state.theta, state.inverse) = (theta.to_vec(), p.to_vec());
    OnePass::restore(state, None).unwrap()
}

fn host(p: &[f64]) -> Host<f64> {
    let mut inverse = Host::new(p.len().isqrt());
    inverse.write(p).unwrap();
    inverse
}
