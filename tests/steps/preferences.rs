//! What rejected steps teach.

use quadriga::train::preference::Pairs;

use super::*;

pub fn pairs() -> Vec<Preference> {
    let pair = |prompt: &[u32], chosen: &[u32], rejected: &[u32]| Preference {
        prompt: prompt.to_vec(),
        chosen: chosen.to_vec(),
        rejected: rejected.to_vec(),
    };
    vec![
        pair(PROMPTS[0], &[8, 9, 10], &[50, 51]),
        pair(PROMPTS[1], &[60], &[8, 70, 71, 5]),
        pair(PROMPTS[2], &[33, 80], &[81, 33]),
    ]
}

pub fn trainer<B: Train>(model: Model<B>, trainable: Trainable<B>, lr: f32) -> Trainer<B> {
    Trainer::new(model, trainable, Settings { lr, ..Dpo::optimizer() }, 160, Recompute::Pointwise).unwrap()
}

fn full(lr: f32) -> Trainer<Naive> {
    let (model, full) = Model::load_trainable(Arc::new(Naive), &checkpoint(), |_, _| {}).unwrap();
    trainer(model, Trainable::Full(full), lr)
}

fn lora(lr: f32) -> Trainer<Naive> {
    let model = Model::load(Arc::new(Naive), &checkpoint(), |_, _| {}).unwrap();
    let spec = |role| ModuleSpec { role, layer: 1, rank: 4, scale: 2.0 };
    let mut adapter = Adapter::init(&Naive, model.config(), &[LayerRole::Q, LayerRole::Down].map(spec), 1).unwrap();
    adapter.train(&Naive, |_| true).unwrap();
    trainer(model, Trainable::Adapter(adapter), lr)
}

fn one(t: &Trainer<Naive>, p: &Preference) -> Pairs {
    Pairs::new(t.model().config(), &Batch::new([p])).unwrap()
}

fn gradient(t: &Trainer<Naive>) -> Vec<f64> {
    t.trainable().params().flat_map(|p| p.g.as_ref().unwrap().head(p.len()).to_vec()).collect()
}

#[test]
fn the_gradient_at_the_reference_is_that_of_the_two_answers() {
    let beta = 0.1;
    for make in [full, lora] {
        for p in pairs() {
            let mut t = make(1e-3);
            let pair = one(&t, &p);
            let now = pair.log_probs(&mut t).unwrap()[0];
            let answers = pair.accumulate(&mut t, &[now], beta, 1.0).unwrap();
            assert_eq!(answers[0].policy, now);
            let (loss, _) = quadriga::train::objective::dpo(&answers[0], beta);
            assert!((loss - std::f64::consts::LN_2).abs() < 1e-12);
            let got = gradient(&t);
            // Of the mean cross-entropy of each answer, as plain fine-tuning has it.
            let alone = |answer: &[u32]| {
                let mut t = make(1e-3);
                let tokens = [&p.prompt[..], answer].concat();
                let loss = (0..tokens.len()).map(|i| i >= p.prompt.len()).collect();
                let batch = Batch::new([&Example { tokens: tokens.clone(), loss }]);
                let (rows, ids): (Vec<u32>, Vec<u32>) = batch.labels.iter().copied().unzip();
                let pass = quadriga::model::Pass::causal(t.model().config(), tokens, &batch.lens, rows).unwrap();
                let target = |r: std::ops::Range<usize>| quadriga::backend::Target::Hard(&ids[r]);
                let losses = t.accumulate(&pass, target, &vec![1.0; ids.len()], true).unwrap();
                (losses.iter().sum::<f64>(), gradient(&t))
            };
            let ((chosen, up), (rejected, down)) = (alone(&p.chosen), alone(&p.rejected));
            assert!((now[0] + chosen).abs() < 1e-9 && (now[1] + rejected).abs() < 1e-9);
            let size = got.iter().map(|g| g * g).sum::<f64>().sqrt();
            assert!(size > 1e-6);
            for ((g, up), down) in got.iter().zip(&up).zip(&down) {
                // Weights of rows are f32.
                assert!((g - beta / 2.0 * (up - down)).abs() < 1e-6 * size, "{g}, {up}, {down}");
            }
        }
    }
}

/// How much more likely the chosen answers are than the rejected ones, in sum, and they alone.
fn margins(t: &mut Trainer<Naive>) -> [f64; 2] {
    let of = |p: &Preference| {
        let [chosen, rejected] = one(t, p).log_probs(t).unwrap()[0];
        [chosen - rejected, chosen]
    };
    pairs().iter().map(of).fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d])
}

#[test]
fn learning_prefers_the_chosen_steps() {
    for make in [full, lora] {
        let mut t = make(1e-3);
        let before = margins(&mut t);
        let learned = learn_preferences(&mut t, &pairs(), &Dpo { batch: 2, ..Dpo::default() }).unwrap();
        let after = margins(&mut t);
        assert_eq!((learned.updates, t.steps(), learned.losses.len()), (6, 6, 3));
        assert!(learned.losses[2] < learned.losses[0].min(std::f64::consts::LN_2), "{learned:?}");
        assert!(after[0] > before[0] + 0.01, "{before:?}, {after:?}");
        // The next chunk has another reference: it begins at ln 2 again.
        let next = learn_preferences(&mut t, &pairs(), &Dpo { epochs: 1, ..Dpo::default() }).unwrap();
        assert!((next.losses[0] - std::f64::consts::LN_2).abs() < 1e-9);
        // The control learns what was chosen.
        let mut t = make(1e-3);
        let learned = learn_chosen(&mut t, &pairs(), &Dpo { epochs: 2, ..Dpo::default() }).unwrap();
        assert!(learned.losses[1] < learned.losses[0] && learned.updates == 2);
        assert!(margins(&mut t)[1] > before[1] + 0.01);
    }
    // At the rate of the paper too, if barely.
    let mut t = full(Dpo::optimizer().lr);
    let before = margins(&mut t);
    learn_preferences(&mut t, &pairs(), &Dpo::default()).unwrap();
    assert!(margins(&mut t)[0] > before[0]);
    let none = learn_preferences(&mut t, &[], &Dpo::default()).unwrap();
    assert_eq!(none, Learned::default());
    for bad in [Dpo { beta: 0.0, ..Dpo::default() }, Dpo { batch: 0, ..Dpo::default() }] {
        assert!(learn_preferences(&mut t, &pairs(), &bad).is_err());
    }
    let hollow = Preference { rejected: Vec::new(), ..pairs()[0].clone() };
    assert!(learn_preferences(&mut t, &[hollow], &Dpo::default()).is_err());
}

#[test]
fn the_buffer_keeps_the_latest_and_what_stands_last_before_them() {
    let mut kept = Preferences::new(2, 4);
    for p in pairs() {
        kept.push(p);
    }
    assert_eq!(kept.len(), 2);
    let all = kept.take();
    assert!(kept.is_empty());
    assert_eq!((&all[0].prompt[..], &all[1].prompt[..]), (&PROMPTS[1][3..], &PROMPTS[2][2..]));
    assert_eq!(all[1].chosen, pairs()[2].chosen);
}

/// Rejected steps, learning, and the draft that has learnt in the place of the old one.
#[test]
fn a_chunk_teaches_the_draft() {
    let target = load(Naive);
    let make = || {
        let (model, weights) = Model::load_trainable(Arc::new(Naive), &Noisy(checkpoint()), |_, _| {}).unwrap();
        trainer(model, Trainable::Full(weights), 5e-3)
    };
    let rate = |draft: Trainer<Naive>| {
        let mut d = decoder(Arc::new(draft.into_parts().0), Exact::tokens(), Sampler::greedy());
        says(&target, PROMPTS[0], TOKENS, &[], &mut d);
        let StepCounts { judged, accepted, .. } = d.counts();
        (accepted as f64 / judged as f64, d.preferences().take())
    };
    let (before, chunk) = rate(make());
    assert!(chunk.len() > 3);
    let mut t = make();
    let learned = learn_preferences(&mut t, &chunk, &Dpo { epochs: 10, batch: 4, ..Dpo::default() }).unwrap();
    assert!(learned.losses[9] < 0.5 * learned.losses[0], "{learned:?}");
    // The control, seen so often that it knows the text by heart, is accepted.
    let mut t = make();
    let learned = learn_chosen(&mut t, &chunk, &Dpo { epochs: 30, batch: 4, ..Dpo::default() }).unwrap();
    let (after, _) = rate(t);
    assert!(after > before + 0.3, "{before} before, {after} after {learned:?}");
}

/// The tiny model with weights of its second layer tripled: a draft that is often wrong.
struct Noisy(Checkpoint);

impl TensorSource for Noisy {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn tensor(&self, role: Role) -> quadriga::Result<HostTensor> {
        let t = self.0.tensor(role)?;
        if role != Role::Layer(1, LayerRole::Down) {
            return Ok(t);
        }
        let more: Vec<f32> = t.to_f32().iter().map(|x| 3.0 * x).collect();
        HostTensor::new(DType::F32, t.rows, t.cols, bytemuck::cast_slice(&more).to_vec().into())
    }
}
