//! Writers of small model files: the formats' grammar once more, independent of the readers under test.
#![allow(dead_code)]

use super::Cases;

/// A metadata value.
#[derive(Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

/// A GGUF file in the making. Offsets are laid out by [`Gguf::bytes`].
#[derive(Clone)]
pub struct Gguf {
    pub version: u32,
    pub keys: Vec<(String, Meta)>,
    /// Name, row-major shape, type number, data.
    pub tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

impl Gguf {
    pub fn key(&mut self, key: &str, value: Meta) {
        self.keys.retain(|(k, _)| k != key);
        self.keys.push((key.into(), value));
    }

    /// The header alone is `bytes()[..header()]`.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_str(&mut out, key);
            let kind = |out: &mut Vec<u8>, k: u32| out.extend(k.to_le_bytes());
            let array = |out: &mut Vec<u8>, k: u32, n: usize| {
                out.extend(9u32.to_le_bytes());
                out.extend(k.to_le_bytes());
                out.extend((n as u64).to_le_bytes());
            };
            match value {
                Meta::U32(v) => {
                    kind(&mut out, 4);
                    out.extend(v.to_le_bytes());
                }
                Meta::F32(v) => {
                    kind(&mut out, 6);
                    out.extend(v.to_le_bytes());
                }
                Meta::Bool(v) => {
                    kind(&mut out, 7);
                    out.push(u8::from(*v));
                }
                Meta::Str(v) => {
                    kind(&mut out, 8);
                    put_str(&mut out, v);
                }
                Meta::Strs(v) => {
                    array(&mut out, 8, v.len());
                    v.iter().for_each(|s| put_str(&mut out, s));
                }
                Meta::F32s(v) => {
                    array(&mut out, 6, v.len());
                    v.iter().for_each(|x| out.extend(x.to_le_bytes()));
                }
                Meta::I32s(v) => {
                    array(&mut out, 5, v.len());
                    v.iter().for_each(|x| out.extend(x.to_le_bytes()));
                }
            }
        }
        let mut at = 0u64;
        for (name, shape, kind, data) in &self.tensors {
            put_str(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(at.to_le_bytes());
            at += (data.len() as u64).next_multiple_of(32);
        }
        for (_, _, _, data) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(data);
        }
        out
    }
}

/// Values in [-1, 1) as f32 bytes.
pub fn f32_bytes(cases: &mut Cases, n: usize) -> Vec<u8> {
    (0..n).flat_map(|_| ((cases.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).to_le_bytes()).collect()
}

/// Sizes of every tiny model here.
pub const VOCAB: usize = 300;
pub const HIDDEN: usize = 16;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 4;
pub const FFN: usize = 32;
pub const LAYERS: usize = 2;

/// Byte-level tokens, a few merges, two special tokens, padding.
pub fn tiny_vocab() -> (Vec<String>, Vec<i32>, Vec<String>) {
    let byte = |b: u32| match b {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => b,
        0..=0x20 => b + 0x100,
        0x7F..=0xA0 => b - 0x7F + 0x121,
        _ => 0x143,
    };
    let mut tokens: Vec<String> = (0..256).map(|b| char::from_u32(byte(b)).unwrap().to_string()).collect();
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ w"];
    tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
    tokens.extend(["<|im_start|>".into(), "<|im_end|>".into()]);
    let mut types = vec![1; 261];
    types.extend([3, 3]);
    while tokens.len() < VOCAB {
        tokens.push(format!("[PAD{}]", tokens.len()));
        types.push(5);
    }
    (tokens, types, merges.iter().map(|m| m.to_string()).collect())
}

/// A complete random model of architecture `arch`, everything in f32.
pub fn tiny_gguf(arch: &str, version: u32) -> Gguf {
    let mut g = Gguf { version, keys: Vec::new(), tensors: Vec::new() };
    g.key("general.architecture", Meta::Str(arch.into()));
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", 128),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", FFN),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
        ("attention.key_length", HEAD_DIM),
    ] {
        g.key(&format!("{arch}.{key}"), Meta::U32(value as u32));
    }
    g.key(&format!("{arch}.attention.layer_norm_rms_epsilon"), Meta::F32(1e-5));
    g.key(&format!("{arch}.rope.freq_base"), Meta::F32(10_000.0));
    if arch == "gemma3" {
        g.key("gemma3.attention.sliding_window", Meta::U32(8));
    }
    let (tokens, types, merges) = tiny_vocab();
    g.key("tokenizer.ggml.model", Meta::Str("gpt2".into()));
    g.key("tokenizer.ggml.pre", Meta::Str("smollm".into()));
    g.key("tokenizer.ggml.tokens", Meta::Strs(tokens));
    g.key("tokenizer.ggml.token_type", Meta::I32s(types));
    g.key("tokenizer.ggml.merges", Meta::Strs(merges));
    g.key("tokenizer.ggml.bos_token_id", Meta::U32(261));
    g.key("tokenizer.ggml.eos_token_id", Meta::U32(262));
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
    g.key("tokenizer.chat_template", Meta::Str(template.into()));

    let mut cases = Cases(7);
    for (name, _, shape) in tensors(arch) {
        let data = f32_bytes(&mut cases, shape.iter().product());
        g.tensors.push((name, shape, 0, data));
    }
    g
}

/// Every tensor of a tiny model: GGUF name, Hugging Face name, shape.
pub fn tensors(arch: &str) -> Vec<(String, String, Vec<usize>)> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let gemma = arch == "gemma3";
    let mut layer = vec![
        ("attn_norm.weight", "input_layernorm.weight", vec![HIDDEN]),
        ("attn_q.weight", "self_attn.q_proj.weight", vec![q, HIDDEN]),
        ("attn_k.weight", "self_attn.k_proj.weight", vec![kv, HIDDEN]),
        ("attn_v.weight", "self_attn.v_proj.weight", vec![kv, HIDDEN]),
        ("attn_output.weight", "self_attn.o_proj.weight", vec![HIDDEN, q]),
        ("ffn_gate.weight", "mlp.gate_proj.weight", vec![FFN, HIDDEN]),
        ("ffn_up.weight", "mlp.up_proj.weight", vec![FFN, HIDDEN]),
        ("ffn_down.weight", "mlp.down_proj.weight", vec![HIDDEN, FFN]),
        (
            "ffn_norm.weight",
            if gemma { "pre_feedforward_layernorm.weight" } else { "post_attention_layernorm.weight" },
            vec![HIDDEN],
        ),
    ];
    if arch == "qwen2" {
        layer.push(("attn_q.bias", "self_attn.q_proj.bias", vec![q]));
        layer.push(("attn_k.bias", "self_attn.k_proj.bias", vec![kv]));
        layer.push(("attn_v.bias", "self_attn.v_proj.bias", vec![kv]));
    }
    if gemma || arch == "qwen3" {
        layer.push(("attn_q_norm.weight", "self_attn.q_norm.weight", vec![HEAD_DIM]));
        layer.push(("attn_k_norm.weight", "self_attn.k_norm.weight", vec![HEAD_DIM]));
    }
    if gemma {
        layer.push(("post_attention_norm.weight", "post_attention_layernorm.weight", vec![HIDDEN]));
        layer.push(("post_ffw_norm.weight", "post_feedforward_layernorm.weight", vec![HIDDEN]));
    }
    let mut all = vec![
        ("token_embd.weight".to_owned(), "model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("output_norm.weight".into(), "model.norm.weight".into(), vec![HIDDEN]),
    ];
    for i in 0..LAYERS {
        let named =
            |(g, h, s): &(&str, &str, Vec<usize>)| (format!("blk.{i}.{g}"), format!("model.layers.{i}.{h}"), s.clone());
        all.extend(layer.iter().map(named));
    }
    all
}

/// A safetensors file of (name, dtype, shape, data).
pub fn safetensors(tensors: &[(String, &str, Vec<usize>, Vec<u8>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, dtype, shape, data) in tensors {
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + data.len()]});
        header.insert(name.clone(), entry);
        at += data.len();
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    tensors.iter().for_each(|t| out.extend(&t.3));
    out
}

/// `config.json` of a tiny model in the older dialect.
pub fn tiny_config(arch: &str) -> serde_json::Value {
    let mut c = serde_json::json!({
        "model_type": if arch == "gemma3" { "gemma3_text" } else { arch },
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": FFN, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 128, "tie_word_embeddings": true,
        "bos_token_id": 261, "eos_token_id": 262
    });
    if arch == "gemma3" {
        c["hidden_activation"] = "gelu_pytorch_tanh".into();
        c["sliding_window"] = 8.into();
        c["rope_local_base_freq"] = 10_000.0.into();
        c["query_pre_attn_scalar"] = HEAD_DIM.into();
    }
    c
}

/// `tokenizer.json` for [`tiny_vocab`].
pub fn tiny_tokenizer() -> serde_json::Value {
    let (tokens, types, merges) = tiny_vocab();
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.iter().zip(0..).filter(|(_, i)| types[*i] == 1).map(|(t, i)| (t.clone(), i.into())).collect();
    let merges: Vec<Vec<&str>> = merges.iter().map(|m| m.split(' ').collect()).collect();
    let added: Vec<_> = [261, 262]
        .iter()
        .map(|&i| {
            serde_json::json!({"id": i, "content": tokens[i], "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let level = |regex| serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, level(true)]},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [261], "tokens": ["<|im_start|>"]}}},
        "decoder": level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges}
    })
}
