//! `quadriga train dpo`.

use clap::Args;
use serde_json::json;

use super::flags::{Common, LoraShape, TrainArgs};
use super::out;
use super::train::{StepBar, config, set};
use crate::engine::PreferenceRun;
use crate::error::Result;
use crate::train::run::Event;

#[derive(Args)]
pub(super) struct DpoArgs {
    #[command(flatten)]
    pub shape: LoraShape,
    /// Strength of the reference, the model without the adapter; default 0.1.
    #[arg(long, allow_negative_numbers = true)]
    pub beta: Option<f64>,
    /// Prompts as they are, not as turns of the model's chat form.
    #[arg(long, conflicts_with = "chat")]
    pub raw: bool,
    #[command(flatten)]
    pub train: TrainArgs,
}

pub(super) fn run(common: &Common, args: &DpoArgs) -> Result<()> {
    let (a, dir) = (&args.train, &args.train.out);
    let mut run = match &a.config {
        Some(path) => config(path)?,
        None => {
            let mut run = PreferenceRun::new("");
            run.plan.seed = common.seed;
            run
        }
    };
    set(&mut run.data, &a.data);
    if a.held_out.is_some() {
        run.held_out.clone_from(&a.held_out);
    }
    args.shape.apply(&mut run.lora);
    set(&mut run.beta, &args.beta);
    run.raw |= args.raw;
    a.apply(&mut run.plan, &mut run.optimizer, &mut run.reading, &mut run.recompute)?;

    let (mut steps, reading) = (StepBar::new(), out::bar(0, "reference"));
    let bar = steps.bar.clone();
    let mut read = |done: usize, of: usize| {
        reading.set_length(of as u64);
        reading.set_position(done as u64);
        if done == of {
            reading.finish_and_clear();
        }
    };
    let mut on = |event: Event| match event {
        Event::Step(step, total, report, seconds) => {
            steps.step(step, total, report.loss, report.tokens as f64 / seconds, report.stepped.grad_norm);
        }
        Event::HeldOut(step, loss) => bar.suspend(|| eprintln!("[step {step}: held-out loss {loss:.4}]")),
        Event::Saved(step) => tracing::info!("checkpoint of step {step}"),
    };
    let ended = run.start(&common.path()?, dir, a.resume, common.options()?, &mut read, &mut on);
    bar.finish_and_clear();
    let ended = ended?;
    let (o, place) = (&ended.run, dir.join("adapter"));
    let speed = o.new_tokens as f64 / o.seconds.max(1e-9);
    if common.json {
        let held_out = ended.held_out.map(|m| {
            json!({
                "pairs": m.pairs, "loss": m.loss, "accuracy": m.accuracy, "margin": m.margin,
                "log_ratio_chosen": m.chosen, "log_ratio_rejected": m.rejected, "kl": m.kl(),
            })
        });
        return out::print_json(&json!({
            "model": common.model, "out": dir, "result": place, "steps": o.steps, "tokens": o.tokens, "beta": run.beta,
            "loss": o.loss, "held_out_before": o.held_out.map(|h| h[0]), "held_out_after": o.held_out.map(|h| h[1]),
            "held_out": held_out, "seconds": out::round(o.seconds, 3), "tokens_per_s": out::round(speed, 1),
            "peak_rss_mb": out::peak_rss_mb(),
        }));
    }
    out::print(&format!("{}: {} steps, loss {:.4}\n", place.display(), o.steps, o.loss))?;
    if let (Some(m), Some([before, after])) = (ended.held_out, o.held_out) {
        out::print(&format!(
            "held-out loss {before:.4} before, {after:.4} after; {:.1} % of {} pairs prefer the chosen answer, margin {:.3}\n\
             ln of policy over reference: chosen {:+.3}, rejected {:+.3} nats an answer\n",
            100.0 * m.accuracy,
            m.pairs,
            m.margin,
            m.chosen,
            m.rejected
        ))?;
    }
    eprintln!("[{speed:.0} tok/s; curve in {}]", dir.join("loss.svg").display());
    Ok(())
}
