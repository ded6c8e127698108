//! Weights on a device, by role; [`Model`] binds them to their configuration.

use std::sync::Arc;

use super::config::ModelConfig;
use super::roles::{LayerRole, Role, TensorSource};
use crate::backend::{Backend, Buffer, Linear, WeightInfo};
use crate::error::{Context, Result, ensure};

/// The weight of a norm.
type Norm<B> = Arc<<B as Backend>::Buf<<B as Backend>::Acc>>;

/// Weights of one layer. Optional parts are there exactly if the config says so.
pub struct LayerWeights<B: Backend> {
    pub(super) attn_norm: Norm<B>,
    pub(super) q: Arc<Linear<B>>,
    pub(super) k: Arc<Linear<B>>,
    pub(super) v: Arc<Linear<B>>,
    pub(super) qk_norm: Option<[Norm<B>; 2]>,
    pub(super) o: Arc<B::Weight>,
    pub(super) post_norms: Option<[Norm<B>; 2]>,
    pub(super) mlp_norm: Norm<B>,
    pub(super) gate: Arc<B::Weight>,
    pub(super) up: Arc<B::Weight>,
    pub(super) down: Arc<B::Weight>,
}

/// The same weights, shared.
impl<B: Backend> Clone for LayerWeights<B> {
    fn clone(&self) -> Self {
        Self {
            attn_norm: self.attn_norm.clone(),
            q: self.q.clone(),
            k: self.k.clone(),
            v: self.v.clone(),
            qk_norm: self.qk_norm.clone(),
            o: self.o.clone(),
            post_norms: self.post_norms.clone(),
            mlp_norm: self.mlp_norm.clone(),
            gate: self.gate.clone(),
            up: self.up.clone(),
            down: self.down.clone(),
        }
    }
}

/// All weights of a decoder. Models that are made of one another share them, at least the embedding.
pub struct Weights<B: Backend> {
    pub(super) embed: Arc<B::Weight>,
    pub(super) layers: Vec<LayerWeights<B>>,
    pub(super) final_norm: Norm<B>,
    /// `None`: the embedding.
    pub(super) head: Option<Arc<B::Weight>>,
}

impl<B: Backend> Weights<B> {
    /// Whether another model has some of them too.
    pub(super) fn shared(&self) -> bool {
        Arc::strong_count(&self.embed) > 1
    }
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
        let embed = Arc::new(matrix(Role::Embed)?);
        let mut layers = Vec::with_capacity(cfg.layers);
        for i in 0..cfg.layers {
            use LayerRole::*;
            let at = |r: LayerRole| Role::Layer(i, r);
            let pair =
                |on: bool, a, b| on.then(|| Ok([Arc::new(vector(at(a))?), Arc::new(vector(at(b))?)])).transpose();
            let mut linear = |w, b| {
                let bias = cfg.qkv_bias.then(|| vector(at(b))).transpose()?;
                Ok(Arc::new(Linear { w: matrix(at(w))?, bias }))
            };
            layers.push(LayerWeights {
                attn_norm: Arc::new(vector(at(AttnNorm))?),
                q: linear(Q, QBias)?,
                k: linear(K, KBias)?,
                v: linear(V, VBias)?,
                qk_norm: pair(cfg.qk_norm, QNorm, KNorm)?,
                o: Arc::new(matrix(at(O))?),
                post_norms: pair(cfg.post_norms, PostAttnNorm, PostMlpNorm)?,
                mlp_norm: Arc::new(vector(at(MlpNorm))?),
                gate: Arc::new(matrix(at(Gate))?),
                up: Arc::new(matrix(at(Up))?),
                down: Arc::new(matrix(at(Down))?),
            });
        }
        let final_norm = Arc::new(vector(Role::FinalNorm)?);
        let head = (!cfg.tied).then(|| matrix(Role::Head).map(Arc::new)).transpose()?;
        be.weights_done();
        Ok(Self { be, weights: Weights { embed, layers, final_norm, head }, cfg })
    }

    /// The model without its other layers: these, in this order, between the same embedding and head. It shares the weights, and
    /// its caches are its own. A draft made of the target's own layers (self-speculation, Zhang et al. 2024, arXiv:2309.08168).
    ///
    /// # Errors
    /// No layers, or one that there is not.
    pub fn of_layers(&self, layers: &[usize]) -> Result<Self> {
        let known = layers.iter().all(|&i| i < self.cfg.layers);
        ensure!(known && !layers.is_empty(), Usage, "layers {layers:?} of a model of {}", self.cfg.layers);
        let w = &self.weights;
        let weights = Weights {
            embed: w.embed.clone(),
            layers: layers.iter().map(|&i| w.layers[i].clone()).collect(),
            final_norm: w.final_norm.clone(),
            head: w.head.clone(),
        };
        let local_layers = layers.iter().map(|&i| self.cfg.is_local(i)).collect();
        let cfg = ModelConfig { layers: layers.len(), local_layers, ..self.cfg.clone() };
        Ok(Self { be: self.be.clone(), weights, cfg })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.cfg
    }

    /// The table of embeddings, and the factor on its rows.
    pub fn embedding(&self) -> (&B::Weight, f32) {
        (&self.weights.embed, self.cfg.embed_scale)
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.be
    }

    /// The vocabulary matrix, `[vocab, hidden]`; of a tied model the embedding.
    pub fn vocabulary(&self) -> &B::Weight {
        self.weights.head.as_ref().unwrap_or(&self.weights.embed)
    }

    /// Weight of the norm before the vocabulary matrix.
    pub fn final_norm(&self) -> &B::Buf<B::Acc> {
        &self.weights.final_norm
    }

    /// The device, to load another model onto.
    pub fn device(&self) -> &Arc<B> {
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
            .flat_map(|l| [&l.q.w, &l.k.w, &l.v.w, &*l.o, &*l.gate, &*l.up, &*l.down])
            .chain(std::iter::once(&*w.embed))
            .chain(w.head.as_deref())
    }
}
