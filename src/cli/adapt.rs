//! `quadriga adapt`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::flags::{Common, LoraShape};
use super::out;
use super::train::{StepBar, named, set};
use crate::engine::continual::{Event, Method, State};
use crate::engine::{AdaptRun, Adapted, Lora, Told};
use crate::error::{Context, Error, ErrorKind, Result, bail};

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
    /// l2, olora, inflora, anchor, random, paper, released. Several, or all, run one after another, each into OUT/METHOD.
    #[arg(long, value_delimiter = ',')]
    pub method: Vec<String>,
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
    #[command(flatten)]
    pub shape: LoraShape,
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
    /// ewc, l2, olora and released: strength of the penalty.
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
    let methods = methods(&run, a)?;
    let bar = StepBar::new().bar;
    let began = std::time::Instant::now();
    let mut on = |told: Told<'_>| match told {
        Told::Event(task, Event::Began { reused, adapter, .. }) => {
            let how = if *reused { "served as it is by" } else { "learnt with" };
            tracing::info!("{task}: {how} adapter {adapter}");
        }
        Told::Event(task, Event::Step { done, of, loss, .. }) => {
            tracing::info!("{task}: step {done} of {of}: loss {loss:.4}");
            bar.set_length(*of);
            bar.set_position(*done);
            bar.set_message(format!("{task}: loss {loss:.3}"));
        }
        Told::Event(_, Event::Finished { .. }) => {}
        Told::Row(state) => bar.suspend(|| eprintln!("{}", row(state))),
        Told::Saved(step) => tracing::info!("checkpoint of step {step}"),
    };
    let all = run.compare(&methods, &common.path()?, &a.out, a.resume, common.options()?, &mut on);
    bar.finish_and_clear();
    let all = all?;
    let wall = out::round(began.elapsed().as_secs_f64(), 3);
    if common.json {
        let mut json = match &all[..] {
            [one] => one.json(),
            several => json!({"methods": several.iter().map(Adapted::json).collect::<Vec<_>>()}),
        };
        json["model"] = json!(common.model);
        json["out"] = json!(a.out);
        json["wall_s"] = json!(wall);
        json["peak_rss_mb"] = json!(out::peak_rss_mb());
        return out::print_json(&json);
    }
    if let [one] = &all[..] {
        let s = &one.state;
        out::print(&s.tree.text(&|k| one.names[k].clone()))?;
        if s.method.routes().is_some() {
            let to = a.out.join("adapters");
            out::print(&format!("{} adapters for {} tasks in {}\n", s.members.len(), s.tasks, to.display()))?;
        }
    }
    // BWT by the usual rule: negative where something was forgotten.
    out::print("method       average  BWT     learning  adapters  steps   training  search   tests\n")?;
    for one in &all {
        let (m, s, t) = (&one.measures, &one.state, &one.seconds);
        out::print(&format!(
            "{:<11} {:6.1} %  {:+6.1}  {:6.1} %  {:8}  {:5}  {:7.1} s  {:6.1} s  {:6.1} s\n",
            s.method.name(),
            100.0 * m.average,
            100.0 * m.bwt,
            100.0 * m.learning,
            one.adapters(),
            s.steps,
            t.training,
            t.search,
            t.evaluation
        ))?;
    }
    eprintln!("[{wall:.1} s; BWT negative: forgotten; scores as pictures in {}]", a.out.display());
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
    set(&mut run.plan.epochs, &a.epochs);
    set(&mut run.plan.batch, &a.batch);
    set(&mut run.plan.stop_loss, &a.stop_loss);
    run.plan.square |= a.square;
    set(&mut run.optimizer.lr, &a.lr);
    a.shape.apply(&mut run.lora);
    set(&mut run.reading.limits[0], &a.train_limit);
    set(&mut run.reading.limits[1], &a.test_limit);
    set(&mut run.reading.max_length, &a.max_length);
    named("--long-rows", &a.long_rows, &mut run.reading.long_rows)?;
    if a.router_layer.is_some() {
        run.router_layer = a.router_layer;
    }
    run.cache &= !a.no_cache;
    run.end &= !a.no_end;
    set(&mut run.rows, &a.rows);
    set(&mut run.save_every, &a.save_every);
    Ok(run)
}

/// The methods that were asked for, each with the flags that belong to it; a flag that belongs to none is refused.
fn methods(run: &AdaptRun, a: &AdaptArgs) -> Result<Vec<Method>> {
    let named = |name: &str| {
        let none = || Error::new(ErrorKind::Usage, format!("--method {name}: there are {}", Method::NAMES.join(", ")));
        Method::named(name).ok_or_else(none)
    };
    let mut methods: Vec<Method> = match &a.method[..] {
        [] => vec![run.method.clone()],
        [all] if all == "all" => Method::NAMES.iter().map(|n| named(n)).collect::<Result<_>>()?,
        names => names.iter().map(|n| named(n)).collect::<Result<_>>()?,
    };
    let given = [
        ("--share", a.share.is_some()),
        ("--gate", a.gate.is_some()),
        ("--probe", a.probe.is_some()),
        ("--warm", a.warm),
        ("--depth", a.depth.is_some()),
        ("--tau", a.tau.is_some()),
        ("--lambda", a.lambda.is_some()),
    ];
    let used: Vec<&str> = methods.iter_mut().flat_map(|m| of_method(m, a)).collect();
    if let Some((flag, _)) = given.iter().find(|(flag, given)| *given && !used.contains(flag)) {
        let names: Vec<&str> = methods.iter().map(Method::name).collect();
        bail!(Usage, "{flag} does not belong to the method {}", names.join(", "));
    }
    Ok(methods)
}

/// Sets what belongs to this method; the flags that do.
fn of_method(method: &mut Method, a: &AdaptArgs) -> Vec<&'static str> {
    match method {
        Method::Tree(t) => {
            set(&mut t.share, &a.share);
            set(&mut t.gate, &a.gate);
            set(&mut t.probe, &a.probe);
            set(&mut t.depth, &a.depth);
            set(&mut t.tau, &a.tau);
            t.warm |= a.warm;
            vec!["--share", "--gate", "--probe", "--warm", "--depth", "--tau"]
        }
        Method::Paper(p) => {
            set(&mut p.depth, &a.depth);
            set(&mut p.tau, &a.tau);
            vec!["--depth", "--tau"]
        }
        Method::Anchor { tau } | Method::Random { tau } => {
            set(tau, &a.tau);
            vec!["--tau"]
        }
        Method::Ewc { lambda } | Method::L2 { lambda } | Method::Olora { lambda } => {
            set(lambda, &a.lambda.map(|l| l as f32));
            vec!["--lambda"]
        }
        Method::Released(r) => {
            set(&mut r.lambda, &a.lambda);
            vec!["--lambda"]
        }
        Method::Sequential | Method::Isolated(_) | Method::Inflora { .. } => Vec::new(),
    }
}
