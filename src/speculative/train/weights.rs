//! Weights of an EAGLE-3 head that trains.

use std::collections::HashMap;

use crate::backend::{AttnSpec, Backend, Buffer, Train};
use crate::error::{Error, ErrorKind, Result, ensure};
use crate::model::config::{Activation, Rope};
use crate::model::{ModelConfig, Param};
use crate::train::checkpoint::NamedTensor;

/// Sizes of a head: those of one layer of its target, without what Llama's layers do not have.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Geometry of attention.
    pub attention: AttnSpec,
    /// Of every norm.
    pub eps: f32,
    /// Gate of the MLP.
    pub activation: Activation,
    /// Rotations.
    pub rope: Rope,
    /// Features of a position: residual streams of the target, side by side.
    pub taps: usize,
    /// Tokens that it knows.
    pub vocab: usize,
}

impl HeadConfig {
    /// A head on a target.
    pub fn new(target: &ModelConfig, taps: usize, vocab: usize) -> Self {
        let ModelConfig { hidden, ffn, heads, kv_heads, head_dim, eps, activation, ref rope, .. } = *target;
        let attention = AttnSpec { heads, kv_heads, head_dim, scale: target.attn_scale, window: None };
        Self { hidden, ffn, attention, eps, activation, rope: rope.clone(), taps, vocab }
    }

    /// Every tensor by its published name, with its shape.
    pub fn tensors(&self) -> [(&'static str, [usize; 2]); 13] {
        let (d, q, kv) = (self.hidden, self.attention.q_dim(), self.attention.kv_dim());
        [
            ("fc.weight", [d, self.taps * d]),
            ("midlayer.input_layernorm.weight", [1, d]),
            ("midlayer.hidden_norm.weight", [1, d]),
            ("midlayer.self_attn.q_proj.weight", [q, 2 * d]),
            ("midlayer.self_attn.k_proj.weight", [kv, 2 * d]),
            ("midlayer.self_attn.v_proj.weight", [kv, 2 * d]),
            ("midlayer.self_attn.o_proj.weight", [d, q]),
            ("midlayer.post_attention_layernorm.weight", [1, d]),
            ("midlayer.mlp.gate_proj.weight", [self.ffn, d]),
            ("midlayer.mlp.up_proj.weight", [self.ffn, d]),
            ("midlayer.mlp.down_proj.weight", [d, self.ffn]),
            ("norm.weight", [1, d]),
            ("lm_head.weight", [self.vocab, d]),
        ]
    }
}

/// Tensors of a head by their published names.
pub type Tensors = HashMap<String, Vec<f32>>;

/// A master and the matrix that products read.
pub(super) struct Linear<B: Backend> {
    pub(super) p: Param<B>,
    pub(super) w: B::Weight,
}

/// A head that trains. Matrices that read several things side by side are one matrix for each of these, and their products are added.
pub struct EagleHead<B: Backend> {
    pub(super) cfg: HeadConfig,
    pub(super) fc: Vec<Linear<B>>,
    /// For the token's embedding, then for the features; so are k and v.
    pub(super) q: Vec<Linear<B>>,
    pub(super) k: Vec<Linear<B>>,
    pub(super) v: Vec<Linear<B>>,
    pub(super) o: Linear<B>,
    pub(super) gate: Linear<B>,
    pub(super) up: Linear<B>,
    pub(super) down: Linear<B>,
    pub(super) lm_head: Linear<B>,
    pub(super) embed_norm: Param<B>,
    pub(super) hidden_norm: Param<B>,
    pub(super) mlp_norm: Param<B>,
    pub(super) last_norm: Param<B>,
}

impl<B: Train> EagleHead<B> {
    /// With these values.
    ///
    /// # Errors
    /// `Weights` for a tensor that is missing or of another size.
    pub fn new(be: &B, cfg: HeadConfig, tensors: &Tensors) -> Result<Self> {
        let shapes = HashMap::from(cfg.tensors());
        let of = |name: &str| -> Result<(&[f32], [usize; 2])> {
            let found = tensors.get(name).map(|v| &v[..]);
            let values = found.ok_or_else(|| Error::new(ErrorKind::Weights, format!("no tensor {name}")))?;
            let shape = shapes[name];
            let n = shape[0] * shape[1];
            ensure!(values.len() == n, Weights, "{name}: {} values for {shape:?}", values.len());
            Ok((values, shape))
        };
        let param = |name: String, shape: [usize; 2], values: &[f32]| -> Result<Param<B>> {
            let mut p = Param::new(be, name, shape, values)?;
            p.train(be, true)?;
            Ok(p)
        };
        let linears = |name: &str, parts: usize| -> Result<Vec<Linear<B>>> {
            let (values, [rows, cols]) = of(name)?;
            let part = cols / parts;
            let one = |i: usize| {
                let values: Vec<f32> = values.chunks(cols).flat_map(|r| &r[i * part..][..part]).copied().collect();
                let name = if parts == 1 { name.to_owned() } else { format!("{name}.{i}") };
                Ok(Linear { p: param(name, [rows, part], &values)?, w: be.trainable(rows, part)? })
            };
            (0..parts).map(one).collect()
        };
        let linear = |name: &str| Ok::<_, Error>(linears(name, 1)?.remove(0));
        let norm = |name: &str| of(name).and_then(|(values, shape)| param(name.to_owned(), shape, values));
        let mut head = Self {
            fc: linears("fc.weight", cfg.taps)?,
            q: linears("midlayer.self_attn.q_proj.weight", 2)?,
            k: linears("midlayer.self_attn.k_proj.weight", 2)?,
            v: linears("midlayer.self_attn.v_proj.weight", 2)?,
            o: linear("midlayer.self_attn.o_proj.weight")?,
            gate: linear("midlayer.mlp.gate_proj.weight")?,
            up: linear("midlayer.mlp.up_proj.weight")?,
            down: linear("midlayer.mlp.down_proj.weight")?,
            lm_head: linear("lm_head.weight")?,
            embed_norm: norm("midlayer.input_layernorm.weight")?,
            hidden_norm: norm("midlayer.hidden_norm.weight")?,
            mlp_norm: norm("midlayer.post_attention_layernorm.weight")?,
            last_norm: norm("norm.weight")?,
            cfg,
        };
        head.refresh(be)?;
        Ok(head)
    }

    /// Its sizes.
    pub fn config(&self) -> &HeadConfig {
        &self.cfg
    }

    fn linears(&self) -> impl Iterator<Item = &Linear<B>> {
        let one = [&self.o, &self.gate, &self.up, &self.down, &self.lm_head];
        self.fc.iter().chain(&self.q).chain(&self.k).chain(&self.v).chain(one)
    }

    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear<B>> {
        let one = [&mut self.o, &mut self.gate, &mut self.up, &mut self.down, &mut self.lm_head];
        self.fc.iter_mut().chain(&mut self.q).chain(&mut self.k).chain(&mut self.v).chain(one)
    }

    /// Every tensor, in a fixed order.
    pub fn params(&self) -> impl Iterator<Item = &Param<B>> {
        let norms = [&self.embed_norm, &self.hidden_norm, &self.mlp_norm, &self.last_norm];
        self.linears().map(|l| &l.p).chain(norms)
    }

    /// As [`EagleHead::params`], to change; [`EagleHead::refresh`] tells the head.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        let Self { fc, q, k, v, o, gate, up, down, lm_head, embed_norm, hidden_norm, mlp_norm, last_norm, .. } = self;
        let all = fc.iter_mut().chain(q).chain(k).chain(v).chain([o, gate, up, down, lm_head]);
        all.map(|l| &mut l.p).chain([embed_norm, hidden_norm, mlp_norm, last_norm])
    }

    /// Brings the masters' values into the matrices that products read.
    ///
    /// # Errors
    /// The device's.
    pub fn refresh(&mut self, be: &B) -> Result<()> {
        self.linears_mut().try_for_each(|l| be.set_weight(&mut l.w, l.p.values()))
    }

    /// Every tensor by its published name, in a fixed order.
    ///
    /// # Errors
    /// The device's.
    pub fn to_host(&self, be: &B) -> Result<Vec<NamedTensor>> {
        let values = self.params().map(|p| Ok((&p.name, p.to_host(be)?))).collect::<Result<Vec<_>>>()?;
        let tensor = |(name, [rows, cols]): (&str, [usize; 2])| {
            let of = |n: &str| n == name || n.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
            let parts: Vec<&Vec<f32>> = values.iter().filter(|(n, _)| of(n)).map(|(_, v)| v).collect();
            let width = cols / parts.len();
            let mut all = Vec::with_capacity(rows * cols);
            (0..rows).for_each(|r| parts.iter().for_each(|p| all.extend_from_slice(&p[r * width..][..width])));
            let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
            (name.to_owned(), shape, all)
        };
        Ok(self.cfg.tensors().map(tensor).into())
    }
}

/// The first `n` elements of a parameter's gradient.
pub(super) fn grad<B: Backend>(p: &mut Param<B>) -> crate::backend::Out<'_, B, B::Acc> {
    let n = p.len();
    p.g.as_mut().expect("all of a head trains").head_mut(n)
}
