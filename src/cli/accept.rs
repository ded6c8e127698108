//! `quadriga eval accept`: what a draft gains on a file of prompts, by category.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use serde_json::{Value, json};

use super::flags::{AcceptArgs, Common};
use super::{drafting, generate, out};
use crate::decode::DecodeStats;
use crate::engine::{Draft, Engine, Generate, Message};
use crate::error::{Error, ErrorKind, Result, ensure};
use crate::train::data::for_each_line;

#[derive(Clone)]
pub(super) struct Prompt {
    pub text: String,
    pub category: String,
}

/// Sums over the prompts of a category.
#[derive(Default)]
struct Sums {
    prompts: usize,
    equal: usize,
    plain: Timed,
    spec: Timed,
    stats: DecodeStats,
    looping: usize,
}

#[derive(Default)]
struct Timed {
    tokens: usize,
    seconds: f64,
}

impl Timed {
    fn speed(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }
}

pub(super) fn read(path: &Path, limit: usize) -> Result<Vec<Prompt>> {
    let stem = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().split('.').next().unwrap_or_default();
    let mut prompts = Vec::new();
    for_each_line(path, |number, line| {
        let usage = |what: String| Error::new(ErrorKind::Usage, what).at(format!("{}, line {number}", path.display()));
        let row: Value = serde_json::from_str(line).map_err(|e| usage(e.to_string()))?;
        let text = row["prompt"].as_str().or_else(|| row["question"].as_str()).or_else(|| row["turns"][0].as_str());
        let text = text.ok_or_else(|| usage("no prompt, question or turns".into()))?;
        let category = row["category"].as_str().or_else(|| row["kind"].as_str()).unwrap_or(stem);
        prompts.push(Prompt { text: text.into(), category: category.into() });
        Ok(())
    })?;
    ensure!(!prompts.is_empty(), Usage, "{}: no prompts", path.display());
    if limit > 0 && limit < prompts.len() {
        // Of all parts of the file.
        let (n, all) = (prompts.len(), prompts);
        let keep = |i: usize| (i * limit) / n != ((i + 1) * limit) / n;
        return Ok(all.into_iter().enumerate().filter(|(i, _)| keep(*i)).map(|(_, p)| p).collect());
    }
    Ok(prompts)
}

/// The continuation's tokens, how long it took behind the prompt, and what the decoder counted.
fn decode(
    engine: &Engine,
    draft: Option<&Draft>,
    ids: &[u32],
    how: &Generate,
    room: usize,
    seed: u64,
) -> Result<(Vec<u32>, f64, DecodeStats)> {
    let mut session = drafting::session(engine, draft, room, seed)?;
    session.push_ids(ids)?;
    session.prefill()?;
    let mut running = session.generate(how.clone())?;
    let start = Instant::now();
    let mut tokens = Vec::new();
    for piece in &mut running {
        tokens.extend(piece?.id);
    }
    Ok((tokens, start.elapsed().as_secs_f64(), session.stats()))
}

pub(super) fn run(common: &Common, args: &AcceptArgs) -> Result<ExitCode> {
    let mut prompts = Vec::new();
    for file in &args.files {
        prompts.extend(read(file, args.limit)?);
    }
    let engine = common.autoregressive()?;
    let draft = args.draft.open(&engine)?;
    ensure!(draft.is_some(), Usage, "nothing drafts: give --decoder spec with --draft lookup, a model or a head");
    let sampler = args.sampling.sampler()?;
    let plain = generate::how(&args.sampling)?;
    let how = args.draft.apply(plain.clone(), sampler, draft.as_ref());
    let costs = draft.as_ref().map(|d| drafting::Costs::restore(common, &engine, d)).transpose()?;
    let mut sums: BTreeMap<&str, Sums> = BTreeMap::new();
    let mut outputs = Vec::new();
    let (bar, mut skipped) = (out::bar(prompts.len() as u64, "prompts"), 0);
    for p in &prompts {
        bar.inc(1);
        let ids = encode(&engine, args.raw, &p.text)?;
        let room = ids.len() + args.sampling.max_tokens;
        if room > engine.config().context {
            skipped += 1;
            continue;
        }
        let s = sums.entry(&p.category).or_default();
        let spec = decode(&engine, draft.as_ref(), &ids, &how, room, common.seed)?;
        let alone = decode(&engine, None, &ids, &plain, room, common.seed)?;
        s.prompts += 1;
        s.equal += usize::from(spec.0 == alone.0);
        s.looping += usize::from(loops(&alone.0));
        for (sum, (tokens, seconds, _)) in [(&mut s.spec, &spec), (&mut s.plain, &alone)] {
            // The first token falls out of the prompt.
            sum.tokens += tokens.len().saturating_sub(1);
            sum.seconds += seconds;
        }
        add(&mut s.stats, &spec.2);
        if args.rows {
            outputs.push(json!({"category": p.category, "ids": spec.0, "equal": spec.0 == alone.0}));
        }
    }
    bar.finish_and_clear();
    args.draft.keep(draft.as_ref())?;
    costs.iter().zip(&draft).for_each(|(c, d)| c.keep(d));
    let name = draft.as_ref().map_or("", |d| d.name());
    report(common, name, &sums, skipped, outputs)
}

/// Whether the second half of a text repeats a piece of up to 32 tokens over and over: what makes any lookup look perfect.
fn loops(ids: &[u32]) -> bool {
    let tail = &ids[ids.len() / 2..];
    tail.len() >= 32 && (1..=32.min(tail.len() / 2)).any(|n| tail.windows(n + 1).all(|w| w[0] == w[n]))
}

pub(super) fn add(to: &mut DecodeStats, s: &DecodeStats) {
    to.forwards += s.forwards;
    to.tokens += s.tokens;
    to.verifications += s.verifications;
    to.verified += s.verified;
    to.drafted += s.drafted;
    to.draft_s += s.draft_s;
    to.verify_s += s.verify_s;
    to.commit_s += s.commit_s;
    to.update_s += s.update_s;
}

pub(super) fn encode(engine: &Engine, raw: bool, text: &str) -> Result<Vec<u32>> {
    match engine.chat_template()?.filter(|_| !raw) {
        Some(t) => engine.tokenizer()?.encode(&t.render(&[Message::new("user", text)], true)?, false, true),
        None => engine.tokenizer()?.encode(text, true, true),
    }
}

fn report(
    common: &Common,
    draft: &str,
    sums: &BTreeMap<&str, Sums>,
    skipped: usize,
    outputs: Vec<Value>,
) -> Result<ExitCode> {
    let ratio = |s: &Sums| s.spec.speed() / s.plain.speed();
    let mean = |f: &dyn Fn(&Sums) -> f64| sums.values().map(f).sum::<f64>() / sums.len().max(1) as f64;
    let (speedup, length) = (mean(&ratio), mean(&|s| s.stats.accept_length()));
    let (equal, all) = sums.values().fold((0, 0), |(e, n), s| (e + s.equal, n + s.prompts));
    if common.json {
        let rows: Vec<Value> = sums
            .iter()
            .map(|(category, s)| {
                let time = s.spec.seconds.max(1e-9);
                json!({
                    "category": category, "prompts": s.prompts, "equal": s.equal, "looping": s.looping,
                    "tokens": s.spec.tokens, "accept_length": out::round(s.stats.accept_length(), 4),
                    "drafted_per_pass": out::round(s.stats.drafted as f64 / s.stats.verifications.max(1) as f64, 3),
                    "tokens_per_s": out::round(s.spec.speed(), 1), "plain_tokens_per_s": out::round(s.plain.speed(), 1),
                    "speedup": out::round(ratio(s), 4), "draft_share": out::round(s.stats.draft_s / time, 4),
                    "verify_share": out::round(s.stats.verify_s / time, 4),
                    "commit_share": out::round(s.stats.commit_s / time, 4),
                })
            })
            .collect();
        out::print_json(&json!({
            "model": common.model, "draft": draft, "categories": rows, "mean_speedup": out::round(speedup, 4),
            "mean_accept_length": out::round(length, 4), "equal": equal, "prompts": all, "skipped": skipped,
            "rows": outputs,
        }))?;
    } else {
        let mut text = format!(
            "{:<18}{:>8}{:>9}{:>9}{:>10}{:>10}{:>9}  time in draft, verify, commit\n",
            "category", "prompts", "accept", "drafted", "plain t/s", "spec t/s", "speed-up"
        );
        for (category, s) in sums {
            let time = s.spec.seconds.max(1e-9) / 100.0;
            text += &format!(
                "{category:<18}{:>8}{:>9.2}{:>9.2}{:>10.1}{:>10.1}{:>8.2}x  {:.0} {:.0} {:.0} %\n",
                s.prompts,
                s.stats.accept_length(),
                s.stats.drafted as f64 / s.stats.verifications.max(1) as f64,
                s.plain.speed(),
                s.spec.speed(),
                ratio(s),
                s.stats.draft_s / time,
                s.stats.verify_s / time,
                s.stats.commit_s / time,
            );
        }
        text += &format!(
            "mean over categories: accept length {length:.2}, speed-up {speedup:.2}x; {equal} of {all} texts equal to plain decoding\n"
        );
        out::print(&text)?;
        if skipped > 0 {
            eprintln!("[{skipped} prompts were too long for the model's context]");
        }
    }
    Ok(if equal == all { ExitCode::SUCCESS } else { ExitCode::from(1) })
}
