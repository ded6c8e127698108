//! Continual learning against closed forms, planted structure, and a model small enough to learn a stream in a test.

#[path = "../common/mod.rs"]
mod common;
mod language;
mod pictures;
mod search;
mod toy;
mod trees;
