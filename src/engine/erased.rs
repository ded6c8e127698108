//! The one place where the backend's type is forgotten: a model and a session behind trait objects.

use std::sync::Arc;

use super::speculation::{Draft, Maker, Source, Speculation};
use crate::backend::{Backend, Mask};
use crate::decode::{Autoregressive, Batch, DecodeStats, Decoder, Prompt, Sampler, Session};
use crate::error::{Result, ensure};
use crate::model::{Model, ModelConfig, Want};
use crate::speculative::{Lookup, Mixed, SmallModel, Speculative, heads};

/// How a continuation is made.
#[derive(Clone)]
#[non_exhaustive]
pub enum Decode {
    /// One pass, one token.
    Autoregressive(Sampler),
    /// Several tokens a pass where the draft guesses right; the text is the same.
    Speculative(Sampler, Draft, Speculation),
}

/// A model on some device.
pub(super) trait AnyModel: Send + Sync {
    fn config(&self) -> &ModelConfig;
    fn session(&self, capacity: usize, seed: u64, taps: &[usize]) -> Result<Box<dyn AnySession>>;
    fn draft(&self, source: Source<'_>, name: &str) -> Result<Draft>;
    fn batch(&self, how: &Batch, prompts: &[Prompt], done: Done<'_>) -> Result<DecodeStats>;
    fn weight_bytes(&self) -> usize;
    fn bytes_per_token(&self) -> usize;
}

/// Hears of a prompt of a batch, by its index, and of its new tokens.
pub(super) type Done<'a> = &'a mut dyn FnMut(usize, &[u32]) -> Result<()>;

/// A session on some device, with the decoder that extends it.
pub(super) trait AnySession: Send {
    fn tokens(&self) -> &[u32];
    fn capacity(&self) -> usize;
    fn push(&mut self, tokens: &[u32]);
    fn truncate(&mut self, len: usize);
    fn advance(&mut self) -> Result<u64>;
    fn logits(&mut self) -> Result<&[f32]>;
    fn begin(&mut self, how: &Decode) -> Result<()>;
    fn step(&mut self) -> Result<usize>;
    fn source(&self, i: usize) -> Option<u8>;
    fn stats(&self) -> DecodeStats;
    fn pass(&mut self, tokens: &[u32], mask: Mask<'_>) -> Result<()>;
    fn nll(&mut self, tokens: &[u32], each: &mut dyn FnMut(f64)) -> Result<()>;
}

/// A model shared by its sessions.
pub(super) struct Shared<B: Backend>(pub Arc<Model<B>>);

struct Running<B: Backend> {
    session: Session<B>,
    decoder: How<B>,
}

/// The decoder of a session.
enum How<B: Backend> {
    Plain(Autoregressive),
    Speculative(Box<Speculative<B>>, Draft),
}

impl<B: Backend> How<B> {
    fn decoder(&self) -> &dyn Decoder<B> {
        match self {
            How::Plain(d) => d,
            How::Speculative(d, _) => &**d,
        }
    }
}

impl<B: Backend> Drop for How<B> {
    fn drop(&mut self) {
        if let How::Speculative(decoder, draft) = self {
            decoder.plan().iter().for_each(|plan| draft.learn(plan));
        }
    }
}

impl<B: Backend> AnyModel for Shared<B> {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn session(&self, capacity: usize, seed: u64, taps: &[usize]) -> Result<Box<dyn AnySession>> {
        let session = Session::with_taps(self.0.clone(), capacity, seed, taps)?;
        Ok(Box::new(Running { session, decoder: How::Plain(Autoregressive::default()) }))
    }

    fn draft(&self, source: Source<'_>, name: &str) -> Result<Draft> {
        let maker: Maker<B> = match source {
            Source::Lookup => Box::new(|| Ok(Box::new(Lookup::default()))),
            Source::Model(tensors) => {
                let model = Arc::new(Model::load(self.0.device().clone(), tensors, |_, _| {})?);
                Box::new(move || Ok(Box::new(SmallModel::new(model.clone()))))
            }
            Source::Layers(layers) => {
                let model = Arc::new(self.0.of_layers(layers)?);
                Box::new(move || Ok(Box::new(SmallModel::new(model.clone()))))
            }
            Source::Head(target, head) => {
                let make = heads::load(self.0.clone(), target, head, true)?;
                Box::new(move || Ok(make()))
            }
            Source::Mixed(second) => {
                Box::new(move || Ok(Box::new(Mixed::new(Box::new(Lookup::default()), second.make::<B>()?))))
            }
        };
        Ok(Draft::new(name.into(), maker()?.taps().to_vec(), maker))
    }

    fn batch(&self, how: &Batch, prompts: &[Prompt], done: Done<'_>) -> Result<DecodeStats> {
        how.run(&self.0, prompts, done)
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

    fn begin(&mut self, how: &Decode) -> Result<()> {
        self.decoder = match how {
            Decode::Autoregressive(s) => How::Plain(Autoregressive::new(*s)),
            Decode::Speculative(s, draft, how) => {
                let (reads, has) = (draft.taps(), self.session.workspace().taps().collect::<Vec<_>>());
                ensure!(
                    reads.is_empty() || reads == has,
                    Usage,
                    "the draft {} reads layers {reads:?}, this session keeps {has:?}: make it with Engine::session_for",
                    draft.name()
                );
                let speculative = Speculative::new(draft.make()?, *s, how.budget());
                let speculative = match how.planned() {
                    true => speculative.planned(draft.plan(self.session.model())?),
                    false => speculative,
                };
                How::Speculative(Box::new(speculative), draft.clone())
            }
        };
        Ok(())
    }

    fn step(&mut self) -> Result<usize> {
        match &mut self.decoder {
            How::Plain(d) => d.step(&mut self.session),
            How::Speculative(d, _) => d.step(&mut self.session),
        }
    }

    fn source(&self, i: usize) -> Option<u8> {
        self.decoder.decoder().source(i)
    }

    fn stats(&self) -> DecodeStats {
        self.decoder.decoder().stats()
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
