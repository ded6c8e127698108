//! Byte-pair encoding against a naive statement of it, on random vocabularies.

mod support;

use std::sync::Arc;

use quadriga::format::gguf::Gguf;
use quadriga::format::{ChatTemplate, Checkpoint, Decoder, Tokenizer};
use serde_json::json;
use support::Cases;
use support::files::{self, Meta};

const SPACE: &str = "\u{2581}";

/// A SentencePiece vocabulary: three special tokens, all bytes, single characters, and random longer pieces with scores
/// that have many ties.
fn sentence_vocab(cases: &mut Cases) -> (Vec<String>, Vec<f32>, Vec<i32>) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    tokens.extend([SPACE, "a", "b", "c", "é"].map(String::from));
    while tokens.len() < 340 {
        let piece: String = (0..2 + cases.below(4)).map(|_| *cases.pick(&[SPACE, "a", "b", "c", "é"])).collect();
        if !tokens.contains(&piece) {
            tokens.push(piece);
        }
    }
    let scores = tokens.iter().map(|_| -(cases.below(30) as f32)).collect();
    let types = (0..tokens.len())
        .map(|i| {
            if i < 1 {
                2
            } else if i < 3 {
                3
            } else if i < 259 {
                6
            } else {
                1
            }
        })
        .collect();
    (tokens, scores, types)
}

/// The merges that the scores stand for, by definition: every split of every ordinary token into two ordinary tokens, in
/// order of falling score, then of ids.
fn merges(tokens: &[String], scores: &[f32], types: &[i32]) -> Vec<(String, String)> {
    let id = |s: &str| tokens.iter().position(|t| t == s).filter(|i| types[*i] == 1);
    let mut all = Vec::new();
    for (i, whole) in tokens.iter().enumerate().filter(|(i, _)| types[*i] == 1) {
        for (k, _) in whole.char_indices().skip(1) {
            if let (Some(l), Some(r)) = (id(&whole[..k]), id(&whole[k..])) {
                all.push((-scores[i], l, r));
            }
        }
    }
    all.sort_by(|a, b| a.partial_cmp(b).unwrap());
    all.into_iter().map(|(_, l, r)| (tokens[l].clone(), tokens[r].clone())).collect()
}

/// Merges the best-ranked pair, leftmost first, until none is left.
fn naive(text: &str, tokens: &[String], merges: &[(String, String)]) -> Vec<u32> {
    let known = |s: &str| tokens.iter().any(|t| t == s);
    let mut parts: Vec<String> = Vec::new();
    for c in text.chars() {
        let c = c.to_string();
        if known(&c) {
            parts.push(c);
        } else {
            parts.extend(c.bytes().map(|b| format!("<0x{b:02X}>")));
        }
    }
    while let Some((_, at)) = (1..parts.len())
        .filter_map(|i| merges.iter().position(|(l, r)| *l == parts[i - 1] && *r == parts[i]).map(|rank| (rank, i)))
        .min()
    {
        let right = parts.remove(at);
        parts[at - 1] += &right;
    }
    parts.iter().map(|p| tokens.iter().position(|t| t == p).unwrap() as u32).collect()
}

#[test]
fn scores_listed_merges_and_the_definition_agree() {
    for seed in 0..12 {
        let mut cases = Cases(seed);
        let (tokens, scores, types) = sentence_vocab(&mut cases);
        let merges = merges(&tokens, &scores, &types);
        let prefix = seed % 2 == 0;

        let mut g = files::Gguf { version: 3, keys: Vec::new(), tensors: Vec::new() };
        g.key("tokenizer.ggml.model", Meta::Str("llama".into()));
        g.key("tokenizer.ggml.tokens", Meta::Strs(tokens.clone()));
        g.key("tokenizer.ggml.scores", Meta::F32s(scores));
        g.key("tokenizer.ggml.token_type", Meta::I32s(types));
        g.key("tokenizer.ggml.unknown_token_id", Meta::U32(0));
        g.key("tokenizer.ggml.bos_token_id", Meta::U32(1));
        if !prefix {
            g.key("tokenizer.ggml.add_space_prefix", Meta::Bool(false));
        }
        let scored = Tokenizer::from_gguf(&Gguf::parse(Arc::new(g.bytes())).unwrap()).unwrap();
        assert!(scored.add_bos());

        let vocab: serde_json::Map<String, serde_json::Value> =
            tokens.iter().zip(0..).map(|(t, i)| (t.clone(), json!(i))).collect();
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let back = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
        let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let prepend = json!({"type": "Prepend", "prepend": SPACE});
        let (normalizers, decoders) = if prefix {
            (json!([prepend, replace]), json!([back, bytes, fuse, strip]))
        } else {
            (json!([replace]), json!([back, bytes, fuse]))
        };
        let listed = json!({
            "added_tokens": [special(1, "<s>"), special(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                "vocab": vocab, "merges": merges.iter().map(|(l, r)| format!("{l} {r}")).collect::<Vec<_>>()}
        });
        let listed = Tokenizer::from_json(&listed.to_string()).unwrap();

        for _ in 0..150 {
            let text: String = (0..cases.below(40)).map(|_| *cases.pick(&[" ", "a", "b", "c", "é", "☃"])).collect();
            let ids = scored.encode(&text, false, true).unwrap();
            assert_eq!(ids, listed.encode(&text, false, true).unwrap(), "{seed} {text:?}");
            let mark = if prefix && !text.is_empty() { SPACE } else { "" };
            let spelled = mark.to_owned() + &text.replace(' ', SPACE);
            assert_eq!(ids, naive(&spelled, &tokens, &merges), "{seed} {text:?}");
            assert_eq!(scored.decode(&ids, true), text);
            assert_eq!(listed.decode(&ids, true), text);
        }
    }
}

#[test]
fn they_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Checkpoint>();
    shared::<Tokenizer>();
    shared::<Decoder>();
    shared::<ChatTemplate>();
}
