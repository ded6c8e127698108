//! Continual learning against closed forms, planted structure, and a model small enough to learn a stream in a test.

mod language;
mod search;
mod toy;
mod trees;
