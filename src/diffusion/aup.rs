//! AUP, Accuracy Under Parallelism: what a decoder that commits several tokens a pass is worth, as one number (d3LLM, arXiv:2601.07568).
//!
//! A decoder has operating points: tokens per forward pass, and the accuracy that it has there. AUP is the area under accuracy over tokens
//! per pass, in which accuracy counts the less, the farther it lies below the best that any method reaches on the task:
//!
//! `AUP = t_1 y_1 + 1/2 sum_{i>=2} (t_i - t_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1}))`, `W(y) = min(exp(-alpha (1 - y / best)), 1)`
//!
//! over points in the order of `t`, without those more than `offset` below `y_1`. The first rectangle is not weighed: a decoder of one token a
//! pass scores its accuracy. A curve that ends more than `offset` below its beginning has no AUP.

use crate::error::{Context, Result, bail, ensure};

/// What is lost in writing accuracies as binary fractions (64.4 - 59.4 > 5) drops no point.
const ROUNDING: f64 = 1e-9;

/// One operating point of a decoder on a task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Tokens per forward pass, more than 0.
    pub tpf: f64,
    /// Percent, 0 to 100.
    pub accuracy: f64,
}

impl Point {
    /// The point, if there can be such a one.
    ///
    /// # Errors
    /// `Usage` for tokens per pass that are not finite or not more than 0, and for an accuracy that is no percentage.
    pub fn validate(self) -> Result<Self> {
        let Self { tpf, accuracy } = self;
        ensure!(tpf.is_finite() && tpf > 0.0, Usage, "TPF {tpf} is impossible: expected tokens per pass, more than 0");
        ensure!(is_percent(accuracy), Usage, "accuracy {accuracy} is impossible: expected percent, 0 to 100");
        Ok(self)
    }
}

fn is_percent(x: f64) -> bool {
    (0.0..=100.0).contains(&x)
}

/// Constants of the metric. `Default` is the published ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AupSettings {
    /// How fast the weight falls below the best accuracy; 0 is the plain area.
    pub alpha: f64,
    /// How far below its first point's accuracy a point may lie, percentage points.
    pub offset: f64,
}

impl Default for AupSettings {
    fn default() -> Self {
        Self { alpha: 3.0, offset: 5.0 }
    }
}

impl AupSettings {
    /// The settings, if the metric has a meaning with them.
    ///
    /// # Errors
    /// `Usage` where one of them is negative or not finite.
    pub fn validate(self) -> Result<Self> {
        for (name, x) in [("alpha", self.alpha), ("offset", self.offset)] {
            ensure!(x.is_finite() && x >= 0.0, Usage, "{name} {x} is impossible: expected 0 or more");
        }
        Ok(self)
    }

    fn too_low(&self, first: Point, point: Point) -> bool {
        first.accuracy - point.accuracy > self.offset + ROUNDING
    }

    /// `W(y)`. An accuracy of `best` or more counts whole, 0 beside a best of 0 too.
    fn weight(&self, accuracy: f64, best: f64) -> f64 {
        if accuracy >= best { 1.0 } else { (-self.alpha * (1.0 - accuracy / best)).exp() }
    }
}

/// A point that counts, with the weight of its accuracy, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighed {
    /// The point.
    pub point: Point,
    /// `W` of its accuracy.
    pub weight: f64,
}

impl Weighed {
    /// Accuracy times weight: the height of the curve under which AUP is the area.
    pub fn height(&self) -> f64 {
        self.point.accuracy * self.weight
    }
}

/// The curve of one method on one task, in ascending order of tokens per pass.
#[derive(Clone, Debug, PartialEq)]
pub struct AupCurve {
    /// Points that count, the first of all among them.
    pub kept: Vec<Weighed>,
    /// Points more than `offset` below the first, and those that another beats at the same tokens per pass.
    pub dropped: Vec<Point>,
    /// The point with the most tokens per pass, kept or not.
    last: Point,
    settings: AupSettings,
}

impl AupCurve {
    /// Orders and weighs `points`; `best` is the best accuracy of any method on the task, percent (points above it count whole). Of several points
    /// at the same tokens per pass, of which the definition does not speak, the most accurate one counts, so that their order never matters.
    ///
    /// # Errors
    /// `Usage` for no points, for an impossible one by its number, and for impossible settings.
    pub fn new(points: &[Point], best: f64, settings: AupSettings) -> Result<Self> {
        settings.validate()?;
        ensure!(is_percent(best), Usage, "best accuracy {best} is impossible: expected percent, 0 to 100");
        for (i, p) in points.iter().enumerate() {
            p.validate().context(|| format!("point {}", i + 1))?;
        }
        let mut sorted = points.to_vec();
        sorted.sort_by(|a, b| a.tpf.total_cmp(&b.tpf).then(b.accuracy.total_cmp(&a.accuracy)));
        let Some(&first) = sorted.first() else { bail!(Usage, "no points: AUP needs one or more") };
        let (mut kept, mut dropped, mut last) = (Vec::<Weighed>::new(), Vec::new(), first);
        for (i, &point) in sorted.iter().enumerate() {
            let beaten = i > 0 && point.tpf == sorted[i - 1].tpf;
            if !beaten {
                last = point;
            }
            if beaten || settings.too_low(first, point) {
                dropped.push(point);
            } else {
                kept.push(Weighed { point, weight: settings.weight(point.accuracy, best) });
            }
        }
        Ok(Self { kept, dropped, last, settings })
    }

    /// AUP: the first point's rectangle, then trapezoids between neighbours that count.
    ///
    /// # Errors
    /// `Usage` where the curve ends more than `offset` below its beginning, with the figures.
    pub fn area(&self) -> Result<f64> {
        let (first, last, offset) = (self.kept[0].point, self.last, self.settings.offset);
        if self.settings.too_low(first, last) {
            let fall = ((first.accuracy - last.accuracy) * 1e6).round() / 1e6;
            bail!(
                Usage,
                "accuracy falls from {} at TPF {} to {} at TPF {}, by {fall} points: with more than {offset} there is no AUP",
                first.accuracy,
                first.tpf,
                last.accuracy,
                last.tpf
            );
        }
        let trapezoids =
            self.kept.windows(2).map(|w| 0.5 * (w[1].point.tpf - w[0].point.tpf) * (w[1].height() + w[0].height()));
        Ok(first.tpf * first.accuracy + trapezoids.sum::<f64>())
    }
}

/// AUP of a method's points in any order; `best` is the best accuracy of any method on the task, percent. See [`AupCurve`].
///
/// # Errors
/// Those of [`AupCurve::new`] and [`AupCurve::area`].
pub fn aup(points: &[Point], best: f64, settings: AupSettings) -> Result<f64> {
    AupCurve::new(points, best, settings)?.area()
}
