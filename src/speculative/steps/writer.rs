//! [`Writer`]: a draft model that writes steps behind a session's text.

use std::sync::Arc;

use super::{End, Ends};
use crate::backend::Backend;
use crate::decode::{Sampler, Session};
use crate::error::{Result, ensure};
use crate::model::Model;

/// Makes `session` hold `text`, keeping what it has computed of it.
pub(super) fn follow<B: Backend>(session: &mut Session<B>, text: &[u32]) {
    let same = session.tokens().iter().zip(text).take_while(|(a, b)| a == b).count();
    session.truncate(same);
    session.push(&text[same..]);
}

pub(super) struct Writer<B: Backend> {
    model: Arc<Model<B>>,
    session: Option<Session<B>>,
}

impl<B: Backend> Writer<B> {
    pub fn new(model: Arc<Model<B>>) -> Self {
        Self { model, session: None }
    }

    /// Up to `ahead` steps of up to `most` tokens behind the text of `s`, drawn by the same random numbers as the target's own
    /// tokens. At least one token of the session's room, and of the draft's context, stays free.
    ///
    /// # Errors
    /// A draft of another vocabulary; logits that are not finite; the device's.
    pub fn write(
        &mut self,
        s: &Session<B>,
        ahead: usize,
        most: usize,
        ends: &Ends,
        sampler: &Sampler,
    ) -> Result<Vec<(Vec<u32>, End)>> {
        let (own, target) = (self.model.config(), s.model().config());
        ensure!(
            own.vocab == target.vocab,
            Usage,
            "the draft has {} tokens, the target {}: they must share a tokenizer",
            own.vocab,
            target.vocab
        );
        let room = s.capacity().min(own.context);
        let mut steps = Vec::new();
        if s.tokens().len() + 1 >= room {
            return Ok(steps);
        }
        let fits = |d: &Session<B>| d.capacity() >= room && d.key(0) == s.key(0);
        let d = match self.session.take().filter(fits) {
            Some(d) => self.session.insert(d),
            None => {
                let mut d = Session::new(self.model.clone(), room, s.key(0).seed)?;
                d.stream = s.stream;
                self.session.insert(d)
            }
        };
        follow(d, s.tokens());
        let mut end = End::Step;
        while steps.len() < ahead && end == End::Step && d.tokens().len() + 1 < room {
            let mut step = Vec::new();
            end = End::Open;
            while end == End::Open && step.len() < most && d.tokens().len() + 1 < room {
                d.advance()?;
                let token = d.sample(sampler)?;
                d.push(&[token]);
                step.push(token);
                end = ends(&step);
            }
            steps.push((step, end));
            // A step that is cut at its longest is a step.
            if end == End::Open {
                end = End::Step;
            }
        }
        Ok(steps)
    }
}
