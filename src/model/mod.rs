//! The decoder: configuration, weights, cache, the forward pass, and its backward.

mod adapters;
mod backward;
pub mod config;
pub mod forward;
mod full;
pub mod kv;
pub mod lora;
mod merge;
pub mod roles;
mod saved;
mod training;
pub mod weights;
pub mod workspace;

pub use adapters::AdapterMap;
pub use config::ModelConfig;
pub use forward::{Sequence, Tap, Want};
pub use full::{Full, Trained};
pub use kv::KvCache;
pub use lora::{Adapter, Param, Place};
pub use saved::{Pass, Recompute, Saved};
pub use training::{Head, Term};
pub use weights::{Model, Weights};
pub use workspace::Workspace;
