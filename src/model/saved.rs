//! What a training pass keeps for its backward, and the room that both work in.

use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use super::lora::Adapter;
use crate::backend::{Backend, Train, Visible};
use crate::error::{Result, ensure};

/// What is computed again in the backward pass instead of kept. Results are the same to the last bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    Nothing,
    /// Normed rows and gated activations: cheap to compute, a third of the memory.
    #[default]
    Pointwise,
    /// Everything but each layer's input: one more forward pass for a small part of the memory.
    Layer,
}

/// The rows of one training pass and who sees whom.
#[derive(Clone, Debug)]
pub struct Pass {
    pub(super) tokens: Vec<u32>,
    pub(super) positions: Vec<u32>,
    /// For layers without a window, and for layers with one.
    pub(super) visible: [Visible; 2],
    /// Rows whose final hidden state is wanted.
    pub(super) wanted: Vec<u32>,
}

impl Pass {
    /// `tokens` with their positions in their sequences; `visible` says who sees whom, `wanted` which rows a loss looks
    /// at. The model's window, if it has one, is applied by position on top.
    ///
    /// # Errors
    /// Lengths that differ, a token outside the vocabulary, wanted rows that are not there or come twice.
    pub fn new(
        cfg: &ModelConfig,
        tokens: Vec<u32>,
        positions: Vec<u32>,
        visible: Visible,
        wanted: Vec<u32>,
    ) -> Result<Self> {
        let rows = tokens.len();
        ensure!(rows > 0 && positions.len() == rows, Shape, "{} positions for {rows} tokens", positions.len());
        visible.check(rows)?;
        let bad = tokens.iter().find(|&&t| t as usize >= cfg.vocab);
        ensure!(bad.is_none(), Usage, "token {} is outside the vocabulary of {}", bad.copied().unwrap_or(0), cfg.vocab);
        let mut seen = vec![false; rows];
        for &r in &wanted {
            let first = seen.get_mut(r as usize).is_some_and(|s| !std::mem::replace(s, true));
            ensure!(first, Shape, "wanted row {r} of {rows} rows is not there, or comes twice");
        }
        let local = match cfg.window {
            Some(w) => visible.windowed(&positions, w)?,
            None => Visible::new(),
        };
        Ok(Self { tokens, positions, visible: [visible, local], wanted })
    }

    /// Sequences of these lengths, one after another, each seen from left to right.
    ///
    /// # Errors
    /// As [`Pass::new`].
    pub fn causal(cfg: &ModelConfig, tokens: Vec<u32>, lens: &[usize], wanted: Vec<u32>) -> Result<Self> {
        let positions = lens.iter().flat_map(|&n| 0..n as u32).collect();
        Self::new(cfg, tokens, positions, Visible::causal(lens), wanted)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows whose hidden state is wanted.
    pub fn wanted(&self) -> &[u32] {
        &self.wanted
    }
}

/// Activations of one layer, `[rows, ..]`.
pub(super) struct LayerSaved<B: Backend> {
    /// q and k before their norms, in models that have them.
    pub(super) pre: Option<[B::Buf<B::Acc>; 2]>,
    /// Rotated.
    pub(super) q: B::Buf<B::Acc>,
    /// Rotated.
    pub(super) k: B::Buf<B::Acc>,
    pub(super) v: B::Buf<B::Acc>,
    /// Output of attention and logarithm of its denominators.
    pub(super) a: B::Buf<B::Act>,
    pub(super) lse: B::Buf<B::Acc>,
    /// Outputs of attention and of the MLP before their post-norms, in models that have them.
    pub(super) post: Option<[B::Buf<B::Acc>; 2]>,
    /// Residual stream between attention and MLP.
    pub(super) mid: B::Buf<B::Acc>,
    pub(super) gate: B::Buf<B::Acc>,
    pub(super) up: B::Buf<B::Acc>,
    /// Shrunk rows of the adapters' four sites.
    pub(super) shrunk: [B::Buf<B::Acc>; 4],
    /// Normed inputs of attention and of the MLP, and the gated activations, where they are kept.
    pub(super) operands: Option<[B::Buf<B::Act>; 3]>,
}

/// Everything a training pass of up to a planned number of rows needs.
pub struct Saved<B: Backend> {
    pub(super) recompute: Recompute,
    pub(super) rows: usize,
    pub(super) wanted_rows: usize,
    /// The lowest layer that is kept; those below share one set of buffers.
    pub(super) lowest: usize,
    /// Residual stream before each layer, and behind the last.
    pub(super) x: Vec<B::Buf<B::Acc>>,
    pub(super) layers: Vec<LayerSaved<B>>,
    pub(super) picked: B::Buf<B::Acc>,
    /// Wanted rows, normed: what the head reads.
    pub(super) out: B::Buf<B::Act>,
    pub(super) rope: [[B::Buf<B::Acc>; 2]; 2],
    pub(super) room: Room<B>,
}

/// Scratch of both directions.
pub(super) struct Room<B: Backend> {
    pub(super) h: B::Buf<B::Act>,
    pub(super) z: B::Buf<B::Act>,
    pub(super) r: B::Buf<B::Acc>,
    pub(super) dx: B::Buf<B::Acc>,
    pub(super) dh: B::Buf<B::Acc>,
    pub(super) dq: B::Buf<B::Acc>,
    pub(super) dk: B::Buf<B::Acc>,
    pub(super) dv: B::Buf<B::Acc>,
    pub(super) da: B::Buf<B::Acc>,
    /// Gradients of heads before their norms.
    pub(super) dpre: B::Buf<B::Acc>,
    pub(super) dz: B::Buf<B::Acc>,
    pub(super) dgate: B::Buf<B::Acc>,
    pub(super) dup: B::Buf<B::Acc>,
    pub(super) dshrunk: B::Buf<B::Acc>,
}

impl<B: Train> Saved<B> {
    /// Plans passes of up to `rows` rows, `wanted` of which are wanted, with adapters of the shape of `adapter`. Layers below
    /// `lowest` have no backward.
    pub fn new(
        be: &B,
        cfg: &ModelConfig,
        rows: usize,
        wanted: usize,
        adapter: Option<&Adapter<B>>,
        lowest: usize,
        recompute: Recompute,
    ) -> Result<Self> {
        ensure!(rows > 0 && wanted > 0, Capacity, "a training pass of no rows");
        let acc = |n: usize| be.alloc::<B::Acc>(rows * n);
        let act = |n: usize| be.alloc::<B::Act>(rows * n);
        let (h, q, kv, ffn) = (cfg.hidden, cfg.q_dim(), cfg.kv_dim(), cfg.ffn);
        let lowest = lowest.min(cfg.layers - 1);
        let sets = match recompute {
            Recompute::Layer => 1,
            _ => cfg.layers - lowest + usize::from(lowest > 0),
        };
        let layer = |set: usize| -> Result<LayerSaved<B>> {
            let ranks = |site: usize| {
                let layers = adapter.map_or(&[][..], |a| &a.layers);
                layers.iter().filter_map(|l| l[site].as_ref()).map(|s| s.ranks).max().unwrap_or(0)
            };
            // A set that layers share needs no operands of its own.
            let keep = recompute == Recompute::Nothing && (lowest == 0 || set > 0);
            Ok(LayerSaved {
                pre: cfg.qk_norm.then(|| Ok([acc(q)?, acc(kv)?])).transpose()?,
                q: acc(q)?,
                k: acc(kv)?,
                v: acc(kv)?,
                a: act(q)?,
                lse: acc(cfg.heads)?,
                post: cfg.post_norms.then(|| Ok([acc(h)?, acc(h)?])).transpose()?,
                mid: acc(h)?,
                gate: acc(ffn)?,
                up: acc(ffn)?,
                shrunk: [acc(ranks(0))?, acc(ranks(1))?, acc(ranks(2))?, acc(ranks(3))?],
                operands: keep.then(|| Ok([act(h)?, act(h)?, act(ffn)?])).transpose()?,
            })
        };
        let local = usize::from(cfg.local_rope.is_some()) * cfg.head_dim;
        let table = |d: usize| Ok([acc(d)?, acc(d)?]);
        Ok(Self {
            recompute,
            rows,
            wanted_rows: wanted,
            lowest,
            x: (0..=cfg.layers).map(|_| acc(h)).collect::<Result<_>>()?,
            layers: (0..sets).map(layer).collect::<Result<_>>()?,
            picked: be.alloc(wanted * h)?,
            out: be.alloc(wanted * h)?,
            rope: [table(cfg.head_dim)?, table(local)?],
            room: Room {
                h: act(h)?,
                z: act(ffn)?,
                r: acc(h)?,
                dx: acc(h)?,
                dh: acc(h)?,
                dq: acc(q)?,
                dk: acc(kv)?,
                dv: acc(kv)?,
                da: acc(q)?,
                dpre: acc(if cfg.qk_norm { q } else { 0 })?,
                dz: acc(ffn)?,
                dgate: acc(ffn)?,
                dup: acc(ffn)?,
                dshrunk: acc(adapter.map_or(0, Adapter::most_ranks))?,
            },
        })
    }

    /// The set of buffers of a layer.
    pub(super) fn set(&self, layer: usize) -> usize {
        match self.recompute {
            Recompute::Layer => 0,
            _ if self.lowest == 0 => layer,
            _ => (layer + 1).saturating_sub(self.lowest),
        }
    }
}
