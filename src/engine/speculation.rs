//! Drafts of the embedded API: what may speed up a session, on the engine's device.

use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::Engine;
use super::learning::AnyLearner;
use crate::backend::Backend;
use crate::decode;
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::{Checkpoint, DraftHead, Tokenizer};
use crate::model::roles::{NamedTensors, TensorSource};
use crate::model::{Model, ModelConfig};
pub use crate::speculative::Memory;
use crate::speculative::adapt::Learning;
use crate::speculative::{self, Budget, CostModel, Plan, heads};

/// What proposes tokens.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum DraftKind {
    /// Text that occurred before: no weights, no training.
    Lookup,
    /// A smaller model with the same vocabulary: a GGUF file or a Hugging Face folder.
    Model(PathBuf),
    /// A head on the target's layers: a folder in the layout of EAGLE, EAGLE-3, Hydra or Medusa.
    Head(PathBuf),
    /// A smaller model that writes whole steps, up to blank lines; they are verified token by token, so the text is the same.
    Steps(PathBuf),
    /// Some of the target's own layers, in this order: self-speculation.
    Layers(Vec<usize>),
}

impl DraftKind {
    /// What lies at `path`: a head, if it is a folder of one, else a model.
    pub fn at(path: &Path) -> Self {
        let head = path.is_dir() && DraftHead::open(path).is_ok_and(|h| heads::Kind::of(&h).is_ok());
        if head { DraftKind::Head(path.into()) } else { DraftKind::Model(path.into()) }
    }
}

/// A draft, ready for any number of sessions of its engine. Cheap to clone.
#[derive(Clone)]
pub struct Draft(Arc<Inner>);

/// How much is drafted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speculation {
    nodes: Option<usize>,
    depth: usize,
    width: usize,
}

impl Default for Speculation {
    /// As much as pays, by measured costs: nothing, where nothing does.
    fn default() -> Self {
        Self { nodes: None, depth: 16, width: 4 }
    }
}

impl Speculation {
    /// So many drafted tokens a pass, whatever that costs.
    pub fn nodes(mut self, n: usize) -> Self {
        self.nodes = Some(n);
        self
    }

    /// At most so many in a row.
    pub fn depth(mut self, n: usize) -> Self {
        self.depth = n;
        self
    }

    /// At most so many alternatives at a place; 1 makes chains.
    pub fn width(mut self, n: usize) -> Self {
        self.width = n;
        self
    }

    pub(super) fn planned(self) -> bool {
        self.nodes.is_none()
    }

    pub(super) fn budget(self) -> Budget<'static> {
        Budget::new(self.nodes.unwrap_or(MOST_NODES), self.depth, self.width)
    }
}

/// Drafted nodes of a pass where costs decide.
const MOST_NODES: usize = 31;

struct Inner {
    name: String,
    taps: Vec<usize>,
    costs: OnceLock<CostModel>,
    /// The plan of the last text that ended.
    learnt: Mutex<Option<Plan>>,
    /// A [`Maker`] of the engine's backend.
    maker: Box<dyn Any + Send + Sync>,
    learner: Option<Arc<dyn AnyLearner>>,
    memory: Option<Arc<Memory>>,
}

/// Makes drafts for sessions on `B`; they share their weights.
pub(super) type Maker<B> = Box<dyn Fn() -> Result<Box<dyn speculative::Draft<B>>> + Send + Sync>;

impl Draft {
    pub(super) fn new<B: Backend>(
        name: String,
        taps: Vec<usize>,
        maker: Maker<B>,
        learner: Option<Arc<dyn AnyLearner>>,
        memory: Option<Arc<Memory>>,
    ) -> Self {
        let (costs, learnt) = (OnceLock::new(), Mutex::new(None));
        Self(Arc::new(Inner { name, taps, costs, learnt, maker: Box::new(maker), learner, memory }))
    }

    /// What its lookup remembers of earlier texts, if it remembers.
    pub(super) fn memory(&self) -> Option<&Arc<Memory>> {
        self.0.memory.as_ref()
    }

    /// What learns it, if it learns.
    pub(super) fn learner(&self) -> Option<&Arc<dyn AnyLearner>> {
        self.0.learner.as_ref()
    }

    /// What passes and drafting cost on this machine: measured in half a second at the first call, unless
    /// [`Draft::set_costs`] told.
    pub(super) fn costs<B: Backend>(&self, model: &Arc<Model<B>>) -> Result<CostModel> {
        if let Some(costs) = self.0.costs.get() {
            return Ok(costs.clone());
        }
        let capacity = model.config().context.min(256);
        let mut session = decode::Session::with_taps(model.clone(), capacity, 0, self.taps())?;
        let vocab = model.config().vocab as u32;
        session.push(&(0..capacity as u32 / 2).map(|i| i * 31 % vocab).collect::<Vec<_>>());
        session.advance()?;
        let mut costs = CostModel::measure(&mut session)?;
        session.push(&[0]);
        costs.measure_draft(&mut *self.make()?, &session)?;
        Ok(self.0.costs.get_or_init(|| costs).clone())
    }

    /// A plan for another text.
    pub(super) fn plan<B: Backend>(&self, model: &Arc<Model<B>>) -> Result<Plan> {
        let plan = Plan::new(self.costs(model)?);
        // A thread that died in between has only read or replaced it.
        let learnt = self.0.learnt.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match &*learnt {
            Some(last) => plan.with_experience(last),
            None => plan,
        })
    }

    /// Keeps what a text has taught about this draft.
    pub(super) fn learn(&self, plan: &Plan) {
        *self.0.learnt.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan.clone());
    }

    /// What was measured, as text for [`Draft::set_costs`]; `None` before the first use.
    pub fn costs_json(&self) -> Option<String> {
        self.0.costs.get().map(CostModel::to_json)
    }

    /// Takes costs that were measured earlier with this machine, model, draft and number of threads.
    ///
    /// # Errors
    /// Text that is not of [`Draft::costs_json`].
    pub fn set_costs(&self, json: &str) -> Result<()> {
        let costs = CostModel::from_json(json)?;
        self.0.costs.get_or_init(|| costs);
        Ok(())
    }

    /// Its name, for statistics.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Layers of the target that it reads.
    pub(super) fn taps(&self) -> &[usize] {
        &self.0.taps
    }

    pub(super) fn make<B: Backend>(&self) -> Result<Box<dyn speculative::Draft<B>>> {
        let Some(maker) = self.0.maker.downcast_ref::<Maker<B>>() else {
            bail!(Usage, "the draft {} was loaded for another device than this session's", self.name());
        };
        maker()
    }
}

/// What a draft is made from, files opened.
pub(super) enum Source<'a> {
    Lookup(Option<Arc<Memory>>),
    Model(&'a dyn TensorSource),
    /// A smaller model's weights, and what spells its steps and ends its texts.
    Steps(&'a dyn TensorSource, &'a Tokenizer, &'a [u32]),
    /// The target's weights as they are stored, and the head's.
    Head(&'a dyn TensorSource, &'a dyn NamedTensors),
    Layers(&'a [usize]),
    /// Lookup as above, else the draft.
    Mixed(Option<Arc<Memory>>, Draft),
    /// The target, a head, and how that learns.
    LearningHead(Arc<Checkpoint>, Arc<DraftHead>, &'a Learning),
    /// A smaller model, and how it learns.
    LearningModel(&'a dyn TensorSource, &'a Learning),
}

impl Engine {
    /// Loads a draft onto this engine's device.
    ///
    /// # Errors
    /// Whatever is wrong with its files; a draft whose vocabulary or tokenizer is not the target's.
    pub fn draft(&self, kind: &DraftKind) -> Result<Draft> {
        match kind {
            DraftKind::Lookup => self.0.model.draft(Source::Lookup(None), "lookup"),
            DraftKind::Model(path) => {
                let checkpoint = self.small_model(path)?;
                self.0.model.draft(Source::Model(&checkpoint), &path.display().to_string())
            }
            DraftKind::Steps(path) => {
                let (checkpoint, eos) = (self.small_model(path)?, self.eos());
                let name = format!("steps of {}", path.display());
                self.0.model.draft(Source::Steps(&checkpoint, self.tokenizer()?, &eos), &name)
            }
            DraftKind::Head(path) => self.head(&DraftHead::open(path)?, &path.display().to_string()),
            DraftKind::Layers(layers) => self.0.model.draft(Source::Layers(layers), "layers"),
        }
    }

    /// The files of a model with this one's tokens.
    pub(super) fn small_model(&self, path: &Path) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::open(path)?;
        same_vocabulary(path, self.config(), checkpoint.config())?;
        if let (Ok(ours), Ok(theirs)) = (self.tokenizer(), checkpoint.tokenizer()) {
            same_tokens(path, ours, &theirs, self.config().vocab)?;
        }
        Ok(checkpoint)
    }

    fn head(&self, head: &DraftHead, name: &str) -> Result<Draft> {
        let Some(path) = &self.0.path else {
            bail!(Unsupported, "{name}: a draft head needs a target from a file");
        };
        let target = Checkpoint::open(path)?;
        self.0.model.draft(Source::Head(&target, head), name).context(|| name.into())
    }

    /// A draft that learns from what it is used for, as `how` says: a head of EAGLE, EAGLE-3 or Hydra by all of its weights, a smaller model
    /// by an adapter. Each call begins with the draft as it is stored and learns on its own: one for each tenant, say.
    ///
    /// # Errors
    /// As [`Engine::draft`]; `Unsupported` for what cannot learn; impossible settings.
    pub fn learning(&self, kind: &DraftKind, how: &Learning) -> Result<Draft> {
        match kind {
            DraftKind::Head(path) => self.learning_head(DraftHead::open(path)?, &path.display().to_string(), how),
            DraftKind::Model(path) => {
                let checkpoint = self.small_model(path)?;
                let name = format!("{}, learning", path.display());
                self.0.model.draft(Source::LearningModel(&checkpoint, how), &name)
            }
            other => bail!(Unsupported, "{other:?} does not learn: heads and small models do"),
        }
    }

    /// As [`Engine::learning`], beginning with [`Engine::shipped_draft`].
    ///
    /// # Errors
    /// As there.
    pub fn learning_shipped(&self, how: &Learning) -> Option<Result<Draft>> {
        SHIPPED.iter().find(|s| (s.fits)(self.config())).map(|s| {
            let head = DraftHead::parse(s.name, s.config, s.weights)?;
            self.learning_head(head, s.name, how)
        })
    }

    fn learning_head(&self, head: DraftHead, name: &str, how: &Learning) -> Result<Draft> {
        let Some(path) = &self.0.path else {
            bail!(Unsupported, "{name}: a draft head needs a target from a file");
        };
        let target = Arc::new(Checkpoint::open(path)?);
        let name = &format!("{name}, learning");
        self.0.model.draft(Source::LearningHead(target, Arc::new(head), how), name).context(|| name.clone())
    }

    /// Lookup where the text repeats, else `draft`; or both in one tree.
    ///
    /// # Errors
    /// A draft of another device.
    pub fn with_lookup(&self, draft: &Draft) -> Result<Draft> {
        self.0.model.draft(Source::Mixed(None, draft.clone()), &format!("lookup + {}", draft.name()))
    }

    /// Lookup in the text and in those of all earlier sessions, which the memory keeps: text that a generation with this draft
    /// leaves behind goes into it.
    ///
    /// # Errors
    /// A memory of another vocabulary.
    pub fn lookup_with(&self, memory: &Arc<Memory>) -> Result<Draft> {
        memory.check(self.config().vocab)?;
        self.0.model.draft(Source::Lookup(Some(memory.clone())), "memory")
    }

    /// [`Engine::with_lookup`] with a lookup as [`Engine::lookup_with`] gives.
    ///
    /// # Errors
    /// A draft of another device; a memory of another vocabulary.
    pub fn with_memory(&self, draft: &Draft, memory: &Arc<Memory>) -> Result<Draft> {
        memory.check(self.config().vocab)?;
        let source = Source::Mixed(Some(memory.clone()), draft.clone());
        self.0.model.draft(source, &format!("memory + {}", draft.name()))
    }

    /// The draft that comes with quadriga for this model, where there is one.
    pub fn shipped_draft(&self) -> Option<Result<Draft>> {
        SHIPPED.iter().find(|s| (s.fits)(self.config())).map(|s| {
            let head = DraftHead::parse(s.name, s.config, s.weights)?;
            self.head(&head, s.name)
        })
    }
}

/// A head that is part of the program.
struct Shipped {
    name: &'static str,
    fits: fn(&ModelConfig) -> bool,
    config: &'static str,
    weights: &'static [u8],
}

const SHIPPED: &[Shipped] = &[Shipped {
    name: "eagle3 for SmolLM2-135M",
    fits: |c| (c.vocab, c.hidden, c.layers, c.heads, c.kv_heads, c.ffn) == (49_152, 576, 30, 9, 3, 1536),
    config: include_str!("../../models/smollm2-135m-draft/config.json"),
    weights: include_bytes!("../../models/smollm2-135m-draft/model.safetensors"),
}];

fn same_vocabulary(path: &Path, target: &ModelConfig, draft: &ModelConfig) -> Result<()> {
    let (t, d) = (target.vocab, draft.vocab);
    ensure!(t == d, Config, "{}: the draft has a vocabulary of {d} tokens, the target one of {t}", path.display());
    Ok(())
}

/// Ids must mean the same: drafts propose ids.
fn same_tokens(path: &Path, target: &Tokenizer, draft: &Tokenizer, vocab: usize) -> Result<()> {
    for id in 0..vocab as u32 {
        let (t, d) = (target.token_bytes(id), draft.token_bytes(id));
        if t != d {
            let show = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
            let (t, d) = (show(&t), show(&d));
            let what = format!(
                "{}: token {id} is {d:?} in the draft and {t:?} in the target: a draft needs the target's tokenizer",
                path.display()
            );
            return Err(Error::new(ErrorKind::Tokenizer, what));
        }
    }
    Ok(())
}
