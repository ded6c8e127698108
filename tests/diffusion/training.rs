//! Training of diffusion models: noise, layouts, losses, distillation (spec 3, I18 to I23).

use std::sync::Arc;

use quadriga::backend::naive::Naive;
use quadriga::backend::{Target, Train};
use quadriga::diffusion::train::{
    Distill, DistillSettings, Masked, MaskedSettings, Noisy, Trajectory, Weighting, layout,
};
use quadriga::model::config::Diffusion;
use quadriga::model::{Model, Pass, Recompute, Term};
use quadriga::rng::Key;
use quadriga::train::run::Objective;
use quadriga::train::{Batch, Example, Settings, Trainable, Trainer};

use super::models::{As, MASK};

const FULL: (f64, Key) = (1.0, KEY);
const KEY: Key = Key { seed: 1, stream: 2, counter: 0 };

fn trainer<B: Train>(be: B, source: &As, rows: usize) -> Trainer<B> {
    let (model, full) = Model::load_trainable(Arc::new(be), source, |_, _| {}).unwrap();
    Trainer::new(model, Trainable::Full(full), Settings::default(), rows, Recompute::Nothing).unwrap()
}

fn noisy(clean: &[u32], start: usize, learn: &[usize]) -> Noisy {
    let mut noisy = clean.to_vec();
    learn.iter().for_each(|&i| noisy[i] = MASK);
    Noisy { clean: clean.to_vec(), start, noisy, learn: learn.to_vec() }
}

const TEXT: [u32; 12] = [4, 9, 200, 31, 77, 8, 301, 12, 44, 5, 90, 2];

fn losses<B: Train>(t: &mut Trainer<B>, pass: &Pass, labels: &[u32]) -> Vec<f64> {
    let weights = vec![0.0; labels.len()];
    t.forward(pass).unwrap();
    let term = Term { target: &|r| Target::Hard(&labels[r]), weights: &weights };
    t.backward(pass, &[term], false).unwrap().swap_remove(0)
}

/// I23: at ratio 0 a shifted model that masks nothing is the autoregressive one; at ratio 1 attention is full; between, it is neither.
#[test]
fn annealing_goes_from_causal_to_full() {
    let source = As::new("tiny-llama", true, None, None);
    let mut t = trainer(Naive, &source, 64);
    let (cfg, model) = (t.model().config().clone(), Diffusion { mask: MASK, shift: true, block: None });
    // Every position has a loss, none is masked.
    let mut s = noisy(&TEXT, 1, &(1..12).collect::<Vec<_>>());
    s.noisy = TEXT.to_vec();
    let at = |see| layout(&cfg, model, std::slice::from_ref(&s), (see, KEY)).unwrap();
    let mut of = |pass: &Pass, labels: &[u32]| losses(&mut t, pass, labels);
    let causal = Pass::causal(&cfg, TEXT.to_vec(), &[12], (0..11).collect()).unwrap();
    let autoregressive = of(&causal, &TEXT[1..]);
    let (pass, labels) = at(0.0);
    assert_eq!(labels, TEXT[1..]);
    assert_eq!(of(&pass, &labels), autoregressive);
    let visible = quadriga::backend::Visible::full(&[12]);
    let full = Pass::new(&cfg, TEXT.to_vec(), (0..12).collect(), visible, (0..11).collect()).unwrap();
    let everything = of(&full, &TEXT[1..]);
    let (pass, labels) = at(1.0);
    assert_eq!(of(&pass, &labels), everything);
    let half = of(&at(0.5).0, &labels);
    assert!(half != everything && half != autoregressive);
}

/// I9: a shifted model's loss of position i is that of the row before it: the unshifted model's loss with labels moved by one.
#[test]
fn a_shift_moves_the_rows_and_nothing_else() {
    let mut t = trainer(Naive, &As::new("tiny-llama", true, None, None), 64);
    let cfg = t.model().config().clone();
    let of = |shift| Diffusion { mask: MASK, shift, block: None };
    let learn = [5, 6, 9];
    let s = noisy(&TEXT, 4, &learn);
    let (pass, labels) = layout(&cfg, of(true), std::slice::from_ref(&s), FULL).unwrap();
    assert_eq!(labels, [8, 301, 5]);
    let shifted = losses(&mut t, &pass, &labels);
    // The same rows asked for by an unshifted model, with the next tokens as labels.
    let before = Noisy { learn: learn.iter().map(|i| i - 1).collect(), ..s };
    let (pass, own) = layout(&cfg, of(false), &[before], FULL).unwrap();
    assert_eq!(own, [77, 8, 44]);
    assert_eq!(losses(&mut t, &pass, &labels), shifted);
}

/// With blocks one pass trains all blocks as decoding sees them: each block's losses equal those of a text cut behind it, whose earlier blocks are clean.
#[test]
fn a_block_layout_is_what_decoding_sees() {
    for shift in [false, true] {
        let model = Diffusion { mask: MASK, shift, block: Some(3) };
        let mut t = trainer(Naive, &As::new("tiny-llama", shift, Some(3), None), 64);
        let cfg = t.model().config().clone();
        let learn: Vec<usize> = vec![4, 6, 7, 8, 10, 11];
        let s = noisy(&TEXT, 4, &learn);
        let (pass, labels) = layout(&cfg, model, std::slice::from_ref(&s), FULL).unwrap();
        let all = losses(&mut t, &pass, &labels);
        for (first, end) in [(4usize, 7usize), (7, 10), (10, 12)] {
            let own: Vec<usize> = learn.iter().copied().filter(|i| (first..end).contains(i)).collect();
            let mut tokens = TEXT[..first].to_vec();
            tokens.extend(&s.noisy[first..end]);
            let mut visible = quadriga::backend::Visible::new();
            for i in 0..end {
                let sees = if i < 4 { 4 } else { end.min(4 + (i - 4) / 3 * 3 + 3) };
                visible.push(&[[0, sees as u32]]).unwrap();
            }
            let wanted = own.iter().map(|i| (i - usize::from(shift)) as u32).collect();
            let alone = Pass::new(&cfg, tokens, (0..end as u32).collect(), visible, wanted).unwrap();
            let labels: Vec<u32> = own.iter().map(|&i| TEXT[i]).collect();
            let expected = losses(&mut t, &alone, &labels);
            for (i, want) in own.iter().zip(expected) {
                let got = all[learn.iter().position(|j| j == i).unwrap()];
                assert!((got - want).abs() < 1e-12, "position {i}: {got}, not {want}");
            }
        }
    }
}

fn batch() -> Batch {
    let example = |tokens: &[u32], start: usize| Example {
        tokens: tokens.to_vec(),
        loss: (0..tokens.len()).map(|i| i >= start).collect(),
    };
    let all = [example(&TEXT, 4), example(&TEXT[2..], 3)];
    Batch { ids: vec![0, 1], ..Batch::new(&all) }
}

/// The weighted loss falls along its gradient as fast as the gradient's norm says.
#[test]
fn the_gradient_of_the_loss_is_that_of_differences() {
    let mut source = As::new("tiny-llama", false, None, Some(1));
    let model = Diffusion { mask: MASK, shift: false, block: None };
    for weighting in [Weighting::Bound, Weighting::Inverse, Weighting::Uniform] {
        let how = MaskedSettings { weighting, ..MaskedSettings::default() };
        // The loss as a function of the learning rate along the gradient: its slope at 0 is -|g|^2 under plain descent.
        let value = |lr: f32, source: &As| {
            let settings = Settings {
                kind: quadriga::train::optim::Kind::Sgd,
                lr,
                weight_decay: 0.0,
                clip: 0.0,
                ..Settings::default()
            };
            let (m, full) = Model::load_trainable(Arc::new(Naive), source, |_, _| {}).unwrap();
            let mut t = Trainer::new(m, Trainable::Full(full), settings, 64, Recompute::Nothing).unwrap();
            let mut objective = Masked::new(model, how.clone(), 9).unwrap();
            let first = objective.step(&mut t, &[batch()], 1).unwrap();
            // The same noise again takes a fresh trainer, whose steps count from 0.
            (first, t)
        };
        let (first, _) = value(1e-12, &source);
        let h = 1e-4;
        let (_, moved) = value(h, &source);
        let again = loss_again(moved, model, how.clone());
        let slope = (again - first.loss) / f64::from(h);
        let expected = -first.stepped.grad_norm.powi(2);
        assert!((slope - expected).abs() < 0.02 * expected.abs(), "{weighting:?}: slope {slope}, |g|^2 {expected}");
        source = As::new("tiny-llama", false, None, Some(1));
    }
}

/// The loss of step 0's noise under the weights of `t`.
fn loss_again(t: Trainer<Naive>, model: Diffusion, how: MaskedSettings) -> f64 {
    let (m, trained) = t.into_parts();
    let settings =
        Settings { kind: quadriga::train::optim::Kind::Sgd, lr: 1e-12, weight_decay: 0.0, ..Settings::default() };
    let mut fresh = Trainer::new(m, trained, settings, 64, Recompute::Nothing).unwrap();
    Masked::new(model, how, 9).unwrap().step(&mut fresh, &[batch()], 1).unwrap().loss
}

/// I21: of a model whose cross-entropy is the same whatever is masked (a unigram model), the bound is that cross-entropy: the weights' mean is 1.
#[test]
fn the_bound_of_a_unigram_model_is_its_cross_entropy() {
    let model = Diffusion { mask: MASK, shift: false, block: None };
    // E_t[(1/p) masked CE / n] = CE when CE does not depend on what is masked: the average of 1/p * count / n is 1.
    let objective = Masked::new(model, MaskedSettings::default(), 4).unwrap();
    let (mut sum, rounds) = (0.0, 4000);
    for step in 0..rounds {
        sum += objective.mass(&[batch()], step).unwrap();
    }
    let mean = sum / f64::from(rounds as u32);
    assert!((mean - 1.0).abs() < 0.05, "{mean}");
}

fn order(ranks: &[u32]) -> Option<Trajectory> {
    Some(Trajectory { ranks: ranks.to_vec(), ..Trajectory::default() })
}

/// I20: noisy and complementary masks part the window, the prompt is untouched, all behind the window is masked; t picks the teacher's step.
#[test]
fn a_window_is_masked_as_the_teacher_had_it() {
    let model = Diffusion { mask: MASK, shift: false, block: None };
    // An answer of 12 tokens, decoded 1, 0, 3, 2, .. in pairs from the right.
    let ranks: Vec<u32> = (0..12).map(|i| i ^ 1).collect();
    let orders = [order(&ranks)];
    let d = Distill::new(model, DistillSettings::default(), &orders, &[2], 5).unwrap();
    let (start, len) = (5, 17);
    for number in 0..200u64 {
        let key = Key { seed: 3, stream: number, counter: 0 };
        for (k, t) in [(4, 0.0), (4, 0.5), (4, 1.0), (16, 0.8), (1, 0.3)] {
            let w = d.window(Some(0), start..len, 12, (k, t), key);
            assert!(w.from >= start && w.to <= len && w.masked.len() == w.to - w.from);
            assert!((w.from - start).is_multiple_of(k) || w.to == len);
            assert!(w.to == len || w.to == w.from + k);
            let decoded = w.from - start + ((1.0 - t) * (w.to - w.from) as f64) as usize;
            let teacher: Vec<bool> = (w.from..w.to).map(|i| ranks[i - start] as usize >= decoded).collect();
            assert_eq!(w.masked, teacher);
            if t == 0.0 && w.from.is_multiple_of(2) == start.is_multiple_of(2) && k == 4 {
                assert!(!w.masked.contains(&true), "at ratio 0 the teacher has all of the window");
            }
            if t == 1.0 && k == 4 {
                assert!(w.masked.iter().all(|m| *m), "at ratio 1 nothing of it");
            }
        }
    }
}

#[test]
fn the_curriculum_rises_as_published() {
    let s = DistillSettings::default();
    assert_eq!(s.ratio_at(0, 100, 0.0), 0.0);
    assert!((s.ratio_at(50, 100, 0.0) - 0.4).abs() < 1e-12 && (s.ratio_at(99, 100, 1.0) - 0.8).abs() < 1e-12);
    let windows: Vec<usize> = (0..=60).map(|i| s.window_at(i, 60)).collect();
    assert_eq!(
        (windows[0], windows[10], windows[15], windows[20], windows[35], windows[45], windows[60]),
        (16, 16, 20, 24, 28, 32, 32)
    );
    assert!(windows.is_sorted());
    let flat = DistillSettings { window: vec![32], ..s };
    assert!((0..10).all(|i| flat.window_at(i, 10) == 32));
}

/// The loss of a distillation step, term by term, by its definition (spec 3.4) on the host.
#[test]
fn the_distillation_loss_is_its_definition() {
    for (shift, both, complement) in [(false, false, true), (true, true, true), (false, false, false)] {
        let source = As::new("tiny-llama", shift, None, None);
        let model = Diffusion { mask: MASK, shift, block: None };
        let orders = [order(&[3, 1, 0, 2, 5, 4, 7, 6]), order(&[0, 1, 2, 3, 4, 5, 6])];
        let how = DistillSettings { window: vec![4], entropy_both: both, complement, ..DistillSettings::default() };
        let mut d = Distill::new(model, how.clone(), &orders, &[2], 11).unwrap();
        let mut t = trainer(Naive, &source, 128);
        // Make some predictions right: labels are what the model says.
        let report = d.step(&mut t, &[batch()], 10).unwrap();

        let mut fresh = trainer(Naive, &source, 128);
        let cfg = fresh.model().config().clone();
        let copies = d.copies_of_step(&[batch()], 0, 10).unwrap().swap_remove(0);
        let (pass, labels) = layout(&cfg, model, &copies, FULL).unwrap();
        let ce = losses(&mut fresh, &pass, &labels);
        let right: Vec<bool> = fresh.likeliest(&pass).unwrap().iter().zip(&labels).map(|(a, b)| a == b).collect();
        let term =
            Term { target: &|r| Target::Entropy { tau: 0.5, labels: &labels[r] }, weights: &vec![0.0; labels.len()] };
        let h = fresh.backward(&pass, &[term], false).unwrap().swap_remove(0);
        let (mut at, mut expected) = (0, 0.0);
        let parts = if complement { 2 } else { 1 };
        let (mut sums, mut counts) = ([[0.0; 2]; 2], [[0usize; 2]; 2]);
        for (c, copy) in copies.iter().enumerate() {
            for _ in &copy.learn {
                let which = c % parts;
                (sums[which][0], counts[which][0]) = (sums[which][0] + ce[at], counts[which][0] + 1);
                if right[at] {
                    (sums[which][1], counts[which][1]) = (sums[which][1] + h[at], counts[which][1] + 1);
                }
                at += 1;
            }
        }
        for which in 0..parts {
            expected += sums[which][0] / counts[which][0].max(1) as f64;
            if which == 0 || both {
                expected += how.entropy * sums[which][1] / counts[which][1].max(1) as f64;
            }
        }
        assert!((report.loss - expected / 4.0).abs() < 1e-6, "{} and {}", report.loss, expected / 4.0);
    }
}

/// Both terms' gradients reach the weights: descent along them lowers their sum as fast as the norm says.
#[test]
fn two_terms_have_the_sum_of_their_gradients() {
    let model = Diffusion { mask: MASK, shift: false, block: None };
    let source = As::new("tiny-llama", false, None, Some(1));
    let mut t = trainer(Naive, &source, 64);
    let cfg = t.model().config().clone();
    let (pass, labels) = layout(&cfg, model, &[noisy(&TEXT, 4, &[5, 6, 9])], FULL).unwrap();
    t.forward(&pass).unwrap();
    let labels = {
        let l = t.likeliest(&pass).unwrap();
        assert_eq!(l.len(), labels.len());
        l
    };
    let gradient = |terms: &[(bool, f32)]| {
        let mut t = trainer(Naive, &source, 64);
        t.forward(&pass).unwrap();
        let weights: Vec<Vec<f32>> = terms.iter().map(|(_, w)| vec![*w; 3]).collect();
        let hard = |r: std::ops::Range<usize>| Target::Hard(&labels[r]);
        let soft = |r: std::ops::Range<usize>| Target::Entropy { tau: 0.5, labels: &labels[r] };
        let terms: Vec<Term<'_, '_, Naive>> = terms
            .iter()
            .zip(&weights)
            .map(
                |((entropy, _), weights)| {
                    if *entropy { Term { target: &soft, weights } } else { Term { target: &hard, weights } }
                },
            )
            .collect();
        t.backward(&pass, &terms, true).unwrap();
        let Trainable::Full(full) = t.trainable() else { unreachable!() };
        full.params().flat_map(|(_, p)| p.g.as_ref().unwrap()[..p.len()].to_vec()).collect::<Vec<f64>>()
    };
    let (hard, soft, sum) =
        (gradient(&[(false, 0.3)]), gradient(&[(true, 0.7)]), gradient(&[(false, 0.3), (true, 0.7)]));
    assert!(hard.iter().any(|g| g.abs() > 1e-4) && soft.iter().any(|g| g.abs() > 1e-4));
    assert!(sum.iter().zip(hard.iter().zip(&soft)).all(|(s, (h, e))| (s - h - e).abs() < 1e-12));
}
