//! `quadriga align improve`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{AnswerArgs, RewardArgs, features, folder, judge, report};
use crate::cli::flags::{Common, LoraShape};
use crate::cli::out;
use crate::cli::train::{RunArgs, StepBar};
use crate::engine::align::{Answering, BestOf, Features, Item, RewardModel, Scripted, order, read_prompts};
use crate::engine::rlhf::Tokens;
use crate::engine::{DataSettings, Engine, Lora, Method, PreferenceRun, TrainRun};
use crate::error::{Error, ErrorKind, Result, bail, ensure};
use crate::files::write_file;
use crate::train::run::Event;
use crate::train::{Plan, Settings};

/// How the model learns from its answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// Rejection-sampling fine-tuning: the answer of the highest reward to each prompt, as it would be trained on any text.
    Rft,
    /// Direct preference optimisation: the answer of the highest reward against that of the lowest.
    Dpo,
}

/// Make the model itself answer so: it writes answers, a reward (of --reward, or learnt here from a rule's comparisons) ranks them, an
/// adapter learns from the ranking, and held-out prompts show what came of it. Stages that are done are not done again. Result:
/// OUT/update/adapter.
#[derive(Args)]
pub(in crate::cli) struct ImproveArgs {
    /// Prompts: .jsonl or .jsonl.gz with prompt, question or turns.
    #[arg(long)]
    pub prompts: PathBuf,
    /// At most so many prompts; 0: all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// Share of the prompts that are held out.
    #[arg(long, default_value_t = 0.25)]
    pub held_out_share: f64,
    /// What was learnt before.
    #[arg(long, required_unless_present = "judge")]
    pub reward: Option<PathBuf>,
    /// A rule that measures what came of it and, without --reward, compares answers for a reward to learn.
    #[arg(long)]
    pub judge: Option<String>,
    /// How sure the rule is: log-odds for a typical difference.
    #[arg(long, default_value_t = 2.0)]
    pub strength: f64,
    /// Comparisons that the rule makes, without --reward.
    #[arg(long, default_value_t = 500)]
    pub comparisons: usize,
    /// How the model learns.
    #[arg(long, value_enum, default_value = "dpo")]
    by: By,
    /// Strength of DPO's reference.
    #[arg(long, default_value_t = 0.1)]
    pub beta: f64,
    /// Folder of the results.
    #[arg(long)]
    pub out: PathBuf,
    #[command(flatten)]
    pub answer: AnswerArgs,
    #[command(flatten)]
    pub options: RewardArgs,
    #[command(flatten)]
    pub shape: LoraShape,
    #[command(flatten)]
    pub run: RunArgs,
}

pub(super) fn run(common: &Common, a: &ImproveArgs) -> Result<()> {
    let share = a.held_out_share;
    ensure!(
        share > 0.0 && share < 1.0,
        Usage,
        "--held-out-share {share} is impossible: expected more than 0, less than 1"
    );
    ensure!(a.answer.answers > 1, Usage, "--answers {}: one answer cannot be ranked", a.answer.answers);
    ensure!(common.adapter.is_none(), Usage, "--adapter: the update trains an adapter of its own");
    ensure!(a.answer.system.is_none(), Unsupported, "--system: the update's rows have no system message");
    folder(&a.out)?;
    let engine = common.autoregressive()?;
    let form = a.answer.form(&engine)?;
    let all = read_prompts(&a.prompts, &form, a.limit)?;
    let n = (share * all.len() as f64).round() as usize;
    ensure!(n > 0 && n < all.len(), Usage, "{} prompts: too few to hold {share} of them out", all.len());
    let mut shuffled: Vec<Item> = order(all.len(), common.seed).into_iter().map(|i| all[i].clone()).collect();
    let mut held = shuffled.split_off(all.len() - n);
    let mut items = shuffled;
    let scripted = match &a.judge {
        Some(name) => Some(Scripted { judge: judge(name, a.strength)?, seed: common.seed }),
        None => None,
    };
    let spec = match &a.reward {
        Some(path) => RewardModel::read(&engine, path)?.options().features,
        None => a.options.options().features,
    };
    same_run(common, a, &items, &held)?;
    let mut made = features(&engine, spec, &a.out, None)?;
    let (answering, _) = a.answer.answering(&engine, None, common.seed)?;
    answer(&engine, &answering, &mut items, 0, &mut made, &a.out.join("answers.jsonl"), "answers")?;
    let reward = match (&a.reward, &scripted) {
        (Some(path), _) => RewardModel::read(&engine, path)?,
        (None, Some(scripted)) => learn(common, a, &engine, &items, scripted)?,
        (None, None) => {
            return Err(Error::new(ErrorKind::Usage, "nothing ranks the answers: give --reward or --judge"));
        }
    };

    let data = a.out.join("update.jsonl");
    let rows = ranked(&reward, &items, a.by)?;
    write_file(&data, |to| rows.iter().try_for_each(|row| writeln!(to, "{row}")))?;
    let loss = update(common, a, &data)?;

    // Before, the best of several, and after, on prompts that nothing was learnt from.
    let first = items.len() as u64;
    answer(&engine, &answering, &mut held, first, &mut made, &a.out.join("before.jsonl"), "before")?;
    let tuned = Engine::open_with(common.path()?, common.options()?.adapter(a.out.join("update/adapter")))?;
    let mut after = held.iter().map(|i| Item { answers: Vec::new(), ..i.clone() }).collect::<Vec<_>>();
    // Features of the tuned model's states would be another's: its answers are read by the first one.
    let mut plain = Features::new(&tuned, spec, None)?;
    answer(&tuned, &answering, &mut after, first, &mut plain, &a.out.join("after.jsonl"), "after")?;
    after.iter_mut().flat_map(|i| &mut i.answers).for_each(|x| x.feature.clear());
    made.fill(&mut after, &mut |_| {})?;
    // Draws with filters are not the model's own: of them there is no estimate.
    let whole = a.answer.temperature == 1.0 && a.answer.top_k == 0 && a.answer.top_p == 1.0;
    let kl = if whole { divergence(&engine, &tuned, &after)? } else { f64::NAN };
    let json = summary(common, a, &reward, scripted.as_ref(), [&held, &after], kl, loss)?;
    report::write(&a.out.join("report.json"), &json)?;
    if common.json {
        return out::print_json(&json);
    }
    let cell = |v: &Value| v.as_f64().map_or_else(|| "-".into(), |v| format!("{v:+.3}"));
    out::print("                    reward    judge   words  KL, nats an answer\n")?;
    for row in json["rows"].as_array().into_iter().flatten() {
        let name = row["name"].as_str().unwrap_or_default();
        let words = row["words"].as_f64().unwrap_or(0.0);
        out::print(&format!(
            "{name:<17} {:>8} {:>8} {words:>7.1}  {}\n",
            cell(&row["reward"]),
            cell(&row["judge"]),
            cell(&row["kl"])
        ))?;
    }
    eprintln!(
        "[rewards are differences from the model's mean before; {} held-out prompts; {}]",
        held.len(),
        a.out.join("update/adapter").display()
    );
    Ok(())
}

fn answer(
    engine: &Engine,
    answering: &Answering,
    items: &mut [Item],
    first: u64,
    features: &mut Features,
    file: &Path,
    what: &'static str,
) -> Result<()> {
    let bar = out::bar((items.len() * answering.each) as u64, what);
    answering.run(engine, items, first, features, Some(file), &mut |n| bar.set_position(n as u64))?;
    bar.finish_and_clear();
    Ok(())
}

/// Refuses to go on with stages that another run has done.
fn same_run(common: &Common, a: &ImproveArgs, items: &[Item], held: &[Item]) -> Result<()> {
    let path = a.out.join("improve.json");
    let mut hash = Sha256::new();
    items.iter().chain(held).for_each(|i| hash.update(format!("{:?}", i.ids)));
    if let Some(reward) = &a.reward {
        hash.update(std::fs::read(reward).map_err(|e| Error::io(reward.display(), e))?);
    }
    let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let is = json!({
        "inputs_sha256": digest, "learnt": items.len(), "judge": a.judge, "strength": a.strength, "comparisons": a.comparisons,
        "options": a.options.options(), "by": format!("{:?}", a.by), "beta": a.beta, "answers": a.answer.answers, "seed": common.seed,
        "max_tokens": a.answer.max_tokens, "temperature": a.answer.temperature, "top_p": a.answer.top_p, "raw": a.answer.raw,
    });
    if let Ok(text) = std::fs::read(&path) {
        let was: Value = serde_json::from_slice(&text).unwrap_or_default();
        let other = is.as_object().into_iter().flatten().find(|(k, v)| was[k.as_str()] != **v);
        if let Some((name, now)) = other {
            let file = path.display();
            bail!(Usage, "{file}: the run that is there had {name} {}, not {now}", was[name.as_str()]);
        }
        return Ok(());
    }
    write_file(&path, |to| Ok(serde_json::to_writer_pretty(to, &is)?))
}

/// A reward from comparisons that the rule makes of answers that are there.
fn learn(
    common: &Common,
    a: &ImproveArgs,
    engine: &Engine,
    items: &[Item],
    scripted: &Scripted,
) -> Result<RewardModel> {
    let path = a.out.join("reward.safetensors");
    if path.exists() {
        return RewardModel::read(engine, &path);
    }
    let mut reward = RewardModel::new(engine, a.options.options())?;
    items.iter().try_for_each(|i| reward.observe(&i.features()))?;
    let pairs = super::active::all_pairs(items);
    let scores = items.iter().map(|i| scripted.of(i)).collect::<Result<Vec<_>>>()?;
    for k in order(pairs.len(), common.seed).into_iter().take(a.comparisons) {
        let c = &pairs[k];
        let feature = |k: usize| &items[c.item].answers[c.answers[k]].feature[..];
        reward.tell(feature(0), feature(1), scripted.says(k as u64, c.answers.map(|i| scores[c.item][i])))?;
    }
    reward.snapshot(&path)?;
    Ok(reward)
}

/// What is learnt from each prompt's answers; a prompt whose answers are all the same teaches nothing.
fn ranked(reward: &RewardModel, items: &[Item], by: By) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for item in items {
        let rewards = reward.rewards(&item.features());
        let usable = || (0..rewards.len()).filter(|&i| !item.answers[i].text.trim().is_empty());
        let best = usable().max_by(|&i, &j| rewards[i].total_cmp(&rewards[j]));
        let worst = usable().min_by(|&i, &j| rewards[i].total_cmp(&rewards[j]));
        let (Some(best), Some(worst)) = (best, worst) else { continue };
        let [chosen, rejected] = [best, worst].map(|i| &item.answers[i].text);
        match by {
            By::Rft => rows.push(json!({"prompt": item.prompt, "completion": chosen})),
            By::Dpo if chosen != rejected => {
                rows.push(json!({"prompt": item.prompt, "chosen": chosen, "rejected": rejected}));
            }
            By::Dpo => {}
        }
    }
    ensure!(!rows.is_empty(), Usage, "no prompt has answers that differ");
    Ok(rows)
}

/// Trains the adapter; the loss at the end.
fn update(common: &Common, a: &ImproveArgs, data: &Path) -> Result<f64> {
    let to = a.out.join("update");
    let (mut lora, mut plan) = (Lora::default(), Plan { seed: common.seed, ..Plan::default() });
    a.shape.apply(&mut lora);
    let reading = DataSettings { chat: !a.answer.raw, ..DataSettings::default() };
    let mut bar = StepBar::new();
    let mut last = f64::NAN;
    let mut on = |event: Event| {
        if let Event::Step(step, total, report, seconds) = event {
            last = report.loss;
            bar.step(step, total, report.loss, report.tokens as f64 / seconds, report.stepped.grad_norm);
        }
    };
    let (model, options) = (common.path()?, common.options()?);
    match a.by {
        By::Rft => {
            let mut optimizer = Settings { lr: 1e-4, ..Settings::default() };
            a.run.apply(&mut plan, &mut optimizer)?;
            let run = json!({"method": Method::Lora(lora), "data": data, "reading": reading, "optimizer": optimizer, "plan": plan});
            let run: TrainRun = serde_json::from_value(run)
                .map_err(|e| Error::with_source(ErrorKind::Usage, "settings of the update", e))?;
            run.start(&model, &to, true, options, &mut on)?;
        }
        By::Dpo => {
            let mut run =
                PreferenceRun { lora, beta: a.beta, reading, raw: a.answer.raw, plan, ..PreferenceRun::new(data) };
            run.reading.chat = false;
            a.run.apply(&mut run.plan, &mut run.optimizer)?;
            run.start(&model, &to, true, options, &mut |_, _| {}, &mut on)?;
        }
    }
    bar.bar.finish_and_clear();
    Ok(last)
}

/// Mean over the tuned model's own answers of ln p_tuned - ln p_base: an unbiased estimate of KL(tuned, base) at temperature 1 and without
/// other filters, nats an answer.
fn divergence(base: &Engine, tuned: &Engine, items: &[Item]) -> Result<f64> {
    let longest =
        items.iter().map(|i| i.ids.len() + i.answers.iter().map(|a| a.tokens.rows()).max().unwrap_or(0)).max();
    let mut sessions = [base.session(longest.unwrap_or(1), 0)?, tuned.session(longest.unwrap_or(1), 0)?];
    let (mut sum, mut n) = (0.0, 0.0);
    for item in items {
        for answer in &item.answers {
            let Tokens { ids, end } = &answer.tokens;
            let all: Vec<u32> = item.ids.iter().chain(ids).copied().chain(end.filter(|_| !answer.cut)).collect();
            let mut of = [0.0; 2];
            for (session, of) in sessions.iter_mut().zip(&mut of) {
                let mut at = 1;
                session.nll(&all, |nll| {
                    if at >= item.ids.len() {
                        *of -= nll;
                    }
                    at += 1;
                })?;
            }
            sum += of[1] - of[0];
            n += 1.0;
        }
    }
    Ok(sum / f64::max(n, 1.0))
}

fn summary(
    common: &Common,
    a: &ImproveArgs,
    reward: &RewardModel,
    scripted: Option<&Scripted>,
    [before, after]: [&[Item]; 2],
    kl: f64,
    loss: f64,
) -> Result<Value> {
    // Of each prompt's answers the mean, and the best by the reward.
    let mut rows = [[0.0; 3]; 3];
    let mut count = 0.0;
    for (b, x) in before.iter().zip(after) {
        let [rb, rx] = [b, x].map(|i| reward.rewards(&i.features()));
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
        let best = (0..rb.len()).max_by(|&i, &j| rb[i].total_cmp(&rb[j])).unwrap_or(0);
        let score = |i: &Item| scripted.map(|s| s.of(i)).transpose();
        let words =
            |i: &Item| -> Vec<f64> { i.answers.iter().map(|a| a.text.split_whitespace().count() as f64).collect() };
        let (sb, sx) = (score(b)?.unwrap_or_default(), score(x)?.unwrap_or_default());
        let at = |v: &[f64], i: usize| v.get(i).copied().unwrap_or(f64::NAN);
        let base = mean(&rb);
        let new = [
            [0.0, mean(&sb), mean(&words(b))],
            [rb[best] - base, at(&sb, best), at(&words(b), best)],
            [mean(&rx) - base, mean(&sx), mean(&words(x))],
        ];
        rows.iter_mut().flatten().zip(new.iter().flatten()).for_each(|(r, n)| *r += n);
        count += 1.0;
    }
    let n = a.answer.answers as f64;
    let best = BestOf { most: a.answer.answers, ..BestOf::default() };
    let kls = [0.0, n.ln() - (n - 1.0) / n, kl];
    let names = [
        "before".into(),
        format!("best of {}", best.most),
        format!("after {}", if a.by == By::Dpo { "DPO" } else { "RFT" }),
    ];
    let row = |((name, row), kl): ((&String, &[f64; 3]), f64)| {
        let [r, j, w] = row.map(|x| x / f64::max(count, 1.0));
        json!({
            "name": name, "reward": report::rounded(r), "judge": scripted.map(|_| report::rounded(j)), "words": report::rounded(w),
            "kl": report::rounded(kl),
        })
    };
    let rows: Vec<Value> = names.iter().zip(&rows).zip(kls).map(row).collect();
    Ok(json!({
        "model": common.model, "by": format!("{:?}", a.by).to_lowercase(), "rows": rows, "held_out": before.len(),
        "comparisons": reward.comparisons(), "loss": loss.is_finite().then(|| report::rounded(loss)), "adapter": a.out.join("update/adapter"),
    }))
}
