//! `config.json` of a Hugging Face folder to [`ModelConfig`].
//!
//! Two dialects are read: up to Transformers 4 `rope_theta` and `rope_scaling` stand at the top, from 5 on they are inside
//! `rope_parameters`, for Gemma once per layer type. A file with neither is refused: assuming a base gives a model that
//! runs and talks nonsense. What the decoder cannot do is an error here, not a surprise later.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::diffusion_config;
use crate::format::mmap::read_text;
use crate::model::config::{Activation, Family, ModelConfig, Rope, RopeScaling};

/// Upper bound of the small JSON files.
const MAX_CONFIG: u64 = 16 << 20;

/// Reads `config.json` and, for further end tokens, `generation_config.json` of a folder.
pub fn read_folder(folder: &Path) -> Result<ModelConfig> {
    let path = folder.join("config.json");
    let mut c = parse(&read_text(&path, MAX_CONFIG)?).context(|| path.display().to_string())?;
    let path = folder.join("generation_config.json");
    if path.is_file() {
        let text = read_text(&path, MAX_CONFIG)?;
        let more =
            object(&text).and_then(|o| Fields(&o).tokens("eos_token_id")).context(|| path.display().to_string())?;
        for id in more {
            if !c.eos.contains(&id) {
                c.eos.push(id);
            }
        }
        c = c.validate().context(|| path.display().to_string())?;
    }
    Ok(c)
}

/// Parses the text of a `config.json`.
pub fn parse(text: &str) -> Result<ModelConfig> {
    parse_object(&object(text)?)
}

/// The same of an object.
pub(super) fn parse_object(top: &Map<String, Value>) -> Result<ModelConfig> {
    let mut fields = Fields(top);
    // The text part of a model that also sees.
    let inner = top.get("text_config").and_then(Value::as_object);
    if let (Some("gemma3"), Some(inner)) = (fields.str("model_type")?, inner) {
        fields = Fields(inner);
    }
    model_config(fields).and_then(|mut c| {
        let outer = Fields(top).tokens("eos_token_id")?;
        if !outer.is_empty() {
            c.eos = outer;
        }
        c.diffusion = diffusion_config::diffusion(Fields(top), fields, &c)?;
        c.validate()
    })
}

pub(super) fn object(text: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(text).map_err(|e| Error::with_source(ErrorKind::Config, "not a JSON object", e))
}

fn model_config(f: Fields<'_>) -> Result<ModelConfig> {
    let family = match f.str("model_type")? {
        Some("llama") => Family::Llama,
        Some("mistral") => Family::Mistral,
        Some("qwen2") => Family::Qwen2,
        Some("qwen3") => Family::Qwen3,
        Some("gemma3_text") => Family::Gemma3,
        Some("llada") => Family::Llada,
        Some("Dream") => Family::Dream,
        Some(other) => bail!(
            Unsupported,
            "model_type {other:?} is not handled; llama, mistral, qwen2, qwen3, gemma3_text, gemma3 with a text_config, llada and Dream are"
        ),
        None => bail!(Config, "model_type is missing"),
    };
    refuse_unhandled(&f, family)?;
    if family == Family::Llada {
        return diffusion_config::llada(f);
    }

    let gemma = family == Family::Gemma3;
    let (hidden, heads) = (f.need("hidden_size")?, f.need("num_attention_heads")?);
    let (layers, ffn) = (f.need("num_hidden_layers")?, f.need("intermediate_size")?);
    let mut c = ModelConfig::base(family, f.need("vocab_size")?, hidden, layers, heads, ffn);
    c.kv_heads = f.size("num_key_value_heads")?.unwrap_or(heads);
    c.head_dim = match (f.size("head_dim")?, family) {
        (Some(n), _) => n,
        (None, Family::Qwen3) => 128,
        (None, Family::Gemma3) => 256,
        (None, _) => {
            ensure!(
                heads > 0 && hidden.is_multiple_of(heads),
                Config,
                "{heads} heads do not divide hidden_size {hidden}"
            );
            hidden / heads
        }
    };
    c.context = f.need("max_position_embeddings")?;
    c.eps = match f.number("rms_norm_eps")? {
        Some(e) => e as f32,
        None => bail!(Config, "rms_norm_eps is missing"),
    };
    c.activation = activation(&f, family)?;
    c.qkv_bias = matches!(family, Family::Qwen2 | Family::Dream);
    c.qk_norm = matches!(family, Family::Qwen3 | Family::Gemma3);
    c.post_norms = gemma;
    // Where the files leave it out, Gemma's reference ties the matrices and the others' do not.
    c.tied = f.bool("tie_word_embeddings")?.unwrap_or(gemma);
    c.attn_scale = (c.head_dim as f32).powf(-0.5);
    if gemma {
        c.embed_scale = (hidden as f32).sqrt();
        c.attn_scale = f.number("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5) as f32;
    }
    ropes(&f, &mut c)?;
    windows(&f, &mut c)?;
    c.bos = f.tokens("bos_token_id")?.first().copied();
    c.eos = f.tokens("eos_token_id")?;
    Ok(c)
}

fn refuse_unhandled(f: &Fields<'_>, family: Family) -> Result<()> {
    // Files of Qwen2 and Dream may say `attention_bias`; their q, k and v always have one and their output never.
    let bias = f.bool("attention_bias")?.unwrap_or(false) && !matches!(family, Family::Qwen2 | Family::Dream);
    ensure!(!bias, Unsupported, "attention_bias with a bias on the output projection is not handled");
    ensure!(!f.bool("mlp_bias")?.unwrap_or(false), Unsupported, "mlp_bias is not handled");
    for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
        let cap = f.number(name)?;
        ensure!(cap.is_none(), Unsupported, "{name} is {}; capped logits are not handled", cap.unwrap_or(0.0));
    }
    for name in ["quantization_config", "num_experts", "num_local_experts"] {
        ensure!(f.get(name).is_none(), Unsupported, "{name} is given, which is not handled");
    }
    let mrope = family == Family::Dream && f.bool("use_mrope")?.unwrap_or(false);
    ensure!(!mrope, Unsupported, "use_mrope is not handled");
    let part = f.number("partial_rotary_factor")?.unwrap_or(1.0);
    ensure!(part == 1.0, Unsupported, "partial_rotary_factor {part} is not handled");
    Ok(())
}

fn activation(f: &Fields<'_>, family: Family) -> Result<Activation> {
    let (key, default) = match family {
        Family::Gemma3 => ("hidden_activation", "gelu_pytorch_tanh"),
        _ => ("hidden_act", "silu"),
    };
    match f.str(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => bail!(Unsupported, "{key} {other:?} is not handled; silu and gelu_pytorch_tanh are"),
    }
}

/// Rotary embeddings in either dialect.
fn ropes(f: &Fields<'_>, c: &mut ModelConfig) -> Result<()> {
    let top = f.number("rope_theta")?;
    if let Some(parameters) = f.object("rope_parameters")? {
        if let (Some(full), local) = (parameters.object("full_attention")?, parameters.object("sliding_attention")?) {
            c.rope = rope(None, Some(full)).context(|| "rope_parameters.full_attention".into())?;
            let local = local.map(|l| rope(None, Some(l)).context(|| "rope_parameters.sliding_attention".into()));
            c.local_rope = local.transpose()?;
        } else {
            ensure!(
                parameters.get("sliding_attention").is_none(),
                Config,
                "rope_parameters has sliding_attention without full_attention"
            );
            c.rope = rope(top, Some(parameters)).context(|| "rope_parameters".into())?;
        }
    } else {
        c.rope = rope(top, f.object("rope_scaling")?)?;
    }
    let local = f.number("rope_local_base_freq")?;
    if c.family == Family::Gemma3 && c.local_rope.is_none() {
        let Some(theta) = local else {
            bail!(
                Config,
                "no rotary base for the sliding-window layers: neither rope_local_base_freq nor rope_parameters.sliding_attention is given"
            );
        };
        c.local_rope = Some(Rope { theta, scaling: RopeScaling::None });
    }
    if c.local_rope.as_ref() == Some(&c.rope) {
        c.local_rope = None;
    }
    Ok(())
}

/// One rotary embedding: `top` is a base that stands outside of `parameters`.
fn rope(top: Option<f64>, parameters: Option<Fields<'_>>) -> Result<Rope> {
    let inner = parameters.as_ref().map(|p| p.number("rope_theta")).transpose()?.flatten();
    let theta = match (inner, top) {
        (Some(a), Some(b)) => {
            ensure!(a == b, Config, "rope_theta is given twice, as {a} and as {b}");
            a
        }
        (Some(t), None) | (None, Some(t)) => t,
        (None, None) => {
            bail!(Config, "no rope_theta, neither at the top nor in rope_parameters; add the model's rotary base")
        }
    };
    let Some(p) = parameters else { return Ok(Rope { theta, scaling: RopeScaling::None }) };
    let kind = match (p.str("rope_type")?, p.str("type")?) {
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => {
            ensure!(p.get("factor").is_none(), Config, "rope scaling has a factor but no rope_type");
            "default"
        }
    };
    let need = |name| match p.number(name)? {
        Some(n) if n > 0.0 => Ok(n),
        Some(n) => bail!(Config, "rope scaling {kind:?}: {name} is {n}"),
        None => bail!(Config, "rope scaling {kind:?} needs {name}"),
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => {
            let (low_freq, high_freq) = (need("low_freq_factor")?, need("high_freq_factor")?);
            if low_freq >= high_freq {
                bail!(Config, "low_freq_factor {low_freq} is not below high_freq_factor {high_freq}");
            }
            let original = need("original_max_position_embeddings")?;
            RopeScaling::Llama3 { factor: need("factor")?, low_freq, high_freq, original }
        }
        other => bail!(Unsupported, "rope scaling {other:?} is not handled; default, linear and llama3 are"),
    };
    Ok(Rope { theta, scaling })
}

/// The sliding window and the layers it is for.
fn windows(f: &Fields<'_>, c: &mut ModelConfig) -> Result<()> {
    let window = f.size("sliding_window")?;
    // `validate` bounds the layer count later; nothing is laid out for more than it allows.
    let layers = c.layers.min(1 << 12);
    let types = f.layer_types()?;
    match c.family {
        Family::Llama | Family::Llada => return Ok(()),
        Family::Mistral => c.window = window,
        Family::Qwen2 | Family::Qwen3 | Family::Dream => {
            if !f.bool("use_sliding_window")?.unwrap_or(false) {
                return Ok(());
            }
            let full = f.size("max_window_layers")?;
            ensure!(
                window.is_none() || full.is_some() || types.is_some(),
                Config,
                "use_sliding_window needs max_window_layers"
            );
            c.window = window;
            c.local_layers = (0..layers).map(|i| full.is_none_or(|n| i >= n)).collect();
        }
        Family::Gemma3 => {
            ensure!(window.is_some(), Config, "sliding_window is missing");
            c.window = window;
            let every = f.size("sliding_window_pattern")?.or(f.size("_sliding_window_pattern")?).unwrap_or(6);
            ensure!(every > 0, Config, "sliding_window_pattern is 0");
            c.local_layers = (0..layers).map(|i| !(i + 1).is_multiple_of(every)).collect();
        }
    }
    if let Some(types) = types {
        c.local_layers = types;
    }
    if c.window.is_none() {
        c.local_layers.clear();
    }
    Ok(())
}

/// A JSON object whose values are asked for by name and type; null counts as absent.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn of(object: &'a Map<String, Value>) -> Self {
        Self(object)
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn typed<T>(&self, name: &str, want: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(v) = self.get(name) else { return Ok(None) };
        match read(v) {
            Some(t) => Ok(Some(t)),
            None => {
                let found: String = v.to_string().chars().take(60).collect();
                bail!(Config, "{name}: expected {want}, found {found}")
            }
        }
    }

    pub(super) fn str(&self, name: &str) -> Result<Option<&'a str>> {
        self.typed(name, "a string", Value::as_str)
    }

    pub(super) fn bool(&self, name: &str) -> Result<Option<bool>> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<f64>> {
        self.typed(name, "a number", Value::as_f64)
    }

    pub(super) fn size(&self, name: &str) -> Result<Option<usize>> {
        self.typed(name, "a size", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        self.typed(name, "an object", |v| v.as_object().map(Fields))
    }

    pub(super) fn need(&self, name: &str) -> Result<usize> {
        match self.size(name)? {
            Some(n) => Ok(n),
            None => bail!(Config, "{name} is missing"),
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.0.keys().map(String::as_str)
    }

    pub(super) fn token(&self, name: &str) -> Result<Option<u32>> {
        self.typed(name, "a token id", |v| v.as_u64().and_then(|n| u32::try_from(n).ok()))
    }

    /// One token id or a list of them.
    pub(super) fn tokens(&self, name: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.typed(name, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            v => id(v).map(|i| vec![i]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// `layer_types`: for each layer whether the window applies.
    fn layer_types(&self) -> Result<Option<Vec<bool>>> {
        let want = "a list of full_attention and sliding_attention";
        self.typed("layer_types", want, |v| {
            let one = |v: &Value| match v.as_str()? {
                "full_attention" => Some(false),
                "sliding_attention" => Some(true),
                _ => None,
            };
            v.as_array()?.iter().map(one).collect()
        })
    }
}
