//! The mathematics of online learning against the figures of its specification, and its bounds over random streams.

use quadriga::online::acceptance::*;
use quadriga::online::*;
use quadriga::rng::Rng;

#[track_caller]
fn near(got: &[f64], want: &[f64], bound: f64) {
    let ok = got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() <= bound);
    assert!(ok, "{got:?}, not {want:?}");
}

const HEDGE: Rule = Rule::Hedge { epsilon: 1.0 };
const RULES: [Rule; 4] =
    [HEDGE, Rule::FixedShare { epsilon: 1.0, lambda: 0.1 }, Rule::AdaptMlProd, Rule::LastLoss { temperature: 0.2 }];
const LOSSES: [[f64; 3]; 3] = [[0.9, 0.5, 0.1], [0.8, 0.4, 0.2], [0.1, 0.5, 0.9]];

/// Weights before each round and after the last.
fn weights(rule: Rule, losses: &[impl AsRef<[f64]>]) -> (Vec<Vec<f64>>, Meta) {
    let mut meta = Meta::new(rule, losses[0].as_ref().len()).unwrap();
    let mut all = vec![meta.weights()];
    for l in losses {
        meta.observe(l.as_ref()).unwrap();
        all.push(meta.weights());
    }
    (all, meta)
}

#[test]
fn meta_weights_of_three_experts() {
    let third = [1.0 / 3.0; 3];
    let (w, hedge) = weights(HEDGE, &LOSSES);
    near(&w[0], &third, 1e-15);
    near(&w[1], &[0.211983, 0.316241, 0.471776], 5e-7);
    near(&w[2], &[0.137349, 0.305675, 0.556976], 5e-7);
    near(&w[3], &[0.231806, 0.345815, 0.422379], 5e-7);
    near(&[hedge.mixture_loss(), hedge.best_loss(), hedge.regret()], &[1.558289, 1.2, 0.358289], 5e-7);
    assert_eq!(hedge.best(), 2);

    let (w, share) = weights(RULES[1], &LOSSES);
    near(&w[1], &[0.224118, 0.317950, 0.457932], 5e-7);
    near(&w[2], &[0.164922, 0.311830, 0.523248], 5e-7);
    near(&w[3], &[0.277037, 0.342209, 0.380754], 5e-7);
    near(&[share.mixture_loss()], &[1.541391], 5e-7);

    let (w, prod) = weights(Rule::AdaptMlProd, &LOSSES);
    near(&w[0], &third, 1e-15);
    near(&w[1], &[0.266667, 0.333333, 0.4], 5e-7);
    near(&w[2], &[0.216889, 0.337778, 0.445333], 5e-7);
    near(&[prod.mixture_loss()], &[1.518044], 5e-7);
}

#[test]
fn weight_ratios_of_a_gap() {
    for (rule, want) in [
        (Rule::Hedge { epsilon: 10.0 }, 0.606531),
        (Rule::LastLoss { temperature: 1.2 }, 0.959189),
        (Rule::LastLoss { temperature: 0.2 }, 0.778801),
    ] {
        let (w, _) = weights(rule, &[[0.35, 0.3]]);
        near(&[w[1][0] / w[1][1]], &[want], 5e-7);
    }
    // The last losses alone: what came before is forgotten.
    let (w, _) = weights(RULES[3], &LOSSES);
    assert_eq!(w[3], weights(RULES[3], &LOSSES[2..]).0[1]);
}

fn uniform(rng: &mut Rng) -> f64 {
    f64::from(rng.uniform())
}

/// Rounds of losses of different kinds: noise, 0 or 1, experts that change places, and experts that differ a little.
fn stream(rng: &mut Rng, n: usize, rounds: usize) -> Vec<Vec<f64>> {
    let kind = (uniform(rng) * 4.0) as usize;
    let means: Vec<f64> = (0..n).map(|_| uniform(rng)).collect();
    let loss = |t: usize, i: usize, u: f64| match kind {
        0 => u,
        1 => f64::from(u < means[i]),
        2 => means[(i + t * 4 / rounds) % n],
        _ => 0.5 + 0.1 * (u - means[i]),
    };
    (0..rounds).map(|t| (0..n).map(|i| loss(t, i, uniform(rng))).collect()).collect()
}

#[test]
fn weights_are_a_distribution_that_ignores_constants_and_names() {
    let mut rng = Rng::new(1);
    for _ in 0..50 {
        let n = 2 + (uniform(&mut rng) * 4.0) as usize;
        let losses = stream(&mut rng, n, 60);
        for rule in RULES {
            let (w, _) = weights(rule, &losses);
            assert!(w.iter().flatten().all(|p| *p >= 0.0), "{rule:?}: {w:?}");
            assert!(w.iter().all(|w| (w.iter().sum::<f64>() - 1.0).abs() < 1e-12), "{rule:?}: {w:?}");
            let half: Vec<Vec<f64>> = losses.iter().map(|l| l.iter().map(|x| 0.5 * x).collect()).collect();
            let moved: Vec<Vec<f64>> = half.iter().map(|l| l.iter().map(|x| x + 0.375).collect()).collect();
            let turned: Vec<Vec<f64>> = losses.iter().map(|l| l.iter().rev().copied().collect()).collect();
            let ((a, _), (b, _), (c, _)) = (weights(rule, &half), weights(rule, &moved), weights(rule, &turned));
            for t in 0..w.len() {
                near(&a[t], &b[t], 1e-12);
                near(&w[t], &c[t].iter().rev().copied().collect::<Vec<_>>(), 1e-12);
            }
        }
    }
}

#[test]
fn regret_stays_within_its_bound() {
    let (n, rounds, mut worst) = (3, 100, f64::NEG_INFINITY);
    let tuned = Rule::Hedge { epsilon: tuned_epsilon(n, rounds as u64) };
    let mut rng = Rng::new(2);
    for trial in 0..2000 {
        let losses = stream(&mut rng, n, rounds);
        let (_, meta) = weights(tuned, &losses);
        near(&[meta.bound().unwrap()], &[7.41], 5e-3);
        near(&[meta.bound().unwrap()], &[(rounds as f64 * (n as f64).ln() / 2.0).sqrt()], 1e-12);
        worst = worst.max(meta.regret());
        if trial % 20 == 0 {
            for rule in [HEDGE, RULES[1], Rule::AdaptMlProd] {
                let (_, meta) = weights(rule, &losses);
                assert!(meta.regret() <= meta.bound().unwrap(), "{rule:?}: regret {}", meta.regret());
            }
        }
    }
    assert!(worst > 2.5 && worst <= 7.41, "worst regret {worst}");
    // The loss on whoever has the greatest weight now: what no random stream is.
    for rule in [tuned, HEDGE, RULES[1], Rule::AdaptMlProd] {
        let mut meta = Meta::new(rule, n).unwrap();
        for _ in 0..rounds {
            let best = meta.best();
            meta.observe(&std::array::from_fn::<_, 3, _>(|i| f64::from(i == best))).unwrap();
        }
        let (regret, bound) = (meta.regret(), meta.bound().unwrap());
        assert!(regret > 1.0 && regret <= bound, "{rule:?}: regret {regret}, bound {bound}");
    }
    assert_eq!(Meta::new(RULES[3], n).unwrap().bound(), None);
}

/// After a shift a share of the weights is there to grow; exponential weights must first unlearn.
#[test]
fn a_share_lets_a_recovered_expert_return() {
    let losses: Vec<[f64; 2]> = (0..100).map(|t| if t < 80 { [0.0, 1.0] } else { [1.0, 0.0] }).collect();
    let ((hedge, _), (share, _)) = (weights(HEDGE, &losses), weights(RULES[1], &losses));
    assert!(hedge[100][1] < 1e-6 && share[100][1] > 0.9);
}

#[test]
fn losses_are_clipped_and_states_saved() {
    for rule in RULES {
        let (_, mut meta) = weights(rule, &[[0.9, 0.5, 0.1]]);
        let mut clipped = meta.clone();
        meta.observe(&[f64::NAN, -3.0, f64::INFINITY]).unwrap();
        clipped.observe(&[1.0, 0.0, 1.0]).unwrap();
        assert_eq!(meta, clipped);
        assert!(meta.observe(&[0.0; 2]).is_err());
        let saved: Meta = serde_json::from_str(&serde_json::to_string(&meta).unwrap()).unwrap();
        saved.validate().unwrap();
        assert_eq!(saved, meta);
        let damaged = serde_json::to_string(&meta).unwrap().replace("\"rounds\":2", "\"rounds\":0");
        assert!(serde_json::from_str::<Meta>(&damaged).unwrap().validate().is_err());
        // Very long runs stay in the numbers, also of one expert.
        let (mut long, mut alone) = (Meta::new(rule, 2).unwrap(), Meta::new(rule, 1).unwrap());
        for _ in 0..5000 {
            long.observe(&[1.0, 0.0]).unwrap();
            alone.observe(&[0.7]).unwrap();
        }
        assert!(long.weights()[1] > 0.89 && long.weights()[0].is_finite(), "{rule:?}: {:?}", long.weights());
        assert_eq!((alone.weights(), alone.regret()), (vec![1.0], 0.0));
        long.validate().unwrap();
    }
    assert!(Meta::new(HEDGE, 0).is_err());
    for rule in [
        Rule::Hedge { epsilon: -1.0 },
        Rule::Hedge { epsilon: f64::NAN },
        Rule::FixedShare { epsilon: 1.0, lambda: 1.5 },
        Rule::LastLoss { temperature: 0.0 },
    ] {
        assert!(Meta::new(rule, 2).is_err(), "{rule:?}");
    }
}

const ADAM: [f64; 3] = [0.9, 0.95, 1e-8];

fn adamw() -> Method {
    let [beta1, beta2, eps] = ADAM;
    Method::AdamW { beta1, beta2, eps }
}

fn optimistic_adam() -> Method {
    let [beta1, beta2, eps] = ADAM;
    Method::OptimisticAdam { beta1, beta2, eps }
}

/// What is played before each of `targets` and after the last, the anchors, and the total loss of (w - c)² / 2.
fn run(settings: Settings, targets: impl IntoIterator<Item = f64>) -> (Vec<f64>, Vec<f64>, f64) {
    let (mut w, mut total) = ([0.0], 0.0);
    let mut opt = Optimizer::new(settings, &w).unwrap();
    let (mut played, mut anchors) = (vec![0.0], opt.anchor().to_vec());
    for c in targets {
        total += 0.5 * (w[0] - c) * (w[0] - c);
        let g = [w[0] - c];
        opt.step(&mut w, &g).unwrap();
        played.push(w[0]);
        anchors.extend(opt.anchor());
    }
    (played, anchors, total)
}

fn plain(method: Method) -> Settings {
    Settings::new(method, 0.1)
}

#[test]
fn optimisers_on_a_parabola() {
    let ones = || std::iter::repeat_n(1.0, 5);
    let ball = Method::HeavyBall { mu: 0.9 };
    near(&run(plain(Method::Ogd), ones()).0, &[0.0, 0.1, 0.19, 0.271, 0.3439, 0.40951], 1e-12);
    let (played, anchors, _) = run(plain(Method::Optimistic), std::iter::repeat_n(1.0, 6));
    near(&played[..6], &[0.0, 0.2, 0.26, 0.328, 0.3884, 0.44352], 1e-12);
    near(&anchors, &[0.0, 0.1, 0.18, 0.254, 0.3212, 0.38236, 0.438008], 1e-12);
    near(&run(plain(ball), ones()).0, &[0.0, 0.1, 0.28, 0.514, 0.7732, 1.02916], 1e-12);
    let decayed = Settings { decay: 0.01, ..plain(adamw()) };
    near(&run(decayed, ones()).0[1..5], &[0.1, 0.199619, 0.298612, 0.396671], 5e-7);
    // The one-step form, from gradients alone.
    let (mut w, mut last) = (0.0, 0.0);
    for want in &played[1..] {
        let g: f64 = w - 1.0;
        w += -0.2 * g + 0.1 * last;
        last = g;
        near(&[w], &[*want], 1e-12);
    }
}

/// The same traces from the rules that train models.
#[test]
fn the_trainers_rules_agree() {
    use quadriga::backend::naive::Naive;
    use quadriga::backend::{Backend, Step, Train, Update};
    let (beta1, beta2, eps) = (0.9, 0.95, 1e-8);
    for (method, rule) in [
        (Method::Ogd, Update::Sgd),
        (Method::Optimistic, Update::Optimistic),
        (Method::HeavyBall { mu: 0.9 }, Update::Momentum { mu: 0.9 }),
        (adamw(), Update::AdamW { beta1, beta2, eps }),
        (optimistic_adam(), Update::OptimisticAdam { beta1, beta2, eps }),
    ] {
        let settings = Settings { decay: 0.01, ..plain(method) };
        let mut w = [0.0, -0.5, 2.0];
        let (mut other, n) = (w, w.len());
        let mut opt = Optimizer::new(settings, &w).unwrap();
        let mut states: Vec<_> = (0..rule.states()).map(|_| Naive.alloc(n).unwrap()).collect();
        if let Some(anchor) = rule.anchor() {
            states[anchor].copy_from_slice(&w);
        }
        for number in 1..=20 {
            let c = [1.0, (number as f64).sin(), 0.1 * number as f64];
            let gradient = |w: &[f64; 3]| std::array::from_fn::<f64, 3, _>(|i| w[i] - c[i]);
            let (mine, theirs) = (gradient(&w), gradient(&other));
            opt.step(&mut w, &mine).unwrap();
            let step = Step { rule, lr: 0.1, decay: 0.01, scale: 1.0, number, l1: 0.0 };
            Naive.optimize(&mut other, &theirs, &mut states, None, &step).unwrap();
            // Its constants are f32.
            near(&w, &other, 2e-6);
        }
    }
}

fn alternating() -> impl Iterator<Item = f64> {
    (0..40).map(|t| if t % 2 == 0 { 1.0 } else { -1.0 })
}

fn drift() -> impl Iterator<Item = f64> {
    (0..40).map(|t| 0.05 * f64::from(t))
}

#[test]
fn optimisers_on_streams_that_move() {
    let ball = Method::HeavyBall { mu: 0.9 };
    for (method, [back_and_forth, on]) in
        [(Method::Ogd, [22.1392, 3.1947]), (Method::Optimistic, [27.4981, 3.0271]), (ball, [21.1631, 0.1195])]
    {
        let (a, d) = (run(plain(method), alternating()).2, run(plain(method), drift()).2);
        near(&[a, d], &[back_and_forth, on], 5e-5);
    }
}

#[test]
fn a_gauge_drops_hints_that_are_worse_than_none() {
    let gauged = |method| Settings { gauge: Some(HintGauge::new(0.9)), ..plain(method) };
    for method in [Method::Optimistic, optimistic_adam()] {
        let (doubted, trusted) = (run(gauged(method), alternating()).2, run(plain(method), alternating()).2);
        assert!(doubted < trusted, "{method:?}: {doubted}, {trusted}");
    }
    // Little is left of what the hints cost, and nothing lost of what they give.
    let optimistic = |targets: &mut dyn Iterator<Item = f64>| run(gauged(Method::Optimistic), targets).2;
    near(&[optimistic(&mut alternating())], &[22.1392], 0.2);
    near(&[optimistic(&mut drift())], &[3.0271], 1e-3);

    let mut gauge = HintGauge::new(0.5);
    assert!(gauge.trusted() && gauge.ratio() == 0.0);
    gauge.observe(&[3.0, 0.0], &[3.0, 4.0]);
    near(&[gauge.ratio(), gauge.delta()], &[0.8, 16.0], 1e-15);
    gauge.observe(&[3.0, 4.0], &[0.0, 0.0]);
    near(&[gauge.ratio(), gauge.delta()], &[7.0 / 2.5, 41.0], 1e-15);
    assert!(!gauge.trusted());
}

#[test]
fn a_hint_of_nothing_and_no_momentum_are_plain_descent() {
    let ogd = run(plain(Method::Ogd), drift()).0;
    assert_eq!(run(plain(Method::HeavyBall { mu: 0.0 }), drift()).0, ogd);
    // A hint that is taken back before each round.
    let gauged = Settings { gauge: Some(HintGauge::new(0.9)), ..plain(Method::Optimistic) };
    let (mut w, mut opt) = ([0.0], Optimizer::new(gauged, &[0.0]).unwrap());
    for (c, want) in drift().zip(&ogd[1..]) {
        let g = [w[0] - c];
        opt.step(&mut w, &g).unwrap();
        w = [opt.anchor()[0]];
        opt.restart_hint(&w);
        assert_eq!(w[0], *want);
    }
    assert_eq!(opt.gauge().unwrap().delta(), 0.0, "nothing was guessed");
}

/// Experts of rates `lrs` on (w - c)² / 2, deployed as their average: what is played in each round.
fn ensemble(rule: Rule, lrs: &[f64], targets: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut meta = Meta::new(rule, lrs.len()).unwrap();
    let mut experts = vec![[0.0]; lrs.len()];
    let mut opts: Vec<_> =
        lrs.iter().map(|&lr| Optimizer::new(Settings::new(Method::Ogd, lr), &[0.0]).unwrap()).collect();
    let mut played = Vec::new();
    for c in targets {
        let p = meta.weights();
        let deployed = average(&p, &experts.iter().map(|e| &e[..]).collect::<Vec<_>>())[0];
        let loss = |w: f64| 0.5 * (w - c) * (w - c);
        let losses: Vec<f64> = experts.iter().map(|e| loss(e[0])).collect();
        // Jensen: what carries Hedge's bound over to the average.
        assert!(loss(deployed) <= p.iter().zip(&losses).map(|(p, l)| p * l).sum::<f64>() + 1e-15);
        played.push(deployed);
        meta.observe(&losses).unwrap();
        for (opt, w) in opts.iter_mut().zip(&mut experts) {
            let g = [w[0] - c];
            opt.step(w, &g).unwrap();
        }
    }
    assert!(meta.bound().is_none_or(|bound| meta.regret() <= bound));
    played
}

#[test]
fn an_ensemble_of_one_or_of_equals_is_plain_descent() {
    let ogd = run(plain(Method::Ogd), drift()).0;
    for rule in RULES {
        assert_eq!(ensemble(rule, &[0.1], drift()), ogd[..40]);
    }
    for epsilon in [0.2, 1.0, 10.0] {
        near(&ensemble(Rule::Hedge { epsilon }, &[0.1; 3], drift()), &ogd[..40], 1e-12);
    }
    // Of different rates it follows the one that keeps up.
    let total = |w: &[f64]| w.iter().zip(drift()).map(|(w, c)| 0.5 * (w - c) * (w - c)).sum::<f64>();
    let mixed = ensemble(Rule::Hedge { epsilon: 10.0 }, &[0.025, 0.1, 0.4], drift());
    assert!(total(&mixed) < 0.5 * total(&ogd));
}

#[test]
fn a_ball_confines_and_nothing_moves_for_free() {
    let ball = Ball { centre: vec![1.0, 1.0], radius: 1.0 };
    let mut w = [4.0, 5.0];
    ball.project(&mut w);
    near(&w, &[1.6, 1.8], 1e-15);
    let inside = w.map(|x| 0.5 * (x + 1.0));
    let mut same = inside;
    ball.project(&mut same);
    assert_eq!(same, inside);
    for method in [Method::Ogd, Method::Optimistic, Method::HeavyBall { mu: 0.9 }, adamw(), optimistic_adam()] {
        let settings = Settings { ball: Some(ball.clone()), lr: 0.9, ..plain(method) };
        let (mut w, mut opt) = ([1.0, 1.0], Optimizer::new(settings, &[1.0, 1.0]).unwrap());
        for t in 0..20 {
            opt.step(&mut w, &[-3.0, f64::from(t % 3) - 1.0]).unwrap();
            let far = |w: &[f64]| (w[0] - 1.0).hypot(w[1] - 1.0);
            assert!(far(&w) <= 1.0 + 1e-12 && opt.anchor().chunks(2).all(|a| far(a) <= 1.0 + 1e-12));
        }
        // A rate of 0 leaves weights to the bit; a gradient that is none leaves weights and states.
        let (mut w, mut opt) = ([0.1, -0.7], Optimizer::new(Settings::new(method, 0.0), &[0.1, -0.7]).unwrap());
        opt.step(&mut w, &[0.3, 1e9]).unwrap();
        assert_eq!(w.map(f64::to_bits), [0.1, -0.7].map(f64::to_bits));
        let before = opt.clone();
        assert!(opt.step(&mut w, &[f64::NAN, 0.0]).is_err() && opt.step(&mut w, &[0.0]).is_err());
        assert_eq!((w, &opt), ([0.1, -0.7], &before));
        // States come back from where they were saved, and go on to the same bits.
        let mut saved: Optimizer = serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap();
        let mut other = w;
        saved.step(&mut other, &[0.5, 0.25]).unwrap();
        opt.step(&mut w, &[0.5, 0.25]).unwrap();
        assert_eq!((w, opt), (other, saved));
    }
    for bad in [
        Settings::new(Method::Ogd, f64::NAN),
        plain(Method::HeavyBall { mu: 1.0 }),
        Settings { ball: Some(Ball { centre: vec![0.0], radius: 1.0 }), ..plain(Method::Ogd) },
        Settings { gauge: Some(HintGauge::new(1.0)), ..plain(Method::Optimistic) },
    ] {
        assert!(Optimizer::new(bad, &[0.0; 2]).is_err());
    }
}

#[test]
fn tokens_a_round() {
    for (acc, want) in [
        (0.5, [1.5, 1.75, 1.875, 1.9375, 1.9688, 1.9922]),
        (0.7, [1.7, 2.19, 2.533, 2.7731, 2.9412, 3.1412]),
        (0.8, [1.8, 2.44, 2.952, 3.3616, 3.6893, 4.1611]),
        (0.9, [1.9, 2.71, 3.439, 4.0951, 4.6856, 5.6953]),
    ] {
        near(&[1, 2, 3, 4, 5, 7].map(|k| tokens_per_round(acc, k)), &want, 5.1e-5);
        let closed = |k: i32| (1.0 - f64::powi(acc, k + 1)) / (1.0 - acc);
        near(&[0, 3, 40].map(|k| tokens_per_round(acc, k as usize)), &[0, 3, 40].map(closed), 1e-12);
    }
    assert_eq!([0, 1, 8].map(|k| tokens_per_round(1.0, k)), [1.0, 2.0, 9.0]);
    assert_eq!([0, 1, 8].map(|k| tokens_per_round(0.0, k)), [1.0; 3]);
}

#[test]
fn the_best_chain() {
    for (alpha, want) in [
        (0.02, [(4, 1.794), (8, 2.758), (11, 3.817), (19, 6.365)]),
        (0.05, [(3, 1.630), (6, 2.353), (8, 3.092), (13, 4.674)]),
        (0.10, [(2, 1.458), (4, 1.981), (6, 2.470), (10, 3.431)]),
        (0.20, [(1, 1.250), (3, 1.583), (4, 1.868), (7, 2.373)]),
    ] {
        for (acc, (k, gain)) in [0.5, 0.7, 0.8, 0.9].into_iter().zip(want) {
            let (best, got) = best_chain(acc, alpha, 64);
            assert_eq!(best, k, "alpha {alpha}, acc {acc}");
            near(&[got, speed_up(acc, k, alpha)], &[gain, gain], 5.1e-4);
        }
    }
    assert_eq!(best_chain(0.5, 0.6, 64), (0, 1.0));
    assert_eq!(best_chain(1.0, 0.1, 7).0, 7);
    assert_eq!(best_chain(0.99, 0.0, 5).0, 5);
}

#[test]
fn distances_of_distributions() {
    let (p, q) = ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3]);
    near(&[total_variation(&p, &q), kl(&p, &q)], &[0.3, 0.223805], 5e-7);
    assert_eq!(kl(&[0.0, 1.0], &[0.5, 0.5]), 2f64.ln());
    assert_eq!(kl(&[0.5, 0.5], &[0.0, 1.0]), f64::INFINITY);
    assert_eq!((pinsker(0.0), pinsker(f64::INFINITY)), (0.0, 1.0));
    let mut rng = Rng::new(3);
    for _ in 0..500 {
        let mut draw = || {
            let x: [f64; 5] = std::array::from_fn(|_| uniform(&mut rng).powi(4) + 1e-6);
            x.map(|v| v / x.iter().sum::<f64>())
        };
        let (p, q) = (draw(), draw());
        assert!(total_variation(&p, &q) <= pinsker(kl(&p, &q)) + 1e-12);
    }
}

#[test]
fn bounds_on_tokens() {
    near(&[tokens_per_round(0.7, 5), tokens_bound(0.3, 5)], &[2.9412, 2.1429], 5.1e-5);
    near(&[speed_up_bound(0.3, 5, 0.1)], &[2.142857 / 1.5], 1e-6);
    assert_eq!((tokens_bound(0.0, 5), tokens_bound(1.0, 5)), (6.0, 6.0 / 7.0));
    let mut rng = Rng::new(4);
    for _ in 0..200 {
        // Rounds that differ, and a simulation of them.
        let k = (uniform(&mut rng) * 12.0) as usize;
        let tvs: Vec<f64> = (0..400).map(|_| uniform(&mut rng)).collect();
        let mean = tvs.iter().sum::<f64>() / 400.0;
        let exact = tvs.iter().map(|tv| tokens_per_round(1.0 - tv, k)).sum::<f64>() / 400.0;
        assert!(exact >= tokens_bound(mean, k));
        let accepted = |tv: &f64| (0..k).take_while(|_| f64::from(rng.uniform()) >= *tv).count() + 1;
        let simulated = tvs.iter().map(accepted).sum::<usize>() as f64 / 400.0;
        assert!(simulated >= tokens_bound(mean, k), "{simulated} tokens, k {k}, tv {mean}");
    }
    // From the regret: 100 rounds of KL .02 each, half of it the comparators'.
    near(&[tv_from_regret(1.0, 1.0, 100), tv_from_regret(-1.0, 0.0, 100)], &[0.1, 0.0], 1e-15);
    assert_eq!(break_even(8.0, 16, 2.0), 1.25);
}
