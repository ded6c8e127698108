//! [`AdapterPool`]: which adapters are on the device.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use super::{AdapterStats, Adapters, Counters, Erased};
use crate::engine::Engine;
use crate::engine::training::to_modules;
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::peft::PeftAdapter;
use crate::model::lora::ModuleValues;

/// How much a pool keeps on the device. Built by chaining.
#[derive(Clone, Copy, Debug)]
pub struct PoolOptions {
    bytes: usize,
    count: usize,
}

impl Default for PoolOptions {
    /// No bound: nothing leaves by itself.
    fn default() -> Self {
        Self { bytes: usize::MAX, count: usize::MAX }
    }
}

impl PoolOptions {
    /// At most so many bytes of adapters.
    pub fn bytes(mut self, n: usize) -> Self {
        self.bytes = n;
        self
    }

    /// At most so many adapters.
    pub fn count(mut self, n: usize) -> Self {
        self.count = n;
        self
    }
}

/// What is on the device now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Adapters.
    pub loaded: usize,
    /// Their bytes.
    pub bytes: usize,
}

/// LoRA adapters of one engine by name. Cheap to clone; all methods may be called from any thread.
///
/// A thread of the pool's own reads, checks and uploads; decoding goes on meanwhile, and what is loaded appears at once or not at all.
/// Where the budget is used up, the adapter that was asked for longest ago and that nobody uses makes room.
///
/// ```no_run
/// use quadriga::engine::{Engine, Generate, PoolOptions};
///
/// # fn main() -> quadriga::Result<()> {
/// let engine = Engine::open("model.gguf")?;
/// let pool = engine.adapter_pool(PoolOptions::default().bytes(1 << 30))?;
/// pool.register("poems", "run/adapter");
/// let poems = pool.get("poems")?;
/// let mut session = engine.session(512, 7)?;
/// session.push_text("Roses are red")?;
/// for piece in session.generate(Generate::default().adapters(&poems))? {
///     print!("{}", piece?.text);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct AdapterPool(Arc<Shared>);

struct Shared {
    engine: Engine,
    options: PoolOptions,
    state: Mutex<State>,
    changed: Condvar,
    jobs: Mutex<Sender<String>>,
}

#[derive(Default)]
struct State {
    entries: HashMap<String, Entry>,
    /// Names in the order in which they were asked for. Of a name only the mention that its entry knows counts, so that asking again
    /// costs no search for the old one.
    mentions: VecDeque<(u64, String)>,
    clock: u64,
    usage: PoolUsage,
}

struct Entry {
    /// `None`: it came from memory, and cannot be loaded again.
    folder: Option<PathBuf>,
    place: Place,
    mentioned: u64,
    counters: Arc<Counters>,
}

enum Place {
    Out,
    Loading,
    In(Loaded),
    Failed(ErrorKind, String),
}

struct Loaded {
    /// In use while anything but the pool holds it.
    adapter: Erased,
    bytes: usize,
    /// The map of sessions that use it in all layers: as long as one does, the next gets the same.
    map: Option<Weak<dyn std::any::Any + Send + Sync>>,
}

impl Loaded {
    fn in_use(&self) -> bool {
        Arc::strong_count(&self.adapter) > 1
    }
}

impl Engine {
    /// A pool of adapters for this engine.
    ///
    /// # Errors
    /// `Io` where the system gives no thread.
    pub fn adapter_pool(&self, options: PoolOptions) -> Result<AdapterPool> {
        let (jobs, inbox) = channel();
        let pool = Arc::new(Shared {
            engine: self.clone(),
            options,
            state: Mutex::default(),
            changed: Condvar::new(),
            jobs: Mutex::new(jobs),
        });
        let weak = Arc::downgrade(&pool);
        // It ends when the last handle of the pool, and with it the sender, is gone.
        let thread = std::thread::Builder::new().name("adapters".into()).spawn(move || serve(&weak, &inbox));
        thread.map_err(|e| Error::io("a thread for adapters", e))?;
        Ok(AdapterPool(pool))
    }
}

fn serve(pool: &Weak<Shared>, jobs: &Receiver<String>) {
    while let Ok(name) = jobs.recv() {
        let Some(pool) = pool.upgrade() else { return };
        let outcome = pool.load(&name);
        let mut state = pool.state();
        if let (Err(e), Some(entry)) = (outcome, state.entries.get_mut(&name)) {
            entry.place = Place::Failed(e.kind(), e.to_string());
        }
        drop(state);
        pool.changed.notify_all();
    }
}

impl AdapterPool {
    /// Makes the PEFT folder `folder` known as `name`. Nothing is read yet. A name that is known keeps what is loaded, and takes the new
    /// folder when it is loaded next.
    pub fn register(&self, name: &str, folder: impl Into<PathBuf>) {
        let mut state = self.0.state();
        state.entries.entry(name.into()).or_insert_with(Entry::new).folder = Some(folder.into());
    }

    /// An adapter from values in memory, on the device at once. It counts towards the budget and never leaves by itself.
    ///
    /// # Errors
    /// `Usage` for a name that is known; what does not fit the model; `Capacity` where there is no room; the device's.
    pub fn insert(&self, name: &str, modules: &[ModuleValues]) -> Result<()> {
        {
            let mut state = self.0.state();
            ensure!(!state.entries.contains_key(name), Usage, "an adapter called {name} is there already");
            state.entries.insert(name.into(), Entry { place: Place::Loading, ..Entry::new() });
        }
        let done = self.0.bring(name, modules);
        if done.is_err() {
            self.0.state().entries.remove(name);
        }
        self.0.changed.notify_all();
        done
    }

    /// The adapter `name` for all layers. Waits until it is loaded.
    ///
    /// # Errors
    /// `Usage` for a name that is not known; whatever is wrong with its folder, by folder and tensor, such as an adapter of another
    /// base; `Capacity` where all that are loaded are in use.
    pub fn get(&self, name: &str) -> Result<Adapters> {
        self.0.whole(self.0.wait(name)?)
    }

    /// The same without waiting: `None` where it is not loaded yet, but is being loaded from now on.
    ///
    /// # Errors
    /// As [`AdapterPool::get`]; those of loading come with the call after it has failed, and the next one tries again.
    pub fn try_get(&self, name: &str) -> Result<Option<Adapters>> {
        let mut state = self.0.state();
        match self.0.ask(&mut state, name, true)? {
            Some(found) => {
                drop(state);
                self.0.whole(found).map(Some)
            }
            None => Ok(None),
        }
    }

    /// Begins to load `name`, if it is not there.
    ///
    /// # Errors
    /// `Usage` for a name that is not known.
    pub fn prefetch(&self, name: &str) -> Result<()> {
        let mut state = self.0.state();
        let entry = state.known(name)?;
        if matches!(entry.place, Place::Out | Place::Failed(..)) {
            entry.place = Place::Loading;
            self.0.send(name);
        }
        Ok(())
    }

    /// One adapter for each of these ranges of layers; between them the model alone. Waits until all are loaded.
    ///
    /// # Errors
    /// As [`AdapterPool::get`]; `Usage` for ranges that overlap, are empty or leave the model.
    pub fn layers(&self, parts: &[(Range<usize>, &str)]) -> Result<Adapters> {
        let found = self.all(parts.iter().map(|p| p.1))?;
        let counters = found.iter().map(|f| f.counters.clone()).collect();
        let parts: Vec<_> = parts.iter().zip(found).map(|(p, f)| (p.0.clone(), f.adapter)).collect();
        Adapters::of_parts(&self.0.engine, &parts, counters)
    }

    /// The sum of adapters with these weights, exactly: its ranks are those of all, side by side. The sum is computed anew for each call
    /// and lies beside the pool: keep it where it is used again.
    ///
    /// # Errors
    /// As [`AdapterPool::get`]; `Usage` for weights that are not finite, or none.
    pub fn mix(&self, parts: &[(&str, f32)]) -> Result<Adapters> {
        let good = !parts.is_empty() && parts.iter().all(|p| p.1.is_finite());
        ensure!(good, Usage, "adapters cannot be summed with these weights: {parts:?}");
        let found = self.all(parts.iter().map(|p| p.0))?;
        let counters = found.iter().map(|f| f.counters.clone()).collect();
        let parts: Vec<_> = found.into_iter().zip(parts).map(|(f, p)| (f.adapter, p.1)).collect();
        let (engine, layers) = (&self.0.engine, self.0.engine.config().layers);
        Adapters::of_parts(engine, &[(0..layers, engine.0.model.mix_adapters(&parts)?)], counters)
    }

    /// Each of these, loaded one beside the other.
    fn all<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<Vec<Found>> {
        names.clone().try_for_each(|n| self.prefetch(n))?;
        names.map(|n| self.0.wait(n)).collect()
    }

    /// Takes `name` off the device; it stays known. Says whether it was there.
    ///
    /// # Errors
    /// `Usage` for a name that is not known, or in use; an adapter from memory, which could not come back: [`AdapterPool::remove`] it.
    pub fn unload(&self, name: &str) -> Result<bool> {
        let mut state = self.0.state();
        let entry = state.known(name)?;
        ensure!(entry.folder.is_some(), Usage, "the adapter {name} has no folder to come back from");
        let out = state.take(name)?;
        // Memory is given back without the lock.
        drop(state);
        Ok(out.is_some())
    }

    /// Forgets `name`, and takes it off the device.
    ///
    /// # Errors
    /// `Usage` for a name that is not known, is in use or is being loaded.
    pub fn remove(&self, name: &str) -> Result<()> {
        let mut state = self.0.state();
        ensure!(!matches!(state.known(name)?.place, Place::Loading), Usage, "the adapter {name} is being loaded");
        let out = state.take(name)?;
        state.entries.remove(name);
        drop(state);
        drop(out);
        Ok(())
    }

    /// Counts of one adapter, if it is known.
    pub fn stats(&self, name: &str) -> Option<AdapterStats> {
        self.0.state().entries.get(name).map(|e| e.counters.stats())
    }

    /// What is on the device.
    pub fn usage(&self) -> PoolUsage {
        self.0.state().usage
    }

    /// The engine it belongs to.
    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }
}

/// An adapter that is loaded, held.
struct Found {
    name: String,
    adapter: Erased,
    counters: Arc<Counters>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, name: &str) {
        // The receiver lives as long as the pool.
        let _ = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).send(name.into());
    }

    /// `name`, if it is loaded; else sees that it is being loaded. An attempt that has failed is `fresh` news once.
    fn ask(&self, state: &mut State, name: &str, fresh: bool) -> Result<Option<Found>> {
        let entry = state.known(name)?;
        if fresh {
            entry.counters.requests.fetch_add(1, Relaxed);
        }
        match &entry.place {
            Place::In(loaded) => {
                if fresh {
                    entry.counters.hits.fetch_add(1, Relaxed);
                }
                let found =
                    Found { name: name.into(), adapter: loaded.adapter.clone(), counters: entry.counters.clone() };
                state.mention(name);
                Ok(Some(found))
            }
            Place::Loading => Ok(None),
            Place::Out => {
                entry.place = Place::Loading;
                self.send(name);
                Ok(None)
            }
            Place::Failed(kind, why) => {
                let e = Error::new(*kind, why.clone());
                entry.place = Place::Out;
                Err(e)
            }
        }
    }

    fn wait(&self, name: &str) -> Result<Found> {
        let mut state = self.state();
        // An old failure is not this caller's.
        let entry = state.known(name)?;
        if matches!(entry.place, Place::Failed(..)) {
            entry.place = Place::Out;
        }
        let mut first = true;
        loop {
            if let Some(found) = self.ask(&mut state, name, first)? {
                return Ok(found);
            }
            first = false;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// For all layers; sessions that use an adapter at the same time share one map.
    fn whole(&self, found: Found) -> Result<Adapters> {
        let counters = vec![found.counters];
        let mut state = self.state();
        let loaded = match state.entries.get_mut(&found.name).map(|e| &mut e.place) {
            Some(Place::In(loaded)) if Arc::ptr_eq(&loaded.adapter, &found.adapter) => Some(loaded),
            _ => None,
        };
        if let Some(map) = loaded.as_ref().and_then(|l| l.map.as_ref()?.upgrade()) {
            return Ok(Adapters::new(&self.engine, map, counters));
        }
        let map = self.engine.0.model.adapter_map(&[(0..self.engine.config().layers, found.adapter)])?;
        if let Some(loaded) = loaded {
            loaded.map = Some(Arc::downgrade(&map));
        }
        Ok(Adapters::new(&self.engine, map, counters))
    }

    /// Reads and checks the folder of `name`, and brings it to the device.
    fn load(&self, name: &str) -> Result<()> {
        let folder = self.state().known(name)?.folder.clone();
        let Some(folder) = folder else { bail!(Usage, "the adapter {name} has no folder to come from") };
        let modules = read(&folder, &self.engine)?;
        self.bring(name, &modules).context(|| format!("the adapter {name}"))
    }

    fn bring(&self, name: &str, modules: &[ModuleValues]) -> Result<()> {
        let model = &self.engine.0.model;
        let bytes = model.adapter_bytes(modules);
        let out = self.state().make_room(bytes, &self.options)?;
        // What leaves gives its memory back before what comes takes its own.
        drop(out);
        let adapter = model.adapter(modules);
        let mut state = self.state();
        let adapter = adapter.inspect_err(|_| state.usage.less(bytes))?;
        if let Some(entry) = state.entries.get_mut(name) {
            entry.place = Place::In(Loaded { adapter, bytes, map: None });
            entry.counters.loads.fetch_add(1, Relaxed);
            state.mention(name);
        } else {
            state.usage.less(bytes);
        }
        Ok(())
    }
}

fn read(folder: &Path, engine: &Engine) -> Result<Vec<ModuleValues>> {
    let peft = PeftAdapter::read(folder, engine.config())?;
    let (same, at) = (peft.diffusion.is_none(), folder.display());
    ensure!(same, Unsupported, "{at}: it makes a diffusion model of its base, which cannot stand beside the base");
    Ok(to_modules(peft))
}

impl PoolUsage {
    fn less(&mut self, bytes: usize) {
        self.bytes -= bytes;
        self.loaded -= 1;
    }
}

impl Entry {
    fn new() -> Self {
        Self { folder: None, place: Place::Out, mentioned: 0, counters: Arc::default() }
    }
}

impl State {
    fn known(&mut self, name: &str) -> Result<&mut Entry> {
        match self.entries.get_mut(name) {
            Some(entry) => Ok(entry),
            None => bail!(Usage, "no adapter is called {name}"),
        }
    }

    fn mention(&mut self, name: &str) {
        self.clock += 1;
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.mentioned = self.clock;
        self.mentions.push_back((self.clock, name.into()));
        // Old mentions go when they are the greater part, so that each call pays for one.
        if self.mentions.len() > 2 * self.usage.loaded + 16 {
            let Self { mentions, entries, .. } = self;
            mentions.retain(|(at, name)| entries.get(name).is_some_and(|e| e.mentioned == *at));
        }
    }

    /// Takes an adapter off the device, if it is there. Its memory goes with what is returned.
    fn take(&mut self, name: &str) -> Result<Option<Erased>> {
        let entry = self.known(name)?;
        let Place::In(loaded) = &entry.place else { return Ok(None) };
        ensure!(!loaded.in_use(), Usage, "the adapter {name} is in use");
        let Place::In(loaded) = std::mem::replace(&mut entry.place, Place::Out) else { return Ok(None) };
        entry.counters.evictions.fetch_add(1, Relaxed);
        entry.mentioned = 0;
        self.usage.less(loaded.bytes);
        Ok(Some(loaded.adapter))
    }

    /// Counts an adapter of `bytes` in, having taken out what has to make room for it.
    fn make_room(&mut self, bytes: usize, options: &PoolOptions) -> Result<Vec<Erased>> {
        // Nobody leaves for one that cannot come.
        let (most, here) = (options.bytes, options.count);
        ensure!(
            bytes <= most && here > 0,
            Capacity,
            "no room for an adapter of {bytes} bytes in a pool of {most} bytes for {here}"
        );
        let mut out = Vec::new();
        let fits = |u: &PoolUsage| u.loaded < options.count && u.bytes.saturating_add(bytes) <= options.bytes;
        for _ in 0..self.mentions.len() {
            if fits(&self.usage) {
                break;
            }
            let Some((at, name)) = self.mentions.pop_front() else { break };
            let Some(entry) = self.entries.get(&name).filter(|e| e.mentioned == at) else { continue };
            let Place::In(loaded) = &entry.place else { continue };
            if loaded.in_use() || entry.folder.is_none() {
                // Used now: as good as asked for now.
                self.mention(&name);
            } else {
                out.extend(self.take(&name)?);
            }
        }
        let PoolUsage { loaded, bytes: held } = self.usage;
        ensure!(
            fits(&self.usage),
            Capacity,
            "no room for an adapter of {bytes} bytes: the {loaded} that stay, of {held} bytes, are in use or cannot be loaded again"
        );
        self.usage = PoolUsage { loaded: loaded + 1, bytes: held + bytes };
        Ok(out)
    }
}
