//! What examples share that train a model from nothing: its tokenizer, its first weights, and the same model in F16.

use std::fs;
use std::path::Path;

use half::f16;
use quadriga::files::{TensorBytes, read_f32, write_folder, write_tensors};
use quadriga::rng::Rng;
use quadriga::{Error, ErrorKind, Result};
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainerBuilder;
use tokenizers::{AddedToken, Tokenizer};

/// A Llama with tied matrices.
pub struct Shape {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub ffn: usize,
    pub context: usize,
    pub bos: u32,
    pub eos: u32,
}

/// Files that a tokenizer needs beside its own.
const CHAT: &str = "tokenizer_config.json";

/// A folder with a tokenizer of its own, trained on `corpus`, whose first tokens are `special`, and random weights. `chat`: with the
/// chat template of the other tiny models.
pub fn begin(corpus: &Path, folder: &Path, shape: &Shape, special: &[&str], chat: bool) -> Result<()> {
    let tokenizer = |e| Error::with_source(ErrorKind::Tokenizer, "training the tokenizer", e);
    // Everything but the vocabulary is as the other tiny models have it.
    let mut bpe = Tokenizer::from_file("models/tiny-llama/tokenizer.json").map_err(tokenizer)?;
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(shape.vocab)
        .special_tokens(special.iter().map(|t| AddedToken::from(*t, true)).collect())
        .initial_alphabet(alphabet.into_iter().collect())
        .build();
    let mut trainer = TrainerWrapper::BpeTrainer(trainer);
    bpe.train_from_files(&mut trainer, vec![corpus.display().to_string()]).map_err(tokenizer)?;
    let bpe = bpe.to_string(true).map_err(tokenizer)?;

    let &Shape { vocab, hidden, layers, heads, kv_heads, ffn, context, bos, eos } = shape;
    let (q, kv) = (hidden, hidden / heads * kv_heads);
    let mut rng = Rng::new(1);
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut matrix = |name: String, rows: usize, cols: usize, gain: f32| {
        let std = gain * (cols as f32).powf(-0.5);
        tensors.push((name, vec![rows, cols], (0..rows * cols).map(|_| std * rng.normal()).collect()));
    };
    // What ends in the residual stream begins small, the deeper the model the smaller.
    let last = (2.0 * layers as f32).powf(-0.5);
    matrix("model.embed_tokens.weight".into(), vocab, hidden, 0.3);
    for i in 0..layers {
        let p = format!("model.layers.{i}");
        for (name, rows, cols, gain) in [
            ("self_attn.q_proj", q, hidden, 1.0),
            ("self_attn.k_proj", kv, hidden, 1.0),
            ("self_attn.v_proj", kv, hidden, 1.0),
            ("self_attn.o_proj", hidden, q, last),
            ("mlp.gate_proj", ffn, hidden, 1.0),
            ("mlp.up_proj", ffn, hidden, 1.0),
            ("mlp.down_proj", hidden, ffn, last),
        ] {
            matrix(format!("{p}.{name}.weight"), rows, cols, gain);
        }
    }
    let norms = (0..layers)
        .flat_map(|i| ["input_layernorm", "post_attention_layernorm"].map(|n| format!("model.layers.{i}.{n}.weight")));
    tensors.extend(norms.chain(["model.norm.weight".into()]).map(|n| (n, vec![hidden], vec![1.0; hidden])));
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": false,
        "mlp_bias": false, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": true,
        "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos,
    });
    write_folder(folder, |f| {
        f.write("config.json", |to| Ok(serde_json::to_writer_pretty(to, &config)?))?;
        f.write("tokenizer.json", |to| to.write_all(bpe.as_bytes()))?;
        if chat {
            let bytes = read(&Path::new("models/tiny-llama").join(CHAT))?;
            f.write(CHAT, |to| to.write_all(&bytes))?;
        }
        let all: Vec<_> = tensors.iter().map(|(n, s, v)| TensorBytes::f32(n, s, v)).collect();
        f.write("model.safetensors", |to| write_tensors(to, &all, Some(("format", "pt"))))
    })
}

/// The same model in F16.
pub fn halve(from: &Path, to: &Path) -> Result<()> {
    let (tensors, _) = read_f32(&from.join("model.safetensors"))?;
    let halves: Vec<(String, Vec<usize>, Vec<f16>)> =
        tensors.into_iter().map(|(n, s, v)| (n, s, v.into_iter().map(f16::from_f32).collect())).collect();
    write_folder(to, |f| {
        for name in ["config.json", "tokenizer.json", CHAT].into_iter().filter(|n| from.join(n).is_file()) {
            let bytes = read(&from.join(name))?;
            f.write(name, |to| to.write_all(&bytes))?;
        }
        let all: Vec<_> = halves
            .iter()
            .map(|(n, s, v)| TensorBytes {
                name: n.clone(),
                dtype: safetensors::Dtype::F16,
                shape: s.clone(),
                bytes: bytemuck::cast_slice(v),
            })
            .collect();
        f.write("model.safetensors", |to| write_tensors(to, &all, Some(("format", "pt"))))
    })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| Error::io(path.display(), e))
}
