//! A record to tokens, with the exact boundary between what is given and what is learnt.

use super::record::{Content, Record, Turn};
use super::{Example, Options, Pairs};
use crate::error::{Result, bail, ensure};

/// What training needs of a model's tokenizer and chat template.
pub trait Encode {
    /// The ids of `text`, special tokens in it read as such; `start` puts before them what the model wants before a text.
    fn encode(&self, text: &str, start: bool) -> Result<Vec<u32>>;
    /// A conversation in the model's chat form, its own special tokens included; `open` ends it where the assistant's answer
    /// begins.
    fn render(&self, turns: &[Turn], open: bool) -> Result<String>;
    /// Tokens that end a text or a turn; the first is the one to end a text with.
    fn ends(&self) -> &[u32];
}

/// The tokens of a record, however many.
pub fn example(record: &Record, encode: &dyn Encode, options: &Options) -> Result<Example> {
    match &record.content {
        Content::Text(text) => {
            let mut e = Pieces::new(encode, true);
            e.push(text, true)?;
            Ok(e.finish(options.append_eos))
        }
        Content::Pair { prompt, completion } if options.pairs == Pairs::Plain => {
            let mut e = Pieces::new(encode, true);
            e.push(prompt, false)?;
            e.push(completion, true)?;
            Ok(e.finish(options.append_eos))
        }
        Content::Pair { prompt, completion } => {
            let turn = |role: &str, content: &str| Turn { role: role.into(), content: content.into() };
            // The line break belongs to the plain form.
            let prompt = prompt.strip_suffix('\n').unwrap_or(prompt);
            chat(&[turn("user", prompt), turn("assistant", completion)], encode)
        }
        Content::Chat(turns) => chat(turns, encode),
    }
}

/// A document in windows of `max_tokens` that share one token, so that every token but the document's first is a label once.
pub(super) fn windows(text: &str, encode: &dyn Encode, options: &Options) -> Result<Vec<Example>> {
    let mut e = Pieces::new(encode, true);
    e.push(text, true)?;
    let tokens = e.finish(options.append_eos).tokens;
    let starts = (0..tokens.len().saturating_sub(1)).step_by(options.max_tokens - 1);
    let window = |at: usize| {
        let tokens = tokens[at..(at + options.max_tokens).min(tokens.len())].to_vec();
        let loss = (0..tokens.len()).map(|i| i > 0).collect();
        Example { tokens, loss }
    };
    Ok(starts.map(window).collect())
}

/// Renders growing beginnings of the conversation: where one ends, the next goes on.
fn chat(turns: &[Turn], encode: &dyn Encode) -> Result<Example> {
    let mut e = Pieces::new(encode, false);
    let mut done = String::new();
    let mut go_on = |e: &mut Pieces, text: String, loss: bool, what: String| -> Result<()> {
        let Some(piece) = text.strip_prefix(&done) else {
            bail!(
                Usage,
                "the chat template changes earlier turns once {what} follows: it cannot be told what to learn"
            );
        };
        e.push(piece, loss)?;
        done = text;
        Ok(())
    };
    for (i, turn) in turns.iter().enumerate().filter(|(_, t)| t.role == "assistant") {
        let what = || format!("message {} ({})", i + 1, turn.role);
        go_on(&mut e, encode.render(&turns[..i], true)?, false, what())?;
        go_on(&mut e, encode.render(&turns[..=i], false)?, true, what())?;
        e.end_turn();
    }
    let learns = turns.iter().any(|t| t.role == "assistant");
    ensure!(learns, Usage, "no message of the role \"assistant\"");
    go_on(&mut e, encode.render(turns, false)?, false, "the last message".into())?;
    Ok(e.finish(false))
}

/// An example in the making.
struct Pieces<'a> {
    encode: &'a dyn Encode,
    start: bool,
    text: String,
    tokens: Vec<u32>,
    loss: Vec<bool>,
}

impl<'a> Pieces<'a> {
    fn new(encode: &'a dyn Encode, start: bool) -> Self {
        Self { encode, start, text: String::new(), tokens: Vec::new(), loss: Vec::new() }
    }

    /// Appends text. It is encoded as it stands behind the rest where that leaves the tokens of the rest as they are, and
    /// else alone, so that the boundary between tokens is always one between pieces: the model answers to a prompt whose
    /// tokens are fixed.
    fn push(&mut self, text: &str, loss: bool) -> Result<()> {
        self.text += text;
        let whole = self.encode.encode(&self.text, self.start)?;
        if whole.starts_with(&self.tokens) {
            self.tokens = whole;
        } else {
            self.tokens.extend(self.encode.encode(text, false)?);
        }
        self.loss.resize(self.tokens.len(), loss);
        Ok(())
    }

    /// What the template puts behind the end of the assistant's turn is not learnt: generation stops before it.
    fn end_turn(&mut self) {
        let ends = self.encode.ends();
        let behind = (0..self.tokens.len()).rev().take_while(|&i| self.loss[i] && !ends.contains(&self.tokens[i]));
        let behind: Vec<usize> = behind.collect();
        // A template without end tokens: the whole turn is learnt.
        let ended = behind.len() < self.tokens.len() && self.loss[self.tokens.len() - 1 - behind.len()];
        if ended {
            behind.into_iter().for_each(|i| self.loss[i] = false);
        }
    }

    fn finish(mut self, append_eos: bool) -> Example {
        if let (true, Some(&eos)) = (append_eos, self.encode.ends().first())
            && self.tokens.last().is_none_or(|t| !self.encode.ends().contains(t))
        {
            self.tokens.push(eos);
            self.loss.push(true);
        }
        if let Some(first) = self.loss.first_mut() {
            *first = false;
        }
        Example { tokens: self.tokens, loss: self.loss }
    }
}
