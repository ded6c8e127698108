//! The training half of `quadriga train draft`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::flags::Common;
use super::out;
use super::train::{named, set};
use crate::engine::{Agreement, DraftRun, HeadEvent};
use crate::error::Result;

#[derive(Args)]
pub(super) struct HeadArgs {
    /// A head to begin with (OUT/draft of an earlier run); default: one that is fitted to the data by least squares.
    #[arg(long)]
    pub init: Option<PathBuf>,
    /// Folder of the model's features, which cost more than a step on them; default: OUT/features.
    #[arg(long)]
    pub features: Option<PathBuf>,
    /// Leave the features there for further runs.
    #[arg(long)]
    pub keep_features: bool,
    /// Layers whose inputs the head reads; default: 2, the middle one, the last but two.
    #[arg(long, value_delimiter = ',')]
    pub taps: Option<Vec<usize>>,
    /// Tokens that the head knows: the most frequent.
    #[arg(long)]
    pub vocab: Option<usize>,
    /// Steps that the head is unrolled for: how far ahead it learns to draft.
    #[arg(long)]
    pub unroll: Option<usize>,
    /// Weight of each of these steps, as a part of the one before.
    #[arg(long)]
    pub decay: Option<f32>,
    /// Tokens of the model's distribution that are learnt one by one; the others as one.
    #[arg(long)]
    pub teacher: Option<usize>,
    /// Matrices of the result: f16, or q8 (blocks of 32 with a scale).
    #[arg(long)]
    pub store: Option<String>,
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
    /// AdamW's second beta.
    #[arg(long)]
    pub beta2: Option<f32>,
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
}

pub(super) fn run(common: &Common, a: &HeadArgs, data: Vec<PathBuf>, dir: &Path, resume: bool) -> Result<()> {
    let mut run = DraftRun { data, init: a.init.clone(), ..DraftRun::default() };
    run.features.clone_from(&a.features);
    run.keep_features = a.keep_features;
    set(&mut run.taps, &a.taps);
    set(&mut run.vocab, &a.vocab);
    set(&mut run.unroll, &a.unroll);
    set(&mut run.decay, &a.decay);
    set(&mut run.teacher, &a.teacher);
    named("--store", &a.store, &mut run.store)?;
    let (plan, optimizer) = (&mut run.plan, &mut run.optimizer);
    plan.seed = common.seed;
    set(&mut plan.steps, &a.steps);
    set(&mut plan.epochs, &a.epochs);
    set(&mut plan.minutes, &a.minutes);
    set(&mut plan.batch_tokens, &a.batch_tokens);
    set(&mut plan.accumulate, &a.accumulate);
    set(&mut plan.save_every, &a.save_every);
    set(&mut plan.keep, &a.keep);
    set(&mut plan.eval_every, &a.eval_every);
    named("--schedule", &a.schedule, &mut optimizer.schedule.kind)?;
    set(&mut optimizer.lr, &a.lr);
    set(&mut optimizer.beta2, &a.beta2);
    set(&mut optimizer.weight_decay, &a.weight_decay);
    set(&mut optimizer.clip, &a.clip);
    set(&mut optimizer.schedule.warmup, &a.warmup);

    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(250));
    // Smoothed, so that people can read it.
    let (mut loss, mut speed) = (f64::NAN, f64::NAN);
    let smooth = |old: f64, new: f64| if old.is_nan() { new } else { 0.9 * old + 0.1 * new };
    let mut on = |event: HeadEvent| match event {
        HeadEvent::Features(done, total) => {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            bar.set_message("the target reads");
            tracing::debug!("features of {done} of {total} tokens");
        }
        HeadEvent::Step(step, total, report, seconds) => {
            loss = smooth(loss, report.loss);
            speed = smooth(speed, report.rows as f64 / seconds);
            bar.set_length(total);
            bar.set_position(step);
            bar.set_message(format!("loss {loss:.3}, {speed:.0} tok/s"));
            let norm = report.stepped.grad_norm;
            tracing::info!("step {step} of {total}: loss {:.4}, gradient {norm:.3}, {speed:.0} tok/s", report.loss);
        }
        HeadEvent::HeldOut(step, a) => bar.suspend(|| eprintln!("[step {step}: held-out {}]", told(&a))),
        HeadEvent::Saved(step) => tracing::info!("checkpoint of step {step}"),
    };
    let outcome = run.start(&common.path()?, dir, resume, common.options()?, &mut on);
    bar.finish_and_clear();
    let o = outcome?;
    let (speed, place) = (o.new_rows as f64 / o.seconds.max(1e-9), dir.join("draft"));
    let held_out = o.held_out.last().map(|(_, loss, right)| Agreement { loss: *loss, right: right.clone() });
    if common.json {
        return out::print_json(&json!({
            "model": common.model, "out": dir, "result": place, "steps": o.steps, "tokens": o.rows, "loss": o.loss,
            "held_out": held_out.as_ref().map(|h| json!({"loss": h.loss, "right": h.right, "length": h.length()})),
            "seconds": out::round(o.seconds, 3), "tokens_per_s": out::round(speed, 1), "peak_rss_mb": out::peak_rss_mb(),
        }));
    }
    out::print(&format!("{}: {} steps, loss {:.4}\n", place.display(), o.steps, o.loss))?;
    if let Some(h) = held_out {
        out::print(&format!("held-out {}\n", told(&h)))?;
    }
    eprintln!("[{speed:.0} tok/s; curve in {}]", dir.join("loss.svg").display());
    Ok(())
}

fn told(a: &Agreement) -> String {
    let right: Vec<String> = a.right.iter().map(|r| format!("{r:.3}")).collect();
    format!("loss {:.4}, right {}, length {:.3}", a.loss, right.join(" "), a.length())
}
