//! Confidence bounds by hand, and the regret of each rule on smooth trees of arms.

use quadriga::continual::search::{Arms, Released, Width, lower_bound, released_bonus};
use quadriga::continual::tree::Tree;
use quadriga::rng::Rng;

#[test]
fn bounds_have_the_known_values() {
    assert!((lower_bound(1.0, 4, 16, 2.0) + 0.665_109).abs() < 1e-6);
    assert_eq!(lower_bound(1.0, 0, 16, 2.0), f64::NEG_INFINITY);
    for (n, t, bonus) in [(4, 15, 1.167_482), (1, 0, 1.730_814), (0, 15, 1_044.227_9), (0, 0, 774.045_5)] {
        let b = released_bonus(n, t, 100);
        assert!((b - bonus).abs() < 1e-6 * bonus.max(1.0) + 5e-5 * f64::from(u8::from(n == 0)), "{b} {bonus}");
    }
}

#[test]
fn with_equal_counts_the_lower_mean_is_chosen_and_new_leaves_come_first() {
    let tree = Tree::flat(2);
    let mut arms = Arms::new(tree.nodes.len());
    let mut rng = Rng::new(1);
    for _ in 0..5 {
        arms.observe(&[0, 1], 0.2);
        arms.observe(&[0, 2], 0.8);
    }
    (0..50).for_each(|_| assert_eq!(arms.choose(&tree, Width::Fixed(2.0), &mut rng), [0, 1]));
    // Where no threshold hides a branch.
    let mut tree = smooth(8, &mut rng).0;
    tree.nodes.iter_mut().for_each(|n| n.threshold = f64::INFINITY);
    let mut arms = Arms::new(tree.nodes.len());
    let mut seen = std::collections::HashSet::new();
    for _ in 0..8 {
        let path = arms.choose(&tree, Width::Fixed(2.0), &mut rng);
        assert!(seen.insert(*path.last().unwrap()));
        arms.observe(&path, [0.1, 0.9][seen.len() % 2]);
    }
}

#[test]
fn without_thresholds_a_tree_is_a_flat_bandit() {
    let mut rng = Rng::new(5);
    let (mut tree, values) = smooth(16, &mut rng);
    tree.nodes.iter_mut().for_each(|n| n.threshold = f64::INFINITY);
    let mut arms = Arms::new(tree.nodes.len());
    for _ in 0..400 {
        let bounds = arms.bounds(&tree, Width::Fixed(2.0));
        let least = tree.leaves().map(|l| bounds[l]).fold(f64::INFINITY, f64::min);
        let path = arms.choose(&tree, Width::Fixed(2.0), &mut rng);
        let leaf = *path.last().unwrap();
        assert!(bounds[leaf] <= least);
        arms.observe(&path, values[tree.nodes[leaf].tasks[0]] + 0.1 * f64::from(rng.normal()));
    }
}

#[test]
fn the_spread_within_leaves_is_estimated() {
    let (tree, mut rng) = (Tree::flat(3), Rng::new(8));
    let mut arms = Arms::new(tree.nodes.len());
    assert_eq!(arms.deviation(), 1.0);
    for i in 0..6000 {
        let k = i % 3;
        arms.observe(&[0, k + 1], k as f64 + 0.1 * f64::from(rng.normal()));
    }
    assert!((arms.deviation() - 0.1).abs() < 0.005, "{}", arms.deviation());
}

/// A binary tree over `n` arms whose values move by half as much at each level, scaled to \[0, 1\]; thresholds are how far the
/// leaves below a node of that depth lie from their mean, at most.
fn smooth(n: usize, rng: &mut Rng) -> (Tree, Vec<f64>) {
    let levels = n.ilog2() as usize;
    let mut values = vec![0.0; n];
    for depth in 1..=levels {
        for branch in 0..1 << depth {
            let step = (2.0 * f64::from(rng.uniform()) - 1.0) * 0.5f64.powi(depth as i32);
            let width = n >> depth;
            values[branch * width..(branch + 1) * width].iter_mut().for_each(|v| *v += step);
        }
    }
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    values.iter_mut().for_each(|v| *v = (*v - low) / (high - low));
    // By the numbers' binary digits, highest first.
    let mut tree =
        Tree::farthest_pair(n, levels, 0.0, |_, a, b| f64::from((a ^ b).checked_ilog2().map_or(0, |d| d + 1)));
    let deltas: Vec<f64> = (0..=levels)
        .map(|depth| {
            let branch = |b: usize| {
                let own = &values[b * (n >> depth)..(b + 1) * (n >> depth)];
                let mean = own.iter().sum::<f64>() / own.len() as f64;
                own.iter().map(|v| (v - mean).abs()).fold(0.0, f64::max)
            };
            (0..1 << depth).map(branch).fold(0.0, f64::max)
        })
        .collect();
    tree.nodes.iter_mut().for_each(|node| node.threshold = deltas[node.depth]);
    (tree, values)
}

#[derive(Clone, Copy)]
enum Rule {
    Uniform,
    Released,
    Flat(Width),
    Tree(Width),
    /// The leaves' values permuted, thresholds kept.
    Shuffled(Width),
}

/// Mean regret over 20 seeds.
fn regret(rule: Rule, n: usize, rounds: u64) -> f64 {
    let mut total = 0.0;
    for seed in 0..20 {
        let mut rng = Rng::stream(seed, n as u64);
        let (tree, mut values) = smooth(n, &mut rng);
        let flat = Tree::flat(n);
        let mut arms = Arms::new(2 * n);
        let mut released = Released::new(n, 1);
        if matches!(rule, Rule::Shuffled(_)) {
            (1..n).rev().for_each(|i| values.swap(i, rng.below(i + 1)));
        }
        for t in 0..rounds {
            let (k, path) = match rule {
                Rule::Uniform => (rng.below(n), Vec::new()),
                // The factor of the released tree's halves, whatever their thresholds' scale is, is left out: 1.
                Rule::Released => (released.choose(&flat, t, rounds, &mut rng)[0], Vec::new()),
                Rule::Flat(w) => {
                    let path = arms.choose(&flat, w, &mut rng);
                    (flat.nodes[*path.last().unwrap()].tasks[0], path)
                }
                Rule::Tree(w) | Rule::Shuffled(w) => {
                    let path = arms.choose(&tree, w, &mut rng);
                    (tree.nodes[*path.last().unwrap()].tasks[0], path)
                }
            };
            let cost = values[k] + 0.1 * f64::from(rng.normal());
            match rule {
                Rule::Released => released.observe(k, 0, cost),
                _ => arms.observe(&path, cost),
            }
            total += values[k];
        }
    }
    total / 20.0
}

#[test]
fn a_tree_beats_a_flat_bandit_and_the_released_rule_loses_to_chance() {
    let (fixed, scaled) = (Width::Fixed(2.0), Width::Scaled(2.0));
    let mut table = String::from("N, T: uniform, released, flat, flat scaled, tree, tree scaled\n");
    let mut at = |rule, n, t| {
        let r = regret(rule, n, t);
        table += &format!("{n} {t}: {r:.1}\n");
        r
    };
    let (flat, tree) = (at(Rule::Flat(fixed), 64, 2000), at(Rule::Tree(fixed), 64, 2000));
    assert!(tree < 0.6 * flat, "{tree} {flat}");
    let short = at(Rule::Tree(fixed), 64, 500);
    assert!(tree < 3.0 * short, "{tree} {short}");
    for n in [8, 64] {
        let (uniform, released) = (at(Rule::Uniform, n, 500), at(Rule::Released, n, 500));
        assert!(released > uniform, "{released} {uniform}");
        assert!(3.0 * at(Rule::Tree(scaled), n, 500) < at(Rule::Tree(fixed), n, 500));
        assert!(3.0 * at(Rule::Flat(scaled), n, 500) < at(Rule::Flat(fixed), n, 500));
    }
    let shuffled = at(Rule::Shuffled(fixed), 64, 500);
    assert!(shuffled > 1.3 * short, "{shuffled} {short}");
    println!("{table}");
}

#[test]
fn the_released_rule_is_close_to_chance_within_a_module() {
    // Scores span at most about 1, so that no task is more than e times as likely as another.
    let (tree, mut rng) = (Tree::flat(4), Rng::new(3));
    let mut state = Released::new(4, 1);
    (0..4).for_each(|k| state.observe(k, 0, k as f64));
    let mut counts = [0u32; 4];
    for _ in 0..20_000 {
        counts[state.choose(&tree, 50, 100, &mut rng)[0]] += 1;
    }
    // The farther, the likelier.
    assert!(counts.windows(2).all(|w| w[0] < w[1]), "{counts:?}");
    assert!(f64::from(counts[3]) < 2.8 * f64::from(counts[0]), "{counts:?}");
}
