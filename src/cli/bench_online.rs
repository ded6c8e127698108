//! `quadriga bench online`: drafts that learn while they serve, beside one that does not, on a stream whose kind of text changes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::accept::{Prompt, encode, read};
use super::flags::{Common, SamplingArgs};
use super::{generate, out};
use crate::engine::{Draft, DraftKind, Engine, Generate, LearnStats, Learning, Memory, Speculation};
use crate::error::{Error, ErrorKind, Result, bail, ensure};
use crate::files::write_file;
use crate::train::chart::{COLOURS, Chart};

#[derive(Args)]
pub(super) struct BenchOnlineArgs {
    /// The stream: .jsonl or .jsonl.gz files of prompts, as of `eval accept`, one after another. FILE@CATEGORY takes those of a category,
    /// FILE:FROM-TO those numbers of what is left, from 0 on.
    #[arg(required = true)]
    pub stream: Vec<String>,
    /// What is compared, beside offline: rules of --learn; memory (lookup that remembers earlier texts, nothing else learns); memory+RULE.
    #[arg(long, value_delimiter = ',', default_value = "sgd,optimistic,adam,ensemble,memory+adam")]
    pub methods: Vec<String>,
    /// A draft head or small model; default: the head that comes with the model.
    #[arg(long)]
    pub draft: Option<PathBuf>,
    /// Learn only between chunks of so many prompts, from all of their rows in one update, whatever that costs; 0: while serving.
    #[arg(long, default_value_t = 0)]
    pub chunk: usize,
    /// Learning rates, as a factor on those of the rules.
    #[arg(long, default_value_t = 1.0)]
    pub rate: f32,
    /// Prompts as they are, not in the model's chat template.
    #[arg(long)]
    pub raw: bool,
    /// Folder of the results: stream.csv, accept.svg, loss.svg, weights.svg, summary.json, and what was learnt.
    #[arg(long)]
    pub out: PathBuf,
    /// Go on with what is in OUT.
    #[arg(long)]
    pub resume: bool,
    /// Prompts between two states on disk.
    #[arg(long, default_value_t = 50)]
    pub save_every: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// What does not learn.
const OFFLINE: &str = "offline";

/// One prompt with one method.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Row {
    prompt: usize,
    segment: usize,
    category: String,
    method: String,
    tokens: usize,
    /// Behind the prompt, everything counted.
    seconds: f64,
    update_s: f64,
    verifications: u64,
    verified: u64,
    drafted: u64,
    equal: bool,
    /// Until then.
    updates: u64,
    rows: u64,
    loss: f64,
    rollbacks: u64,
    weights: Vec<f64>,
}

#[derive(Serialize, Deserialize)]
struct Done {
    /// Other methods, or a stream that begins with other prompts, cannot go on from here.
    methods: Vec<String>,
    sha256: String,
    prompts: usize,
    rows: Vec<Row>,
}

struct Method {
    name: String,
    draft: Draft,
    how: Generate,
}

impl Method {
    fn open(engine: &Engine, name: &str, args: &BenchOnlineArgs) -> Result<Self> {
        let (memory, rule) = match name.strip_prefix("memory") {
            Some("") => (true, None),
            Some(rest) => match rest.strip_prefix('+') {
                Some(rule) => (true, Some(rule)),
                None => bail!(Usage, "--methods {name}: expected memory, RULE or memory+RULE"),
            },
            None => (false, Some(name).filter(|n| *n != OFFLINE)),
        };
        let kind = args.draft.as_deref().map(DraftKind::at);
        let draft = match rule {
            None => match &kind {
                Some(kind) => Some(engine.draft(kind)),
                None => engine.shipped_draft(),
            },
            Some(rule) => {
                let mut how = Learning::named(rule)?;
                how.optimizer.lr *= args.rate;
                if args.chunk > 0 {
                    // Never due by itself.
                    how = Learning { rows: usize::MAX / 4, spending: None, ..how };
                }
                match &kind {
                    Some(kind) => Some(engine.learning(kind, &how)),
                    None => engine.learning_shipped(&how),
                }
            }
        };
        let Some(draft) = draft.transpose()? else {
            bail!(Usage, "no draft head comes with this model: give one by --draft");
        };
        let draft = match memory {
            true => engine.with_memory(&draft, &Arc::new(Memory::default()))?,
            false => engine.with_lookup(&draft)?,
        };
        let how = generate::how(&args.sampling)?;
        let how = how.speculative(args.sampling.sampler()?, &draft, Speculation::default());
        Ok(Self { name: name.into(), draft, how })
    }

    fn state(&self, out: &Path) -> PathBuf {
        out.join(format!("{}.state", self.name.replace('+', "-")))
    }

    fn run(&self, engine: &Engine, ids: &[u32], room: usize, seed: u64) -> Result<(Vec<u32>, Row)> {
        let mut session = engine.session_for(&self.draft, room, seed)?;
        session.push_ids(ids)?;
        session.prefill()?;
        let start = Instant::now();
        let mut tokens = Vec::new();
        for piece in session.generate(self.how.clone())? {
            tokens.extend(piece?.id);
        }
        let stats = session.stats();
        // What the text taught is heard when it is over.
        drop(session);
        let seconds = start.elapsed().as_secs_f64();
        let learnt = self.draft.learnt().unwrap_or_default();
        let LearnStats { updates, rows, loss, rollbacks, weights, .. } = learnt;
        let row = Row {
            prompt: 0,
            segment: 0,
            category: String::new(),
            method: self.name.clone(),
            tokens: tokens.len().saturating_sub(1),
            seconds,
            update_s: stats.update_s,
            verifications: stats.verifications,
            verified: stats.verified,
            drafted: stats.drafted,
            equal: true,
            updates,
            rows,
            loss,
            rollbacks,
            weights,
        };
        Ok((tokens, row))
    }
}

/// The prompts of one part of the stream: FILE, FILE@CATEGORY, either with :FROM-TO.
fn segment(part: &str) -> Result<Vec<Prompt>> {
    let usage = |what: String| Error::new(ErrorKind::Usage, format!("{part}: {what}"));
    let (rest, range) = match part.rsplit_once(':') {
        Some((rest, range)) if range.contains('-') && !Path::new(part).exists() => (rest, Some(range)),
        _ => (part, None),
    };
    let (file, category) = match rest.rsplit_once('@') {
        Some((file, category)) if !Path::new(rest).exists() => (file, Some(category)),
        _ => (rest, None),
    };
    let mut prompts = read(Path::new(file), 0)?;
    if let Some(category) = category {
        prompts.retain(|p| p.category == category);
    }
    if let Some(range) = range {
        let ends = range.split_once('-').map(|(a, b)| (a.parse::<usize>(), b.parse::<usize>()));
        let Some((Ok(from), Ok(to))) = ends else { return Err(usage(format!("{range} is no FROM-TO"))) };
        ensure!(from < to && to <= prompts.len(), Usage, "{part}: {from} to {to} of {} prompts", prompts.len());
        prompts = prompts[from..to].to_vec();
    }
    ensure!(!prompts.is_empty(), Usage, "{part}: no prompts");
    Ok(prompts)
}

/// SHA-256 of prompts and of the segments that they belong to, in hexadecimal.
fn digest(prompts: &[(usize, &Prompt)]) -> String {
    let mut hash = Sha256::new();
    for (segment, p) in prompts {
        hash.update((*segment as u64).to_le_bytes());
        hash.update((p.text.len() as u64).to_le_bytes());
        hash.update(&p.text);
    }
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

pub(super) fn run(common: &Common, args: &BenchOnlineArgs) -> Result<ExitCode> {
    let stream: Vec<Vec<Prompt>> = args.stream.iter().map(|p| segment(p)).collect::<Result<_>>()?;
    let engine = common.autoregressive()?;
    let names = std::iter::once(OFFLINE).chain(args.methods.iter().map(|m| &**m).filter(|m| *m != OFFLINE));
    let methods: Vec<Method> = names.map(|n| Method::open(&engine, n, args)).collect::<Result<_>>()?;
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(args.out.display(), e))?;
    let at = args.out.join("progress.json");
    let names = methods.iter().map(|m| m.name.clone()).collect();
    let all: Vec<(usize, &Prompt)> =
        stream.iter().enumerate().flat_map(|(s, prompts)| prompts.iter().map(move |p| (s, p))).collect();
    let mut done = Done { methods: names, sha256: digest(&[]), prompts: 0, rows: Vec::new() };
    if at.exists() {
        ensure!(args.resume, Usage, "{}: of an earlier run: --resume goes on with it", at.display());
        let bytes = std::fs::read(&at).map_err(|e| Error::io(at.display(), e))?;
        let damaged = |e| Error::with_source(ErrorKind::Config, at.display().to_string(), e);
        let before: Done = serde_json::from_slice(&bytes).map_err(damaged)?;
        let begins = all.get(..before.prompts).is_some_and(|p| digest(p) == before.sha256);
        let same = begins && before.methods == done.methods;
        ensure!(same, Usage, "{}: of other methods, or of a stream that begins with other prompts", at.display());
        done = before;
        for m in methods.iter().filter(|m| m.draft.learnt().is_some()) {
            m.draft.restore_learnt(&m.state(&args.out))?;
        }
    }
    let (bar, mut asked) = (out::bar(all.len() as u64, "prompts"), 0);
    for (i, (segment, prompt)) in all.iter().enumerate().skip(done.prompts) {
        bar.set_position(i as u64);
        let ids = encode(&engine, args.raw, &prompt.text)?;
        let room = ids.len() + args.sampling.max_tokens;
        if room <= engine.config().context {
            let mut first: Option<Vec<u32>> = None;
            for turn in 0..methods.len() {
                // In another order each time: what slows the machine slows all alike.
                let m = &methods[(turn + asked) % methods.len()];
                let (tokens, row) = m.run(&engine, &ids, room, common.seed)?;
                // All draft by the same costs: how much is drafted should depend on drafts alone.
                if let Some(costs) = methods[0].draft.costs_json().filter(|_| asked == 0) {
                    methods.iter().try_for_each(|m| m.draft.set_costs(&costs))?;
                }
                let equal = first.get_or_insert_with(|| tokens.clone()) == &tokens;
                let category = prompt.category.clone();
                done.rows.push(Row { prompt: i, segment: *segment, category, equal, ..row });
            }
            asked += 1;
        }
        if args.chunk > 0 && (i + 1) % args.chunk == 0 {
            methods.iter().filter(|m| m.draft.learnt().is_some()).try_for_each(|m| m.draft.learn_now())?;
        }
        done.prompts = i + 1;
        if (i + 1) % args.save_every.max(1) == 0 && i + 1 < all.len() {
            done.sha256 = digest(&all[..done.prompts]);
            save(&args.out, &methods, &done)?;
        }
    }
    bar.finish_and_clear();
    done.sha256 = digest(&all);
    save(&args.out, &methods, &done)?;
    report(common, args, &methods, &done.rows)
}

/// States first: those of a run that is killed in between are newer than the rows, and the rows count.
fn save(out: &Path, methods: &[Method], done: &Done) -> Result<()> {
    for m in methods.iter().filter(|m| m.draft.learnt().is_some()) {
        m.draft.save_learnt(&m.state(out))?;
    }
    let mut csv = String::from(
        "prompt,segment,category,method,tokens,seconds,update_s,accept_length,drafted,equal,updates,rows,loss,rollbacks,weights\n",
    );
    for r in &done.rows {
        let length = r.verified as f64 / r.verifications.max(1) as f64;
        let weights: Vec<String> = r.weights.iter().map(|w| format!("{w:.4}")).collect();
        let _ = writeln!(
            csv,
            "{},{},{},{},{},{:.6},{:.6},{length:.4},{},{},{},{},{:.4},{},{}",
            r.prompt,
            r.segment,
            r.category,
            r.method,
            r.tokens,
            r.seconds,
            r.update_s,
            r.drafted,
            r.equal,
            r.updates,
            r.rows,
            r.loss,
            r.rollbacks,
            weights.join(" ")
        );
    }
    write_file(&out.join("stream.csv"), |to| to.write_all(csv.as_bytes()))?;
    write_file(&out.join("progress.json"), |to| Ok(serde_json::to_writer(to, done)?))
}

/// Sums of a method over a segment.
#[derive(Clone, Copy, Default)]
struct Sum {
    tokens: usize,
    seconds: f64,
    update_s: f64,
    verifications: u64,
    verified: u64,
}

impl Sum {
    fn add(&mut self, r: &Row) {
        self.tokens += r.tokens;
        self.seconds += r.seconds;
        self.update_s += r.update_s;
        self.verifications += r.verifications;
        self.verified += r.verified;
    }
    fn length(&self) -> f64 {
        self.verified as f64 / self.verifications.max(1) as f64
    }
    fn speed(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }
}

fn report(common: &Common, args: &BenchOnlineArgs, methods: &[Method], rows: &[Row]) -> Result<ExitCode> {
    let mut sums: BTreeMap<(usize, &str), Sum> = BTreeMap::new();
    let all = args.stream.len();
    for r in rows {
        sums.entry((r.segment, &r.method)).or_default().add(r);
        sums.entry((all, &r.method)).or_default().add(r);
    }
    charts(args, methods, rows)?;
    let unequal = rows.iter().filter(|r| !r.equal).count();
    let mut text = format!(
        "{:<44}{:<18}{:>8}{:>8}{:>9}{:>8}{:>10}\n",
        "segment", "method", "accept", "x", "tok/s", "x", "learning"
    );
    let mut table = Vec::new();
    for segment in 0..=all {
        let name = args.stream.get(segment).map_or("all", |s| s.rsplit('/').next().unwrap_or(s));
        let base = sums.get(&(segment, OFFLINE)).copied().unwrap_or_default();
        for m in methods {
            let Some(s) = sums.get(&(segment, &*m.name)) else { continue };
            let (length, speed) = (s.length() / base.length(), s.speed() / base.speed());
            let share = s.update_s / s.seconds.max(1e-9);
            let _ = writeln!(
                text,
                "{name:<44}{:<18}{:>8.3}{length:>7.3}x{:>9.1}{speed:>7.3}x{:>8.1} %",
                m.name,
                s.length(),
                s.speed(),
                100.0 * share
            );
            table.push(json!({
                "segment": name, "method": m.name, "tokens": s.tokens, "accept_length": out::round(s.length(), 4),
                "accept_ratio": out::round(length, 4), "tokens_per_s": out::round(s.speed(), 2), "speed_ratio": out::round(speed, 4),
                "learning_share": out::round(share, 4),
            }));
        }
    }
    let learnt: Vec<Value> = methods
        .iter()
        .filter_map(|m| {
            m.draft.learnt().map(|l| {
                json!({
                    "method": m.name, "updates": l.updates, "rows": l.rows, "mean_loss": out::round(l.loss / l.rows.max(1) as f64, 4),
                    "rollbacks": l.rollbacks, "refused": l.refused, "seconds": out::round(l.seconds, 3), "weights": l.weights,
                    "gain": out::round(l.gain, 4),
                })
            })
        })
        .collect();
    let prompts = rows.len() / methods.len().max(1);
    let json = json!({
        "model": common.model, "prompts": prompts, "unequal": unequal, "segments": table, "learnt": learnt,
    });
    write_file(&args.out.join("summary.json"), |to| Ok(serde_json::to_writer_pretty(to, &json)?))?;
    if common.json {
        out::print_json(&json)?;
    } else {
        for l in &learnt {
            let _ = writeln!(text, "{l}");
        }
        let _ = writeln!(text, "{prompts} prompts; {unequal} texts differ; results in {}", args.out.display());
        out::print(&text)?;
    }
    Ok(ExitCode::from(u8::from(unequal > 0)))
}

/// Accept lengths and losses over the stream, each method a line, and the weights of experts.
fn charts(args: &BenchOnlineArgs, methods: &[Method], rows: &[Row]) -> Result<()> {
    let mut accept = Chart::new("accept length", "prompt", "tokens a pass (mean of 20 prompts)");
    let mut loss = Chart::new("loss before learning", "rows", "mean, nats");
    let mut weights = Chart::new("weights of the experts", "prompt", "weight");
    for (i, m) in methods.iter().enumerate() {
        let own: Vec<&Row> = rows.iter().filter(|r| r.method == m.name).collect();
        let colour = COLOURS[i % COLOURS.len()];
        let mean = |w: &[&Row]| {
            let mut sum = Sum::default();
            w.iter().for_each(|r| sum.add(r));
            (w[w.len() - 1].prompt as f64, sum.length())
        };
        accept.line(&m.name, colour, 2.0, own.windows(20.min(own.len().max(1))).map(mean).collect());
        let steps = own.windows(2).filter(|w| w[1].rows > w[0].rows);
        let points = steps.map(|w| (w[1].rows as f64, (w[1].loss - w[0].loss) / (w[1].rows - w[0].rows) as f64));
        let points: Vec<(f64, f64)> = points.collect();
        if !points.is_empty() {
            loss.line(&m.name, colour, 1.5, points);
        }
        let n = own.last().map_or(0, |r| r.weights.len());
        for e in 0..if n > 1 { n } else { 0 } {
            let points = own.iter().filter_map(|r| r.weights.get(e).map(|w| (r.prompt as f64, *w))).collect();
            weights.line(&format!("{} {e}", m.name), COLOURS[(i + e) % COLOURS.len()], 2.0, points);
        }
    }
    for (name, chart) in [("accept", accept), ("loss", loss), ("weights", weights)] {
        write_file(&args.out.join(format!("{name}.svg")), |to| to.write_all(chart.svg().as_bytes()))?;
    }
    Ok(())
}
