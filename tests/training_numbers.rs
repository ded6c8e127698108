//! The specification of training against numbers that were worked out by hand or elsewhere.

use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Step, Target, Train, TreeMask, Update, Visible, Write};
use quadriga::model::config::Activation;

#[track_caller]
fn close(got: &[f64], want: &[f64]) {
    let near = got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(near, "{got:?}, not {want:?}");
}

/// Loss and gradient of one row.
fn loss(z: &[f64], target: &Target<'_, Naive>) -> (f64, Vec<f64>) {
    let (mut l, mut z) = ([0.0], z.to_vec());
    Naive.loss_rows(&mut l, &mut z, target, &[1.0]).unwrap();
    (l[0], z)
}

#[test]
fn losses_against_a_distribution() {
    let (z, p): (_, &[f64]) = ([0.3, -0.2, 1.0, 0.1], &[0.4, 0.3, 0.2, 0.1]);
    let cross = [-0.174725, -0.163364, 0.253649, 0.084440];
    close(&loss(&z, &Target::Soft(p)).1, &cross);
    close(&loss(&z, &Target::ForwardKl(p)).1, &cross);
    close(&loss(&z, &Target::TotalVariation(p)).1, &[-0.143746, -0.087186, 0.164181, 0.066751]);
    close(&loss(&z, &Target::ReverseKl(p)).1, &[-0.185129, -0.141297, 0.259196, 0.067229]);
    // KL is cross entropy less the entropy of p, and of one token's it is what Hard is.
    let entropy: f64 = p.iter().map(|p| -p * f64::ln(*p)).sum();
    let kl = loss(&z, &Target::ForwardKl(p)).0;
    close(&[loss(&z, &Target::Soft(p)).0 - entropy], &[kl]);
    let one: &[f64] = &[0.0, 0.0, 1.0, 0.0];
    let (hard, soft) = (loss(&z, &Target::Hard(&[2])), loss(&z, &Target::Soft(one)));
    assert_eq!(hard, soft);
    close(&[hard.0], &[z.iter().map(|z| z.exp()).sum::<f64>().ln() - 1.0]);
}

#[test]
fn losses_of_the_likeliest_and_the_rest() {
    let (p, q) = ([0.4f32, 0.25, 0.15, 0.1, 0.06, 0.04], [0.3, 0.3, 0.1, 0.15, 0.05, 0.1]);
    let z = q.map(f64::ln);
    let top = |k: usize, tail| loss(&z, &Target::TopK { ids: &[0, 1, 2, 3, 4, 5][..k], p: &p[..k], k, tail });
    let (two, three) = (top(2, true), top(3, true));
    close(&[two.0, three.0], &[1.103284, 1.368765]);
    close(&two.1, &[-0.1, 0.05, 0.0125, 0.01875, 0.00625, 0.0125]);
    close(&three.1, &[-0.1, 0.05, -0.05, 0.05, 0.016667, 0.033333]);
    close(&top(3, false).1, &[-0.16, -0.01, -0.07, 0.12, 0.04, 0.08]);
    // As divergences: less the entropy of what is kept and the rest.
    let kl: Vec<f64> = (1..=6)
        .map(|k| {
            let kept: Vec<f64> = p[..k].iter().map(|&p| p.into()).collect();
            let rest = 1.0 - kept.iter().sum::<f64>();
            let tail = if k < 6 { rest * rest.ln() } else { 0.0 };
            top(k, true).0 + tail + kept.iter().map(|p| p * p.ln()).sum::<f64>()
        })
        .collect();
    close(&kl, &[0.022582, 0.022756, 0.049219, 0.049219, 0.064053, 0.064053]);
}

/// The rest is so unlikely that its probability is taken for more than it is: a constant.
#[test]
fn an_impossible_rest_has_no_gradient() {
    let z = [30.0, 28.0, 0.0, 1.0];
    let target = |tail| Target::TopK { ids: &[0, 1], p: &[0.5, 0.3], k: 2, tail };
    let ((value, grad), (least, without)) = (loss(&z, &target(true)), loss(&z, &target(false)));
    close(&[value - least], &[-0.2 * 1e-8f64.ln()]);
    close(&grad, &without);
}

#[test]
fn entropy_of_a_right_answer() {
    // Two of three tokens, as likely as each other.
    let z = [1.0, 1.0, -1e4];
    let entropy = |label| loss(&z, &Target::Entropy { tau: 0.5, labels: &[label] });
    close(&[entropy(0).0, entropy(1).0], &[2f64.ln(), 0.0]);
    close(&entropy(0).1, &[0.0; 3]);
    // p = 3/4, 1/4 at temperature 2.
    let z = [2.0 * 3f64.ln(), 0.0];
    let (h, grad) = loss(&z, &Target::Entropy { tau: 2.0, labels: &[0] });
    let ln3 = 3f64.ln();
    close(&[h], &[4f64.ln() - 0.75 * ln3]);
    close(&grad, &[-3.0 / 32.0 * ln3, 3.0 / 32.0 * ln3]);
}

#[test]
fn norms_and_gates() {
    let (x, g, dy) = ([1.0, 2.0, -1.0, 0.5], [1.0f32, 0.5, 2.0, 1.0], [0.1, -0.2, 0.3, 0.4]);
    let mut w = Naive.alloc(4).unwrap();
    Naive.upload_acc(&mut w, &g).unwrap();
    let (mut dx, mut dw) = ([0.0; 4], [0.0; 4]);
    Naive.rms_norm_bwd(&mut dx, Some(&mut dw), &dy, &x, &w, 1e-5, Write::Set).unwrap();
    close(&dx, &[0.143999, 0.047999, 0.415999, 0.351999]);
    close(&dw, &std::array::from_fn::<_, 4, _>(|i| dy[i] * x[i] * 0.799997));

    let (mut dgate, mut dup, mut z) = ([0.0], [0.0], [0.0]);
    Naive.glu(&mut z, &[0.5], &[-1.5], Activation::Silu).unwrap();
    Naive.glu_bwd(&mut dgate, &mut dup, &[1.0], &[0.5], &[-1.5], Activation::Silu).unwrap();
    close(&[z[0], dgate[0], dup[0]], &[-0.466844, -1.109942, 0.311230]);
}

#[test]
fn smooth_l1_of_distances() {
    let (mut loss, mut dx) = ([0.0; 3], [0.0; 3]);
    Naive.smooth_l1(&mut loss, &mut dx, &[0.5, 2.0, -1.0], &[0.0, 1.0, 1.0], &[1.0, 0.5, 1.0]).unwrap();
    close(&loss, &[0.125, 0.5, 1.5]);
    close(&dx, &[0.5, 0.5, -1.0]);
    // A mean over the row, on either side of 1.
    let (mut loss, mut dx) = ([0.0], [0.0; 2]);
    Naive.smooth_l1(&mut loss, &mut dx, &[0.5, 2.0], &[0.0, 0.0], &[2.0]).unwrap();
    close(&loss, &[(0.125 + 1.5) / 2.0]);
    close(&dx, &[0.5, 1.0]);
}

/// w and, where there is one, the first state after each of `steps` steps on (w - 1)^2 / 2 from 0.
fn trace(rule: Update, decay: f32, steps: u64) -> (Vec<f64>, Vec<f64>) {
    let mut states: Vec<_> = (0..rule.states()).map(|_| Naive.alloc(1).unwrap()).collect();
    let mut w = [0.0];
    let (mut played, mut kept) = (Vec::new(), Vec::new());
    for number in 1..=steps {
        let step = Step { rule, lr: 0.1, decay, scale: 1.0, number, l1: 0.0 };
        let g = [w[0] - 1.0];
        Naive.optimize(&mut w, &g, &mut states, None, &step).unwrap();
        played.push(w[0]);
        kept.extend(rule.anchor().map(|a| states[a][0]));
    }
    (played, kept)
}

#[test]
fn optimisers_on_a_parabola() {
    close(&trace(Update::Sgd, 0.0, 5).0, &[0.1, 0.19, 0.271, 0.3439, 0.40951]);
    let (played, anchor) = trace(Update::Optimistic, 0.0, 6);
    close(&played[..5], &[0.2, 0.26, 0.328, 0.3884, 0.44352]);
    close(&anchor, &[0.1, 0.18, 0.254, 0.3212, 0.38236, 0.438008]);
    close(&trace(Update::Momentum { mu: 0.9 }, 0.0, 5).0, &[0.1, 0.28, 0.514, 0.7732, 1.02916]);
    let adam = Update::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8 };
    close(&trace(adam, 0.01, 4).0, &[0.1, 0.199619, 0.298612, 0.396671]);
    // By its anchor it is AdamW along gradients at the weights that were played: the first step is the same.
    let optimistic = Update::OptimisticAdam { beta1: 0.9, beta2: 0.95, eps: 1e-8 };
    let (played, anchor) = trace(optimistic, 0.01, 1);
    close(&[played[0], anchor[0]], &[0.2, 0.1]);
}

#[test]
fn decay_and_clipping() {
    let step = Step { rule: Update::Sgd, lr: 0.1, decay: 0.5, scale: 0.25, number: 1, l1: 0.0 };
    let mut w = [2.0];
    Naive.optimize(&mut w, &[4.0], &mut [], None, &step).unwrap();
    close(&w, &[2.0 - 0.1 * (1.0 + 1.0)]);
    // Of an optimistic rule the anchor alone decays.
    let (mut w, mut states) = ([9.0], [Naive.alloc(1).unwrap()]);
    states[0][0] = 2.0;
    Naive.optimize(&mut w, &[4.0], &mut states, None, &Step { rule: Update::Optimistic, ..step }).unwrap();
    close(&[states[0][0], w[0]], &[1.8, 1.7]);
}

#[test]
fn the_proximal_step_shrinks_towards_the_reference() {
    let step = Step { rule: Update::Sgd, lr: 0.0, decay: 0.0, scale: 1.0, number: 1, l1: 0.1 };
    let prox = |w: [f64; 3], reference: Option<&[f64]>| {
        let mut w = w;
        Naive.optimize(&mut w, &[0.0; 3], &mut [], reference, &step).unwrap();
        w
    };
    let from_zero = prox([1.0, -0.2, 0.05], None);
    close(&from_zero, &[0.9, -0.1, 0.0]);
    assert_eq!(from_zero.iter().filter(|w| **w == 0.0).count(), 1);
    let r = [0.5, -0.5, 2.0];
    let from_r = prox([1.5, -0.7, 2.05], Some(&r));
    close(&from_r, &[1.4, -0.6, 2.0]);
    assert_eq!(from_r[2], r[2]);
}

#[test]
fn rows_that_are_seen() {
    let rows = |v: &Visible| (0..v.rows()).map(|i| v.row(i).to_vec()).collect::<Vec<_>>();
    assert_eq!(
        rows(&Visible::causal(&[2, 3]).windowed(&[0, 1, 0, 1, 2], 2).unwrap()),
        [[[0, 1]], [[0, 2]], [[2, 3]], [[2, 4]], [[3, 5]]]
    );
    assert_eq!(rows(&Visible::causal(&[3])), [[[0, 1]], [[0, 2]], [[0, 3]]]);
    assert_eq!(rows(&Visible::full(&[2, 1])), [[[0, 2]], [[0, 2]], [[2, 3]]]);
    assert_eq!(rows(&Visible::blocks(&[3, 2], 2)), [[[0, 2]], [[0, 2]], [[0, 3]], [[3, 5]], [[3, 5]]]);
    let tree = Visible::tree(&TreeMask::new(&[TreeMask::ROOT, 0, 0, 2]).unwrap());
    assert_eq!(rows(&tree), [vec![[0, 1]], vec![[0, 2]], vec![[0, 1], [2, 3]], vec![[0, 1], [2, 4]]]);
    assert_eq!(tree.pairs(), 1 + 2 + 2 + 3);
    assert!(tree.sees(3, 2) && !tree.sees(3, 1));
    let mut v = Visible::new();
    assert!(v.push(&[[0, 2], [1, 3]]).is_err() && v.push(&[]).is_err() && v.push(&[[2, 2]]).is_err());
    v.push(&[[0, 1], [2, 3]]).unwrap();
    assert!(v.check(1).is_err(), "it looks at rows that are not there");
}
