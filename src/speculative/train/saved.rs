//! What the forward pass of a head keeps for its backward, and the room that both work in.

use super::logits::Logits;
use super::weights::HeadConfig;
use crate::backend::{Backend, Train};
use crate::error::{Result, ensure};

/// One unrolled step.
pub(super) struct StepSaved<B: Backend> {
    /// Embeddings of the tokens.
    pub(super) e: B::Buf<B::Acc>,
    /// Normed embeddings and features.
    pub(super) x: [B::Buf<B::Act>; 2],
    /// Rotated; as many rows as there are keys, the last of which are the slots'. So are `y` and `lse`.
    pub(super) q: B::Buf<B::Acc>,
    pub(super) y: B::Buf<B::Act>,
    pub(super) lse: B::Buf<B::Acc>,
    /// Residual stream between attention and MLP.
    pub(super) mid: B::Buf<B::Acc>,
    pub(super) h: B::Buf<B::Act>,
    pub(super) gate: B::Buf<B::Acc>,
    pub(super) up: B::Buf<B::Acc>,
    pub(super) z: B::Buf<B::Act>,
    /// Residual stream behind: the features of the next step.
    pub(super) out: B::Buf<B::Acc>,
    pub(super) normed: B::Buf<B::Act>,
    /// Gradient of `normed`.
    pub(super) dnormed: B::Buf<B::Acc>,
    /// Rotations of the slots' positions, and their inverses.
    pub(super) rope: [B::Buf<B::Acc>; 2],
}

/// Everything that passes of up to a planned number of rows need.
pub struct HeadSaved<B: Backend> {
    pub(super) rows: usize,
    pub(super) steps: Vec<StepSaved<B>>,
    pub(super) features: Vec<B::Buf<B::Act>>,
    /// Of all rows: embeddings, features behind `fc`, both normed.
    pub(super) e: B::Buf<B::Acc>,
    pub(super) g: B::Buf<B::Acc>,
    pub(super) x: [B::Buf<B::Act>; 2],
    pub(super) rope: [B::Buf<B::Acc>; 2],
    /// `g` of the slots.
    pub(super) first: B::Buf<B::Acc>,
    /// Of the rows, then of each later step's slots.
    pub(super) k: B::Buf<B::Acc>,
    pub(super) v: B::Buf<B::Acc>,
    pub(super) room: HeadRoom<B>,
}

pub(super) struct HeadRoom<B: Backend> {
    pub(super) logits: Logits<B>,
    /// Gradients, by what they are of: `g` of the slots and of all rows, normed things, the MLP's.
    pub(super) dx: B::Buf<B::Acc>,
    pub(super) dg: B::Buf<B::Acc>,
    pub(super) dh: [B::Buf<B::Acc>; 2],
    pub(super) scratch: B::Buf<B::Acc>,
    pub(super) dz: B::Buf<B::Acc>,
    pub(super) dgate: B::Buf<B::Acc>,
    pub(super) dup: B::Buf<B::Acc>,
    pub(super) dy: B::Buf<B::Acc>,
    pub(super) dq: B::Buf<B::Acc>,
    /// Of one step's attention, and of all.
    pub(super) dkv: [B::Buf<B::Acc>; 2],
    pub(super) dkv_all: [B::Buf<B::Acc>; 2],
}

impl<B: Train> HeadSaved<B> {
    /// For passes of up to `rows` rows and `steps` unrolled steps.
    ///
    /// # Errors
    /// No memory.
    pub fn new(be: &B, cfg: &HeadConfig, rows: usize, steps: usize) -> Result<Self> {
        ensure!(rows > 0 && steps > 0, Capacity, "a training pass of {rows} rows and {steps} steps");
        let acc = |n: usize, width: usize| be.alloc::<B::Acc>(n * width);
        let act = |n: usize, width: usize| be.alloc::<B::Act>(n * width);
        let HeadConfig { hidden: d, ffn, attention: a, .. } = cfg;
        let (d, ffn, q, kv, hd) = (*d, *ffn, a.q_dim(), a.kv_dim(), a.head_dim);
        let step = |i: usize| -> Result<StepSaved<B>> {
            let keys = (i + 1) * rows;
            Ok(StepSaved {
                e: acc(rows, d)?,
                x: [act(rows, d)?, act(rows, d)?],
                q: acc(keys, q)?,
                y: act(keys, q)?,
                lse: acc(keys, a.heads)?,
                mid: acc(rows, d)?,
                h: act(rows, d)?,
                gate: acc(rows, ffn)?,
                up: acc(rows, ffn)?,
                z: act(rows, ffn)?,
                out: acc(rows, d)?,
                normed: act(rows, d)?,
                dnormed: acc(rows, d)?,
                rope: [acc(rows, hd)?, acc(rows, hd)?],
            })
        };
        let keys = steps * rows;
        let kvs = || Ok([acc(keys, kv)?, acc(keys, kv)?]);
        Ok(Self {
            rows,
            steps: (0..steps).map(step).collect::<Result<_>>()?,
            features: (0..cfg.taps).map(|_| act(rows, d)).collect::<Result<_>>()?,
            e: acc(rows, d)?,
            g: acc(rows, d)?,
            x: [act(rows, d)?, act(rows, d)?],
            rope: [acc(rows, hd)?, acc(rows, hd)?],
            first: acc(rows, d)?,
            k: acc(keys, kv)?,
            v: acc(keys, kv)?,
            room: HeadRoom {
                logits: Logits::new(be, cfg.vocab)?,
                dx: acc(rows, d)?,
                dg: acc(rows, d)?,
                dh: [acc(rows, d)?, acc(rows, d)?],
                scratch: acc(rows, d)?,
                dz: acc(rows, ffn)?,
                dgate: acc(rows, ffn)?,
                dup: acc(rows, ffn)?,
                dy: acc(keys, q)?,
                dq: acc(keys, q)?,
                dkv: kvs()?,
                dkv_all: kvs()?,
            },
        })
    }
}
