//! Turning logits into text: sessions, samplers, the decoder trait and the autoregressive baseline.

pub mod autoregressive;
pub mod batch;
pub mod sampler;
pub mod session;
pub mod text;
pub mod together;

pub use autoregressive::Autoregressive;
pub use batch::{Batch, Prompt};
pub use sampler::Sampler;
pub use session::Session;
pub use text::TextStream;
pub use together::Together;

use crate::backend::Backend;
use crate::error::Result;

/// What decoders count, for `--json` and for the line behind every generation. Times are seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodeStats {
    /// Passes of the target model.
    pub forwards: u64,
    /// Tokens emitted.
    pub tokens: u64,
    /// Passes that verified drafted tokens.
    pub verifications: u64,
    /// Tokens that these gave: accepted ones, and the target's own behind them.
    pub verified: u64,
    /// Tokens that were drafted.
    pub drafted: u64,
    /// Time in draft passes.
    pub draft_s: f64,
    /// Time in verifying passes.
    pub verify_s: f64,
    /// Time in keeping what was accepted.
    pub commit_s: f64,
    /// Time in draft updates.
    pub update_s: f64,
}

impl DecodeStats {
    /// Tokens per pass of the target model.
    pub fn tokens_per_forward(&self) -> f64 {
        self.tokens as f64 / (self.forwards.max(1)) as f64
    }

    /// Mean tokens per verification, 1 where there was none.
    pub fn accept_length(&self) -> f64 {
        if self.verifications == 0 { 1.0 } else { self.verified as f64 / self.verifications as f64 }
    }
}

/// Extends a session, one step at a time.
pub trait Decoder<B: Backend>: Send {
    /// One step: appends at least one token to the session and says how many.
    ///
    /// # Errors
    /// A full context, logits that are not finite, a device that failed. The session's committed part stays valid.
    fn step(&mut self, session: &mut Session<B>) -> Result<usize>;

    /// Which of a draft's sources proposed token `i` of the last step; `None` is the model itself.
    fn source(&self, _i: usize) -> Option<u8> {
        None
    }

    /// Counts so far.
    fn stats(&self) -> DecodeStats;
}
