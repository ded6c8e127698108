//! [`Serving`]: many requests at a time, one pass for all of them.

use std::collections::VecDeque;
use std::sync::Arc;

use super::erased::{Decode, speculative};
use super::session::{Pieces, check, without};
use super::{Adapters, Draft, Engine, Finish, Generate, Piece};
use crate::backend::Train;
use crate::decode::{DecodeStats, Decoder, Session};
use crate::error::{Result, bail, ensure};
use crate::model::Model;
use crate::speculative::{Speculative, SpeculativeBatch};

/// How much is served at a time. Built by chaining.
#[derive(Clone, Copy, Debug)]
pub struct ServingOptions {
    sequences: usize,
    rows: usize,
    context: usize,
}

impl Default for ServingOptions {
    /// Eight sequences, passes of 128 rows, the model's context.
    fn default() -> Self {
        Self { sequences: 8, rows: 128, context: usize::MAX }
    }
}

impl ServingOptions {
    /// At most so many requests in a pass; others wait.
    pub fn sequences(mut self, n: usize) -> Self {
        self.sequences = n;
        self
    }

    /// At most so many rows in a pass: one for each sequence, drafted tokens, and tokens of prompts.
    pub fn rows(mut self, n: usize) -> Self {
        self.rows = n;
        self
    }

    /// At most so many tokens in a sequence, prompt and continuation.
    pub fn context(mut self, n: usize) -> Self {
        self.context = n;
        self
    }
}

/// A request's number: they count up from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Request(pub u64);

/// What a pass brought for a request.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Whose it is.
    pub request: Request,
    /// Its next pieces.
    pub pieces: Vec<Piece>,
    /// Why it ended, with its last pieces.
    pub finish: Option<Finish>,
    /// Counts so far. Passes are those that the request had a part in.
    pub stats: DecodeStats,
}

/// Continues many texts, each as it would be continued alone: same tokens, same pieces, whatever else is in the batch. Requests
/// come at any time; each [`Serving::step`] is one pass over all that are active, which reads the weights once.
pub struct Serving {
    engine: Engine,
    slots: Box<dyn AnySlots>,
    options: ServingOptions,
    taps: Vec<usize>,
    waiting: VecDeque<Waiting>,
    active: Vec<Active>,
    next: u64,
}

struct Active {
    request: Request,
    pieces: Pieces,
    adapters: Option<Adapters>,
}

struct Waiting {
    request: Request,
    prompt: Vec<u32>,
    how: Generate,
    seed: u64,
}

impl Engine {
    /// Serves requests as `options` say; those that speculate with drafts that read no layers of the model.
    ///
    /// # Errors
    /// No sequence, fewer rows than sequences, no context; the device's.
    pub fn serving(&self, options: ServingOptions) -> Result<Serving> {
        Serving::new(self, options, &[])
    }

    /// The same where requests may speculate with `draft`, as [`Engine::session_for`] does for one session.
    ///
    /// # Errors
    /// As [`Engine::serving`].
    pub fn serving_for(&self, draft: &Draft, options: ServingOptions) -> Result<Serving> {
        Serving::new(self, options, draft.taps())
    }
}

impl Serving {
    fn new(engine: &Engine, mut options: ServingOptions, taps: &[usize]) -> Result<Self> {
        options.context = options.context.min(engine.config().context);
        ensure!(options.context > 0, Capacity, "sequences of no tokens");
        let slots = engine.0.model.serving(options.sequences, options.rows, taps)?;
        let (waiting, active) = (VecDeque::new(), Vec::new());
        Ok(Self { engine: engine.clone(), slots, options, taps: taps.into(), waiting, active, next: 0 })
    }

    /// A request to continue `prompt`; its pieces come from [`Serving::step`].
    ///
    /// # Errors
    /// A prompt that is empty, longer than the context or not of the vocabulary; a draft that reads other layers than these
    /// sequences keep; adapters of another engine.
    pub fn submit(&mut self, prompt: &[u32], how: Generate, seed: u64) -> Result<Request> {
        ensure!(!prompt.is_empty(), Usage, "the prompt is empty: there is nothing to continue");
        check(&self.engine, 0, prompt, self.options.context)?;
        how.adapters.iter().try_for_each(|a| a.check(&self.engine))?;
        if let Decode::Speculative(_, draft, _) = &how.decode {
            let (reads, has, name) = (draft.taps(), &self.taps[..], draft.name());
            let good = reads.is_empty() || reads == has;
            ensure!(
                good,
                Usage,
                "the draft {name} reads layers {reads:?}, served are {has:?}: use Engine::serving_for"
            );
        }
        let request = Request(self.next);
        self.next += 1;
        self.waiting.push_back(Waiting { request, prompt: prompt.into(), how, seed });
        Ok(request)
    }

    /// The same with a text (and the tokenizer's beginning-of-text token, where it wants one).
    ///
    /// # Errors
    /// As [`Serving::submit`]; no tokenizer.
    pub fn submit_text(&mut self, prompt: &str, how: Generate, seed: u64) -> Result<Request> {
        let ids = self.engine.tokenizer()?.encode(prompt, true, true)?;
        self.submit(&ids, how, seed)
    }

    /// Requests that have not ended: in the batch, and waiting for room in it.
    pub fn pending(&self) -> (usize, usize) {
        (self.active.len(), self.waiting.len())
    }

    /// Forgets a request; says whether there was one.
    pub fn cancel(&mut self, request: Request) -> bool {
        let before = self.active.len() + self.waiting.len();
        self.waiting.retain(|w| w.request != request);
        if let Some(i) = self.active.iter().position(|a| a.request == request) {
            self.remove(i);
        }
        self.active.len() + self.waiting.len() < before
    }

    fn remove(&mut self, i: usize) {
        self.active.remove(i);
        self.slots.remove(i);
    }

    /// Lets in who waits, while there is room, and runs one pass over all that are active: their next tokens, or as much of their
    /// prompts as has room. Replies come in the order of requests; who ended makes room.
    ///
    /// # Errors
    /// The device's; logits that are not finite, of whichever sequence. Who is in the batch stays as it was; who was to be let in, and
    /// could not, is forgotten.
    pub fn step(&mut self) -> Result<Vec<Reply>> {
        let mut replies = Vec::new();
        while self.active.len() < self.options.sequences {
            let Some(Waiting { request, prompt, how, seed }) = self.waiting.pop_front() else { break };
            let mut pieces = Pieces::new(&self.engine, &how, self.options.context - prompt.len());
            if pieces.is_full() {
                pieces.end(Finish::Length);
                let stats = DecodeStats::default();
                replies.push(Reply { request, pieces: Vec::new(), finish: pieces.finish, stats });
                continue;
            }
            let capacity = self.options.context.min(prompt.len().saturating_add(how.max_tokens));
            self.slots.push(&prompt, &how, capacity, seed)?;
            self.active.push(Active { request, pieces, adapters: how.adapters });
        }
        let given = self.slots.step()?;
        let mut ended = Vec::new();
        for (i, (n, Active { request, pieces, adapters })) in given.into_iter().zip(&mut self.active).enumerate() {
            let (tokens, mut dropped) = (self.slots.tokens(i), 0);
            if n > 0 {
                let from = tokens.len() - n;
                let kept = pieces.take(&self.engine, &tokens[from..], |k| self.slots.source(i, k));
                dropped = n - kept;
                adapters.iter().for_each(|a| a.count(kept));
                if kept < n {
                    self.slots.truncate(i, from + kept);
                }
            }
            let stats = without(self.slots.stats(i), dropped as u64);
            if pieces.finish.is_some() {
                ended.push(i);
            }
            if n > 0 {
                let (pieces, finish) = (pieces.ready.drain(..).collect(), pieces.finish);
                replies.push(Reply { request: *request, pieces, finish, stats });
            }
        }
        ended.into_iter().rev().for_each(|i| self.remove(i));
        replies.sort_by_key(|r| r.request);
        Ok(replies)
    }
}

/// The sequences of a batch on some device.
pub(super) trait AnySlots: Send {
    fn push(&mut self, prompt: &[u32], how: &Generate, capacity: usize, seed: u64) -> Result<()>;
    /// How many tokens each got.
    fn step(&mut self) -> Result<Vec<usize>>;
    fn tokens(&self, i: usize) -> &[u32];
    fn source(&self, i: usize, token: usize) -> Option<u8>;
    fn stats(&self, i: usize) -> DecodeStats;
    fn truncate(&mut self, i: usize, len: usize);
    fn remove(&mut self, i: usize);
}

pub(super) struct Slots<B: Train> {
    model: Arc<Model<B>>,
    batch: SpeculativeBatch<B>,
    taps: Vec<usize>,
    slots: Vec<Slot<B>>,
}

struct Slot<B: Train> {
    session: Session<B>,
    decoder: Speculative<B>,
    draft: Option<Draft>,
}

impl<B: Train> Drop for Slot<B> {
    fn drop(&mut self) {
        self.decoder.finish(&self.session);
        if let (Some(plan), Some(draft)) = (self.decoder.plan(), &self.draft) {
            draft.learn(plan);
        }
    }
}

impl<B: Train> Slots<B> {
    pub fn new(model: Arc<Model<B>>, sequences: usize, rows: usize, taps: &[usize]) -> Result<Self> {
        let batch = SpeculativeBatch::new(model.clone(), sequences, rows, taps)?;
        Ok(Self { model, batch, taps: taps.into(), slots: Vec::new() })
    }
}

impl<B: Train> AnySlots for Slots<B> {
    fn push(&mut self, prompt: &[u32], how: &Generate, capacity: usize, seed: u64) -> Result<()> {
        let mut session = Session::of_rows(self.model.clone(), capacity, seed, &self.taps, 1)?;
        session.set_adapters(how.adapters.as_ref().map(Adapters::map).transpose()?);
        session.push(prompt);
        let (decoder, draft) = match &how.decode {
            Decode::Autoregressive(sampler) => (Speculative::plain(*sampler), None),
            Decode::Speculative(sampler, draft, how) => {
                (speculative(&session, *sampler, draft, *how)?, Some(draft.clone()))
            }
            Decode::Steps(..) => bail!(Unsupported, "drafts by steps decode one text at a time"),
        };
        self.slots.push(Slot { session, decoder, draft });
        Ok(())
    }

    fn step(&mut self) -> Result<Vec<usize>> {
        let mut all: Vec<_> = self.slots.iter_mut().map(|s| (&mut s.session, &mut s.decoder)).collect();
        self.batch.step(&mut all)
    }

    fn tokens(&self, i: usize) -> &[u32] {
        self.slots[i].session.tokens()
    }

    fn source(&self, i: usize, token: usize) -> Option<u8> {
        self.slots[i].decoder.source(token)
    }

    fn stats(&self, i: usize) -> DecodeStats {
        self.slots[i].decoder.stats()
    }

    fn truncate(&mut self, i: usize, len: usize) {
        self.slots[i].session.truncate(len);
    }

    fn remove(&mut self, i: usize) {
        self.slots.remove(i);
    }
}
