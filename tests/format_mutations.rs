//! Damaged and hostile files: every reader must answer with a result or an [`Error`](quadriga::Error), never with a panic,
//! never with an allocation out of proportion to the file. Seeded: a failure prints the case to repeat.

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use quadriga::dtype::DType;
use quadriga::format::gguf::Gguf;
use quadriga::format::safetensors::Shards;
use quadriga::format::{ChatTemplate, Checkpoint, Message, Tokenizer, gguf_config, hf_config};
use quadriga::model::roles::{Role, TensorSource};
use quadriga::tensor::ByteSource;
use support::files::{self, tiny_gguf};
use support::{Cases, model};

/// Integers that break careless readers.
const NASTY: [u64; 16] = [
    0,
    1,
    2,
    3,
    31,
    0x7F,
    0xFF,
    0xFFFF,
    0x7FFF_FFFF,
    0xFFFF_FFFF,
    1 << 32,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 7,
    u64::MAX,
];

/// One to four random changes within the first `area` bytes.
fn mutate(good: &[u8], area: usize, cases: &mut Cases) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..1 + cases.below(4) {
        let at = cases.below(area.min(bytes.len()));
        match cases.below(8) {
            0 => bytes.truncate(at),
            1 | 2 if at < bytes.len() => bytes[at] ^= 1 << cases.below(8),
            3 if at < bytes.len() => bytes[at] = cases.next() as u8,
            4 | 5 => {
                let width = *cases.pick(&[1, 2, 4, 8]);
                let value = cases.pick(&NASTY).to_le_bytes();
                if let Some(place) = bytes.get_mut(at..at + width) {
                    place.copy_from_slice(&value[..width]);
                }
            }
            6 => {
                let n = cases.below(24).min(bytes.len() - at);
                bytes.drain(at..at + n);
            }
            _ => {
                let from = cases.below(bytes.len().max(1));
                let n = cases.below(24).min(bytes.len() - from);
                let piece = bytes[from..from + n].to_vec();
                bytes.splice(at..at, piece);
            }
        }
        if bytes.is_empty() {
            break;
        }
    }
    bytes
}

/// Swaps numbers and pieces of a JSON text for others, keeping most of it well-formed.
fn mutate_json(good: &str, cases: &mut Cases) -> String {
    const WORDS: [&str; 18] = [
        "0",
        "-1",
        "1e400",
        "18446744073709551615",
        "9223372036854775808",
        "1e-320",
        "null",
        "true",
        "\"\"",
        "[]",
        "{}",
        "\"\\ud800\"",
        "[[[[[[[[]]]]]]]]",
        "0.5",
        "\"Sequence\"",
        "4294967295",
        "16777215",
        "\u{2581}",
    ];
    let mut text = good.to_owned();
    for _ in 0..1 + cases.below(3) {
        // A random token of the text: a run of letters and digits, a string, or one sign.
        let at = cases.below(text.len());
        let Some(start) = (0..=at).rev().find(|i| text.is_char_boundary(*i)) else { continue };
        let rest = &text[start..];
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '.' && c != '"').filter(|n| *n > 0).unwrap_or(1);
        let end = (start + word..=text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
        match cases.below(4) {
            0 => text.replace_range(start..end, ""),
            1 => text.truncate(start),
            _ => text.replace_range(start..end, cases.pick::<&str>(&WORDS)),
        }
        if text.is_empty() {
            break;
        }
    }
    text
}

/// Everything the engine would do with a GGUF.
fn use_gguf(bytes: Vec<u8>) -> bool {
    let Ok(g) = Gguf::parse(Arc::new(bytes)) else { return false };
    for t in g.tensors() {
        assert!(g.data(t).len() == t.range.len());
    }
    let template = ChatTemplate::from_gguf(&g, "t");
    if let Ok(Some(t)) = template {
        let _ = t.render(&[Message::new("user", "hello")], true);
    }
    use_tokenizer(Tokenizer::from_gguf(&g));
    gguf_config::model_config(&g).is_ok()
}

fn use_tokenizer(t: quadriga::Result<Tokenizer>) -> bool {
    let Ok(t) = t else { return false };
    for parse in [false, true] {
        if let Ok(ids) = t.encode("hello wörld <|im_end|> 12\n\n  x", true, parse) {
            let text = t.decode(&ids, parse);
            assert!(text.len() < 10_000);
        }
    }
    true
}

fn use_folder(folder: &Path) -> bool {
    let Ok(c) = Checkpoint::open(folder) else { return false };
    let _ = (c.tokenizer().is_ok(), c.chat_template().is_ok());
    let whole = c.check().is_ok();
    if whole {
        let t = c.tensor(Role::FinalNorm).unwrap();
        assert_eq!(t.to_f32().len(), c.config().hidden);
    }
    whole
}

fn run(name: &str, seed: u64, count: usize, mut one: impl FnMut(&mut Cases) -> bool) {
    let mut accepted = 0;
    for i in 0..count as u64 {
        let case = seed.wrapping_add(i.wrapping_mul(0x1_0000_0001));
        let result = catch_unwind(AssertUnwindSafe(|| one(&mut Cases(case))));
        match result {
            Ok(ok) => accepted += usize::from(ok),
            Err(_) => panic!("{name}: case {case:#x} panicked"),
        }
    }
    eprintln!("{name}: {count} cases, {accepted} still accepted");
}

/// Peak resident memory of this process in MB, where the system tells it.
fn peak_mb() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM"));
    line.and_then(|l| l.split_whitespace().nth(1)).and_then(|n| n.parse::<usize>().ok()).unwrap_or(0) / 1024
}

/// One test, so that the peak of memory belongs to it.
#[test]
fn damaged_files_are_errors() {
    let before = peak_mb();
    let scale = std::env::var("QUADRIGA_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(1);

    for (arch, version) in [("llama", 3), ("gemma3", 2)] {
        let good = tiny_gguf(arch, version);
        let header = good.bytes().len() - good.tensors.iter().map(|t| t.3.len()).sum::<usize>();
        let good = good.bytes();
        assert!(use_gguf(good.clone()));
        run(&format!("gguf {arch}"), 1, 4000 * scale, |c| use_gguf(mutate(&good, header, c)));
        // The interesting numbers are few beside the vocabulary: aim at both ends of the header.
        run(&format!("gguf {arch}, first keys"), 2, 2000 * scale, |c| use_gguf(mutate(&good, 700, c)));
        run(&format!("gguf {arch}, table"), 3, 2000 * scale, |c| {
            let table = header - 2000..header;
            let mut bytes = good.clone();
            let changed = mutate(&good[table.clone()], table.len(), c);
            bytes.splice(table, changed);
            use_gguf(bytes)
        });
    }
    // A real header without its tensors, so that what gets through the parser reaches the tokenizer.
    if let Some(path) = model("SmolLM2-135M-Instruct.Q4_1.gguf") {
        use std::io::Read;
        let mut good = Vec::new();
        std::fs::File::open(path).unwrap().take(1_785_664).read_to_end(&mut good).unwrap();
        good[8..16].fill(0);
        let tokenize = |bytes| Gguf::parse(Arc::new(bytes)).is_ok_and(|g| use_tokenizer(Tokenizer::from_gguf(&g)));
        assert!(tokenize(good.clone()));
        run("real header, first keys", 4, 200 * scale, |c| tokenize(mutate(&good, 1500, c)));
        run("real header", 5, 200 * scale, |c| tokenize(mutate(&good, good.len(), c)));
    }

    let named = |arch| files::tensors(arch).into_iter().map(|(_, hf, shape)| (hf, shape));
    let mut numbers = Cases(3);
    let tensors: Vec<(String, &str, Vec<usize>, Vec<u8>)> = named("llama")
        .map(|(hf, shape)| {
            let n = shape.iter().product();
            (hf, "F32", shape, files::f32_bytes(&mut numbers, n))
        })
        .collect();
    let weights = files::safetensors(&tensors);
    let header = weights.len() - tensors.iter().map(|t| t.3.len()).sum::<usize>();
    let parse = |bytes: Vec<u8>| {
        let shards = Shards::parse(vec![("m".into(), Arc::new(bytes) as Arc<dyn ByteSource>)]);
        shards.is_ok_and(|s| s.tensors().all(|t| s.tensor(&t.name).is_some_and(|(e, b)| e.range.len() == b.len())))
    };
    assert!(parse(weights.clone()));
    run("safetensors", 6, 2500 * scale, |c| parse(mutate(&weights, header, c)));
    run("safetensors, numbers", 7, 1500 * scale, |c| {
        let text = std::str::from_utf8(&weights[8..header]).unwrap();
        let text = mutate_json(text, c);
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.extend(&weights[header..]);
        parse(bytes)
    });

    for arch in ["llama", "qwen2", "gemma3"] {
        let config = files::tiny_config(arch).to_string();
        run(&format!("config.json {arch}"), 8, 1200 * scale, |c| hf_config::parse(&mutate_json(&config, c)).is_ok());
    }
    let tokenizer = files::tiny_tokenizer().to_string();
    run("tokenizer.json", 9, 1500 * scale, |c| use_tokenizer(Tokenizer::from_json(&mutate_json(&tokenizer, c))));
    // Most of that text is vocabulary; the parts around it matter more.
    let parts = tokenizer.find("\"vocab\"").unwrap();
    run("tokenizer.json, parts", 10, 1500 * scale, |c| {
        let text = mutate_json(&tokenizer[..parts], c) + &tokenizer[parts..];
        use_tokenizer(Tokenizer::from_json(&text))
    });
    let template = "{% set ns = namespace(x=[1, 2]) %}{% for m in messages[0:] %}{% if loop.first and m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ bos_token + m['content'].strip() | upper }}{{ m | tojson(indent=2) }}{{ '%5d' | format(3) }}{{ 'x' * 3 }}{% endfor %}{% macro f(a) %}{{ a }}{% endmacro %}{{ f(ns.x[-1]) }}{{ strftime_now('%d %b %Y') }}";
    run("chat template", 11, 1500 * scale, |c| {
        let text = mutate_json(template, c);
        ChatTemplate::new("t", &text, "<s>", "</s>")
            .is_ok_and(|t| t.render(&[Message::new("user", "hi")], true).is_ok())
    });

    let dir = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let file = format!("model-{i}.safetensors");
        std::fs::write(dir.path().join(&file), files::safetensors(part)).unwrap();
        map.extend(part.iter().map(|t| (t.0.clone(), file.clone().into())));
    }
    let index = serde_json::json!({"weight_map": map}).to_string();
    for (file, text) in [
        ("config.json", files::tiny_config("llama").to_string()),
        ("generation_config.json", r#"{"eos_token_id": [262, 261]}"#.into()),
        (
            "tokenizer_config.json",
            r#"{"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "x"}]}"#.into(),
        ),
        ("model.safetensors.index.json", index),
    ] {
        let path = dir.path().join(file);
        std::fs::write(&path, &text).unwrap();
        if file == "model.safetensors.index.json" {
            assert!(use_folder(dir.path()));
            run(file, 12, 500 * scale, |c| {
                std::fs::write(&path, mutate_json(&text, c)).unwrap();
                use_folder(dir.path())
            });
            std::fs::write(&path, &text).unwrap();
        }
    }
    for file in ["generation_config.json", "tokenizer_config.json", "config.json"] {
        let path = dir.path().join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        run(file, 13, 200 * scale, |c| {
            std::fs::write(&path, mutate_json(&text, c)).unwrap();
            use_folder(dir.path())
        });
        std::fs::write(&path, &text).unwrap();
    }

    let grown = peak_mb() - before;
    eprintln!("peak memory grew by {grown} MB");
    assert!(grown < 300, "peak memory grew by {grown} MB");
}

#[test]
fn empty_and_foreign_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    for bytes in [&b""[..], b"G", b"GGUF", b"GGUF\x03\0\0\0", b"PK\x03\x04", b"{}", &[0; 64], &[0xFF; 64]] {
        std::fs::write(&path, bytes).unwrap();
        let e = Checkpoint::open(&path).err().unwrap().to_string();
        assert!(e.contains("/f"), "{e}");
        assert!(Checkpoint::open_archive(&path, dir.path()).is_err());
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        assert!(Checkpoint::open(dir.path()).is_err());
    }
    assert!(Checkpoint::open(&dir.path().join("nothing")).is_err());
    assert!(Tokenizer::from_json("").is_err() && Tokenizer::from_json("{}").is_err());
    assert!(hf_config::parse("").is_err() && hf_config::parse("[]").is_err());
}

#[test]
fn weights_that_are_no_numbers_load() {
    let mut g = tiny_gguf("llama", 3);
    g.tensors.iter_mut().for_each(|t| t.3.iter_mut().for_each(|b| *b = 0xFF));
    // A block type as well: every kind of scale is NaN.
    let q = g.tensors.iter_mut().find(|t| t.0.ends_with("ffn_down.weight")).unwrap();
    (q.2, q.3) = (8, vec![0xFF; files::HIDDEN * files::FFN / 32 * 34]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nan.gguf");
    std::fs::write(&path, g.bytes()).unwrap();
    let c = Checkpoint::open(&path).unwrap();
    c.check().unwrap();
    for slot in quadriga::format::roles::slots(c.config()) {
        let t = c.tensor(slot.role).unwrap();
        assert!(t.to_f32().iter().all(|x| x.is_nan()), "{}", slot.name);
        assert_eq!(t.dtype == DType::Q8_0, slot.name == "layer 0 mlp.down");
    }
}

#[test]
fn offsets_that_overlap_or_leave_the_file_are_errors() {
    let good = tiny_gguf("llama", 3).bytes();
    let name = b"output_norm.weight";
    let at = good.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 4 + 8 + 4;
    for (offset, says) in [
        (0u64, "overlap"),
        (32, "overlap"),
        (33, "not a multiple"),
        (1 << 40, "reaches beyond"),
        (u64::MAX - 31, "reaches beyond"),
        (1 << 63, "reaches beyond"),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
        let e = Gguf::parse(Arc::new(bytes)).err().unwrap().to_string();
        assert!(e.contains(says) && e.contains("output_norm.weight"), "{offset}: {e}");
    }
}
