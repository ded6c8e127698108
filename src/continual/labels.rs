//! Labels as a trie of tokens: which of several labels stands behind a prompt is a walk from the root, and only where the walk can
//! go two ways does the model have a say. A label with a token of its own is decided by one row of logits.

use crate::error::{Result, ensure};

/// A beginning of labels.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    parent: usize,
    token: u32,
    depth: usize,
    children: Vec<usize>,
}

/// A row behind a prompt: its token, its position behind the prompt (from 0), and which of these rows it sees, itself the last.
pub type LabelRow = (u32, u32, Vec<u32>);

/// The labels of a stream, by their tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    nodes: Vec<Node>,
    /// Where each label ends.
    ends: Vec<usize>,
    /// Nodes that branch, the root first.
    branching: Vec<usize>,
    rows: Vec<LabelRow>,
    deciding: Vec<Option<u32>>,
    choices: Vec<Vec<u32>>,
}

impl Labels {
    /// Of labels by their tokens, behind each of which `end` stands: so none is the beginning of another.
    ///
    /// # Errors
    /// A label without tokens; two with the same.
    pub fn new(labels: &[Vec<u32>], end: u32) -> Result<Self> {
        let mut nodes = vec![Node { parent: 0, token: 0, depth: 0, children: Vec::new() }];
        let mut ends: Vec<usize> = Vec::new();
        for (i, label) in labels.iter().enumerate() {
            ensure!(!label.is_empty(), Usage, "label {i} has no token");
            let mut at = 0;
            for &token in label.iter().chain([&end]) {
                let found = nodes[at].children.iter().copied().find(|&c| nodes[c].token == token);
                at = found.unwrap_or_else(|| {
                    let (new, depth) = (nodes.len(), nodes[at].depth + 1);
                    nodes[at].children.push(new);
                    nodes.push(Node { parent: at, token, depth, children: Vec::new() });
                    new
                });
            }
            let same = ends.iter().position(|&e| e == at);
            ensure!(same.is_none(), Usage, "labels {} and {i} have the same tokens", same.unwrap_or(0));
            ends.push(at);
        }
        let branching: Vec<usize> = (0..nodes.len()).filter(|&i| i == 0 || nodes[i].children.len() > 1).collect();
        let mut on_the_way = vec![false; nodes.len()];
        for &b in &branching {
            let mut at = b;
            while at != 0 && !std::mem::replace(&mut on_the_way[at], true) {
                at = nodes[at].parent;
            }
        }
        // All nodes on the way to one that branches, but the root: parents come before their children.
        let computed: Vec<usize> = (1..nodes.len()).filter(|&i| on_the_way[i]).collect();
        let place = |node: usize| computed.binary_search(&node).ok().map(|p| p as u32);
        let row = |&i: &usize| {
            let (mut seen, mut at) = (Vec::new(), i);
            while let Some(p) = place(at) {
                seen.push(p);
                at = nodes[at].parent;
            }
            seen.reverse();
            (nodes[i].token, nodes[i].depth as u32 - 1, seen)
        };
        let rows = computed.iter().map(row).collect();
        let deciding = branching.iter().map(|&n| place(n)).collect();
        let tokens = |&n: &usize| nodes[n].children.iter().map(|&c| nodes[c].token).collect();
        let choices = branching.iter().map(tokens).collect();
        Ok(Self { nodes, ends, branching, rows, deciding, choices })
    }

    /// Rows that every prompt has behind it.
    pub fn rows(&self) -> &[LabelRow] {
        &self.rows
    }

    /// The rows whose logits decide: `None` is the prompt's last one, `Some` one of [`Labels::rows`].
    pub fn deciding(&self) -> &[Option<u32>] {
        &self.deciding
    }

    /// Tokens between which each deciding row decides.
    pub fn choices(&self) -> &[Vec<u32>] {
        &self.choices
    }

    /// The likeliest of the `allowed` labels, the first among equals, where nothing but they can follow. `logits` are those of
    /// [`Labels::choices`].
    pub fn best(&self, logits: &[Vec<f32>], allowed: &[usize]) -> Option<usize> {
        let mut open = vec![false; self.nodes.len()];
        for &label in allowed {
            let mut at = self.ends[label];
            while !std::mem::replace(&mut open[at], true) && at != 0 {
                at = self.nodes[at].parent;
            }
        }
        // Log-probability of each node's token among those that may stand there.
        let mut own = vec![0.0f64; self.nodes.len()];
        for (&node, logits) in self.branching.iter().zip(logits) {
            let ways: Vec<(usize, f64)> = self.nodes[node]
                .children
                .iter()
                .zip(logits)
                .filter(|(c, _)| open[**c])
                .map(|(c, z)| (*c, f64::from(*z)))
                .collect();
            let top = ways.iter().map(|w| w.1).fold(f64::NEG_INFINITY, f64::max);
            let total = ways.iter().map(|w| (w.1 - top).exp()).sum::<f64>().ln() + top;
            ways.iter().for_each(|&(c, z)| own[c] = z - total);
        }
        let score = |label: usize| {
            let (mut sum, mut at) = (0.0, self.ends[label]);
            while at != 0 {
                sum += own[at];
                at = self.nodes[at].parent;
            }
            sum
        };
        let mut best: Option<(usize, f64)> = None;
        for &label in allowed {
            let s = score(label);
            if best.is_none_or(|b| s > b.1) {
                best = Some((label, s));
            }
        }
        best.map(|b| b.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 0: a; 1: b c; 2: b d; 3: b d e; the end is 9.
    fn labels() -> Labels {
        Labels::new(&[vec![1], vec![2, 3], vec![2, 4], vec![2, 4, 5]], 9).unwrap()
    }

    #[test]
    fn only_rows_that_decide_are_computed() {
        let l = labels();
        // Behind the prompt stand b and, below it, d: c and e have one successor.
        assert_eq!(l.rows(), [(2, 0, vec![0]), (4, 1, vec![0, 1])]);
        assert_eq!(l.deciding(), [None, Some(0), Some(1)]);
        assert_eq!(l.choices(), [vec![1, 2], vec![3, 4], vec![9, 5]]);
    }

    #[test]
    fn the_best_label_is_that_of_all_products() {
        let l = labels();
        let logits = vec![vec![0.0, 1.0], vec![0.0, 0.5], vec![-0.2, 0.2]];
        let p = |z: &[f32], i: usize| f64::from(z[i]).exp() / z.iter().map(|z| f64::from(*z).exp()).sum::<f64>();
        let b = p(&logits[0], 1);
        let d = b * p(&logits[1], 1);
        let all = [p(&logits[0], 0), b * p(&logits[1], 0), d * p(&logits[2], 0), d * p(&logits[2], 1)];
        assert!((all.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let top = (0..4).max_by(|&x, &y| all[x].total_cmp(&all[y])).unwrap();
        assert_eq!(l.best(&logits, &[0, 1, 2, 3]), Some(top));
        // With fewer labels, fewer ways: b needs no more than to be likelier than a.
        assert_eq!(l.best(&logits, &[0, 2]), Some(2));
        assert_eq!(l.best(&logits, &[1, 2]), Some(2));
        assert_eq!(l.best(&logits, &[2]), Some(2));
        assert_eq!(l.best(&logits, &[]), None);
    }

    #[test]
    fn impossible_labels_are_refused() {
        assert!(Labels::new(&[vec![]], 9).is_err());
        assert!(Labels::new(&[vec![1], vec![1]], 9).unwrap_err().to_string().contains("0 and 1"));
    }
}
