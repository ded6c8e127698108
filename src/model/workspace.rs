//! Buffers of a forward pass, planned once: no allocation happens in a step.

use super::config::ModelConfig;
use std::ops::Range;

use crate::backend::{Backend, Buffer, In, Out};
use crate::error::{Result, ensure};

/// Activations of up to `max_rows` rows. On the CPU, pages are touched only by passes that need them.
pub struct Workspace<B: Backend> {
    pub(super) max_rows: usize,
    pub(super) max_logits: usize,
    /// Residual stream, `[rows, hidden]`.
    pub(super) x: B::Buf<B::Acc>,
    /// Normed input of a block, `[rows, hidden]`.
    pub(super) h: B::Buf<B::Act>,
    pub(super) q: B::Buf<B::Acc>,
    pub(super) k: B::Buf<B::Acc>,
    pub(super) v: B::Buf<B::Acc>,
    /// Output of attention, `[rows, q_dim]`.
    pub(super) a: B::Buf<B::Act>,
    /// Output of a block before the residual sum, `[rows, hidden]`.
    pub(super) r: B::Buf<B::Acc>,
    /// Gated MLP activations, `[rows, ffn]`.
    pub(super) g: B::Buf<B::Act>,
    /// Room for gate and up where a backend does not fuse them, `[2, rows, ffn]`.
    pub(super) gate_up: B::Buf<B::Acc>,
    /// Inputs shrunk by adapters, row behind row, each of as many columns as its own adapter has ranks.
    pub(super) shrunk: B::Buf<B::Acc>,
    /// Cosines and sines of global layers, then of local ones, `[rows, head_dim]` each.
    pub(super) rope: [B::Buf<B::Acc>; 2],
    /// Rows that want logits, `[max_logits, hidden]`.
    pub(super) picked: B::Buf<B::Acc>,
    pub(super) logits: B::Buf<B::Acc>,
    /// Residual streams that are kept, `[rows, hidden]` each, with the layer at whose input they stand.
    pub(super) taps: Vec<(usize, B::Buf<B::Acc>)>,
    /// 0, 1, ...: what a tap gathers.
    pub(super) every: Vec<u32>,
    pub(super) table: Vec<f32>,
    pub(super) rows: Vec<u32>,
    pub(super) tokens: Vec<u32>,
    vocab: usize,
    hidden: usize,
}

impl<B: Backend> Workspace<B> {
    /// Plans passes of up to `max_rows` rows, of which up to `max_logits` want logits.
    pub fn new(be: &B, cfg: &ModelConfig, max_rows: usize, max_logits: usize) -> Result<Self> {
        Self::with_taps(be, cfg, max_rows, max_logits, &[])
    }

    /// A workspace that keeps the residual stream of every row of the last pass at the input of each layer in `taps`: 0 is the
    /// embedding, the number of layers what the last of them gives, before the final norm.
    ///
    /// # Errors
    /// As [`Workspace::new`]; a tap behind the last layer.
    pub fn with_taps(be: &B, cfg: &ModelConfig, max_rows: usize, max_logits: usize, taps: &[usize]) -> Result<Self> {
        let beyond = taps.iter().find(|&&at| at > cfg.layers);
        ensure!(beyond.is_none(), Usage, "tap {} of {} layers", beyond.copied().unwrap_or(0), cfg.layers);
        ensure!(max_rows > 0 && max_logits > 0, Capacity, "a workspace of no rows");
        let acc = |n: usize| be.alloc::<B::Acc>(n);
        let act = |n: usize| be.alloc::<B::Act>(n);
        let (r, h, local) = (max_rows, cfg.hidden, if cfg.local_rope.is_some() { max_rows } else { 0 });
        Ok(Self {
            max_rows,
            max_logits,
            x: acc(r * h)?,
            h: act(r * h)?,
            q: acc(r * cfg.q_dim())?,
            k: acc(r * cfg.kv_dim())?,
            v: acc(r * cfg.kv_dim())?,
            a: act(r * cfg.q_dim())?,
            r: acc(r * h)?,
            g: act(r * cfg.ffn)?,
            gate_up: acc(2 * r * cfg.ffn)?,
            shrunk: acc(0)?,
            rope: [acc(r * cfg.head_dim)?, acc(local * cfg.head_dim)?],
            picked: acc(max_logits * h)?,
            logits: acc(max_logits * cfg.vocab)?,
            taps: taps.iter().map(|&at| Ok((at, acc(r * h)?))).collect::<Result<_>>()?,
            every: (0..if taps.is_empty() { 0 } else { r as u32 }).collect(),
            table: vec![0.0; r * cfg.head_dim],
            rows: Vec::with_capacity(r),
            tokens: Vec::with_capacity(r),
            vocab: cfg.vocab,
            hidden: h,
        })
    }

    /// Makes room for sequences with adapters of up to `ranks` ranks an input ([`super::AdapterMap::ranks`]). A pass does so by
    /// itself, once for each adapter that is wider than those before it.
    ///
    /// # Errors
    /// The device's.
    pub fn reserve_ranks(&mut self, be: &B, ranks: usize) -> Result<()> {
        let n = self.max_rows * ranks;
        if self.shrunk.len() < n {
            self.shrunk = be.alloc(n)?;
        }
        Ok(())
    }

    /// Most rows of one pass.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Most rows of one pass that may want logits.
    pub fn max_logits(&self) -> usize {
        self.max_logits
    }

    /// Copies logit row `i` of the last pass; `out` has one entry per vocabulary token.
    pub fn logits(&self, be: &B, i: usize, out: &mut [f32]) -> Result<()> {
        be.download_acc(self.logits.view(i * self.vocab..(i + 1) * self.vocab), out)
    }

    /// Returns once the last pass is done, where a device works on its own.
    pub fn wait(&self, be: &B) -> Result<()> {
        be.download_acc(self.x.head(1), &mut [0.0])
    }

    /// The first `rows` logit rows of the last pass, to change them.
    pub fn logit_rows_mut(&mut self, rows: usize) -> Out<'_, B, B::Acc> {
        self.logits.head_mut(rows * self.vocab)
    }

    /// The first `rows` logit rows of the last pass, where they are: for what samples and verifies on the device.
    pub fn logit_rows(&self, rows: usize) -> In<'_, B, B::Acc> {
        self.logits.head(rows * self.vocab)
    }

    /// Of [`Workspace::logit_rows`], these.
    pub fn logit_range(&self, rows: Range<usize>) -> In<'_, B, B::Acc> {
        self.logits.view(rows.start * self.vocab..rows.end * self.vocab)
    }

    /// The layers at whose inputs the residual stream is kept.
    pub fn taps(&self) -> impl Iterator<Item = usize> {
        self.taps.iter().map(|t| t.0)
    }

    /// The residual stream at tap number `tap`, `[rows, hidden]`, of the first `rows` rows of the last pass.
    pub fn features(&self, tap: usize, rows: usize) -> In<'_, B, B::Acc> {
        self.taps[tap].1.head(rows * self.hidden)
    }

    /// Copies row `i` of the residual stream behind the last layer, before the final norm; `out` has `hidden` entries.
    pub fn hidden(&self, be: &B, i: usize, out: &mut [f32]) -> Result<()> {
        be.download_acc(self.x.view(i * self.hidden..(i + 1) * self.hidden), out)
    }
}
