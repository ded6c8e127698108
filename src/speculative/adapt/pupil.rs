//! [`Ear`]: brings what one text's verifications found to a learner.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::feedback::Episode;
use super::learner::Learner;
use crate::backend::{Backend, Train};
use crate::decode::Session;
use crate::error::Result;
use crate::model::Workspace;
use crate::speculative::choices::Choices;

/// Rows whose likeliest tokens are read at once.
const TOGETHER: usize = 16;

/// A verification of one text's tree, whose tokens are committed.
pub struct Verified<'a, B: Backend> {
    /// The text, with the target's token behind the kept ones.
    pub session: &'a Session<B>,
    /// Where the pass left its logits.
    pub logits: &'a Workspace<B>,
    /// The row of node 0 there.
    pub first: usize,
    /// Nodes that were kept, node 0 first.
    pub path: &'a [u32],
    /// Whether there were others than node 0.
    pub drafted: bool,
    /// What drafting, the pass and its commit took.
    pub seconds: f64,
}

/// Hears what verification found out about one text.
pub trait Pupil<B: Backend>: Send {
    /// Of one pass. It may learn meanwhile.
    fn verified(&mut self, what: &Verified<'_, B>);

    /// The text is over.
    fn finish(&mut self, session: &Session<B>);
}

/// Brings rows to a learner and lets it learn where that is due, between one draft and the next.
pub struct Ear<B: Train> {
    learner: Arc<Mutex<Learner<B>>>,
    episode: Episode,
    context: usize,
    /// Rows that are a sequence of their own, whether an update is due or not.
    longest: usize,
    choices: Choices<B>,
    /// Whether the learner had time for this text when it began: all of its rows are read then, or none, since rows with a gap between them
    /// are no sequence.
    listens: Option<bool>,
    /// Whether it has given up: serving goes on without learning.
    failed: bool,
}

impl<B: Train> Ear<B> {
    /// Of one text.
    ///
    /// # Errors
    /// No memory.
    pub fn new(learner: Arc<Mutex<Learner<B>>>, be: &B, vocab: usize) -> Result<Self> {
        let how = lock(&learner).settings().clone();
        let k = (2 * how.teacher).min(vocab);
        let choices = Choices::new(be, vocab, TOGETHER, k)?;
        let (context, longest) = (how.context, how.longest());
        Ok(Self { learner, episode: Episode::new(k), context, longest, choices, listens: None, failed: false })
    }

    fn hear(&mut self, v: &Verified<'_, B>) -> Result<()> {
        let (watches, allows) = {
            let learner = lock(&self.learner);
            (learner.watches(), learner.allows())
        };
        let start = Instant::now();
        if *self.listens.get_or_insert(allows) || watches {
            let be = v.session.model().backend();
            // The kept rows are all that is committed but the last tokens: those of the path.
            let at = v.session.cache().len() - v.path.len();
            let mut done = 0;
            while done < v.path.len() {
                // Rows that lie together are read together.
                let row = v.first + v.path[done] as usize;
                let together = v.path[done..].iter().zip(v.path[done]..).take_while(|(a, b)| **a == *b).count();
                let n = together.min(TOGETHER);
                let (ids, ln_p) = self.choices.read(be, n, v.logits.logit_range(row..row + n), None)?;
                self.episode.push(at + done, ids, ln_p);
                done += n;
            }
        }
        let mut learner = lock(&self.learner);
        learner.paid(start.elapsed().as_secs_f64());
        let settle = learner.heard(v.path.len(), v.drafted, v.seconds);
        let due = learner.is_due(self.episode.len());
        if (settle || due || self.episode.len() >= self.longest)
            && let Some(sequence) = self.episode.take(v.session, self.context)?
        {
            learner.push(sequence);
        }
        if settle {
            learner.settle()?;
        } else if due {
            learner.update()?;
        }
        Ok(())
    }

    fn give_up(&mut self, done: Result<()>) {
        if let Err(e) = done {
            tracing::warn!("the draft no longer learns: {e}");
            self.failed = true;
        }
    }
}

impl<B: Train> Pupil<B> for Ear<B> {
    fn verified(&mut self, what: &Verified<'_, B>) {
        if !self.failed {
            let done = self.hear(what);
            self.give_up(done);
        }
    }

    fn finish(&mut self, session: &Session<B>) {
        self.listens = None;
        if !self.failed {
            let done = self.episode.take(session, self.context).map(|s| {
                if let Some(s) = s {
                    lock(&self.learner).push(s);
                }
            });
            self.give_up(done);
        }
    }
}

/// Whoever panicked with it left a learner that may be half updated; what it publishes cannot change a text.
pub(super) fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
