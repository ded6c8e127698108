//! Masked diffusion models: what their files say, the decoder against goldens of an independent implementation
//! (`scripts/diffusion_reference.py`), and writing them.

mod common;
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Mask};
use quadriga::format::write_model::{write_diffusion_model, write_model};
use quadriga::format::{Checkpoint, hf_config, roles};
use quadriga::model::config::{Diffusion, Family};
use quadriga::model::roles::TensorSource;
use quadriga::model::{KvCache, Model, ModelConfig, Sequence, Want, Workspace};
use serde_json::{Value, json};
use support::files::{self, Meta, tiny_gguf};

const NAMES: [&str; 2] = ["tiny-llada", "tiny-dream"];

fn folder(name: &str) -> PathBuf {
    common::root().join("models").join(name)
}

fn open(name: &str) -> Checkpoint {
    let c = Checkpoint::open(&folder(name)).unwrap();
    c.check().unwrap();
    c
}

fn read(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The configuration of a fixture with keys replaced (null counts as absent).
fn config(name: &str, changes: Value) -> Result<ModelConfig, String> {
    let mut c = read(folder(name).join("config.json"));
    for (k, v) in changes.as_object().unwrap() {
        c[k] = v.clone();
    }
    hf_config::parse(&c.to_string()).map_err(|e| format!("{:?}: {e}", e.kind()))
}

#[test]
fn configurations_are_read() {
    let shared = |c: &ModelConfig| (c.hidden, c.layers, c.heads, c.kv_heads, c.head_dim, c.ffn, c.vocab, c.context);
    let l = open("tiny-llada").config().clone();
    assert_eq!((l.family, shared(&l)), (Family::Llada, (32, 3, 4, 2, 8, 48, 392, 256)));
    assert_eq!((l.eps, l.rope.theta, l.tied, l.qkv_bias, l.embed_scale), (1e-5, 5000.0, false, false, 1.0));
    assert_eq!((l.eos.clone(), l.diffusion), (vec![2], Some(Diffusion { mask: 384, shift: false, block: None })));
    let d = open("tiny-dream").config().clone();
    assert_eq!((d.family, shared(&d)), (Family::Dream, shared(&l)));
    assert_eq!((d.eps, d.rope.theta, d.tied, d.qkv_bias, d.window), (1e-6, 2000.0, false, true, None));
    assert_eq!((d.eos.clone(), d.diffusion), (vec![2], Some(Diffusion { mask: 384, shift: true, block: None })));
    assert_eq!((l.family.to_string(), d.family.to_string()), ("llada".into(), "dream".into()));
    assert_eq!(open("tiny-llama").config().diffusion, None);
    for (name, mask) in NAMES.iter().zip(["<|mdm_mask|>", "<|mask|>"]) {
        let t = open(name).tokenizer().unwrap();
        assert_eq!((t.id(mask), t.is_special(384), t.eos().contains(&384)), (Some(384), true, false));
    }
}

#[test]
fn keys_of_llada_count() {
    let llada = |changes| config("tiny-llada", changes);
    assert_eq!(llada(json!({"embedding_size": null})).unwrap().vocab, 385);
    assert_eq!(llada(json!({"mlp_hidden_size": null})).unwrap().ffn, 4 * 32);
    assert_eq!(llada(json!({"n_kv_heads": null})).unwrap().kv_heads, 4);
    assert_eq!(llada(json!({"n_kv_heads": null, "multi_query_attention": true})).unwrap().kv_heads, 1);
    assert_eq!(llada(json!({"n_kv_heads": 4, "multi_query_attention": false})).unwrap().kv_heads, 4);
    assert!(llada(json!({"include_qkv_bias": true})).unwrap().qkv_bias);
    assert!(llada(json!({"weight_tying": true})).unwrap().tied);
    assert_eq!(llada(json!({"input_emb_norm": true})).unwrap().embed_scale, 32f32.sqrt());
    for (changes, says) in [
        (json!({"block_type": "sequential"}), "Unsupported: block_type \"sequential\""),
        (json!({"block_type": null}), "Config: block_type is missing"),
        (json!({"activation_type": "swiglu"}), "Unsupported: activation_type \"swiglu\""),
        (json!({"layer_norm_type": "default"}), "Unsupported: layer_norm_type \"default\""),
        (json!({"alibi": true}), "Unsupported: alibi true"),
        (json!({"rope": null}), "Unsupported: rope false"),
        (json!({"include_bias": true}), "Unsupported: include_bias true"),
        (json!({"bias_for_layer_norm": true}), "Unsupported: bias_for_layer_norm true"),
        (json!({"attention_layer_norm": true}), "Unsupported: attention_layer_norm true"),
        (json!({"layer_norm_with_affine": false}), "Unsupported: layer_norm_with_affine false"),
        (json!({"scale_logits": true}), "Unsupported: scale_logits true"),
        (json!({"block_group_size": 2}), "Unsupported: block_group_size 2"),
        (json!({"multi_query_attention": true}), "Unsupported: multi_query_attention true means 1"),
        (json!({"multi_query_attention": false}), "Unsupported: multi_query_attention false means 4"),
        (json!({"num_experts": 64}), "Unsupported: num_experts"),
        (json!({"embedding_size": 384}), "Config: embedding_size 384 is below vocab_size 385"),
        (json!({"n_heads": 5}), "Config: n_heads 5 does not divide d_model 32"),
        (json!({"d_model": null}), "Config: d_model is missing"),
        (json!({"rope_theta": null}), "Config: rope_theta is missing"),
        (json!({"rms_norm_eps": null}), "Config: rms_norm_eps is missing"),
        (json!({"mask_token_id": null}), "Config: a llada model without mask_token_id"),
        (json!({"mask_token_id": "<mask>"}), "Config: mask_token_id: expected a token id, found \"<mask>\""),
        (json!({"mask_token_id": 392}), "Config: mask_token_id 392 is outside the vocabulary of 392"),
        (json!({"mask_token_id": 2}), "Config: token 2 is both the mask and an end token"),
    ] {
        let e = llada(changes).unwrap_err();
        assert!(e.starts_with(says), "{says}: {e}");
    }
}

#[test]
fn dream_is_qwen2_with_a_mask() {
    for (changes, says) in [
        (json!({"mask_token_id": null}), "Config: a Dream model without mask_token_id"),
        (json!({"mask_token_id": 151666}), "Config: mask_token_id 151666 is outside the vocabulary of 392"),
        (json!({"block_size": 32}), "Unsupported: block_size 32 of a Dream model"),
        (json!({"use_mrope": true}), "Unsupported: use_mrope"),
        (
            json!({"use_sliding_window": true, "sliding_window": 64}),
            "Unsupported: a diffusion model with a sliding window",
        ),
        (json!({"rope_theta": null}), "Config: no rope_theta"),
    ] {
        let e = config("tiny-dream", changes).unwrap_err();
        assert!(e.starts_with(says), "{says}: {e}");
    }
    // Its files name a bias that their reader does not read.
    assert_eq!(config("tiny-dream", json!({"attention_bias": false})), config("tiny-dream", json!({})));
}

#[test]
fn the_object_makes_any_model_one() {
    let of = |name, object: Value| config(name, json!({"diffusion": object})).map(|c| c.diffusion.unwrap());
    let whole = json!({"mask_token_id": 7, "shift": true, "block_size": 16});
    for name in ["tiny-llama", "tiny-qwen3", "tiny-llada", "tiny-dream"] {
        assert_eq!(of(name, whole.clone()), Ok(Diffusion { mask: 7, shift: true, block: Some(16) }), "{name}");
        let plain = config(name, json!({})).unwrap();
        let other = ModelConfig::clone(&config(name, json!({"diffusion": whole})).unwrap());
        assert!(other.diffusion != plain.diffusion && other.hidden == plain.hidden && other.family == plain.family);
    }
    // What it leaves out is what the family implies.
    assert_eq!(of("tiny-llada", json!({"shift": true})), Ok(Diffusion { mask: 384, shift: true, block: None }));
    assert_eq!(of("tiny-dream", json!({"block_size": 4})), Ok(Diffusion { mask: 384, shift: true, block: Some(4) }));
    assert_eq!(of("tiny-dream", json!({"mask_token_id": 5, "block_size": null})).unwrap().mask, 5);
    let reasoner = json!({"block_size": 32, "diffusion": {"shift": false, "block_size": 32}});
    assert_eq!(config("tiny-dream", reasoner).unwrap().diffusion.unwrap().block, Some(32));
    let bare = json!({"mask_token_id": null, "diffusion": {"mask_token_id": 9}});
    assert_eq!(config("tiny-llada", bare).unwrap().diffusion.unwrap().mask, 9);

    for (object, says) in [
        (json!({"shift": true}), "Config: diffusion: mask_token_id is missing"),
        (json!({"mask_token_id": 7}), "Config: diffusion: shift is missing"),
        (json!({"mask_token_id": 7, "shift": 1}), "Config: diffusion: shift: expected true or false, found 1"),
        (
            json!({"mask_token_id": -1, "shift": true}),
            "Config: diffusion: mask_token_id: expected a token id, found -1",
        ),
        (json!({"mask_token_id": 7, "shift": true, "block_size": 0}), "Config: diffusion: block_size is 0"),
        (json!({"mask_token_id": 7, "shift": true, "block": 4}), "Config: diffusion: block is unknown"),
        (json!({"mask_token_id": 384, "shift": true}), "Config: mask_token_id 384 is outside the vocabulary of 384"),
        (json!({"mask_token_id": 2, "shift": true}), "Config: token 2 is both the mask and an end token"),
        (json!(7), "Config: diffusion: expected an object, found 7"),
    ] {
        let e = of("tiny-llama", object).unwrap_err();
        assert!(e.starts_with(says), "{says}: {e}");
    }
    let e = of("tiny-gemma3", json!({"mask_token_id": 7, "shift": true})).unwrap_err();
    assert!(e.contains("a diffusion model with a sliding window"), "{e}");
}

#[test]
fn end_tokens_come_from_every_file() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder("tiny-llada")).unwrap() {
        let from = entry.unwrap().path();
        std::fs::copy(&from, dir.path().join(from.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("tokenizer.json");
    let mut t = read(path.clone());
    let mut turn = t["added_tokens"][0].clone();
    (turn["id"], turn["content"]) = (385.into(), "<|eot_id|>".into());
    t["added_tokens"].as_array_mut().unwrap().push(turn);
    std::fs::write(&path, t.to_string()).unwrap();
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [2, 300]}"#).unwrap();
    let c = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(c.config().eos, [2, 300]);
    assert_eq!(c.tokenizer().unwrap().eos(), [2, 300, 385, 0]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": 384}"#).unwrap();
    let e = Checkpoint::open(dir.path()).err().unwrap().to_string();
    assert!(e.contains("generation_config.json: token 384 is both the mask and an end token"), "{e}");
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// The rows of the head of a pass in blocks, the first `prompt` long.
fn rows<B: Backend>(model: &Model<B>, ids: &[u32], prompt: usize, block: usize) -> Vec<Vec<f32>> {
    let mut cache = KvCache::new(model.backend(), model.config(), 64).unwrap();
    let mut ws = Workspace::new(model.backend(), model.config(), 64, 64).unwrap();
    let mut all = Vec::new();
    for part in [&ids[..prompt]].into_iter().chain(ids[prompt..].chunks(block)) {
        model.forward(&mut [Sequence::new(&mut cache, part, Mask::Full, Want::All)], &mut ws).unwrap();
        for i in 0..part.len() {
            let mut row = vec![0.0; model.config().vocab];
            ws.logits(model.backend(), i, &mut row).unwrap();
            all.push(row);
        }
        cache.commit_first(part.len()).unwrap();
    }
    all
}

/// Likeliest token, its probability and the entropy of a row without its mask.
fn judge(row: &[f32], mask: usize) -> (u64, f64, f64) {
    let z: Vec<f64> =
        row.iter().enumerate().map(|(i, &x)| if i == mask { f64::NEG_INFINITY } else { x as f64 }).collect();
    let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = z.iter().map(|x| (x - top).exp()).sum();
    let p = z.iter().map(|x| (x - top).exp() / sum);
    let entropy = p.filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum();
    (z.iter().position(|&x| x == top).unwrap() as u64, 1.0 / sum, entropy)
}

fn goldens_hold<B: Backend>(be: impl Fn() -> B, tolerance: f64, backend: &str) {
    for name in NAMES {
        let golden = read(folder(name).join("golden.json"));
        let model = Model::load(Arc::new(be()), &open(name), |_, _| {}).unwrap();
        let d = model.config().diffusion.unwrap();
        assert_eq!((json!(d.mask), json!(d.shift)), (golden["mask"].clone(), golden["shift"].clone()));
        for case in golden["logits"].as_array().unwrap() {
            let what = format!("{name} on {backend}, {}", case["name"]);
            let near = |part: String, got: f64, want: &Value, tolerance: f64| {
                let want = want.as_f64().unwrap();
                assert!((got - want).abs() <= tolerance, "{what}: {part}: {got}, golden {want}");
            };
            let ids = ids(&case["ids"]);
            let prompt = case["prompt"].as_u64().unwrap() as usize;
            let rows = match case["name"].as_str().unwrap() {
                "full" => rows(&model, &ids, ids.len(), 1),
                _ => rows(&model, &ids, prompt, 4),
            };
            for (r, top) in case["top5"].as_array().unwrap().iter().enumerate() {
                for pair in top.as_array().unwrap() {
                    let id = pair[0].as_u64().unwrap() as usize;
                    near(format!("row {r}, logit {id}"), rows[r][id] as f64, &pair[1], tolerance);
                }
            }
            for row in case["rows"].as_array().unwrap() {
                let r = row[0].as_u64().unwrap() as usize;
                assert_eq!(row[1].as_array().unwrap().len(), model.config().vocab);
                for (i, want) in row[1].as_array().unwrap().iter().enumerate() {
                    near(format!("row {r}, logit {i}"), rows[r][i] as f64, want, tolerance);
                }
            }
            let masked = case["masked"].as_array().unwrap();
            assert_eq!(masked.len(), ids.iter().filter(|&&t| t == d.mask).count());
            for m in masked {
                let at = m[0].as_u64().unwrap() as usize;
                assert_eq!(ids[at], d.mask);
                let (token, p, entropy) = judge(&rows[at - usize::from(d.shift)], d.mask as usize);
                assert_eq!(token, m[1].as_u64().unwrap(), "{what}: position {at}");
                // dp/dz_i sums to at most 1/2; dH/dz_i = -p_i (ln p_i + H), whose absolute values sum to about 1 here.
                near(format!("probability at {at}"), p, &m[2], tolerance);
                near(format!("entropy at {at}"), entropy, &m[3], 2.0 * tolerance);
            }
        }
    }
}

#[test]
fn naive_equals_the_goldens() {
    // What is left is the goldens' own rounding to six decimals, and rotations rounded to f32.
    goldens_hold(|| Naive, 1e-5, "naive");
}

#[test]
fn cpu_exact_is_within_a_thousandth() {
    for tier in Tier::available() {
        goldens_hold(|| Cpu::with(2, tier, Compute::Exact), 1e-3, &format!("cpu exact {tier}"));
    }
}

fn same_tensors(a: &Checkpoint, b: &Checkpoint) {
    for slot in roles::slots(a.config()) {
        assert!(a.tensor(slot.role).unwrap().to_f32() == b.tensor(slot.role).unwrap().to_f32(), "{}", slot.name);
    }
}

#[test]
fn a_model_is_written_and_read() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let a = open(name);
        let out = dir.path().join(name);
        write_model(&a, &a, &out).unwrap();
        let b = Checkpoint::open(&out).unwrap();
        b.check().unwrap();
        assert_eq!(a.config(), b.config());
        same_tensors(&a, &b);
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            assert!(
                std::fs::read(folder(name).join(file)).unwrap() == std::fs::read(out.join(file)).unwrap(),
                "{file}"
            );
        }
        assert!(write_model(&open("tiny-llama"), &a, &dir.path().join("other")).is_err());
    }
}

#[test]
fn a_converted_model_says_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let d = Diffusion { mask: 5, shift: true, block: Some(16) };
    for (name, d) in [("tiny-qwen2", d), ("tiny-llama3", Diffusion { block: None, ..d }), ("tiny-llada", d)] {
        let a = open(name);
        let out = dir.path().join(name);
        write_diffusion_model(&a, &a, d, &out).unwrap();
        let b = Checkpoint::open(&out).unwrap();
        b.check().unwrap();
        let mut want = a.config().clone();
        want.diffusion = Some(d);
        assert_eq!(*b.config(), want, "{name}");
        same_tensors(&a, &b);
        let (mut old, new) = (read(folder(name).join("config.json")), read(out.join("config.json")));
        old["diffusion"] = json!({"mask_token_id": 5, "shift": true, "block_size": d.block});
        assert_eq!(old.to_string(), new.to_string(), "keys and their order");
        // A converted model as the one to be like: the object is replaced.
        let again = dir.path().join(format!("{name}-again"));
        write_diffusion_model(&a, &b, Diffusion { mask: 6, shift: false, block: None }, &again).unwrap();
        let c = Checkpoint::open(&again).unwrap();
        assert_eq!(c.config().diffusion, Some(Diffusion { mask: 6, shift: false, block: None }));
        assert!(out.join("tokenizer.json").is_file() == folder(name).join("tokenizer.json").is_file());
    }
    let none = dir.path().join("none");
    let refused = |like: &Checkpoint, d, says: &str| {
        let e = write_diffusion_model(like, like, d, &none).unwrap_err().to_string();
        assert!(e.contains(says) && !none.exists(), "{e}");
    };
    refused(&open("tiny-llama"), Diffusion { mask: 384, ..d }, "token 384 is outside the vocabulary");
    refused(&open("tiny-llama"), Diffusion { mask: 2, ..d }, "both the mask and an end token");
    refused(&open("tiny-gemma3"), d, "sliding window");
    let gguf = Checkpoint::open(&folder("tiny-gguf").join("k.gguf")).unwrap();
    refused(&gguf, d, "open such a folder");
    let e = write_diffusion_model(&open("tiny-llama"), &open("tiny-qwen2"), d, &none).unwrap_err().to_string();
    assert!(e.contains("weights of another model") && !none.exists(), "{e}");
}

/// A tiny GGUF of `arch` under another architecture's name.
fn renamed(arch: &str, name: &str) -> files::Gguf {
    let mut g = tiny_gguf(arch, 3);
    for (key, _) in &mut g.keys {
        if let Some(tail) = key.strip_prefix(&format!("{arch}.")) {
            *key = format!("{name}.{tail}");
        }
    }
    g.key("general.architecture", Meta::Str(name.into()));
    g
}

#[test]
fn gguf_files_are_read_as_llama_cpp_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    let written = std::cell::Cell::new(0);
    let open = |g: &files::Gguf| {
        // Not one path for all: what is open is mapped.
        let path = dir.path().join(format!("{}.gguf", written.replace(written.get() + 1)));
        std::fs::write(&path, g.bytes()).unwrap();
        Checkpoint::open(&path)
    };
    for (arch, name, family, shift) in
        [("llama", "llada", Family::Llada, false), ("qwen2", "dream", Family::Dream, true)]
    {
        let plain = open(&tiny_gguf(arch, 3)).unwrap();
        let mut g = renamed(arch, name);
        let e = open(&g).err().unwrap().to_string();
        assert!(e.contains("tokenizer.ggml.mask_token_id is missing"), "{e}");
        g.key("tokenizer.ggml.mask_token_id", Meta::U32(270));
        let m = open(&g).unwrap();
        m.check().unwrap();
        assert_eq!(m.config().diffusion, Some(Diffusion { mask: 270, shift, block: None }));
        let mut like = plain.config().clone();
        (like.family, like.diffusion) = (family, m.config().diffusion);
        assert_eq!(*m.config(), like);
        // q and k of both are in the order of those they descend from.
        same_tensors(&plain, &m);
        g.key("diffusion.shift_logits", Meta::Bool(!shift));
        assert_eq!(open(&g).unwrap().config().diffusion.unwrap().shift, !shift);
        g.key("tokenizer.ggml.mask_token_id", Meta::U32(300));
        assert!(open(&g).err().unwrap().to_string().contains("token 300 is outside the vocabulary"));
    }
}

#[test]
fn inspect_shows_it() {
    let inspect = |path: &Path, more: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_quadriga"))
            .arg("inspect")
            .arg("-m")
            .arg(path)
            .args(more)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let of = |name| serde_json::from_str::<Value>(&inspect(&folder(name), &["--json"])).unwrap()["config"].clone();
    assert_eq!(of("tiny-llada")["diffusion"], json!({"mask": 384, "shift": false, "block": null}));
    assert_eq!((&of("tiny-dream")["diffusion"]["shift"], &of("tiny-dream")["family"]), (&json!(true), &json!("dream")));
    assert_eq!(of("tiny-llama")["diffusion"], Value::Null);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m");
    let a = open("tiny-llama");
    write_diffusion_model(&a, &a, Diffusion { mask: 5, shift: true, block: Some(16) }, &out).unwrap();
    let line = "masked diffusion · mask 5 · row i predicts position i + 1 · blocks of 16";
    assert!(inspect(&out, &[]).contains(line));
    assert!(inspect(&folder("tiny-llada"), &[]).contains("mask 384 · row i predicts position i · all see all"));
    assert!(!inspect(&folder("tiny-llama"), &[]).contains("masked diffusion"));
}
