//! [`SpeculativeBatch`]: several sessions, one pass.

use std::sync::Arc;
use std::time::Instant;

use super::Speculative;
use super::decoder::Verifier;
use crate::backend::{Backend, Mask, TreeMask};
use crate::decode::{Session, Together};
use crate::error::{Result, ensure};
use crate::model::{Model, Want};

/// Verifies the trees of several sessions in one pass, which reads the weights once for all, and reads their prompts beside. Each
/// session's text is what it would have been alone.
pub struct SpeculativeBatch<B: Backend> {
    together: Together<B>,
    room: Verifier<B>,
    sessions: usize,
    rows: usize,
}

/// A session's rows in a pass.
struct Part {
    tokens: Vec<u32>,
    /// Of a tree; `None` for tokens of a prompt.
    tree: Option<TreeMask>,
    /// Whether a token comes out.
    ends: bool,
}

impl<B: Backend> SpeculativeBatch<B> {
    /// For up to `sessions` sessions of this model with these taps, and passes of up to `rows` rows.
    ///
    /// # Errors
    /// Fewer rows than sessions; the device's.
    pub fn new(model: Arc<Model<B>>, sessions: usize, rows: usize, taps: &[usize]) -> Result<Self> {
        ensure!(sessions > 0 && rows >= sessions, Capacity, "{rows} rows for the trees of {sessions} sessions");
        let room = Verifier::new(model.backend(), rows, sessions)?;
        Ok(Self { together: Together::new(model, rows, taps)?, room, sessions, rows })
    }

    /// One pass, in which each session takes a step with its decoder: a tree; or, where there is a prompt to read, as much of it
    /// as the pass has room for, earlier sessions first. Returns how many tokens each got: none, while its prompt is being read.
    ///
    /// # Errors
    /// Those of a single step; more sessions than expected; an empty one. Sessions stay as they were.
    pub fn step(&mut self, all: &mut [(&mut Session<B>, &mut Speculative<B>)]) -> Result<Vec<usize>> {
        let n = all.len();
        ensure!(n <= self.sessions, Capacity, "{n} sessions in a batch of {}", self.sessions);
        let mut room = self.rows;
        let mut parts: Vec<Option<Part>> = Vec::with_capacity(n);
        for (s, d) in &mut *all {
            ensure!(!s.tokens().is_empty(), Usage, "the prompt is empty: there is nothing to continue");
            let ready = Speculative::is_ready(s);
            parts.push(if ready {
                let tree = d.propose(s, self.rows / n)?;
                room -= tree.len();
                Some(Part { tokens: tree.tokens().to_vec(), tree: Some(tree.mask()?), ends: true })
            } else {
                None
            });
        }
        for ((s, d), part) in all.iter_mut().zip(&mut parts).filter(|(_, part)| part.is_none()) {
            let pending = s.pending();
            let rows = pending.len().min(room);
            if rows > 0 {
                room -= rows;
                *part = Some(Part { tokens: pending[..rows].to_vec(), tree: None, ends: rows == pending.len() });
                d.read(s);
            }
        }
        let (mut sessions, decoders): (Vec<_>, Vec<_>) =
            all.iter_mut().zip(&parts).filter(|(_, p)| p.is_some()).map(|((s, d), _)| (&mut **s, &mut **d)).unzip();
        let numbers: Vec<usize> = (0..n).filter(|&i| parts[i].is_some()).collect();
        let parts: Vec<Part> = parts.into_iter().flatten().collect();
        let mut given = vec![0; n];
        if parts.is_empty() {
            return Ok(given);
        }
        let (mut draws, mut penalties) = (Vec::new(), Vec::new());
        for ((s, d), _) in sessions.iter().zip(&decoders).zip(&parts).filter(|(_, p)| p.ends) {
            d.draws(s, draws.len(), &mut draws, &mut penalties);
        }
        let start = Instant::now();
        let rows = self.together.stage_parts(&mut sessions, &Vec::from_iter(parts.iter().map(Part::staged)))?;
        if !penalties.is_empty() {
            self.together.penalize(rows, &penalties)?;
        }
        let model = sessions[0].model().clone();
        let trees: Vec<_> = decoders.iter().zip(&parts).filter(|(_, p)| p.ends).map(|(d, _)| d.tree()).collect();
        let mut found = match rows {
            0 => Vec::new(),
            _ => {
                let logits = self.together.workspace().logit_rows(rows);
                self.room.verify(model.backend(), logits, &draws, &trees)?
            }
        }
        .into_iter();
        // Of a prompt all that was read stays.
        let ends: Vec<Option<(Vec<u32>, u32)>> =
            parts.iter().map(|p| if p.ends { found.next() } else { None }).collect();
        let kept = |(p, end): (&Part, &Option<(Vec<u32>, u32)>)| match (&p.tree, end) {
            (Some(_), Some((path, _))) => path.clone(),
            _ => (0..p.tokens.len() as u32).collect(),
        };
        let kept: Vec<Vec<u32>> = parts.iter().zip(&ends).map(kept).collect();
        let verified = Instant::now();
        self.together.commit(&mut sessions, &Vec::from_iter(kept.iter().map(|k| &k[..])))?;
        let times = [(verified - start).as_secs_f64(), verified.elapsed().as_secs_f64()];
        // Each has its share of the pass.
        let all = parts.iter().map(|p| p.tokens.len()).sum::<usize>() as f64;
        let mut first = 0;
        for ((((s, d), part), end), i) in sessions.iter_mut().zip(decoders).zip(&parts).zip(ends).zip(numbers) {
            let Some((path, next)) = end else { continue };
            s.push(&[next]);
            let [seconds, commit] = times.map(|t| t * part.tokens.len() as f64 / all);
            // A prompt's end has one row of logits, a tree as many as nodes.
            given[i] = if part.tree.is_some() {
                let given = d.conclude(&path, next, seconds, commit);
                d.teach(s, self.together.workspace(), first, &path, seconds + commit);
                given
            } else {
                d.begun()
            };
            first += if part.tree.is_some() { part.tokens.len() } else { 1 };
        }
        Ok(given)
    }
}

impl Part {
    fn staged(&self) -> (&[u32], Mask<'_>, Want<'_>) {
        match &self.tree {
            Some(tree) => (&self.tokens, Mask::Tree(tree), Want::All),
            None => (&self.tokens, Mask::Causal, if self.ends { Want::Last } else { Want::Nothing }),
        }
    }
}
