//! Attention over the cache: softmax by chunks of keys, merged in order.
//!
//! A query row sees keys at consecutive *positions*: those behind its window up to its own, be they committed, staged
//! before it, or its ancestors in a tree; in a block up to the block's end. Chunks, lanes and the order of every sum are counted by position, so a row's
//! result is the same bit for bit however its keys came into the cache, however many rows are in the pass and however
//! many threads share the work: decoding a tree of drafts equals decoding token by token.
//!
//! For each chunk of `CHUNK` positions a row has a maximum m, the sum l of e^(score - m) and the values weighted by the
//! same; chunks are folded from the first to the last as in online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867;
//! Dao et al. 2022, arXiv:2205.14135). Rows are worked on in groups that share the keys they read; where groups are few
//! and contexts long, a group's chunks are spread over tasks and folded at the end.
#![allow(unsafe_code)]

mod group;
#[cfg(test)]
mod tests;

use std::cell::Cell;

use super::Tier;
use super::kv::{CpuKv, Layer};
use super::lanes::tiles::Panel;
use super::lanes::{Element, Kernel, Simd, dispatch};
use super::pool::{Pool, Shards};
use crate::backend::{AttnSpec, Mask};
use crate::error::{Result, ensure};
use group::{Group, Scratch, State};

/// Positions whose softmax is computed at once. Results depend on it; they do not depend on the other constants.
const CHUNK: usize = 128;
/// Queries (rows times heads that share a key head) that a group aims at.
const GROUP: usize = 24;
/// Tasks for each thread, so that their ends meet.
const TASKS: usize = 4;
/// Multiply-adds below which a pass is not worth waking another thread: about five microseconds.
const SMALL: usize = 1 << 17;

/// One sequence's part in a pass: `rows` behind `past` committed and `staged` staged rows of its cache.
#[derive(Clone, Copy)]
pub struct SegView<'a> {
    /// Its cache, with the rows of the pass staged.
    pub kv: &'a CpuKv,
    /// Committed rows.
    pub past: usize,
    /// Rows that earlier passes staged.
    pub staged: usize,
    /// Rows of this pass.
    pub rows: usize,
    /// Who sees whom among all staged rows.
    pub mask: Mask<'a>,
}

impl SegView<'_> {
    /// One behind its last cache row.
    fn end(&self) -> usize {
        self.past + self.staged + self.rows
    }
}

/// Work for one thread: a group of rows of one segment, one key head, and some of the group's chunks.
struct Task {
    segment: usize,
    head: usize,
    /// The group's first row among all staged rows of its segment, and its rows.
    row: usize,
    rows: usize,
    /// The group's first row in the pass.
    at: usize,
    chunks: std::ops::Range<usize>,
    /// Where the chunks' results go in the workspace, if others work on the same group.
    partial: Option<usize>,
    /// Whether it is the first of its group.
    first: bool,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch::new()) };
}

/// y\[r, h\] = softmax_j(scale q\[r, h\].k\[j\]) v\[j\] over the rows j of its segment that r may see. `y` and `q` are
/// `[rows, heads * head_dim]`, the rows of the segments one after the other.
///
/// # Errors
/// Shapes that do not fit together, rows beyond a cache's capacity, a window of no keys.
pub fn attention(
    pool: &Pool,
    tier: Tier,
    y: &mut [f32],
    q: &[f32],
    segs: &[SegView<'_>],
    layer: usize,
    spec: &AttnSpec,
) -> Result<()> {
    check(y, q, segs, layer, spec)?;
    let (tasks, workspace) = plan(pool.threads(), segs, spec);
    let mut workspace = vec![0.0f32; workspace];
    let (y, parts) = (Shards::new(y), Shards::new(&mut workspace));
    let ctx = Context { tier, y: &y, q, segs, layer, spec };
    let work: usize = segs.iter().map(|s| s.rows * s.end()).sum::<usize>() * 2 * spec.q_dim();
    let run = |n: usize, f: &(dyn Fn(usize) + Sync)| {
        if work < SMALL { (0..n).for_each(f) } else { pool.run(n, f) }
    };
    run(tasks.len(), &|i| {
        let t = &tasks[i];
        // SAFETY: every task has its own part of the workspace.
        let part = t.partial.map(|at| unsafe { parts.slice(at, State::len(t.queries(spec), spec) * t.chunks.len()) });
        ctx.dispatch(t, Step::Chunks(part));
    });
    if workspace.is_empty() {
        return Ok(());
    }
    // The parts of a group's tasks follow one another in the workspace.
    let firsts: Vec<usize> = (0..tasks.len()).filter(|&i| tasks[i].first).collect();
    run(firsts.len(), &|i| {
        let t = &tasks[firsts[i]];
        let end = firsts.get(i + 1).map_or(workspace.len(), |&j| tasks[j].partial.unwrap_or(0));
        ctx.dispatch(t, Step::Fold(&workspace[t.partial.unwrap_or(0)..end]));
    });
    Ok(())
}

impl Task {
    fn queries(&self, spec: &AttnSpec) -> usize {
        self.rows * (spec.heads / spec.kv_heads)
    }
}

/// What a task is asked to do.
enum Step<'a> {
    /// Its chunks, either into a part of the workspace or, where they are all of the group's, to the end.
    Chunks(Option<&'a mut [f32]>),
    /// The rest, from the chunks' results in order.
    Fold(&'a [f32]),
}

/// What all tasks of a pass share.
#[derive(Clone, Copy)]
struct Context<'a> {
    tier: Tier,
    y: &'a Shards<'a, f32>,
    q: &'a [f32],
    segs: &'a [SegView<'a>],
    layer: usize,
    spec: &'a AttnSpec,
}

impl Context<'_> {
    fn dispatch(self, task: &Task, step: Step<'_>) {
        match self.segs[task.segment].kv.layer(self.layer) {
            Layer::F32(data) => dispatch(self.tier, Run { ctx: self, data, task, step }),
            Layer::F16(data) => dispatch(self.tier, Run { ctx: self, data, task, step }),
        }
    }
}

/// One task on a cache of one element type.
struct Run<'a, E> {
    ctx: Context<'a>,
    data: &'a [E],
    task: &'a Task,
    step: Step<'a>,
}

impl<E: Element> Kernel for Run<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (Context { spec, q, .. }, t) = (self.ctx, self.task);
        let seg = &self.ctx.segs[t.segment];
        let panel = Panel::new(self.data, spec.kv_dim(), t.head, spec.head_dim);
        let group = Group { seg, spec, head: t.head, row: t.row, rows: t.rows };
        let mut scratch = SCRATCH.take();
        let q = &q[t.at * spec.q_dim()..(t.at + t.rows) * spec.q_dim()];
        let state = match self.step {
            Step::Chunks(Some(part)) => {
                group.chunks(s, panel, q, t.chunks.clone(), &mut scratch, Some(part));
                None
            }
            Step::Chunks(None) => {
                group.chunks(s, panel, q, t.chunks.clone(), &mut scratch, None);
                Some(&scratch.state)
            }
            Step::Fold(parts) => {
                group.fold_all(s, parts, &mut scratch);
                Some(&scratch.state)
            }
        };
        if let Some(state) = state {
            for (i, from) in state.outputs(spec).enumerate() {
                let (row, head) = group.query(i);
                let at = (t.at + row) * spec.q_dim() + head * spec.head_dim;
                // SAFETY: each query's output is written by one task: that which ends its group.
                let y = unsafe { self.ctx.y.slice(at, spec.head_dim) };
                state.finish(s, i, from, y);
            }
        }
        SCRATCH.set(scratch);
    }
}

fn check(y: &[f32], q: &[f32], segs: &[SegView<'_>], layer: usize, spec: &AttnSpec) -> Result<()> {
    let (heads, kv_heads, dim) = (spec.heads, spec.kv_heads, spec.head_dim);
    ensure!(
        kv_heads > 0 && dim > 0 && heads > 0 && heads.is_multiple_of(kv_heads),
        Shape,
        "{heads} query heads cannot share {kv_heads} key heads of {dim} columns"
    );
    ensure!(spec.window != Some(0), Shape, "an attention window of 0 positions shows nothing");
    let n = segs.iter().map(|s| s.rows).sum::<usize>() * spec.q_dim();
    ensure!(
        q.len() == n && y.len() == n,
        Shape,
        "queries and outputs of the segments are {n} values, not {} and {}",
        q.len(),
        y.len()
    );
    for s in segs {
        let cap = s.kv.capacity();
        ensure!(layer < s.kv.layers(), Shape, "layer {layer} of a cache of {} layers", s.kv.layers());
        ensure!(
            s.kv.kv_dim() == spec.kv_dim(),
            Shape,
            "keys of {} columns in a cache of {}",
            spec.kv_dim(),
            s.kv.kv_dim()
        );
        let staged = s.staged + s.rows;
        ensure!(
            s.past <= cap && staged <= cap - s.past,
            Capacity,
            "{staged} rows behind row {} of a cache of {cap} rows",
            s.past
        );
        s.mask.check(staged)?;
    }
    Ok(())
}

/// The tasks of a pass and the length of the workspace they need.
fn plan(threads: usize, segs: &[SegView<'_>], spec: &AttnSpec) -> (Vec<Task>, usize) {
    let rows = (GROUP / (spec.heads / spec.kv_heads)).max(1);
    let groups: usize = segs.iter().map(|s| s.rows.div_ceil(rows)).sum::<usize>() * spec.kv_heads;
    let wanted = if threads == 1 || groups >= TASKS * threads { 1 } else { (TASKS * threads).div_ceil(groups.max(1)) };
    let (mut tasks, mut workspace) = (Vec::with_capacity(groups), 0);
    // Parts are for all groups or for none: the fold relies on it.
    let longest = segs.iter().map(|s| s.end().div_ceil(CHUNK)).max().unwrap_or(0);
    let split = wanted > 1 && longest > 1;
    let mut first = 0;
    for (segment, s) in segs.iter().enumerate() {
        // The last rows see most: they come first, so that the threads end together.
        for i in (0..s.rows).step_by(rows).rev() {
            for head in 0..spec.kv_heads {
                let (at, row) = (first + i, s.staged + i);
                let group = Group { seg: s, spec, head, row, rows: rows.min(s.rows - i) };
                let all = group.chunk_range();
                let each = if split { all.len().div_ceil(wanted).max(1) } else { all.len() };
                for start in all.clone().step_by(each) {
                    let chunks = start..all.end.min(start + each);
                    let partial = split.then_some(workspace);
                    let task =
                        Task { segment, head, row, rows: group.rows, at, first: start == all.start, chunks, partial };
                    if split {
                        workspace += State::len(task.queries(spec), spec) * task.chunks.len();
                    }
                    tasks.push(task);
                }
            }
        }
        first += s.rows;
    }
    (tasks, workspace)
}
