//! Section 7.4: what to show while learning.

use quadriga::rlhf::*;
use quadriga::rng::Rng;

use super::worlds::{Users, difference, mean};
use super::{explicit, near};

const MARKS: [usize; 5] = [100, 500, 1000, 2000, 4000];

/// Regret summed to each mark, of both answers' mean and of the first alone, the log-log slopes of both from round 200, and the
/// share of rounds in which something was asked.
struct Deployed {
    both: Vec<f64>,
    first: Vec<f64>,
    curves: [Vec<f64>; 2],
    asked: f64,
}

fn show(world: &Users, beta: f64, second: Second) -> Deployed {
    let d = Users::D;
    let mut reward = OnePass::new(d, explicit(1.0, 1.0)).unwrap();
    let mut rng = Rng::new(0);
    let (mut sums, mut curves, mut asked) = ([0.0; 2], [Vec::new(), Vec::new()], 0);
    for t in 0..Users::ROUNDS {
        let answers = world.answers(t);
        let shown = deploy(&reward, answers, beta, second, &mut rng).unwrap();
        let other = shown.second.unwrap_or(shown.first);
        let regret = [shown.first, other].map(|j| world.regret(t, j));
        sums[0] += 0.5 * (regret[0] + regret[1]);
        sums[1] += regret[0];
        curves.iter_mut().zip(sums).for_each(|(c, s)| c.push(s));
        if shown.second.is_some() {
            let z = difference(&answers[shown.first * d..][..d], &answers[other * d..][..d]);
            reward.update(&z, world.label(t, &z)).unwrap();
            asked += 1;
        }
    }
    let [both, first] = curves.each_ref().map(|c| MARKS.map(|t| c[t - 1]).to_vec());
    Deployed { both, first, curves, asked: asked as f64 / Users::ROUNDS as f64 }
}

struct Mean {
    both: Vec<f64>,
    first: Vec<f64>,
    slopes: [f64; 2],
    asked: f64,
}

fn all(worlds: &[Users], beta: f64, second: Second) -> (Mean, Vec<Deployed>) {
    let runs: Vec<Deployed> = worlds.iter().map(|w| show(w, beta, second)).collect();
    let at = |of: &dyn Fn(&Deployed) -> &[f64]| (0..MARKS.len()).map(|i| mean(runs.iter().map(|r| of(r)[i]))).collect();
    let slopes = [0, 1].map(|c| {
        let points = (200..=Users::ROUNDS).map(|t| (t as f64, mean(runs.iter().map(|r| r.curves[c][t - 1]))));
        slope_loglog(&points.collect::<Vec<_>>())
    });
    let (both, first) = (at(&|r| &r.both), at(&|r| &r.first));
    let asked = mean(runs.iter().map(|r| r.asked));
    println!(
        "{second:?}, beta {beta}: {both:.0?}, slope {:.2}; first {first:.1?}, {:.2}; asked {asked:.2}",
        slopes[0], slopes[1]
    );
    (Mean { both, first, slopes, asked }, runs)
}

#[test]
fn regret_of_what_is_shown() {
    let worlds: Vec<Users> = (1..=10).map(Users::new).collect();
    for (second, beta, printed, slope) in [
        (Second::Worst, 0.0, [218.0, 1094.0, 2196.0, 4394.0, 8799.0], 1.00),
        (Second::Rank(4), 0.0, [80.0, 302.0, 572.0, 1106.0, 2173.0], 0.94),
        (Second::Runnerup, 0.0, [53.0, 150.0, 260.0, 476.0, 909.0], 0.85),
        (Second::Forced, 0.5, [50.0, 148.0, 259.0, 477.0, 910.0], 0.86),
        (Second::Optimistic, 0.1, [39.0, 77.0, 99.0, 130.0, 161.0], 0.37),
        (Second::Optimistic, 0.5, [41.0, 73.0, 91.0, 116.0, 147.0], 0.34),
        (Second::Optimistic, 1.0, [54.0, 113.0, 148.0, 190.0, 241.0], 0.37),
        (Second::Optimistic, 2.0, [71.0, 167.0, 233.0, 318.0, 419.0], 0.45),
    ] {
        let (figures, runs) = all(&worlds, beta, second);
        near(&figures.both, &printed, 0.51);
        near(&figures.slopes[..1], &[slope], 0.0151);
        if second == Second::Optimistic {
            assert!((0.2..=0.55).contains(&figures.slopes[0]) && figures.asked < 1.0);
        } else {
            assert!(figures.slopes[0] > 0.8 && figures.asked == 1.0);
        }
        if second == Second::Optimistic && beta == 0.5 {
            near(&runs[0].both, &[46.095697, 73.638132, 91.872340, 113.303384, 137.752669], 5.1e-7);
        }
        // What the first answer alone costs, where the second must differ.
        match second {
            Second::Runnerup => near(&[figures.first[0], figures.first[4]], &[34.6, 62.4], 0.051),
            Second::Worst => near(&[figures.first[0], figures.first[4]], &[49.6, 291.0], 0.51),
            _ => {}
        }
    }
    let (figures, _) = all(&worlds, 2.0, Second::Forced);
    near(&[figures.first[0], figures.first[4]], &[22.8, 43.5], 0.051);
    // Chance draws from a generator of its own here.
    let (figures, _) = all(&worlds, 0.0, Second::Pair);
    assert!(figures.slopes[0] > 0.97 && (figures.both[4] / 8809.0 - 1.0).abs() < 0.02);
    let (figures, _) = all(&worlds, 0.0, Second::Random);
    assert!((figures.first[4] / 104.0 - 1.0).abs() < 0.2 && figures.slopes[1] < 0.5);
}
