//! `quadriga train draft`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use indicatif::ProgressStyle;
use serde_json::json;

use super::flags::Common;
use super::train_head::HeadArgs;
use super::{out, train_head};
use crate::engine::SelfGen;
use crate::error::Result;

#[derive(Args)]
pub(super) struct TrainDraftArgs {
    /// Prompts that the model continues: .jsonl or .jsonl.gz with prompt, question or turns; several files are mixed.
    #[arg(long, required_unless_present = "data")]
    pub prompts: Vec<PathBuf>,
    /// What the model said to prompts, instead of or beside asking it: .jsonl with n, prompt_ids and ids.
    #[arg(long)]
    pub data: Vec<PathBuf>,
    /// Folder of the results.
    #[arg(long)]
    pub out: PathBuf,
    /// Go on with what is in OUT.
    #[arg(long)]
    pub resume: bool,
    /// Only write OUT/gen.jsonl, the model's continuations.
    #[arg(long)]
    pub generate_only: bool,
    /// Most new tokens of a prompt.
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
    /// Temperature of the continuations that are drawn.
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Share of the prompts whose continuation is drawn; the others are continued greedily.
    #[arg(long, default_value_t = 0.25, allow_negative_numbers = true)]
    pub sampled_share: f64,
    /// Prompts continued at a time; the result does not depend on it.
    #[arg(long, default_value_t = 24)]
    pub batch: usize,
    /// At most so many prompts of all; 0: all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    #[command(flatten)]
    pub head: HeadArgs,
}

pub(super) fn run(common: &Common, args: &TrainDraftArgs) -> Result<()> {
    let mut data = args.data.clone();
    if !args.prompts.is_empty() {
        generate(common, args)?;
        data.push(args.out.join("gen.jsonl"));
    }
    if args.generate_only { Ok(()) } else { train_head::run(common, &args.head, data, &args.out, args.resume) }
}

fn generate(common: &Common, args: &TrainDraftArgs) -> Result<()> {
    let how = SelfGen {
        prompts: args.prompts.clone(),
        limit: args.limit,
        max_tokens: args.max_tokens,
        sampled_share: args.sampled_share,
        temperature: args.temperature,
        seed: common.seed,
    };
    let engine = common.autoregressive()?;
    let bar = out::bar(0, "");
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta} left") {
        bar.set_style(style);
    }
    let (start, mut tokens) = (Instant::now(), 0);
    let made = how.run(&engine, &common.model, &args.out, args.batch, args.resume, &mut |rows, all, new| {
        tokens += new;
        if bar.length() != Some(all as u64) {
            bar.set_length(all as u64);
            bar.set_position(rows as u64 - 1);
            bar.reset_eta();
        }
        bar.set_position(rows as u64);
        bar.set_message(format!("{:.0} tok/s", tokens as f64 / start.elapsed().as_secs_f64()));
    });
    bar.finish_and_clear();
    let (made, seconds, path) = (made?, start.elapsed().as_secs_f64(), args.out.join("gen.jsonl"));
    let speed = made.tokens as f64 / seconds.max(1e-9);
    if common.json && args.generate_only {
        return out::print_json(&json!({
            "model": common.model, "result": path, "rows": made.rows, "resumed": made.resumed, "tokens": made.tokens,
            "forwards": made.forwards, "seconds": out::round(seconds, 3), "tokens_per_s": out::round(speed, 1),
            "peak_rss_mb": out::peak_rss_mb(),
        }));
    }
    eprintln!(
        "[{}: {} rows, {} tokens new, {speed:.0} tok/s; {}]",
        path.display(),
        made.rows,
        made.tokens,
        engine.device()
    );
    Ok(())
}
