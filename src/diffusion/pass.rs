//! What a schedule and a model tell one another: a pass, and the tokens that came of it.

use std::ops::Range;

/// One pass over some positions of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Rows of the cache that the pass attends to; all behind them are forgotten.
    pub past: usize,
    /// Positions that are computed, in the order in which their keys would join the cache.
    pub spans: Vec<Range<usize>>,
    /// How many of them, from the first on, join the cache.
    pub keep: usize,
    /// Rows of the pass whose logits are wanted, one for each candidate, ascending but for rows that serve two.
    pub wanted: Vec<u32>,
    /// Number of the pass, from 1 on.
    pub number: u64,
}

impl Pass {
    /// Over one span behind `past` rows of the cache, nothing of it kept.
    pub fn over(past: usize, span: Range<usize>) -> Self {
        Self { past, spans: std::iter::once(span).collect(), ..Self::default() }
    }

    /// Positions computed.
    pub fn rows(&self) -> usize {
        self.spans.iter().map(Range::len).sum()
    }

    /// The position that row `row` of the pass computes.
    pub fn position(&self, row: u32) -> usize {
        let mut row = row as usize;
        for s in &self.spans {
            if row < s.len() {
                return s.start + row;
            }
            row -= s.len();
        }
        usize::MAX
    }

    /// Which row of the pass computes `position`.
    pub(super) fn row(&self, position: usize) -> Option<u32> {
        let mut at = 0;
        for s in &self.spans {
            if s.contains(&position) {
                return Some((at + position - s.start) as u32);
            }
            at += s.len();
        }
        None
    }
}

/// A position that became a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// In the whole text, prompt included.
    pub position: usize,
    /// The token.
    pub token: u32,
}

/// Counts of one text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Forward passes (NFE), of whatever length. In the published decoder's mode its own count, which may be one higher.
    pub passes: u64,
    /// Positions that they computed.
    pub positions: u64,
    /// Rows that went through the vocabulary matrix.
    pub logits: u64,
    /// Passes that computed the cached prefix again.
    pub refreshes: u64,
}
