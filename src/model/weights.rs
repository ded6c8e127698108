//! Weights on a device, by role; [`Model`] binds them to their configuration.

use std::sync::Arc;

use super::config::ModelConfig;
use super::roles::{LayerRole, Role, TensorSource};
use crate::backend::{Backend, Buffer, Linear, WeightInfo};
use crate::error::{Context, Result};

/// Weights of one layer. Optional parts are there exactly if the config says so.
pub struct LayerWeights<B: Backend> {
    pub(super) attn_norm: B::Buf<B::Acc>,
    pub(super) q: Linear<B>,
    pub(super) k: Linear<B>,
    pub(super) v: Linear<B>,
    pub(super) qk_norm: Option<[B::Buf<B::Acc>; 2]>,
    pub(super) o: B::Weight,
    pub(super) post_norms: Option<[B::Buf<B::Acc>; 2]>,
    pub(super) mlp_norm: B::Buf<B::Acc>,
    pub(super) gate: B::Weight,
    pub(super) up: B::Weight,
    pub(super) down: B::Weight,
}

/// All weights of a decoder.
pub struct Weights<B: Backend> {
    pub(super) embed: B::Weight,
    pub(super) layers: Vec<LayerWeights<B>>,
    pub(super) final_norm: B::Buf<B::Acc>,
    /// `None`: the embedding.
    pub(super) head: Option<B::Weight>,
}

/// A decoder on a device: what sessions share.
pub struct Model<B: Backend> {
    pub(super) be: Arc<B>,
    pub(super) cfg: ModelConfig,
    pub(super) weights: Weights<B>,
}

impl<B: Backend> Model<B> {
    /// Brings every weight of `source` to the device. `progress` hears of each tensor: how many are done, of how many.
    pub fn load(be: Arc<B>, source: &dyn TensorSource, mut progress: impl FnMut(usize, usize)) -> Result<Self> {
        let total = Role::all(source.config()).count();
        let mut done = 0;
        Self::load_with(be, source, |be, role, _| {
            let w = be.weight(source.tensor(role)?).context(|| role.to_string())?;
            done += 1;
            progress(done, total);
            Ok(w)
        })
    }

    /// With matrices that `make` gives for their role and shape; vectors are the source's.
    pub(super) fn load_with(
        be: Arc<B>,
        source: &dyn TensorSource,
        mut make: impl FnMut(&B, Role, [usize; 2]) -> Result<B::Weight>,
    ) -> Result<Self> {
        let cfg = source.config().clone();
        let mut matrix = |role: Role| make(&be, role, role.shape(&cfg).unwrap_or([0, 0]));
        let vector = |role: Role| -> Result<B::Buf<B::Acc>> {
            let v = source.tensor(role)?.to_f32();
            let mut b = be.alloc(v.len())?;
            be.upload_acc(b.head_mut(v.len()), &v)?;
            Ok(b)
        };
        let embed = matrix(Role::Embed)?;
        let mut layers = Vec::with_capacity(cfg.layers);
        for i in 0..cfg.layers {
            use LayerRole::*;
            let at = |r: LayerRole| Role::Layer(i, r);
            let pair = |on: bool, a, b| on.then(|| Ok([vector(at(a))?, vector(at(b))?])).transpose();
            let mut linear = |w, b| {
                let bias = cfg.qkv_bias.then(|| vector(at(b))).transpose()?;
                Ok(Linear { w: matrix(at(w))?, bias })
            };
            layers.push(LayerWeights {
                attn_norm: vector(at(AttnNorm))?,
                q: linear(Q, QBias)?,
                k: linear(K, KBias)?,
                v: linear(V, VBias)?,
                qk_norm: pair(cfg.qk_norm, QNorm, KNorm)?,
                o: matrix(at(O))?,
                post_norms: pair(cfg.post_norms, PostAttnNorm, PostMlpNorm)?,
                mlp_norm: vector(at(MlpNorm))?,
                gate: matrix(at(Gate))?,
                up: matrix(at(Up))?,
                down: matrix(at(Down))?,
            });
        }
        let final_norm = vector(Role::FinalNorm)?;
        let head = (!cfg.tied).then(|| matrix(Role::Head)).transpose()?;
        be.weights_done();
        Ok(Self { be, weights: Weights { embed, layers, final_norm, head }, cfg })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.cfg
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.be
    }

    /// Bytes of all matrices on the device.
    pub fn weight_bytes(&self) -> usize {
        self.matrices().map(WeightInfo::bytes).sum()
    }

    /// Bytes of the matrices that a one-token pass reads: all of them, but of an untied embedding only one row.
    pub fn bytes_per_token(&self) -> usize {
        let skip = if self.weights.head.is_some() { self.weights.embed.bytes() } else { 0 };
        self.weight_bytes() - skip
    }

    fn matrices(&self) -> impl Iterator<Item = &B::Weight> {
        let w = &self.weights;
        w.layers
            .iter()
            .flat_map(|l| [&l.q.w, &l.k.w, &l.v.w, &l.o, &l.gate, &l.up, &l.down])
            .chain(std::iter::once(&w.embed))
            .chain(&w.head)
    }
}
