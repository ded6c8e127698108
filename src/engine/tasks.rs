//! Tasks with checkable answers, answered by diffusion at some settings, or from left to right.

use std::time::Instant;

use super::{Engine, Generate};
use crate::diffusion::{Outcome, Schedule, Settings};
use crate::error::{Result, ensure};

/// A prompt, and what a right answer comes down to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// The right answer.
    pub answer: String,
    /// Its kind, where there are several.
    pub category: String,
}

/// How tasks were answered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Tasks.
    pub tasks: usize,
    /// Those that were answered rightly.
    pub right: usize,
    /// Which.
    pub each: Vec<bool>,
    /// Tokens of the answers, up to the first end token, which does not count.
    pub tokens: u64,
    /// Forward passes, counted for each text; of whatever length.
    pub passes: u64,
    /// Positions that they computed.
    pub positions: u64,
    /// Rows that went through the vocabulary matrix.
    pub logits: u64,
    /// Seconds of decoding.
    pub seconds: f64,
}

impl Measured {
    /// Percent.
    pub fn accuracy(&self) -> f64 {
        100.0 * self.right as f64 / self.tasks.max(1) as f64
    }

    /// Tokens over passes, of all tasks together.
    pub fn tokens_per_forward(&self) -> f64 {
        self.tokens as f64 / self.passes.max(1) as f64
    }

    /// Tokens over seconds.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }
}

impl Engine {
    /// Answers `tasks` by diffusion, `width` at a time, in `tokens` positions each. `right` compares what is said with the right answer; `on` hears of
    /// each text that is done.
    ///
    /// # Errors
    /// As [`Engine::diffuse`]; no tokenizer.
    pub fn measure_diffusion(
        &self,
        tasks: &[Task],
        settings: Settings,
        tokens: usize,
        width: usize,
        right: &dyn Fn(&str, &str) -> bool,
        on: &mut dyn FnMut(),
    ) -> Result<Measured> {
        ensure!(width > 0, Usage, "--width 0 is impossible");
        let tokenizer = self.tokenizer()?;
        let mut out = Measured::default();
        for part in tasks.chunks(width) {
            let start = Instant::now();
            let texts: Result<Vec<Schedule>> = part.iter().map(|t| self.blank(&t.prompt, tokens, settings)).collect();
            let done = self.diffuse(&mut texts?, &mut |_, _, _| Ok(()))?;
            out.seconds += start.elapsed().as_secs_f64();
            for (task, Outcome { text, counts }) in part.iter().zip(done) {
                out.add(right(&tokenizer.decode(&text, true), &task.answer), text.len(), counts.passes);
                out.positions += counts.positions;
                out.logits += counts.logits;
                on();
            }
        }
        Ok(out)
    }

    /// The same from left to right, one token a pass, one task at a time.
    ///
    /// # Errors
    /// As [`super::Session::generate`].
    pub fn measure_autoregressive(
        &self,
        tasks: &[Task],
        tokens: usize,
        right: &dyn Fn(&str, &str) -> bool,
        on: &mut dyn FnMut(),
    ) -> Result<Measured> {
        let (mut out, eos) = (Measured::default(), self.eos());
        for task in tasks {
            let start = Instant::now();
            let mut session = self.session(task.prompt.len() + tokens, 0)?;
            session.push_ids(&task.prompt)?;
            let (mut text, mut n, mut said) = (String::new(), 0, 0);
            for piece in session.generate(Generate::default().max_tokens(tokens))? {
                let piece = piece?;
                said += u64::from(piece.id.is_some());
                n += usize::from(piece.id.is_some_and(|id| !eos.contains(&id)));
                text += &piece.text;
            }
            out.seconds += start.elapsed().as_secs_f64();
            // Each token takes a pass, the end token too; the first one's is the prompt's.
            out.add(right(&text, &task.answer), n, said);
            out.positions += task.prompt.len() as u64 + said.saturating_sub(1);
            out.logits += said;
            on();
        }
        Ok(out)
    }
}

impl Measured {
    fn add(&mut self, right: bool, tokens: usize, passes: u64) {
        self.tasks += 1;
        self.right += usize::from(right);
        self.each.push(right);
        self.tokens += tokens as u64;
        self.passes += passes;
    }
}
