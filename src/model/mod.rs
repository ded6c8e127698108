//! The decoder: configuration, weights, cache and forward pass.

pub mod config;
