//! From rows to the likeliest tokens behind them.

use crate::backend::{Backend, Buffer, In};
use crate::error::Result;

/// Most tokens behind a row that are asked for: the limit of [`Backend::top_k`].
const MOST: usize = 64;

/// Reads the likeliest tokens of logits.
pub(super) struct Choices<B: Backend> {
    vocab: usize,
    width: usize,
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
            stats: be.alloc(rows * 3)?,
            best: be.alloc(rows)?,
            values: be.alloc(rows * width)?,
            ids: be.alloc(rows * width)?,
            host: Host::default(),
        })
    }

    /// The likeliest tokens of each of `rows` rows of logits, and the logarithms of their probabilities; `tokens` says which token of
    /// the target an id is, if not the same. Where logits are not finite, no token has a chance.
    pub fn read(
        &mut self,
        be: &B,
        rows: usize,
        logits: In<'_, B, B::Acc>,
        tokens: Option<&[u32]>,
    ) -> Result<(&[u32], &[f32])> {
        let Self { vocab, stats, best, values, ids, host, .. } = self;
        let k = self.width;
        be.logits_stats(stats.head_mut(rows * 3), best.head_mut(rows), logits, *vocab)?;
        be.top_k(values.head_mut(rows * k), ids.head_mut(rows * k), logits, *vocab, k)?;
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

/// [`Choices`] with room for logits of a vocabulary matrix.
pub(super) struct Vocabulary<B: Backend> {
    logits: B::Buf<B::Acc>,
    choices: Choices<B>,
}

impl<B: Backend> Vocabulary<B> {
    /// As [`Choices::new`].
    pub fn new(be: &B, vocab: usize, rows: usize, width: usize) -> Result<Self> {
        Ok(Self { logits: be.alloc(rows * vocab)?, choices: Choices::new(be, vocab, rows, width)? })
    }

    /// [`Choices::read`] of the logits w h + bias.
    pub fn read(
        &mut self,
        be: &B,
        rows: usize,
        h: In<'_, B, B::Act>,
        w: &B::Weight,
        bias: Option<&B::Buf<B::Acc>>,
        tokens: Option<&[u32]>,
    ) -> Result<(&[u32], &[f32])> {
        let n = rows * self.choices.vocab;
        be.linear(self.logits.head_mut(n), h, w, bias)?;
        self.choices.read(be, rows, self.logits.head(n), tokens)
    }
}
