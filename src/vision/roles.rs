//! What a tensor of a vision transformer is for, independent of what a file calls it.

use std::fmt;

use super::config::VitConfig;
use crate::error::Result;

/// A tensor's part in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum VitRole {
    /// Of the patch embedding, `[hidden, channels * patch * patch]`.
    Patch,
    PatchBias,
    ClassToken,
    /// `[tokens, hidden]`; the class token's first.
    Positions,
    Block(usize, BlockRole),
    Norm,
    NormBias,
    Head,
    HeadBias,
}

/// A tensor's part in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum BlockRole {
    Norm1,
    Norm1Bias,
    Q,
    QBias,
    K,
    KBias,
    V,
    VBias,
    O,
    OBias,
    /// LayerScale on attention.
    Scale1,
    Norm2,
    Norm2Bias,
    Fc1,
    Fc1Bias,
    Fc2,
    Fc2Bias,
    /// LayerScale on the MLP.
    Scale2,
}

impl BlockRole {
    /// Every role of a block, in the order of the forward pass.
    pub const ALL: [BlockRole; 18] = {
        use BlockRole::*;
        [
            Norm1, Norm1Bias, Q, QBias, K, KBias, V, VBias, O, OBias, Scale1, Norm2, Norm2Bias, Fc1, Fc1Bias, Fc2,
            Fc2Bias, Scale2,
        ]
    };
}

impl VitRole {
    /// The shape `[rows, cols]` that `cfg` gives this tensor (a vector is `[1, n]`), or `None` where a model of this config
    /// has no such tensor.
    pub fn shape(self, cfg: &VitConfig) -> Option<[usize; 2]> {
        use BlockRole::*;
        let h = cfg.hidden;
        match self {
            VitRole::Patch => Some([h, cfg.patch_values()]),
            VitRole::PatchBias | VitRole::Norm | VitRole::NormBias => Some([1, h]),
            VitRole::ClassToken => cfg.class_token.then_some([1, h]),
            VitRole::Positions => Some([cfg.tokens(), h]),
            VitRole::Head => Some([cfg.classes, h]),
            VitRole::HeadBias => Some([1, cfg.classes]),
            VitRole::Block(i, _) if i >= cfg.blocks => None,
            VitRole::Block(_, r) => match r {
                Norm1 | Norm1Bias | Norm2 | Norm2Bias | OBias | Fc2Bias => Some([1, h]),
                Q | K | V | O => Some([h, h]),
                QBias | KBias | VBias => cfg.qkv_bias.then_some([1, h]),
                Scale1 | Scale2 => cfg.layer_scale.then_some([1, h]),
                Fc1 => Some([cfg.mlp, h]),
                Fc1Bias => Some([1, cfg.mlp]),
                Fc2 => Some([h, cfg.mlp]),
            },
        }
    }

    /// Every tensor that a model of this config has, in the order of the forward pass.
    pub fn all(cfg: &VitConfig) -> impl Iterator<Item = VitRole> {
        let blocks = (0..cfg.blocks).flat_map(|i| BlockRole::ALL.map(|r| VitRole::Block(i, r)));
        let first = [VitRole::Patch, VitRole::PatchBias, VitRole::ClassToken, VitRole::Positions];
        let last = [VitRole::Norm, VitRole::NormBias, VitRole::Head, VitRole::HeadBias];
        first.into_iter().chain(blocks).chain(last).filter(|r| r.shape(cfg).is_some())
    }

    /// Whether products read it: it lies on the device as a [`Weight`](crate::backend::Backend::Weight).
    pub fn is_matrix(self) -> bool {
        use BlockRole::*;
        match self {
            VitRole::Patch | VitRole::Head => true,
            VitRole::Block(_, r) => matches!(r, Q | K | V | O | Fc1 | Fc2),
            _ => false,
        }
    }
}

impl fmt::Display for VitRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use BlockRole::*;
        let name = match self {
            VitRole::Patch => "patch.w",
            VitRole::PatchBias => "patch.b",
            VitRole::ClassToken => "class",
            VitRole::Positions => "positions",
            VitRole::Norm => "norm.w",
            VitRole::NormBias => "norm.b",
            VitRole::Head => "head.w",
            VitRole::HeadBias => "head.b",
            VitRole::Block(i, r) => {
                let name = match r {
                    Norm1 => "norm1.w",
                    Norm1Bias => "norm1.b",
                    Q => "attn.wq",
                    QBias => "attn.bq",
                    K => "attn.wk",
                    KBias => "attn.bk",
                    V => "attn.wv",
                    VBias => "attn.bv",
                    O => "attn.wo",
                    OBias => "attn.bo",
                    Scale1 => "scale1",
                    Norm2 => "norm2.w",
                    Norm2Bias => "norm2.b",
                    Fc1 => "mlp.fc1.w",
                    Fc1Bias => "mlp.fc1.b",
                    Fc2 => "mlp.fc2.w",
                    Fc2Bias => "mlp.fc2.b",
                    Scale2 => "scale2",
                };
                return write!(f, "blocks.{i}.{name}");
            }
        };
        f.write_str(name)
    }
}

/// Where a vision transformer's weights come from: files, random numbers, a trained model.
pub trait VitSource {
    /// The model's configuration, validated.
    fn config(&self) -> &VitConfig;
    /// The values of a role's tensor, row-major, in the shape that [`VitRole::shape`] gives it for [`VitConfig::trained`].
    ///
    /// # Errors
    /// A tensor that is missing, or has another shape.
    fn values(&self, role: VitRole) -> Result<Vec<f32>>;
}
