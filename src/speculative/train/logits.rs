//! From rows of a head to losses and likeliest tokens, a few rows of logits at a time.

use std::ops::Range;

use super::pass::StepRows;
use crate::backend::{Backend, Buffer, In, Target, Train, WeightInfo, Write};
use crate::dtype::Real;
use crate::error::Result;

/// Rows of logits that exist at a time.
const TILE: usize = 256;

/// Parts of `rows` rows that logits exist of at a time.
pub(super) fn tiles(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(TILE).map(move |at| at..rows.min(at + TILE))
}

/// What rows said.
#[derive(Default)]
pub(super) struct RowsSaid {
    /// Losses, nats; 0 where a row has nothing to learn.
    pub(super) loss: Vec<f64>,
    /// Likeliest tokens, where they were asked for.
    pub(super) token: Vec<u32>,
}

/// Logits of a tile.
pub(super) struct Logits<B: Backend> {
    logits: B::Buf<B::Acc>,
    loss: B::Buf<B::Acc>,
    stats: B::Buf<B::Acc>,
    argmax: B::Buf<u32>,
}

impl<B: Train> Logits<B> {
    /// Over `vocab` tokens.
    pub(super) fn new(be: &B, vocab: usize) -> Result<Self> {
        let [logits, loss, stats] = [be.alloc(TILE * vocab)?, be.alloc(TILE)?, be.alloc(3 * TILE)?];
        Ok(Self { logits, loss, stats, argmax: be.alloc(TILE)? })
    }

    /// Adds to `said` what the rows `tile` of `rows` say, whose operands are `x`; `k` of the teacher's tokens are given for each. The
    /// logits become their gradient, which is returned. `tokens`: the likeliest too.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn say(
        &mut self,
        be: &B,
        x: In<'_, B, B::Act>,
        (w, bias): (&B::Weight, Option<&B::Buf<B::Acc>>),
        rows: &StepRows,
        k: usize,
        tile: Range<usize>,
        tokens: bool,
        said: &mut RowsSaid,
    ) -> Result<In<'_, B, B::Acc>> {
        let (n, vocab) = (tile.len(), w.rows());
        be.linear_fwd(self.logits.head_mut(n * vocab), x, w, bias, Write::Set)?;
        if tokens {
            let (stats, argmax) = (self.stats.head_mut(3 * n), self.argmax.head_mut(n));
            be.logits_stats(stats, argmax, self.logits.head(n * vocab), vocab)?;
            let at = said.token.len();
            said.token.resize(at + n, 0);
            be.download(self.argmax.head(n), &mut said.token[at..])?;
        }
        let of = tile.start * k..tile.end * k;
        let target = Target::TopK { ids: &rows.ids[of.clone()], p: &rows.p[of], k, tail: true };
        let weights = &rows.weights[tile];
        be.loss_rows(self.loss.head_mut(n), self.logits.head_mut(n * vocab), &target, weights)?;
        said.loss.extend(losses(be, &self.loss, weights)?);
        Ok(self.logits.head(n * vocab))
    }
}

/// The losses of rows that have these weights; 0 where the weight is.
pub(super) fn losses<B: Train>(be: &B, loss: &B::Buf<B::Acc>, weights: &[f32]) -> Result<Vec<f64>> {
    let mut values = vec![B::Acc::default(); weights.len()];
    be.download(loss.head(weights.len()), &mut values)?;
    Ok(values.iter().zip(weights).map(|(l, w)| if *w > 0.0 { l.to_f64() } else { 0.0 }).collect())
}
