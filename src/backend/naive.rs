//! The specification: every op in f64 loops.
