//! Sessions and generations of the embedded API.

use std::collections::VecDeque;

use super::erased::{AnySession, Decode};
use super::{Draft, Engine, Message, Speculation};
use crate::backend::Mask;
use crate::decode::{DecodeStats, Sampler, TextStream};
use crate::error::{Error, ErrorKind, Result};

/// One text in the making.
pub struct Session {
    engine: Engine,
    inner: Box<dyn AnySession>,
    /// Verified tokens behind the end of the current generation, which nobody saw.
    dropped: u64,
}

/// What to generate and when to stop. Built by chaining.
#[derive(Clone)]
pub struct Generate {
    decode: Decode,
    max_tokens: usize,
    stop: Vec<String>,
    ignore_eos: bool,
}

impl Default for Generate {
    fn default() -> Self {
        let decode = Decode::Autoregressive(Sampler::greedy());
        Self { decode, max_tokens: 256, stop: Vec::new(), ignore_eos: false }
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
        Self { engine, inner, dropped: 0 }
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
        let (have, room, vocab) = (self.tokens().len(), self.capacity(), self.engine.config().vocab);
        if have + ids.len() > room {
            let n = have + ids.len();
            let what = format!("the prompt has {n} tokens, the context holds {room}: raise --context or shorten it");
            return Err(Error::new(ErrorKind::Capacity, what));
        }
        if let Some(t) = ids.iter().find(|&&t| t as usize >= vocab) {
            let what = format!("token {t} is outside the vocabulary of {vocab}");
            return Err(Error::new(ErrorKind::Usage, what));
        }
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
        let mut stats = self.inner.stats();
        stats.tokens -= self.dropped;
        stats.verified = stats.verified.saturating_sub(self.dropped);
        stats
    }

    /// Continues the text: an iterator over pieces, computed as they are asked for.
    pub fn generate(&mut self, how: Generate) -> Result<Generation<'_>> {
        self.inner.begin(&how.decode)?;
        self.dropped = 0;
        let eos = if how.ignore_eos { Vec::new() } else { self.engine.eos() };
        let text = TextStream::new(&how.stop);
        Ok(Generation { left: how.max_tokens, session: self, eos, text, ready: VecDeque::new(), finish: None })
    }
}

/// A running generation; see [`Session::generate`].
pub struct Generation<'a> {
    session: &'a mut Session,
    eos: Vec<u32>,
    text: TextStream,
    left: usize,
    ready: VecDeque<Piece>,
    finish: Option<Finish>,
}

impl Generation<'_> {
    /// Why it ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// The session it extends.
    pub fn session(&mut self) -> &mut Session {
        self.session
    }

    fn step(&mut self) -> Result<()> {
        let before = self.session.tokens().len();
        if self.left == 0 || before >= self.session.capacity() {
            return self.end(Finish::Length);
        }
        let n = self.session.inner.step()?;
        for i in before..before + n {
            let (id, source) = (self.session.tokens()[i], self.session.inner.source(i - before));
            self.session.dropped = (before + n - i - 1) as u64;
            if self.eos.contains(&id) {
                // The end token is part of the session, so that a next turn sees it.
                self.session.inner.truncate(i + 1);
                self.ready.push_back(Piece { id: Some(id), text: String::new(), source });
                return self.end(Finish::Eos);
            }
            let bytes = self.session.engine.0.tokenizer.as_ref().map(|t| t.token_bytes(id));
            let text = self.text.push(bytes.as_deref().unwrap_or_default());
            self.ready.push_back(Piece { id: Some(id), text, source });
            self.left -= 1;
            if self.text.stopped() || self.left == 0 {
                self.session.inner.truncate(i + 1);
                return self.end(if self.text.stopped() { Finish::Stop } else { Finish::Length });
            }
        }
        Ok(())
    }

    fn end(&mut self, why: Finish) -> Result<()> {
        self.finish = Some(why);
        let text = self.text.finish();
        if !text.is_empty() {
            self.ready.push_back(Piece { id: None, text, source: None });
        }
        Ok(())
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && self.finish.is_none() {
            if let Err(e) = self.step() {
                self.finish = Some(Finish::Length);
                return Some(Err(e));
            }
        }
        self.ready.pop_front().map(Ok)
    }
}
