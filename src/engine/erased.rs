//! The one place where the backend's type is forgotten: a model and a session behind trait objects.

use std::sync::Arc;

use crate::backend::{Backend, Mask};
use crate::decode::{Autoregressive, DecodeStats, Decoder, Sampler, Session};
use crate::error::Result;
use crate::model::{Model, ModelConfig, Want};

/// How a continuation is made.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Decode {
    /// One pass, one token.
    Autoregressive(Sampler),
}

/// A model on some device.
pub(super) trait AnyModel: Send + Sync {
    fn config(&self) -> &ModelConfig;
    fn session(&self, capacity: usize, seed: u64) -> Result<Box<dyn AnySession>>;
    fn weight_bytes(&self) -> usize;
    fn bytes_per_token(&self) -> usize;
}

/// A session on some device, with the decoder that extends it.
pub(super) trait AnySession: Send {
    fn tokens(&self) -> &[u32];
    fn capacity(&self) -> usize;
    fn push(&mut self, tokens: &[u32]);
    fn truncate(&mut self, len: usize);
    fn advance(&mut self) -> Result<u64>;
    fn logits(&mut self) -> Result<&[f32]>;
    fn begin(&mut self, how: &Decode);
    fn step(&mut self) -> Result<usize>;
    fn stats(&self) -> DecodeStats;
    fn pass(&mut self, tokens: &[u32], mask: Mask<'_>) -> Result<()>;
    fn nll(&mut self, tokens: &[u32], each: &mut dyn FnMut(f64)) -> Result<()>;
}

/// A model shared by its sessions.
pub(super) struct Shared<B: Backend>(pub Arc<Model<B>>);

struct Running<B: Backend> {
    session: Session<B>,
    decoder: Box<dyn Decoder<B>>,
}

impl<B: Backend> AnyModel for Shared<B> {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn session(&self, capacity: usize, seed: u64) -> Result<Box<dyn AnySession>> {
        let session = Session::new(self.0.clone(), capacity, seed)?;
        Ok(Box::new(Running { session, decoder: Box::new(Autoregressive::default()) }))
    }

    fn weight_bytes(&self) -> usize {
        self.0.weight_bytes()
    }

    fn bytes_per_token(&self) -> usize {
        self.0.bytes_per_token()
    }
}

impl<B: Backend> AnySession for Running<B> {
    fn tokens(&self) -> &[u32] {
        self.session.tokens()
    }

    fn capacity(&self) -> usize {
        self.session.capacity()
    }

    fn push(&mut self, tokens: &[u32]) {
        self.session.push(tokens);
    }

    fn truncate(&mut self, len: usize) {
        self.session.truncate(len);
    }

    fn advance(&mut self) -> Result<u64> {
        let passes = self.session.advance()?;
        self.session.wait()?;
        Ok(passes)
    }

    fn logits(&mut self) -> Result<&[f32]> {
        self.session.logits()
    }

    fn begin(&mut self, how: &Decode) {
        self.decoder = match how {
            Decode::Autoregressive(s) => Box::new(Autoregressive::new(*s)),
        };
    }

    fn step(&mut self) -> Result<usize> {
        self.decoder.step(&mut self.session)
    }

    fn stats(&self) -> DecodeStats {
        self.decoder.stats()
    }

    fn pass(&mut self, tokens: &[u32], mask: Mask<'_>) -> Result<()> {
        self.session.stage(tokens, mask, Want::All)?;
        self.session.commit(&[])?;
        self.session.wait()
    }

    fn nll(&mut self, tokens: &[u32], each: &mut dyn FnMut(f64)) -> Result<()> {
        self.session.nll(tokens, each)
    }
}
