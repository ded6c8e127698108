//! [`Memory`]: the texts of earlier sessions, where [`super::Lookup`] finds what its own text does not have yet.

use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use sha2::{Digest, Sha256};

use super::automaton::{Automaton, Continuation, Cursor};
use super::rates::Rates;
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::files::write_file;

/// Stands between texts: no token.
const SEPARATOR: u32 = u32::MAX;
/// Tokens by which a text is recognised, and which are kept in front of its continuation.
const CONTEXT: usize = 16;
/// Longest match: what lies farther back says no more about the next token.
pub(super) const LONGEST: usize = 64;
/// What a saved memory begins with.
const MAGIC: &[u8; 8] = b"QDRGMEM1";
const SUM: usize = 32;

/// Texts of earlier sessions in one suffix automaton, and how often lookup in them was right. All sessions of a draft share one;
/// tokens are those of one vocabulary, below `u32::MAX`.
///
/// Its contents depend on nothing but the texts and the order in which they ended. Looking something up takes no time that grows
/// with it; a new text takes time proportional to its own length, but that half of the memory is built anew whenever it is full.
pub struct Memory {
    held: RwLock<Held>,
    limit: usize,
}

/// What a memory holds.
#[derive(Default)]
pub(super) struct Held {
    text: Automaton,
    /// The rates of the session that ended last.
    rates: Rates,
    /// Changes so far: cursors are good for one version.
    version: u64,
}

impl Default for Memory {
    /// Of 200,000 tokens, some 30 MB.
    fn default() -> Self {
        Self::new(200_000)
    }
}

impl Memory {
    /// An empty one of up to `limit` tokens, separators between texts counted; when it is full, its older half is forgotten.
    pub fn new(limit: usize) -> Self {
        Self { held: RwLock::default(), limit }
    }

    /// Tokens that it holds.
    pub fn len(&self) -> usize {
        self.read().text.text().len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all texts and rates.
    pub fn forget(&self) {
        let mut held = self.write();
        *held = Held { version: held.version + 1, ..Held::default() };
    }

    /// Adds a text. What it begins with is left out as far as it is known already, but for a few tokens of context.
    pub fn add(&self, tokens: &[u32]) {
        self.write().add(tokens, 0, self.limit);
    }

    /// The same, where the first `fed` tokens were added before; and the rates that the text has taught.
    pub(super) fn learn(&self, tokens: &[u32], fed: usize, rates: &Rates) {
        let mut held = self.write();
        held.add(tokens, fed, self.limit);
        held.rates.clone_from(rates);
    }

    /// Fails unless all tokens are below `vocab`.
    pub(crate) fn check(&self, vocab: usize) -> Result<()> {
        let held = self.read();
        let alien = held.text.text().iter().find(|&&t| t != SEPARATOR && t as usize >= vocab);
        let Some(token) = alien else { return Ok(()) };
        let what =
            format!("the memory holds token {token}, the model has a vocabulary of {vocab}: it is another model's");
        Err(Error::new(ErrorKind::Config, what))
    }

    /// Its texts and rates, for [`Memory::from_bytes`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let held = self.read();
        let mut out = Vec::from(MAGIC);
        out.extend((self.limit as u64).to_le_bytes());
        out.extend(held.rates.to_bytes());
        out.extend(held.text.text().iter().flat_map(|t| t.to_le_bytes()));
        let sum = Sha256::digest(&out);
        out.extend_from_slice(&sum);
        out
    }

    /// What [`Memory::to_bytes`] gave: it proposes what the saved one did.
    ///
    /// # Errors
    /// `Weights` for bytes that are damaged or something else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        const HEAD: usize = 16 + Rates::BYTES;
        ensure!(bytes.starts_with(MAGIC), Weights, "this is no memory of a draft");
        let n = bytes.len();
        ensure!(n >= HEAD + SUM && (n - HEAD - SUM).is_multiple_of(4), Weights, "{n} bytes are no whole memory");
        let (body, sum) = bytes.split_at(n - SUM);
        ensure!(Sha256::digest(body)[..] == *sum, Weights, "the memory is damaged: its SHA-256 is another");
        let (head, texts) = body.split_at(HEAD);
        let limit = head[8..16].iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        let tokens = texts.len() / 4;
        ensure!(limit >= tokens as u64, Weights, "the memory has {tokens} tokens and a limit of {limit}");
        let none = || Error::new(ErrorKind::Weights, "the memory's rates are impossible");
        let rates = Rates::from_bytes(&head[16..]).ok_or_else(none)?;
        let mut text = Automaton::default();
        texts.as_chunks::<4>().0.iter().for_each(|t| text.push(u32::from_le_bytes(*t)));
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        Ok(Self { held: RwLock::new(Held { text, rates, version: 0 }), limit })
    }

    /// Puts what [`Memory::to_bytes`] gave in place of what is there.
    ///
    /// # Errors
    /// As [`Memory::from_bytes`]: nothing has changed then.
    pub fn restore(&self, bytes: &[u8]) -> Result<()> {
        let read = Self::from_bytes(bytes)?.held.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut held = self.write();
        *held = Held { version: held.version + 1, ..read };
        Ok(())
    }

    /// Writes it to a file.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_file(path, |w| w.write_all(&self.to_bytes()))
    }

    /// Reads it from a file.
    ///
    /// # Errors
    /// The file system's; a damaged file, by name.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path.display(), e))?;
        Self::from_bytes(&bytes).context(|| path.display().to_string())
    }

    // A thread that died in between had no memory left to grow into, and took the process along.

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    pub fn text(&self) -> &Automaton {
        &self.text
    }

    /// How many tokens `tokens` begins with that are known, each behind the [`CONTEXT`] tokens before it or all there are.
    pub fn knows(&self, tokens: &[u32]) -> usize {
        let mut at = Cursor::default();
        let known = |(i, token): &(usize, &u32)| {
            at = self.text.within(self.text.advance(at, **token), LONGEST);
            at.len > (*i).min(CONTEXT)
        };
        tokens.iter().enumerate().take_while(known).count()
    }

    /// Where the end of a text stands: its longest suffix, of up to [`LONGEST`] tokens, that occurs in the memory.
    pub fn find(&self, tokens: &[u32]) -> Cursor {
        let end = &tokens[tokens.len().saturating_sub(LONGEST)..];
        end.iter().fold(Cursor::default(), |at, token| self.text.advance(at, *token))
    }

    fn add(&mut self, tokens: &[u32], fed: usize, limit: usize) {
        let fed = fed.max(self.knows(tokens));
        if fed >= tokens.len() {
            return;
        }
        let new = &tokens[fed.saturating_sub(CONTEXT)..];
        let separator = if self.text.text().is_empty() { &[][..] } else { &[SEPARATOR] };
        if self.text.text().len() + separator.len() + new.len() > limit {
            let all = [self.text.text(), separator, new].concat();
            self.text = Automaton::default();
            all[all.len() - limit / 2..].iter().for_each(|t| self.text.push(*t));
        } else {
            separator.iter().chain(new).for_each(|t| self.text.push(*t));
        }
        self.version += 1;
    }
}

/// What followed a match in the memory: the ends of texts are nothing to propose.
pub(super) fn is_token(c: &Continuation) -> bool {
    c.token != SEPARATOR
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn only_what_is_new_is_added_and_the_limit_holds() {
        let text = |from: u32, to: u32| (from..to).collect::<Vec<_>>();
        let memory = Memory::new(200);
        memory.add(&text(0, 40));
        memory.add(&text(0, 40));
        memory.add(&text(0, 25));
        assert_eq!(memory.len(), 40);
        // The next turn: a separator and 16 tokens of context.
        memory.add(&text(0, 60));
        assert_eq!(memory.read().text().text()[40..], [&[SEPARATOR][..], &text(24, 60)].concat());
        memory.add(&text(0, 60));
        assert_eq!((memory.len(), memory.read().knows(&text(0, 61))), (77, 60));
        // A text with another beginning is another text.
        assert_eq!(memory.read().knows(&[&[7], &text(1, 40)[..]].concat()), 1);
        memory.add(&text(100, 222));
        assert_eq!(memory.len(), 200);
        // Now the older half goes.
        memory.add(&[5]);
        memory.add(&text(300, 310));
        assert_eq!(memory.len(), 100);
        assert_eq!(memory.read().text().text()[89..], [&[SEPARATOR][..], &text(300, 310)].concat());
        let mut rng = Rng::new(1);
        for limit in [0, 1, 2, 33, 100] {
            let memory = Memory::new(limit);
            for _ in 0..50 {
                memory.add(&(0..rng.below(70)).map(|_| rng.below(9) as u32).collect::<Vec<_>>());
                assert!(memory.len() <= limit);
            }
            memory.forget();
            assert!(memory.is_empty());
        }
    }

    #[test]
    fn what_is_saved_comes_back_and_damage_is_named() {
        let memory = Memory::new(100);
        let mut rates = Rates::default();
        rates.learn(Rates::slot(1, 9, 2), true);
        memory.learn(&[4, 7, 4, 7, 9], 0, &rates);
        memory.add(&[8, 4, 7]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("texts.memory");
        memory.save(&path).unwrap();
        let again = Memory::open(&path).unwrap();
        assert_eq!(again.to_bytes(), memory.to_bytes());
        assert_eq!((again.read().rates(), again.limit, again.len()), (&rates, 100, 9));
        assert!(again.check(10).is_ok() && again.check(9).unwrap_err().to_string().contains("token 9"));
        let good = memory.to_bytes();
        let mut rng = Rng::new(2);
        for case in 0..400 {
            let mut bad = good.clone();
            if case % 2 == 0 {
                bad.truncate(rng.below(bad.len()));
            } else {
                let at = rng.below(bad.len());
                bad[at] ^= 1 << rng.below(8);
            }
            std::fs::write(&path, &bad).unwrap();
            let e = Memory::open(&path).err().unwrap();
            assert!(e.to_string().contains("texts.memory: ") && e.kind() == ErrorKind::Weights, "{e}");
        }
        // A right sum does not make impossible contents possible.
        let sealed = |at: usize, b: &[u8]| {
            let mut body = good[..good.len() - SUM].to_vec();
            body[at..at + b.len()].copy_from_slice(b);
            let sum = Sha256::digest(&body);
            Memory::from_bytes(&[&body[..], &sum].concat()).err().unwrap().to_string()
        };
        assert!(sealed(8, &[3]).contains("9 tokens and a limit of 3"));
        for rate in [f32::NAN, -1.0, f32::INFINITY, 129.0] {
            assert!(sealed(16, &rate.to_le_bytes()).contains("rates"), "{rate}");
        }
        assert!(Memory::open(&dir.path().join("none")).err().unwrap().to_string().contains("none: "));
    }
}
