//! Static trees of the best expected length, by dynamic programming (Sequoia: Chen et al. 2024, arXiv:2402.12374).

use super::Shape;

/// The static tree of `nodes` drafted nodes, none deeper than `depth`, from which most tokens are expected where a node of rank r
/// is right with probability `accept[r]` whenever its parent is. Returns it with [`Shape::expected`]; it is smaller where `accept`
/// leaves no room for so many.
///
/// With `F(n, d)` the expected tokens below a node that stands, itself counted, from n nodes in d levels, and `G(m, d, r)` those of m
/// nodes among its children of rank r and higher:
///
/// ```text
/// F(n, d) = 1 + G(n - 1, d - 1, 0)        G(0, d, r) = 0
/// G(m, d, r) = max over s in 0..=m of  accept[r] F(s, d) + G(m - s, d, r + 1)        where F(0, d) = 0
/// ```
pub fn sequoia(nodes: usize, depth: usize, accept: &[f64]) -> (Shape, f64) {
    let (ranks, sizes) = (accept.len(), nodes + 1);
    // Levels from the lowest: `best[d][r][m]` is G, and the size of the subtree of rank r that attains it. No level: no nodes.
    let none = (f64::NEG_INFINITY, 0);
    let nothing: Vec<(f64, usize)> = (0..sizes).map(|m| if m == 0 { (0.0, 0) } else { none }).collect();
    let mut best = vec![vec![nothing.clone(); ranks + 1]];
    for d in 1..=depth {
        let mut level = vec![nothing.clone(); ranks + 1];
        for r in (0..ranks).rev() {
            for m in 1..sizes {
                for s in 0..=m {
                    let below = if s == 0 { 0.0 } else { accept[r] * (1.0 + best[d - 1][0][s - 1].0) };
                    let all = below + level[r + 1][m - s].0;
                    if all > level[r][m].0 {
                        level[r][m] = (all, s);
                    }
                }
            }
        }
        best.push(level);
    }
    let room = (0..sizes).rev().find(|&m| best[depth][0][m].0.is_finite()).unwrap_or(0);
    let (mut paths, mut open) = (Vec::new(), vec![(Vec::new(), room, depth)]);
    while let Some((path, mut m, d)) = open.pop() {
        for (r, of_rank) in best[d].iter().enumerate().take(ranks) {
            let s = of_rank[m].1;
            m -= s;
            if s > 0 {
                let mut child: Vec<u32> = path.clone();
                child.push(r as u32);
                paths.push(child.clone());
                open.push((child, s - 1, d - 1));
            }
        }
    }
    let shape = Shape::from_paths(&paths).expect("paths to all nodes of a tree");
    (shape, 1.0 + best[depth][0][room].0)
}
