//! What the two kinds of files call each tensor. Which tensors a model has, and their shapes, is [`crate::model::roles`].

use crate::model::config::{Family, ModelConfig};
use crate::model::roles::{LayerRole, Role};

/// A tensor of one model: its names and its shape.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The role.
    pub role: Role,
    /// Readable name, e.g. `layer 3 attn.wq`.
    pub name: String,
    /// Name in Hugging Face files.
    pub hf: String,
    /// Name in GGUF files.
    pub gguf: String,
    /// Shape, row-major; a vector has one dimension.
    pub shape: Vec<usize>,
}

/// Names in Hugging Face and in GGUF files; a layer's without their prefix.
fn names(role: Role, c: &ModelConfig) -> (&'static str, &'static str) {
    use LayerRole::*;
    match role {
        Role::Embed => ("model.embed_tokens.weight", "token_embd.weight"),
        Role::Head => ("lm_head.weight", "output.weight"),
        Role::FinalNorm => ("model.norm.weight", "output_norm.weight"),
        Role::Layer(_, role) => match role {
            AttnNorm => ("input_layernorm.weight", "attn_norm.weight"),
            Q => ("self_attn.q_proj.weight", "attn_q.weight"),
            K => ("self_attn.k_proj.weight", "attn_k.weight"),
            V => ("self_attn.v_proj.weight", "attn_v.weight"),
            QBias => ("self_attn.q_proj.bias", "attn_q.bias"),
            KBias => ("self_attn.k_proj.bias", "attn_k.bias"),
            VBias => ("self_attn.v_proj.bias", "attn_v.bias"),
            QNorm => ("self_attn.q_norm.weight", "attn_q_norm.weight"),
            KNorm => ("self_attn.k_norm.weight", "attn_k_norm.weight"),
            O => ("self_attn.o_proj.weight", "attn_output.weight"),
            PostAttnNorm => ("post_attention_layernorm.weight", "post_attention_norm.weight"),
            // One name, two meanings: without norms behind the blocks, `post_attention_layernorm` is the one before the MLP.
            MlpNorm if c.post_norms => ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
            MlpNorm => ("post_attention_layernorm.weight", "ffn_norm.weight"),
            Gate => ("mlp.gate_proj.weight", "ffn_gate.weight"),
            Up => ("mlp.up_proj.weight", "ffn_up.weight"),
            Down => ("mlp.down_proj.weight", "ffn_down.weight"),
            PostMlpNorm => ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
        },
    }
}

/// Names in the files of LLaDA; a layer's without their prefix. `ff_proj` is the gate, and `ff_out` is a layer's down projection
/// or, outside of the layers, the head.
fn llada(role: Role) -> &'static str {
    use LayerRole::*;
    match role {
        Role::Embed => "model.transformer.wte.weight",
        Role::Head => "model.transformer.ff_out.weight",
        Role::FinalNorm => "model.transformer.ln_f.weight",
        Role::Layer(_, role) => match role {
            AttnNorm => "attn_norm.weight",
            Q => "q_proj.weight",
            K => "k_proj.weight",
            V => "v_proj.weight",
            QBias => "q_proj.bias",
            KBias => "k_proj.bias",
            VBias => "v_proj.bias",
            QNorm => "q_norm.weight",
            KNorm => "k_norm.weight",
            O => "attn_out.weight",
            PostAttnNorm => "attn_post_norm.weight",
            MlpNorm => "ff_norm.weight",
            Gate => "ff_proj.weight",
            Up => "up_proj.weight",
            Down => "ff_out.weight",
            PostMlpNorm => "ff_post_norm.weight",
        },
    }
}

/// Names and shape of `role` in a model of this configuration; `None` where it has no such tensor.
pub fn slot(c: &ModelConfig, role: Role) -> Option<Slot> {
    let [rows, cols] = role.shape(c)?;
    let (mut hf, gguf) = names(role, c);
    let mut layers = "model.layers";
    if c.family == Family::Llada {
        (hf, layers) = (llada(role), "model.transformer.blocks");
    }
    let (hf, gguf) = match role {
        Role::Layer(i, _) => (format!("{layers}.{i}.{hf}"), format!("blk.{i}.{gguf}")),
        _ => (hf.into(), gguf.into()),
    };
    let shape = if role.is_vector() { vec![cols] } else { vec![rows, cols] };
    Some(Slot { role, name: role.to_string(), hf, gguf, shape })
}

/// Every tensor that a model of this configuration has, layer by layer.
pub fn slots(c: &ModelConfig) -> impl Iterator<Item = Slot> {
    Role::all(c).filter_map(|role| slot(c, role))
}
