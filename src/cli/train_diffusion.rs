//! `quadriga train diffusion` and `quadriga distill`.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::flags::{Common, TrainArgs};
use super::out;
use super::train::{StepBar, config, named, set};
use crate::engine::{Convert, DiffusionRun, DistillSettings, Learn, Lora, MaskedSettings, Method};
use crate::error::{Error, ErrorKind, Result, bail};
use crate::format::Checkpoint;
use crate::train::run::Event;

/// What both verbs take.
#[derive(Args)]
pub(super) struct SharedArgs {
    #[command(flatten)]
    pub train: TrainArgs,
    /// Positions of an answer, filled up with end tokens that are learnt; default: up to a multiple of 32, or of the model's blocks.
    #[arg(long)]
    pub answer_length: Option<usize>,
    /// Rank of a LoRA adapter on all linears; default: all weights train.
    #[arg(long)]
    pub rank: Option<usize>,
}

#[derive(Args)]
pub(super) struct TrainDiffusionArgs {
    #[command(flatten)]
    pub shared: SharedArgs,
    /// Makes a diffusion model of an autoregressive one: the token, by id or text, that becomes the mask; a reserved one.
    #[arg(long)]
    pub mask_token: Option<String>,
    /// With --mask-token: row i of the head predicts position i, not i + 1 as it did.
    #[arg(long, requires = "mask_token")]
    pub unshifted: bool,
    /// With --mask-token: block-causal attention in blocks of so many positions, instead of full.
    #[arg(long, requires = "mask_token")]
    pub block_size: Option<usize>,
    /// Weight of a mask: bound (1/p over the answer), inverse (1/p over the masks) or uniform.
    #[arg(long)]
    pub weighting: Option<String>,
    /// Share of the run in which attention goes from causal to full.
    #[arg(long)]
    pub anneal: Option<f64>,
    /// Widths of blocks, each for an equal share of the run: 1,4,16.
    #[arg(long, value_delimiter = ',')]
    pub grow: Option<Vec<usize>>,
}

#[derive(Args)]
pub(super) struct DistillArgs {
    #[command(flatten)]
    pub shared: SharedArgs,
    /// Where the teacher's orders of unmasking are, or go; default: OUT/trajectories.jsonl. The teacher is the model itself.
    #[arg(long)]
    pub trajectories: Option<PathBuf>,
    /// Takes the order from the likelihoods of this autoregressive model instead: one pass in place of many.
    #[arg(long)]
    pub likelihood: Option<PathBuf>,
    /// Positions of the blocks in which the teacher decodes; default 32.
    #[arg(long)]
    pub teacher_block: Option<usize>,
    /// The teacher computes its current block only, behind a cache: fewer positions, and not quite its own order.
    #[arg(long)]
    pub cached_teacher: bool,
    /// Mask ratio: a bound that rises from the first to the second.
    #[arg(long, value_delimiter = ',', num_args = 2)]
    pub ratio: Option<Vec<f64>>,
    /// Widths of the window, interpolated over the run.
    #[arg(long, value_delimiter = ',')]
    pub window: Option<Vec<usize>>,
    /// Weight of the entropy of right predictions.
    #[arg(long)]
    pub entropy: Option<f64>,
    /// Their temperature.
    #[arg(long)]
    pub tau: Option<f32>,
    /// Without the copy with complementary masks.
    #[arg(long)]
    pub no_complement: bool,
    /// Entropy in both copies.
    #[arg(long)]
    pub entropy_both: bool,
    /// Masks at random: what the teacher's order is compared with.
    #[arg(long)]
    pub random: bool,
}

pub(super) fn masked(common: &Common, args: &TrainDiffusionArgs) -> Result<()> {
    let mut run = settings(common, &args.shared, Learn::Masked(MaskedSettings::default()))?;
    let Learn::Masked(how) = &mut run.learn else {
        bail!(Usage, "--config is of a distillation; it belongs to `distill`");
    };
    named("--weighting", &args.weighting, &mut how.weighting)?;
    set(&mut how.anneal, &args.anneal);
    set(&mut how.grow, &args.grow);
    if let Some(token) = &args.mask_token {
        let mask = match token.parse() {
            Ok(id) => id,
            Err(_) => {
                let known = Checkpoint::open(&common.path()?)?.tokenizer()?.id(token);
                known.ok_or_else(|| {
                    Error::new(ErrorKind::Usage, format!("--mask-token {token}: the tokenizer has no such token"))
                })?
            }
        };
        run.convert = Some(Convert { mask, shift: !args.unshifted, block: args.block_size });
    }
    start(common, &args.shared, &run)
}

pub(super) fn distill(common: &Common, args: &DistillArgs) -> Result<()> {
    let first = Learn::Distill {
        settings: DistillSettings::default(),
        trajectories: None,
        likelihood: None,
        block: 32,
        cached: false,
    };
    let mut run = settings(common, &args.shared, first)?;
    let Learn::Distill { settings: how, trajectories, likelihood, block, cached } = &mut run.learn else {
        bail!(Usage, "--config is of another training; it belongs to `train diffusion`");
    };
    if let Some(r) = &args.ratio {
        how.ratio = [r[0], r[1]];
    }
    set(&mut how.window, &args.window);
    set(&mut how.entropy, &args.entropy);
    set(&mut how.tau, &args.tau);
    set(block, &args.teacher_block);
    *cached |= args.cached_teacher;
    how.complement &= !args.no_complement;
    how.entropy_both |= args.entropy_both;
    how.random |= args.random;
    for (to, flag) in [(trajectories, &args.trajectories), (likelihood, &args.likelihood)] {
        if flag.is_some() {
            to.clone_from(flag);
        }
    }
    start(common, &args.shared, &run)
}

fn settings(common: &Common, args: &SharedArgs, learn: Learn) -> Result<DiffusionRun> {
    let a = &args.train;
    let mut run: DiffusionRun = match &a.config {
        Some(path) => config(path)?,
        None => {
            let run = json!({"method": Method::Full, "data": a.data, "learn": learn, "plan": {"seed": common.seed}});
            serde_json::from_value(run).map_err(|e| Error::with_source(ErrorKind::Usage, "settings of the run", e))?
        }
    };
    set(&mut run.data, &a.data);
    if a.held_out.is_some() {
        run.held_out.clone_from(&a.held_out);
    }
    set(&mut run.answer, &args.answer_length);
    if let Some(rank) = args.rank {
        run.method = Method::Lora(Lora { rank, alpha: 2.0 * rank as f32, ..Lora::default() });
    }
    a.apply(&mut run.plan, &mut run.optimizer, &mut run.reading, &mut run.recompute)?;
    Ok(run)
}

fn start(common: &Common, args: &SharedArgs, run: &DiffusionRun) -> Result<()> {
    let mut steps = StepBar::new();
    let (bar, record) = (steps.bar.clone(), out::bar(0, "trajectories"));
    let mut on = |event: Event| match event {
        Event::Step(step, total, report, seconds) => {
            steps.step(step, total, report.loss, report.tokens as f64 / seconds, report.stepped.grad_norm);
        }
        Event::HeldOut(step, loss) => bar.suspend(|| eprintln!("[step {step}: held-out bound {loss:.4} nats a token]")),
        Event::Saved(step) => tracing::info!("checkpoint of step {step}"),
    };
    let mut recorded = |done: usize, of: usize| {
        record.set_length(of as u64);
        record.set_position(done as u64);
        if done == of {
            record.finish_and_clear();
        }
    };
    let (dir, options) = (&args.train.out, common.options()?);
    let outcome = run.start(&common.path()?, dir, args.train.resume, options, &mut recorded, &mut on);
    bar.finish_and_clear();
    let o = outcome?;
    let place = dir.join(if run.method == Method::Full { "model" } else { "adapter" });
    let speed = o.new_tokens as f64 / o.seconds.max(1e-9);
    if common.json {
        let held_out: Value = o.held_out.map_or(Value::Null, |h| json!({"before": h[0], "after": h[1]}));
        return out::print_json(&json!({
            "model": common.model, "out": dir, "result": place, "steps": o.steps, "tokens": o.tokens, "loss": o.loss,
            "held_out_bound": held_out, "seconds": out::round(o.seconds, 3), "tokens_per_s": out::round(speed, 1),
            "peak_rss_mb": out::peak_rss_mb(),
        }));
    }
    out::print(&format!("{}: {} steps, loss {:.4}\n", place.display(), o.steps, o.loss))?;
    if let Some([before, after]) = o.held_out {
        out::print(&format!("held-out bound {before:.4} before, {after:.4} after, nats a token\n"))?;
    }
    eprintln!("[{speed:.0} tok/s; curve in {}]", dir.join("loss.svg").display());
    Ok(())
}
