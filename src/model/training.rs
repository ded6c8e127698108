//! The forward pass of training: the same decoder as `forward`, over packed sequences, without a cache, keeping what
//! `backward` needs.

use std::ops::Range;

use super::config::Rope;
use super::lora::{Adapter, Site, SiteAdapter};
use super::roles::LayerRole;
use super::saved::{Pass, Saved};
use super::weights::Model;
use crate::backend::{AttnSpec, Backend, Buffer, In, Target, Train, Write};
use crate::dtype::Real;
use crate::error::{Result, ensure};

/// How a layer is run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Run {
    /// To the next layer's input.
    Forward,
    /// Again, for what the backward pass reads.
    Again,
}

impl<B: Backend> Model<B> {
    pub(super) fn spec(&self, layer: usize) -> AttnSpec {
        let cfg = &self.cfg;
        let window = cfg.window.filter(|_| cfg.is_local(layer));
        AttnSpec { heads: cfg.heads, kv_heads: cfg.kv_heads, head_dim: cfg.head_dim, scale: cfg.attn_scale, window }
    }

    /// Which table of rotations and which of visible rows a layer uses.
    pub(super) fn tables(&self, layer: usize) -> (usize, usize) {
        let local = self.cfg.is_local(layer);
        (usize::from(local && self.cfg.local_rope.is_some()), usize::from(local && self.cfg.window.is_some()))
    }
}

impl<B: Train> Model<B> {
    /// Runs the rows of `pass`, with `adapter` on top of the weights. The final hidden states of its wanted rows,
    /// normed, lie in `saved` for [`Model::head`].
    ///
    /// # Errors
    /// A pass larger than planned; the device's errors.
    pub fn forward_saved(&self, pass: &Pass, adapter: Option<&Adapter<B>>, saved: &mut Saved<B>) -> Result<()> {
        self.enter(pass, adapter, 0, saved)?;
        self.finish(pass, adapter, 0, saved)
    }

    /// The residual stream at the inputs of `layers`, `[rows, hidden]` each, of a pass that goes no further than the highest of them: 0 is
    /// the embedding.
    ///
    /// # Errors
    /// A layer that the model lacks; as [`Model::forward_saved`].
    pub fn hidden_at(
        &self,
        pass: &Pass,
        adapter: Option<&Adapter<B>>,
        layers: &[usize],
        saved: &mut Saved<B>,
    ) -> Result<Vec<Vec<f32>>> {
        let top = layers.iter().copied().max().unwrap_or(0);
        ensure!(top <= self.cfg.layers, Usage, "layer {top} of {}", self.cfg.layers);
        self.enter(pass, adapter, top, saved)?;
        let n = pass.rows() * self.cfg.hidden;
        let of = |&i: &usize| {
            let mut hidden = vec![0.0; n];
            self.be.download_acc(saved.x[i].head(n), &mut hidden)?;
            Ok(hidden)
        };
        layers.iter().map(of).collect()
    }

    /// [`Model::forward_saved`] from the input of `layer` on, where [`Model::hidden_at`] gave `hidden`: the same bits. Nothing below it
    /// may be adapted.
    ///
    /// # Errors
    /// Hidden states of other rows, an adapted layer below; as [`Model::forward_saved`].
    pub fn forward_from(
        &self,
        pass: &Pass,
        layer: usize,
        hidden: &[f32],
        adapter: Option<&Adapter<B>>,
        saved: &mut Saved<B>,
    ) -> Result<()> {
        let n = pass.rows() * self.cfg.hidden;
        ensure!(hidden.len() == n, Shape, "{} hidden values for {} rows", hidden.len(), pass.rows());
        ensure!(layer <= self.cfg.layers, Usage, "layer {layer} of {}", self.cfg.layers);
        let below = adapter.is_some_and(|a| a.layers[..layer].iter().flatten().any(Option::is_some));
        ensure!(!below, Usage, "an adapter below layer {layer}, where the pass begins");
        self.check(pass, saved)?;
        self.be.upload_acc(saved.x[layer].head_mut(n), hidden)?;
        self.finish(pass, adapter, layer, saved)
    }

    fn check(&self, pass: &Pass, saved: &mut Saved<B>) -> Result<()> {
        let rows = pass.rows();
        ensure!(rows <= saved.rows, Capacity, "{rows} rows in one training pass; {} are planned", saved.rows);
        let (wanted, most) = (pass.wanted.len(), saved.wanted_rows);
        ensure!(wanted <= most, Capacity, "{wanted} rows have a loss in one pass; {most} are planned");
        self.fill_tables(pass, saved)
    }

    /// The layers below `top`.
    fn enter(&self, pass: &Pass, adapter: Option<&Adapter<B>>, top: usize, saved: &mut Saved<B>) -> Result<()> {
        self.check(pass, saved)?;
        let n = pass.rows() * self.cfg.hidden;
        self.be.embed(saved.x[0].head_mut(n), &self.weights.embed, &pass.tokens, self.cfg.embed_scale)?;
        (0..top).try_for_each(|i| self.layer(i, pass, adapter, saved, Run::Forward))
    }

    /// The layers from `first` on, and the norm of the wanted rows.
    fn finish(&self, pass: &Pass, adapter: Option<&Adapter<B>>, first: usize, saved: &mut Saved<B>) -> Result<()> {
        let (be, cfg, wanted) = (&*self.be, &self.cfg, pass.wanted.len());
        (first..cfg.layers).try_for_each(|i| self.layer(i, pass, adapter, saved, Run::Forward))?;
        if wanted > 0 {
            let (n, p) = (pass.rows() * cfg.hidden, wanted * cfg.hidden);
            be.gather_rows(saved.picked.head_mut(p), saved.x[cfg.layers].head(n), &pass.wanted, cfg.hidden)?;
            be.rms_norm(saved.out.head_mut(p), saved.picked.head(p), &self.weights.final_norm, cfg.eps)?;
        }
        Ok(())
    }

    /// The input of a layer's q, k and v in the last pass, `[rows, hidden]`.
    ///
    /// # Errors
    /// The device's.
    pub fn attention_input(&self, layer: usize, pass: &Pass, saved: &mut Saved<B>) -> Result<Vec<f32>> {
        let (be, n) = (&*self.be, pass.rows() * self.cfg.hidden);
        let Saved { x, room, .. } = saved;
        be.rms_norm(room.h.head_mut(n), x[layer].head(n), &self.weights.layers[layer].attn_norm, self.cfg.eps)?;
        let mut out = vec![B::Act::default(); n];
        be.download(room.h.head(n), &mut out)?;
        Ok(out.iter().map(|x| x.to_f64() as f32).collect())
    }

    /// Layer `i` from `saved.x[i]`.
    pub(super) fn layer(
        &self,
        i: usize,
        pass: &Pass,
        adapter: Option<&Adapter<B>>,
        saved: &mut Saved<B>,
        run: Run,
    ) -> Result<()> {
        let (be, cfg, l, rows) = (&*self.be, &self.cfg, &self.weights.layers[i], pass.rows());
        let (spec, eps, (rope, seen)) = (self.spec(i), cfg.eps, self.tables(i));
        let (n, nq, nk, ng) = (rows * cfg.hidden, rows * spec.q_dim(), rows * spec.kv_dim(), rows * cfg.ffn);
        let set = saved.set(i);
        let Saved { x, layers, room, rope: tables, .. } = saved;
        let (before, behind) = x.split_at_mut(i + 1);
        let (x, next, s) = (&before[i], &mut behind[0], &mut layers[set]);
        let table = tables[rope][0].head(rows * cfg.head_dim);
        let site = |site: Site| adapter.and_then(|a| a.site(i, site));

        let h = s.operands.as_mut().map_or(&mut room.h, |o| &mut o[0]);
        be.rms_norm(h.head_mut(n), x.head(n), &l.attn_norm, eps)?;
        let h = h.head(n);
        let lora = SiteAdapter::shrunk(be, site(Site::Qkv), &mut s.shrunk[0], h, rows)?;
        let [q, k] = s.pre.as_mut().map_or([&mut s.q, &mut s.k], |[q, k]| [q, k]);
        for (role, y, l) in
            [(LayerRole::Q, &mut *q, &l.q), (LayerRole::K, &mut *k, &l.k), (LayerRole::V, &mut s.v, &l.v)]
        {
            SiteAdapter::linear(be, lora, role, y, h, &l.w, l.bias.as_ref(), Write::Set, rows)?;
        }
        if let (Some([q, k]), Some([q_norm, k_norm])) = (&s.pre, &l.qk_norm) {
            be.copy(s.q.head_mut(nq), q.head(nq))?;
            be.copy(s.k.head_mut(nk), k.head(nk))?;
            be.head_norm(s.q.head_mut(nq), q_norm, eps)?;
            be.head_norm(s.k.head_mut(nk), k_norm, eps)?;
        }
        be.rope(s.q.head_mut(nq), table, cfg.head_dim)?;
        be.rope(s.k.head_mut(nk), table, cfg.head_dim)?;
        let lse = s.lse.head_mut(rows * cfg.heads);
        let (q, k, v) = (s.q.head(nq), s.k.head(nk), s.v.head(nk));
        be.attend(s.a.head_mut(nq), lse, q, k, v, &pass.visible[seen], &spec)?;

        let a = s.a.head(nq);
        be.copy(s.mid.head_mut(n), x.head(n))?;
        let (to, write) = match &mut s.post {
            Some([attn, _]) => (attn, Write::Set),
            None => (&mut s.mid, Write::Add),
        };
        let lora = SiteAdapter::shrunk(be, site(Site::O), &mut s.shrunk[1], a, rows)?;
        SiteAdapter::linear(be, lora, LayerRole::O, to, a, &l.o, None, write, rows)?;
        if let (Some([attn, _]), Some([norm, _])) = (&s.post, &l.post_norms) {
            be.add_normed(s.mid.head_mut(n), attn.head(n), norm, eps)?;
        }

        let h = s.operands.as_mut().map_or(&mut room.h, |o| &mut o[1]);
        be.rms_norm(h.head_mut(n), s.mid.head(n), &l.mlp_norm, eps)?;
        let h = h.head(n);
        let lora = SiteAdapter::shrunk(be, site(Site::GateUp), &mut s.shrunk[2], h, rows)?;
        SiteAdapter::linear(be, lora, LayerRole::Gate, &mut s.gate, h, &l.gate, None, Write::Set, rows)?;
        SiteAdapter::linear(be, lora, LayerRole::Up, &mut s.up, h, &l.up, None, Write::Set, rows)?;
        let z = s.operands.as_mut().map_or(&mut room.z, |o| &mut o[2]);
        be.glu(z.head_mut(ng), s.gate.head(ng), s.up.head(ng), cfg.activation)?;
        let z = z.head(ng);
        let lora = SiteAdapter::shrunk(be, site(Site::Down), &mut s.shrunk[3], z, rows)?;
        // Behind this, only a post-norm's input is read by the backward pass.
        if run == Run::Again && s.post.is_none() {
            return Ok(());
        }
        if run == Run::Forward {
            be.copy(next.head_mut(n), s.mid.head(n))?;
        }
        let (to, write) = match &mut s.post {
            Some([_, mlp]) => (mlp, Write::Set),
            None => (&mut *next, Write::Add),
        };
        SiteAdapter::linear(be, lora, LayerRole::Down, to, z, &l.down, None, write, rows)?;
        if let (Run::Forward, Some([_, mlp]), Some([_, norm])) = (run, &s.post, &l.post_norms) {
            be.add_normed(next.head_mut(n), mlp.head(n), norm, eps)?;
        }
        Ok(())
    }

    /// Rotations of the pass's positions and their inverses.
    fn fill_tables(&self, pass: &Pass, saved: &mut Saved<B>) -> Result<()> {
        let ropes: [Option<&Rope>; 2] = [Some(&self.cfg.rope), self.cfg.local_rope.as_ref()];
        let d = self.cfg.head_dim;
        for (rope, bufs) in ropes.into_iter().zip(&mut saved.rope) {
            let Some(rope) = rope else { continue };
            let mut table = vec![0.0; pass.rows() * d];
            rope.fill(pass.positions.iter().map(|&p| p as usize), d, &mut table);
            self.be.upload_acc(bufs[0].head_mut(table.len()), &table)?;
            table.chunks_exact_mut(d).for_each(|row| row[d / 2..].iter_mut().for_each(|sin| *sin = -*sin));
            self.be.upload_acc(bufs[1].head_mut(table.len()), &table)?;
        }
        Ok(())
    }
}

/// Room for the vocabulary matrix: logits of a few rows at a time, so that `[rows, vocabulary]` never exists.
pub struct Head<B: Backend> {
    tile: usize,
    logits: B::Buf<B::Acc>,
    /// Logits for a second term.
    second: Option<B::Buf<B::Acc>>,
    loss: B::Buf<B::Acc>,
    /// Gradient of the wanted rows' hidden states.
    dout: B::Buf<B::Acc>,
}

impl<B: Train> Head<B> {
    /// For passes with up to `wanted` rows that have a loss, whose logits are computed `tile` rows at a time.
    pub fn new(model: &Model<B>, wanted: usize, tile: usize) -> Result<Self> {
        let (be, cfg, tile) = (&*model.be, &model.cfg, tile.clamp(1, wanted.max(1)));
        let [logits, dout] = [be.alloc(tile * cfg.vocab)?, be.alloc(wanted * cfg.hidden)?];
        Ok(Self { tile, logits, second: None, loss: be.alloc(tile)?, dout })
    }

    pub(super) fn dout(&self, rows: usize, hidden: usize) -> In<'_, B, B::Acc> {
        self.dout.head(rows * hidden)
    }
}

/// One part of a loss over wanted rows: what they should have been, and the weight of each row's gradient.
pub struct Term<'a, 't, B: Backend> {
    /// Of a range of wanted rows.
    pub target: &'a dyn Fn(Range<usize>) -> Target<'t, B>,
    /// Of all wanted rows.
    pub weights: &'a [f32],
}

impl<B: Train> Model<B> {
    /// The loss of each wanted row of the last pass, and, where `grad`, its gradient for [`Model::backward`]: that of
    /// the row's loss times its weight. `target` gives what the rows of a range should have been. `dw` is the gradient
    /// of the vocabulary matrix, if that trains.
    ///
    /// # Errors
    /// The device's.
    #[allow(clippy::too_many_arguments)]
    pub fn head<'t>(
        &self,
        pass: &Pass,
        saved: &Saved<B>,
        head: &mut Head<B>,
        target: impl Fn(Range<usize>) -> Target<'t, B>,
        weights: &[f32],
        grad: bool,
        full: Option<&mut super::Full<B>>,
    ) -> Result<Vec<f64>> {
        let mut losses = self.head_terms(pass, saved, head, &[Term { target: &target, weights }], grad, full)?;
        Ok(losses.swap_remove(0))
    }

    /// [`Model::head`] for a loss that is a sum of one or two terms: the losses of each.
    ///
    /// # Errors
    /// Another number of terms; the device's.
    pub fn head_terms(
        &self,
        pass: &Pass,
        saved: &Saved<B>,
        head: &mut Head<B>,
        terms: &[Term<'_, '_, B>],
        grad: bool,
        mut full: Option<&mut super::Full<B>>,
    ) -> Result<Vec<Vec<f64>>> {
        let (be, cfg, n) = (&*self.be, &self.cfg, pass.wanted.len());
        ensure!((1..=2).contains(&terms.len()), Shape, "a loss of {} terms", terms.len());
        for t in terms {
            ensure!(t.weights.len() == n, Shape, "{} weights for {n} rows that have a loss", t.weights.len());
        }
        if terms.len() == 2 && head.second.is_none() {
            head.second = Some(be.alloc(head.tile * cfg.vocab)?);
        }
        let w = self.weights.head.as_ref().unwrap_or(&self.weights.embed);
        let role = if cfg.tied { super::roles::Role::Embed } else { super::roles::Role::Head };
        let mut losses = vec![vec![0.0; n]; terms.len()];
        let mut part = vec![B::Acc::default(); head.tile];
        for first in (0..n).step_by(head.tile) {
            let r = first..n.min(first + head.tile);
            let (rows, h) = (r.len(), first * cfg.hidden..r.end * cfg.hidden);
            let (nv, x) = (rows * cfg.vocab, saved.out.view(h.clone()));
            be.linear_fwd(head.logits.head_mut(nv), x, w, None, Write::Set)?;
            if let Some(second) = head.second.as_mut().filter(|_| terms.len() == 2) {
                be.copy(second.head_mut(nv), head.logits.head(nv))?;
            }
            for (term, losses) in terms.iter().zip(&mut losses).rev() {
                let (loss, weights) = (head.loss.head_mut(rows), &term.weights[r.clone()]);
                let last = std::ptr::eq(term, &terms[0]);
                let logits = if last { &mut head.logits } else { head.second.as_mut().unwrap_or(&mut head.logits) };
                be.loss_rows(loss, logits.head_mut(nv), &(term.target)(r.clone()), weights)?;
                be.download(head.loss.head(rows), &mut part[..rows])?;
                losses[r.clone()].iter_mut().zip(&part).for_each(|(l, p)| *l = p.to_f64());
            }
            if grad {
                if let Some(second) = head.second.as_ref().filter(|_| terms.len() == 2) {
                    be.axpy(head.logits.head_mut(nv), 1.0, second.head(nv))?;
                }
                let dz = head.logits.head(nv);
                be.linear_bwd_x(head.dout.view_mut(h), dz, w, Write::Set)?;
                if let Some(dw) = full.as_mut().and_then(|f| f.grad(role)) {
                    be.linear_bwd_w(dw, dz, x, rows)?;
                }
            }
        }
        Ok(losses)
    }

    /// Shows `visit` the logits of each wanted row of the last pass.
    ///
    /// # Errors
    /// The device's.
    pub fn logits(
        &self,
        pass: &Pass,
        saved: &Saved<B>,
        head: &mut Head<B>,
        visit: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let (be, cfg, n) = (&*self.be, &self.cfg, pass.wanted.len());
        let mut logits = vec![0.0; head.tile * cfg.vocab];
        for first in (0..n).step_by(head.tile) {
            let r = first..n.min(first + head.tile);
            let nv = r.len() * cfg.vocab;
            let x = saved.out.view(first * cfg.hidden..r.end * cfg.hidden);
            be.linear_fwd(head.logits.head_mut(nv), x, self.vocabulary(), None, Write::Set)?;
            be.download_acc(head.logits.head(nv), &mut logits[..nv])?;
            logits[..nv].chunks_exact(cfg.vocab).zip(r).for_each(|(row, i)| visit(i, row));
        }
        Ok(())
    }

    /// The likeliest token behind each wanted row of the last pass.
    ///
    /// # Errors
    /// The device's.
    pub fn likeliest(&self, pass: &Pass, saved: &Saved<B>, head: &mut Head<B>) -> Result<Vec<u32>> {
        let (be, cfg, n) = (&*self.be, &self.cfg, pass.wanted.len());
        let (mut stats, mut argmax) = (be.alloc(3 * head.tile)?, be.alloc(head.tile)?);
        let mut tokens = vec![0; n];
        for first in (0..n).step_by(head.tile) {
            let r = first..n.min(first + head.tile);
            let (rows, nv) = (r.len(), r.len() * cfg.vocab);
            let x = saved.out.view(first * cfg.hidden..r.end * cfg.hidden);
            be.linear_fwd(head.logits.head_mut(nv), x, self.vocabulary(), None, Write::Set)?;
            be.logits_stats(stats.head_mut(3 * rows), argmax.head_mut(rows), head.logits.head(nv), cfg.vocab)?;
            be.download(argmax.head(rows), &mut tokens[r])?;
        }
        Ok(tokens)
    }
}
