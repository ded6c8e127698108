//! [`Draft`]: what proposes tokens.

use super::{DraftTree, Plan, Pool};
use crate::backend::Backend;
use crate::decode::Session;
use crate::error::Result;

/// How much a draft may propose in one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget<'a> {
    /// Drafted nodes at most, node 0 not counted.
    pub nodes: usize,
    /// Longest path of drafted nodes.
    pub depth: usize,
    /// Most children of a node, and most nodes that a draft expands at one depth.
    pub width: usize,
    /// What passes cost and how often drafts are right, where that decides how much of the budget is used.
    pub plan: Option<&'a Plan>,
    /// Which of the plan's sources drafts.
    pub source: u8,
}

impl Budget<'_> {
    /// Without a plan: all of it may be used.
    pub const fn new(nodes: usize, depth: usize, width: usize) -> Self {
        Self { nodes, depth, width, plan: None, source: 0 }
    }

    /// Whether a draft should read the frontier of `pool`.
    pub fn expands(&self, pool: &Pool) -> bool {
        let left = self.depth.saturating_sub(pool.depth());
        left > 0 && !pool.frontier().is_empty() && self.plan.is_none_or(|p| p.worth_expanding(pool, *self))
    }

    /// How many nodes of a grown `pool` should be verified.
    pub fn size(&self, pool: &Pool) -> usize {
        self.plan.map_or(self.nodes, |p| p.size(pool, *self))
    }
}

/// Proposes what may come next.
///
/// A draft follows a session by itself: it compares the session's tokens with those it has seen, drops what is no longer there
/// and catches up with what is new. So a session may be truncated, extended or swapped between proposals.
pub trait Draft<B: Backend>: Send {
    /// Its name, for statistics.
    fn name(&self) -> &str;

    /// Layers of the target whose inputs it reads ([`Session::with_taps`]), in the order in which it reads them.
    fn taps(&self) -> &[usize] {
        &[]
    }

    /// Grows `tree`, which holds node 0 alone: the session's last token, which is not in its cache yet. All tokens before it are.
    /// Proposing nothing is allowed.
    ///
    /// # Errors
    /// The device's; a session of another model.
    fn propose(&mut self, session: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()>;

    /// Whether the last proposal took no pass of a model.
    fn is_free(&self) -> bool {
        false
    }

    /// What verification kept of the last proposal: nodes of a path, node 0 first, and the target's token behind the last.
    fn verdict(&mut self, _tree: &DraftTree, _path: &[u32], _next: u32) {}

    /// A text is over, or over for now: these are its tokens. Called once for every continuation.
    fn finish(&mut self, _tokens: &[u32]) {}
}
