//! Any operation on any backend with seeded inputs.

use super::cost::{Sizes, cost};
use super::inputs::{Inputs, TrainSetup};
use super::ops::{Loss, TrainOp};
use crate::backend::{Buffer, Group, In, Step, Target, Train, Visible, WeightInfo, Write};
use crate::bench::inputs::{from_elems, to_elems};
use crate::bench::timing;
use crate::dtype::{Elem, Real};
use crate::error::Result;
use crate::perf::Cost;

/// Settings that operations are run with; numbers that no kernel has as a default.
pub const EPS: f32 = 1e-5;
/// Factor of an adapter's first group; the next have more.
pub const SCALE: f32 = 1.5;
/// Temperature of softmax and entropy.
pub const TAU: f32 = 0.7;
/// Of the proximal step.
pub const L1: f32 = 0.02;

/// One copy of the buffers.
struct Set<B: Train> {
    acc: Vec<B::Buf<B::Acc>>,
    act: Vec<B::Buf<B::Act>>,
    w: Option<B::Weight>,
}

impl<B: Train> Set<B> {
    fn new(be: &B, op: &TrainOp, inputs: &Inputs) -> Result<Self> {
        let acc = inputs.acc.iter().map(|values| {
            let mut buf = be.alloc::<B::Acc>(values.len())?;
            be.upload_acc(buf.head_mut(values.len()), values)?;
            Ok(buf)
        });
        let act = inputs.act.iter().map(|values| {
            let mut buf = be.alloc::<B::Act>(values.len())?;
            be.upload(buf.head_mut(values.len()), &to_elems::<B::Act>(values))?;
            Ok(buf)
        });
        let w = match *op {
            TrainOp::SetWeight { input, output } => Some(be.trainable(output, input)?),
            _ => inputs.matrix.clone().map(|m| be.weight(m)).transpose()?,
        };
        Ok(Self { acc: acc.collect::<Result<_>>()?, act: act.collect::<Result<_>>()?, w })
    }
}

/// An operation with its inputs on a backend.
pub struct PreparedTrain<'b, B: Train> {
    be: &'b B,
    op: TrainOp,
    sets: Vec<Set<B>>,
    inputs: Inputs,
    visible: Visible,
    /// What [`Train::sq_norm`] gave.
    norm: f64,
    turn: usize,
    cold: bool,
}

impl<'b, B: Train> PreparedTrain<'b, B> {
    /// Makes the inputs and brings them to the device.
    ///
    /// # Errors
    /// Those of the backend: no memory, a type it does not do.
    pub fn new(be: &'b B, op: TrainOp, setup: TrainSetup) -> Result<Self> {
        let mut inputs = Inputs::new(&op, &setup)?;
        let floats: usize = inputs.acc.iter().chain(&inputs.act).map(Vec::len).sum();
        let one = 4 * floats + inputs.matrix.as_ref().map_or(0, |m| m.data.len());
        let copies = setup.working_set.div_ceil(one.max(1)).clamp(1, 4096);
        let sets = (0..copies).map(|_| Set::new(be, &op, &inputs)).collect::<Result<_>>()?;
        (inputs.acc, inputs.act, inputs.matrix) = Default::default();
        let visible = op.attn().map_or(Ok(Visible::new()), |a| a.visible())?;
        Ok(Self { be, op, sets, inputs, visible, norm: 0.0, turn: 0, cold: setup.working_set > 0 })
    }

    /// The operation's cost where activations and weights are stored as on this backend.
    pub fn cost(&self) -> Cost {
        let weights = self.sets[0].w.as_ref().map_or(0, WeightInfo::bytes);
        let sizes = Sizes { act: size_of::<B::Act>(), acc: size_of::<B::Acc>() };
        cost(&self.op, weights, self.visible.pairs(), sizes)
    }

    /// Whether each call finds its inputs outside the caches.
    pub fn is_cold(&self) -> bool {
        self.cold
    }

    /// A buffer of sums of the first copy, in the order in which [`Train`]'s method names them: results, then inputs.
    pub fn acc(&mut self, i: usize) -> &mut B::Buf<B::Acc> {
        &mut self.sets[0].acc[i]
    }

    /// A buffer of activations of the first copy.
    pub fn act(&mut self, i: usize) -> &mut B::Buf<B::Act> {
        &mut self.sets[0].act[i]
    }

    /// Tokens, rows or labels.
    pub fn ids(&self) -> &[u32] {
        &self.inputs.ids
    }

    /// Weights of the rows of a loss.
    pub fn weights(&self) -> &[f32] {
        &self.inputs.weights
    }

    /// Runs it once, on the next copy of its inputs.
    ///
    /// # Errors
    /// The backend's.
    pub fn run(&mut self) -> Result<()> {
        let turn = self.turn % self.sets.len();
        self.turn += 1;
        let Self { be, op, sets, inputs, visible, norm, .. } = self;
        let Set { acc, act, w } = &mut sets[turn];
        use TrainOp::*;
        match (*op, &mut acc[..], &mut act[..], w.as_mut()) {
            (SetWeight { .. }, [_, values], _, Some(w)) => be.set_weight(w, all(values)),
            (Copy { .. }, [y, x], ..) => be.copy(out(y), all(x)),
            (Zero { .. }, [x], ..) => be.zero(out(x)),
            (Axpy { .. }, [y, x], ..) => be.axpy(out(y), SCALE, all(x)),
            (SqNorm { n }, [x], ..) => {
                // Of two tensors, of which the first may be empty.
                *norm = be.sq_norm(&[x.view(0..n / 3), x.view(n / 3..n)])?;
                Ok(())
            }
            (LinearFwd { bias, write, .. }, [y, b], [x], Some(w)) => {
                be.linear_fwd(out(y), all(x), w, bias.then_some(&*b), write)
            }
            (LinearBwdX { write, .. }, [dx, dy], _, Some(w)) => be.linear_bwd_x(out(dx), all(dy), w, write),
            (LinearLoraFwd { rows, part, write, .. }, [y, h, b], [x], Some(w)) => {
                // A power of two, so that a backend may scale an operand before it rounds it.
                let group = Group { rows, matrix: all(b), scale: 2.0 };
                be.linear_lora_fwd(y, all(x), w, None, write, all(h), part, group)
            }
            (LinearsBwdX { rows, linears, ranks, .. }, [dx, dh, a, dys @ ..], _, Some(w)) => {
                let readers: Vec<_> = dys[..linears].iter().map(|dy| (all(dy), &*w)).collect();
                let lora = (ranks > 0).then(|| (all(dh), ranks, all(a)));
                be.linears_bwd_x(dx, rows, &readers, lora)
            }
            (LinearBwdW { rows, .. }, [dw, dy], [x], _) => be.linear_bwd_w(out(dw), all(dy), all(x), rows),
            (ColumnSums { .. }, [db, dy], ..) => be.column_sums(out(db), all(dy)),
            (RmsNormBwd { dw: asked, write, .. }, [dx, dw, dy, x, w], ..) => {
                be.rms_norm_bwd(out(dx), asked.then(|| out(dw)), all(dy), all(x), w, EPS, write)
            }
            (GluBwd { act, .. }, [dgate, dup, dz, gate, up], ..) => {
                be.glu_bwd(out(dgate), out(dup), all(dz), all(gate), all(up), act)
            }
            (MulRows { n, .. }, [y, a, x], ..) => be.mul_rows(out(y), all(a), all(x), n),
            (SubtractOuter { n, .. }, [a, v], ..) => be.subtract_outer(out(a), all(v), n, 1.0),
            (MeanRows { means, each, d }, [y, x], ..) => {
                let ranges: Vec<_> = (0..means).map(|i| i * each..(i + 1) * each).collect();
                be.mean_rows(out(y), all(x), &ranges, d)
            }
            (LayerNorm { .. }, [x, w, b], [y], _) => be.layer_norm(out(y), all(x), w, b, EPS),
            (LayerNormBwd { dw: asked, write, .. }, [dx, dw, dy, x, w], ..) => {
                be.layer_norm_bwd(out(dx), asked.then(|| out(dw)), all(dy), all(x), w, EPS, write)
            }
            (Gelu { .. }, [x], [y], _) => be.gelu(out(y), all(x)),
            (GeluBwd { .. }, [dx, dy, x], ..) => be.gelu_bwd(out(dx), all(dy), all(x)),
            (AddScaled { .. }, [y, x, w], ..) => be.add_scaled(out(y), all(x), w),
            (AddScaledBwd { dw: asked, .. }, [dx, dw, dy, x, w], ..) => {
                be.add_scaled_bwd(out(dx), asked.then(|| out(dw)), all(dy), all(x), w)
            }
            (Attend(a), [lse, q, k, v], [y], _) => {
                be.attend(out(y), out(lse), all(q), all(k), all(v), visible, &a.spec)
            }
            (AttendBwd(a), [dq, dk, dv, dy, lse, q, k, v], [y], _) => {
                let (dq, dk, dv) = (out(dq), out(dk), out(dv));
                be.attend_bwd(dq, dk, dv, all(dy), all(y), all(lse), all(q), all(k), all(v), visible, &a.spec)
            }
            (ScatterRows { d, .. }, [dx, dy], ..) => be.scatter_rows(out(dx), all(dy), &inputs.ids, d),
            (EmbedBwd { .. }, [dtable, dx], ..) => be.embed_bwd(out(dtable), all(dx), &inputs.ids, SCALE),
            (LoraShrink { groups: g, ranks, .. }, [h, a @ ..], [x], _) => {
                be.lora_shrink(out(h), all(x), ranks, &groups::<B>(g, a))
            }
            (LoraExpand { groups: g, part, .. }, [y, h, b @ ..], ..) => {
                be.lora_expand(out(y), all(h), part, &groups::<B>(g, b))
            }
            (LoraExpandBwd { groups: g, part, .. }, [dh, dy, b @ ..], ..) => {
                be.lora_expand_bwd(out(dh), all(dy), part, &groups::<B>(g, b))
            }
            (LoraShrinkBwd { groups: g, ranks, .. }, [dx, dh, a @ ..], ..) => {
                be.lora_shrink_bwd(out(dx), all(dh), ranks, &groups::<B>(g, a))
            }
            (LoraBwdB { part, .. }, [db, dy, h], ..) => be.lora_bwd_b(out(db), all(dy), all(h), part, SCALE),
            (LoraBwdA { ranks, .. }, [da, dh], [x], _) => be.lora_bwd_a(out(da), all(dh), all(x), ranks),
            (LossRows { loss, .. }, [l, logits, p], ..) => {
                be.loss_rows(out(l), out(logits), &target::<B>(loss, inputs, p), &inputs.weights)
            }
            (SoftmaxRows { vocab, .. }, [x], ..) => be.softmax_rows(out(x), vocab, TAU),
            (SmoothL1 { .. }, [loss, dx, x, target], ..) => {
                be.smooth_l1(out(loss), out(dx), all(x), all(target), &inputs.weights)
            }
            (Optimize { rule, .. }, [w, g, reference, states @ ..], ..) => {
                let l1 = if rule.l1 { L1 } else { 0.0 };
                let step = Step { rule: rule.update, lr: 0.01, decay: 0.1, scale: 0.5, number: 3, l1 };
                be.optimize(out(w), all(g), states, rule.reference.then(|| all(reference)), &step)
            }
            (op, ..) => unreachable!("{} has other buffers", op.name()),
        }
    }

    /// What it wrote into the first copy, each result by itself.
    ///
    /// # Errors
    /// The backend's.
    pub fn output(&mut self) -> Result<Vec<Vec<f64>>> {
        use TrainOp::*;
        let Set { acc, act, w } = &mut self.sets[0];
        if let (SetWeight { .. }, Some(w)) = (self.op, w) {
            self.be.linear_fwd(out(&mut acc[0]), all(&act[0]), w, None, Write::Set)?;
        }
        let sums: Vec<usize> = match self.op {
            SqNorm { .. } => return Ok(vec![vec![self.norm]]),
            LayerNorm { .. } | Gelu { .. } => vec![],
            AttendBwd(_) => (0..3).collect(),
            RmsNormBwd { dw: true, .. } | LayerNormBwd { dw: true, .. } | AddScaledBwd { dw: true, .. } => vec![0, 1],
            GluBwd { .. } | LossRows { .. } | SmoothL1 { .. } => vec![0, 1],
            Optimize { rule, .. } => [0].into_iter().chain(3..3 + rule.update.states()).collect(),
            _ => vec![0],
        };
        let mut values = Vec::new();
        for i in sums {
            values.push(download::<B, B::Acc>(self.be, all(&acc[i]), acc[i].len())?);
        }
        if let Attend(_) | LayerNorm { .. } | Gelu { .. } = self.op {
            values.push(download::<B, B::Act>(self.be, all(&act[0]), act[0].len())?);
        }
        Ok(values)
    }

    /// As [`Prepared::time`](crate::bench::Prepared::time).
    ///
    /// # Errors
    /// The backend's.
    pub fn time(&mut self, samples: usize, batch_s: f64) -> Result<Vec<f64>> {
        let copies = self.sets.len();
        timing::time(samples, batch_s, copies, |calls| {
            self.wait()?;
            let start = std::time::Instant::now();
            (0..calls).try_for_each(|_| self.run())?;
            self.wait()?;
            Ok(start.elapsed().as_secs_f64() / calls as f64)
        })
    }

    /// A download waits for what was queued.
    fn wait(&self) -> Result<()> {
        self.be.download_acc(self.sets[0].acc[0].head(1), &mut [0.0])
    }
}

fn all<T: Elem, U: Buffer<T>>(b: &U) -> U::View<'_> {
    b.head(b.len())
}

fn out<T: Elem, U: Buffer<T>>(b: &mut U) -> U::ViewMut<'_> {
    let n = b.len();
    b.head_mut(n)
}

fn groups<'a, B: Train>(rows: &[usize], matrices: &'a [B::Buf<B::Acc>]) -> Vec<Group<'a, B>> {
    let each = rows.iter().zip(matrices).enumerate();
    each.map(|(i, (&rows, m))| Group { rows, matrix: all(m), scale: SCALE + i as f32 / 4.0 }).collect()
}

fn target<'a, B: Train>(loss: Loss, inputs: &'a Inputs, p: &'a B::Buf<B::Acc>) -> Target<'a, B> {
    match loss {
        Loss::Hard => Target::Hard(&inputs.ids),
        Loss::Soft => Target::Soft(all(p)),
        Loss::ForwardKl => Target::ForwardKl(all(p)),
        Loss::ReverseKl => Target::ReverseKl(all(p)),
        Loss::TotalVariation => Target::TotalVariation(all(p)),
        Loss::TopK { k, tail } => Target::TopK { ids: &inputs.ids, p: &inputs.p, k, tail },
        Loss::Entropy => Target::Entropy { tau: TAU, labels: &inputs.ids },
    }
}

fn download<B: Train, T: Real>(be: &B, from: In<'_, B, T>, n: usize) -> Result<Vec<f64>> {
    let mut host = vec![T::default(); n];
    be.download(from, &mut host)?;
    Ok(from_elems(&host))
}
