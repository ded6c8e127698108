//! A smaller model that drafts ([`SmallModel`](crate::speculative::SmallModel)) and learns with a LoRA adapter.
//!
//! Loss: mean cross-entropy of the target's likeliest tokens behind each position of the continuation. [`Model::merged`] gives the model
//! that drafts as the adapter was trained; [`Adapter::mix`] is the weighted sum of adapters as one.

use std::sync::Arc;

use super::pass::{Sequence, extent, within};
use super::trainable::{Measured, Trainable};
use crate::backend::{Backend, Target, Train};
use crate::error::{Result, ensure};
use crate::model::roles::LayerRole;
use crate::model::{Adapter, Head, Model, ModelConfig, Param, Pass, Recompute, Saved};
use crate::train::checkpoint::NamedTensor;

/// Rows of logits that exist at a time.
const TILE: usize = 256;

/// What A and B of a layer's linear are called, if a model has it.
pub type Names = fn(&ModelConfig, usize, LayerRole) -> Option<[String; 2]>;

/// A model with an adapter that trains, and the room for passes.
pub struct SmallModelLora<B: Backend> {
    model: Arc<Model<B>>,
    adapter: Adapter<B>,
    /// Of a pass; teacher's tokens; steps that are counted.
    rows: usize,
    k: usize,
    steps: usize,
    saved: Saved<B>,
    head: Head<B>,
    names: Names,
}

impl<B: Train> SmallModelLora<B> {
    /// `adapter` on `model`, in passes of up to `rows` tokens; `k` tokens of each teacher are learnt, `steps` counted. Its tensors are
    /// called as `names` says.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        model: Arc<Model<B>>,
        mut adapter: Adapter<B>,
        rows: usize,
        k: usize,
        steps: usize,
        names: Names,
    ) -> Result<Self> {
        ensure!(rows > 0 && k > 0 && steps > 0, Usage, "training of {rows} rows, {k} tokens, {steps} steps");
        let (be, cfg) = (model.backend(), model.config());
        adapter.train(be, |_| true)?;
        let lowest = adapter.lowest().unwrap_or(0);
        let saved = Saved::new(be, cfg, rows, rows, Some(&adapter), lowest, Recompute::default())?;
        let head = Head::new(&model, rows, TILE)?;
        Ok(Self { adapter, rows, k, steps, saved, head, model, names })
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter<B> {
        &self.adapter
    }

    /// The model without it.
    pub fn model(&self) -> &Arc<Model<B>> {
        &self.model
    }

    /// One pass over `sequences`, whose rows weigh `weight` each.
    fn group(&mut self, sequences: &[&Sequence], weight: f32, learn: bool, measured: &mut Measured) -> Result<()> {
        let Self { model, adapter, k, steps, saved, head, .. } = self;
        let (mut tokens, mut lens, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        let (mut ids, mut p) = (Vec::new(), Vec::new());
        for s in sequences {
            let (at, n, t) = (tokens.len(), s.tokens.len() - 1, &s.teacher);
            let fits = t.k >= *k && t.ids.len() == (n - s.prompt) * t.k && t.p.len() == t.ids.len();
            ensure!(fits, Shape, "a teacher of {} tokens for {} positions does not fit", t.ids.len(), n - s.prompt);
            tokens.extend(&s.tokens[..n]);
            lens.push(n);
            wanted.extend((at + s.prompt..at + n).map(|r| r as u32));
            ids.extend(t.ids.chunks(t.k).flat_map(|row| &row[..*k]));
            p.extend(t.p.chunks(t.k).flat_map(|row| &row[..*k]));
        }
        let pass = Pass::causal(model.config(), tokens, &lens, wanted)?;
        model.forward_saved(&pass, Some(&*adapter), saved)?;
        if !learn {
            let said = model.likeliest(&pass, saved, head)?;
            let right: Vec<bool> = said.iter().zip(ids.chunks(*k)).map(|(said, ids)| *said == ids[0]).collect();
            let mut at = 0;
            for (s, n) in sequences.iter().zip(lens) {
                let right = &right[at..at + n - s.prompt];
                measured.count(right.len(), *steps, |row, i| right.get(row + i).copied());
                at += right.len();
            }
        }
        let of = |r: std::ops::Range<usize>| r.start * *k..r.end * *k;
        let target =
            |r: std::ops::Range<usize>| Target::TopK { ids: &ids[of(r.clone())], p: &p[of(r)], k: *k, tail: true };
        let weights = vec![weight; pass.wanted().len()];
        let losses = model.head(&pass, saved, head, target, &weights, learn, None)?;
        measured.loss += f64::from(weight) * losses.iter().sum::<f64>();
        if learn {
            model.backward(&pass, saved, head, Some(adapter), None)?;
        }
        Ok(())
    }
}

impl<B: Train> Trainable<B> for SmallModelLora<B> {
    fn params(&self) -> Vec<&Param<B>> {
        self.adapter.params().collect()
    }

    fn params_mut(&mut self) -> Vec<&mut Param<B>> {
        self.adapter.params_mut().collect()
    }

    fn refresh(&mut self) -> Result<()> {
        Ok(()) // Products read the masters.
    }

    fn pass(&mut self, sequences: &[&Sequence], learn: bool) -> Result<Measured> {
        let slots = |s: &Sequence| extent(s.prompt, s.tokens.len()).map_or(0, |[_, slots]| slots);
        let trained: Vec<&Sequence> = sequences.iter().copied().filter(|s| slots(s) > 0).collect();
        let mut measured = Measured { rows: trained.iter().map(|s| slots(s)).sum(), ..Measured::default() };
        let weight = 1.0 / measured.rows.max(1) as f32;
        for group in within(trained.iter().map(|s| s.tokens.len() - 1), self.rows)? {
            self.group(&trained[group], weight, learn, &mut measured)?;
        }
        Ok(measured)
    }

    fn is_linear(&self) -> bool {
        false
    }

    fn to_host(&self) -> Result<Vec<NamedTensor>> {
        let (be, cfg, mut all) = (self.model.backend(), self.model.config(), Vec::new());
        for m in self.adapter.to_host(be)? {
            let names = (self.names)(cfg, m.spec.layer, m.spec.role).into_iter().flatten();
            let (input, output) = (m.a.len() / m.spec.rank, m.b.len() / m.spec.rank);
            let shapes = [vec![m.spec.rank, input], vec![output, m.spec.rank]];
            all.extend(names.zip(shapes).zip([m.a, m.b]).map(|((name, shape), values)| (name, shape, values)));
        }
        Ok(all)
    }
}
