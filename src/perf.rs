//! What an operation costs and what the machine could do: every reported speed stands beside its roof.

use std::ops::Add;

/// Work of one call: bytes that must move through memory at least once, and floating-point (or integer) operations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Bytes read and written, each once.
    pub bytes: f64,
    /// Operations; a multiply-add counts as two.
    pub flops: f64,
}

impl Add for Cost {
    type Output = Cost;
    fn add(self, o: Cost) -> Cost {
        Cost { bytes: self.bytes + o.bytes, flops: self.flops + o.flops }
    }
}

/// What the machine was measured to reach, with the same threads.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// Memory read bandwidth, bytes per second.
    pub bytes_per_s: f64,
    /// Arithmetic peak of the type in question, operations per second.
    pub flops_per_s: f64,
}

impl Peaks {
    /// The least time `cost` can take, in seconds, and whether memory is what bounds it.
    pub fn floor(&self, cost: Cost) -> (f64, bool) {
        let (m, c) = (cost.bytes / self.bytes_per_s, cost.flops / self.flops_per_s);
        (m.max(c), m >= c)
    }
}
