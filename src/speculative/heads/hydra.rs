//! Hydra heads with a prefix layer (Ankner et al. 2024, arXiv:2402.05109).
//!
//! With h_t the target's state at position t behind its final norm and E its embedding, e_t = norm(layer(h_t)) stands for the text, and
//! head i reads it with the i + 1 tokens behind it:
//!
//! ```text
//! u = [e_t, E(x_{t+1}), .., E(x_{t+i+1})]
//! v = R u + b + silu(L u + c);  v += silu(M v + m)    the latter once or more
//! logits of x_{t+i+2} = U v + a
//! ```

use std::sync::Arc;

use super::layer::{Layer, LayerRoom, Place};
use super::medusa::Residual;
use super::source::Source;
use super::{CHUNK, Followed};
use crate::backend::{Backend, Buffer, Linear, Mask, TreeMask};
use crate::decode::Session;
use crate::error::{Result, ensure};
use crate::model::Model;
use crate::model::config::Activation;
use crate::speculative::choices::Vocabulary;
use crate::speculative::{Budget, Draft, DraftTree, Pool};

/// The published name of the prefix layer, as it is spelt.
pub(in crate::speculative) const PREFIX: &str = "prefix_embeding_layer";

struct Mlp<B: Backend> {
    straight: Linear<B>,
    gated: Linear<B>,
    more: Residual<B>,
    vocabulary: Linear<B>,
}

pub(super) struct Hydra<B: Backend> {
    head: Arc<Head<B>>,
    state: Option<State<B>>,
}

struct Head<B: Backend> {
    model: Arc<Model<B>>,
    /// The output of the last layer.
    taps: [usize; 1],
    input_norm: B::Buf<B::Acc>,
    layer: Layer<B>,
    norm: B::Buf<B::Acc>,
    heads: Vec<Mlp<B>>,
}

struct State<B: Backend> {
    /// Row t: of h_t.
    kv: B::Kv,
    capacity: usize,
    followed: Followed,
    pool: Pool,
    choices: Vocabulary<B>,
    layer: LayerRoom<B>,
    zero: B::Buf<B::Acc>,
    picked: B::Buf<B::Acc>,
    x: B::Buf<B::Acc>,
    s: B::Buf<B::Act>,
    /// e_t, E of the session's last token, E of the pool's rows.
    table: B::Buf<B::Acc>,
    /// Rows of the table side by side.
    joined: B::Buf<B::Acc>,
    u: B::Buf<B::Act>,
    v: B::Buf<B::Acc>,
    l: B::Buf<B::Acc>,
    h: B::Buf<B::Act>,
    index: Vec<u32>,
}

pub(super) fn load<B: Backend>(s: &Source<'_, B>, model: Arc<Model<B>>) -> Result<Hydra<B>> {
    let (d, vocab) = (s.cfg.hidden, s.cfg.vocab);
    let mut heads: Vec<Mlp<B>> = Vec::new();
    while s.has(&format!("hydra_mlp.{}.1.linear.weight", heads.len())) {
        let i = heads.len();
        // Every second module of a published head is a dropout.
        let at = |j: usize| format!("hydra_mlp.{i}.{}", 2 * j + 1);
        let layers = s.head.sizes("hydra_num_layers")?.and_then(|n| n.first().copied());
        let layers =
            layers.unwrap_or_else(|| (0..).take_while(|&j| s.has(&format!("{}.linear.weight", at(j)))).count());
        let mut more = Vec::new();
        for j in 1..layers {
            // All but the first are one block, which a file may hold once.
            let own = format!("{}.linear", at(j));
            let name = if s.has(&format!("{own}.weight")) { own } else { format!("{}.linear", at(1)) };
            more.push(s.linear(&name, d, d)?);
        }
        heads.push(Mlp {
            straight: s.linear(&format!("{}.res_connection", at(0)), d, (i + 2) * d)?,
            gated: s.linear(&format!("{}.linear", at(0)), d, (i + 2) * d)?,
            more: Residual(more),
            vocabulary: s.linear(&format!("hydra_lm_head.{i}.1"), vocab, d)?,
        });
    }
    ensure!(!heads.is_empty(), Weights, "hydra_mlp.0.1.linear.weight is missing");
    s.as_many("hydra_num_heads", heads.len())?;
    let prefix = format!("{PREFIX}.layers.0");
    let head = Head {
        model,
        taps: [s.cfg.layers],
        input_norm: s.vector(&format!("{prefix}.input_layernorm.weight"), d)?,
        layer: s.layer(&prefix, s.cfg.clone(), d)?,
        norm: s.vector(&format!("{PREFIX}.norm.weight"), d)?,
        heads,
    };
    Ok(Hydra { head: Arc::new(head), state: None })
}

impl<B: Backend> Head<B> {
    fn state(&self, capacity: usize, width: usize) -> Result<State<B>> {
        let (be, cfg, heads) = (self.model.backend(), self.model.config(), self.heads.len());
        let d = cfg.hidden;
        let sides = width * (heads + 1) * d;
        Ok(State {
            kv: be.kv_alloc(1, capacity, self.layer.cfg.kv_dim())?,
            capacity,
            followed: Followed::default(),
            pool: Pool::new(width),
            choices: Vocabulary::new(be, cfg.vocab, width, width)?,
            layer: LayerRoom::new(be, &self.layer.cfg, CHUNK)?,
            zero: be.alloc(d)?,
            picked: be.alloc(CHUNK * d)?,
            x: be.alloc(CHUNK * d)?,
            s: be.alloc(CHUNK * d)?,
            table: be.alloc((2 + heads * width) * d)?,
            joined: be.alloc(sides)?,
            u: be.alloc(sides)?,
            v: be.alloc(width * d)?,
            l: be.alloc(width * d)?,
            h: be.alloc(width * d)?,
            index: Vec::new(),
        })
    }

    /// Reads what is new of the session; leaves e of its last committed position at the head of the table.
    fn catch_up(&self, st: &mut State<B>, session: &Session<B>) -> Result<()> {
        let (be, cfg, n) = (self.model.backend(), self.model.config(), session.cache().len());
        let tokens = &session.tokens()[..n];
        let (d, eps) = (cfg.hidden, self.layer.cfg.eps);
        // The last is read again if nothing is new, for what it gives.
        let kept = st.followed.keep(tokens).min(n - 1);
        let State { kv, followed, layer, zero, picked, x, s, table, index, .. } = st;
        let mut last = 0;
        for from in (kept..n).step_by(CHUNK) {
            let rows = CHUNK.min(n - from);
            let m = rows * d;
            index.clear();
            index.extend(from as u32..(from + rows) as u32);
            be.gather_rows(picked.head_mut(m), session.features(0), index, d)?;
            be.gather_rows(x.head_mut(m), zero.head(d), &[0; CHUNK][..rows], d)?;
            be.add_normed(x.head_mut(m), picked.head(m), self.model.final_norm(), cfg.eps)?;
            be.rms_norm(s.head_mut(m), x.head(m), &self.input_norm, eps)?;
            let place = Place { past: from, staged: 0, rows, mask: Mask::Causal };
            self.layer.run(be, layer, x, s.head(m), kv, &place)?;
            last = rows - 1;
        }
        followed.read(tokens);
        be.gather_rows(table.head_mut(d), zero.head(d), &[0], d)?;
        be.add_normed(table.head_mut(d), x.view(last * d..(last + 1) * d), &self.norm, eps)
    }

    /// Gives the pool what head `pool.depth()` says behind each row of the frontier, at first behind the session's last token.
    fn level(&self, st: &mut State<B>, last: u32) -> Result<()> {
        let State { pool, choices, table, joined, u, v, l, h, index, .. } = st;
        let (be, (embedding, scale), d) = (self.model.backend(), self.model.embedding(), self.layer.cfg.hidden);
        let (i, frontier) = (pool.depth(), pool.frontier());
        index.clear();
        let rows = if i == 0 {
            be.embed(table.view_mut(d..2 * d), embedding, &[last], scale)?;
            index.extend([0, 1]);
            1
        } else {
            let to = (2 + frontier.start) * d..(2 + frontier.end) * d;
            be.embed(table.view_mut(to), embedding, &pool.tokens()[frontier.clone()], scale)?;
            for row in frontier.clone() {
                index.extend([0, 1]);
                let above = |r: &u32| Some(pool.parents()[*r as usize]).filter(|&p| p != TreeMask::ROOT);
                let first = index.len();
                index.extend(std::iter::successors(Some(row as u32), above).map(|r| 2 + r));
                index[first..].reverse();
            }
            frontier.len()
        };
        let (wide, n, mlp) = (rows * (i + 2) * d, rows * d, &self.heads[i]);
        be.gather_rows(joined.head_mut(wide), table.head((2 + frontier.end) * d), index, d)?;
        be.operand(u.head_mut(wide), joined.head(wide))?;
        be.linear(v.head_mut(n), u.head(wide), &mlp.straight.w, mlp.straight.bias.as_ref())?;
        be.linear(l.head_mut(n), u.head(wide), &mlp.gated.w, mlp.gated.bias.as_ref())?;
        be.add_activated(v.head_mut(n), l.head(n), Activation::Silu)?;
        mlp.more.run(be, v, h, l, n)?;
        let (ids, ln_q) = choices.read(be, rows, h.head(n), &mlp.vocabulary.w, mlp.vocabulary.bias.as_ref(), None)?;
        pool.expand(ids, ln_q);
        Ok(())
    }
}

impl<B: Backend> super::Another for Hydra<B> {
    fn another(&self) -> Self {
        Hydra { head: self.head.clone(), state: None }
    }
}

impl<B: Backend> Draft<B> for Hydra<B> {
    fn name(&self) -> &str {
        "hydra"
    }

    fn taps(&self) -> &[usize] {
        &self.head.taps
    }

    fn propose(&mut self, session: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()> {
        let Self { head, state } = self;
        super::check(session, &head.model, &head.taps)?;
        let (n, Budget { nodes, depth, width, .. }) = (session.cache().len(), budget);
        if n == 0 || nodes == 0 || depth == 0 || width == 0 {
            return Ok(());
        }
        let capacity = session.capacity();
        let st = match state {
            Some(st) if st.capacity >= capacity && st.pool.width() == width => st,
            _ => state.insert(head.state(capacity, width)?),
        };
        head.catch_up(st, session)?;
        st.pool.reset();
        let levels = nodes.min(head.heads.len());
        while st.pool.depth() == 0 || (st.pool.depth() < levels && budget.expands(&st.pool)) {
            head.level(st, session.tokens()[n])?;
        }
        st.pool.finish(budget.size(&st.pool), budget.source, tree);
        Ok(())
    }
}
