//! [`Staleness`]: how far predictions behind a cache are from those of a full pass over the same text.

use super::denoiser::{Denoise, Job, RowStat};
use super::pass::Pass;
use crate::error::Result;

/// What one pass behind a cache was worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stale {
    /// Passes since everything was computed last.
    pub age: u64,
    /// Candidates.
    pub candidates: usize,
    /// Those whose likeliest token a full pass would not have said.
    pub differ: usize,
    /// The largest difference of an entropy, nats.
    pub entropy: f32,
}

/// Runs every pass as it is, and again in full at a place of its own, and compares. The text is made by the former.
pub struct Staleness<D> {
    inner: D,
    fresh: D,
    ages: Vec<u64>,
    /// Of every pass that saw a cache, in their order.
    pub passes: Vec<Stale>,
}

impl<D: Denoise> Staleness<D> {
    /// `fresh` has as many places as `inner`.
    pub fn new(inner: D, fresh: D) -> Self {
        Self { inner, fresh, ages: Vec::new(), passes: Vec::new() }
    }

    /// Means by age: the age, candidates, the share that differs, the largest difference of an entropy.
    pub fn by_age(&self) -> Vec<(u64, usize, f64, f32)> {
        let mut out: Vec<(u64, usize, f64, f32)> = Vec::new();
        for s in &self.passes {
            let i = out.iter().position(|o| o.0 == s.age).unwrap_or_else(|| {
                out.push((s.age, 0, 0.0, 0.0));
                out.len() - 1
            });
            out[i].1 += s.candidates;
            out[i].2 += s.differ as f64;
            out[i].3 = out[i].3.max(s.entropy);
        }
        out.iter_mut().for_each(|o| o.2 /= o.1.max(1) as f64);
        out.sort_by_key(|o| o.0);
        out
    }
}

impl<D: Denoise> Denoise for Staleness<D> {
    fn run(&mut self, jobs: &[Job<'_>]) -> Result<Vec<Vec<RowStat>>> {
        let found = self.inner.run(jobs)?;
        for (job, found) in jobs.iter().zip(&found) {
            if self.ages.len() <= job.place {
                self.ages.resize(job.place + 1, 0);
            }
            let age = &mut self.ages[job.place];
            if job.pass.past == 0 {
                *age = 0;
                continue;
            }
            *age += 1;
            // The same rows of a pass over all positions, so far as the pass reached.
            let end = job.pass.spans.iter().map(|s| s.end).max().unwrap_or(0);
            let wanted = job.pass.wanted.iter().map(|&r| job.pass.position(r) as u32).collect();
            let pass = Pass { wanted, number: job.pass.number, ..Pass::over(0, 0..end) };
            let full = self.fresh.run(&[Job { place: job.place, text: job.text, pass: &pass }])?.swap_remove(0);
            let pairs = || found.iter().zip(&full);
            self.passes.push(Stale {
                age: *age,
                candidates: found.len(),
                differ: pairs().filter(|(a, b)| a.argmax != b.argmax).count(),
                entropy: pairs().map(|(a, b)| (a.entropy - b.entropy).abs()).fold(0.0, f32::max),
            });
        }
        Ok(found)
    }
}
