//! [`Together`]: trees of several sessions in one pass.

use std::sync::Arc;

use super::Session;
use crate::backend::{Backend, Mask, Penalty};
use crate::error::{Result, ensure};
use crate::model::{Model, Sequence, Want, Workspace};

/// A workspace for the trees of several sessions: one pass reads the weights once for all of them. A row's result does not
/// depend on the sessions beside it, so each decodes as it would alone.
pub struct Together<B: Backend> {
    model: Arc<Model<B>>,
    ws: Workspace<B>,
}

impl<B: Backend> Together<B> {
    /// For passes of up to `max_rows` rows of sessions of this model that have these taps.
    ///
    /// # Errors
    /// As [`Workspace::with_taps`].
    pub fn new(model: Arc<Model<B>>, max_rows: usize, taps: &[usize]) -> Result<Self> {
        let ws = Workspace::with_taps(model.backend(), model.config(), max_rows, max_rows, taps)?;
        Ok(Self { model, ws })
    }

    /// [`Session::stage`] of one tree for each session, in one pass. The logits of all rows, tree after tree, are then in
    /// [`Together::workspace`]; returns how many there are.
    ///
    /// # Errors
    /// As [`Session::stage`]; a session of another model or with other taps.
    pub fn stage(&mut self, sessions: &mut [&mut Session<B>], trees: &[(&[u32], Mask<'_>)]) -> Result<usize> {
        self.stage_parts(sessions, &Vec::from_iter(trees.iter().map(|(tokens, mask)| (*tokens, *mask, Want::All))))
    }

    /// [`Together::stage`] of rows of which not all want logits: those of prompts beside trees.
    ///
    /// # Errors
    /// As [`Together::stage`].
    pub fn stage_parts(
        &mut self,
        sessions: &mut [&mut Session<B>],
        parts: &[(&[u32], Mask<'_>, Want<'_>)],
    ) -> Result<usize> {
        let (n, m) = (sessions.len(), parts.len());
        ensure!(n == m, Shape, "{m} trees for {n} sessions");
        for s in &mut *sessions {
            let own = Arc::ptr_eq(s.model(), &self.model) && s.workspace().taps().eq(self.ws.taps());
            ensure!(own, Usage, "a session of another model, or with other taps, in one pass");
            s.unstage();
        }
        let both = sessions.iter_mut().zip(parts);
        let mut seqs: Vec<Sequence<'_, B>> =
            both.map(|(s, (tokens, mask, want))| s.text.sequence(tokens, *mask, *want)).collect();
        let rows = self.model.forward(&mut seqs, &mut self.ws)?;
        let mut first = 0;
        for (s, (tokens, ..)) in sessions.iter_mut().zip(parts) {
            s.text.staged.extend_from_slice(tokens);
            s.text.shared_at = Some(first);
            first += tokens.len();
        }
        Ok(rows)
    }

    /// [`Session::commit`] for each session of the last [`Together::stage`], in the same order.
    ///
    /// # Errors
    /// As [`Session::commit`], of the first session that refuses; other sessions, or others in between.
    pub fn commit(&self, sessions: &mut [&mut Session<B>], kept: &[&[u32]]) -> Result<()> {
        let mut first = 0;
        let same = sessions.iter().all(|s| {
            let at = first;
            first += s.text.staged.len();
            s.text.shared_at == Some(at)
        });
        ensure!(same && sessions.len() == kept.len(), Usage, "a batch is committed as it was staged");
        for (s, rows) in sessions.iter_mut().zip(kept) {
            s.text.commit(&self.model, &self.ws, rows)?;
        }
        Ok(())
    }

    /// Changes the logit rows of the last pass by samplers' penalties.
    ///
    /// # Errors
    /// The device's.
    pub fn penalize(&mut self, rows: usize, penalties: &[Penalty]) -> Result<()> {
        let (be, vocab) = (self.model.backend(), self.model.config().vocab);
        be.penalize(self.ws.logit_rows_mut(rows), vocab, penalties)
    }

    /// Logits and features of the last pass.
    pub fn workspace(&self) -> &Workspace<B> {
        &self.ws
    }
}
