//! [`DraftTree`]: drafted tokens of one sequence.

use crate::backend::TreeMask;
use crate::error::Result;

/// A tree of drafted tokens. Node 0 is the sequence's last token, known and not drafted; every other node proposes its token
/// behind its parent, which has a smaller number. Siblings have different tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DraftTree {
    tokens: Vec<u32>,
    parents: Vec<u32>,
    depths: Vec<u32>,
    scores: Vec<f32>,
    sources: Vec<u8>,
}

impl DraftTree {
    /// Bits of a node's source that say which draft named it; those above say what others named there, for those who learn how often
    /// drafts are right.
    pub const DRAFT: u8 = 0x0f;

    /// Node 0 alone.
    pub fn new(last: u32) -> Self {
        let mut tree = Self::default();
        tree.reset(last);
        tree
    }

    /// Back to node 0 alone.
    pub fn reset(&mut self, last: u32) {
        let Self { tokens, parents, depths, scores, sources } = self;
        tokens.clear();
        parents.clear();
        depths.clear();
        scores.clear();
        sources.clear();
        tokens.push(last);
        parents.push(TreeMask::ROOT);
        depths.push(0);
        scores.push(0.0);
        sources.push(0);
    }

    /// Proposes `token` behind `parent`; `ln_q` is the logarithm of the probability that the draft gives it there: one above 0
    /// counts as 0, NaN as no chance. Returns the node's number. A sibling with the same token is that node, whose score becomes
    /// the larger. So scores never rise along a path.
    pub fn push(&mut self, parent: u32, token: u32, ln_q: f32, source: u8) -> u32 {
        let (p, score) = (parent as usize, self.scores[parent as usize] + ln_chance(ln_q));
        if let Some(twin) = (p + 1..self.len()).find(|&i| self.parents[i] == parent && self.tokens[i] == token) {
            self.scores[twin] = self.scores[twin].max(score);
            return twin as u32;
        }
        self.tokens.push(token);
        self.parents.push(parent);
        self.depths.push(self.depths[p] + 1);
        self.scores.push(score);
        self.sources.push(source);
        self.len() as u32 - 1
    }

    /// Nodes, node 0 counted.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Of all nodes.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Of all nodes; that of node 0 is [`TreeMask::ROOT`].
    pub fn parents(&self) -> &[u32] {
        &self.parents
    }

    /// Distances from node 0.
    pub fn depths(&self) -> &[u32] {
        &self.depths
    }

    /// Logarithms of the probabilities that the draft gives the paths to the nodes.
    pub fn scores(&self) -> &[f32] {
        &self.scores
    }

    /// Which of several drafts proposed a node, in the bits of [`DraftTree::DRAFT`]; 0 where there is one.
    pub fn sources(&self) -> &[u8] {
        &self.sources
    }

    /// Says that one draft proposed all nodes.
    pub(super) fn set_source(&mut self, source: u8) {
        self.sources.fill(source);
    }

    /// Says which proposed each node.
    pub(super) fn set_sources(&mut self, sources: Vec<u8>) {
        debug_assert_eq!(sources.len(), self.len());
        self.sources = sources;
    }

    /// The logarithm of the probability that the draft gives drafted node `i` behind its parent.
    pub fn ln_q(&self, i: usize) -> f32 {
        // Behind a parent of no chance the difference is NaN.
        ln_chance(self.scores[i] - self.scores[self.parents[i] as usize])
    }

    /// The tree of these nodes: ascending, node 0 first, none without its parent.
    pub fn part(&self, nodes: &[u32]) -> Self {
        let mut part = Self::new(self.tokens[0]);
        for i in nodes[1..].iter().map(|&i| i as usize) {
            let above = nodes.binary_search(&self.parents[i]).expect("a node's parent stays with it");
            part.push(above as u32, self.tokens[i], self.ln_q(i), self.sources[i]);
        }
        part
    }

    /// Who sees whom when the tree is staged.
    ///
    /// # Errors
    /// None that a tree built by [`DraftTree::push`] can have.
    pub fn mask(&self) -> Result<TreeMask> {
        TreeMask::new(&self.parents)
    }
}

/// What a draft gives as the logarithm of a probability, made one.
pub(super) fn ln_chance(ln_q: f32) -> f32 {
    if ln_q.is_nan() { f32::NEG_INFINITY } else { ln_q.min(0.0) }
}
