//! A stream of tasks from files to files: adapters, scores, tree and router out.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::stream_files::{StreamReading, TaskFile, Tokens, tokens};
use super::training::{Lora, to_peft};
use super::{EngineOptions, OnDevice, Texts, on_device};
use crate::backend::Train;
use crate::continual::language::{Language, LanguageSettings, longest};
use crate::continual::metrics::Measures;
use crate::continual::picture::{scores_svg, tree_svg};
use crate::continual::{Event, Labels, Learner, Method, Plan, Router, Seconds, State, Stream};
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::files::write_file;
use crate::format::Checkpoint;
use crate::model::lora::ModuleValues;
use crate::model::{Adapter, Model, Place, Recompute};
use crate::train::run::checkpoints;
use crate::train::{Checkpoint as Saved, Cursor, Settings, Trainable, Trainer};

/// What a run's folder has for [`Routed`].
pub(super) const ROUTER: &str = "router.json";

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
        let other = options.adapter.is_none();
        ensure!(other, Usage, "--adapter: a stream trains adapters of its own");
        self.method.validate()?;
        self.plan.validate()?;
        ensure!(self.rows > 0, Usage, "passes of 0 rows");
        let checkpoint = Checkpoint::open(model)?;
        ensure!(checkpoint.config().diffusion.is_none(), Unsupported, "{}: a diffusion model", model.display());
        let texts = Texts::new(checkpoint.tokenizer()?, checkpoint.chat_template()?);
        let read = |path: &PathBuf| TaskFile::read(path, self.reading.limits);
        let files: Vec<TaskFile> = self.tasks.iter().map(read).collect::<Result<_>>()?;
        let tokens = tokens(&files, &texts, &self.reading)?;
        let saved = Saved::to_resume(&checkpoints(out), resume)?;
        on_device(options, Job { run: self, checkpoint: &checkpoint, tokens, saved, out, on })
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

struct Job<'a> {
    run: &'a AdaptRun,
    checkpoint: &'a Checkpoint,
    tokens: Tokens,
    saved: Option<Saved>,
    out: &'a Path,
    on: &'a mut dyn FnMut(Told<'_>),
}

impl OnDevice for Job<'_> {
    type Out = Adapted;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<Adapted> {
        let Self { run, checkpoint, tokens, saved, out, on } = self;
        let json = serde_json::to_value(run).map_err(|e| Error::with_source(ErrorKind::Config, "settings", e))?;
        std::fs::create_dir_all(out).map_err(|e| Error::io(out.display(), e))?;
        write_file(&out.join("run.json"), |to| Ok(serde_json::to_writer_pretty(to, &json)?))?;
        let names: Vec<String> = tokens.tasks.iter().map(|t| t.name.clone()).collect();
        let (lora, count) = (run.shape(names.len()), names.len());
        let progress = |done, total| options.progress.iter().for_each(|p| p(done, total));
        let model = Model::load(std::sync::Arc::new(be), checkpoint, progress).context(|| "weights".into())?;
        let cfg = model.config().clone();
        let specs = lora.modules(&cfg)?;
        let mut adapter = Adapter::init(model.backend(), &cfg, &specs, run.plan.seed)?;
        adapter.train(model.backend(), |_| true)?;
        let places = adapter.places();
        let cut = adapter.lowest().unwrap_or(0);
        let router_layer = run.router_layer.unwrap_or(if cut > 0 { cut } else { cfg.layers * 2 / 3 });
        let trie = Labels::new(&tokens.labels, tokens.end)?;
        let rows = run.rows.max(longest(&tokens.tasks, &tokens.labels, &trie));
        ensure!(
            rows <= cfg.context.max(run.rows),
            Capacity,
            "an example of {rows} rows; the context is {}",
            cfg.context
        );
        let trainer =
            Trainer::new(model, Trainable::Adapter(adapter), run.optimizer.clone(), rows, Recompute::Pointwise)?;
        let settings = LanguageSettings { router_layer, cache: run.cache, end: run.end, rows };
        let mut learner = Language::new(trainer, tokens.tasks, tokens.labels, tokens.end, settings)?;
        let mut stream = begin(run, count, &json, saved.as_ref(), &mut learner)?;
        while let Some(event) = stream.advance(&mut learner)? {
            let (task, steps) = (stream.state().reports.len() - 1, stream.state().steps);
            on(Told::Event(&names[task], &event));
            let finished = matches!(event, Event::Finished { .. });
            if finished {
                on(Told::Row(stream.state()));
            }
            let due = matches!(event, Event::Step { .. }) && run.save_every > 0 && steps % run.save_every == 0;
            if finished || due {
                save(&stream, &learner, run.plan.seed, &json)?.save(&checkpoints(out), 1)?;
                on(Told::Saved(steps));
            }
        }
        let adapted = Adapted {
            names,
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
        Ok(adapted)
    }
}

/// The stream at its beginning, or where its checkpoint stands.
fn begin<B: Train>(
    run: &AdaptRun,
    tasks: usize,
    json: &serde_json::Value,
    saved: Option<&Saved>,
    learner: &mut Language<B>,
) -> Result<Stream> {
    let Some(saved) = saved else {
        let state = State::new(run.method.clone(), run.plan.clone(), tasks, learner.values()?)?;
        return Stream::new(state, learner);
    };
    let same = saved.config["run"] == *json;
    ensure!(same, Usage, "the checkpoint is of a run with other settings: {}", saved.config["run"]);
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

fn save<B: Train>(stream: &Stream, learner: &Language<B>, seed: u64, json: &serde_json::Value) -> Result<Saved> {
    let (steps, moments) = learner.moments()?;
    let mut tensors = stream.state().tensors();
    tensors.push(("values".into(), learner.values()?));
    tensors.extend(moments);
    let config = json!({"run": json, "state": stream.state(), "seconds": stream.seconds, "moments": steps});
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
    /// A name for the adapter of these tasks that is a file's name too.
    fn folder(&self, tasks: &[usize]) -> PathBuf {
        let safe = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
        let names: Vec<String> = tasks.iter().map(|&k| self.names[k].chars().map(safe).collect()).collect();
        let mut name = names.join("+");
        // A group of many tasks is named after its first.
        if name.len() > 80 {
            name = format!("{}+{}_more", names[0], names.len() - 1);
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

    /// All that is worth a table.
    pub fn json(&self) -> serde_json::Value {
        let State { method, plan, members, scores, reports, tree, steps, .. } = &self.state;
        let groups: Vec<Vec<&String>> =
            members.iter().map(|m| m.tasks.iter().map(|&k| &self.names[k]).collect()).collect();
        json!({
            "method": method, "plan": plan, "tasks": self.names, "steps": steps, "measures": self.measures,
            "scores": scores.rows, "untrained": scores.untrained,
            "adapters": if method.routes().is_some() { members.len() } else { 1 }, "groups": groups,
            "parameters": self.parameters, "seconds": self.seconds, "cached_bytes": self.cached_bytes,
            "reports": reports, "tree": tree.nodes,
        })
    }
}
