//! A stream of tasks from files to files: adapters, scores, tree and router out.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::stream_files::{StreamReading, TaskFile, tokens};
use super::training::{Lora, to_peft};
use super::{EngineOptions, OnDevice, Texts, on_device};
use crate::backend::Train;
use crate::continual::language::{Language, LanguageSettings, TextStream};
use crate::continual::metrics::Measures;
use crate::continual::picture::{scores_svg, tree_svg};
use crate::continual::{Event, Learner, Method, Plan, Router, Seconds, State, Stream};
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::files::write_file;
use crate::format::Checkpoint;
use crate::model::lora::ModuleValues;
use crate::model::{Adapter, Model, Place, Recompute};
use crate::train::run::checkpoints;
use crate::train::{Checkpoint as Saved, Cursor, Settings, Trainable, Trainer};

/// What a run's folder has for [`Routed`].
pub(super) const ROUTER: &str = "router.json";

/// Linears whose inputs InfLoRA knows.
const INFLORA: [&str; 6] = ["q", "k", "v", "q_proj", "k_proj", "v_proj"];

/// A whole run, as `run.json` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdaptRun {
    /// Files of the tasks, in the order of the stream.
    pub tasks: Vec<PathBuf>,
    /// How tasks are kept apart or held together.
    pub method: Method,
    /// What every method does alike.
    #[serde(default)]
    pub plan: Plan,
    /// Shape of an adapter; of a task's part, where each task has ranks of its own.
    #[serde(default)]
    pub lora: Lora,
    /// Optimiser.
    #[serde(default)]
    pub optimizer: Settings,
    /// How files are read.
    #[serde(default)]
    pub reading: StreamReading,
    /// Layer at whose input the router looks; `None`: the lowest adapted one, or, where all are adapted, two thirds up.
    #[serde(default)]
    pub router_layer: Option<usize>,
    /// Keeps what frozen layers below the adapters give.
    #[serde(default = "yes")]
    pub cache: bool,
    /// Learns that the text ends behind a label.
    #[serde(default = "yes")]
    pub end: bool,
    /// Most rows of a pass.
    #[serde(default = "rows")]
    pub rows: usize,
    /// Steps between checkpoints; 0: one behind each task.
    #[serde(default)]
    pub save_every: u64,
}

fn yes() -> bool {
    true
}

fn rows() -> usize {
    1024
}

/// What a run tells while it goes.
#[derive(Debug)]
pub enum Told<'a> {
    /// Something happened to the task of this name.
    Event(&'a str, &'a Event),
    /// A task ended: where the stream stands.
    Row(&'a State),
    /// A checkpoint of this step is on disk.
    Saved(u64),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapted {
    /// Names of the tasks.
    pub names: Vec<String>,
    /// Where the stream stands.
    pub state: State,
    /// Its measures.
    pub measures: Measures,
    /// Seconds by what they went into, those before a resumption included.
    pub seconds: Seconds,
    /// Bytes kept of frozen layers.
    pub cached_bytes: usize,
    /// Values of an adapter.
    pub parameters: usize,
}

/// Which adapter serves which task, and the router that tells tasks by their prompts: `router.json` in a run's folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Routing {
    /// At whose input the features are taken.
    pub layer: usize,
    /// Names of the tasks.
    pub tasks: Vec<String>,
    /// For each task the folder of its adapter.
    pub adapters: Vec<PathBuf>,
    pub router: Router,
}

impl AdaptRun {
    /// Runs it on the model at `model`; results and checkpoints go to the folder `out`. With `resume`, goes on from the newest
    /// checkpoint there, if there is one, to the very values that it would have had without a break.
    ///
    /// # Errors
    /// Whatever is wrong with settings, files or device, by name; `Diverged` with the last checkpoint kept.
    pub fn start(
        &self,
        model: &Path,
        out: &Path,
        resume: bool,
        options: EngineOptions,
        on: &mut dyn FnMut(Told<'_>),
    ) -> Result<Adapted> {
        let mut all = self.compare(std::slice::from_ref(&self.method), model, out, resume, options, on)?;
        Ok(all.swap_remove(0))
    }

    /// The same with each of several methods in turn, on the same examples in the same order. One method's results go to `out`
    /// itself, those of several to a folder in it for each, by its name. Frozen layers run once for all.
    ///
    /// # Errors
    /// As [`AdaptRun::start`]; no method, or one twice.
    pub fn compare(
        &self,
        methods: &[Method],
        model: &Path,
        out: &Path,
        resume: bool,
        options: EngineOptions,
        on: &mut dyn FnMut(Told<'_>),
    ) -> Result<Vec<Adapted>> {
        let other = options.adapter.is_none();
        ensure!(other, Usage, "--adapter: a stream trains adapters of its own");
        ensure!(!methods.is_empty(), Usage, "no method");
        ensure!(self.rows > 0, Usage, "passes of 0 rows");
        let most = self.reading.max_length;
        ensure!(most > 1, Usage, "max_length {most}: a prompt has two tokens at least");
        self.optimizer.validate()?;
        self.plan.validate()?;
        let mut runs = Vec::new();
        for (i, method) in methods.iter().enumerate() {
            method.validate()?;
            let name = method.name();
            let decays = self.optimizer.weight_decay > 0.0 || self.optimizer.l1 > 0.0;
            ensure!(!(method.blocks() && decays), Usage, "{name}: weight_decay and l1 would move frozen ranks");
            let pulled = method.tau() > 0.0 && self.optimizer.l1 > 0.0;
            ensure!(!pulled, Usage, "{name}: the optimiser's l1 and the method's own pull exclude one another");
            let twice = methods[..i].iter().any(|m| m.name() == name);
            ensure!(!twice, Usage, "the method {name} twice");
            let other = matches!(method, Method::Inflora { .. })
                && self.lora.targets.iter().any(|t| !INFLORA.contains(&&t[..]));
            ensure!(!other, Usage, "inflora adapts q, k and v, not {}", self.lora.targets.join(", "));
            let out = if methods.len() == 1 { out.to_owned() } else { out.join(name) };
            let saved = Saved::to_resume(&checkpoints(&out), resume)?;
            runs.push(One { run: Self { method: method.clone(), ..self.clone() }, out, saved });
        }
        let checkpoint = Checkpoint::open(model)?;
        ensure!(checkpoint.config().diffusion.is_none(), Unsupported, "{}: a diffusion model", model.display());
        let texts = Texts::new(checkpoint.tokenizer()?, checkpoint.chat_template()?);
        let read = |path: &PathBuf| TaskFile::read(path, self.reading.limits);
        let files: Vec<TaskFile> = self.tasks.iter().map(read).collect::<Result<_>>()?;
        let names = files.iter().map(|f| f.name.clone()).collect();
        let stream = tokens(&files, &texts, &self.reading)?;
        on_device(options, Job { runs, checkpoint: &checkpoint, names, stream, on })
    }

    /// The shape of the adapter that trains: where each of `tasks` tasks has ranks of its own, it has all of them.
    fn shape(&self, tasks: usize) -> Lora {
        let mut lora = self.lora.clone();
        if self.method.blocks() {
            lora.rank *= tasks;
            // The same factor on every task's part.
            lora.alpha *= if lora.rank_stabilized { (tasks as f32).sqrt() } else { tasks as f32 };
        }
        lora
    }
}

/// A run with one method, its folder, and where it stood.
struct One {
    run: AdaptRun,
    out: PathBuf,
    saved: Option<Saved>,
}

struct Job<'a> {
    runs: Vec<One>,
    checkpoint: &'a Checkpoint,
    names: Vec<String>,
    stream: TextStream,
    on: &'a mut dyn FnMut(Told<'_>),
}

impl OnDevice for Job<'_> {
    type Out = Vec<Adapted>;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<Vec<Adapted>> {
        let Self { runs, checkpoint, names, stream, on } = self;
        let progress = |done, total| options.progress.iter().for_each(|p| p(done, total));
        let model = Model::load(std::sync::Arc::new(be), checkpoint, progress).context(|| "weights".into())?;
        let (mut parts, mut all) = ((model, stream), Vec::new());
        for one in &runs {
            let done = one.run(checkpoint, parts.0, parts.1, &names, on);
            let (adapted, model, stream) = done.context(|| format!("method {}", one.run.method.name()))?;
            parts = (model, stream);
            all.push(adapted);
        }
        Ok(all)
    }
}

impl One {
    fn run<B: Train>(
        &self,
        checkpoint: &Checkpoint,
        model: Model<B>,
        stream: TextStream,
        names: &[String],
        on: &mut dyn FnMut(Told<'_>),
    ) -> Result<(Adapted, Model<B>, TextStream)> {
        let Self { run, out, saved } = self;
        let json = serde_json::to_value(run).map_err(|e| Error::with_source(ErrorKind::Config, "settings", e))?;
        std::fs::create_dir_all(out).map_err(|e| Error::io(out.display(), e))?;
        let (lora, count, cfg) = (run.shape(names.len()), names.len(), model.config().clone());
        let specs = lora.modules(&cfg)?;
        let mut adapter = Adapter::init(model.backend(), &cfg, &specs, run.plan.seed)?;
        adapter.train(model.backend(), |_| true)?;
        let (places, cut) = (adapter.places(), adapter.lowest().unwrap_or(0));
        let router_layer = run.router_layer.unwrap_or(if cut > 0 { cut } else { cfg.layers * 2 / 3 });
        let rows = run.rows.max(stream.longest());
        let (trainable, optimizer) = (Trainable::Adapter(adapter), run.optimizer.clone());
        let trainer = Trainer::new(model, trainable, optimizer, rows, Recompute::Pointwise)?;
        let settings = LanguageSettings { router_layer, cache: run.cache, end: run.end, rows };
        let digest = stream.digest();
        let mut learner = Language::new(trainer, stream, settings)?;
        let like = json!({"run": json, "model": checkpoint.path(), "examples": digest});
        let mut stream = begin(run, count, &like, saved.as_ref(), &mut learner)?;
        write_file(&out.join("run.json"), |to| Ok(serde_json::to_writer_pretty(to, &json)?))?;
        while let Some(event) = stream.advance(&mut learner)? {
            let (task, steps) = (stream.state().reports.len() - 1, stream.state().steps);
            on(Told::Event(&names[task], &event));
            let finished = matches!(event, Event::Finished { .. });
            if finished {
                on(Told::Row(stream.state()));
            }
            let due = matches!(event, Event::Step { .. }) && run.save_every > 0 && steps % run.save_every == 0;
            if finished || due {
                save(&stream, &learner, run.plan.seed, &like)?.save(&checkpoints(out), 1)?;
                on(Told::Saved(steps));
            }
        }
        let adapted = Adapted {
            names: names.to_vec(),
            measures: stream.state().scores.measures()?,
            seconds: stream.seconds,
            cached_bytes: learner.cached_bytes(),
            parameters: learner.layout().len,
            state: stream.state().clone(),
        };
        let base = checkpoint.path().display().to_string();
        let write = |folder: &Path, values: &[f32]| {
            to_peft(&lora, base.clone(), modules(&places, values), None).write(folder, &cfg)
        };
        adapted.write(out, router_layer, &learner.values()?, &write)?;
        let (model, stream) = learner.into_parts();
        Ok((adapted, model, stream))
    }
}

/// The stream at its beginning, or where its checkpoint stands. `like` is what both must have in common.
fn begin<B: Train>(
    run: &AdaptRun,
    tasks: usize,
    like: &serde_json::Value,
    saved: Option<&Saved>,
    learner: &mut Language<B>,
) -> Result<Stream> {
    let Some(saved) = saved else {
        let state = State::new(run.method.clone(), run.plan.clone(), tasks, learner.values()?)?;
        return Stream::new(state, learner);
    };
    for (what, key) in [("settings", "run"), ("model", "model"), ("examples", "examples")] {
        let (was, is) = (&saved.config["like"][key], &like[key]);
        ensure!(was == is, Usage, "the checkpoint is of a run with other {what}: {was}");
    }
    let damaged = |e| Error::with_source(ErrorKind::Config, "the checkpoint is not of a stream", e);
    let mut state: State = serde_json::from_value(saved.config["state"].clone()).map_err(damaged)?;
    let seconds: Seconds = serde_json::from_value(saved.config["seconds"].clone()).map_err(damaged)?;
    let steps = saved.config["moments"].as_u64().unwrap_or(0);
    let tensors: Vec<(String, Vec<f32>)> = saved.tensors.iter().map(|t| (t.0.clone(), t.2.clone())).collect();
    state.restore(&tensors, learner.layout().modules.len())?;
    let values = tensors.iter().find(|t| t.0 == "values");
    let none = || Error::new(ErrorKind::Weights, "the checkpoint has no tensor values");
    learner.set_values(&values.ok_or_else(none)?.1)?;
    learner.set_moments(steps, &tensors)?;
    let mut stream = Stream::new(state, learner)?;
    stream.seconds = seconds;
    Ok(stream)
}

fn save<B: Train>(stream: &Stream, learner: &Language<B>, seed: u64, like: &serde_json::Value) -> Result<Saved> {
    let (steps, moments) = learner.moments()?;
    let mut tensors = stream.state().tensors();
    tensors.push(("values".into(), learner.values()?));
    tensors.extend(moments);
    let config = json!({"like": like, "state": stream.state(), "seconds": stream.seconds, "moments": steps});
    Ok(Saved {
        step: stream.state().steps,
        cursor: Cursor::default(),
        seed,
        tokens: stream.state().reports.iter().map(|r| r.tokens).sum(),
        config,
        tensors: tensors.into_iter().map(|(name, v)| (name, vec![v.len()], v)).collect(),
    })
}

/// A flat vector as the modules whose places these are.
fn modules(places: &[Place], values: &[f32]) -> Vec<ModuleValues> {
    let of =
        |p: &Place| ModuleValues { spec: p.spec, a: values[p.a.clone()].to_vec(), b: values[p.b.clone()].to_vec() };
    places.iter().map(of).collect()
}

impl Adapted {
    /// A name for the adapter of these tasks that is a file's name too, unlike that of any other adapter.
    fn folder(&self, tasks: &[usize]) -> PathBuf {
        let safe = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
        let names: Vec<String> = tasks.iter().map(|&k| self.names[k].chars().map(safe).collect()).collect();
        let mut name = names.join("+");
        // A task belongs to one adapter, so the number of its first tells adapters apart where their names do not.
        let plain =
            tasks.iter().all(|&k| self.names[k].chars().all(|c| safe(c) == c) && !self.names[k].starts_with('.'));
        if !plain || name.len() > 80 {
            name.truncate(60);
            name = format!("{}-{name}", tasks.first().copied().unwrap_or(0));
        }
        Path::new("adapters").join(name)
    }

    fn write(&self, out: &Path, layer: usize, last: &[f32], write: &dyn Fn(&Path, &[f32]) -> Result<()>) -> Result<()> {
        let State { method, members, reports, router, tree, scores, .. } = &self.state;
        if method.routes().is_some() {
            for m in members {
                write(&out.join(self.folder(&m.tasks)), &m.values)?;
            }
            let folder = |r: &crate::continual::TaskReport| self.folder(&members[r.adapter].tasks);
            let adapters = reports.iter().map(folder).collect();
            let routing = Routing { layer, tasks: self.names.clone(), adapters, router: router.clone() };
            write_file(&out.join(ROUTER), |to| Ok(serde_json::to_writer(to, &routing)?))?;
        } else {
            write(&out.join("adapter"), last)?;
        }
        let name = |k: usize| self.names[k].clone();
        let text = |file: &str, text: String| write_file(&out.join(file), |to| to.write_all(text.as_bytes()));
        if !tree.nodes.is_empty() {
            text("tree.txt", tree.text(&name))?;
            text("tree.svg", tree_svg(tree, &name))?;
        }
        let title = format!("{}: per cent right", method.name());
        text("scores.svg", scores_svg(scores, &title, &name))?;
        let header = format!("after,{}\n", self.names.join(","));
        let line = |(i, row): (usize, &Vec<f64>)| {
            let cells: Vec<String> = row.iter().map(|v| v.to_string()).collect();
            format!("{},{}\n", self.names[i], cells.join(","))
        };
        text("scores.csv", header + &scores.rows.iter().enumerate().map(line).collect::<String>())?;
        let report = self.json();
        write_file(&out.join("stream.json"), |to| Ok(serde_json::to_writer_pretty(to, &report)?))
    }

    /// Adapters that serve: one for each group or task where requests are routed, else one.
    pub fn adapters(&self) -> usize {
        if self.state.method.routes().is_some() { self.state.members.len() } else { 1 }
    }

    /// All that is worth a table.
    pub fn json(&self) -> serde_json::Value {
        let State { method, plan, members, scores, reports, tree, steps, .. } = &self.state;
        let kept = if method.routes().is_some() { &members[..] } else { &[] };
        let groups: Vec<Vec<&String>> =
            kept.iter().map(|m| m.tasks.iter().map(|&k| &self.names[k]).collect()).collect();
        json!({
            "method": method, "plan": plan, "tasks": self.names, "steps": steps, "measures": self.measures,
            "scores": scores.rows, "untrained": scores.untrained,
            "adapters": self.adapters(), "groups": groups,
            "parameters": self.parameters, "seconds": self.seconds, "cached_bytes": self.cached_bytes,
            "reports": reports, "tree": tree.nodes,
        })
    }
}
