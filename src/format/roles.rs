//! What each tensor is for, what the two kinds of files call it, and which shape it must have: one table.

use crate::model::config::ModelConfig;

/// A tensor of the model by its purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Embedding `[vocab, hidden]`.
    Embed,
    /// Vocabulary matrix `[vocab, hidden]`; absent where it is the embedding.
    Head,
    /// Norm before the vocabulary matrix.
    FinalNorm,
    /// A tensor of decoder layer `i`.
    Layer(usize, LayerRole),
}

/// A tensor within a decoder layer.
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
    O,
    /// Norm over each query head.
    QNorm,
    /// Norm over each key head.
    KNorm,
    /// Norm behind attention, before the residual sum (Gemma).
    PostAttnNorm,
    MlpNorm,
    Gate,
    Up,
    Down,
    /// Norm behind the MLP, before the residual sum (Gemma).
    PostMlpNorm,
}

/// A dimension as a formula of the configuration.
#[derive(Clone, Copy)]
enum Dim {
    Vocab,
    Hidden,
    Q,
    Kv,
    Head,
    Ffn,
}

/// Which configurations have the tensor.
#[derive(Clone, Copy)]
enum When {
    Always,
    Untied,
    QkvBias,
    QkNorm,
    PostNorms,
    NoPostNorms,
}

/// A row of the table. In a layer's row the names lack their prefix (`model.layers.3.` and `blk.3.`).
struct Row {
    role: Role,
    name: &'static str,
    hf: &'static str,
    gguf: &'static str,
    shape: &'static [Dim],
    when: When,
}

const fn row(
    role: Role,
    name: &'static str,
    hf: &'static str,
    gguf: &'static str,
    shape: &'static [Dim],
    when: When,
) -> Row {
    Row { role, name, hf, gguf, shape, when }
}

#[rustfmt::skip]
static TABLE: [Row; 20] = {
    use {Dim::*, LayerRole::*, When::*};
    const fn l(role: LayerRole) -> Role { Role::Layer(0, role) }
    [
        row(Role::Embed,     "embed",          "model.embed_tokens.weight",         "token_embd.weight",          &[Vocab, Hidden], Always),
        row(Role::Head,      "head",           "lm_head.weight",                    "output.weight",              &[Vocab, Hidden], Untied),
        row(Role::FinalNorm, "final norm",     "model.norm.weight",                 "output_norm.weight",         &[Hidden],        Always),
        row(l(AttnNorm),     "attn norm",      "input_layernorm.weight",            "attn_norm.weight",           &[Hidden],        Always),
        row(l(LayerRole::Q), "attn.wq",        "self_attn.q_proj.weight",           "attn_q.weight",              &[Dim::Q, Hidden], Always),
        row(l(K),            "attn.wk",        "self_attn.k_proj.weight",           "attn_k.weight",              &[Kv, Hidden],    Always),
        row(l(V),            "attn.wv",        "self_attn.v_proj.weight",           "attn_v.weight",              &[Kv, Hidden],    Always),
        row(l(QBias),        "attn.bq",        "self_attn.q_proj.bias",             "attn_q.bias",                &[Dim::Q],        QkvBias),
        row(l(KBias),        "attn.bk",        "self_attn.k_proj.bias",             "attn_k.bias",                &[Kv],            QkvBias),
        row(l(VBias),        "attn.bv",        "self_attn.v_proj.bias",             "attn_v.bias",                &[Kv],            QkvBias),
        row(l(O),            "attn.wo",        "self_attn.o_proj.weight",           "attn_output.weight",         &[Hidden, Dim::Q], Always),
        row(l(QNorm),        "attn.q norm",    "self_attn.q_norm.weight",           "attn_q_norm.weight",         &[Head],          QkNorm),
        row(l(KNorm),        "attn.k norm",    "self_attn.k_norm.weight",           "attn_k_norm.weight",         &[Head],          QkNorm),
        row(l(PostAttnNorm), "post-attn norm", "post_attention_layernorm.weight",   "post_attention_norm.weight", &[Hidden],        PostNorms),
        // One name, two meanings: without norms behind the blocks, `post_attention_layernorm` is the one before the MLP.
        row(l(MlpNorm),      "mlp norm",       "post_attention_layernorm.weight",   "ffn_norm.weight",            &[Hidden],        NoPostNorms),
        row(l(MlpNorm),      "mlp norm",       "pre_feedforward_layernorm.weight",  "ffn_norm.weight",            &[Hidden],        PostNorms),
        row(l(Gate),         "mlp.gate",       "mlp.gate_proj.weight",              "ffn_gate.weight",            &[Ffn, Hidden],   Always),
        row(l(Up),           "mlp.up",         "mlp.up_proj.weight",                "ffn_up.weight",              &[Ffn, Hidden],   Always),
        row(l(Down),         "mlp.down",       "mlp.down_proj.weight",              "ffn_down.weight",            &[Hidden, Ffn],   Always),
        row(l(PostMlpNorm),  "post-mlp norm",  "post_feedforward_layernorm.weight", "post_ffw_norm.weight",       &[Hidden],        PostNorms),
    ]
};

/// A role of one model: names and shape filled in.
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

impl Row {
    fn applies(&self, c: &ModelConfig) -> bool {
        match self.when {
            When::Always => true,
            When::Untied => !c.tied,
            When::QkvBias => c.qkv_bias,
            When::QkNorm => c.qk_norm,
            When::PostNorms => c.post_norms,
            When::NoPostNorms => !c.post_norms,
        }
    }

    fn slot(&self, c: &ModelConfig, role: Role) -> Slot {
        let size = |d: &Dim| match d {
            Dim::Vocab => c.vocab,
            Dim::Hidden => c.hidden,
            Dim::Q => c.q_dim(),
            Dim::Kv => c.kv_dim(),
            Dim::Head => c.head_dim,
            Dim::Ffn => c.ffn,
        };
        let shape = self.shape.iter().map(size).collect();
        let (name, hf, gguf) = match role {
            Role::Layer(i, _) => (
                format!("layer {i} {}", self.name),
                format!("model.layers.{i}.{}", self.hf),
                format!("blk.{i}.{}", self.gguf),
            ),
            _ => (self.name.into(), self.hf.into(), self.gguf.into()),
        };
        Slot { role, name, hf, gguf, shape }
    }
}

/// Names and shape of `role` in a model of this configuration; `None` where it has no such tensor.
pub fn slot(c: &ModelConfig, role: Role) -> Option<Slot> {
    let same = |r: &Row| match (r.role, role) {
        (Role::Layer(_, a), Role::Layer(i, b)) => a == b && i < c.layers,
        (a, b) => a == b,
    };
    TABLE.iter().find(|r| same(r) && r.applies(c)).map(|r| r.slot(c, role))
}

/// Every tensor that a model of this configuration has, layer by layer.
pub fn slots(c: &ModelConfig) -> impl Iterator<Item = Slot> {
    let of = |r: &Row, i: usize| match r.role {
        Role::Layer(_, role) => Role::Layer(i, role),
        role => role,
    };
    let global = TABLE.iter().filter(|r| !matches!(r.role, Role::Layer(..)));
    let layer = TABLE.iter().filter(|r| matches!(r.role, Role::Layer(..)));
    let global = global.filter(|r| r.applies(c)).map(move |r| r.slot(c, of(r, 0)));
    let layers =
        (0..c.layers).flat_map(move |i| layer.clone().filter(|r| r.applies(c)).map(move |r| r.slot(c, of(r, i))));
    global.chain(layers)
}
