//! The forward pass: images of one pass are packed as sequences whose rows see one another.

use super::config::Pool;
use super::images::Images;
use super::saved::{Layout, VitSaved};
use super::weights::{Vit, all};
use crate::backend::{Buffer, Train, Write};
use crate::dtype::Real;
use crate::error::{Result, ensure};
use crate::model::Adapter;
use crate::model::lora::{Site, SiteAdapter};
use crate::model::roles::LayerRole;

impl<B: Train> Vit<B> {
    /// Runs images, with `adapter` on top of the weights. `saved` then holds what logits and the backward pass read.
    ///
    /// # Errors
    /// Images of another size than the model's; more than planned; the device's errors.
    pub fn forward(&self, images: &Images, adapter: Option<&Adapter<B>>, saved: &mut VitSaved<B>) -> Result<()> {
        let (be, cfg, n) = (&*self.be, &self.cfg, images.len());
        ensure!(n > 0 && n <= saved.images, Capacity, "{n} images in one pass; {} are planned", saved.images);
        let (found, size) = (images.shape(), [cfg.channels, cfg.image[0], cfg.image[1]]);
        ensure!(found == size, Shape, "images of {found:?} for a model of {size:?} (channels, height, width)");
        if saved.pass.images != n {
            saved.pass = Layout::new(cfg, n);
        }
        let (d, rows) = (cfg.hidden, saved.pass.rows());
        let patches = images.patches(cfg.patch);
        let (read, embedded) = (patches.len(), n * cfg.patches() * d);
        let VitSaved { pass, patches: kept, x, room, .. } = &mut *saved;
        be.upload_acc(room.patches.head_mut(read), &patches)?;
        be.operand(kept.head_mut(read), room.patches.head(read))?;
        let bias = self.patch.bias.as_ref();
        be.linear_fwd(room.patches.head_mut(embedded), kept.head(read), &self.patch.w, bias, Write::Set)?;
        be.gather_rows(x[0].head_mut(rows * d), all::<B>(&self.positions), &pass.position, d)?;
        be.scatter_rows(x[0].head_mut(rows * d), room.patches.head(embedded), &pass.patches, d)?;
        if let Some(class) = &self.class {
            be.gather_rows(room.each.head_mut(n * d), all::<B>(class), &vec![0; n], d)?;
            be.scatter_rows(x[0].head_mut(rows * d), room.each.head(n * d), &pass.class, d)?;
        }
        for i in 0..cfg.blocks {
            self.block(i, adapter, saved)?;
        }
        self.pool(cfg.blocks, saved)?;
        let [w, b] = &self.norm;
        be.layer_norm(saved.out.head_mut(n * d), saved.pooled.head(n * d), w, b, cfg.eps)
    }

    /// Block `i` from `saved.x[i]`.
    fn block(&self, i: usize, adapter: Option<&Adapter<B>>, saved: &mut VitSaved<B>) -> Result<()> {
        let (be, cfg, l, rows) = (&*self.be, &self.cfg, &self.blocks[i], saved.pass.rows());
        let (n, m, eps) = (rows * cfg.hidden, rows * cfg.mlp, cfg.eps);
        let set = saved.set(i);
        let VitSaved { pass, x, blocks, .. } = saved;
        let (before, behind) = x.split_at_mut(i + 1);
        let (x, next, s) = (&before[i], &mut behind[0], &mut blocks[set]);
        let site = |site: Site| adapter.and_then(|a| a.site(i, site));

        be.layer_norm(s.h[0].head_mut(n), x.head(n), &l.norm1[0], &l.norm1[1], eps)?;
        let h = s.h[0].head(n);
        let lora = SiteAdapter::shrunk(be, site(Site::Qkv), &mut s.shrunk[0], h, rows)?;
        for (role, y, l) in
            [(LayerRole::Q, &mut s.q, &l.q), (LayerRole::K, &mut s.k, &l.k), (LayerRole::V, &mut s.v, &l.v)]
        {
            SiteAdapter::linear(be, lora, role, y, h, &l.w, l.bias.as_ref(), Write::Set, rows)?;
        }
        let lse = s.lse.head_mut(rows * cfg.heads);
        let (q, k, v) = (s.q.head(n), s.k.head(n), s.v.head(n));
        be.attend(s.a.head_mut(n), lse, q, k, v, &pass.visible, &cfg.attention())?;
        let a = s.a.head(n);
        be.copy(s.mid.head_mut(n), x.head(n))?;
        let lora = SiteAdapter::shrunk(be, site(Site::O), &mut s.shrunk[1], a, rows)?;
        let (to, write) = match &mut s.unscaled {
            Some([attn, _]) => (attn, Write::Set),
            None => (&mut s.mid, Write::Add),
        };
        SiteAdapter::linear(be, lora, LayerRole::O, to, a, &l.o.w, l.o.bias.as_ref(), write, rows)?;
        if let (Some([attn, _]), Some(scale)) = (&s.unscaled, &l.scale1) {
            be.add_scaled(s.mid.head_mut(n), attn.head(n), scale)?;
        }

        be.layer_norm(s.h[1].head_mut(n), s.mid.head(n), &l.norm2[0], &l.norm2[1], eps)?;
        let h = s.h[1].head(n);
        let lora = SiteAdapter::shrunk(be, site(Site::GateUp), &mut s.shrunk[2], h, rows)?;
        let (w, bias) = (&l.fc1.w, l.fc1.bias.as_ref());
        SiteAdapter::linear(be, lora, LayerRole::Up, &mut s.u, h, w, bias, Write::Set, rows)?;
        be.gelu(s.z.head_mut(m), s.u.head(m))?;
        let z = s.z.head(m);
        let lora = SiteAdapter::shrunk(be, site(Site::Down), &mut s.shrunk[3], z, rows)?;
        be.copy(next.head_mut(n), s.mid.head(n))?;
        let (w, bias) = (&l.fc2.w, l.fc2.bias.as_ref());
        let (to, write) = match &mut s.unscaled {
            Some([_, mlp]) => (mlp, Write::Set),
            None => (&mut *next, Write::Add),
        };
        SiteAdapter::linear(be, lora, LayerRole::Down, to, z, w, bias, write, rows)?;
        match (&s.unscaled, &l.scale2) {
            (Some([_, mlp]), Some(scale)) => be.add_scaled(next.head_mut(n), mlp.head(n), scale),
            _ => Ok(()),
        }
    }

    /// What the head would read of the residual stream before block `x`, into `saved.pooled`.
    pub(super) fn pool(&self, x: usize, saved: &mut VitSaved<B>) -> Result<()> {
        let (be, d) = (&*self.be, self.cfg.hidden);
        let VitSaved { pass, x: stream, pooled, room, .. } = saved;
        let (n, rows, patches) = (pass.images * d, pass.rows() * d, pass.patches.len() * d);
        if self.cfg.pool == Pool::Class {
            return be.gather_rows(pooled.head_mut(n), stream[x].head(rows), &pass.class, d);
        }
        be.gather_rows(room.patches.head_mut(patches), stream[x].head(rows), &pass.patches, d)?;
        be.zero(pooled.head_mut(n))?;
        let share = 1.0 / self.cfg.patches() as f32;
        be.embed_bwd(pooled.head_mut(n), room.patches.head(patches), &pass.image, share)
    }

    /// The input of block `i`'s q, k and v in the last pass. Blocks without a backward share one place for theirs, so it is made again.
    pub(super) fn attention_input<'s>(&self, i: usize, saved: &'s mut VitSaved<B>) -> Result<&'s B::Buf<B::Act>> {
        let (n, set, [w, b]) = (saved.pass.rows() * self.cfg.hidden, saved.set(i), &self.blocks[i].norm1);
        let h = &mut saved.blocks[set].h[0];
        self.be.layer_norm(h.head_mut(n), saved.x[i].head(n), w, b, self.cfg.eps)?;
        Ok(h)
    }

    /// Appends the first `n` operands as f32.
    pub(super) fn wide(&self, from: &B::Buf<B::Act>, n: usize, into: &mut Vec<f32>) -> Result<()> {
        let mut values = vec![B::Act::default(); n];
        self.be.download(from.head(n), &mut values)?;
        into.extend(values.into_iter().map(|x| x.to_f64() as f32));
        Ok(())
    }

    /// Logits of the last pass, `[images, classes]`, into `saved.logits`; those of `forbidden` classes are -inf.
    pub(super) fn logits(&self, forbidden: &[u32], saved: &mut VitSaved<B>) -> Result<()> {
        let (be, cfg) = (&*self.be, &self.cfg);
        let (n, v) = (saved.pass.images * cfg.hidden, saved.pass.images * cfg.classes);
        let out = saved.out.head(n);
        be.linear_fwd(saved.logits.head_mut(v), out, &self.head.w, self.head.bias.as_ref(), Write::Set)?;
        if !forbidden.is_empty() {
            be.forbid(saved.logits.head_mut(v), cfg.classes, forbidden)?;
        }
        Ok(())
    }
}
