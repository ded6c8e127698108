//! What the one-pass learner is compared with, and what is reported.

use nalgebra::DVector;
use quadriga::ErrorKind;
use quadriga::rlhf::*;

use super::near;
use super::worlds::{Passive, dot, norm};

fn gradient(world: &Passive, theta: &[f64], lambda: f64) -> Vec<f64> {
    let mut g: Vec<f64> = theta.iter().map(|t| lambda * t).collect();
    for (z, y) in world.rounds() {
        let c = sigmoid(dot(z, theta)) - y;
        g.iter_mut().zip(z).for_each(|(g, z)| *g += c * z);
    }
    g
}

#[test]
fn the_estimate_of_all_data_is_the_minimum_warm_or_cold() {
    let world = Passive::new(61, 6, 800, 3.0);
    let [mut warm, mut cold] = [(); 2].map(|()| Mle::new(6, 0.3, None).unwrap());
    let mut steps = [0, 0];
    assert_eq!(warm.fit(true).unwrap(), 1);
    for (t, (z, y)) in world.rounds().enumerate() {
        warm.push(z, y).unwrap();
        cold.push(z, y).unwrap();
        if t % 100 == 99 {
            steps[0] += warm.fit(true).unwrap();
            steps[1] += cold.fit(false).unwrap();
            near(warm.theta(), cold.theta(), 1e-12);
        }
    }
    assert!(steps[0] < steps[1] && warm.multiply_adds() < cold.multiply_adds(), "{steps:?}");
    assert!(norm(&gradient(&world, warm.theta(), 0.3)) < 1e-10);
    assert_eq!((warm.len(), warm.bytes()), (800, 8 * (800 * 7 + 6)));

    // In a ball: on its edge, with the gradient straight outwards.
    let mut bounded = Mle::new(6, 0.3, Some(1.0)).unwrap();
    world.rounds().for_each(|(z, y)| bounded.push(z, y).unwrap());
    bounded.fit(true).unwrap();
    let (theta, g) = (bounded.theta(), gradient(&world, bounded.theta(), 0.3));
    near(&[norm(theta)], &[1.0], 1e-12);
    near(&[dot(theta, &g) / norm(&g)], &[-1.0], 1e-9);

    // Labels of a plane: the ridge alone holds it.
    let mut separable = Mle::new(1, 1e-6, None).unwrap();
    (0..100).for_each(|_| separable.push(&[1.0], 1.0).unwrap());
    separable.fit(false).unwrap();
    let theta = separable.theta()[0];
    assert!(theta > 10.0 && (1e-6 * theta / (100.0 * (1.0 - sigmoid(theta))) - 1.0).abs() < 1e-6);

    for e in [Mle::new(0, 1.0, None), Mle::new(2, 0.0, None), Mle::new(2, 1.0, Some(0.0))] {
        assert!([ErrorKind::Shape, ErrorKind::Config].contains(&e.unwrap_err().kind()));
    }
    assert!(separable.push(&[f64::NAN], 1.0).is_err() && separable.push(&[1.0], -1.0).is_err());
}

#[test]
fn descent_without_curvature() {
    let z = [[1.0, 2.0], [-1.0, 0.5]];
    let mut sgd = Sgd::new(2, Rate::Constant(0.1), 2).unwrap();
    assert!(!sgd.push(&z[0], 1.0).unwrap());
    assert_eq!(sgd.theta(), [0.0, 0.0]);
    assert!(sgd.push(&z[1], 0.0).unwrap());
    // Mean of -z/2 and +z'/2.
    near(sgd.theta(), &[0.1 * 0.5, 0.1 * 0.375], 1e-15);
    let mut root = Sgd::new(1, Rate::Root(1.0), 1).unwrap();
    root.push(&[1.0], 1.0).unwrap();
    near(root.theta(), &[0.5], 1e-15);
    root.push(&[1.0], 1.0).unwrap();
    near(root.theta(), &[0.5 + sigmoid(-0.5) / 2f64.sqrt()], 1e-15);
    // Adam's first step is the rate, whatever the gradient's size.
    let mut adam = Sgd::adam(2, 0.01, 1).unwrap();
    adam.push(&[1e3, -1e-3], 1.0).unwrap();
    near(adam.theta(), &[0.01, -0.01], 1e-6);
    assert!(Sgd::new(2, Rate::Root(-1.0), 1).is_err() && Sgd::new(2, Rate::Constant(1.0), 0).is_err());
    assert!(Sgd::new(0, Rate::Constant(1.0), 1).is_err() && sgd.push(&z[0], f64::NAN).is_err());
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    dot(a, b) / (norm(a) * norm(b))
}

#[test]
fn the_papers_approximation_solves_its_system_and_the_released_one_does_not() {
    let (d, b) = (12, 32);
    let world = Passive::new(71, d, b, 3.0);
    let exact = |damping: f64| {
        let mut h = nalgebra::DMatrix::identity(d, d) * damping;
        for (z, _) in world.rounds() {
            let z = DVector::from_column_slice(z);
            h += 0.25 / b as f64 * &z * z.transpose();
        }
        let g: Vec<f64> = gradient(&world, &vec![0.0; d], 0.0).iter().map(|g| g / b as f64).collect();
        (h.cholesky().unwrap().solve(&DVector::from_column_slice(&g)), g)
    };
    // At the end of the schedule, with steps enough: the damped Newton step.
    let whole = HvpSettings { steps: d, growth: 1, ..HvpSettings::default() };
    let mut hvp = Hvp::new(d, whole).unwrap();
    let direction = hvp.update(&world.z, &world.y).unwrap();
    let (want, g) = exact(0.8);
    near(&direction, want.as_slice(), 1e-9);
    near(hvp.theta(), &direction.iter().map(|v| -1e-3 * v).collect::<Vec<_>>(), 1e-15);
    // The damping grows: a tenth of it in the first of ten batches.
    let mut hvp = Hvp::new(d, HvpSettings { growth: 10, ..whole }).unwrap();
    near(&hvp.update(&world.z, &world.y).unwrap(), exact(0.08).0.as_slice(), 1e-9);

    // As released: nearly the gradient, of nearly its length, and it exactly once the schedule has ended.
    let released = HvpSettings { variant: Variant::Released, growth: 2, ..HvpSettings::default() };
    let mut hvp = Hvp::new(d, released).unwrap();
    let direction = hvp.update(&world.z, &world.y).unwrap();
    let ratio = norm(&direction) / norm(&g);
    println!("released: cosine {:.6}, length {ratio:.3}", cosine(&direction, &g));
    assert!(cosine(&direction, &g) > 0.999 && (0.8..=1.05).contains(&ratio) && direction != g);
    let last = hvp.update(&world.z, &world.y).unwrap();
    let at: Vec<f64> = gradient(&world, &direction.iter().map(|v| -1e-3 * v).collect::<Vec<_>>(), 0.0);
    near(&last, &at.iter().map(|g| g / b as f64).collect::<Vec<_>>(), 1e-15);

    for settings in [
        HvpSettings { eta: 0.0, ..whole },
        HvpSettings { steps: 0, ..whole },
        HvpSettings { damping: 0.0, ..whole },
        HvpSettings { growth: 0, ..whole },
        HvpSettings { tolerance: 1.0, ..whole },
    ] {
        assert_eq!(Hvp::new(d, settings).unwrap_err().kind(), ErrorKind::Config);
    }
    assert!(hvp.update(&world.z, &world.y[1..]).is_err() && hvp.update(&[], &[]).is_err());
}

#[test]
fn figures_of_a_report() {
    let mut progress = Progress::default();
    assert_eq!((progress.count(), progress.accuracy(), progress.log_loss()), (0, 0.0, 0.0));
    for (p, y) in [(0.9, 1.0), (0.1, 1.0), (0.5, 0.0), (0.7, 0.5), (1.0, 1.0), (0.2, 0.0)] {
        progress.push(p, y).unwrap();
    }
    near(&[progress.accuracy()], &[(1.0 + 0.0 + 0.5 + 0.5 + 1.0 + 1.0) / 6.0], 1e-15);
    let losses = [0.9f64.ln(), 0.1f64.ln(), 0.5f64.ln(), 0.5 * (0.7f64.ln() + 0.3f64.ln()), 0.0, 0.8f64.ln()];
    near(&[progress.log_loss()], &[-losses.iter().sum::<f64>() / 6.0], 1e-12);
    assert_eq!(progress.bins().map(|b| b.count), [1, 1, 1, 1, 2]);
    near(&[progress.bins()[4].predicted, progress.bins()[4].observed], &[1.9, 2.0], 1e-15);
    near(&[progress.calibration_error()], &[(0.9 + 0.2 + 0.5 + 0.2 + 0.1) / 6.0], 1e-15);
    // Sure and wrong is dear and finite.
    progress.push(1.0, 0.0).unwrap();
    assert!(progress.log_loss().is_finite() && progress.log_loss() > 5.0);
    assert!(progress.push(1.1, 0.0).is_err() && progress.push(0.5, f64::NAN).is_err());

    near(&[correlation(&[1.0, 2.0, 3.0], &[2.0, 4.0, 7.0]).unwrap()], &[5.0 / (2.0f64 * 38.0 / 3.0).sqrt()], 1e-12);
    assert_eq!(correlation(&[1.0, 1.0], &[2.0, 4.0]).unwrap(), 0.0);
    assert!(correlation(&[1.0], &[]).is_err());
    let curve: Vec<(f64, f64)> = (1..50).map(|t| (t as f64, 3.0 * (t as f64).powf(0.37))).collect();
    near(&[slope_loglog(&curve), slope_loglog(&[]), slope_loglog(&curve[..1])], &[0.37, 0.0, 0.0], 1e-12);
}

/// Predictions before labels, of the learner itself: better than a coin at once, and honest about how sure they are.
#[test]
fn progressive_validation_of_a_learner() {
    let world = Passive::new(81, 8, 4000, 3.0);
    let mut reward = OnePass::new(8, Settings::default()).unwrap();
    let mut progress = Progress::default();
    for (z, y) in world.rounds() {
        progress.push(reward.update(z, y).unwrap().probability, y).unwrap();
    }
    let oracle = world.rounds().filter(|(z, y)| (dot(z, &world.theta) > 0.0) == (*y == 1.0)).count() as f64 / 4000.0;
    println!("accuracy {:.3} of {oracle:.3}, loss {:.3}", progress.accuracy(), progress.log_loss());
    assert!(progress.accuracy() > oracle - 0.01 && progress.log_loss() < 0.6);
    assert!(progress.calibration_error() < 0.02 && progress.bins().iter().all(|b| b.count > 100));
}
