//! Forward pass of a head under training-time test (Li et al. 2025, arXiv:2503.01840): step 0 reads the target's features, each later
//! step what the step before made of them, as drafting does.

use super::layer::rotations;
use super::logits::{RowsSaid, tiles};
use super::pass::HeadPass;
use super::saved::HeadSaved;
use super::weights::{EagleHead, Linear, grad};
use crate::backend::{Backend, Buffer, Train, Write};
use crate::dtype::Real;
use crate::error::{Result, ensure};

/// The target's table of embeddings, and the factor on its rows.
pub type Embedding<'a, B> = (&'a <B as Backend>::Weight, f32);

/// What the steps of a pass said, `[steps][slots]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// Losses, nats; 0 where a slot has nothing to learn.
    pub loss: Vec<Vec<f64>>,
    /// Likeliest tokens, where they were asked for.
    pub token: Vec<Vec<u32>>,
}

/// The buffer's elements `from` to `from + n`, of what `x` is of one row.
macro_rules! rows {
    ($buf:expr, $from:expr, $n:expr, $width:expr) => {
        $buf.view($from * $width..($from + $n) * $width)
    };
    (mut $buf:expr, $from:expr, $n:expr, $width:expr) => {
        $buf.view_mut($from * $width..($from + $n) * $width)
    };
}
pub(super) use rows;

/// y = sum of w x over an input's parts.
macro_rules! product {
    ($be:expr, $y:expr, $ws:expr, $xs:expr) => {
        for (i, (l, x)) in $ws.iter().zip($xs).enumerate() {
            $be.linear_fwd($y, x, &l.w, None, if i == 0 { Write::Set } else { Write::Add })?;
        }
    };
}

impl<B: Train> EagleHead<B> {
    /// Runs all steps of `pass` and keeps what the backward pass needs.
    ///
    /// # Errors
    /// A pass larger than planned; the device's errors.
    pub fn forward(
        &self,
        be: &B,
        embedding: Embedding<'_, B>,
        pass: &HeadPass,
        saved: &mut HeadSaved<B>,
    ) -> Result<()> {
        let (cfg, n, slots) = (&self.cfg, pass.rows(), pass.slots());
        ensure!(n <= saved.rows, Capacity, "{n} rows in one training pass; {} are planned", saved.rows);
        ensure!(slots > 0, Usage, "a training pass without a token to learn");
        let (d, kv, hd) = (cfg.hidden, cfg.attention.kv_dim(), cfg.attention.head_dim);
        for (buf, values) in saved.features.iter_mut().zip(&pass.features) {
            let values: Vec<B::Act> = values.iter().map(|x| B::Act::of(x.to_f32())).collect();
            be.upload(buf.head_mut(n * d), &values)?;
        }
        let features = saved.features.iter().map(|f| f.head(n * d));
        product!(be, saved.g.head_mut(n * d), self.fc, features);

        // Keys and values of all rows.
        let (table, scale) = embedding;
        be.embed(saved.e.head_mut(n * d), table, &pass.tokens, scale)?;
        be.rms_norm(saved.x[0].head_mut(n * d), saved.e.head(n * d), &self.embed_norm.w, cfg.eps)?;
        be.rms_norm(saved.x[1].head_mut(n * d), saved.g.head(n * d), &self.hidden_norm.w, cfg.eps)?;
        let x = saved.x.each_ref().map(|x| x.head(n * d));
        product!(be, saved.k.head_mut(n * kv), self.k, x);
        product!(be, saved.v.head_mut(n * kv), self.v, x);
        let positions = pass.positions.iter().map(|&p| p as usize);
        rotations(be, &cfg.rope, hd, positions, &mut saved.rope)?;
        be.rope(saved.k.head_mut(n * kv), saved.rope[0].head(n * hd), hd)?;

        be.gather_rows(saved.first.head_mut(slots * d), saved.g.head(n * d), &pass.slots, d)?;
        (0..saved.steps.len()).try_for_each(|i| self.step(be, embedding, pass, saved, i))
    }

    fn step(
        &self,
        be: &B,
        (table, scale): Embedding<'_, B>,
        pass: &HeadPass,
        saved: &mut HeadSaved<B>,
        i: usize,
    ) -> Result<()> {
        let (cfg, slots, eps) = (&self.cfg, pass.slots(), self.cfg.eps);
        let spec = &cfg.attention;
        let (d, qd, kv, hd) = (cfg.hidden, spec.q_dim(), spec.kv_dim(), spec.head_dim);
        let (n, nf, keys) = (slots * d, slots * cfg.ffn, pass.rows() + i * slots);
        let own = keys - slots;
        let (before, behind) = saved.steps.split_at_mut(i);
        let s = &mut behind[0];
        let g = before.last().map_or(&saved.first, |s| &s.out).head(n);

        be.embed(s.e.head_mut(n), table, &pass.step(i, 0.0).tokens, scale)?;
        be.rms_norm(s.x[0].head_mut(n), s.e.head(n), &self.embed_norm.w, eps)?;
        be.rms_norm(s.x[1].head_mut(n), g, &self.hidden_norm.w, eps)?;
        let x = s.x.each_ref().map(|x| x.head(n));
        let positions = pass.slots.iter().map(|&r| pass.positions[r as usize] as usize + i);
        rotations(be, &cfg.rope, hd, positions, &mut s.rope)?;
        let rope = s.rope[0].head(slots * hd);
        // Nobody asks for the others, but what a diverged pass left there would spread.
        be.zero(s.q.head_mut(own * qd))?;
        product!(be, rows!(mut s.q, own, slots, qd), self.q, x);
        be.rope(rows!(mut s.q, own, slots, qd), rope, hd)?;
        if i > 0 {
            product!(be, rows!(mut saved.k, own, slots, kv), self.k, x);
            product!(be, rows!(mut saved.v, own, slots, kv), self.v, x);
            be.rope(rows!(mut saved.k, own, slots, kv), rope, hd)?;
        }
        let (k, v) = (saved.k.head(keys * kv), saved.v.head(keys * kv));
        let (y, lse) = (s.y.head_mut(keys * qd), s.lse.head_mut(keys * spec.heads));
        be.attend(y, lse, s.q.head(keys * qd), k, v, &pass.visible(i)?, spec)?;
        be.copy(s.mid.head_mut(n), g)?;
        be.linear_fwd(s.mid.head_mut(n), rows!(s.y, own, slots, qd), &self.o.w, None, Write::Add)?;

        be.rms_norm(s.h.head_mut(n), s.mid.head(n), &self.mlp_norm.w, eps)?;
        be.linear_fwd(s.gate.head_mut(nf), s.h.head(n), &self.gate.w, None, Write::Set)?;
        be.linear_fwd(s.up.head_mut(nf), s.h.head(n), &self.up.w, None, Write::Set)?;
        be.glu(s.z.head_mut(nf), s.gate.head(nf), s.up.head(nf), cfg.activation)?;
        be.copy(s.out.head_mut(n), s.mid.head(n))?;
        be.linear_fwd(s.out.head_mut(n), s.z.head(nf), &self.down.w, None, Write::Add)?;
        be.rms_norm(s.normed.head_mut(n), s.out.head(n), &self.last_norm.w, eps)
    }

    /// What the steps of the last forward pass say. Active slots of step i weigh `weights[i]`; where `grad`, the gradient of the weighted
    /// sum of their losses is ready for [`EagleHead::backward`], that of the vocabulary rows is added. `tokens`: the likeliest too.
    ///
    /// # Errors
    /// The device's.
    pub fn say(
        &mut self,
        be: &B,
        pass: &HeadPass,
        saved: &mut HeadSaved<B>,
        weights: &[f32],
        with_grad: bool,
        tokens: bool,
    ) -> Result<Said> {
        let (d, slots) = (self.cfg.hidden, pass.slots());
        let mut said = Said::default();
        let HeadSaved { steps, room, .. } = saved;
        ensure!(weights.len() == steps.len(), Shape, "{} weights of {} steps", weights.len(), steps.len());
        for (i, s) in steps.iter_mut().enumerate() {
            let rows = pass.step(i, weights[i]);
            let mut of = RowsSaid::default();
            for tile in tiles(slots) {
                let (at, n) = (tile.start, tile.len());
                let (Linear { p, w }, x) = (&mut self.lm_head, rows!(s.normed, at, n, d));
                let dz = room.logits.say(be, x, (&*w, None), &rows, pass.k, tile, tokens, &mut of)?;
                if with_grad {
                    be.linear_bwd_w(grad(p), dz, x, n)?;
                    be.linear_bwd_x(rows!(mut s.dnormed, at, n, d), dz, w, Write::Set)?;
                }
            }
            said.loss.push(of.loss);
            if tokens {
                said.token.push(of.token);
            }
        }
        Ok(said)
    }
}
