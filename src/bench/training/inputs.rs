//! Seeded inputs of every operation. What depends on other inputs is computed from them in f64.

use super::ops::{Loss, SelfAttn, TrainOp};
use crate::backend::naive::Naive;
use crate::backend::{Train, Update};
use crate::bench::decoding::normalize;
use crate::bench::inputs::{Storage, matrix, normals};
use crate::error::Result;
use crate::rng::Rng;
use crate::tensor::HostTensor;

/// How inputs are made.
#[derive(Clone, Copy, Debug)]
pub struct TrainSetup {
    /// Of the inputs: equal seeds, equal inputs on every backend.
    pub seed: u64,
    /// What activations are rounded to beforehand.
    pub act: Storage,
    /// What both operands of products with matrices are rounded to beforehand.
    pub linear: Storage,
    /// The same of products with adapters.
    pub lora: Storage,
    /// The same of queries, keys, values and their cotangents in attention.
    pub attention: Storage,
    /// Bytes of inputs to rotate over from call to call, so that each call finds its own cold in the caches. 0: one copy.
    pub working_set: usize,
}

impl Default for TrainSetup {
    fn default() -> Self {
        let f32 = Storage::F32;
        Self { seed: 0, act: f32, linear: f32, lora: f32, attention: f32, working_set: 0 }
    }
}

/// Inputs on the host. Results come first among the buffers, filled with what must not shine through (or is added to).
#[derive(Default)]
pub(super) struct Inputs {
    pub acc: Vec<Vec<f32>>,
    pub act: Vec<Vec<f32>>,
    pub matrix: Option<HostTensor>,
    /// Tokens, rows or labels.
    pub ids: Vec<u32>,
    /// Probabilities of tokens.
    pub p: Vec<f32>,
    /// Of rows.
    pub weights: Vec<f32>,
}

/// Elements of the buffers of sums and of those of activations, with the types in which an operation may look at them.
type Buffers = (Vec<(usize, Storage)>, Vec<(usize, Storage)>);

fn buffers(op: &TrainOp, s: &TrainSetup) -> Buffers {
    use TrainOp::*;
    let plain = |sizes: &[usize]| sizes.iter().map(|&n| (n, Storage::F32)).collect::<Vec<_>>();
    // A result, and operands.
    let product = |y: usize, to: Storage, operands: &[usize]| {
        let mut all = plain(&[y]);
        all.extend(operands.iter().map(|&n| (n, to)));
        all
    };
    let total = |groups: &[usize]| groups.iter().sum::<usize>();
    let adapters = |y: usize, operands: &[usize], groups: &[usize], each: usize| {
        let mut all = product(y, s.lora, operands);
        all.extend(groups.iter().map(|_| (each, s.lora)));
        all
    };
    match *op {
        SetWeight { input, output } => {
            (product(PROBES * output, s.linear, &[output * input]), vec![(PROBES * input, s.linear)])
        }
        Copy { n } | Axpy { n } => (plain(&[n, n]), vec![]),
        Zero { n } | SqNorm { n } => (plain(&[n]), vec![]),
        LinearFwd { rows, input, output, .. } => (plain(&[rows * output, output]), vec![(rows * input, s.linear)]),
        LinearBwdX { rows, input, output, .. } => (product(rows * input, s.linear, &[rows * output]), vec![]),
        LinearLoraFwd { rows, input, output, part, .. } => {
            (product(rows * output, s.lora, &[rows * part.stride, output * part.n]), vec![(rows * input, s.linear)])
        }
        LinearsBwdX { rows, input, output, linears, ranks, .. } => {
            let mut all = product(rows * input, s.lora, &[rows * ranks, ranks * input]);
            all.extend((0..linears).map(|_| (rows * output, s.linear)));
            (all, vec![])
        }
        LinearBwdW { rows, input, output } => {
            (product(output * input, s.linear, &[rows * output]), vec![(rows * input, s.linear)])
        }
        ColumnSums { rows, d } => (plain(&[d, rows * d]), vec![]),
        RmsNormBwd { rows, d, .. } => (plain(&[rows * d, d, rows * d, rows * d, d]), vec![]),
        GluBwd { rows, d, .. } => (plain(&[rows * d; 5]), vec![]),
        MulRows { m, n, b } => (plain(&[b * m, m * n, b * n]), vec![]),
        SubtractOuter { n, b } => (plain(&[n * n, b * n]), vec![]),
        MeanRows { means, each, d } => (plain(&[means * d, means * each * d]), vec![]),
        LayerNorm { rows, d } => (plain(&[rows * d, d, d]), vec![(rows * d, Storage::F32)]),
        LayerNormBwd { rows, d, .. } | AddScaledBwd { rows, d, .. } => {
            (plain(&[rows * d, d, rows * d, rows * d, d]), vec![])
        }
        Gelu { n } => (plain(&[n]), vec![(n, Storage::F32)]),
        GeluBwd { n } => (plain(&[n, n, n]), vec![]),
        AddScaled { rows, d } => (plain(&[rows * d, rows * d, d]), vec![]),
        Attend(a) => {
            let (q, kv) = (a.rows() * a.spec.q_dim(), a.rows() * a.spec.kv_dim());
            (product(a.rows() * a.spec.heads, s.attention, &[q, kv, kv]), vec![(q, Storage::F32)])
        }
        AttendBwd(a) => {
            let (q, kv) = (a.rows() * a.spec.q_dim(), a.rows() * a.spec.kv_dim());
            let mut all = plain(&[q, kv, kv]);
            all.push((q, s.attention));
            all.extend(product(a.rows() * a.spec.heads, s.attention, &[q, kv, kv]));
            (all, vec![(q, Storage::F32)])
        }
        ScatterRows { into, rows, d } => (plain(&[into * d, rows * d]), vec![]),
        EmbedBwd { vocab, rows, d } => (plain(&[vocab * d, rows * d]), vec![]),
        LoraShrink { groups, input, ranks } => {
            let n = total(groups);
            (adapters(n * ranks, &[], groups, ranks * input), vec![(n * input, s.lora)])
        }
        LoraExpand { groups, output, part } => {
            let n = total(groups);
            (adapters(n * output, &[n * part.stride], groups, output * part.n), vec![])
        }
        LoraExpandBwd { groups, output, part } => {
            let n = total(groups);
            (adapters(n * part.stride, &[n * output], groups, output * part.n), vec![])
        }
        LoraShrinkBwd { groups, input, ranks } => {
            let n = total(groups);
            (adapters(n * input, &[n * ranks], groups, ranks * input), vec![])
        }
        LoraBwdB { rows, output, part } => {
            (product(output * part.n, s.lora, &[rows * output, rows * part.stride]), vec![])
        }
        LoraBwdA { rows, input, ranks } => {
            (product(ranks * input, s.lora, &[rows * ranks]), vec![(rows * input, s.lora)])
        }
        LossRows { rows, vocab, .. } => (plain(&[rows, rows * vocab, rows * vocab]), vec![]),
        SoftmaxRows { rows, vocab } => (plain(&[rows * vocab]), vec![]),
        SmoothL1 { rows, d } => (plain(&[rows, rows * d, rows * d, rows * d]), vec![]),
        Optimize { n, rule } => (plain(&vec![n; 3 + rule.update.states()]), vec![]),
    }
}

/// Rows of activations that look at a matrix which was set.
const PROBES: usize = 3;

impl Inputs {
    pub fn new(op: &TrainOp, setup: &TrainSetup) -> Result<Self> {
        let mut rng = Rng::new(setup.seed);
        let (acc, act) = buffers(op, setup);
        let mut i = Self {
            acc: acc.iter().map(|&(n, _)| normals(&mut rng, n)).collect(),
            act: act.iter().map(|&(n, _)| normals(&mut rng, n)).collect(),
            ..Self::default()
        };
        match *op {
            TrainOp::LinearFwd { dtype, input, output, .. }
            | TrainOp::LinearBwdX { dtype, input, output, .. }
            | TrainOp::LinearLoraFwd { dtype, input, output, .. }
            | TrainOp::LinearsBwdX { dtype, input, output, .. } => {
                let mut w = matrix(&mut rng, dtype, output, input)?;
                if setup.linear != Storage::F32 {
                    let mut values = w.to_f32();
                    setup.linear.round(&mut values, input);
                    w = HostTensor::from_f32(output, input, &values)?;
                }
                i.matrix = Some(w);
            }
            TrainOp::ScatterRows { into, rows, .. } => {
                let mut all: Vec<u32> = (0..into as u32).collect();
                (0..rows).for_each(|r| all.swap(r, r + rng.below(into - r)));
                all.truncate(rows);
                i.ids = all;
            }
            TrainOp::EmbedBwd { vocab, rows, .. } => i.ids = (0..rows).map(|_| rng.below(vocab) as u32).collect(),
            TrainOp::AttendBwd(a) => i.attend(&a, setup.act)?,
            TrainOp::LossRows { rows, vocab, loss } => i.loss(&mut rng, rows, vocab, loss),
            TrainOp::SmoothL1 { rows, .. } => i.weights = row_weights(&mut rng, rows),
            TrainOp::Optimize { rule, .. } => {
                let [w, _, reference, states @ ..] = &mut i.acc[..] else { unreachable!() };
                // Near enough for some to meet the reference.
                reference.iter_mut().zip(&*w).for_each(|(r, w)| *r = w + 0.05 * *r);
                states.iter_mut().flatten().for_each(|x| *x *= 0.1);
                if let Update::AdamW { .. } | Update::OptimisticAdam { .. } = rule.update {
                    states[1].iter_mut().for_each(|v| *v *= *v);
                }
                if let Some(a) = rule.update.anchor() {
                    states[a].copy_from_slice(w);
                }
            }
            _ => {}
        }
        for (values, (_, to)) in i.acc.iter_mut().zip(acc) {
            to.round(values, 1);
        }
        for (values, (_, to)) in i.act.iter_mut().zip(act) {
            to.round(values, 1);
            setup.act.round(values, 1);
        }
        Ok(i)
    }

    /// What attention gives: backward begins with it.
    fn attend(&mut self, a: &SelfAttn, act: Storage) -> Result<()> {
        let wide = |i: usize| self.acc[i].iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (mut lse, q, k, v) = (wide(4), wide(5), wide(6), wide(7));
        let mut y = vec![0.0; q.len()];
        Naive.attend(&mut y, &mut lse, &q, &k, &v, &a.visible()?, &a.spec)?;
        self.act[0] = y.iter().map(|&x| x as f32).collect();
        act.round(&mut self.act[0], 1);
        self.acc[4] = lse.iter().map(|&x| x as f32).collect();
        Ok(())
    }

    fn loss(&mut self, rng: &mut Rng, rows: usize, vocab: usize, loss: Loss) {
        self.weights = row_weights(rng, rows);
        let [_, logits, p] = &mut self.acc[..] else { unreachable!() };
        logits.iter_mut().for_each(|z| *z *= 2.0);
        normalize(p, vocab);
        let of_rows = logits.chunks_exact(vocab).zip(p.chunks_exact_mut(vocab)).enumerate();
        for (r, (z, p)) in of_rows {
            match loss {
                Loss::Hard => self.ids.push(rng.below(vocab) as u32),
                // Some tokens that cannot be, in rows that need not sum to 1.
                Loss::Soft | Loss::ForwardKl => p.iter_mut().step_by(5).skip(1).for_each(|p| *p = 0.0),
                Loss::ReverseKl => {}
                // Off the kink: there a rounding decides the gradient.
                Loss::TotalVariation => {
                    let sum: f64 = z.iter().map(|&z| f64::from(z).exp()).sum();
                    for (p, &z) in p.iter_mut().zip(z) {
                        let q = f64::from(z).exp() / sum;
                        if (f64::from(*p) / q - 1.0).abs() < 0.02 {
                            *p = (0.9 * q) as f32;
                        }
                    }
                }
                Loss::TopK { k, .. } => {
                    let mut order: Vec<u32> = (0..vocab as u32).collect();
                    order.sort_by(|&a, &b| p[b as usize].total_cmp(&p[a as usize]));
                    self.p.extend(order[..k].iter().map(|&i| p[i as usize]));
                    self.ids.extend(&order[..k]);
                }
                Loss::Entropy => {
                    let best = (0..vocab).fold(0, |best, j| if z[j] > z[best] { j } else { best });
                    self.ids.push(if r % 3 == 1 { (best + 1) % vocab } else { best } as u32);
                }
            }
        }
    }
}

/// Some of them 0.
fn row_weights(rng: &mut Rng, rows: usize) -> Vec<f32> {
    (0..rows).map(|r| if r % 4 == 2 { 0.0 } else { 0.25 + rng.uniform() }).collect()
}
