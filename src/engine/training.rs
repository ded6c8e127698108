//! Training from files to files: a model, data and settings in; an adapter or a model out.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{EngineOptions, Texts, on_device};
use crate::backend::Train;
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::format::Checkpoint;
use crate::format::peft::{PeftAdapter, PeftTensor};
use crate::format::write_model::{can_write, write_model};
use crate::model::config::Diffusion;
use crate::model::lora::{ModuleSpec, ModuleValues};
use crate::model::roles::{LayerRole, TensorSource};
use crate::model::{Adapter, Model, ModelConfig, Recompute, Trained};
use crate::train::data::{Dataset, LongRows, Options, Pairs};
use crate::train::run::{Event, NextToken, Outcome, checkpoints, run};
use crate::train::{Checkpoint as State, Plan, Settings, Trainable, Trainer};

/// Which LoRA adapter a run makes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// Columns of B.
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    pub alpha: f32,
    /// By alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
    pub rank_stabilized: bool,
    /// Which linears of a layer: q, k, v, o, gate, up, down.
    pub targets: Vec<String>,
    /// Only so many of the upper layers; 0: all. The backward pass ends where they end.
    pub top_layers: usize,
}

impl Default for Lora {
    fn default() -> Self {
        let targets = ["q", "k", "v", "o", "gate", "up", "down"].map(String::from).into();
        Self { rank: 8, alpha: 16.0, rank_stabilized: false, targets, top_layers: 0 }
    }
}

impl Lora {
    fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// The modules of a model that it adapts.
    ///
    /// # Errors
    /// `Usage` for a rank, a target or a number of layers that is impossible.
    pub fn modules(&self, cfg: &ModelConfig) -> Result<Vec<ModuleSpec>> {
        ensure!(self.rank > 0 && self.rank <= 4096, Usage, "lora: rank {} is impossible", self.rank);
        ensure!(self.alpha.is_finite() && self.alpha > 0.0, Usage, "lora: alpha {} is impossible", self.alpha);
        ensure!(self.top_layers <= cfg.layers, Usage, "lora: {} of {} layers", self.top_layers, cfg.layers);
        let first = if self.top_layers == 0 { 0 } else { cfg.layers - self.top_layers };
        let roles: Vec<LayerRole> = self.targets.iter().map(|t| target(t)).collect::<Result<_>>()?;
        ensure!(!roles.is_empty(), Usage, "lora: no target");
        let in_order = |&r: &LayerRole| roles.contains(&r);
        let specs = (first..cfg.layers).flat_map(|layer| {
            let spec = move |role| ModuleSpec { role, layer, rank: self.rank, scale: self.scale() };
            LayerRole::LINEARS.into_iter().filter(in_order).map(spec)
        });
        Ok(specs.collect())
    }
}

fn target(name: &str) -> Result<LayerRole> {
    use LayerRole::*;
    let short = name.strip_suffix("_proj").unwrap_or(name);
    let all = [("q", Q), ("k", K), ("v", V), ("o", O), ("gate", Gate), ("up", Up), ("down", Down)];
    let found = all.iter().find(|(n, _)| *n == short).map(|(_, r)| *r);
    found.ok_or_else(|| {
        Error::new(ErrorKind::Usage, format!("lora: no linear is called {name}; there are q, k, v, o, gate, up, down"))
    })
}

/// What a run changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// A low-rank adapter.
    Lora(Lora),
    /// All weights.
    Full,
}

impl Method {
    /// The model on a device, with what of it trains.
    pub(super) fn load<B: Train>(
        &self,
        be: B,
        checkpoint: &Checkpoint,
        seed: u64,
        options: &EngineOptions,
    ) -> Result<(Model<B>, Trainable<B>)> {
        let other = options.adapter.is_none();
        ensure!(other, Usage, "--adapter: a run trains the model's own weights, or an adapter of its own");
        let (be, progress) = (Arc::new(be), |done, total| options.progress.iter().for_each(|p| p(done, total)));
        match self {
            Method::Lora(lora) => {
                let specs = lora.modules(checkpoint.config())?;
                let model = Model::load(be, checkpoint, progress).context(|| "weights".into())?;
                let mut adapter = Adapter::init(model.backend(), model.config(), &specs, seed)?;
                adapter.train(model.backend(), |_| true)?;
                Ok((model, Trainable::Adapter(adapter)))
            }
            Method::Full => {
                let (model, full) = Model::load_trainable(be, checkpoint, progress).context(|| "weights".into())?;
                Ok((model, Trainable::Full(full)))
            }
        }
    }
}

/// How data files are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSettings {
    /// Most tokens of an example; windows of a text file.
    pub max_length: usize,
    /// What to do with longer ones.
    pub long_rows: LongRows,
    /// Prompts and completions as turns of the model's chat form.
    pub chat: bool,
    /// Ends texts and completions with the end token.
    pub eos: bool,
    /// At most so many examples; 0: all.
    pub limit: usize,
}

impl Default for DataSettings {
    fn default() -> Self {
        Self { max_length: 1024, long_rows: LongRows::Error, chat: false, eos: true, limit: 0 }
    }
}

impl DataSettings {
    pub(super) fn options(&self, pairs: Pairs) -> Options {
        Options {
            max_tokens: self.max_length,
            long_rows: self.long_rows,
            append_eos: self.eos,
            pairs,
            ..Options::default()
        }
    }

    pub(super) fn load(&self, path: &Path, texts: &Texts) -> Result<Dataset> {
        let options = self.options(if self.chat { Pairs::Chat } else { Pairs::Plain });
        let mut set = Dataset::load(path, texts, &options)?;
        if self.limit > 0 {
            set.examples.truncate(self.limit);
        }
        Ok(set)
    }
}

/// A whole run, as `run.json` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainRun {
    /// What changes.
    pub method: Method,
    /// Training data.
    pub data: PathBuf,
    /// Held-out data, if any.
    #[serde(default)]
    pub held_out: Option<PathBuf>,
    /// How both are read.
    #[serde(default)]
    pub reading: DataSettings,
    /// Optimiser.
    #[serde(default)]
    pub optimizer: Settings,
    /// Length and rhythm.
    #[serde(default)]
    pub plan: Plan,
    /// What the backward pass computes again.
    #[serde(default)]
    pub recompute: Recompute,
}

impl TrainRun {
    /// Runs it on the model at `model`; results, checkpoints and the curve go to the folder `out`. With `resume`, goes
    /// on from the newest checkpoint there, if there is one.
    ///
    /// # Errors
    /// Whatever is wrong with settings, data, files or device, by name; `Diverged` with the last good checkpoint kept.
    pub fn start(
        &self,
        model: &Path,
        out: &Path,
        resume: bool,
        options: EngineOptions,
        on: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        let checkpoint = Checkpoint::open(model)?;
        if self.method == Method::Full {
            can_write(&checkpoint)?;
        }
        self.plan.validate()?;
        let texts = Texts::new(checkpoint.tokenizer()?, checkpoint.chat_template()?);
        let examples = self.reading.load(&self.data, &texts)?.examples;
        let held_out = match &self.held_out {
            Some(path) => self.reading.load(path, &texts)?.examples,
            None => Vec::new(),
        };
        let state = State::to_resume(&checkpoints(out), resume)?;
        let mut plan = self.plan.clone();
        // A longer step than the data's longest example has nothing to fill it.
        plan.batch_tokens = plan.batch_tokens.max(examples.iter().map(|e| e.tokens.len()).max().unwrap_or(0));
        let mut optimizer = self.optimizer.clone();
        if optimizer.schedule.total == 0 {
            optimizer.schedule.total = plan.total(plan.batches(&examples)?);
        }
        let job = Job { run: self, optimizer, plan, checkpoint: &checkpoint, examples, held_out, state, out, on };
        on_device(options, job)
    }
}

struct Job<'a> {
    run: &'a TrainRun,
    optimizer: Settings,
    plan: Plan,
    checkpoint: &'a Checkpoint,
    examples: Vec<crate::train::Example>,
    held_out: Vec<crate::train::Example>,
    state: Option<State>,
    out: &'a Path,
    on: &'a mut dyn FnMut(Event),
}

impl super::OnDevice for Job<'_> {
    type Out = Outcome;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<Outcome> {
        let Self { run: settings, plan, checkpoint, .. } = self;
        let (model, trainable) = settings.method.load(be, checkpoint, plan.seed, options)?;
        let mut trainer = Trainer::new(model, trainable, self.optimizer, plan.batch_tokens, settings.recompute)?;
        let json = serde_json::to_value(settings).map_err(|e| Error::with_source(ErrorKind::Config, "settings", e))?;
        std::fs::create_dir_all(self.out).map_err(|e| Error::io(self.out.display(), e))?;
        crate::files::write_file(&self.out.join("run.json"), |to| Ok(serde_json::to_writer_pretty(to, &json)?))?;
        let outcome = run(
            &mut trainer,
            &mut NextToken,
            &self.examples,
            &self.held_out,
            &plan,
            self.out,
            &json,
            self.state.as_ref(),
            self.on,
        )?;
        let (model, trained) = trainer.into_parts();
        match (&trained, &settings.method) {
            (Trainable::Adapter(a), Method::Lora(lora)) => {
                let base = checkpoint.path().display().to_string();
                let peft = to_peft(lora, base, a.to_host(model.backend())?, None);
                peft.write(&self.out.join("adapter"), model.config())?;
            }
            (Trainable::Full(full), _) => {
                write_model(&Trained { model: &model, full }, checkpoint, &self.out.join("model"))?;
            }
            _ => {}
        }
        Ok(outcome)
    }
}

pub(super) fn to_peft(
    lora: &Lora,
    base: String,
    modules: Vec<ModuleValues>,
    diffusion: Option<Diffusion>,
) -> PeftAdapter {
    let tensor = |m: ModuleValues| PeftTensor {
        layer: m.spec.layer,
        module: m.spec.role,
        rank: m.spec.rank,
        alpha: lora.alpha,
        a: m.a,
        b: m.b,
    };
    PeftAdapter {
        rank: lora.rank,
        alpha: lora.alpha,
        rank_stabilized: lora.rank_stabilized,
        base_model: Some(base),
        diffusion,
        tensors: modules.into_iter().map(tensor).collect(),
    }
}

/// The modules of an adapter's folder, for [`Adapter::new`].
///
/// # Errors
/// As [`PeftAdapter::read`].
pub fn read_adapter(folder: &Path, cfg: &ModelConfig) -> Result<Vec<ModuleValues>> {
    Ok(to_modules(PeftAdapter::read(folder, cfg)?))
}

pub(super) fn to_modules(peft: PeftAdapter) -> Vec<ModuleValues> {
    let scales: Vec<f32> = peft.tensors.iter().map(|t| peft.scale(t)).collect();
    let modules = peft.tensors.into_iter().zip(scales).map(|(t, scale)| {
        let spec = ModuleSpec { role: t.module, layer: t.layer, rank: t.rank, scale };
        ModuleValues { spec, a: t.a, b: t.b }
    });
    modules.collect()
}

/// A model's tensors with an adapter added to them: W + scale B A.
pub struct Merged<'a> {
    base: &'a dyn TensorSource,
    modules: Vec<ModuleValues>,
    config: ModelConfig,
}

impl<'a> Merged<'a> {
    /// `base` with the adapter in `folder`.
    ///
    /// # Errors
    /// As [`PeftAdapter::read`].
    pub fn new(base: &'a dyn TensorSource, folder: &Path) -> Result<Self> {
        let (peft, mut config) = (PeftAdapter::read(folder, base.config())?, base.config().clone());
        config.diffusion = peft.diffusion.or(config.diffusion);
        Ok(Self {
            modules: to_modules(peft),
            base,
            config: config.validate().context(|| folder.display().to_string())?,
        })
    }
}

impl TensorSource for Merged<'_> {
    /// The base's; a diffusion model's where the adapter makes one.
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the adapter does not touch is as it was; the rest is F32, exact but for one rounding of each entry.
    fn tensor(&self, role: crate::model::roles::Role) -> Result<crate::tensor::HostTensor> {
        use crate::model::roles::Role;
        use crate::tensor::HostTensor;
        let t = self.base.tensor(role)?;
        let Role::Layer(layer, role) = role else { return Ok(t) };
        let Some(m) = self.modules.iter().find(|m| (m.spec.layer, m.spec.role) == (layer, role)) else { return Ok(t) };
        let (rank, mut values) = (m.spec.rank, t.to_f32());
        let mut row = vec![0.0f64; t.cols];
        for (w, b) in values.chunks_exact_mut(t.cols).zip(m.b.chunks_exact(rank)) {
            row.fill(0.0);
            for (a, b) in m.a.chunks_exact(t.cols).zip(b) {
                let b = f64::from(m.spec.scale) * f64::from(*b);
                row.iter_mut().zip(a).for_each(|(r, a)| *r += b * f64::from(*a));
            }
            w.iter_mut().zip(&row).for_each(|(w, r)| *w = (f64::from(*w) + r) as f32);
        }
        HostTensor::from_f32(t.rows, t.cols, &values)
    }
}
