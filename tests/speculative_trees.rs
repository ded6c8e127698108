//! Trees of drafted tokens on the host: how they are grown, cut, joined and planned, held to worked examples, to invariants under
//! random drafts, and to exhaustive search.

use quadriga::backend::TreeMask;
use quadriga::rng::Rng;
use quadriga::speculative::{Budget, CostModel, Curve, DraftTree, Plan, Pool, Shape, merge, prune, sequoia};

/// Tokens by falling probability, ties to the lower token, as flat lists for [`Pool::expand`].
fn likeliest(row: &[f32], width: usize) -> (Vec<u32>, Vec<f32>) {
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
    order.truncate(width);
    let ln = order.iter().map(|t| row[*t as usize].ln()).collect();
    (order, ln)
}

/// Grows `pool` to `levels` levels by a draft that knows one probability row for each last token.
fn grow(pool: &mut Pool, q: &[Vec<f32>], last: u32, levels: usize) {
    let mut read = vec![last];
    for _ in 0..levels {
        let tops: Vec<_> = read.iter().map(|t| likeliest(&q[*t as usize], pool.width())).collect();
        let tokens: Vec<u32> = tops.iter().flat_map(|t| t.0.clone()).collect();
        let ln_q: Vec<f32> = tops.iter().flat_map(|t| t.1.clone()).collect();
        pool.expand(&tokens, &ln_q);
        read = pool.tokens()[pool.frontier()].to_vec();
    }
}

fn tree_of(pool: &Pool, last: u32, most: usize) -> DraftTree {
    let mut tree = DraftTree::new(last);
    pool.finish(most, 0, &mut tree);
    tree
}

/// A random draft; some rows put all on one token, so that scores tie.
fn random_rows(rng: &mut Rng, vocab: usize) -> Vec<Vec<f32>> {
    let mut row = || {
        let mut row: Vec<f32> = (0..vocab).map(|_| rng.uniform().powi(4)).collect();
        match rng.below(4) {
            0 => {
                row.fill(0.0);
                row[rng.below(vocab)] = 1.0;
            }
            1 => row.fill(1.0),
            _ => {}
        }
        let sum: f32 = row.iter().sum();
        row.into_iter().map(|x| x / sum).collect::<Vec<f32>>()
    };
    (0..vocab).map(|_| row()).collect()
}

fn bigram() -> Vec<Vec<f32>> {
    [[0.6, 0.2, 0.15, 0.05], [0.1, 0.1, 0.5, 0.3], [0.45, 0.05, 0.4, 0.1], [0.25; 4]].map(Vec::from).to_vec()
}

#[test]
fn a_dynamic_tree_is_the_worked_example() {
    let mut pool = Pool::new(2);
    grow(&mut pool, &bigram(), 0, 1);
    assert_eq!(pool.frontier(), 0..2);
    assert_eq!(pool.parents(), [TreeMask::ROOT; 2]);
    pool.reset();
    grow(&mut pool, &bigram(), 0, 2);
    // Candidates 2 and 3, both behind the first row.
    assert_eq!((pool.frontier(), &pool.tokens()[2..], &pool.parents()[2..]), (2..4, &[0, 1][..], &[0, 0][..]));
    pool.reset();
    grow(&mut pool, &bigram(), 0, 3);
    let pooled: Vec<f32> = pool.scores(99).iter().map(|s| s.exp()).collect();
    let expected = [0.6, 0.36, 0.216, 0.2, 0.12, 0.1, 0.072, 0.06, 0.06, 0.036];
    assert!(pooled.len() == 10 && pooled.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{pooled:?}");
    let tree = tree_of(&pool, 0, 5);
    assert_eq!(tree.tokens(), [0, 0, 1, 0, 1, 0]);
    assert_eq!(tree.parents(), [TreeMask::ROOT, 0, 0, 1, 1, 3]);
    assert_eq!(tree.depths(), [0, 1, 1, 2, 2, 3]);
    let mask = tree.mask().unwrap();
    let rows: Vec<String> = (0..6).map(|i| (0..6).map(|j| if mask.sees(i, j) { '1' } else { '0' }).collect()).collect();
    assert_eq!(rows, ["100000", "110000", "101000", "110100", "110010", "110101"]);
}

#[test]
fn a_parent_comes_before_its_equally_likely_child() {
    let mut pool = Pool::new(2);
    pool.expand(&[3, 1], &[0.0, f32::NEG_INFINITY]);
    // A probability that rounding made larger than 1.
    pool.expand(&[2, 0], &[1e-6, f32::NAN]);
    assert_eq!(tree_of(&pool, 0, 1).tokens(), [0, 3]);
    // No node of no chance, however many there may be.
    let all = tree_of(&pool, 0, 9);
    assert_eq!((all.tokens(), all.scores()), (&[0, 3, 2][..], &[0.0; 3][..]));
    assert_eq!(pool.frontier().len(), 1);
}

#[test]
fn kept_nodes_are_connected_and_nested() {
    let mut rng = Rng::new(5);
    for case in 0..200 {
        let (vocab, width, levels) = (3 + rng.below(6), 1 + rng.below(4), 1 + rng.below(5));
        let q = random_rows(&mut rng, vocab);
        let mut pool = Pool::new(width);
        grow(&mut pool, &q, 0, levels);
        // Each row of the pool stands behind its parent's.
        let rows = TreeMask::new(pool.parents()).unwrap();
        assert!(pool.frontier().all(|r| rows.depth(r) as usize == pool.depth() - 1), "case {case}");
        let paths = |t: &DraftTree| -> Vec<Vec<u32>> {
            let mut paths: Vec<Vec<u32>> = vec![vec![]];
            for i in 1..t.len() {
                let mut path = paths[t.parents()[i] as usize].clone();
                path.push(t.tokens()[i]);
                paths.push(path);
            }
            paths
        };
        let mut before = vec![vec![]];
        for most in 0..pool.scores(99).len() + 2 {
            let tree = tree_of(&pool, 0, most);
            assert_eq!(tree.len() - 1, most.min(pool.scores(99).len()), "case {case}: connected, so none is lost");
            let mask = tree.mask().unwrap();
            for i in 1..tree.len() {
                let p = tree.parents()[i] as usize;
                assert!(tree.scores()[i] <= tree.scores()[p]);
                let seen = (0..tree.len()).filter(|&j| mask.sees(i, j)).count();
                assert!(seen == tree.depths()[i] as usize + 1 && mask.sees(i, 0));
                assert!((0..tree.len()).all(|j| !mask.sees(p, j) || mask.sees(i, j)));
            }
            let now = paths(&tree);
            assert!(before.iter().all(|p| now.contains(p)), "case {case}: a larger tree holds the smaller");
            // A tree cut out of a larger one is the one grown so small.
            assert_eq!(paths(&prune(&tree_of(&pool, 0, 99), most)), now);
            before = now;
        }
        // What the target says is at most one token longer than the tree is deep, and what stands is a path of it.
        let tree = tree_of(&pool, 0, 30);
        let said: Vec<u32> = (0..9).map(|_| rng.below(vocab) as u32).collect();
        let kept = paths(&tree).iter().filter(|p| said.starts_with(p)).map(Vec::len).max().unwrap();
        assert!(kept as u32 <= *tree.depths().iter().max().unwrap());
    }
}

/// EAGLE's static tree: the paths of Li et al. 2024 (arXiv:2401.15077), as their code has them.
const EAGLE: &[&[u32]] = &[
    &[0],
    &[1],
    &[2],
    &[3],
    &[0, 0],
    &[0, 1],
    &[0, 2],
    &[1, 0],
    &[1, 1],
    &[2, 0],
    &[2, 1],
    &[3, 0],
    &[0, 0, 0],
    &[0, 0, 1],
    &[0, 0, 2],
    &[0, 1, 0],
    &[0, 1, 1],
    &[0, 2, 0],
    &[0, 2, 1],
    &[1, 0, 0],
    &[0, 0, 0, 0],
    &[0, 0, 0, 1],
    &[0, 0, 0, 2],
    &[0, 0, 0, 0, 0],
    &[0, 0, 0, 0, 1],
];

#[test]
fn static_trees_hold_the_ranks_they_name() {
    let mut shuffled = EAGLE.to_vec();
    shuffled.reverse();
    let shape = Shape::from_paths(&shuffled).unwrap();
    assert_eq!(shape, Shape::from_paths(EAGLE).unwrap());
    assert_eq!((shape.len(), shape.width()), (25, 4));
    let mut rng = Rng::new(8);
    let q: Vec<Vec<f32>> = (0..9).map(|_| (0..9).map(|_| 0.01 + rng.uniform()).collect()).collect();
    let mut pool = Pool::of_shape(shape.clone());
    grow(&mut pool, &q, 0, 5);
    assert!(pool.frontier().is_empty(), "the last level has no children");
    let tree = tree_of(&pool, 0, 25);
    assert_eq!(tree.len(), 26);
    // By hand: follow each path's ranks.
    for path in EAGLE {
        let (mut at, mut token) = (0, 0);
        for &rank in *path {
            token = likeliest(&q[token as usize], 9).0[rank as usize];
            let child = (1..26).find(|&i| tree.parents()[i] == at && tree.tokens()[i] == token);
            at = child.expect("the node stands") as u32;
        }
    }
    // A chain, both ways; fewer tokens than ranks.
    let (mut chain, mut thin) = (Pool::of_shape(Shape::chain(4)), Pool::new(1));
    grow(&mut chain, &q, 0, 4);
    grow(&mut thin, &q, 0, 4);
    assert_eq!(tree_of(&chain, 0, 9), tree_of(&thin, 0, 9));
    pool.reset();
    pool.expand(&[4, 5], &[-0.1, -0.2]);
    pool.expand(&[6, 7], &[-0.1, -0.2]);
    assert_eq!(pool.frontier().len(), 2);
    let two = tree_of(&pool, 0, 25);
    assert_eq!(two.tokens(), [0, 4, 5, 6, 7]);
    for bad in [&[&[0][..], &[0, 1], &[1, 1]][..], &[&[0], &[0]], &[&[]]] {
        assert!(Shape::from_paths(bad).is_err());
    }
}

/// All shapes of `nodes` nodes with ranks below `width`, none deeper than `depth`, as sets of paths.
fn all_shapes(nodes: usize, depth: usize, width: u32) -> Vec<Vec<Vec<u32>>> {
    let mut found: Vec<Vec<Vec<u32>>> = vec![vec![]];
    for _ in 0..nodes {
        let mut next = Vec::new();
        for shape in &found {
            for above in std::iter::once(&vec![]).chain(shape).filter(|p| p.len() < depth) {
                for rank in 0..width {
                    let mut path = above.clone();
                    path.push(rank);
                    // In ascending order, so that each set comes once.
                    if !shape.contains(&path) {
                        let mut more = shape.clone();
                        more.push(path);
                        more.sort();
                        next.push(more);
                    }
                }
            }
        }
        next.sort();
        next.dedup();
        found = next;
    }
    found
}

#[test]
fn sequoia_finds_the_best_of_all_shapes() {
    let mut rng = Rng::new(3);
    for nodes in 1..=5 {
        for depth in 1..=4 {
            let shapes = all_shapes(nodes, depth, 3);
            for _ in 0..4 {
                let accept: Vec<f64> = (0..3).map(|_| f64::from(rng.uniform()) / 2.0).collect();
                let (shape, expected) = sequoia(nodes, depth, &accept);
                assert!((shape.expected(&accept) - expected).abs() < 1e-12);
                let deepest = shape.parents().iter().fold(vec![], |mut d: Vec<usize>, p| {
                    d.push(d.get(*p as usize).map_or(1, |d| d + 1));
                    d
                });
                assert!(deepest.iter().all(|d| *d <= depth));
                let of = |s: &Vec<Vec<u32>>| Shape::from_paths(s).unwrap().expected(&accept);
                // Depth 1 has room for three nodes only.
                let best = shapes.iter().map(of).fold(f64::NAN, f64::max);
                if shapes.is_empty() {
                    assert_eq!((shape.len(), depth), (3, 1));
                } else {
                    assert!(
                        (best - expected).abs() < 1e-12,
                        "{nodes} nodes, depth {depth}: {best} is above {expected}"
                    );
                    assert_eq!(shape.len(), nodes);
                }
            }
        }
    }
    let accept = [0.6, 0.16, 0.07, 0.04, 0.02];
    let eagle = Shape::from_paths(EAGLE).unwrap().expected(&accept);
    let (shape, expected) = sequoia(25, 5, &accept);
    assert!(shape.len() == 25 && expected >= eagle, "{expected} below the hand-made {eagle}");
    assert!(sequoia(25, 12, &accept).1 > expected, "deeper trees may be better");
    assert_eq!(sequoia(3, 9, &[0.5]).0, Shape::chain(3));
    assert!(sequoia(4, 0, &accept).0.is_empty() && sequoia(0, 4, &accept).0.is_empty());
}

#[test]
fn joined_trees_share_prefixes_and_know_their_sources() {
    let mut a = DraftTree::new(1);
    let a1 = a.push(0, 10, -0.5, 0);
    let a2 = a.push(a1, 11, -0.5, 0);
    a.push(a2, 12, -0.5, 0);
    let mut b = DraftTree::new(1);
    let b1 = b.push(0, 10, -0.25, 1);
    b.push(b1, 11, -2.0, 1);
    b.push(b1, 13, -0.125, 1);
    let (joint, by) = merge(&[&a, &b]);
    assert_eq!(joint.tokens(), [1, 10, 11, 12, 13]);
    assert_eq!(joint.parents(), [TreeMask::ROOT, 0, 1, 2, 1]);
    assert_eq!(by, [3, 3, 3, 1, 2]);
    assert_eq!(joint.sources(), [0, 0, 0, 0, 1]);
    // 10 by the second, 11 by the first.
    assert_eq!(joint.scores(), [0.0, -0.25, -1.0, -1.5, -0.375]);
    assert_eq!(prune(&joint, 2).tokens(), [1, 10, 13]);
    assert_eq!(merge(&[&a]).0, a);
}

/// A pass that always takes a second, drafting that takes `step` a token.
fn chain_costs(step: f64) -> CostModel {
    CostModel { pass: Curve::constant(1.0), draft_step: Curve::constant(step), draft_fixed: step }
}

#[test]
fn the_best_chain_is_that_of_the_closed_form() {
    // Acceptance .5, .7, .8, .9: the k that maximises (1 - a^(k+1)) / (1 - a) / (1 + k step), and that maximum.
    let table = [
        (0.02, [(4, 1.794), (8, 2.758), (11, 3.817), (19, 6.365)]),
        (0.05, [(3, 1.630), (6, 2.353), (8, 3.092), (13, 4.674)]),
        (0.10, [(2, 1.458), (4, 1.981), (6, 2.470), (10, 3.431)]),
        (0.20, [(1, 1.250), (3, 1.583), (4, 1.868), (7, 2.373)]),
    ];
    for (step, row) in table {
        for (accept, (k, rate)) in [0.5f64, 0.7, 0.8, 0.9].into_iter().zip(row) {
            let cost = chain_costs(step);
            let (mut chances, mut spent) = (vec![accept], step);
            while cost.worth_expanding(&chances, &chances[chances.len() - 1..], accept, spent, 63, 63) {
                chances.push(chances[chances.len() - 1] * accept);
                spent += step;
            }
            let (size, found) = cost.best(&chances, spent);
            assert_eq!((chances.len(), size), (k, k), "acceptance {accept}, step {step}");
            assert!((found - rate).abs() < 1e-3, "{found} is not {rate}");
            // The same by a plan and a pool that a draft drives.
            let plan = Plan::reproducible(cost);
            let budget = Budget { plan: Some(&plan), ..Budget::new(63, 63, 1) };
            let mut pool = Pool::new(1);
            pool.expand(&[1], &[(accept as f32).ln()]);
            while budget.expands(&pool) {
                pool.expand(&[1], &[(accept as f32).ln()]);
            }
            assert_eq!((pool.depth(), budget.size(&pool)), (k, k));
        }
    }
}

#[test]
fn sizes_are_the_best_of_all() {
    let mut rng = Rng::new(12);
    let mut grown = 0;
    for _ in 0..300 {
        let mut seconds = 0.1;
        let points: Vec<(usize, f64)> = [1, 2, 4, 9, 30]
            .map(|rows| {
                seconds += f64::from(rng.uniform()).powi(3);
                (rows, seconds)
            })
            .to_vec();
        let curve = Curve::new(&points);
        // Linear between the points, by hand.
        let at = |n: usize| {
            let i = points.iter().position(|p| p.0 >= n).unwrap_or(4).max(1);
            let ((a, x), (b, y)) = (points[i - 1], points[i]);
            x + (y - x) / (b - a) as f64 * (n as f64 - a as f64)
        };
        assert!((1..40).all(|n| (curve.at(n) - at(n)).abs() < 1e-9));
        let draft_step = f64::from(rng.uniform()) / 10.0;
        let cost = CostModel { pass: curve, draft_step: Curve::constant(draft_step), draft_fixed: 0.0 };
        let mut chances: Vec<f64> = (0..rng.below(36)).map(|_| f64::from(rng.uniform()).powi(2)).collect();
        chances.sort_by(|a, b| b.total_cmp(a));
        let spent = f64::from(rng.uniform());
        let rate =
            |m: usize, spent: f64, chances: &[f64]| (1.0 + chances[..m].iter().sum::<f64>()) / (spent + at(m + 1));
        let most = (0..=chances.len()).map(|m| rate(m, spent, &chances)).fold(0.0, f64::max);
        let (size, found) = cost.best(&chances, spent);
        assert!((found - most).abs() < 1e-9 && (rate(size, spent, &chances) - most).abs() < 1e-9);
        // One more level pays if some number of levels and of nodes is better than the best now.
        let frontier: Vec<f64> = chances.iter().copied().take(3).collect();
        let (mut all, mut next, mut better) = (chances.clone(), frontier.clone(), false);
        for level in 1..=4 {
            next.iter_mut().for_each(|c| *c *= 0.7);
            all.extend(&next);
            all.sort_by(|a, b| b.total_cmp(a));
            let spent = spent + draft_step * f64::from(level);
            better |= (0..=all.len().min(40)).any(|m| rate(m, spent, &all) > most + 1e-12);
        }
        let worth = cost.worth_expanding(&chances, &frontier, 0.7, spent, 40, 4);
        assert_eq!(worth, better && !frontier.is_empty());
        grown += usize::from(worth);
    }
    assert!((20..280).contains(&grown), "{grown} of 300 say little");
    // A second row is dear, more are free: a level alone does not pay, several do.
    let jump = CostModel {
        pass: Curve::new(&[(1, 1.0), (2, 1.5), (64, 1.5)]),
        draft_step: Curve::constant(0.01),
        draft_fixed: 0.01,
    };
    assert!(!jump.worth_expanding(&[0.2], &[0.2], 0.9, 0.01, 63, 1));
    assert!(jump.worth_expanding(&[0.2], &[0.2], 0.9, 0.01, 63, 9));
}

/// A chain of drafted tokens of which `ln_q` is the same.
fn chain(nodes: usize, q: f32) -> DraftTree {
    let mut tree = DraftTree::new(0);
    for i in 0..nodes as u32 {
        tree.push(i, 1, q.ln(), 0);
    }
    tree
}

#[test]
fn speculation_that_does_not_pay_costs_little_and_comes_back() {
    // A pass of five rows costs twice one of one row.
    let cost = CostModel { pass: Curve::new(&[(1, 1.0), (5, 2.0)]), ..CostModel::default() };
    let mut plan = Plan::reproducible(cost);
    let (mut time, mut tokens, mut rng) = (0.0, 0.0, Rng::new(9));
    let mut run = |plan: &mut Plan, steps: usize, accept: f32| {
        let (mut drafted, mut spent, mut said) = (0, 0.0, 0.0);
        for _ in 0..steps {
            let tree = chain(if plan.speculates() { 4 } else { 0 }, 0.9);
            let stood = (1..tree.len()).take_while(|_| rng.uniform() < accept).count();
            let path: Vec<u32> = (0..=stood as u32).collect();
            plan.observe(&tree, &path, 0.0, 0.0);
            drafted += usize::from(tree.len() > 1);
            spent += plan.cost().pass.at(tree.len());
            said += path.len() as f64;
            time += plan.cost().pass.at(tree.len());
            tokens += path.len() as f64;
            // Two steps at the beginning, one begun too many, and a fortieth of all.
            assert!(time - tokens < 3.001 + 0.025 * tokens, "{tokens} tokens in the time of {time}");
        }
        (drafted, said / spent)
    };
    let (drafted, _) = run(&mut plan, 2000, 0.05);
    assert!((10..200).contains(&drafted), "off, but for {drafted} trials");
    let (_, rate) = run(&mut plan, 2000, 0.9);
    assert!(rate > 1.9, "on again: {rate}");
    assert!(plan.speculates());
    let (drafted, rate) = run(&mut plan, 2000, 0.0);
    assert!(drafted < 200 && rate > 0.95, "{drafted}, {rate}");
}

#[test]
fn drafts_that_overrate_themselves_are_seen_through() {
    let cost = CostModel { pass: Curve::new(&[(1, 1.0), (9, 2.0)]), ..CostModel::default() };
    let mut plan = Plan::reproducible(cost);
    assert_eq!(plan.chance(0, 0.88f32.ln(), 1), f64::from(0.88f32.ln().exp()));
    let tree = chain(8, 0.88);
    let before = plan.cut(&tree, 8, 0.0).0.len();
    let mut rng = Rng::new(2);
    for _ in 0..400 {
        let stood = (1..9).take_while(|_| rng.uniform() < 0.3).count() as u32;
        plan.observe(&tree, &(0..=stood).collect::<Vec<_>>(), 0.0, 0.0);
    }
    let now = plan.chance(0, 0.88f32.ln(), 1);
    assert!((now - 0.3).abs() < 0.06, "{now}");
    assert!((plan.chance(0, 0.88f32.ln(), 2) - 0.3).abs() < 0.1);
    assert!(plan.chance(0, 0.83f32.ln(), 1) < now, "rising within a range");
    assert!((plan.chance(1, 0.88f32.ln(), 1) - 0.88).abs() < 1e-6, "another source");
    assert_eq!(plan.chance(0, f32::NEG_INFINITY, 1), 0.0);
    assert_eq!(before, 9);
    assert!(plan.cut(&tree, 8, 0.0).0.len() < 5);
    // What is cut is connected and in order.
    let mut tree = DraftTree::new(0);
    let a = tree.push(0, 1, 0.4f32.ln(), 1);
    tree.push(a, 2, 0.95f32.ln(), 1);
    tree.push(0, 3, 0.5f32.ln(), 1);
    assert_eq!(plan.cut(&tree, 2, 0.0).0.tokens(), [0, 1, 3]);
    assert_eq!(plan.cut(&tree, 3, 0.0).0.tokens(), tree.tokens());
}

#[test]
fn the_clock_is_followed() {
    let cost = CostModel { pass: Curve::new(&[(1, 1.0), (5, 1.2)]), ..CostModel::default() };
    let mut plan = Plan::new(cost.clone());
    for _ in 0..100 {
        plan.observe(&chain(0, 0.9), &[0], 0.0, 2.0);
        plan.observe(&chain(4, 0.9), &[0, 1, 2], 0.0, 3.0);
    }
    assert!((plan.cost().pass.at(1) - 2.0).abs() < 0.1 && (plan.cost().pass.at(5) - 3.0).abs() < 0.2);
    let mut fixed = Plan::reproducible(cost.clone());
    fixed.observe(&chain(4, 0.9), &[0], 7.0, 9.0);
    assert_eq!(fixed.cost(), &cost);
    // While it drafts, a step now and then does not: else nobody knew what plain decoding costs.
    let plain = (0..400).filter(|_| {
        let rests = !plan.speculates();
        plan.observe(
            &chain(if rests { 0 } else { 4 }, 0.9),
            &(0..if rests { 1 } else { 4 }).collect::<Vec<_>>(),
            0.0,
            2.5,
        );
        rests
    });
    assert_eq!(plain.count(), 3);
}

#[test]
fn costs_come_back_from_text() {
    let cost = CostModel {
        pass: Curve::new(&[(1, 0.011), (2, 0.0123), (4, 0.012)]),
        draft_step: Curve::constant(1e-4),
        draft_fixed: 2e-3,
    };
    assert_eq!(cost.pass.at(2), 0.012, "never falling");
    assert_eq!(CostModel::from_json(&cost.to_json()).unwrap(), cost);
    for bad in [
        "{}",
        r#"{"pass":[[1,0.0]],"draft_step":[],"draft_fixed":0}"#,
        r#"{"pass":[[2,1],[1,2]],"draft_step":[],"draft_fixed":0}"#,
        r#"{"pass":[[1,2],[2,1]],"draft_step":[],"draft_fixed":0}"#,
        r#"{"pass":[[1,1]],"draft_step":[[1,-1]],"draft_fixed":0}"#,
        r#"{"pass":[[1,1]],"draft_step":[],"draft_fixed":-1}"#,
        r#"{"pass":[[1,1]],"draft_step":[],"draft_fixed":0,"more":1}"#,
    ] {
        assert!(CostModel::from_json(bad).unwrap_err().to_string().contains("measured costs"), "{bad}");
    }
}
