//! Where a stream stands: everything but the model, in one value that can be written and read.

use serde::{Deserialize, Serialize};

use super::metrics::Scores;
use super::penalty::Fisher;
use super::router::Router;
use super::search;
use super::settings::{Method, Plan};
use super::signature::Signature;
use super::tree::Tree;
use crate::error::{Result, bail, ensure};

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The task begins.
    Begin,
    /// This step of it.
    Step(u64),
    /// It ends: what was learnt is kept, all tasks so far are tested.
    End,
}

/// An adapter with the tasks that it serves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Numbers of its tasks.
    pub tasks: Vec<usize>,
    /// Its values.
    #[serde(skip)]
    pub values: Vec<f32>,
}

/// How a task went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Steps done; 0 where an adapter served unchanged.
    pub steps: u64,
    /// Tokens or patches learnt from, every epoch counted.
    pub tokens: u64,
    /// Loss of every step, nats.
    pub losses: Vec<f64>,
    /// Distance of its signature to those of the tasks before.
    pub distances: Vec<f64>,
    /// How often each earlier task was chosen for a module.
    pub pulls: Vec<u64>,
    /// The method's penalty: its mean value over the steps where its gradient is added, its value at the last step where it is a pull.
    pub penalty: f64,
    /// Its adapter, of those that are kept.
    pub adapter: usize,
    /// Of the test examples of every task so far, how many went to each task; empty where nothing routes.
    pub routed: Vec<Vec<usize>>,
    /// Share of the adapter's values that a pull left exactly where they were before the task.
    pub unchanged: f64,
    /// Norm of the adapter behind it.
    pub norm: f64,
}

/// All that a stream needs to go on, but the optimiser's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// How it is learnt.
    pub method: Method,
    /// What all methods do alike.
    pub plan: Plan,
    /// Tasks of the stream.
    pub tasks: usize,
    /// The current task.
    pub task: usize,
    /// What comes next in it.
    pub stage: Stage,
    /// Steps since the beginning of the stream.
    pub steps: u64,
    /// Adapters that are kept: one for each group or task; else what each task ended with, where the method looks back at it.
    pub members: Vec<Member>,
    /// Scores.
    pub scores: Scores,
    /// How tasks went; the last one may be under way.
    pub reports: Vec<TaskReport>,
    /// Over all tasks learnt, where the method builds one.
    pub tree: Tree,
    /// Features of tasks.
    pub router: Router,
    /// Bandits of mode P, one for each module.
    pub arms: Vec<search::Arms>,
    /// That of mode C.
    pub released: search::Released,
    /// Signatures of tasks.
    #[serde(skip)]
    pub signatures: Vec<Signature>,
    /// Modes P and C: the running sum that becomes the current task's signature.
    #[serde(skip)]
    pub running: Vec<f32>,
    /// Of EWC.
    #[serde(skip)]
    pub fisher: Fisher,
    /// InfLoRA's bases of older tasks' inputs: for each module, rows of an orthonormal basis.
    #[serde(skip)]
    pub bases: Vec<Vec<f32>>,
    /// The adapter as the stream began: B = 0.
    #[serde(skip)]
    pub anchor: Vec<f32>,
}

/// A tensor: name and values.
pub type Tensor = (String, Vec<f32>);

impl State {
    /// Of a stream that has not begun.
    ///
    /// # Errors
    /// Impossible settings.
    pub fn new(method: Method, plan: Plan, tasks: usize, anchor: Vec<f32>) -> Result<Self> {
        method.validate()?;
        plan.validate()?;
        Ok(Self {
            method,
            plan,
            tasks,
            task: 0,
            stage: Stage::Begin,
            steps: 0,
            members: Vec::new(),
            scores: Scores::default(),
            reports: Vec::new(),
            tree: Tree::default(),
            router: Router::default(),
            arms: Vec::new(),
            released: search::Released::new(0, 0),
            signatures: Vec::new(),
            running: Vec::new(),
            fisher: Fisher::default(),
            bases: Vec::new(),
            anchor,
        })
    }

    /// What JSON leaves out.
    pub fn tensors(&self) -> Vec<Tensor> {
        let mut all = vec![("anchor".into(), self.anchor.clone()), ("running".into(), self.running.clone())];
        all.extend([
            ("fisher.weights".into(), self.fisher.weights.clone()),
            ("fisher.anchor".into(), self.fisher.anchor.clone()),
        ]);
        let list = |what: &str, values: &[Vec<f32>]| -> Vec<Tensor> {
            values.iter().enumerate().map(|(i, v)| (format!("{what}.{i}"), v.clone())).collect()
        };
        all.extend(self.members.iter().enumerate().map(|(i, m)| (format!("member.{i}"), m.values.clone())));
        for (k, s) in self.signatures.iter().enumerate() {
            all.extend(list(&format!("signature.{k}"), s));
        }
        all.extend(list("basis", &self.bases));
        all
    }

    /// Takes in what [`State::tensors`] gave. Signatures have `modules` parts.
    ///
    /// # Errors
    /// `Weights`, naming a tensor that is missing.
    pub fn restore(&mut self, tensors: &[Tensor], modules: usize) -> Result<()> {
        let find = |name: &str| tensors.iter().find(|t| t.0 == name).map(|t| t.1.clone());
        let need = |name: &str| match find(name) {
            Some(v) => Ok(v),
            None => bail!(Weights, "the checkpoint has no tensor {name}"),
        };
        self.anchor = need("anchor")?;
        self.running = need("running")?;
        self.fisher = Fisher { weights: need("fisher.weights")?, anchor: need("fisher.anchor")? };
        for (i, m) in self.members.iter_mut().enumerate() {
            m.values = need(&format!("member.{i}"))?;
            let n = self.anchor.len();
            ensure!(m.values.len() == n, Weights, "member.{i} has {} values, the adapter {n}", m.values.len());
        }
        self.signatures.clear();
        while find(&format!("signature.{}.0", self.signatures.len())).is_some() {
            let k = self.signatures.len();
            let parts = (0..modules).map(|m| need(&format!("signature.{k}.{m}"))).collect::<Result<_>>()?;
            self.signatures.push(parts);
        }
        self.bases.clear();
        while let Some(basis) = find(&format!("basis.{}", self.bases.len())) {
            self.bases.push(basis);
        }
        Ok(())
    }

    /// The adapter that serves a task.
    ///
    /// # Errors
    /// A task that was not learnt.
    pub fn member_of(&self, task: usize) -> Result<usize> {
        match self.reports.get(task) {
            Some(r) if r.adapter < self.members.len() => Ok(r.adapter),
            _ => bail!(Usage, "task {task} has no adapter"),
        }
    }
}
