//! [`SmallModel`]: a smaller model with the target's vocabulary drafts (Leviathan et al. 2023, arXiv:2211.17192).

use std::sync::Arc;

use super::{Budget, Draft, DraftTree, Pool};
use crate::backend::{Backend, Buffer, Mask, TreeMask};
use crate::decode::Session;
use crate::decode::session::PREFILL_ROWS;
use crate::error::Result;
use crate::model::{KvCache, Model, Sequence, Want, Workspace};

/// Most rows that are expanded at one depth, and most children of a row.
const WIDTH: usize = 16;

/// A smaller model, with a cache of its own that follows the session's text.
pub struct SmallModel<B: Backend> {
    model: Arc<Model<B>>,
    state: Option<State<B>>,
    /// Tokens that the cache holds.
    seen: Vec<u32>,
    pool: Pool,
}

struct State<B: Backend> {
    cache: KvCache<B>,
    ws: Workspace<B>,
    best: Best<B>,
}

/// The likeliest tokens behind some rows, on the device and here.
struct Best<B: Backend> {
    values: B::Buf<B::Acc>,
    ids: B::Buf<u32>,
    stats: B::Buf<B::Acc>,
    argmax: B::Buf<u32>,
    host: (Vec<f32>, Vec<f32>),
    tokens: Vec<u32>,
    ln_q: Vec<f32>,
}

impl<B: Backend> Best<B> {
    fn new(be: &B) -> Result<Self> {
        Ok(Self {
            values: be.alloc(WIDTH * WIDTH)?,
            ids: be.alloc(WIDTH * WIDTH)?,
            stats: be.alloc(WIDTH * 3)?,
            argmax: be.alloc(WIDTH)?,
            host: (Vec::new(), Vec::new()),
            tokens: Vec::new(),
            ln_q: Vec::new(),
        })
    }

    /// Of the first `rows` rows of the last pass the `k` likeliest tokens, and the logarithms of their probabilities.
    fn read(&mut self, be: &B, ws: &Workspace<B>, vocab: usize, rows: usize, k: usize) -> Result<()> {
        let n = rows * k;
        be.top_k(self.values.head_mut(n), self.ids.head_mut(n), ws.logit_rows(rows), vocab, k)?;
        be.logits_stats(self.stats.head_mut(rows * 3), self.argmax.head_mut(rows), ws.logit_rows(rows), vocab)?;
        let (values, stats) = &mut self.host;
        values.resize(n, 0.0);
        stats.resize(rows * 3, 0.0);
        self.tokens.resize(n, 0);
        be.download_acc(self.values.head(n), values)?;
        be.download_acc(self.stats.head(rows * 3), stats)?;
        be.download(self.ids.head(n), &mut self.tokens)?;
        self.ln_q.clear();
        self.ln_q.extend(values.iter().enumerate().map(|(i, v)| v - stats[i / k * 3 + 1]));
        Ok(())
    }
}

impl<B: Backend> SmallModel<B> {
    /// Drafts with `model`, whose tokens are the target's.
    pub fn new(model: Arc<Model<B>>) -> Self {
        Self { model, state: None, seen: Vec::new(), pool: Pool::new(1) }
    }

    /// Runs what is new of `tokens`; logits behind the last are then row 0 of the workspace.
    fn catch_up(&mut self, session: &Session<B>) -> Result<()> {
        let (be, cfg, tokens) = (self.model.backend(), self.model.config(), session.tokens());
        let capacity = session.capacity().min(cfg.context);
        if self.state.as_ref().is_none_or(|s| s.cache.capacity() < capacity) {
            // Drafted rows stand behind a text that may fill the context.
            let cache = KvCache::new(be, cfg, capacity + WIDTH * WIDTH)?;
            let ws = Workspace::new(be, cfg, PREFILL_ROWS, WIDTH)?;
            (self.state, self.seen) = (Some(State { cache, ws, best: Best::new(be)? }), Vec::new());
        }
        let state = self.state.as_mut().expect("made above");
        let same = self.seen.iter().zip(tokens).take_while(|(a, b)| a == b).count().min(tokens.len() - 1);
        state.cache.truncate(same);
        self.seen.truncate(same);
        while self.seen.len() < tokens.len() {
            let at = self.seen.len();
            let end = tokens.len().min(at + PREFILL_ROWS);
            let want = if end == tokens.len() { Want::Last } else { Want::Nothing };
            let seq = Sequence::new(&mut state.cache, &tokens[at..end], Mask::Causal, want);
            self.model.forward(&mut [seq], &mut state.ws)?;
            state.cache.commit_first(end - at)?;
            self.seen.extend_from_slice(&tokens[at..end]);
        }
        Ok(())
    }
}

impl<B: Backend> Draft<B> for SmallModel<B> {
    fn name(&self) -> &str {
        "model"
    }

    fn propose(&mut self, session: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()> {
        if session.tokens().len() > self.model.config().context {
            return Ok(()); // Its own context is shorter.
        }
        self.catch_up(session)?;
        let (be, vocab) = (self.model.backend(), self.model.config().vocab);
        let State { cache, ws, best } = self.state.as_mut().expect("made to catch up");
        let width = budget.width.clamp(1, WIDTH).min(vocab);
        if self.pool.width() != width {
            self.pool = Pool::new(width);
        }
        self.pool.reset();
        let mut rows = 1;
        loop {
            best.read(be, ws, vocab, rows, width)?;
            self.pool.expand(&best.tokens, &best.ln_q);
            let frontier = self.pool.frontier();
            rows = frontier.len();
            let full = cache.len() + frontier.end >= cache.capacity();
            if full || self.pool.depth() >= budget.nodes || !budget.expands(&self.pool) {
                break;
            }
            let mask = TreeMask::new(&self.pool.parents()[..frontier.end])?;
            let tokens = &self.pool.tokens()[frontier];
            let seq = Sequence::extend(cache, tokens, Mask::Tree(&mask), Want::All);
            self.model.forward(&mut [seq], ws)?;
        }
        cache.truncate(cache.len());
        self.pool.finish(budget.size(&self.pool), budget.source, tree);
        Ok(())
    }
}
