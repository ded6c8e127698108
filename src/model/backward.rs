//! The backward pass: the forward pass's lines in reverse.

use super::full::Full;
use super::lora::{Adapter, Site, SiteAdapter};
use super::roles::{LayerRole, Role};
use super::saved::{Pass, Recompute, Saved};
use super::training::{Head, Run};
use super::weights::Model;
use crate::backend::{Buffer, Train, Write};
use crate::error::{Result, ensure};

impl<B: Train> Model<B> {
    /// Adds to the gradients of what trains, of `adapter` and of `full`, those of the loss that [`Model::head`] computed for
    /// the last pass. It ends at the lowest layer in which anything trains.
    ///
    /// # Errors
    /// The device's; a layer that trains, but was not kept.
    pub fn backward(
        &self,
        pass: &Pass,
        saved: &mut Saved<B>,
        head: &Head<B>,
        mut adapter: Option<&mut Adapter<B>>,
        mut full: Option<&mut Full<B>>,
    ) -> Result<()> {
        let (be, cfg, rows) = (&*self.be, &self.cfg, pass.rows());
        let (n, wanted) = (rows * cfg.hidden, pass.wanted.len());
        let lowest = match (&full, adapter.as_ref().and_then(|a| a.lowest())) {
            (Some(_), _) => 0,
            (None, Some(lowest)) => lowest,
            (None, None) => return Ok(()),
        };
        ensure!(lowest >= saved.lowest, Shape, "layer {lowest} trains; layers below {} are not kept", saved.lowest);
        if wanted == 0 {
            return Ok(());
        }
        let p = wanted * cfg.hidden;
        let dw = full.as_mut().and_then(|f| f.grad(Role::FinalNorm));
        let (dout, picked) = (head.dout(wanted, cfg.hidden), saved.picked.head(p));
        let room = &mut saved.room;
        be.rms_norm_bwd(room.dh.head_mut(p), dw, dout, picked, &self.weights.final_norm, cfg.eps, Write::Set)?;
        be.zero(room.dx.head_mut(n))?;
        be.scatter_rows(room.dx.head_mut(n), room.dh.head(p), &pass.wanted, cfg.hidden)?;
        for i in (lowest..cfg.layers).rev() {
            if saved.recompute == Recompute::Layer {
                self.layer(i, pass, adapter.as_deref(), saved, Run::Again)?;
            }
            let last = i == lowest && full.is_none();
            self.layer_backward(i, pass, adapter.as_deref_mut(), full.as_deref_mut(), saved, last)?;
        }
        if let Some(dw) = full.as_mut().and_then(|f| f.grad(Role::Embed)) {
            be.embed_bwd(dw, saved.room.dx.head(n), &pass.tokens, cfg.embed_scale)?;
        }
        Ok(())
    }

    /// Turns `room.dx` from the gradient of layer `i`'s output into that of its input; not where it is the `last` layer
    /// that trains.
    fn layer_backward(
        &self,
        i: usize,
        pass: &Pass,
        mut adapter: Option<&mut Adapter<B>>,
        mut full: Option<&mut Full<B>>,
        saved: &mut Saved<B>,
        last: bool,
    ) -> Result<()> {
        use LayerRole::*;
        let (be, cfg, l, rows) = (&*self.be, &self.cfg, &self.weights.layers[i], pass.rows());
        let (spec, eps, (rope, seen)) = (self.spec(i), cfg.eps, self.tables(i));
        let (n, nq, nk, ng) = (rows * cfg.hidden, rows * spec.q_dim(), rows * spec.kv_dim(), rows * cfg.ffn);
        let set = saved.set(i);
        let (x, s, room) = (saved.x[i].head(n), &saved.layers[set], &mut saved.room);
        let inverse = saved.rope[rope][1].head(rows * cfg.head_dim);
        macro_rules! grad {
            ($role:expr) => {
                full.as_mut().and_then(|f| f.grad(Role::Layer(i, $role)))
            };
        }
        // The gradients of what adapts these linears, and the gradient of their input.
        macro_rules! through {
            ($site:ident, $dx:ident, $x:expr, $linears:expr) => {{
                let site = adapter.as_mut().and_then(|a| a.site_mut(i, Site::$site));
                let shrunk = &s.shrunk[Site::$site as usize];
                let dx = if last && matches!(Site::$site, Site::Qkv) { None } else { Some(&mut room.$dx) };
                SiteAdapter::linears_backward(be, site, $linears, $x, shrunk, &mut room.dshrunk, dx, rows)?;
            }};
        }

        // The MLP: x += down(glu(gate h, up h)), h = norm(mid).
        let dy = match (&s.post, &l.post_norms) {
            (Some([_, mlp]), Some([_, norm])) => {
                let dw = grad!(PostMlpNorm);
                be.rms_norm_bwd(room.r.head_mut(n), dw, room.dx.head(n), mlp.head(n), norm, eps, Write::Set)?;
                room.r.head(n)
            }
            _ => room.dx.head(n),
        };
        let (gate, up) = (s.gate.head(ng), s.up.head(ng));
        let z = match &s.operands {
            Some([.., z]) => z.head(ng),
            None => {
                be.glu(room.z.head_mut(ng), gate, up, cfg.activation)?;
                room.z.head(ng)
            }
        };
        if let Some(dw) = grad!(Down) {
            be.linear_bwd_w(dw, dy, z, rows)?;
        }
        through!(Down, dz, z, [(Down, dy, &*l.down)]);
        be.glu_bwd(room.dgate.head_mut(ng), room.dup.head_mut(ng), room.dz.head(ng), gate, up, cfg.activation)?;
        let h = match &s.operands {
            Some([_, h, _]) => h.head(n),
            None => {
                be.rms_norm(room.h.head_mut(n), s.mid.head(n), &l.mlp_norm, eps)?;
                room.h.head(n)
            }
        };
        let (dgate, dup) = (room.dgate.head(ng), room.dup.head(ng));
        for (role, dy) in [(Gate, dgate), (Up, dup)] {
            if let Some(dw) = grad!(role) {
                be.linear_bwd_w(dw, dy, h, rows)?;
            }
        }
        through!(GateUp, dh, h, [(Gate, dgate, &*l.gate), (Up, dup, &*l.up)]);
        let dw = grad!(MlpNorm);
        be.rms_norm_bwd(room.dx.head_mut(n), dw, room.dh.head(n), s.mid.head(n), &l.mlp_norm, eps, Write::Add)?;

        // Attention: mid = x + o(attend(rope(norm(q h)), rope(norm(k h)), v h)), h = norm(x).
        let dy = match (&s.post, &l.post_norms) {
            (Some([attn, _]), Some([norm, _])) => {
                let dw = grad!(PostAttnNorm);
                be.rms_norm_bwd(room.r.head_mut(n), dw, room.dx.head(n), attn.head(n), norm, eps, Write::Set)?;
                room.r.head(n)
            }
            _ => room.dx.head(n),
        };
        let a = s.a.head(nq);
        if let Some(dw) = grad!(O) {
            be.linear_bwd_w(dw, dy, a, rows)?;
        }
        through!(O, da, a, [(O, dy, &*l.o)]);
        be.attend_bwd(
            room.dq.head_mut(nq),
            room.dk.head_mut(nk),
            room.dv.head_mut(nk),
            room.da.head(nq),
            a,
            s.lse.head(rows * cfg.heads),
            s.q.head(nq),
            s.k.head(nk),
            s.v.head(nk),
            &pass.visible[seen],
            &spec,
        )?;
        be.rope(room.dq.head_mut(nq), inverse, cfg.head_dim)?;
        be.rope(room.dk.head_mut(nk), inverse, cfg.head_dim)?;
        if let (Some([q, k]), Some([q_norm, k_norm])) = (&s.pre, &l.qk_norm) {
            let dw = grad!(QNorm);
            be.rms_norm_bwd(room.dpre.head_mut(nq), dw, room.dq.head(nq), q.head(nq), q_norm, eps, Write::Set)?;
            be.copy(room.dq.head_mut(nq), room.dpre.head(nq))?;
            let dw = grad!(KNorm);
            be.rms_norm_bwd(room.dpre.head_mut(nk), dw, room.dk.head(nk), k.head(nk), k_norm, eps, Write::Set)?;
            be.copy(room.dk.head_mut(nk), room.dpre.head(nk))?;
        }
        let (dq, dk, dv) = (room.dq.head(nq), room.dk.head(nk), room.dv.head(nk));
        for (bias, dy) in [(QBias, dq), (KBias, dk), (VBias, dv)] {
            if let Some(db) = grad!(bias) {
                be.column_sums(db, dy)?;
            }
        }
        let h = match &s.operands {
            Some([h, ..]) => h.head(n),
            None => {
                be.rms_norm(room.h.head_mut(n), x, &l.attn_norm, eps)?;
                room.h.head(n)
            }
        };
        for (role, dy) in [(Q, dq), (K, dk), (V, dv)] {
            if let Some(dw) = grad!(role) {
                be.linear_bwd_w(dw, dy, h, rows)?;
            }
        }
        through!(Qkv, dh, h, [(Q, dq, &l.q.w), (K, dk, &l.k.w), (V, dv, &l.v.w)]);
        if last {
            return Ok(());
        }
        let dw = grad!(AttnNorm);
        be.rms_norm_bwd(room.dx.head_mut(n), dw, room.dh.head(n), x, &l.attn_norm, eps, Write::Add)
    }
}
