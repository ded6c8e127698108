//! Streams of linear regressions, where everything that a method should do can be worked out on paper.

use quadriga::continual::{
    Event, Grouped, Layout, Learner, Method, Module, Moments, Paper, Penalty, Plan, Route, Sample, Split, State, Stream,
};
use quadriga::error::Result;
use quadriga::rng::Rng;

const D: usize = 12;
/// Examples of a task.
const N: usize = 256;

/// y = w.x with w = B of one module, plain gradient descent. A test example is right where the error is small.
#[derive(Clone)]
pub struct Linear {
    layout: Layout,
    w: Vec<f32>,
    /// Steps, so that there is an optimiser's state.
    steps: u64,
    rate: f32,
    /// Of each task: inputs and the true weights.
    tasks: Vec<(Vec<Vec<f32>>, Vec<f32>)>,
}

impl Linear {
    /// Tasks around `centres`, of `clusters[k]` each, `near` from it.
    pub fn new(clusters: &[usize], near: f32, rate: f32, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut normal = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.normal()).collect() };
        // Rows of signs, any two of which differ in half of the places, so that clusters are surely apart.
        let centre = |c: usize| -> Vec<f32> {
            let sign = |i: usize| if (i & c).count_ones().is_multiple_of(2) { 1.5 } else { -1.5 };
            normal(D).iter().enumerate().map(|(i, x)| sign(i) + 0.2 * x).collect()
        };
        let centres: Vec<Vec<f32>> = (0..4).map(centre).collect();
        let task = |&c: &usize| {
            let w = centres[c].iter().zip(normal(D)).map(|(c, e)| c + near * e).collect();
            ((0..N).map(|_| normal(D)).collect(), w)
        };
        let tasks = clusters.iter().map(task).collect();
        let module = |i: usize| {
            let b = 4 * i;
            Module { name: format!("m{i}"), layer: i, rank: 1, input: 0, output: 4, a: b..b, b: b..b + 4 }
        };
        let layout = Layout { modules: (0..D / 4).map(module).collect(), len: D };
        Self { layout, w: vec![0.0; D], steps: 0, rate, tasks }
    }

    fn error(&self, w: &[f32], task: usize, i: usize) -> f32 {
        let (x, own) = &self.tasks[task];
        let dot = |w: &[f32]| w.iter().zip(&x[i]).map(|(a, b)| a * b).sum::<f32>();
        dot(w) - dot(own)
    }

    /// Mean of half the squared errors.
    pub fn loss(&self, w: &[f32], task: usize) -> f64 {
        let n = self.tasks[task].0.len();
        (0..n).map(|i| 0.5 * f64::from(self.error(w, task, i)).powi(2)).sum::<f64>() / n as f64
    }
}

impl Learner for Linear {
    fn layout(&self) -> &Layout {
        &self.layout
    }
    fn size(&self, task: usize) -> [usize; 2] {
        [self.tasks[task].0.len(); 2]
    }
    fn classes(&self, _: usize) -> &[usize] {
        &[0, 1]
    }
    fn truth(&self, _: usize, _: usize) -> usize {
        1
    }
    fn values(&self) -> Result<Vec<f32>> {
        Ok(self.w.clone())
    }
    fn set_values(&mut self, values: &[f32]) -> Result<()> {
        self.w = values.to_vec();
        Ok(())
    }
    fn restart(&mut self) -> Result<()> {
        self.steps = 0;
        Ok(())
    }
    fn moments(&self) -> Result<(u64, Moments)> {
        Ok((self.steps, Vec::new()))
    }
    fn set_moments(&mut self, steps: u64, _: &Moments) -> Result<()> {
        self.steps = steps;
        Ok(())
    }
    fn gradient(&mut self, samples: &[Sample]) -> Result<(f64, Vec<f32>)> {
        let (mut g, mut loss, n) = (vec![0.0; D], 0.0, samples.len() as f32);
        for s in samples {
            let e = self.error(&self.w, s.task, s.index);
            loss += f64::from(0.5 * e * e / n);
            g.iter_mut().zip(&self.tasks[s.task].0[s.index]).for_each(|(g, x)| *g += e * x / n);
        }
        Ok((loss, g))
    }
    fn step(&mut self, samples: &[Sample], penalty: Penalty<'_>) -> Result<f64> {
        let (loss, mut g) = self.gradient(samples)?;
        if let Some(add) = penalty.gradient {
            add(loss, &self.w.clone(), &mut g)?;
        }
        self.w.iter_mut().zip(&g).for_each(|(w, g)| *w -= self.rate * g);
        if let Some((r, strength)) = penalty.pull {
            for (w, r) in self.w.iter_mut().zip(r) {
                *w = r + quadriga::continual::penalty::soft(*w - r, self.rate * strength);
            }
        }
        self.steps += 1;
        Ok(loss)
    }
    fn predict(&mut self, task: usize, examples: &[usize], _: &[usize]) -> Result<Vec<usize>> {
        Ok(examples.iter().map(|&i| usize::from(self.error(&self.w, task, i).abs() < 0.5)).collect())
    }
    fn features(&mut self, task: usize, _: Split) -> Result<Vec<Vec<f32>>> {
        // Each task's prompts look different.
        Ok(self.tasks[task].0.iter().map(|x| vec![x[0] * 0.1, task as f32]).collect())
    }
    fn input_products(&mut self, _: &[Sample]) -> Result<Vec<Vec<f64>>> {
        unreachable!("modules without inputs")
    }
    fn length(&self, _: Sample) -> usize {
        1
    }
}

pub fn run(learner: &mut dyn Learner, method: Method, plan: Plan, tasks: usize) -> State {
    let state = State::new(method, plan, tasks, learner.values().unwrap()).unwrap();
    let mut stream = Stream::new(state, learner).unwrap();
    while stream.advance(learner).unwrap().is_some() {}
    stream.state().clone()
}

fn plan() -> Plan {
    Plan { epochs: 15, batch: 8, ..Plan::default() }
}

#[test]
fn forgetting_has_its_closed_form() {
    let mut l = Linear::new(&[0, 1], 0.0, 0.1, 1);
    let state = run(&mut l, Method::Sequential, plan(), 2);
    let m = state.scores.measures().unwrap();
    assert!(m.learning > 0.99 && m.average < 0.7, "{m:?}");
    // Converged on the second task: the first one's loss is that of the difference of the two truths.
    let (w, truth) = (l.values().unwrap(), l.tasks[1].1.clone());
    w.iter().zip(&truth).for_each(|(a, b)| assert!((a - b).abs() < 1e-3, "{a} {b}"));
    let closed = l.loss(&truth, 0);
    assert!(closed > 1.0 && (l.loss(&w, 0) / closed - 1.0).abs() < 1e-3);
}

#[test]
fn groups_are_the_planted_ones_and_nothing_is_forgotten() {
    for seed in 0..20 {
        let clusters = [0, 1, 2, 1, 0, 2];
        let mut l = Linear::new(&clusters, 0.02, 0.1, seed);
        let settings = Grouped { probe: 0, share: 0.35, gate: 0.0, ..Grouped::default() };
        let state = run(&mut l, Method::Tree(settings), plan(), 6);
        let groups: Vec<Vec<usize>> = state.members.iter().map(|m| m.tasks.clone()).collect();
        assert_eq!(groups, [[0, 4], [1, 3], [2, 5]], "seed {seed}");
        let mut leaves: Vec<Vec<usize>> = state.tree.leaves().map(|i| state.tree.nodes[i].tasks.clone()).collect();
        leaves.sort();
        // The tree shows what the groups are.
        assert_eq!(leaves, groups);
        let m = state.scores.measures().unwrap();
        assert!(m.average > 0.99 && m.bwt > -0.02, "{m:?}");
    }
}

#[test]
fn a_task_that_comes_again_is_not_learnt_again() {
    let mut l = Linear::new(&[0, 1, 0], 0.0, 0.1, 4);
    let settings = Grouped { probe: 0, share: 0.35, gate: 0.25, ..Grouped::default() };
    let state = run(&mut l, Method::Tree(settings), plan(), 3);
    assert_eq!(state.reports[2].steps, 0, "{:?}", state.reports[2].distances);
    assert_eq!(state.members.len(), 2);
    assert!(state.scores.rows[2][2] > 0.99);
}

#[test]
fn the_same_inputs_with_other_answers_get_an_adapter_of_their_own() {
    let mut l = Linear::new(&[0, 0], 0.0, 0.1, 5);
    l.tasks[1].0 = l.tasks[0].0.clone();
    l.tasks[1].1 = l.tasks[0].1.iter().map(|w| -w).collect();
    let state = run(&mut l, Method::Tree(Grouped { probe: 0, ..Grouped::default() }), plan(), 2);
    assert!(state.reports[1].distances[0] > 0.9, "{:?}", state.reports[1].distances);
    assert_eq!(state.members.len(), 2);
    assert!(state.scores.measures().unwrap().average > 0.99);
}

#[test]
fn penalties_of_no_strength_are_the_sequential_method_bit_for_bit() {
    let values = |method: Method| {
        let mut l = Linear::new(&[0, 1, 2], 0.1, 0.1, 6);
        run(&mut l, method, Plan { epochs: 3, ..plan() }, 3);
        l.values().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    let plain = values(Method::Sequential);
    for method in [
        Method::Ewc { lambda: 0.0 },
        Method::L2 { lambda: 0.0 },
        Method::Anchor { tau: 0.0 },
        Method::Random { tau: 0.0 },
        Method::Paper(Paper { tau: 0.0, ..Paper::default() }),
    ] {
        assert_eq!(values(method.clone()), plain, "{method:?}");
    }
    for method in [
        Method::Ewc { lambda: 1.0 },
        Method::L2 { lambda: 0.1 },
        Method::Anchor { tau: 0.5 },
        Method::Random { tau: 0.5 },
        Method::Paper(Paper { tau: 0.5, ..Paper::default() }),
    ] {
        assert_ne!(values(method.clone()), plain, "{method:?}");
    }
}

#[test]
fn every_penalty_acts_behind_the_first_task() {
    for method in [
        Method::Ewc { lambda: 1.0 },
        Method::L2 { lambda: 0.1 },
        Method::Anchor { tau: 0.1 },
        Method::Random { tau: 0.1 },
        Method::Paper(Paper { tau: 0.1, query: 2, ..Paper::default() }),
        Method::Tree(Grouped { probe: 0, share: 1.0, gate: 0.0, tau: 0.1, ..Grouped::default() }),
    ] {
        let mut l = Linear::new(&[0, 1, 2], 0.1, 0.1, 7);
        let state = run(&mut l, method.clone(), Plan { epochs: 2, ..plan() }, 3);
        assert_eq!(state.reports[0].penalty, 0.0, "{method:?}");
        assert!(state.reports[1..].iter().all(|r| r.penalty.abs() > 1e-6), "{method:?}: {:?}", state.reports);
    }
}

#[test]
fn a_pull_leaves_values_exactly_where_they_were() {
    let unchanged = |tau| {
        let mut l = Linear::new(&[0, 0], 0.01, 0.1, 12);
        run(&mut l, Method::Anchor { tau }, plan(), 2).reports[1].unchanged
    };
    // A strong pull lets nothing go that has so little reason to; without one everything moves.
    assert_eq!(unchanged(0.0), 0.0);
    assert!(unchanged(0.3) > 0.9, "{}", unchanged(0.3));
}

#[test]
fn an_oracle_is_an_upper_bound_for_the_router() {
    let score = |route| {
        let mut l = Linear::new(&[0, 1, 2], 0.1, 0.1, 8);
        run(&mut l, Method::Isolated(route), plan(), 3).scores.measures().unwrap()
    };
    let (router, oracle) = (score(Route::Router), score(Route::Oracle));
    assert!(oracle.average > 0.99 && router.average <= oracle.average && oracle.bwt == 0.0);
}

#[test]
fn a_stream_that_is_killed_anywhere_goes_on_to_the_same_bits() {
    for method in [
        Method::Sequential,
        Method::Isolated(Route::Router),
        Method::Ewc { lambda: 1.0 },
        Method::L2 { lambda: 0.1 },
        Method::Anchor { tau: 0.2 },
        Method::Random { tau: 0.2 },
        Method::Paper(Paper { query: 3, ..Paper::default() }),
        Method::Tree(Grouped { probe: 8, share: 0.4, gate: 0.0, ..Grouped::default() }),
    ] {
        let fresh = || Linear::new(&[0, 1, 0], 0.1, 0.1, 9);
        let (mut whole, plan) = (fresh(), Plan { epochs: 2, ..plan() });
        let expected = run(&mut whole, method.clone(), plan.clone(), 3);
        let mut learner = fresh();
        let state = State::new(method, plan, 3, learner.values().unwrap()).unwrap();
        let mut stream = Stream::new(state, &learner).unwrap();
        let mut calls = 0;
        while stream.advance(&mut learner).unwrap().is_some() {
            calls += 1;
            // Nothing but the state, the values and the optimiser survives.
            let json = serde_json::to_string(stream.state()).unwrap();
            let (tensors, values) = (stream.state().tensors(), learner.values().unwrap());
            let (steps, moments) = learner.moments().unwrap();
            let mut state: State = serde_json::from_str(&json).unwrap();
            state.restore(&tensors, learner.layout().modules.len()).unwrap();
            assert_eq!(&state, stream.state());
            learner = fresh();
            learner.set_values(&values).unwrap();
            learner.set_moments(steps, &moments).unwrap();
            stream = Stream::new(state, &learner).unwrap();
        }
        assert!(calls > 20);
        assert_eq!(stream.state(), &expected);
        assert_eq!(learner.values().unwrap(), whole.values().unwrap());
    }
}

#[test]
fn a_task_ends_early_where_its_loss_is_low() {
    let mut l = Linear::new(&[0, 1], 0.1, 0.1, 10);
    let state = run(&mut l, Method::Sequential, Plan { stop_loss: 0.05, ..plan() }, 2);
    let all = 15 * N as u64 / 8;
    assert!(state.reports.iter().all(|r| r.steps < all && r.steps > 8));
    let mut events = Vec::new();
    let mut l = Linear::new(&[0], 0.1, 0.1, 10);
    let state = State::new(Method::Sequential, Plan { epochs: 1, ..plan() }, 1, l.values().unwrap()).unwrap();
    let mut stream = Stream::new(state, &l).unwrap();
    while let Some(e) = stream.advance(&mut l).unwrap() {
        events.push(e);
    }
    assert_eq!(events[0], Event::Began { task: 0, adapter: 0, reused: false });
    assert!(matches!(events[32], Event::Step { done: 32, of: 32, .. }));
    assert_eq!(events[33..], [Event::Finished { task: 0 }]);
}

#[test]
fn impossible_settings_are_named() {
    let bad = |m: Method| State::new(m, Plan::default(), 1, vec![]).unwrap_err().to_string();
    assert!(bad(Method::Ewc { lambda: f32::NAN }).contains("ewc: lambda"));
    assert!(bad(Method::Inflora { energy: 1.5 }).contains("energy"));
    assert!(bad(Method::Tree(Grouped { share: 2.0, ..Grouped::default() })).contains("share"));
    assert!(State::new(Method::Sequential, Plan { epochs: 0, ..Plan::default() }, 1, vec![]).is_err());
    for name in Method::NAMES {
        assert_eq!(Method::named(name).unwrap().name(), name);
    }
    assert!(Method::named("nothing").is_none());
}
