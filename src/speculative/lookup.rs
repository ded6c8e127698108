//! [`Lookup`]: drafts what followed the last time, without a model.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::automaton::{Automaton, Continuation};
use super::{Budget, Draft, DraftTree};
use crate::backend::Backend;
use crate::decode::Session;
use crate::error::Result;

/// Suffixes of falling length whose continuations are tried behind one node.
const LEVELS: usize = 3;
/// Continuations of a suffix that are looked at, newest first.
const MOST: usize = 64;
/// Trials after which older ones count half.
const MEMORY: f32 = 128.0;
/// Trials that the prior counts as.
const PRIOR: f32 = 4.0;
/// Match lengths from which on the next rate holds, and how often the prior has the next token among the continuations.
const PRIORS: [(usize, f32); 8] = [(1, 0.2), (2, 0.35), (3, 0.5), (4, 0.6), (5, 0.7), (7, 0.8), (11, 0.87), (21, 0.93)];
/// How often a suffix was seen: once, twice, more often.
const SEEN: usize = 3;

/// How often the token that came was among those that had followed a suffix.
#[derive(Clone, Copy, Debug)]
struct Rate {
    hits: f32,
    trials: f32,
}

/// Looks the end of the text up in the text itself (prompt lookup; with a suffix automaton as in SAM decoding, Hu et al. 2024,
/// arXiv:2411.10666) and proposes what followed: behind the longest suffix that occurred before, then behind shorter ones.
///
/// The probability of a token is that of an escape model as in PPM (Cleary & Witten 1984, doi:10.1109/TCOM.1984.1096090):
/// the share of the suffix's occurrences that it followed, times how often suffixes of that length, seen so often, had the next
/// token at all, times how often all longer ones had not. Those rates begin as a prior and are learnt from every token of
/// the session, drafted or not.
pub struct Lookup {
    text: Automaton,
    /// Shortest and longest suffix looked up.
    min: usize,
    max: usize,
    /// Paths less likely than this are not proposed.
    floor: f32,
    rates: [[Rate; SEEN]; PRIORS.len()],
}

impl Default for Lookup {
    fn default() -> Self {
        Self::new(1, usize::MAX)
    }
}

/// A token that may be proposed.
#[derive(Clone, Copy, Debug)]
struct Offer {
    score: f32,
    ln_q: f32,
    parent: u32,
    token: u32,
    /// Where the automaton stands behind it, and the length of the match.
    state: u32,
    len: usize,
}

impl Lookup {
    /// Looks up suffixes of `min` to `max` tokens.
    pub fn new(min: usize, max: usize) -> Self {
        let rates = PRIORS.map(|(_, p)| [Rate { hits: p * PRIOR, trials: PRIOR }; SEEN]);
        Self { text: Automaton::new(), min: min.max(1), max: max.max(1), floor: 0.02, rates }
    }

    /// Proposes only paths at least as likely as `chance`.
    pub fn floor(self, chance: f32) -> Self {
        Self { floor: chance, ..self }
    }

    /// Makes `tokens` its text: appends what is new, begins again where the text has changed.
    pub fn follow(&mut self, tokens: &[u32]) {
        let known = self.text.text().iter().zip(tokens).take_while(|(a, b)| a == b).count();
        if known < self.text.text().len() {
            self.text.clear();
        }
        let from = self.text.text().len();
        for (i, &token) in tokens.iter().enumerate().skip(from) {
            if i >= known {
                self.learn(token);
            }
            self.text.push(token);
        }
    }

    /// Grows `tree`, which holds node 0 alone, by the likeliest paths behind the text.
    pub fn grow(&self, budget: Budget, source: u8, tree: &mut DraftTree) {
        let mut open = BinaryHeap::new();
        let ((state, len), mut made) = (self.suffix(), Reverse(0));
        let mut at = (0, state, len);
        while tree.len() <= budget.nodes {
            let (node, state, len) = at;
            if (tree.depths()[node as usize] as usize) < budget.depth {
                for (c, len, chance) in self.behind(state, len, budget.width) {
                    let (ln_q, score) = (chance.ln(), tree.scores()[node as usize] + chance.ln());
                    if score >= self.floor.ln() {
                        let offer = Offer { score, ln_q, parent: node, token: c.token, state: c.to, len: len + 1 };
                        open.push(Ranked(offer, made));
                        made.0 += 1;
                    }
                }
            }
            let Some(Ranked(best, _)) = open.pop() else { break };
            at = (tree.push(best.parent, best.token, best.ln_q, source), best.state, best.len);
        }
    }

    /// The longest suffix, as far as asked for, that occurred before, and its length.
    fn suffix(&self) -> (u32, usize) {
        let mut state = self.text.suffix();
        while let Some(shorter) = self.text.shorter(state).filter(|s| self.text.len(*s) >= self.max) {
            state = shorter;
        }
        (state, self.text.len(state).min(self.max))
    }

    /// The likeliest tokens behind a match of `len` tokens that ends in `state`: each with the length of the match that had it and
    /// its probability.
    fn behind(&self, state: u32, len: usize, width: usize) -> Vec<(Continuation, usize, f32)> {
        let (mut found, mut escape) = (Vec::new(), 1.0);
        self.levels(state, len, |slot, len, level| {
            let total = level.iter().map(|c| c.count).sum::<u32>() as f32;
            let rate = self.rate(slot);
            found.extend(level.iter().map(|c| (*c, len, escape * rate * c.count as f32 / total)));
            escape *= 1.0 - rate;
            true
        });
        found.sort_by(|a, b| b.2.total_cmp(&a.2).then(b.0.end.cmp(&a.0.end)));
        found.truncate(width);
        found
    }

    /// Learns from `token`, which comes next.
    fn learn(&mut self, token: u32) {
        let (mut tried, (state, len)) = (Vec::new(), self.suffix());
        self.levels(state, len, |slot, _, level| {
            let hit = level.iter().any(|c| c.token == token);
            tried.push((slot, hit));
            !hit
        });
        for ((length, seen), hit) in tried {
            let rate = &mut self.rates[length][seen];
            if rate.trials >= MEMORY {
                *rate = Rate { hits: rate.hits / 2.0, trials: rate.trials / 2.0 };
            }
            *rate = Rate { hits: rate.hits + f32::from(u8::from(hit)), trials: rate.trials + 1.0 };
        }
    }

    /// Shows `each` the continuations of ever shorter suffixes, those alone that no longer one had, until it says false: the
    /// rate that holds for them, the suffix's length, and the continuations.
    fn levels(&self, state: u32, len: usize, mut each: impl FnMut((usize, usize), usize, &[Continuation]) -> bool) {
        let (mut named, mut levels) = (Vec::new(), 0);
        let mut at = Some((state, len));
        while let Some((state, len)) = at.filter(|(_, len)| *len >= self.min && levels < LEVELS) {
            let level: Vec<Continuation> =
                self.text.continuations(state).take(MOST).filter(|c| !named.contains(&c.token)).collect();
            if !level.is_empty() {
                let seen = level.iter().map(|c| c.count as usize).sum::<usize>().clamp(1, SEEN) - 1;
                let length = PRIORS.partition_point(|(from, _)| *from <= len) - 1;
                if !each((length, seen), len, &level) {
                    break;
                }
                named.extend(level.iter().map(|c| c.token));
                levels += 1;
            }
            at = self.text.shorter(state).map(|s| (s, self.text.len(s)));
        }
    }

    fn rate(&self, (length, seen): (usize, usize)) -> f32 {
        let Rate { hits, trials } = self.rates[length][seen];
        // Certainty would leave nothing for shorter suffixes.
        (hits / trials).min(0.99)
    }
}

/// An offer and its number; the likelier is greater, and of equals the earlier.
struct Ranked(Offer, Reverse<u32>);

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.score.total_cmp(&other.0.score).then(self.1.cmp(&other.1))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ranked {}

impl<B: Backend> Draft<B> for Lookup {
    fn name(&self) -> &str {
        "lookup"
    }

    fn is_free(&self) -> bool {
        true
    }

    fn propose(&mut self, session: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()> {
        self.follow(session.tokens());
        self.grow(budget, budget.source, tree);
        if let Some(plan) = budget.plan {
            *tree = plan.cut(tree, budget.nodes, 0.0).0;
        }
        Ok(())
    }
}
