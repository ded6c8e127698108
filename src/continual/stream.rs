//! [`Stream`]: tasks one after another, a step at a time.

use std::time::Instant;

use super::learner::{Learner, OnGradient, Penalty, Sample, Split};
use super::methods::{self, Chosen};
use super::settings::Route;
use super::state::{Stage, State, TaskReport};
use crate::error::{Result, ensure};
use crate::rng::Rng;

/// Steps whose losses decide whether a task is learnt.
const WINDOW: usize = 8;

/// What [`Stream::advance`] did.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A task began.
    Began {
        /// Its number.
        task: usize,
        /// Its adapter among those that are kept.
        adapter: usize,
        /// Whether that serves unchanged: there is nothing to learn.
        reused: bool,
    },
    /// A step is done.
    Step {
        /// The task.
        task: usize,
        /// Steps of it that are done.
        done: u64,
        /// Steps that it has, unless its loss ends it early.
        of: u64,
        /// Loss before the step, nats.
        loss: f64,
    },
    /// A task ended; the scores have a new row.
    Finished {
        /// Its number.
        task: usize,
    },
}

/// Seconds since the stream was made, by what they went into.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Seconds {
    /// Forward, backward and update.
    pub training: f64,
    /// Choosing earlier tasks, signatures and trees.
    pub search: f64,
    /// Tests.
    pub evaluation: f64,
}

/// A stream of tasks under way.
pub struct Stream {
    state: State,
    /// Time so far. It is no part of the state: who keeps that may keep this beside it.
    pub seconds: Seconds,
    /// Of the epoch under way: its task, its number, and the order of its examples.
    order: Option<(usize, u64, Vec<usize>)>,
}

impl Stream {
    /// A stream from where `state` stands.
    ///
    /// # Errors
    /// A state of another adapter; a task without examples.
    pub fn new(state: State, learner: &dyn Learner) -> Result<Self> {
        learner.layout().check()?;
        let n = learner.layout().len;
        ensure!(state.anchor.len() == n, Shape, "a stream of {} values, an adapter of {n}", state.anchor.len());
        for task in 0..state.tasks {
            let [train, test] = learner.size(task);
            ensure!(train > 0 && test > 0, Usage, "task {task} has {train} training and {test} test examples");
        }
        Ok(Self { state, seconds: Seconds::default(), order: None })
    }

    /// Where it stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Steps of a task with so many examples.
    pub fn steps(&self, examples: usize) -> u64 {
        let plan = &self.state.plan;
        plan.epochs * examples.div_ceil(plan.batch) as u64
    }

    /// Does the next thing: begins a task, makes a step, or ends the task. `None` where no task is left. What it changed lies in
    /// [`Stream::state`], in the learner's values and its optimiser, and nowhere else: with those three kept after any call, the
    /// stream goes on to the same values.
    ///
    /// # Errors
    /// `Diverged` where a loss is not finite; the learner's.
    pub fn advance(&mut self, learner: &mut dyn Learner) -> Result<Option<Event>> {
        if self.state.task >= self.state.tasks {
            return Ok(None);
        }
        let task = self.state.task;
        let event = match self.state.stage {
            Stage::Begin => self.begin(learner)?,
            Stage::Step(k) => self.step(k, learner)?,
            Stage::End => {
                self.end(learner)?;
                self.state.task += 1;
                self.state.stage = Stage::Begin;
                Event::Finished { task }
            }
        };
        Ok(Some(event))
    }

    fn begin(&mut self, learner: &mut dyn Learner) -> Result<Event> {
        let (task, begun) = (self.state.task, Instant::now());
        if task == 0 && self.state.plan.square {
            for j in 0..self.state.tasks {
                let allowed = all_classes(learner, j + 1);
                let examples = every(learner, j);
                self.state.scores.untrained.push(score(learner, j, &examples, &allowed)?);
            }
            self.seconds.evaluation += begun.elapsed().as_secs_f64();
        }
        let begun = Instant::now();
        let mut report = TaskReport { pulls: vec![0; task], ..TaskReport::default() };
        let reused = methods::begin(&mut self.state, learner, &mut report)?;
        let adapter = report.adapter;
        self.state.reports.push(report);
        self.state.stage = if reused { Stage::End } else { Stage::Step(0) };
        self.seconds.search += begun.elapsed().as_secs_f64();
        Ok(Event::Began { task, adapter, reused })
    }

    /// The examples of a step: each epoch has its own order, the same for all methods.
    fn batch(&mut self, k: u64, examples: usize) -> Vec<Sample> {
        let (task, plan) = (self.state.task, &self.state.plan);
        let per_epoch = examples.div_ceil(plan.batch) as u64;
        let (epoch, at) = (k / per_epoch, (k % per_epoch) as usize * plan.batch);
        let (.., order) = match self.order.take() {
            Some(kept) if (kept.0, kept.1) == (task, epoch) => self.order.insert(kept),
            _ => {
                let rng = Rng::stream(plan.seed, ((task as u64) << 32) | epoch);
                self.order.insert((task, epoch, methods::shuffled(examples, rng)))
            }
        };
        let end = examples.min(at + plan.batch);
        order[at..end].iter().map(|&index| Sample { task, index }).collect()
    }

    fn step(&mut self, k: u64, learner: &mut dyn Learner) -> Result<Event> {
        let task = self.state.task;
        let examples = learner.size(task)[0];
        let (of, per_epoch) = (self.steps(examples), examples.div_ceil(self.state.plan.batch) as u64);
        let samples = self.batch(k, examples);
        let begun = Instant::now();
        let mut chosen = Chosen::new(&self.state, learner, &samples, k, per_epoch)?;
        self.seconds.search += begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let tau = self.state.method.tau();
        let reference = chosen.reference.take();
        // The learner is busy while its gradient is looked at.
        let layout = self.state.method.adds_to_gradients().then(|| learner.layout().clone());
        let (state, mut penalty, mut searching) = (&mut self.state, 0.0, 0.0);
        let mut on_gradient = |loss: f64, values: &[f32], grad: &mut [f32]| {
            let begun = Instant::now();
            if let Some(layout) = &layout {
                penalty = methods::on_gradient(state, layout, &mut chosen, loss, values, grad)?;
            }
            searching += begun.elapsed().as_secs_f64();
            Ok(())
        };
        let gradient = if layout.is_some() { Some(&mut on_gradient as OnGradient<'_>) } else { None };
        let pull = reference.as_deref().filter(|_| tau > 0.0).map(|r| (r, tau));
        let loss = learner.step(&samples, Penalty { gradient, pull })?;
        self.seconds.training += begun.elapsed().as_secs_f64() - searching;
        self.seconds.search += searching;
        let tokens: usize = samples.iter().map(|&s| learner.length(s)).sum();
        let report = &mut self.state.reports[task];
        report.steps += 1;
        report.tokens += tokens as u64;
        report.losses.push(loss);
        report.penalty += (penalty - report.penalty) / report.steps as f64;
        self.state.steps += 1;
        let last = &report.losses[report.losses.len().saturating_sub(WINDOW)..];
        let mean = last.iter().sum::<f64>() / last.len() as f64;
        let learnt = last.len() == WINDOW && mean < self.state.plan.stop_loss;
        let over = k + 1 >= of || learnt;
        if let (Some((reference, tau)), true) = (pull, over) {
            // A penalty that is always 0 is a defect: it goes on record.
            report.penalty = f64::from(tau) * super::signature::l1(&learner.values()?, reference);
        }
        self.state.stage = if over { Stage::End } else { Stage::Step(k + 1) };
        Ok(Event::Step { task, done: k + 1, of, loss })
    }

    fn end(&mut self, learner: &mut dyn Learner) -> Result<()> {
        let task = self.state.task;
        let begun = Instant::now();
        methods::end(&mut self.state, learner)?;
        let values = learner.values()?;
        self.state.reports[task].norm = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        if self.state.method.routes().is_some() {
            let features = learner.features(task, Split::Train)?;
            self.state.router.add(&features, &learner.kinds(task))?;
        }
        self.seconds.search += begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        let tested = if self.state.plan.square { self.state.tasks } else { task + 1 };
        let mut row = Vec::new();
        let mut allowed = all_classes(learner, task + 1);
        for j in 0..tested {
            if j > task {
                allowed = all_classes(learner, j + 1);
            }
            let score = self.test(j, &allowed, learner)?;
            row.push(score);
        }
        learner.set_values(&values)?;
        self.state.scores.rows.push(row);
        self.seconds.evaluation += begun.elapsed().as_secs_f64();
        Ok(())
    }

    /// The score of one task, each test example by the adapter that the method gives it.
    fn test(&mut self, j: usize, allowed: &[usize], learner: &mut dyn Learner) -> Result<f64> {
        let n = learner.size(j)[1];
        let learnt = self.state.reports.len();
        let routes: Vec<usize> = match self.state.method.routes() {
            None => {
                self.state.reports[learnt - 1].routed.push(vec![]);
                let examples = every(learner, j);
                return score(learner, j, &examples, allowed);
            }
            Some(Route::Oracle) if j < learnt => vec![j; n],
            Some(_) => {
                let features = learner.features(j, Split::Test)?;
                let router = self.state.router.ready()?;
                features.iter().map(|f| Ok(router.route(f)?.0)).collect::<Result<_>>()?
            }
        };
        let mut counts = vec![0; learnt];
        routes.iter().for_each(|&k| counts[k] += 1);
        self.state.reports[learnt - 1].routed.push(counts);
        let mut right = 0.0;
        for (m, member) in self.state.members.iter().enumerate() {
            let of = |k: usize| self.state.member_of(k).is_ok_and(|own| own == m);
            let mine: Vec<usize> = (0..n).filter(|&i| of(routes[i])).collect();
            if !mine.is_empty() {
                learner.set_values(&member.values)?;
                right += score(learner, j, &mine, allowed)? * mine.len() as f64;
            }
        }
        Ok(right / n as f64)
    }
}

fn every(learner: &dyn Learner, task: usize) -> Vec<usize> {
    (0..learner.size(task)[1]).collect()
}

/// Classes of the first `tasks` tasks, ascending.
fn all_classes(learner: &dyn Learner, tasks: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..tasks).flat_map(|t| learner.classes(t).to_vec()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Share of these test examples that the learner gets right as it is.
fn score(learner: &mut dyn Learner, task: usize, examples: &[usize], allowed: &[usize]) -> Result<f64> {
    let predicted = learner.predict(task, examples, allowed)?;
    let right = examples.iter().zip(&predicted).filter(|(i, p)| learner.truth(task, **i) == **p).count();
    Ok(right as f64 / examples.len() as f64)
}
