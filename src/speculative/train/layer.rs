//! What heads that train are made of: linears with biases, and one decoder layer of the Llama form. All rows of a pass give keys and values
//! to the layer; only the slots among them ask.

use super::backward::parts;
use super::forward::rows;
use super::pass::HeadPass;
use super::weights::{Linear, grad};
use crate::backend::{AttnSpec, Backend, Buffer, In, Out, Train, Visible, Write};
use crate::error::{Result, bail, ensure};
use crate::model::config::{Activation, Rope};
use crate::model::roles::NamedTensors;
use crate::model::{Model, ModelConfig, Param};
use crate::train::checkpoint::NamedTensor;

/// A linear and, where the file has one, its bias.
pub(super) struct Affine<B: Backend> {
    pub(super) linear: Linear<B>,
    pub(super) bias: Option<Param<B>>,
}

impl<B: Train> Affine<B> {
    pub(super) fn matrix(&self) -> &B::Weight {
        &self.linear.w
    }

    /// y = w x + bias, or added to y.
    pub(super) fn forward(&self, be: &B, y: Out<'_, B, B::Acc>, x: In<'_, B, B::Act>, write: Write) -> Result<()> {
        be.linear_fwd(y, x, &self.linear.w, self.bias.as_ref().map(|b| &b.w), write)
    }

    /// Adds to the gradients, from that of the output.
    pub(super) fn learn(&mut self, be: &B, dy: In<'_, B, B::Acc>, x: In<'_, B, B::Act>, rows: usize) -> Result<()> {
        be.linear_bwd_w(grad(&mut self.linear.p), dy, x, rows)?;
        self.bias.as_mut().map_or(Ok(()), |b| be.column_sums(grad(b), dy))
    }

    pub(super) fn params(&self) -> impl Iterator<Item = &Param<B>> {
        std::iter::once(&self.linear.p).chain(&self.bias)
    }

    pub(super) fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        std::iter::once(&mut self.linear.p).chain(&mut self.bias)
    }

    pub(super) fn refresh(&mut self, be: &B) -> Result<()> {
        be.set_weight(&mut self.linear.w, self.linear.p.values())
    }
}

/// The tensors of a published head, to train.
pub(super) struct Published<'a, B: Backend> {
    pub(super) be: &'a B,
    pub(super) head: &'a dyn NamedTensors,
}

impl<B: Train> Published<'_, B> {
    pub(super) fn has(&self, name: &str) -> bool {
        self.head.shape(name).is_some()
    }

    fn param(&self, name: String, shape: [usize; 2], found: &[usize]) -> Result<Param<B>> {
        match self.head.shape(&name) {
            None => bail!(Weights, "{name} {found:?} is missing"),
            Some(shape) => ensure!(shape == found, Weights, "{name}: expected {found:?}, file has {shape:?}"),
        }
        let values = self.head.tensor(&name)?.to_f32();
        let mut p = Param::new(self.be, name, shape, &values)?;
        p.train(self.be, true)?;
        Ok(p)
    }

    pub(super) fn vector(&self, name: String, n: usize) -> Result<Param<B>> {
        self.param(name, [1, n], &[n])
    }

    /// `NAME.weight`.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Affine<B>> {
        let p = self.param(format!("{name}.weight"), [rows, cols], &[rows, cols])?;
        let mut affine = Affine { linear: Linear { p, w: self.be.trainable(rows, cols)? }, bias: None };
        affine.refresh(self.be)?;
        Ok(affine)
    }

    /// `NAME.weight` and, where it is there, `NAME.bias`.
    pub(super) fn affine(&self, name: &str, rows: usize, cols: usize) -> Result<Affine<B>> {
        let bias = format!("{name}.bias");
        let bias = self.has(&bias).then(|| self.vector(bias, rows)).transpose()?;
        Ok(Affine { bias, ..self.matrix(name, rows, cols)? })
    }

    /// The decoder layer `PREFIX.*`.
    pub(super) fn layer(&self, prefix: &str, cfg: &ModelConfig) -> Result<TrainLayer<B>> {
        let (d, q, kv, ffn) = (cfg.hidden, cfg.q_dim(), cfg.kv_dim(), cfg.ffn);
        let ModelConfig { heads, kv_heads, head_dim, attn_scale: scale, eps, activation, .. } = *cfg;
        let at = |name: &str| format!("{prefix}.{name}");
        Ok(TrainLayer {
            linears: [
                self.affine(&at("self_attn.q_proj"), q, d)?,
                self.affine(&at("self_attn.k_proj"), kv, d)?,
                self.affine(&at("self_attn.v_proj"), kv, d)?,
                self.matrix(&at("self_attn.o_proj"), d, q)?,
                self.matrix(&at("mlp.gate_proj"), ffn, d)?,
                self.matrix(&at("mlp.up_proj"), ffn, d)?,
                self.matrix(&at("mlp.down_proj"), d, ffn)?,
            ],
            norm: self.vector(at("post_attention_layernorm.weight"), d)?,
            spec: AttnSpec { heads, kv_heads, head_dim, scale, window: None },
            rope: cfg.rope.clone(),
            hidden: d,
            ffn,
            eps,
            activation,
        })
    }
}

/// Parameters as a file has them.
pub(super) fn published<'a, B: Train>(be: &B, params: impl Iterator<Item = &'a Param<B>>) -> Result<Vec<NamedTensor>> {
    let shape = |[rows, cols]: [usize; 2]| if rows == 1 { vec![cols] } else { vec![rows, cols] };
    params.map(|p| Ok((p.name.clone(), shape(p.shape), p.to_host(be)?))).collect()
}

/// Rotations of these positions, and their inverses.
pub(super) fn rotations<B: Backend>(
    be: &B,
    rope: &Rope,
    head_dim: usize,
    positions: impl Iterator<Item = usize>,
    to: &mut [B::Buf<B::Acc>; 2],
) -> Result<()> {
    let positions: Vec<usize> = positions.collect();
    let mut table = vec![0.0; positions.len() * head_dim];
    rope.fill(positions.into_iter(), head_dim, &mut table);
    be.upload_acc(to[0].head_mut(table.len()), &table)?;
    table.chunks_exact_mut(head_dim).for_each(|row| row[head_dim / 2..].iter_mut().for_each(|sin| *sin = -*sin));
    be.upload_acc(to[1].head_mut(table.len()), &table)
}

/// Writes the target's states behind its final norm, of all rows of `pass`, to `to` from element `at` on. `room` is scratch for as many.
pub(super) fn states<B: Train>(
    target: &Model<B>,
    pass: &HeadPass,
    room: &mut B::Buf<B::Acc>,
    to: &mut B::Buf<B::Acc>,
    at: usize,
) -> Result<()> {
    let (be, values) = (target.backend(), pass.features[0].iter().map(|x| x.to_f32()).collect::<Vec<_>>());
    let n = values.len();
    be.upload_acc(room.head_mut(n), &values)?;
    be.zero(to.view_mut(at..at + n))?;
    be.add_normed(to.view_mut(at..at + n), room.head(n), target.final_norm(), target.config().eps)
}

/// x += attention(s), then x += mlp(norm(x)).
pub(super) struct TrainLayer<B: Backend> {
    /// q, k, v, o, gate, up, down.
    pub(super) linears: [Affine<B>; 7],
    /// Before the MLP.
    pub(super) norm: Param<B>,
    spec: AttnSpec,
    rope: Rope,
    hidden: usize,
    ffn: usize,
    eps: f32,
    activation: Activation,
}

/// What a layer's forward pass keeps for its backward, and the room of both.
pub(super) struct LayerSaved<B: Backend> {
    /// Rotations of all rows and of the slots, and their inverses.
    rope: [B::Buf<B::Acc>; 2],
    own_rope: [B::Buf<B::Acc>; 2],
    /// Of the rows, then of each later step's slots.
    k: B::Buf<B::Acc>,
    v: B::Buf<B::Acc>,
    /// As many rows as there are keys, the last of which are the slots'. So are `y` and `lse`.
    q: B::Buf<B::Acc>,
    y: B::Buf<B::Act>,
    lse: B::Buf<B::Acc>,
    /// Residual stream between attention and MLP.
    mid: B::Buf<B::Acc>,
    h: B::Buf<B::Act>,
    gate: B::Buf<B::Acc>,
    up: B::Buf<B::Acc>,
    z: B::Buf<B::Act>,
    dh: B::Buf<B::Acc>,
    dz: B::Buf<B::Acc>,
    dgate: B::Buf<B::Acc>,
    dup: B::Buf<B::Acc>,
    dy: B::Buf<B::Acc>,
    dq: B::Buf<B::Acc>,
    dk: B::Buf<B::Acc>,
    dv: B::Buf<B::Acc>,
}

impl<B: Train> TrainLayer<B> {
    /// Room for passes of up to `rows` rows, and as many more for each further one of `steps`.
    pub(super) fn saved(&self, be: &B, rows: usize, steps: usize) -> Result<LayerSaved<B>> {
        let (spec, keys) = (&self.spec, steps * rows);
        let (q, kv, hd) = (spec.q_dim(), spec.kv_dim(), spec.head_dim);
        let acc = |n: usize, width: usize| be.alloc::<B::Acc>(n * width);
        let act = |n: usize, width: usize| be.alloc::<B::Act>(n * width);
        Ok(LayerSaved {
            rope: [acc(rows, hd)?, acc(rows, hd)?],
            own_rope: [acc(rows, hd)?, acc(rows, hd)?],
            k: acc(keys, kv)?,
            v: acc(keys, kv)?,
            q: acc(keys, q)?,
            y: act(keys, q)?,
            lse: acc(keys, spec.heads)?,
            mid: acc(rows, self.hidden)?,
            h: act(rows, self.hidden)?,
            gate: acc(rows, self.ffn)?,
            up: acc(rows, self.ffn)?,
            z: act(rows, self.ffn)?,
            dh: acc(rows, self.hidden)?,
            dz: acc(rows, self.ffn)?,
            dgate: acc(rows, self.ffn)?,
            dup: acc(rows, self.ffn)?,
            dy: acc(rows, q)?,
            dq: acc(rows, q)?,
            dk: acc(rows, kv)?,
            dv: acc(rows, kv)?,
        })
    }

    pub(super) fn params(&self) -> impl Iterator<Item = &Param<B>> {
        self.linears.iter().flat_map(Affine::params).chain([&self.norm])
    }

    pub(super) fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.linears.iter_mut().flat_map(Affine::params_mut).chain([&mut self.norm])
    }

    pub(super) fn refresh(&mut self, be: &B) -> Result<()> {
        self.linears.iter_mut().try_for_each(|l| l.refresh(be))
    }

    /// Of its norms.
    pub(super) fn eps(&self) -> f32 {
        self.eps
    }

    /// Keys and values of all rows, from their operands.
    pub(super) fn read(&self, be: &B, pass: &HeadPass, s: In<'_, B, B::Act>, saved: &mut LayerSaved<B>) -> Result<()> {
        let (n, hd) = (pass.rows(), self.spec.head_dim);
        rotations(be, &self.rope, hd, pass.positions.iter().map(|&p| p as usize), &mut saved.rope)?;
        let LayerSaved { k, v, rope, .. } = saved;
        self.keys(be, k, v, s, 0, n, rope[0].head(n * hd))
    }

    #[allow(clippy::too_many_arguments)]
    fn keys(
        &self,
        be: &B,
        k: &mut B::Buf<B::Acc>,
        v: &mut B::Buf<B::Acc>,
        s: In<'_, B, B::Act>,
        at: usize,
        n: usize,
        rope: In<'_, B, B::Acc>,
    ) -> Result<()> {
        let kv = self.spec.kv_dim();
        self.linears[1].forward(be, rows!(mut k, at, n, kv), s, Write::Set)?;
        self.linears[2].forward(be, rows!(mut v, at, n, kv), s, Write::Set)?;
        be.rope(rows!(mut k, at, n, kv), rope, self.spec.head_dim)
    }

    /// The slots' rows in step `i`: from residual stream `x` and operands `s` to the residual stream behind, `out`. Behind step 0 they
    /// give keys and values too.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn ask(
        &self,
        be: &B,
        pass: &HeadPass,
        i: usize,
        x: In<'_, B, B::Acc>,
        s: In<'_, B, B::Act>,
        out: &mut B::Buf<B::Acc>,
        saved: &mut LayerSaved<B>,
    ) -> Result<()> {
        let (spec, slots) = (&self.spec, pass.slots());
        let (qd, kv, hd) = (spec.q_dim(), spec.kv_dim(), spec.head_dim);
        let (n, nf, keys) = (slots * self.hidden, slots * self.ffn, pass.rows() + i * slots);
        let own = keys - slots;
        let [wq, .., wo, gate, up, down] = &self.linears;
        let positions = pass.slots.iter().map(|&r| pass.positions[r as usize] as usize + i);
        rotations(be, &self.rope, hd, positions, &mut saved.own_rope)?;
        let LayerSaved { k, v, q, y, lse, mid, h, z, own_rope, .. } = saved;
        let rope = own_rope[0].head(slots * hd);
        // Nobody asks for the others, but what a diverged pass left there would spread.
        be.zero(q.head_mut(own * qd))?;
        wq.forward(be, rows!(mut q, own, slots, qd), s, Write::Set)?;
        be.rope(rows!(mut q, own, slots, qd), rope, hd)?;
        if i > 0 {
            self.keys(be, k, v, s, own, slots, rope)?;
        }
        let (to, lse) = (y.head_mut(keys * qd), lse.head_mut(keys * spec.heads));
        let (k, v) = (k.head(keys * kv), v.head(keys * kv));
        be.attend(to, lse, q.head(keys * qd), k, v, &pass.visible(i)?, spec)?;
        be.copy(mid.head_mut(n), x)?;
        wo.forward(be, mid.head_mut(n), rows!(y, own, slots, qd), Write::Add)?;

        be.rms_norm(h.head_mut(n), mid.head(n), &self.norm.w, self.eps)?;
        gate.forward(be, saved.gate.head_mut(nf), h.head(n), Write::Set)?;
        up.forward(be, saved.up.head_mut(nf), h.head(n), Write::Set)?;
        be.glu(z.head_mut(nf), saved.gate.head(nf), saved.up.head(nf), self.activation)?;
        be.copy(out.head_mut(n), mid.head(n))?;
        down.forward(be, out.head_mut(n), z.head(nf), Write::Add)
    }

    /// Of step 0, if no later one followed. Turns `dx` from the gradient of the residual stream behind into that of the one before; `ds` become
    /// the gradients of the operands `s`, of all rows and of the slots.
    pub(super) fn backward(
        &mut self,
        be: &B,
        pass: &HeadPass,
        s: [In<'_, B, B::Act>; 2],
        dx: &mut B::Buf<B::Acc>,
        ds: &mut [B::Buf<B::Acc>; 2],
        saved: &mut LayerSaved<B>,
    ) -> Result<()> {
        let (spec, rows, slots) = (self.spec, pass.rows(), pass.slots());
        let (qd, kv, hd) = (spec.q_dim(), spec.kv_dim(), spec.head_dim);
        let (n, nf, own) = (slots * self.hidden, slots * self.ffn, rows - slots);
        let [wq, wk, wv, wo, gate, up, down] = &mut self.linears;
        let LayerSaved { dh, dz, dgate, dup, dy, dq, dk, dv, .. } = saved;

        down.learn(be, dx.head(n), saved.z.head(nf), slots)?;
        be.linear_bwd_x(dz.head_mut(nf), dx.head(n), down.matrix(), Write::Set)?;
        let (g, u) = (saved.gate.head(nf), saved.up.head(nf));
        be.glu_bwd(dgate.head_mut(nf), dup.head_mut(nf), dz.head(nf), g, u, self.activation)?;
        gate.learn(be, dgate.head(nf), saved.h.head(n), slots)?;
        up.learn(be, dup.head(nf), saved.h.head(n), slots)?;
        let readers = [(dgate.head(nf), gate.matrix()), (dup.head(nf), up.matrix())];
        be.linears_bwd_x(dh, slots, &readers, None)?;
        let (w, dw) = parts(&mut self.norm);
        be.rms_norm_bwd(dx.head_mut(n), dw, dh.head(n), saved.mid.head(n), w, self.eps, Write::Add)?;

        // Queries that nobody asked for have no gradient.
        wo.learn(be, dx.head(n), rows!(saved.y, own, slots, qd), slots)?;
        be.zero(dy.head_mut(own * qd))?;
        be.linear_bwd_x(rows!(mut dy, own, slots, qd), dx.head(n), wo.matrix(), Write::Set)?;
        let visible: Visible = pass.visible(0)?;
        be.attend_bwd(
            dq.head_mut(rows * qd),
            dk.head_mut(rows * kv),
            dv.head_mut(rows * kv),
            dy.head(rows * qd),
            saved.y.head(rows * qd),
            saved.lse.head(rows * spec.heads),
            saved.q.head(rows * qd),
            saved.k.head(rows * kv),
            saved.v.head(rows * kv),
            &visible,
            &spec,
        )?;
        be.rope(rows!(mut dq, own, slots, qd), saved.own_rope[1].head(slots * hd), hd)?;
        be.rope(dk.head_mut(rows * kv), saved.rope[1].head(rows * hd), hd)?;
        let (dq, dk, dv) = (rows!(dq, own, slots, qd), dk.head(rows * kv), dv.head(rows * kv));
        wq.learn(be, dq, s[1], slots)?;
        wk.learn(be, dk, s[0], rows)?;
        wv.learn(be, dv, s[0], rows)?;
        be.linears_bwd_x(&mut ds[0], rows, &[(dk, wk.matrix()), (dv, wv.matrix())], None)?;
        be.linear_bwd_x(ds[1].head_mut(n), dq, wq.matrix(), Write::Set)
    }
}
