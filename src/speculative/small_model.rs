//! [`SmallModel`]: a smaller model with the target's vocabulary drafts (Leviathan et al. 2023, arXiv:2211.17192).

use std::sync::Arc;

use super::choices::Choices;
use super::{Budget, Draft, DraftTree, Pool};
use crate::backend::{Backend, Mask, TreeMask};
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
    choices: Choices<B>,
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
            (self.state, self.seen) =
                (Some(State { cache, ws, choices: Choices::new(be, cfg.vocab, WIDTH, WIDTH)? }), Vec::new());
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
        let State { cache, ws, choices } = self.state.as_mut().expect("made to catch up");
        let width = budget.width.clamp(1, WIDTH).min(vocab);
        if self.pool.width() != width {
            self.pool = Pool::new(width);
        }
        self.pool.reset();
        let mut rows = 1;
        loop {
            let (ids, ln_q) = choices.read(be, rows, ws.logit_rows(rows), None)?;
            self.pool.expand(ids, ln_q);
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
