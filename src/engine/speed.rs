//! How fast a model trains: steps over random tokens.

use std::path::Path;
use std::time::Instant;

use super::{EngineOptions, Method, OnDevice, on_device};
use crate::backend::Train;
use crate::error::Result;
use crate::format::Checkpoint;
use crate::model::roles::Role;
use crate::model::{ModelConfig, Recompute};
use crate::rng::Rng;
use crate::train::{Batch, Settings, Trainer};

/// What to measure.
#[derive(Clone, Debug)]
pub struct TrainBench {
    /// What trains.
    pub method: Method,
    /// Tokens of the one sequence of a step; all but the first are labels.
    pub tokens: usize,
    /// Steps that are timed, behind two that are not.
    pub steps: usize,
    /// What the backward pass computes again.
    pub recompute: Recompute,
}

/// Seconds and operations.
#[derive(Clone, Debug, Default)]
pub struct TrainSpeed {
    /// Seconds of each step, sorted.
    pub steps: Vec<f64>,
    /// Seconds of each forward pass with its loss, sorted.
    pub forwards: Vec<f64>,
    /// Floating-point operations of a step: products of weights, of attention and of adapters; what is computed twice
    /// counts once.
    pub flops: f64,
}

/// Times steps of `what` on the model at `model`.
///
/// # Errors
/// Files or device, by name.
pub fn train_speed(model: &Path, what: &TrainBench, options: EngineOptions) -> Result<TrainSpeed> {
    on_device(options, Job { checkpoint: &Checkpoint::open(model)?, what })
}

struct Job<'a> {
    checkpoint: &'a Checkpoint,
    what: &'a TrainBench,
}

/// Operations of a step over one causal sequence of `n` tokens.
fn flops(cfg: &ModelConfig, what: &TrainBench) -> f64 {
    let n = what.tokens as f64;
    let values = |r: Role| r.shape(cfg).map_or(0.0, |[o, i]| (o * i) as f64);
    let matrices = Role::all(cfg).filter(|r| !r.is_vector() && !matches!(r, Role::Embed | Role::Head));
    let linear: f64 = matrices.map(values).sum();
    let head = values(Role::Embed);
    // Scores and values, over the half that is visible; five such products backward.
    let attention = 4.0 * (n + 1.0) / 2.0 * (cfg.layers * cfg.q_dim()) as f64;
    let (backward, extra) = match &what.method {
        Method::Lora(lora) => {
            let modules = lora.modules(cfg).unwrap_or_default();
            let shape = |m: &crate::model::lora::ModuleSpec| {
                Role::Layer(m.layer, m.role).shape(cfg).map_or(0.0, |[o, i]| ((o + i) * m.rank) as f64)
            };
            (1.0, 6.0 * modules.iter().map(shape).sum::<f64>())
        }
        Method::Full => (2.0, 0.0),
    };
    n * (2.0 * (linear + head) * (1.0 + backward) + 3.5 * attention + extra)
}

impl OnDevice for Job<'_> {
    type Out = TrainSpeed;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<TrainSpeed> {
        let Self { checkpoint, what } = self;
        let (model, trainable) = what.method.load(be, checkpoint, 0, options)?;
        let (mut rng, n, cfg) = (Rng::new(0), what.tokens, model.config().clone());
        let tokens: Vec<u32> = (0..n).map(|_| rng.below(cfg.vocab) as u32).collect();
        let labels = (1..n).map(|i| (i as u32 - 1, tokens[i])).collect();
        let batch = Batch { tokens, lens: vec![n], labels, ids: Vec::new() };
        let settings = Settings { lr: 1e-5, ..Settings::default() };
        let mut trainer = Trainer::new(model, trainable, settings, n, what.recompute)?;
        let mut out = TrainSpeed { flops: flops(&cfg, what), ..TrainSpeed::default() };
        let batches = [batch];
        for i in 0..what.steps + 2 {
            let start = Instant::now();
            trainer.step(&batches)?;
            if i >= 2 {
                out.steps.push(start.elapsed().as_secs_f64());
            }
        }
        for _ in 0..what.steps {
            let start = Instant::now();
            trainer.evaluate(&batches)?;
            out.forwards.push(start.elapsed().as_secs_f64());
        }
        out.steps.sort_by(f64::total_cmp);
        out.forwards.sort_by(f64::total_cmp);
        Ok(out)
    }
}
