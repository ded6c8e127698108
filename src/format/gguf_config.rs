//! GGUF metadata to [`ModelConfig`].

use crate::error::{Result, bail, ensure};
use crate::format::StoredType;
use crate::format::gguf::Gguf;
use crate::model::config::{Activation, Diffusion, Family, ModelConfig, Rope, RopeScaling};

/// Metadata of one architecture: keys without their `llama.` prefix.
struct Keys<'a> {
    file: &'a Gguf,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn size(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        // Some writers give one number per layer. Layers that differ are not handled, so all must be equal.
        if let Some(mut each) = if self.file.is_array(&key) { self.file.numbers(&key)? } else { None } {
            let first = each.next();
            ensure!(first.is_some() && each.all(|n| Some(n) == first), Unsupported, "{key} differs between layers");
            return match first {
                Some(n) if n >= 0.0 && n.fract() == 0.0 && n < 1e9 => Ok(Some(n as usize)),
                _ => bail!(Config, "{key} holds {first:?}, expected a size"),
            };
        }
        self.file.size(&key)
    }

    fn need(&self, name: &str) -> Result<usize> {
        match self.size(name)? {
            Some(n) => Ok(n),
            None => bail!(Config, "{} is missing", self.key(name)),
        }
    }

    fn float(&self, name: &str) -> Result<Option<f64>> {
        self.file.float(&self.key(name))
    }
}

/// The configuration that a GGUF file declares.
pub fn model_config(file: &Gguf) -> Result<ModelConfig> {
    let Some(arch) = file.str("general.architecture")? else {
        bail!(Config, "general.architecture is missing");
    };
    // GGUF knows Mistral as llama: the graphs are the same.
    let family = match arch {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        "gemma3" => Family::Gemma3,
        "llada" => Family::Llada,
        "dream" => Family::Dream,
        _ => {
            bail!(Unsupported, "architecture {arch:?} is not handled; llama, qwen2, qwen3, gemma3, llada and dream are")
        }
    };
    let k = Keys { file, arch };
    refuse_unhandled(&k)?;

    let (hidden, heads) = (k.need("embedding_length")?, k.need("attention.head_count")?);
    let Some(embed) = file.tensor("token_embd.weight") else {
        bail!(Weights, "token_embd.weight is missing");
    };
    // Not the length of the token list: matrices are padded beyond it, and the rows are what the logits have.
    let vocab = if embed.shape.len() == 2 { embed.shape[0] } else { 0 };
    let mut c = ModelConfig::base(family, vocab, hidden, k.need("block_count")?, heads, k.need("feed_forward_length")?);
    c.kv_heads = k.size("attention.head_count_kv")?.unwrap_or(heads);
    if let Some(n) = k.size("attention.key_length")? {
        c.head_dim = n;
    }
    let (value, turned) = (k.size("attention.value_length")?, k.size("rope.dimension_count")?);
    ensure!(value.unwrap_or(c.head_dim) == c.head_dim, Unsupported, "value heads are not as wide as key heads");
    ensure!(turned.unwrap_or(c.head_dim) == c.head_dim, Unsupported, "only a part of each head is rotated");
    c.context = k.need("context_length")?;
    c.eps = match k.float("attention.layer_norm_rms_epsilon")? {
        Some(e) => e as f32,
        None => bail!(Config, "{} is missing", k.key("attention.layer_norm_rms_epsilon")),
    };
    c.tied = file.tensor("output.weight").is_none();
    c.qkv_bias = matches!(family, Family::Qwen2 | Family::Dream) || file.tensor("blk.0.attn_q.bias").is_some();
    c.qk_norm = matches!(family, Family::Qwen3 | Family::Gemma3);
    c.attn_scale = (c.head_dim as f32).powf(-0.5);
    c.rope = rope(&k, family)?;
    window(&k, &mut c)?;
    if family == Family::Gemma3 {
        gemma(&k, &mut c)?;
    }
    if let Some(scale) = k.float("attention.scale")?.filter(|s| *s != 0.0) {
        c.attn_scale = scale as f32;
    }

    c.bos = file.token("tokenizer.ggml.bos_token_id")?;
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        c.eos.extend(file.token(key)?.filter(|t| !c.eos.contains(t)).into_iter().collect::<Vec<_>>());
    }
    c.diffusion = diffusion(file, family)?;
    c.validate()
}

/// What makes LLaDA and Dream diffusion models, by the keys of llama.cpp's converters.
fn diffusion(file: &Gguf, family: Family) -> Result<Option<Diffusion>> {
    let shift = match family {
        Family::Llada => false,
        // Its converter does not write the key.
        Family::Dream => true,
        _ => return Ok(None),
    };
    let Some(mask) = file.token("tokenizer.ggml.mask_token_id")? else {
        bail!(Config, "tokenizer.ggml.mask_token_id is missing");
    };
    Ok(Some(Diffusion { mask, shift: file.bool("diffusion.shift_logits")?.unwrap_or(shift), block: None }))
}

fn refuse_unhandled(k: &Keys<'_>) -> Result<()> {
    let experts = k.size("expert_count")?.unwrap_or(0);
    ensure!(experts == 0, Unsupported, "a mixture of {experts} experts is not handled");
    for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
        let cap = k.float(name)?.unwrap_or(0.0);
        ensure!(cap == 0.0, Unsupported, "{} is {cap}; capped logits are not handled", k.key(name));
    }
    Ok(())
}

fn rope(k: &Keys<'_>, family: Family) -> Result<Rope> {
    let theta = match (k.float("rope.freq_base")?, family) {
        (Some(t), _) => t,
        // The format's own default, relied upon by files of the first Llama models only.
        (None, Family::Llama) => 10_000.0,
        (None, _) => bail!(Config, "{} is missing", k.key("rope.freq_base")),
    };
    let factor = match k.float("rope.scaling.factor")? {
        Some(f) => Some(f),
        None => k.float("rope.scale_linear")?,
    };
    let kind = k.file.str(&k.key("rope.scaling.type"))?;
    let mut scaling = match (kind.unwrap_or("linear"), factor) {
        ("none", _) | ("linear", None | Some(0.0 | 1.0)) => RopeScaling::None,
        ("linear", Some(factor)) => RopeScaling::Linear { factor },
        (other, _) => bail!(Unsupported, "{} {other:?} is not handled", k.key("rope.scaling.type")),
    };
    if let Some(t) = k.file.tensor("rope_freqs.weight") {
        ensure!(scaling == RopeScaling::None, Config, "both rope_freqs.weight and linear rope scaling are given");
        let StoredType::Known(dtype) = &t.stored else { bail!(Unsupported, "rope_freqs.weight is {}", t.stored) };
        let n = t.shape.iter().product();
        ensure!(n <= 1 << 12, Config, "rope_freqs.weight has {n} entries");
        let mut factors = vec![0.0; n];
        dtype.to_f32(&k.file.data(t), &mut factors);
        scaling = RopeScaling::Factors(factors);
    }
    Ok(Rope { theta, scaling })
}

fn window(k: &Keys<'_>, c: &mut ModelConfig) -> Result<()> {
    let window = k.size("attention.sliding_window")?.filter(|w| *w > 0);
    c.window = match c.family {
        Family::Llama | Family::Gemma3 => window,
        // Qwen's files carry a window that their `use_sliding_window` switches off; which layers it would be for is not said.
        _ => {
            let harmless = window.is_none_or(|w| w >= c.context);
            ensure!(
                harmless,
                Unsupported,
                "{} does not say which layers it applies to",
                k.key("attention.sliding_window")
            );
            None
        }
    };
    Ok(())
}

/// What Gemma's files leave to the reader: which layers are local, and their rotary base.
fn gemma(k: &Keys<'_>, c: &mut ModelConfig) -> Result<()> {
    c.activation = Activation::GeluTanh;
    c.post_norms = true;
    c.embed_scale = (c.hidden as f32).sqrt();
    // The 27B alone (62 layers) scales by the width per head instead of the head size, and its file does not say so.
    if c.layers == 62 && c.heads > 0 {
        c.attn_scale = (c.hidden as f32 / c.heads as f32).powf(-0.5);
    }
    ensure!(c.window.is_some(), Config, "{} is missing", k.key("attention.sliding_window"));
    let key = k.key("attention.sliding_window_pattern");
    // `validate` bounds the layer count later, so the pattern is not laid out for more than it allows.
    let layers = c.layers.min(1 << 12);
    c.local_layers = if k.file.is_array(&key) {
        k.file.numbers(&key)?.into_iter().flatten().map(|b| b != 0.0).collect()
    } else {
        let every = k.file.size(&key)?.unwrap_or(6);
        ensure!(every > 0, Config, "{key} is 0");
        (0..layers).map(|i| !(i + 1).is_multiple_of(every)).collect()
    };
    let theta = k.float("rope.freq_base_swa")?.unwrap_or(10_000.0);
    c.local_rope = Some(Rope { theta, scaling: RopeScaling::None }).filter(|r| *r != c.rope);
    Ok(())
}
