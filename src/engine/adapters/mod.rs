//! LoRA adapters beside the weights of an engine: many of them, each used by the requests that name it, in one batch.
//!
//! An [`AdapterPool`] knows adapters by name and keeps those on the device that were used last; [`Adapters`] is what a request
//! uses: one adapter, one for each range of layers, or a weighted sum. As long as it is there, nothing of it is unloaded.

mod pool;

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

pub use pool::{AdapterPool, PoolOptions, PoolUsage};

use super::{Engine, Session};
use crate::backend::{Backend, Train};
use crate::error::{Result, bail, ensure};
use crate::model::lora::ModuleValues;
use crate::model::{Adapter, AdapterMap, Model};

/// An `Arc<Adapter<B>>`, or an `Arc<AdapterMap<B>>`, of the engine's backend.
pub(super) type Erased = Arc<dyn Any + Send + Sync>;

/// What a request uses beside the weights. Cheap to clone; what it names stays loaded while it, or a session that uses it, is there.
#[derive(Clone)]
pub struct Adapters(Arc<Chosen>);

struct Chosen {
    engine: Engine,
    map: Erased,
    counters: Vec<Arc<Counters>>,
}

/// What became of one adapter so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdapterStats {
    /// Times that it was asked for.
    pub requests: u64,
    /// Of these, when it was there already.
    pub hits: u64,
    /// Times that it was brought to the device.
    pub loads: u64,
    /// Times that it had to leave, for others or because it was told to.
    pub evictions: u64,
    /// Tokens generated with it.
    pub tokens: u64,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    hits: AtomicU64,
    loads: AtomicU64,
    evictions: AtomicU64,
    tokens: AtomicU64,
}

impl Counters {
    fn stats(&self) -> AdapterStats {
        let [requests, hits, loads, evictions, tokens] =
            [&self.requests, &self.hits, &self.loads, &self.evictions, &self.tokens].map(|n| n.load(Relaxed));
        AdapterStats { requests, hits, loads, evictions, tokens }
    }
}

impl Adapters {
    fn new(engine: &Engine, map: Erased, counters: Vec<Arc<Counters>>) -> Self {
        Self(Arc::new(Chosen { engine: engine.clone(), map, counters }))
    }

    /// Of a weighted sum, or of ranges.
    fn of_parts(engine: &Engine, parts: &[(Range<usize>, Erased)], counters: Vec<Arc<Counters>>) -> Result<Self> {
        Ok(Self::new(engine, engine.0.model.adapter_map(parts)?, counters))
    }

    /// Says that `n` tokens were generated with it.
    pub(super) fn count(&self, n: usize) {
        self.0.counters.iter().for_each(|c| {
            c.tokens.fetch_add(n as u64, Relaxed);
        });
    }

    /// Fails unless its pool is of `engine`.
    pub(super) fn check(&self, engine: &Engine) -> Result<()> {
        let own = Arc::ptr_eq(&self.0.engine.0, &engine.0);
        ensure!(own, Usage, "the adapter was loaded for another engine: each has a pool of its own");
        Ok(())
    }

    /// What a session on `B` takes.
    pub(super) fn map<B: Backend>(&self) -> Result<Arc<AdapterMap<B>>> {
        downcast(&self.0.map)
    }
}

impl std::fmt::Debug for Adapters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Adapters").field(&self.0.counters.len()).finish()
    }
}

fn downcast<T: Any + Send + Sync>(erased: &Erased) -> Result<Arc<T>> {
    match erased.clone().downcast::<T>() {
        Ok(t) => Ok(t),
        Err(_) => bail!(Usage, "the adapter was loaded for another device than this session's"),
    }
}

/// An adapter on the model's device.
pub(super) fn upload<B: Train>(model: &Model<B>, modules: &[ModuleValues]) -> Result<Erased> {
    Ok(Arc::new(Adapter::new(model.backend(), model.config(), modules)?))
}

/// Of adapters, those of these layers.
pub(super) fn of_ranges<B: Backend>(model: &Model<B>, parts: &[(Range<usize>, Erased)]) -> Result<Erased> {
    let own = |(range, adapter): &(Range<usize>, Erased)| Ok((range.clone(), downcast::<Adapter<B>>(adapter)?));
    let parts: Vec<_> = parts.iter().map(own).collect::<Result<_>>()?;
    Ok(Arc::new(AdapterMap::of_ranges(model.config().layers, &parts)?))
}

/// The weighted sum of adapters, as one.
pub(super) fn mix<B: Train>(model: &Model<B>, parts: &[(Erased, f32)]) -> Result<Erased> {
    let own = |(adapter, weight): &(Erased, f32)| Ok((downcast::<Adapter<B>>(adapter)?, *weight));
    let own: Vec<_> = parts.iter().map(own).collect::<Result<_>>()?;
    let parts: Vec<_> = own.iter().map(|(adapter, weight)| (&**adapter, *weight)).collect();
    Ok(Arc::new(Adapter::mix(model.backend(), model.config(), &parts)?))
}

impl Session {
    /// Uses `adapters` from now on, beside the weights; `None`: the model alone. What was computed with others is computed anew when
    /// it is needed; the tokens stay.
    ///
    /// # Errors
    /// `Usage` for adapters of another engine.
    pub fn set_adapters(&mut self, adapters: Option<&Adapters>) -> Result<()> {
        adapters.map_or(Ok(()), |a| a.check(self.engine()))?;
        self.use_adapters(adapters)
    }
}
