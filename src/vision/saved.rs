//! What a pass over images keeps for its backward, and the room that both work in.

use super::config::VitConfig;
use crate::backend::{AttnSpec, Backend, Train, Visible};
use crate::error::{Result, ensure};
use crate::model::Adapter;

/// Activations of one block, `[rows, ..]`.
pub(super) struct BlockSaved<B: Backend> {
    /// Normed inputs of attention and of the MLP.
    pub(super) h: [B::Buf<B::Act>; 2],
    pub(super) q: B::Buf<B::Acc>,
    pub(super) k: B::Buf<B::Acc>,
    pub(super) v: B::Buf<B::Acc>,
    /// Output of attention and logarithm of its denominators.
    pub(super) a: B::Buf<B::Act>,
    pub(super) lse: B::Buf<B::Acc>,
    /// Residual stream between attention and MLP.
    pub(super) mid: B::Buf<B::Acc>,
    /// Output of fc1, and what GELU makes of it.
    pub(super) u: B::Buf<B::Acc>,
    pub(super) z: B::Buf<B::Act>,
    /// Outputs of attention and MLP before LayerScale, in models that have it.
    pub(super) unscaled: Option<[B::Buf<B::Acc>; 2]>,
    /// Shrunk rows of the adapters' four sites.
    pub(super) shrunk: [B::Buf<B::Acc>; 4],
}

/// Everything that passes of up to a planned number of images need.
pub struct VitSaved<B: Backend> {
    pub(super) images: usize,
    /// The lowest block that is kept; those below share one set of buffers.
    pub(super) lowest: usize,
    /// Images of the last pass, and who sees whom in it.
    pub(super) pass: Layout,
    /// Patches of the images, and their embedding.
    pub(super) patches: B::Buf<B::Act>,
    /// Residual stream before each block, and behind the last.
    pub(super) x: Vec<B::Buf<B::Acc>>,
    pub(super) blocks: Vec<BlockSaved<B>>,
    /// What is pooled, and normed.
    pub(super) pooled: B::Buf<B::Acc>,
    pub(super) out: B::Buf<B::Act>,
    pub(super) logits: B::Buf<B::Acc>,
    pub(super) loss: B::Buf<B::Acc>,
    pub(super) room: Room<B>,
}

/// Which rows of a pass are what; the images of a pass follow one another.
#[derive(Default)]
pub(super) struct Layout {
    pub(super) images: usize,
    pub(super) visible: Visible,
    /// Rows of class tokens, if there are any, and of patches.
    pub(super) class: Vec<u32>,
    pub(super) patches: Vec<u32>,
    /// Each row's position in its image, and each patch's image.
    pub(super) position: Vec<u32>,
    pub(super) image: Vec<u32>,
}

impl Layout {
    pub(super) fn new(cfg: &VitConfig, images: usize) -> Self {
        let (tokens, patches, first) = (cfg.tokens() as u32, cfg.patches() as u32, u32::from(cfg.class_token));
        let n = images as u32;
        Self {
            images,
            visible: Visible::full(&vec![cfg.tokens(); images]),
            class: (0..n * first).map(|i| i * tokens).collect(),
            patches: (0..n).flat_map(|i| (0..patches).map(move |p| i * tokens + first + p)).collect(),
            position: (0..n).flat_map(|_| 0..tokens).collect(),
            image: (0..n).flat_map(|i| (0..patches).map(move |_| i)).collect(),
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.position.len()
    }
}

/// Scratch of both directions.
pub(super) struct Room<B: Backend> {
    /// Patches in or behind their embedding, and their gradients.
    pub(super) patches: B::Buf<B::Acc>,
    /// One row for each image.
    pub(super) each: B::Buf<B::Acc>,
    pub(super) dpooled: B::Buf<B::Acc>,
    pub(super) dout: B::Buf<B::Acc>,
    pub(super) dx: B::Buf<B::Acc>,
    pub(super) dh: B::Buf<B::Acc>,
    pub(super) r: B::Buf<B::Acc>,
    pub(super) da: B::Buf<B::Acc>,
    pub(super) dq: B::Buf<B::Acc>,
    pub(super) dk: B::Buf<B::Acc>,
    pub(super) dv: B::Buf<B::Acc>,
    pub(super) du: B::Buf<B::Acc>,
    pub(super) dz: B::Buf<B::Acc>,
    pub(super) dshrunk: B::Buf<B::Acc>,
}

impl<B: Train> VitSaved<B> {
    /// Plans passes of up to `images` images with adapters of the shape of `adapter`. Blocks below `lowest` have no backward.
    ///
    /// # Errors
    /// No images; no memory.
    pub fn new(be: &B, cfg: &VitConfig, images: usize, adapter: Option<&Adapter<B>>, lowest: usize) -> Result<Self> {
        ensure!(images > 0, Capacity, "a pass of no images");
        let rows = images * cfg.tokens();
        let acc = |n: usize| be.alloc::<B::Acc>(rows * n);
        let act = |n: usize| be.alloc::<B::Act>(rows * n);
        let (h, mlp, lowest) = (cfg.hidden, cfg.mlp, lowest.min(cfg.blocks));
        let ranks = adapter.map_or([0; 4], Adapter::ranks);
        let block = |_| -> Result<BlockSaved<B>> {
            Ok(BlockSaved {
                h: [act(h)?, act(h)?],
                q: acc(h)?,
                k: acc(h)?,
                v: acc(h)?,
                a: act(h)?,
                lse: acc(cfg.heads)?,
                mid: acc(h)?,
                u: acc(mlp)?,
                z: act(mlp)?,
                unscaled: cfg.layer_scale.then(|| Ok([acc(h)?, acc(h)?])).transpose()?,
                shrunk: [acc(ranks[0])?, acc(ranks[1])?, acc(ranks[2])?, acc(ranks[3])?],
            })
        };
        let sets = cfg.blocks - lowest + usize::from(lowest > 0);
        let embedded = images * cfg.patches() * h;
        let read = images * cfg.patches() * cfg.patch_values();
        Ok(Self {
            images,
            lowest,
            pass: Layout::default(),
            patches: be.alloc(read)?,
            x: (0..=cfg.blocks).map(|_| acc(h)).collect::<Result<_>>()?,
            blocks: (0..sets).map(block).collect::<Result<_>>()?,
            pooled: be.alloc(images * h)?,
            out: be.alloc(images * h)?,
            logits: be.alloc(images * cfg.classes)?,
            loss: be.alloc(images)?,
            room: Room {
                patches: be.alloc(read.max(embedded))?,
                each: be.alloc(images * h)?,
                dpooled: be.alloc(images * h)?,
                dout: be.alloc(images * h)?,
                dx: acc(h)?,
                dh: acc(h)?,
                r: acc(h)?,
                da: acc(h)?,
                dq: acc(h)?,
                dk: acc(h)?,
                dv: acc(h)?,
                du: acc(mlp)?,
                dz: acc(mlp)?,
                dshrunk: acc(ranks.into_iter().max().unwrap_or(0))?,
            },
        })
    }

    /// The set of buffers of a block.
    pub(super) fn set(&self, block: usize) -> usize {
        if self.lowest == 0 { block } else { (block + 1).saturating_sub(self.lowest) }
    }
}

impl VitConfig {
    pub(super) fn attention(&self) -> AttnSpec {
        let d = self.head_dim();
        AttnSpec { heads: self.heads, kv_heads: self.heads, head_dim: d, scale: (d as f32).powf(-0.5), window: None }
    }
}
