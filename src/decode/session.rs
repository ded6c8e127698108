//! [`Session`]: one text in the making: its tokens, its cache, its random numbers.

use std::ops::Range;
use std::sync::Arc;

use super::Sampler;
use super::sampler::drawn;
use crate::backend::{Backend, Buffer, In, Mask, Penalty};
use crate::error::{Result, bail, ensure};
use crate::model::{AdapterMap, KvCache, Model, Sequence, Want, Workspace};
use crate::rng::Key;

/// Rows of one prefill pass: enough to be bound by arithmetic, few enough to keep activations in the cache and memory small.
pub const PREFILL_ROWS: usize = 64;
/// Rows of one pass that may want logits: the largest speculation tree, and the chunk of a perplexity run.
pub const LOGIT_ROWS: usize = 64;

/// A text in the making. The last tokens may be *pending*: known, but not yet in the cache.
///
/// A step of speculation: the last token is pending, be it sampled or what the step before found. [`Session::stage`] takes a
/// tree whose node 0 is that token; [`Session::logit_rows`] are then the target's, row by row of the tree; [`Session::commit`]
/// keeps a path from node 0 on, whose tokens are then the text's; and [`Session::push`] appends the token that verification
/// drew behind the path, which is the next pending one.
pub struct Session<B: Backend> {
    model: Arc<Model<B>>,
    ws: Workspace<B>,
    pub(super) text: Text<B>,
    /// `tokens.len()` at which the logits in the workspace were computed; 0: never.
    logits_at: usize,
    /// The logits, where somebody on the host asked for them.
    logits: Vec<f32>,
    /// The token drawn, on the device.
    drawn: B::Buf<u32>,
    /// The logits with a repetition penalty, where there is one.
    penalized: Option<B::Buf<B::Acc>>,
    seed: u64,
    /// Which of the seed's random numbers this session draws by: another stream, another continuation of the same text.
    pub stream: u64,
}

impl<B: Backend> Session<B> {
    /// An empty session that can grow to `capacity` tokens.
    ///
    /// # Errors
    /// A capacity of zero, or beyond the context the model was made for.
    pub fn new(model: Arc<Model<B>>, capacity: usize, seed: u64) -> Result<Self> {
        Self::with_taps(model, capacity, seed, &[])
    }

    /// A session that keeps [`Session::features`] of all committed tokens at the inputs of these layers, numbered as in
    /// [`Workspace::with_taps`].
    ///
    /// # Errors
    /// As [`Session::new`]; a tap behind the last layer.
    pub fn with_taps(model: Arc<Model<B>>, capacity: usize, seed: u64, taps: &[usize]) -> Result<Self> {
        Self::of_rows(model, capacity, seed, taps, PREFILL_ROWS)
    }

    /// The same with a workspace of its own for no more than `rows` rows a pass: one is enough for a session whose passes are those
    /// of [`super::Together`].
    ///
    /// # Errors
    /// As [`Session::with_taps`].
    pub fn of_rows(model: Arc<Model<B>>, capacity: usize, seed: u64, taps: &[usize], rows: usize) -> Result<Self> {
        let cfg = model.config();
        ensure!(
            (1..=cfg.context).contains(&capacity),
            Capacity,
            "a context of {capacity} tokens was asked for; this model allows 1 to {}",
            cfg.context
        );
        let be = model.backend();
        let rows = rows.min(capacity);
        let cache = KvCache::new(be, cfg, capacity)?;
        let ws = Workspace::with_taps(be, cfg, rows, LOGIT_ROWS.min(rows), taps)?;
        let features = taps.iter().map(|_| be.alloc(capacity * cfg.hidden)).collect::<Result<_>>()?;
        let tokens = Vec::with_capacity(capacity);
        let text = Text { cache, tokens, staged: Vec::new(), shared_at: None, features, adapters: None };
        let (logits, drawn) = (Vec::new(), be.alloc(1)?);
        Ok(Self { ws, text, logits_at: 0, logits, drawn, penalized: None, seed, stream: 0, model })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model<B>> {
        &self.model
    }

    /// All tokens so far, prompt and continuation.
    pub fn tokens(&self) -> &[u32] {
        &self.text.tokens
    }

    /// The cache.
    pub fn cache(&self) -> &KvCache<B> {
        &self.text.cache
    }

    /// The workspace of its passes, which says how many rows one may have.
    pub fn workspace(&self) -> &Workspace<B> {
        &self.ws
    }

    /// Most tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.text.cache.capacity()
    }

    /// The residual stream at tap number `tap` of the committed tokens, `[cache().len(), hidden]`, on the device.
    pub fn features(&self, tap: usize) -> In<'_, B, B::Acc> {
        self.text.features[tap].head(self.text.cache.len() * self.model.config().hidden)
    }

    /// `rows` of [`Session::features`].
    ///
    /// # Errors
    /// Rows that are not committed.
    pub fn feature_rows(&self, tap: usize, rows: Range<usize>) -> Result<In<'_, B, B::Acc>> {
        let (d, len) = (self.model.config().hidden, self.text.cache.len());
        ensure!(rows.start <= rows.end && rows.end <= len, Shape, "features of rows {rows:?} of {len}");
        Ok(self.text.features[tap].view(rows.start * d..rows.end * d))
    }

    /// Becomes another continuation of the first `len` tokens of `other`, by the same random numbers, with what is computed of all
    /// but the last of them: that one is pending.
    ///
    /// # Errors
    /// No tokens, or more than `other` has; a session of another model, with other taps, or too long for this one.
    pub fn follow(&mut self, other: &Self, len: usize) -> Result<()> {
        let same = Arc::ptr_eq(&self.model, &other.model) && self.ws.taps().eq(other.ws.taps());
        ensure!(same, Usage, "a session cannot follow one of another model, or with other taps");
        let (n, d) = (other.tokens().len(), self.model.config().hidden);
        ensure!((1..=n).contains(&len), Usage, "a session cannot follow {len} of {n} tokens");
        let rows = other.text.cache.len().min(len - 1);
        self.unstage();
        let be = self.model.backend();
        self.text.cache.follow(be, &other.text.cache, rows)?;
        let every: Vec<u32> = (0..rows as u32).collect();
        for (to, from) in self.text.features.iter_mut().zip(&other.text.features) {
            be.gather_rows(to.head_mut(rows * d), from.head(rows * d), &every, d)?;
        }
        self.text.tokens.clear();
        self.text.tokens.extend_from_slice(&other.tokens()[..len]);
        self.text.adapters.clone_from(&other.text.adapters);
        (self.seed, self.stream) = (other.seed, other.stream);
        Ok(())
    }

    /// Adapters of all passes from now on, beside the weights; `None`: the model alone. What was computed with others is forgotten and
    /// computed anew by the next [`Session::advance`]; the tokens stay.
    pub fn set_adapters(&mut self, adapters: Option<Arc<AdapterMap<B>>>) {
        let same = match (&self.text.adapters, &adapters) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (a, b) => a.is_none() && b.is_none(),
        };
        if !same {
            self.unstage();
            self.text.cache.truncate(0);
            self.text.adapters = adapters;
        }
    }

    /// The adapters of its passes.
    pub fn adapters(&self) -> Option<&Arc<AdapterMap<B>>> {
        self.text.adapters.as_ref()
    }

    /// Appends tokens; they are computed by the next [`Session::advance`].
    pub fn push(&mut self, tokens: &[u32]) {
        self.text.tokens.extend_from_slice(tokens);
    }

    /// Back to the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.text.truncate(len);
        if self.logits_at > len {
            self.logits_at = 0;
        }
    }

    /// Runs all pending tokens through the model, so that the logits behind the last are known. Returns the passes made.
    ///
    /// # Errors
    /// An empty session, or more tokens than its capacity.
    pub fn advance(&mut self) -> Result<u64> {
        if self.logits_at == self.tokens().len() && self.logits_at > 0 {
            return Ok(0);
        }
        ensure!(!self.tokens().is_empty(), Usage, "the prompt is empty: there is nothing to continue");
        let (n, capacity) = (self.tokens().len(), self.capacity());
        ensure!(n <= capacity, Capacity, "{n} tokens exceed the context of {capacity}");
        self.pending();
        let mut passes = 0;
        while self.cache().len() < n {
            let at = self.cache().len();
            let end = n.min(at + self.ws.max_rows());
            let want = if end == n { Want::Last } else { Want::Nothing };
            let tokens = self.tokens()[at..end].to_vec();
            self.stage(&tokens, Mask::Causal, want)?;
            self.commit_all()?;
            passes += 1;
        }
        self.logits_at = n;
        Ok(passes)
    }

    /// Tokens to run through the model before the logits behind the last are known. At least one, unless there is none: logits of a
    /// truncated session have to be computed again from its last token.
    pub(crate) fn pending(&mut self) -> &[u32] {
        let n = self.tokens().len();
        if self.cache().len() == n {
            self.text.cache.truncate(n.saturating_sub(1));
        }
        &self.text.tokens[self.text.cache.len()..]
    }

    /// Logits of the token after the last one, as of the last [`Session::advance`], brought to the host.
    ///
    /// # Errors
    /// None were computed, or a [`Session::stage`] has taken their place.
    pub fn logits(&mut self) -> Result<&[f32]> {
        ensure!(self.logits_at > 0, Usage, "there are no logits: advance the session first");
        self.logits.resize(self.model.config().vocab, 0.0);
        self.ws.logits(self.model.backend(), 0, &mut self.logits)?;
        Ok(&self.logits)
    }

    /// Draws the next token, without appending it, on the device: nothing but the token leaves it. The random number is that
    /// of the token's position, so the same seed, stream and text give the same token, however the text came about.
    ///
    /// # Errors
    /// As [`Session::logits`]; `Diverged` where the logits are not finite.
    pub fn sample(&mut self, sampler: &Sampler) -> Result<u32> {
        ensure!(self.logits_at > 0, Usage, "there are no logits: advance the session first");
        let key = self.key(self.tokens().len() as u64);
        let (be, vocab) = (self.model.backend(), self.model.config().vocab);
        let mut logits = self.ws.logit_rows(1);
        let penalties = sampler.penalties(0, self.tokens().iter().rev().copied());
        if !penalties.is_empty() {
            // The penalty changes logits in place; those of the model are kept.
            let mut copy = self.penalized.take().map_or_else(|| be.alloc::<B::Acc>(vocab), Ok)?;
            be.gather_rows(copy.head_mut(vocab), logits, &[0], vocab)?;
            be.penalize(copy.head_mut(vocab), vocab, &penalties)?;
            logits = self.penalized.insert(copy).head(vocab);
        }
        be.sample(self.drawn.head_mut(1), logits, &[sampler.draw(key)])?;
        let mut token = [0];
        be.download(self.drawn.head(1), &mut token)?;
        drawn(token[0])
    }

    /// One pass over `tokens` behind the committed rows, staged and not kept. Returns how many rows want logits; they lie in the
    /// workspace, and on the device in [`Session::logit_rows`].
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn stage(&mut self, tokens: &[u32], mask: Mask<'_>, want: Want<'_>) -> Result<usize> {
        self.unstage();
        let rows = self.model.forward(&mut [self.text.sequence(tokens, mask, want)], &mut self.ws)?;
        self.text.staged.extend_from_slice(tokens);
        Ok(rows)
    }

    /// The first `n` logit rows of the last pass, `[n, vocab]`, on the device.
    pub fn logit_rows(&self, n: usize) -> In<'_, B, B::Acc> {
        self.ws.logit_rows(n)
    }

    /// Changes the logit rows of the last [`Session::stage`] by a sampler's penalties.
    ///
    /// # Errors
    /// The device's.
    pub fn penalize(&mut self, rows: usize, penalties: &[Penalty]) -> Result<()> {
        let (be, vocab) = (self.model.backend(), self.model.config().vocab);
        be.penalize(self.ws.logit_rows_mut(rows), vocab, penalties)
    }

    /// The random number of the token at `position`: the same however the text before it came about.
    pub fn key(&self, position: u64) -> Key {
        Key { seed: self.seed, stream: self.stream, counter: position }
    }

    /// Returns once the last pass is done: on a GPU passes are only queued.
    ///
    /// # Errors
    /// What the device met.
    pub fn wait(&self) -> Result<()> {
        self.ws.wait(self.model.backend())
    }

    /// Forgets what is staged and the logits, before other rows take their place.
    pub(super) fn unstage(&mut self) {
        self.logits_at = 0;
        self.text.staged.clear();
        self.text.shared_at = None;
    }

    /// Keeps staged rows of the last [`Session::stage`] (a path of a tree), in this order, with their features. Their tokens become
    /// the text's, behind those that are committed: the first of them may be pending there already.
    ///
    /// # Errors
    /// Rows that are not staged or do not ascend strictly; tokens other than the pending ones.
    pub fn commit(&mut self, rows: &[u32]) -> Result<()> {
        ensure!(
            self.text.shared_at.is_none(),
            Usage,
            "the staged rows are those of a pass of several sessions, which commits them"
        );
        self.text.commit(&self.model, &self.ws, rows)
    }

    fn commit_all(&mut self) -> Result<()> {
        self.commit(&Vec::from_iter(0..self.text.staged.len() as u32))
    }

    /// Negative log-likelihoods in nats of all tokens but the first, each given those before it: the sum over a window that
    /// starts empty. The session is left holding the tokens.
    pub fn nll(&mut self, tokens: &[u32], mut each: impl FnMut(f64)) -> Result<()> {
        self.truncate(0);
        let mut row = vec![0.0; self.model.config().vocab];
        for (i, chunk) in tokens.chunks(self.ws.max_logits()).enumerate() {
            let at = i * self.ws.max_logits();
            let rows = self.stage(chunk, Mask::Causal, Want::All)?;
            for r in 0..rows {
                let Some(&next) = tokens.get(at + r + 1) else { break };
                self.ws.logits(self.model.backend(), r, &mut row)?;
                let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
                let sum: f64 = row.iter().map(|&x| (x as f64 - max).exp()).sum();
                let nll = max + sum.ln() - row[next as usize] as f64;
                if !nll.is_finite() {
                    bail!(Diverged, "the logits behind token {} are not finite", at + r);
                }
                each(nll);
            }
            self.commit_all()?;
        }
        Ok(())
    }
}

/// What is known of a text and what is computed: tokens, cache, features.
pub(super) struct Text<B: Backend> {
    pub cache: KvCache<B>,
    tokens: Vec<u32>,
    /// Tokens of the staged rows.
    pub staged: Vec<u32>,
    /// Where they begin in the workspace of [`super::Together`]; `None`: they are in the session's own, at the beginning.
    pub shared_at: Option<usize>,
    /// For each tap `[capacity, hidden]`.
    features: Vec<B::Buf<B::Acc>>,
    adapters: Option<Arc<AdapterMap<B>>>,
}

impl<B: Backend> Text<B> {
    /// Its part of a pass.
    pub fn sequence<'a>(&'a mut self, tokens: &'a [u32], mask: Mask<'a>, want: Want<'a>) -> Sequence<'a, B> {
        Sequence::new(&mut self.cache, tokens, mask, want).adapted(self.adapters.as_deref())
    }

    fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.cache.truncate(len);
        self.staged.clear();
        self.shared_at = None;
    }

    /// Keeps rows that were staged by the last pass of `ws`.
    pub fn commit(&mut self, model: &Model<B>, ws: &Workspace<B>, rows: &[u32]) -> Result<()> {
        let first = self.shared_at.unwrap_or(0);
        let (be, d, at, staged) = (model.backend(), model.config().hidden, self.cache.len(), self.staged.len());
        let kept: Option<Vec<u32>> = rows.iter().map(|&r| self.staged.get(r as usize).copied()).collect();
        let Some(kept) = kept else { bail!(Shape, "cannot commit rows {rows:?} of {staged} staged ones") };
        let pending = &self.tokens[at..];
        let same = pending.iter().zip(&kept).all(|(a, b)| a == b);
        ensure!(same, Usage, "cannot commit tokens {kept:?} where {pending:?} are pending");
        let known = pending.len();
        let index: Vec<u32> = rows.iter().map(|r| first as u32 + r).collect();
        for (tap, to) in self.features.iter_mut().enumerate() {
            let to = to.view_mut(at * d..(at + rows.len()) * d);
            be.gather_rows(to, ws.features(tap, first + staged), &index, d)?;
        }
        self.cache.commit(be, rows)?;
        self.tokens.extend(kept.iter().skip(known));
        self.staged.clear();
        self.shared_at = None;
        Ok(())
    }
}
