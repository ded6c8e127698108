//! [`Plan`]: how much to draft, and whether, by what passes cost and by how often drafts were right.

use super::{Budget, CostModel, DraftTree, Pool};

/// Lower ends of all but the first range of a draft's probabilities for which it is learnt how often tokens stand.
const EDGES: [f32; 10] = [0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97];
/// Depths that are learnt apart; what is deeper counts as the last.
const DEPTHS: usize = 3;
/// Tokens that the prior, a draft that is right about itself, counts as.
const PRIOR: f64 = 8.0;
/// Tokens after which older ones count half.
const MEMORY: u32 = 512;
/// What a new time moves a running mean by.
const STEP: f64 = 0.1;
/// The most a single time counts, in times of what was expected.
const OUTLIER: f64 = 2.0;
/// The most that drafting counts, in plain steps.
const SLOW_DRAFT: f64 = 4.0;
/// Steps with a draft after which one goes without, so that it is known what speculation is worth.
const PLAIN_EVERY: u32 = 128;

/// Tokens whose parent stood: how many did too, and how many the draft's probabilities promised.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Seen {
    stood: f64,
    promised: f64,
    trials: u32,
}

/// How often one source is right, by its own probability and by depth.
#[derive(Clone, Debug, Default, PartialEq)]
struct Calibration([[Seen; EDGES.len() + 1]; DEPTHS]);

impl Calibration {
    fn cell(q: f32, depth: usize) -> (usize, usize) {
        (depth.clamp(1, DEPTHS) - 1, EDGES.partition_point(|e| *e <= q))
    }

    /// The probability that a token stands if its parent does. It rises with `ln_q` within a range.
    fn chance(&self, ln_q: f32, depth: usize) -> f64 {
        let q = ln_q.exp();
        let (d, bin) = Self::cell(q, depth);
        let (seen, q) = (&self.0[d][bin], f64::from(q));
        if q > 0.0 { (q * (seen.stood + PRIOR * q) / (seen.promised + PRIOR * q)).min(1.0) } else { 0.0 }
    }

    fn observe(&mut self, ln_q: f32, depth: usize, stood: bool) {
        let (d, bin) = Self::cell(ln_q.exp(), depth);
        let seen = &mut self.0[d][bin];
        if seen.trials >= MEMORY {
            *seen = Seen { stood: seen.stood / 2.0, promised: seen.promised / 2.0, trials: seen.trials / 2 };
        }
        seen.stood += f64::from(u8::from(stood));
        seen.promised += f64::from(ln_q.exp());
        seen.trials += 1;
    }
}

/// Whether speculation is on. It is switched off when it does not pay, and tried again when plain steps have saved up for a
/// trial: what it loses against plain decoding stays below a fixed share, whatever drafts do.
///
/// Times are in plain steps.
#[derive(Clone, Debug, PartialEq)]
struct Switch {
    on: bool,
    /// What may still be lost.
    credit: f64,
    /// Running sums since it was switched on: steps, tokens, times.
    steps: u32,
    tokens: f64,
    time: f64,
}

impl Switch {
    /// Of every plain step, what may be lost: plain decoding is at most 1 / 0.97 times faster.
    const SHARE: f64 = 0.025;
    /// What may be lost at the beginning.
    const FIRST: f64 = 2.0;
    /// What may be lost by a later trial.
    const TRIAL: f64 = 1.0;
    /// The most that is saved up, so that a draft that has become bad is noticed.
    const MOST: f64 = 8.0;
    /// Steps over which the running rate is taken.
    const WINDOW: u32 = 32;

    fn new() -> Self {
        Self { on: true, credit: Self::FIRST, steps: 0, tokens: 0.0, time: 0.0 }
    }

    fn observe(&mut self, tokens: f64, time: f64) {
        let gained = if self.on { tokens - time } else { 0.0 };
        self.credit = (self.credit + Self::SHARE * tokens + gained).min(Self::MOST);
        if !self.on {
            if self.credit >= Self::TRIAL {
                *self = Self { credit: self.credit, ..Self::new() };
            }
            return;
        }
        let keep = 1.0 - 1.0 / f64::from(Self::WINDOW);
        self.steps += 1;
        self.tokens = keep * self.tokens + tokens;
        self.time = keep * self.time + time;
        let slower = self.steps >= Self::WINDOW && self.tokens < 0.98 * self.time;
        if self.credit <= 0.0 || slower {
            self.on = false;
            self.credit = self.credit.min(0.0);
        }
    }
}

/// How many tokens to draft, and whether to draft at all. What it decides depends on the drafts' probabilities, on what stood
/// before and on times, never on what the target is about to say: so it changes no text.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    measured: CostModel,
    /// `measured`, as fast as passes are now.
    cost: CostModel,
    /// Whether times are those of `measured` rather than the clock's.
    fixed: bool,
    /// How much longer than measured passes take: of one row, of more. What slows passes of one row, a longer text or a busy
    /// machine, slows the others; but what those cost beyond it must not make plain decoding look slow.
    slower: [f64; 2],
    sources: Vec<Calibration>,
    switch: Switch,
    /// Steps with a draft since the last without.
    drafted: u32,
}

impl Plan {
    /// Begins with the times of `cost` and follows the clock as passes become slower or faster, as they do with the text's length.
    pub fn new(cost: CostModel) -> Self {
        let measured = cost.clone();
        Self { measured, cost, fixed: false, slower: [1.0; 2], sources: Vec::new(), switch: Switch::new(), drafted: 0 }
    }

    /// Takes the times of `cost` for those of all passes, whatever the clock says: the same seed gives the same trees.
    pub fn reproducible(cost: CostModel) -> Self {
        Self { fixed: true, ..Self::new(cost) }
    }

    /// Begins with what `other` has learnt about how often drafts are right: about the same drafts, with another text.
    pub fn with_experience(self, other: &Plan) -> Self {
        Self { sources: other.sources.clone(), ..self }
    }

    /// What passes cost now.
    pub fn cost(&self) -> &CostModel {
        &self.cost
    }

    /// Whether the next step should draft.
    pub fn speculates(&self) -> bool {
        self.switch.on && (self.fixed || self.drafted < PLAIN_EVERY)
    }

    /// The probability that a token stands if its parent does, where `source` gives it `ln_q`, the logarithm of its own.
    pub fn chance(&self, source: u8, ln_q: f32, depth: usize) -> f64 {
        match self.sources.get(source as usize) {
            Some(c) => c.chance(ln_q, depth),
            None => f64::from(ln_q.exp()),
        }
    }

    /// Of a tree, the chances of all paths, node 0's first.
    fn paths(&self, tree: &DraftTree) -> Vec<f64> {
        let mut paths = vec![1.0];
        for i in 1..tree.len() {
            let (parent, depth) = (tree.parents()[i] as usize, tree.depths()[i] as usize);
            paths.push(paths[parent] * self.chance(tree.sources()[i], tree.ln_q(i), depth));
        }
        paths
    }

    /// The nodes of a tree that pay, when drafting took `spent` seconds, at most `most`; and the expected tokens a second.
    pub fn cut(&self, tree: &DraftTree, most: usize, spent: f64) -> (DraftTree, f64) {
        let paths = self.paths(tree);
        let mut order: Vec<usize> = (1..tree.len()).collect();
        // A parent is at least as likely as its child and has the lower number.
        order.sort_by(|a, b| paths[*b].total_cmp(&paths[*a]).then(a.cmp(b)));
        order.truncate(most);
        let chances: Vec<f64> = order.iter().map(|&i| paths[i]).collect();
        let (size, rate) = self.cost.best(&chances, spent);
        let mut kept: Vec<u32> = order[..size].iter().map(|&i| i as u32).chain([0]).collect();
        kept.sort_unstable();
        (tree.part(&kept), rate)
    }

    /// Seconds that it took to grow `pool`.
    fn spent(&self, pool: &Pool) -> f64 {
        let read = pool.levels().rev().skip(1).map(|rows| self.cost.draft_step.at(rows.len()));
        self.cost.draft_fixed + read.sum::<f64>()
    }

    pub(super) fn worth_expanding(&self, pool: &Pool, budget: Budget) -> bool {
        let (chances, rows) = pool.chances(budget.nodes, |ln_q, depth| self.chance(budget.source, ln_q, depth));
        let level = |i: usize| pool.levels().rev().nth(i).map_or(1.0, |r| rows[r].iter().sum::<f64>());
        let ratio = if level(1) > 0.0 { (level(0) / level(1)).min(1.0) } else { 0.0 };
        let (spent, left) = (self.spent(pool), budget.depth - pool.depth());
        self.cost.worth_expanding(&chances, &rows[pool.frontier()], ratio, spent, budget.nodes, left)
    }

    pub(super) fn size(&self, pool: &Pool, budget: Budget) -> usize {
        let (chances, _) = pool.chances(budget.nodes, |ln_q, depth| self.chance(budget.source, ln_q, depth));
        self.cost.best_size(&chances, self.spent(pool))
    }

    /// Seconds that drafting took: `clock`, or what the costs say of so deep a tree, if one was drafted by passes of a model.
    pub(super) fn drafting(&self, clock: f64, tree: Option<&DraftTree>, width: usize) -> f64 {
        match tree {
            _ if !self.fixed => clock,
            None => 0.0,
            Some(tree) => self.passes(tree, width),
        }
    }

    /// Seconds that a model takes to draft so deep a tree behind a text that it has read.
    pub(super) fn passes(&self, tree: &DraftTree, width: usize) -> f64 {
        let depth = tree.depths().iter().max().copied().unwrap_or(0);
        self.cost.draft_fixed + f64::from(depth.saturating_sub(1)) * self.cost.draft_step.at(width)
    }

    /// Learns from a step: the tree that was verified, the nodes of it that stood, and the seconds that drafting and verification
    /// took. A step without a draft is one with node 0 alone.
    pub fn observe(&mut self, tree: &DraftTree, path: &[u32], draft: f64, verify: f64) {
        for i in (1..tree.len()).filter(|i| path.contains(&tree.parents()[*i])) {
            let source = tree.sources()[i] as usize;
            if self.sources.len() <= source {
                self.sources.resize(source + 1, Calibration::default());
            }
            let stood = path.contains(&(i as u32));
            self.sources[source].observe(tree.ln_q(i), tree.depths()[i] as usize, stood);
        }
        let rows = tree.len();
        let (expected, plain) = (self.cost.pass.at(rows), self.cost.pass.at(1));
        let verify = if self.fixed { expected } else { verify.clamp(expected / OUTLIER, expected * OUTLIER) };
        self.switch.observe(path.len() as f64, (draft.min(SLOW_DRAFT * plain) + verify) / plain);
        self.drafted = if rows == 1 { 0 } else { self.drafted + 1 };
        if !self.fixed {
            let by = 1.0 + STEP * (verify / expected - 1.0);
            self.slower[1] *= by;
            if rows == 1 {
                self.slower[0] *= by;
            }
            self.cost = self.measured.scaled(self.slower[0], self.slower[1]);
        }
    }
}
