//! [`TaskRouter`]: the adapter of a stream's task for each prompt.

use std::path::Path;

use super::adapt::{ROUTER, Routing};
use super::{AdapterPool, Adapters, Engine, PoolOptions};
use crate::continual::Ready;
use crate::continual::language::feature;
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::model::{Model, Pass, Recompute, Saved};

/// The adapters of a run of [`AdaptRun`](super::AdaptRun), and which of them a prompt gets.
pub struct TaskRouter {
    pool: AdapterPool,
    routing: Routing,
    /// The routing's router, its metric worked out.
    router: Ready,
}

/// Where a prompt went.
#[derive(Clone, Debug)]
pub struct Routed {
    /// Name of the task.
    pub task: String,
    /// How much farther the next task is: 0 as near, towards 1 much farther.
    pub margin: f64,
    /// Its adapter, for [`Generate::adapters`](super::Generate::adapters).
    pub adapters: Adapters,
}

impl TaskRouter {
    /// Whether `folder` is a run with a router, and not an adapter.
    pub fn is_run(folder: &Path) -> bool {
        folder.join(ROUTER).is_file()
    }

    /// The tasks, in the order in which they were learnt.
    pub fn tasks(&self) -> &[String] {
        &self.routing.tasks
    }

    /// The task that `prompt` looks like to the model without adapters.
    ///
    /// # Errors
    /// An empty prompt; an adapter that cannot be read, by name; the device's.
    pub fn route(&self, prompt: &[u32]) -> Result<Routed> {
        ensure!(!prompt.is_empty(), Usage, "the prompt is empty: there is nothing to route by");
        let feature = self.pool.engine().0.model.features(prompt, self.routing.layer)?;
        let (k, margin) = self.router.route(&feature)?;
        let task = self.routing.tasks[k].clone();
        Ok(Routed { adapters: self.pool.get(&task)?, task, margin })
    }

    /// The pool that the adapters lie in, by the names of their tasks.
    pub fn pool(&self) -> &AdapterPool {
        &self.pool
    }
}

impl Engine {
    /// The router of the run in `folder`, whose adapters are loaded as prompts ask for them.
    ///
    /// # Errors
    /// A file that is missing, damaged, or of another model's run, by name.
    pub fn task_router(&self, folder: &Path, options: PoolOptions) -> Result<TaskRouter> {
        let path = folder.join(ROUTER);
        let text = std::fs::read(&path).map_err(|e| Error::io(path.display(), e))?;
        let damaged = |e| Error::with_source(ErrorKind::Config, "not the router of a run of `adapt`", e);
        let routing: Routing = serde_json::from_slice(&text).map_err(damaged).context(|| path.display().to_string())?;
        let (at, cfg) = (path.display(), self.config());
        let fits = routing.layer <= cfg.layers && routing.router.width() == 2 * cfg.hidden;
        ensure!(fits, Config, "{at}: of another model: a router of width {}", routing.router.width());
        let n = routing.tasks.len();
        let whole = n > 0 && routing.adapters.len() == n && routing.router.tasks() == n;
        ensure!(whole, Config, "{at}: {n} tasks, {} adapters", routing.adapters.len());
        let router = routing.router.ready().context(|| path.display().to_string())?;
        let pool = self.adapter_pool(options)?;
        for (task, adapter) in routing.tasks.iter().zip(&routing.adapters) {
            pool.register(task, folder.join(adapter));
        }
        Ok(TaskRouter { pool, routing, router })
    }
}

/// What the router sees of a prompt: see [`feature`].
pub(super) fn features<B: crate::backend::Train>(model: &Model<B>, prompt: &[u32], layer: usize) -> Result<Vec<f32>> {
    let (be, cfg) = (model.backend(), model.config());
    // As the stream computed it, in whatever way the sessions compute.
    let pass = Pass::causal(cfg, prompt.to_vec(), &[prompt.len()], Vec::new())?;
    let mut saved = Saved::new(be, cfg, prompt.len(), 1, None, cfg.layers - 1, Recompute::Layer)?;
    let hidden = model.hidden_at(&pass, None, &[layer], &mut saved)?;
    Ok(feature(&hidden[0], cfg.hidden))
}
