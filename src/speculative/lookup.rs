//! [`Lookup`]: drafts what followed the last time, without a model.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::automaton::{Automaton, Continuation, Cursor};
use super::memory::{Held, LONGEST, is_token};
use super::rates::{Rates, Slot};
use super::{Budget, Draft, DraftTree, Memory};
use crate::backend::Backend;
use crate::decode::Session;
use crate::error::Result;

/// Suffixes of falling length whose continuations are tried behind one node, in the text and in the memory each.
const LEVELS: usize = 3;
/// Continuations of a suffix that are looked at, newest first.
const MOST: usize = 64;
/// New tokens of a text that go into the memory before it ends.
const FED: usize = 1024;

/// Looks the end of the text up in the text itself (prompt lookup; with a suffix automaton as in SAM decoding, Hu et al. 2024,
/// arXiv:2411.10666) and proposes what followed: behind the longest suffix that occurred before, then behind shorter ones.
///
/// The probability of a token is that of an escape model as in PPM (Cleary & Witten 1984, doi:10.1109/TCOM.1984.1096090):
/// the share of the suffix's occurrences that it followed, times how often suffixes of that length, seen so often, had the next
/// token at all, times how often all longer ones had not. Those rates begin as a prior and are learnt from every token of
/// the session, drafted or not.
///
/// With a [`Memory`] it looks into the texts of earlier sessions too, with rates of their own: the longer suffix first, of equals
/// the text's own.
pub struct Lookup {
    text: Automaton,
    memory: Option<Recall>,
    /// Shortest and longest suffix looked up.
    min: usize,
    max: usize,
    /// Paths less likely than this are not proposed.
    floor: f32,
    rates: Rates,
}

/// What a text has to do with the memory.
struct Recall {
    memory: Arc<Memory>,
    /// Where the text's end stands in it, and the version for which that holds.
    at: Cursor,
    version: u64,
    /// Tokens of the text that it has.
    fed: usize,
}

impl Recall {
    fn find(&self, held: &Held, text: &[u32]) -> Cursor {
        if held.version() == self.version { self.at } else { held.find(text) }
    }
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
}

/// Where a path stands in the text itself and in the memory.
type Ends = [Cursor; 2];

impl Lookup {
    /// Looks up suffixes of `min` to `max` tokens.
    pub fn new(min: usize, max: usize) -> Self {
        let (min, max) = (min.max(1), max.max(1));
        Self { text: Automaton::default(), memory: None, min, max, floor: 0.02, rates: Rates::default() }
    }

    /// Looks into `memory` too, begins with the rates that the last text has taught, and adds its own text when that is over: what
    /// is new of it, and of long texts some before.
    pub fn with_memory(memory: Arc<Memory>) -> Self {
        let rates = memory.read().rates().clone();
        let recall = Recall { memory, at: Cursor::default(), version: 0, fed: 0 };
        Self { memory: Some(recall), rates, ..Self::default() }
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
        let memory = self.memory.as_ref().map(|r| r.memory.clone());
        let held = memory.as_ref().map(|m| m.read());
        let (mut at, mut taught) = (Cursor::default(), known);
        if let (Some(recall), Some(held)) = (&mut self.memory, &held) {
            if self.text.text().is_empty() {
                recall.fed = held.knows(tokens).max(recall.fed.min(known));
            } else {
                at = recall.find(held, self.text.text());
            }
            // What an earlier session has read teaches nothing: it is in the memory because of that.
            taught = known.max(recall.fed);
        }
        let inner = held.as_ref().map(|h| h.text());
        for (i, &token) in tokens.iter().enumerate().skip(self.text.text().len()) {
            if i >= taught {
                self.learn(inner, [self.suffix(), at], token);
            }
            self.text.push(token);
            at = inner.map_or(at, |m| m.within(m.advance(at, token), LONGEST));
        }
        if let (Some(recall), Some(held)) = (&mut self.memory, held) {
            (recall.at, recall.version) = (at, held.version());
            drop(held);
            if tokens.len() - recall.fed >= FED {
                self.feed();
            }
        }
    }

    /// Gives the memory what is new of the text.
    fn feed(&mut self) {
        if let Some(recall) = &mut self.memory {
            recall.memory.learn(self.text.text(), recall.fed, &self.rates);
            recall.fed = self.text.text().len();
        }
    }

    /// Grows `tree`, which holds node 0 alone, by the likeliest paths behind the text.
    pub fn grow(&self, budget: Budget, source: u8, tree: &mut DraftTree) {
        let held = self.memory.as_ref().map(|r| (r, r.memory.read()));
        let memory = held.as_ref().map(|(_, held)| held.text());
        let found = held.as_ref().map_or(Cursor::default(), |(recall, held)| recall.find(held, self.text.text()));
        let (mut open, mut made, mut node) = (BinaryHeap::new(), Reverse(0), 0);
        let mut ends: Vec<Ends> = vec![[self.suffix(), found]];
        while tree.len() <= budget.nodes {
            if (tree.depths()[node] as usize) < budget.depth {
                let least = self.floor / tree.scores()[node].exp();
                for (token, chance) in self.behind(memory, ends[node], budget.width, least) {
                    let (ln_q, score) = (chance.ln(), tree.scores()[node] + chance.ln());
                    if score >= self.floor.ln() {
                        open.push(Ranked(Offer { score, ln_q, parent: node as u32, token }, made));
                        made.0 += 1;
                    }
                }
            }
            let Some(Ranked(best, _)) = open.pop() else { break };
            let [own, far] = ends[best.parent as usize];
            let far = memory.map_or(far, |m| m.advance(far, best.token));
            ends.push([self.text.advance(own, best.token), far]);
            node = tree.push(best.parent, best.token, best.ln_q, source) as usize;
        }
    }

    /// The longest suffix, as far as asked for, that occurred before.
    fn suffix(&self) -> Cursor {
        self.text.within(self.text.suffix(), self.max)
    }

    /// The likeliest tokens behind a path, each with its probability; those below `least` may be missing.
    fn behind(&self, memory: Option<&Automaton>, ends: Ends, width: usize, least: f32) -> Vec<(u32, f32)> {
        let (mut found, mut escape) = (Vec::new(), 1.0);
        self.levels(memory, ends, |slot, level| {
            let total = level.iter().map(|c| c.count).sum::<u32>() as f32;
            let rate = self.rates.get(slot);
            found.extend(level.iter().map(|c| (*c, escape * rate * c.count as f32 / total)));
            escape *= 1.0 - rate;
            escape >= least
        });
        found.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.end.cmp(&a.0.end)));
        found.truncate(width);
        found.into_iter().map(|(c, chance)| (c.token, chance)).collect()
    }

    /// Learns from `token`, which comes next.
    fn learn(&mut self, memory: Option<&Automaton>, ends: Ends, token: u32) {
        let mut tried = Vec::new();
        self.levels(memory, ends, |slot, level| {
            let hit = level.iter().any(|c| c.token == token);
            tried.push((slot, hit));
            !hit
        });
        tried.into_iter().for_each(|(slot, hit)| self.rates.learn(slot, hit));
    }

    /// Shows `each` the continuations of ever shorter suffixes, those alone that no longer one had, until it says false: the
    /// rate that holds for them, and the continuations.
    fn levels(&self, memory: Option<&Automaton>, ends: Ends, mut each: impl FnMut(Slot, &[Continuation]) -> bool) {
        let texts = [&self.text, memory.unwrap_or(&self.text)];
        let (mut named, mut levels) = (Vec::new(), [0; 2]);
        let mut open = [Some(ends[0]), memory.map(|m| m.within(ends[1], self.max))];
        loop {
            for (at, n) in open.iter_mut().zip(levels) {
                *at = at.filter(|at| at.len >= self.min && n < LEVELS);
            }
            let place = usize::from(open[1].map(|at| at.len) > open[0].map(|at| at.len));
            let Some(at) = open[place] else { break };
            let all = texts[place].continuations(at).filter(is_token).take(MOST);
            let level: Vec<Continuation> = all.filter(|c| !named.contains(&c.token)).collect();
            if !level.is_empty() {
                let seen = level.iter().map(|c| c.count as usize).sum::<usize>().max(1);
                if !each(Rates::slot(place, at.len, seen), &level) {
                    break;
                }
                named.extend(level.iter().map(|c| c.token));
                levels[place] += 1;
            }
            open[place] = texts[place].shorter(at);
        }
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

    fn finish(&mut self, tokens: &[u32]) {
        if self.memory.is_some() {
            self.follow(tokens);
            self.feed();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::backend::naive::Naive;
    use crate::rng::Rng;

    #[test]
    fn the_memorys_matches_are_those_of_a_search() {
        let mut rng = Rng::new(8);
        let (mut longest, mut rebuilt) = (0, 0);
        for case in 0..40 {
            let alphabet = 1 + rng.below(4);
            let memory = Arc::new(Memory::new(80 + rng.below(300)));
            let mut lookup = Lookup::with_memory(memory.clone());
            let mut text = Vec::new();
            for _ in 0..60 {
                let mut new: Vec<u32> = (0..1 + rng.below(12)).map(|_| rng.below(alphabet) as u32).collect();
                let before = memory.len();
                match rng.below(6) {
                    0 => memory.add(&new),
                    1 => memory.add(&[&new[..], &text].concat()),
                    2 => text.truncate(rng.below(text.len() + 1)),
                    3 => <Lookup as Draft<Naive>>::finish(&mut lookup, &text),
                    _ => text.append(&mut new),
                }
                rebuilt += usize::from(memory.len() < before);
                if rng.below(3) > 0 {
                    lookup.follow(&text);
                }
                let (held, recall) = (memory.read(), lookup.memory.as_ref().unwrap());
                let (known, own) = (held.text().text(), lookup.text.text());
                let at = recall.find(&held, own);
                let found = |n: usize| n == 0 || known.windows(n).any(|w| w == &own[own.len() - n..]);
                let want = (0..=own.len().min(LONGEST)).rev().find(|n| found(*n)).unwrap();
                assert_eq!(at.len, want, "case {case}: {own:?} in {known:?}");
                let part = &own[own.len() - want..];
                let behind = known.windows(want + 1).filter(|w| w.starts_with(part)).map(|w| w[want]);
                let behind: BTreeSet<u32> = behind.filter(|t| *t != u32::MAX).collect();
                let named: BTreeSet<u32> = held.text().continuations(at).filter(is_token).map(|c| c.token).collect();
                assert_eq!(named, behind, "case {case}: behind {part:?} in {known:?}");
                longest = longest.max(want);
            }
        }
        assert!(longest == LONGEST && rebuilt > 20, "{longest}, {rebuilt}");
    }
}
