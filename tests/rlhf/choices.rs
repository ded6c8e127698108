//! Section 7.3: what to ask.

use quadriga::rlhf::*;
use quadriga::rng::Rng;

use super::worlds::{Scarce, mean};
use super::{explicit, near};

const MARKS: [usize; 4] = [50, 100, 200, 400];
/// Tables have three digits, some of which were rounded from four.
const DIGITS: f64 = 5.6e-4;

/// Sub-optimality of the last and of the mean iterate at each mark, and what was asked with its score.
struct Asked {
    last: Vec<f64>,
    average: Vec<f64>,
    picks: Vec<(usize, f64)>,
    mle: Vec<f64>,
}

fn ask(world: &Scarce, rule: Choose) -> Asked {
    let mut reward = OnePass::new(Scarce::D, explicit(1.0, 1.0)).unwrap();
    let mut mle = Mle::new(Scarce::D, 1.0, None).unwrap();
    let mut pool = Pool::new(world.z.clone(), &reward).unwrap();
    let mut asked = Asked { last: Vec::new(), average: Vec::new(), picks: Vec::new(), mle: Vec::new() };
    let mut rng = Rng::new(0);
    for t in 0..400 {
        let k = match rule {
            Choose::Random => world.order[t],
            rule => pool.next(&reward, rule, &mut rng).unwrap(),
        };
        asked.picks.push((k, pool.variances()[k]));
        let step = reward.update(pool.z(k), world.y[k]).unwrap();
        assert!((step.uncertainty - pool.variances()[k]).abs() < 1e-12);
        mle.push(pool.z(k), world.y[k]).unwrap();
        pool.learned(k, &reward).unwrap();
        if MARKS.contains(&(t + 1)) {
            asked.last.push(world.gap(reward.theta()));
            asked.average.push(world.gap(&reward.average()));
            mle.fit(true).unwrap();
            asked.mle.push(world.gap(mle.theta()));
        }
    }
    assert_eq!(pool.open(), 1600);
    asked
}

#[test]
fn asking_where_it_is_uncertain_beats_chance_when_rare_directions_matter() {
    let worlds: Vec<Scarce> = (1..=20).map(Scarce::new).collect();
    let rules = [Choose::Random, Choose::Uncertainty, Choose::Fisher, Choose::Margin, Choose::Norm];
    let runs: Vec<Vec<Asked>> = rules.iter().map(|&rule| worlds.iter().map(|w| ask(w, rule)).collect()).collect();
    let at = |run: &[Asked], of: &dyn Fn(&Asked) -> &[f64]| -> Vec<f64> {
        (0..MARKS.len()).map(|i| mean(run.iter().map(|a| of(a)[i]))).collect()
    };
    for (run, (rule, last, average, rare)) in runs.iter().zip([
        ("random", [0.597, 0.403, 0.266, 0.108], [0.672, 0.511, 0.334, 0.192], 1.6),
        ("uncertainty", [0.258, 0.170, 0.104, 0.072], [0.274, 0.213, 0.144, 0.101], 60.0),
        ("fisher", [0.215, 0.144, 0.110, 0.057], [0.246, 0.193, 0.130, 0.084], 61.0),
        ("margin", [0.615, 0.378, 0.186, 0.094], [0.676, 0.500, 0.300, 0.145], 1.6),
        ("norm", [0.742, 0.619, 0.419, 0.131], [0.784, 0.665, 0.526, 0.274], 0.0),
    ]) {
        let share = mean(
            run.iter().zip(&worlds).map(|(a, w)| mean(a.picks[..50].iter().map(|p| f64::from(u8::from(w.rare[p.0]))))),
        );
        println!(
            "{rule}: {:.3?} / {:.3?}, rare {:.1} %",
            at(run, &|a| &a.last),
            at(run, &|a| &a.average),
            100.0 * share
        );
        near(&at(run, &|a| &a.last), &last, DIGITS);
        near(&at(run, &|a| &a.average), &average, DIGITS);
        assert!((100.0 * share - rare).abs() < 0.51, "{share}");
    }
    near(&at(&runs[0], &|a| &a.mle), &[0.598, 0.405, 0.265, 0.106], DIGITS);
    near(&at(&runs[1], &|a| &a.mle), &[0.256, 0.168, 0.105, 0.073], DIGITS);

    let (random, active) = (&runs[0], &runs[1]);
    let (chance, chosen) = (at(random, &|a| &a.last), at(active, &|a| &a.last));
    assert!((0..3).all(|i| chosen[i] <= 0.6 * chance[i]), "{chosen:?} {chance:?}");
    let wins = random.iter().zip(active).filter(|(r, a)| a.last[2] < r.last[2]).count();
    println!("active better in {wins} of 20");
    assert_eq!(wins, 19);

    let (picks, scores): (Vec<usize>, Vec<f64>) = active[0].picks[..10].iter().copied().unzip();
    assert_eq!(picks, [1240, 1852, 1714, 1951, 1155, 802, 1288, 1828, 21, 420]);
    let printed = [
        3.97225351, 3.00369467, 2.89338691, 2.82680324, 2.45237119, 2.36865895, 2.31927646, 1.94761208, 1.88096841,
        1.80396963,
    ];
    near(&scores, &printed, 5.1e-9);
    assert_eq!(worlds[0].rare.iter().filter(|r| **r).count(), 33);
    near(&[active[0].last[2], random[0].last[2]], &[0.070924, 0.168408], 5.1e-7);
}

#[test]
fn a_batch_spreads_over_what_it_will_know() {
    let world = Scarce::new(1);
    let mut rng = Rng::new(1);
    let mut reward = OnePass::new(Scarce::D, explicit(1.0, 1.0)).unwrap();
    let mut pool = Pool::new(world.z.clone(), &reward).unwrap();
    // Where labels do not move θ, the batch is what one at a time would be.
    let batch = pool.batch(&reward, 10, Choose::Uncertainty, &mut rng).unwrap();
    for &k in &batch {
        assert_eq!(pool.next(&reward, Choose::Uncertainty, &mut rng), Some(k));
        reward.update(pool.z(k), 0.5).unwrap();
        pool.learned(k, &reward).unwrap();
    }
    let exact = reward.variances(&world.z).unwrap();
    near(pool.variances(), &exact, 1e-12);
    pool.refresh(&reward).unwrap();
    assert_eq!(pool.variances(), exact);
    for rule in [Choose::Fisher, Choose::Margin, Choose::Norm, Choose::Random] {
        let mut batch = pool.batch(&reward, 50, rule, &mut rng).unwrap();
        batch.sort_unstable();
        batch.dedup();
        assert!(batch.len() == 50 && batch.iter().all(|k| pool.open() == 1990 && pool.z(*k).len() == 8));
    }
    // A pool ends.
    let mut few = Pool::new(world.z[..3 * Scarce::D].to_vec(), &reward).unwrap();
    assert_eq!(few.batch(&reward, 9, Choose::Uncertainty, &mut rng).unwrap().len(), 3);
    (0..3).for_each(|k| few.close(k).unwrap());
    assert_eq!((few.next(&reward, Choose::Random, &mut rng), few.open()), (None, 0));
    assert!(few.close(3).is_err() && few.learned(3, &reward).is_err());
}

#[test]
fn a_pool_follows_batches_and_forgetting() {
    let world = Scarce::new(2);
    let settings = Settings { forget: 0.99, ..Settings::default() };
    let mut reward = OnePass::new(Scarce::D, settings).unwrap();
    let mut pool = Pool::new(world.z.clone(), &reward).unwrap();
    let d = Scarce::D;
    reward.update_batch(&world.z[..20 * d], &world.y[..20]).unwrap();
    pool.observe(&reward).unwrap();
    reward.update(&world.z[20 * d..21 * d], 1.0).unwrap();
    pool.observe(&reward).unwrap();
    reward.update(&vec![0.0; d], 1.0).unwrap();
    pool.observe(&reward).unwrap();
    near(pool.variances(), &reward.variances(&world.z).unwrap(), 1e-12);
}
