//! Drafts of the embedded API that learn: from files to a learner, and the one place where the learner's backend is forgotten.

use std::any::Any;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Draft;
use crate::backend::Train;
use crate::error::{Result, bail};
use crate::format::peft::tensor_names;
use crate::format::{Checkpoint, DraftHead};
use crate::model::lora::{Adapter, ModuleSpec, ModuleValues};
use crate::model::roles::{LayerRole, NamedTensors};
use crate::model::{Model, ModelConfig};
use crate::speculative::SmallModel;
use crate::speculative::adapt::{Ear, LearnStats, Learner, Learning, Publisher, Pupil, Slot};
use crate::speculative::heads::{self, Kind, Make};
use crate::speculative::train::{Eagle1, Eagle3, Hydra, SmallModelLora, Trainable, step_weights};
use crate::tensor::HostTensor;
use crate::train::checkpoint::NamedTensor;

/// Rows of a pass beyond those of an update: the last step of a text brings some more.
const SPARE: usize = 64;
/// Rows of a pass: an update has more of them than most texts, and is made of as many passes as it takes.
fn planned(how: &Learning) -> usize {
    how.longest() + how.context + SPARE
}

/// A learner on some device.
pub(super) trait AnyLearner: Send + Sync {
    fn stats(&self) -> LearnStats;
    fn save(&self, path: &Path, memory: Option<&[u8]>) -> Result<()>;
    fn restore(&self, path: &Path, memory: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;
    fn learn(&self) -> Result<()>;
    fn any(&self) -> &dyn Any;
}

struct Shared<B: Train>(Arc<Mutex<Learner<B>>>);

impl<B: Train> Shared<B> {
    fn lock(&self) -> MutexGuard<'_, Learner<B>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Train> AnyLearner for Shared<B> {
    fn stats(&self) -> LearnStats {
        self.lock().stats().clone()
    }

    fn save(&self, path: &Path, memory: Option<&[u8]>) -> Result<()> {
        self.lock().save(path, memory)
    }

    fn restore(&self, path: &Path, memory: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.lock().restore(path, memory)
    }

    fn learn(&self) -> Result<()> {
        self.lock().update()
    }

    fn any(&self) -> &dyn Any {
        self
    }
}

impl Draft {
    /// What it has learnt so far; `None` for a draft that does not learn.
    pub fn learnt(&self) -> Option<LearnStats> {
        self.learner().map(|l| l.stats())
    }

    /// Learns from all that it has heard, at once, whatever that costs.
    ///
    /// # Errors
    /// The device's. A draft that does not learn does nothing.
    pub fn learn_now(&self) -> Result<()> {
        self.learner().map_or(Ok(()), |l| l.learn())
    }

    /// Writes what it has learnt, and what it has heard and not learnt yet, to a file: whole or not at all.
    ///
    /// # Errors
    /// `Usage` for a draft that does not learn; the disk's.
    pub fn save_learnt(&self, path: &Path) -> Result<()> {
        match self.learner() {
            Some(l) => l.save(path, self.memory().map(|m| m.to_bytes()).as_deref()),
            None => bail!(Usage, "{}: the draft {} does not learn", path.display(), self.name()),
        }
    }

    /// Goes on from what [`Draft::save_learnt`] wrote for the same draft, learning by the same rule.
    ///
    /// # Errors
    /// A file of another draft or rule, or a damaged one, by name: the draft stays as it is.
    pub fn restore_learnt(&self, path: &Path) -> Result<()> {
        match self.learner() {
            Some(l) => l.restore(path, &mut |bytes| self.memory().map_or(Ok(()), |m| m.restore(bytes))),
            None => bail!(Usage, "{}: the draft {} does not learn", path.display(), self.name()),
        }
    }
}

/// A head some of whose tensors have other values than its files.
struct Renewed<'a> {
    base: &'a DraftHead,
    tensors: &'a [NamedTensor],
}

impl NamedTensors for Renewed<'_> {
    fn names(&self) -> Vec<&str> {
        self.base.names()
    }
    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.base.shape(name)
    }
    fn tensor(&self, name: &str) -> Result<HostTensor> {
        match self.tensors.iter().find(|t| t.0 == name) {
            Some((_, shape, values)) => {
                let cols = *shape.last().unwrap_or(&1);
                HostTensor::from_f32(values.len() / cols.max(1), cols, values)
            }
            None => self.base.tensor(name),
        }
    }
    fn integers(&self, name: &str) -> Result<Vec<i64>> {
        self.base.integers(name)
    }
    fn layer(&self) -> Result<ModelConfig> {
        self.base.layer()
    }
    fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.base.sizes(key)
    }
    fn flag(&self, key: &str) -> Result<bool> {
        self.base.flag(key)
    }
}

/// A learner, and where its versions are found.
pub(super) type Begun<B> = (Arc<Slot<B>>, Arc<dyn AnyLearner>);

/// Of a head.
pub(super) fn head<B: Train>(
    model: Arc<Model<B>>,
    target: Arc<Checkpoint>,
    head: Arc<DraftHead>,
    how: &Learning,
) -> Result<Begun<B>> {
    how.validate()?;
    let (rows, k) = (planned(how), how.teacher);
    let bench: Box<dyn Trainable<B>> = match Kind::of(&*head)? {
        Kind::Eagle3 => Box::new(Eagle3::new(model.clone(), &*head, rows, k, step_weights(how.unroll, how.decay))?),
        Kind::Eagle => Box::new(Eagle1::new(model.clone(), &*head, rows, k, how.unroll)?),
        Kind::Hydra => Box::new(Hydra::new(model.clone(), &*head, rows, k)?),
        Kind::Medusa => bail!(Unsupported, "Medusa heads do not learn; EAGLE, EAGLE-3 and Hydra heads do"),
    };
    let slot = Arc::new(Slot::new(heads::load(model.clone(), &*target, &*head, true)?));
    let on = model.clone();
    let publisher: Publisher<B> = Box::new(move |parts| {
        let [(_, tensors)] = parts else { bail!(Shape, "a head of {} parts", parts.len()) };
        heads::load(on.clone(), &*target, &Renewed { base: &head, tensors }, true)
    });
    begin(model, bench, publisher, slot, how)
}

/// Of a small model, by an adapter.
pub(super) fn small_model<B: Train>(model: Arc<Model<B>>, small: Model<B>, how: &Learning) -> Result<Begun<B>> {
    how.validate()?;
    let small = Arc::new(small);
    let cfg = small.config().clone();
    let all = || (0..cfg.layers).flat_map(|layer| LayerRole::LINEARS.map(|role| (layer, role)));
    let (rank, scale) = (how.rank, how.scale);
    let specs: Vec<ModuleSpec> = all().map(|(layer, role)| ModuleSpec { role, layer, rank, scale }).collect();
    let adapter = Adapter::init(small.backend(), &cfg, &specs, how.seed)?;
    let rows = planned(how);
    let bench = Box::new(SmallModelLora::new(small.clone(), adapter, rows, how.teacher, how.unroll, tensor_names)?);
    let drafts = |small: Arc<Model<B>>| -> Make<B> { Box::new(move || Box::new(SmallModel::new(small.clone()))) };
    let slot = Arc::new(Slot::new(drafts(small.clone())));
    let publisher: Publisher<B> = Box::new(move |parts| {
        let (be, cfg) = (small.backend(), small.config());
        let adapter = |tensors: &[NamedTensor]| {
            let find = |name: &str| tensors.iter().find(|t| t.0 == name).map(|t| t.2.clone()).unwrap_or_default();
            let module = |&spec: &ModuleSpec| {
                let [a, b] = tensor_names(cfg, spec.layer, spec.role)?;
                Some(ModuleValues { spec, a: find(&a), b: find(&b) })
            };
            Adapter::new(be, cfg, &specs.iter().filter_map(module).collect::<Vec<_>>())
        };
        let adapters = parts.iter().map(|(share, t)| Ok((adapter(t)?, *share))).collect::<Result<Vec<_>>>()?;
        // Stacked, not averaged: the mean of products is not the product of means.
        let mixed = Adapter::mix(be, cfg, &adapters.iter().map(|(a, share)| (a, *share)).collect::<Vec<_>>())?;
        Ok(drafts(Arc::new(small.merged(&mixed)?)))
    });
    begin(model, bench, publisher, slot, how)
}

fn begin<B: Train>(
    model: Arc<Model<B>>,
    bench: Box<dyn Trainable<B>>,
    publisher: Publisher<B>,
    slot: Arc<Slot<B>>,
    how: &Learning,
) -> Result<Begun<B>> {
    let learner = Learner::new(model, bench, publisher, slot.clone(), how.clone())?;
    Ok((slot, Arc::new(Shared(Arc::new(Mutex::new(learner))))))
}

/// What brings a text's verifications to `learner`.
pub(super) fn ear<B: Train>(learner: &Arc<dyn AnyLearner>, model: &Arc<Model<B>>) -> Result<Box<dyn Pupil<B>>> {
    let Some(Shared(learner)) = learner.any().downcast_ref::<Shared<B>>() else {
        bail!(Usage, "the draft was loaded for another device than this session's");
    };
    let model: &Model<B> = model;
    Ok(Box::new(Ear::new(learner.clone(), model.backend(), model.config().vocab)?))
}
