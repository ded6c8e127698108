//! [`Visible`]: who sees whom in a pass without a cache.

use super::TreeMask;
use crate::error::{Result, ensure};

/// Which rows of a pass each row attends to, as ranges of row numbers: packing, windows, blocks and trees are all this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Visible {
    ends: Vec<u32>,
    ranges: Vec<[u32; 2]>,
}

impl Visible {
    /// No rows yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a row that sees these ranges of rows, `[first, one behind the last]`, ascending and apart.
    ///
    /// # Errors
    /// Ranges that are empty, overlap or descend; a row that sees nothing.
    pub fn push(&mut self, ranges: &[[u32; 2]]) -> Result<()> {
        let apart = ranges.windows(2).all(|w| w[0][1] <= w[1][0]);
        let real = ranges.iter().all(|r| r[0] < r[1]) && !ranges.is_empty();
        ensure!(apart && real, Shape, "row {} cannot see the ranges {ranges:?}", self.rows());
        self.ranges.extend_from_slice(ranges);
        self.ends.push(self.ranges.len() as u32);
        Ok(())
    }

    fn of(rows: impl Iterator<Item = [usize; 2]>) -> Self {
        let ranges: Vec<_> = rows.map(|[a, b]| [a as u32, b as u32]).collect();
        Self { ends: (1..=ranges.len() as u32).collect(), ranges }
    }

    fn each(lens: &[usize], range: impl Fn(usize, usize) -> [usize; 2]) -> Self {
        let starts = lens.iter().scan(0, |at, &n| Some((std::mem::replace(at, *at + n), n)));
        Self::of(starts.flat_map(|(at, n)| (0..n).map(move |i| (at, n, i))).map(|(at, n, i)| {
            let [a, b] = range(i, n);
            [at + a, at + b.min(n)]
        }))
    }

    /// Sequences of these lengths, one after another, whose rows see themselves and all before; [`Visible::windowed`] makes a window of it.
    pub fn causal(lens: &[usize]) -> Self {
        Self::each(lens, |i, _| [0, i + 1])
    }

    /// Sequences whose rows see all of their sequence.
    pub fn full(lens: &[usize]) -> Self {
        Self::each(lens, |_, n| [0, n])
    }

    /// Sequences cut into blocks of `block` rows: a row sees its own block and all before.
    pub fn blocks(lens: &[usize], block: usize) -> Self {
        Self::each(lens, |i, _| [0, (i / block.max(1) + 1) * block.max(1)])
    }

    /// The rows of a tree: each sees its ancestors and itself.
    pub fn tree(tree: &TreeMask) -> Self {
        let mut visible = Self::new();
        for i in 0..tree.len() {
            for j in (0..=i as u32).filter(|&j| tree.sees(i, j as usize)) {
                let first = visible.ends.last().map_or(0, |&e| e as usize);
                match visible.ranges[first..].last_mut() {
                    Some(r) if r[1] == j => r[1] += 1,
                    _ => visible.ranges.push([j, j + 1]),
                }
            }
            visible.ends.push(visible.ranges.len() as u32);
        }
        visible
    }

    /// The same without what lies `window` or more positions before a row.
    ///
    /// # Errors
    /// A row that then sees nothing.
    pub fn windowed(&self, positions: &[u32], window: usize) -> Result<Self> {
        let mut out = Self::new();
        let mut ranges: Vec<[u32; 2]> = Vec::new();
        for i in 0..self.rows() {
            ranges.clear();
            let near = |j: &u32| positions[*j as usize] as usize + window > positions[i] as usize;
            for j in self.row(i).iter().flat_map(|r| r[0]..r[1]).filter(near) {
                match ranges.last_mut() {
                    Some(r) if r[1] == j => r[1] += 1,
                    _ => ranges.push([j, j + 1]),
                }
            }
            out.push(&ranges)?;
        }
        Ok(out)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.ends.len()
    }

    /// What row `i` sees.
    pub fn row(&self, i: usize) -> &[[u32; 2]] {
        let first = if i == 0 { 0 } else { self.ends[i - 1] as usize };
        &self.ranges[first..self.ends[i] as usize]
    }

    /// All ranges, row after row, and how many there are up to and with each row.
    pub fn parts(&self) -> (&[[u32; 2]], &[u32]) {
        (&self.ranges, &self.ends)
    }

    /// Whether row `i` sees row `j`.
    pub fn sees(&self, i: usize, j: usize) -> bool {
        self.row(i).iter().any(|r| (r[0] as usize..r[1] as usize).contains(&j))
    }

    /// Pairs of a row and a row that it sees.
    pub fn pairs(&self) -> usize {
        self.ranges.iter().map(|r| (r[1] - r[0]) as usize).sum()
    }

    /// Whether it is a table for `rows` rows and looks at no others.
    ///
    /// # Errors
    /// If not.
    pub fn check(&self, rows: usize) -> Result<()> {
        let inside = self.ranges.iter().all(|r| r[1] as usize <= rows);
        ensure!(self.rows() == rows && inside, Shape, "rows seen by {} rows, in a pass of {rows}", self.rows());
        Ok(())
    }
}
