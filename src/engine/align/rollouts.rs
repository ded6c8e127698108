//! Rollouts: several answers to each of many prompts, many at a time, with what a reward sees of them.

use std::sync::Arc;

use crate::backend::{Mask, Train};
use crate::decode::{DecodeStats, Decoder, Session};
use crate::engine::erased::{Decode, speculative};
use crate::engine::{Adapters, Finish, Generate};
use crate::error::{Result, bail, ensure};
use crate::model::{Model, Want};
use crate::rlhf::{FeatureSpec, Pooler, Tokens, feature};
use crate::speculative::{Speculative, SpeculativeBatch};

/// What is to be answered, and how.
pub(crate) struct Rollouts<'a> {
    /// Token ids.
    pub prompts: &'a [Vec<u32>],
    /// Numbers of the prompts, of which the random numbers are made; as many.
    pub numbers: &'a [u64],
    /// Answers to each.
    pub each: usize,
    /// Number of the first of these among all answers to a prompt.
    pub from: usize,
    pub how: &'a Generate,
    /// Tokens that end an answer.
    pub eos: &'a [u32],
    /// The one that a cut answer is closed with.
    pub end: Option<u32>,
    pub seed: u64,
    /// Answers in the making at a time.
    pub width: usize,
    /// Features are a by-product where the draft, if there is one, reads no layers.
    pub spec: Option<FeatureSpec>,
}

/// One answer.
#[derive(Clone, Debug)]
pub(crate) struct Rolled {
    pub tokens: Tokens,
    pub finish: Finish,
    pub feature: Option<Vec<f32>>,
}

/// Hears of an answer by the indices of prompt and answer.
pub(crate) type Done<'a> = &'a mut dyn FnMut(usize, usize, Rolled) -> Result<()>;

/// The random numbers of an answer: those of plain decoding for the first answer to prompt 0.
pub(crate) fn stream(prompt: u64, answer: usize) -> u64 {
    prompt << 20 | answer as u64
}

struct Slot<B: Train> {
    session: Session<B>,
    decoder: Speculative<B>,
    prompt: usize,
    answer: usize,
}

impl Rollouts<'_> {
    /// All answers, each as it would be written alone. A prompt is read once: its answers begin with copies of its cache.
    pub fn run<B: Train>(&self, model: &Arc<Model<B>>, done: Done<'_>) -> Result<DecodeStats> {
        let (cfg, n, new) = (model.config(), self.each * self.prompts.len(), self.how.max_tokens);
        ensure!(self.width > 0 && new > 0, Usage, "rollouts of no answers, or of no tokens");
        let longest = self.prompts.iter().map(Vec::len).max().unwrap_or(0);
        ensure!(self.prompts.iter().all(|p| !p.is_empty()), Usage, "a prompt is empty: there is nothing to answer");
        // One more for the end of an answer that was cut.
        let capacity = longest + new + 1;
        ensure!(
            capacity <= cfg.context,
            Capacity,
            "a prompt of {longest} tokens and {new} new ones exceed the model's context of {}",
            cfg.context
        );
        let mut stats = DecodeStats::default();
        if n == 0 {
            return Ok(stats);
        }
        let taps = match (&self.how.decode, self.spec) {
            (Decode::Speculative(_, draft, _), _) if !draft.taps().is_empty() => draft.taps().to_vec(),
            (_, Some(spec)) => vec![spec.tap(cfg.layers)],
            (_, None) => Vec::new(),
        };
        let mut pooler = match self.spec {
            Some(spec) if taps == [spec.tap(cfg.layers)] => Some(Pooler::new(model.clone(), spec, capacity)?),
            _ => None,
        };
        let width = self.width.min(n);
        let rows = match &self.how.decode {
            Decode::Autoregressive(_) => width,
            Decode::Speculative(..) => width.max(128),
            Decode::Steps(..) => bail!(Unsupported, "drafts by steps decode one text at a time"),
        };
        let mut batch = SpeculativeBatch::new(model.clone(), width, rows, &taps)?;
        let mut root = Session::with_taps(model.clone(), capacity, self.seed, &taps)?;
        root.set_adapters(self.how.adapters.as_ref().map(Adapters::map).transpose()?);
        // The prompt that the root holds, and the next answer.
        let (mut held, mut next) = (usize::MAX, 0);
        let mut slots: Vec<Slot<B>> = Vec::with_capacity(width);
        let mut free: Vec<Session<B>> = Vec::new();
        loop {
            while slots.len() < width && next < n {
                let (prompt, answer) = (next / self.each, self.from + next % self.each);
                let ids = &self.prompts[prompt];
                if held != prompt {
                    let same = root.tokens().iter().zip(ids).take_while(|(a, b)| a == b).count();
                    root.truncate(same);
                    root.push(&ids[same..]);
                    stats.forwards += root.advance()?;
                    held = prompt;
                }
                let made =
                    free.pop().map_or_else(|| Session::of_rows(model.clone(), capacity, self.seed, &taps, 1), Ok);
                let mut session = made?;
                session.follow(&root, ids.len())?;
                session.stream = stream(self.numbers[prompt], answer);
                let decoder = match &self.how.decode {
                    Decode::Speculative(sampler, draft, how) => speculative(&session, *sampler, draft, *how)?,
                    Decode::Autoregressive(sampler) => Speculative::plain(*sampler),
                    Decode::Steps(..) => bail!(Unsupported, "drafts by steps decode one text at a time"),
                };
                slots.push(Slot { session, decoder, prompt, answer });
                next += 1;
            }
            if slots.is_empty() {
                return Ok(stats);
            }
            let mut all: Vec<_> = slots.iter_mut().map(|s| (&mut s.session, &mut s.decoder)).collect();
            let given = batch.step(&mut all)?;
            stats.forwards += 1;
            let mut i = 0;
            for n in given {
                let ids = &self.prompts[slots[i].prompt];
                let Some((tokens, finish)) = self.ended(&slots[i].session.tokens()[ids.len()..], n) else {
                    i += 1;
                    continue;
                };
                let Slot { mut session, mut decoder, prompt, answer } = slots.remove(i);
                let at = ids.len();
                decoder.finish(&session);
                if let (Some(plan), Decode::Speculative(_, draft, _)) = (decoder.plan(), &self.how.decode) {
                    draft.learn(plan);
                }
                let of = decoder.stats();
                stats.tokens += (tokens.ids.len() + usize::from(finish == Finish::Eos)) as u64;
                (stats.drafted, stats.verifications) =
                    (stats.drafted + of.drafted, stats.verifications + of.verifications);
                (stats.verified, stats.update_s) = (stats.verified + of.verified, stats.update_s + of.update_s);
                let feature = match &mut pooler {
                    Some(pooler) if tokens.rows() > 0 => {
                        close(&mut session, at, &tokens)?;
                        Some(feature(pooler, &session, at, &tokens)?)
                    }
                    _ => None,
                };
                done(prompt, answer, Rolled { tokens, finish, feature })?;
                free.push(session);
            }
        }
    }

    /// The answer, if it has ended within its last `new` tokens.
    fn ended(&self, made: &[u32], new: usize) -> Option<(Tokens, Finish)> {
        let from = made.len() - new;
        let end = made[from..].iter().position(|t| self.eos.contains(t)).map(|i| from + i);
        let (ids, last, finish) = match end.filter(|&i| i < self.how.max_tokens) {
            Some(i) => (&made[..i], Some(made[i]), Finish::Eos),
            None if made.len() >= self.how.max_tokens => (&made[..self.how.max_tokens], self.end, Finish::Length),
            None => return None,
        };
        Some((Tokens { ids: ids.to_vec(), end: last }, finish))
    }
}

/// Commits what is not yet computed of an answer, its end with it.
fn close<B: Train>(session: &mut Session<B>, at: usize, answer: &Tokens) -> Result<()> {
    let all: Vec<u32> = answer.ids.iter().copied().chain(answer.end).collect();
    session.truncate(at + answer.ids.len());
    let computed = session.cache().len().saturating_sub(at);
    for &token in &all[computed..] {
        session.stage(&[token], Mask::Causal, Want::Nothing)?;
        session.commit(&[0])?;
    }
    Ok(())
}
