//! Many prompts continued at once: a pass of the model takes the next token, or a piece of the prompt, of each.
//!
//! A row's result does not depend on the rows beside it, and random numbers are those of a prompt's own stream and of the
//! token's position; so a continuation is what a [`Session`](super::Session) of its own would give, bit for bit.

use super::sampler::drawn;
use super::session::PREFILL_ROWS;
use super::{DecodeStats, Sampler};
use crate::backend::{Backend, Buffer, Mask};
use crate::error::{Result, ensure};
use crate::model::{KvCache, Model, Sequence, Want, Workspace};
use crate::rng::Key;

/// A prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// Token ids, at least one.
    pub ids: Vec<u32>,
    /// How its tokens are drawn; the repetition penalty must be 1.
    pub sampler: Sampler,
    /// Which of the seed's random numbers it draws by.
    pub stream: u64,
}

/// How prompts are continued.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Prompts in the making at a time.
    pub width: usize,
    /// Most new tokens of each.
    pub max_tokens: usize,
    /// Tokens that end a continuation, as its last.
    pub eos: Vec<u32>,
    /// Seed of all random numbers.
    pub seed: u64,
}

/// A place in the batch: one prompt with what has been made of it.
struct Slot<B: Backend> {
    cache: KvCache<B>,
    prompt: usize,
    tokens: Vec<u32>,
    /// Rows in the current pass.
    rows: usize,
}

impl<B: Backend> Slot<B> {
    fn pending(&self) -> usize {
        self.tokens.len() - self.cache.len()
    }
}

impl Batch {
    /// Continues all `prompts`. `done` hears of each, by its index, with its new tokens, as soon as it has ended: not in order.
    /// A place that becomes free goes to the next prompt.
    ///
    /// # Errors
    /// A prompt that is empty or, with its continuation, exceeds the model's context; logits that are not finite; the
    /// device's; those of `done`.
    pub fn run<B: Backend>(
        &self,
        model: &Model<B>,
        prompts: &[Prompt],
        done: &mut dyn FnMut(usize, &[u32]) -> Result<()>,
    ) -> Result<DecodeStats> {
        let (be, cfg, width) = (model.backend(), model.config(), self.width.min(prompts.len()));
        let mut stats = DecodeStats::default();
        let longest = prompts.iter().map(|p| p.ids.len()).max().unwrap_or(0);
        ensure!(prompts.iter().all(|p| !p.ids.is_empty()), Usage, "a prompt is empty: there is nothing to continue");
        ensure!(
            prompts.iter().all(|p| p.sampler.repeat_penalty == 1.0),
            Unsupported,
            "a batch has no repetition penalty"
        );
        ensure!(self.max_tokens > 0 && self.width > 0, Usage, "a batch of no sequence, or of no token");
        let (most, capacity) = (cfg.context, longest.saturating_add(self.max_tokens));
        ensure!(capacity <= most, Capacity, "a prompt and its continuation have {capacity} tokens, the context {most}");
        if prompts.is_empty() {
            return Ok(stats);
        }
        let mut ws = Workspace::new(be, cfg, width + PREFILL_ROWS, width)?;
        let (mut on_device, mut new) = (be.alloc::<u32>(width)?, vec![0; width]);
        let mut slots = Vec::with_capacity(width);
        for (prompt, first) in prompts.iter().enumerate().take(width) {
            let cache = KvCache::new(be, cfg, capacity)?;
            slots.push(Slot { cache, prompt, tokens: first.ids.clone(), rows: 0 });
        }
        let mut next = width;
        while !slots.is_empty() {
            self.pass(model, &mut slots, &mut ws)?;
            stats.forwards += 1;
            let ready = |s: &Slot<B>| s.rows > 0 && s.rows == s.pending();
            let draw = |s: &Slot<B>| {
                let Prompt { sampler, stream, .. } = &prompts[s.prompt];
                sampler.draw(Key { seed: self.seed, stream: *stream, counter: s.tokens.len() as u64 })
            };
            let draws: Vec<_> = slots.iter().filter(|s| ready(s)).map(draw).collect();
            let n = draws.len();
            if n > 0 {
                be.sample(on_device.head_mut(n), ws.logit_rows(n), &draws)?;
                be.download(on_device.head(n), &mut new[..n])?;
                stats.tokens += n as u64;
            }
            let mut new = new[..n].iter();
            for s in &mut slots {
                let token = if ready(s) { new.next() } else { None };
                s.cache.commit_first(s.rows)?;
                let Some(&token) = token else { continue };
                s.tokens.push(drawn(token)?);
                let made = &s.tokens[prompts[s.prompt].ids.len()..];
                if made.len() < self.max_tokens && !self.eos.contains(&token) {
                    continue;
                }
                done(s.prompt, made)?;
                s.prompt = next;
                next += 1;
                if let Some(p) = prompts.get(s.prompt) {
                    // What both prompts begin with, a template's first turn, stays; one row at least gives logits.
                    let same = s.tokens.iter().zip(&p.ids).take_while(|(a, b)| a == b).count();
                    s.cache.truncate(same.min(p.ids.len() - 1));
                    s.tokens.clone_from(&p.ids);
                }
            }
            slots.retain(|s| s.prompt < prompts.len());
        }
        Ok(stats)
    }

    /// One pass over the last token of each sequence that has only that to compute, and over up to [`PREFILL_ROWS`] of what
    /// else is pending.
    fn pass<B: Backend>(&self, model: &Model<B>, slots: &mut [Slot<B>], ws: &mut Workspace<B>) -> Result<()> {
        let mut room = PREFILL_ROWS;
        let mut sequences = Vec::with_capacity(slots.len());
        for s in slots {
            let (at, pending) = (s.cache.len(), s.pending());
            s.rows = if pending == 1 { 1 } else { pending.min(room) };
            if pending > 1 {
                room -= s.rows;
            }
            if s.rows > 0 {
                let tokens = &s.tokens[at..at + s.rows];
                let want = if s.rows == pending { Want::Last } else { Want::Nothing };
                sequences.push(Sequence::new(&mut s.cache, tokens, Mask::Causal, want));
            }
        }
        model.forward(&mut sequences, ws)?;
        Ok(())
    }
}
