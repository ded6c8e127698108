//! EAGLE heads (Li et al. 2024, arXiv:2401.15077) that train; `heads/eagle.rs` says what they are.
//!
//! With h the target's states behind its final norm and y the head's output: mean SmoothL1(y_t, h_{t+1}) + 0.1 mean CE of the target's
//! likeliest tokens, by its own vocabulary matrix. One step is trained; the steps behind it, which read the head's own output, are counted.

use std::sync::Arc;

use super::forward::rows;
use super::layer::{Affine, LayerSaved, Published, TrainLayer, published, states};
use super::logits::{Logits, RowsSaid, losses, tiles};
use super::pass::{DraftVocab, HeadPass, Sequence};
use super::trainable::{Measured, Trainable};
use super::weights::HeadConfig;
use crate::backend::{Backend, Buffer, Train, Write};
use crate::error::{Result, ensure};
use crate::model::roles::NamedTensors;
use crate::model::{Model, Param};
use crate::train::checkpoint::NamedTensor;

/// Of the cross-entropy; that of the regression is 1.
const CROSS_ENTROPY: f32 = 0.1;

/// A head that trains, with its target and the room for passes.
pub struct Eagle1<B: Backend> {
    target: Arc<Model<B>>,
    fc: Affine<B>,
    layer: TrainLayer<B>,
    cfg: HeadConfig,
    vocab: DraftVocab,
    /// Of a pass; teacher's tokens; steps that are counted.
    rows: usize,
    k: usize,
    steps: usize,
    saved: Saved<B>,
}

struct Saved<B: Backend> {
    layer: LayerSaved<B>,
    scratch: B::Buf<B::Acc>,
    /// Embeddings of all rows, then their states; of later steps those of the slots.
    parts: B::Buf<B::Acc>,
    joined: B::Buf<B::Acc>,
    u: B::Buf<B::Act>,
    x: B::Buf<B::Acc>,
    /// Operands of all rows, and of the slots.
    s: [B::Buf<B::Act>; 2],
    first: B::Buf<B::Acc>,
    out: B::Buf<B::Acc>,
    normed: B::Buf<B::Act>,
    /// States that outputs should be.
    wanted: B::Buf<B::Acc>,
    loss: B::Buf<B::Acc>,
    logits: Logits<B>,
    dx: B::Buf<B::Acc>,
    ds: [B::Buf<B::Acc>; 2],
}

impl<B: Train> Eagle1<B> {
    /// The published `head` of `target`, in passes of up to `rows` rows; `k` tokens of each teacher are learnt, `steps` counted.
    ///
    /// # Errors
    /// `Weights` for a tensor that is missing or misshapen, `Config` for a head of another model; no memory.
    pub fn new(target: Arc<Model<B>>, head: &dyn NamedTensors, rows: usize, k: usize, steps: usize) -> Result<Self> {
        ensure!(rows > 0 && k > 0 && steps > 0, Usage, "training of {rows} rows, {k} tokens, {steps} steps");
        let (be, c) = (target.backend(), head.layer()?);
        let (d, vocab) = (target.config().hidden, target.config().vocab);
        let fits = (c.hidden, c.vocab) == (d, vocab);
        ensure!(fits, Config, "a head of width {} over {} tokens, its target {d} over {vocab}", c.hidden, c.vocab);
        let of = Published { be, head };
        let (fc, layer) = (of.affine("fc", d, 2 * d)?, of.layer("layers.0", &c)?);
        let acc = |width: usize| be.alloc::<B::Acc>(rows * width);
        let act = |width: usize| be.alloc::<B::Act>(rows * width);
        let saved = Saved {
            layer: layer.saved(be, rows, steps)?,
            scratch: acc(d)?,
            parts: acc(2 * d)?,
            joined: acc(2 * d)?,
            u: act(2 * d)?,
            x: acc(d)?,
            s: [act(d)?, act(d)?],
            first: acc(d)?,
            out: acc(d)?,
            normed: act(d)?,
            wanted: acc(d)?,
            loss: acc(1)?,
            logits: Logits::new(be, vocab)?,
            dx: acc(d)?,
            ds: [acc(d)?, acc(d)?],
        };
        let (cfg, vocab) = (HeadConfig::new(target.config(), 1, vocab), DraftVocab::all(vocab));
        Ok(Self { target, fc, layer, cfg, vocab, rows, k, steps, saved })
    }

    /// Step 0, and what its outputs should be.
    fn forward(&mut self, pass: &HeadPass) -> Result<()> {
        let Self { target, fc, layer, saved: s, .. } = self;
        let (be, (table, scale), d) = (target.backend(), target.embedding(), target.config().hidden);
        let (rows, slots) = (pass.rows(), pass.slots());
        let (n, m) = (rows * d, slots * d);
        be.embed(s.parts.head_mut(n), table, &pass.tokens, scale)?;
        states(target, pass, &mut s.scratch, &mut s.parts, n)?;
        side_by_side(be, s, rows, d)?;
        fc.forward(be, s.x.head_mut(n), s.u.head(2 * n), Write::Set)?;
        be.operand(s.s[0].head_mut(n), s.x.head(n))?;
        be.gather_rows(s.first.head_mut(m), s.x.head(n), &pass.slots, d)?;
        be.operand(s.s[1].head_mut(m), s.first.head(m))?;
        layer.read(be, pass, s.s[0].head(n), &mut s.layer)?;
        layer.ask(be, pass, 0, s.first.head(m), s.s[1].head(m), &mut s.out, &mut s.layer)?;
        // The last row of a sequence has no next one, and no weight.
        let next = |&r: &u32| (rows + (r as usize + 1).min(rows - 1)) as u32;
        let next: Vec<u32> = pass.slots.iter().map(next).collect();
        be.gather_rows(s.wanted.head_mut(m), s.parts.head(2 * n), &next, d)
    }

    /// Step `i`, from the output of the step before.
    fn again(&mut self, pass: &HeadPass, i: usize) -> Result<()> {
        let Self { target, fc, layer, saved: s, .. } = self;
        let (be, (table, scale), d) = (target.backend(), target.embedding(), target.config().hidden);
        let n = pass.slots() * d;
        be.embed(s.parts.head_mut(n), table, &pass.step(i, 0.0).tokens, scale)?;
        be.copy(s.parts.view_mut(n..2 * n), s.out.head(n))?;
        side_by_side(be, s, pass.slots(), d)?;
        fc.forward(be, s.first.head_mut(n), s.u.head(2 * n), Write::Set)?;
        be.operand(s.s[1].head_mut(n), s.first.head(n))?;
        layer.ask(be, pass, i, s.first.head(n), s.s[1].head(n), &mut s.out, &mut s.layer)
    }

    /// What the slots say in step `i`: their loss in step 0, with `weights` of regression and cross-entropy, and their likeliest tokens, or,
    /// with `learn`, the gradient of the outputs in `dx`.
    fn say(&mut self, pass: &HeadPass, i: usize, weights: [f32; 2], learn: bool) -> Result<(f64, Vec<u32>)> {
        let Self { target, k, saved: s, .. } = self;
        let (be, w, d, slots) = (target.backend(), target.vocabulary(), target.config().hidden, pass.slots());
        let (n, [regression, entropy]) = (slots * d, weights);
        let (mut loss, mut said) = (0.0, RowsSaid::default());
        if i == 0 {
            let weight = |slot| if pass.wanted(slot, 1).is_some() { regression } else { 0.0 };
            let each: Vec<f32> = (0..slots).map(weight).collect();
            let dx = s.dx.head_mut(n);
            be.smooth_l1(s.loss.head_mut(slots), dx, s.out.head(n), s.wanted.head(n), &each)?;
            loss += f64::from(regression) * losses(be, &s.loss, &each)?.iter().sum::<f64>();
        }
        be.operand(s.normed.head_mut(n), s.out.head(n))?;
        let rows = pass.step(i, if i == 0 { entropy } else { 0.0 });
        for tile in tiles(slots) {
            let (at, len) = (tile.start, tile.len());
            let dz = s.logits.say(be, rows!(s.normed, at, len, d), (w, None), &rows, *k, tile, !learn, &mut said)?;
            if learn {
                be.linear_bwd_x(rows!(mut s.dx, at, len, d), dz, w, Write::Add)?;
            }
        }
        Ok((loss + f64::from(entropy) * said.loss.iter().sum::<f64>(), said.token))
    }

    /// From the gradient of the outputs.
    fn backward(&mut self, pass: &HeadPass) -> Result<()> {
        let Self { target, fc, layer, saved: s, .. } = self;
        let (be, d, n, m) = (target.backend(), self.cfg.hidden, pass.rows(), pass.slots());
        let operands = [s.s[0].head(n * d), s.s[1].head(m * d)];
        layer.backward(be, pass, operands, &mut s.dx, &mut s.ds, &mut s.layer)?;
        // The operands are the residual stream itself.
        let [all, own] = &mut s.ds;
        be.axpy(own.head_mut(m * d), 1.0, s.dx.head(m * d))?;
        be.scatter_rows(all.head_mut(n * d), own.head(m * d), &pass.slots, d)?;
        fc.learn(be, all.head(n * d), s.u.head(2 * n * d), n)
    }
}

/// Embeddings and states of `rows` rows as operands side by side.
fn side_by_side<B: Train>(be: &B, s: &mut Saved<B>, rows: usize, d: usize) -> Result<()> {
    let (n, index) = (2 * rows * d, (0..rows as u32).flat_map(|r| [r, rows as u32 + r]).collect::<Vec<_>>());
    be.gather_rows(s.joined.head_mut(n), s.parts.head(n), &index, d)?;
    be.operand(s.u.head_mut(n), s.joined.head(n))
}

impl<B: Train> Trainable<B> for Eagle1<B> {
    fn params(&self) -> Vec<&Param<B>> {
        self.fc.params().chain(self.layer.params()).collect()
    }

    fn params_mut(&mut self) -> Vec<&mut Param<B>> {
        self.fc.params_mut().chain(self.layer.params_mut()).collect()
    }

    fn refresh(&mut self) -> Result<()> {
        let be = self.target.backend();
        self.fc.refresh(be)?;
        self.layer.refresh(be)
    }

    fn pass(&mut self, sequences: &[&Sequence], learn: bool) -> Result<Measured> {
        let passes = HeadPass::packed(&self.cfg, sequences, &self.vocab, self.k, self.rows)?;
        let mut measured = Measured { rows: passes.iter().map(|p| p.active(0)).sum(), ..Measured::default() };
        let next: usize = passes.iter().map(|p| p.active(1)).sum();
        let weights = [1.0 / next.max(1) as f32, CROSS_ENTROPY / measured.rows.max(1) as f32];
        for pass in &passes {
            self.forward(pass)?;
            let (loss, token) = self.say(pass, 0, weights, learn)?;
            measured.loss += loss;
            if learn {
                self.backward(pass)?;
                continue;
            }
            let mut tokens = vec![token];
            for i in 1..self.steps {
                self.again(pass, i)?;
                tokens.push(self.say(pass, i, weights, false)?.1);
            }
            measured.count(pass.slots(), self.steps, |s, i| pass.wanted(s, i).map(|t| tokens[i][s] == t));
        }
        Ok(measured)
    }

    fn to_host(&self) -> Result<Vec<NamedTensor>> {
        published(self.target.backend(), self.params().into_iter())
    }
}
