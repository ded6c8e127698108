//! The training half of `quadriga train draft`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::flags::Common;
use super::out;
use super::train::{RunArgs, StepBar, named, set};
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
    #[command(flatten)]
    pub run: RunArgs,
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
    run.plan.seed = common.seed;
    a.run.apply(&mut run.plan, &mut run.optimizer)?;

    let mut steps = StepBar::new();
    let bar = steps.bar.clone();
    let mut on = |event: HeadEvent| match event {
        HeadEvent::Features(done, total) => {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            bar.set_message("the target reads");
            tracing::debug!("features of {done} of {total} tokens");
        }
        HeadEvent::Step(step, total, report, seconds) => {
            steps.step(step, total, report.loss, report.rows as f64 / seconds, report.stepped.grad_norm);
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
