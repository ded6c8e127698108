//! Learning from preferences, from files to files: a model, pairs of answers and settings in; an adapter out.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::training::{Lora, Method, to_peft};
use super::{DataSettings, EngineOptions, OnDevice, Texts, on_device};
use crate::backend::Train;
use crate::error::{Error, ErrorKind, Result, ensure};
use crate::format::Checkpoint;
use crate::model::Recompute;
use crate::train::data::{Pairs, Preference, Row, preferences};
use crate::train::preference::{Margins, Preferring};
use crate::train::run::{Event, Objective, Outcome, checkpoints, run};
use crate::train::{Batches, Checkpoint as State, Plan, Settings, Trainable, Trainer};

/// A run of direct preference optimisation, as `run.json` has it. The reference is the model without the adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreferenceRun {
    /// The adapter.
    #[serde(default)]
    pub lora: Lora,
    /// Strength β of the reference.
    #[serde(default = "beta")]
    pub beta: f64,
    /// Rows of [`PreferenceText`](super::PreferenceText).
    pub data: PathBuf,
    /// Held-out rows, if any.
    #[serde(default)]
    pub held_out: Option<PathBuf>,
    /// How both are read. Prompts are a user's turns where the model has a chat form, whatever `chat` says; with it, a model without one is an
    /// error.
    #[serde(default)]
    pub reading: DataSettings,
    /// Prompts as they are, all the same.
    #[serde(default)]
    pub raw: bool,
    /// Optimiser.
    #[serde(default = "optimizer")]
    pub optimizer: Settings,
    /// Length and rhythm.
    #[serde(default)]
    pub plan: Plan,
    /// What the backward pass computes again.
    #[serde(default)]
    pub recompute: Recompute,
}

fn beta() -> f64 {
    0.1
}

/// Far below the rate of next-token training: a pair moves both its answers' tokens, and what is learnt at first is the easy difference.
fn optimizer() -> Settings {
    Settings { lr: 5e-5, ..Settings::default() }
}

/// How a run of preferences ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Preferred {
    /// As any run's.
    pub run: Outcome,
    /// What held-out pairs say at the end, where there are any. At the beginning every margin is 0.
    pub held_out: Option<Margins>,
}

impl PreferenceRun {
    /// What most want, on the pairs in `data`.
    pub fn new(data: impl Into<PathBuf>) -> Self {
        Self {
            lora: Lora::default(),
            beta: beta(),
            data: data.into(),
            held_out: None,
            reading: DataSettings::default(),
            raw: false,
            optimizer: optimizer(),
            plan: Plan::default(),
            recompute: Recompute::default(),
        }
    }

    /// Runs it on the model at `model`: `OUT/adapter`, a PEFT folder, checkpoints and the curve go to the folder `out`. With `resume`, goes on from
    /// the newest checkpoint there, if there is one; what the reference says is then computed again. `read` hears of how many pairs it has
    /// been computed, of how many; `on` of steps.
    ///
    /// # Errors
    /// Whatever is wrong with settings, data, files or device, by name; `Diverged` with the last good checkpoint kept.
    pub fn start(
        &self,
        model: &Path,
        out: &Path,
        resume: bool,
        options: EngineOptions,
        read: &mut dyn FnMut(usize, usize),
        on: &mut dyn FnMut(Event),
    ) -> Result<Preferred> {
        let checkpoint = Checkpoint::open(model)?;
        self.plan.validate()?;
        let (beta, both) = (self.beta, self.raw && self.reading.chat);
        ensure!(beta.is_finite() && beta > 0.0, Usage, "beta = {beta} is impossible");
        ensure!(!both, Usage, "prompts are either raw or in the model's chat form");
        let template = checkpoint.chat_template()?;
        let chat = self.reading.chat || (!self.raw && template.is_some());
        let texts = Texts::new(checkpoint.tokenizer()?, template);
        let load = |path: &Path| -> Result<Vec<Preference>> {
            let pairs = if chat { Pairs::Chat } else { Pairs::Plain };
            let mut rows = preferences(path, &texts, &self.reading.options(pairs))?;
            if self.reading.limit > 0 {
                rows.truncate(self.reading.limit);
            }
            Ok(rows)
        };
        let pairs = load(&self.data)?;
        let held_out = self.held_out.as_deref().map(load).transpose()?.unwrap_or_default();
        let state = State::to_resume(&checkpoints(out), resume)?;
        let mut plan = self.plan.clone();
        let longest = pairs.iter().chain(&held_out).map(Row::tokens).max();
        plan.batch_tokens = plan.batch_tokens.max(longest.unwrap_or(0));
        let mut optimizer = self.optimizer.clone();
        if optimizer.schedule.total == 0 {
            optimizer.schedule.total = plan.total(plan.batches(&pairs)?);
        }
        let checkpoint = &checkpoint;
        on_device(options, Job { run: self, optimizer, plan, checkpoint, pairs, held_out, state, out, read, on })
    }
}

struct Job<'a> {
    run: &'a PreferenceRun,
    optimizer: Settings,
    plan: Plan,
    checkpoint: &'a Checkpoint,
    pairs: Vec<Preference>,
    held_out: Vec<Preference>,
    state: Option<State>,
    out: &'a Path,
    read: &'a mut dyn FnMut(usize, usize),
    on: &'a mut dyn FnMut(Event),
}

impl OnDevice for Job<'_> {
    type Out = Preferred;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<Preferred> {
        let Self { run: settings, plan, checkpoint, pairs, held_out, out, .. } = self;
        let method = Method::Lora(settings.lora.clone());
        let (model, trainable) = method.load(be, checkpoint, plan.seed, options)?;
        let mut trainer = Trainer::new(model, trainable, self.optimizer, plan.batch_tokens, settings.recompute)?;
        let json = serde_json::to_value(settings).map_err(|e| Error::with_source(ErrorKind::Config, "settings", e))?;
        std::fs::create_dir_all(out).map_err(|e| Error::io(out.display(), e))?;
        crate::files::write_file(&out.join("run.json"), |to| Ok(serde_json::to_writer_pretty(to, &json)?))?;
        // Here the adapter's B is 0: what trains is the reference still, resumed or not.
        let both = [&pairs[..], &held_out];
        let mut objective = Preferring::new(&mut trainer, both, settings.beta, plan.packing(), self.read)?;
        let state = self.state.as_ref();
        let ended = run(&mut trainer, &mut objective, &pairs, &held_out, &plan, out, &json, state, self.on)?;
        if objective.measured.is_none() && !held_out.is_empty() {
            // A run that was over before it was resumed.
            objective.evaluate(&mut trainer, &Batches::once(&held_out, plan.packing())?)?;
        }
        let (model, trained) = trainer.into_parts();
        if let Trainable::Adapter(a) = &trained {
            let base = checkpoint.path().display().to_string();
            let peft = to_peft(&settings.lora, base, a.to_host(model.backend())?, None);
            peft.write(&out.join("adapter"), model.config())?;
        }
        Ok(Preferred { run: ended, held_out: objective.measured })
    }
}
