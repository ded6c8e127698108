//! [`SpeculativeBatch`]: several sessions, one pass.

use std::sync::Arc;
use std::time::Instant;

use super::Speculative;
use super::decoder::Verifier;
use crate::backend::{Backend, Mask};
use crate::decode::{Session, Together};
use crate::error::{Result, ensure};
use crate::model::Model;

/// Verifies the trees of several sessions in one pass, which reads the weights once for all. Each session's text is what it would
/// have been alone.
pub struct SpeculativeBatch<B: Backend> {
    together: Together<B>,
    room: Verifier<B>,
    rows: usize,
}

impl<B: Backend> SpeculativeBatch<B> {
    /// For up to `sessions` sessions of this model with these taps, whose trees have up to `rows` nodes together.
    ///
    /// # Errors
    /// Fewer rows than sessions; the device's.
    pub fn new(model: Arc<Model<B>>, sessions: usize, rows: usize, taps: &[usize]) -> Result<Self> {
        ensure!(sessions > 0 && rows >= sessions, Capacity, "{rows} rows for the trees of {sessions} sessions");
        let room = Verifier::new(model.backend(), rows, sessions)?;
        Ok(Self { together: Together::new(model, rows, taps)?, room, rows })
    }

    /// One step of each session with its decoder: a prompt's first token where there is a prompt to read, else a tree. Returns how
    /// many tokens each got.
    ///
    /// # Errors
    /// Those of a single step. Sessions stay as they were, but that some may have read their prompts.
    pub fn step(&mut self, all: &mut [(&mut Session<B>, &mut Speculative<B>)]) -> Result<Vec<usize>> {
        let mut given = vec![0; all.len()];
        let (mut sessions, mut decoders, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
        for (i, (s, d)) in all.iter_mut().enumerate() {
            if Speculative::is_ready(s) {
                sessions.push(&mut **s);
                decoders.push(&mut **d);
                numbers.push(i);
            } else {
                given[i] = d.first(s)?;
            }
        }
        if sessions.is_empty() {
            return Ok(given);
        }
        let (mut draws, mut penalties, mut masks) = (Vec::new(), Vec::new(), Vec::new());
        for (s, d) in sessions.iter().zip(&mut decoders) {
            masks.push(d.propose(s, self.rows / numbers.len())?.mask()?);
            d.draws(s, draws.len(), &mut draws, &mut penalties);
        }
        let start = Instant::now();
        let trees: Vec<_> = decoders.iter().zip(&masks).map(|(d, m)| (d.tree().tokens(), Mask::Tree(m))).collect();
        let rows = self.together.stage(&mut sessions, &trees)?;
        if !penalties.is_empty() {
            self.together.penalize(rows, &penalties)?;
        }
        let model = sessions[0].model().clone();
        let trees: Vec<_> = decoders.iter().map(|d| d.tree()).collect();
        let logits = self.together.workspace().logit_rows(rows);
        let found = self.room.verify(model.backend(), logits, &draws, &trees)?;
        let verified = Instant::now();
        self.together.commit(&mut sessions, &found.iter().map(|f| &f.0[..]).collect::<Vec<_>>())?;
        // Each has its share of the pass.
        let share = 1.0 / numbers.len() as f64;
        let (seconds, commit) = ((verified - start).as_secs_f64() * share, verified.elapsed().as_secs_f64() * share);
        for (((s, d), (path, next)), i) in sessions.iter_mut().zip(&mut decoders).zip(&found).zip(numbers) {
            s.push(&[*next]);
            given[i] = d.conclude(path, *next, seconds, commit);
        }
        Ok(given)
    }
}
