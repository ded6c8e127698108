//! What a tensor is for, independent of what a file calls it.

use std::fmt;

use super::config::ModelConfig;
use crate::error::Result;
use crate::tensor::HostTensor;

/// A tensor's part in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Role {
    Embed,
    FinalNorm,
    Head,
    Layer(usize, LayerRole),
}

/// A tensor's part in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum LayerRole {
    AttnNorm,
    Q,
    K,
    V,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    O,
    /// Norm between attention and the residual sum (Gemma).
    PostAttnNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
    /// Norm between the MLP and the residual sum (Gemma).
    PostMlpNorm,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Embed => f.write_str("embedding"),
            Role::FinalNorm => f.write_str("final norm"),
            Role::Head => f.write_str("output head"),
            Role::Layer(i, r) => write!(f, "layer {i} {r}"),
        }
    }
}

impl fmt::Display for LayerRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use LayerRole::*;
        f.write_str(match self {
            AttnNorm => "attn.norm",
            Q => "attn.wq",
            K => "attn.wk",
            V => "attn.wv",
            QBias => "attn.bq",
            KBias => "attn.bk",
            VBias => "attn.bv",
            QNorm => "attn.q_norm",
            KNorm => "attn.k_norm",
            O => "attn.wo",
            PostAttnNorm => "attn.post_norm",
            MlpNorm => "mlp.norm",
            Gate => "mlp.gate",
            Up => "mlp.up",
            Down => "mlp.down",
            PostMlpNorm => "mlp.post_norm",
        })
    }
}

impl LayerRole {
    /// The linears of a layer, in the order of the forward pass: what an adapter may change.
    pub const LINEARS: [LayerRole; 7] = {
        use LayerRole::*;
        [Q, K, V, O, Gate, Up, Down]
    };

    /// Every role of a layer.
    pub const ALL: [LayerRole; 16] = {
        use LayerRole::*;
        [AttnNorm, Q, K, V, QBias, KBias, VBias, QNorm, KNorm, O, PostAttnNorm, MlpNorm, Gate, Up, Down, PostMlpNorm]
    };
}

impl Role {
    /// Whether it is a norm or a bias.
    pub fn is_vector(self) -> bool {
        use LayerRole::*;
        match self {
            Role::Embed | Role::Head => false,
            Role::FinalNorm => true,
            Role::Layer(_, r) => !matches!(r, Q | K | V | O | Gate | Up | Down),
        }
    }

    /// The shape `[rows, cols]` that `cfg` gives this tensor (a vector is `[1, n]`), or `None` where a model of this config
    /// has no such tensor.
    pub fn shape(self, cfg: &ModelConfig) -> Option<[usize; 2]> {
        use LayerRole::*;
        let (h, q, kv, d) = (cfg.hidden, cfg.q_dim(), cfg.kv_dim(), cfg.head_dim);
        match self {
            Role::Embed => Some([cfg.vocab, h]),
            Role::FinalNorm => Some([1, h]),
            Role::Head => (!cfg.tied).then_some([cfg.vocab, h]),
            Role::Layer(i, _) if i >= cfg.layers => None,
            Role::Layer(_, r) => match r {
                AttnNorm | MlpNorm => Some([1, h]),
                Q => Some([q, h]),
                K | V => Some([kv, h]),
                QBias => cfg.qkv_bias.then_some([1, q]),
                KBias | VBias => cfg.qkv_bias.then_some([1, kv]),
                QNorm | KNorm => cfg.qk_norm.then_some([1, d]),
                O => Some([h, q]),
                PostAttnNorm | PostMlpNorm => cfg.post_norms.then_some([1, h]),
                Gate | Up => Some([cfg.ffn, h]),
                Down => Some([h, cfg.ffn]),
            },
        }
    }

    /// Every tensor that a model of this config has.
    pub fn all(cfg: &ModelConfig) -> impl Iterator<Item = Role> {
        let layers = (0..cfg.layers).flat_map(|i| LayerRole::ALL.map(|r| Role::Layer(i, r)));
        [Role::Embed].into_iter().chain(layers).chain([Role::FinalNorm, Role::Head]).filter(|r| r.shape(cfg).is_some())
    }
}

/// Tensors by name with the settings beside them: what is no decoder by itself, such as a head that drafts for one.
pub trait NamedTensors {
    /// Of all tensors.
    fn names(&self) -> Vec<&str>;
    /// Dimensions of a tensor, row-major; `None` if there is none of this name.
    fn shape(&self, name: &str) -> Option<&[usize]>;
    /// A vector (as `[1, n]`) or a matrix.
    fn tensor(&self, name: &str) -> Result<HostTensor>;
    /// The elements of a tensor of integers or truth values.
    fn integers(&self, name: &str) -> Result<Vec<i64>>;
    /// The decoder layer that the settings describe, of however many layers.
    fn layer(&self) -> Result<ModelConfig>;
    /// A setting that is a size or a list of them. Dots lead into objects.
    fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>>;
    /// A setting that is true or false; false if it is not there.
    fn flag(&self, key: &str) -> Result<bool>;
}

/// Where weights come from: a checkpoint on disk, or a test.
pub trait TensorSource {
    /// The model's configuration, validated.
    fn config(&self) -> &ModelConfig;
    /// The tensor of a role, ready to use: rows in the decoder's order, norms without an implied offset.
    fn tensor(&self, role: Role) -> Result<HostTensor>;
}
