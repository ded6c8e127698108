//! Shapes of trees that can be counted by hand, and clusters that were planted.

use quadriga::continual::signature::{Signature, distance};
use quadriga::continual::tree::Tree;
use quadriga::rng::Rng;

/// One module with these vectors.
fn plane(vectors: &[[f32; 2]]) -> Vec<Signature> {
    vectors.iter().map(|v| vec![v.to_vec()]).collect()
}

fn root(tree: &Tree) -> [Vec<usize>; 2] {
    let c = &tree.nodes[0].children;
    [tree.nodes[c[0]].tasks.clone(), tree.nodes[c[1]].tasks.clone()]
}

fn normal(n: usize, rng: &mut Rng) -> Vec<f32> {
    (0..n).map(|_| rng.normal()).collect()
}

fn unit(n: usize, rng: &mut Rng) -> Vec<f32> {
    let v = normal(n, rng);
    let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt();
    v.iter().map(|x| x / norm).collect()
}

#[test]
fn the_released_rule_splits_by_a_lower_median() {
    let mut rng = Rng::new(1);
    for (n, left, levels) in [(2, 1, 1), (3, 2, 2), (4, 3, 3), (5, 3, 3), (6, 4, 4), (8, 5, 4), (16, 9, 5), (64, 33, 7)]
    {
        // One module for each level, all different.
        let vectors: Vec<Signature> = (0..n).map(|_| (0..8).map(|_| normal(64, &mut rng)).collect()).collect();
        let tree = Tree::released(&vectors, 8);
        assert_eq!(root(&tree).map(|s| s.len()), [left, n - left], "{n} tasks");
        if n > 2 {
            assert_eq!(left, n / 2 + 1);
        }
        assert_eq!(tree.levels(), levels, "{n} tasks");
    }
}

#[test]
fn eight_tasks_give_the_papers_figure_and_look_at_four_modules_only() {
    let mut rng = Rng::new(2);
    let mut vectors: Vec<Signature> = (0..8).map(|_| (0..16).map(|_| normal(32, &mut rng)).collect()).collect();
    let tree = Tree::released(&vectors, 16);
    let sizes = |i: usize| tree.nodes[i].children.iter().map(|&c| tree.nodes[c].tasks.len()).collect::<Vec<_>>();
    let children = tree.nodes[0].children.clone();
    assert_eq!(sizes(0), [5, 3]);
    assert_eq!(sizes(children[0]), [3, 2]);
    assert_eq!(sizes(children[1]), [2, 1]);
    for v in &mut vectors {
        v[4..].iter_mut().for_each(|m| *m = normal(32, &mut rng));
    }
    assert_eq!(Tree::released(&vectors, 16), tree);
    vectors.iter_mut().for_each(|v| v[0] = normal(32, &mut rng));
    assert_ne!(Tree::released(&vectors, 16), tree);
}

#[test]
fn three_tasks_by_hand() {
    let corner = plane(&[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]);
    assert_eq!(root(&Tree::released(&corner, 1)), [vec![0], vec![1, 2]]);
    assert_eq!(root(&Tree::paper(&corner, 1)), [vec![0, 1], vec![2]]);
    let line = plane(&[[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]);
    assert_eq!(root(&Tree::released(&line, 1)), [vec![0, 1], vec![2]]);
    assert_eq!(root(&Tree::paper(&line, 1)), [vec![0], vec![1, 2]]);
    let ours = Tree::farthest_pair(3, 1, 0.0, |_, a, b| distance(&line[a], &line[b], 0..1));
    assert_eq!((ours.nodes[0].pivots, root(&ours)), (Some([0, 2]), [vec![0, 1], vec![2]]));
}

#[test]
fn a_tree_of_nothing_and_of_one() {
    assert_eq!(Tree::paper(&[], 3).nodes.len(), 0);
    let one = Tree::farthest_pair(1, 3, 0.5, |_, _, _| 0.0);
    assert_eq!((one.nodes.len(), one.levels()), (1, 0));
    assert_eq!(one.text(&|k| format!("t{k}")), "t0\n");
}

/// How often the root's split is the planted one, of 300 trials, for the paper's rule, the released one and ours.
fn recovered(plant: impl Fn(&mut Rng) -> Vec<(usize, Vec<f32>)>) -> [usize; 3] {
    let mut right = [0; 3];
    for trial in 0..300 {
        let mut rng = Rng::stream(7, trial);
        let (of, vectors): (Vec<usize>, Vec<Signature>) =
            plant(&mut rng).into_iter().map(|(c, v)| (c, vec![v])).unzip();
        let n = of.len();
        let side = |s: usize| (0..n).filter(|&k| of[k] == s).collect::<Vec<_>>();
        let planted = |t: &Tree| {
            let [a, b] = root(t);
            (a == side(0) && b == side(1)) || (a == side(1) && b == side(0))
        };
        let ours = Tree::farthest_pair(n, 1, 0.0, |_, a, b| distance(&vectors[a], &vectors[b], 0..1));
        let trees = [Tree::paper(&vectors, 1), Tree::released(&vectors, 1), ours];
        right.iter_mut().zip(&trees).for_each(|(r, t)| *r += usize::from(planted(t)));
    }
    right
}

#[test]
fn the_farthest_pair_finds_planted_clusters_and_the_published_rules_do_not() {
    let noisy = |centre: &[f32], rng: &mut Rng| -> Vec<f32> {
        let noise = unit(centre.len(), rng);
        centre.iter().zip(noise).map(|(c, n)| c + 0.3 * n).collect()
    };
    let two = |sizes: [usize; 2], scale: [f32; 2], opposite: bool| {
        move |rng: &mut Rng| {
            let first = unit(256, rng);
            let second = if opposite { first.iter().map(|x| -x).collect() } else { unit(256, rng) };
            let mut all = Vec::new();
            for (c, centre) in [first, second].iter().enumerate() {
                let centre: Vec<f32> = centre.iter().map(|x| scale[c] * x).collect();
                all.extend((0..sizes[c]).map(|_| (c, noisy(&centre, rng))));
            }
            all
        }
    };
    for plant in [two([4, 4], [1.0; 2], false), two([4, 4], [1.0; 2], true), two([4, 4], [1.0, 2.0], false)] {
        let [paper, released, ours] = recovered(plant);
        assert_eq!(ours, 300);
        // The paper's rule can draw the right halves by chance, one way in 70.
        assert!(paper < 30 && released == 0, "{paper} {released}");
    }
    let [paper, released, ours] = recovered(two([6, 2], [1.0; 2], false));
    assert_eq!((paper, released, ours), (0, 0, 300));
}

#[test]
fn a_planted_hierarchy_is_found_whole() {
    for trial in 0..300 {
        let mut rng = Rng::stream(11, trial);
        let directions: Vec<Vec<f32>> = (0..7).map(|_| unit(256, &mut rng)).collect();
        let vectors: Vec<Signature> = (0..8usize)
            .map(|k| {
                let noise = unit(256, &mut rng);
                // The nodes above leaf k: 0, then 1 + its highest bit, then 3 + its two highest bits.
                let above = [(0, k >> 2 & 1, 1.0), (1 + (k >> 2), k >> 1 & 1, 0.5), (3 + (k >> 1), k & 1, 0.25)];
                let at = |i: usize| {
                    let planted: f32 = above
                        .iter()
                        .map(|&(node, side, scale)| scale * directions[node][i] * if side == 1 { 1.0 } else { -1.0 })
                        .sum();
                    planted + 0.2 * noise[i]
                };
                vec![(0..256).map(at).collect()]
            })
            .collect();
        let tree = Tree::farthest_pair(8, 3, 0.0, |_, a, b| distance(&vectors[a], &vectors[b], 0..1));
        let mut inner: Vec<Vec<usize>> =
            tree.nodes.iter().filter(|n| n.tasks.len() > 1).map(|n| n.tasks.clone()).collect();
        inner.sort();
        let mut planted: Vec<Vec<usize>> = vec![(0..8).collect(), (0..4).collect(), (4..8).collect()];
        planted.extend((0..4).map(|i| vec![2 * i, 2 * i + 1]));
        planted.sort();
        assert_eq!(inner, planted, "trial {trial}");
    }
}
