//! Training of diffusion models from files to files: conversion, the masked loss, distillation.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::training::{DataSettings, Method, to_peft};
use super::{Engine, EngineOptions, OnDevice, Texts, on_device};
use crate::backend::Train;
use crate::diffusion::train::{Distill, DistillSettings, Masked, MaskedSettings, Trajectory, by_likelihood};
use crate::diffusion::{Cache, Choose, Rank, Schedule, Settings as Decoding};
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::format::Checkpoint;
use crate::format::write_model::{can_write, write_diffusion_model};
use crate::model::config::Diffusion;
use crate::model::{Recompute, Trained};
use crate::train::run::{Event, Objective, Outcome, checkpoints, run};
use crate::train::{Checkpoint as State, Example, Plan, Settings, Trainable, Trainer};

/// What is learnt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Learn {
    /// To fill masks.
    Masked(MaskedSettings),
    /// To fill several at once, in a teacher's order.
    Distill {
        /// How.
        settings: DistillSettings,
        /// Trajectories, one a line; recorded there from the model itself where the file is not there yet. `None`: in the run's folder.
        trajectories: Option<PathBuf>,
        /// Takes the order from the likelihoods of this autoregressive model instead (TRIMS 2026, arXiv:2604.00666).
        likelihood: Option<PathBuf>,
        /// Positions of the blocks in which the teacher decodes; a block-causal model has its own.
        block: usize,
        /// The teacher computes its current block only, behind a dual cache: fewer positions, and not quite its own order.
        #[serde(default)]
        cached: bool,
    },
}

/// A whole run, as `run.json` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffusionRun {
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
    /// Positions of an answer, what pads it with end tokens included; 0: up to a multiple of 32.
    #[serde(default)]
    pub answer: usize,
    /// Makes a diffusion model of an autoregressive one, or another of a diffusion model.
    #[serde(default)]
    pub convert: Option<Convert>,
    /// What is learnt.
    pub learn: Learn,
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

/// [`Diffusion`] as `run.json` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Convert {
    /// Token that becomes the mask: a reserved one that no data contains.
    pub mask: u32,
    /// Keeps the convention that row i predicts position i + 1.
    pub shift: bool,
    /// Blocks of block-causal attention.
    pub block: Option<usize>,
}

impl DiffusionRun {
    /// Runs it on the model at `model`; results, checkpoints and the curve go to the folder `out`. `on` hears of steps, `recorded` of trajectories:
    /// how many are done, of how many.
    ///
    /// # Errors
    /// Whatever is wrong with settings, data, files or device, by name; `Diverged` with the last good checkpoint kept.
    pub fn start(
        &self,
        model: &Path,
        out: &Path,
        resume: bool,
        options: EngineOptions,
        recorded: &mut dyn FnMut(usize, usize),
        on: &mut dyn FnMut(Event),
    ) -> Result<Outcome> {
        let checkpoint = Checkpoint::open(model)?;
        if self.method == Method::Full {
            can_write(&checkpoint)?;
        }
        self.plan.validate()?;
        let cfg = checkpoint.config();
        let diffusion = match self.convert {
            Some(c) => Diffusion { mask: c.mask, shift: c.shift, block: c.block },
            None => cfg.diffusion.ok_or_else(|| {
                let what = "this model has no mask token: say which token becomes it (--mask-token), or take a diffusion model";
                Error::new(ErrorKind::Usage, what)
            })?,
        };
        let mut converted = cfg.clone();
        converted.diffusion = Some(diffusion);
        converted.validate().context(|| model.display().to_string())?;
        let texts = Texts::new(checkpoint.tokenizer()?, checkpoint.chat_template()?);
        let eos = cfg.eos.first().copied();
        let eos = eos.ok_or_else(|| Error::new(ErrorKind::Usage, "this model has no end token to pad answers with"))?;
        let load = |path: &Path| -> Result<Vec<Example>> {
            let mut set = self.reading.load(path, &texts)?.examples;
            for (i, e) in set.iter_mut().enumerate() {
                self.pad(e, diffusion, eos).context(|| format!("{}, example {}", path.display(), i + 1))?;
            }
            Ok(set)
        };
        let examples = load(&self.data)?;
        let held_out = self.held_out.as_deref().map(load).transpose()?.unwrap_or_default();
        std::fs::create_dir_all(out).map_err(|e| Error::io(out.display(), e))?;
        let orders = match &self.learn {
            Learn::Distill { settings, trajectories, likelihood, block, cached } if !settings.random => {
                let teacher = Teacher {
                    model: likelihood.as_deref().unwrap_or(model),
                    by_nll: likelihood.is_some(),
                    block: diffusion.block.unwrap_or(*block),
                    cache: if *cached && diffusion.block.is_none() { Cache::Dual } else { Cache::None },
                };
                let file = trajectories.clone().unwrap_or_else(|| out.join("trajectories.jsonl"));
                teacher.orders(&file, &examples, options.again(), recorded)?
            }
            _ => Vec::new(),
        };
        let state = State::to_resume(&checkpoints(out), resume)?;
        let mut plan = self.plan.clone();
        plan.batch_tokens = plan.batch_tokens.max(examples.iter().map(|e| e.tokens.len()).max().unwrap_or(0));
        let mut optimizer = self.optimizer.clone();
        if optimizer.schedule.total == 0 {
            optimizer.schedule.total = plan.total(plan.batches(&examples)?);
        }
        let job = Job {
            run: self,
            diffusion,
            eos: cfg.eos.clone(),
            optimizer,
            plan,
            checkpoint: &checkpoint,
            examples,
            held_out,
            orders,
            state,
            out,
            on,
        };
        on_device(options, job)
    }

    /// Pads an answer with end tokens, which are learnt as well.
    fn pad(&self, e: &mut Example, model: Diffusion, eos: u32) -> Result<()> {
        ensure!(!e.tokens.contains(&model.mask), Usage, "the data holds the mask token {}", model.mask);
        let start = e.loss.iter().position(|l| *l).unwrap_or(e.tokens.len());
        let n = e.tokens.len() - start;
        let to = if self.answer > 0 { self.answer } else { n.next_multiple_of(model.block.unwrap_or(32)) };
        ensure!(n <= to, Usage, "an answer has {n} tokens, --answer-length allows {to}");
        e.tokens.resize(start + to, eos);
        e.loss.resize(start + to, true);
        Ok(())
    }
}

/// Whoever gives the order.
struct Teacher<'a> {
    model: &'a Path,
    by_nll: bool,
    block: usize,
    cache: Cache,
}

impl Teacher<'_> {
    /// The order in which each example's answer is unmasked: read from `file`, and what is missing there recorded.
    fn orders(
        &self,
        file: &Path,
        examples: &[Example],
        options: EngineOptions,
        recorded: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Option<Trajectory>>> {
        const TOGETHER: usize = 16;
        let mut orders: Vec<Option<Trajectory>> = vec![None; examples.len()];
        let mut lines: Vec<String> = Vec::new();
        if file.is_file() {
            crate::train::data::for_each_line(file, |number, text| {
                let place = || format!("{}, line {number}", file.display());
                let t: Trajectory = serde_json::from_str(text)
                    .map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))
                    .context(place)?;
                let n = orders.len();
                ensure!(t.example < n, Usage, "{}: example {} of {n}: trajectories of other data", place(), t.example);
                lines.push(text.to_owned());
                let at = t.example;
                orders[at] = Some(t);
                Ok(())
            })?;
        }
        let missing: Vec<usize> = (0..examples.len()).filter(|&i| orders[i].is_none()).collect();
        let mut done = examples.len() - missing.len();
        recorded(done, examples.len());
        if missing.is_empty() {
            return Ok(orders);
        }
        let engine = Engine::open_with(self.model, options)?;
        for part in missing.chunks(64 * TOGETHER) {
            for part in part.chunks(TOGETHER) {
                let split = |i: usize| {
                    let e = &examples[i];
                    e.tokens.split_at(e.loss.iter().position(|l| *l).unwrap_or(e.tokens.len()))
                };
                if self.by_nll {
                    for &i in part {
                        let (prompt, answer) = split(i);
                        let mut nll = Vec::with_capacity(prompt.len() + answer.len());
                        let mut session = engine.session(examples[i].tokens.len() + 1, 0)?;
                        session.nll(&examples[i].tokens, |x| nll.push(x))?;
                        let ranks = by_likelihood(&nll[prompt.len() - 1..], self.block);
                        orders[i] = Some(Trajectory { example: i, text: answer.to_vec(), ranks, correct: true });
                    }
                } else {
                    // One token a pass, most certain first, so that every position has a rank of its own.
                    let texts: Result<Vec<Schedule>> = part
                        .iter()
                        .map(|&i| {
                            let (prompt, answer) = split(i);
                            let choose = Choose::Threshold {
                                by: Rank::Entropy,
                                at: f32::NEG_INFINITY,
                                best: false,
                                every: false,
                            };
                            let Self { block, cache, .. } = *self;
                            let how = Decoding {
                                choose,
                                block,
                                cache,
                                add: 100,
                                activate: 100,
                                early_stop: false,
                                ..Decoding::default()
                            };
                            engine.blank(prompt, answer.len(), how)
                        })
                        .collect();
                    let mut texts = texts?;
                    engine.diffuse(&mut texts, &mut |_, _, _| Ok(()))?;
                    for (&i, t) in part.iter().zip(&texts) {
                        let (prompt, answer) = split(i);
                        let text = t.tokens()[prompt.len()..].to_vec();
                        let correct = text == answer;
                        orders[i] = Some(Trajectory { example: i, text, ranks: t.ranks().to_vec(), correct });
                    }
                }
                done += part.len();
                recorded(done, examples.len());
            }
            for t in part.iter().filter_map(|&i| orders[i].as_ref()) {
                lines.push(
                    serde_json::to_string(t).map_err(|e| Error::with_source(ErrorKind::Config, "a trajectory", e))?,
                );
            }
            crate::files::write_file(file, |to| lines.iter().try_for_each(|l| writeln!(to, "{l}")))?;
        }
        Ok(orders)
    }
}

struct Job<'a> {
    run: &'a DiffusionRun,
    diffusion: Diffusion,
    eos: Vec<u32>,
    optimizer: Settings,
    plan: Plan,
    checkpoint: &'a Checkpoint,
    examples: Vec<Example>,
    held_out: Vec<Example>,
    orders: Vec<Option<Trajectory>>,
    state: Option<State>,
    out: &'a Path,
    on: &'a mut dyn FnMut(Event),
}

impl OnDevice for Job<'_> {
    type Out = Outcome;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<Outcome> {
        let Self { run: settings, plan, checkpoint, diffusion, .. } = self;
        let (model, trainable) = settings.method.load(be, checkpoint, plan.seed, options)?;
        let mut objective: Box<dyn Objective<B> + '_> = match &settings.learn {
            Learn::Masked(how) => Box::new(Masked::new(diffusion, how.clone(), plan.seed)?),
            Learn::Distill { settings: how, .. } => {
                Box::new(Distill::new(diffusion, how.clone(), &self.orders, &self.eos, plan.seed)?)
            }
        };
        // Copies of a sequence: clean and noisy with blocks, two of the noisy one in distillation.
        let copies = if diffusion.block.is_some() { 2 } else { 1 }
            * if matches!(settings.learn, Learn::Distill { .. }) { 2 } else { 1 };
        let rows = plan.batch_tokens * copies;
        let mut trainer = Trainer::new(model, trainable, self.optimizer, rows, settings.recompute)?;
        let json = serde_json::to_value(settings).map_err(|e| Error::with_source(ErrorKind::Config, "settings", e))?;
        crate::files::write_file(&self.out.join("run.json"), |to| Ok(serde_json::to_writer_pretty(to, &json)?))?;
        let (examples, held_out, state) = (&self.examples, &self.held_out, self.state.as_ref());
        let outcome = run(&mut trainer, &mut *objective, examples, held_out, &plan, self.out, &json, state, self.on)?;
        let (model, trained) = trainer.into_parts();
        match (&trained, &settings.method) {
            (Trainable::Adapter(a), Method::Lora(lora)) => {
                let base = checkpoint.path().display().to_string();
                let peft = to_peft(lora, base, a.to_host(model.backend())?, Some(diffusion));
                peft.write(&self.out.join("adapter"), model.config())?;
            }
            (Trainable::Full(full), _) => {
                let trained = Trained { model: &model, full };
                write_diffusion_model(&trained, checkpoint, diffusion, &self.out.join("model"))?;
            }
            _ => {}
        }
        Ok(outcome)
    }
}
