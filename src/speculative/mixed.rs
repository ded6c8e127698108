//! [`Mixed`]: two drafts, of which each step uses what promises more.

use super::{Budget, Draft, DraftTree, merge, prune};
use crate::backend::Backend;
use crate::decode::Session;
use crate::error::Result;

/// What the running rate of the second draft keeps of its past, step by step.
const KEEP: f64 = 0.9;
/// Steps without the second draft after which it is asked again, at first and, doubled each time in vain, at last.
const AGAIN: [u32; 2] = [64, 1024];

/// A draft that costs nothing, as [`super::Lookup`], and one that costs passes. Where the first promises as many tokens a second
/// as the second has been giving, it drafts alone; else the second is asked too, and both proposals become one tree.
///
/// Nodes have source 0 where the first draft proposed them, else 1, in the bits of [`DraftTree::DRAFT`].
pub struct Mixed<B: Backend> {
    drafts: [Box<dyn Draft<B>>; 2],
    /// What each proposed last; the second may not have been asked.
    trees: [DraftTree; 2],
    asked: bool,
    /// Steps since the second was asked, and after how many it is asked in any case.
    since: u32,
    again: u32,
    /// Seconds of the step in which it was: drafting, and the pass.
    time: f64,
    /// Running sums of such steps.
    gave: (f64, f64),
}

impl<B: Backend> Mixed<B> {
    /// `first` costs nothing and reads no layers of the target.
    pub fn new(first: Box<dyn Draft<B>>, second: Box<dyn Draft<B>>) -> Self {
        let trees = [DraftTree::new(0), DraftTree::new(0)];
        Self { drafts: [first, second], trees, asked: false, since: 0, again: AGAIN[0], time: 0.0, gave: (0.0, 0.0) }
    }

    fn ask(&mut self, i: usize, session: &Session<B>, budget: Budget, last: u32) -> Result<()> {
        self.trees[i].reset(last);
        self.drafts[i].propose(session, Budget { source: i as u8, ..budget }, &mut self.trees[i])?;
        self.trees[i].set_source(i as u8);
        Ok(())
    }
}

/// Both drafts named a node.
const AGREED: u8 = 0x10;
/// The other draft named other tokens in its place, and not this one.
const REFUSED: u8 = 0x20;

/// Both proposals as one tree. A token that both name is right far more often than either says, one that the other could have named and did
/// not far less: their sources say which it is, so that a plan learns how often.
fn joined(first: &DraftTree, second: &DraftTree) -> DraftTree {
    let (mut tree, by) = merge(&[first, second]);
    let mut named = vec![0; tree.len()];
    for i in 1..tree.len() {
        named[tree.parents()[i] as usize] |= by[i];
    }
    let source = |i: usize| match (tree.sources()[i], by[i], named[tree.parents()[i] as usize]) {
        (s, 3, _) => s | AGREED,
        (s, _, 3) => s | REFUSED,
        (s, ..) => s,
    };
    let sources = std::iter::once(0).chain((1..tree.len()).map(source)).collect();
    tree.set_sources(sources);
    tree
}

impl<B: Backend> Draft<B> for Mixed<B> {
    fn name(&self) -> &str {
        "mixed"
    }

    fn taps(&self) -> &[usize] {
        self.drafts[1].taps()
    }

    fn is_free(&self) -> bool {
        !self.asked || self.drafts[1].is_free()
    }

    fn propose(&mut self, session: &Session<B>, budget: Budget, tree: &mut DraftTree) -> Result<()> {
        let last = tree.tokens()[0];
        // Without a plan a step is a step.
        let cut = |tree: &DraftTree, spent: f64| match budget.plan {
            Some(plan) => plan.cut(tree, budget.nodes, spent),
            None => {
                let best = prune(tree, budget.nodes);
                let tokens = best.scores().iter().map(|s| f64::from(s.exp())).sum();
                (best, tokens)
            }
        };
        self.ask(0, session, budget, last)?;
        let (best, rate) = cut(&self.trees[0], 0.0);
        let (tokens, seconds) = self.gave;
        let better = seconds == 0.0 || rate < tokens / seconds;
        self.asked = better || self.since >= self.again;
        if !self.asked {
            self.since += 1;
            *tree = best;
            return Ok(());
        }
        self.again = if better { AGAIN[0] } else { AGAIN[1].min(2 * self.again) };
        self.since = 0;
        self.ask(1, session, budget, last)?;
        // Not by the clock: reading a long prompt says nothing about later steps.
        let spent = budget.plan.map_or(0.0, |p| p.passes(&self.trees[1], budget.width));
        *tree = cut(&joined(&self.trees[0], &self.trees[1]), spent).0;
        self.time = budget.plan.map_or(1.0, |p| spent + p.cost().pass.at(tree.len()));
        Ok(())
    }

    fn verdict(&mut self, tree: &DraftTree, path: &[u32], next: u32) {
        let stood: Vec<u32> = path[1..].iter().map(|&i| tree.tokens()[i as usize]).chain([next]).collect();
        for (draft, own) in self.drafts.iter_mut().zip(&self.trees).take(1 + usize::from(self.asked)) {
            let mut walked = vec![0];
            for token in &stood[..stood.len() - 1] {
                let at = walked[walked.len() - 1];
                let child = (1..own.len()).find(|&i| own.parents()[i] == at && own.tokens()[i] == *token);
                let Some(child) = child else { break };
                walked.push(child as u32);
            }
            draft.verdict(own, &walked, stood[walked.len() - 1]);
        }
        if self.asked {
            let (tokens, seconds) = self.gave;
            self.gave = (KEEP * tokens + path.len() as f64, KEEP * seconds + self.time);
        }
    }

    fn finish(&mut self, tokens: &[u32]) {
        self.drafts.iter_mut().for_each(|d| d.finish(tokens));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_say_what_the_other_draft_named() {
        let (mut a, mut b) = (DraftTree::new(7), DraftTree::new(7));
        let two = a.push(0, 2, -0.5, 0);
        a.push(two, 3, -0.1, 0);
        a.push(0, 4, -2.0, 0);
        let two = b.push(0, 2, -0.7, 1);
        b.push(two, 5, -0.3, 1);
        let nine = b.push(0, 9, -3.0, 1);
        b.push(nine, 1, -0.2, 1);
        let tree = joined(&a, &b);
        let of = |token: u32| tree.sources()[tree.tokens().iter().position(|t| *t == token).unwrap()];
        assert_eq!([2, 3, 4, 5, 9, 1].map(of), [AGREED, REFUSED, REFUSED, 1 | REFUSED, 1 | REFUSED, 1]);
    }
}
