//! A training run from its first step, or from a checkpoint, to its end.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::curve::{Curve, Point};
use super::data::Row;
use super::{Batch, Batches, Checkpoint, Packing, Report, Trainer};
use crate::backend::Train;
use crate::error::{Context, Error, ErrorKind, Result, ensure};

/// How long a run is, what a step is made of, and what is kept. A folder holds its checkpoints, `loss.csv` and `loss.svg`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// Steps; 0: as many as `epochs` make.
    pub steps: u64,
    /// Times that the data is seen, where `steps` is 0.
    pub epochs: f64,
    /// Minutes after which the run ends even so; 0: any number.
    pub minutes: f64,
    /// Most tokens in a pass, in packed sequences.
    pub batch_tokens: usize,
    /// Passes that make a step.
    pub accumulate: usize,
    /// Steps between checkpoints; 0: one at the end.
    pub save_every: u64,
    /// Checkpoints that stay.
    pub keep: usize,
    /// Steps between measurements on held-out data; 0: at the beginning and at the end.
    pub eval_every: u64,
    /// Order of the data, and the first values of what is new.
    pub seed: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            steps: 0,
            epochs: 1.0,
            minutes: 0.0,
            batch_tokens: 1024,
            accumulate: 1,
            save_every: 100,
            keep: 2,
            eval_every: 0,
            seed: 0,
        }
    }
}

impl Plan {
    /// Refuses what no run can be.
    ///
    /// # Errors
    /// `Usage`, naming the setting.
    pub fn validate(&self) -> Result<()> {
        let long = self.steps > 0 || (self.epochs > 0.0 && self.epochs.is_finite());
        ensure!(long, Usage, "a run of {} steps and {} epochs never begins", self.steps, self.epochs);
        let minutes = self.minutes >= 0.0;
        ensure!(minutes, Usage, "minutes = {} is impossible", self.minutes);
        ensure!(self.batch_tokens > 1 && self.batch_tokens <= 1 << 20, Usage, "batch_tokens = {}", self.batch_tokens);
        ensure!(self.accumulate > 0, Usage, "a step of 0 passes");
        Ok(())
    }

    /// Steps of a whole run over `batches` batches an epoch.
    pub fn total(&self, batches: usize) -> u64 {
        if self.steps > 0 {
            return self.steps;
        }
        ((self.epochs * batches as f64 / self.accumulate as f64).ceil() as u64).max(1)
    }

    /// What its passes hold.
    pub fn packing(&self) -> Packing {
        Packing { rows: self.batch_tokens, sequences: self.batch_tokens }
    }

    /// Batches of an epoch.
    ///
    /// # Errors
    /// As [`Batches::new`].
    pub fn batches<R: Row>(&self, examples: &[R]) -> Result<usize> {
        Ok(Batches::new(examples, self.packing(), Some(self.seed), Default::default())?.in_epoch())
    }
}

/// What a run tells while it goes.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A step is done: its number, of how many, what it did, and the seconds that it took.
    Step(u64, u64, Report, f64),
    /// Loss on held-out data after a step.
    HeldOut(u64, f64),
    /// A checkpoint of this step is on disk.
    Saved(u64),
}

/// How a run ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Steps done, those before a resumption included.
    pub steps: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Mean loss of the last tenth of the steps, nats.
    pub loss: f64,
    /// Loss on held-out data at the beginning (of the whole run) and at the end.
    pub held_out: Option<[f64; 2]>,
    /// Seconds of steps, since it was resumed.
    pub seconds: f64,
    /// Tokens of those seconds.
    pub new_tokens: u64,
}

/// What a run makes small.
pub trait Objective<B: Train> {
    /// One step on `batches`, of a run of `total` steps.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    fn step(&mut self, trainer: &mut Trainer<B>, batches: &[Batch], total: u64) -> Result<Report>;

    /// The loss of data that is not learnt from, the same at every call with the same weights.
    ///
    /// # Errors
    /// The device's.
    fn evaluate(&mut self, trainer: &mut Trainer<B>, batches: &[Batch]) -> Result<f64>;
}

/// Mean cross-entropy of each label given what stands before it.
pub struct NextToken;

impl<B: Train> Objective<B> for NextToken {
    fn step(&mut self, trainer: &mut Trainer<B>, batches: &[Batch], _: u64) -> Result<Report> {
        trainer.step(batches)
    }

    fn evaluate(&mut self, trainer: &mut Trainer<B>, batches: &[Batch]) -> Result<f64> {
        trainer.evaluate(batches)
    }
}

/// Runs `trainer` over `examples` towards `objective`. `settings` go into every checkpoint; with `resume` the run goes on from one, which must
/// be of the same settings, to the very weights that it would have had without a break.
///
/// # Errors
/// `Diverged` where loss or gradient is not finite: the last checkpoint stays. Whatever the device or the disk says.
#[allow(clippy::too_many_arguments)]
pub fn run<B: Train, R: Row>(
    trainer: &mut Trainer<B>,
    objective: &mut dyn Objective<B>,
    examples: &[R],
    held_out: &[R],
    plan: &Plan,
    dir: &Path,
    settings: &serde_json::Value,
    resume: Option<&Checkpoint>,
    on: &mut dyn FnMut(Event),
) -> Result<Outcome> {
    plan.validate()?;
    let (mut curve, mut tokens, mut cursor) = (Curve::default(), 0, Default::default());
    if let Some(from) = resume {
        // A run may go on for longer than it was first given.
        let without_end = |v: &serde_json::Value| {
            let mut v = v.clone();
            if let Some(plan) = v.get_mut("plan").and_then(|p| p.as_object_mut()) {
                plan.remove("minutes");
            }
            v
        };
        let same = without_end(&from.config["run"]) == without_end(settings) && from.seed == plan.seed;
        ensure!(same, Usage, "the checkpoint is of a run with other settings: {}", from.config["run"]);
        curve = serde_json::from_value(from.config["curve"].clone())
            .map_err(|e| Error::with_source(ErrorKind::Config, "the checkpoint's curve is damaged", e))?;
        trainer.restore(from)?;
        (tokens, cursor) = (from.tokens, from.cursor);
    }
    let mut batches = Batches::new(examples, plan.packing(), Some(plan.seed), cursor)?;
    let total = plan.total(batches.in_epoch());
    let held_out = Batches::once(held_out, plan.packing())?;
    let mut run = Run { trainer, objective, plan, dir, settings, curve, held_out };
    if run.trainer.steps() == 0 {
        run.measure(on)?;
    }
    let (start, mut out, mut saved) = (Instant::now(), Outcome::default(), resume.map(|r| r.step));
    while run.trainer.steps() < total {
        let at = Instant::now();
        if plan.minutes > 0.0 && (at - start).as_secs_f64() > 60.0 * plan.minutes {
            break;
        }
        let step: Vec<Batch> = batches.by_ref().take(plan.accumulate).collect();
        let done = run.objective.step(run.trainer, &step, total);
        let report = done.context(|| match saved {
            Some(step) => format!("stopped; the checkpoint of step {step} in {} is good", dir.display()),
            None => "stopped before the first checkpoint".into(),
        })?;
        tokens += report.tokens as u64;
        out.new_tokens += report.tokens as u64;
        let number = run.trainer.steps();
        let (loss, lr) = (report.loss, report.stepped.lr);
        run.curve.points.push(Point { step: number, tokens: tokens as f64, loss, lr });
        let seconds = at.elapsed().as_secs_f64();
        out.seconds += seconds;
        on(Event::Step(number, total, report, seconds));
        if plan.eval_every > 0 && number.is_multiple_of(plan.eval_every) && number < total {
            run.measure(on)?;
        }
        if plan.save_every > 0 && number.is_multiple_of(plan.save_every) && number < total {
            run.save(batches.cursor(), tokens)?;
            saved = Some(number);
            on(Event::Saved(number));
        }
    }
    let steps = run.trainer.steps();
    if run.curve.held_out.last().is_none_or(|h| h.0 != steps) {
        run.measure(on)?;
    }
    run.save(batches.cursor(), tokens)?;
    on(Event::Saved(steps));
    let curve = &run.curve;
    let tail = &curve.points[curve.points.len() - curve.points.len().div_ceil(10)..];
    out.loss = tail.iter().map(|p| p.loss).sum::<f64>() / tail.len().max(1) as f64;
    out.held_out = curve.held_out.first().zip(curve.held_out.last()).map(|(a, b)| [a.1, b.1]);
    (out.steps, out.tokens) = (steps, tokens);
    Ok(out)
}

struct Run<'a, B: Train> {
    trainer: &'a mut Trainer<B>,
    objective: &'a mut dyn Objective<B>,
    plan: &'a Plan,
    dir: &'a Path,
    settings: &'a serde_json::Value,
    curve: Curve,
    held_out: Vec<Batch>,
}

impl<B: Train> Run<'_, B> {
    fn measure(&mut self, on: &mut dyn FnMut(Event)) -> Result<()> {
        if !self.held_out.is_empty() {
            let (step, loss) = (self.trainer.steps(), self.objective.evaluate(self.trainer, &self.held_out)?);
            self.curve.held_out.push((step, loss));
            on(Event::HeldOut(step, loss));
        }
        Ok(())
    }

    fn save(&self, cursor: super::Cursor, tokens: u64) -> Result<PathBuf> {
        let config = json!({"run": self.settings, "curve": self.curve});
        let checkpoint = self.trainer.checkpoint(cursor, self.plan.seed, tokens, config)?;
        self.curve.write_csv(&self.dir.join("loss.csv"))?;
        self.curve.write_svg(&self.dir.join("loss.svg"), "Training loss")?;
        checkpoint.save(&checkpoints(self.dir), self.plan.keep)
    }
}

/// Where a run in `dir` keeps its checkpoints.
pub fn checkpoints(dir: &Path) -> PathBuf {
    dir.join("checkpoints")
}
