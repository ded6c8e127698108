//! `quadriga adapt`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::flags::Common;
use super::out;
use super::train::{StepBar, named, set};
use crate::engine::continual::{Event, Method, State};
use crate::engine::{AdaptRun, Lora, Told};
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};

/// Learn tasks one after another and keep them all; results: OUT/adapters with OUT/router.json, or OUT/adapter, in PEFT folders.
#[derive(Args)]
pub(super) struct AdaptArgs {
    /// Files of the tasks, in their order: .jsonl or .jsonl.gz with {"split": "train" or "test", "input", "label"}; a first line may
    /// hold {"task", "labels"}.
    #[arg(required_unless_present = "config")]
    pub tasks: Vec<PathBuf>,
    /// Folder of the results and checkpoints.
    #[arg(long)]
    pub out: PathBuf,
    /// Settings of an earlier run (OUT/run.json); flags override them.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Go on from the newest checkpoint in OUT.
    #[arg(long)]
    pub resume: bool,
    /// tree: groups of similar tasks share an adapter, a router picks it. Others, for comparison: sequential, isolated, oracle, ewc,
    /// olora, inflora, anchor, random, paper, released.
    #[arg(long)]
    pub method: Option<String>,
    /// Times that a task's examples are seen.
    #[arg(long)]
    pub epochs: Option<u64>,
    /// Examples of a step.
    #[arg(long)]
    pub batch: Option<usize>,
    /// End a task early once the mean loss of 8 steps is below this, nats.
    #[arg(long)]
    pub stop_loss: Option<f64>,
    /// Test every task after every task, for forward transfer.
    #[arg(long)]
    pub square: bool,
    /// Learning rate.
    #[arg(long)]
    pub lr: Option<f32>,
    /// Columns of B.
    #[arg(long)]
    pub rank: Option<usize>,
    /// Updates are scaled by alpha / rank.
    #[arg(long)]
    pub alpha: Option<f32>,
    /// Linears to adapt: q, k, v, o, gate, up, down.
    #[arg(long, value_delimiter = ',')]
    pub targets: Option<Vec<String>>,
    /// Adapt only so many of the upper layers; those below run once for each example. 0: all.
    #[arg(long)]
    pub top_layers: Option<usize>,
    /// At most so many training examples of a task; 0: all.
    #[arg(long)]
    pub train_limit: Option<usize>,
    /// At most so many test examples of a task; 0: all.
    #[arg(long)]
    pub test_limit: Option<usize>,
    /// Most tokens of a prompt.
    #[arg(long)]
    pub max_length: Option<usize>,
    /// What to do with longer ones: error, truncate or skip.
    #[arg(long)]
    pub long_rows: Option<String>,
    /// tree: tasks of a group are nearer to one another than this, 0 to 1.
    #[arg(long)]
    pub share: Option<f64>,
    /// tree: a task as near to an earlier one as this is served by its adapter as it is.
    #[arg(long)]
    pub gate: Option<f64>,
    /// tree: training examples that make a task's signature; 0: all.
    #[arg(long)]
    pub probe: Option<usize>,
    /// tree: runs of modules, from the input, by which the tree's levels are split; paper: levels of the tree.
    #[arg(long)]
    pub depth: Option<usize>,
    /// tree: a new group begins with the nearest one's adapter.
    #[arg(long)]
    pub warm: bool,
    /// tree, anchor, random and paper: strength of the L1 pull.
    #[arg(long)]
    pub tau: Option<f32>,
    /// ewc, olora and released: strength of the penalty.
    #[arg(long)]
    pub lambda: Option<f64>,
    /// Layer at whose input the router looks.
    #[arg(long)]
    pub router_layer: Option<usize>,
    /// Run frozen layers in every epoch and test instead of keeping what they give.
    #[arg(long)]
    pub no_cache: bool,
    /// Do not learn that the text ends behind a label.
    #[arg(long)]
    pub no_end: bool,
    /// Most rows of a pass.
    #[arg(long)]
    pub rows: Option<usize>,
    /// Steps between checkpoints; 0: one behind each task.
    #[arg(long)]
    pub save_every: Option<u64>,
}

pub(super) fn run(common: &Common, a: &AdaptArgs) -> Result<()> {
    let run = settings(common, a)?;
    let mut steps = StepBar::new();
    let bar = steps.bar.clone();
    let began = std::time::Instant::now();
    let mut last = began;
    let mut on = |told: Told<'_>| match told {
        Told::Event(task, Event::Began { reused, adapter, .. }) => {
            let how = if *reused { "served as it is by" } else { "learnt with" };
            tracing::info!("{task}: {how} adapter {adapter}");
            last = std::time::Instant::now();
        }
        Told::Event(task, Event::Step { done, of, loss, .. }) => {
            let seconds = last.elapsed().as_secs_f64();
            last = std::time::Instant::now();
            steps.step(*done, *of, *loss, run.plan.batch as f64 / seconds.max(1e-9), f64::NAN);
            bar.set_message(format!("{task}: loss {loss:.3}"));
        }
        Told::Event(_, Event::Finished { .. }) => {}
        Told::Row(state) => bar.suspend(|| eprintln!("{}", row(state))),
        Told::Saved(step) => tracing::info!("checkpoint of step {step}"),
    };
    let adapted = run.start(&common.path()?, &a.out, a.resume, common.options()?, &mut on);
    bar.finish_and_clear();
    let adapted = adapted?;
    if common.json {
        let mut json = adapted.json();
        json["model"] = json!(common.model);
        json["out"] = json!(a.out);
        json["wall_s"] = json!(out::round(began.elapsed().as_secs_f64(), 3));
        json["peak_rss_mb"] = json!(out::peak_rss_mb());
        return out::print_json(&json);
    }
    let (m, s) = (&adapted.measures, &adapted.state);
    let name = |k: usize| adapted.names[k].clone();
    if !s.tree.nodes.is_empty() {
        out::print(&s.tree.text(&name))?;
    }
    out::print(&format!(
        "{}: average accuracy {:.1} %, BWT {:+.1} (negative: forgotten), learning accuracy {:.1} %\n",
        s.method.name(),
        100.0 * m.average,
        100.0 * m.bwt,
        100.0 * m.learning
    ))?;
    if s.method.routes().is_some() {
        out::print(&format!(
            "{} adapters for {} tasks in {}\n",
            s.members.len(),
            s.tasks,
            a.out.join("adapters").display()
        ))?;
    }
    let t = &adapted.seconds;
    eprintln!(
        "[{} steps; {:.1} s training, {:.1} s search, {:.1} s tests; scores in {}]",
        s.steps,
        t.training,
        t.search,
        t.evaluation,
        a.out.join("scores.svg").display()
    );
    Ok(())
}

/// The newest row of the scores, for people.
fn row(state: &State) -> String {
    let last = state.scores.rows.last().map_or(&[][..], |r| r);
    let cells: Vec<String> = last.iter().map(|v| format!("{:3.0}", 100.0 * v)).collect();
    let n = state.scores.rows.len();
    let average = last.iter().take(n).sum::<f64>() / n.max(1) as f64;
    format!("[after task {n}: {} | {:.1} %]", cells.join(" "), 100.0 * average)
}

fn settings(common: &Common, a: &AdaptArgs) -> Result<AdaptRun> {
    let mut run = match &a.config {
        Some(path) => {
            let text = std::fs::read(path).map_err(|e| Error::io(path.display(), e))?;
            let parsed = serde_json::from_slice::<AdaptRun>(&text);
            parsed.map_err(|e| Error::new(ErrorKind::Usage, e.to_string())).context(|| path.display().to_string())?
        }
        None => {
            let method = Method::named("tree");
            let targets = vec!["q".into(), "v".into()];
            let lora = Lora { rank: 8, alpha: 32.0, targets, ..Lora::default() };
            let optimizer = json!({"lr": 1e-3});
            let run = json!({"tasks": [], "method": method, "lora": lora, "optimizer": optimizer, "plan": {"seed": common.seed}});
            serde_json::from_value(run).map_err(|e| Error::with_source(ErrorKind::Usage, "settings of the run", e))?
        }
    };
    if !a.tasks.is_empty() {
        run.tasks.clone_from(&a.tasks);
    }
    if let Some(name) = &a.method {
        let known = Method::named(name);
        let none = || Error::new(ErrorKind::Usage, format!("--method {name}: there are {}", Method::NAMES.join(", ")));
        run.method = known.ok_or_else(none)?;
    }
    set(&mut run.plan.epochs, &a.epochs);
    set(&mut run.plan.batch, &a.batch);
    set(&mut run.plan.stop_loss, &a.stop_loss);
    run.plan.square |= a.square;
    set(&mut run.optimizer.lr, &a.lr);
    set(&mut run.lora.rank, &a.rank);
    set(&mut run.lora.alpha, &a.alpha);
    set(&mut run.lora.targets, &a.targets);
    set(&mut run.lora.top_layers, &a.top_layers);
    set(&mut run.reading.limits[0], &a.train_limit);
    set(&mut run.reading.limits[1], &a.test_limit);
    set(&mut run.reading.max_length, &a.max_length);
    named("--long-rows", &a.long_rows, &mut run.reading.long_rows)?;
    ensure!(
        run.reading.max_length > 1,
        Usage,
        "--max-length {}: a prompt has two tokens at least",
        run.reading.max_length
    );
    if a.router_layer.is_some() {
        run.router_layer = a.router_layer;
    }
    run.cache &= !a.no_cache;
    run.end &= !a.no_end;
    set(&mut run.rows, &a.rows);
    set(&mut run.save_every, &a.save_every);
    of_method(&mut run.method, a)?;
    Ok(run)
}

/// Settings that belong to some methods only; a flag of another one's is refused.
fn of_method(method: &mut Method, a: &AdaptArgs) -> Result<()> {
    let name = method.name();
    let mut given = [
        ("--share", a.share.is_some()),
        ("--gate", a.gate.is_some()),
        ("--probe", a.probe.is_some()),
        ("--warm", a.warm),
        ("--depth", a.depth.is_some()),
        ("--tau", a.tau.is_some()),
        ("--lambda", a.lambda.is_some()),
    ];
    let mut used = |flag: &str| given.iter_mut().filter(|g| g.0 == flag).for_each(|g| g.1 = false);
    match method {
        Method::Tree(t) => {
            set(&mut t.share, &a.share);
            set(&mut t.gate, &a.gate);
            set(&mut t.probe, &a.probe);
            set(&mut t.depth, &a.depth);
            set(&mut t.tau, &a.tau);
            t.warm |= a.warm;
            ["--share", "--gate", "--probe", "--warm", "--depth", "--tau"].iter().for_each(|f| used(f));
        }
        Method::Paper(p) => {
            set(&mut p.depth, &a.depth);
            set(&mut p.tau, &a.tau);
            ["--depth", "--tau"].iter().for_each(|f| used(f));
        }
        Method::Anchor { tau } | Method::Random { tau } => {
            set(tau, &a.tau);
            used("--tau");
        }
        Method::Ewc { lambda } | Method::Olora { lambda } => {
            set(lambda, &a.lambda.map(|l| l as f32));
            used("--lambda");
        }
        Method::Released(r) => {
            set(&mut r.lambda, &a.lambda);
            used("--lambda");
        }
        Method::Sequential | Method::Isolated(_) | Method::Inflora { .. } => {}
    }
    if let Some((flag, _)) = given.iter().find(|g| g.1) {
        bail!(Usage, "{flag} does not belong to the method {name}");
    }
    Ok(())
}
