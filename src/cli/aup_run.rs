//! `quadriga eval aup --data`: a model's own points, over thresholds, on tasks with checkable answers.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, Value, json};

use super::accuracy::essence;
use super::aup::ShowArgs;
use super::diffusion::DiffusionArgs;
use super::flags::Common;
use super::out;
use crate::engine::{AupSettings, Choose, DiffusionSettings, Engine, Measured, Point as AupPoint, Task, aup};
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::files::write_file;
use crate::train::data::for_each_line;

/// Points of a model.
#[derive(Args)]
pub(super) struct RunArgs {
    /// Tasks instead of points: rows with prompt and completion (or question and answer); what stands behind the last ####, or all of it, must be the answer's.
    #[arg(long, conflicts_with = "files")]
    pub data: Option<PathBuf>,
    /// Thresholds to measure at: entropies, or probabilities with --confidence; default: the one that the other flags say.
    #[arg(long, value_delimiter = ',', requires = "data", allow_negative_numbers = true)]
    pub thresholds: Vec<f32>,
    /// Positions of an answer.
    #[arg(long, default_value_t = 256)]
    pub answer_length: usize,
    /// Texts decoded at a time; 1 for honest speeds.
    #[arg(long, default_value_t = 8)]
    pub width: usize,
    /// At most so many tasks; 0: all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// Adds the points to this JSON table of points, which is made if it is not there.
    #[arg(long, requires = "data")]
    pub points: Option<PathBuf>,
    /// The method's name in tables.
    #[arg(long, default_value = "model")]
    pub method: String,
    #[command(flatten)]
    pub diffusion: DiffusionArgs,
}

/// A threshold, where there are several, and what came of it.
type Point = (Option<f32>, Measured);

/// The tasks of a file, encoded as training encodes prompts.
fn tasks(engine: &Engine, path: &Path, limit: usize) -> Result<Vec<Task>> {
    let mut tasks = Vec::new();
    for_each_line(path, |number, text| {
        let place = || format!("{}, line {number}", path.display());
        let row: Value =
            serde_json::from_str(text).map_err(|e| Error::new(ErrorKind::Usage, e.to_string())).context(place)?;
        let field = |names: [&str; 2]| names.iter().find_map(|n| row[n].as_str());
        let (Some(prompt), Some(answer)) = (field(["prompt", "question"]), field(["completion", "answer"])) else {
            bail!(Usage, "{}: a task has prompt and completion, or question and answer", place());
        };
        if limit == 0 || tasks.len() < limit {
            let prompt = engine.tokenizer()?.encode(prompt, true, true)?;
            let category = row["category"].as_str().unwrap_or("").into();
            tasks.push(Task { prompt, answer: answer.into(), category });
        }
        Ok(())
    })?;
    ensure!(!tasks.is_empty(), Usage, "{}: no task", path.display());
    Ok(tasks)
}

fn at(settings: DiffusionSettings, threshold: f32) -> Result<DiffusionSettings> {
    let Choose::Threshold { by, best, every, .. } = settings.choose else {
        bail!(Usage, "--thresholds: with --passes there is no threshold");
    };
    DiffusionSettings { choose: Choose::Threshold { by, at: threshold, best, every }, ..settings }.validate()
}

/// Measures a model, prints its points with their AUP, and adds them to `--points`.
pub(super) fn run(common: &Common, args: &RunArgs, show: &ShowArgs, data: &Path) -> Result<ExitCode> {
    let points = measure(common, args, data)?;
    let settings = AupSettings { alpha: show.alpha, offset: show.offset }.validate().context(|| "flags".into())?;
    let list: Vec<AupPoint> =
        points.iter().map(|(_, m)| AupPoint { tpf: m.tokens_per_forward(), accuracy: m.accuracy() }).collect();
    let best = list.iter().map(|p| p.accuracy).fold(0.0, f64::max);
    let area = aup(&list, best, settings);
    if common.json {
        let rows: Vec<Value> = points.iter().map(|(t, m)| json_of(m, *t)).collect();
        let (value, why) = (area.as_ref().ok(), area.as_ref().err().map(ToString::to_string));
        let model = json!({"model": common.model, "data": data, "method": args.method, "points": rows, "aup": value, "refused": why});
        out::print_json(&model)?;
    } else {
        match &area {
            Ok(a) => out::print(&format!("AUP {a:.1}, weighed by the best of these points ({best:.2} %)\n"))?,
            Err(e) => eprintln!("no AUP: {e}"),
        }
    }
    Ok(ExitCode::from(u8::from(area.is_err())))
}

/// The points of a model.
fn measure(common: &Common, args: &RunArgs, data: &Path) -> Result<Vec<Point>> {
    let engine = common.engine()?;
    let tasks = tasks(&engine, data, args.limit)?;
    let right = |said: &str, answer: &str| essence(said) == essence(answer);
    let mut points: Vec<Point> = Vec::new();
    let rounds = args.thresholds.len().max(1);
    let bar = out::bar((tasks.len() * rounds) as u64, "tasks");
    let mut on = || bar.inc(1);
    if engine.config().diffusion.is_none() {
        ensure!(
            args.thresholds.is_empty(),
            Usage,
            "--thresholds: this model has no mask token, it decodes from left to right"
        );
        points.push((None, engine.measure_autoregressive(&tasks, args.answer_length, &right, &mut on)?));
    } else {
        let settings = args.diffusion.settings(&engine, None, common.seed)?;
        let mut measure = |s| engine.measure_diffusion(&tasks, s, args.answer_length, args.width, &right, &mut on);
        if args.thresholds.is_empty() {
            points.push((None, measure(settings)?));
        }
        for &t in &args.thresholds {
            points.push((Some(t), measure(at(settings, t)?)?));
        }
    }
    bar.finish_and_clear();
    if let Some(file) = &args.points {
        add(file, data, &args.method, &points)?;
    }
    if !common.json {
        for (t, m) in &points {
            let t = t.map_or_else(String::new, |t| format!("threshold {t}: "));
            let line = format!(
                "{t}accuracy {:.2} % ({} of {}), {:.3} tokens a pass; {} tokens, {} passes, {} positions, {} rows of logits; {:.0} tok/s\n",
                m.accuracy(),
                m.right,
                m.tasks,
                m.tokens_per_forward(),
                m.tokens,
                m.passes,
                m.positions,
                m.logits,
                m.tokens_per_second()
            );
            out::print(&line)?;
            for (name, right, all) in by_category(&tasks, m) {
                out::print(&format!("  {name}: {right} of {all}\n"))?;
            }
        }
    }
    Ok(points)
}

fn by_category(tasks: &[Task], m: &Measured) -> Vec<(String, usize, usize)> {
    let mut out: Vec<(String, usize, usize)> = Vec::new();
    for (task, right) in tasks.iter().zip(&m.each).filter(|(t, _)| !t.category.is_empty()) {
        let i = out.iter().position(|o| o.0 == task.category).unwrap_or_else(|| {
            out.push((task.category.clone(), 0, 0));
            out.len() - 1
        });
        out[i].1 += usize::from(*right);
        out[i].2 += 1;
    }
    out
}

/// A point for JSON.
fn json_of(m: &Measured, threshold: Option<f32>) -> Value {
    json!({
        "threshold": threshold, "tasks": m.tasks, "right": m.right, "accuracy": out::round(m.accuracy(), 4),
        "tokens_per_forward": out::round(m.tokens_per_forward(), 4), "tokens": m.tokens, "forwards": m.passes,
        "positions": m.positions, "logit_rows": m.logits, "seconds": out::round(m.seconds, 3),
        "tokens_per_s": out::round(m.tokens_per_second(), 1),
    })
}

/// Adds points to a table of points, under the task that the data's file is named by.
fn add(file: &Path, data: &Path, method: &str, points: &[Point]) -> Result<()> {
    let mut table: Value = match std::fs::read(file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|e| Error::new(ErrorKind::Usage, format!("{}: {e}", file.display())))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Value::Object(Map::new()),
        Err(e) => return Err(Error::io(file.display(), e)),
    };
    let task = data.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let task = task.trim_end_matches(".gz").trim_end_matches(".jsonl").to_owned();
    ensure!(
        table.is_object() && (table[&task].is_null() || table[&task].is_object()),
        Usage,
        "{}: not a table of points",
        file.display()
    );
    let list: Vec<Value> = points.iter().map(|(_, m)| json!([m.tokens_per_forward(), m.accuracy()])).collect();
    match table[&task][method].as_array_mut() {
        Some(old) => old.extend(list),
        None => table[&task][method] = list.into(),
    }
    write_file(file, |to| Ok(serde_json::to_writer_pretty(to, &table)?))
}
