//! What each method does when a task begins, in a step, and when a task ends.

use std::ops::Range;

use super::delta::Delta;
use super::inflora;
use super::layout::Layout;
use super::learner::{Learner, Sample};
use super::penalty::{Blocks, Fisher, ratio};
use super::search::{Arms, Released};
use super::settings::{Grouped, Method};
use super::signature::{self, Part, Signature};
use super::state::{Member, State, TaskReport};
use super::tree::Tree;
use crate::error::{Result, ensure};
use crate::rng::Rng;

/// Streams of random numbers, apart from those of the examples' order.
const DRAWS: u64 = 1 << 63;
const PROBES: u64 = 1 << 62;

/// Ranks of the tasks, where each has its own.
fn blocks(state: &State, layout: &Layout) -> Blocks {
    Blocks { rank: layout.modules.first().map_or(0, |m| m.rank) / state.tasks.max(1) }
}

/// Begins a task: says whether an adapter serves it unchanged.
pub(super) fn begin(state: &mut State, learner: &mut dyn Learner, report: &mut TaskReport) -> Result<bool> {
    let task = state.task;
    if state.method.blocks() {
        let (rank, tasks) = (learner.layout().modules.first().map_or(0, |m| m.rank), state.tasks);
        let same = learner.layout().modules.iter().all(|m| m.rank == rank);
        ensure!(
            same && rank >= tasks && rank.is_multiple_of(tasks),
            Shape,
            "rank {rank} for {tasks} tasks with ranks of their own"
        );
    }
    match state.method.clone() {
        Method::Sequential | Method::Ewc { .. } | Method::L2 { .. } | Method::Released(_) => {}
        Method::Anchor { .. } | Method::Random { .. } => {}
        Method::Paper(_) => {
            let modules = learner.layout().modules.len();
            state.arms = vec![Arms::new(state.tree.nodes.len()); modules];
        }
        Method::Olora { .. } => learner.restart()?,
        Method::Inflora { .. } => {
            let samples = all(learner, task);
            let products = learner.input_products(&samples)?;
            let (mut values, layout) = (learner.values()?, learner.layout());
            let own = blocks(state, layout).ranks(task);
            for (i, m) in layout.modules.iter().enumerate() {
                let old = state.bases.get(i).map_or(&[][..], |b| b);
                let rows = inflora::design(&products[i], old, m.input, own.len())?;
                values[m.a.clone()][own.start * m.input..own.end * m.input].copy_from_slice(&rows);
            }
            learner.set_values(&values)?;
            // Behind the new values: an optimistic rule's anchor begins as they are.
            learner.restart()?;
        }
        Method::Isolated(_) => {
            learner.set_values(&state.anchor)?;
            learner.restart()?;
            report.adapter = state.members.len();
            state.members.push(Member { tasks: vec![task], values: state.anchor.clone() });
        }
        Method::Tree(settings) => return join(state, &settings, learner, report),
    }
    Ok(false)
}

/// Mode R: the task's signature, and the group that it belongs to.
fn join(state: &mut State, settings: &Grouped, learner: &mut dyn Learner, report: &mut TaskReport) -> Result<bool> {
    let task = state.task;
    let own = probe(state, settings.probe, learner)?;
    let modules = own.len();
    report.distances = state.signatures.iter().map(|s| signature::distance(&own, s, 0..modules)).collect();
    state.signatures.push(own);
    let d = &report.distances;
    let nearest = (0..d.len()).min_by(|&a, &b| d[a].total_cmp(&d[b]));
    let again = nearest.filter(|&k| d[k] < settings.gate);
    let widest = |m: &Member| m.tasks.iter().map(|&k| d[k]).fold(0.0, f64::max);
    let group = (0..state.members.len())
        .filter(|&g| widest(&state.members[g]) < settings.share)
        .min_by(|&a, &b| widest(&state.members[a]).total_cmp(&widest(&state.members[b])));
    let member = match (again, group) {
        (Some(k), _) => Some(state.member_of(k)?),
        (None, group) => group,
    };
    report.adapter = member.unwrap_or(state.members.len());
    if let Some(g) = member {
        state.members[g].tasks.push(task);
    } else {
        let warm = nearest.filter(|_| settings.warm).map(|k| state.member_of(k)).transpose()?;
        let values = warm.map_or_else(|| state.anchor.clone(), |g| state.members[g].values.clone());
        state.members.push(Member { tasks: vec![task], values });
    }
    learner.set_values(&state.members[report.adapter].values)?;
    learner.restart()?;
    Ok(again.is_some())
}

/// The signature of the current task: the gradient of B at the stream's first adapter, where that of A is 0.
fn probe(state: &State, examples: usize, learner: &mut dyn Learner) -> Result<Signature> {
    let (task, n) = (state.task, learner.size(state.task)[0]);
    let mut order = shuffled(n, Rng::stream(state.plan.seed, PROBES | task as u64));
    if examples > 0 {
        order.truncate(examples);
    }
    learner.set_values(&state.anchor)?;
    let mut sum = vec![0.0f32; learner.layout().len];
    for part in order.chunks(state.plan.batch) {
        let samples: Vec<Sample> = part.iter().map(|&index| Sample { task, index }).collect();
        let (_, g) = learner.own_gradient(&samples)?;
        sum.iter_mut().zip(&g).for_each(|(s, g)| *s += g * samples.len() as f32);
    }
    let mut own = signature::split(learner.layout(), &sum, Part::B);
    let zero = own.iter().flatten().all(|x| *x == 0.0);
    ensure!(!zero, Usage, "task {task}: its gradient at the first adapter is 0: nothing tells it from others");
    signature::normalize(&mut own);
    Ok(own)
}

/// What a step looks back at.
pub(super) struct Chosen {
    /// Where the pull goes.
    pub(super) reference: Option<Vec<f32>>,
    /// An earlier task for each module.
    tasks: Vec<usize>,
    /// Mode P: the way to it.
    paths: Vec<Vec<usize>>,
    /// Mode P: the gradients at the earlier adapters, where this step asks for them.
    queried: Option<Signature>,
    step: u64,
    per_epoch: u64,
    rng: Rng,
}

impl Chosen {
    pub(super) fn new(
        state: &State,
        learner: &mut dyn Learner,
        samples: &[Sample],
        step: u64,
        per_epoch: u64,
    ) -> Result<Self> {
        let rng = Rng::stream(state.plan.seed, DRAWS | state.steps);
        let mut new =
            Self { reference: None, tasks: Vec::new(), paths: Vec::new(), queried: None, step, per_epoch, rng };
        if state.task == 0 {
            return Ok(new);
        }
        let (task, modules, tau) = (state.task, learner.layout().modules.len(), state.method.tau());
        match state.method.clone() {
            Method::Anchor { .. } => new.reference = state.members.last().map(|m| m.values.clone()),
            Method::Random { .. } => {
                new.tasks = (0..modules).map(|_| new.rng.below(task)).collect();
                new.reference = Some(composite(state, learner.layout(), &new.tasks));
            }
            Method::Paper(settings) => {
                for arms in &state.arms {
                    let path = arms.choose(&state.tree, settings.width, &mut new.rng);
                    let leaf = &state.tree.nodes[path.last().copied().unwrap_or(0)].tasks;
                    new.tasks.push(leaf[if leaf.len() > 1 { new.rng.below(leaf.len()) } else { 0 }]);
                    new.paths.push(path);
                }
                let reference = composite(state, learner.layout(), &new.tasks);
                if settings.query > 0 && step.is_multiple_of(settings.query) {
                    let values = learner.values()?;
                    learner.set_values(&reference)?;
                    let gradient = learner.gradient(samples);
                    learner.set_values(&values)?;
                    let mut there = signature::split(learner.layout(), &gradient?.1, Part::Both);
                    signature::normalize(&mut there);
                    new.queried = Some(there);
                }
                new.reference = Some(reference);
            }
            Method::Tree(_) => {
                let own = &state.members[state.reports[task].adapter];
                // Of a task that is alone in its group there is nothing to hold on to.
                new.reference = (tau > 0.0 && own.tasks.len() > 1).then(|| own.values.clone());
            }
            _ => {}
        }
        Ok(new)
    }
}

/// For each module the values of the adapter that one task ended with; what belongs to no module as the last task left it.
fn composite(state: &State, layout: &Layout, tasks: &[usize]) -> Vec<f32> {
    let mut out = state.members.last().map_or_else(|| state.anchor.clone(), |m| m.values.clone());
    for (m, &k) in layout.modules.iter().zip(tasks) {
        let from = &state.members[k].values;
        for part in [&m.a, &m.b] {
            out[part.clone()].copy_from_slice(&from[part.clone()]);
        }
    }
    out
}

/// Adds the method's penalty to a step's gradient; returns its value.
pub(super) fn on_gradient(
    state: &mut State,
    layout: &Layout,
    chosen: &mut Chosen,
    loss: f64,
    values: &[f32],
    grad: &mut [f32],
) -> Result<f64> {
    let task = state.task;
    let mut penalty = 0.0;
    match state.method.clone() {
        Method::Ewc { lambda } | Method::L2 { lambda } if task > 0 => penalty = state.fisher.pull(lambda, values, grad),
        Method::Olora { lambda } => {
            let own = blocks(state, layout);
            penalty = own.orthogonal(layout, task, lambda, values, grad);
            own.keep(layout, task, true, grad);
        }
        Method::Inflora { .. } => blocks(state, layout).keep(layout, task, false, grad),
        Method::Paper(settings) => {
            accumulate(state, chosen, grad, 1.0);
            if task > 0 && (settings.query == 0 || chosen.queried.is_some()) {
                let here = match chosen.queried {
                    Some(_) => signature::split(layout, grad, Part::Both),
                    None => signature::split(layout, &state.running, Part::Both),
                };
                let mut here = here;
                signature::normalize(&mut here);
                for (m, (path, &k)) in chosen.paths.iter().zip(&chosen.tasks).enumerate() {
                    let there = chosen.queried.as_ref().map_or(&state.signatures[k][m], |q| &q[m]);
                    state.arms[m].observe(path, 0.5 * signature::l1(&here[m], there));
                    state.reports[task].pulls[k] += 1;
                }
            }
        }
        Method::Released(settings) => {
            // The code's loop repeats the addition for every module.
            let weight = layout.modules.len() as f32 / chosen.per_epoch as f32;
            accumulate(state, chosen, values, weight);
            if task == 0 {
                return Ok(0.0);
            }
            let t = chosen.step % chosen.per_epoch;
            if t == 0 {
                state.released = Released::new(task, layout.modules.len());
            }
            let tasks = state.released.choose(&state.tree, t, chosen.per_epoch, &mut chosen.rng);
            let mut vectors: Vec<&[f32]> = Vec::with_capacity(tasks.len());
            for (m, (&k, module)) in tasks.iter().zip(&layout.modules).enumerate() {
                let stored = &state.signatures[k][m];
                state.released.observe(k, m, signature::l1(&state.running[module.a.clone()], stored));
                state.reports[task].pulls[k] += 1;
                vectors.push(stored);
            }
            let weight = settings.lambda * t as f64 / chosen.per_epoch as f64;
            penalty = loss - ratio(layout, &vectors, loss, weight, values, grad);
        }
        _ => {}
    }
    Ok(penalty)
}

/// running += weight v, which begins at 0 with every epoch.
fn accumulate(state: &mut State, chosen: &Chosen, v: &[f32], weight: f32) {
    if chosen.step.is_multiple_of(chosen.per_epoch) {
        state.running = vec![0.0; v.len()];
    }
    state.running.iter_mut().zip(v).for_each(|(s, x)| *s += weight * x);
}

/// Ends a task: keeps what later tasks look back at.
pub(super) fn end(state: &mut State, learner: &mut dyn Learner) -> Result<()> {
    let task = state.task;
    let values = learner.values()?;
    match state.method.clone() {
        Method::Sequential | Method::Olora { .. } => {}
        Method::Isolated(_) => state.members[task].values = values,
        Method::Ewc { .. } => {
            let samples = all(learner, task);
            let batches = samples.chunks(state.plan.batch);
            let share = 1.0 / batches.len() as f32;
            for batch in batches {
                state.fisher.add(&learner.gradient(batch)?.1, share);
            }
            state.fisher.anchor = values;
        }
        // All weights are 1.
        Method::L2 { .. } => state.fisher = Fisher { weights: vec![1.0; values.len()], anchor: values },
        Method::Inflora { energy } => {
            let samples = all(learner, task);
            let products = learner.input_products(&samples)?;
            state.bases.resize(products.len(), Vec::new());
            for ((basis, c), m) in state.bases.iter_mut().zip(&products).zip(&learner.layout().modules) {
                inflora::extend(basis, c, m.input, energy)?;
            }
        }
        Method::Anchor { .. } => {
            if let Some(before) = state.members.last() {
                state.reports[task].unchanged = Delta::of(&values, &before.values)?.sparsity();
            }
            state.members = vec![Member { tasks: vec![task], values }];
        }
        Method::Random { .. } => state.members.push(Member { tasks: vec![task], values }),
        Method::Paper(settings) => {
            state.members.push(Member { tasks: vec![task], values });
            let mut own = signature::split(learner.layout(), &state.running, Part::Both);
            signature::normalize(&mut own);
            state.signatures.push(own);
            // Halved, as the costs are, so that a node's threshold has their unit.
            state.tree = Tree::paper(&state.signatures, settings.depth);
            state.tree.nodes.iter_mut().for_each(|n| n.threshold *= 0.5);
        }
        Method::Released(_) => {
            state.signatures.push(signature::split(learner.layout(), &state.running, Part::A));
            state.tree = Tree::released(&differences(&state.signatures), learner.layout().modules.len());
        }
        Method::Tree(settings) => {
            if state.reports[task].steps > 0 {
                let own = &mut state.members[state.reports[task].adapter];
                if own.tasks.len() > 1 {
                    state.reports[task].unchanged = Delta::of(&values, &own.values)?.sparsity();
                }
                own.values = values;
            }
            state.tree = tree_of_groups(state, &learner.layout().groups(settings.depth));
        }
    }
    Ok(())
}

/// Mode R's tree, whose leaves are the groups: two groups are as far apart as their farthest tasks.
fn tree_of_groups(state: &State, runs: &[Range<usize>]) -> Tree {
    let groups: Vec<&Vec<usize>> = state.members.iter().map(|m| &m.tasks).collect();
    let widest = |depth: usize, a: &[usize], b: &[usize]| {
        let run = &runs[depth.min(runs.len() - 1)];
        let d = |k: usize, l: usize| signature::distance(&state.signatures[k], &state.signatures[l], run.clone());
        a.iter().flat_map(|&k| b.iter().map(move |&l| (k, l))).map(|(k, l)| d(k, l)).fold(0.0, f64::max)
    };
    let mut tree =
        Tree::farthest_pair(groups.len(), usize::MAX, 0.0, |depth, a, b| widest(depth, groups[a], groups[b]));
    for node in &mut tree.nodes {
        if let [group] = node.tasks[..] {
            node.threshold = widest(node.depth, groups[group], groups[group]);
        }
        node.pivots = node.pivots.map(|pair| pair.map(|g| groups[g][0]));
        node.tasks = node.tasks.iter().flat_map(|&g| groups[g].iter().copied()).collect();
        node.tasks.sort_unstable();
    }
    tree
}

/// The first vector, and each later one minus the one before.
pub fn differences(stored: &[Signature]) -> Vec<Signature> {
    let minus = |a: &Vec<f32>, b: &Vec<f32>| a.iter().zip(b).map(|(a, b)| a - b).collect();
    let of = |k: usize| match k {
        0 => stored[0].clone(),
        _ => stored[k].iter().zip(&stored[k - 1]).map(|(a, b)| minus(a, b)).collect(),
    };
    (0..stored.len()).map(of).collect()
}

/// 0 .. n in an order drawn by `rng`.
pub(super) fn shuffled(n: usize, mut rng: Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    rng.shuffle(&mut order);
    order
}

fn all(learner: &dyn Learner, task: usize) -> Vec<Sample> {
    (0..learner.size(task)[0]).map(|index| Sample { task, index }).collect()
}
