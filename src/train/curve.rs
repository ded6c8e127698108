//! The course of a training run as CSV and as a picture.

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::chart::Chart;
use crate::error::Result;
use crate::files::write_file;

/// One training step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens seen until then.
    pub tokens: f64,
    /// Mean loss of the step, nats: per label, or per pair of answers.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
}

/// What a run recorded, in the order of steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// One for each step.
    pub points: Vec<Point>,
    /// Step and loss on held-out data, where it was measured.
    pub held_out: Vec<(u64, f64)>,
}

impl Curve {
    /// Writes `step,tokens,loss,lr,held_out`, a line for each step, the last field empty where nothing was measured.
    pub fn write_csv(&self, path: &Path) -> Result<()> {
        write_file(path, |out| out.write_all(self.csv().as_bytes()))
    }

    /// Writes a picture: the loss of every step as a thin line, their mean around it as a thick one, held-out losses as dots.
    pub fn write_svg(&self, path: &Path, title: &str) -> Result<()> {
        write_file(path, |out| out.write_all(self.svg(title).as_bytes()))
    }

    fn csv(&self) -> String {
        let mut text = String::from("step,tokens,loss,lr,held_out\n");
        let mut rows: Vec<(u64, Option<&Point>, Option<f64>)> =
            self.points.iter().map(|p| (p.step, Some(p), None)).collect();
        for &(step, loss) in &self.held_out {
            // A measurement before the first step has a line of its own.
            match rows.binary_search_by_key(&step, |r| r.0) {
                Ok(i) => rows[i].2 = Some(loss),
                Err(i) => rows.insert(i, (step, None, Some(loss))),
            }
        }
        for (step, point, held_out) in rows {
            let fields = point.map_or(",,".into(), |p| format!("{},{},{}", p.tokens, p.loss, p.lr));
            let held_out = held_out.map_or(String::new(), |x| x.to_string());
            let _ = writeln!(text, "{step},{fields},{held_out}");
        }
        text
    }

    /// At each step the mean over all, of which those `span` steps before or behind weigh 1/e of the step itself.
    fn smooth(&self, span: f64) -> Vec<(f64, f64)> {
        let points: Vec<&Point> = self.points.iter().filter(|p| p.loss.is_finite()).collect();
        let keep = (-1.0 / span).exp();
        let mut means = vec![(0.0, 0.0); points.len()];
        // Forth, then back without the step itself.
        let (mut sum, mut weight) = (0.0, 0.0);
        for (m, p) in means.iter_mut().zip(&points) {
            (sum, weight) = (sum * keep + p.loss, weight * keep + 1.0);
            *m = (sum, weight);
        }
        (sum, weight) = (0.0, 0.0);
        for (m, p) in means.iter_mut().zip(&points).rev() {
            *m = (m.0 + sum, m.1 + weight);
            (sum, weight) = ((sum + p.loss) * keep, (weight + 1.0) * keep);
        }
        points.iter().zip(means).map(|(p, (sum, weight))| (p.step as f64, sum / weight)).collect()
    }

    fn svg(&self, title: &str) -> String {
        let raw: Vec<(f64, f64)> =
            self.points.iter().map(|p| (p.step as f64, p.loss)).filter(|p| p.1.is_finite()).collect();
        let smooth = self.smooth((raw.len() as f64 / 40.0).max(1.0));
        let dots: Vec<(f64, f64)> =
            self.held_out.iter().map(|&(s, l)| (s as f64, l)).filter(|p| p.1.is_finite()).collect();
        let mut chart = Chart::new(title, "step", "loss, nats");
        if !raw.is_empty() {
            chart.line("each step", "#9bb8d9", 1.0, raw);
            chart.line("smoothed", "#1f4e8c", 2.5, smooth);
        }
        if !dots.is_empty() {
            chart.dots("held out", "#c4421a", dots);
        }
        chart.svg()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::chart::{BOTTOM, LEFT, RIGHT, TOP};

    fn sample() -> Curve {
        let loss = |s: f64| 3.2 * (-s / 120.0).exp() + 1.1 + 0.25 * (s * 1.7).sin();
        let point = |s: u64| Point { step: s, tokens: s as f64 * 512.0, loss: loss(s as f64), lr: 1e-4 };
        Curve { points: (1..=400).map(point).collect(), held_out: vec![(0, 4.4), (200, 1.9), (400, 1.4)] }
    }

    #[test]
    fn csv_has_a_line_for_each_step() {
        let point = |step, loss| Point { step, tokens: 8.0 * step as f64, loss, lr: 0.5 };
        let c = Curve { points: vec![point(1, 2.0), point(2, 1.5)], held_out: vec![(0, 3.0), (2, 1.25)] };
        assert_eq!(c.csv(), "step,tokens,loss,lr,held_out\n0,,,,3\n1,8,2,0.5,\n2,16,1.5,0.5,1.25\n");
        let dir = tempfile::tempdir().unwrap();
        c.write_csv(&dir.path().join("loss.csv")).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("loss.csv")).unwrap(), c.csv());
    }

    #[test]
    fn the_mean_follows_a_line_and_keeps_a_constant() {
        let mut c = sample();
        c.points.iter_mut().for_each(|p| p.loss = p.step as f64 / 100.0);
        // Weights fall alike to both sides: no lag.
        let middle = c.smooth(10.0)[199];
        assert!((middle.1 - 2.0).abs() < 1e-6, "{middle:?}");
        c.points.iter_mut().for_each(|p| p.loss = 2.5);
        assert!(c.smooth(10.0).iter().all(|p| (p.1 - 2.5).abs() < 1e-12));
        c.points[5].loss = f64::NAN;
        assert_eq!(c.smooth(10.0).len(), 399);
    }

    #[test]
    fn every_point_of_the_picture_lies_in_the_plot() {
        let one = Curve { points: vec![sample().points[0]], held_out: vec![] };
        for c in [sample(), one, Curve::default(), Curve { points: vec![], ..sample() }] {
            let svg = c.svg("a < b & c");
            assert!(svg.contains("a &lt; b &amp; c") && !svg.contains("NaN") && !svg.contains("inf"));
            let lists = svg.split("points=\"").skip(1).map(|t| t.split('"').next().unwrap());
            for p in lists.flat_map(|l| l.split(' ')) {
                let (x, y) = p.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((LEFT..=RIGHT).contains(&x) && (TOP..=BOTTOM).contains(&y), "{p}");
            }
            assert_eq!(svg.matches("<circle").count(), c.held_out.len());
        }
        let dir = tempfile::tempdir().unwrap();
        sample().write_svg(&dir.path().join("loss.svg"), "loss").unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("loss.svg")).unwrap(), sample().svg("loss"));
    }
}
