//! Any operation on any backend with seeded inputs.

mod cached;

use std::time::Instant;

use super::cost::{Sizes, cost};
use super::decoding::{Decoding, normalize};
use super::inputs::{Storage, from_elems, matrix, normals, to_elems};
use super::ops::{Op, Verify};
use super::timing;
use crate::backend::{Backend, Buffer, Group, In, Linear, Mask, TreeMask, WeightInfo};
use crate::error::Result;
use crate::perf::Cost;
use crate::rng::Rng;
use cached::{mask, segments};

const EPS: f32 = 1e-5;
/// Layers of a cache where nothing asks for more: the operation works on the second, to catch one that ignores it.
const LAYERS: usize = 2;

/// How inputs are made.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Of the inputs: equal seeds, equal inputs on every backend.
    pub seed: u64,
    /// What activations are rounded to beforehand.
    pub act: Storage,
    /// What keys and values are rounded to beforehand.
    pub kv: Storage,
    /// What the queries of attention are rounded to beforehand.
    pub q: Storage,
    /// Bytes of weights (or of cached rows) to rotate over from call to call, so that each call finds its own cold in
    /// the caches, as in a model that is larger than they are. 0: one copy.
    pub working_set: usize,
    /// Bytes in which the backend keeps one cached key or value, for [`Prepared::cost`].
    pub kv_bytes: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self { seed: 0, act: Storage::F32, kv: Storage::F32, q: Storage::F32, working_set: 0, kv_bytes: 4 }
    }
}

/// What an operation wrote.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Results in numbers, widened to f64, each by itself.
    pub values: Vec<Vec<f64>>,
    /// All tokens and nodes.
    pub ids: Vec<u32>,
}

/// An operation with its inputs on a backend.
pub struct Prepared<'b, B: Backend> {
    be: &'b B,
    op: Op,
    /// In the order in which [`acc_inputs`] lists them.
    acc: Vec<B::Buf<B::Acc>>,
    act: Vec<B::Buf<B::Act>>,
    /// Copies of the operation's matrices.
    weights: Vec<Vec<Linear<B>>>,
    /// Copies of what its groups of rows have.
    adapters: Vec<Vec<B::Buf<B::Acc>>>,
    ids: Vec<u32>,
    decoding: Decoding,
    /// What [`Decoding::new`] lists.
    id_buffers: Vec<B::Buf<u32>>,
    kv: Vec<B::Kv>,
    spare: Vec<B::Kv>,
    tree: Vec<TreeMask>,
    copies: usize,
    turn: usize,
    sizes: Sizes,
}

/// Elements of each accumulator buffer; 0-filled where `false`, random where `true`, a rotation table where the operation
/// wants one.
fn acc_inputs(op: &Op) -> Vec<(usize, bool)> {
    match *op {
        Op::Embed { d, rows, .. } => vec![(rows * d, false)],
        Op::GatherRows { from, rows, d } => vec![(rows * d, false), (from * d, true)],
        Op::Add { rows, d } | Op::AddActivated { rows, d, .. } => vec![(rows * d, true), (rows * d, true)],
        Op::Operand { rows, d } => vec![(rows * d, true)],
        Op::RmsNorm { rows, d } => vec![(rows * d, true), (d, true)],
        Op::AddRmsNorm { rows, d } | Op::AddNormed { rows, d } => vec![(rows * d, true), (d, true), (rows * d, true)],
        Op::HeadNorm { rows, heads, head_dim } => vec![(rows * heads * head_dim, true), (head_dim, true)],
        Op::Linear { rows, output, .. } => vec![(rows * output, false)],
        Op::Qkv { rows, q, kv, .. } => vec![(rows * q, false), (rows * kv, false), (rows * kv, false)],
        Op::Glu { rows, d, .. } => vec![(rows * d, true), (rows * d, true)],
        Op::LinearGlu { rows, output, .. } => vec![(2 * rows * output, false)],
        Op::Rope { rows, heads, head_dim } => vec![(rows * heads * head_dim, true), (rows * head_dim, true)],
        Op::LogitsStats { rows, vocab } => vec![(rows * vocab, true), (rows * 3, false)],
        Op::TopK { rows, vocab, k } => vec![(rows * vocab, true), (rows * k, false)],
        Op::Sample { rows, vocab, .. } => vec![(rows * vocab, true)],
        Op::Distribution { rows, vocab, .. } => vec![(rows * vocab, true), (rows * vocab, false)],
        Op::Penalize { rows, vocab, .. } | Op::Forbid { rows, vocab, .. } => vec![(rows * vocab, true)],
        Op::Unmask { sequences, rows, .. } => vec![(3 * sequences * rows, true)],
        Op::VerifyTree { by: Verify::Match, .. } => vec![(1, true); 2],
        Op::VerifyTree { sequences, nodes, vocab, .. } => vec![(sequences * nodes * vocab, true); 2],
        Op::ShrinkRows { groups, ranks, .. } => vec![(groups.iter().sum::<usize>() * ranks, false)],
        Op::ExpandRows { groups, output, part } => {
            let rows: usize = groups.iter().sum();
            vec![(rows * output, true), (rows * part.stride, true)]
        }
        Op::RopeStage(a)
        | Op::KvStage(a)
        | Op::KvCommit(a)
        | Op::KvCommitBatch(a)
        | Op::KvCopy(a)
        | Op::Attention(a) => {
            let rows = a.rows();
            let kv = rows * a.spec.kv_dim();
            vec![(rows * a.spec.q_dim(), true), (kv, true), (kv, true), (rows * a.spec.head_dim, true)]
        }
    }
}

/// Elements of each operand buffer, whether it is random, and the width of its rows.
fn act_inputs(op: &Op) -> Vec<(usize, bool, usize)> {
    match *op {
        Op::Operand { rows, d } | Op::RmsNorm { rows, d } | Op::AddRmsNorm { rows, d } | Op::Glu { rows, d, .. } => {
            vec![(rows * d, false, d)]
        }
        Op::Linear { rows, input, .. } | Op::Qkv { rows, input, .. } => vec![(rows * input, true, input)],
        Op::LinearGlu { rows, input, output, .. } => {
            vec![(rows * input, true, input), (rows * output, false, output)]
        }
        Op::ShrinkRows { groups, input, .. } => vec![(groups.iter().sum::<usize>() * input, true, input)],
        _ => op.attn().map(|a| (a.rows() * a.spec.q_dim(), false, a.spec.q_dim())).into_iter().collect(),
    }
}

/// (outputs, has a bias) of each matrix, and their inputs.
fn matrices(op: &Op) -> (Vec<(usize, bool)>, usize) {
    match *op {
        Op::Embed { vocab, d, .. } => (vec![(vocab, false)], d),
        Op::Linear { input, output, bias, .. } => (vec![(output, bias)], input),
        Op::Qkv { input, q, kv, bias, .. } => (vec![(q, bias), (kv, bias), (kv, bias)], input),
        Op::LinearGlu { input, output, .. } => (vec![(output, false), (output, false)], input),
        _ => (Vec::new(), 0),
    }
}

/// Groups that have a matrix of an adapter, and its elements.
fn adapter(op: &Op) -> (usize, usize) {
    match *op {
        Op::ShrinkRows { groups, input, ranks } => (groups.len(), ranks * input),
        Op::ExpandRows { groups, output, part } => (groups.len(), output * part.n),
        _ => (0, 0),
    }
}

/// cos and sin of random angles, in the layout of [`Backend::rope`].
fn rotations(rng: &mut Rng, n: usize, head_dim: usize) -> Vec<f32> {
    let mut t = vec![0.0; n];
    for row in t.chunks_exact_mut(head_dim) {
        let (cos, sin) = row.split_at_mut(head_dim / 2);
        for (c, s) in cos.iter_mut().zip(sin) {
            let angle = rng.uniform() * std::f32::consts::TAU;
            (*c, *s) = (angle.cos(), angle.sin());
        }
    }
    t
}

fn upload_acc<B: Backend>(be: &B, values: &[f32]) -> Result<B::Buf<B::Acc>> {
    let mut buf = be.alloc::<B::Acc>(values.len())?;
    be.upload_acc(buf.head_mut(values.len()), values)?;
    Ok(buf)
}

impl<'b, B: Backend> Prepared<'b, B> {
    /// Makes the inputs and brings them to the device.
    ///
    /// # Errors
    /// Those of the backend: no memory, a type it does not do.
    pub fn new(be: &'b B, op: Op, setup: Setup) -> Result<Self> {
        let mut rng = Rng::new(setup.seed);
        let rotated = match op {
            Op::Rope { head_dim, .. } => Some((1, head_dim)),
            Op::RopeStage(a) => Some((3, a.spec.head_dim)),
            _ => None,
        };
        let mut acc = Vec::new();
        let mut drafted_from = Vec::new();
        for (i, (n, random)) in acc_inputs(&op).into_iter().enumerate() {
            let mut values = match rotated {
                Some((at, head_dim)) if at == i => rotations(&mut rng, n, head_dim),
                _ if random => normals(&mut rng, n),
                _ => vec![0.0; n],
            };
            if op.attn().is_some() && (1..3).contains(&i) {
                setup.kv.round(&mut values, 1);
            }
            if op.attn().is_some() && i == 0 {
                setup.q.round(&mut values, 1);
            }
            if let Op::VerifyTree { vocab, by: Verify::Reject { .. }, .. } = op {
                normalize(&mut values, vocab);
            }
            acc.push(upload_acc(be, &values)?);
            if matches!(op, Op::VerifyTree { .. }) {
                drafted_from = values;
            }
        }
        let mut act = Vec::new();
        for (n, random, width) in act_inputs(&op) {
            let mut values = if random { normals(&mut rng, n) } else { vec![0.0; n] };
            setup.act.round(&mut values, width);
            let mut buf = be.alloc::<B::Act>(n)?;
            be.upload(buf.head_mut(n), &to_elems::<B::Act>(&values))?;
            act.push(buf);
        }
        let ids = match op {
            Op::Embed { vocab: most, rows, .. } | Op::GatherRows { from: most, rows, .. } => {
                (0..rows).map(|_| rng.below(most) as u32).collect()
            }
            _ => Vec::new(),
        };
        let (decoding, host) = Decoding::new(&op, &mut rng, &drafted_from);
        let mut id_buffers = Vec::new();
        for values in host {
            let mut buf = be.alloc::<u32>(values.len())?;
            be.upload(buf.head_mut(values.len()), &values)?;
            id_buffers.push(buf);
        }

        let (shapes, input) = matrices(&op);
        let mut sources = Vec::new();
        for (output, bias) in shapes {
            let w = matrix(&mut rng, op.dtype().unwrap_or(crate::dtype::DType::F32), output, input)?;
            sources.push((w, bias.then(|| normals(&mut rng, output))));
        }
        let (groups, elements) = adapter(&op);
        let lora: Vec<Vec<f32>> = (0..groups).map(|_| normals(&mut rng, elements)).collect();
        let lora_bytes = groups * elements * size_of::<B::Acc>();
        let kv_row = op.attn().map_or(0, |a| 2 * a.spec.kv_dim() * setup.kv_bytes);
        let kv_rows: usize = op.attn().map_or(0, |a| a.segments.iter().map(|s| s.0 + a.staged + s.1).sum());
        let one = sources.iter().map(|(w, _)| w.data.len()).sum::<usize>() + lora_bytes + kv_row * kv_rows;
        // An embedding is read by rows, and a cache is committed while its rows are warm: copies would change nothing.
        let rotate =
            one > 0 && !matches!(op, Op::Embed { .. } | Op::KvCommit(_) | Op::KvCommitBatch(_) | Op::KvCopy(_));
        let copies = if rotate { setup.working_set.div_ceil(one).clamp(1, 4096) } else { 1 };
        let mut weights = Vec::new();
        for _ in 0..if sources.is_empty() { 0 } else { copies } {
            let set = sources.iter().map(|(w, bias)| {
                let bias = bias.as_ref().map(|b| upload_acc(be, b)).transpose()?;
                Ok(Linear { w: be.weight(w.clone())?, bias })
            });
            weights.push(set.collect::<Result<Vec<_>>>()?);
        }
        let mut adapters = Vec::new();
        for _ in 0..copies {
            adapters.push(lora.iter().map(|m| upload_acc(be, m)).collect::<Result<_>>()?);
        }
        let sizes = Sizes { act: size_of::<B::Act>(), acc: size_of::<B::Acc>(), kv: setup.kv_bytes };
        let mut p = Self {
            be,
            op,
            acc,
            act,
            weights,
            adapters,
            ids,
            decoding,
            id_buffers,
            kv: Vec::new(),
            spare: Vec::new(),
            tree: Vec::new(),
            copies,
            turn: 0,
            sizes,
        };
        if let Some(a) = op.attn() {
            p.fill_caches(a, &mut rng, setup.kv)?;
        }
        Ok(p)
    }

    /// The operation's cost where activations and weights are stored as on this backend.
    pub fn cost(&self) -> Cost {
        let weights = self.weights.first().map_or(0, |set| set.iter().map(|l| l.w.bytes()).sum());
        let masks: Vec<Mask<'_>> = match self.op.attn() {
            Some(a) => self.tree.iter().map(|t| mask(a.mask, t)).collect(),
            None => Vec::new(),
        };
        let all = matches!(self.op, Op::KvCommit(_) | Op::KvCommitBatch(_) | Op::KvCopy(_));
        let layers = if all { LAYERS } else { 1 };
        let one = cost(&self.op, weights, self.sizes, &masks);
        Cost { bytes: one.bytes * layers as f64, flops: one.flops * layers as f64 }
    }

    /// Whether each call finds its weights or cached rows outside the caches.
    pub fn is_cold(&self) -> bool {
        self.copies > 1
    }

    /// Runs it once, on the next copy of its weights.
    ///
    /// # Errors
    /// The backend's.
    pub fn run(&mut self) -> Result<()> {
        self.step(false)
    }

    /// Runs the composition that a fused operation stands for; any other operation as [`Prepared::run`].
    ///
    /// # Errors
    /// The backend's.
    pub fn run_composed(&mut self) -> Result<()> {
        self.step(true)
    }

    fn step(&mut self, composed: bool) -> Result<()> {
        let turn = self.turn % self.copies;
        self.turn += 1;
        if let Some(a) = self.op.attn().copied() {
            return self.step_cached(&a, if self.copies > 1 { turn } else { 1 }, composed);
        }
        let Self { be, acc, act, weights, adapters, ids, decoding, id_buffers, .. } = self;
        let w: &[Linear<B>] = weights.get(turn).map_or(&[], |w| w);
        let all = |b: &B::Buf<B::Acc>| b.len();
        match (self.op, &mut acc[..], &mut act[..]) {
            (Op::Embed { rows, d, .. }, [y], _) => be.embed(y.head_mut(rows * d), &w[0].w, ids, 1.5),
            (Op::GatherRows { rows, d, .. }, [y, x], _) => be.gather_rows(y.head_mut(rows * d), x.head(all(x)), ids, d),
            (Op::Add { .. }, [x, r], _) => be.add(x.head_mut(r.len()), r.head(r.len())),
            (Op::AddActivated { act, .. }, [x, r], _) => be.add_activated(x.head_mut(r.len()), r.head(r.len()), act),
            (Op::Operand { .. }, [x], [y]) => be.operand(y.head_mut(x.len()), x.head(x.len())),
            (Op::RmsNorm { rows, d }, [x, w], [y]) => be.rms_norm(y.head_mut(rows * d), x.head(rows * d), w, EPS),
            (Op::AddRmsNorm { rows, d }, [x, w, r], [y]) => {
                let n = rows * d;
                if composed {
                    be.add(x.head_mut(n), r.head(n))?;
                    return be.rms_norm(y.head_mut(n), x.head(n), w, EPS);
                }
                be.add_rms_norm(y.head_mut(n), x, r.head(n), w, rows, EPS)
            }
            (Op::AddNormed { rows, d }, [x, w, r], _) => be.add_normed(x.head_mut(rows * d), r.head(rows * d), w, EPS),
            (Op::HeadNorm { .. }, [x, w], _) => {
                let n = x.len();
                be.head_norm(x.head_mut(n), w, EPS)
            }
            (Op::Linear { rows, input, output, .. }, [y], [x]) => {
                be.linear(y.head_mut(rows * output), x.head(rows * input), &w[0].w, w[0].bias.as_ref())
            }
            (Op::Qkv { rows, input, q: nq, kv, .. }, [q, k, v], [x]) => {
                let x = x.head(rows * input);
                let (q, k, v) = (q.head_mut(rows * nq), k.head_mut(rows * kv), v.head_mut(rows * kv));
                if composed {
                    be.linear(q, x, &w[0].w, w[0].bias.as_ref())?;
                    be.linear(k, x, &w[1].w, w[1].bias.as_ref())?;
                    return be.linear(v, x, &w[2].w, w[2].bias.as_ref());
                }
                be.qkv(q, k, v, x, [&w[0], &w[1], &w[2]])
            }
            (Op::Glu { rows, d, act }, [gate, up], [y]) => {
                be.glu(y.head_mut(rows * d), gate.head(rows * d), up.head(rows * d), act)
            }
            (Op::LinearGlu { rows, input, output, act, .. }, [scratch], [x, y]) => {
                let (x, n) = (x.head(rows * input), rows * output);
                if composed {
                    be.linear(scratch.view_mut(0..n), x, &w[0].w, None)?;
                    be.linear(scratch.view_mut(n..2 * n), x, &w[1].w, None)?;
                    return be.glu(y.head_mut(n), scratch.view(0..n), scratch.view(n..2 * n), act);
                }
                be.linear_glu(y.head_mut(n), x, &w[0].w, &w[1].w, act, scratch, rows)
            }
            (Op::Rope { head_dim, .. }, [x, table], _) => {
                let n = x.len();
                be.rope(x.head_mut(n), table.head(table.len()), head_dim)
            }
            (Op::ShrinkRows { groups: g, ranks, .. }, [h], [x]) => {
                let n = h.len();
                be.shrink_rows(h.head_mut(n), x.head(x.len()), ranks, &groups(g, &adapters[turn]))
            }
            (Op::ExpandRows { groups: g, part, .. }, [y, h], _) => {
                let n = y.len();
                be.expand_rows(y.head_mut(n), h.head(h.len()), part, &groups(g, &adapters[turn]))
            }
            (op, ..) => decoding.step(*be, &op, acc, id_buffers),
        }
    }

    /// What it wrote since the inputs were made. Of operations that write a cache, attention over its second layer; of a path,
    /// the part that was found.
    ///
    /// # Errors
    /// The backend's.
    pub fn output(&mut self) -> Result<Output> {
        let (acc, act, ids): (&[usize], &[usize], &[usize]) = match self.op {
            Op::Operand { .. } | Op::RmsNorm { .. } | Op::Glu { .. } => (&[], &[0], &[]),
            Op::LinearGlu { .. } => (&[], &[1], &[]),
            Op::AddRmsNorm { .. } => (&[0], &[0], &[]),
            Op::Qkv { .. } => (&[0, 1, 2], &[], &[]),
            Op::RopeStage(_) => (&[0], &[0], &[]),
            Op::KvStage(_) | Op::KvCommit(_) | Op::KvCommitBatch(_) | Op::KvCopy(_) | Op::Attention(_) => {
                (&[], &[0], &[])
            }
            Op::LogitsStats { .. } | Op::TopK { .. } => (&[1], &[], &[0]),
            Op::Distribution { .. } => (&[1], &[], &[]),
            Op::Sample { .. } => (&[], &[], &[0]),
            Op::Unmask { .. } => (&[], &[], &[0, 1]),
            Op::VerifyTree { .. } => (&[], &[], &[0, 1, 2]),
            _ => (&[0], &[], &[]),
        };
        if let (Op::RopeStage(a) | Op::KvStage(a) | Op::KvCommit(a) | Op::KvCommitBatch(a) | Op::KvCopy(a), be) =
            (self.op, self.be)
        {
            let kv = if matches!(self.op, Op::KvCopy(_)) { &mut self.spare } else { &mut self.kv };
            let s = segments(&a, kv, &self.tree);
            let n = self.acc[0].len();
            be.attention(self.act[0].head_mut(n), self.acc[0].head(n), &s, 1, &a.spec)?;
        }
        let mut out = Output::default();
        for &i in acc {
            let values = download::<B, B::Acc>(self.be, self.acc[i].head(self.acc[i].len()), self.acc[i].len())?;
            out.values.push(from_elems(&values));
        }
        for &i in act {
            let values = download::<B, B::Act>(self.be, self.act[i].head(self.act[i].len()), self.act[i].len())?;
            out.values.push(from_elems(&values));
        }
        for &i in ids {
            let ids = &self.id_buffers[i];
            out.ids.extend(download::<B, u32>(self.be, ids.head(ids.len()), ids.len())?);
        }
        if let Op::VerifyTree { sequences, .. } = self.op {
            let (path, found) = out.ids.split_at(out.ids.len() - 2 * sequences);
            let paths = path.chunks(path.len() / sequences).zip(found);
            out.ids = paths.flat_map(|(p, n)| &p[..*n as usize]).chain(found).copied().collect();
        }
        Ok(out)
    }

    /// Seconds of one call, from `samples` batches that each last `batch_s` seconds or a call, whichever is longer.
    ///
    /// # Errors
    /// The backend's.
    pub fn time(&mut self, samples: usize, batch_s: f64) -> Result<Vec<f64>> {
        timing::time(samples, batch_s, self.copies, |calls| self.batch(calls))
    }

    /// Mean seconds of `calls` calls in a row.
    ///
    /// # Errors
    /// The backend's.
    pub fn batch(&mut self, calls: usize) -> Result<f64> {
        self.wait()?;
        let start = Instant::now();
        for _ in 0..calls {
            self.run()?;
        }
        self.wait()?;
        Ok(start.elapsed().as_secs_f64() / calls as f64)
    }

    /// A download waits for what was queued.
    fn wait(&self) -> Result<()> {
        self.be.download_acc(self.acc[0].head(1), &mut [0.0])
    }
}

/// So many rows each, with these matrices.
fn groups<'a, B: Backend>(rows: &[usize], matrices: &'a [B::Buf<B::Acc>]) -> Vec<Group<'a, B>> {
    let each = rows.iter().zip(matrices).enumerate();
    each.map(|(i, (&rows, m))| Group { rows, matrix: m.head(m.len()), scale: 0.5 + i as f32 / 4.0 }).collect()
}

fn download<B: Backend, T: crate::dtype::Elem>(be: &B, from: In<'_, B, T>, n: usize) -> Result<Vec<T>> {
    let mut host = vec![T::default(); n];
    be.download(from, &mut host)?;
    Ok(host)
}
