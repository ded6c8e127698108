//! [`Learner`]: from feedback to new versions of a draft.

use std::sync::Arc;
use std::time::Instant;

use super::feedback::Feedback;
use super::guard::{Guard, Sign};
use super::live::Slot;
use super::settings::{Deploy, LOSS, Learning};
use super::spending::Spending;
use super::state::hash;
use crate::backend::{Backend, Buffer, Train};
use crate::error::{ErrorKind, Result};
use crate::model::Model;
use crate::online::{HintGauge, Meta};
use crate::speculative::heads::Make;
use crate::speculative::train::{Measured, Sequence, Trainable};
use crate::train::Optimizer;
use crate::train::checkpoint::NamedTensor;
use crate::train::optim::Kind;

/// Makes drafts of the weighted sum of what these tensors, by their published names, make: of one alone where [`Trainable::is_linear`].
pub type Publisher<B> = Box<dyn Fn(&[(f32, Vec<NamedTensor>)]) -> Result<Make<B>> + Send>;

/// Updates between two comparisons with the weights that learning began with.
const COMPARE: u64 = 4;
/// Tokens of a chain by which a version must be worse than the one before, on the same rows, to be taken back.
const WORSE: f64 = 0.02;

/// Values of all tensors that train.
type Weights<B> = Vec<<B as Backend>::Buf<<B as Backend>::Acc>>;

/// One of several learners: weights of its own, with an optimiser of its own.
pub(super) struct Expert<B: Train> {
    pub weights: Weights<B>,
    pub optimizer: Optimizer<B>,
}

/// The last gradient, which is the next hint, and how such hints have done.
struct Hints<B: Train> {
    last: Weights<B>,
    /// Whether there is one: the first hint is 0 by definition, not a guess.
    known: bool,
    gauge: HintGauge,
}

impl<B: Train> Hints<B> {
    const KEEP: f64 = 0.9;

    /// Begins anew: what was is no hint for other weights.
    fn forget(&mut self) {
        (self.known, self.gauge) = (false, HintGauge::new(Self::KEEP));
    }
}

/// What a learner has done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LearnStats {
    /// Updates.
    pub updates: u64,
    /// Rows learnt.
    pub rows: u64,
    /// Sum over these of their losses before they were learnt, nats: of the experts by their weights. The mean of an update counts as 8 at
    /// most.
    pub loss: f64,
    /// Versions taken back.
    pub rollbacks: u64,
    /// Updates without effect since something was not finite.
    pub refused: u64,
    /// Seconds, all told.
    pub seconds: f64,
    /// Weights of the experts.
    pub weights: Vec<f64>,
    /// By how much accepted runs are longer than at the beginning, as far as one knows.
    pub gain: f64,
}

/// Learns a draft's weights from what verification found, and publishes them (Qian et al. 2026, arXiv:2603.12617).
///
/// Outputs do not depend on it: the target decides which drafted tokens stand.
pub struct Learner<B: Train> {
    pub(super) target: Arc<Model<B>>,
    how: Learning,
    /// Has the weights that are at work; those of others are put in when these are.
    bench: Box<dyn Trainable<B>>,
    pub(super) experts: Vec<Expert<B>>,
    /// Those of the last version that proved no worse.
    good: Vec<Expert<B>>,
    pub(super) meta: Meta,
    good_meta: Meta,
    /// Mean of the experts' weights, where there are several.
    mean: Option<Weights<B>>,
    /// What it began with.
    base: Weights<B>,
    /// Its SHA-256.
    fingerprint: String,
    hints: Option<Hints<B>>,
    publisher: Publisher<B>,
    slot: Arc<Slot<B>>,
    /// The version before the newest.
    before: Arc<Make<B>>,
    feedback: Feedback,
    guard: Guard,
    spending: Option<Spending>,
    pub(super) stats: LearnStats,
}

impl<B: Train> Learner<B> {
    /// Of a draft with the weights of `bench`, which `slot` has a version of.
    ///
    /// # Errors
    /// Impossible settings; no memory.
    pub fn new(
        target: Arc<Model<B>>,
        bench: Box<dyn Trainable<B>>,
        publisher: Publisher<B>,
        slot: Arc<Slot<B>>,
        how: Learning,
    ) -> Result<Self> {
        how.validate()?;
        let be = target.backend();
        let copy = || -> Result<Weights<B>> {
            let of = |p: &&crate::model::Param<B>| {
                let mut w = be.alloc(p.len())?;
                be.copy(w.head_mut(p.len()), p.values())?;
                Ok(w)
            };
            bench.params().iter().map(of).collect()
        };
        let expert = |factor: &f32| -> Result<Expert<B>> {
            let mut settings = how.optimizer.clone();
            settings.lr *= factor;
            Ok(Expert { weights: copy()?, optimizer: Optimizer::new(be, settings, bench.params().into_iter())? })
        };
        let experts = || how.experts.iter().map(expert).collect::<Result<Vec<_>>>();
        let meta = Meta::new(how.meta, how.experts.len())?;
        let optimistic = matches!(how.optimizer.kind, Kind::Optimistic | Kind::OptimisticAdam);
        let hints = (how.check_hints && optimistic).then(|| -> Result<Hints<B>> {
            Ok(Hints { last: copy()?, known: false, gauge: HintGauge::new(Hints::<B>::KEEP) })
        });
        let stats = LearnStats { weights: meta.weights(), ..LearnStats::default() };
        let begun = bench.params().iter().map(|p| p.to_host(be)).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            fingerprint: hash(begun.iter().map(|v| &v[..])),
            experts: experts()?,
            good: experts()?,
            good_meta: meta.clone(),
            meta,
            mean: (how.experts.len() > 1 && bench.is_linear()).then(copy).transpose()?,
            base: copy()?,
            hints: hints.transpose()?,
            before: slot.newest().1,
            feedback: Feedback::new(how.remembered[0], how.remembered[1], how.seed),
            guard: Guard::new(how.guard),
            spending: how.spending.map(Spending::new),
            stats,
            publisher,
            slot,
            bench,
            target,
            how,
        })
    }

    pub(super) fn bench(&self) -> &dyn Trainable<B> {
        &*self.bench
    }

    pub(super) fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The last version that proved no worse.
    pub(super) fn good(&self) -> (&[Expert<B>], &Meta) {
        (&self.good, &self.good_meta)
    }

    /// Sequences that wait to be learnt.
    pub(super) fn fresh(&self) -> impl Iterator<Item = &Sequence> {
        self.feedback.fresh()
    }

    /// Puts what was saved in place of what is there: of each expert all tensors and states by name.
    pub(super) fn set(
        &mut self,
        experts: &[Vec<(String, Vec<f32>)>],
        steps: &[u64],
        rates: &[f32],
        meta: Meta,
        fresh: Vec<Sequence>,
    ) -> Result<()> {
        let be = self.target.backend();
        for (((e, values), &steps), &rate) in self.experts.iter_mut().zip(experts).zip(steps).zip(rates) {
            let find = |name: &str, _: usize| -> Result<&[f32]> {
                let found = values.iter().find(|v| v.0 == name).map(|v| &v.1[..]);
                found.ok_or_else(|| crate::Error::new(ErrorKind::Weights, format!("no tensor {name}")))
            };
            for (p, w) in self.bench.params().iter().zip(&mut e.weights) {
                be.upload_acc(w.head_mut(p.len()), find(&p.name, p.len())?)?;
            }
            e.optimizer.restore(be, self.bench.params().into_iter(), steps, find)?;
            e.optimizer.scale_rate(rate / e.optimizer.settings().lr);
        }
        self.meta = meta;
        self.stats.weights = self.meta.weights();
        self.keep()?;
        self.merge()?;
        self.publish()?;
        self.guard.settle();
        self.hints.iter_mut().for_each(Hints::forget);
        self.feedback.skip();
        fresh.into_iter().for_each(|s| self.feedback.push(s));
        Ok(())
    }

    /// Its settings.
    pub fn settings(&self) -> &Learning {
        &self.how
    }

    /// What it has done.
    pub fn stats(&self) -> &LearnStats {
        &self.stats
    }

    /// Whether a new version is watched, which needs all rows.
    pub(super) fn watches(&self) -> bool {
        self.guard.watches()
    }

    /// Whether it has time to spend.
    pub(super) fn allows(&self) -> bool {
        self.spending.as_ref().is_none_or(Spending::allows)
    }

    /// Reading rows for it took so long.
    pub(super) fn paid(&mut self, seconds: f64) {
        self.stats.seconds += seconds;
        self.spending.iter_mut().for_each(|s| s.spent(seconds));
    }

    /// Hears that a pass kept `kept` tokens in `seconds`. Returns whether it wants all rows now, for [`Learner::settle`].
    pub(super) fn heard(&mut self, kept: usize, drafted: bool, seconds: f64) -> bool {
        if let Some(s) = &mut self.spending {
            s.served(seconds);
        }
        match self.guard.heard(kept, drafted) {
            Sign::None => false,
            Sign::Passed => {
                if let Err(e) = self.keep() {
                    tracing::warn!("a version of the draft could not be kept: {e}");
                }
                false
            }
            Sign::Alarm => true,
        }
    }

    /// New rows.
    pub(super) fn push(&mut self, sequence: Sequence) {
        self.feedback.push(sequence);
    }

    /// Whether an update is due.
    pub(super) fn is_due(&self, pending: usize) -> bool {
        let rows = self.feedback.fresh_rows() + pending;
        rows >= self.how.rows && !self.watches() && self.allows()
    }

    fn counted<T>(&mut self, what: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let done = what(self);
        self.paid(start.elapsed().as_secs_f64());
        if let Some(s) = &self.spending {
            self.stats.gain = s.gain();
        }
        done
    }

    /// One update from all rows that are new, published at once.
    ///
    /// # Errors
    /// The device's. What is not finite changes nothing and is no error.
    pub fn update(&mut self) -> Result<()> {
        self.counted(Self::learn)
    }

    fn learn(&mut self) -> Result<()> {
        let replay = (self.how.replay * self.feedback.fresh_rows() as f32) as usize;
        let (fresh, old) = self.feedback.take(replay);
        let fresh: Vec<&Sequence> = fresh.iter().map(|s| &**s).collect();
        let old: Vec<&Sequence> = old.iter().map(|s| &**s).collect();
        let (mut losses, mut best, mut moved) = (Vec::new(), Measured::default(), false);
        let start = Instant::now();
        for i in 0..self.experts.len() {
            exchange(&mut *self.bench, &mut self.experts[i].weights);
            let found = self.step(i, &fresh, &old);
            exchange(&mut *self.bench, &mut self.experts[i].weights);
            let (found, stepped) = found?;
            moved |= stepped;
            losses.push(if found.loss.is_finite() { (found.loss / LOSS).min(1.0) } else { 1.0 });
            if i == 0 || found.loss < best.loss {
                best = found;
            }
        }
        if best.rows == 0 {
            return Ok(());
        }
        let mean: f64 = self.meta.weights().iter().zip(&losses).map(|(p, l)| p * l * LOSS).sum();
        self.stats.loss += mean * best.rows as f64;
        self.stats.rows += best.rows as u64;
        self.stats.updates += 1;
        if !moved {
            self.stats.refused += 1;
            return Ok(());
        }
        self.meta.observe(&losses)?;
        let learnt = start.elapsed();
        self.stats.weights = self.meta.weights();
        if let Some(s) = &mut self.spending {
            s.observe_loss(mean);
            if self.stats.updates % COMPARE == 2 {
                let begun = measure(&mut *self.bench, &mut self.base, &fresh)?;
                s.observe_gain(best.rows as f64, best.length() / begun.length() - 1.0);
            }
        }
        let compared = start.elapsed();
        self.merge()?;
        self.publish()?;
        tracing::debug!(
            "update {}: {} rows and {} old texts, loss {mean:.3}; learning {:.0} ms, comparing {:.0} ms, publishing {:.0} ms",
            self.stats.updates,
            best.rows,
            old.len(),
            1e3 * learnt.as_secs_f64(),
            1e3 * (compared - learnt).as_secs_f64(),
            1e3 * (start.elapsed() - compared).as_secs_f64(),
        );
        Ok(())
    }

    /// One step of expert `i`, whose weights are in; its losses before, and whether it moved.
    fn step(&mut self, i: usize, fresh: &[&Sequence], old: &[&Sequence]) -> Result<(Measured, bool)> {
        let (be, bench) = (self.target.backend(), &mut self.bench);
        bench.refresh()?;
        let found = bench.pass(fresh, true)?;
        if found.rows == 0 {
            return Ok((found, false));
        }
        if !old.is_empty() {
            bench.pass(old, true)?;
        }
        if let (0, Some(Hints { last, known, gauge })) = (i, &mut self.hints) {
            let params = bench.params();
            let pairs = || params.iter().filter_map(|p| Some((p.g.as_ref()?, p.len())));
            let norm = be.sq_norm(&pairs().map(|(g, n)| g.head(n)).collect::<Vec<_>>())?;
            // What is not finite moves nothing, and is no hint.
            if norm.is_finite() {
                let mut off = 0.0;
                for ((g, n), h) in pairs().zip(last) {
                    be.axpy(h.head_mut(n), -1.0, g.head(n))?;
                    off += be.sq_norm(&[h.head(n)])?;
                    be.copy(h.head_mut(n), g.head(n))?;
                }
                if std::mem::replace(known, true) {
                    // Their norms are all that it needs.
                    gauge.observe(&[norm.sqrt() + off.sqrt()], &[norm.sqrt()]);
                }
            }
        }
        let hints = self.hints.as_ref().is_none_or(|h| h.gauge.trusted());
        let optimizer = &mut self.experts[i].optimizer;
        match optimizer.step(be, bench.params_mut().into_iter()) {
            Ok(_) if hints => Ok((found, true)),
            Ok(_) => optimizer.forget_hint(be, bench.params_mut().into_iter()).map(|()| (found, true)),
            Err(e) if e.kind() == ErrorKind::Diverged => Ok((found, false)),
            Err(e) => Err(e),
        }
    }

    /// The experts' mean.
    fn merge(&mut self) -> Result<()> {
        let Some(mean) = &mut self.mean else { return Ok(()) };
        let be = self.target.backend();
        let weights = shares(&self.meta, self.how.deploy);
        for (i, to) in mean.iter_mut().enumerate() {
            let n = to.len();
            be.zero(to.head_mut(n))?;
            for (e, p) in self.experts.iter().zip(&weights) {
                be.axpy(to.head_mut(n), *p as f32, e.weights[i].head(n))?;
            }
        }
        Ok(())
    }

    /// All tensors of what drafts, and their shares.
    fn tensors(&mut self) -> Result<Vec<(f32, Vec<NamedTensor>)>> {
        let (bench, shares) = (&mut *self.bench, shares(&self.meta, self.how.deploy));
        let (parts, shares): (Vec<&mut Weights<B>>, _) = match &mut self.mean {
            Some(mean) => (vec![mean], vec![1.0]),
            None => (self.experts.iter_mut().map(|e| &mut e.weights).collect(), shares),
        };
        let mut of = |(weights, share): (&mut Weights<B>, f64)| {
            exchange(bench, weights);
            let tensors = bench.to_host();
            exchange(bench, weights);
            tensors.map(|t| (share as f32, t))
        };
        parts.into_iter().zip(shares).filter(|(_, share)| *share > 0.0).map(&mut of).collect()
    }

    pub(super) fn publish(&mut self) -> Result<()> {
        let tensors = self.tensors()?;
        let make = (self.publisher)(&tensors)?;
        // One that is being watched has not proved anything yet.
        if !self.guard.watches() {
            self.before = self.slot.newest().1;
        }
        self.slot.publish(Arc::new(make));
        self.guard.begin();
        Ok(())
    }

    /// What is played now has proved no worse.
    pub(super) fn keep(&mut self) -> Result<()> {
        let be = self.target.backend();
        copy(be, &mut self.good, &self.experts)?;
        self.good_meta = self.meta.clone();
        Ok(())
    }

    /// Compares the version that is watched with the one before on all rows since, and takes it back where it is worse: weights, optimisers'
    /// states, experts' weights; learning rates are halved.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.counted(|l| {
            l.guard.settle();
            let (fresh, _) = l.feedback.take(0);
            let fresh: Vec<&Sequence> = fresh.iter().map(|s| &**s).collect();
            let worse = fresh.is_empty() || {
                let now = {
                    let played = l.mean.as_mut().unwrap_or(&mut l.experts[0].weights);
                    measure(&mut *l.bench, played, &fresh)?
                };
                // The last good experts' mean is not at hand; the best of them is.
                let best = l.good_meta.best();
                let then = measure(&mut *l.bench, &mut l.good[best].weights, &fresh)?;
                now.length().is_nan() || now.length() < then.length() - WORSE
            };
            if !worse {
                return l.keep();
            }
            let be = l.target.backend();
            copy(be, &mut l.experts, &l.good)?;
            l.meta = l.good_meta.clone();
            for e in &mut l.experts {
                exchange(&mut *l.bench, &mut e.weights);
                let forgot = e.optimizer.forget_hint(be, l.bench.params_mut().into_iter());
                exchange(&mut *l.bench, &mut e.weights);
                forgot?;
            }
            // Both: what is kept on disk is the good ones'.
            l.experts.iter_mut().chain(&mut l.good).for_each(|e| e.optimizer.scale_rate(0.5));
            l.merge()?;
            l.hints.iter_mut().for_each(Hints::forget);
            l.guard.took_back();
            l.stats.rollbacks += 1;
            l.stats.weights = l.meta.weights();
            l.slot.publish(l.before.clone());
            Ok(())
        })
    }
}

/// How much of each expert drafts.
fn shares(meta: &Meta, deploy: Deploy) -> Vec<f64> {
    let (weights, best) = (meta.weights(), meta.best());
    match deploy {
        Deploy::Average => weights,
        Deploy::Select => (0..weights.len()).map(|i| f64::from(u8::from(i == best))).collect(),
    }
}

/// Exchanges the values of the draft's parameters for `weights`.
fn exchange<B: Train>(bench: &mut dyn Trainable<B>, weights: &mut Weights<B>) {
    bench.params_mut().into_iter().zip(weights).for_each(|(p, w)| std::mem::swap(&mut p.w, w));
}

/// How a draft with `weights` does.
fn measure<B: Train>(bench: &mut dyn Trainable<B>, weights: &mut Weights<B>, on: &[&Sequence]) -> Result<Measured> {
    exchange(bench, weights);
    let found = bench.refresh().and_then(|()| bench.pass(on, false));
    exchange(bench, weights);
    found
}

fn copy<B: Train>(be: &B, to: &mut [Expert<B>], from: &[Expert<B>]) -> Result<()> {
    for (to, from) in to.iter_mut().zip(from) {
        for (to, from) in to.weights.iter_mut().zip(&from.weights) {
            let n = from.len();
            be.copy(to.head_mut(n), from.head(n))?;
        }
        to.optimizer.copy_from(be, &from.optimizer)?;
    }
    Ok(())
}
