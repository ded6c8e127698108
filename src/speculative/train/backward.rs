//! Backward pass of a head: the lines of `forward` in reverse. Gradients of weights add up over steps; those of keys and values too,
//! since later steps see the keys of earlier ones.

use super::forward::rows;
use super::pass::HeadPass;
use super::saved::{HeadRoom, HeadSaved};
use super::weights::{EagleHead, Linear, grad};
use crate::backend::{Buffer, In, Out, Train, Write};
use crate::error::Result;
use crate::model::Param;

/// dw += dy^T x and dx = or += dy w, for each of an input's parts.
macro_rules! through {
    ($be:expr, $ws:expr, $dy:expr, $xs:expr, $dxs:expr, $rows:expr, $n:expr, $write:expr) => {
        for ((l, x), dx) in $ws.iter_mut().zip($xs).zip($dxs.iter_mut()) {
            $be.linear_bwd_w(grad(&mut l.p), $dy, x, $rows)?;
            $be.linear_bwd_x(dx.head_mut($n), $dy, &l.w, $write)?;
        }
    };
}

impl<B: Train> EagleHead<B> {
    /// Adds the gradients of what [`EagleHead::say`] weighed.
    ///
    /// # Errors
    /// The device's.
    pub fn backward(&mut self, be: &B, pass: &HeadPass, saved: &mut HeadSaved<B>) -> Result<()> {
        let (n, slots, steps, eps) = (pass.rows(), pass.slots(), saved.steps.len(), self.cfg.eps);
        let (d, kv, hd) = (self.cfg.hidden, self.cfg.attention.kv_dim(), self.cfg.attention.head_dim);
        for to in &mut saved.room.dkv_all {
            be.zero(to.head_mut((n + (steps - 1) * slots) * kv))?;
        }
        be.zero(saved.room.dx.head_mut(slots * d))?;
        for i in (0..steps).rev() {
            self.step_backward(be, pass, saved, i)?;
        }

        let HeadSaved { room, rope, x, e, g, features, .. } = saved;
        be.zero(room.dg.head_mut(n * d))?;
        be.scatter_rows(room.dg.head_mut(n * d), room.dx.head(slots * d), &pass.slots, d)?;
        be.rope(room.dkv_all[0].head_mut(n * kv), rope[1].head(n * hd), hd)?;
        let x = x.each_ref().map(|x| x.head(n * d));
        let (dk, dv) = (room.dkv_all[0].head(n * kv), room.dkv_all[1].head(n * kv));
        through!(be, self.k, dk, x, room.dh, n, n * d, Write::Set);
        through!(be, self.v, dv, x, room.dh, n, n * d, Write::Add);
        let HeadRoom { dh: [de, dh], scratch, dg, .. } = room;
        let (n_d, norms) = (n * d, [&mut self.embed_norm, &mut self.hidden_norm]);
        norms_backward(be, n_d, norms, [scratch, dg], [de.head(n_d), dh.head(n_d)], [e.head(n_d), g.head(n_d)], eps)?;
        for (Linear { p, .. }, f) in self.fc.iter_mut().zip(features) {
            be.linear_bwd_w(grad(p), dg.head(n_d), f.head(n_d), n)?;
        }
        Ok(())
    }

    /// Turns `room.dx` from the gradient of step `i`'s residual stream, as far as the next step knows it, into that of the features that
    /// the step reads.
    fn step_backward(&mut self, be: &B, pass: &HeadPass, saved: &mut HeadSaved<B>, i: usize) -> Result<()> {
        let (slots, eps, spec) = (pass.slots(), self.cfg.eps, self.cfg.attention);
        let (d, qd, kv, hd) = (self.cfg.hidden, spec.q_dim(), spec.kv_dim(), spec.head_dim);
        let (n, nf, keys) = (slots * d, slots * self.cfg.ffn, pass.rows() + i * slots);
        let own = keys - slots;
        let HeadSaved { steps, room, first, k, v, .. } = saved;
        let (before, behind) = steps.split_at_mut(i);
        let (s, g) = (&behind[0], before.last().map_or(&*first, |s| &s.out).head(n));

        let (w, dw) = parts(&mut self.last_norm);
        be.rms_norm_bwd(room.dx.head_mut(n), dw, s.dnormed.head(n), s.out.head(n), w, eps, Write::Add)?;

        // The MLP.
        let z = s.z.head(nf);
        be.linear_bwd_w(grad(&mut self.down.p), room.dx.head(n), z, slots)?;
        be.linear_bwd_x(room.dz.head_mut(nf), room.dx.head(n), &self.down.w, Write::Set)?;
        let (gate, up) = (s.gate.head(nf), s.up.head(nf));
        be.glu_bwd(room.dgate.head_mut(nf), room.dup.head_mut(nf), room.dz.head(nf), gate, up, self.cfg.activation)?;
        be.linear_bwd_w(grad(&mut self.gate.p), room.dgate.head(nf), s.h.head(n), slots)?;
        be.linear_bwd_w(grad(&mut self.up.p), room.dup.head(nf), s.h.head(n), slots)?;
        let readers = [(room.dgate.head(nf), &self.gate.w), (room.dup.head(nf), &self.up.w)];
        be.linears_bwd_x(&mut room.scratch, slots, &readers, None)?;
        let (w, dw) = parts(&mut self.mlp_norm);
        be.rms_norm_bwd(room.dx.head_mut(n), dw, room.scratch.head(n), s.mid.head(n), w, eps, Write::Add)?;

        // Attention. Queries that nobody asked for have no gradient.
        be.linear_bwd_w(grad(&mut self.o.p), room.dx.head(n), rows!(s.y, own, slots, qd), slots)?;
        be.zero(room.dy.head_mut(own * qd))?;
        be.linear_bwd_x(rows!(mut room.dy, own, slots, qd), room.dx.head(n), &self.o.w, Write::Set)?;
        let [dk, dv] = &mut room.dkv;
        be.attend_bwd(
            room.dq.head_mut(keys * qd),
            dk.head_mut(keys * kv),
            dv.head_mut(keys * kv),
            room.dy.head(keys * qd),
            s.y.head(keys * qd),
            s.lse.head(keys * spec.heads),
            s.q.head(keys * qd),
            k.head(keys * kv),
            v.head(keys * kv),
            &pass.visible(i)?,
            &spec,
        )?;
        for (all, one) in room.dkv_all.iter_mut().zip(&room.dkv) {
            be.axpy(all.head_mut(keys * kv), 1.0, one.head(keys * kv))?;
        }
        let (rope, x) = (s.rope[1].head(slots * hd), s.x.each_ref().map(|x| x.head(n)));
        be.rope(rows!(mut room.dq, own, slots, qd), rope, hd)?;
        through!(be, self.q, rows!(room.dq, own, slots, qd), x, room.dh, slots, n, Write::Set);
        if i > 0 {
            // No earlier step sees these keys: their gradients are whole.
            be.rope(rows!(mut room.dkv_all[0], own, slots, kv), rope, hd)?;
            let [dk, dv] = room.dkv_all.each_ref().map(|g| rows!(g, own, slots, kv));
            through!(be, self.k, dk, x, room.dh, slots, n, Write::Add);
            through!(be, self.v, dv, x, room.dh, slots, n, Write::Add);
        }
        let HeadRoom { dh: [de, dh], scratch, dx, .. } = room;
        let norms = [&mut self.embed_norm, &mut self.hidden_norm];
        norms_backward(be, n, norms, [scratch, dx], [de.head(n), dh.head(n)], [s.e.head(n), g], eps)
    }
}

/// A norm's weight and its gradient.
#[allow(clippy::type_complexity)]
pub(super) fn parts<B: Train>(p: &mut Param<B>) -> (&B::Buf<B::Acc>, Option<Out<'_, B, B::Acc>>) {
    let n = p.len();
    (&p.w, p.g.as_mut().map(|g| g.head_mut(n)))
}

/// Of the embeddings' norm only the weight learns; that of the features also adds to the gradient of what it reads, in `dx`.
fn norms_backward<B: Train>(
    be: &B,
    n: usize,
    [embed, hidden]: [&mut Param<B>; 2],
    [scratch, dx]: [&mut B::Buf<B::Acc>; 2],
    [de, dh]: [In<'_, B, B::Acc>; 2],
    [e, g]: [In<'_, B, B::Acc>; 2],
    eps: f32,
) -> Result<()> {
    let (w, dw) = parts(embed);
    be.rms_norm_bwd(scratch.head_mut(n), dw, de, e, w, eps, Write::Set)?;
    let (w, dw) = parts(hidden);
    be.rms_norm_bwd(dx.head_mut(n), dw, dh, g, w, eps, Write::Add)
}
