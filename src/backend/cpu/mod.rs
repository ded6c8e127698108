//! The native CPU backend.

pub mod pool;
