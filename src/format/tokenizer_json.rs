//! The tokenizer that a Hugging Face `tokenizer.json` describes.
//!
//! The model is read here, straight into our own tables. Of the other parts only kinds in use by the supported families
//! pass; what passes is built by the `tokenizers` crate.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::AddedToken;

use crate::error::{Error, ErrorKind, Result, bail, ensure};
use crate::format::Pairs;
use crate::format::bpe::{BpeParts, Merges, Unknown, Vocab};
use crate::format::tokenizer::{Parts, Spelling};

#[derive(serde::Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(serde::Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default = "Model::no_vocab")]
    vocab: Pairs<u32>,
    #[serde(default)]
    merges: Vec<Merge>,
    unk_token: Option<String>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

impl Model {
    fn no_vocab() -> Pairs<u32> {
        Pairs(Vec::new())
    }
}

/// `["a", "b"]`, or `"a b"` in older files.
struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Pair;
        impl<'de> Visitor<'de> for Pair {
            type Value = Merge;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens to merge")
            }
            fn visit_str<E: serde::de::Error>(self, line: &str) -> std::result::Result<Merge, E> {
                let (left, right) = line.split_once(' ').ok_or_else(|| E::custom("a merge without a space"))?;
                Ok(Merge(left.into(), right.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Merge, A::Error> {
                match (seq.next_element()?, seq.next_element()?, seq.next_element::<String>()?) {
                    (Some(left), Some(right), None) => Ok(Merge(left, right)),
                    _ => Err(A::Error::custom("a merge that is not two tokens")),
                }
            }
        }
        d.deserialize_any(Pair)
    }
}

pub(crate) fn parts(json: &str) -> Result<Parts> {
    let file: File =
        serde_json::from_str(json).map_err(|e| Error::with_source(ErrorKind::Tokenizer, "not a tokenizer.json", e))?;
    let m = &file.model;
    let kind = m.kind.as_deref().unwrap_or("BPE");
    ensure!(kind == "BPE", Unsupported, "tokenizer model {kind:?} is not handled; BPE is");
    ensure!(m.dropout.unwrap_or(0.0) == 0.0, Unsupported, "a tokenizer with dropout is not handled");
    for affix in [&m.continuing_subword_prefix, &m.end_of_word_suffix].into_iter().flatten() {
        ensure!(affix.is_empty(), Unsupported, "subword affix {affix:?} is not handled");
    }

    let vocab = vocabulary(&m.vocab.0, &file.added_tokens)?;
    let merges = Merges::listed(&vocab, m.merges.iter().map(|Merge(a, b)| Ok((a.as_str(), b.as_str()))))?;
    let token = match &m.unk_token {
        None => None,
        Some(t) => match vocab.id(t) {
            Some(id) => Some(id),
            None => bail!(Tokenizer, "unk_token {t:?} is not in the vocabulary"),
        },
    };
    let unknown = Unknown { byte_fallback: m.byte_fallback, token, fuse: m.fuse_unk };
    let (prefix, suffix) = around(&file.post_processor, vocab.len())?;
    Ok(Parts {
        bpe: BpeParts { vocab, merges, unknown, whole_words: m.ignore_merges },
        normalizer: part(
            file.normalizer,
            "normalizer",
            &["NFC", "NFD", "NFKC", "NFKD", "Replace", "Prepend", "Lowercase", "Strip", "StripAccents", "Sequence"],
        )?,
        pre_tokenizer: part(
            file.pre_tokenizer,
            "pre_tokenizer",
            &["ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit", "Sequence"],
        )?,
        spelling: spelling(&file.decoder)?,
        added: file.added_tokens.into_iter().map(|a| (a.id, a.token)).collect(),
        prefix,
        suffix,
    })
}

/// Texts by id, of the model's vocabulary and of added tokens, which may stand in both.
fn vocabulary(pairs: &[(String, u32)], added: &[Added]) -> Result<Vocab> {
    let entries = || pairs.iter().map(|(t, id)| (t, *id)).chain(added.iter().map(|a| (&a.token.content, a.id)));
    let size = entries().map(|(_, id)| id as usize + 1).max().unwrap_or(0);
    // Gaps are allowed, but a single huge id must not make a huge table.
    let most = 2 * entries().count() + 65_536;
    ensure!(size <= most, Tokenizer, "token id {} with only {} tokens", size - 1, entries().count());
    let mut texts: Vec<&str> = vec![""; size];
    for (text, id) in entries() {
        let at = &mut texts[id as usize];
        ensure!(at.is_empty() || *at == text, Tokenizer, "tokens {at:?} and {text:?} have the same id {id}");
        *at = text;
    }
    let mut vocab = Vocab::with_capacity(size);
    texts.into_iter().try_for_each(|t| vocab.push(t))?;
    Ok(vocab)
}

fn kind_of(v: &Value) -> &str {
    v["type"].as_str().unwrap_or("(none)")
}

/// A part and, where it is a sequence, the parts of that, in order.
fn flatten<'a>(v: &'a Value, list: &str) -> Vec<&'a Value> {
    match v {
        Value::Null => Vec::new(),
        v if kind_of(v) == "Sequence" => {
            v[list].as_array().into_iter().flatten().flat_map(|v| flatten(v, list)).collect()
        }
        v => vec![v],
    }
}

/// Builds a part after checking that all its kinds are known.
fn part<T: DeserializeOwned>(v: Value, name: &str, known: &[&str]) -> Result<Option<T>> {
    let list = if name == "normalizer" { "normalizers" } else { "pretokenizers" };
    for step in flatten(&v, list) {
        let kind = kind_of(step);
        ensure!(known.contains(&kind), Unsupported, "{name} {kind:?} is not handled; {} are", known.join(", "));
    }
    if v.is_null() {
        return Ok(None);
    }
    serde_json::from_value(v).map(Some).map_err(|e| Error::with_source(ErrorKind::Tokenizer, name, e))
}

/// The tokens that the post-processor puts before and after a text.
fn around(post: &Value, count: usize) -> Result<(Vec<u32>, Vec<u32>)> {
    let (mut prefix, mut suffix) = (Vec::new(), Vec::new());
    for step in flatten(post, "processors") {
        match kind_of(step) {
            // Touches offsets only.
            "ByteLevel" => {}
            "TemplateProcessing" => {
                let mut seen = false;
                for piece in step["single"].as_array().into_iter().flatten() {
                    if piece.get("Sequence").is_some() {
                        ensure!(!seen, Tokenizer, "the post_processor repeats the text");
                        seen = true;
                        continue;
                    }
                    let name = piece["SpecialToken"]["id"].as_str().unwrap_or("");
                    let ids = step["special_tokens"].get(name).and_then(|t| t["ids"].as_array());
                    let Some(ids) = ids else {
                        bail!(Tokenizer, "the post_processor uses a special token {name:?} that it does not define");
                    };
                    for id in ids {
                        match id.as_u64() {
                            Some(i) if (i as usize) < count => {
                                (if seen { &mut suffix } else { &mut prefix }).push(i as u32);
                            }
                            _ => bail!(Tokenizer, "the post_processor's token {id} is outside the vocabulary"),
                        }
                    }
                }
                ensure!(seen, Tokenizer, "the post_processor drops the text");
            }
            other => {
                bail!(Unsupported, "post_processor {other:?} is not handled; ByteLevel and TemplateProcessing are")
            }
        }
    }
    Ok((prefix, suffix))
}

/// How the decoder turns token texts into bytes.
fn spelling(decoder: &Value) -> Result<Spelling> {
    let steps = flatten(decoder, "decoders");
    let steps: HashMap<&str, &Value> = steps.into_iter().map(|s| (kind_of(s), s)).collect();
    let unknown = |known: &[&str]| steps.keys().find(|k| !known.contains(k)).copied();
    if steps.contains_key("ByteLevel") && unknown(&["ByteLevel", "Fuse"]).is_none() {
        return Ok(Spelling::ByteLevel);
    }
    if let Some(other) = unknown(&["Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"]) {
        bail!(Unsupported, "decoder {other:?} is not handled");
    }
    let marks = steps.get("Replace").is_some_and(|r| r["pattern"]["String"] == "\u{2581}" && r["content"] == " ");
    let strip = steps.get("Strip").map(|s| s["content"] == " " && s["start"] == 1 && s["stop"] == 0);
    let metaspace = steps.get("Metaspace");
    ensure!(
        (marks || metaspace.is_some()) && strip != Some(false),
        Unsupported,
        "the decoder is neither byte-level nor SentencePiece"
    );
    let strip_leading = strip.is_some() || metaspace.is_some_and(|m| m["prepend_scheme"] != "never");
    Ok(Spelling::Sentence { strip_leading })
}
