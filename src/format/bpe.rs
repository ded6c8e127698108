//! Byte-pair encoding as a model for the `tokenizers` crate, built to load fast: the vocabulary is one string with offsets,
//! found through a table of ids, and nothing is allocated per token.
//!
//! Two ways to rank merges. A file may list them in order; a SentencePiece vocabulary has scores instead, and there a pair
//! may merge if both halves and the whole are ordinary tokens, better scores of the whole first, then smaller ids. That needs
//! no table at all: the whole is looked up while encoding.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::HashMap as StdMap;
use std::hash::BuildHasher;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use tokenizers::{AddedToken, Model, Token, Trainer};

use crate::error::{Context, Result, bail, ensure};

/// More ids than any vocabulary has; bounds what a file can make the reader allocate.
const MAX_TOKENS: usize = 1 << 24;

/// Token texts by id and ids by text.
#[derive(Default)]
pub(crate) struct Vocab {
    text: String,
    /// Where text `i` ends; it starts where the one before ends.
    ends: Vec<u32>,
    ids: HashTable<u32>,
    hasher: DefaultHashBuilder,
    /// Some text has several ids.
    doubles: bool,
}

impl Vocab {
    /// Room for `tokens` texts. Callers bound it by what a file really holds.
    pub(crate) fn with_capacity(tokens: usize) -> Self {
        let ids = HashTable::with_capacity(tokens);
        Self { text: String::with_capacity(tokens * 7), ends: Vec::with_capacity(tokens), ids, ..Self::default() }
    }

    /// Adds the text of the next id. If it was there already, the later id wins, as in the reference implementation.
    pub(crate) fn push(&mut self, text: &str) -> Result<()> {
        let id = self.ends.len();
        ensure!(id < MAX_TOKENS, Tokenizer, "the vocabulary has more than {MAX_TOKENS} tokens");
        let Ok(end) = u32::try_from(self.text.len() + text.len()) else {
            bail!(Tokenizer, "the vocabulary's texts exceed 4 GiB");
        };
        self.text.push_str(text);
        self.ends.push(end);
        if text.is_empty() {
            return Ok(());
        }
        let Self { text: all, ends, ids, hasher, .. } = self;
        let of = |id: u32| text_of(all, ends, id);
        let entry = ids.entry(hasher.hash_one(text), |&i| of(i) == text, |&i| hasher.hash_one(of(i)));
        let mut entry = entry.or_insert(id as u32);
        self.doubles |= *entry.get() != id as u32;
        *entry.get_mut() = id as u32;
        Ok(())
    }

    /// Tokens, gaps included.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The text of token `id`; empty beyond the vocabulary.
    pub(crate) fn text(&self, id: u32) -> &str {
        if (id as usize) < self.ends.len() { text_of(&self.text, &self.ends, id) } else { "" }
    }

    /// The id of a text.
    pub(crate) fn id(&self, text: &str) -> Option<u32> {
        self.ids.find(self.hasher.hash_one(text), |&i| self.text(i) == text).copied()
    }
}

fn text_of<'a>(text: &'a str, ends: &[u32], id: u32) -> &'a str {
    let id = id as usize;
    let start = if id == 0 { 0 } else { ends[id - 1] as usize };
    &text[start..ends[id] as usize]
}

/// Which pairs merge, and in which order.
pub(crate) enum Merges {
    /// Pair of ids to its rank and the merged id.
    Listed(HashMap<(u32, u32), (u32, u32)>),
    /// Per token its place by score, best first; `u32::MAX` for tokens that take no part.
    Scored(Vec<u32>),
}

impl Merges {
    /// From pairs of texts in order.
    pub(crate) fn listed<'a>(
        vocab: &Vocab,
        pairs: impl ExactSizeIterator<Item = Result<(&'a str, &'a str)>>,
    ) -> Result<Self> {
        let mut map = HashMap::with_capacity(pairs.len());
        let mut whole = String::new();
        // Most vocabularies list what merges make in the order of the merges: the next id is a good guess.
        let mut guess = 0;
        for (rank, pair) in pairs.enumerate() {
            let (left, right) = pair.context(|| format!("merge {rank}"))?;
            whole.clear();
            whole.push_str(left);
            whole.push_str(right);
            let made = if !vocab.doubles && vocab.text(guess) == whole { Some(guess) } else { vocab.id(&whole) };
            let (Some(l), Some(r), Some(w)) = (vocab.id(left), vocab.id(right), made) else {
                bail!(Tokenizer, "merge {rank} ({left:?} + {right:?}) is not within the vocabulary");
            };
            map.insert((l, r), (rank as u32, w));
            guess = w + 1;
        }
        Ok(Merges::Listed(map))
    }

    /// From a score per token; `None` for tokens that take no part.
    pub(crate) fn scored(scores: impl Iterator<Item = Option<f32>>) -> Self {
        // Bits of a float, made to sort as an integer with the highest score first.
        let place = |s: f32| {
            let bits = (s + 0.0).to_bits();
            let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
            (!ascending).min(u32::MAX - 1)
        };
        Merges::Scored(scores.map(|s| s.map_or(u32::MAX, place)).collect())
    }
}

/// What to do with a character that the vocabulary lacks.
#[derive(Default)]
pub(crate) struct Unknown {
    /// Spell it in bytes, as tokens `<0x00>` to `<0xFF>`, if all of them exist.
    pub(crate) byte_fallback: bool,
    /// Else put this token; without it the character is dropped.
    pub(crate) token: Option<u32>,
    /// One such token for a run of unknown characters.
    pub(crate) fuse: bool,
}

/// The model. Shared, since a tokenizer that reads special tokens and one that does not differ only outside of it.
#[derive(Clone)]
pub(crate) struct Bpe(pub(crate) Arc<BpeParts>);

pub(crate) struct BpeParts {
    pub(crate) vocab: Vocab,
    pub(crate) merges: Merges,
    pub(crate) unknown: Unknown,
    /// A pre-token that is in the vocabulary becomes that token, whatever the merges say.
    pub(crate) whole_words: bool,
}

#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    /// Bytes of the word it covers; 0 when it was merged into its left neighbour.
    start: u32,
    len: u32,
    prev: u32,
    next: u32,
}

const NONE: u32 = u32::MAX;

/// Order among possible merges: rank, then position. With scores the rank is (place of the whole, left id, right id).
type Rank = (u32, u32, u32);

impl BpeParts {
    /// Rank and merged id of two neighbours that spell `whole` (`None` where that is not whole characters).
    fn merge(&self, left: u32, right: u32, whole: Option<&str>) -> Option<(Rank, u32)> {
        match &self.merges {
            Merges::Listed(map) => map.get(&(left, right)).map(|&(rank, id)| ((rank, 0, 0), id)),
            Merges::Scored(place) => {
                let place = |id: u32| place.get(id as usize).copied().filter(|p| *p != u32::MAX);
                place(left).and(place(right))?;
                let id = self.vocab.id(whole?)?;
                Some(((place(id)?, left, right), id))
            }
        }
    }

    /// The tokens of one pre-token, as (id, end in bytes).
    fn encode(&self, word: &str, mut emit: impl FnMut(u32, usize)) {
        if self.whole_words
            && let Some(id) = self.vocab.id(word)
        {
            return emit(id, word.len());
        }
        let mut symbols = self.characters(word);
        let mut queue = BinaryHeap::with_capacity(symbols.len());
        let candidate = |symbols: &[Symbol], at: u32| {
            let left = symbols[at as usize];
            let right = *symbols.get(left.next as usize)?;
            let whole = word.get(left.start as usize..(right.start + right.len) as usize);
            self.merge(left.id, right.id, whole).map(|(rank, id)| Reverse((rank, at, id)))
        };
        queue.extend((0..symbols.len() as u32).filter_map(|at| candidate(&symbols, at)));
        while let Some(top) = queue.pop() {
            let Reverse((_, at, id)) = top;
            // Entries are not removed when a neighbour changes: one that no longer holds is skipped here.
            if symbols[at as usize].len == 0 || candidate(&symbols, at) != Some(top) {
                continue;
            }
            let gone = symbols[at as usize].next as usize;
            let right = symbols[gone];
            symbols[gone].len = 0;
            let left = &mut symbols[at as usize];
            (left.id, left.len, left.next) = (id, left.len + right.len, right.next);
            let prev = left.prev;
            if let Some(after) = symbols.get_mut(right.next as usize) {
                after.prev = at;
            }
            queue.extend(candidate(&symbols, at));
            if prev != NONE {
                queue.extend(candidate(&symbols, prev));
            }
        }
        symbols.iter().filter(|s| s.len > 0).for_each(|s| emit(s.id, (s.start + s.len) as usize));
    }

    /// One symbol per character; unknown ones by the rule of [`Unknown`].
    fn characters(&self, word: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(word.len());
        let mut push = |id, start: usize, len: usize| {
            let at = symbols.len() as u32;
            if let Some(last) = symbols.last_mut() {
                last.next = at;
            }
            let prev = at.checked_sub(1).unwrap_or(NONE);
            symbols.push(Symbol { id, start: start as u32, len: len as u32, prev, next: NONE });
        };
        // The run of unknown characters that is not yet pushed.
        let mut unknown: Option<(u32, usize, usize)> = None;
        for (start, c) in word.char_indices() {
            let text = &word[start..start + c.len_utf8()];
            let known = self.vocab.id(text);
            let bytes = if known.is_none() && self.unknown.byte_fallback { self.bytes(text) } else { None };
            if known.is_some() || bytes.is_some() {
                if let Some((id, start, len)) = unknown.take() {
                    push(id, start, len);
                }
                match (known, bytes) {
                    (Some(id), _) => push(id, start, text.len()),
                    (None, bytes) => bytes.into_iter().flatten().enumerate().for_each(|(i, id)| push(id, start + i, 1)),
                }
            } else if let Some(id) = self.unknown.token {
                unknown = match unknown {
                    Some((id, from, len)) if self.unknown.fuse => Some((id, from, len + text.len())),
                    other => {
                        if let Some((id, start, len)) = other {
                            push(id, start, len);
                        }
                        Some((id, start, text.len()))
                    }
                };
            }
        }
        if let Some((id, start, len)) = unknown {
            push(id, start, len);
        }
        symbols
    }

    fn bytes(&self, text: &str) -> Option<Vec<u32>> {
        text.bytes().map(|b| self.vocab.id(&format!("<0x{b:02X}>"))).collect()
    }
}

impl Model for Bpe {
    type Trainer = NoTrainer;

    fn tokenize(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        // Positions within a word are u32.
        if word.len() >= NONE as usize {
            return Err("a text of 4 GiB or more".into());
        }
        let (mut tokens, mut from) = (Vec::new(), 0);
        // Texts of tokens are looked up by id where they are needed, not carried along.
        self.0.encode(word, |id, end| {
            tokens.push(Token::new(id, String::new(), (from, end)));
            from = end;
        });
        Ok(tokens)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.vocab.id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        Some(self.0.vocab.text(id).to_owned()).filter(|t| !t.is_empty())
    }

    fn get_vocab(&self) -> StdMap<String, u32> {
        (0..self.0.vocab.len() as u32).map(|id| (self.0.vocab.text(id).to_owned(), id)).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.vocab.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("not written back".into())
    }

    fn get_trainer(&self) -> NoTrainer {
        NoTrainer
    }
}

/// The `tokenizers` crate asks every model for a trainer; this one has none.
pub(crate) struct NoTrainer;

impl Trainer for NoTrainer {
    type Model = Bpe;

    fn should_show_progress(&self) -> bool {
        false
    }

    fn train(&self, _: &mut Bpe) -> tokenizers::Result<Vec<AddedToken>> {
        Err("vocabularies are not trained here".into())
    }

    fn feed<I, S, F>(&mut self, _: I, _: F) -> tokenizers::Result<()>
    where
        I: Iterator<Item = S> + Send,
        S: AsRef<str> + Send,
        F: Fn(&str) -> tokenizers::Result<Vec<String>> + Sync,
    {
        Err("vocabularies are not trained here".into())
    }
}
