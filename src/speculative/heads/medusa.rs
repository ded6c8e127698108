//! Medusa (Cai et al. 2024, arXiv:2401.10774).
//!
//! With h the target's state at the last position it has read, behind its final norm, head i guesses what comes i + 1 tokens behind the
//! known next one, whatever comes in between:
//!
//! ```text
//! h += silu(W h + b)                       once or more
//! logits = U h
//! ```

use std::sync::Arc;

use super::source::Source;
use crate::backend::{Backend, Buffer, Linear};
use crate::decode::Session;
use crate::error::Result;
use crate::model::Model;
use crate::model::config::Activation;
use crate::speculative::choices::Vocabulary;
use crate::speculative::{Budget, Draft, DraftTree, Pool};

/// v += silu(linear(v)), again and again.
pub(super) struct Residual<B: Backend>(pub Vec<Linear<B>>);

impl<B: Backend> Residual<B> {
    /// On `rows` rows; leaves v's operands in `h`. `l` is scratch.
    pub fn run(
        &self,
        be: &B,
        v: &mut B::Buf<B::Acc>,
        h: &mut B::Buf<B::Act>,
        l: &mut B::Buf<B::Acc>,
        n: usize,
    ) -> Result<()> {
        be.operand(h.head_mut(n), v.head(n))?;
        for block in &self.0 {
            be.linear(l.head_mut(n), h.head(n), &block.w, block.bias.as_ref())?;
            be.add_activated(v.head_mut(n), l.head(n), Activation::Silu)?;
            be.operand(h.head_mut(n), v.head(n))?;
        }
        Ok(())
    }
}

pub(super) struct Medusa<B: Backend> {
    model: Arc<Model<B>>,
    /// The output of the last layer.
    taps: [usize; 1],
    heads: Arc<Vec<(Residual<B>, B::Weight)>>,
    state: Option<State<B>>,
}

struct State<B: Backend> {
    pool: Pool,
    choices: Vocabulary<B>,
    zero: B::Buf<B::Acc>,
    picked: B::Buf<B::Acc>,
    /// The target's state, then a head's.
    v: [B::Buf<B::Acc>; 2],
    h: B::Buf<B::Act>,
    l: B::Buf<B::Acc>,
}

pub(super) fn load<B: Backend>(s: &Source<'_, B>, model: Arc<Model<B>>, prefix: &str) -> Result<Medusa<B>> {
    let (d, vocab) = (s.cfg.hidden, s.cfg.vocab);
    let mut heads = Vec::new();
    while s.has(&format!("{prefix}{}.0.linear.weight", heads.len())) {
        let at = format!("{prefix}{}", heads.len());
        let mut blocks = Vec::new();
        while s.has(&format!("{at}.{}.linear.weight", blocks.len())) {
            blocks.push(s.linear(&format!("{at}.{}.linear", blocks.len()), d, d)?);
        }
        let matrix = s.matrix(&format!("{at}.{}.weight", blocks.len()), vocab, d)?;
        heads.push((Residual(blocks), matrix));
    }
    s.as_many("medusa_num_heads", heads.len())?;
    s.as_many("medusa_num_layers", heads[0].0.0.len())?;
    Ok(Medusa { model, taps: [s.cfg.layers], heads: Arc::new(heads), state: None })
}

impl<B: Backend> Medusa<B> {
    fn new_state(&self, width: usize) -> Result<State<B>> {
        let (be, cfg) = (self.model.backend(), self.model.config());
        Ok(State {
            pool: Pool::new(width),
            choices: Vocabulary::new(be, cfg.vocab, 1, width)?,
            zero: be.alloc(cfg.hidden)?,
            picked: be.alloc(cfg.hidden)?,
            v: [be.alloc(cfg.hidden)?, be.alloc(cfg.hidden)?],
            h: be.alloc(cfg.hidden)?,
            l: be.alloc(cfg.hidden)?,
        })
    }
}

impl<B: Backend> super::Another for Medusa<B> {
    fn another(&self) -> Self {
        Medusa { model: self.model.clone(), taps: self.taps, heads: self.heads.clone(), state: None }
    }
}

impl<B: Backend> Draft<B> for Medusa<B> {
    fn name(&self) -> &str {
        "medusa"
    }

    fn taps(&self) -> &[usize] {
        &self.taps
    }

    fn propose(&mut self, session: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()> {
        super::check(session, &self.model, &self.taps)?;
        let (n, Budget { nodes, depth, width, .. }) = (session.cache().len(), budget);
        if n == 0 || nodes == 0 || depth == 0 || width == 0 {
            return Ok(());
        }
        if self.state.as_ref().is_none_or(|s| s.pool.width() != width) {
            self.state = Some(self.new_state(width)?);
        }
        let Self { model, heads, state, .. } = self;
        let (be, cfg) = (model.backend(), model.config());
        let State { pool, choices, zero, picked, v: [own, v], h, l } = state.as_mut().expect("made above");
        let d = cfg.hidden;
        be.gather_rows(picked.head_mut(d), session.features(0), &[n as u32 - 1], d)?;
        be.gather_rows(own.head_mut(d), zero.head(d), &[0], d)?;
        be.add_normed(own.head_mut(d), picked.head(d), model.final_norm(), cfg.eps)?;
        pool.reset();
        for (blocks, w) in heads.iter().take(nodes) {
            let rows = if pool.depth() == 0 { 1 } else { pool.frontier().len() };
            if pool.depth() > 0 && !budget.expands(pool) {
                break;
            }
            be.gather_rows(v.head_mut(d), own.head(d), &[0], d)?;
            blocks.run(be, v, h, l, d)?;
            let (ids, ln_q) = choices.read(be, 1, h.head(d), w, None, None)?;
            pool.expand(&ids.repeat(rows), &ln_q.repeat(rows));
        }
        pool.finish(budget.size(pool), budget.source, tree);
        Ok(())
    }
}
