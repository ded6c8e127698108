//! What verification teaches: the target's distribution behind every committed token, kept where it was computed anyway.

use std::collections::VecDeque;
use std::sync::Arc;

use half::bf16;

use crate::backend::Backend;
use crate::decode::Session;
use crate::error::Result;
use crate::rng::Rng;
use crate::speculative::train::{Sequence, Teacher, extent};

/// What one text has taught and nobody has learnt yet: rows of a teacher for consecutive positions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Episode {
    /// Position of the first row.
    from: usize,
    teacher: Teacher,
}

impl Episode {
    /// Of `k` tokens a row.
    pub fn new(k: usize) -> Self {
        Self { from: 0, teacher: Teacher { k, ..Teacher::default() } }
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.teacher.ids.len() / self.teacher.k.max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.teacher.ids.is_empty()
    }

    /// Adds rows for the positions from `at` on: the likeliest tokens behind each and the logarithms of their probabilities. Rows that do
    /// not go on where the last ended begin anew, and so does whatever is no distribution.
    pub fn push(&mut self, at: usize, ids: &[u32], ln_p: &[f32]) {
        if at != self.from + self.len() {
            self.clear(at);
        }
        let k = self.teacher.k;
        for (i, (ids, ln_p)) in ids.chunks_exact(k).zip(ln_p.chunks_exact(k)).enumerate() {
            let p = || ln_p.iter().map(|x| x.exp());
            // A poisoned row would poison the draft.
            if !(p().all(|p| p.is_finite()) && (1e-6..1.001).contains(&p().sum::<f32>())) {
                self.clear(at + i + 1);
                continue;
            }
            self.teacher.ids.extend(ids);
            self.teacher.p.extend(p());
        }
    }

    fn clear(&mut self, from: usize) {
        self.from = from;
        self.teacher.ids.clear();
        self.teacher.p.clear();
    }

    /// Takes all rows as a sequence behind up to `context` tokens of `session`, with its features; `None` where there are too few.
    ///
    /// # Errors
    /// The device's.
    pub fn take<B: Backend>(&mut self, session: &Session<B>, context: usize) -> Result<Option<Sequence>> {
        // The text may have been cut since: the last row needs the token behind it.
        let n = self
            .len()
            .min(session.tokens().len().saturating_sub(self.from + 1))
            .min(session.cache().len().saturating_sub(self.from));
        if self.from == 0 || n == 0 {
            self.clear(self.from);
            return Ok(None);
        }
        let (start, last) = (self.from.saturating_sub(context.max(1)), self.from + n - 1);
        let (prompt, tokens) = (self.from - start, session.tokens()[start..last + 2].to_vec());
        let Some([rows, slots]) = extent(prompt, tokens.len()) else { return Ok(None) };
        let (be, d) = (session.model().backend(), session.model().config().hidden);
        let taps = session.workspace().taps().count();
        let (mut stream, mut features) = (vec![0f32; rows * d], Vec::with_capacity(taps * rows * d));
        for tap in 0..taps {
            be.download_acc(session.feature_rows(tap, start..start + rows)?, &mut stream)?;
            features.extend(stream.iter().map(|&x| bf16::from_f32(x)));
        }
        let k = self.teacher.k;
        let teacher =
            Teacher { k, ids: self.teacher.ids[..slots * k].to_vec(), p: self.teacher.p[..slots * k].to_vec() };
        self.clear(last + 1);
        Ok(Some(Sequence { prompt, tokens, features, teacher }))
    }
}

/// Trained rows of a sequence.
pub(super) fn rows(s: &Sequence) -> usize {
    extent(s.prompt, s.tokens.len()).map_or(0, |[_, slots]| slots)
}

/// Sequences to learn from: all that are new, and of those that are not a ring of the newest and a fair sample of all
/// (Vitter 1985, doi:10.1145/3147.3165).
#[derive(Clone, Debug)]
pub struct Feedback {
    fresh: Vec<Arc<Sequence>>,
    ring: VecDeque<Arc<Sequence>>,
    reservoir: Vec<Arc<Sequence>>,
    /// Most sequences of each.
    most: [usize; 2],
    seen: u64,
    rng: Rng,
}

impl Feedback {
    /// With room for so many sequences in the ring and in the sample.
    pub fn new(ring: usize, reservoir: usize, seed: u64) -> Self {
        let rng = Rng::stream(seed, 0xfeed);
        Self { fresh: Vec::new(), ring: VecDeque::new(), reservoir: Vec::new(), most: [ring, reservoir], seen: 0, rng }
    }

    /// Hears of a sequence.
    pub fn push(&mut self, s: Sequence) {
        self.fresh.push(Arc::new(s));
    }

    /// Rows that are new.
    pub fn fresh_rows(&self) -> usize {
        self.fresh.iter().map(|s| rows(s)).sum()
    }

    /// What is new, newest last, and about `replay` rows of what is not: half from the ring, half from the sample. What was new is old
    /// then.
    pub fn take(&mut self, replay: usize) -> (Vec<Arc<Sequence>>, Vec<Arc<Sequence>>) {
        let mut old = Vec::new();
        let (mut left, mut turn) = (replay as isize, 0);
        while left > 0 && self.ring.len() + self.reservoir.len() > old.len() {
            let from_ring = turn % 2 == 0 && !self.ring.is_empty() || self.reservoir.is_empty();
            let n = if from_ring { self.ring.len() } else { self.reservoir.len() };
            let i = self.rng.below(n);
            let s = if from_ring { self.ring[i].clone() } else { self.reservoir[i].clone() };
            left -= rows(&s).max(1) as isize;
            old.push(s);
            turn += 1;
        }
        let fresh = std::mem::take(&mut self.fresh);
        for s in &fresh {
            self.ring.push_back(s.clone());
            if self.ring.len() > self.most[0] {
                self.ring.pop_front();
            }
            self.seen += 1;
            if self.reservoir.len() < self.most[1] {
                self.reservoir.push(s.clone());
            } else if self.most[1] > 0 {
                let i = self.rng.below(self.seen.min(u64::from(u32::MAX)) as usize);
                if i < self.most[1] {
                    self.reservoir[i] = s.clone();
                }
            }
        }
        (fresh, old)
    }

    /// What is new.
    pub fn fresh(&self) -> impl Iterator<Item = &Sequence> {
        self.fresh.iter().map(|s| &**s)
    }

    /// Drops what is new, unlearnt.
    pub fn skip(&mut self) {
        self.fresh.clear();
    }
}
