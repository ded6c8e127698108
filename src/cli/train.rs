//! `quadriga train`.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::flags::{Common, LoraArgs, TrainArgs};
use super::out;
use crate::engine::{DataSettings, Lora, Method, TrainRun};
use crate::error::{Context, Error, ErrorKind, Result, bail};
use crate::model::Recompute;
use crate::train::run::Event;
use crate::train::{Plan, Settings};

pub(super) fn lora(common: &Common, args: &LoraArgs) -> Result<()> {
    let mut run = settings(&args.train, common, || Method::Lora(Lora::default()))?;
    let Method::Lora(lora) = &mut run.method else {
        bail!(Usage, "--config is of a run of all weights; it belongs to `train full`");
    };
    args.shape.apply(lora);
    start(common, &args.train, &run, "adapter")
}

pub(super) fn full(common: &Common, args: &TrainArgs) -> Result<()> {
    let run = settings(args, common, || Method::Full)?;
    if run.method != Method::Full {
        bail!(Usage, "--config is of a LoRA run; it belongs to `train lora`");
    }
    start(common, args, &run, "model")
}

pub(super) fn set<T: Clone>(to: &mut T, flag: &Option<T>) {
    if let Some(x) = flag {
        to.clone_from(x);
    }
}

/// A word as the setting that it names in `run.json`.
pub(super) fn named<T: DeserializeOwned>(flag: &str, word: &Option<String>, to: &mut T) -> Result<()> {
    if let Some(word) = word {
        let parsed = T::deserialize(serde_json::Value::from(word.as_str()));
        *to = parsed.map_err(|e| Error::new(ErrorKind::Usage, format!("{flag} {word}: {e}")))?;
    }
    Ok(())
}

/// Settings as an earlier run wrote them.
pub(super) fn config<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|e| Error::io(path.display(), e))?;
    let parsed = serde_json::from_slice(&text);
    parsed.map_err(|e| Error::new(ErrorKind::Usage, e.to_string())).context(|| path.display().to_string())
}

/// Length, rhythm and optimiser of a run of any kind.
#[derive(Args)]
pub(super) struct RunArgs {
    /// Steps; default: as many as the epochs make.
    #[arg(long)]
    pub steps: Option<u64>,
    /// Times that the data is seen.
    #[arg(long)]
    pub epochs: Option<f64>,
    /// Stop after so many minutes.
    #[arg(long)]
    pub minutes: Option<f64>,
    /// Most tokens in a pass, in packed sequences.
    #[arg(long)]
    pub batch_tokens: Option<usize>,
    /// Passes that make a step.
    #[arg(long)]
    pub accumulate: Option<usize>,
    /// Learning rate.
    #[arg(long, allow_negative_numbers = true)]
    pub lr: Option<f32>,
    /// Decoupled weight decay.
    #[arg(long, allow_negative_numbers = true)]
    pub weight_decay: Option<f32>,
    /// Longest gradient; 0: any.
    #[arg(long)]
    pub clip: Option<f32>,
    /// constant, linear or cosine.
    #[arg(long)]
    pub schedule: Option<String>,
    /// Steps until the full learning rate.
    #[arg(long)]
    pub warmup: Option<u64>,
    /// Steps between checkpoints; 0: one at the end.
    #[arg(long)]
    pub save_every: Option<u64>,
    /// Checkpoints that stay.
    #[arg(long)]
    pub keep: Option<usize>,
    /// Steps between measurements on held-out data; 0: first and last.
    #[arg(long)]
    pub eval_every: Option<u64>,
    /// AdamW's second beta.
    #[arg(long)]
    pub beta2: Option<f32>,
}

impl RunArgs {
    /// Sets what was given.
    pub fn apply(&self, plan: &mut Plan, optimizer: &mut Settings) -> Result<()> {
        set(&mut plan.steps, &self.steps);
        set(&mut plan.epochs, &self.epochs);
        set(&mut plan.minutes, &self.minutes);
        set(&mut plan.batch_tokens, &self.batch_tokens);
        set(&mut plan.accumulate, &self.accumulate);
        set(&mut plan.save_every, &self.save_every);
        set(&mut plan.keep, &self.keep);
        set(&mut plan.eval_every, &self.eval_every);
        named("--schedule", &self.schedule, &mut optimizer.schedule.kind)?;
        set(&mut optimizer.schedule.warmup, &self.warmup);
        set(&mut optimizer.lr, &self.lr);
        set(&mut optimizer.beta2, &self.beta2);
        set(&mut optimizer.weight_decay, &self.weight_decay);
        set(&mut optimizer.clip, &self.clip);
        Ok(())
    }
}

/// The bar of a run: loss and speed smoothed, so that people can read them.
pub(super) struct StepBar {
    pub bar: ProgressBar,
    loss: f64,
    speed: f64,
}

impl StepBar {
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, loss: f64::NAN, speed: f64::NAN }
    }

    /// A step of `total` is done, at `speed` tokens a second.
    pub fn step(&mut self, step: u64, total: u64, loss: f64, speed: f64, gradient: f64) {
        let smooth = |old: f64, new: f64| if old.is_nan() { new } else { 0.9 * old + 0.1 * new };
        (self.loss, self.speed) = (smooth(self.loss, loss), smooth(self.speed, speed));
        self.bar.set_length(total);
        self.bar.set_position(step);
        self.bar.set_message(format!("loss {:.3}, {:.0} tok/s", self.loss, self.speed));
        tracing::info!("step {step} of {total}: loss {loss:.4}, gradient {gradient:.3}, {:.0} tok/s", self.speed);
    }
}

impl TrainArgs {
    /// Sets what was given but for the data.
    pub(super) fn apply(
        &self,
        plan: &mut Plan,
        optimizer: &mut Settings,
        reading: &mut DataSettings,
        recompute: &mut Recompute,
    ) -> Result<()> {
        self.run.apply(plan, optimizer)?;
        set(&mut reading.max_length, &self.max_length);
        named("--long-rows", &self.long_rows, &mut reading.long_rows)?;
        set(&mut reading.limit, &self.limit);
        reading.chat |= self.chat;
        named("--optimizer", &self.optimizer, &mut optimizer.kind)?;
        named("--recompute", &self.recompute, recompute)
    }
}

fn settings(a: &TrainArgs, common: &Common, method: impl FnOnce() -> Method) -> Result<TrainRun> {
    let mut run = match &a.config {
        Some(path) => config(path)?,
        None => {
            let mut run = json!({"method": method(), "data": a.data});
            run["plan"] = json!({"seed": common.seed});
            serde_json::from_value::<TrainRun>(run)
                .map_err(|e| Error::with_source(ErrorKind::Usage, "settings of the run", e))?
        }
    };
    set(&mut run.data, &a.data);
    if a.held_out.is_some() {
        run.held_out.clone_from(&a.held_out);
    }
    a.apply(&mut run.plan, &mut run.optimizer, &mut run.reading, &mut run.recompute)?;
    Ok(run)
}

fn start(common: &Common, args: &TrainArgs, run: &TrainRun, result: &str) -> Result<()> {
    let mut steps = StepBar::new();
    let bar = steps.bar.clone();
    let mut on = |event: Event| match event {
        Event::Step(step, total, report, seconds) => {
            steps.step(step, total, report.loss, report.tokens as f64 / seconds, report.stepped.grad_norm);
        }
        Event::HeldOut(step, loss) => bar.suspend(|| eprintln!("[step {step}: held-out loss {loss:.4}]")),
        Event::Saved(step) => tracing::info!("checkpoint of step {step}"),
    };
    let outcome = run.start(&common.path()?, &args.out, args.resume, common.options()?, &mut on);
    bar.finish_and_clear();
    let o = outcome?;
    let (speed, place) = (o.new_tokens as f64 / o.seconds.max(1e-9), args.out.join(result));
    if common.json {
        return out::print_json(&json!({
            "model": common.model, "out": args.out, "result": place, "steps": o.steps, "tokens": o.tokens, "loss": o.loss,
            "held_out_before": o.held_out.map(|h| h[0]), "held_out_after": o.held_out.map(|h| h[1]),
            "seconds": out::round(o.seconds, 3), "tokens_per_s": out::round(speed, 1), "peak_rss_mb": out::peak_rss_mb(),
        }));
    }
    out::print(&format!("{}: {} steps, loss {:.4}\n", place.display(), o.steps, o.loss))?;
    if let Some([before, after]) = o.held_out {
        out::print(&format!("held-out loss {before:.4} before, {after:.4} after\n"))?;
    }
    eprintln!("[{speed:.0} tok/s; curve in {}]", args.out.join("loss.svg").display());
    Ok(())
}
