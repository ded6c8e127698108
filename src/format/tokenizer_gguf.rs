//! The tokenizer that GGUF metadata describe.

use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::bpe::{BpeParts, Merges, Unknown, Vocab};
use crate::format::gguf::Gguf;
use crate::format::tokenizer::{Parts, Spelling};

/// Token types of the format.
const NORMAL: f64 = 1.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// How Qwen and Llama 3 cut a text; they differ in how many digits stay together.
fn split_pattern(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

pub(crate) fn parts(file: &Gguf) -> Result<Parts> {
    let Some(model) = file.str("tokenizer.ggml.model")? else {
        bail!(Tokenizer, "tokenizer.ggml.model is missing");
    };
    let tokens = need(file.strings("tokenizer.ggml.tokens")?, "tokenizer.ggml.tokens")?;
    let count = tokens.len();
    ensure!(count <= 1 << 24, Tokenizer, "a vocabulary of {count} tokens");
    let mut vocab = Vocab::with_capacity(count);
    for (i, text) in tokens.enumerate() {
        vocab.push(text.context(|| format!("token {i}"))?)?;
    }
    let mut added = Vec::new();
    let types = file.numbers("tokenizer.ggml.token_type")?;
    if let Some(types) = &types {
        ensure!(types.len() == count, Tokenizer, "{count} tokens, but {} token types", types.len());
        for (id, kind) in (0..).zip(types.clone()).filter(|(_, k)| *k == CONTROL || *k == USER_DEFINED) {
            added.push((id, AddedToken::from(vocab.text(id), kind == CONTROL).normalized(false)));
        }
    }
    let mut parts = match model {
        "gpt2" => byte_level(file, vocab)?,
        "llama" => sentence(file, vocab, need(types, "tokenizer.ggml.token_type")?)?,
        _ => bail!(Unsupported, "tokenizer model {model:?} is not handled; gpt2 and llama are"),
    };
    parts.added = added;
    // Where a file does not say, SentencePiece and Llama 3 open a text with bos, the other byte-level ones do not.
    let default = model == "llama" || file.str("tokenizer.ggml.pre")? == Some("llama-bpe");
    parts.prefix = around(file, "bos", default, count)?;
    parts.suffix = around(file, "eos", false, count)?;
    Ok(parts)
}

fn need<T>(value: Option<T>, key: &str) -> Result<T> {
    value.ok_or_else(|| Error::new(ErrorKind::Tokenizer, format!("{key} is missing")))
}

/// The bos or eos token if texts get it.
fn around(file: &Gguf, which: &str, default: bool, count: usize) -> Result<Vec<u32>> {
    if !file.bool(&format!("tokenizer.ggml.add_{which}_token"))?.unwrap_or(default) {
        return Ok(Vec::new());
    }
    let key = format!("tokenizer.ggml.{which}_token_id");
    let id = need(file.token(&key)?, &key)?;
    ensure!((id as usize) < count, Tokenizer, "{key} is {id}, the vocabulary has {count} tokens");
    Ok(vec![id])
}

/// Byte-level BPE. `tokenizer.ggml.pre` names how the text is normalised and cut before, which the file does not hold.
fn byte_level(file: &Gguf, vocab: Vocab) -> Result<Parts> {
    let level = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, true, use_regex));
    let split = |digits: &str| -> Result<PreTokenizerWrapper> {
        Split::new(SplitPattern::Regex(split_pattern(digits)), SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::from)
            .map_err(|e| Error::with_source(ErrorKind::Tokenizer, "split pattern", e))
    };
    let pre = file.str("tokenizer.ggml.pre")?;
    let (normalizer, steps, whole_words) = match pre {
        Some("smollm") => (None, vec![Digits::new(true).into(), level(true)], false),
        // The metadata do not name it, but Qwen's own tokenizer composes characters first.
        Some("qwen2") => (Some(NFC.into()), vec![split(r"\p{N}")?, level(false)], false),
        Some("llama-bpe") => (None, vec![split(r"\p{N}{1,3}")?, level(false)], true),
        Some("gpt-2") => (None, vec![level(true)], false),
        _ => bail!(
            Unsupported,
            "tokenizer.ggml.pre {:?} is not handled; smollm, qwen2, llama-bpe and gpt-2 are",
            pre.unwrap_or("(missing)")
        ),
    };
    let lines = need(file.strings("tokenizer.ggml.merges")?, "tokenizer.ggml.merges")?;
    // A merge is "left right"; a space within either is spelled otherwise, so the first one is the border.
    let pairs = lines.map(|line| {
        let line = line?;
        line.split_once(' ').ok_or_else(|| Error::new(ErrorKind::Tokenizer, format!("{line:?} is no pair")))
    });
    let merges = Merges::listed(&vocab, pairs)?;
    Ok(Parts {
        bpe: BpeParts { vocab, merges, unknown: Unknown::default(), whole_words },
        added: Vec::new(),
        normalizer,
        pre_tokenizer: Some(Sequence::new(steps).into()),
        spelling: Spelling::ByteLevel,
        prefix: Vec::new(),
        suffix: Vec::new(),
    })
}

/// SentencePiece BPE: no merges in the file, scores rank them.
fn sentence(file: &Gguf, vocab: Vocab, types: impl Iterator<Item = f64>) -> Result<Parts> {
    let scores = need(file.numbers("tokenizer.ggml.scores")?, "tokenizer.ggml.scores")?;
    ensure!(scores.len() == vocab.len(), Tokenizer, "{} tokens, but {} scores", vocab.len(), scores.len());
    let merges = Merges::scored(scores.zip(types).map(|(s, kind)| (kind == NORMAL).then_some(s as f32)));
    let token = file.token("tokenizer.ggml.unknown_token_id")?;
    ensure!(
        token.is_none_or(|t| (t as usize) < vocab.len()),
        Tokenizer,
        "tokenizer.ggml.unknown_token_id is {token:?}"
    );

    let space = Replace::new(" ", "\u{2581}").map_err(|e| Error::with_source(ErrorKind::Tokenizer, "space mark", e))?;
    let strip_leading = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let normalizer: NormalizerWrapper = if strip_leading {
        Normalizers::new(vec![Prepend::new("\u{2581}".into()).into(), space.into()]).into()
    } else {
        space.into()
    };
    Ok(Parts {
        bpe: BpeParts {
            vocab,
            merges,
            unknown: Unknown { byte_fallback: true, token, fuse: true },
            whole_words: false,
        },
        added: Vec::new(),
        normalizer: Some(normalizer),
        pre_tokenizer: None,
        spelling: Spelling::Sentence { strip_leading },
        prefix: Vec::new(),
        suffix: Vec::new(),
    })
}
