//! Training of a draft head from files to files: a target and what it said in; a head out.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{EngineOptions, on_device};
use crate::backend::Train;
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::Checkpoint;
use crate::model::Model;
use crate::speculative::train::{
    About, Continuation, DraftVocab, EagleHead, FeatureSpec, Features, HeadConfig, HeadData, HeadEvent, HeadOutcome,
    HeadTrainer, Store, config, fitted, read_head, run_head, step_weights, write_head,
};
use crate::train::run::checkpoints;
use crate::train::{Checkpoint as State, Plan, Settings, schedule};

/// Tokens that a teacher names on disk, of which those that the head knows are used.
const NAMED: usize = 32;

/// A whole run, as `run.json` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DraftRun {
    /// What the target said: JSON lines with `n`, `prompt_ids` and `ids`.
    pub data: Vec<PathBuf>,
    /// Of each so many numbers `n`, one is held out; 0: none.
    pub held_out: u64,
    /// Layers of the target whose inputs the head reads; empty: 2, the middle one, the last but two.
    pub taps: Vec<usize>,
    /// Tokens that the head knows: the most frequent of the data.
    pub vocab: usize,
    /// Unrolled steps, and what each weighs of the step before.
    pub unroll: usize,
    /// Weight of each step of the step before.
    pub decay: f32,
    /// Tokens of the teacher; the others are one.
    pub teacher: usize,
    /// A head to begin with; `None`: one that is fitted to the data.
    pub init: Option<PathBuf>,
    /// Where the target's features are kept; `None`: in the run's folder.
    pub features: Option<PathBuf>,
    /// Whether they stay there when the run is over.
    pub keep_features: bool,
    /// How the head's matrices are stored.
    pub store: Store,
    /// Optimiser.
    pub optimizer: Settings,
    /// Length and rhythm.
    pub plan: Plan,
}

impl Default for DraftRun {
    fn default() -> Self {
        let schedule = schedule::Schedule { kind: schedule::Kind::Cosine, warmup: 20, total: 0, floor: 0.02 };
        Self {
            data: Vec::new(),
            held_out: 50,
            taps: Vec::new(),
            vocab: 8192,
            unroll: 4,
            decay: 0.8,
            teacher: 12,
            init: None,
            features: None,
            keep_features: false,
            store: Store::default(),
            optimizer: Settings { lr: 5e-4, schedule, ..Settings::default() },
            plan: Plan { epochs: 3.0, batch_tokens: 768, accumulate: 2, eval_every: 100, ..Plan::default() },
        }
    }
}

impl DraftRun {
    /// Runs it on the target at `model`; the head goes to `out/draft`, checkpoints and the curve to `out`. With `resume`, goes on from
    /// the newest checkpoint there, if there is one.
    ///
    /// # Errors
    /// Whatever is wrong with settings, data, files or device, by name; `Diverged` with the last good checkpoint kept.
    pub fn start(
        &self,
        model: &Path,
        out: &Path,
        resume: bool,
        options: EngineOptions,
        on: &mut dyn FnMut(HeadEvent),
    ) -> Result<HeadOutcome> {
        let checkpoint = Checkpoint::open(model)?;
        let cfg = checkpoint.config();
        self.plan.validate()?;
        let (unroll, decay) = (self.unroll > 0 && self.unroll <= 16, self.decay > 0.0 && self.decay <= 1.0);
        ensure!(unroll && decay, Usage, "{} steps that weigh {} of the step before", self.unroll, self.decay);
        ensure!((1..=NAMED).contains(&self.teacher), Usage, "{} tokens of the teacher; 1 to {NAMED}", self.teacher);
        let most = cfg.vocab.saturating_sub(self.teacher);
        ensure!(self.vocab > self.teacher && self.vocab <= most, Usage, "a draft vocabulary of {} tokens", self.vocab);
        let taps = match &self.taps[..] {
            [] if cfg.layers > 5 => vec![2, cfg.layers / 2, cfg.layers - 3],
            [] => bail!(Usage, "a target of {} layers: say which ones the head reads", cfg.layers),
            taps => taps.to_vec(),
        };
        let head = HeadConfig::new(cfg, taps.len(), self.vocab);
        let name = model.file_name().map_or_else(|| model.display().to_string(), |n| n.to_string_lossy().into_owned());
        // What cannot be written is refused before hours are spent.
        config(&head, &About { target: cfg, name: &name, taps: &taps }, self.store)?;
        let rows = Continuation::read(&self.data, self.plan.batch_tokens)?;
        let state = State::to_resume(&checkpoints(out), resume)?;
        on_device(options, Job { run: self, checkpoint: &checkpoint, head, name, taps, rows, state, out, on })
    }

    /// What a checkpoint remembers: all but how long the run may take, and how many rows of data it began with.
    fn settings(&self, rows: usize) -> Result<serde_json::Value> {
        let json = serde_json::to_value(self).map_err(|e| Error::with_source(ErrorKind::Config, "settings", e))?;
        Ok(serde_json::json!({"settings": json, "rows": rows}))
    }
}

struct Job<'a> {
    run: &'a DraftRun,
    checkpoint: &'a Checkpoint,
    head: HeadConfig,
    name: String,
    taps: Vec<usize>,
    rows: Vec<Continuation>,
    state: Option<State>,
    out: &'a Path,
    on: &'a mut dyn FnMut(HeadEvent),
}

impl super::OnDevice for Job<'_> {
    type Out = HeadOutcome;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<HeadOutcome> {
        let Self { run, checkpoint, head: cfg, name, taps, mut rows, state, out, on } = self;
        if let Some(state) = &state {
            // Data may have grown since.
            let n = state.config["run"]["rows"].as_u64().unwrap_or(0) as usize;
            ensure!(n <= rows.len(), Usage, "the run began with {n} continuations; the data has {}", rows.len());
            rows.truncate(n);
        }
        let settings = run.settings(rows.len())?;
        if let Some(state) = &state {
            let what_learns = |v: &serde_json::Value| {
                let mut v = v.clone();
                v["settings"]["plan"]["minutes"] = 0.into();
                for how in ["store", "keep_features", "features"] {
                    v["settings"][how].take();
                }
                v
            };
            let same = what_learns(&state.config["run"]) == what_learns(&settings) && state.seed == run.plan.seed;
            ensure!(same, Usage, "the checkpoint is of a run with other settings: {}", state.config["run"]);
        }
        let progress = |done, total| options.progress.iter().for_each(|p| p(done, total));
        let target = Model::load(Arc::new(be), checkpoint, progress).context(|| "weights".into())?;
        let dir = run.features.clone().unwrap_or_else(|| out.join("features"));
        let spec = FeatureSpec { taps: taps.clone(), k: NAMED };
        let mut tell = |done, total| on(HeadEvent::Features(done, total));
        let features = Features::of(&target, &name, &rows, &dir, spec, &mut tell)?;
        let held = |i: &usize| run.held_out > 0 && rows[*i].n.is_multiple_of(run.held_out);
        let (held_out, train): (Vec<usize>, Vec<usize>) = (0..rows.len()).partition(held);

        let target_vocab = checkpoint.config().vocab;
        let (tensors, vocab) = match (&state, &run.init) {
            // The checkpoint has what they are.
            (Some(state), _) => {
                let damaged = |e| Error::with_source(ErrorKind::Config, "the checkpoint's tokens are damaged", e);
                let d2t = serde_json::from_value(state.config["d2t"].clone()).map_err(damaged)?;
                let zeros = cfg.tensors().map(|(name, [r, c])| (name.to_owned(), vec![0.0; r * c]));
                (zeros.into(), DraftVocab::new(d2t, target_vocab)?)
            }
            (None, Some(folder)) => read_head(folder, target_vocab).context(|| folder.display().to_string())?,
            (None, None) => {
                let said = train.iter().flat_map(|&i| features.said(i)).copied();
                let vocab = DraftVocab::most_frequent(said, cfg.vocab, target_vocab)?;
                let (be, seed) = (target.backend(), run.plan.seed);
                (fitted(be, checkpoint, &cfg, &features, &train, vocab.d2t(), seed)?, vocab)
            }
        };
        let n = vocab.d2t().len();
        ensure!(n == cfg.vocab, Usage, "the head to begin with knows {n} tokens, not {}", cfg.vocab);
        let head = EagleHead::new(target.backend(), cfg.clone(), &tensors)?;
        let data = HeadData { features: &features, train, held_out, vocab: &vocab, k: run.teacher };
        let mut optimizer = run.optimizer.clone();
        if optimizer.schedule.total == 0 {
            optimizer.schedule.total = run.plan.total(data.passes(&run.plan)?);
        }
        let weights = step_weights(run.unroll, run.decay);
        let mut trainer = HeadTrainer::new(target, head, optimizer, run.plan.batch_tokens, weights)?;
        std::fs::create_dir_all(out).map_err(|e| Error::io(out.display(), e))?;
        crate::files::write_file(&out.join("run.json"), |to| Ok(serde_json::to_writer_pretty(to, run)?))?;
        let outcome = run_head(&mut trainer, &data, &run.plan, out, &settings, state.as_ref(), on)?;
        let about = About { target: checkpoint.config(), name: &name, taps: &taps };
        let tensors = trainer.head().to_host(trainer.target().backend())?;
        write_head(&out.join("draft"), &cfg, &about, run.store, &tensors, &vocab)?;
        if !run.keep_features {
            features.remove()?;
        }
        Ok(outcome)
    }
}
