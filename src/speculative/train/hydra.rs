//! Hydra heads with a prefix layer (Ankner et al. 2024, arXiv:2402.05109) that train; `heads/hydra.rs` says what they are.
//!
//! The loss is the sum over heads of the mean cross-entropy of the target's likeliest tokens. Behind a slot, head i reads the text's tokens
//! and has the teacher i positions further on.

use std::sync::Arc;

use super::backward::parts;
use super::forward::rows;
use super::layer::{Affine, LayerSaved, Published, TrainLayer, published, states};
use super::logits::{Logits, RowsSaid, tiles};
use super::pass::{DraftVocab, HeadPass, Sequence};
use super::trainable::{Measured, Trainable};
use super::weights::HeadConfig;
use crate::backend::{Backend, Buffer, Train, Write};
use crate::error::{Result, ensure};
use crate::model::config::Activation;
use crate::model::roles::NamedTensors;
use crate::model::{Model, Param};
use crate::speculative::heads::HYDRA_PREFIX as PREFIX;
use crate::train::checkpoint::NamedTensor;

/// One head.
struct Mlp<B: Backend> {
    straight: Affine<B>,
    gated: Affine<B>,
    /// Residual blocks, each once however often the file holds it.
    blocks: Vec<Affine<B>>,
    /// Which block each residual layer is.
    order: Vec<usize>,
    /// Further names of a block.
    same: Vec<(String, usize)>,
    vocabulary: Affine<B>,
}

impl<B: Train> Mlp<B> {
    fn linears(&self) -> impl Iterator<Item = &Affine<B>> {
        [&self.straight, &self.gated].into_iter().chain(&self.blocks).chain([&self.vocabulary])
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Affine<B>> {
        [&mut self.straight, &mut self.gated].into_iter().chain(&mut self.blocks).chain([&mut self.vocabulary])
    }
}

/// Heads that train, with their target and the room for passes.
pub struct Hydra<B: Backend> {
    target: Arc<Model<B>>,
    input_norm: Param<B>,
    layer: TrainLayer<B>,
    norm: Param<B>,
    heads: Vec<Mlp<B>>,
    cfg: HeadConfig,
    vocab: DraftVocab,
    /// Of a pass; teacher's tokens.
    rows: usize,
    k: usize,
    saved: Saved<B>,
}

struct Saved<B: Backend> {
    layer: LayerSaved<B>,
    /// States of all rows and of the slots, and both normed.
    x: [B::Buf<B::Acc>; 2],
    s: [B::Buf<B::Act>; 2],
    out: B::Buf<B::Acc>,
    /// e of the slots, then the embedding of the token that each reads, then of those behind it.
    table: B::Buf<B::Acc>,
    /// Of one head: rows of the table side by side, as operands, and their gradient.
    joined: B::Buf<B::Acc>,
    u: B::Buf<B::Act>,
    v: B::Buf<B::Acc>,
    /// What is activated, and the operands of each residual block and of the vocabulary matrix.
    l: Vec<B::Buf<B::Acc>>,
    h: Vec<B::Buf<B::Act>>,
    /// Factors of 1 for the gate of [`Train::glu_bwd`].
    ones: B::Buf<B::Acc>,
    logits: Logits<B>,
    dv: B::Buf<B::Acc>,
    dl: B::Buf<B::Acc>,
    de: B::Buf<B::Acc>,
    dx: B::Buf<B::Acc>,
    ds: [B::Buf<B::Acc>; 2],
    scratch: B::Buf<B::Acc>,
}

impl<B: Train> Hydra<B> {
    /// The published `head` of `target`, in passes of up to `rows` rows; `k` tokens of each teacher are learnt.
    ///
    /// # Errors
    /// `Weights` for a tensor that is missing or misshapen; no memory.
    pub fn new(target: Arc<Model<B>>, head: &dyn NamedTensors, rows: usize, k: usize) -> Result<Self> {
        ensure!(rows > 0 && k > 0, Usage, "training of {rows} rows, {k} tokens");
        let (be, c) = (target.backend(), target.config());
        let (d, vocab, of) = (c.hidden, c.vocab, Published { be, head });
        let mut heads = Vec::new();
        while of.has(&format!("hydra_mlp.{}.1.linear.weight", heads.len())) {
            heads.push(mlp(&of, heads.len(), d, vocab)?);
        }
        ensure!(!heads.is_empty(), Weights, "hydra_mlp.0.1.linear.weight is missing");
        let layer = of.layer(&format!("{PREFIX}.layers.0"), c)?;
        let [input_norm, norm] = ["layers.0.input_layernorm", "norm"].map(|n| format!("{PREFIX}.{n}.weight"));
        let acc = |width: usize| be.alloc::<B::Acc>(rows * width);
        let act = |width: usize| be.alloc::<B::Act>(rows * width);
        let blocks = heads.iter().map(|h| h.order.len()).max().unwrap_or(0);
        let mut ones = acc(d)?;
        be.upload_acc(ones.head_mut(rows * d), &vec![1.0; rows * d])?;
        let saved = Saved {
            layer: layer.saved(be, rows, 1)?,
            x: [acc(d)?, acc(d)?],
            s: [act(d)?, act(d)?],
            out: acc(d)?,
            table: acc((heads.len() + 1) * d)?,
            joined: acc((heads.len() + 1) * d)?,
            u: act((heads.len() + 1) * d)?,
            v: acc(d)?,
            l: (0..=blocks).map(|_| acc(d)).collect::<Result<_>>()?,
            h: (0..=blocks).map(|_| act(d)).collect::<Result<_>>()?,
            ones,
            logits: Logits::new(be, vocab)?,
            dv: acc(d)?,
            dl: acc(d)?,
            de: acc(d)?,
            dx: acc(d)?,
            ds: [acc(d)?, acc(d)?],
            scratch: acc(d)?,
        };
        Ok(Self {
            input_norm: of.vector(input_norm, d)?,
            norm: of.vector(norm, d)?,
            layer,
            heads,
            cfg: HeadConfig::new(c, 1, vocab),
            vocab: DraftVocab::all(vocab),
            rows,
            k,
            saved,
            target,
        })
    }

    /// The prefix layer, and the table that heads read.
    fn forward(&mut self, pass: &HeadPass) -> Result<()> {
        let Self { target, input_norm, layer, norm, heads, saved: s, .. } = self;
        let (be, (table, scale), d) = (target.backend(), target.embedding(), target.config().hidden);
        let (n, m, eps) = (pass.rows() * d, pass.slots() * d, layer.eps());
        let [all, own] = &mut s.x;
        states(target, pass, &mut s.scratch, all, 0)?;
        be.gather_rows(own.head_mut(m), all.head(n), &pass.slots, d)?;
        be.rms_norm(s.s[0].head_mut(n), all.head(n), &input_norm.w, eps)?;
        be.rms_norm(s.s[1].head_mut(m), own.head(m), &input_norm.w, eps)?;
        layer.read(be, pass, s.s[0].head(n), &mut s.layer)?;
        layer.ask(be, pass, 0, own.head(m), s.s[1].head(m), &mut s.out, &mut s.layer)?;
        be.zero(s.table.head_mut(m))?;
        be.add_normed(s.table.head_mut(m), s.out.head(m), &norm.w, eps)?;
        for i in 0..heads.len() {
            be.embed(s.table.view_mut((i + 1) * m..(i + 2) * m), table, &pass.step(i, 0.0).tokens, scale)?;
        }
        Ok(())
    }

    /// What head `i` says of the slots, each active one with this weight. With `learn`, its gradients are added, that of e too.
    fn head(&mut self, pass: &HeadPass, i: usize, weight: f32, learn: bool) -> Result<RowsSaid> {
        let Self { target, heads, k, saved: s, .. } = self;
        let (be, d, slots, wide) = (target.backend(), target.config().hidden, pass.slots(), i + 2);
        let (n, mlp) = (slots * d, &mut heads[i]);
        let side_by_side: Vec<u32> =
            (0..slots).flat_map(|s| (0..wide).map(move |part| (part * slots + s) as u32)).collect();
        be.gather_rows(s.joined.head_mut(wide * n), s.table.head(wide * n), &side_by_side, d)?;
        be.operand(s.u.head_mut(wide * n), s.joined.head(wide * n))?;
        let u = s.u.head(wide * n);
        mlp.straight.forward(be, s.v.head_mut(n), u, Write::Set)?;
        mlp.gated.forward(be, s.l[0].head_mut(n), u, Write::Set)?;
        be.add_activated(s.v.head_mut(n), s.l[0].head(n), Activation::Silu)?;
        be.operand(s.h[0].head_mut(n), s.v.head(n))?;
        for (j, &block) in mlp.order.iter().enumerate() {
            mlp.blocks[block].forward(be, s.l[j + 1].head_mut(n), s.h[j].head(n), Write::Set)?;
            be.add_activated(s.v.head_mut(n), s.l[j + 1].head(n), Activation::Silu)?;
            be.operand(s.h[j + 1].head_mut(n), s.v.head(n))?;
        }
        let (rows, last) = (pass.step(i, weight), &s.h[mlp.order.len()]);
        let (mut said, w) = (RowsSaid::default(), &mut mlp.vocabulary);
        for tile in tiles(slots) {
            let (at, len) = (tile.start, tile.len());
            let (x, matrix) = (rows!(last, at, len, d), (w.matrix(), w.bias.as_ref().map(|b| &b.w)));
            let dz = s.logits.say(be, x, matrix, &rows, *k, tile, !learn, &mut said)?;
            if learn {
                w.learn(be, dz, x, len)?;
                be.linear_bwd_x(rows!(mut s.dv, at, len, d), dz, w.matrix(), Write::Set)?;
            }
        }
        if !learn {
            return Ok(said);
        }

        // dl = dv silu'(l). The gradient of the factors of 1 is nobody's.
        macro_rules! activated {
            ($j:expr) => {{
                let (dl, nobody) = (s.dl.head_mut(n), s.scratch.head_mut(n));
                be.glu_bwd(dl, nobody, s.dv.head(n), s.l[$j].head(n), s.ones.head(n), Activation::Silu)?;
            }};
        }
        for (j, &block) in mlp.order.iter().enumerate().rev() {
            activated!(j + 1);
            mlp.blocks[block].learn(be, s.dl.head(n), s.h[j].head(n), slots)?;
            be.linear_bwd_x(s.dv.head_mut(n), s.dl.head(n), mlp.blocks[block].matrix(), Write::Add)?;
        }
        activated!(0);
        mlp.straight.learn(be, s.dv.head(n), u, slots)?;
        mlp.gated.learn(be, s.dl.head(n), u, slots)?;
        let readers = [(s.dv.head(n), mlp.straight.matrix()), (s.dl.head(n), mlp.gated.matrix())];
        be.linears_bwd_x(&mut s.joined, slots, &readers, None)?;
        let e: Vec<u32> = (0..slots).map(|s| (s * wide) as u32).collect();
        be.gather_rows(s.scratch.head_mut(n), s.joined.head(wide * n), &e, d)?;
        be.add(s.de.head_mut(n), s.scratch.head(n))?;
        Ok(said)
    }

    /// The prefix layer's, from the gradient of e.
    fn backward(&mut self, pass: &HeadPass) -> Result<()> {
        let Self { target, input_norm, layer, norm, saved: s, .. } = self;
        let (be, d, eps) = (target.backend(), target.config().hidden, layer.eps());
        let (n, m) = (pass.rows() * d, pass.slots() * d);
        let (w, dw) = parts(norm);
        be.rms_norm_bwd(s.dx.head_mut(m), dw, s.de.head(m), s.out.head(m), w, eps, Write::Set)?;
        let operands = [s.s[0].head(n), s.s[1].head(m)];
        layer.backward(be, pass, operands, &mut s.dx, &mut s.ds, &mut s.layer)?;
        for (i, n) in [n, m].into_iter().enumerate() {
            let (w, dw) = parts(input_norm);
            be.rms_norm_bwd(s.scratch.head_mut(n), dw, s.ds[i].head(n), s.x[i].head(n), w, eps, Write::Set)?;
        }
        Ok(())
    }
}

/// Head `i`.
fn mlp<B: Train>(of: &Published<'_, B>, i: usize, d: usize, vocab: usize) -> Result<Mlp<B>> {
    // Every second module of a published head is a dropout.
    let at = |j: usize| format!("hydra_mlp.{i}.{}", 2 * j + 1);
    let has = |j: usize| of.has(&format!("{}.linear.weight", at(j)));
    let layers = of.head.sizes("hydra_num_layers")?.and_then(|n| n.first().copied());
    let layers = layers.unwrap_or_else(|| (0..).take_while(|&j| has(j)).count());
    let (mut blocks, mut order, mut same) = (Vec::<Affine<B>>::new(), Vec::new(), Vec::new());
    for j in 1..layers {
        // All but the first layer are one block in training, of which a file may hold copies.
        if j > 1 && !has(j) {
            order.push(0);
            continue;
        }
        let name = format!("{}.linear", at(j));
        let block = of.affine(&name, d, d)?;
        let values = |a: &Affine<B>| a.params().map(|p| p.to_host(of.be)).collect::<Result<Vec<_>>>();
        let new = values(&block)?;
        let old = blocks.iter().map(values).collect::<Result<Vec<_>>>()?.iter().position(|old| *old == new);
        match old {
            Some(old) => same.push((name, old)),
            None => blocks.push(block),
        }
        order.push(old.unwrap_or(blocks.len() - 1));
    }
    Ok(Mlp {
        straight: of.affine(&format!("{}.res_connection", at(0)), d, (i + 2) * d)?,
        gated: of.affine(&format!("{}.linear", at(0)), d, (i + 2) * d)?,
        blocks,
        order,
        same,
        vocabulary: of.affine(&format!("hydra_lm_head.{i}.1"), vocab, d)?,
    })
}

impl<B: Train> Trainable<B> for Hydra<B> {
    fn params(&self) -> Vec<&Param<B>> {
        let heads = self.heads.iter().flat_map(Mlp::linears).flat_map(Affine::params);
        heads.chain(self.layer.params()).chain([&self.input_norm, &self.norm]).collect()
    }

    fn params_mut(&mut self) -> Vec<&mut Param<B>> {
        let heads = self.heads.iter_mut().flat_map(Mlp::linears_mut).flat_map(Affine::params_mut);
        heads.chain(self.layer.params_mut()).chain([&mut self.input_norm, &mut self.norm]).collect()
    }

    fn refresh(&mut self) -> Result<()> {
        let be = self.target.backend();
        self.heads.iter_mut().flat_map(Mlp::linears_mut).try_for_each(|l| l.refresh(be))?;
        self.layer.refresh(be)
    }

    fn pass(&mut self, sequences: &[&Sequence], learn: bool) -> Result<Measured> {
        let passes = HeadPass::packed(&self.cfg, sequences, &self.vocab, self.k, self.rows)?;
        let heads = self.heads.len();
        let active = |i: usize| passes.iter().map(|p| p.active(i)).sum::<usize>();
        let weights: Vec<f32> = (0..heads).map(|i| 1.0 / active(i).max(1) as f32).collect();
        let mut measured = Measured { rows: active(0), ..Measured::default() };
        for pass in &passes {
            self.forward(pass)?;
            let n = pass.slots() * self.cfg.hidden;
            self.target.backend().zero(self.saved.de.head_mut(n))?;
            let mut tokens = Vec::new();
            for (i, &weight) in weights.iter().enumerate() {
                let said = self.head(pass, i, weight, learn)?;
                measured.loss += f64::from(weight) * said.loss.iter().sum::<f64>();
                tokens.push(said.token);
            }
            if learn {
                self.backward(pass)?;
            } else {
                measured.count(pass.slots(), heads, |s, i| pass.wanted(s, i).map(|t| tokens[i][s] == t));
            }
        }
        Ok(measured)
    }

    fn to_host(&self) -> Result<Vec<NamedTensor>> {
        let be = self.target.backend();
        let mut all = published(be, self.params().into_iter())?;
        for (name, block) in self.heads.iter().flat_map(|h| h.same.iter().map(|(n, i)| (n, &h.blocks[*i]))) {
            for (mut tensor, end) in published(be, block.params())?.into_iter().zip(["weight", "bias"]) {
                tensor.0 = format!("{name}.{end}");
                all.push(tensor);
            }
        }
        Ok(all)
    }
}
