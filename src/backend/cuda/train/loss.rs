//! Losses.

use super::super::memory::{Dst, Src};
use super::super::sampling::threads;
use super::super::{Cuda, args, kernels as k};
use crate::backend::Target;
use crate::backend::sampling::width;
use crate::error::{Result, ensure};

impl Cuda {
    pub(super) fn run_loss_rows(
        &self,
        loss: Dst<'_, f32>,
        logits: Dst<'_, f32>,
        target: &Target<'_, Self>,
        weights: &[f32],
    ) -> Result<()> {
        let rows = loss.len();
        ensure!(weights.len() == rows, Shape, "loss_rows: {} weights of rows", weights.len());
        if rows == 0 {
            return Ok(());
        }
        let vocab = width("loss_rows", logits.len(), rows)?;
        let none = (&[][..], &[][..], 0, false, 1.0);
        let (kind, p, (ids, top, per_row, tail, tau)) = match *target {
            Target::Hard(ids) => (0, None, (ids, &[][..], 1, false, 1.0)),
            Target::Soft(p) => (1, Some(p), none),
            Target::ForwardKl(p) => (2, Some(p), none),
            Target::ReverseKl(p) => (3, Some(p), none),
            Target::TotalVariation(p) => (4, Some(p), none),
            Target::TopK { ids, p, k, tail } => (5, None, (ids, p, k, tail, 1.0)),
            Target::Entropy { tau, labels } => (6, None, (labels, &[][..], 1, false, tau)),
        };
        ensure!(ids.iter().all(|&id| (id as usize) < vocab), Shape, "loss_rows: a token behind the last of {vocab}");
        let mut small = self.small();
        let weights = small.table(&self.stream, weights)?;
        let (ids, top) = (small.table(&self.stream, ids)?, small.table(&self.stream, top)?);
        let args = args::LossRows::new(
            logits,
            loss,
            weights,
            ids,
            top,
            p.unwrap_or(Src::EMPTY),
            rows as u32,
            vocab as u32,
            per_row as u32,
            kind,
            u32::from(kind == 5),
            u32::from(p.is_some()),
            u32::from(tail),
            tau,
        )?;
        self.launch(k::LOSS_ROWS, args, [rows, 1, 1], threads(vocab, 1024), 0)
    }

    pub(super) fn run_smooth_l1(
        &self,
        loss: Dst<'_, f32>,
        dx: Dst<'_, f32>,
        x: Src<'_, f32>,
        target: Src<'_, f32>,
        weights: &[f32],
    ) -> Result<()> {
        let rows = loss.len();
        if rows == 0 {
            return Ok(());
        }
        let d = width("smooth_l1", x.len(), rows)?;
        let mut small = self.small();
        let weights = small.table(&self.stream, weights)?;
        let args = args::SmoothL1::new(loss, dx, x, target, weights, rows as u32, d as u32)?;
        self.rows_launch(k::SMOOTH_L1, args, rows)
    }
}
