//! Names of a vision transformer's tensors in files.

use serde_json::{Map, Value};

use crate::error::{Result, bail};
use crate::format::hf_config::Fields;
use crate::format::safetensors::Shards;
use crate::vision::roles::{BlockRole, VitRole};

/// Whose names a folder has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Names {
    /// timm's; `norm` is `norm` or, where the norm follows the pooling, `fc_norm`.
    Timm { norm: &'static str },
    /// Those of Hugging Face's ViT, behind `vit.` where there is a head.
    Vit { prefix: &'static str },
    /// Those of Hugging Face's DINOv2, behind `dinov2.` where there is a head.
    Dinov2 { prefix: &'static str },
}

/// Where a role's values lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In a tensor of this name.
    Whole(String),
    /// In this third of the rows of one.
    Third(String, usize),
}

impl Place {
    pub(super) fn name(&self) -> &str {
        match self {
            Place::Whole(name) | Place::Third(name, _) => name,
        }
    }
}

impl Names {
    /// Told by the configuration and by which tensors there are.
    pub(super) fn of(top: &Map<String, Value>, tensors: &Shards) -> Result<Self> {
        let f = Fields::of(top);
        let has = |name: &str| tensors.entry(name).is_some();
        match (f.str("model_type")?, f.str("architecture")?) {
            (Some("vit"), _) => Ok(Names::Vit { prefix: if has("embeddings.cls_token") { "" } else { "vit." } }),
            (Some("dinov2"), _) => {
                Ok(Names::Dinov2 { prefix: if has("embeddings.cls_token") { "" } else { "dinov2." } })
            }
            (Some(other), _) => bail!(Unsupported, "model_type {other:?} is no vision transformer that is known here"),
            (None, Some(a)) if a.starts_with("vit_") || a.starts_with("deit") => {
                Ok(Names::Timm { norm: if has("fc_norm.weight") { "fc_norm" } else { "norm" } })
            }
            (None, Some(other)) => {
                bail!(Unsupported, "architecture {other:?}: of timm's only vit_* and deit* are known")
            }
            (None, None) => bail!(Config, "neither model_type nor architecture is there"),
        }
    }

    pub(super) fn place(&self, role: VitRole) -> Place {
        match *self {
            Names::Timm { norm } => timm(role, norm),
            Names::Vit { prefix } => Place::Whole(hugging_face(role, prefix, false)),
            Names::Dinov2 { prefix } => Place::Whole(hugging_face(role, prefix, true)),
        }
    }

    /// Whether a tensor has no part in what is computed: of pre-training, or of the pooler.
    pub(super) fn harmless(&self, name: &str) -> bool {
        let (Names::Vit { prefix } | Names::Dinov2 { prefix }) = self else { return false };
        let inner = name.strip_prefix(prefix).unwrap_or(name);
        inner == "embeddings.mask_token" || inner.starts_with("pooler.")
    }
}

fn timm(role: VitRole, norm: &str) -> Place {
    use BlockRole::*;
    let (i, r) = match role {
        VitRole::Patch => return Place::Whole("patch_embed.proj.weight".into()),
        VitRole::PatchBias => return Place::Whole("patch_embed.proj.bias".into()),
        VitRole::ClassToken => return Place::Whole("cls_token".into()),
        VitRole::Positions => return Place::Whole("pos_embed".into()),
        VitRole::Norm => return Place::Whole(format!("{norm}.weight")),
        VitRole::NormBias => return Place::Whole(format!("{norm}.bias")),
        VitRole::Head => return Place::Whole("head.weight".into()),
        VitRole::HeadBias => return Place::Whole("head.bias".into()),
        VitRole::Block(i, r) => (i, r),
    };
    let at = |inner: &str| format!("blocks.{i}.{inner}");
    let name = match r {
        Q => return Place::Third(at("attn.qkv.weight"), 0),
        K => return Place::Third(at("attn.qkv.weight"), 1),
        V => return Place::Third(at("attn.qkv.weight"), 2),
        QBias => return Place::Third(at("attn.qkv.bias"), 0),
        KBias => return Place::Third(at("attn.qkv.bias"), 1),
        VBias => return Place::Third(at("attn.qkv.bias"), 2),
        Norm1 => "norm1.weight",
        Norm1Bias => "norm1.bias",
        O => "attn.proj.weight",
        OBias => "attn.proj.bias",
        Scale1 => "ls1.gamma",
        Norm2 => "norm2.weight",
        Norm2Bias => "norm2.bias",
        Fc1 => "mlp.fc1.weight",
        Fc1Bias => "mlp.fc1.bias",
        Fc2 => "mlp.fc2.weight",
        Fc2Bias => "mlp.fc2.bias",
        Scale2 => "ls2.gamma",
    };
    Place::Whole(at(name))
}

fn hugging_face(role: VitRole, prefix: &str, dino: bool) -> String {
    use BlockRole::*;
    let pick = |vit: &'static str, dinov2: &'static str| if dino { dinov2 } else { vit };
    let inner = match role {
        VitRole::Head => return "classifier.weight".into(),
        VitRole::HeadBias => return "classifier.bias".into(),
        VitRole::Patch => "embeddings.patch_embeddings.projection.weight",
        VitRole::PatchBias => "embeddings.patch_embeddings.projection.bias",
        VitRole::ClassToken => "embeddings.cls_token",
        VitRole::Positions => "embeddings.position_embeddings",
        VitRole::Norm => "layernorm.weight",
        VitRole::NormBias => "layernorm.bias",
        VitRole::Block(i, r) => {
            let name = match r {
                Norm1 => pick("layernorm_before.weight", "norm1.weight"),
                Norm1Bias => pick("layernorm_before.bias", "norm1.bias"),
                Q => "attention.attention.query.weight",
                QBias => "attention.attention.query.bias",
                K => "attention.attention.key.weight",
                KBias => "attention.attention.key.bias",
                V => "attention.attention.value.weight",
                VBias => "attention.attention.value.bias",
                O => "attention.output.dense.weight",
                OBias => "attention.output.dense.bias",
                Scale1 => "layer_scale1.lambda1",
                Norm2 => pick("layernorm_after.weight", "norm2.weight"),
                Norm2Bias => pick("layernorm_after.bias", "norm2.bias"),
                Fc1 => pick("intermediate.dense.weight", "mlp.fc1.weight"),
                Fc1Bias => pick("intermediate.dense.bias", "mlp.fc1.bias"),
                Fc2 => pick("output.dense.weight", "mlp.fc2.weight"),
                Fc2Bias => pick("output.dense.bias", "mlp.fc2.bias"),
                Scale2 => "layer_scale2.lambda1",
            };
            return format!("{prefix}encoder.layer.{i}.{name}");
        }
    };
    format!("{prefix}{inner}")
}
