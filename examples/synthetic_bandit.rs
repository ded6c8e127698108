//! What one pass over comparisons is worth where the truth is known: error against that of all the data, what to ask, what to show, and
//! the time of a round. `cargo run --release --example synthetic_bandit`.

#[path = "../tests/rlhf/worlds.rs"]
mod worlds;

use std::time::Instant;

use quadriga::Result;
use quadriga::rlhf::*;
use quadriga::rng::Rng;
use worlds::{Passive, Scarce, Users, difference, mean};

fn main() -> Result<()> {
    estimate()?;
    ask()?;
    show()?;
    time()
}

fn row(name: &str, figures: &[f64], digits: usize) {
    print!("{name:>34}");
    figures.iter().for_each(|x| print!("{x:>9.digits$}"));
    println!();
}

fn explicit(eta: f64, lambda: f64) -> Settings {
    Settings { rule: Rule::Explicit, eta, lambda, ..Settings::default() }
}

/// The mean of lists, place by place.
fn average(lists: &[Vec<f64>]) -> Vec<f64> {
    (0..lists[0].len()).map(|i| mean(lists.iter().map(|l| l[i]))).collect()
}

const MARKS: [usize; 6] = [100, 500, 1000, 2000, 5000, 20_000];

/// Errors at the marks of an estimator that learns from a comparison and says where it is; it is told where that will be looked at.
fn follow(world: &Passive, mut learn: impl FnMut(&[f64], f64, bool) -> Result<Vec<f64>>) -> Result<Vec<f64>> {
    let mut errors = Vec::new();
    for (t, (z, y)) in world.rounds().enumerate() {
        let marked = MARKS.contains(&(t + 1));
        let theta = learn(z, y, marked)?;
        if marked {
            errors.push(world.error(&theta));
        }
    }
    Ok(errors)
}

fn estimate() -> Result<()> {
    println!(
        "Distance to the truth (d = 8, norm 3, mean of 10) after so many comparisons, and the exponent from 1000 on\n"
    );
    row("", &MARKS.map(|t| t as f64), 0);
    let worlds: Vec<Passive> = (1..=10).map(|s| Passive::new(s, 8, 20_000, 3.0)).collect();
    let print = |name: &str, errors: Vec<Vec<f64>>| {
        let mut figures = average(&errors);
        let points: Vec<_> = MARKS.iter().zip(&figures).skip(2).map(|(&t, &e)| (t as f64, e)).collect();
        figures.push(slope_loglog(&points));
        row(name, &figures, 3);
    };
    let all = |make: &dyn Fn(&Passive) -> Result<Vec<f64>>| worlds.iter().map(make).collect::<Result<Vec<_>>>();

    print(
        "all data, ridge 1",
        all(&|world| {
            let mut mle = Mle::new(8, 1.0, None)?;
            follow(world, |z, y, marked| {
                mle.push(z, y)?;
                if marked {
                    mle.fit(true)?;
                }
                Ok(mle.theta().to_vec())
            })
        })?,
    );
    for (name, settings) in [
        ("one pass, eta 1", explicit(1.0, 1.0)),
        ("one pass, implicit", Settings { lambda: 1.0, ..Settings::default() }),
        ("one pass, eta 2", explicit(2.0, 1.0)),
        ("one pass, eta 1/2", explicit(0.5, 1.0)),
        ("one pass, constants of lemma 1", Settings { bound: None, ..Settings::theory(4.0, 1.0, 8) }),
    ] {
        let run = |world: &Passive| {
            let mut reward = OnePass::new(8, settings.clone())?;
            follow(world, |z, y, _| reward.update(z, y).map(|_| reward.theta().to_vec()))
        };
        print(name, all(&run)?);
    }
    for (name, rate) in [("gradients, 0.1", Rate::Constant(0.1)), ("gradients, 1/sqrt(t)", Rate::Root(1.0))] {
        let run = |world: &Passive| {
            let mut sgd = Sgd::new(8, rate, 1)?;
            follow(world, |z, y, _| sgd.push(z, y).map(|_| sgd.theta().to_vec()))
        };
        print(name, all(&run)?);
    }
    Ok(())
}

fn ask() -> Result<()> {
    const MARKS: [usize; 4] = [50, 100, 200, 400];
    println!(
        "\nWhat the greedy choice falls short of the best (rare directions matter, mean of 10) after so many labels\n"
    );
    row("", &MARKS.map(|t| t as f64), 0);
    let worlds: Vec<Scarce> = (1..=10).map(Scarce::new).collect();
    let rules = [Choose::Random, Choose::Uncertainty, Choose::Fisher, Choose::Margin, Choose::Norm];
    for rule in rules {
        let run = |(s, world): (usize, &Scarce)| -> Result<Vec<f64>> {
            let mut rng = Rng::new(s as u64);
            let mut reward = OnePass::new(Scarce::D, explicit(1.0, 1.0))?;
            let mut pool = Pool::new(world.z.clone(), &reward)?;
            let mut gaps = Vec::new();
            for t in 1..=400 {
                let Some(k) = pool.next(&reward, rule, &mut rng) else { break };
                reward.update(pool.z(k), world.y[k])?;
                pool.learned(k, &reward)?;
                if MARKS.contains(&t) {
                    gaps.push(world.gap(reward.theta()));
                }
            }
            Ok(gaps)
        };
        let gaps = worlds.iter().enumerate().map(run).collect::<Result<Vec<_>>>()?;
        row(&format!("{rule:?}").to_lowercase(), &average(&gaps), 3);
    }
    Ok(())
}

fn show() -> Result<()> {
    const MARKS: [usize; 4] = [100, 500, 1000, 4000];
    println!(
        "\nRegret of what was shown, of 16 answers (mean of 10), its exponent from 200 on, share of rounds that asked\n"
    );
    row("", &MARKS.map(|t| t as f64), 0);
    let worlds: Vec<Users> = (1..=10).map(Users::new).collect();
    for (name, second, beta) in [
        ("any two", Second::Pair, 0.0),
        ("best and worst", Second::Worst, 0.0),
        ("best and any other", Second::Random, 0.0),
        ("best and 4th", Second::Rank(4), 0.0),
        ("best and second", Second::Runnerup, 0.0),
        ("optimistic, must differ, beta 0.5", Second::Forced, 0.5),
        ("optimistic, beta 0.1", Second::Optimistic, 0.1),
        ("optimistic, beta 0.5", Second::Optimistic, 0.5),
        ("optimistic, beta 2", Second::Optimistic, 2.0),
    ] {
        let run = |(s, world): (usize, &Users)| -> Result<(Vec<f64>, f64)> {
            let d = Users::D;
            let mut rng = Rng::new(s as u64);
            let mut reward = OnePass::new(d, explicit(1.0, 1.0))?;
            let (mut sum, mut curve) = (0.0, Vec::new());
            for t in 0..Users::ROUNDS {
                let answers = world.answers(t);
                let shown = deploy(&reward, answers, beta, second, &mut rng)?;
                let other = shown.second.unwrap_or(shown.first);
                sum += 0.5 * (world.regret(t, shown.first) + world.regret(t, other));
                curve.push(sum);
                if shown.second.is_some() {
                    let z = difference(&answers[shown.first * d..][..d], &answers[other * d..][..d]);
                    reward.update(&z, world.label(t, &z))?;
                }
            }
            Ok((curve, reward.steps() as f64 / Users::ROUNDS as f64))
        };
        let (curves, asked): (Vec<_>, Vec<_>) =
            worlds.iter().enumerate().map(run).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let curve = average(&curves);
        let points: Vec<_> = (200..=Users::ROUNDS).map(|t| (t as f64, curve[t - 1])).collect();
        let figures: Vec<f64> = MARKS.iter().map(|t| curve[t - 1]).collect();
        print!("{name:>34}");
        figures.iter().for_each(|x| print!("{x:>9.0}"));
        println!("{:>9.2}{:>9.2}", slope_loglog(&points), mean(asked.into_iter()));
    }
    Ok(())
}

fn time() -> Result<()> {
    const MARKS: [usize; 5] = [100, 1000, 5000, 10_000, 20_000];
    let d = 64;
    println!(
        "\nMicroseconds of a round (d = {d}): median of one pass over the last 100, and all data from the estimate before\n"
    );
    println!("{:>34}{:>9}{:>9}{:>9}{:>9}{:>9}", "comparisons", "one pass", "all", "times", "error", "error");
    let world = Passive::new(3, d, 20_000, 3.0);
    let mut reward = OnePass::new(d, explicit(1.0, 1.0))?;
    let mut mle = Mle::new(d, 1.0, None)?;
    let mut micros = Vec::new();
    for (t, (z, y)) in world.rounds().enumerate() {
        let clock = Instant::now();
        reward.update(z, y)?;
        micros.push(clock.elapsed().as_secs_f64() * 1e6);
        if MARKS.contains(&(t + 1)) {
            mle.fit(true)?;
        }
        mle.push(z, y)?;
        if MARKS.contains(&(t + 1)) {
            let clock = Instant::now();
            mle.fit(true)?;
            let refit = clock.elapsed().as_secs_f64() * 1e6;
            let mut last = micros[micros.len() - 100..].to_vec();
            last.sort_by(f64::total_cmp);
            let errors = [reward.theta(), mle.theta()].map(|theta| world.error(theta));
            print!("{:>34}{:>9.1}{refit:>9.0}{:>9.0}", t + 1, last[50], refit / last[50]);
            println!("{:>9.4}{:>9.4}", errors[0], errors[1]);
        }
    }
    println!("{:>34}{:>9}{:>9}", "bytes kept", reward.bytes(), mle.bytes());
    Ok(())
}
