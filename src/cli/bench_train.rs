//! `quadriga bench train`.

use serde_json::json;

use super::flags::{BenchTrainArgs, Common};
use super::out;
use super::train::named;
use crate::bench::peaks::matrix_peak;
use crate::engine::{Lever, LeverBench, Lora, Method, TrainBench, lever_speed, train_speed};
use crate::error::{Result, ensure};
use crate::model::Recompute;

pub(super) fn run(common: &Common, args: &BenchTrainArgs) -> Result<()> {
    ensure!(args.tokens >= 2, Usage, "--tokens {} is impossible: a sequence needs 2 or more", args.tokens);
    ensure!(args.steps >= 1, Usage, "--steps 0 measures nothing");
    if let Some(top) = args.levers {
        return levers(common, args, top);
    }
    let lora = Lora { rank: args.rank, alpha: 2.0 * args.rank as f32, ..Lora::default() };
    let method = if args.full { Method::Full } else { Method::Lora(lora) };
    let mut recompute = Recompute::default();
    named("--recompute", &args.recompute, &mut recompute)?;
    let what = TrainBench { method, tokens: args.tokens, steps: args.steps, recompute };
    let options = common.options()?;
    let roof = options.cpu().map(|cpu| matrix_peak(&cpu))?;
    let speed = train_speed(&common.path()?, &what, common.options()?)?;
    let median = |x: &[f64]| x[x.len() / 2];
    let (step, forward) = (median(&speed.steps), median(&speed.forwards));
    let (tokens, flops) = (args.tokens as f64 / step, speed.flops / step);
    let kind = if args.full { "full".to_owned() } else { format!("lora, rank {}", args.rank) };
    let peak = out::peak_rss_mb();
    if common.json {
        return out::print_json(&json!({
            "model": common.model, "method": if args.full { "full" } else { "lora" }, "rank": args.rank, "tokens": args.tokens,
            "ms_per_step": out::round(step * 1e3, 2), "ms_forward": out::round(forward * 1e3, 2),
            "tokens_per_s": out::round(tokens, 1), "gflop_s": out::round(flops / 1e9, 1),
            "roof_gflop_s": out::round(roof / 1e9, 1), "roof_fraction": out::round(flops / roof, 4),
            "peak_rss_mb": peak.map(|m| out::round(m, 1)),
        }));
    }
    out::print(&format!(
        "{kind}: {:.1} ms a step of {} tokens, {tokens:.0} tok/s; forward {:.1} ms\n{:.0} GFLOP/s, {:.1} % of the {:.0} that \
         matrix products reach in registers\n",
        step * 1e3,
        args.tokens,
        forward * 1e3,
        flops / 1e9,
        100.0 * flops / roof,
        roof / 1e9,
    ))?;
    if let Some(mb) = peak {
        eprintln!("[peak memory {mb:.0} MB]");
    }
    Ok(())
}

/// What a step costs as it gets sparser, for sequences of 64 tokens.
fn levers(common: &Common, args: &BenchTrainArgs, top: usize) -> Result<()> {
    const LENGTH: usize = 64;
    ensure!(top > 0, Usage, "--levers 0 adapts no layer");
    let targets = vec!["q".into(), "v".into()];
    let lora = Lora { rank: args.rank, alpha: 2.0 * args.rank as f32, targets, top_layers: top, ..Lora::default() };
    let sequences = args.tokens.div_ceil(LENGTH);
    let what = LeverBench { lora, sequences, length: LENGTH, steps: args.steps };
    let seconds = lever_speed(&common.path()?, &what, common.options()?)?;
    let median = |x: &Vec<f64>| x[x.len() / 2];
    let plain = median(&seconds[0]);
    let rows: Vec<_> = Lever::ALL.iter().zip(&seconds).map(|(l, s)| (l.name(), median(s))).collect();
    if common.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, s)| json!({"lever": name, "ms_per_step": out::round(s * 1e3, 2), "of_plain": out::round(s / plain, 4)}))
            .collect();
        return out::print_json(&json!({
            "model": common.model, "rank": args.rank, "tokens": sequences * LENGTH, "top_layers": top, "levers": rows,
        }));
    }
    for (name, s) in rows {
        out::print(&format!("{name:>14}  {:8.1} ms  {:5.1} % of plain\n", s * 1e3, 100.0 * s / plain))?;
    }
    Ok(())
}
