//! `quadriga align demo`: the whole system on one model, in some minutes and without a network.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};

use super::active::{all_pairs, better};
use super::deploy::Person;
use super::{AnswerArgs, folder, report};
use crate::cli::flags::Common;
use crate::cli::out;
use crate::engine::Engine;
use crate::engine::align::{
    Aligner, Answer, Answering, Ask, BestOf, Comparison, Curve, Deployed, Features, Form, HeldOut, Item, Prefer,
    Questions, RewardModel, RewardOptions, Scored, Scripted, active, baselines, order, simulate,
};
use crate::engine::rlhf::judge::{Bradley, Judge};
use crate::engine::rlhf::{FeatureSpec, OnePass, Pooling, Second, Settings};
use crate::error::Result;

/// Show all of it on one model: answers, features, one pass beside a full refit, chosen questions, deployment, a restart, and then you.
/// Exit status 1 if a check fails.
#[derive(Args)]
pub(in crate::cli) struct DemoArgs {
    /// Folder of the results; answers and features that are there are used again.
    #[arg(long)]
    pub out: PathBuf,
    /// Prompts, at most 100.
    #[arg(long, default_value_t = 64)]
    pub prompts: usize,
    /// Answers to each.
    #[arg(long, default_value_t = 8)]
    pub answers: usize,
    /// Most tokens of an answer.
    #[arg(long, short = 'n', default_value_t = 32)]
    pub max_tokens: usize,
    /// Rounds of deployment.
    #[arg(long, default_value_t = 300)]
    pub rounds: usize,
    /// Questions to you at the end, on a terminal.
    #[arg(long, default_value_t = 20)]
    pub questions: u64,
}

const TOPICS: [&str; 50] = [
    "rain",
    "bread",
    "trains",
    "the sea",
    "chess",
    "winter",
    "coffee",
    "bridges",
    "cats",
    "maps",
    "gardens",
    "music",
    "snow",
    "tea",
    "mountains",
    "books",
    "clocks",
    "soup",
    "birds",
    "rivers",
    "paper",
    "lemons",
    "bicycles",
    "stars",
    "wood",
    "fishing",
    "cheese",
    "letters",
    "lamps",
    "horses",
    "islands",
    "salt",
    "painting",
    "kites",
    "markets",
    "the moon",
    "glass",
    "honey",
    "dancing",
    "forests",
    "ships",
    "apples",
    "silence",
    "stones",
    "wool",
    "theatre",
    "bees",
    "windows",
    "sleep",
    "stairs",
];

/// A judge with the features that suit it.
struct Task {
    name: &'static str,
    judge: Judge,
    pool: Pooling,
}

/// What one judge's pool has.
struct World {
    items: Vec<Item>,
    scores: Vec<Vec<f64>>,
    scripted: Scripted,
    train: Vec<Comparison>,
    held: Vec<Comparison>,
    options: RewardOptions,
    features: Features,
}

pub(super) fn run(common: &Common, a: &DemoArgs) -> Result<ExitCode> {
    folder(&a.out)?;
    let began = Instant::now();
    let engine = common.autoregressive()?;
    let mut checks = self_tests()?;
    let say = |text: &str| if common.json { Ok(()) } else { out::print(text) };
    say(&format!("the mathematics, against printed digits: {}\n", verdicts(&checks)))?;

    let form = Form::new(&engine, false, None)?;
    let answers = AnswerArgs {
        answers: a.answers,
        max_tokens: a.max_tokens,
        temperature: 1.0,
        top_k: 0,
        top_p: 0.95,
        width: 16,
        raw: false,
        system: None,
    };
    let (answering, _) = answers.answering(&engine, None, common.seed)?;
    let tasks = [
        Task { name: "shorter", judge: Judge::Shorter, pool: Pooling::Last },
        Task { name: "first-person", judge: Judge::FirstPerson, pool: Pooling::Mean },
        Task { name: "fewer-commas", judge: Judge::FewerCommas, pool: Pooling::Mean },
    ];
    let mut reports = Vec::new();
    for task in &tasks {
        let world = world(common, a, &engine, &form, &answering, task)?;
        let (json, mut of) = study(common, a, &engine, task, &world, &say)?;
        reports.push(json);
        if task.name == "shorter" {
            checks.append(&mut of);
            let (same, ms) = restart(common, a, &engine, &world)?;
            checks.push(("a killed process goes on to the same bits".into(), same));
            say(&format!(
                "saved, dropped and read again: {}; an answer is on disk in {ms:.1} ms\n",
                if same { "the same bits" } else { "NOT the same" }
            ))?;
            if std::io::stdin().is_terminal() && !common.json && a.questions > 0 {
                person(common, a, &engine, world, &answering)?;
            }
        }
    }
    let wall = began.elapsed().as_secs_f64();
    let passed = checks.iter().all(|c| c.1);
    let json = json!({
        "model": common.model, "checks": checks.iter().map(|(n, ok)| json!({"name": n, "passed": ok})).collect::<Vec<_>>(),
        "passed": passed, "tasks": reports, "wall_s": report::rounded(wall), "device": engine.device(), "peak_rss_mb": out::peak_rss_mb(),
    });
    report::write(&a.out.join("report.json"), &json)?;
    if common.json {
        out::print_json(&json)?;
    } else {
        out::print(&format!("\nchecks: {}\n", verdicts(&checks)))?;
        eprintln!("[{wall:.0} s on {}; pictures and report.json in {}]", engine.device(), a.out.display());
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn verdicts(checks: &[(String, bool)]) -> String {
    let failed: Vec<&str> = checks.iter().filter(|c| !c.1).map(|c| &*c.0).collect();
    match failed[..] {
        [] => format!("all {} passed", checks.len()),
        _ => format!("{} of {} FAILED: {}", failed.len(), checks.len(), failed.join("; ")),
    }
}

/// Answers, features and comparisons of a judge.
fn world(
    common: &Common,
    a: &DemoArgs,
    engine: &Engine,
    form: &Form,
    answering: &Answering,
    task: &Task,
) -> Result<World> {
    let spec = FeatureSpec { pool: task.pool, ..FeatureSpec::default() };
    let mut features = Features::new(engine, spec, Some(&a.out.join("features")))?;
    let asks = ["Write one short sentence about", "Give one short opinion about"];
    let prompts = asks.iter().flat_map(|ask| TOPICS.iter().map(move |topic| format!("{ask} {topic}.")));
    let mut items: Vec<Item> = prompts
        .map(|prompt| Ok(Item { ids: form.prompt(&prompt)?, prompt, ..Item::default() }))
        .collect::<Result<_>>()?;
    // The first prompts of a seed's order, so that fewer are not all of one kind.
    let order = order(items.len(), common.seed);
    items = order.into_iter().take(a.prompts).map(|i| std::mem::take(&mut items[i])).collect();
    let bar = out::bar((items.len() * a.answers) as u64, "answers");
    let start = Instant::now();
    let stats = answering.run(engine, &mut items, 0, &mut features, Some(&a.out.join("answers.jsonl")), &mut |n| {
        bar.set_position(n as u64);
    })?;
    bar.finish_and_clear();
    if stats.tokens > 0 && !common.json {
        let s = start.elapsed().as_secs_f64();
        let tokens: usize = items.iter().flat_map(|i| &i.answers).map(|x| x.tokens.ids.len()).sum();
        out::print(&format!(
            "{} answers, {tokens} tokens in {s:.1} s: {:.0} tok/s, features with them\n",
            items.len() * a.answers,
            stats.tokens as f64 / s
        ))?;
    }
    // Lengths in tokens: of answers that were cut, all are the same, and none is better.
    let score = |i: &Item, x: &Answer| match task.judge {
        Judge::Shorter => Ok(-(x.tokens.ids.len() as f64)),
        _ => task.judge.score(&i.prompt, &x.text, None),
    };
    let score = |i: &Item| i.answers.iter().map(|x| score(i, x)).collect::<Result<Vec<f64>>>();
    let raw = items.iter().map(score).collect::<Result<Vec<_>>>()?;
    // All scores with standard deviation 2: what they differ by are log-odds.
    let judge = Bradley::standardised(task.judge.clone(), &raw.concat());
    let mean = raw.concat().iter().sum::<f64>() / raw.concat().len().max(1) as f64;
    let scores: Vec<Vec<f64>> = raw.iter().map(|s| s.iter().map(|s| (s - mean) / judge.unit).collect()).collect();
    let scripted = Scripted { judge: Bradley { unit: 1.0, ..judge }, seed: common.seed };
    let first_held = items.len() - items.len() / 4;
    let (train, held): (Vec<_>, Vec<_>) = all_pairs(&items).into_iter().partition(|c| c.item < first_held);
    let held = held.into_iter().filter_map(|c| better(c, &scores[c.item])).collect();
    let learner = Settings { lambda: 0.5, ..Settings::default() };
    let options = RewardOptions { features: spec, learner, ..RewardOptions::default() };
    Ok(World { items, scores, scripted, train, held, options, features })
}

type Checks = Vec<(String, bool)>;

fn study(
    common: &Common,
    a: &DemoArgs,
    engine: &Engine,
    task: &Task,
    w: &World,
    say: &dyn Fn(&str) -> Result<()>,
) -> Result<(Value, Checks)> {
    let mut reward = RewardModel::new(engine, w.options.clone())?;
    for item in &w.items {
        reward.observe(&item.features())?;
    }
    let first_held = w.items.len() - w.items.len() / 4;
    let scored: Vec<(usize, Vec<f64>)> = (first_held..w.items.len()).map(|i| (i, w.scores[i].clone())).collect();
    let held = HeldOut::new(&reward, &w.items, &w.held, &scored);
    let [base, oracle] = held.bounds().unwrap_or([0.0; 2]);
    let feature = |c: &Comparison, k: usize| &w.items[c.item].answers[c.answers[k]].feature;
    let label = |k: usize| w.scripted.says(k as u64, w.train[k].answers.map(|i| w.scores[w.train[k].item][i]));

    // One pass beside a full refit, on the same comparisons.
    let chosen: Vec<usize> = order(w.train.len(), common.seed).into_iter().take(2000).collect();
    let signed = |&k: &usize| {
        let c = &w.train[k];
        let z = reward.scale().difference(feature(c, 0), feature(c, 1));
        if label(k) > 0.5 { z } else { z.iter().map(|x| -x).collect() }
    };
    let zs: Vec<Vec<f64>> = chosen.iter().map(signed).collect();
    let names = ["implicit", "explicit", "mle", "sgd"];
    let bar = out::bar(names.len() as u64, "learning");
    let curves = baselines(&reward, &zs, &held, &names, &mut |name, _| {
        bar.set_position(names.iter().position(|n| *n == name).unwrap_or(0) as u64);
    })?;
    bar.finish_and_clear();
    let refs: Vec<&Curve> = curves.iter().collect();
    say(&format!(
        "\n== judge \"{}\", {:?} features: share of held-out comparisons decided rightly\n",
        task.name, task.pool
    ))?;
    say(&report::table(&refs, "comparisons", &|m| Some(m.accuracy)))?;
    say(&format!("mean score of the best of {}: any answer {base:.2}, the judge's own best {oracle:.2}\n", a.answers))?;
    say(&report::table(&refs, "comparisons", &|m| m.best))?;
    report::accuracy_svg(&a.out.join(format!("{}-accuracy.svg", task.name)), task.name, &refs)?;
    let at = |c: &Curve, t: u64| c.marks.iter().find(|m| m.comparisons == t).copied();
    let us = |t| at(&curves[0], t).map_or(f64::NAN, |m| m.update_us);
    say(&format!(
        "an update takes {:.0} us at 10 comparisons, {:.0} at 500; a warm refit {:.0} ms at 500\n",
        us(10),
        us(500),
        at(&curves[2], 500).map_or(f64::NAN, |m| m.weights_ms)
    ))?;

    // Chosen questions.
    let train_zs: Vec<Vec<f64>> =
        w.train.iter().map(|c| reward.scale().difference(feature(c, 0), feature(c, 1))).collect();
    let mut groups = vec![Vec::new(); w.items.len()];
    w.train.iter().enumerate().for_each(|(k, c)| groups[c.item].push(k));
    groups.retain(|g| !g.is_empty());
    let mut asked = Vec::new();
    for name in ["random", "uncertainty", "fisher"] {
        let (Some(ask), learner) = (Ask::named(name), reward.untaught(w.options.learner.clone())?) else {
            continue;
        };
        let run = active(
            learner,
            Questions { zs: &train_zs, groups: &groups, ask, budget: 200, seed: common.seed },
            &mut |k| Ok(label(k)),
            &held,
            &mut |_| {},
        )?;
        asked.push(Curve { name: name.into(), ..run.last });
    }
    let refs: Vec<&Curve> = asked.iter().collect();
    say("what is asked, chosen (uncertainty need not beat chance: it looks for the worst case of all directions)\n")?;
    say(&report::table(&refs, "comparisons", &|m| Some(m.accuracy)))?;

    // Deployment.
    let prompts: Vec<Scored> = (0..first_held)
        .map(|i| Scored { rows: reward.rows(&w.items[i].features()), scores: w.scores[i].clone() })
        .collect();
    let rules = [
        ("optimistic 0.1", Second::Optimistic, 0.1),
        ("optimistic 0.3", Second::Optimistic, 0.3),
        ("forced 0.3", Second::Forced, 0.3),
        ("best & second", Second::Runnerup, 0.0),
        ("best & worst", Second::Worst, 0.0),
        ("random pair", Second::Pair, 0.0),
    ];
    let says = |t: u64, both: [f64; 2]| w.scripted.says((1 << 32) + t, both);
    let deployed = rules
        .iter()
        .map(|(name, second, beta)| {
            let learner = reward.untaught(w.options.learner.clone())?;
            simulate(name, learner, &prompts, (*second, *beta), a.rounds, common.seed, &says)
        })
        .collect::<Result<Vec<Deployed>>>()?;
    say(&format!(
        "deployment, {} rounds, in thirds: mean regret of what was shown / score of the first answer / asked\n",
        a.rounds
    ))?;
    let third = a.rounds.div_ceil(3).max(1);
    let parts = |d: &Deployed| -> Vec<[f64; 3]> {
        (0..a.rounds).step_by(third).map(|at| d.part(at..a.rounds.min(at + third))).collect()
    };
    for d in &deployed {
        let cells: Vec<String> =
            parts(d).iter().map(|[r, f, q]| format!("{r:.2} / {f:.2} / {:>3.0} %", 100.0 * q)).collect();
        say(&format!("{:<15} {}\n", d.name, cells.join("    ")))?;
    }
    let lines: Vec<(String, Vec<(f64, f64)>)> = deployed.iter().map(|d| (d.name.clone(), d.curve())).collect();
    report::lines_svg(
        &a.out.join(format!("{}-regret.svg", task.name)),
        task.name,
        "rounds",
        "cumulative regret",
        &lines,
    )?;

    let ours = |t| at(&curves[0], t);
    let accuracy = |t| ours(t).map_or(0.0, |m| m.accuracy);
    let gap = (accuracy(500) - at(&curves[2], 500).map_or(0.0, |m| m.accuracy)).abs();
    let best = ours(500).and_then(|m| m.best).unwrap_or(base);
    let checks = vec![
        ("accuracy 0.80 after 100 comparisons".into(), accuracy(100) >= 0.80),
        ("accuracy 0.88 after 500".into(), accuracy(500) >= 0.88),
        ("within 0.02 of the refit".into(), gap <= 0.02),
        ("half of the oracle's gain".into(), best - base >= (oracle - base) / 2.0),
    ];
    let json = json!({
        "judge": task.name, "features": w.options.features, "base": report::rounded(base), "oracle": report::rounded(oracle),
        "curves": curves, "asked": asked,
        "deployment": deployed.iter().map(|d| json!({"rule": d.name, "thirds": parts(d)})).collect::<Vec<_>>(),
    });
    Ok((json, checks))
}

/// Learns through a file that is dropped in the middle as a killed process would; whether what comes of it is the same.
fn restart(common: &Common, a: &DemoArgs, engine: &Engine, w: &World) -> Result<(bool, f64)> {
    let path = a.out.join("restart.safetensors");
    let remove = |p: &std::path::Path| std::fs::remove_file(p).is_ok();
    let log = a.out.join("restart.safetensors.log");
    let mut whole = RewardModel::new(engine, w.options.clone())?;
    let chosen: Vec<usize> = order(w.train.len(), common.seed).into_iter().take(150).collect();
    remove(&path);
    remove(&log);
    let mut seconds = Vec::new();
    let mut parts = Some(RewardModel::open(engine, &path, Some(w.options.clone()))?);
    for (t, &k) in chosen.iter().enumerate() {
        let c = &w.train[k];
        let (item, y) = (&w.items[c.item], w.scripted.says(k as u64, c.answers.map(|i| w.scores[c.item][i])));
        let seen = item.features();
        let [first, second] = c.answers.map(|i| &item.answers[i].feature[..]);
        whole.learn(&seen, Some((first, second, y)))?;
        if t == 40 || t == 100 {
            // Nothing is saved here: what was answered is in the log.
            drop(parts.take());
        }
        let mut part = parts.take().map_or_else(|| RewardModel::open(engine, &path, None), Ok)?;
        let start = Instant::now();
        part.learn(&seen, Some((first, second, y)))?;
        seconds.push(start.elapsed().as_secs_f64());
        parts = Some(part);
    }
    let bits = |r: &RewardModel| r.learner().theta().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let same = parts.is_some_and(|p| bits(&p) == bits(&whole));
    remove(&path);
    remove(&log);
    Ok((same, 1e3 * out::median(seconds)))
}

/// The user's turn: some comparisons, then the same prompts with what was learnt.
fn person(common: &Common, a: &DemoArgs, engine: &Engine, w: World, answering: &Answering) -> Result<()> {
    let World { mut items, features, options, .. } = w;
    out::print(&format!(
        "\n== your turn: {} questions; your taste is kept in {}\n",
        a.questions,
        a.out.join("you.safetensors").display()
    ))?;
    let reward = RewardModel::open(engine, &a.out.join("you.safetensors"), Some(options))?;
    let mut aligner = Aligner { reward, features, answering: answering.clone(), beta: 1.0, second: Second::Forced };
    let mut you = Person::keyboard();
    let n = items.len().min(a.questions as usize);
    for (round, item) in items.iter_mut().take(n).enumerate() {
        let shown = aligner.choose(item, round as u64)?;
        let y = match you.prefer(round as u64, item, &shown, None) {
            Err(e) if e.kind() == crate::ErrorKind::Usage => break,
            y => y?,
        };
        aligner.tell(item, &shown, y)?;
    }
    aligner.reward.save()?;
    out::print("\n== before, and the best of 8 new answers by your taste\n")?;
    let best = BestOf { most: 8, ..BestOf::default() };
    let again = Answering { seed: common.seed + 1, ..answering.clone() };
    for (i, item) in items.iter_mut().take(5).enumerate() {
        let before = item.answers[0].text.clone();
        let chosen = best.run(&aligner.reward, &again, &mut aligner.features, item, i as u64)?;
        out::print(&format!(
            "{}\n  before: {}\n  after:  {}\n",
            item.prompt,
            before.trim(),
            item.answers[chosen.answer].text.trim()
        ))?;
    }
    Ok(())
}

/// Examples small enough to check by hand: two steps, an implicit one, and a choice.
fn self_tests() -> Result<Checks> {
    let near = |a: f64, b: f64| (a - b).abs() < 1e-10;
    let step = |rule, lambda: f64| OnePass::new(3, Settings { rule, eta: 1.0, lambda, ..Settings::default() });
    let mut one = step(crate::engine::rlhf::Rule::Explicit, 1.0)?;
    one.update(&[1.0, 0.0, -1.0], 1.0)?;
    one.update(&[0.5, -0.5, 0.0], 0.0)?;
    let theta = [0.127977201969, 0.242959216381, -0.370936418350];
    let explicit = one.theta().iter().zip(theta).all(|(a, b)| near(*a, b));
    let symmetric = {
        let p = one.state()?.inverse;
        (0..3).all(|i| (0..3).all(|j| p[3 * i + j].to_bits() == p[3 * j + i].to_bits()))
    };
    let mut a = step(crate::engine::rlhf::Rule::Implicit, 1.0)?;
    let mut b = step(crate::engine::rlhf::Rule::Implicit, 1.0)?;
    let s = a.update(&[1.0, 0.5, 0.0], 1.0)?;
    b.update(&[-1.0, -0.5, 0.0], 0.0)?;
    let flipped = a.theta().iter().zip(b.theta()).all(|(a, b)| near(*a, *b));
    let between = s.after > s.margin && s.after - s.margin <= s.uncertainty * 0.5;
    Ok(vec![
        ("two explicit steps".into(), explicit),
        ("exact symmetry".into(), symmetric),
        ("a flipped comparison is the same".into(), flipped),
        ("an implicit step does not overshoot".into(), between),
    ])
}
