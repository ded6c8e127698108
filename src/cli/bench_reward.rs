//! `quadriga bench reward`: what a comparison costs.

use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::flags::{Common, DeviceFlag};
use super::out;
use crate::backend::cpu::bandwidth::read_bandwidth;
use crate::engine::align::inverse;
use crate::engine::rlhf::{OnePass, Precision, Settings};
use crate::error::{Result, ensure};
use crate::rng::Rng;

/// One-pass updates of a reward, by width of the features, beside the memory that they must move.
#[derive(Args)]
pub(super) struct BenchRewardArgs {
    /// Widths of features: 576 is SmolLM2's, 2048 Llama-3.2-1B's, 4096 Llama-3-8B's.
    #[arg(long, value_delimiter = ',', default_value = "576,2048,4096")]
    pub widths: Vec<usize>,
    /// Timed updates of each; the median and the 10th and 90th percentile are reported.
    #[arg(long, default_value_t = 60)]
    pub samples: usize,
}

pub(super) fn run(common: &Common, a: &BenchRewardArgs) -> Result<()> {
    ensure!(a.samples > 0, Usage, "--samples 0 is impossible: expected 1 or more");
    ensure!(a.widths.iter().all(|d| (1..=65_536).contains(d)), Usage, "--widths: expected 1 to 65536 each");
    let options = common.options()?;
    // On a GPU the roof is another one, which `bench kernels` measures.
    let on_cpu = !matches!(common.device, DeviceFlag::Cuda);
    let bandwidth = match on_cpu {
        true => Some(out::round(read_bandwidth(options.cpu()?.pool(), 512 << 20)? / 1e9, 2)),
        false => None,
    };
    let mut rows = Vec::new();
    for &d in &a.widths {
        for precision in [Precision::F32, Precision::F64] {
            let mut one = OnePass::with(inverse(&options, d, precision)?, Settings::default())?;
            let mut rng = Rng::new(common.seed);
            let scale = 1.0 / (d as f64).sqrt();
            let mut us = Vec::new();
            for i in 0..a.samples + 5 {
                let z: Vec<f64> = (0..d).map(|_| scale * f64::from(rng.normal())).collect();
                let start = Instant::now();
                one.update(&z, (i % 2) as f64)?;
                // The first ones touch the pages.
                if i >= 5 {
                    us.push(1e6 * start.elapsed().as_secs_f64());
                }
            }
            us.sort_by(f64::total_cmp);
            let at = |q: f64| us[(q * (us.len() - 1) as f64).round() as usize];
            // P is read for P z, and read and written for P - v v'.
            let bytes = 3 * one.bytes();
            let gb_s = bytes as f64 / at(0.5) / 1e3;
            rows.push(json!({
                "d": d, "precision": precision, "us": out::round(at(0.5), 1), "p10": out::round(at(0.1), 1), "p90": out::round(at(0.9), 1),
                "bytes": bytes, "state_mb": out::round(one.bytes() as f64 / 1e6, 2), "gb_s": out::round(gb_s, 1),
                "roof_fraction": bandwidth.map(|b| out::round(gb_s / b, 3)),
            }));
        }
    }
    if common.json {
        return out::print_json(&json!({"read_gb_s": bandwidth, "rows": rows}));
    }
    out::print("    d  type       us   (p10 - p90)    state      GB/s   of what memory gives\n")?;
    for r in &rows {
        let f = |k: &str| r[k].as_f64().unwrap_or(f64::NAN);
        let roof = r["roof_fraction"].as_f64().map_or_else(|| "-".into(), |x| format!("{:.0} %", 100.0 * x));
        out::print(&format!(
            "{:>5}  {:<4} {:>8.1}  ({:.1} - {:.1})  {:>6.1} MB  {:>6.1}   {roof}\n",
            r["d"].as_u64().unwrap_or(0),
            r["precision"].as_str().unwrap_or_default(),
            f("us"),
            f("p10"),
            f("p90"),
            f("state_mb"),
            f("gb_s"),
        ))?;
    }
    if let Some(b) = bandwidth {
        eprintln!("[memory read at {b:.1} GB/s in this run, over 512 MB; what fits into a cache may go faster]");
    }
    Ok(())
}
