//! `quadriga align active`.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde_json::json;

use super::{AnswerArgs, RewardArgs, features, folder, judge, report};
use crate::cli::flags::Common;
use crate::cli::out;
use crate::engine::align::{
    Active, Ask, Comparison, Curve, Form, HeldOut, Item, Questions, RewardModel, Scripted, active, order, read_pairs,
    read_prompts, split,
};
use crate::error::{Error, ErrorKind, Result, ensure};

/// Learn a reward from few comparisons, each chosen by what is uncertain; result: OUT/reward.safetensors. The pool is a file of pairs
/// whose labels are looked at when asked, or answers that the model writes to prompts, compared by a rule.
#[derive(Args)]
pub(in crate::cli) struct ActiveArgs {
    /// Pairs: .jsonl or .jsonl.gz with {"prompt", "chosen", "rejected"}.
    #[arg(long, required_unless_present = "prompts")]
    pub data: Option<PathBuf>,
    /// Prompts to answer instead: .jsonl or .jsonl.gz with prompt, question or turns.
    #[arg(long, conflicts_with = "data", requires = "judge")]
    pub prompts: Option<PathBuf>,
    /// The rule that compares answers to --prompts: shorter, longer, fewer-commas, first-person, plain-words, sentiment, full-stop, list,
    /// correct, or mix:A:B:WEIGHT.
    #[arg(long, requires = "prompts")]
    pub judge: Option<String>,
    /// How sure the rule is: log-odds for a typical difference.
    #[arg(long, default_value_t = 2.0)]
    pub strength: f64,
    /// Comparisons that may be asked.
    #[arg(long, default_value_t = 200)]
    pub budget: usize,
    /// What to ask next: uncertainty, fisher, margin, norm, random, best-worst. Several are compared; the reward is the first one's.
    #[arg(long, value_delimiter = ',', default_value = "uncertainty,random")]
    pub ask: Vec<String>,
    /// Share of the prompts that are held out.
    #[arg(long, default_value_t = 0.25)]
    pub held_out_share: f64,
    /// At most so many pairs or prompts; 0: all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// Folder of the results.
    #[arg(long)]
    pub out: PathBuf,
    /// Folder of computed features; default: OUT/features.
    #[arg(long)]
    pub features: Option<PathBuf>,
    #[command(flatten)]
    pub answer: AnswerArgs,
    #[command(flatten)]
    pub reward: RewardArgs,
}

pub(super) fn run(common: &Common, a: &ActiveArgs) -> Result<()> {
    let share = a.held_out_share;
    ensure!((0.0..1.0).contains(&share), Usage, "--held-out-share {share} is impossible: expected 0 to less than 1");
    ensure!(a.budget > 0, Usage, "--budget 0 is impossible: expected 1 or more");
    let asks = a.ask.iter().map(|name| named(name)).collect::<Result<Vec<Ask>>>()?;
    folder(&a.out)?;
    let path = a.out.join("reward.safetensors");
    ensure!(!path.exists(), Usage, "{} is there: give another --out, or move it away", path.display());
    let engine = common.autoregressive()?;
    let form = Form::new(&engine, a.answer.raw, a.answer.system.clone())?;
    let options = a.reward.options();
    let mut made = features(&engine, options.features, &a.out, a.features.as_ref())?;
    let (items, pairs, scripted) = match (&a.data, &a.prompts) {
        (Some(path), _) => {
            let (mut items, pairs) = read_pairs(path, &form, a.limit)?;
            let bar = out::bar(items.len() as u64, "features");
            made.fill(&mut items, &mut |n| bar.set_position(n as u64))?;
            bar.finish_and_clear();
            (items, pairs, None)
        }
        (None, Some(path)) => {
            let mut items = read_prompts(path, &form, a.limit)?;
            let scripted =
                Scripted { judge: judge(a.judge.as_deref().unwrap_or_default(), a.strength)?, seed: common.seed };
            let (answering, _) = a.answer.answering(&engine, None, common.seed)?;
            let bar = out::bar((items.len() * answering.each) as u64, "answers");
            let file = a.out.join("answers.jsonl");
            answering.run(&engine, &mut items, 0, &mut made, Some(&file), &mut |n| bar.set_position(n as u64))?;
            bar.finish_and_clear();
            let pairs = all_pairs(&items);
            (items, pairs, Some(scripted))
        }
        (None, None) => return Err(Error::new(ErrorKind::Usage, "no pool: give --data or --prompts")),
    };
    let scores = match &scripted {
        Some(s) => items.iter().map(|i| s.of(i)).collect::<Result<Vec<_>>>()?,
        None => Vec::new(),
    };
    let (train, held) = split(items.len(), &pairs, share, common.seed);
    ensure!(!train.is_empty(), Usage, "no pairs are left to ask");
    // Held-out comparisons are measured by the better answer.
    let held: Vec<Comparison> = match scripted {
        Some(_) => held.into_iter().filter_map(|c| better(c, &scores[c.item])).collect(),
        None => held,
    };
    let mut reward = RewardModel::new(&engine, options.clone())?;
    let learnt: HashSet<usize> = train.iter().map(|c| c.item).collect();
    let seen =
        order(items.len(), common.seed).into_iter().filter(|i| learnt.contains(i)).flat_map(|i| items[i].features());
    let seen: Vec<Vec<f32>> = seen.take(options.warmup as usize).collect();
    reward.observe(&seen)?;
    let mut prompts: Vec<usize> = held.iter().map(|c| c.item).collect();
    prompts.dedup();
    let scored: Vec<(usize, Vec<f64>)> = match scripted {
        Some(_) => prompts.into_iter().map(|i| (i, scores[i].clone())).collect(),
        None => Vec::new(),
    };
    let held_out = HeldOut::new(&reward, &items, &held, &scored);

    let feature = |c: &Comparison, k: usize| &items[c.item].answers[c.answers[k]].feature;
    let zs: Vec<Vec<f64>> = train.iter().map(|c| reward.scale().difference(feature(c, 0), feature(c, 1))).collect();
    let mut groups = vec![Vec::new(); items.len()];
    train.iter().enumerate().for_each(|(k, c)| groups[c.item].push(k));
    groups.retain(|g| !g.is_empty());
    let label = |k: usize| match &scripted {
        Some(s) => s.says(k as u64, train[k].answers.map(|i| scores[train[k].item][i])),
        None => 1.0,
    };
    let start = Instant::now();
    let mut runs: Vec<(&str, Active)> = Vec::new();
    for (name, &ask) in a.ask.iter().zip(&asks) {
        let bar = out::bar(a.budget.min(zs.len()) as u64, "comparisons");
        let learner = reward.untaught(options.learner.clone())?;
        let run = active(
            learner,
            Questions { zs: &zs, groups: &groups, ask, budget: a.budget, seed: common.seed },
            &mut |k| Ok(label(k)),
            &held_out,
            &mut |t| bar.set_position(t),
        )?;
        bar.finish_and_clear();
        runs.push((name, run));
    }
    // The reward learns what its rule asked, in that order.
    if let Some((_, first)) = runs.first() {
        for &k in &first.asked {
            reward.tell(feature(&train[k], 0), feature(&train[k], 1), label(k))?;
        }
    }
    reward.snapshot(&path)?;
    let curves: Vec<Curve> = runs.iter().map(|(name, r)| Curve { name: (*name).into(), ..r.last.clone() }).collect();
    let curves: Vec<&Curve> = curves.iter().collect();
    report::accuracy_svg(&a.out.join("accuracy.svg"), "comparisons chosen", &curves)?;
    let json = json!({
        "model": common.model, "options": options, "pool": train.len(), "held_out": held.len(), "budget": a.budget,
        "runs": runs.iter().map(|(name, r)| json!({"ask": name, "last": r.last, "average": r.average})).collect::<Vec<_>>(),
        "base_and_oracle": held_out.bounds(), "reward": path, "seconds": report::rounded(start.elapsed().as_secs_f64()),
    });
    report::write(&a.out.join("report.json"), &json)?;
    if common.json {
        return out::print_json(&json);
    }
    out::print(&report::table(&curves, "comparisons", &|m| Some(m.accuracy)))?;
    if let Some([base, oracle]) = held_out.bounds() {
        out::print(&format!(
            "\njudge's score of the best answer; any answer {base:.2}, the judge's own best {oracle:.2}\n"
        ))?;
        out::print(&report::table(&curves, "comparisons", &|m| m.best))?;
    }
    eprintln!("[uncertainty does not always beat chance: docs/rlhf.md; {} on {}]", path.display(), engine.device());
    Ok(())
}

fn named(name: &str) -> Result<Ask> {
    let none = || Error::new(ErrorKind::Usage, format!("--ask {name}: there are {}", Ask::NAMES.join(", ")));
    Ask::named(name).ok_or_else(none)
}

/// All pairs of different answers to each prompt.
pub(super) fn all_pairs(items: &[Item]) -> Vec<Comparison> {
    let of = |(item, i): (usize, &Item)| {
        let n = i.answers.len();
        let differ = |a: usize, b: usize| i.answers[a].tokens.ids != i.answers[b].tokens.ids;
        let pairs = (0..n).flat_map(move |a| (a + 1..n).map(move |b| [a, b])).filter(|&[a, b]| differ(a, b));
        pairs.map(|answers| Comparison { item, answers }).collect::<Vec<_>>()
    };
    items.iter().enumerate().flat_map(of).collect()
}

/// The comparison with the better answer first; none of equals.
pub(super) fn better(c: Comparison, scores: &[f64]) -> Option<Comparison> {
    let [a, b] = c.answers;
    match scores[a].total_cmp(&scores[b]) {
        std::cmp::Ordering::Greater => Some(c),
        std::cmp::Ordering::Less => Some(Comparison { answers: [b, a], ..c }),
        std::cmp::Ordering::Equal => None,
    }
}
