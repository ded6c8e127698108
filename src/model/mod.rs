//! The decoder: configuration, weights, cache and forward pass.

pub mod config;
pub mod forward;
pub mod kv;
pub mod roles;
pub mod weights;
pub mod workspace;

pub use config::ModelConfig;
pub use forward::{Sequence, Tap, Want};
pub use kv::KvCache;
pub use weights::{Model, Weights};
pub use workspace::Workspace;
