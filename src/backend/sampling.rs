//! What the operations on logits and on drafted tokens take and give.

use super::{Backend, In, Out};
use crate::error::{Result, ensure};
use crate::rng::Key;

/// Stands for a token where there is none: the logits hold NaN or nothing finite, or no probability is left to draw from.
pub const NO_TOKEN: u32 = u32::MAX;

/// How tokens are drawn from a row x of logits: from softmax(x / temperature) over the tokens that top-k, then top-p, then min-p
/// keep, lower ids first among equals. The token is the first, in the order of ids, up to which the probabilities exceed the key's
/// uniform number; so equal keys give equal tokens on every backend, unless rounding moves a sum across the number.
///
/// Probabilities below 2^-32 of the best may be taken for 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// 0 or more; 0 takes the largest.
    pub temperature: f32,
    /// Keeps the k most likely; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest of the most likely whose mass reaches p; above 0, and 1 keeps all.
    pub top_p: f32,
    /// Keeps those at least this fraction as likely as the best; 0 keeps all.
    pub min_p: f32,
    /// Place of the random number of the first token; those of further ones follow it.
    pub key: Key,
}

impl Draw {
    /// The largest logit, whatever the random number.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, key: Key { seed: 0, stream: 0, counter: 0 } };

    /// Whether it always takes the largest.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }
}

/// Drafted tokens: one tree for each sequence, one after another. Node 0 of a tree is the sequence's last token, which is not
/// drafted; every other node proposes its token behind its parent, which comes before it. Siblings are tried in the order of their
/// numbers.
#[derive(Clone, Copy, Debug)]
pub struct Trees<'a> {
    /// Nodes of each tree, node 0 included.
    pub sizes: &'a [u32],
    /// Of all nodes.
    pub tokens: &'a [u32],
    /// Of all nodes, numbered in their tree; those of nodes 0 are not read.
    pub parents: &'a [u32],
}

/// What the target model has to say behind the nodes, and how drafted tokens are held to it.
pub enum Rule<'a, B: Backend> {
    /// `[nodes]`: the token that the target takes behind each node. The walk goes to the child with that token. Its own best
    /// tokens ([`Draw::GREEDY`]) make greedy decoding; one draw a node ([`Backend::sample`]) makes sampling, if the drafted
    /// tokens do not depend on these draws. With a token's position for the draw's counter the tokens kept are the very ones
    /// that would be drawn without a draft.
    Match(In<'a, B, u32>),
    /// Speculative sampling. The children of a node were drawn from q, in the order of their numbers and without replacement
    /// (a chain has one child a node). Child x is accepted if u q(x) < p(x); else p becomes norm(max(0, p - q)), then q
    /// becomes norm(q without x), and the next child is tried. Where none is left a token is drawn from p.
    Reject {
        /// The target's distribution behind each node, `[nodes, vocab]`, as [`Backend::distribution`] makes it.
        p: In<'a, B, B::Acc>,
        /// The draft's distributions, `[drafted, vocab]`: the very ones that were drawn from.
        q: In<'a, B, B::Acc>,
        /// Of each node with children the row of q they were drawn from.
        drafts: &'a [u32],
        /// Of each sequence; decision i (a child tried, or the last draw) takes the number of `key.at(i)`. They must be
        /// others than those that the children were drawn with.
        keys: &'a [Key],
    },
}

/// What verification finds, as [`Backend::kv_commit_batch`] takes it.
pub struct Accepted<'a, B: Backend> {
    /// `[sequences, stride]`: the nodes that stand, from node 0 down; at most `stride` of them. What lies behind is not written.
    pub path: Out<'a, B, u32>,
    /// How many stand, node 0 included.
    pub counts: Out<'a, B, u32>,
    /// The target's token behind the last of them: the next node 0, not yet in the cache. [`NO_TOKEN`] if the target gave no
    /// distribution.
    pub next: Out<'a, B, u32>,
}

/// Children of a node that [`Rule::Reject`] tries at most.
pub const MAX_SIBLINGS: usize = 64;

impl<'a> Trees<'a> {
    /// Checks that there is a tree for each sequence and that parents come first.
    pub(super) fn check(&self, sequences: usize) -> Result<()> {
        let nodes: usize = self.sizes.iter().map(|n| *n as usize).sum();
        let (t, p) = (self.tokens.len(), self.parents.len());
        ensure!(self.sizes.len() == sequences, Shape, "{} trees for {sequences} sequences", self.sizes.len());
        ensure!((t, p) == (nodes, nodes), Shape, "{t} tokens and {p} parents for {nodes} nodes");
        ensure!(!self.sizes.contains(&0), Shape, "a tree without node 0");
        for tree in self.iter() {
            let early = (1..).zip(&tree.parents[1..]).all(|(i, p)| *p < i);
            ensure!(early, Shape, "parents {:?} do not come before their children", tree.parents);
        }
        Ok(())
    }

    /// Checks what [`Rule::Reject`] brings.
    pub(super) fn check_reject(&self, drafts: &[u32], keys: &[Key], drafted: usize, vocab: usize) -> Result<()> {
        let (nodes, sequences) = (self.tokens.len(), self.sizes.len());
        ensure!(drafts.len() == nodes, Shape, "{} rows of q for {nodes} nodes", drafts.len());
        ensure!(keys.len() == sequences, Shape, "{} keys for {sequences} sequences", keys.len());
        for tree in self.iter() {
            for (i, &parent) in tree.parents.iter().enumerate().skip(1) {
                let (x, row) = (tree.tokens[i], drafts[tree.first + parent as usize]);
                ensure!((x as usize) < vocab, Shape, "drafted token {x} of a vocabulary of {vocab}");
                ensure!((row as usize) < drafted, Shape, "row {row} of {drafted} rows of q");
                let siblings = tree.children(parent as usize).count();
                ensure!(siblings <= MAX_SIBLINGS, Shape, "{siblings} children of one node exceed {MAX_SIBLINGS}");
            }
        }
        Ok(())
    }

    /// One after another.
    pub(super) fn iter(&self) -> impl Iterator<Item = Tree<'a>> + use<'a> {
        let Trees { sizes, tokens, parents } = *self;
        let mut first = 0;
        sizes.iter().map(move |&n| {
            let r = first..first + n as usize;
            first = r.end;
            Tree { first: r.start, tokens: &tokens[r.clone()], parents: &parents[r] }
        })
    }
}

/// Width of each of `rows` rows (at least one) that hold `len` values.
pub(super) fn width(what: &str, len: usize, rows: usize) -> Result<usize> {
    ensure!(len > 0 && len.is_multiple_of(rows), Shape, "{what}: {len} values are not {rows} rows");
    Ok(len / rows)
}

/// The tree of one sequence.
pub(super) struct Tree<'a> {
    /// Its node 0 among the nodes of all.
    pub first: usize,
    pub tokens: &'a [u32],
    parents: &'a [u32],
}

impl Tree<'_> {
    /// In the order in which they are tried.
    pub fn children(&self, node: usize) -> impl Iterator<Item = usize> {
        (node + 1..self.parents.len()).filter(move |&c| self.parents[c] as usize == node)
    }

    /// [`Rule::Match`]: writes the path, says how long it is and which token follows.
    pub fn walk(&self, picks: &[u32], path: &mut [u32]) -> (u32, u32) {
        let (mut node, mut kept) = (0, 0);
        loop {
            path[kept] = node as u32;
            kept += 1;
            let pick = picks[self.first + node];
            match self.children(node).find(|&c| self.tokens[c] == pick) {
                Some(child) if kept < path.len() => node = child,
                _ => return (kept as u32, pick),
            }
        }
    }
}
