//! The tree over tasks: nodes are sets of tasks with similar signatures. Three ways to split a node, see each constructor.

use serde::{Deserialize, Serialize};

use super::signature::{Signature, dot, l1};

/// A set of tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Their numbers, ascending.
    pub tasks: Vec<usize>,
    /// Edges to the root.
    pub depth: usize,
    /// What the split compared with: the median distance or dot product; for the farthest pair, the node's diameter. 0 in a leaf
    /// of the first two.
    pub threshold: f64,
    /// Two nodes, or none.
    pub children: Vec<usize>,
    /// The farthest pair, where the node was split by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pivots: Option<[usize; 2]>,
}

/// A binary tree over tasks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tree {
    /// Node 0 is the root, where there is any task.
    pub nodes: Vec<Node>,
}

/// The two halves of a node with what divided them, or `None` for a leaf.
type Halves = Option<(Vec<usize>, Vec<usize>)>;

impl Tree {
    /// As in the paper: `near` are the tasks whose signature at module `depth` lies within the median L1 distance from the node's
    /// mean, `far` the others; the median of an even number is the lower one. Where either is empty the list is split in the
    /// middle. Node thresholds are the medians, the delta of its confidence bounds.
    ///
    /// Two clusters of equal size are equally far from their mean, so this finds them by chance only.
    pub fn paper(signatures: &[Signature], depth_max: usize) -> Self {
        let modules = signatures.first().map_or(0, Vec::len);
        Self::grow(signatures.len(), |tasks, depth| {
            if tasks.len() <= 1 || depth >= depth_max.min(modules) {
                return (0.0, None, None);
            }
            let mean = mean(signatures, tasks, depth);
            let score: Vec<f64> = tasks.iter().map(|&k| l1(&signatures[k][depth], &mean)).collect();
            let median = lower_median(&score);
            (median, None, halves(tasks, |i| score[i] <= median))
        })
    }

    /// As in the released code: left are the tasks whose dot product with the node's mean is at least the lower median of those.
    /// `vectors` are the differences of consecutive tasks' accumulated parameters.
    pub fn released(vectors: &[Signature], depth_max: usize) -> Self {
        let modules = vectors.first().map_or(0, Vec::len);
        Self::grow(vectors.len(), |tasks, depth| {
            if tasks.len() <= 1 || depth >= depth_max.min(modules) {
                return (0.0, None, None);
            }
            let mean = mean(vectors, tasks, depth);
            let score: Vec<f64> = tasks.iter().map(|&k| dot(&vectors[k][depth], &mean)).collect();
            let median = lower_median(&score);
            (median, None, halves(tasks, |i| score[i] >= median))
        })
    }

    /// By the farthest pair: its two members become pivots, the others join the nearer (the one of the lower number among equals).
    /// A node whose diameter is below `share`, or at `depth_max`, is a leaf. `distance` is that of two tasks by the modules of a
    /// depth.
    pub fn farthest_pair(
        tasks: usize,
        depth_max: usize,
        share: f64,
        distance: impl Fn(usize, usize, usize) -> f64,
    ) -> Self {
        Self::grow(tasks, |tasks, depth| {
            let mut far = (0.0, None);
            for (i, &a) in tasks.iter().enumerate() {
                for &b in &tasks[i + 1..] {
                    let d = distance(depth, a, b);
                    if far.1.is_none() || d > far.0 {
                        far = (d, Some([a, b]));
                    }
                }
            }
            let (diameter, Some(pivots)) = far else { return (0.0, None, None) };
            if depth >= depth_max || diameter < share {
                return (diameter, None, None);
            }
            let [a, b] = pivots;
            let nearer = |&k: &usize| k == a || (k != b && distance(depth, k, a) <= distance(depth, k, b));
            let (left, right) = tasks.iter().copied().partition(nearer);
            (diameter, Some(pivots), Some((left, right)))
        })
    }

    /// All tasks as leaves of one root: what a bandit without a tree searches.
    pub fn flat(tasks: usize) -> Self {
        let mut tree = Self { nodes: vec![Node::new((0..tasks).collect(), 0)] };
        for k in 0..tasks {
            tree.nodes[0].children.push(k + 1);
            tree.nodes.push(Node::new(vec![k], 1));
        }
        tree.nodes[0].threshold = f64::INFINITY;
        tree
    }

    fn grow(tasks: usize, mut split: impl FnMut(&[usize], usize) -> (f64, Option<[usize; 2]>, Halves)) -> Self {
        let mut tree = Self::default();
        if tasks == 0 {
            return tree;
        }
        tree.nodes.push(Node::new((0..tasks).collect(), 0));
        let mut at = 0;
        while at < tree.nodes.len() {
            let (threshold, pivots, halves) = split(&tree.nodes[at].tasks, tree.nodes[at].depth);
            let depth = tree.nodes[at].depth + 1;
            tree.nodes[at].threshold = threshold;
            tree.nodes[at].pivots = pivots;
            if let Some((left, right)) = halves {
                let n = tree.nodes.len();
                tree.nodes[at].children = vec![n, n + 1];
                tree.nodes.extend([Node::new(left, depth), Node::new(right, depth)]);
            }
            at += 1;
        }
        tree
    }

    /// Numbers of the nodes without children.
    pub fn leaves(&self) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(|&i| self.nodes[i].children.is_empty())
    }

    /// Edges from the root to the deepest leaf.
    pub fn levels(&self) -> usize {
        self.nodes.iter().map(|n| n.depth).max().unwrap_or(0)
    }

    /// The tree as text, a node a line.
    pub fn text(&self, name: &dyn Fn(usize) -> String) -> String {
        let mut out = String::new();
        let mut open = if self.nodes.is_empty() { Vec::new() } else { vec![(0, String::new(), String::new())] };
        while let Some((i, own, below)) = open.pop() {
            let node = &self.nodes[i];
            let names: Vec<String> = node.tasks.iter().map(|&k| name(k)).collect();
            let wide = if node.tasks.len() > 1 { format!("  ({:.3})", node.threshold) } else { String::new() };
            out += &format!("{own}{}{wide}\n", names.join(" "));
            for (c, &child) in node.children.iter().enumerate().rev() {
                let end = c + 1 == node.children.len();
                let (a, b) = if end { ("└─ ", "   ") } else { ("├─ ", "│  ") };
                open.push((child, format!("{below}{a}"), format!("{below}{b}")));
            }
        }
        out
    }
}

impl Node {
    fn new(tasks: Vec<usize>, depth: usize) -> Self {
        Self { tasks, depth, threshold: 0.0, children: Vec::new(), pivots: None }
    }
}

fn mean(signatures: &[Signature], tasks: &[usize], module: usize) -> Vec<f32> {
    let mut sum = vec![0.0f64; signatures[tasks[0]][module].len()];
    for &k in tasks {
        sum.iter_mut().zip(&signatures[k][module]).for_each(|(s, x)| *s += f64::from(*x));
    }
    sum.iter().map(|s| (s / tasks.len() as f64) as f32).collect()
}

fn lower_median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) / 2]
}

/// The tasks at the places where `left` holds, and the others; the list split in the middle where all are on one side.
fn halves(tasks: &[usize], left: impl Fn(usize) -> bool) -> Halves {
    let (a, b): (Vec<usize>, Vec<usize>) = (0..tasks.len()).partition(|&i| left(i));
    let of = |places: &[usize]| places.iter().map(|&i| tasks[i]).collect::<Vec<_>>();
    if a.is_empty() || b.is_empty() {
        let (a, b) = tasks.split_at(tasks.len() / 2);
        return Some((a.to_vec(), b.to_vec()));
    }
    Some((of(&a), of(&b)))
}
