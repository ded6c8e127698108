//! Trees of drafted tokens: [`Pool`] grows one level by level, [`Shape`] says where nodes of a static tree stand, [`merge`] joins
//! the trees of several drafts.

use std::cmp::Ordering;
use std::ops::Range;

use super::DraftTree;
use super::tree::ln_chance;
use crate::backend::TreeMask;
use crate::error::{Result, bail, ensure};

/// Where the nodes of a static tree stand: each is the child of a certain rank among its parent's likeliest tokens. Level by
/// level, parents in order, ranks ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Of each drafted node, its parent among the drafted nodes, [`TreeMask::ROOT`] for a child of node 0.
    parents: Vec<u32>,
    ranks: Vec<u32>,
}

impl Shape {
    /// One child behind the other.
    pub fn chain(nodes: usize) -> Self {
        let parents = (0..nodes as u32).map(|i| i.checked_sub(1).unwrap_or(TreeMask::ROOT)).collect();
        Self { parents, ranks: vec![0; nodes] }
    }

    /// From the paths to all nodes, each a list of child ranks, in any order.
    ///
    /// # Errors
    /// An empty path, one that comes twice, one whose parent's path is missing.
    pub fn from_paths<P: AsRef<[u32]>>(paths: &[P]) -> Result<Self> {
        let mut paths: Vec<&[u32]> = paths.iter().map(AsRef::as_ref).collect();
        paths.sort_by_key(|p| (p.len(), *p));
        let mut shape = Self { parents: Vec::new(), ranks: Vec::new() };
        for (i, path) in paths.iter().enumerate() {
            ensure!(i == 0 || paths[i - 1] != *path, Usage, "the tree's path {path:?} comes twice");
            let Some((&rank, above)) = path.split_last() else {
                bail!(Usage, "an empty path in a tree");
            };
            let parent = paths[..i].binary_search_by_key(&(above.len(), above), |p| (p.len(), p));
            shape.parents.push(match (above.is_empty(), parent) {
                (true, _) => TreeMask::ROOT,
                (_, Ok(p)) => p as u32,
                _ => bail!(Usage, "the tree's path {path:?} has no parent {above:?}"),
            });
            shape.ranks.push(rank);
        }
        Ok(shape)
    }

    /// Drafted nodes.
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    /// Whether it drafts nothing.
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// Of each drafted node, the drafted node above it, [`TreeMask::ROOT`] for a child of node 0.
    pub fn parents(&self) -> &[u32] {
        &self.parents
    }

    /// Of each drafted node, its rank among its parent's likeliest tokens.
    pub fn ranks(&self) -> &[u32] {
        &self.ranks
    }

    /// Children of a node at most, and so how many of a node's likeliest tokens are needed.
    pub fn width(&self) -> usize {
        self.ranks.iter().max().map_or(0, |r| *r as usize + 1)
    }

    fn children(&self, of: u32) -> impl Iterator<Item = u32> {
        (0..self.len() as u32).filter(move |&i| self.parents[i as usize] == of)
    }

    /// Tokens of a pass over the tree, node 0's draw counted, where a node of rank r is right with probability `accept[r]`
    /// whenever its parent is.
    pub fn expected(&self, accept: &[f64]) -> f64 {
        let mut reach: Vec<f64> = Vec::with_capacity(self.len());
        for (&p, &r) in self.parents.iter().zip(&self.ranks) {
            let above = if p == TreeMask::ROOT { 1.0 } else { reach[p as usize] };
            reach.push(above * accept.get(r as usize).copied().unwrap_or(0.0));
        }
        1.0 + reach.iter().sum::<f64>()
    }
}

/// A proposed token before it is decided whether the target sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    token: u32,
    ln_q: f32,
    /// Of the whole path.
    score: f32,
    /// Candidate above, or [`TreeMask::ROOT`].
    parent: u32,
    /// Node of the static shape.
    place: u32,
}

/// A tree that a draft grows level by level, and of which the best part is verified (EAGLE-2: Li et al. 2024, arXiv:2406.16858).
///
/// The draft gives the likeliest tokens behind node 0, then reads the [`Pool::frontier`], the best of them, in one pass and gives
/// those behind each, and so on. What it reads are its *rows*: they are numbered in the order of reading, and
/// [`Pool::parents`] names the row above each, so that a row's parent can be found among staged keys.
///
/// ```
/// # use quadriga::speculative::{DraftTree, Pool};
/// let mut pool = Pool::new(2);
/// pool.expand(&[7, 9], &[0.6f32.ln(), 0.2f32.ln()]); // behind node 0
/// assert_eq!(&pool.tokens()[pool.frontier()], &[7, 9]); // to be read now, behind the same parent
/// pool.expand(&[1, 2, 3, 4], &[0.6f32.ln(), 0.2f32.ln(), 0.5f32.ln(), 0.3f32.ln()]); // behind 7, then behind 9
/// assert_eq!(&pool.tokens()[pool.frontier()], &[1, 2]);
/// assert_eq!(&pool.parents()[pool.frontier()], &[0, 0]); // 7 was row 0
/// let mut tree = DraftTree::new(5);
/// pool.finish(3, 0, &mut tree);
/// assert_eq!(tree.tokens(), &[5, 7, 9, 1]);
/// ```
#[derive(Clone, Debug)]
pub struct Pool {
    width: usize,
    shape: Option<Shape>,
    all: Vec<Candidate>,
    /// Of each row, its candidate.
    rows: Vec<u32>,
    tokens: Vec<u32>,
    parents: Vec<u32>,
    /// Of each level given, the first of its rows; those of the last are the frontier.
    starts: Vec<usize>,
}

impl Pool {
    /// A dynamic tree: `width` children of every node, `width` nodes to read at every depth. A width of 1 is a chain.
    pub fn new(width: usize) -> Self {
        let (all, rows, tokens, parents, starts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { width, shape: None, all, rows, tokens, parents, starts }
    }

    /// A static tree: at every depth exactly the nodes of `shape`.
    pub fn of_shape(shape: Shape) -> Self {
        Self { shape: Some(shape.clone()), ..Self::new(shape.width()) }
    }

    /// Back to the beginning, for another step.
    pub fn reset(&mut self) {
        self.all.clear();
        self.rows.clear();
        self.tokens.clear();
        self.parents.clear();
        self.starts.clear();
    }

    /// How many of a node's likeliest tokens [`Pool::expand`] wants; fewer will do.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Levels given so far.
    pub fn depth(&self) -> usize {
        self.starts.len()
    }

    /// Tokens of all rows, those read and those of the frontier.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Of all rows, the row above; [`TreeMask::ROOT`] at the first level. What [`TreeMask::new`] takes.
    pub fn parents(&self) -> &[u32] {
        &self.parents
    }

    /// The rows to read next; all are [`Pool::depth`] tokens behind node 0. Empty: nothing is left to expand.
    pub fn frontier(&self) -> Range<usize> {
        self.starts.last().copied().unwrap_or(0)..self.rows.len()
    }

    /// Rows of each level, the frontier's last.
    pub(super) fn levels(&self) -> impl DoubleEndedIterator<Item = Range<usize>> {
        let ends = self.starts.iter().skip(1).copied().chain([self.rows.len()]);
        let spans: Vec<_> = self.starts.iter().copied().zip(ends).map(|(a, b)| a..b).collect();
        spans.into_iter()
    }

    /// Of all candidates, the best first as far as [`Pool::finish`] would keep `most`, and of all rows: the chances of their
    /// paths where `chance` is that of a token, from the draft's own probability of it and its depth.
    pub(super) fn chances(&self, most: usize, chance: impl Fn(f32, usize) -> f64) -> (Vec<f64>, Vec<f64>) {
        let (mut paths, mut depths): (Vec<f64>, Vec<usize>) = (Vec::new(), Vec::new());
        for c in &self.all {
            let (above, depth) = match c.parent {
                TreeMask::ROOT => (1.0, 1),
                p => (paths[p as usize], depths[p as usize] + 1),
            };
            paths.push(above * chance(c.ln_q, depth));
            depths.push(depth);
        }
        let of = |c: u32| paths[c as usize];
        let kept = self.best(0..self.all.len() as u32, most).into_iter();
        let kept = kept.filter(|&c| self.all[c as usize].score > f32::NEG_INFINITY).map(of).collect();
        (kept, self.rows.iter().map(|&c| of(c)).collect())
    }

    /// The likeliest tokens behind each row of the frontier (at first, behind node 0), likeliest first, row after row, all rows
    /// with equally many, and the logarithms of the probabilities that the draft gives them there. NaN counts as no chance.
    pub fn expand(&mut self, tokens: &[u32], ln_q: &[f32]) {
        assert_eq!(tokens.len(), ln_q.len(), "as many probabilities as tokens");
        let (root, from) = ([TreeMask::ROOT], self.all.len());
        let read = self.frontier();
        let owners = if self.starts.is_empty() { &root[..] } else { &self.rows[read.clone()] };
        let each = tokens.len() / owners.len().max(1);
        assert_eq!(each * owners.len(), tokens.len(), "equally many tokens behind every row");
        for (i, &parent) in owners.iter().enumerate() {
            let (above, place) = match self.all.get(parent as usize) {
                Some(c) => (c.score, c.place),
                None => (0.0, TreeMask::ROOT),
            };
            let mut propose = |rank: usize, place: u32| {
                let at = i * each + rank;
                let ln_q = ln_chance(ln_q[at]);
                self.all.push(Candidate { token: tokens[at], ln_q, score: above + ln_q, parent, place });
            };
            match &self.shape {
                None => (0..each.min(self.width)).for_each(|rank| propose(rank, 0)),
                Some(s) => s
                    .children(place)
                    .map(|c| (s.ranks[c as usize] as usize, c))
                    .filter(|(rank, _)| *rank < each)
                    .for_each(|(rank, c)| propose(rank, c)),
            }
        }
        let appended = from as u32..self.all.len() as u32;
        let next = match &self.shape {
            None => self.best(appended, self.width),
            Some(s) => appended.filter(|&c| s.children(self.all[c as usize].place).next().is_some()).collect(),
        };
        self.starts.push(self.rows.len());
        for c in next.into_iter().filter(|&c| self.all[c as usize].score > f32::NEG_INFINITY) {
            let Candidate { token, parent, .. } = self.all[c as usize];
            let above = self.rows[read.clone()].iter().position(|&r| r == parent);
            self.rows.push(c);
            self.tokens.push(token);
            self.parents.push(above.map_or(TreeMask::ROOT, |r| (read.start + r) as u32));
        }
    }

    /// The scores of the best `most` candidates, falling: what a budget is chosen by.
    pub fn scores(&self, most: usize) -> Vec<f32> {
        let scores = self.best(0..self.all.len() as u32, most).into_iter().map(|c| self.all[c as usize].score);
        scores.take_while(|s| *s > f32::NEG_INFINITY).collect()
    }

    /// Grows `tree` by the `most` candidates whose paths are likeliest, in the order in which they were proposed. A tie goes to
    /// the one proposed first, so that no child comes without its parent; what the draft gives no chance is left out.
    pub fn finish(&self, most: usize, source: u8, tree: &mut DraftTree) {
        let mut kept = self.best(0..self.all.len() as u32, most);
        kept.sort_unstable();
        let mut nodes = vec![0; self.all.len()];
        for c in kept.into_iter().map(|c| c as usize).filter(|&c| self.all[c].score > f32::NEG_INFINITY) {
            let Candidate { token, ln_q, parent, .. } = self.all[c];
            let above = if parent == TreeMask::ROOT { 0 } else { nodes[parent as usize] };
            nodes[c] = tree.push(above, token, ln_q, source);
        }
    }

    fn best(&self, of: Range<u32>, most: usize) -> Vec<u32> {
        best(of, most, |c| self.all[c as usize].score)
    }
}

/// The `most` best of `of`, best first; ties to the lower number.
fn best(of: Range<u32>, most: usize, score: impl Fn(u32) -> f32) -> Vec<u32> {
    let order = |a: &u32, b: &u32| score(*b).partial_cmp(&score(*a)).unwrap_or(Ordering::Equal).then(a.cmp(b));
    let mut all: Vec<u32> = of.collect();
    if most < all.len() && most > 0 {
        all.select_nth_unstable_by(most, order);
    }
    all.truncate(most);
    all.sort_unstable_by(order);
    all
}

/// The `most` drafted nodes of `tree` whose paths are likeliest; ties to the lower number.
pub fn prune(tree: &DraftTree, most: usize) -> DraftTree {
    let mut kept = best(1..tree.len() as u32, most, |i| tree.scores()[i as usize]);
    kept.push(0);
    kept.sort_unstable();
    tree.part(&kept)
}

/// Joins proposals behind the same token by their common prefixes (SpecInfer: Miao et al. 2024, arXiv:2305.09781). A token keeps
/// the best score it got and the source that named it first; the second result is, for every node, a bit for each of `trees`
/// that proposed it.
pub fn merge(trees: &[&DraftTree]) -> (DraftTree, Vec<u32>) {
    let mut joint = DraftTree::new(trees.first().map_or(0, |t| t.tokens()[0]));
    let mut by = vec![0];
    for (s, tree) in trees.iter().enumerate() {
        let mut nodes = vec![0; tree.len()];
        by[0] |= 1 << s;
        for i in 1..tree.len() {
            let parent = nodes[tree.parents()[i] as usize];
            nodes[i] = joint.push(parent, tree.tokens()[i], tree.ln_q(i), tree.sources()[i]);
            by.resize(joint.len(), 0);
            by[nodes[i] as usize] |= 1 << s;
        }
    }
    (joint, by)
}
