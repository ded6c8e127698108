//! A model's tokenizer and chat template as training wants them.

use super::Message;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{ChatTemplate, Tokenizer};
use crate::train::data::{Encode, Turn};

/// Encodes training data as sessions encode prompts.
#[derive(Clone, Debug)]
pub struct Texts {
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

impl Texts {
    /// From the two parts.
    pub fn new(tokenizer: Tokenizer, template: Option<ChatTemplate>) -> Self {
        Self { tokenizer, template }
    }
}

impl Encode for Texts {
    fn encode(&self, text: &str, start: bool) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text, false, true)?;
        Ok(if start { [self.tokenizer.prefix(), &ids].concat() } else { ids })
    }

    fn render(&self, turns: &[Turn], open: bool) -> Result<String> {
        let none = || Error::new(ErrorKind::Tokenizer, "this model has no chat template");
        let messages: Vec<Message> = turns.iter().map(|t| Message::new(&t.role, &t.content)).collect();
        self.template.as_ref().ok_or_else(none)?.render(&messages, open)
    }

    fn ends(&self) -> &[u32] {
        self.tokenizer.eos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Engine, EngineOptions};
    use crate::train::data::{Dataset, Options, Pairs};

    #[test]
    fn training_sees_the_tokens_that_sessions_see() {
        let engine =
            Engine::open_with("models/tiny-llama", EngineOptions::default().device(crate::engine::Device::Naive));
        let engine = engine.unwrap();
        let (texts, tokenizer) = (engine.texts().unwrap(), engine.tokenizer().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, "{\"question\": \"2 + 2?\\n\", \"answer\": \"\\nIt is 4.\"}\n").unwrap();
        let chat = Dataset::load(&path, &texts, &Options { pairs: Pairs::Chat, ..Options::default() }).unwrap();
        let e = &chat.examples[0];
        let learnt: Vec<u32> = e.tokens.iter().zip(&e.loss).filter(|(_, l)| **l).map(|(t, _)| *t).collect();
        assert_eq!(tokenizer.decode(&learnt, false), "\nIt is 4.<|im_end|>");
        let given = e.loss.iter().position(|l| *l).unwrap();
        let mut session = engine.session(256, 0).unwrap();
        session.push_chat(&[Message::new("user", "2 + 2?")]).unwrap();
        assert_eq!(e.tokens[..given], *session.tokens());
        assert!(tokenizer.decode(&e.tokens, false).ends_with("<|im_start|>assistant\n\nIt is 4.<|im_end|>\n"));

        let plain = Dataset::load(&path, &texts, &Options::default()).unwrap();
        let e = &plain.examples[0];
        let mut session = engine.session(256, 0).unwrap();
        session.push_text("2 + 2?\n").unwrap();
        let given = session.tokens().len();
        assert_eq!((&e.tokens[..given], e.loss.iter().position(|l| *l)), (session.tokens(), Some(given)));
        assert_eq!(tokenizer.decode(&e.tokens, true), "2 + 2?\n\nIt is 4.");
        assert_eq!(e.tokens.last(), tokenizer.eos().first());
    }
}
