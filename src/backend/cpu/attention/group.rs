//! Attention of a group: some rows of a segment and the query heads that share one key head.

use std::ops::Range;

use super::super::lanes::math::{exp, exp1};
use super::super::lanes::tiles::{BLOCK, Panel, TILE, scores, weigh};
use super::super::lanes::{Element, Simd};
use super::{CHUNK, SegView};
use crate::backend::{AttnSpec, Mask, TreeMask};

/// Distance between two queries' scores: not a power of two, which would crowd them into few sets of the cache.
const STRIDE: usize = CHUNK + BLOCK;
/// Blocks of keys, and columns of values, that stay in the first-level cache while all queries pass over them.
const KEY_STEP: usize = 4;
const COLUMN_STEP: usize = 64;

/// The queries, row by row and then head by head, that are computed together.
pub struct Group<'a> {
    pub seg: &'a SegView<'a>,
    pub spec: &'a AttnSpec,
    /// Key head.
    pub head: usize,
    /// First row, among all staged rows of its segment.
    pub row: usize,
    pub rows: usize,
}

/// Maximum, sum and weighted values of some queries, over one chunk or several.
pub struct State {
    max: Vec<f32>,
    sum: Vec<f32>,
    acc: Vec<f32>,
}

/// Buffers of one thread, kept from task to task.
pub struct Scratch {
    q: Vec<f32>,
    /// Scores of a chunk, then its weights: `[queries, STRIDE]`.
    p: Vec<f32>,
    /// Scores of all staged rows of a tree: `[queries, blocks of staged rows]`.
    tree: Vec<f32>,
    /// For each row of the group and each depth, the ancestor there, as a cache row.
    path: Vec<u32>,
    /// Positions that each row sees, and those of them in the current chunk.
    seen: Vec<Range<usize>>,
    here: Vec<Range<usize>>,
    spans: Vec<Span>,
    chunk: State,
    pub state: State,
}

/// Queries of one tile that all see `len` positions from `position` on, which are the cache rows from `row` on.
struct Span {
    queries: Range<usize>,
    row: usize,
    position: usize,
    len: usize,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    pub const fn new() -> Self {
        Self {
            q: Vec::new(),
            p: Vec::new(),
            tree: Vec::new(),
            path: Vec::new(),
            seen: Vec::new(),
            here: Vec::new(),
            spans: Vec::new(),
            chunk: State::new(),
            state: State::new(),
        }
    }
}

impl State {
    const fn new() -> Self {
        Self { max: Vec::new(), sum: Vec::new(), acc: Vec::new() }
    }

    /// Columns of the weighted values: the head's, padded to whole blocks.
    fn width(spec: &AttnSpec) -> usize {
        spec.head_dim.next_multiple_of(BLOCK)
    }

    /// Floats that one chunk's state of `queries` queries takes in the workspace.
    pub fn len(queries: usize, spec: &AttnSpec) -> usize {
        queries * (Self::width(spec) + 2)
    }

    fn reset(&mut self, queries: usize, width: usize) {
        for (v, x, n) in [(&mut self.max, f32::NEG_INFINITY, queries), (&mut self.sum, 0.0, queries)] {
            v.clear();
            v.resize(n, x);
        }
        self.acc.clear();
        self.acc.resize(queries * width, 0.0);
    }

    /// Weighted values of the queries.
    pub fn outputs(&self, spec: &AttnSpec) -> impl Iterator<Item = &[f32]> {
        self.acc.chunks_exact(Self::width(spec))
    }

    /// y = acc / sum of query `i`.
    #[inline(always)]
    pub fn finish<S: Simd>(&self, s: S, i: usize, acc: &[f32], y: &mut [f32]) {
        let inv = s.splat(1.0 / self.sum[i]);
        for (y, a) in y.chunks_mut(S::N).zip(acc.chunks_exact(S::N)) {
            s.store_part(s.mul(s.load(a), inv), y);
        }
    }

    /// Takes in the state of the next chunk. What has seen nothing there stays as it is.
    #[inline(always)]
    fn fold<S: Simd>(&mut self, s: S, max: &[f32], sum: &[f32], acc: &[f32]) {
        let width = acc.len() / max.len().max(1);
        for i in 0..max.len() {
            if sum[i] == 0.0 {
                continue;
            }
            let m = if max[i] > self.max[i] { max[i] } else { self.max[i] };
            let (old, new) = (exp1(s, self.max[i] - m), exp1(s, max[i] - m));
            self.max[i] = m;
            self.sum[i] = self.sum[i] * old + sum[i] * new;
            let (old, new, r) = (s.splat(old), s.splat(new), i * width..(i + 1) * width);
            for (to, from) in self.acc[r.clone()].chunks_exact_mut(S::N).zip(acc[r].chunks_exact(S::N)) {
                let x = s.fma(s.load(from), new, s.mul(s.load(to), old));
                s.store(x, to);
            }
        }
    }
}

impl<'a> Group<'a> {
    fn shared_heads(&self) -> usize {
        self.spec.heads / self.spec.kv_heads
    }

    fn queries(&self) -> usize {
        self.rows * self.shared_heads()
    }

    /// Row (in the group) and head of query `i`.
    pub fn query(&self, i: usize) -> (usize, usize) {
        let g = self.shared_heads();
        (i / g, self.head * g + i % g)
    }

    /// Positions that staged row `i` sees.
    fn seen(&self, i: usize) -> Range<usize> {
        let SegView { past, staged, rows, mask, .. } = *self.seg;
        let p = mask.position(past, i);
        let end = if matches!(mask, Mask::Tree(_)) { p + 1 } else { past + mask.end(i, staged + rows) };
        self.spec.window.map_or(0, |w| (p + 1).saturating_sub(w))..end
    }

    /// Chunks in which the group sees anything.
    pub fn chunk_range(&self) -> Range<usize> {
        let seen = (self.row..self.row + self.rows).map(|i| self.seen(i));
        let r = seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0);
        r.start / CHUNK..r.end.div_ceil(CHUNK)
    }

    /// Attention over `chunks`: each chunk's state into its place of `parts`, or all of them folded into `x.state`. `q` is
    /// that of the group's rows.
    #[inline(always)]
    pub fn chunks<S: Simd, E: Element>(
        &self,
        s: S,
        panel: Panel<'_, E>,
        q: &[f32],
        chunks: Range<usize>,
        x: &mut Scratch,
        mut parts: Option<&mut [f32]>,
    ) {
        let (n, width) = (self.queries(), State::width(self.spec));
        self.pack(q, &mut x.q);
        x.p.resize(n * STRIDE, 0.0);
        x.seen.clear();
        x.seen.extend((self.row..self.row + self.rows).map(|i| self.seen(i)));
        x.state.reset(n, width);
        let tree = match self.seg.mask {
            Mask::Tree(t) if chunks.end * CHUNK > self.seg.past => Some(t),
            _ => None,
        };
        if let Some(t) = tree {
            self.tree_scores(s, panel, t, x);
        }
        for (i, chunk) in chunks.enumerate() {
            let base = chunk * CHUNK;
            x.here.clear();
            x.here.extend(x.seen.iter().map(|r| {
                let start = r.start.max(base);
                start..r.end.min(base + CHUNK).max(start)
            }));
            x.chunk.reset(n, width);
            self.score(s, panel, base, x);
            if tree.is_some() {
                self.pick_tree_scores(base, x);
            }
            self.softmax(s, base, x);
            self.weigh(s, panel, base, x);
            let Scratch { chunk: c, state, .. } = x;
            match &mut parts {
                None => state.fold(s, &c.max, &c.sum, &c.acc),
                Some(parts) => {
                    let (max, rest) = parts[i * n * (width + 2)..].split_at_mut(n);
                    let (sum, rest) = rest.split_at_mut(n);
                    max.copy_from_slice(&c.max);
                    sum.copy_from_slice(&c.sum);
                    rest[..n * width].copy_from_slice(&c.acc);
                }
            }
        }
    }

    /// Folds the chunks' states, in order, into `x.state`.
    #[inline(always)]
    pub fn fold_all<S: Simd>(&self, s: S, parts: &[f32], x: &mut Scratch) {
        let n = self.queries();
        x.state.reset(n, State::width(self.spec));
        for part in parts.chunks_exact(State::len(n, self.spec)) {
            x.state.fold(s, &part[..n], &part[n..2 * n], &part[2 * n..]);
        }
    }

    /// Tiles of queries: their range, and that of their rows within the group.
    fn tiles(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<> {
        let (n, g) = (self.queries(), self.shared_heads());
        (0..n).step_by(TILE).map(move |i| {
            let end = n.min(i + TILE);
            (i..end, i / g..(end - 1) / g + 1)
        })
    }

    /// Queries times the scale, tile after tile as `[head_dim, queries of the tile]`.
    fn pack(&self, q: &[f32], to: &mut Vec<f32>) {
        let (dim, q_dim) = (self.spec.head_dim, self.spec.q_dim());
        to.resize(self.queries() * dim, 0.0);
        for (tile, _) in self.tiles() {
            let (m, to) = (tile.len(), &mut to[tile.start * dim..tile.end * dim]);
            for (lane, i) in tile.enumerate() {
                let (row, head) = self.query(i);
                let from = &q[row * q_dim + head * dim..][..dim];
                for (to, from) in to[lane..].iter_mut().step_by(m).zip(from) {
                    *to = from * self.spec.scale;
                }
            }
        }
    }

    /// Scores of the chunk's keys whose position is their cache row: all but the staged rows of a tree.
    #[inline(always)]
    fn score<S: Simd, E: Element>(&self, s: S, panel: Panel<'_, E>, base: usize, x: &mut Scratch) {
        let limit = if matches!(self.seg.mask, Mask::Tree(_)) { self.seg.past } else { usize::MAX };
        let dim = self.spec.head_dim;
        for step in (base / BLOCK..(base + CHUNK) / BLOCK).step_by(KEY_STEP) {
            for (tile, rows) in self.tiles() {
                let (lo, hi) = hull(&x.here[rows]);
                let (from, to) = (step.max(lo / BLOCK), (step + KEY_STEP).min(hi.min(limit).div_ceil(BLOCK)));
                if from < to && lo < hi {
                    let out = &mut x.p[tile.start * STRIDE + from * BLOCK - base..];
                    scores(s, panel, from..to, &x.q[tile.start * dim..tile.end * dim], tile.len(), out, STRIDE);
                }
            }
        }
    }

    /// Scores of a tree's staged rows, and the path to each row of the group.
    #[inline(always)]
    fn tree_scores<S: Simd, E: Element>(&self, s: S, panel: Panel<'_, E>, tree: &TreeMask, x: &mut Scratch) {
        let (past, dim, end) = (self.seg.past, self.spec.head_dim, self.row + self.rows);
        let first = past / BLOCK;
        let blocks = (past + end).div_ceil(BLOCK) - first;
        x.tree.resize(self.queries() * blocks * BLOCK, 0.0);
        for step in (0..blocks).step_by(KEY_STEP) {
            for (tile, _) in self.tiles() {
                let b = first + step..first + blocks.min(step + KEY_STEP);
                let out = &mut x.tree[(tile.start * blocks + step) * BLOCK..];
                scores(s, panel, b, &x.q[tile.start * dim..tile.end * dim], tile.len(), out, blocks * BLOCK);
            }
        }
        x.path.clear();
        x.path.resize(self.rows * end, 0);
        for (i, path) in x.path.chunks_exact_mut(end).enumerate() {
            let mut row = (self.row + i) as u32;
            while row != TreeMask::ROOT {
                path[tree.depth(row as usize) as usize] = row;
                row = tree.parent(row as usize);
            }
        }
    }

    /// Brings the scores of each row's ancestors to their positions.
    fn pick_tree_scores(&self, base: usize, x: &mut Scratch) {
        let (past, g, end) = (self.seg.past, self.shared_heads(), self.row + self.rows);
        let width = x.tree.len() / self.queries();
        for (i, p) in x.p.chunks_exact_mut(STRIDE).enumerate() {
            let (here, path) = (&x.here[i / g], &x.path[i / g * end..]);
            for position in here.start.max(past)..here.end {
                p[position - base] = x.tree[i * width + past % BLOCK + path[position - past] as usize];
            }
        }
    }

    /// Scores to weights e^(score - max), with their maxima and sums.
    #[inline(always)]
    fn softmax<S: Simd>(&self, s: S, base: usize, x: &mut Scratch) {
        let g = self.shared_heads();
        for (i, p) in x.p.chunks_exact_mut(STRIDE).enumerate() {
            let here = &x.here[i / g];
            if here.is_empty() {
                continue;
            }
            // Whole blocks, with what is not seen at -inf: it leaves the maximum and adds an exact 0 to its lane's sum.
            let (a, b) = (here.start - base, here.end - base);
            let (from, to) = (a / BLOCK * BLOCK, b.next_multiple_of(BLOCK));
            p[from..a].fill(f32::NEG_INFINITY);
            p[b..to].fill(f32::NEG_INFINITY);
            let p = &mut p[from..to];
            let mut max = s.splat(f32::NEG_INFINITY);
            for p in p.chunks_exact(S::N) {
                max = s.max(s.load(p), max);
            }
            let max = s.greatest(max);
            let (vmax, mut sum) = (s.splat(max), s.splat(0.0));
            for p in p.chunks_exact_mut(S::N) {
                let e = exp(s, s.sub(s.load(p), vmax));
                s.store(e, p);
                sum = s.add(sum, e);
            }
            x.chunk.max[i] = max;
            x.chunk.sum[i] = s.sum(sum);
        }
    }

    /// The chunk's values times the weights.
    #[inline(always)]
    fn weigh<S: Simd, E: Element>(&self, s: S, panel: Panel<'_, E>, base: usize, x: &mut Scratch) {
        let width = State::width(self.spec);
        self.plan_spans(x);
        for column in (0..width).step_by(COLUMN_STEP) {
            let columns = column..width.min(column + COLUMN_STEP);
            for Span { queries, row, position, len } in &x.spans {
                let p = &x.p[queries.start * STRIDE + position - base..];
                let acc = &mut x.chunk.acc[queries.start * width..];
                weigh(s, panel, *row..row + len, columns.clone(), p, STRIDE, queries.len(), acc, width);
            }
        }
    }

    /// Each row's sums run over its positions in order: first those that it does not share with all rows of its tile,
    /// then the shared ones, then again its own. What a row does not see is left out rather than weighted by 0, so that
    /// not even a sign of zero depends on it.
    fn plan_spans(&self, x: &mut Scratch) {
        let (g, past, path_len) = (self.shared_heads(), self.seg.past, self.row + self.rows);
        // From here on a position's cache row is found by the path.
        let limit = if matches!(self.seg.mask, Mask::Tree(_)) { past } else { usize::MAX };
        let Scratch { here, path, spans, .. } = x;
        spans.clear();
        for (tile, rows) in self.tiles() {
            let start = here[rows.clone()].iter().map(|r| r.start).max().unwrap_or(0);
            let end = here[rows.clone()].iter().map(|r| r.end).min().unwrap_or(0).min(limit);
            // Where nothing is shared, all is each row's own and before the shared part.
            let (start, end) = if start < end { (start, end) } else { (usize::MAX, usize::MAX) };
            for before in [true, false] {
                for r in rows.clone() {
                    let Range { start: from, end: to } = here[r];
                    let (from, to) = if before { (from, to.min(start)) } else { (from.max(end), to) };
                    let queries = tile.start.max(r * g)..tile.end.min((r + 1) * g);
                    let plain = to.min(limit);
                    if from < plain {
                        spans.push(Span { queries: queries.clone(), row: from, position: from, len: plain - from });
                    }
                    spans.extend((from.max(limit)..to).map(|position| {
                        let row = past + path[r * path_len + position - past] as usize;
                        Span { queries: queries.clone(), row, position, len: 1 }
                    }));
                }
                if before && start < end {
                    spans.push(Span { queries: tile.clone(), row: start, position: start, len: end - start });
                }
            }
        }
    }
}

/// The least range of positions that holds all that `rows` see.
fn hull(rows: &[Range<usize>]) -> (usize, usize) {
    let seen = rows.iter().filter(|r| !r.is_empty());
    seen.fold((usize::MAX, 0), |(lo, hi), r| (lo.min(r.start), hi.max(r.end)))
}
