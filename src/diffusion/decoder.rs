//! Runs schedules over a denoiser, several texts in a pass.

use super::denoiser::{Denoise, Job};
use super::pass::{Commit, Counts};
use super::schedule::Schedule;
use crate::error::Result;

/// Hears of a text after each pass, by its index, and of its new tokens.
pub type OnPass<'a> = &'a mut dyn FnMut(usize, &Schedule, &[Commit]) -> Result<()>;

/// A finished text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Tokens behind the prompt up to the first end token, which does not count.
    pub text: Vec<u32>,
    /// What it took.
    pub counts: Counts,
}

impl Outcome {
    /// Of a schedule that is done.
    pub fn of(schedule: &Schedule) -> Self {
        Self { text: schedule.text().to_vec(), counts: schedule.counts() }
    }

    /// Tokens of the text over passes.
    pub fn tokens_per_forward(&self) -> f64 {
        self.text.len() as f64 / (self.counts.passes.max(1)) as f64
    }
}

/// Decodes all `texts` to their ends. Text i uses place i of the denoiser. `on` hears after each pass of a text, by its index, and of its
/// new tokens.
///
/// # Errors
/// The denoiser's; predictions that are not finite; those of `on`.
pub fn decode(denoiser: &mut dyn Denoise, texts: &mut [Schedule], on: OnPass<'_>) -> Result<()> {
    loop {
        let passes: Vec<_> = texts.iter_mut().enumerate().filter_map(|(i, t)| Some((i, t.next_pass()?))).collect();
        if passes.is_empty() {
            return Ok(());
        }
        let jobs: Vec<Job<'_>> = passes.iter().map(|(i, pass)| Job { place: *i, text: &texts[*i], pass }).collect();
        let found = denoiser.run(&jobs)?;
        for ((i, pass), stats) in passes.iter().zip(found) {
            let commits = texts[*i].commit(pass, &stats)?.to_vec();
            on(*i, &texts[*i], &commits)?;
        }
    }
}
