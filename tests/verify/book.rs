//! The rules of verification by the book, and rules that are not quite them, with the exact odds of all that they can decide.

use quadriga::backend::Order;
use quadriga::bench::ops::Verify;

use super::case::Case;
use super::common::Cell;

/// Nodes kept, and the token behind the last.
pub type Found = (Vec<usize>, u32);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mutant {
    None,
    /// Behind a rejection draws from p, not from what p has beyond q.
    DrawsFromTarget,
    /// Random numbers of six bits: as good as any where all ratios have six bits.
    Coarse,
    /// Such numbers, and accepts where u q(x) = p(x): also where both are 0.
    AcceptsEqual,
}

/// A way that a run can go, and how likely it is.
pub struct Outcome {
    pub found: Found,
    pub weight: f64,
    pub cells: Vec<Cell>,
}

/// What to decide: the first decisions are given, those behind them take the first that is possible.
#[derive(Default)]
pub struct Choices {
    given: Vec<usize>,
    odds: Vec<Vec<f64>>,
    cells: Vec<Cell>,
}

impl Choices {
    /// Decides by number `number`, in proportion to `odds` (which sum to 1), in their order.
    fn choose(&mut self, number: u64, odds: &[f64]) -> usize {
        let i = self.odds.len();
        let next = |from: usize| (from..odds.len()).find(|&k| odds[k] > 1e-14);
        let hit = self.given.get(i).copied().or_else(|| next(0));
        // A wrong rule may be left with nothing: what follows then has no weight, and the law does not sum to 1.
        let hit = hit.unwrap_or(0);
        if i == self.given.len() {
            self.given.push(hit);
        }
        let from = odds[..hit].iter().sum::<f64>();
        // Where there is no other way any number will do.
        if odds[hit] < 1.0 - 1e-14 {
            self.cells.push(Cell { number, from, to: from + odds[hit] });
        }
        self.odds.push(odds.to_vec());
        hit
    }

    /// Everything that `run` can find, which must not depend on anything but its choices.
    pub fn all(run: impl Fn(&mut Choices) -> Found) -> Vec<Outcome> {
        let (mut all, mut given) = (Vec::new(), Vec::new());
        loop {
            let mut c = Choices { given, ..Choices::default() };
            let found = run(&mut c);
            let weight = c.cells.iter().map(|c| c.to - c.from).product();
            all.push(Outcome { found, weight, cells: c.cells });
            given = c.given;
            // The last decision that can go another way does.
            loop {
                let Some(last) = given.pop() else { return all };
                let odds = &c.odds[given.len()];
                if let Some(other) = (last + 1..odds.len()).find(|&k| odds[k] > 1e-14) {
                    given.push(other);
                    break;
                }
            }
        }
    }
}

/// Verification of one draft.
pub struct Book<'a> {
    pub case: &'a Case,
    /// Drafted, one a node.
    pub tokens: &'a [u32],
    pub by: Verify,
    pub mutant: Mutant,
}

/// What a node owes: token x with probability owed\[x\], and with what is left of 1 nothing, where the node is rejected.
struct Owed {
    own: Vec<f64>,
    owed: Vec<f64>,
    q: Vec<f64>,
}

impl Owed {
    fn ratio(&self, x: usize) -> f64 {
        if self.owed[x] >= self.q[x] { f64::from(self.owed[x] > 0.0) } else { self.owed[x] / self.q[x] }
    }

    fn reject(&mut self, x: usize, replacement: bool) {
        let covered: f64 = self.owed.iter().zip(&self.q).map(|(o, q)| o.min(*q)).sum();
        self.owed.iter_mut().zip(&self.q).for_each(|(o, q)| *o = (*o - q).max(0.0) / (1.0 - covered));
        if !replacement {
            self.q[x] = 0.0;
            let left: f64 = self.q.iter().sum();
            self.q.iter_mut().for_each(|q| *q /= left.max(f64::MIN_POSITIVE));
        }
    }
}

impl Book<'_> {
    /// Goes one of the ways that there are.
    pub fn run(&self, c: &mut Choices) -> Found {
        let mut path = vec![0];
        match self.by {
            Verify::Match => loop {
                let at = path[path.len() - 1];
                let pick = c.choose(path.len() as u64 - 1, &self.case.p(&self.case.text(self.tokens, at)));
                match self.children(at, path.len()).into_iter().find(|&n| self.tokens[n] as usize == pick) {
                    Some(child) => path.push(child),
                    None => return (path, pick as u32),
                }
            },
            Verify::Reject { replacement, order: Order::RootFirst } => {
                let mut decision = 0..;
                let mut number = || decision.next().unwrap();
                'down: loop {
                    let at = path[path.len() - 1];
                    let mut owed = self.open(at, 1.0);
                    for child in self.children(at, path.len()) {
                        let x = self.tokens[child] as usize;
                        if self.accepts(c, number(), owed.ratio(x)) {
                            path.push(child);
                            continue 'down;
                        }
                        owed.reject(x, replacement);
                    }
                    return (path, self.draw(c, number(), &owed));
                }
            }
            Verify::Reject { replacement, order: Order::LeavesFirst } => {
                let next = self.tried(c, replacement, &mut path, 1.0).expect("the root stands");
                (path, next)
            }
        }
    }

    /// What follows where the last node of the path, or one below it, stands.
    fn tried(&self, c: &mut Choices, replacement: bool, path: &mut Vec<usize>, r: f64) -> Option<u32> {
        let at = path[path.len() - 1];
        let mut owed = self.open(at, r);
        for child in self.children(at, path.len()) {
            let x = self.tokens[child] as usize;
            path.push(child);
            let found = self.tried(c, replacement, path, owed.ratio(x));
            if found.is_some() {
                return found;
            }
            path.pop();
            owed.reject(x, replacement);
        }
        let r: f64 = owed.owed.iter().sum();
        // The root is never given up.
        (at == 0 || self.accepts(c, at as u64, r)).then(|| self.draw(c, 0, &owed))
    }

    fn children(&self, at: usize, kept: usize) -> Vec<usize> {
        let parents = &self.case.parents;
        let all = (at + 1..parents.len()).filter(|&n| parents[n] as usize == at);
        if kept < self.case.stride { all.collect() } else { Vec::new() }
    }

    fn open(&self, at: usize, r: f64) -> Owed {
        let text = self.case.text(self.tokens, at);
        let own = self.case.p(&text);
        Owed { owed: own.iter().map(|p| r * p).collect(), own, q: self.case.q(&text) }
    }

    fn accepts(&self, c: &mut Choices, number: u64, ratio: f64) -> bool {
        let ratio = match self.mutant {
            Mutant::Coarse => (64.0 * ratio - 1e-9).ceil() / 64.0,
            Mutant::AcceptsEqual => ((64.0 * ratio + 1e-9).floor() + 1.0).min(64.0) / 64.0,
            _ => ratio,
        };
        c.choose(number, &[ratio, 1.0 - ratio]) == 0
    }

    fn draw(&self, c: &mut Choices, number: u64, owed: &Owed) -> u32 {
        // What owes nothing is accepted by a mutant alone.
        let nothing = owed.owed.iter().all(|o| *o == 0.0);
        let from = if nothing || self.mutant == Mutant::DrawsFromTarget { &owed.own } else { &owed.owed };
        let sum: f64 = from.iter().sum();
        c.choose(number, &from.iter().map(|p| p / sum).collect::<Vec<_>>()) as u32
    }
}
