//! What each sparse lever of continual learning saves of a step of LoRA training.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use super::{EngineOptions, Lora, OnDevice, on_device};
use crate::backend::{Target, Train};
use crate::error::{Context, Result, ensure};
use crate::format::Checkpoint;
use crate::model::{Adapter, Model, Pass, Recompute, Term};
use crate::rng::Rng;
use crate::train::{Settings, Trainable, Trainer};

/// What to measure: a step of some sequences of one length, each with one label at its end where the head is sparse.
#[derive(Clone, Debug)]
pub struct LeverBench {
    /// The adapter; its `top_layers` are those that the truncated levers keep.
    pub lora: Lora,
    /// Sequences of a step.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Steps that are timed of each lever, behind one that is not.
    pub steps: usize,
}

/// A way to make a step, the next one sparser than the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lever {
    /// Adapters in all layers, a loss on every token.
    Plain,
    /// The vocabulary matrix for labelled rows only.
    LabelHead,
    /// Adapters in the upper layers, where the backward pass ends.
    Truncated,
    /// The same with what the layers below give kept from an earlier pass.
    CachedPrefix,
    /// The same, forward only: an adapter that serves a task as it is.
    Reused,
}

impl Lever {
    /// All, in order.
    pub const ALL: [Lever; 5] = [Lever::Plain, Lever::LabelHead, Lever::Truncated, Lever::CachedPrefix, Lever::Reused];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Lever::Plain => "plain",
            Lever::LabelHead => "label_head",
            Lever::Truncated => "truncated",
            Lever::CachedPrefix => "cached_prefix",
            Lever::Reused => "reused",
        }
    }
}

/// Seconds of each lever's steps, sorted, in the order of [`Lever::ALL`].
///
/// # Errors
/// Files, adapter or device, by name.
pub fn lever_speed(model: &Path, what: &LeverBench, options: EngineOptions) -> Result<Vec<Vec<f64>>> {
    ensure!(what.sequences > 0 && what.length > 1 && what.steps > 0, Usage, "a step of no tokens measures nothing");
    on_device(options, Job { checkpoint: &Checkpoint::open(model)?, what })
}

struct Job<'a> {
    checkpoint: &'a Checkpoint,
    what: &'a LeverBench,
}

impl OnDevice for Job<'_> {
    type Out = Vec<Vec<f64>>;
    fn run<B: Train>(self, be: B, _: &EngineOptions) -> Result<Vec<Vec<f64>>> {
        let Self { checkpoint, what } = self;
        let mut model = Model::load(std::sync::Arc::new(be), checkpoint, |_, _| {}).context(|| "weights".into())?;
        let mut rng = Rng::new(0);
        let rows = what.sequences * what.length;
        let mut all = Vec::new();
        for lever in Lever::ALL {
            let cfg = model.config().clone();
            let tokens: Vec<u32> = (0..rows).map(|_| rng.below(cfg.vocab) as u32).collect();
            let top = if matches!(lever, Lever::Plain | Lever::LabelHead) { 0 } else { what.lora.top_layers };
            let lora = Lora { top_layers: top, ..what.lora.clone() };
            let mut adapter = Adapter::init(model.backend(), &cfg, &lora.modules(&cfg)?, 0)?;
            adapter.train(model.backend(), |_| true)?;
            let cut = adapter.lowest().unwrap_or(0);
            let settings = Settings { lr: 1e-5, ..Settings::default() };
            let trainable = Trainable::Adapter(adapter);
            let mut trainer = Trainer::new(model, trainable, settings, rows, Recompute::default())?;
            let last = |r: u32| (r as usize + 1).is_multiple_of(what.length);
            let wanted: Vec<u32> = (0..rows as u32).filter(|&r| lever == Lever::Plain || last(r)).collect();
            let ids: Vec<u32> = wanted.iter().map(|_| rng.below(cfg.vocab) as u32).collect();
            let pass = Pass::causal(&cfg, tokens, &vec![what.length; what.sequences], wanted)?;
            let cached = matches!(lever, Lever::CachedPrefix | Lever::Reused);
            let hidden = if cached { trainer.hidden_at(&pass, &[cut])?.swap_remove(0) } else { Vec::new() };
            let weights = vec![1.0 / ids.len() as f32; ids.len()];
            let mut seconds = Vec::new();
            for i in 0..=what.steps {
                let start = Instant::now();
                if cached {
                    trainer.forward_from(&pass, cut, &hidden)?;
                } else {
                    trainer.forward(&pass)?;
                }
                let learns = lever != Lever::Reused;
                let target = |r: Range<usize>| Target::Hard(&ids[r]);
                trainer.backward(&pass, &[Term { target: &target, weights: &weights }], learns)?;
                if learns {
                    trainer.update()?;
                }
                if i > 0 {
                    seconds.push(start.elapsed().as_secs_f64());
                }
            }
            seconds.sort_by(f64::total_cmp);
            all.push(seconds);
            model = trainer.into_parts().0;
        }
        Ok(all)
    }
}
