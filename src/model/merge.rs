//! An adapter added to a model's weights, on the device.

use std::sync::Arc;

use super::lora::{Adapter, Module, SiteAdapter};
use super::roles::LayerRole;
use super::weights::{Model, Weights};
use crate::backend::{Buffer, Group, Linear, Train, WeightInfo};
use crate::error::Result;

impl<B: Train> Model<B> {
    /// The model with W + scale B A for each W that `adapter` adapts, in the type of [`Train::trainable`]. All other weights are shared.
    ///
    /// # Errors
    /// The device's.
    pub fn merged(&self, adapter: &Adapter<B>) -> Result<Self> {
        let (be, w) = (&*self.be, &self.weights);
        let mut layers = w.layers.clone();
        for (l, sites) in layers.iter_mut().zip(&adapter.layers) {
            for (site, m) in sites.iter().flatten().flat_map(|s| s.modules.iter().map(move |m| (s, m))) {
                let linear = |old: &Linear<B>| -> Result<Arc<Linear<B>>> {
                    let copy = |b: &B::Buf<B::Acc>| {
                        let mut to = be.alloc(b.len())?;
                        be.copy(to.head_mut(b.len()), b.head(b.len()))?;
                        Ok(to)
                    };
                    let bias = old.bias.as_ref().map(copy).transpose()?;
                    Ok(Arc::new(Linear { w: added(be, &old.w, site, m)?, bias }))
                };
                let matrix = |old: &B::Weight| added(be, old, site, m).map(Arc::new);
                match m.role {
                    LayerRole::Q => l.q = linear(&l.q)?,
                    LayerRole::K => l.k = linear(&l.k)?,
                    LayerRole::V => l.v = linear(&l.v)?,
                    LayerRole::O => l.o = matrix(&l.o)?,
                    LayerRole::Gate => l.gate = matrix(&l.gate)?,
                    LayerRole::Up => l.up = matrix(&l.up)?,
                    LayerRole::Down => l.down = matrix(&l.down)?,
                    other => unreachable!("adapters are of linears, not of {other}"),
                }
            }
        }
        let (embed, final_norm, head) = (w.embed.clone(), w.final_norm.clone(), w.head.clone());
        let weights = Weights { embed, layers, final_norm, head };
        Ok(Self { be: self.be.clone(), weights, cfg: self.cfg.clone() })
    }
}

/// W + scale B A.
fn added<B: Train>(be: &B, w: &B::Weight, site: &SiteAdapter<B>, m: &Module<B>) -> Result<B::Weight> {
    let (rows, cols, ranks) = (w.rows(), w.cols(), m.part);
    let (mut dense, mut b) = (be.alloc(rows * cols)?, be.alloc(rows * ranks.n)?);
    let every: Vec<u32> = (0..rows as u32).collect();
    be.embed(dense.head_mut(rows * cols), w, &every, 1.0)?;
    be.axpy(b.head_mut(rows * ranks.n), m.scale, m.b.values())?;
    let matrix = site.a.w.view(ranks.first * cols..(ranks.first + ranks.n) * cols);
    let group = Group { rows, matrix, scale: 1.0 };
    be.lora_shrink_bwd(dense.head_mut(rows * cols), b.head(rows * ranks.n), ranks.n, &[group])?;
    let mut to = be.trainable(rows, cols)?;
    be.set_weight(&mut to, dense.head(rows * cols))?;
    Ok(to)
}
