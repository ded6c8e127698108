//! Masked diffusion models in `config.json`: the keys of LLaDA, and what says that a decoder is one.
//!
//! LLaDA's configuration is that of OLMo, from which its code descends, and has its own name for everything; Dream's is Qwen2's.
//! Both name the mask in `mask_token_id`. A model of any family is one with an object of our own at the top,
//! `"diffusion": {"mask_token_id": 5, "shift": true, "block_size": null}`, whose keys stand above what the family implies.

use serde_json::{Value, json};

use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::hf_config::{Fields, object};
use crate::model::config::{Diffusion, Family, ModelConfig, Rope, RopeScaling};

/// The key of our own object, and the keys in it.
const OBJECT: &str = "diffusion";
const KEYS: [&str; 3] = ["mask_token_id", "shift", "block_size"];

/// The decoder that a configuration of `model_type` llada describes.
pub(super) fn llada(f: Fields<'_>) -> Result<ModelConfig> {
    refuse_unhandled(&f)?;
    let (hidden, heads) = (f.need("d_model")?, f.need("n_heads")?);
    ensure!(heads > 0 && hidden.is_multiple_of(heads), Config, "n_heads {heads} does not divide d_model {hidden}");
    let ffn = match f.size("mlp_hidden_size")? {
        Some(n) => n,
        None => f.need("mlp_ratio")?.saturating_mul(hidden),
    };
    let tokens = f.need("vocab_size")?;
    // Rows beyond the tokens are padding.
    let vocab = f.size("embedding_size")?.unwrap_or(tokens);
    ensure!(vocab >= tokens, Config, "embedding_size {vocab} is below vocab_size {tokens}");
    let mut c = ModelConfig::base(Family::Llada, vocab, hidden, f.need("n_layers")?, heads, ffn);
    c.kv_heads = kv_heads(&f, heads)?;
    c.context = f.need("max_sequence_length")?;
    let number = |name| match f.number(name)? {
        Some(n) => Ok(n),
        None => bail!(Config, "{name} is missing"),
    };
    c.eps = number("rms_norm_eps")? as f32;
    c.rope = Rope { theta: number("rope_theta")?, scaling: RopeScaling::None };
    c.qkv_bias = f.bool("include_qkv_bias")?.unwrap_or(false);
    c.tied = f.bool("weight_tying")?.unwrap_or(true);
    if f.bool("input_emb_norm")?.unwrap_or(false) {
        c.embed_scale = (hidden as f32).sqrt();
    }
    c.bos = f.tokens("bos_token_id")?.first().copied();
    c.eos = f.tokens("eos_token_id")?;
    Ok(c)
}

fn refuse_unhandled(f: &Fields<'_>) -> Result<()> {
    for (name, handled) in [("block_type", "llama"), ("activation_type", "silu"), ("layer_norm_type", "rms")] {
        match f.str(name)? {
            Some(s) if s == handled => {}
            Some(other) => bail!(Unsupported, "{name} {other:?} is not handled; {handled:?} is"),
            None => bail!(Config, "{name} is missing; {handled:?} is handled"),
        }
    }
    // What is left out is what LLaDA's own code takes for it.
    for (name, default, handled) in [
        ("rope", false, true),
        ("alibi", false, false),
        ("include_bias", false, false),
        ("bias_for_layer_norm", false, false),
        ("attention_layer_norm", false, false),
        ("layer_norm_with_affine", true, true),
        ("scale_logits", false, false),
    ] {
        let given = f.bool(name)?.unwrap_or(default);
        ensure!(given == handled, Unsupported, "{name} {given} is not handled; {handled} is");
    }
    let group = f.size("block_group_size")?.unwrap_or(1);
    ensure!(group == 1, Unsupported, "block_group_size {group} is not handled; 1 is");
    Ok(())
}

/// Two keys say how many heads of keys and values there are; they must agree.
fn kv_heads(f: &Fields<'_>, heads: usize) -> Result<usize> {
    let given = f.size("n_kv_heads")?;
    let Some(multi_query) = f.bool("multi_query_attention")? else { return Ok(given.unwrap_or(heads)) };
    let implied = if multi_query { 1 } else { heads };
    let n = given.unwrap_or(implied);
    ensure!(
        n == implied,
        Unsupported,
        "multi_query_attention {multi_query} means {implied} key/value heads, n_kv_heads says {n}"
    );
    Ok(n)
}

/// What makes model `c`, read from `model`, a diffusion model; `top` is the whole file.
pub(super) fn diffusion(top: Fields<'_>, model: Fields<'_>, c: &ModelConfig) -> Result<Option<Diffusion>> {
    let shift = match c.family {
        Family::Llada => Some(false),
        Family::Dream => Some(true),
        _ => None,
    };
    let own = match top.object(OBJECT)? {
        Some(own) => Some(read_object(own).context(|| OBJECT.into())?),
        None if shift.is_none() => return Ok(None),
        None => None,
    };
    let (mask, own_shift, block) = own.unwrap_or_default();
    let mask = match (mask, shift) {
        (Some(mask), _) => mask,
        (None, None) => bail!(Config, "{OBJECT}: mask_token_id is missing"),
        (None, Some(_)) => match model.token("mask_token_id")? {
            Some(mask) => mask,
            None => bail!(Config, "a {} model without mask_token_id", model.str("model_type")?.unwrap_or_default()),
        },
    };
    ensure!((mask as usize) < c.vocab, Config, "mask_token_id {mask} is outside the vocabulary of {}", c.vocab);
    let Some(shift) = own_shift.or(shift) else {
        bail!(Config, "{OBJECT}: shift is missing; it says whether row i of the head predicts position i + 1")
    };
    // Later models of this name are trained in blocks, and without the shift.
    if let (Family::Dream, None, Some(n)) = (c.family, block, model.size("block_size")?) {
        bail!(Unsupported, "block_size {n} of a Dream model is not handled outside of an object {OBJECT:?}");
    }
    Ok(Some(Diffusion { mask, shift, block }))
}

type Own = (Option<u32>, Option<bool>, Option<usize>);

fn read_object(own: Fields<'_>) -> Result<Own> {
    if let Some(name) = own.names().find(|n| !KEYS.contains(n)) {
        bail!(Config, "{name} is unknown; {} are known", KEYS.join(", "));
    }
    let block = own.size("block_size")?;
    ensure!(block != Some(0), Config, "block_size is 0");
    Ok((own.token("mask_token_id")?, own.bool("shift")?, block))
}

/// The object that says what `d` is.
pub(super) fn object_of(d: &Diffusion) -> Value {
    let [mask, shift, block] = KEYS;
    json!({mask: d.mask, shift: d.shift, block: d.block})
}

/// Such an object by itself, for a model of configuration `c`.
pub(super) fn parse(text: &str, c: &ModelConfig) -> Result<Diffusion> {
    let top = object(text)?;
    let (Some(mask), Some(shift), block) = read_object(Fields::of(&top))? else {
        bail!(Config, "mask_token_id or shift is missing")
    };
    ensure!((mask as usize) < c.vocab, Config, "mask_token_id {mask} is outside the vocabulary of {}", c.vocab);
    Ok(Diffusion { mask, shift, block })
}

/// The text of a `config.json` with `d` in it, above whatever else it says.
pub(super) fn with_diffusion(text: &str, d: &Diffusion) -> Result<String> {
    let mut top = object(text)?;
    top.insert(OBJECT.into(), object_of(d));
    serde_json::to_string_pretty(&top).map_err(|e| Error::with_source(ErrorKind::Config, "not written as JSON", e))
}
