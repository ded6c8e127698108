//! `quadriga align deploy`.

use std::io::{BufRead, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{AnswerArgs, RewardArgs, features, folder, judge, report, second};
use crate::cli::drafting::DraftArgs;
use crate::cli::flags::{Common, DecoderFlag};
use crate::cli::out;
use crate::engine::align::{Aligner, Deployment, Item, Prefer, RewardModel, RoundRow, Scripted, order, read_prompts};
use crate::engine::rlhf::{Shown, slope_loglog};
use crate::error::{Error, ErrorKind, Result, bail, ensure};

/// Learn a taste while answering: of several answers the best is shown and, only where it may be worth asking, a second one. State:
/// OUT/reward.safetensors; rounds: OUT/rounds.jsonl. A run that was ended goes on where it was.
#[derive(Args)]
pub(in crate::cli) struct DeployArgs {
    /// Prompts: .jsonl or .jsonl.gz with prompt, question or turns.
    #[arg(long)]
    pub prompts: PathBuf,
    /// At most so many prompts; 0: all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// Who prefers: you (at the keyboard), a file of answers (file:PATH, a line 1, 2 or = each), or a rule: shorter, longer, fewer-commas,
    /// first-person, plain-words, sentiment, full-stop, list, correct, mix:A:B:WEIGHT.
    #[arg(long, default_value = "you")]
    pub judge: String,
    /// How sure a rule is: log-odds for a typical difference.
    #[arg(long, default_value_t = 2.0)]
    pub strength: f64,
    /// Rounds in all; prompts come round again. 0: one for each prompt.
    #[arg(long, default_value_t = 0)]
    pub rounds: u64,
    /// How many standard deviations of its reward a second answer may be worth asking for. About 0.3 asks in a third of the rounds.
    #[arg(long, default_value_t = 0.3)]
    pub beta: f64,
    /// The second answer: optimistic (may be none), forced (never none: for comparison), runner-up, worst, random,
    /// pair (both at random), rank:K, quantile:Q.
    #[arg(long, default_value = "optimistic")]
    pub second: String,
    /// Folder of the results.
    #[arg(long)]
    pub out: PathBuf,
    /// Begin with a copy of this reward.
    #[arg(long)]
    pub reward: Option<PathBuf>,
    #[command(flatten)]
    pub answer: AnswerArgs,
    #[command(flatten)]
    pub options: RewardArgs,
    /// What drafts the answers: auto (the head that was made for the model), lookup, the file or folder of a draft model or head, or
    /// lookup and one of these (lookup+PATH). The answers are the same.
    #[arg(long)]
    pub draft: Option<String>,
    /// The draft learns from the answers, by a rule: see `generate --learn`.
    #[arg(long, value_name = "RULE", num_args = 0..=1, require_equals = true, default_missing_value = "auto", requires = "draft")]
    pub learn: Option<String>,
}

impl DeployArgs {
    fn draft(&self) -> Option<DraftArgs> {
        let draft = self.draft.clone()?;
        Some(DraftArgs { decoder: Some(DecoderFlag::Spec), draft, learn: self.learn.clone(), ..DraftArgs::default() })
    }
}

pub(super) fn run(common: &Common, a: &DeployArgs) -> Result<()> {
    ensure!(a.beta.is_finite() && a.beta >= 0.0, Usage, "--beta {} is impossible: expected 0 or more", a.beta);
    let second = second(&a.second)?;
    folder(&a.out)?;
    let engine = common.autoregressive()?;
    let form = a.answer.form(&engine)?;
    let prompts = read_prompts(&a.prompts, &form, a.limit)?;
    let mut judge: Box<dyn Prefer> = match (&*a.judge, a.judge.strip_prefix("file:")) {
        ("you", _) => Box::new(Person::keyboard()),
        (_, Some(path)) => Box::new(Person::file(path.into())?),
        (name, None) => Box::new(Scripted { judge: judge(name, a.strength)?, seed: common.seed }),
    };
    let path = a.out.join("reward.safetensors");
    if let Some(from) = a.reward.as_ref().filter(|_| !path.exists()) {
        RewardModel::read(&engine, from)?.snapshot(&path)?;
    }
    let options = if a.reward.is_some() { None } else { Some(a.options.options()) };
    let reward = RewardModel::open(&engine, &path, options)?;
    let features = features(&engine, reward.options().features, &a.out, None)?;
    let drafting = a.draft();
    let (answering, _) = a.answer.answering(&engine, drafting.as_ref(), common.seed)?;
    let mut aligner = Aligner { reward, features, answering, beta: a.beta, second };
    let mut run = Deployment::open(&a.out.join("rounds.jsonl"), &mut aligner, &|text| form.prompt(text))?;
    let done = run.rows.len() as u64;
    judge.skip(run.rows.iter().filter(|r| r.second.is_some()).count())?;
    if done > 0 {
        eprintln!("[{done} rounds are there]");
    }
    let rounds = if a.rounds > 0 { a.rounds } else { prompts.len() as u64 };
    let order = order(prompts.len(), common.seed);
    let bar = if a.judge == "you" { indicatif::ProgressBar::hidden() } else { out::bar(rounds, "rounds") };
    for round in done..rounds {
        let mut item: Item = prompts[order[(round % prompts.len() as u64) as usize]].clone();
        let row = match run.round(&mut aligner, &mut item, &mut *judge) {
            Err(e) if e.kind() == ErrorKind::Usage && e.to_string() == END => break,
            row => row?,
        };
        if a.judge == "you" {
            eprintln!("{}", said(row));
        }
        bar.set_position(round + 1);
    }
    bar.finish_and_clear();
    aligner.reward.save()?;
    let json = summary(&run.rows, &aligner);
    draw(&a.out.join("regret.svg"), &run.rows)?;
    report::write(&a.out.join("report.json"), &json)?;
    if common.json {
        return out::print_json(&json);
    }
    out::print(&text(&json))?;
    eprintln!("[{} comparisons in {} on {}]", aligner.reward.comparisons(), path.display(), engine.device());
    Ok(())
}

/// The end of what a person, or a file, has to say.
const END: &str = "no more answers";

/// A person at the keyboard, or what one has written down.
pub(in crate::cli) struct Person {
    lines: Box<dyn Iterator<Item = std::io::Result<String>>>,
    /// The file, and lines read.
    from: Option<PathBuf>,
    read: usize,
}

impl Person {
    pub fn keyboard() -> Self {
        Self { lines: Box::new(std::io::stdin().lines()), from: None, read: 0 }
    }

    fn file(path: PathBuf) -> Result<Self> {
        let file = std::fs::File::open(&path).map_err(|e| Error::io(path.display(), e))?;
        Ok(Self { lines: Box::new(std::io::BufReader::new(file).lines()), from: Some(path), read: 0 })
    }

    fn place(&self) -> String {
        self.from.as_ref().map_or("stdin".into(), |p| p.display().to_string())
    }

    /// The next line, if there is one.
    pub fn line(&mut self) -> Result<Option<String>> {
        self.read += 1;
        self.lines.next().transpose().map_err(|e| Error::io(self.place(), e))
    }

    /// 1, 0, 1/2 or nothing.
    pub fn answer(&mut self) -> Result<Option<f64>> {
        loop {
            if self.from.is_none() {
                eprint!("which one? 1, 2, = (the same), or nothing to say: ");
                let _ = std::io::stderr().flush();
            }
            let Some(line) = self.line()? else { bail!(Usage, "{END}") };
            match line.trim() {
                "1" => return Ok(Some(1.0)),
                "2" => return Ok(Some(0.0)),
                "=" => return Ok(Some(0.5)),
                "" => return Ok(None),
                "q" => bail!(Usage, "{END}"),
                other => {
                    let text = format!("{other:?} is no answer: 1, 2, = or nothing (q ends)");
                    ensure!(self.from.is_none(), Usage, "{}, line {}: {text}", self.place(), self.read);
                    eprintln!("{text}");
                }
            }
        }
    }
}

impl Prefer for Person {
    fn skip(&mut self, asked: usize) -> Result<()> {
        if self.from.is_some() {
            (0..asked).try_for_each(|_| self.line().map(|_| ()))?;
        }
        Ok(())
    }

    fn scores(&mut self, _: &Item) -> Result<Option<Vec<f64>>> {
        Ok(None)
    }

    fn prefer(&mut self, round: u64, item: &Item, shown: &Shown, _: Option<&[f64]>) -> Result<Option<f64>> {
        let text = |i: usize| item.answers[i].text.trim();
        if self.from.is_none() {
            out::print(&format!("\n--- {}: {}\n", round + 1, item.prompt))?;
            match shown.second {
                None => out::print(&format!("{}\n", text(shown.first)))?,
                Some(s) => out::print(&format!("1: {}\n2: {}\n", text(shown.first), text(s)))?,
            }
        }
        match shown.second {
            None => Ok(None),
            Some(_) => self.answer(),
        }
    }
}

/// What a round did, for the person who answered.
fn said(row: &RoundRow) -> String {
    let [generate, learn] = row.seconds;
    let learnt = match (row.probability, row.preference) {
        (Some(p), Some(y)) => {
            format!("expected 1 with {:.0} %, it was {}; learnt in {:.1} ms", 100.0 * p, y, 1e3 * learn)
        }
        _ => "nothing asked".into(),
    };
    format!("[{} answers in {generate:.1} s; {learnt}]", row.answers.len())
}

/// Cumulative regret, where a judge scores.
fn regret(rows: &[RoundRow]) -> Vec<(f64, f64)> {
    let mut sum = 0.0;
    let each = rows.iter().map_while(RoundRow::regret).enumerate();
    each.map(|(t, r)| {
        sum += r;
        ((t + 1) as f64, sum)
    })
    .collect()
}

fn draw(path: &std::path::Path, rows: &[RoundRow]) -> Result<()> {
    let (mut asked, mut right, mut predicted) = (0.0, 0.0, 0.0);
    let mut shares = Vec::new();
    let mut hits = Vec::new();
    for (t, row) in rows.iter().enumerate() {
        asked += f64::from(u8::from(row.second.is_some()));
        shares.push(((t + 1) as f64, asked / (t + 1) as f64));
        if let (Some(p), Some(y)) = (row.probability, row.preference.filter(|y| *y != 0.5)) {
            predicted += 1.0;
            right += f64::from(u8::from((p > 0.5) == (y > 0.5)));
            hits.push(((t + 1) as f64, right / predicted));
        }
    }
    let regret = regret(rows);
    let mean = regret.iter().map(|&(t, r)| (t, r / t)).collect();
    let mut lines = vec![("asked, share of rounds".into(), shares), ("predicted rightly, share".into(), hits)];
    if !regret.is_empty() {
        lines.push(("mean regret".into(), mean));
    }
    report::lines_svg(path, "deployment", "rounds", "", &lines)
}

fn summary(rows: &[RoundRow], aligner: &Aligner) -> serde_json::Value {
    let n = rows.len();
    let part = |r: std::ops::Range<usize>| {
        let rows = &rows[r.clone()];
        let asked = rows.iter().filter(|r| r.second.is_some()).count();
        let regrets: Vec<f64> = rows.iter().filter_map(RoundRow::regret).collect();
        let mean = |v: &[f64]| (!v.is_empty()).then(|| report::rounded(v.iter().sum::<f64>() / v.len() as f64));
        let first: Vec<f64> = rows.iter().filter_map(|r| r.answers[r.first].score).collect();
        json!({"rounds": [r.start, r.end], "asked": asked, "regret": mean(&regrets), "first_score": mean(&first)})
    };
    let third = n.div_ceil(3).max(1);
    let thirds: Vec<_> = (0..n).step_by(third).map(|at| part(at..n.min(at + third))).collect();
    let curve = regret(rows);
    let late: Vec<(f64, f64)> = curve.iter().copied().filter(|p| p.0 >= n as f64 / 20.0).collect();
    let median = |k: usize| out::median(rows.iter().map(|r| r.seconds[k]).collect());
    let learns: Vec<f64> =
        rows.iter().filter(|r| r.preference.is_some() && r.seconds[1] > 0.0).map(|r| r.seconds[1]).collect();
    json!({
        "rounds": n, "comparisons": aligner.reward.comparisons(),
        "asked": rows.iter().filter(|r| r.second.is_some()).count(), "thirds": thirds,
        "regret": curve.last().map(|p| report::rounded(p.1)),
        "regret_slope": (late.len() > 10).then(|| report::rounded(slope_loglog(&late))),
        "progressive": aligner.reward.progress(), "answer_s": report::rounded(median(0)),
        "learn_ms": report::rounded(1e3 * out::median(learns)),
        "tokens_per_forward": report::rounded(out::median(rows.iter().map(|r| r.tokens_per_forward).collect())),
        "state_bytes": aligner.reward.learner().bytes(),
    })
}

fn text(json: &serde_json::Value) -> String {
    let mut text = String::from("rounds      asked  mean regret  score of the first answer\n");
    for t in json["thirds"].as_array().into_iter().flatten() {
        let (from, to) = (t["rounds"][0].as_u64().unwrap_or(0), t["rounds"][1].as_u64().unwrap_or(0));
        let share = 100.0 * t["asked"].as_f64().unwrap_or(0.0) / (to - from).max(1) as f64;
        let cell = |v: &serde_json::Value| v.as_f64().map_or_else(|| "-".into(), |v| format!("{v:.3}"));
        text += &format!(
            "{:>4}-{:<5} {share:>5.0} %  {:>11}  {:>12}\n",
            from + 1,
            to,
            cell(&t["regret"]),
            cell(&t["first_score"])
        );
    }
    if let Some(slope) = json["regret_slope"].as_f64() {
        text +=
            &format!("cumulative regret {:.1}, growing like t^{slope:.2}\n", json["regret"].as_f64().unwrap_or(0.0));
    }
    text
}
