//! [`StepDecoder`]: steps of a draft, the target's own versions in parallel, a judge between them.

use std::sync::Arc;
use std::time::Instant;

use super::writer::Writer;
use super::{Case, End, Ends, Judge, Preference, Preferences};
use crate::backend::{Backend, Buffer, Mask, NO_TOKEN};
use crate::decode::{DecodeStats, Decoder, Sampler, Session, Together};
use crate::error::{Result, bail, ensure};
use crate::model::Model;

/// How far steps go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSettings {
    /// Steps that the draft writes ahead of the text.
    pub ahead: usize,
    /// Most tokens of a step, the draft's and the target's.
    pub max_tokens: usize,
}

impl Default for StepSettings {
    fn default() -> Self {
        Self { ahead: 4, max_tokens: 100 }
    }
}

/// What became of steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCounts {
    /// Written by the draft.
    pub written: u64,
    /// Compared with the target's own: those behind a rejected one never are.
    pub judged: u64,
    /// Of these, accepted.
    pub accepted: u64,
}

/// Extends a session by steps. In each round the draft writes up to `ahead` steps; the target reads them in one go and writes its own
/// version of each behind the same text, and one step more, all of them in the same passes. The draft's steps stand up to the first that
/// the judge rejects, and there the target's version is taken.
///
/// **Not lossless**, but for [`Exact::tokens`](super::Exact::tokens): accepted steps are the draft's words. With that judge the text is what
/// [`Autoregressive`](crate::decode::Autoregressive) says, sampled or greedy.
///
/// The session needs the judge's taps ([`StepDecoder::taps`]). Rejected steps are kept as [`Preferences`].
pub struct StepDecoder<B: Backend> {
    settings: StepSettings,
    sampler: Sampler,
    ends: Box<Ends>,
    judge: Box<dyn Judge<B>>,
    writer: Writer<B>,
    versions: Option<Versions<B>>,
    preferences: Preferences,
    counts: StepCounts,
    stats: DecodeStats,
}

/// The target's own steps in the making.
struct Versions<B: Backend> {
    together: Together<B>,
    sessions: Vec<Session<B>>,
    drawn: B::Buf<u32>,
}

/// One of them: where it begins in its session's text, and whether it is whole.
#[derive(Clone, Copy)]
struct Version {
    start: usize,
    whole: bool,
}

impl<B: Backend> StepDecoder<B> {
    /// `draft`, whose tokens are the target's, writes ahead; both draw by `sampler`; `ends` says where steps end.
    ///
    /// # Errors
    /// `Usage`: settings of no step or no token.
    pub fn new(
        draft: Arc<Model<B>>,
        judge: Box<dyn Judge<B>>,
        sampler: Sampler,
        settings: StepSettings,
        ends: impl Fn(&[u32]) -> End + Send + Sync + 'static,
    ) -> Result<Self> {
        ensure!(settings.ahead > 0 && settings.max_tokens > 0, Usage, "{settings:?}: there is no step to write");
        Ok(Self {
            settings,
            sampler,
            ends: Box::new(ends),
            judge,
            writer: Writer::new(draft),
            versions: None,
            preferences: Preferences::default(),
            counts: StepCounts::default(),
            stats: DecodeStats::default(),
        })
    }

    /// Layers whose inputs the session must keep.
    pub fn taps(&self) -> &[usize] {
        self.judge.taps()
    }

    /// Another draft from the next step on: one that has learnt.
    pub fn set_draft(&mut self, draft: Arc<Model<B>>) {
        self.writer = Writer::new(draft);
    }

    /// What became of steps so far.
    pub fn counts(&self) -> StepCounts {
        self.counts
    }

    /// Rejected steps beside the target's own, for [`learn_preferences`](super::learn_preferences).
    pub fn preferences(&mut self) -> &mut Preferences {
        &mut self.preferences
    }

    fn round(&mut self, s: &mut Session<B>) -> Result<usize> {
        let (clock, len) = (Instant::now(), s.tokens().len());
        let StepSettings { ahead, max_tokens } = self.settings;
        let steps = self.writer.write(s, ahead, max_tokens, &*self.ends, &self.sampler)?;
        let drafted = Instant::now();
        // The target reads all steps; every version begins behind a part of this.
        let mut starts = vec![len];
        for (step, _) in &steps {
            s.push(step);
            starts.push(s.tokens().len());
        }
        self.stats.forwards += s.advance()?;
        if steps.last().is_some_and(|(_, end)| *end == End::Text) {
            starts.pop(); // Nothing comes behind the end.
        }
        let mut made: Vec<Version> = starts.iter().map(|&start| Version { start, whole: false }).collect();
        let mut room = match self.versions.take().filter(|v| v.serves(s, starts.len())) {
            Some(room) => room,
            None => Versions::new(s, ahead + 1, self.judge.taps())?,
        };
        for (v, &start) in room.sessions.iter_mut().zip(&starts) {
            v.follow(s, start)?;
        }
        let (mut accepted, mut own) = (0, None);
        while accepted < made.len() && own.is_none() {
            let now = made[accepted];
            if !now.whole {
                room.pass(&mut made[accepted..], accepted, &self.sampler, &*self.ends, max_tokens)?;
                self.stats.forwards += 1;
                continue;
            }
            let Some((step, _)) = steps.get(accepted) else {
                own = Some(room.sessions[accepted].tokens()[now.start..].to_vec());
                break;
            };
            if self.accepts(s, &mut room.sessions[accepted], step, now.start)? {
                accepted += 1;
            } else {
                own = Some(room.sessions[accepted].tokens()[now.start..].to_vec());
            }
        }
        let end = starts.get(accepted).copied().unwrap_or(s.tokens().len());
        s.truncate(end);
        if let Some(own) = own {
            if let Some((step, _)) = steps.get(accepted) {
                let prompt = s.tokens().to_vec();
                self.preferences.push(Preference { prompt, chosen: own.clone(), rejected: step.clone() });
            }
            s.push(&own);
        }
        self.versions = Some(room);
        self.counts.written += steps.len() as u64;
        self.counts.accepted += accepted as u64;
        self.counts.judged += (accepted + 1).min(steps.len()) as u64;
        let new = s.tokens().len() - len;
        self.stats.tokens += new as u64;
        self.stats.verifications += 1;
        self.stats.verified += new as u64;
        self.stats.drafted += steps.iter().map(|(step, _)| step.len() as u64).sum::<u64>();
        self.stats.draft_s += (drafted - clock).as_secs_f64();
        self.stats.verify_s += drafted.elapsed().as_secs_f64();
        Ok(new)
    }

    /// Whether the draft's `step`, which `s` holds at `start`, may stand for the one that `version` holds there.
    fn accepts(&mut self, s: &Session<B>, version: &mut Session<B>, step: &[u32], start: usize) -> Result<bool> {
        if version.tokens()[start..] == *step {
            return Ok(true);
        }
        if !self.judge.taps().is_empty() {
            self.stats.forwards += version.advance()?;
        }
        let (prefix, own) = version.tokens().split_at(start);
        self.judge.accepts(&Case { prefix, draft: step, own, sessions: [s, version] })
    }
}

impl<B: Backend> Versions<B> {
    fn new(s: &Session<B>, sessions: usize, taps: &[usize]) -> Result<Self> {
        let same = s.workspace().taps().eq(taps.iter().copied());
        ensure!(same, Usage, "the judge reads layers {taps:?}: the session must be made with these taps");
        let (model, seed) = (s.model(), s.key(0).seed);
        let own = || Session::with_taps(model.clone(), s.capacity(), seed, taps);
        Ok(Self {
            together: Together::new(model.clone(), sessions, taps)?,
            sessions: (0..sessions).map(|_| own()).collect::<Result<_>>()?,
            drawn: model.backend().alloc(sessions)?,
        })
    }

    fn serves(&self, s: &Session<B>, sessions: usize) -> bool {
        let same = |v: &Session<B>| {
            let taps = v.workspace().taps().eq(s.workspace().taps());
            Arc::ptr_eq(v.model(), s.model()) && v.capacity() == s.capacity() && taps
        };
        self.sessions.len() >= sessions && self.sessions.first().is_some_and(same)
    }

    /// The next token of each of the versions `made`, the first of which is number `first`, that is not whole.
    fn pass(&mut self, made: &mut [Version], first: usize, sampler: &Sampler, ends: &Ends, most: usize) -> Result<()> {
        let (mut open, mut active) = (Vec::new(), Vec::new());
        for (v, session) in made.iter_mut().zip(&mut self.sessions[first..]).filter(|(v, _)| !v.whole) {
            open.push(v);
            active.push(session);
        }
        let last: Vec<[u32; 1]> = active.iter().map(|s| [s.tokens()[s.tokens().len() - 1]]).collect();
        let trees: Vec<(&[u32], Mask<'_>)> = last.iter().map(|t| (&t[..], Mask::Causal)).collect();
        let n = self.together.stage(&mut active, &trees)?;
        let (mut draws, mut penalties) = (Vec::with_capacity(n), Vec::new());
        for (row, s) in active.iter().enumerate() {
            draws.push(sampler.draw(s.key(s.tokens().len() as u64)));
            penalties.extend(sampler.penalties(row as u32, s.tokens().iter().rev().copied()));
        }
        if !penalties.is_empty() {
            self.together.penalize(n, &penalties)?;
        }
        let model = active[0].model().clone();
        let (be, mut tokens) = (model.backend(), vec![0; n]);
        be.sample(self.drawn.head_mut(n), self.together.workspace().logit_rows(n), &draws)?;
        be.download(self.drawn.head(n), &mut tokens)?;
        if tokens.contains(&NO_TOKEN) {
            bail!(Diverged, "the logits are not finite: the weights are damaged, or the computation overflowed");
        }
        self.together.commit(&mut active, &vec![&[0][..]; n])?;
        for ((v, s), token) in open.into_iter().zip(active).zip(tokens) {
            s.push(&[token]);
            let step = &s.tokens()[v.start..];
            v.whole = ends(step) != End::Open || step.len() >= most || s.tokens().len() >= s.capacity();
        }
        Ok(())
    }
}

impl<B: Backend> Decoder<B> for StepDecoder<B> {
    /// One round: at least one step.
    fn step(&mut self, session: &mut Session<B>) -> Result<usize> {
        let len = session.tokens().len();
        let made = self.round(session);
        if made.is_err() {
            session.truncate(len);
        }
        made
    }

    fn stats(&self) -> DecodeStats {
        self.stats
    }
}
