//! quadriga: a from-scratch LLM engine. Hand-written kernels drive a minimal transformer runtime, without an ML framework.

pub mod backend;
pub mod bench;
pub mod cli;
pub mod decode;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod format;
pub mod model;
pub mod perf;
pub mod rng;
pub mod tensor;

pub use error::{Error, ErrorKind, Result};
