//! Trains the language model of `models/tiny-text` from nothing: byte-level BPE and weights, on a text file.
//!
//! `cargo run --release --example make_tiny -- CORPUS OUT [STEPS]`, in the repository's root; models/README.md says which
//! corpus. OUT/model is the result, in F16. The bits depend on the corpus and on the CPU's instructions, not on its threads.

use std::fs;
use std::path::Path;

use half::f16;
use quadriga::Result;
use quadriga::engine::{Device, EngineOptions, TrainRun};
use quadriga::files::{TensorBytes, read_f32, write_file, write_folder, write_tensors};
use quadriga::rng::Rng;
use quadriga::train::run::Event;
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainerBuilder;
use tokenizers::{AddedToken, Tokenizer};

const VOCAB: usize = 1024;
const HIDDEN: usize = 128;
const LAYERS: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const FFN: usize = 320;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (corpus, out, steps) = match &args[..] {
        [corpus, out] => (corpus, out, 1200),
        [corpus, out, steps] if steps.parse::<u64>().is_ok() => (corpus, out, steps.parse().unwrap_or(0)),
        _ => {
            eprintln!("usage: make_tiny CORPUS OUT [STEPS]");
            std::process::exit(2);
        }
    };
    if let Err(e) = make(Path::new(corpus), Path::new(out), steps) {
        eprintln!("error: {e}");
        std::process::exit(2);
    }
}

fn make(corpus: &Path, out: &Path, steps: u64) -> Result<()> {
    let io = |path: &Path| {
        let name = path.display().to_string();
        move |e| quadriga::Error::io(name, e)
    };
    fs::create_dir_all(out).map_err(io(out))?;
    let text = fs::read_to_string(corpus).map_err(io(corpus))?;
    // The end of the text is held out.
    let cut = (text.len() - text.len() / 200..).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len());
    let (train, held_out) = (out.join("train.txt"), out.join("held_out.txt"));
    write_file(&train, |to| to.write_all(&text.as_bytes()[..cut]))?;
    write_file(&held_out, |to| to.write_all(&text.as_bytes()[cut..]))?;

    let init = out.join("init");
    begin(&train, &init)?;
    let run = json!({
        "method": "full", "data": train, "held_out": held_out,
        "reading": {"max_length": 256},
        "optimizer": {
            "lr": 3e-3, "weight_decay": 0.01,
            "schedule": {"kind": "cosine", "warmup": 50, "total": 0, "floor": 0.05},
        },
        "plan": {"steps": steps, "batch_tokens": 4096, "save_every": 100, "seed": 1},
    });
    let run: TrainRun = serde_json::from_value(run).expect("the settings of a run");
    let options = EngineOptions::default().device(Device::Cpu);
    let outcome = run.start(&init, &out.join("run"), true, options, &mut |event| match event {
        Event::Step(step, total, report, seconds) if step % 20 == 0 => {
            eprintln!("step {step} of {total}: loss {:.4}, {:.0} tok/s", report.loss, report.tokens as f64 / seconds);
        }
        Event::HeldOut(step, loss) => eprintln!("step {step}: held-out loss {loss:.4}"),
        _ => {}
    })?;
    halve(&out.join("run/model"), &out.join("model"))?;
    println!("{}: held-out loss {:?}", out.join("model").display(), outcome.held_out);
    Ok(())
}

/// A folder with a tokenizer of its own and random weights.
fn begin(corpus: &Path, folder: &Path) -> Result<()> {
    let tokenizer = |e| quadriga::Error::with_source(quadriga::ErrorKind::Tokenizer, "training the tokenizer", e);
    // Everything but the vocabulary is as the other tiny models have it.
    let mut bpe = Tokenizer::from_file("models/tiny-llama/tokenizer.json").map_err(tokenizer)?;
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(|t| AddedToken::from(t, true));
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(VOCAB)
        .special_tokens(special.into())
        .initial_alphabet(alphabet.into_iter().collect())
        .build();
    let mut trainer = TrainerWrapper::BpeTrainer(trainer);
    bpe.train_from_files(&mut trainer, vec![corpus.display().to_string()]).map_err(tokenizer)?;
    let bpe = bpe.to_string(true).map_err(tokenizer)?;

    let (q, kv) = (HIDDEN, HIDDEN / HEADS * KV_HEADS);
    let mut rng = Rng::new(1);
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut matrix = |name: String, rows: usize, cols: usize, gain: f32| {
        let std = gain * (cols as f32).powf(-0.5);
        tensors.push((name, vec![rows, cols], (0..rows * cols).map(|_| std * rng.normal()).collect()));
    };
    // What ends in the residual stream begins small, the deeper the model the smaller.
    let last = (2.0 * LAYERS as f32).powf(-0.5);
    matrix("model.embed_tokens.weight".into(), VOCAB, HIDDEN, 0.3);
    for i in 0..LAYERS {
        let p = format!("model.layers.{i}");
        for (name, rows, cols, gain) in [
            ("self_attn.q_proj", q, HIDDEN, 1.0),
            ("self_attn.k_proj", kv, HIDDEN, 1.0),
            ("self_attn.v_proj", kv, HIDDEN, 1.0),
            ("self_attn.o_proj", HIDDEN, q, last),
            ("mlp.gate_proj", FFN, HIDDEN, 1.0),
            ("mlp.up_proj", FFN, HIDDEN, 1.0),
            ("mlp.down_proj", HIDDEN, FFN, last),
        ] {
            matrix(format!("{p}.{name}.weight"), rows, cols, gain);
        }
    }
    let norms = (0..LAYERS)
        .flat_map(|i| ["input_layernorm", "post_attention_layernorm"].map(|n| format!("model.layers.{i}.{n}.weight")));
    tensors.extend(norms.chain(["model.norm.weight".into()]).map(|n| (n, vec![HIDDEN], vec![1.0; HIDDEN])));
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": false,
        "mlp_bias": false, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": true,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    });
    let chat = fs::read("models/tiny-llama/tokenizer_config.json");
    let chat = chat.map_err(|e| quadriga::Error::io("models/tiny-llama/tokenizer_config.json", e))?;
    write_folder(folder, |f| {
        f.write("config.json", |to| Ok(serde_json::to_writer_pretty(to, &config)?))?;
        f.write("tokenizer.json", |to| to.write_all(bpe.as_bytes()))?;
        f.write("tokenizer_config.json", |to| to.write_all(&chat))?;
        let all: Vec<_> = tensors.iter().map(|(n, s, v)| TensorBytes::f32(n, s, v)).collect();
        f.write("model.safetensors", |to| write_tensors(to, &all, Some(("format", "pt"))))
    })
}

/// The same model in F16.
fn halve(from: &Path, to: &Path) -> Result<()> {
    let (tensors, _) = read_f32(&from.join("model.safetensors"))?;
    let halves: Vec<(String, Vec<usize>, Vec<f16>)> =
        tensors.into_iter().map(|(n, s, v)| (n, s, v.into_iter().map(f16::from_f32).collect())).collect();
    write_folder(to, |f| {
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            let path = from.join(name);
            let bytes = fs::read(&path).map_err(|e| quadriga::Error::io(path.display(), e))?;
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
