//! [`CostModel`]: what passes cost on this machine, and so how much to draft.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{Budget, Draft, DraftTree};
use crate::backend::{Backend, Mask, TreeMask};
use crate::decode::Session;
use crate::error::{Error, ErrorKind, Result, ensure};
use crate::model::Want;

/// Rows of the passes that are timed.
const ROWS: [usize; 11] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64];
/// Nodes that a draft reads at one depth when it is timed.
const WIDTHS: [usize; 3] = [1, 4, 8];
/// Times each is timed, where there is time.
const REPEATS: usize = 3;
/// Seconds that timing may take, but for one pass of each of the first sizes.
const LIMIT: f64 = 0.25;

/// Seconds as a function of rows: linear between measured points, constant before the first, going on beyond the last, never
/// falling.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve(Vec<(usize, f64)>);

impl Curve {
    /// Through `points` (rows, seconds), rows ascending. Of a measured fall the lower value stands: what disturbs a measurement
    /// makes it longer.
    pub fn new(points: &[(usize, f64)]) -> Self {
        let mut rising = points.to_vec();
        for i in (1..rising.len()).rev() {
            rising[i - 1].1 = rising[i - 1].1.min(rising[i].1);
        }
        Self(rising)
    }

    /// The same whatever the rows.
    pub fn constant(seconds: f64) -> Self {
        Self(vec![(1, seconds)])
    }

    /// Seconds for `rows` rows; 0 where nothing is known.
    pub fn at(&self, rows: usize) -> f64 {
        let p = &self.0;
        let i = p.partition_point(|(n, _)| *n < rows);
        match p.len() {
            0 => 0.0,
            1 => p[0].1,
            _ if i == 0 => p[0].1,
            len => {
                let ((a, x), (b, y)) = (p[i.min(len - 1) - 1], p[i.min(len - 1)]);
                x + (y - x) * (rows - a) as f64 / (b - a) as f64
            }
        }
    }

    fn scaled(&self, by: impl Fn(usize) -> f64) -> Self {
        let points: Vec<_> = self.0.iter().map(|&(rows, s)| (rows, s * by(rows))).collect();
        Self::new(&points)
    }

    fn check(&self, what: &str) -> Result<()> {
        let rising = self.0.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1);
        let sane = self.0.iter().all(|&(rows, s)| rows > 0 && s.is_finite() && s >= 0.0);
        ensure!(rising && sane, Config, "measured costs: {what} is not a rising curve of seconds by rows");
        Ok(())
    }
}

/// What speculation costs here, with this model and so many threads. All times are seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostModel {
    /// A pass of the target, by rows.
    pub pass: Curve,
    /// One level of drafting, by nodes read.
    pub draft_step: Curve,
    /// Beginning a draft: all up to the tokens behind node 0.
    pub draft_fixed: f64,
}

impl CostModel {
    /// Of nodes whose paths are right with probabilities `chances`, how many of the first give most expected tokens a second when
    /// drafting took `spent`, and that rate. The least of equally good numbers.
    pub fn best(&self, chances: &[f64], spent: f64) -> (usize, f64) {
        let (mut tokens, mut best) = (1.0, (0, 1.0 / (spent + self.pass.at(1))));
        for (i, chance) in chances.iter().enumerate() {
            tokens += chance;
            let rate = tokens / (spent + self.pass.at(i + 2));
            if rate > best.1 {
                best = (i + 1, rate);
            }
        }
        best
    }

    /// The first of [`CostModel::best`].
    pub fn best_size(&self, chances: &[f64], spent: f64) -> usize {
        self.best(chances, spent).0
    }

    /// Whether reading one more level is expected to pay. `chances` are those of all nodes so far, best first, `frontier` those of
    /// the nodes to read, `ratio` what the last level kept of the chance of the level before, which the next are supposed to
    /// keep of theirs. At most `nodes` can be verified; `levels` may still be read. A level that does not pay by itself does if
    /// some more after it do.
    pub fn worth_expanding(
        &self,
        chances: &[f64],
        frontier: &[f64],
        ratio: f64,
        spent: f64,
        nodes: usize,
        levels: usize,
    ) -> bool {
        let step = self.draft_step.at(frontier.len());
        let (mut all, mut next) = (chances.to_vec(), frontier.to_vec());
        let now = self.best(&all[..all.len().min(nodes)], spent).1;
        (1..=levels.min(nodes)).any(|level| {
            next.iter_mut().for_each(|c| *c *= ratio);
            all.extend_from_slice(&next);
            all.sort_by(|a, b| b.total_cmp(a));
            all.truncate(nodes);
            self.best(&all, spent + step * level as f64).1 > now
        }) && !frontier.is_empty()
    }

    /// The same with passes of one row slower by the first factor, all else by the second.
    pub(super) fn scaled(&self, one: f64, more: f64) -> Self {
        Self {
            pass: self.pass.scaled(|rows| if rows == 1 { one } else { more }),
            draft_step: self.draft_step.scaled(|_| more),
            draft_fixed: self.draft_fixed * more,
        }
    }

    /// Times passes behind the session's tokens, in a third of a second unless a single pass is slow: sizes that there is no time for
    /// are extrapolated. The session stays as it was, but that the logits behind its last token have to be computed again.
    ///
    /// # Errors
    /// The device's; a session whose context is full.
    pub fn measure<B: Backend>(session: &mut Session<B>) -> Result<Self> {
        let (len, past) = (session.tokens().len(), session.cache().len());
        let room = session.workspace().max_logits().min(session.capacity() - past);
        ensure!(room > 0, Capacity, "the context is full: there is no room to time passes behind it");
        let token = session.tokens().last().copied().unwrap_or(0);
        let start = Instant::now();
        let mut points: Vec<(usize, f64)> = Vec::new();
        for rows in ROWS.into_iter().filter(|r| *r <= room) {
            let left = LIMIT - start.elapsed().as_secs_f64();
            if let [.., (before, s)] = points[..]
                && points.len() > 2
                && s * rows as f64 / before as f64 > left
            {
                break;
            }
            // A flat tree, and once more than is counted: the first pass of a size may build what later ones use.
            let parents: Vec<u32> = (0..rows).map(|i| if i == 0 { TreeMask::ROOT } else { 0 }).collect();
            let (mask, tokens) = (TreeMask::new(&parents)?, vec![token; rows]);
            let mut pass = || {
                session.stage(&tokens, Mask::Tree(&mask), Want::All)?;
                session.wait()
            };
            points.push((rows, fastest(left / 4.0, &mut pass)?));
        }
        session.truncate(len);
        Ok(Self { pass: Curve::new(&points), ..Self::default() })
    }

    /// Times how `draft` proposes behind the session's last token, which is not in its cache while all others are.
    ///
    /// # Errors
    /// The draft's.
    pub fn measure_draft<B: Backend>(&mut self, draft: &mut dyn Draft<B>, session: &Session<B>) -> Result<()> {
        let mut tree = DraftTree::new(0);
        let last = session.tokens().last().copied().unwrap_or(0);
        let mut levels = |depth: usize, width: usize| {
            fastest(LIMIT / 8.0, &mut || {
                tree.reset(last);
                draft.propose(session, Budget::new(64, depth, width), &mut tree)
            })
        };
        self.draft_fixed = levels(1, 1)?;
        let mut points = Vec::new();
        for width in WIDTHS {
            points.push((width, ((levels(3, width)? - levels(1, width)?) / 2.0).max(0.0)));
        }
        self.draft_step = Curve::new(&points);
        Ok(())
    }

    /// As text, to be kept for this machine, model and number of threads.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("numbers")
    }

    /// From [`CostModel::to_json`].
    ///
    /// # Errors
    /// Text of another kind; times that no pass can have.
    pub fn from_json(text: &str) -> Result<Self> {
        let read = serde_json::from_str::<Self>(text);
        let cost = read.map_err(|e| Error::new(ErrorKind::Config, format!("measured costs: {e}")))?;
        cost.pass.check("pass")?;
        cost.draft_step.check("draft_step")?;
        let fixed = cost.draft_fixed;
        ensure!(fixed.is_finite() && fixed >= 0.0, Config, "measured costs: draft_fixed is {fixed}");
        let takes_time = cost.pass.at(1) > 0.0;
        ensure!(takes_time, Config, "measured costs: a pass that takes no time");
        Ok(cost)
    }
}

/// The fewest seconds of a few calls, after one that is not counted, in about `limit` seconds: one call that takes longer is the
/// only one.
fn fastest(limit: f64, call: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() <= REPEATS && (times.is_empty() || start.elapsed().as_secs_f64() < limit) {
        let start = Instant::now();
        call()?;
        times.push(start.elapsed().as_secs_f64());
    }
    if times.len() > 1 {
        times.remove(0);
    }
    Ok(times.into_iter().fold(f64::INFINITY, f64::min))
}
