//! The backward pass: the forward pass's lines in reverse.

use super::config::Pool;
use super::roles::{BlockRole, VitRole};
use super::saved::VitSaved;
use super::weights::{Masters, Vit};
use crate::backend::{Buffer, Target, Train, Write};
use crate::dtype::Real;
use crate::error::{Result, ensure};
use crate::model::Adapter;
use crate::model::lora::{Site, SiteAdapter};
use crate::model::roles::LayerRole;

impl<B: Train> Vit<B> {
    /// The cross-entropy of each image of the last pass, nats. `saved.logits` become its gradient times the image's weight.
    pub(super) fn loss(&self, labels: &[u32], weights: &[f32], saved: &mut VitSaved<B>) -> Result<Vec<f64>> {
        let (be, n) = (&*self.be, saved.pass.images);
        ensure!(labels.len() == n && weights.len() == n, Shape, "{} labels for {n} images", labels.len());
        let v = n * self.cfg.classes;
        be.loss_rows(saved.loss.head_mut(n), saved.logits.head_mut(v), &Target::Hard(labels), weights)?;
        let mut losses = vec![B::Acc::default(); n];
        be.download(saved.loss.head(n), &mut losses)?;
        Ok(losses.into_iter().map(Real::to_f64).collect())
    }

    /// Adds to the gradients of what trains those of the loss whose gradient by the logits lies in `saved`. It ends at the lowest
    /// block in which anything trains.
    pub(super) fn backward(
        &self,
        saved: &mut VitSaved<B>,
        masters: &mut Masters<B>,
        mut adapter: Option<&mut Adapter<B>>,
    ) -> Result<()> {
        let (be, cfg) = (&*self.be, &self.cfg);
        let (images, rows, d) = (saved.pass.images, saved.pass.rows(), cfg.hidden);
        let (n, each) = (rows * d, images * d);
        let dz = saved.logits.head(images * cfg.classes);
        let out = saved.out.head(each);
        if let Some(dw) = masters.grad(VitRole::Head) {
            be.linear_bwd_w(dw, dz, out, images)?;
        }
        if let Some(db) = masters.grad(VitRole::HeadBias) {
            be.column_sums(db, dz)?;
        }
        let of_adapter = adapter.as_ref().and_then(|a| a.lowest());
        let Some(lowest) = masters.lowest(cfg.blocks).into_iter().chain(of_adapter).min() else { return Ok(()) };
        let embedding = masters.embedding_trains();
        ensure!(lowest >= saved.lowest, Shape, "block {lowest} trains; blocks below {} are not kept", saved.lowest);
        let room = &mut saved.room;
        be.linear_bwd_x(room.dout.head_mut(each), dz, &self.head.w, Write::Set)?;
        let (pooled, dout, dw) = (saved.pooled.head(each), room.dout.head(each), masters.grad(VitRole::Norm));
        be.layer_norm_bwd(room.dpooled.head_mut(each), dw, dout, pooled, &self.norm[0], cfg.eps, Write::Set)?;
        if let Some(db) = masters.grad(VitRole::NormBias) {
            be.column_sums(db, dout)?;
        }
        be.zero(room.dx.head_mut(n))?;
        match cfg.pool {
            Pool::Class => be.scatter_rows(room.dx.head_mut(n), room.dpooled.head(each), &saved.pass.class, d)?,
            Pool::Mean => {
                let patches = saved.pass.patches.len() * d;
                be.zero(room.each.head_mut(each))?;
                be.axpy(room.each.head_mut(each), 1.0 / cfg.patches() as f32, room.dpooled.head(each))?;
                be.gather_rows(room.patches.head_mut(patches), room.each.head(each), &saved.pass.image, d)?;
                be.scatter_rows(room.dx.head_mut(n), room.patches.head(patches), &saved.pass.patches, d)?;
            }
        }
        for i in (lowest..cfg.blocks).rev() {
            let norm =
                [BlockRole::Norm1, BlockRole::Norm1Bias].into_iter().any(|r| masters.trains(VitRole::Block(i, r)));
            let last = i == lowest && !embedding && !norm;
            self.block_backward(i, saved, masters, adapter.as_deref_mut(), last)?;
        }
        if embedding { self.embedding_backward(saved, masters) } else { Ok(()) }
    }

    /// Gradients of the patch embedding, the class token and the positions from that of the first block's input.
    fn embedding_backward(&self, saved: &mut VitSaved<B>, masters: &mut Masters<B>) -> Result<()> {
        let (be, cfg, d) = (&*self.be, &self.cfg, self.cfg.hidden);
        let VitSaved { pass, patches: kept, room, .. } = saved;
        let (n, each, embedded) = (pass.rows() * d, pass.images * d, pass.patches.len() * d);
        if let Some(dpositions) = masters.grad(VitRole::Positions) {
            be.embed_bwd(dpositions, room.dx.head(n), &pass.position, 1.0)?;
        }
        if let Some(dclass) = masters.grad(VitRole::ClassToken) {
            be.gather_rows(room.each.head_mut(each), room.dx.head(n), &pass.class, d)?;
            be.column_sums(dclass, room.each.head(each))?;
        }
        be.gather_rows(room.patches.head_mut(embedded), room.dx.head(n), &pass.patches, d)?;
        if let Some(dw) = masters.grad(VitRole::Patch) {
            let read = pass.patches.len() * cfg.patch_values();
            be.linear_bwd_w(dw, room.patches.head(embedded), kept.head(read), pass.patches.len())?;
        }
        match masters.grad(VitRole::PatchBias) {
            Some(db) => be.column_sums(db, room.patches.head(embedded)),
            None => Ok(()),
        }
    }

    /// Turns `room.dx` from the gradient of block `i`'s output into that of its input; not where it is the `last` block that
    /// trains.
    fn block_backward(
        &self,
        i: usize,
        saved: &mut VitSaved<B>,
        masters: &mut Masters<B>,
        mut adapter: Option<&mut Adapter<B>>,
        last: bool,
    ) -> Result<()> {
        use BlockRole::*;
        let (be, cfg, l, rows) = (&*self.be, &self.cfg, &self.blocks[i], saved.pass.rows());
        let (n, m, eps) = (rows * cfg.hidden, rows * cfg.mlp, cfg.eps);
        let set = saved.set(i);
        let VitSaved { pass, x, blocks, room, .. } = saved;
        let (x, s) = (x[i].head(n), &blocks[set]);
        macro_rules! grad {
            ($role:expr) => {
                masters.grad(VitRole::Block(i, $role))
            };
        }
        // Gradients of a linear's weight and bias.
        macro_rules! linear {
            ($w:ident, $b:ident, $dy:expr, $x:expr) => {{
                if let Some(dw) = grad!($w) {
                    be.linear_bwd_w(dw, $dy, $x, rows)?;
                }
                if let Some(db) = grad!($b) {
                    be.column_sums(db, $dy)?;
                }
            }};
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

        // The MLP: x += scale2 fc2(gelu(fc1 h)), h = norm2(mid).
        let dy = match (&s.unscaled, &l.scale2) {
            (Some([_, mlp]), Some(scale)) => {
                be.add_scaled_bwd(room.r.head_mut(n), grad!(Scale2), room.dx.head(n), mlp.head(n), scale)?;
                room.r.head(n)
            }
            _ => room.dx.head(n),
        };
        let (z, h) = (s.z.head(m), s.h[1].head(n));
        linear!(Fc2, Fc2Bias, dy, z);
        through!(Down, dz, z, [(LayerRole::Down, dy, &l.fc2.w)]);
        be.gelu_bwd(room.du.head_mut(m), room.dz.head(m), s.u.head(m))?;
        let du = room.du.head(m);
        linear!(Fc1, Fc1Bias, du, h);
        through!(GateUp, dh, h, [(LayerRole::Up, du, &l.fc1.w)]);
        if let Some(db) = grad!(Norm2Bias) {
            be.column_sums(db, room.dh.head(n))?;
        }
        let (dh, mid) = (room.dh.head(n), s.mid.head(n));
        be.layer_norm_bwd(room.dx.head_mut(n), grad!(Norm2), dh, mid, &l.norm2[0], eps, Write::Add)?;

        // Attention: mid = x + scale1 o(attend(q h, k h, v h)), h = norm1(x).
        let dy = match (&s.unscaled, &l.scale1) {
            (Some([attn, _]), Some(scale)) => {
                be.add_scaled_bwd(room.r.head_mut(n), grad!(Scale1), room.dx.head(n), attn.head(n), scale)?;
                room.r.head(n)
            }
            _ => room.dx.head(n),
        };
        let (a, h) = (s.a.head(n), s.h[0].head(n));
        linear!(O, OBias, dy, a);
        through!(O, da, a, [(LayerRole::O, dy, &l.o.w)]);
        be.attend_bwd(
            room.dq.head_mut(n),
            room.dk.head_mut(n),
            room.dv.head_mut(n),
            room.da.head(n),
            a,
            s.lse.head(rows * cfg.heads),
            s.q.head(n),
            s.k.head(n),
            s.v.head(n),
            &pass.visible,
            &cfg.attention(),
        )?;
        let (dq, dk, dv) = (room.dq.head(n), room.dk.head(n), room.dv.head(n));
        linear!(Q, QBias, dq, h);
        linear!(K, KBias, dk, h);
        linear!(V, VBias, dv, h);
        let linears = [(LayerRole::Q, dq, &l.q.w), (LayerRole::K, dk, &l.k.w), (LayerRole::V, dv, &l.v.w)];
        through!(Qkv, dh, h, linears);
        if last {
            return Ok(());
        }
        if let Some(db) = grad!(Norm1Bias) {
            be.column_sums(db, room.dh.head(n))?;
        }
        be.layer_norm_bwd(room.dx.head_mut(n), grad!(Norm1), room.dh.head(n), x, &l.norm1[0], eps, Write::Add)
    }
}
