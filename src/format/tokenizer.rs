//! Text to token ids and back.
//!
//! Normalisation, splitting and special tokens are the `tokenizers` crate's; the byte-pair model beneath is ours and loads
//! in milliseconds. A tokenizer comes from `tokenizer.json` or from GGUF metadata and behaves the same from both.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use crate::error::{Error, ErrorKind, Result};
use crate::format::bpe::{Bpe, BpeParts};
use crate::format::gguf::Gguf;
use crate::format::{tokenizer_gguf, tokenizer_json};

type Impl = TokenizerImpl<Bpe, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Names of tokens that end a turn or a text in the supported families.
const END_NAMES: [&str; 8] =
    ["<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"];

/// How token texts stand for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// One printable character per byte (GPT-2's alphabet).
    ByteLevel,
    /// Text with U+2581 for a space; `<0x0A>` for single bytes (SentencePiece). Texts decode without the space that
    /// encoding put in front, where it does.
    Sentence { strip_leading: bool },
}

/// What a file says about its tokenizer, in one form for both kinds of files.
pub(crate) struct Parts {
    pub(crate) bpe: BpeParts,
    pub(crate) added: Vec<(u32, AddedToken)>,
    pub(crate) normalizer: Option<NormalizerWrapper>,
    pub(crate) pre_tokenizer: Option<PreTokenizerWrapper>,
    pub(crate) spelling: Spelling,
    /// Put before and after a text when special tokens are asked for.
    pub(crate) prefix: Vec<u32>,
    pub(crate) suffix: Vec<u32>,
}

struct Inner {
    bpe: Bpe,
    reading: Impl,
    /// The same without special tokens in the text; made when first asked for.
    plain: OnceLock<Impl>,
    /// Tokens outside of the model's own alphabet, and whether each is special.
    added: HashMap<u32, bool>,
    spelling: Spelling,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    eos: Vec<u32>,
}

/// A tokenizer. Cheap to clone; usable from several threads.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({} tokens, {:?})", self.vocab_size(), self.0.spelling)
    }
}

impl Tokenizer {
    /// From the text of a `tokenizer.json` (byte-pair models only).
    pub fn from_json(json: &str) -> Result<Self> {
        Self::build(tokenizer_json::parts(json)?)
    }

    /// From the metadata of a GGUF file.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        Self::build(tokenizer_gguf::parts(file)?)
    }

    fn build(parts: Parts) -> Result<Self> {
        let damaged =
            |e: tokenizers::Error| Error::with_source(ErrorKind::Tokenizer, "the tokenizer does not fit together", e);
        let bpe = Bpe(Arc::new(parts.bpe));
        let mut reading = Impl::new(bpe.clone());
        reading.with_normalizer(parts.normalizer).map_err(damaged)?;
        reading.with_pre_tokenizer(parts.pre_tokenizer);
        let added: HashMap<u32, bool> = parts.added.iter().map(|(id, t)| (*id, t.special)).collect();
        // All in one call: each call builds the search automaton anew.
        reading.add_tokens(parts.added.into_iter().map(|(_, t)| t)).map_err(damaged)?;
        let mut inner = Inner {
            bpe,
            reading,
            plain: OnceLock::new(),
            added,
            spelling: parts.spelling,
            prefix: parts.prefix,
            suffix: parts.suffix,
            eos: Vec::new(),
        };
        let end =
            END_NAMES.iter().filter_map(|n| inner.bpe.0.vocab.id(n)).filter(|id| inner.added.get(id) == Some(&true));
        inner.eos = end.collect();
        Ok(Self(Arc::new(inner)))
    }

    /// The same with further end tokens, such as those of the model's configuration; they come first.
    #[must_use]
    pub fn with_eos(self, ids: &[u32]) -> Self {
        let mut eos: Vec<u32> = Vec::new();
        for &id in ids.iter().chain(&self.0.eos) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let mut inner = self.0;
        match Arc::get_mut(&mut inner) {
            Some(unique) => unique.eos = eos,
            None => {
                inner = Arc::new(Inner {
                    bpe: inner.bpe.clone(),
                    reading: inner.reading.clone(),
                    plain: OnceLock::new(),
                    added: inner.added.clone(),
                    spelling: inner.spelling,
                    prefix: inner.prefix.clone(),
                    suffix: inner.suffix.clone(),
                    eos,
                });
            }
        }
        Self(inner)
    }

    /// Tokens, gaps and special ones included. The model's matrix may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.0.bpe.0.vocab.len()
    }

    /// The ids of `text`. With `add_special` the tokens that open (and close) a text are put around it; with `parse_special`
    /// text such as `<|im_end|>` is read as the special token, without it as plain characters (for text of unknown origin).
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let inner = &*self.0;
        let plain = || {
            let mut t = inner.reading.clone();
            t.set_encode_special_tokens(true);
            t
        };
        let with = if parse_special { &inner.reading } else { inner.plain.get_or_init(plain) };
        let failed = |e| Error::with_source(ErrorKind::Tokenizer, "the text cannot be tokenized", e);
        let encoding = with.encode_fast(text, false).map_err(failed)?;
        let (prefix, suffix) = if add_special { (&inner.prefix[..], &inner.suffix[..]) } else { (&[][..], &[][..]) };
        Ok([prefix, encoding.get_ids(), suffix].concat())
    }

    /// Whether [`Tokenizer::encode`] with `add_special` puts a token before the text.
    pub fn add_bos(&self) -> bool {
        !self.0.prefix.is_empty()
    }

    /// The tokens that [`Tokenizer::encode`] with `add_special` puts before the text.
    pub fn prefix(&self) -> &[u32] {
        &self.0.prefix
    }

    /// Tokens that end a text or a turn.
    pub fn eos(&self) -> &[u32] {
        &self.0.eos
    }

    /// Whether `id` is a special token, not part of any text.
    pub fn is_special(&self, id: u32) -> bool {
        self.0.added.get(&id) == Some(&true)
    }

    /// The id of a token by its text as the file spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.0.bpe.0.vocab.id(token)
    }

    /// The text of a token as the file spells it; empty for an unknown id.
    pub fn token(&self, id: u32) -> &str {
        self.0.bpe.0.vocab.text(id)
    }

    /// The bytes that a token stands for, often not whole characters; none for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Cow<'_, [u8]> {
        let text = self.token(id);
        if self.0.added.contains_key(&id) {
            return Cow::Borrowed(text.as_bytes());
        }
        match self.0.spelling {
            Spelling::ByteLevel => match text.chars().map(byte_of).collect() {
                Some(bytes) => Cow::Owned(bytes),
                None => Cow::Borrowed(text.as_bytes()),
            },
            Spelling::Sentence { .. } => match byte_token(text) {
                Some(b) => Cow::Owned(vec![b]),
                None if text.contains('\u{2581}') => Cow::Owned(text.replace('\u{2581}', " ").into_bytes()),
                None => Cow::Borrowed(text.as_bytes()),
            },
        }
    }

    /// The text of `ids`; what is no character becomes U+FFFD. With `skip_special`, special tokens add nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = self.decoder(skip_special);
        let mut text = String::new();
        ids.iter().for_each(|&id| text.push_str(&stream.push(id)));
        text + &stream.finish()
    }

    /// Starts decoding token by token.
    pub fn decoder(&self, skip_special: bool) -> Decoder {
        let strip = self.0.spelling == Spelling::Sentence { strip_leading: true };
        Decoder { tokenizer: self.clone(), skip_special, strip, pending: Vec::new() }
    }
}

/// Decodes a stream of tokens into whole characters: bytes of a character that is not complete yet are held back.
pub struct Decoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The next text loses a leading space.
    strip: bool,
    pending: Vec<u8>,
}

impl Decoder {
    /// The text that became certain with `id`; possibly empty.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        let bytes = self.tokenizer.token_bytes(id);
        let skip = usize::from(self.strip && bytes.first() == Some(&b' '));
        self.strip &= bytes.is_empty();
        self.pending.extend_from_slice(&bytes[skip..]);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.pending.clear();
                    return text;
                }
                Err(e) => {
                    text.push_str(&String::from_utf8_lossy(&self.pending[..e.valid_up_to()]));
                    // No length: the bytes may still become a character.
                    let Some(bad) = e.error_len() else {
                        self.pending.drain(..e.valid_up_to());
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..e.valid_up_to() + bad);
                }
            }
        }
    }

    /// The end of the text: U+FFFD if a character was left incomplete.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// The byte behind a character of GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes follow from U+0100.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        n @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(n as u8),
        n @ 0x100..=0x120 => Some((n - 0x100) as u8),
        n @ 0x121..=0x142 => Some((n - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The byte of a token `<0x0A>`.
fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()) { u8::from_str_radix(hex, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(b) = byte_of(c) {
                assert!(!std::mem::replace(&mut seen[b as usize], true), "byte {b} twice");
            }
        }
        assert!(seen.iter().all(|s| *s));
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of(' ')), (Some(b' '), Some(b'\n'), None));
    }
}
