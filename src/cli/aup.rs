//! `quadriga eval aup`.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::aup_file::{self, Family, Task};
use super::flags::Common;
use super::out;
use crate::engine::{AupCurve, AupSettings};
use crate::error::{Context, Result, ensure};
use crate::files::write_file;
use crate::train::chart::{COLOURS, Chart};

/// Accuracy Under Parallelism of decoders that commit several tokens a pass. Exit status 1 if a curve ends too low to have any.
#[derive(Args)]
pub(super) struct AupArgs {
    /// YAML or JSON (.json) files of operating points, TASK: {METHOD: [[TPF, accuracy in percent], ..]}, perhaps within FAMILY: {..}; files
    /// are put together. A task's `best: ACCURACY` is what its methods are weighed by, else the best accuracy of its points.
    pub files: Vec<PathBuf>,
    #[command(flatten)]
    pub show: ShowArgs,
    #[command(flatten)]
    pub model: super::aup_run::RunArgs,
}

/// How AUP is computed and shown, wherever the points come from.
#[derive(Args)]
pub(super) struct ShowArgs {
    /// A method's mean is its sum over so many tasks; default: as many as its family has. The published leaderboard always divides by 5. A
    /// task that a method lacks counts as 0.
    #[arg(long)]
    pub tasks: Option<usize>,
    /// How fast the weight of an accuracy falls below the best; 0: the plain area.
    #[arg(long, default_value_t = AupSettings::default().alpha, allow_negative_numbers = true)]
    pub alpha: f64,
    /// Points of accuracy that a method may lose from its lowest TPF on.
    #[arg(long, default_value_t = AupSettings::default().offset, allow_negative_numbers = true)]
    pub offset: f64,
    /// Accuracy over TPF as a picture; of several tasks one each, FILE-FAMILY-TASK.svg.
    #[arg(long)]
    pub svg: Option<PathBuf>,
}

pub(super) fn run(common: &Common, args: &AupArgs) -> Result<ExitCode> {
    if let Some(data) = &args.model.data {
        return super::aup_run::run(common, &args.model, &args.show, data);
    }
    ensure!(!args.files.is_empty(), Usage, "FILES of points are required, or tasks to measure a model on: --data");
    report(common, &args.show, &aup_file::read(&args.files)?)
}

/// AUP of every method on every task, its mean, pictures. Status 1 where a curve has no AUP.
///
/// # Errors
/// `Usage` for settings that are impossible; pictures that cannot be written.
pub(super) fn report(common: &Common, args: &ShowArgs, families: &[Family]) -> Result<ExitCode> {
    let settings = AupSettings { alpha: args.alpha, offset: args.offset }.validate().context(|| "flags".into())?;
    let boards: Vec<Board> = families.iter().map(|f| Board::new(f, args.tasks, settings)).collect::<Result<_>>()?;
    if let Some(file) = &args.svg {
        pictures(file, &boards)?;
    }
    let refused = boards.iter().flat_map(|b| &b.tasks).flat_map(|t| &t.cells).flatten().filter(|c| c.aup.is_err());
    let refused = refused.count();
    if common.json {
        let families: Vec<Value> = boards.iter().map(Board::json).collect();
        let (alpha, offset) = (args.alpha, args.offset);
        out::print_json(&json!({"alpha": alpha, "offset": offset, "refused": refused, "families": families}))?;
    } else {
        let tables: Vec<String> = boards.iter().map(Board::text).collect();
        out::print(&tables.join("\n"))?;
    }
    Ok(ExitCode::from(u8::from(refused > 0)))
}

/// A method on a task.
struct Cell {
    curve: AupCurve,
    aup: Result<f64>,
}

/// A task with its cells in the order of the board's methods; `None` where a method lacks it.
struct Line<'a> {
    task: &'a Task,
    cells: Vec<Option<Cell>>,
}

/// A family's methods on its tasks.
struct Board<'a> {
    name: &'a str,
    /// In the order in which they come.
    methods: Vec<&'a str>,
    tasks: Vec<Line<'a>>,
    divisor: usize,
}

impl<'a> Board<'a> {
    fn new(family: &'a Family, divisor: Option<usize>, settings: AupSettings) -> Result<Self> {
        let (n, name) = (family.tasks.len(), &*family.name);
        let divisor = divisor.unwrap_or(n);
        ensure!(divisor >= n, Usage, "--tasks {divisor}: there are {n} tasks{}", within(name));
        let mut methods = Vec::new();
        for m in family.tasks.iter().flat_map(|t| &t.methods) {
            if !methods.contains(&&*m.name) {
                methods.push(&*m.name);
            }
        }
        let line = |task: &'a Task| {
            let best = task.best();
            if best > 0.0 && best <= 1.0 {
                tracing::warn!("{}{}: no accuracy above {best}, are they percent?", task.name, within(name));
            }
            let cell = |method: &&str| {
                let Some(m) = task.methods.iter().find(|m| m.name == *method) else { return Ok(None) };
                let curve = AupCurve::new(&m.points, best, settings).context(|| format!("{}: {method}", task.name))?;
                Ok(Some(Cell { aup: curve.area(), curve }))
            };
            Ok(Line { task, cells: methods.iter().map(cell).collect::<Result<_>>()? })
        };
        let tasks = family.tasks.iter().map(line).collect::<Result<_>>()?;
        Ok(Self { name, methods, tasks, divisor })
    }

    /// The mean of method `i`, none where a task refuses it, and on how many tasks it was measured.
    fn mean(&self, i: usize) -> (Option<f64>, usize) {
        let cells = || self.tasks.iter().filter_map(|t| t.cells[i].as_ref());
        let sum: Option<f64> = cells().map(|c| c.aup.as_ref().ok()).sum();
        (sum.map(|s| s / self.divisor as f64), cells().count())
    }

    fn text(&self) -> String {
        const BEST: &str = "best accuracy";
        let names = self.methods.iter().map(|m| m.chars().count());
        let first = names.max().unwrap_or(0).max(BEST.len());
        let widths: Vec<usize> = self.tasks.iter().map(|t| t.task.name.chars().count().max(7) + 2).collect();
        let mut text = String::new();
        if !self.name.is_empty() {
            let _ = writeln!(text, "{}", self.name);
        }
        let mut row = |name: &str, cells: &mut dyn Iterator<Item = String>, last: &str| {
            let mut line = format!("{name:<first$}");
            cells.zip(&widths).for_each(|(cell, &w)| _ = write!(line, "{cell:>w$}"));
            let _ = write!(line, "{last:>9}");
            let _ = writeln!(text, "{}", line.trim_end());
        };
        row("AUP", &mut self.tasks.iter().map(|t| t.task.name.clone()), "mean");
        let mut notes = String::new();
        for (i, method) in self.methods.iter().enumerate() {
            let (mean, measured) = self.mean(i);
            let mut cells = self.tasks.iter().map(|t| match &t.cells[i] {
                None => "-".into(),
                Some(Cell { aup: Ok(x), .. }) => format!("{x:.2}"),
                Some(Cell { aup: Err(e), .. }) => {
                    let _ = writeln!(notes, "{method} on {}: {e}", t.task.name);
                    "refused".into()
                }
            });
            row(method, &mut cells, &mean.map_or("-".into(), |m| format!("{m:.2}")));
            if measured < self.tasks.len() {
                let _ = writeln!(notes, "{method}: {measured} of {} tasks, the others count as 0", self.tasks.len());
            }
        }
        row(BEST, &mut self.tasks.iter().map(|t| format!("{:.2}", t.task.best())), "");
        if self.divisor > self.tasks.len() {
            let _ = writeln!(notes, "means: sums over {} tasks divided by {}", self.tasks.len(), self.divisor);
        }
        text + &notes
    }

    fn json(&self) -> Value {
        let tasks = self.tasks.iter().map(|t| {
            let named = self.methods.iter().zip(&t.cells);
            let methods = named.filter_map(|(name, cell)| {
                let Cell { curve, aup } = cell.as_ref()?;
                let kept = curve.kept.iter().map(|w| json!([w.point.tpf, w.point.accuracy, w.weight]));
                let dropped = curve.dropped.iter().map(|p| json!([p.tpf, p.accuracy]));
                Some(json!({
                    "method": name, "aup": aup.as_ref().ok(), "refused": aup.as_ref().err().map(ToString::to_string),
                    "points": kept.collect::<Vec<_>>(), "dropped": dropped.collect::<Vec<_>>(),
                }))
            });
            json!({"task": t.task.name, "best": t.task.best(), "methods": methods.collect::<Vec<_>>()})
        });
        let means = self.methods.iter().enumerate().map(|(i, name)| {
            let (mean, measured) = self.mean(i);
            json!({"method": name, "mean": mean, "tasks": measured})
        });
        json!({
            "family": Some(self.name).filter(|n| !n.is_empty()), "divisor": self.divisor, "tasks": tasks.collect::<Vec<_>>(),
            "means": means.collect::<Vec<_>>(),
        })
    }
}

/// ` in FAMILY`, where there is one.
fn within(family: &str) -> String {
    if family.is_empty() { String::new() } else { format!(" in {family}") }
}

fn pictures(file: &Path, boards: &[Board]) -> Result<()> {
    let all: Vec<(&Board, &Line)> = boards.iter().flat_map(|b| b.tasks.iter().map(move |t| (b, t))).collect();
    let mut taken = HashSet::new();
    for (board, line) in &all {
        let title = format!("{}{}", line.task.name, within(board.name));
        let mut chart = Chart::new(&title, "tokens per forward pass", "accuracy, %");
        for (i, (name, cell)) in board.methods.iter().zip(&line.cells).enumerate() {
            let Some(cell) = cell else { continue };
            let points: Vec<(f64, f64)> = cell.curve.kept.iter().map(|w| (w.point.tpf, w.point.accuracy)).collect();
            let colour = COLOURS[i % COLOURS.len()];
            // A line of one point would not be seen.
            match points.len() {
                1 => chart.dots(name, colour, points),
                _ => chart.line(name, colour, 2.0, points),
            }
        }
        let path = if all.len() == 1 { file.into() } else { suffixed(file, board.name, &line.task.name, &mut taken) };
        write_file(&path, |to| to.write_all(chart.svg().as_bytes()))?;
    }
    Ok(())
}

/// FILE-FAMILY-TASK.svg with what may stand in the name of a file; a number behind it where another task has that name.
fn suffixed(file: &Path, family: &str, task: &str, taken: &mut HashSet<String>) -> PathBuf {
    let part = |p: Option<&std::ffi::OsStr>| p.map(|p| p.to_string_lossy().into_owned());
    let (stem, end) = (part(file.file_stem()), part(file.extension()));
    let plain = |p: &&str| p.replace(|c: char| !(c.is_alphanumeric() || "+-_.".contains(c)), "-");
    let suffix = [family, task].iter().filter(|p| !p.is_empty()).map(plain).collect::<Vec<_>>().join("-");
    let base = format!("{}-{suffix}", stem.as_deref().unwrap_or("aup"));
    let numbers = std::iter::once(String::new()).chain((2..).map(|n| format!("-{n}")));
    let names = numbers.map(|n| format!("{base}{n}.{}", end.as_deref().unwrap_or("svg")));
    let name = names.into_iter().find(|n| taken.insert(n.to_lowercase())).unwrap_or(base);
    file.with_file_name(name)
}
