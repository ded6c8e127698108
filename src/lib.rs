//! quadriga: a from-scratch LLM engine. Hand-written kernels drive a minimal transformer runtime, without an ML framework.
//!
//! Start at [`engine`] to run models, at [`backend::Backend`] for the operations and their mathematics, at [`model`] for the
//! decoder and its cache. `docs/architecture.md` has the rules that hold everywhere.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../docs/serving.md")]
struct Serving;

pub mod backend;
pub mod bench;
pub mod cli;
pub mod continual;
pub mod decode;
pub mod diffusion;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod files;
pub mod format;
pub mod model;
pub mod online;
pub mod perf;
pub mod rlhf;
pub mod rng;
pub mod speculative;
pub mod tensor;
pub mod train;
pub mod vision;

pub use error::{Error, ErrorKind, Result};
