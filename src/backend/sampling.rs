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
    /// Speculative sampling. The children of a node were drawn from q, in the order of their numbers (a chain has one child a
    /// node). How many a node has may depend on its path, on no other token that was drawn: a child that is dropped for its
    /// probability takes the law along.
    ///
    /// A node has a ratio r, 1 at node 0, and begins with its own p. Child x has the ratio min(1, r p(x) / q(x)). Where it is
    /// rejected, what it would have covered is taken away: with R = sum max(0, r p - q), p becomes max(0, r p - q) / R and r
    /// becomes R / (R + 1 - r), which leaves r = 1 as it is. Then the next child is tried; where none is left a token is drawn
    /// from p.
    Reject {
        /// The target's distribution behind each node, `[nodes, vocab]`, as [`Backend::distribution`] makes it.
        p: In<'a, B, B::Acc>,
        /// The draft's distributions, `[drafted, vocab]`: the very ones that were drawn from.
        q: In<'a, B, B::Acc>,
        /// Of each node with children the row of q they were drawn from.
        drafts: &'a [u32],
        /// Of each sequence; its random numbers are those of `key.at(i)`. They must be others than those that the children
        /// were drawn with.
        keys: &'a [Key],
        /// Whether siblings were drawn with replacement: then q stays as it is, and a token that was rejected is tried again.
        /// Else q becomes norm(q without x) behind the rejection of x.
        replacement: bool,
        /// In which order nodes are tried.
        order: Order,
    },
}

/// How [`Rule::Reject`] walks a tree.
///
/// Both are lossless for the same proposals, by one argument. Let a node with ratio r and law p be *served* if the procedure accepts
/// it with probability r and what it then emits behind the node follows p, then the target. A child x ~ q that is served with
/// min(1, r p(x) / q(x)) covers min(q(x), r p(x)) of what the node owes, r p(x); it is rejected with probability
/// 1 - sum min(q, r p) = R + 1 - r, and the node owes max(0, r p - q): it is the same node with the p and r of [`Rule::Reject`],
/// whatever x was, and its next child comes from a q that may depend on x. A node without further children is accepted with
/// probability r and emits a token from p. So all nodes are served, from the leaves up, and node 0 with r = 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From node 0 down, token by token: each node that is reached stands, so r = 1 everywhere (Leviathan et al. 2023,
    /// arXiv:2211.17192; Chen et al. 2024, arXiv:2402.12374; with replacement Miao et al. 2024, arXiv:2305.09781). Decision i (a
    /// child tried, or the last draw) takes number i.
    RootFirst,
    /// From the leaves up: a node is given up only when all below it are (traversal verification, Weng et al. 2025,
    /// arXiv:2505.12398; of a chain block verification, Sun et al. 2024, arXiv:2403.10444). What a path's likelier tokens have to
    /// spare makes up for others. Node c is tested by number c, the last draw takes number 0. A tree has at most
    /// [`MAX_TRAVERSED`] nodes.
    LeavesFirst,
}

/// Less than this of a residual is rounding: p was q.
pub(super) const NOTHING: f64 = 1e-9;

/// The ratio of a child: min(1, w / q) for its share `w` of p and the `q` it was drawn with. Nothing where w is 0, whatever q.
pub(super) fn ratio(w: f64, q: f64) -> f64 {
    if w < q {
        w / q
    } else if w > 0.0 {
        1.0
    } else {
        0.0
    }
}

/// A logit to be changed by a repetition penalty, see [`Backend::penalize`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Penalty {
    /// Row of logits.
    pub row: u32,
    /// Token in it.
    pub token: u32,
    /// What a positive logit is divided and any other multiplied by (Keskar et al. 2019, arXiv:1909.05858); above 0.
    pub factor: f32,
}

impl Penalty {
    /// On its logit.
    pub fn on(&self, x: f32) -> f32 {
        if x > 0.0 { x / self.factor } else { x * self.factor }
    }
}

/// Checks that every penalty has its logit.
pub(super) fn check_penalties(penalties: &[Penalty], logits: usize, vocab: usize) -> Result<()> {
    for Penalty { row, token, .. } in penalties {
        let inside = (*token as usize) < vocab && (*row as usize) < logits / vocab;
        ensure!(inside, Shape, "a penalty on token {token} of row {row}: there are {} of {vocab}", logits / vocab);
    }
    Ok(())
}

/// Checks that the tokens of [`Backend::forbid`] have their logits.
pub(super) fn check_forbidden(tokens: &[u32], vocab: usize) -> Result<()> {
    let outside = tokens.iter().find(|t| **t as usize >= vocab);
    ensure!(outside.is_none(), Shape, "token {} is forbidden in a vocabulary of {vocab}", outside.unwrap_or(&0));
    Ok(())
}

/// What verification finds, as [`Backend::kv_commit_batch`] takes it.
pub struct Accepted<'a, B: Backend> {
    /// `[sequences, stride]`: the nodes that stand, from node 0 down; at most `stride` of them. What lies behind may be anything.
    pub path: Out<'a, B, u32>,
    /// How many stand, node 0 included.
    pub counts: Out<'a, B, u32>,
    /// The target's token behind the last of them: the next node 0, not yet in the cache. [`NO_TOKEN`] if the target gave no
    /// distribution there (its logits held NaN): the sequence has failed.
    pub next: Out<'a, B, u32>,
}

/// Children of a node that [`Rule::Reject`] tries at most.
pub const MAX_SIBLINGS: usize = 64;

/// Nodes of a tree that [`Order::LeavesFirst`] takes at most.
pub const MAX_TRAVERSED: usize = 512;

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
    pub(super) fn check_reject(
        &self,
        drafts: &[u32],
        keys: &[Key],
        drafted: usize,
        vocab: usize,
        order: Order,
    ) -> Result<()> {
        let (nodes, sequences) = (self.tokens.len(), self.sizes.len());
        let most = self.sizes.iter().copied().max().unwrap_or(0) as usize;
        let fits = order == Order::RootFirst || most <= MAX_TRAVERSED;
        ensure!(fits, Shape, "a tree of {most} nodes exceeds {MAX_TRAVERSED}, the most that are verified leaves first");
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

    /// Whether anything is proposed behind a node.
    pub fn has_children(&self, node: usize) -> bool {
        self.children(node).next().is_some()
    }

    /// [`Rule::Reject`], where `open(node, r)` is a node with its ratio: writes the path, says how long it is and which token
    /// follows.
    pub fn reject<L: Left>(
        &self,
        replacement: bool,
        order: Order,
        key: Key,
        open: impl Fn(usize, f64) -> L,
        path: &mut [u32],
    ) -> (u32, u32) {
        match order {
            Order::LeavesFirst => {
                let walk = Traversal { tree: self, replacement, key, open };
                // Node 0 has the ratio 1, which nothing lowers.
                walk.tried(0, 1.0, 0, path).unwrap_or((0, NO_TOKEN))
            }
            Order::RootFirst => {
                let mut numbers = (0..).map(|i| key.at(i).uniform());
                let mut number = || numbers.next().unwrap_or_default();
                let (mut node, mut kept) = (0, 0);
                'down: loop {
                    path[kept] = node as u32;
                    kept += 1;
                    let mut left = open(node, 1.0);
                    for child in self.children(node).take_while(|_| kept < path.len()) {
                        let x = self.tokens[child] as usize;
                        if number() < left.ratio(x) {
                            node = child;
                            continue 'down;
                        }
                        if !left.reject(x, replacement) {
                            break;
                        }
                    }
                    return (kept as u32, left.draw(number()));
                }
            }
        }
    }

    /// [`Rule::Match`]: writes the path, says how long it is and which token follows.
    pub fn walk(&self, picks: &[u32], path: &mut [u32]) -> (u32, u32) {
        let (mut node, mut kept) = (0, 0);
        loop {
            path[kept] = node as u32;
            kept += 1;
            let pick = picks[self.first + node];
            match self.children(node).find(|&c| self.tokens[c] == pick) {
                // Where the target has no token none is right, though the draft have none either.
                Some(child) if kept < path.len() && pick != NO_TOKEN => node = child,
                _ => return (kept as u32, pick),
            }
        }
    }
}

/// What rejections have left of a node's r, p and q.
pub(super) trait Left {
    fn r(&self) -> f64;
    /// That of child `x`.
    fn ratio(&self, x: usize) -> f64;
    /// Takes away what child `x` would have covered. False where no further child can stand: nothing is left of q; or nothing of p,
    /// which stays as it is where r is 1 (p was q but for rounding) and where it was nothing before (no distribution: a failure
    /// that must be told), and else makes r 0.
    fn reject(&mut self, x: usize, replacement: bool) -> bool;
    /// A token from p.
    fn draw(&self, u: f64) -> u32;
}

struct Traversal<'a, F> {
    tree: &'a Tree<'a>,
    replacement: bool,
    key: Key,
    open: F,
}

impl<L: Left, F: Fn(usize, f64) -> L> Traversal<'_, F> {
    /// What stands at `node`, which has `r` and `depth` nodes above it, or below.
    fn tried(&self, node: usize, r: f64, depth: usize, path: &mut [u32]) -> Option<(u32, u32)> {
        path[depth] = node as u32;
        let mut left = (self.open)(node, r);
        let deeper = depth + 1 < path.len();
        for child in self.tree.children(node).take_while(|_| deeper) {
            let x = self.tree.tokens[child] as usize;
            let r = left.ratio(x);
            if r > 0.0
                && let Some(found) = self.tried(child, r, depth + 1, path)
            {
                return Some(found);
            }
            if !left.reject(x, self.replacement) {
                break;
            }
        }
        let stands = self.key.at(node as u64).uniform() < left.r();
        stands.then(|| (depth as u32 + 1, left.draw(self.key.uniform())))
    }
}

#[cfg(test)]
mod tests {
    use super::ratio;

    /// The random number may be 0, and is less than 1.
    #[test]
    fn ratios_at_the_ends() {
        // Accepted is what the number is less than.
        assert_eq!([ratio(0.0, 0.5), ratio(0.0, 0.0)], [0.0; 2]);
        let most = 1.0 - f64::EPSILON / 2.0;
        assert!(most < ratio(0.3, 0.3) && most < ratio(0.3, 0.1) && most < ratio(0.3, 0.0));
        assert_eq!(ratio(0.1, 0.4), 0.25);
    }
}
