//! [`Chart`]: lines over one axis, as a picture.

use std::fmt::Write as _;

/// Size of the picture and edges of the plot in it, pixels.
const SIZE: (f64, f64) = (800.0, 450.0);
pub(super) const LEFT: f64 = 70.0;
pub(super) const RIGHT: f64 = 780.0;
pub(super) const TOP: f64 = 44.0;
pub(super) const BOTTOM: f64 = 396.0;

/// Colours of several lines of one kind, one after another.
pub const COLOURS: [&str; 8] = ["#1f4e8c", "#c4421a", "#2e7d32", "#7b3fa0", "#b8860b", "#00838f", "#ad1457", "#5d4037"];

struct Series {
    name: String,
    colour: String,
    shape: Shape,
    points: Vec<(f64, f64)>,
}

enum Shape {
    Line(f64),
    Dots,
}

/// Lines and dots with axes, ticks and a legend.
pub struct Chart {
    title: String,
    x: String,
    y: String,
    series: Vec<Series>,
}

impl Chart {
    /// Nothing yet, over an axis named `x`.
    pub fn new(title: &str, x: &str, y: &str) -> Self {
        Self { title: title.into(), x: x.into(), y: y.into(), series: Vec::new() }
    }

    /// A line so many pixels wide. What is not finite is left out.
    pub fn line(&mut self, name: &str, colour: &str, width: f64, points: Vec<(f64, f64)>) {
        let shape = Shape::Line(width);
        self.series.push(Series { name: name.into(), colour: colour.into(), shape, points });
    }

    /// Dots.
    pub fn dots(&mut self, name: &str, colour: &str, points: Vec<(f64, f64)>) {
        self.series.push(Series { name: name.into(), colour: colour.into(), shape: Shape::Dots, points });
    }

    /// Where each name of the legend stands: beside the title, or, where there is no room for all, in rows below the plot.
    fn legend(&self) -> Vec<(f64, f64)> {
        /// Of a name, with its square and the gap behind it; letters are at most so wide on average.
        const WIDTH: f64 = 120.0;
        const LETTER: f64 = 8.0;
        let width = |s: &Series| (34.0 + LETTER * s.name.chars().count() as f64).max(WIDTH);
        let title = 10.0 * self.title.chars().count() as f64;
        let all: f64 = self.series.iter().map(width).sum();
        let beside = all <= RIGHT - LEFT - title;
        let (mut x, mut y) = if beside { (RIGHT - all, 27.0) } else { (LEFT, SIZE.1 + 8.0) };
        let places = self.series.iter().map(|s| {
            if x > LEFT && x + width(s) > RIGHT {
                (x, y) = (LEFT, y + 20.0);
            }
            x += width(s);
            (x - width(s), y)
        });
        places.collect()
    }

    /// As SVG.
    pub fn svg(&self) -> String {
        let finite = |p: &&(f64, f64)| p.0.is_finite() && p.1.is_finite();
        let all = || self.series.iter().flat_map(|s| &s.points).filter(finite);
        let range = |f: fn(&(f64, f64)) -> f64| {
            let (low, high) = all().map(f).fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
            if low > high { (0.0, 1.0) } else { (low, if high > low { high } else { low + 1.0 }) }
        };
        let (xs, ys) = (ticks(range(|p| p.0), 8), ticks(range(|p| p.1), 6));
        let (x0, x1) = range(|p| p.0);
        // The upright axis ends on ticks, the other where the lines do.
        let (y0, y1) = (ys[0], ys[ys.len() - 1]);
        let x = |v: f64| LEFT + (v - x0) / (x1 - x0) * (RIGHT - LEFT);
        let y = |v: f64| BOTTOM - (v - y0) / (y1 - y0) * (BOTTOM - TOP);
        let (w, legend) = (SIZE.0, self.legend());
        // Rows of a legend below the plot make the picture higher.
        let h = legend.iter().map(|at| at.1 + 14.0).fold(SIZE.1, f64::max);
        let mut s = format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="13" fill="#222">
<rect width="{w}" height="{h}" fill="#fff"/>
<text x="{LEFT}" y="26" font-size="16">{}</text>
"##,
            escape(&self.title)
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
<text x="{middle_x}" y="{}" text-anchor="middle">{}</text>
<text transform="translate(18 {middle_y}) rotate(-90)" text-anchor="middle">{}</text>"##,
            SIZE.1 - 14.0,
            escape(&self.x),
            escape(&self.y)
        );
        for Series { colour, shape, points, .. } in &self.series {
            let points = points.iter().filter(finite).map(|p| (x(p.0), y(p.1)));
            match shape {
                Shape::Line(width) => {
                    let line: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
                    if !line.is_empty() {
                        let _ = writeln!(
                            s,
                            r##"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="{width}"/>"##,
                            line.join(" ")
                        );
                    }
                }
                Shape::Dots => points.for_each(|(x, y)| {
                    let _ = writeln!(s, r##"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{colour}"/>"##);
                }),
            }
        }
        for (Series { name, colour, .. }, (x, y)) in self.series.iter().zip(legend) {
            let (top, text) = (y - 11.0, x + 18.0);
            let _ = writeln!(
                s,
                r##"<rect x="{x}" y="{top}" width="12" height="12" fill="{colour}"/><text x="{text}" y="{y}">{}</text>"##,
                escape(name)
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

    #[test]
    fn a_legend_stands_where_it_has_room() {
        let chart = |names: &[&str]| {
            let mut c = Chart::new("GSM8K-CoT in Dream", "x", "y");
            names.iter().for_each(|n| c.line(n, COLOURS[0], 1.0, vec![(0.0, 0.0), (1.0, 1.0)]));
            c
        };
        let few = chart(&["training", "held out"]);
        assert_eq!(few.legend(), [(540.0, 27.0), (660.0, 27.0)]);
        assert!(few.svg().contains(r#"height="450""#));
        let many = chart(&[
            "Qwen2.5-7B-it",
            "EAGLE-3 (LLaMA-3.1-8B)",
            "Dream",
            "Fast-dLLM",
            "Fast-dLLM v2",
            "dParallel",
            "d3LLM",
        ]);
        let places = many.legend();
        assert_eq!(places.iter().map(|p| p.1).collect::<Vec<_>>(), [458.0, 458.0, 458.0, 458.0, 478.0, 478.0, 478.0]);
        for (w, s) in places.windows(2).zip(&many.series) {
            assert!(w[1].1 > w[0].1 || w[1].0 - w[0].0 >= 26.0 + 8.0 * s.name.len() as f64, "{w:?}");
        }
        assert!(places.iter().all(|p| (LEFT..RIGHT - 100.0).contains(&p.0)), "{places:?}");
        assert!(many.svg().contains(r#"height="492""#));
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
}
