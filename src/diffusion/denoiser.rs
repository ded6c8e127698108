//! [`Denoise`]: what a pass of a model tells about masked positions; and a model that does.

use std::sync::Arc;

use super::pass::Pass;
use super::schedule::Schedule;
use super::settings::{Choose, Rank};
use crate::backend::{Backend, Buffer, Draw, Mask};
use crate::error::{Result, ensure};
use crate::model::{KvCache, Model, Sequence, Want, Workspace};
use crate::rng::Key;

/// Random numbers of a seed that draw tokens.
const DRAWS: u64 = 0x4452_4157 << 32;
/// Most rows of a pass over several texts.
const MOST_ROWS: usize = 2048;

/// What is predicted for one position, before any temperature and without MASK.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStat {
    /// The likeliest token, the lowest among equals; `NO_TOKEN` where the logits are not finite.
    pub argmax: u32,
    /// The token to take: the likeliest, or one drawn.
    pub token: u32,
    /// Largest logit.
    pub max: f32,
    /// ln sum e^z.
    pub lse: f32,
    /// Entropy, nats.
    pub entropy: f32,
    /// Second largest logit, where margins are looked at.
    pub second: f32,
}

impl RowStat {
    /// Probability of the likeliest token.
    pub fn confidence(&self) -> f32 {
        (self.max - self.lse).exp()
    }

    /// Probability of the second.
    pub fn second_probability(&self) -> f32 {
        (self.second - self.lse).exp()
    }
}

/// A pass that a text wants.
pub struct Job<'a> {
    /// Its place: whose cache.
    pub place: usize,
    /// The text; its tokens are those at the beginning of the pass.
    pub text: &'a Schedule,
    /// The pass.
    pub pass: &'a Pass,
}

/// Predicts masked positions.
pub trait Denoise {
    /// One pass for each job, in common where it can be: predictions for its wanted rows, in their order.
    fn run(&mut self, jobs: &[Job<'_>]) -> Result<Vec<Vec<RowStat>>>;
}

/// A model with a cache for each of several texts.
pub struct ModelDenoiser<B: Backend> {
    model: Arc<Model<B>>,
    caches: Vec<KvCache<B>>,
    ws: Workspace<B>,
    stats: B::Buf<B::Acc>,
    argmax: B::Buf<u32>,
    drawn: B::Buf<u32>,
    pairs: (B::Buf<B::Acc>, B::Buf<u32>),
}

/// What a job's sequence borrows while it runs.
struct Rows {
    tokens: Vec<u32>,
    positions: Vec<u32>,
}

impl Rows {
    fn of(job: &Job<'_>) -> Self {
        let positions: Vec<u32> = job.pass.spans.iter().flat_map(|s| s.start as u32..s.end as u32).collect();
        Self { tokens: positions.iter().map(|&p| job.text.tokens()[p as usize]).collect(), positions }
    }
}

impl<B: Backend> ModelDenoiser<B> {
    /// Room for `places` texts of up to `length` positions each.
    ///
    /// # Errors
    /// A model that is none of diffusion; no memory.
    pub fn new(model: Arc<Model<B>>, places: usize, length: usize) -> Result<Self> {
        Self::with_caches(model, places, length, length + 1)
    }

    /// [`ModelDenoiser::new`] with caches of `capacity` rows: the published decoder's may hold a block twice.
    ///
    /// # Errors
    /// The same.
    pub fn with_caches(model: Arc<Model<B>>, places: usize, length: usize, capacity: usize) -> Result<Self> {
        let (be, cfg) = (model.backend(), model.config());
        ensure!(cfg.diffusion.is_some(), Usage, "this model has no mask token: it is not a diffusion model");
        ensure!(places > 0 && length > 0, Capacity, "room for {places} texts of {length} positions");
        let rows = (places * length).min(MOST_ROWS.max(length + 1)).max(length + 1);
        let caches = (0..places).map(|_| KvCache::new(be, cfg, capacity)).collect::<Result<_>>()?;
        let ws = Workspace::new(be, cfg, rows, rows)?;
        Ok(Self {
            caches,
            stats: be.alloc(3 * rows)?,
            argmax: be.alloc(rows)?,
            drawn: be.alloc(rows)?,
            pairs: (be.alloc(2 * rows)?, be.alloc(2 * rows)?),
            ws,
            model,
        })
    }

    /// The prompt of a block-causal model sees itself alone: it is a pass of its own, whose cache is exact.
    fn prompt(&mut self, job: &Job<'_>) -> Result<()> {
        let cache = &mut self.caches[job.place];
        let p = job.text.prompt();
        cache.truncate(0);
        let keep = p - usize::from(job.text.model().shift && p > 0);
        let tokens = &job.text.tokens()[..p];
        self.model.forward(&mut [Sequence::new(cache, tokens, Mask::Full, Want::Nothing)], &mut self.ws)?;
        cache.commit_first(keep)
    }

    fn together(&mut self, jobs: &[Job<'_>], found: &mut Vec<Vec<RowStat>>) -> Result<()> {
        let mut rows: Vec<Rows> = jobs.iter().map(Rows::of).collect();
        // What this pass computed of a block-causal model's text before the rows of its last forward pass.
        let mut before = vec![0; jobs.len()];
        let mut wanted: Vec<Vec<u32>> = jobs.iter().map(|j| j.pass.wanted.clone()).collect();
        for (i, job) in jobs.iter().enumerate() {
            if job.text.model().block.is_some() && job.pass.past == 0 {
                self.prompt(job)?;
                before[i] = self.caches[job.place].len();
                rows[i].tokens.drain(..before[i]);
                rows[i].positions.drain(..before[i]);
                wanted[i].iter_mut().for_each(|r| *r -= before[i] as u32);
            } else {
                self.caches[job.place].truncate(job.pass.past);
            }
        }
        let mut sequences = Vec::with_capacity(jobs.len());
        let mut caches: Vec<Option<&mut KvCache<B>>> = self.caches.iter_mut().map(Some).collect();
        for ((job, rows), wanted) in jobs.iter().zip(&rows).zip(&wanted) {
            let cache = caches[job.place].take();
            let cache = cache.ok_or_else(|| crate::Error::new(crate::ErrorKind::Shape, "two passes of one text"))?;
            let mask = match job.text.model().block {
                Some(block) => {
                    // The row before a block is computed again with it, as the last of the block before.
                    let lead = job.text.model().shift && rows.positions[0] > 0;
                    Mask::Blocks { block, offset: if lead { block - 1 } else { 0 } }
                }
                None => Mask::Full,
            };
            let s = Sequence::new(cache, &rows.tokens, mask, Want::Rows(wanted));
            sequences.push(s.at(&rows.positions));
        }
        let n = self.model.forward(&mut sequences, &mut self.ws)?;
        drop(sequences);
        self.read(jobs, n, found)?;
        for (job, before) in jobs.iter().zip(before) {
            let (cache, keep) = (&mut self.caches[job.place], job.pass.keep);
            match keep.checked_sub(before) {
                Some(more) => cache.commit_first(more)?,
                None => cache.truncate(keep),
            }
        }
        Ok(())
    }

    /// Statistics of the `n` rows of logits of `jobs`.
    fn read(&mut self, jobs: &[Job<'_>], n: usize, found: &mut Vec<Vec<RowStat>>) -> Result<()> {
        let (be, vocab) = (self.model.backend(), self.model.config().vocab);
        let settings = *jobs[0].text.settings();
        if n == 0 {
            found.extend(jobs.iter().map(|_| Vec::new()));
            return Ok(());
        }
        if !settings.authors {
            be.forbid(self.ws.logit_rows_mut(n), vocab, &[jobs[0].text.model().mask])?;
        }
        let logits = self.ws.logit_rows(n);
        be.logits_stats(self.stats.head_mut(3 * n), self.argmax.head_mut(n), logits, vocab)?;
        let (mut stats, mut argmax) = (vec![0.0; 3 * n], vec![0; n]);
        be.download_acc(self.stats.head(3 * n), &mut stats)?;
        be.download(self.argmax.head(n), &mut argmax)?;
        let margin = matches!(
            settings.choose,
            Choose::Quota { by: Rank::Margin, .. } | Choose::Timetable { by: Rank::Margin, .. }
        );
        let mut best = vec![0.0; 2 * n];
        if margin {
            let (values, ids) = &mut self.pairs;
            be.top_k(values.head_mut(2 * n), ids.head_mut(2 * n), logits, vocab, 2)?;
            be.download_acc(values.head(2 * n), &mut best)?;
        }
        let mut tokens = argmax.clone();
        if settings.temperature > 0.0 {
            let draws: Vec<Draw> = jobs.iter().flat_map(draws).collect();
            be.sample(self.drawn.head_mut(n), logits, &draws)?;
            be.download(self.drawn.head(n), &mut tokens)?;
        }
        let mut all = (0..n).map(|i| RowStat {
            argmax: argmax[i],
            token: tokens[i],
            max: stats[3 * i],
            lse: stats[3 * i + 1],
            entropy: stats[3 * i + 2],
            second: best[2 * i + 1],
        });
        found.extend(jobs.iter().map(|j| all.by_ref().take(j.pass.wanted.len()).collect()));
        Ok(())
    }
}

/// A random number for each wanted row, by text, pass and position: the same whatever is cached.
fn draws<'j>(job: &'j Job<'_>) -> impl Iterator<Item = Draw> + 'j {
    let s = *job.text.settings();
    let key = Key { seed: s.seed, stream: DRAWS, counter: job.pass.number << 32 };
    job.pass.wanted.iter().map(move |&row| Draw {
        temperature: s.temperature,
        top_p: s.top_p,
        key: key.at(job.pass.position(row) as u64),
        ..Draw::GREEDY
    })
}

impl<B: Backend> Denoise for ModelDenoiser<B> {
    fn run(&mut self, jobs: &[Job<'_>]) -> Result<Vec<Vec<RowStat>>> {
        let (mut found, mut first) = (Vec::with_capacity(jobs.len()), 0);
        while first < jobs.len() {
            let (mut end, mut rows) = (first, 0);
            let kind = |j: &Job<'_>| {
                let s = j.text.settings();
                (s.authors, s.temperature > 0.0)
            };
            while end < jobs.len()
                && (end == first || rows + jobs[end].pass.rows() <= self.ws.max_rows())
                && kind(&jobs[end]) == kind(&jobs[first])
            {
                rows += jobs[end].pass.rows();
                end += 1;
            }
            self.together(&jobs[first..end], &mut found)?;
            first = end;
        }
        Ok(found)
    }
}
