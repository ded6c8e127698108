//! [`Session`]: one text in the making: its tokens, its cache, its random numbers.

use std::sync::Arc;

use super::Sampler;
use super::sampler::drawn;
use crate::backend::{Backend, Buffer, Mask};
use crate::error::{Result, bail, ensure};
use crate::model::{KvCache, Model, Sequence, Want, Workspace};
use crate::rng::Key;

/// Rows of one prefill pass: enough to be bound by arithmetic, few enough to keep activations in the cache and memory small.
pub const PREFILL_ROWS: usize = 64;
/// Rows of one pass that may want logits: the largest speculation tree, and the chunk of a perplexity run.
pub const LOGIT_ROWS: usize = 64;

/// A text in the making. The last tokens may be *pending*: known, but not yet in the cache.
pub struct Session<B: Backend> {
    model: Arc<Model<B>>,
    cache: KvCache<B>,
    ws: Workspace<B>,
    tokens: Vec<u32>,
    /// `tokens.len()` at which the logits in the workspace were computed; 0: never.
    logits_at: usize,
    /// The logits, where somebody on the host asked for them.
    logits: Vec<f32>,
    /// The token drawn, on the device.
    drawn: B::Buf<u32>,
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
        let cfg = model.config();
        ensure!(
            (1..=cfg.context).contains(&capacity),
            Capacity,
            "a context of {capacity} tokens was asked for; this model allows 1 to {}",
            cfg.context
        );
        let be = model.backend();
        let rows = PREFILL_ROWS.min(capacity);
        let cache = KvCache::new(be, cfg, capacity)?;
        let ws = Workspace::new(be, cfg, rows, LOGIT_ROWS.min(rows))?;
        let (tokens, logits, drawn) = (Vec::with_capacity(capacity), Vec::new(), be.alloc(1)?);
        Ok(Self { cache, ws, tokens, logits_at: 0, logits, drawn, seed, stream: 0, model })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model<B>> {
        &self.model
    }

    /// All tokens so far, prompt and continuation.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The cache.
    pub fn cache(&self) -> &KvCache<B> {
        &self.cache
    }

    /// Most tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Appends tokens; they are computed by the next [`Session::advance`].
    pub fn push(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// Back to the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.cache.truncate(len);
        if self.logits_at > len {
            self.logits_at = 0;
        }
    }

    /// Runs all pending tokens through the model, so that the logits behind the last are known. Returns the passes made.
    ///
    /// # Errors
    /// An empty session, or more tokens than its capacity.
    pub fn advance(&mut self) -> Result<u64> {
        if self.logits_at == self.tokens.len() && self.logits_at > 0 {
            return Ok(0);
        }
        ensure!(!self.tokens.is_empty(), Usage, "the prompt is empty: there is nothing to continue");
        let (n, capacity) = (self.tokens.len(), self.capacity());
        ensure!(n <= capacity, Capacity, "{n} tokens exceed the context of {capacity}");
        // Logits of a truncated session have to be computed again from its last token.
        if self.cache.len() == n {
            self.cache.truncate(n - 1);
        }
        let mut passes = 0;
        while self.cache.len() < n {
            let at = self.cache.len();
            let end = n.min(at + self.ws.max_rows());
            let want = if end == n { Want::Last } else { Want::Nothing };
            let tokens = &self.tokens[at..end];
            let seq = Sequence { cache: &mut self.cache, tokens, mask: Mask::Causal, want };
            self.model.forward(&mut [seq], &mut self.ws)?;
            self.cache.commit_first(end - at)?;
            passes += 1;
        }
        self.logits_at = n;
        Ok(passes)
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

    /// Draws the next token, without appending it: on the device, where nothing but the token leaves it, unless there is a
    /// repetition penalty. The random number is that of the token's position, so the same seed, stream and text give the
    /// same token, however the text came about.
    ///
    /// # Errors
    /// As [`Session::logits`]; `Diverged` where the logits are not finite.
    pub fn sample(&mut self, sampler: &Sampler) -> Result<u32> {
        let key = Key { seed: self.seed, stream: self.stream, counter: self.tokens.len() as u64 };
        if sampler.repeat_penalty != 1.0 {
            // The penalty changes logits in place; those of the model are kept.
            let mut logits = self.logits()?.to_vec();
            return sampler.sample(&mut logits, &self.tokens, key);
        }
        ensure!(self.logits_at > 0, Usage, "there are no logits: advance the session first");
        let (be, mut token) = (self.model.backend(), [0]);
        be.sample(self.drawn.head_mut(1), self.ws.logit_rows(1), &[sampler.draw(key)])?;
        be.download(self.drawn.head(1), &mut token)?;
        drawn(token[0])
    }

    /// One pass over `tokens` behind the committed rows, staged and not kept; all rows' logits are in the workspace.
    pub fn stage(&mut self, tokens: &[u32], mask: Mask<'_>, want: Want<'_>) -> Result<usize> {
        self.logits_at = 0;
        let seq = Sequence { cache: &mut self.cache, tokens, mask, want };
        self.model.forward(&mut [seq], &mut self.ws)
    }

    /// Returns once the last pass is done: on a GPU passes are only queued.
    ///
    /// # Errors
    /// What the device met.
    pub fn wait(&self) -> Result<()> {
        self.ws.wait(self.model.backend())
    }

    /// Keeps staged rows of the last [`Session::stage`] (a path of a tree).
    pub fn commit(&mut self, rows: &[u32]) -> Result<()> {
        self.cache.commit(self.model.backend(), rows)
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
            self.cache.commit_first(rows)?;
        }
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }
}
