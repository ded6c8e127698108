//! Identities of section 2.1, projections, and what must hold of any learner whatever its settings.

use nalgebra::{DMatrix, DVector};
use quadriga::ErrorKind;
use quadriga::rlhf::*;
use quadriga::rng::Rng;

use super::worlds::{Passive, Stream, difference, distance, dot, norm};
use super::{explicit, host, near, settings};

const RULES: [Rule; 2] = [Rule::Explicit, Rule::Implicit];

#[test]
fn a_step_goes_towards_its_label_and_not_past_it() {
    for rule in RULES {
        for (eta, lambda) in [(1.0, 1.0), (3.0, 0.1), (0.6, 10.0)] {
            let mut s = Stream::new(21);
            let mut reward = OnePass::new(5, settings(rule, eta, lambda)).unwrap();
            for _ in 0..500 {
                let (z, y) = (s.normals(5), f64::from(u8::from(s.uniform() < 0.5)));
                let step = reward.update(&z, y).unwrap();
                let moved = step.after - step.margin;
                let reach = eta * step.uncertainty * (step.probability - y).abs();
                // A step below the margin's last bit is none.
                let visible = reach > 1e-12 * step.margin.abs();
                let towards = moved * (2.0 * y - 1.0);
                assert!(towards > 0.0 || !visible && towards == 0.0, "{rule:?}: {step:?}");
                assert!(moved.abs() <= reach * (1.0 + 1e-12) || !visible, "{rule:?}: {step:?}");
                let root = step.after + eta * step.uncertainty * (sigmoid(step.after) - y) - step.margin;
                assert!(rule == Rule::Explicit || root.abs() < 1e-12 * (1.0 + reach), "{root}");
                near(&[reward.reward(&z)], &[step.after], 1e-10 * (1.0 + reach));
            }
        }
    }
}

#[test]
fn the_order_of_two_answers_does_not_matter() {
    for rule in RULES {
        let world = Passive::new(22, 6, 300, 3.0);
        let [mut one, mut other] = [(); 2].map(|()| OnePass::new(6, settings(rule, 1.0, 0.3)).unwrap());
        for (t, (z, y)) in world.rounds().enumerate() {
            one.update(z, y).unwrap();
            let flipped: Vec<f64> = z.iter().map(|z| -z).collect();
            if t % 2 == 0 { other.update(&flipped, 1.0 - y) } else { other.update(z, y) }.unwrap();
        }
        assert!(distance(one.theta(), other.theta()) < 1e-13);
        assert!(distance(&one.state().unwrap().inverse, &other.state().unwrap().inverse) < 1e-13);
    }
}

#[test]
fn the_determinant_is_known_without_the_matrix() {
    for forget in [1.0, 0.99] {
        let world = Passive::new(23, 6, 200, 3.0);
        let mut reward = OnePass::new(6, Settings { forget, lambda: 0.3, ..Settings::default() }).unwrap();
        world.rounds().take(150).for_each(|(z, y)| _ = reward.update(z, y).unwrap());
        reward.update_batch(&world.z[150 * 6..170 * 6], &world.y[150..170]).unwrap();
        let p = DMatrix::from_row_slice(6, 6, &reward.state().unwrap().inverse);
        near(&[reward.log_det()], &[-p.determinant().ln()], 1e-9);
    }
}

#[test]
fn a_batch_of_one_is_a_step_and_any_batch_the_minimum_of_its_loss() {
    let world = Passive::new(24, 6, 40, 3.0);
    for rule in RULES {
        for bound in [None, Some(0.4)] {
            let settings = Settings { bound, ..settings(rule, 1.5, 0.2) };
            let [mut one, mut other] = [(); 2].map(|()| OnePass::new(6, settings.clone()).unwrap());
            for (z, y) in world.rounds() {
                one.update(z, y).unwrap();
                other.update_batch(z, &[y]).unwrap();
            }
            assert!(distance(one.theta(), other.theta()) < 1e-11);
            assert!(distance(&one.state().unwrap().inverse, &other.state().unwrap().inverse) < 1e-11);
            assert_eq!(one.projections(), other.projections());
            assert_eq!(one.projections() > 0, bound.is_some());
        }
        for lambda in [0.05, 1e-4] {
            batch_against_dense(&world, rule, lambda);
        }
    }
}

/// From a state in the middle: the stationarity of θ', and P, by dense matrices.
fn batch_against_dense(world: &Passive, rule: Rule, lambda: f64) {
    let eta = 1.5;
    let mut reward = OnePass::new(6, settings(rule, eta, lambda)).unwrap();
    world.rounds().take(20).for_each(|(z, y)| _ = reward.update(z, y).unwrap());
    let before = reward.state().unwrap();
    // One of them is an answer against its equal: nothing.
    let (mut zs, ys) = (world.z[20 * 6..].to_vec(), &world.y[20..]);
    zs[6..12].fill(0.0);
    reward.update_batch(&zs, ys).unwrap();
    assert_eq!((reward.steps(), reward.removed().len()), (39, 19 * 6));
    let h = DMatrix::from_row_slice(6, 6, &before.inverse).try_inverse().unwrap();
    let at = |theta: &[f64]| {
        let (mut g, mut curvature) = (DVector::zeros(6), DMatrix::zeros(6, 6));
        for (z, y) in zs.chunks_exact(6).zip(ys) {
            let (m, z) = (dot(z, theta), DVector::from_column_slice(z));
            g += (sigmoid(m) - y) * &z;
            curvature += slope(m) * &z * z.transpose();
        }
        (g, curvature)
    };
    let moved = DVector::from_vec(difference(reward.theta(), &before.theta));
    let residual = match rule {
        Rule::Explicit => {
            let (g, curvature) = at(&before.theta);
            g * eta + (&h + curvature * eta) * moved
        }
        Rule::Implicit => at(reward.theta()).0 * eta + &h * moved,
    };
    assert!(residual.amax() < 1e-11, "{rule:?}, lambda {lambda}: {residual}");
    let p = DMatrix::from_row_slice(6, 6, &reward.state().unwrap().inverse);
    assert!(((h + at(reward.theta()).1) * p - DMatrix::identity(6, 6)).amax() < 1e-10);
}

/// Symmetric positive definite, eigenvalues over six orders of magnitude.
fn norm_of(s: &mut Stream, d: usize) -> DMatrix<f64> {
    let basis = DMatrix::from_vec(d, d, s.normals(d * d)).qr().q();
    let values = DVector::from_iterator(d, (0..d).map(|_| 10f64.powf(-6.0 * s.uniform())));
    let p = &basis * DMatrix::from_diagonal(&values) * basis.transpose();
    0.5 * (&p + p.transpose())
}

#[test]
fn a_projection_is_the_nearest_point_of_the_ball() {
    let mut s = Stream::new(31);
    for trial in 0..60 {
        let d = 1 + trial % 12;
        let p = norm_of(&mut s, d);
        let inverse = host(p.as_slice());
        // What the step takes from P leaves it positive.
        let z = s.normals(d);
        let u = &p * DVector::from_column_slice(&z);
        let c = 0.25 / (1.0 + 0.25 * dot(&z, u.as_slice()));
        let v: Vec<f64> = u.iter().map(|u| c.sqrt() * u).collect();
        let local = &p - c * &u * u.transpose();
        let theta: Vec<f64> = s.normals(d).iter().map(|x| 3.0 * x).collect();
        let bound = norm(&theta) * (0.05 + 0.9 * s.uniform());
        let found = project(&inverse, &v, &theta, bound).unwrap();
        assert!((norm(&found.theta) / bound - 1.0).abs() < 1e-12 && norm(&found.theta) <= bound * (1.0 + 1e-15));
        // Stationary: x + μP̃x = θ.
        let x = DVector::from_column_slice(&found.theta);
        let residual = &x + found.mu * &local * &x - DVector::from_column_slice(&theta);
        assert!(found.mu > 0.0 && residual.norm() < 1e-11 * norm(&theta), "{trial}: {}", residual.norm());
        // Nothing feasible is nearer.
        let factor = local.cholesky().unwrap();
        let far = |x: &[f64]| {
            let apart = DVector::from_vec(difference(x, &theta));
            factor.l().solve_lower_triangular(&apart).unwrap().norm_squared()
        };
        let nearest = far(&found.theta);
        for k in 0..50 {
            let reach = if k % 2 == 0 { 1.0 } else { 1e-3 };
            let mut other: Vec<f64> = found.theta.iter().map(|x| x + reach * bound * s.normal()).collect();
            let shrink = (bound / norm(&other)).min(1.0);
            other.iter_mut().for_each(|x| *x *= shrink);
            assert!(far(&other) >= nearest * (1.0 - 1e-9), "{trial}");
        }
        // A smaller ball takes a larger multiplier.
        assert!(project(&inverse, &v, &theta, 0.9 * bound).unwrap().mu > found.mu);
        // What is inside stays where it is.
        let inside = project(&inverse, &v, &theta, norm(&theta) * 1.001).unwrap();
        assert_eq!((inside.theta, inside.mu, inside.products), (theta, 0.0, 0));
    }
}

#[test]
fn a_learner_in_a_ball_never_leaves_it() {
    for rule in RULES {
        let world = Passive::new(33, 6, 300, 5.0);
        let mut reward = OnePass::new(6, Settings { bound: Some(1.0), ..settings(rule, 1.0, 0.1) }).unwrap();
        for (z, y) in world.rounds() {
            let step = reward.update(z, y).unwrap();
            assert!(norm(reward.theta()) <= 1.0 + 1e-15);
            assert_eq!(step.weight, slope(step.after));
        }
        assert!(reward.projections() > 20 && reward.projections() < reward.steps());
        near(&[dot(reward.theta(), &world.theta) / 5.0], &[1.0], 0.05);
    }
}

#[test]
fn a_state_goes_on_to_the_same_bits() {
    let world = Passive::new(41, 7, 120, 3.0);
    let fresh = |single: bool| -> Box<dyn Inverse> {
        if single { Box::new(Host::<f32>::new(7)) } else { Box::new(Host::<f64>::new(7)) }
    };
    for single in [false, true] {
        let settings = Settings { bound: Some(2.0), forget: 0.999, lambda: 0.1, ..Settings::default() };
        let mut whole = OnePass::with(fresh(single), settings).unwrap();
        world.rounds().take(60).for_each(|(z, y)| _ = whole.update(z, y).unwrap());
        let text = serde_json::to_string(&whole.state().unwrap()).unwrap();
        let mut resumed = OnePass::restore(serde_json::from_str(&text).unwrap(), Some(fresh(single))).unwrap();
        for (z, y) in world.rounds().skip(60) {
            assert_eq!(whole.update(z, y).unwrap(), resumed.update(z, y).unwrap());
        }
        let bits = |s: State| -> Vec<u64> {
            s.theta.iter().chain(&s.sum).chain(&s.inverse).chain([&s.log_det]).map(|x| x.to_bits()).collect()
        };
        assert_eq!(whole.state().unwrap(), resumed.state().unwrap());
        assert_eq!(bits(whole.state().unwrap()), bits(resumed.state().unwrap()));
        assert_eq!(whole.average(), resumed.average());
    }
}

#[test]
fn what_cannot_be_learnt_from_is_refused_and_changes_nothing() {
    let world = Passive::new(42, 3, 20, 3.0);
    let mut reward = OnePass::new(3, Settings::default()).unwrap();
    world.rounds().for_each(|(z, y)| _ = reward.update(z, y).unwrap());
    let before = reward.state().unwrap();
    for (z, y, kind, says) in [
        (&[1.0, f64::NAN, 0.0][..], 1.0, ErrorKind::Diverged, "number 1 of row 0 is NaN"),
        (&[1.0, 0.0, f64::INFINITY], 1.0, ErrorKind::Diverged, "inf"),
        (&[1e200, 0.0, 0.0], 1.0, ErrorKind::Diverged, "comparison 21: zᵀPz"),
        (&[1.0, 0.0], 1.0, ErrorKind::Shape, "2 numbers, not 3"),
        (&[1.0, 0.0, 0.0], 1.5, ErrorKind::Usage, "a label of 1.5"),
        (&[1.0, 0.0, 0.0], f64::NAN, ErrorKind::Usage, "a label of NaN"),
    ] {
        let e = reward.update(z, y).unwrap_err();
        assert!(e.kind() == kind && e.to_string().contains(says), "{e:?}");
        let e = reward.update_batch(z, &[y]).unwrap_err();
        assert!(e.kind() == kind, "{e:?}");
        assert_eq!(reward.state().unwrap(), before);
    }
    assert_eq!(reward.update_batch(&[1.0; 6], &[1.0]).unwrap_err().kind(), ErrorKind::Shape);
    // An answer against its equal is no error and no step.
    let step = reward.update(&[0.0; 3], 1.0).unwrap();
    assert_eq!((step.probability, step.uncertainty, step.projected), (0.5, 0.0, false));
    reward.update_batch(&[0.0; 6], &[1.0, 0.0]).unwrap();
    reward.update_batch(&[], &[]).unwrap();
    assert_eq!(reward.state().unwrap(), before);
    assert!(reward.removed().is_empty());

    let mut rng = Rng::new(0);
    assert_eq!(reward.variances(&[1.0; 4]).unwrap_err().kind(), ErrorKind::Shape);
    assert_eq!(reward.variance(&[1.0; 6]).unwrap_err().kind(), ErrorKind::Shape);
    assert_eq!(deploy(&reward, &[], 0.1, Second::Optimistic, &mut rng).unwrap_err().kind(), ErrorKind::Shape);
    for (beta, second) in [(-1.0, Second::Optimistic), (0.1, Second::Rank(1)), (0.1, Second::Quantile(0.5))] {
        assert_eq!(deploy(&reward, &[1.0; 6], beta, second, &mut rng).unwrap_err().kind(), ErrorKind::Usage);
    }
    assert_eq!(OnePass::new(0, Settings::default()).err().unwrap().kind(), ErrorKind::Shape);
    assert!(Host::<f64>::new(0).times(&[], &mut []).is_err() && project(&host(&[1.0]), &[], &[1.0, 2.0], 1.0).is_err());
    let alone = deploy(&reward, &[1.0; 3], 0.1, Second::Forced, &mut rng).unwrap();
    assert_eq!((alone.first, alone.second), (0, None));

    for (settings, says) in [
        (explicit(0.0, 1.0), "eta = 0"),
        (explicit(1.0, f64::NAN), "lambda = NaN"),
        (Settings { bound: Some(-1.0), ..Settings::default() }, "bound = -1"),
        (Settings { forget: 1.5, ..Settings::default() }, "forget = 1.5"),
        (Settings { forget: 0.0, ..Settings::default() }, "forget = 0"),
    ] {
        let e = OnePass::new(3, settings).err().unwrap();
        assert!(e.kind() == ErrorKind::Config && e.to_string().contains(says), "{e}");
    }
    let mut short = before.clone();
    short.inverse.pop();
    assert_eq!(OnePass::restore(short, None).err().unwrap().kind(), ErrorKind::Shape);
    let mut damaged = before.clone();
    damaged.inverse[4] = f64::NAN;
    assert_eq!(OnePass::restore(damaged, None).err().unwrap().kind(), ErrorKind::Diverged);
    assert!(OnePass::restore(before, Some(Box::new(Host::<f64>::new(4)))).is_err());
}

/// Labels of a plane, ten thousand times the same: margins and curvature stay finite.
#[test]
fn separable_data_are_no_special_case() {
    for rule in RULES {
        let mut reward = OnePass::new(2, settings(rule, 1.0, 1e-6)).unwrap();
        let mut last = 0.0;
        for t in 0..10_000 {
            let step = reward.update(&[1.0, -0.5], 1.0).unwrap();
            assert!(step.after.is_finite() && step.weight >= 0.0 && (t == 0 || step.after >= last));
            last = step.after;
        }
        assert!(last > 5.0);
    }
}

#[test]
fn ties_pull_together() {
    let mut reward = OnePass::new(2, Settings::default()).unwrap();
    let z = [1.0, 0.0];
    (0..5).for_each(|_| _ = reward.update(&z, 1.0).unwrap());
    let sure = reward.reward(&z);
    (0..50).for_each(|_| _ = reward.update(&z, 0.5).unwrap());
    assert!(sure > 1.0 && reward.reward(&z).abs() < 0.3 * sure);
}

#[test]
fn who_forgets_follows_a_reward_that_moves() {
    let (d, length) = (6, 3.0);
    let (first, second) = (Passive::new(51, d, 8000, length), Passive::new(52, d, 3000, length));
    let mut errors = [0.0; 2];
    for (forget, error) in [1.0, 0.998].into_iter().zip(&mut errors) {
        let mut reward = OnePass::new(d, Settings { forget, ..Settings::default() }).unwrap();
        first.rounds().for_each(|(z, y)| _ = reward.update(z, y).unwrap());
        assert!(first.error(reward.theta()) < 0.8);
        second.rounds().for_each(|(z, y)| _ = reward.update(z, y).unwrap());
        *error = second.error(reward.theta());
    }
    println!("errors after a change: {errors:?}, {} apart", distance(&first.theta, &second.theta));
    assert!(errors[1] < 0.5 * errors[0], "{errors:?}");
}

#[test]
fn settings_are_read_with_their_defaults() {
    let read: Settings = serde_json::from_str(r#"{"rule": "explicit", "eta": 2.0}"#).unwrap();
    assert_eq!(read, Settings { rule: Rule::Explicit, eta: 2.0, ..Settings::default() });
    assert!(serde_json::from_str::<Settings>(r#"{"lamda": 1.0}"#).is_err());
    assert_eq!(serde_json::to_string(&Second::Rank(4)).unwrap(), r#"{"rank":4}"#);
    assert_eq!(serde_json::to_string(&(Second::Optimistic, Choose::Fisher)).unwrap(), r#"["optimistic","fisher"]"#);
}
