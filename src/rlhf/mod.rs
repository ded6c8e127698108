//! Learning what is preferred, online.

pub mod judge;
