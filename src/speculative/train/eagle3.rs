//! [`Eagle3`]: an EAGLE-3 head as a draft that learns.

use std::sync::Arc;

use super::pass::{DraftVocab, HeadPass, Sequence};
use super::saved::HeadSaved;
use super::trainable::{Measured, Trainable};
use super::weights::{EagleHead, HeadConfig, Tensors};
use crate::backend::Train;
use crate::error::{Result, ensure};
use crate::model::roles::NamedTensors;
use crate::model::{Model, Param};
use crate::train::checkpoint::NamedTensor;

/// A head on a target that serves, with the room of its training.
pub struct Eagle3<B: Train> {
    target: Arc<Model<B>>,
    head: EagleHead<B>,
    saved: HeadSaved<B>,
    vocab: DraftVocab,
    /// Tokens of the teacher that are learnt one by one.
    k: usize,
    /// Of the unrolled steps.
    weights: Vec<f32>,
}

impl<B: Train> Eagle3<B> {
    /// From a head's tensors, by their published names. Passes have up to `rows` rows; of the teacher `k` tokens count one by one; step i
    /// weighs `weights[i]`.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit the target; no memory.
    pub fn new(
        target: Arc<Model<B>>,
        head: &dyn NamedTensors,
        rows: usize,
        k: usize,
        weights: Vec<f32>,
    ) -> Result<Self> {
        let (layer, all) = (head.layer()?, target.config().vocab);
        let hidden = target.config().hidden;
        ensure!(layer.hidden == hidden, Config, "hidden_size is {}, the target's {hidden}", layer.hidden);
        let vocab = match head.shape("d2t") {
            Some(_) => {
                let ids = head.integers("d2t")?.into_iter().zip(0i64..).map(|(offset, i)| (i + offset) as u32);
                DraftVocab::new(ids.collect(), all)?
            }
            None => DraftVocab::all(all),
        };
        let fc = head.shape("fc.weight").and_then(|s| s.get(1).copied()).unwrap_or(0);
        let taps = fc / hidden;
        ensure!(taps > 0 && fc == taps * hidden, Weights, "fc.weight: {fc} columns for features of {hidden}");
        let cfg = HeadConfig::new(&layer, taps, vocab.d2t().len());
        let mut tensors = Tensors::new();
        for (name, [rows, cols]) in cfg.tensors() {
            let found = head.tensor(name)?;
            let shape = [found.rows, found.cols];
            ensure!(shape == [rows, cols], Weights, "{name}: expected {:?}, file has {shape:?}", [rows, cols]);
            tensors.insert(name.to_owned(), found.to_f32());
        }
        let be = target.backend();
        let saved = HeadSaved::new(be, &cfg, rows, weights.len())?;
        let head = EagleHead::new(be, cfg, &tensors)?;
        Ok(Self { head, saved, vocab, k, weights, target })
    }
}

impl<B: Train> Trainable<B> for Eagle3<B> {
    fn params(&self) -> Vec<&Param<B>> {
        self.head.params().collect()
    }

    fn params_mut(&mut self) -> Vec<&mut Param<B>> {
        self.head.params_mut().collect()
    }

    fn refresh(&mut self) -> Result<()> {
        self.head.refresh(self.target.backend())
    }

    fn pass(&mut self, sequences: &[&Sequence], learn: bool) -> Result<Measured> {
        let (cfg, most) = (self.head.config(), self.saved.rows);
        let mut passes = HeadPass::packed(cfg, sequences, &self.vocab, self.k, most)?;
        passes.retain(|p| p.active(0) > 0);
        let steps = self.weights.len();
        let active = |i: usize| passes.iter().map(|p| p.active(i)).sum::<usize>();
        let weights: Vec<f32> = self.weights.iter().enumerate().map(|(i, w)| w / active(i).max(1) as f32).collect();
        let mut found = Measured { rows: active(0), ..Measured::default() };
        let total: f64 = self.weights.iter().copied().map(f64::from).sum();
        let Self { target, head, saved, .. } = self;
        let be = target.backend();
        for pass in &passes {
            head.forward(be, target.embedding(), pass, saved)?;
            let said = head.say(be, pass, saved, &weights, learn, true)?;
            if learn {
                head.backward(be, pass, saved)?;
            }
            for (losses, w) in said.loss.iter().zip(&weights) {
                found.loss += f64::from(*w) * losses.iter().sum::<f64>() / total;
            }
            found.count(pass.slots(), steps, |s, i| pass.wanted(s, i).map(|wanted| said.token[i][s] == wanted));
        }
        Ok(found)
    }

    fn to_host(&self) -> Result<Vec<NamedTensor>> {
        self.head.to_host(self.target.backend())
    }
}
