//! The specification: every op as the shortest correct f64 loop. For tiny models and for tests of the other backends.

mod curvature;
mod encoder;
mod sampling;
mod train;

pub use encoder::normal_cdf;

use super::host::HostBuf;
use super::sampling::{check_forbidden, check_penalties, width};
use super::{
    Accepted, AttnSpec, Backend, Candidates, Draw, Group, Masked, NO_TOKEN, Penalty, Ranks, Rule, Segment, Train,
    Trees, WeightInfo, Write, unmask,
};
use crate::dtype::Elem;
use crate::error::Result;
use crate::model::config::Activation;
use crate::tensor::HostTensor;

/// The f64 backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Naive;

/// A matrix widened to f64.
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f64>,
}

impl WeightInfo for Matrix {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn bytes(&self) -> usize {
        size_of_val(&self.data[..])
    }
}

/// Keys and values, `[layer][row][kv_dim]`.
pub struct Kv {
    dim: usize,
    layers: Vec<[Vec<f64>; 2]>,
}

impl Kv {
    fn row(&self, layer: usize, side: usize, row: usize, head: usize, head_dim: usize) -> &[f64] {
        &self.layers[layer][side][row * self.dim + head * head_dim..][..head_dim]
    }
}

/// x / (1 + e^-x), or GELU in its tanh form.
pub fn activate(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
    }
}

fn rms(x: &[f64], eps: f32) -> f64 {
    (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps as f64).sqrt()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Backend for Naive {
    type Act = f64;
    type Acc = f64;
    type Buf<T: Elem> = HostBuf<T>;
    type Weight = Matrix;
    type Kv = Kv;

    fn alloc<T: Elem>(&self, n: usize) -> Result<HostBuf<T>> {
        Ok(HostBuf::zeros(n))
    }

    fn upload<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        dst.copy_from_slice(src);
        Ok(())
    }

    fn download<T: Elem>(&self, src: &[T], dst: &mut [T]) -> Result<()> {
        dst.copy_from_slice(src);
        Ok(())
    }

    fn upload_acc(&self, dst: &mut [f64], src: &[f32]) -> Result<()> {
        dst.iter_mut().zip(src).for_each(|(d, &s)| *d = s as f64);
        Ok(())
    }

    fn download_acc(&self, src: &[f64], dst: &mut [f32]) -> Result<()> {
        dst.iter_mut().zip(src).for_each(|(d, &s)| *d = s as f32);
        Ok(())
    }

    fn weight(&self, t: HostTensor) -> Result<Matrix> {
        let data = t.to_f32().into_iter().map(f64::from).collect();
        t.data.release();
        Ok(Matrix { rows: t.rows, cols: t.cols, data })
    }

    fn embed(&self, y: &mut [f64], table: &Matrix, tokens: &[u32], scale: f32) -> Result<()> {
        for (y, &t) in y.chunks_exact_mut(table.cols).zip(tokens) {
            for (y, w) in y.iter_mut().zip(&table.data[t as usize * table.cols..]) {
                *y = w * scale as f64;
            }
        }
        Ok(())
    }

    fn gather_rows(&self, y: &mut [f64], x: &[f64], rows: &[u32], d: usize) -> Result<()> {
        for (y, &r) in y.chunks_exact_mut(d).zip(rows) {
            y.copy_from_slice(&x[r as usize * d..][..d]);
        }
        Ok(())
    }

    fn add(&self, x: &mut [f64], r: &[f64]) -> Result<()> {
        x.iter_mut().zip(r).for_each(|(x, r)| *x += r);
        Ok(())
    }

    fn operand(&self, y: &mut [f64], x: &[f64]) -> Result<()> {
        y.copy_from_slice(x);
        Ok(())
    }

    fn add_activated(&self, x: &mut [f64], r: &[f64], act: Activation) -> Result<()> {
        x.iter_mut().zip(r).for_each(|(x, r)| *x += activate(act, *r));
        Ok(())
    }

    fn rms_norm(&self, y: &mut [f64], x: &[f64], w: &HostBuf<f64>, eps: f32) -> Result<()> {
        for (y, x) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())) {
            let d = rms(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w.iter()) {
                *y = x * w / d;
            }
        }
        Ok(())
    }

    fn add_normed(&self, x: &mut [f64], r: &[f64], w: &HostBuf<f64>, eps: f32) -> Result<()> {
        let mut y = vec![0.0; r.len()];
        self.rms_norm(&mut y, r, w, eps)?;
        self.add(x, &y)
    }

    fn head_norm(&self, x: &mut [f64], w: &HostBuf<f64>, eps: f32) -> Result<()> {
        let copy = x.to_vec();
        self.rms_norm(x, &copy, w, eps)
    }

    fn linear(&self, y: &mut [f64], x: &[f64], w: &Matrix, bias: Option<&HostBuf<f64>>) -> Result<()> {
        self.linear_fwd(y, x, w, bias, Write::Set)
    }

    fn glu(&self, y: &mut [f64], gate: &[f64], up: &[f64], act: Activation) -> Result<()> {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = activate(act, *g) * u;
        }
        Ok(())
    }

    fn shrink_rows(&self, h: &mut [f64], x: &[f64], ranks: usize, groups: &[Group<'_, Self>]) -> Result<()> {
        self.lora_shrink(h, x, ranks, groups)
    }

    fn expand_rows(&self, y: &mut [f64], h: &[f64], part: Ranks, groups: &[Group<'_, Self>]) -> Result<()> {
        self.lora_expand(y, h, part, groups)
    }

    fn rope(&self, x: &mut [f64], table: &[f64], head_dim: usize) -> Result<()> {
        let (rows, half) = (table.len() / head_dim, head_dim / 2);
        let width = x.len() / rows.max(1);
        for (x, t) in x.chunks_exact_mut(width.max(1)).zip(table.chunks_exact(head_dim)) {
            for head in x.chunks_exact_mut(head_dim) {
                for i in 0..half {
                    let (a, b, cos, sin) = (head[i], head[i + half], t[i], t[i + half]);
                    (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
        Ok(())
    }

    fn kv_alloc(&self, layers: usize, capacity: usize, kv_dim: usize) -> Result<Kv> {
        let side = || vec![f64::NAN; capacity * kv_dim];
        Ok(Kv { dim: kv_dim, layers: (0..layers).map(|_| [side(), side()]).collect() })
    }

    fn kv_stage(&self, segments: &mut [Segment<'_, Self>], layer: usize, k: &[f64], v: &[f64]) -> Result<()> {
        let mut at = 0;
        for s in segments {
            let (first, n) = (s.range().start * s.kv.dim, s.rows * s.kv.dim);
            for (side, x) in [k, v].into_iter().enumerate() {
                s.kv.layers[layer][side][first..][..n].copy_from_slice(&x[at..at + n]);
            }
            at += n;
        }
        Ok(())
    }

    fn kv_commit(&self, kv: &mut Kv, past: usize, rows: &[u32]) -> Result<()> {
        let d = kv.dim;
        for side in kv.layers.iter_mut().flatten() {
            for (i, &r) in rows.iter().enumerate() {
                let from = (past + r as usize) * d;
                side.copy_within(from..from + d, (past + i) * d);
            }
        }
        Ok(())
    }

    fn kv_copy(&self, dst: &mut Kv, src: &Kv, len: usize) -> Result<()> {
        let n = len * src.dim;
        for (d, s) in dst.layers.iter_mut().flatten().zip(src.layers.iter().flatten()) {
            d[..n].copy_from_slice(&s[..n]);
        }
        Ok(())
    }

    fn attention(
        &self,
        y: &mut [f64],
        q: &[f64],
        segments: &[Segment<'_, Self>],
        layer: usize,
        spec: &AttnSpec,
    ) -> Result<()> {
        let d = spec.head_dim;
        let mut at = 0;
        for s in segments {
            for i in 0..s.rows {
                let row = s.staged + i;
                let pos = s.mask.position(s.past, row);
                let in_window = |key: usize| spec.window.is_none_or(|w| key + w > pos);
                let visible: Vec<usize> = (0..s.past)
                    .filter(|&j| in_window(j))
                    .chain(
                        (0..s.staged + s.rows)
                            .filter(|&j| s.mask.sees(row, j) && in_window(s.mask.position(s.past, j)))
                            .map(|j| s.past + j),
                    )
                    .collect();
                for h in 0..spec.heads {
                    let kv_head = h * spec.kv_heads / spec.heads;
                    let q = &q[(at + i) * spec.q_dim() + h * d..][..d];
                    let score: Vec<f64> = visible
                        .iter()
                        .map(|&j| spec.scale as f64 * dot(q, s.kv.row(layer, 0, j, kv_head, d)))
                        .collect();
                    let max = score.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let p: Vec<f64> = score.iter().map(|x| (x - max).exp()).collect();
                    let sum: f64 = p.iter().sum();
                    let y = &mut y[(at + i) * spec.q_dim() + h * d..][..d];
                    y.fill(0.0);
                    for (p, &j) in p.iter().zip(&visible) {
                        for (y, v) in y.iter_mut().zip(s.kv.row(layer, 1, j, kv_head, d)) {
                            *y += p / sum * v;
                        }
                    }
                }
            }
            at += s.rows;
        }
        Ok(())
    }

    fn logits_stats(&self, stats: &mut [f64], argmax: &mut [u32], logits: &[f64], vocab: usize) -> Result<()> {
        for ((x, s), best) in logits.chunks_exact(vocab).zip(stats.chunks_exact_mut(3)).zip(argmax) {
            let (three, id) = sampling::stats(x);
            s.copy_from_slice(&three);
            *best = id;
        }
        Ok(())
    }

    fn top_k(&self, values: &mut [f64], ids: &mut [u32], logits: &[f64], vocab: usize, k: usize) -> Result<()> {
        for ((x, v), ids) in logits.chunks_exact(vocab).zip(values.chunks_exact_mut(k)).zip(ids.chunks_exact_mut(k)) {
            ids.copy_from_slice(&sampling::order(x)[..k]);
            v.iter_mut().zip(ids).for_each(|(v, id)| *v = x[*id as usize]);
        }
        Ok(())
    }

    fn penalize(&self, logits: &mut [f64], vocab: usize, penalties: &[Penalty]) -> Result<()> {
        check_penalties(penalties, logits.len(), vocab)?;
        for &Penalty { row, token, factor } in penalties {
            let x = &mut logits[row as usize * vocab + token as usize];
            *x = if *x > 0.0 { *x / f64::from(factor) } else { *x * f64::from(factor) };
        }
        Ok(())
    }

    fn forbid(&self, logits: &mut [f64], vocab: usize, tokens: &[u32]) -> Result<()> {
        check_forbidden(tokens, vocab)?;
        for x in logits.chunks_exact_mut(vocab) {
            tokens.iter().for_each(|t| x[*t as usize] = f64::NEG_INFINITY);
        }
        Ok(())
    }

    fn sample(&self, tokens: &mut [u32], logits: &[f64], draws: &[Draw]) -> Result<()> {
        if draws.is_empty() {
            return Ok(());
        }
        let (vocab, n) = (width("sample", logits.len(), draws.len())?, width("sample", tokens.len(), draws.len())?);
        for ((x, tokens), draw) in logits.chunks_exact(vocab).zip(tokens.chunks_exact_mut(n)).zip(draws) {
            let mut p = sampling::law(x, draw).unwrap_or_default();
            for (i, token) in (0..).zip(tokens) {
                *token = sampling::invert(&p, draw.key.at(i).uniform());
                if *token != NO_TOKEN {
                    p[*token as usize] = 0.0;
                }
            }
        }
        Ok(())
    }

    fn distribution(&self, p: &mut [f64], logits: &[f64], draws: &[Draw]) -> Result<()> {
        if draws.is_empty() {
            return Ok(());
        }
        let vocab = width("distribution", logits.len(), draws.len())?;
        for ((x, p), draw) in logits.chunks_exact(vocab).zip(p.chunks_exact_mut(vocab)).zip(draws) {
            p.copy_from_slice(&sampling::law(x, draw).unwrap_or_else(|| vec![0.0; vocab]));
        }
        Ok(())
    }

    fn unmask(
        &self,
        tokens: &mut [u32],
        taken: &mut [u32],
        rows: Candidates<'_, Self>,
        texts: &[Masked<'_>],
        eos: &[u32],
    ) -> Result<()> {
        unmask::on_host(tokens, taken, [rows.picks, rows.argmax], rows.stats, texts, eos)
    }

    fn verify_tree(&self, to: Accepted<'_, Self>, trees: &Trees<'_>, rule: Rule<'_, Self>) -> Result<()> {
        let Accepted { path, counts, next } = to;
        trees.check(counts.len())?;
        if counts.is_empty() {
            return Ok(());
        }
        let stride = width("verify_tree", path.len(), counts.len())?;
        let mut vocab = 0;
        if let Rule::Reject { p, q, drafts, keys, order, .. } = &rule {
            vocab = width("verify_tree", p.len(), trees.tokens.len())?;
            trees.check_reject(drafts, keys, q.len() / vocab, vocab, *order)?;
        }
        for (s, (tree, path)) in trees.iter().zip(path.chunks_exact_mut(stride)).enumerate() {
            (counts[s], next[s]) = match &rule {
                Rule::Match(picks) => tree.walk(picks, path),
                Rule::Reject { p, q, drafts, keys, replacement, order } => {
                    let row = |of: &[f64], i: usize| of[i * vocab..][..vocab].to_vec();
                    let open = |node: usize, r| {
                        let at = tree.first + node;
                        let drafted = tree.has_children(node).then(|| row(q, drafts[at] as usize));
                        sampling::Rest { p: row(p, at), q: drafted.unwrap_or_default(), r }
                    };
                    tree.reject(*replacement, *order, keys[s], open, path)
                }
            };
        }
        Ok(())
    }
}
