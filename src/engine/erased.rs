//! The one place where the backend's type is forgotten: a model and a session behind trait objects.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use super::adapters::{self, Adapters, Erased};
use super::align::{self, rollouts::Rollouts};
use super::learning;
use super::serving::{AnySlots, Slots};
use super::speculation::{Draft, Maker, Source, Speculation};
use super::steps::{Steps, blank_line};
use crate::backend::{Backend, Mask, Train};
use crate::decode::{Autoregressive, Batch, DecodeStats, Decoder, Prompt, Sampler, Session};
use crate::error::{Result, ensure};
use crate::model::lora::ModuleValues;
use crate::model::roles::TensorSource;
use crate::model::{Model, ModelConfig, Want};
use crate::rlhf::{self, FeatureSpec, Precision, Tokens};
use crate::speculative::adapt::Live;
use crate::speculative::steps::{Preference, StepChain, StepCounts, StepDecoder, StepSettings};
use crate::speculative::{Lookup, Memory, Mixed, SmallModel, Speculative, heads};

/// How a continuation is made.
#[derive(Clone)]
#[non_exhaustive]
pub enum Decode {
    /// One pass, one token.
    Autoregressive(Sampler),
    /// Several tokens a pass where the draft guesses right; the text is the same.
    Speculative(Sampler, Draft, Speculation),
    /// Whole steps of a draft where a judge lets them stand: **not** the same text.
    Steps(Sampler, Steps),
}

/// A model on some device.
pub(super) trait AnyModel: Send + Sync {
    fn config(&self) -> &ModelConfig;
    fn session(&self, capacity: usize, seed: u64, taps: &[usize]) -> Result<Box<dyn AnySession>>;
    fn draft(&self, source: Source<'_>, name: &str) -> Result<Draft>;
    /// Another model on the same device: an `Arc<Model<B>>`.
    fn load(&self, source: &dyn TensorSource) -> Result<Box<dyn Any + Send + Sync>>;
    fn batch(&self, how: &Batch, prompts: &[Prompt], done: Done<'_>) -> Result<DecodeStats>;
    fn diffuse(&self, texts: &mut [crate::diffusion::Schedule], on: crate::diffusion::OnPass<'_>) -> Result<()>;
    fn serving(&self, sequences: usize, rows: usize, taps: &[usize]) -> Result<Box<dyn AnySlots>>;
    /// What a router of tasks sees of a prompt.
    fn features(&self, prompt: &[u32], layer: usize) -> Result<Vec<f32>>;
    /// An `Arc<Adapter<B>>`.
    fn adapter(&self, modules: &[ModuleValues]) -> Result<Erased>;
    /// Bytes of it on the device.
    fn adapter_bytes(&self, modules: &[ModuleValues]) -> usize;
    /// An `Arc<AdapterMap<B>>`.
    fn adapter_map(&self, parts: &[(Range<usize>, Erased)]) -> Result<Erased>;
    /// An `Arc<Adapter<B>>`: the weighted sum.
    fn mix_adapters(&self, parts: &[(Erased, f32)]) -> Result<Erased>;
    /// What makes features of answers, for a prompt and an answer of up to so many tokens.
    fn extractor(&self, spec: FeatureSpec, capacity: usize) -> Result<Box<dyn AnyExtractor>>;
    fn rollouts(&self, job: &Rollouts<'_>, done: align::rollouts::Done<'_>) -> Result<DecodeStats>;
    /// A `[width, width]` matrix for a one-pass reward.
    fn inverse(&self, width: usize, precision: Precision) -> Result<Box<dyn rlhf::Inverse>>;
    fn weight_bytes(&self) -> usize;
    fn bytes_per_token(&self) -> usize;
}

/// [`rlhf::Extractor`] on some device.
pub(super) trait AnyExtractor: Send {
    fn of(&mut self, prompt: &[u32], answers: &[Tokens]) -> Result<Vec<Vec<f32>>>;
}

impl<B: Train> AnyExtractor for rlhf::Extractor<B> {
    fn of(&mut self, prompt: &[u32], answers: &[Tokens]) -> Result<Vec<Vec<f32>>> {
        rlhf::Extractor::of(self, prompt, answers)
    }
}

/// Hears of a prompt of a batch, by its index, and of its new tokens.
pub(super) type Done<'a> = &'a mut dyn FnMut(usize, &[u32]) -> Result<()>;

/// A session on some device, with the decoder that extends it.
pub(super) trait AnySession: Send {
    fn tokens(&self) -> &[u32];
    fn capacity(&self) -> usize;
    fn push(&mut self, tokens: &[u32]);
    fn truncate(&mut self, len: usize);
    fn adapt(&mut self, adapters: Option<&Adapters>) -> Result<()>;
    fn advance(&mut self) -> Result<u64>;
    fn logits(&mut self) -> Result<&[f32]>;
    fn begin(&mut self, how: &Decode) -> Result<()>;
    fn step(&mut self) -> Result<usize>;
    /// The continuation is over; said by itself of one that is abandoned.
    fn finish(&mut self);
    fn source(&self, i: usize) -> Option<u8>;
    fn stats(&self) -> DecodeStats;
    fn steps(&mut self) -> Option<(StepCounts, Vec<Preference>)>;
    fn pass(&mut self, tokens: &[u32], mask: Mask<'_>) -> Result<()>;
    fn nll(&mut self, tokens: &[u32], each: &mut dyn FnMut(f64)) -> Result<()>;
}

fn lookup(memory: Option<&Arc<Memory>>) -> Lookup {
    memory.map_or_else(Lookup::default, |m| Lookup::with_memory(m.clone()))
}

/// A decoder for a session that keeps what the draft reads.
pub(super) fn speculative<B: Train>(
    session: &Session<B>,
    sampler: Sampler,
    draft: &Draft,
    how: Speculation,
) -> Result<Speculative<B>> {
    let (reads, has) = (draft.taps(), session.workspace().taps().collect::<Vec<_>>());
    ensure!(
        reads.is_empty() || reads == has,
        Usage,
        "the draft {} reads layers {reads:?}, this session keeps {has:?}: make it with Engine::session_for",
        draft.name()
    );
    let decoder = Speculative::new(draft.make()?, sampler, how.budget());
    let decoder = match how.planned() {
        true => decoder.planned(draft.plan(session.model())?),
        false => decoder,
    };
    Ok(match draft.learner() {
        Some(learner) => decoder.taught(learning::ear(learner, session.model())?),
        None => decoder,
    })
}

/// A model shared by its sessions.
pub(super) struct Shared<B: Backend>(pub Arc<Model<B>>);

struct Running<B: Backend> {
    session: Session<B>,
    decoder: How<B>,
    /// Whether the decoder was told that its continuation is over.
    over: bool,
}

impl<B: Backend> Running<B> {
    fn finish(&mut self) {
        if let (false, How::Speculative(decoder, draft)) = (self.over, &mut self.decoder) {
            decoder.finish(&self.session);
            decoder.plan().iter().for_each(|plan| draft.learn(plan));
        }
        self.over = true;
    }
}

impl<B: Backend> Drop for Running<B> {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The decoder of a session.
enum How<B: Backend> {
    Plain(Autoregressive),
    Speculative(Box<Speculative<B>>, Draft),
    Steps(Box<StepDecoder<B>>),
}

impl<B: Backend> How<B> {
    fn decoder(&self) -> &dyn Decoder<B> {
        match self {
            How::Plain(d) => d,
            How::Speculative(d, _) => &**d,
            How::Steps(d) => &**d,
        }
    }
}

impl<B: Train> AnyModel for Shared<B> {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn session(&self, capacity: usize, seed: u64, taps: &[usize]) -> Result<Box<dyn AnySession>> {
        let session = Session::with_taps(self.0.clone(), capacity, seed, taps)?;
        Ok(Box::new(Running { session, decoder: How::Plain(Autoregressive::default()), over: true }))
    }

    fn draft(&self, source: Source<'_>, name: &str) -> Result<Draft> {
        let (mut learner, mut remembers) = (None, None);
        let maker: Maker<B> = match source {
            Source::LearningHead(target, head, how) => {
                let (slot, taught) = learning::head(self.0.clone(), target, head, how)?;
                learner = Some(taught);
                Box::new(move || Ok(Box::new(Live::new(slot.clone()))))
            }
            Source::LearningModel(tensors, how) => {
                let small = Model::load(self.0.device().clone(), tensors, |_, _| {})?;
                let (slot, taught) = learning::small_model(self.0.clone(), small, how)?;
                learner = Some(taught);
                Box::new(move || Ok(Box::new(Live::new(slot.clone()))))
            }
            Source::Lookup(memory) => Box::new(move || Ok(Box::new(lookup(memory.as_ref())))),
            Source::Model(tensors) => {
                let model = Arc::new(Model::load(self.0.device().clone(), tensors, |_, _| {})?);
                Box::new(move || Ok(Box::new(SmallModel::new(model.clone()))))
            }
            Source::Steps(tensors, tokenizer, eos) => {
                let model = Arc::new(Model::load(self.0.device().clone(), tensors, |_, _| {})?);
                let (tokenizer, eos, most) = (tokenizer.clone(), eos.to_vec(), StepSettings::default().max_tokens);
                Box::new(move || {
                    let ends = blank_line(tokenizer.clone(), eos.clone());
                    Ok(Box::new(StepChain::new(model.clone(), Sampler::greedy(), most, ends)))
                })
            }
            Source::Layers(layers) => {
                let model = Arc::new(self.0.of_layers(layers)?);
                Box::new(move || Ok(Box::new(SmallModel::new(model.clone()))))
            }
            Source::Head(target, head) => {
                let make = heads::load(self.0.clone(), target, head, true)?;
                Box::new(move || Ok(make()))
            }
            Source::Mixed(memory, second) => {
                remembers = memory.clone();
                learner = second.learner().cloned();
                let first = move || Box::new(lookup(memory.as_ref()));
                Box::new(move || Ok(Box::new(Mixed::new(first(), second.make::<B>()?))))
            }
        };
        Ok(Draft::new(name.into(), maker()?.taps().to_vec(), maker, learner, remembers))
    }

    fn load(&self, source: &dyn TensorSource) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(Arc::new(Model::load(self.0.device().clone(), source, |_, _| {})?)))
    }

    fn diffuse(&self, texts: &mut [crate::diffusion::Schedule], on: crate::diffusion::OnPass<'_>) -> Result<()> {
        super::diffusion::run(&self.0, texts, on)
    }

    fn batch(&self, how: &Batch, prompts: &[Prompt], done: Done<'_>) -> Result<DecodeStats> {
        how.run(&self.0, prompts, done)
    }

    fn serving(&self, sequences: usize, rows: usize, taps: &[usize]) -> Result<Box<dyn AnySlots>> {
        Ok(Box::new(Slots::new(self.0.clone(), sequences, rows, taps)?))
    }

    fn features(&self, prompt: &[u32], layer: usize) -> Result<Vec<f32>> {
        super::routed::features(&self.0, prompt, layer)
    }

    fn adapter(&self, modules: &[ModuleValues]) -> Result<Erased> {
        adapters::upload(&self.0, modules)
    }

    fn adapter_bytes(&self, modules: &[ModuleValues]) -> usize {
        modules.iter().map(|m| m.a.len() + m.b.len()).sum::<usize>() * size_of::<B::Acc>()
    }

    fn adapter_map(&self, parts: &[(Range<usize>, Erased)]) -> Result<Erased> {
        adapters::of_ranges(&self.0, parts)
    }

    fn mix_adapters(&self, parts: &[(Erased, f32)]) -> Result<Erased> {
        adapters::mix(&self.0, parts)
    }

    fn extractor(&self, spec: FeatureSpec, capacity: usize) -> Result<Box<dyn AnyExtractor>> {
        Ok(Box::new(rlhf::Extractor::new(self.0.clone(), spec, capacity)?))
    }

    fn rollouts(&self, job: &Rollouts<'_>, done: align::rollouts::Done<'_>) -> Result<DecodeStats> {
        job.run(&self.0, done)
    }

    fn inverse(&self, width: usize, precision: Precision) -> Result<Box<dyn rlhf::Inverse>> {
        rlhf::on_device(self.0.device().clone(), width, precision)
    }

    fn weight_bytes(&self) -> usize {
        self.0.weight_bytes()
    }

    fn bytes_per_token(&self) -> usize {
        self.0.bytes_per_token()
    }
}

impl<B: Train> AnySession for Running<B> {
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

    fn adapt(&mut self, adapters: Option<&Adapters>) -> Result<()> {
        self.session.set_adapters(adapters.map(Adapters::map).transpose()?);
        Ok(())
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
        self.finish();
        self.decoder = match how {
            Decode::Autoregressive(s) => How::Plain(Autoregressive::new(*s)),
            Decode::Steps(s, steps) => How::Steps(Box::new(steps.decoder(self.session.model(), *s)?)),
            Decode::Speculative(s, draft, how) => {
                let decoder = speculative(&self.session, *s, draft, *how)?;
                How::Speculative(Box::new(decoder), draft.clone())
            }
        };
        self.over = false;
        Ok(())
    }

    fn step(&mut self) -> Result<usize> {
        match &mut self.decoder {
            How::Plain(d) => d.step(&mut self.session),
            How::Speculative(d, _) => d.step(&mut self.session),
            How::Steps(d) => d.step(&mut self.session),
        }
    }

    fn finish(&mut self) {
        Running::finish(self);
    }

    fn source(&self, i: usize) -> Option<u8> {
        self.decoder.decoder().source(i)
    }

    fn stats(&self) -> DecodeStats {
        self.decoder.decoder().stats()
    }

    fn steps(&mut self) -> Option<(StepCounts, Vec<Preference>)> {
        match &mut self.decoder {
            How::Steps(d) => Some((d.counts(), d.preferences().take())),
            _ => None,
        }
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
