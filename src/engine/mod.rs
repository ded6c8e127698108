//! [`Engine`]: the embedded API. Opens a model on a device chosen at run time and hands out sessions.
//!
//! ```no_run
//! use quadriga::engine::{Engine, Generate, Message};
//!
//! # fn main() -> quadriga::Result<()> {
//! let engine = Engine::open("models/SmolLM2-135M-Instruct.Q4_1.gguf")?;
//! let mut session = engine.session(2048, 7)?;
//! session.push_chat(&[Message::new("user", "Name three primary colours.")])?;
//! for piece in session.generate(Generate::default().max_tokens(64))? {
//!     print!("{}", piece?.text);
//! }
//! # Ok(())
//! # }
//! ```

mod accuracy;
mod adapt;
mod adapters;
pub mod align;
mod diffusion;
mod diffusion_training;
mod draft;
mod erased;
mod learning;
mod levers;
mod preferences;
mod routed;
mod selfgen;
mod serving;
mod session;
mod speculation;
mod speed;
mod steps;
mod stream_files;
mod tasks;
mod texts;
mod training;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

pub use accuracy::{Accuracy, LabelTask, label_accuracy};
pub use adapt::{AdaptRun, Adapted, Told};
pub use adapters::{AdapterPool, AdapterStats, Adapters, PoolOptions, PoolUsage};
pub use diffusion_training::{Convert, DiffusionRun, Learn};
pub use draft::DraftRun;
pub use erased::Decode;
pub use levers::{Lever, LeverBench, lever_speed};
pub use preferences::{PreferenceRun, Preferred};
pub use routed::{Routed, TaskRouter};
pub use selfgen::{SelfGen, SelfGenerated};
pub use serving::{Reply, Request, Serving, ServingOptions};
pub use session::{Finish, Generate, Generation, Piece, Session};
pub use speculation::{Draft, DraftKind, Memory, Speculation};
pub use speed::{TrainBench, TrainSpeed, train_speed};
pub use steps::{Preference, StepCounts, StepJudge, StepSettings, Steps};
pub use stream_files::StreamReading;
pub use tasks::{Measured, Task};
pub use texts::Texts;
pub use training::{DataSettings, Lora, Merged, Method, TrainRun, read_adapter};

use crate::backend::Train;
use crate::backend::cpu::{Compute, Cpu, Tier};
use crate::backend::cuda::{self, Cuda};
use crate::backend::naive::Naive;
pub use crate::continual;
pub use crate::diffusion::aup::{AupCurve, AupSettings, Point, Weighed, aup};
pub use crate::diffusion::train::{DistillSettings, MaskedSettings, Weighting};
pub use crate::diffusion::{Cache, Choose, Commit, OnPass, Outcome, Rank, Schedule, Settings as DiffusionSettings};
use crate::error::{Context, Error, ErrorKind, Result, bail};
pub use crate::format::Message;
use crate::format::{ChatTemplate, Checkpoint, Tokenizer};
use crate::model::roles::TensorSource;
use crate::model::{Model, ModelConfig};
pub use crate::rlhf;
pub use crate::speculative::adapt::{Deploy, LearnStats, Learning, Spend};
pub use crate::speculative::train::{Agreement, HeadEvent};
pub use crate::train::data::PreferenceText;
pub use crate::train::preference::Margins;
use erased::{AnyModel, Shared};

/// Where a model runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The best there is: a usable GPU, else the CPU.
    #[default]
    Auto,
    /// The native CPU backend.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// The f64 specification: slow, exact, for tiny models.
    Naive,
}

/// Hears how loading goes: tensors done, of how many.
pub type Progress = Box<dyn Fn(usize, usize) + Send + Sync>;

/// How to open a model. `Default` is what most want.
#[derive(Default)]
pub struct EngineOptions {
    device: Device,
    threads: usize,
    compute: Compute,
    tier: Option<Tier>,
    without_graphs: bool,
    adapter: Option<PathBuf>,
    progress: Option<Progress>,
}

impl EngineOptions {
    /// The device.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// CPU threads; 0 means one for each physical core this process may use.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Integer or f32 products with quantised weights.
    pub fn compute(mut self, compute: Compute) -> Self {
        self.compute = compute;
        self
    }

    /// CPU instructions below the best that were found, for comparisons.
    pub fn tier(mut self, tier: Tier) -> Self {
        self.tier = Some(tier);
        self
    }

    /// Hands every kernel to a GPU by itself, without CUDA graphs; the results are the same.
    pub fn without_graphs(mut self, yes: bool) -> Self {
        self.without_graphs = yes;
        self
    }

    /// Adds the LoRA adapter in this PEFT folder to the weights as they are loaded: what it touches becomes F32.
    pub fn adapter(mut self, folder: impl Into<PathBuf>) -> Self {
        self.adapter = Some(folder.into());
        self
    }

    /// The GPU, where one is to be used. One that cannot run the kernels is an error only where it was asked for by name.
    fn gpu(&self) -> Result<Option<Cuda>> {
        let gpu = match self.device {
            Device::Cuda => Some(Cuda::open(0)?),
            Device::Auto if self.tier.is_none() && cuda::available() => Cuda::open(0).ok(),
            _ => None,
        };
        Ok(gpu.map(|gpu| if self.without_graphs { gpu.without_graphs() } else { gpu }))
    }

    /// The same for another model on the same device, without an adapter.
    fn again(&self) -> Self {
        let Self { device, threads, compute, tier, without_graphs, .. } = *self;
        Self { device, threads, compute, tier, without_graphs, adapter: None, progress: None }
    }

    pub(crate) fn cpu(&self) -> Result<Cpu> {
        let threads = if self.threads == 0 { default_threads() } else { self.threads };
        let best = Tier::detect();
        let tier = self.tier.unwrap_or(best);
        if tier > best {
            bail!(Unsupported, "this machine has {best} instructions; {tier} was asked for");
        }
        Ok(Cpu::with(threads, tier, self.compute))
    }

    /// Hears how loading goes.
    pub fn progress(mut self, f: impl Fn(usize, usize) + Send + Sync + 'static) -> Self {
        self.progress = Some(Box::new(f));
        self
    }
}

struct Inner {
    model: Box<dyn AnyModel>,
    /// What is wrong with a tokenizer or a template matters only to those who need it: token ids work without.
    tokenizer: Result<Tokenizer>,
    template: Result<Option<ChatTemplate>>,
    device: String,
    threads: usize,
    load_s: f64,
    /// Where the weights came from, if from files.
    path: Option<PathBuf>,
    /// The adapter that is merged into them.
    adapter: Option<PathBuf>,
    compute: Compute,
}

/// A model on a device with its tokenizer. Cheap to clone; sessions of one engine may run on several threads.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

impl Engine {
    /// Opens a GGUF file or a Hugging Face folder on the best device.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, EngineOptions::default())
    }

    /// Opens a model as `options` say.
    ///
    /// # Errors
    /// Whatever is wrong with the files, by name; a device that is not there.
    pub fn open_with(path: impl AsRef<Path>, options: EngineOptions) -> Result<Self> {
        let (path, start) = (path.as_ref(), Instant::now());
        let checkpoint = Checkpoint::open(path)?;
        let (text, model) = std::thread::scope(|s| {
            let text = s.spawn(|| (checkpoint.tokenizer(), checkpoint.chat_template()));
            let model = match &options.adapter {
                Some(folder) => Merged::new(&checkpoint, folder).and_then(|m| Self::load(&m, &options)),
                None => Self::load(&checkpoint, &options),
            };
            (text.join(), model)
        });
        let (tokenizer, template) = text.unwrap_or_else(|p| std::panic::resume_unwind(p));
        Self::finish(model?, tokenizer, template, start, Some(path.into()), &options)
    }

    /// An engine from weights made elsewhere, without a tokenizer: sessions take token ids.
    pub fn from_tensors(source: &dyn TensorSource, options: EngineOptions) -> Result<Self> {
        let start = Instant::now();
        let none = Err(Error::new(ErrorKind::Tokenizer, "this model comes without a tokenizer: give token ids"));
        Self::finish(Self::load(source, &options)?, none, Ok(None), start, None, &options)
    }

    fn finish(
        (model, device, threads): (Box<dyn AnyModel>, String, usize),
        tokenizer: Result<Tokenizer>,
        template: Result<Option<ChatTemplate>>,
        start: Instant,
        path: Option<PathBuf>,
        options: &EngineOptions,
    ) -> Result<Self> {
        let (load_s, adapter, compute) = (start.elapsed().as_secs_f64(), options.adapter.clone(), options.compute);
        Ok(Self(Arc::new(Inner { model, tokenizer, template, device, threads, load_s, path, adapter, compute })))
    }

    fn load(source: &dyn TensorSource, options: &EngineOptions) -> Result<(Box<dyn AnyModel>, String, usize)> {
        fn on<B: Train>(be: B, source: &dyn TensorSource, o: &EngineOptions) -> Result<Box<dyn AnyModel>> {
            let progress = |done, total| o.progress.iter().for_each(|p| p(done, total));
            Ok(Box::new(Shared(Arc::new(Model::load(Arc::new(be), source, progress).context(|| "weights".into())?))))
        }
        if let Some(gpu) = options.gpu()? {
            let name = format!("cuda ({})", gpu.name());
            return Ok((on(gpu, source, options)?, name, 0));
        }
        if options.device == Device::Naive {
            return Ok((on(Naive, source, options)?, "naive (f64)".into(), 1));
        }
        let cpu = options.cpu()?;
        let (tier, threads) = (cpu.tier(), cpu.pool().threads());
        Ok((on(cpu, source, options)?, format!("cpu ({tier}, {threads} threads)"), threads))
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.0.model.config()
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// `Tokenizer` where the files have none, or a damaged one.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.0.tokenizer.as_ref().map_err(|e| Error::new(e.kind(), e.to_string()))
    }

    /// The chat template, where the files have one.
    ///
    /// # Errors
    /// `Tokenizer` where it is damaged.
    pub fn chat_template(&self) -> Result<Option<&ChatTemplate>> {
        self.0.template.as_ref().map(Option::as_ref).map_err(|e| Error::new(e.kind(), e.to_string()))
    }

    /// The tokenizer and the chat template for training data.
    ///
    /// # Errors
    /// `Tokenizer` where either is damaged, or there is no tokenizer.
    pub fn texts(&self) -> Result<Texts> {
        Ok(Texts::new(self.tokenizer()?.clone(), self.chat_template()?.cloned()))
    }

    /// An empty session of up to `capacity` tokens, with its own random numbers.
    pub fn session(&self, capacity: usize, seed: u64) -> Result<Session> {
        Ok(Session::new(self.clone(), self.0.model.session(capacity, seed, &[])?))
    }

    /// A session that keeps what `draft` reads of the model's layers.
    pub fn session_for(&self, draft: &Draft, capacity: usize, seed: u64) -> Result<Session> {
        Ok(Session::new(self.clone(), self.0.model.session(capacity, seed, draft.taps())?))
    }

    /// Tokens that end a generation.
    pub fn eos(&self) -> Vec<u32> {
        let mut ids = self.config().eos.clone();
        if let Ok(t) = &self.0.tokenizer {
            ids.extend(t.eos());
        }
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// The token that ends a turn: of several the configuration's first.
    pub fn end(&self) -> Option<u32> {
        let of_tokenizer = || self.0.tokenizer.as_ref().ok().and_then(|t| t.eos().first().copied());
        self.config().eos.first().copied().or_else(of_tokenizer)
    }

    /// What it runs on, for people.
    pub fn device(&self) -> &str {
        &self.0.device
    }

    /// CPU threads in use, 0 on a GPU.
    pub fn threads(&self) -> usize {
        self.0.threads
    }

    /// Seconds that opening took.
    pub fn load_seconds(&self) -> f64 {
        self.0.load_s
    }

    /// Bytes of all matrices.
    pub fn weight_bytes(&self) -> usize {
        self.0.model.weight_bytes()
    }

    /// Bytes of matrices that one decoded token reads.
    pub fn bytes_per_token(&self) -> usize {
        self.0.model.bytes_per_token()
    }
}

/// Something that trains, on whatever device.
trait OnDevice {
    type Out;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<Self::Out>;
}

fn on_device<J: OnDevice>(options: EngineOptions, job: J) -> Result<J::Out> {
    match options.gpu()? {
        Some(gpu) => job.run(gpu, &options),
        None if options.device == Device::Naive => job.run(Naive, &options),
        None => job.run(options.cpu()?, &options),
    }
}

/// Physical cores that this process may use.
pub fn default_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    num_cpus::get_physical().clamp(1, allowed)
}
