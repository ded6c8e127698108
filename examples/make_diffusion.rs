//! Makes data of narrow tasks whose answers can be checked, and an untrained model for them: what `scripts/make-diffusion.sh` begins with.
//!
//! `cargo run --release --example make_diffusion -- OUT [ROWS [large]]`, in the repository's root; the script runs the
//! whole recipe. `make_diffusion halve MODEL OUT` writes a model in F16. OUT/train.jsonl and OUT/dev.jsonl share no prompt. The same seed writes the same bytes.
//!
//! Three kinds of rows: sums with working, lists to be sorted, and word problems in the manner of GSM8K with a line for each step
//! and `#### answer` at the end. Digits are tokens of their own.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use half::f16;
use quadriga::Result;
use quadriga::files::{TensorBytes, read_f32, write_file, write_folder, write_tensors};
use quadriga::rng::Rng;
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainerBuilder;
use tokenizers::{AddedToken, Tokenizer};

const VOCAB: usize = 512;
const DEV: usize = 600;

/// Sizes of a model: width, layers, heads, MLP.
const SMALL: [usize; 4] = [128, 6, 4, 352];
const LARGE: [usize; 4] = [512, 12, 8, 1408];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (out, rows, sizes) = match &args[..] {
        [verb, from, to] if verb == "halve" => {
            if let Err(e) = halve(Path::new(from), Path::new(to)) {
                eprintln!("error: {e}");
                std::process::exit(2);
            }
            return;
        }
        [out] => (out, 40_000, SMALL),
        [out, rows] if rows.parse::<usize>().is_ok() => (out, rows.parse().unwrap_or(0), SMALL),
        [out, rows, large] if large == "large" => (out, rows.parse().unwrap_or(0), LARGE),
        _ => {
            eprintln!("usage: make_diffusion OUT [ROWS [large]] or make_diffusion halve MODEL OUT");
            std::process::exit(2);
        }
    };
    if let Err(e) = make(Path::new(out), rows, sizes) {
        eprintln!("error: {e}");
        std::process::exit(2);
    }
}

/// A prompt and its answer.
type Task = (String, String);

/// `13+48-7=`: a line for each step, then the value.
fn sum(rng: &mut Rng) -> Task {
    let n = 2 + rng.below(3);
    let mut value = 2 + rng.below(48);
    let (mut prompt, mut answer) = (format!("Compute {value}"), String::new());
    for _ in 1..n {
        let before = value;
        let (sign, by) = match rng.below(3) {
            0 if value > 2 => ('-', 1 + rng.below(value - 1)),
            1 if value <= 20 => ('*', 2 + rng.below(3)),
            _ => ('+', 1 + rng.below(40)),
        };
        value = match sign {
            '-' => value - by,
            '*' => value * by,
            _ => value + by,
        };
        // Left to right, as the steps are written.
        let _ = write!(prompt, " {sign} {by}");
        let _ = writeln!(answer, "{before} {sign} {by} = {value}");
    }
    (prompt + " from left to right.\n", format!("{answer}#### {value}"))
}

fn list(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")
}

fn sort(rng: &mut Rng) -> Task {
    let mut numbers: Vec<usize> = (0..4 + rng.below(6)).map(|_| rng.below(100)).collect();
    let prompt = format!("Sort {}.\n", list(&numbers));
    numbers.sort_unstable();
    (prompt, format!("#### {}", list(&numbers)))
}

fn story(rng: &mut Rng) -> Task {
    let pick = |rng: &mut Rng, from: &[&'static str]| from[rng.below(from.len())];
    let name = pick(rng, &["Ann", "Ben", "Carla", "David", "Eva", "Frank", "Grace", "Henry"]);
    let thing = pick(rng, &["apples", "books", "coins", "marbles", "stamps", "cards", "shells", "pencils"]);
    let mut have = 5 + rng.below(40);
    let mut prompt = format!("{name} has {have} {thing}.");
    let mut answer = String::new();
    for _ in 0..2 + rng.below(2) {
        let before = have;
        match rng.below(4) {
            0 if have > 3 => {
                let n = 1 + rng.below(have - 2);
                have -= n;
                let how = pick(rng, &["gives away", "loses", "sells"]);
                let _ = write!(prompt, " {name} {how} {n} of them.");
                let _ = writeln!(answer, "{name} {how} {n}: {before} - {n} = {have} {thing}.");
            }
            1 if have <= 12 => {
                let n = 2 + rng.below(3);
                have *= n;
                let _ = write!(prompt, " Then {name} gets {n} times as many.");
                let _ = writeln!(answer, "{n} times as many: {before} * {n} = {have} {thing}.");
            }
            2 if have.is_multiple_of(2) => {
                have /= 2;
                let _ = write!(prompt, " Half of them are lost.");
                let _ = writeln!(answer, "Half is lost: {before} / 2 = {have} {thing}.");
            }
            _ => {
                let n = 2 + rng.below(30);
                have += n;
                let how = pick(rng, &["buys", "finds", "wins"]);
                let _ = write!(prompt, " {name} {how} {n} more.");
                let _ = writeln!(answer, "{name} {how} {n}: {before} + {n} = {have} {thing}.");
            }
        }
    }
    let _ = writeln!(prompt, " How many {thing} does {name} have?");
    (prompt, format!("{answer}#### {have}"))
}

fn make(out: &Path, rows: usize, sizes: [usize; 4]) -> Result<()> {
    fs::create_dir_all(out).map_err(|e| quadriga::Error::io(out.display(), e))?;
    let (mut rng, mut seen, mut tasks) = (Rng::new(7), HashSet::new(), Vec::new());
    while tasks.len() < rows + DEV {
        let (kind, make): (&str, fn(&mut Rng) -> Task) =
            [("sum", sum as fn(&mut Rng) -> Task), ("sort", sort), ("story", story)][tasks.len() % 3];
        let (prompt, completion) = make(&mut rng);
        if seen.insert(prompt.clone()) {
            tasks.push(json!({"prompt": prompt, "completion": completion, "category": kind}));
        }
    }
    let (dev, train) = tasks.split_at(DEV);
    for (name, rows) in [("train", train), ("dev", dev)] {
        write_file(&out.join(format!("{name}.jsonl")), |to| rows.iter().try_for_each(|r| writeln!(to, "{r}")))?;
    }
    let text = |r: &serde_json::Value| {
        format!("{}{}", r["prompt"].as_str().unwrap_or(""), r["completion"].as_str().unwrap_or(""))
    };
    let corpus = out.join("corpus.txt");
    write_file(&corpus, |to| train.iter().take(6000).try_for_each(|r| writeln!(to, "{}", text(r))))?;
    begin(&corpus, &out.join("init"), sizes)?;
    println!("{}: {} rows, {DEV} for development, model {sizes:?}", out.display(), train.len());
    Ok(())
}

/// A folder with a tokenizer of its own and random weights.
fn begin(corpus: &Path, folder: &Path, [hidden, layers, heads, ffn]: [usize; 4]) -> Result<()> {
    let tokenizer = |e| quadriga::Error::with_source(quadriga::ErrorKind::Tokenizer, "training the tokenizer", e);
    let mut bpe = Tokenizer::from_file("models/tiny-llama/tokenizer.json").map_err(tokenizer)?;
    // Token 3 is kept for the mask.
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"].map(|t| AddedToken::from(t, true));
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

    let mut rng = Rng::new(1);
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let mut matrix = |name: String, rows: usize, cols: usize, gain: f32| {
        let std = gain * (cols as f32).powf(-0.5);
        tensors.push((name, vec![rows, cols], (0..rows * cols).map(|_| std * rng.normal()).collect()));
    };
    // What ends in the residual stream begins small, the deeper the model the smaller.
    let last = (2.0 * layers as f32).powf(-0.5);
    matrix("model.embed_tokens.weight".into(), VOCAB, hidden, 0.3);
    for i in 0..layers {
        let p = format!("model.layers.{i}");
        for name in ["q", "k", "v"] {
            matrix(format!("{p}.self_attn.{name}_proj.weight"), hidden, hidden, 1.0);
        }
        matrix(format!("{p}.self_attn.o_proj.weight"), hidden, hidden, last);
        for name in ["gate", "up"] {
            matrix(format!("{p}.mlp.{name}_proj.weight"), ffn, hidden, 1.0);
        }
        matrix(format!("{p}.mlp.down_proj.weight"), hidden, ffn, last);
    }
    let norms = (0..layers)
        .flat_map(|i| ["input_layernorm", "post_attention_layernorm"].map(|n| format!("model.layers.{i}.{n}.weight")));
    tensors.extend(norms.chain(["model.norm.weight".into()]).map(|n| (n, vec![hidden], vec![1.0; hidden])));
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": VOCAB,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": false,
        "mlp_bias": false, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": true,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    });
    write_folder(folder, |f| {
        f.write("config.json", |to| Ok(serde_json::to_writer_pretty(to, &config)?))?;
        f.write("tokenizer.json", |to| to.write_all(bpe.as_bytes()))?;
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
        for name in ["config.json", "tokenizer.json"] {
            let path = from.join(name);
            let bytes = fs::read(&path).map_err(|e| quadriga::Error::io(path.display(), e))?;
            f.write(name, |to| to.write_all(&bytes))?;
        }
        let bytes = |v| bytemuck::cast_slice(v);
        let all: Vec<_> = halves
            .iter()
            .map(|(n, s, v)| TensorBytes {
                name: n.clone(),
                dtype: safetensors::Dtype::F16,
                shape: s.clone(),
                bytes: bytes(v),
            })
            .collect();
        f.write("model.safetensors", |to| write_tensors(to, &all, Some(("format", "pt"))))
    })
}
