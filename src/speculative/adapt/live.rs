//! [`Live`]: a draft whose weights are exchanged while it serves, between one proposal and the next.

use std::sync::{Arc, PoisonError, RwLock};

use crate::backend::Backend;
use crate::decode::Session;
use crate::error::Result;
use crate::speculative::heads::Make;
use crate::speculative::{Budget, Draft, DraftTree};

/// Where the newest version of a draft is found. A version never changes once it is published.
pub struct Slot<B: Backend>(RwLock<(u64, Arc<Make<B>>)>);

impl<B: Backend> Slot<B> {
    /// Version 0.
    pub fn new(make: Make<B>) -> Self {
        Self(RwLock::new((0, Arc::new(make))))
    }

    /// Number and maker of the newest version.
    pub fn newest(&self) -> (u64, Arc<Make<B>>) {
        // Whoever panicked has not begun to write.
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts a version in place of the newest, under the next number.
    pub fn publish(&self, make: Arc<Make<B>>) {
        let mut slot = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *slot = (slot.0 + 1, make);
    }
}

/// Drafts with the newest version of a [`Slot`]. A new one is taken up before a proposal, never within: the tree says which
/// version made it. It reads the text again, so that all rows of its cache are its own.
pub struct Live<B: Backend> {
    slot: Arc<Slot<B>>,
    version: u64,
    inner: Box<dyn Draft<B>>,
}

impl<B: Backend> Live<B> {
    /// With the newest version.
    pub fn new(slot: Arc<Slot<B>>) -> Self {
        let (version, make) = slot.newest();
        Self { slot, version, inner: make() }
    }
}

impl<B: Backend> Draft<B> for Live<B> {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn taps(&self) -> &[usize] {
        self.inner.taps()
    }

    fn is_free(&self) -> bool {
        self.inner.is_free()
    }

    fn propose(&mut self, session: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()> {
        let (version, make) = self.slot.newest();
        if version != self.version {
            (self.version, self.inner) = (version, make());
        }
        self.inner.propose(session, budget, tree)
    }

    fn verdict(&mut self, tree: &DraftTree, path: &[u32], next: u32) {
        self.inner.verdict(tree, path, next);
    }

    fn finish(&mut self, tokens: &[u32]) {
        self.inner.finish(tokens);
    }
}
