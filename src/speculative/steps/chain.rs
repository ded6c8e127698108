//! [`StepChain`]: steps of a draft, verified token by token.

use std::sync::Arc;

use super::writer::Writer;
use super::{End, Ends};
use crate::backend::Backend;
use crate::decode::{Sampler, Session};
use crate::error::Result;
use crate::model::Model;
use crate::speculative::{Budget, Draft, DraftTree};

/// The lossless form of step-level drafting: a draft for [`Speculative`](crate::speculative::Speculative) that proposes a step as a
/// chain of tokens and goes on with the rest of it for as long as the target says the same. The target's text is untouched.
pub struct StepChain<B: Backend> {
    writer: Writer<B>,
    ends: Box<Ends>,
    sampler: Sampler,
    most: usize,
    /// The text behind which `step` was written.
    base: Vec<u32>,
    step: Vec<u32>,
}

impl<B: Backend> StepChain<B> {
    /// `model`, whose tokens are the target's, writes steps of up to `most` tokens by `sampler`: that of the decoder agrees with
    /// the target most often.
    pub fn new(
        model: Arc<Model<B>>,
        sampler: Sampler,
        most: usize,
        ends: impl Fn(&[u32]) -> End + Send + Sync + 'static,
    ) -> Self {
        Self { writer: Writer::new(model), ends: Box::new(ends), sampler, most, base: Vec::new(), step: Vec::new() }
    }

    /// What of the step lies behind `text`; `None` where the text left it, or has reached its end.
    fn rest(&self, text: &[u32]) -> Option<&[u32]> {
        let (base, behind) = text.split_at_checked(self.base.len())?;
        let rest = self.step.strip_prefix(behind).filter(|rest| !rest.is_empty())?;
        (base == self.base).then_some(rest)
    }
}

impl<B: Backend> Draft<B> for StepChain<B> {
    fn name(&self) -> &str {
        "steps"
    }

    fn propose(&mut self, session: &Session<B>, budget: Budget<'_>, tree: &mut DraftTree) -> Result<()> {
        let text = session.tokens();
        if self.rest(text).is_none() {
            let written = self.writer.write(session, 1, self.most, &*self.ends, &self.sampler)?;
            self.base = text.to_vec();
            self.step = written.into_iter().next().map_or_else(Vec::new, |(step, _)| step);
        }
        let rest = self.rest(text).unwrap_or_default();
        let mut node = 0;
        for &token in rest.iter().take(budget.nodes.min(budget.depth)) {
            // The draft would say so: it has no doubts to tell of.
            node = tree.push(node, token, 0.0, budget.source);
        }
        Ok(())
    }
}
