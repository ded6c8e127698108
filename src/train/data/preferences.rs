//! Preferences: rows of a file to two answers behind one prompt.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::record::{object, string};
use super::{Batch, Content, Encode, LongRows, Options, Pairs, Record, Row, Turn, example, for_each_line, is_lines};
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};

/// Two answers to a prompt as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preference {
    /// What stands before both.
    pub prompt: Vec<u32>,
    /// The better answer.
    pub chosen: Vec<u32>,
    /// The worse one.
    pub rejected: Vec<u32>,
}

impl Preference {
    /// Refuses what nothing can be learnt from.
    ///
    /// # Errors
    /// `Usage`: a prompt or an answer without tokens.
    pub fn check(&self) -> Result<()> {
        let whole = ![&self.prompt, &self.chosen, &self.rejected].into_iter().any(Vec::is_empty);
        ensure!(whole, Usage, "a preference needs a prompt and two answers");
        Ok(())
    }
}

/// Two sequences: the prompt with the chosen answer, and with the rejected one. Labels are the answers' tokens.
impl Row for Preference {
    fn tokens(&self) -> usize {
        2 * self.prompt.len() + self.chosen.len() + self.rejected.len()
    }

    fn add_to(&self, batch: &mut Batch) {
        for answer in [&self.chosen, &self.rejected] {
            batch.push(&[&self.prompt[..], answer].concat(), |i| i >= self.prompt.len());
        }
    }
}

/// A row of a file of preferences.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreferenceText {
    /// What was asked.
    pub prompt: String,
    /// The better answer.
    pub chosen: String,
    /// The worse one.
    pub rejected: String,
}

impl PreferenceText {
    /// Reads a line, and the part of the data that it belongs to, where it says so.
    fn parse(text: &str) -> Result<(Self, Option<String>)> {
        let fields = object(text)?;
        let field = |key| string(&fields, key);
        let row = Self { prompt: field("prompt")?, chosen: field("chosen")?, rejected: field("rejected")? };
        let split = if fields.contains_key("split") { Some(field("split")?) } else { None };
        Ok((row, split))
    }

    /// The tokens, each answer closed as `options` say; `None` for a row that is too long and left out for it.
    ///
    /// # Errors
    /// `Usage`, without the place: an empty prompt or answer, answers that come to the same tokens, a row that is too long.
    pub fn tokens(&self, encode: &dyn Encode, options: &Options) -> Result<Option<Preference>> {
        for (name, answer) in [("chosen", &self.chosen), ("rejected", &self.rejected)] {
            ensure!(!answer.trim().is_empty(), Usage, "{name:?} is empty");
        }
        if options.pairs == Pairs::Plain {
            ensure!(!encode.encode(&self.prompt, true)?.is_empty(), Usage, "\"prompt\" has no token");
        }
        let (mut prompt, mut answers, mut longest) = (Vec::new(), [const { Vec::new() }; 2], 0);
        for (to, answer) in answers.iter_mut().zip([&self.chosen, &self.rejected]) {
            let e = example(&self.record(answer, options.pairs), encode, options)?;
            let learnt = |l: &bool| *l;
            let (Some(first), Some(last)) = (e.loss.iter().position(learnt), e.loss.iter().rposition(learnt)) else {
                bail!(Usage, "an answer without tokens");
            };
            let end = options.max_tokens.min(last + 1);
            longest = longest.max(last + 1);
            prompt = e.tokens[..first].to_vec();
            *to = e.tokens.get(first..end).unwrap_or_default().to_vec();
        }
        let cut = longest > options.max_tokens;
        if cut {
            match options.long_rows {
                LongRows::Error => return Err(super::too_long(longest, options.max_tokens)),
                LongRows::Skip => return Ok(None),
                LongRows::Truncate => {}
            }
        }
        let cut = if cut { format!(" once cut to {} tokens", options.max_tokens) } else { String::new() };
        let [chosen, rejected] = answers;
        ensure!(!chosen.is_empty() && !rejected.is_empty(), Usage, "an answer has no token{cut}");
        ensure!(chosen != rejected, Usage, "\"chosen\" and \"rejected\" are the same{cut}");
        Ok(Some(Preference { prompt, chosen, rejected }))
    }

    fn record(&self, answer: &str, pairs: Pairs) -> Record {
        let turn = |role: &str, content: &str| Turn { role: role.into(), content: content.into() };
        let content = match pairs {
            Pairs::Plain => Content::Pair { prompt: self.prompt.clone(), completion: answer.into() },
            Pairs::Chat => Content::Chat(vec![turn("user", &self.prompt), turn("assistant", answer)]),
        };
        Record { content, split: None }
    }
}

/// The preferences in a `.jsonl` or `.jsonl.gz` file, a [`PreferenceText`] a line; of rows that name their `split`, only those of the one that
/// `options` name.
///
/// # Errors
/// `Usage` with file and line for a row that cannot be used; a file without any; one that cannot be read.
pub fn preferences(path: &Path, encode: &dyn Encode, options: &Options) -> Result<Vec<Preference>> {
    ensure!(is_lines(path)?, Usage, "{}: preferences are rows of a .jsonl file", path.display());
    let mut rows = Vec::new();
    for_each_line(path, |line, text| {
        let place = || format!("{}, line {line}", path.display());
        let usage = |e: Error| Error::new(ErrorKind::Usage, e.to_string());
        let (row, split) = PreferenceText::parse(text).map_err(usage).context(place)?;
        if split.is_none_or(|s| s == options.split) {
            rows.extend(row.tokens(encode, options).map_err(usage).context(place)?);
        }
        Ok(())
    })?;
    ensure!(!rows.is_empty(), Usage, "{}: no row to learn from", path.display());
    Ok(rows)
}
