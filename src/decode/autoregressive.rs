//! The baseline decoder: one pass, one token.

use super::{DecodeStats, Decoder, Sampler, Session};
use crate::backend::Backend;
use crate::error::Result;

/// Samples the next token from the model's own distribution, again and again.
#[derive(Clone, Debug, Default)]
pub struct Autoregressive {
    sampler: Sampler,
    stats: DecodeStats,
}

impl Autoregressive {
    /// Draws by `sampler`.
    pub fn new(sampler: Sampler) -> Self {
        Self { sampler, stats: DecodeStats::default() }
    }
}

impl<B: Backend> Decoder<B> for Autoregressive {
    fn step(&mut self, s: &mut Session<B>) -> Result<usize> {
        self.stats.forwards += s.advance()?;
        let token = s.sample(&self.sampler)?;
        s.push(&[token]);
        self.stats.tokens += 1;
        Ok(1)
    }

    fn stats(&self) -> DecodeStats {
        self.stats
    }
}
