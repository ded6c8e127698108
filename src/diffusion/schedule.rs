//! [`Schedule`]: the state of one text in the making. It says what each pass computes and takes what the pass found; it knows no model.
//!
//! One scheduler makes all decoders: blocks one after another or several at once, a number of steps or a threshold, with and without
//! a cache (d3LLM 2026, arXiv:2601.07568). Block 0 is the prompt.

use super::pass::{Commit, Counts, Pass};
use super::settings::{Cache, Choose, Settings};
use crate::backend::NO_TOKEN;
use crate::error::{Result, bail, ensure};
use crate::model::ModelConfig;
use crate::model::config::Diffusion;

/// Passes after which the published decoder gives up.
const MOST: u64 = 10_000;

#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) masks: usize,
    pub(super) full: bool,
    pub(super) done_at: Option<u64>,
    pub(super) cached: bool,
    pub(super) remasked: bool,
    /// Passes of a number of steps that are done, and the masks there were at the first.
    pub(super) steps: usize,
    pub(super) first_masks: usize,
}

impl Block {
    /// Whether `percent` of it are decoded. All of nothing is.
    fn has(&self, percent: u32) -> bool {
        let total = self.end - self.start;
        (total - self.masks) * 100 >= percent as usize * total
    }
}

/// A text in the making.
pub struct Schedule {
    pub(super) settings: Settings,
    pub(super) model: Diffusion,
    pub(super) eos: Vec<u32>,
    pub(super) prompt: usize,
    pub(super) x: Vec<u32>,
    /// One behind the last position that was given from the start: no end token before it ends the text.
    pub(super) fixed: usize,
    pub(super) given: Vec<bool>,
    pub(super) ranks: Vec<u32>,
    pub(super) sure: Vec<f32>,
    pub(super) blocks: Vec<Block>,
    /// Blocks that have begun, the prompt included.
    pub(super) begun: usize,
    /// Positions in blocks that are cached.
    cached: usize,
    /// Rows in the cache.
    stored: usize,
    /// The block for which a prefix or dual cache was taken.
    current: usize,
    pub(super) candidates: Vec<u32>,
    pub(super) commits: Vec<Commit>,
    counts: Counts,
    pub(super) number: u64,
    ended: bool,
}

impl Schedule {
    /// `prompt`, then `tokens` masks.
    ///
    /// # Errors
    /// As [`Schedule::infill`].
    pub fn new(cfg: &ModelConfig, settings: Settings, prompt: &[u32], tokens: usize) -> Result<Self> {
        let mask = cfg.diffusion.map_or(NO_TOKEN, |d| d.mask);
        Self::infill(cfg, settings, prompt, &vec![mask; tokens])
    }

    /// `prompt`, then a `text` of which the masks are to be filled and all else stays.
    ///
    /// # Errors
    /// A model that is none of diffusion; settings that are impossible or do not suit it; a text without masks or longer than the
    /// model's context; a prompt that holds MASK.
    pub fn infill(cfg: &ModelConfig, settings: Settings, prompt: &[u32], text: &[u32]) -> Result<Self> {
        let settings = settings.validate()?;
        let Some(model) = cfg.diffusion else {
            bail!(Usage, "this model has no mask token: it is not a diffusion model, decode it autoregressively");
        };
        let (p, all) = (prompt.len(), prompt.len() + text.len());
        ensure!(
            all <= cfg.context,
            Capacity,
            "{p} prompt tokens and {} to fill exceed the context of {}",
            text.len(),
            cfg.context
        );
        let alien = prompt.iter().chain(text).find(|&&t| t as usize >= cfg.vocab);
        ensure!(
            alien.is_none(),
            Usage,
            "token {} is outside the vocabulary of {}",
            alien.copied().unwrap_or(0),
            cfg.vocab
        );
        ensure!(
            !prompt.contains(&model.mask),
            Usage,
            "the prompt holds the mask token {}: put it into the text to fill",
            model.mask
        );
        ensure!(text.contains(&model.mask), Usage, "there is no mask to fill");
        ensure!(
            p > 0 || !model.shift,
            Usage,
            "the prompt is empty: this model predicts a token from the one before it"
        );
        ensure!(!settings.early_stop || !cfg.eos.is_empty(), Usage, "early stop needs a model with an end token");
        if let Some(block) = model.block {
            let fits = settings.block == block;
            ensure!(fits, Usage, "--block-size {}: this block-causal model has blocks of {block}", settings.block);
            let exact = matches!(settings.cache, Cache::None | Cache::Delayed { .. });
            ensure!(
                exact && !settings.authors,
                Usage,
                "a block-causal model's cache is exact: --cache none or delayed"
            );
        }
        let given: Vec<bool> = text.iter().map(|&t| t != model.mask).collect();
        let fixed = p + given.iter().rposition(|&g| g).map_or(0, |i| i + 1);
        let block = |start: usize, end: usize| Block {
            start,
            end,
            masks: if start < p { 0 } else { given[start - p..end - p].iter().filter(|g| !**g).count() },
            full: false,
            done_at: None,
            cached: false,
            remasked: false,
            steps: 0,
            first_masks: 0,
        };
        let mut blocks = vec![Block { done_at: Some(0), full: true, ..block(0, p) }];
        blocks[0].masks = 0;
        blocks.extend((p..all).step_by(settings.block).map(|start| block(start, all.min(start + settings.block))));
        blocks[1].full = true;
        Ok(Self {
            settings,
            model,
            eos: cfg.eos.clone(),
            prompt: p,
            x: [prompt, text].concat(),
            fixed,
            ranks: vec![u32::MAX; text.len()],
            sure: vec![1.0; text.len()],
            given,
            blocks,
            begun: 2,
            cached: 0,
            stored: 0,
            current: 0,
            candidates: Vec::new(),
            commits: Vec::new(),
            counts: Counts::default(),
            number: 0,
            ended: false,
        })
    }

    /// The whole text as it is, masks included.
    pub fn tokens(&self) -> &[u32] {
        &self.x
    }

    /// Tokens of the prompt.
    pub fn prompt(&self) -> usize {
        self.prompt
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What makes its model a diffusion model.
    pub fn model(&self) -> Diffusion {
        self.model
    }

    /// Counts so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// For each position behind the prompt the pass, from 0 on, that made it a token; `u32::MAX` for what was given, filled behind
    /// the end, or is a mask yet. A text's pseudo-trajectory: after pass j the masks are those with a rank above j.
    pub fn ranks(&self) -> &[u32] {
        &self.ranks
    }

    /// Tokens behind the prompt that are final: no pass changes them.
    pub fn settled(&self) -> &[u32] {
        let end = match self.settings.remask > 0.0 {
            true => self.blocks.iter().find(|b| b.masks > 0).map_or(self.x.len(), |b| b.start),
            false => self.x.iter().position(|&t| t == self.model.mask).unwrap_or(self.x.len()),
        };
        let text = &self.x[self.prompt..end.max(self.prompt)];
        &text[..self.end_in(text).map_or(text.len(), |e| e + 1)]
    }

    /// The text behind the prompt up to its first end token, which is not part of it: what counts as tokens.
    pub fn text(&self) -> &[u32] {
        let text = &self.x[self.prompt..];
        &text[..self.end_in(text).unwrap_or(text.len())]
    }

    /// Where the first end token stands that ends it.
    fn end_in(&self, text: &[u32]) -> Option<usize> {
        let from = self.fixed - self.prompt;
        let ends = |t: &u32| self.eos.contains(t);
        text.get(from..)?.iter().position(ends).map(|e| from + e)
    }

    fn masks(&self, end: usize) -> impl Iterator<Item = u32> {
        let mask = self.model.mask;
        (self.prompt..end).filter(move |&i| self.x[i] == mask).map(|i| i as u32)
    }

    /// What the next pass computes; `None` when the text is done. Every pass it gives must come back through [`Schedule::commit`].
    pub fn next_pass(&mut self) -> Option<Pass> {
        loop {
            let before: Vec<u32> = self.masks(self.x.len()).collect();
            if before.is_empty() || self.ended || self.number >= MOST {
                if self.settings.early_stop {
                    self.stop_at_end();
                }
                return None;
            }
            self.number += 1;
            if self.settings.early_stop && self.stop_at_end() && !self.x[self.prompt..].contains(&self.model.mask) {
                // The published count has it already.
                self.counts.passes += u64::from(self.settings.authors);
                self.ended = true;
                return None;
            }
            self.begin_blocks();
            let right = self.blocks[..self.begun].iter().rfind(|b| b.full || b.masks > 0).map_or(0, |b| b.end);
            self.candidates = match self.settings.authors {
                true => before.into_iter().filter(|&i| (i as usize) < right).collect(),
                false => self.masks(right).collect(),
            };
            // A pass that may take nothing need not run; the published samplers run it.
            if self.quota() == Some(0) && !self.settings.authors {
                self.advance_steps();
                self.number -= 1;
                continue;
            }
            let mut pass = self.plan();
            let shift = usize::from(self.model.shift);
            let first = pass.spans[0].start;
            let mut rows = Vec::with_capacity(self.candidates.len());
            self.candidates.retain(|&i| {
                // Behind an authors' cached prefix nobody computes the row before the first position: they take its own.
                let before = (i as usize).saturating_sub(shift);
                let from = if self.settings.authors && i as usize >= first { before.max(first) } else { before };
                let row = pass.row(from);
                rows.extend(row);
                row.is_some()
            });
            pass.wanted = rows;
            pass.number = self.number;
            self.counts.passes += 1;
            self.counts.positions += pass.rows() as u64;
            self.counts.logits += pass.wanted.len() as u64;
            self.counts.refreshes += u64::from(pass.past == 0 && pass.keep > 0 && self.stored > 0);
            self.stored = pass.past + pass.keep;
            return Some(pass);
        }
    }

    /// Fills what lies behind the first end token; says whether there is one.
    fn stop_at_end(&mut self) -> bool {
        let Some(e) = self.end_in(&self.x[self.prompt..]).map(|e| e + self.prompt) else { return false };
        self.x[e + 1..].fill(self.eos[0]);
        for b in self.blocks.iter_mut().filter(|b| b.end > e && b.end > b.start) {
            if b.start > e {
                (b.masks, b.full, b.cached) = (0, true, true);
                b.done_at.get_or_insert(self.number);
            } else {
                b.masks = self.x[b.start..=e].iter().filter(|&&t| t == self.model.mask).count();
            }
        }
        self.begun = self.blocks.len();
        true
    }

    /// Blocks that now have to advance, and at most one that begins.
    fn begin_blocks(&mut self) {
        let Settings { add, activate, .. } = self.settings;
        for b in 1..self.begun {
            self.blocks[b].full |= self.blocks[b - 1].has(activate);
        }
        let last = &self.blocks[self.begun - 1];
        if self.begun < self.blocks.len() && (last.has(add) || last.masks == 0) {
            self.blocks[self.begun].full = last.has(activate);
            self.begun += 1;
        }
    }

    /// One behind the last position that a pass has to see.
    fn sight(&self) -> usize {
        let last = self.blocks[..self.begun].iter().rfind(|b| b.masks > 0).map_or(self.x.len(), |b| b.end);
        let ahead = if self.model.block.is_some() { Some(0) } else { self.settings.look_ahead };
        ahead.map_or(self.x.len(), |n| self.x.len().min(last.saturating_add(n)))
    }

    /// Rows of the cache for so many cached positions. A shifted model predicts the first position behind them from the last of them,
    /// which is therefore computed again, behind the rows before it.
    fn rows_of(&self, positions: usize) -> usize {
        positions - usize::from(self.model.shift && !self.settings.authors && positions > 0)
    }

    fn plan(&mut self) -> Pass {
        let end = self.sight();
        let whole = |keep| Pass { keep, ..Pass::over(0, 0..end) };
        match self.settings.cache {
            Cache::None => whole(0),
            Cache::Prefix | Cache::Dual => {
                let now = self.blocks.iter().position(|b| b.masks > 0).unwrap_or(0);
                let fresh = std::mem::replace(&mut self.current, now) != now;
                let (from, to) = (self.rows_of(self.blocks[now].start), self.blocks[now].end);
                let dual = self.settings.cache == Cache::Dual;
                match (fresh, dual) {
                    (true, false) => whole(from),
                    (false, false) => Pass::over(self.stored, from..end),
                    (true, true) => {
                        let spans = [0..from, to..end, from..to].into_iter().filter(|s| !s.is_empty()).collect();
                        Pass { spans, keep: from + (end - to), ..Pass::default() }
                    }
                    (false, true) => Pass::over(self.stored, from..to),
                }
            }
            Cache::Delayed { delay, refresh } => {
                let (old, first) = (self.cached, self.rows_of(self.cached));
                if let Some(to) = self.admit(delay) {
                    self.cached = to;
                    return Pass { keep: self.rows_of(to) - first, ..Pass::over(self.stored, first..end) };
                }
                let complete = |b: &&Block| b.masks == 0 && b.done_at.is_some() && !b.cached;
                let waiting = self.blocks[..self.begun].iter().rfind(complete).map(|b| b.start);
                let due = refresh.is_some_and(|r| self.number.is_multiple_of(r));
                match (old > 0, waiting) {
                    (false, _) => whole(0),
                    (true, None) if !due => Pass::over(self.stored, first..end),
                    (true, waiting) if self.settings.authors => whole(waiting.unwrap_or(old)),
                    (true, _) => whole(first),
                }
            }
        }
    }

    /// Where the blocks end that join the cache now, if any.
    fn admit(&mut self, delay: u64) -> Option<usize> {
        let stop_early = matches!(self.settings.choose, Choose::Threshold { best: true, .. });
        let (number, cached, mut to) = (self.number, self.cached, None);
        for b in self.blocks[..self.begun].iter_mut().filter(|b| b.end > cached) {
            if b.masks > 0 {
                break;
            }
            let age = number - *b.done_at.get_or_insert(number);
            if age >= delay && !b.cached {
                b.cached = true;
                to = Some(b.end);
            } else if age < delay && stop_early {
                break;
            }
        }
        to
    }
}
