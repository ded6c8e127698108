//! Diffusion decoding: the scheduler's published traces, its invariants, and models under every cache.

#[path = "../common/mod.rs"]
mod common;
mod golden;
mod invariants;
mod joint;
mod models;
mod script;
mod traces;
mod training;
