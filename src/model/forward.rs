//! The forward pass: one decoder for every family.

use super::adapters::{AdapterMap, Spans};
use super::config::Rope;
use super::kv::KvCache;
use super::lora::Site;
use super::roles::LayerRole;
use super::weights::Model;
use super::workspace::Workspace;
use crate::backend::{AttnSpec, Backend, Buffer, Mask, Segment};
use crate::error::{Result, ensure};

/// Which rows of a sequence pay for the vocabulary matrix.
#[derive(Clone, Copy, Debug)]
pub enum Want<'a> {
    /// None: only the cache is filled.
    Nothing,
    /// The last.
    Last,
    /// Every row.
    All,
    /// These rows.
    Rows(&'a [u32]),
}

/// One sequence's part of a pass.
pub struct Sequence<'a, B: Backend> {
    /// Its cache; the pass stages its rows there.
    pub cache: &'a mut KvCache<B>,
    /// One token a row.
    pub tokens: &'a [u32],
    /// Who sees whom among the staged rows: those of this pass and, where it extends, those before it.
    pub mask: Mask<'a>,
    /// Which rows of this pass want logits.
    pub want: Want<'a>,
    /// Whether the rows stand behind those that are staged already; if not, they take their place.
    pub extend: bool,
    /// Positions of the rows where they are others than the mask's; for models without a window.
    pub positions: Option<&'a [u32]>,
    /// Adapters beside the weights; `None`: the base model's own bits.
    pub adapters: Option<&'a AdapterMap<B>>,
}

impl<'a, B: Backend> Sequence<'a, B> {
    /// Rows behind the committed ones.
    pub fn new(cache: &'a mut KvCache<B>, tokens: &'a [u32], mask: Mask<'a>, want: Want<'a>) -> Self {
        Self { cache, tokens, mask, want, extend: false, positions: None, adapters: None }
    }

    /// Rows behind all that is staged: the next level of a tree, computed without those before it. `mask` covers all staged rows,
    /// of which row i of this pass is number `cache.staged() + i`, and so do the rows that [`KvCache::commit`] takes afterwards.
    /// The same tree staged in one pass gives the same bits.
    pub fn extend(cache: &'a mut KvCache<B>, tokens: &'a [u32], mask: Mask<'a>, want: Want<'a>) -> Self {
        Self { cache, tokens, mask, want, extend: true, positions: None, adapters: None }
    }

    /// The same with rows that stand elsewhere in the text: a cache whose rows are not in the order of positions.
    pub fn at(self, positions: &'a [u32]) -> Self {
        Self { positions: Some(positions), ..self }
    }

    /// The same with adapters. What is in the cache has to have been computed with them.
    pub fn adapted(self, adapters: Option<&'a AdapterMap<B>>) -> Self {
        Self { adapters, ..self }
    }

    /// Position of row `i`.
    fn position(&self, i: usize) -> usize {
        match self.positions {
            Some(p) => p[i] as usize,
            None => self.mask.position(self.cache.len(), self.staged() + i),
        }
    }

    /// Staged rows that the pass keeps.
    fn staged(&self) -> usize {
        if self.extend { self.cache.staged } else { 0 }
    }
}

/// A place in the pass whose activations can be watched, to find where two implementations part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    /// Residual stream before the first layer.
    Embedding,
    /// Residual stream behind layer i.
    Layer(usize),
}

/// Hears the residual stream (`[rows, hidden]`, as f32) at every [`Tap`].
pub type Watch<'a> = &'a mut dyn FnMut(Tap, &[f32]);

impl<B: Backend> Model<B> {
    /// One pass over the rows of all `seqs`. Their tokens are staged in their caches; logits of the wanted rows, sequence
    /// after sequence, lie in `ws` until the next pass. Returns how many logit rows there are.
    ///
    /// # Errors
    /// More rows than the workspace or a cache holds, a token outside the vocabulary, a mask of other rows.
    pub fn forward(&self, seqs: &mut [Sequence<'_, B>], ws: &mut Workspace<B>) -> Result<usize> {
        self.forward_watched(seqs, ws, None)
    }

    /// [`Model::forward`], with the residual stream shown to `watch`.
    pub fn forward_watched(
        &self,
        seqs: &mut [Sequence<'_, B>],
        ws: &mut Workspace<B>,
        mut watch: Option<Watch<'_>>,
    ) -> Result<usize> {
        let (be, cfg, w) = (&*self.be, &self.cfg, &self.weights);
        let rows = self.plan(seqs, ws)?;
        let logit_rows = ws.rows.len();
        if rows == 0 {
            return Ok(0);
        }
        self.fill_rope(seqs, ws, rows)?;
        let mut adapted = Spans::of(seqs.iter().map(|s| (s.tokens.len(), s.adapters)), cfg.layers)?;
        ws.reserve_ranks(be, adapted.ranks())?;
        let (n, eps) = (rows * cfg.hidden, cfg.eps);
        let mut segments: Vec<Segment<'_, B>> = seqs
            .iter_mut()
            .map(|s| {
                let (past, staged, rows) = (s.cache.len(), s.staged(), s.tokens.len());
                s.cache.staged = staged + rows;
                Segment { kv: &mut s.cache.kv, past, staged, rows, mask: s.mask }
            })
            .collect();

        be.embed(ws.x.head_mut(n), &w.embed, &ws.tokens, cfg.embed_scale)?;
        self.show(&mut watch, Tap::Embedding, ws, n)?;
        for (i, l) in w.layers.iter().enumerate() {
            self.keep(ws, i, rows)?;
            let local = cfg.is_local(i);
            let spec = AttnSpec {
                heads: cfg.heads,
                kv_heads: cfg.kv_heads,
                head_dim: cfg.head_dim,
                scale: cfg.attn_scale,
                window: cfg.window.filter(|_| local),
            };
            let (nq, nk) = (rows * spec.q_dim(), rows * spec.kv_dim());
            be.rms_norm(ws.h.head_mut(n), ws.x.head(n), &l.attn_norm, eps)?;
            let qkv = [&*l.q, &*l.k, &*l.v];
            be.qkv(ws.q.head_mut(nq), ws.k.head_mut(nk), ws.v.head_mut(nk), ws.h.head(n), qkv)?;
            if adapted.has(i, Site::Qkv) {
                adapted.shrink(be, &mut ws.shrunk, &ws.h, i, Site::Qkv)?;
                for (role, y) in [(LayerRole::Q, &mut ws.q), (LayerRole::K, &mut ws.k), (LayerRole::V, &mut ws.v)] {
                    adapted.expand(be, y, 0, &ws.shrunk, i, role)?;
                }
            }
            if let Some([q_norm, k_norm]) = &l.qk_norm {
                be.head_norm(ws.q.head_mut(nq), q_norm, eps)?;
                be.head_norm(ws.k.head_mut(nk), k_norm, eps)?;
            }
            let table = &ws.rope[usize::from(local && cfg.local_rope.is_some())];
            let table = table.head(rows * cfg.head_dim);
            be.rope_stage(&mut ws.q, &mut ws.k, &ws.v, table, &mut segments, i, &spec)?;
            be.attention(ws.a.head_mut(nq), ws.q.head(nq), &segments, i, &spec)?;
            be.linear(ws.r.head_mut(n), ws.a.head(nq), &l.o, None)?;
            if adapted.has(i, Site::O) {
                adapted.shrink(be, &mut ws.shrunk, &ws.a, i, Site::O)?;
                adapted.expand(be, &mut ws.r, 0, &ws.shrunk, i, LayerRole::O)?;
            }
            if let Some([post_attn, _]) = &l.post_norms {
                be.add_normed(ws.x.head_mut(n), ws.r.head(n), post_attn, eps)?;
                be.rms_norm(ws.h.head_mut(n), ws.x.head(n), &l.mlp_norm, eps)?;
            } else {
                be.add_rms_norm(ws.h.head_mut(n), &mut ws.x, ws.r.head(n), &l.mlp_norm, rows, eps)?;
            }
            let ng = rows * cfg.ffn;
            if adapted.has(i, Site::GateUp) {
                let y = &mut ws.gate_up;
                be.linear(y.view_mut(0..ng), ws.h.head(n), &l.gate, None)?;
                be.linear(y.view_mut(ng..2 * ng), ws.h.head(n), &l.up, None)?;
                adapted.shrink(be, &mut ws.shrunk, &ws.h, i, Site::GateUp)?;
                adapted.expand(be, y, 0, &ws.shrunk, i, LayerRole::Gate)?;
                adapted.expand(be, y, ng, &ws.shrunk, i, LayerRole::Up)?;
                be.glu(ws.g.head_mut(ng), y.view(0..ng), y.view(ng..2 * ng), cfg.activation)?;
            } else {
                be.linear_glu(ws.g.head_mut(ng), ws.h.head(n), &l.gate, &l.up, cfg.activation, &mut ws.gate_up, rows)?;
            }
            be.linear(ws.r.head_mut(n), ws.g.head(ng), &l.down, None)?;
            if adapted.has(i, Site::Down) {
                adapted.shrink(be, &mut ws.shrunk, &ws.g, i, Site::Down)?;
                adapted.expand(be, &mut ws.r, 0, &ws.shrunk, i, LayerRole::Down)?;
            }
            match &l.post_norms {
                Some([_, post_mlp]) => be.add_normed(ws.x.head_mut(n), ws.r.head(n), post_mlp, eps)?,
                None => be.add(ws.x.head_mut(n), ws.r.head(n))?,
            }
            self.show(&mut watch, Tap::Layer(i), ws, n)?;
        }
        self.keep(ws, w.layers.len(), rows)?;
        if logit_rows > 0 {
            let p = logit_rows * cfg.hidden;
            be.gather_rows(ws.picked.head_mut(p), ws.x.head(n), &ws.rows, cfg.hidden)?;
            be.rms_norm(ws.h.head_mut(p), ws.picked.head(p), &w.final_norm, eps)?;
            let head = w.head.as_ref().unwrap_or(&w.embed);
            be.linear(ws.logits.head_mut(logit_rows * cfg.vocab), ws.h.head(p), head, None)?;
        }
        Ok(logit_rows)
    }

    /// Copies the residual stream to the taps at the input of layer `layer`.
    fn keep(&self, ws: &mut Workspace<B>, layer: usize, rows: usize) -> Result<()> {
        let d = self.cfg.hidden;
        for (_, to) in ws.taps.iter_mut().filter(|t| t.0 == layer) {
            self.be.gather_rows(to.head_mut(rows * d), ws.x.head(rows * d), &ws.every[..rows], d)?;
        }
        Ok(())
    }

    /// Checks a pass against every limit and lists its tokens and its logit rows in the workspace.
    fn plan(&self, seqs: &[Sequence<'_, B>], ws: &mut Workspace<B>) -> Result<usize> {
        ws.rows.clear();
        ws.tokens.clear();
        for s in seqs {
            let (n, at) = (s.tokens.len(), ws.tokens.len() as u32);
            let (before, staged, capacity) = (s.cache.len() + s.staged(), s.staged() + n, s.cache.capacity());
            ensure!(before + n <= capacity, Capacity, "{n} tokens behind {before} exceed the context of {capacity}");
            s.mask.check(staged)?;
            if let Some(p) = s.positions {
                let fits = p.len() == n && self.cfg.window.is_none();
                ensure!(
                    fits,
                    Shape,
                    "{} positions for {n} tokens, in a model with a window of {:?}",
                    p.len(),
                    self.cfg.window
                );
            }
            ws.tokens.extend_from_slice(s.tokens);
            match s.want {
                Want::Nothing => {}
                Want::Last => ws.rows.extend((n as u32 + at).checked_sub(1).filter(|_| n > 0)),
                Want::All => ws.rows.extend(at..at + n as u32),
                Want::Rows(r) => {
                    ensure!(r.iter().all(|&r| (r as usize) < n), Shape, "logit rows {r:?} of {n} tokens");
                    ws.rows.extend(r.iter().map(|r| at + r));
                }
            }
        }
        let (rows, vocab) = (ws.tokens.len(), self.cfg.vocab);
        ensure!(rows <= ws.max_rows, Capacity, "{rows} rows in one pass; the workspace holds {}", ws.max_rows);
        let (want, most) = (ws.rows.len(), ws.max_logits);
        ensure!(want <= most, Capacity, "{want} rows want logits; the workspace holds {most}");
        let bad = ws.tokens.iter().find(|&&t| t as usize >= vocab);
        ensure!(bad.is_none(), Usage, "token {} is outside the vocabulary of {vocab}", bad.copied().unwrap_or(0));
        Ok(rows)
    }

    fn fill_rope(&self, seqs: &[Sequence<'_, B>], ws: &mut Workspace<B>, rows: usize) -> Result<()> {
        let ropes: [Option<&Rope>; 2] = [Some(&self.cfg.rope), self.cfg.local_rope.as_ref()];
        let d = self.cfg.head_dim;
        for (rope, buf) in ropes.into_iter().zip(&mut ws.rope) {
            let Some(rope) = rope else { continue };
            let positions = seqs.iter().flat_map(|s| (0..s.tokens.len()).map(|i| s.position(i)));
            rope.fill(positions, d, &mut ws.table);
            self.be.upload_acc(buf.head_mut(rows * d), &ws.table[..rows * d])?;
        }
        Ok(())
    }

    fn show(&self, watch: &mut Option<Watch<'_>>, tap: Tap, ws: &Workspace<B>, n: usize) -> Result<()> {
        if let Some(watch) = watch {
            let mut v = vec![0.0; n];
            self.be.download_acc(ws.x.head(n), &mut v)?;
            watch(tap, &v);
        }
        Ok(())
    }
}
