//! A training run of a head from its first step, or from a checkpoint, to its end.

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::features::Features;
use super::pass::{DraftVocab, HeadPass};
use super::trainer::{Agreement, HeadReport, HeadTrainer};
use crate::backend::Train;
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::train::curve::{Curve, Point};
use crate::train::run::checkpoints;
use crate::train::{Checkpoint, Cursor, Plan, data};

/// What a run tells while it goes.
#[derive(Clone, Debug)]
pub enum HeadEvent {
    /// The target has read so many tokens of the data, of how many.
    Features(usize, usize),
    /// A step is done: its number, of how many, what it did, and the seconds that it took.
    Step(u64, u64, HeadReport, f64),
    /// How the head does on held-out data after a step.
    HeldOut(u64, Agreement),
    /// A checkpoint of this step is on disk.
    Saved(u64),
}

/// How a run ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeadOutcome {
    /// Steps done, those before a resumption included.
    pub steps: u64,
    /// Rows seen.
    pub rows: u64,
    /// Mean loss of the last tenth of the steps, nats.
    pub loss: f64,
    /// Step, then what [`Agreement`] has: the loss, and how many proposals of each unrolled step are right.
    pub held_out: Vec<(u64, f64, Vec<f64>)>,
    /// Seconds of steps, since it was resumed.
    pub seconds: f64,
    /// Rows of those seconds.
    pub new_rows: u64,
}

/// Data of a run.
pub struct HeadData<'a> {
    /// Of all sequences.
    pub features: &'a Features,
    /// Those that are trained on.
    pub train: Vec<usize>,
    /// Those that are not.
    pub held_out: Vec<usize>,
    /// Tokens of the head.
    pub vocab: &'a DraftVocab,
    /// Tokens of the teacher that a row is trained with.
    pub k: usize,
}

impl HeadData<'_> {
    fn order(&self, which: &[usize], plan: &Plan, seed: Option<u64>, cursor: Cursor) -> Result<data::Order> {
        let lens = which.iter().map(|&i| self.features.rows(i)).collect();
        data::Order::new(lens, data::Packing { rows: plan.batch_tokens, sequences: plan.batch_tokens }, seed, cursor)
    }

    /// Passes of an epoch.
    ///
    /// # Errors
    /// As [`data::Order::new`].
    pub fn passes(&self, plan: &Plan) -> Result<usize> {
        Ok(self.order(&self.train, plan, Some(plan.seed), Cursor::default())?.in_epoch())
    }

    fn pass<B: Train>(&self, trainer: &HeadTrainer<B>, which: &[usize], batch: &[usize]) -> Result<HeadPass> {
        let read = batch.iter().map(|&i| self.features.read(which[i])).collect::<Result<Vec<_>>>()?;
        HeadPass::new(trainer.head().config(), &read.iter().collect::<Vec<_>>(), self.vocab, self.k)
    }
}

/// Runs `trainer` over `data`. `settings` go into every checkpoint; with `resume` the run goes on from one, which must be of the same
/// settings, to the very weights that it would have had without a break.
///
/// # Errors
/// `Diverged` where loss or gradient is not finite: the last checkpoint stays. Whatever the device or the disk says.
#[allow(clippy::too_many_arguments)]
pub fn run_head<B: Train>(
    trainer: &mut HeadTrainer<B>,
    data: &HeadData<'_>,
    plan: &Plan,
    dir: &Path,
    settings: &serde_json::Value,
    resume: Option<&Checkpoint>,
    on: &mut dyn FnMut(HeadEvent),
) -> Result<HeadOutcome> {
    plan.validate()?;
    let (mut curve, mut out, mut cursor) = (Curve::default(), HeadOutcome::default(), Cursor::default());
    if let Some(from) = resume {
        let damaged = |e| Error::with_source(ErrorKind::Config, "the checkpoint's state is damaged", e);
        curve = serde_json::from_value(from.config["curve"].clone()).map_err(damaged)?;
        out.held_out = serde_json::from_value(from.config["held_out"].clone()).map_err(damaged)?;
        trainer.restore(from)?;
        (out.rows, cursor) = (from.tokens, from.cursor);
    }
    let mut order = data.order(&data.train, plan, Some(plan.seed), cursor)?;
    let total = plan.total(order.in_epoch());
    let mut held_out = Vec::new();
    if !data.held_out.is_empty() {
        let mut order = data.order(&data.held_out, plan, None, Cursor::default())?;
        let n = order.in_epoch();
        for batch in order.by_ref().take(n) {
            held_out.push(data.pass(trainer, &data.held_out, &batch)?);
        }
    }
    let measure =
        |trainer: &mut HeadTrainer<B>, out: &mut HeadOutcome, curve: &mut Curve| -> Result<Option<Agreement>> {
            if held_out.is_empty() {
                return Ok(None);
            }
            let (step, a) = (trainer.steps(), trainer.evaluate(&held_out)?);
            curve.held_out.push((step, a.loss));
            out.held_out.push((step, a.loss, a.right.clone()));
            Ok(Some(a))
        };
    let save = |trainer: &HeadTrainer<B>, out: &HeadOutcome, curve: &Curve, cursor: Cursor| -> Result<()> {
        let config = json!({"run": settings, "curve": curve, "held_out": out.held_out, "d2t": data.vocab.d2t()});
        let checkpoint = trainer.checkpoint(cursor, plan.seed, out.rows, config)?;
        curve.write_csv(&dir.join("loss.csv"))?;
        curve.write_svg(&dir.join("loss.svg"), "Training loss of the draft")?;
        checkpoint.save(&checkpoints(dir), plan.keep).map(|_| ())
    };
    if trainer.steps() == 0 {
        let a = measure(trainer, &mut out, &mut curve)?;
        a.into_iter().for_each(|a| on(HeadEvent::HeldOut(0, a)));
    }
    let (start, mut saved) = (Instant::now(), resume.map(|r| r.step));
    while trainer.steps() < total {
        let at = Instant::now();
        if plan.minutes > 0.0 && (at - start).as_secs_f64() > 60.0 * plan.minutes {
            break;
        }
        let mut passes = Vec::with_capacity(plan.accumulate);
        for batch in order.by_ref().take(plan.accumulate) {
            passes.push(data.pass(trainer, &data.train, &batch)?);
        }
        let report = trainer.step(&passes).context(|| match saved {
            Some(step) => format!("stopped; the checkpoint of step {step} in {} is good", dir.display()),
            None => "stopped before the first checkpoint".into(),
        })?;
        out.rows += report.rows as u64;
        out.new_rows += report.rows as u64;
        let number = trainer.steps();
        let (loss, lr) = (report.loss, report.stepped.lr);
        curve.points.push(Point { step: number, tokens: out.rows as f64, loss, lr });
        let seconds = at.elapsed().as_secs_f64();
        out.seconds += seconds;
        on(HeadEvent::Step(number, total, report, seconds));
        if plan.eval_every > 0 && number.is_multiple_of(plan.eval_every) && number < total {
            let a = measure(trainer, &mut out, &mut curve)?;
            a.into_iter().for_each(|a| on(HeadEvent::HeldOut(number, a)));
        }
        if plan.save_every > 0 && number.is_multiple_of(plan.save_every) && number < total {
            save(trainer, &out, &curve, order.cursor())?;
            saved = Some(number);
            on(HeadEvent::Saved(number));
        }
    }
    let steps = trainer.steps();
    if out.held_out.last().is_none_or(|h| h.0 != steps) {
        let a = measure(trainer, &mut out, &mut curve)?;
        a.into_iter().for_each(|a| on(HeadEvent::HeldOut(steps, a)));
    }
    ensure!(steps > 0, Usage, "the run ended before its first step");
    save(trainer, &out, &curve, order.cursor())?;
    on(HeadEvent::Saved(steps));
    let tail = &curve.points[curve.points.len() - curve.points.len().div_ceil(10)..];
    out.loss = tail.iter().map(|p| p.loss).sum::<f64>() / tail.len().max(1) as f64;
    out.steps = steps;
    Ok(out)
}
