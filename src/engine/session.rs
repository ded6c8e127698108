//! Sessions and generations of the embedded API.

use std::collections::VecDeque;

use super::erased::{AnySession, Decode};
use super::{Adapters, Draft, Engine, Message, Preference, Speculation, StepCounts, Steps};
use crate::backend::Mask;
use crate::decode::{DecodeStats, Sampler, TextStream};
use crate::error::{Error, ErrorKind, Result, ensure};

/// One text in the making.
pub struct Session {
    engine: Engine,
    inner: Box<dyn AnySession>,
    /// Verified tokens behind the end of the current generation, which nobody saw.
    dropped: u64,
    adapters: Option<Adapters>,
}

/// What to generate and when to stop. Built by chaining.
#[derive(Clone)]
pub struct Generate {
    pub(super) decode: Decode,
    pub(super) max_tokens: usize,
    stop: Vec<String>,
    ignore_eos: bool,
    pub(super) adapters: Option<Adapters>,
}

impl Default for Generate {
    fn default() -> Self {
        let decode = Decode::Autoregressive(Sampler::greedy());
        Self { decode, max_tokens: 256, stop: Vec::new(), ignore_eos: false, adapters: None }
    }
}

impl Generate {
    /// The decoder and its sampler.
    pub fn decode(mut self, decode: Decode) -> Self {
        self.decode = decode;
        self
    }

    /// Speculative decoding by `sampler`: the same text, sooner. The session has to be made by [`Engine::session_for`] if the draft
    /// reads the model's layers.
    pub fn speculative(self, sampler: Sampler, draft: &Draft, how: Speculation) -> Self {
        self.decode(Decode::Speculative(sampler, draft.clone(), how))
    }

    /// Whole steps of a draft by `sampler` where their judge lets them stand. **Not lossless.** The session has to be made by
    /// [`Engine::session_for_steps`] if the judge reads the model's layers.
    pub fn steps(self, sampler: Sampler, steps: &Steps) -> Self {
        self.decode(Decode::Steps(sampler, steps.clone()))
    }

    /// Autoregressive decoding by `sampler`.
    pub fn sampler(self, sampler: Sampler) -> Self {
        self.decode(Decode::Autoregressive(sampler))
    }

    /// At most so many tokens.
    pub fn max_tokens(mut self, n: usize) -> Self {
        self.max_tokens = n;
        self
    }

    /// Ends before the first occurrence of any of these strings.
    pub fn stop<S: Into<String>>(mut self, strings: impl IntoIterator<Item = S>) -> Self {
        self.stop = strings.into_iter().map(Into::into).collect();
        self
    }

    /// With these adapters beside the weights. A session keeps those it has, if none are named here.
    pub fn adapters(mut self, adapters: &Adapters) -> Self {
        self.adapters = Some(adapters.clone());
        self
    }

    /// Goes on behind end-of-text tokens.
    pub fn ignore_eos(mut self, yes: bool) -> Self {
        self.ignore_eos = yes;
        self
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The most tokens that were asked for, or the session's capacity.
    Length,
    /// The model ended its text.
    Eos,
    /// A stop string.
    Stop,
}

impl Finish {
    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Length => "length",
            Finish::Eos => "eos",
            Finish::Stop => "stop",
        }
    }
}

/// What one token adds.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The token; `None` for the text that was still held back at the end.
    pub id: Option<u32>,
    /// Whole characters that became certain with it; may be empty.
    pub text: String,
    /// Which of the draft's sources had proposed it; `None` is the model itself.
    pub source: Option<u8>,
}

impl Session {
    pub(super) fn new(engine: Engine, inner: Box<dyn AnySession>) -> Self {
        Self { engine, inner, dropped: 0, adapters: None }
    }

    /// The engine it belongs to.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// All tokens so far.
    pub fn tokens(&self) -> &[u32] {
        self.inner.tokens()
    }

    /// Most tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.inner.capacity()
    }

    /// Appends token ids.
    ///
    /// # Errors
    /// More tokens than the session holds, or one outside the vocabulary.
    pub fn push_ids(&mut self, ids: &[u32]) -> Result<()> {
        check(&self.engine, self.tokens().len(), ids, self.capacity())?;
        self.inner.push(ids);
        Ok(())
    }

    /// Appends text as it is (with the tokenizer's beginning-of-text token on an empty session, where it wants one).
    pub fn push_text(&mut self, text: &str) -> Result<()> {
        let first = self.tokens().is_empty();
        let ids = self.engine.tokenizer()?.encode(text, first, true)?;
        self.push_ids(&ids)
    }

    /// Appends messages in the model's chat form, ready for the assistant's turn.
    pub fn push_chat(&mut self, messages: &[Message]) -> Result<()> {
        let none = || Error::new(ErrorKind::Tokenizer, "this model has no chat template: use --raw");
        let text = self.engine.chat_template()?.ok_or_else(none)?.render(messages, true)?;
        let ids = self.engine.tokenizer()?.encode(&text, false, true)?;
        self.push_ids(&ids)
    }

    pub(super) fn use_adapters(&mut self, adapters: Option<&Adapters>) -> Result<()> {
        self.inner.adapt(adapters)?;
        self.adapters = adapters.cloned();
        Ok(())
    }

    /// Back to the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.inner.truncate(len);
    }

    /// Computes all pending tokens; [`Session::logits`] are then those behind the last.
    pub fn prefill(&mut self) -> Result<()> {
        self.inner.advance().map(drop)
    }

    /// Logits behind the last token computed, one per vocabulary entry, brought from the device.
    ///
    /// # Errors
    /// None were computed yet.
    pub fn logits(&mut self) -> Result<&[f32]> {
        self.inner.logits()
    }

    /// One pass over `tokens` behind what is computed, logits for every row, nothing kept: what a verification costs. Returns
    /// once it is done.
    pub fn pass(&mut self, tokens: &[u32], mask: Mask<'_>) -> Result<()> {
        self.inner.pass(tokens, mask)
    }

    /// Negative log-likelihood (nats) of every token but the first given those before it. Replaces the session's contents.
    pub fn nll(&mut self, tokens: &[u32], mut each: impl FnMut(f64)) -> Result<()> {
        self.inner.nll(tokens, &mut each)
    }

    /// Counts of the current decoder.
    pub fn stats(&self) -> DecodeStats {
        without(self.inner.stats(), self.dropped)
    }

    /// What became of a draft's steps in the current generation, and the rejected ones since the last call beside the model's
    /// own; `None` where it does not go by steps.
    pub fn steps(&mut self) -> Option<(StepCounts, Vec<Preference>)> {
        self.inner.steps()
    }

    /// Continues the text: an iterator over pieces, computed as they are asked for.
    pub fn generate(&mut self, how: Generate) -> Result<Generation<'_>> {
        if how.adapters.is_some() {
            self.set_adapters(how.adapters.as_ref())?;
        }
        self.inner.begin(&how.decode)?;
        self.dropped = 0;
        let pieces = Pieces::new(&self.engine, &how, self.capacity().saturating_sub(self.tokens().len()));
        Ok(Generation { session: self, pieces })
    }
}

/// Fails unless `ids`, behind `have` tokens, are a prompt for a context of `room` tokens.
pub(super) fn check(engine: &Engine, have: usize, ids: &[u32], room: usize) -> Result<()> {
    let (n, vocab) = (have + ids.len(), engine.config().vocab);
    ensure!(n <= room, Capacity, "the prompt has {n} tokens, the context holds {room}: raise --context or shorten it");
    let alien = ids.iter().find(|&&t| t as usize >= vocab);
    ensure!(alien.is_none(), Usage, "token {} is outside the vocabulary of {vocab}", alien.copied().unwrap_or(0));
    Ok(())
}

/// Counts without tokens behind the end of the text.
pub(super) fn without(mut stats: DecodeStats, dropped: u64) -> DecodeStats {
    stats.tokens -= dropped;
    stats.verified = stats.verified.saturating_sub(dropped);
    stats
}

/// A running generation; see [`Session::generate`].
pub struct Generation<'a> {
    session: &'a mut Session,
    pieces: Pieces,
}

impl Generation<'_> {
    /// Why it ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.pieces.finish
    }

    /// The session it extends.
    pub fn session(&mut self) -> &mut Session {
        self.session
    }

    fn step(&mut self) -> Result<()> {
        let Session { engine, inner, dropped, adapters } = &mut *self.session;
        let before = inner.tokens().len();
        if self.pieces.left == 0 || before >= inner.capacity() {
            self.pieces.end(Finish::Length);
        } else {
            let n = inner.step()?;
            let kept = self.pieces.take(engine, &inner.tokens()[before..], |i| inner.source(i));
            *dropped = (n - kept) as u64;
            adapters.iter().for_each(|a| a.count(kept));
            if kept < n {
                inner.truncate(before + kept);
            }
        }
        if self.pieces.finish.is_some() {
            inner.finish();
        }
        Ok(())
    }
}

/// The pieces of a continuation, and its end.
pub(super) struct Pieces {
    eos: Vec<u32>,
    text: TextStream,
    left: usize,
    pub ready: VecDeque<Piece>,
    pub finish: Option<Finish>,
}

impl Pieces {
    /// Of a text with room for so many tokens more.
    pub fn new(engine: &Engine, how: &Generate, room: usize) -> Self {
        let eos = if how.ignore_eos { Vec::new() } else { engine.eos() };
        let (text, left) = (TextStream::new(&how.stop), how.max_tokens.min(room));
        Self { eos, text, left, ready: VecDeque::new(), finish: None }
    }

    /// Whether there is nothing to be said at all.
    pub fn is_full(&self) -> bool {
        self.left == 0
    }

    /// Takes what a step gave, and returns how many of these tokens are the text's: all, unless it ends with one of them. An end
    /// token is, so that a next turn sees it.
    pub fn take(&mut self, engine: &Engine, new: &[u32], source: impl Fn(usize) -> Option<u8>) -> usize {
        for (i, &id) in new.iter().enumerate() {
            let eos = self.eos.contains(&id);
            let bytes = engine.0.tokenizer.as_ref().ok().filter(|_| !eos).map(|t| t.token_bytes(id));
            let text = self.text.push(bytes.as_deref().unwrap_or_default());
            self.ready.push_back(Piece { id: Some(id), text, source: source(i) });
            self.left -= 1;
            let why = match (eos, self.text.stopped()) {
                (true, _) => Finish::Eos,
                (_, true) => Finish::Stop,
                _ if self.left == 0 => Finish::Length,
                _ => continue,
            };
            self.end(why);
            return i + 1;
        }
        new.len()
    }

    /// Ends, with the text that was still held back.
    pub fn end(&mut self, why: Finish) {
        self.finish = Some(why);
        let text = self.text.finish();
        if !text.is_empty() {
            self.ready.push_back(Piece { id: None, text, source: None });
        }
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.pieces.ready.is_empty() && self.pieces.finish.is_none() {
            if let Err(e) = self.step() {
                self.pieces.finish = Some(Finish::Length);
                return Some(Err(e));
            }
        }
        self.pieces.ready.pop_front().map(Ok)
    }
}
