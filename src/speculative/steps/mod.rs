//! Step-level lookahead (Fu et al. 2025, arXiv:2506.19830), with a draft that learns from its rejected steps: Online-LR of
//! OnlineSpec (arXiv:2603.12617).
//!
//! A draft model writes whole steps, several ahead (a step is a paragraph of reasoning, say); the target writes its own version of
//! each, all at once, several sequences in one pass; a [`Judge`] says whether the two versions come to the same.
//!
//! **Not lossless.** A step that a judge accepts stays as the draft wrote it: the text is then not what the target would have said,
//! and what a judge overlooks, a wrong number in a fluent sentence, is in it. Two ways keep the target's own text: [`StepDecoder`] with
//! [`Exact::tokens`], and [`StepChain`], which has a draft's steps verified token by token and is by far the cheaper.

mod chain;
mod decoder;
mod judge;
mod preferences;
mod writer;

pub use chain::StepChain;
pub use decoder::{StepCounts, StepDecoder, StepSettings};
pub use judge::{Case, Exact, Judge, Prompted, Similarity};
pub use preferences::{Dpo, Learned, Preferences, learn_chosen, learn_preferences};

pub use crate::train::data::Preference;

/// What the tokens of a step so far come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The step goes on.
    Open,
    /// It is whole: the next token begins another.
    Step,
    /// So is the text: nothing is drafted behind it.
    Text,
}

/// Says where steps end, from the tokens of one step so far (never empty): what is a blank line only a tokenizer knows.
pub type Ends = dyn Fn(&[u32]) -> End + Send + Sync;
