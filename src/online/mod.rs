//! The mathematics of online learning, on the host and in f64: what a learner of drafts decides by.
//!
//! [`Meta`] weighs experts by their losses, [`Optimizer`] is the update rules on plain vectors, [`acceptance`] says what a draft
//! that agrees so often with its target is worth.

pub mod acceptance;
mod hedge;
mod optimistic;

pub use hedge::{Meta, Rule, average, tuned_epsilon};
pub use optimistic::{Ball, HintGauge, Method, Optimizer, Settings};
