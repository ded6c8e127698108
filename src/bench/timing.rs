//! How long a call takes.

use crate::error::Result;

/// Seconds of one call, from `samples` batches that each last `batch_s` seconds or a call, whichever is longer. `batch` makes so
/// many calls and gives the seconds of one; a call finds one of `copies` copies of its inputs, in turn.
pub(super) fn time(
    samples: usize,
    batch_s: f64,
    copies: usize,
    mut batch: impl FnMut(usize) -> Result<f64>,
) -> Result<Vec<f64>> {
    // The first call warms the machine, the next tell how many make a batch.
    batch(1)?;
    let one = batch(3)?.max(1e-9);
    let calls = (batch_s / one).ceil().clamp(1.0, 1e6) as usize;
    // Whole turns over the copies, where that is not too long: every batch is the same, so that a GPU gets all but the first
    // two as graphs, and the host's launches are not what is timed.
    let whole = calls.next_multiple_of(copies);
    let calls = if whole as f64 * one <= 8.0 * batch_s { whole } else { calls };
    batch(calls)?;
    batch(calls)?;
    (0..samples).map(|_| batch(calls)).collect()
}
