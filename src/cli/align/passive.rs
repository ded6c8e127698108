//! `quadriga align passive`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{RewardArgs, features, folder, report};
use crate::cli::flags::Common;
use crate::cli::out;
use crate::engine::align::{
    BASELINES, Comparison, Curve, Form, HeldOut, Item, RewardModel, baselines, mark, marks, order, read_pairs, split,
};
use crate::error::{Result, ensure};
use crate::files::write_file;

/// Comparisons between two snapshots of a reward that learns from a file, which has them all anyway.
const SNAPSHOT: u64 = 500;

/// Learn a reward from pairs that are there already, each seen once; result: OUT/reward.safetensors.
#[derive(Args)]
pub(in crate::cli) struct PassiveArgs {
    /// Pairs: .jsonl or .jsonl.gz with {"prompt", "chosen", "rejected"}.
    #[arg(long)]
    pub data: PathBuf,
    /// Pairs to measure on; default: those of some of the prompts of --data.
    #[arg(long)]
    pub held_out: Option<PathBuf>,
    /// Share of the prompts of --data that are held out, where there is no --held-out.
    #[arg(long, default_value_t = 0.2)]
    pub held_out_share: f64,
    /// At most so many pairs; 0: all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// Folder of the results.
    #[arg(long)]
    pub out: PathBuf,
    /// Go on with OUT/reward.safetensors, behind the pairs that it has learnt.
    #[arg(long)]
    pub resume: bool,
    /// Also learn the same pairs by these, and compare: mle (refits everything, warm), explicit, implicit, sgd, adam,
    /// hvp (conjugate gradients on the batch's Hessian), released (the same as the paper's code has it); or all.
    #[arg(long, value_delimiter = ',')]
    pub compare: Vec<String>,
    /// Prompts as they are, not in the model's chat form.
    #[arg(long)]
    pub raw: bool,
    /// Folder of computed features; default: OUT/features.
    #[arg(long)]
    pub features: Option<PathBuf>,
    #[command(flatten)]
    pub reward: RewardArgs,
}

pub(super) fn run(common: &Common, a: &PassiveArgs) -> Result<()> {
    let share = a.held_out_share;
    ensure!((0.0..1.0).contains(&share), Usage, "--held-out-share {share} is impossible: expected 0 to less than 1");
    let names: Vec<&str> = match &a.compare[..] {
        [one] if one == "all" => BASELINES.to_vec(),
        names => names.iter().map(String::as_str).collect(),
    };
    let alien = names.iter().find(|n| !BASELINES.contains(n));
    ensure!(alien.is_none(), Usage, "--compare {}: there are {}", alien.unwrap_or(&""), BASELINES.join(", "));
    folder(&a.out)?;
    let path = a.out.join("reward.safetensors");
    ensure!(
        a.resume || !path.exists(),
        Usage,
        "{} is there: --resume goes on with it, another --out begins anew",
        path.display()
    );
    let engine = common.autoregressive()?;
    let form = Form::new(&engine, a.raw, None)?;
    let (mut items, pairs) = read_pairs(&a.data, &form, a.limit)?;
    let (train, held) = match &a.held_out {
        None => split(items.len(), &pairs, share, common.seed),
        Some(path) => {
            let (mut others, held) = read_pairs(path, &form, 0)?;
            let n = items.len();
            items.append(&mut others);
            (pairs, held.into_iter().map(|c| Comparison { item: c.item + n, ..c }).collect())
        }
    };
    ensure!(!train.is_empty(), Usage, "{}: no pairs are left to learn", a.data.display());
    let is = digest(common, a, &train, &items);
    let pairs_of = a.out.join("pairs.sha256");
    if path.exists() {
        let was = std::fs::read_to_string(&pairs_of).unwrap_or_default();
        ensure!(was == is, Usage, "{}: learnt from other pairs, or in another order (--seed)", path.display());
    } else {
        write_file(&pairs_of, |to| to.write_all(is.as_bytes()))?;
    }
    let mut reward = match path.exists() {
        true => RewardModel::read(&engine, &path)?,
        false => RewardModel::new(&engine, a.reward.options())?,
    };
    let options = a.reward.options();
    ensure!(*reward.options() == options, Usage, "{}: made with {:?}", path.display(), reward.options());

    let mut made = features(&engine, options.features, &a.out, a.features.as_ref())?;
    let bar = out::bar(items.len() as u64, "features");
    let start = Instant::now();
    made.fill(&mut items, &mut |n| bar.set_position(n as u64))?;
    bar.finish_and_clear();
    let features_s = start.elapsed().as_secs_f64();
    let found = made.cache.as_ref().map_or([0; 2], |c| c.found);

    let order = order(train.len(), common.seed);
    let feature = |c: &Comparison, k: usize| &items[c.item].answers[c.answers[k]].feature;
    if reward.rounds() == 0 {
        let seen: Vec<Vec<f32>> = order
            .iter()
            .flat_map(|&i| [0, 1].map(|k| feature(&train[i], k).clone()))
            .take(options.warmup as usize)
            .collect();
        reward.observe(&seen)?;
    }
    let held_out = HeldOut::new(&reward, &items, &held, &[]);
    let wanted = marks(train.len() as u64);
    // One round has shown it the scale.
    let done = reward.rounds() - 1;
    let bar = out::bar(train.len() as u64, "comparisons");
    let (mut curve, mut since, mut seconds) = (Vec::new(), Vec::new(), 0.0);
    for (t, &i) in (1u64..).zip(&order).skip(done as usize) {
        let start = Instant::now();
        // Every other pair from its other side, which is the same lesson, so that predictions are not all of one kind.
        let (first, y) = if t % 2 == 0 { (0, 1.0) } else { (1, 0.0) };
        reward.tell(feature(&train[i], first), feature(&train[i], 1 - first), y)?;
        since.push(start.elapsed().as_secs_f64());
        seconds += since.last().copied().unwrap_or(0.0);
        if wanted.contains(&t) {
            curve.push(mark(t, reward.learner().theta(), &held_out, seconds, &mut since));
        }
        if t % SNAPSHOT == 0 {
            reward.snapshot(&path)?;
        }
        bar.set_position(t);
    }
    bar.finish_and_clear();
    reward.snapshot(&path)?;
    let one_pass = Curve { name: "one-pass".into(), marks: curve, bytes: reward.learner().bytes() };

    let zs: Vec<Vec<f64>> =
        order.iter().map(|&i| reward.scale().difference(feature(&train[i], 0), feature(&train[i], 1))).collect();
    let bar = out::bar(names.len() as u64 * train.len() as u64, "baselines");
    let others = baselines(&reward, &zs, &held_out, &names, &mut |name, t| {
        let k = names.iter().position(|n| *n == name).unwrap_or(0);
        bar.set_position((k * train.len()) as u64 + t);
    })?;
    bar.finish_and_clear();

    let curves: Vec<&Curve> = std::iter::once(&one_pass).chain(&others).collect();
    let theta = reward.learner().theta();
    let (accuracy, log_loss, _) = held_out.measure(theta);
    let (calibration, length) = (held_out.calibration(theta)?, held_out.length_correlation(theta));
    report::accuracy_svg(&a.out.join("accuracy.svg"), "one pass over the comparisons", &curves)?;
    let json = json!({
        "model": common.model, "options": reward.options(), "pairs": train.len(), "held_out": held.len(),
        "comparisons": reward.comparisons(), "accuracy": report::rounded(accuracy), "log_loss": report::rounded(log_loss),
        "progressive": reward.progress(), "calibration": calibration.bins(), "length_correlation": report::rounded(length),
        "curves": curves, "features_s": report::rounded(features_s), "features_found": found[0], "features_made": found[1],
        "peak_rss_mb": out::peak_rss_mb(), "reward": path,
    });
    report::write(&a.out.join("report.json"), &json)?;
    if common.json {
        return out::print_json(&json);
    }
    out::print(&report::table(&curves, "comparisons", &|m| Some(m.accuracy)))?;
    out::print(&format!(
        "held out: {:.1} % of {} right, log-loss {log_loss:.3}; calibration (predicted>true): {}\n",
        100.0 * accuracy,
        held.len(),
        report::calibration(&calibration)
    ))?;
    out::print(&format!(
        "before learning each: {:.1} % right, log-loss {:.3}; correlation of reward with length {length:+.2}\n",
        100.0 * reward.progress().accuracy(),
        reward.progress().log_loss()
    ))?;
    for c in &curves {
        let last = c.marks.last();
        let (s, us) = last.map_or((0.0, 0.0), |m| (m.seconds, m.update_us));
        eprintln!("[{}: {s:.3} s in all, {us:.0} us an update, {:.1} MB]", c.name, c.bytes as f64 / 1e6);
    }
    eprintln!(
        "[{} features in {features_s:.1} s, {} found; {} on {}]",
        found[1],
        found[0],
        path.display(),
        engine.device()
    );
    Ok(())
}

/// What decides which comparisons come in which order, as a hash.
fn digest(common: &Common, a: &PassiveArgs, train: &[Comparison], items: &[Item]) -> String {
    let mut hash = Sha256::new();
    hash.update(format!("{} {:?}", common.seed, a.raw));
    for c in train {
        hash.update(items[c.item].prompt.as_bytes());
        c.answers.iter().for_each(|&k| hash.update(format!("\0{}", items[c.item].answers[k].text)));
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}
