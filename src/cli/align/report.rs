//! Tables and pictures that the stages share.

use std::path::Path;

use serde_json::Value;

use crate::cli::out;
use crate::engine::align::{Curve, Mark};
use crate::engine::rlhf::Progress;
use crate::error::Result;
use crate::files::write_file;
use crate::train::chart::{COLOURS, Chart};

/// Curves of accuracy against comparisons, as a picture whose axis counts in powers of ten.
pub(super) fn accuracy_svg(path: &Path, title: &str, curves: &[&Curve]) -> Result<()> {
    curves_svg(path, title, "share of held-out comparisons decided rightly", curves, &|m| Some(m.accuracy))
}

pub(super) fn curves_svg(
    path: &Path,
    title: &str,
    y: &str,
    curves: &[&Curve],
    of: &dyn Fn(&Mark) -> Option<f64>,
) -> Result<()> {
    let lines = curves.iter().map(|c| {
        let points = c.marks.iter().filter_map(|m| Some(((m.comparisons as f64).log10(), of(m)?)));
        (c.name.clone(), points.collect())
    });
    lines_svg(path, title, "comparisons, powers of ten", y, &Vec::from_iter(lines))
}

pub(super) fn lines_svg(path: &Path, title: &str, x: &str, y: &str, lines: &[(String, Vec<(f64, f64)>)]) -> Result<()> {
    let mut chart = Chart::new(title, x, y);
    for ((name, points), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        chart.line(name, colour, 2.0, points.clone());
    }
    write_file(path, |to| to.write_all(chart.svg().as_bytes()))
}

/// Accuracy, or best score, of several curves, a line a mark.
pub(super) fn table(curves: &[&Curve], what: &str, of: &dyn Fn(&Mark) -> Option<f64>) -> String {
    let mut text = format!("{what:<12}");
    curves.iter().for_each(|c| text += &format!(" {:>13}", c.name));
    text.push('\n');
    let Some(longest) = curves.iter().max_by_key(|c| c.marks.len()) else { return text };
    for m in &longest.marks {
        text += &format!("{:<12}", m.comparisons);
        for c in curves {
            let same = c.marks.iter().find(|x| x.comparisons == m.comparisons);
            text += &same.and_then(of).map_or_else(|| format!(" {:>13}", "-"), |v| format!(" {v:>13.3}"));
        }
        text.push('\n');
    }
    text
}

/// Predicted against true shares, in five bins.
pub(super) fn calibration(progress: &Progress) -> String {
    let bins = progress.bins();
    let cell = |b: &crate::engine::rlhf::Bin| match b.count {
        0 => "-".into(),
        n => format!("{:.2}>{:.2} ({n})", b.predicted / n as f64, b.observed / n as f64),
    };
    bins.iter().map(cell).collect::<Vec<String>>().join("  ")
}

/// The report, for programs.
pub(super) fn write(path: &Path, report: &Value) -> Result<()> {
    write_file(path, |to| Ok(serde_json::to_writer_pretty(to, report)?))
}

pub(super) fn rounded(x: f64) -> f64 {
    out::round(x, 4)
}
