//! The course of a training run as CSV and as a picture.

use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::files::write_file;

/// One training step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens seen until then.
    pub tokens: f64,
    /// Mean loss of the step, nats per label.
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

/// Size of the picture and edges of the plot in it, pixels.
const SIZE: (f64, f64) = (800.0, 450.0);
const LEFT: f64 = 70.0;
const RIGHT: f64 = 780.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 396.0;

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
        let all = || raw.iter().chain(&dots);
        let range = |f: fn(&(f64, f64)) -> f64| {
            let (low, high) = all().map(f).fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
            if low > high { (0.0, 1.0) } else { (low, if high > low { high } else { low + 1.0 }) }
        };
        let (xs, ys) = (ticks(range(|p| p.0), 8), ticks(range(|p| p.1), 6));
        let (x0, x1) = range(|p| p.0);
        // The loss axis ends on ticks, the steps where the run does.
        let (y0, y1) = (ys[0], ys[ys.len() - 1]);
        let x = |v: f64| LEFT + (v - x0) / (x1 - x0) * (RIGHT - LEFT);
        let y = |v: f64| BOTTOM - (v - y0) / (y1 - y0) * (BOTTOM - TOP);
        let line = |points: &[(f64, f64)]| -> String {
            points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect::<Vec<_>>().join(" ")
        };

        let (w, h) = SIZE;
        let mut s = format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="13" fill="#222">
<rect width="{w}" height="{h}" fill="#fff"/>
<text x="{LEFT}" y="26" font-size="16">{}</text>
"##,
            escape(title)
        );
        for (v, label) in ys.iter().zip(labels(&ys)) {
            let at = y(*v);
            let _ = writeln!(s, r##"<path d="M{LEFT} {at:.1}H{RIGHT}" stroke="#ddd"/>"##);
            let _ = writeln!(s, r##"<text x="{}" y="{:.1}" text-anchor="end">{label}</text>"##, LEFT - 8.0, at + 4.5);
        }
        for (v, label) in xs.iter().zip(labels(&xs)).filter(|(v, _)| (x0..=x1).contains(*v)) {
            let at = x(*v);
            let _ = writeln!(s, r##"<path d="M{at:.1} {BOTTOM}v6" stroke="#222"/>"##);
            let _ = writeln!(s, r##"<text x="{at:.1}" y="{}" text-anchor="middle">{label}</text>"##, BOTTOM + 20.0);
        }
        let (middle_x, middle_y) = ((LEFT + RIGHT) / 2.0, (TOP + BOTTOM) / 2.0);
        let _ = writeln!(
            s,
            r##"<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#222"/>
<text x="{middle_x}" y="{}" text-anchor="middle">step</text>
<text transform="translate(18 {middle_y}) rotate(-90)" text-anchor="middle">loss, nats per token</text>"##,
            h - 14.0
        );
        let mut legend = Vec::new();
        if !raw.is_empty() {
            let _ = writeln!(
                s,
                r##"<polyline points="{}" fill="none" stroke="#9bb8d9" stroke-width="1"/>
<polyline points="{}" fill="none" stroke="#1f4e8c" stroke-width="2.5"/>"##,
                line(&raw),
                line(&smooth)
            );
            legend.extend([("#9bb8d9", "each step"), ("#1f4e8c", "smoothed")]);
        }
        for p in &dots {
            let _ = writeln!(s, r##"<circle cx="{:.1}" cy="{:.1}" r="4" fill="#c4421a"/>"##, x(p.0), y(p.1));
        }
        if !dots.is_empty() {
            legend.push(("#c4421a", "held out"));
        }
        for (i, (colour, text)) in legend.iter().rev().enumerate() {
            let at = RIGHT - 120.0 * (i + 1) as f64;
            let _ = writeln!(
                s,
                r##"<rect x="{at}" y="16" width="12" height="12" fill="{colour}"/><text x="{}" y="27">{text}</text>"##,
                at + 18.0
            );
        }
        s + "</svg>\n"
    }
}

/// Round values, 1, 2 or 5 times a power of ten apart, from at or below the range to at or above it; about `count`.
fn ticks((low, high): (f64, f64), count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|&s| s >= rough * 0.999).unwrap_or(rough);
    let (from, to) = ((low / step).floor() as i64, (high / step).ceil() as i64);
    (from..=to).map(|i| i as f64 * step).collect()
}

/// The ticks with as many decimals as they need to differ.
fn labels(ticks: &[f64]) -> Vec<String> {
    let step = ticks[1] - ticks[0];
    let decimals = (-step.log10()).ceil().max(0.0) as usize;
    ticks.iter().map(|v| format!("{v:.decimals$}")).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn ticks_are_round_and_cover_the_range() {
        assert_eq!(ticks((0.0, 400.0), 8), [0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0]);
        assert_eq!(labels(&ticks((0.93, 4.4), 6)), ["0", "1", "2", "3", "4", "5"]);
        assert_eq!(labels(&ticks((0.012, 0.055), 6)), ["0.01", "0.02", "0.03", "0.04", "0.05", "0.06"]);
        for (low, high) in [(0.0, 1.0), (1e-9, 2e-9), (3.0, 1e7), (-5.0, 12.3)] {
            let t = ticks((low, high), 6);
            assert!(t[0] <= low && t[t.len() - 1] >= high && (2..=10).contains(&t.len()), "{t:?}");
        }
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
