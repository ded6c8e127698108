//! From rows to the likeliest tokens behind them.

use crate::backend::{Backend, Buffer, In};
use crate::error::Result;

/// Most tokens behind a row that are asked for: the limit of [`Backend::top_k`].
const MOST: usize = 64;

/// Logits of a pass, and what is read of them.
pub(super) struct Choices<B: Backend> {
    vocab: usize,
    width: usize,
    logits: B::Buf<B::Acc>,
    stats: B::Buf<B::Acc>,
    best: B::Buf<u32>,
    values: B::Buf<B::Acc>,
    ids: B::Buf<u32>,
    host: Host,
}

#[derive(Default)]
struct Host {
    stats: Vec<f32>,
    ln_q: Vec<f32>,
    ids: Vec<u32>,
}

impl<B: Backend> Choices<B> {
    /// For passes of up to `rows` rows over `vocab` tokens, `width` of them behind each.
    pub fn new(be: &B, vocab: usize, rows: usize, width: usize) -> Result<Self> {
        let width = width.min(MOST).min(vocab);
        Ok(Self {
            vocab,
            width,
            logits: be.alloc(rows * vocab)?,
            stats: be.alloc(rows * 3)?,
            best: be.alloc(rows)?,
            values: be.alloc(rows * width)?,
            ids: be.alloc(rows * width)?,
            host: Host::default(),
        })
    }

    /// The likeliest tokens behind each of `rows` rows, whose logits are w h + bias, and the logarithms of their probabilities;
    /// `tokens` says which token of the target an id is, if not the same. Where logits are not finite, no token has a chance.
    pub fn read(
        &mut self,
        be: &B,
        rows: usize,
        h: In<'_, B, B::Act>,
        w: &B::Weight,
        bias: Option<&B::Buf<B::Acc>>,
        tokens: Option<&[u32]>,
    ) -> Result<(&[u32], &[f32])> {
        let Self { vocab, logits, stats, best, values, ids, host, .. } = self;
        let (n, k) = (rows * *vocab, self.width);
        be.linear(logits.head_mut(n), h, w, bias)?;
        be.logits_stats(stats.head_mut(rows * 3), best.head_mut(rows), logits.head(n), *vocab)?;
        be.top_k(values.head_mut(rows * k), ids.head_mut(rows * k), logits.head(n), *vocab, k)?;
        host.stats.resize(rows * 3, 0.0);
        host.ln_q.resize(rows * k, 0.0);
        host.ids.resize(rows * k, 0);
        be.download_acc(stats.head(rows * 3), &mut host.stats)?;
        be.download_acc(values.head(rows * k), &mut host.ln_q)?;
        be.download(ids.head(rows * k), &mut host.ids)?;
        for (row, (ln_q, ids)) in host.ln_q.chunks_exact_mut(k).zip(host.ids.chunks_exact_mut(k)).enumerate() {
            let all = host.stats[row * 3 + 1];
            for (x, id) in ln_q.iter_mut().zip(ids) {
                let known = (*id as usize) < *vocab && all.is_finite();
                *x = if known { *x - all } else { f32::NEG_INFINITY };
                *id = if known { tokens.map_or(*id, |t| t[*id as usize]) } else { 0 };
            }
        }
        Ok((&host.ids, &host.ln_q))
    }
}
