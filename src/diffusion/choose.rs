//! Which predictions of a pass become tokens: the second half of [`Schedule`].

use std::ops::Range;

use super::denoiser::RowStat;
use super::pass::{Commit, Pass};
use super::schedule::Schedule;
use super::settings::{Choose, Rank};
use crate::backend::NO_TOKEN;
use crate::error::{Result, bail, ensure};
use crate::rng::Key;

/// Random numbers of a seed that rank and choose positions, apart from those that draw tokens.
const CHANCE: u64 = 0x4d41_534b << 32;
/// Where Dream's times end.
const LAST_TIME: f64 = 1e-3;

impl Schedule {
    /// Passes of block `b` where their number is given: an even share.
    fn steps_of(&self, b: usize, steps: usize) -> usize {
        let blocks = self.blocks.len() - 1;
        (steps * b / blocks - steps * (b - 1) / blocks).max(1)
    }

    /// How many tokens this pass takes of the current block, where their number is given.
    pub(super) fn quota(&mut self) -> Option<usize> {
        let steps = match self.settings.choose {
            Choose::Quota { steps, .. } | Choose::Timetable { steps, .. } => steps,
            Choose::Threshold { .. } => return None,
        };
        let now = self.blocks.iter().position(|b| b.masks > 0)?;
        let steps = self.steps_of(now, steps);
        let b = &mut self.blocks[now];
        if b.steps == 0 {
            b.first_masks = b.masks;
        }
        if b.steps + 1 >= steps {
            return Some(b.masks);
        }
        Some(match self.settings.choose {
            Choose::Timetable { by: Rank::Random, .. } => usize::MAX,
            Choose::Timetable { .. } => (b.masks as f64 * leaving(b.steps, steps)) as usize,
            _ => b.first_masks / steps + usize::from(b.steps < b.first_masks % steps),
        })
    }

    pub(super) fn advance_steps(&mut self) {
        if let Some(b) = self.blocks.iter_mut().find(|b| b.masks > 0) {
            b.steps += 1;
        }
    }

    /// Takes what the pass found for its candidates: `stats\[i\]` for `pass.wanted\[i\]`. Returns the new tokens, ascending by position.
    ///
    /// # Errors
    /// `Diverged` where a prediction is not finite; rows of another pass.
    pub fn commit(&mut self, pass: &Pass, stats: &[RowStat]) -> Result<&[Commit]> {
        let n = self.candidates.len();
        ensure!(
            stats.len() == n && pass.number == self.number,
            Shape,
            "{} predictions for {n} candidates",
            stats.len()
        );
        if let Some(i) = stats.iter().position(|s| s.argmax == NO_TOKEN) {
            bail!(Diverged, "pass {}: the prediction of position {} is not finite", pass.number, self.candidates[i]);
        }
        let mut taken = vec![None; n];
        self.choose(stats, &mut taken);
        self.commits.clear();
        for (i, token) in taken.into_iter().enumerate() {
            let Some(token) = token else { continue };
            let position = self.candidates[i] as usize;
            self.x[position] = token;
            self.ranks[position - self.prompt] = (pass.number - 1) as u32;
            self.sure[position - self.prompt] = stats[i].confidence();
            let b = 1 + (position - self.prompt) / self.settings.block;
            self.blocks[b].masks = self.blocks[b].masks.saturating_sub(1);
            self.commits.push(Commit { position, token });
        }
        if self.settings.remask > 0.0 {
            self.remask();
        }
        Ok(&self.commits)
    }

    fn choose(&mut self, stats: &[RowStat], taken: &mut [Option<u32>]) {
        match self.settings.choose {
            Choose::Quota { by, .. } | Choose::Timetable { by, .. } => {
                let Some(count) = self.quota() else { return };
                let now = self.blocks.iter().position(|b| b.masks > 0).unwrap_or(0);
                let chance = match self.settings.choose {
                    Choose::Timetable { steps, .. } if count == usize::MAX => {
                        Some(leaving(self.blocks[now].steps, self.steps_of(now, steps)))
                    }
                    _ => None,
                };
                let mut order: Vec<(f64, usize)> = (0..stats.len()).map(|i| (self.cost(by, i, &stats[i]), i)).collect();
                order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
                match chance {
                    Some(p) => order.retain(|(u, _)| *u < p),
                    None => order.truncate(count),
                }
                order.iter().for_each(|&(_, i)| taken[i] = Some(stats[i].token));
                self.advance_steps();
            }
            Choose::Threshold { by, at, best, every } => {
                let passes = |s: &RowStat| match by {
                    Rank::Confidence => s.confidence() >= at,
                    _ if best => s.entropy <= at,
                    _ => s.entropy < at,
                };
                let lowest = |schedule: &Self, span: Range<usize>| {
                    let inside = (0..stats.len()).filter(|&i| span.contains(&(schedule.candidates[i] as usize)));
                    inside.map(|i| (schedule.cost(by, i, &stats[i]), i)).reduce(|a, b| if b.0 < a.0 { b } else { a })
                };
                for (t, s) in taken.iter_mut().zip(stats).filter(|(_, s)| passes(s)) {
                    *t = Some(s.token);
                }
                if let Some((_, i)) = lowest(self, 0..self.x.len()).filter(|_| best) {
                    taken[i] = Some(stats[i].token);
                }
                let must = self.blocks[..self.begun].iter().filter(|b| b.full && b.masks > 0);
                for b in must.take(if every { usize::MAX } else { 1 }) {
                    let span = b.start..b.end;
                    let any =
                        (0..taken.len()).any(|i| taken[i].is_some() && span.contains(&(self.candidates[i] as usize)));
                    if let Some((_, i)) = lowest(self, span).filter(|_| !any) {
                        taken[i] = Some(stats[i].argmax);
                    }
                }
            }
        }
    }

    /// Smaller is better.
    fn cost(&self, by: Rank, i: usize, s: &RowStat) -> f64 {
        match by {
            Rank::Confidence => -f64::from(s.confidence()),
            Rank::Margin => -f64::from(s.confidence() - s.second_probability()),
            Rank::Entropy => f64::from(s.entropy),
            Rank::Random => {
                let counter = self.number * self.x.len() as u64 + u64::from(self.candidates[i]);
                Key { seed: self.settings.seed, stream: CHANCE, counter }.uniform()
            }
        }
    }

    /// Complete blocks give back what was taken with too little confidence, once.
    fn remask(&mut self) {
        for b in self.blocks[1..self.begun].iter_mut().filter(|b| b.masks == 0 && !b.remasked) {
            b.remasked = true;
            for i in b.start - self.prompt..b.end - self.prompt {
                if !self.given[i] && self.sure[i] < self.settings.remask {
                    self.x[self.prompt + i] = self.model.mask;
                    self.ranks[i] = u32::MAX;
                    b.masks += 1;
                }
            }
            b.steps = 0;
        }
    }
}

/// The share of masks that leaves in step k of `steps`.
fn leaving(k: usize, steps: usize) -> f64 {
    let time = |k: usize| 1.0 + (LAST_TIME - 1.0) * k as f64 / steps as f64;
    1.0 - time(k + 1) / time(k)
}
