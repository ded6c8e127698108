//! Training data: records of a file to tokens, tokens to batches.
//!
//! A `.jsonl` or `.jsonl.gz` file holds one record a line, in any of the forms of [`Record`]; a `.txt` file is one document.
//! Whatever is wrong with a row is an error of kind `Usage` with the file and the line.

mod batches;
mod files;
mod preferences;
mod record;
mod tokens;

use std::path::Path;

pub use batches::{Batch, Batches, Cursor, Order, Packing, Row, pack};
pub use files::{for_each_line, is_lines, read_all};
pub use preferences::{Preference, PreferenceText, preferences};
pub use record::{Content, Header, Record, Turn};
pub use tokens::{Encode, example};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, ErrorKind, Result, ensure};

/// A sequence of tokens and which of them are labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Whether the loss counts token `i`, predicted from those before it. Never the first.
    pub loss: Vec<bool>,
}

/// What to do with a row that has more tokens than allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LongRows {
    /// Refuse the file.
    #[default]
    Error,
    /// Keep the first tokens.
    Truncate,
    /// Leave the row out.
    Skip,
}

/// How a prompt and its completion become one text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pairs {
    /// One after the other.
    #[default]
    Plain,
    /// As a user's and an assistant's turn in the model's chat form.
    Chat,
}

/// How to read data.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most tokens in an example; the window of a `.txt` file.
    pub max_tokens: usize,
    /// What to do with longer rows.
    pub long_rows: LongRows,
    /// Ends texts and completions with the model's end token, as a label. Conversations end as their template says.
    pub append_eos: bool,
    /// Of rows that name their `split`, only those of this one are read.
    pub split: String,
    /// The form of prompts and completions.
    pub pairs: Pairs,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_tokens: 1024,
            long_rows: LongRows::Error,
            append_eos: true,
            split: "train".into(),
            pairs: Pairs::Plain,
        }
    }
}

/// The examples of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    /// In the file's order.
    pub examples: Vec<Example>,
    /// Rows left out because they were too long.
    pub skipped: usize,
    /// Rows cut because they were too long.
    pub truncated: usize,
}

impl Dataset {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// `Usage` with file and line for a row that cannot be used; a file without any; one that cannot be read.
    pub fn load(path: &Path, encode: &dyn Encode, options: &Options) -> Result<Self> {
        ensure!(options.max_tokens >= 2, Usage, "an example of {} tokens has nothing to learn", options.max_tokens);
        let mut set = Self::default();
        if is_lines(path)? {
            for_each_line(path, |line, text| {
                let row = || format!("{}, line {line}", path.display());
                let usage = |e: Error| Error::new(ErrorKind::Usage, e.to_string()).at(row());
                match Record::parse(text, line).map_err(usage)? {
                    Some(record) if record.split.as_ref().is_none_or(|s| *s == options.split) => {
                        let example = example(&record, encode, options).map_err(usage)?;
                        set.add(example, options).context(row)
                    }
                    _ => Ok(()),
                }
            })?;
        } else {
            let text = read_all(path)?;
            set.examples = tokens::windows(&text, encode, options).context(|| path.display().to_string())?;
        }
        ensure!(!set.examples.is_empty(), Usage, "{}: no row to learn from", path.display());
        Ok(set)
    }

    fn add(&mut self, mut example: Example, options: &Options) -> Result<()> {
        let (n, most) = (example.tokens.len(), options.max_tokens);
        if n > most {
            match options.long_rows {
                LongRows::Error => return Err(too_long(n, most)),
                LongRows::Skip => {
                    self.skipped += 1;
                    return Ok(());
                }
                LongRows::Truncate => {
                    example.tokens.truncate(most);
                    example.loss.truncate(most);
                    self.truncated += 1;
                }
            }
        }
        let cut = if n > most { format!(" once cut to {most} tokens") } else { String::new() };
        ensure!(example.loss.contains(&true), Usage, "no token to learn{cut}");
        self.examples.push(example);
        Ok(())
    }
}

fn too_long(tokens: usize, most: usize) -> Error {
    let what = format!(
        "{tokens} tokens, more than the limit of {most}; --long-rows truncate cuts such rows, --long-rows skip leaves them out"
    );
    Error::new(ErrorKind::Usage, what)
}

#[cfg(test)]
mod tests;
