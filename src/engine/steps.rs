//! Step-level drafting of the embedded API: whole paragraphs of a draft that a judge lets stand.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use super::{Engine, Message, Session};
use crate::backend::Backend;
use crate::decode::Sampler;
use crate::error::{Result, bail, ensure};
use crate::format::{ChatTemplate, Tokenizer};
use crate::model::Model;
use crate::speculative::steps::{End, Exact, Judge, Prompted, Similarity, StepDecoder};
pub use crate::speculative::steps::{Preference, StepCounts, StepSettings};

/// What lets a draft's step stand in place of the model's own. Only `Tokens` keeps the model's text; a cheaper way to keep it is
/// [`DraftKind::Steps`](super::DraftKind::Steps).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum StepJudge {
    /// The same tokens.
    Tokens,
    /// The same text but for blanks at its ends.
    Text,
    /// Mean hidden states of the model whose cosine is at least this.
    Similarity(f64),
    /// The model itself, asked whether both say the same.
    Ask,
}

/// A draft that writes whole steps, with the judge of them, ready for any number of sessions of its engine. **Not lossless**: accepted
/// steps are the draft's words. Cheap to clone.
#[derive(Clone)]
pub struct Steps(Arc<Inner>);

struct Inner {
    judge: StepJudge,
    taps: Vec<usize>,
    settings: StepSettings,
    texts: (Tokenizer, Option<ChatTemplate>),
    eos: Vec<u32>,
    /// An `Arc<Model<B>>` of the engine's backend.
    draft: Box<dyn Any + Send + Sync>,
}

impl Steps {
    /// Layers of the target that the judge reads.
    pub(super) fn taps(&self) -> &[usize] {
        &self.0.taps
    }

    pub(super) fn decoder<B: Backend>(&self, target: &Arc<Model<B>>, sampler: Sampler) -> Result<StepDecoder<B>> {
        let Inner { judge, taps, settings, texts: (tokenizer, template), eos, draft } = &*self.0;
        let Some(draft) = draft.downcast_ref::<Arc<Model<B>>>() else {
            bail!(Usage, "the draft was loaded for another device than this session's");
        };
        let spell = tokenizer.clone();
        let judge: Box<dyn Judge<B>> = match *judge {
            StepJudge::Tokens => Box::new(Exact::tokens()),
            StepJudge::Text => Box::new(Exact::text(move |ids| spell.decode(ids, true))),
            StepJudge::Similarity(threshold) => Box::new(Similarity::new(taps[0], threshold)?),
            StepJudge::Ask => {
                let template = template.clone();
                let ask = move |draft: &[u32], own: &[u32]| question(&spell, template.as_ref(), draft, own);
                // Two steps, spelled anew: bytes that are no text become three each.
                let room = ask(&[], &[])?.len() + 32 * settings.max_tokens;
                let answer = |word: &str| Ok(tokenizer.encode(word, false, false)?.first().copied().unwrap_or(0));
                let answers = [answer("Yes")?, answer("No")?];
                let room = room.min(target.config().context);
                Box::new(Prompted::new(target.clone(), room, move |_, draft, own| ask(draft, own), answers)?)
            }
        };
        StepDecoder::new(draft.clone(), judge, sampler, *settings, blank_line(tokenizer.clone(), eos.clone()))
    }
}

/// Steps end with a blank line behind their first word, texts with a token of `eos`.
pub(super) fn blank_line(tokenizer: Tokenizer, eos: Vec<u32>) -> impl Fn(&[u32]) -> End + Send + Sync {
    move |step| {
        if step.last().is_some_and(|t| eos.contains(t)) {
            return End::Text;
        }
        let bytes: Vec<u8> = step.iter().flat_map(|&t| tokenizer.token_bytes(t).into_owned()).collect();
        if bytes.trim_ascii_start().windows(2).any(|w| w == b"\n\n") { End::Step } else { End::Open }
    }
}

/// The tokens of the question whether two steps say the same.
fn question(tokenizer: &Tokenizer, template: Option<&ChatTemplate>, draft: &[u32], own: &[u32]) -> Result<Vec<u32>> {
    let [draft, own] = [draft, own].map(|ids| tokenizer.decode(ids, true));
    let text = format!(
        "Here are two versions of one step of a longer answer.\n\nFirst version:\n{}\n\nSecond version:\n{}\n\n\
         Do both come to the same facts, numbers and conclusions? Answer Yes or No.",
        draft.trim(),
        own.trim()
    );
    match template {
        Some(t) => tokenizer.encode(&t.render(&[Message::new("user", text)], true)?, false, true),
        None => tokenizer.encode(&format!("{text}\n\n"), true, false),
    }
}

impl Engine {
    /// Loads a draft model that writes whole steps, with the judge of them.
    ///
    /// # Errors
    /// Whatever is wrong with its files; a draft of another tokenizer; a model without a tokenizer; settings of no step.
    pub fn steps(&self, draft: &Path, judge: StepJudge, settings: StepSettings) -> Result<Steps> {
        ensure!(settings.ahead > 0 && settings.max_tokens > 0, Usage, "{settings:?}: there is no step to write");
        let taps = match judge {
            StepJudge::Similarity(t) => {
                ensure!((-1.0..=1.0).contains(&t), Usage, "a threshold of {t} is no cosine");
                vec![self.config().layers]
            }
            _ => Vec::new(),
        };
        let texts = (self.tokenizer()?.clone(), self.chat_template()?.cloned());
        let draft = self.0.model.load(&self.small_model(draft)?)?;
        Ok(Steps(Arc::new(Inner { judge, taps, settings, texts, eos: self.eos(), draft })))
    }

    /// A session that keeps what the judge of `steps` reads of the model's layers.
    pub fn session_for_steps(&self, steps: &Steps, capacity: usize, seed: u64) -> Result<Session> {
        Ok(Session::new(self.clone(), self.0.model.session(capacity, seed, steps.taps())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Device, EngineOptions};

    #[test]
    fn steps_end_with_a_blank_line_behind_words() {
        let options = EngineOptions::default().device(Device::Naive);
        let engine = Engine::open_with("models/tiny-llama", options).unwrap();
        let tokenizer = engine.tokenizer().unwrap();
        let ends = blank_line(tokenizer.clone(), engine.eos());
        let encode = |text: &str| tokenizer.encode(text, false, false).unwrap();
        let ids = encode("\n\n One step,\nof two lines.\n\n");
        let whole = (1..=ids.len()).find(|&n| ends(&ids[..n]) != End::Open);
        assert_eq!((whole, ends(&ids)), (Some(ids.len()), End::Step));
        assert_eq!(ends(&[encode("On"), vec![engine.eos()[0]]].concat()), End::Text);
        let texts = [encode("2 + 2 = 4"), encode("Two and two are four.")];
        let asked = question(tokenizer, engine.chat_template().unwrap(), &texts[0], &texts[1]).unwrap();
        let asked = tokenizer.decode(&asked, false);
        assert!(asked.contains("\n2 + 2 = 4\n") && asked.contains("\nTwo and two are four.\n"), "{asked}");
        assert!(asked.ends_with("assistant\n"), "{asked}");
    }
}
