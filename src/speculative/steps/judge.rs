//! [`Judge`]: whether a draft's step and the target's own version of it come to the same.

use std::ops::Range;
use std::sync::Arc;

use super::writer::follow;
use crate::backend::Backend;
use crate::decode::Session;
use crate::error::{Result, bail, ensure};
use crate::model::Model;

/// Two versions of one step.
pub struct Case<'a, B: Backend> {
    /// The text before the step.
    pub prefix: &'a [u32],
    /// The draft's version.
    pub draft: &'a [u32],
    /// The target's.
    pub own: &'a [u32],
    /// Sessions of the target that hold prefix and draft's version, and prefix and own version, computed to the last token where
    /// the judge has [`Judge::taps`].
    pub sessions: [&'a Session<B>; 2],
}

/// Compares steps whose tokens differ: equal tokens are accepted without asking.
pub trait Judge<B: Backend>: Send {
    /// Its name, for statistics.
    fn name(&self) -> &str;

    /// Layers of the target whose inputs it reads ([`Session::with_taps`]).
    fn taps(&self) -> &[usize] {
        &[]
    }

    /// Whether the draft's version may stand for the target's.
    ///
    /// # Errors
    /// `Diverged` where what it compares is not finite; the device's.
    fn accepts(&mut self, case: &Case<'_, B>) -> Result<bool>;
}

/// The text of tokens.
type TextOf = dyn Fn(&[u32]) -> String + Send;

/// Accepts the same tokens or, where it is told how to spell them, the same text but for blanks at its ends.
pub struct Exact {
    text: Option<Box<TextOf>>,
}

impl Exact {
    /// The same tokens: what comes out is what the target alone would have said.
    pub fn tokens() -> Self {
        Self { text: None }
    }

    /// The same text after trimming. Not lossless: tokens, and blanks at the ends of steps, may be the draft's.
    pub fn text(text: impl Fn(&[u32]) -> String + Send + 'static) -> Self {
        Self { text: Some(Box::new(text)) }
    }
}

impl<B: Backend> Judge<B> for Exact {
    fn name(&self) -> &str {
        "exact"
    }

    fn accepts(&mut self, case: &Case<'_, B>) -> Result<bool> {
        let same = |text: &TextOf| text(case.draft).trim() == text(case.own).trim();
        Ok(case.draft == case.own || self.text.as_deref().is_some_and(same))
    }
}

/// Accepts where the target's mean hidden states over the two versions point the same way: their cosine is at least a threshold.
/// Not lossless: nearness of meaning is not equality of content.
pub struct Similarity {
    threshold: f64,
    tap: [usize; 1],
}

impl Similarity {
    /// Compares the residual stream at the input of layer `tap` (the number of layers: behind the last).
    ///
    /// # Errors
    /// `Usage`: a threshold that is no cosine.
    pub fn new(tap: usize, threshold: f64) -> Result<Self> {
        ensure!((-1.0..=1.0).contains(&threshold), Usage, "a threshold of {threshold} is no cosine");
        Ok(Self { threshold, tap: [tap] })
    }
}

impl<B: Backend> Judge<B> for Similarity {
    fn name(&self) -> &str {
        "similarity"
    }

    fn taps(&self) -> &[usize] {
        &self.tap
    }

    fn accepts(&mut self, case: &Case<'_, B>) -> Result<bool> {
        let at = case.prefix.len();
        let [draft, own] = case.sessions;
        let a = mean_state(draft, at..at + case.draft.len())?;
        let b = mean_state(own, at..at + case.own.len())?;
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let cosine = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
        ensure!(cosine.is_finite(), Diverged, "the hidden states of a step are not finite, or all 0");
        Ok(cosine >= self.threshold)
    }
}

/// Mean over `rows` of the residual stream at a session's first tap.
fn mean_state<B: Backend>(s: &Session<B>, rows: Range<usize>) -> Result<Vec<f64>> {
    let (d, n) = (s.model().config().hidden, rows.len());
    let mut host = vec![0.0; n * d];
    s.model().backend().download_acc(s.feature_rows(0, rows)?, &mut host)?;
    let mut mean = vec![0.0; d];
    for row in host.chunks(d) {
        mean.iter_mut().zip(row).for_each(|(m, &x)| *m += f64::from(x) / n as f64);
    }
    Ok(mean)
}

/// The tokens of a question about a prefix, the draft's version and the target's.
type Ask = dyn Fn(&[u32], &[u32], &[u32]) -> Result<Vec<u32>> + Send;

/// Asks a model, the target itself say, whether the versions say the same, and compares the logits of two answers. Not lossless:
/// it accepts whatever the model takes for the same.
pub struct Prompted<B: Backend> {
    session: Session<B>,
    ask: Box<Ask>,
    answers: [u32; 2],
}

impl<B: Backend> Prompted<B> {
    /// `ask` makes the question of prefix, draft's version and own version, in at most `capacity` tokens; `answers` are the tokens of
    /// yes and no behind it.
    ///
    /// # Errors
    /// Answers outside the vocabulary, or equal; as [`Session::new`].
    pub fn new(
        model: Arc<Model<B>>,
        capacity: usize,
        ask: impl Fn(&[u32], &[u32], &[u32]) -> Result<Vec<u32>> + Send + 'static,
        answers: [u32; 2],
    ) -> Result<Self> {
        let vocab = model.config().vocab;
        let [yes, no] = answers;
        ensure!(
            yes != no && answers.iter().all(|&t| (t as usize) < vocab),
            Usage,
            "tokens {yes}, {no} are no two answers"
        );
        Ok(Self { session: Session::new(model, capacity, 0)?, ask: Box::new(ask), answers })
    }
}

impl<B: Backend> Judge<B> for Prompted<B> {
    fn name(&self) -> &str {
        "prompted"
    }

    fn accepts(&mut self, case: &Case<'_, B>) -> Result<bool> {
        let question = (self.ask)(case.prefix, case.draft, case.own)?;
        follow(&mut self.session, &question);
        self.session.advance()?;
        let logits = self.session.logits()?;
        let [yes, no] = self.answers.map(|t| logits[t as usize]);
        if !(yes.is_finite() && no.is_finite()) {
            bail!(Diverged, "the judge's logits are not finite: {yes}, {no}");
        }
        Ok(yes > no)
    }
}
