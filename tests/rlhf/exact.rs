//! Section 7.1: examples that can be checked by hand.

use quadriga::rlhf::*;
use quadriga::rng::Rng;

use super::worlds::{Passive, Stream, dot};
use super::{explicit, host, near, settings, standing};

const Z: [[f64; 3]; 4] = [[1.0, 0.0, -1.0], [0.5, -0.5, 0.0], [0.0, 1.0, 0.5], [-1.0, 0.25, 0.75]];
const Y: [f64; 4] = [1.0, 0.0, 1.0, 1.0];

#[test]
fn the_generator_of_the_worlds() {
    let mut s = Stream::new(42);
    assert_eq!(
        [(); 4].map(|()| s.bits()),
        [0xbdd732262feb6e95, 0x28efe333b266f103, 0x47526757130f9f52, 0x581ce1ff0e4ae394]
    );
    let uniforms = [0.7415648787718233, 0.1599103928769201, 0.27860113025513866, 0.34419071652363753];
    assert_eq!(Stream::new(42).uniforms(4), uniforms);
    let normals = [0.8822489062222688, -0.4508498757188601, 0.1883526341159315, 0.219586379190761];
    near(&Stream::new(42).normals(4), &normals, 1e-15);
}

#[test]
fn the_link() {
    near(&[sigmoid(0.5), slope(0.5)], &[0.6224593312018546, 0.2350037122015945], 1e-16);
    near(&[sigmoid(-2.0), slope(6.0)], &[0.11920292202211755, 0.002466509291359931], 1e-15);
    let inverse = [0.0, 1.0, 2.0, 4.0, 6.0].map(|w| 1.0 / slope(w));
    near(&inverse, &[4.0, 5.086161269630487, 9.524391382167263, 56.61646567203297, 405.4312722449118], 1e-10);
    // Where σ rounds to 0 or 1, nothing is lost or infinite.
    for w in [-800.0, -40.0, 40.0, 800.0] {
        assert_eq!(slope(w), slope(-w));
        assert!((sigmoid(w) + sigmoid(-w) - 1.0).abs() < 1e-15);
        assert_eq!(log_loss(w, 1.0).max(log_loss(w, 0.0)), w.abs());
    }
    assert!((slope(40.0) / (-40.0f64).exp() - 1.0).abs() < 1e-15);
}

#[test]
fn the_loss_its_gradient_and_its_curvature() {
    let (z, theta) = ([0.5, -1.0, 0.25], [0.2, 0.1, -0.3]);
    let m = dot(&z, &theta);
    near(&[log_loss(m, 1.0), slope(m)], &[0.731350140827, 0.249648766827], 1e-12);
    near(&z.map(|z| (sigmoid(m) - 1.0) * z), &[-0.2593706079, 0.5187412159, -0.1296853040], 1e-10);
    let h = 1e-6;
    near(&[(log_loss(m + h, 1.0) - log_loss(m - h, 1.0)) / (2.0 * h)], &[sigmoid(m) - 1.0], 1e-9);
}

/// T1.
#[test]
fn four_steps() {
    let mut reward = OnePass::new(3, explicit(1.0, 1.0)).unwrap();
    let want = [
        [0.333333333333, 0.0, -0.333333333333, 0.0, 2.0, 0.224157389901],
        [0.127977201969, 0.242959216381, -0.370936418350, 0.166666666667, 0.461307204582, 0.249793537749],
        [0.173524683311, 0.599783261372, -0.208913799427, 0.057491007206, 1.163642531021, 0.235271657710],
        [-0.125251985619, 0.650804429157, -0.013623716521, -0.180264217538, 1.061733198446, 0.245240253414],
    ];
    for ((z, y), w) in Z.iter().zip(Y).zip(want) {
        let step = reward.update(z, y).unwrap();
        near(reward.theta(), &w[..3], 1e-12);
        near(&[step.margin, step.uncertainty, step.weight], &w[3..], 1e-12);
        assert_eq!(step.probability, sigmoid(step.margin));
        assert!((step.after - reward.reward(z)).abs() < 1e-15 && !step.projected);
    }
    let p = reward.state().unwrap().inverse;
    near(&p[..3], &[0.709174515116, 0.042065526481, 0.198830358199], 1e-12);
    near(&[p[4], p[5], p[8]], &[0.775169086243, -0.077179053687, 0.769758918709], 1e-12);
    let h = nalgebra::DMatrix::from_row_slice(3, 3, &p).try_inverse().unwrap();
    near(h.row(0).transpose().as_slice(), &[1.531846027753, -0.123758447791, -0.408087579962], 1e-11);
    near(&[h[(1, 1)], h[(1, 2)], h[(2, 2)]], &[1.313047557985, 0.163618376370, 1.420922946874], 1e-11);
    near(&[reward.log_det()], &[0.952858419958], 1e-12);

    let eta = 2.3465735902799727;
    assert_eq!(Settings::theory(1.0, 1.0, 3).eta, eta);
    let mut reward = OnePass::new(3, explicit(eta, 2.0)).unwrap();
    let want = [
        [0.369738656127, 0.0, -0.369738656127],
        [0.113689711679, 0.281289349058, -0.394979060738],
        [0.142992705088, 0.685463246296, -0.204653845414],
        [-0.227147956097, 0.761177052471, 0.054386190971],
    ];
    for ((z, y), w) in Z.iter().zip(Y).zip(want) {
        reward.update(z, y).unwrap();
        near(reward.theta(), &w, 1e-12);
    }
    near(&[reward.log_det()], &[2.606650421570], 1e-12);
}

/// T2.
#[test]
fn four_steps_each_of_them_projected() {
    let mut reward = OnePass::new(3, Settings { bound: Some(0.5), ..explicit(1.0, 0.1) }).unwrap();
    let want = [
        [0.353553390593, 0.0, -0.353553390593, 0.221181016370],
        [-0.115213629330, 0.396788719714, -0.281575090384, 0.245948290614],
        [0.044183755059, 0.483508065814, 0.119447670894, 0.232426807236],
        [-0.337433179846, 0.251518510548, 0.269957937448, 0.228598546361],
    ];
    for ((z, y), w) in Z.iter().zip(Y).zip(want) {
        let step = reward.update(z, y).unwrap();
        assert!(step.projected);
        near(reward.theta(), &w[..3], 1e-12);
        near(&[step.weight, step.after], &[w[3], reward.reward(z)], 1e-12);
    }
    assert_eq!((reward.projections(), reward.steps()), (4, 4));
}

/// T3.
#[test]
fn a_projection() {
    let p = project(&host(&[1.0, 0.0, 0.0, 0.25]), &[], &[3.0, 4.0], 2.0).unwrap();
    near(&[p.mu], &[4.336131609380], 1e-10);
    near(&p.theta, &[0.562205024090, 1.919355493620], 1e-12);
    let p = project(&host(&[0.5, 0.2, 0.2, 0.4]), &[], &[1.0, -2.0], 1.0).unwrap();
    near(&p.theta, &[0.529756573774, -0.848149734742], 1e-12);
}

/// T4.
#[test]
fn an_implicit_step() {
    near(&[proximal(0.3, 2.0, 0.0), proximal(0.3, 2.0, 1.0)], &[-0.469479087866, 0.884494534817], 1e-12);
    // P = 2I: q = 2 for a unit z, and θ along it has the margin 0.3.
    for (y, implicit, taylor) in [(0.0, -0.469479087866, -0.471624828134), (1.0, 0.884494534817, 0.871633732212)] {
        for (rule, want) in [(Rule::Implicit, implicit), (Rule::Explicit, taylor)] {
            let mut state = standing(&[0.3, 0.0], &[2.0, 0.0, 0.0, 2.0]).state().unwrap();
            state.settings.rule = rule;
            let step = OnePass::restore(state, None).unwrap().update(&[1.0, 0.0], y).unwrap();
            near(&[step.after, step.uncertainty], &[want, 2.0], 1e-12);
        }
    }
}

/// T5.
#[test]
fn conjugate_gradients_are_conjugate() {
    let a = [[4.0, 1.0, 0.0, 0.0], [1.0, 3.0, 0.5, 0.0], [0.0, 0.5, 2.0, 0.25], [0.0, 0.0, 0.25, 1.0]];
    let times = |x: &[f64], y: &mut [f64]| {
        y.iter_mut().zip(&a).for_each(|(y, row)| *y = dot(row, x));
        Ok(())
    };
    let b = [1.0, 2.0, -1.0, 0.5];
    let (x, residuals) = conjugate_gradients(times, &b, 4, 0.0).unwrap();
    near(&x, &[0.0553846154, 0.7784615385, -0.7815384615, 0.6953846154], 1e-10);
    near(&residuals[..1], &[4.853820e-1], 5e-8);
    near(&residuals[1..2], &[1.330596e-1], 5e-8);
    near(&residuals[2..3], &[4.488335e-2], 5e-9);
    assert!(residuals[3] < 1e-15, "{residuals:?}");

    let (_, defective) = released_gradients(times, &b, 4, 0.0).unwrap();
    near(&defective, &[4.853820e-1, 5.580523e-1, 4.691959e-1, 3.569499e-1], 5e-8);
    let (x, _) = released_gradients(times, &b, 3, 0.0).unwrap();
    near(&x, &[0.1886218036, 1.0157515107, -0.7896600024, 0.4252714288], 1e-10);
    // Right ones never do this.
    assert!(defective[1] > defective[0] && residuals.windows(2).all(|r| r[1] < r[0]));
}

const F: [f64; 12] = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.6, 0.8, 0.0];
const P: [f64; 9] = [0.5, 0.1, 0.0, 0.1, 1.0, 0.0, 0.0, 0.0, 0.2];
const THETA: [f64; 3] = [0.3, 0.2, 0.25];

/// T6.
#[test]
fn uncertainty_of_pairs() {
    let reward = standing(&THETA, &P);
    let m = reward.gram(&F).unwrap();
    let squared = |i: usize, j: usize| m[i * 4 + i] + m[j * 4 + j] - 2.0 * m[i * 4 + j];
    let all = [squared(0, 1), squared(0, 2), squared(0, 3), squared(1, 2), squared(1, 3), squared(2, 3)];
    near(&all, &[1.3, 0.7, 0.656, 1.2, 0.196, 1.116], 1e-12);
    assert_eq!(pair_of(&m, 4), (0, 1));
    near(&[reward.variance(&[1.0, -1.0, 0.0]).unwrap().sqrt()], &[1.140175425], 1e-9);
    // Among equals the first.
    assert_eq!(pair_of(&[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], 3), (0, 1));
    assert_eq!(pair_of(&[1.0], 1), (0, 0));
}

/// T7.
#[test]
fn what_is_shown() {
    let reward = standing(&THETA, &P);
    let mut rng = Rng::new(0);
    let mut show = |beta: f64, second| deploy(&reward, &F, beta, second, &mut rng).unwrap();
    let alone = show(0.0, Second::Optimistic);
    assert_eq!((alone.first, alone.second, alone.bonus), (3, None, 0.0));
    near(&alone.scores, &[0.3, 0.2, 0.25, 0.34], 1e-15);
    for (beta, second, want) in [
        (0.05, 0, [0.3809938269, 0.2442718872, 0.3556409012, 0.34]),
        (0.1, 0, [0.4619876539, 0.2885437745, 0.4612818023, 0.34]),
        (0.5, 2, [1.1099382693, 0.6427188724, 1.3064090117, 0.34]),
    ] {
        let shown = show(beta, Second::Optimistic);
        assert_eq!((shown.first, shown.second), (3, Some(second)));
        near(&shown.scores, &want, 1e-10);
        near(&[shown.bonus], &[shown.scores[second] - reward.reward(&F[second * 3..][..3])], 1e-15);
    }
    for (rule, second) in [
        (Second::Forced, 0),
        (Second::Runnerup, 0),
        (Second::Worst, 1),
        (Second::Rank(2), 0),
        (Second::Rank(3), 2),
        (Second::Rank(9), 1),
        (Second::Quantile(2.0), 0),
        (Second::Quantile(9.0), 0),
    ] {
        let shown = show(0.0, rule);
        assert_eq!((shown.first, shown.second), (3, Some(second)), "{rule:?}");
    }
    let mut seen = [[0; 4]; 3];
    for _ in 0..400 {
        for (rule, seen) in [Second::Quantile(1.3), Second::Random, Second::Pair].into_iter().zip(&mut seen) {
            let shown = show(0.1, rule);
            assert_ne!(Some(shown.first), shown.second);
            seen[shown.second.unwrap()] += 1;
            assert!(shown.first == 3 || rule == Second::Pair);
        }
    }
    // 4 / 1.3 rounds up to all four.
    assert!(seen[0][..3].iter().all(|&n| n > 80) && seen[1][..3].iter().all(|&n| n > 80), "{seen:?}");
    assert!(seen[2].iter().all(|&n| n > 60), "{seen:?}");
}

/// T8.
#[test]
fn pessimism_and_what_it_is_measured_from() {
    let reward = standing(&THETA, &P);
    assert_eq!(pessimistic(&reward, &F, 0.0, false).unwrap().0, 3);
    let (best, bounds) = pessimistic(&reward, &F, 0.2, false).unwrap();
    near(&bounds, &[0.1585786438, 0.0, 0.1605572809, 0.1485842222], 1e-10);
    assert_eq!(best, 2);
    let (best, bounds) = pessimistic(&reward, &F, 0.2, true).unwrap();
    near(&bounds, &[-0.0892904106, -0.1909905059, -0.1538011805, -0.0147192192], 1e-10);
    assert_eq!(best, 3);
    // A constant in every feature changes nothing where it is centred, and can change the winner where it is not.
    let moved: Vec<f64> = F.chunks_exact(3).flat_map(|f| [f[0] + 5.0, f[1], f[2] - 3.0]).collect();
    near(&pessimistic(&reward, &moved, 0.2, true).unwrap().1, &bounds, 1e-12);
}

/// T9.
#[test]
fn a_batch_is_the_dense_formula() {
    let mut s = Stream::new(5);
    let z = s.normals(24);
    let y: Vec<f64> = s.uniforms(4).iter().map(|&u| f64::from(u8::from(u < 0.5))).collect();
    let mut reward = OnePass::new(6, explicit(1.0, 0.7)).unwrap();
    reward.update_batch(&z, &y).unwrap();
    let want = [-0.3150859912, 0.4813680089, -0.1970320555, -0.2909160650, -0.4506459064, 0.2021914077];
    near(reward.theta(), &want, 1e-10);
    assert_eq!((reward.steps(), reward.average()[0]), (4, reward.theta()[0] * 4.0 / 5.0));
}

/// T10.
#[test]
fn a_pool_follows_an_update() {
    let mut s = Stream::new(7);
    let (rows, z) = (s.normals(30), s.normals(6));
    let mut p = vec![0.0; 36];
    p.iter_mut().step_by(7).for_each(|p| *p = 2.0);
    // θ and y at which the step ends where σ' = 0.2.
    let q = 2.0 * dot(&z, &z);
    let margin = (0.5 * (1.0 + 0.2f64.sqrt())).ln() - (0.5 * (1.0 - 0.2f64.sqrt())).ln();
    let theta: Vec<f64> = z.iter().map(|z| z * margin / (0.5 * q)).collect();
    let mut reward = standing(&theta, &p);
    let mut pool = Pool::new(rows.clone(), &reward).unwrap();
    near(pool.variances(), &[10.2967375851, 17.9402625951, 30.5261438387, 6.0000997790, 7.4115028509], 1e-9);
    // A label that is just what was predicted leaves θ alone.
    let step = reward.update(&z, sigmoid(dot(&z, &theta))).unwrap();
    near(&[step.weight, step.after], &[0.2, step.margin], 1e-14);
    pool.observe(&reward).unwrap();
    near(pool.variances(), &[10.0176039876, 14.0871491023, 30.5204204259, 5.8260193552, 7.4086844296], 1e-9);
    near(&reward.variances(&rows).unwrap(), pool.variances(), 1e-12);
}

/// T11.
#[test]
fn the_golden_run() {
    let world = Passive::new(7, 4, 200, 2.0);
    near(&world.theta, &[0.9087451255, -1.7138870699, 0.0036040078, -0.4865803323], 1e-10);
    near(world.z(0), &[0.3720908641, 0.1412881128, -0.0747198923, -0.2765938693], 1e-10);
    assert_eq!(world.y.iter().sum::<f64>(), 93.0);
    let first = [1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0].map(f64::from);
    assert_eq!(world.y[..20], first);

    let mut reward = OnePass::new(4, explicit(1.0, 1.0)).unwrap();
    let (mut loss, mut log_det) = (0.0, 0.0);
    for (t, (z, y)) in world.rounds().enumerate() {
        let step = reward.update(z, y).unwrap();
        loss += log_loss(step.margin, y);
        log_det += (step.weight * step.uncertainty).ln_1p();
        if t + 1 == 10 {
            near(reward.theta(), &[-0.3187427490, -0.8603608263, 0.2361765548, -0.9338586331], 1e-10);
            near(&[world.error(reward.theta())], &[1.5777773602], 1e-10);
        }
    }
    let trace: f64 = reward.state().unwrap().inverse.iter().step_by(5).sum();
    near(&[loss, log_det, reward.log_det()], &[114.0630807886, 11.9863953627, 11.9863953627], 1e-10);
    near(&[trace], &[0.2036596872], 1e-10);

    let slow = 0.5 * std::f64::consts::LN_2 + 3.0;
    for (settings, theta, error) in [
        (explicit(1.0, 1.0), [0.5067385371, -1.5693237837, -0.2301145305, -0.3036478461], 0.5201888988),
        (explicit(slow, 1.0), [0.4647997501, -2.2707769232, -0.5261116204, -0.3589856450], 0.8967122482),
        (settings(Rule::Implicit, 1.0, 1.0), [0.5046450551, -1.5808017969, -0.2325193113, -0.3066120497], 0.5187979967),
    ] {
        let mut reward = OnePass::new(4, settings).unwrap();
        world.rounds().for_each(|(z, y)| _ = reward.update(z, y).unwrap());
        near(reward.theta(), &theta, 1e-10);
        near(&[world.error(reward.theta())], &[error], 1e-10);
    }
    let mut mle = Mle::new(4, 1.0, None).unwrap();
    world.rounds().for_each(|(z, y)| mle.push(z, y).unwrap());
    mle.fit(false).unwrap();
    near(mle.theta(), &[0.5233941515, -1.6496916515, -0.2419019896, -0.3141721963], 1e-10);
    near(&[world.error(mle.theta())], &[0.4925588138], 1e-10);
}

/// The table of section 2.3.
#[test]
fn the_settings_and_the_radius_of_lemma_1() {
    for (bound, d, eta, lambda, hundred, ten_thousand) in [
        (1.0, 8, 2.3465735903, 2508.828485, 127.424223, 157.511910),
        (3.0, 8, 4.3465735903, 5679.812589, 466.017536, 483.203553),
        (1.0, 576, 2.3465735903, 160843.781731, 805.961716, 811.159451),
        (1.0, 4096, 2.3465735903, 1142074.477906, 2138.807387, 2140.770674),
    ] {
        let s = Settings::theory(bound, 1.0, d);
        s.validate().unwrap();
        assert_eq!((s.rule, s.bound), (Rule::Explicit, Some(bound)));
        near(&[s.eta], &[eta], 1e-10);
        near(&[s.lambda], &[lambda], 1e-6);
        let radius = |t| radius_theory(&s, 1.0, bound, d, t, 0.05);
        near(&[radius(100), radius(10_000)], &[hundred, ten_thousand], 1e-6);
    }
}

#[test]
fn quantiles_of_chi_square() {
    // Tables: NIST/SEMATECH e-Handbook, section 1.3.6.7.4.
    for (d, p, want) in [
        (1, 0.95, 3.841),
        (2, 0.95, 5.991),
        (8, 0.95, 15.507),
        (10, 0.99, 23.209),
        (100, 0.95, 124.342),
        (100, 0.025, 74.222),
    ] {
        near(&[chi_square_quantile(d, p).unwrap()], &[want], 5.1e-4);
    }
    // Two degrees of freedom are an exponential.
    near(&[chi_square_quantile(2, 0.9).unwrap()], &[-2.0 * 0.1f64.ln()], 1e-12);
    // Wilson & Hilferty's cube is good to 1e-4 in high dimensions.
    for d in [576, 4096] {
        let (n, z) = (d as f64, 1.6448536269514722);
        let cube = n * (1.0 - 2.0 / (9.0 * n) + z * (2.0 / (9.0 * n)).sqrt()).powi(3);
        assert!((chi_square_quantile(d, 0.95).unwrap() / cube - 1.0).abs() < 1e-4);
    }
    near(&[radius_calibrated(1.0, 8, 0.0, 0.0, 0.05)], &[3.938], 5e-4);
    let half = radius_calibrated(0.5, 8, 4.0, 3.0, 0.05);
    near(&[half], &[0.5 * 3.938 + 6.0], 5e-4);
    let reward = standing(&THETA, &P);
    for (beta0, d, lambda, prior, delta) in [
        (-1.0, 8, 1.0, 1.0, 0.1),
        (1.0, 0, 1.0, 1.0, 0.1),
        (1.0, 8, -1.0, 1.0, 0.1),
        (1.0, 8, 1.0, -1.0, 0.1),
        (1.0, 8, 1.0, 1.0, 1.0),
    ] {
        let beta = radius_calibrated(beta0, d, lambda, prior, delta);
        assert!(beta.is_nan() && pessimistic(&reward, &F, beta, true).is_err());
    }
}
