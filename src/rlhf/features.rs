//! [`Extractor`]: phi(prompt, answer), what a reward sees of an answer: hidden states of the model itself.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::{Buffer, In, Mask, Train, TreeMask};
use crate::decode::Session;
use crate::error::{Result, ensure};
use crate::model::{Model, Want};

/// Rows of a pass: enough to be bound by arithmetic, and so few that a row's attention to its siblings costs nothing.
const ROWS: usize = 128;

/// Which hidden states make a feature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// That of the answer's last token, which is the end token where the model has one.
    Last,
    /// The mean over the answer's tokens without its end token: better for what an answer says than for how it ends.
    #[default]
    Mean,
}

/// How a feature is made. Positions are always those of the answer's own tokens; none is inferred from padding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureSpec {
    /// Pooling.
    #[serde(default)]
    pub pool: Pooling,
    /// Layer at whose input the residual stream is read, 0 the embedding; `None`: behind the last layer and the final norm.
    #[serde(default)]
    pub layer: Option<usize>,
    /// Divide by the Euclidean norm.
    #[serde(default)]
    pub unit: bool,
}

impl FeatureSpec {
    /// The tap of a workspace that it reads, in a model of so many layers.
    pub fn tap(&self, layers: usize) -> usize {
        self.layer.unwrap_or(layers)
    }
}

/// An answer as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    /// Ids of its text, without an end token.
    pub ids: Vec<u32>,
    /// The token that ends it, where the model has one. It is read even where generation was cut: how the model sees an end here.
    pub end: Option<u32>,
}

impl Tokens {
    /// Rows that it takes in a pass.
    pub fn rows(&self) -> usize {
        self.ids.len() + usize::from(self.end.is_some())
    }

    fn all(&self) -> impl Iterator<Item = u32> {
        self.ids.iter().copied().chain(self.end)
    }

    /// Of rows that begin at `first`, those that are pooled.
    pub(super) fn pooled(&self, pool: Pooling, first: usize) -> Range<usize> {
        match pool {
            Pooling::Mean if !self.ids.is_empty() => first..first + self.ids.len(),
            _ => first + self.rows() - 1..first + self.rows(),
        }
    }
}

/// Hidden states to features, on the device.
pub struct Pooler<B: Train> {
    model: Arc<Model<B>>,
    spec: FeatureSpec,
    normed: B::Buf<B::Acc>,
    pooled: B::Buf<B::Acc>,
    rows: usize,
}

impl<B: Train> Pooler<B> {
    /// For up to `rows` hidden states at a time.
    ///
    /// # Errors
    /// A layer that the model lacks; the device's.
    pub fn new(model: Arc<Model<B>>, spec: FeatureSpec, rows: usize) -> Result<Self> {
        let (be, cfg) = (model.backend(), model.config());
        let (tap, layers) = (spec.tap(cfg.layers), cfg.layers);
        ensure!(tap <= layers, Usage, "features at the input of layer {tap}: the model has {layers}");
        let [normed, pooled] = [be.alloc(rows * cfg.hidden)?, be.alloc(rows * cfg.hidden)?];
        Ok(Self { spec, normed, pooled, rows, model })
    }

    /// A feature for each range of the rows `x`, `[rows, hidden]`.
    ///
    /// # Errors
    /// More rows than planned; the device's.
    pub fn of(&mut self, x: In<'_, B, B::Acc>, rows: usize, ranges: &[Range<usize>]) -> Result<Vec<Vec<f32>>> {
        let (be, cfg) = (self.model.backend(), self.model.config());
        let (n, d) = (rows * cfg.hidden, cfg.hidden);
        ensure!(rows <= self.rows, Capacity, "{rows} hidden states, of {} that are planned", self.rows);
        let m = ranges.len() * d;
        if self.spec.layer.is_some() {
            be.mean_rows(self.pooled.head_mut(m), x, ranges, d)?;
        } else {
            be.zero(self.normed.head_mut(n))?;
            be.add_normed(self.normed.head_mut(n), x, self.model.final_norm(), cfg.eps)?;
            be.mean_rows(self.pooled.head_mut(m), self.normed.head(n), ranges, d)?;
        }
        let mut out = vec![0.0; m];
        be.download_acc(self.pooled.head(m), &mut out)?;
        Ok(out.chunks_exact(d).map(|row| self.finish(row)).collect())
    }

    fn finish(&self, row: &[f32]) -> Vec<f32> {
        let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        match self.spec.unit && norm > 0.0 {
            true => row.iter().map(|&x| (f64::from(x) / norm) as f32).collect(),
            false => row.to_vec(),
        }
    }
}

/// Reads prompts and their answers. All answers of a prompt are branches of one tree behind it: the prompt is computed once,
/// nothing is padded, and an answer's feature is the same bits whatever stands beside it.
pub struct Extractor<B: Train> {
    session: Session<B>,
    pooler: Pooler<B>,
}

impl<B: Train> Extractor<B> {
    /// For prompts that have, with one answer, up to `capacity` tokens.
    ///
    /// # Errors
    /// A capacity beyond the model's context; as [`Pooler::new`].
    pub fn new(model: Arc<Model<B>>, spec: FeatureSpec, capacity: usize) -> Result<Self> {
        let tap = spec.tap(model.config().layers);
        let pooler = Pooler::new(model.clone(), spec, capacity.max(ROWS))?;
        // A tree of short answers may have more rows than the longest one.
        let room = (capacity + ROWS).min(model.config().context).max(capacity);
        Ok(Self { session: Session::of_rows(model, room, 0, &[tap], ROWS)?, pooler })
    }

    /// The features of `answers` to `prompt`, `[hidden]` each.
    ///
    /// # Errors
    /// An empty prompt or answer, more tokens than the capacity; the device's.
    pub fn of(&mut self, prompt: &[u32], answers: &[Tokens]) -> Result<Vec<Vec<f32>>> {
        ensure!(!prompt.is_empty(), Usage, "the prompt is empty: there is nothing that was answered");
        ensure!(answers.iter().all(|a| a.rows() > 0), Usage, "an empty answer has no feature");
        let room = self.session.capacity();
        let longest = prompt.len() + answers.iter().map(Tokens::rows).max().unwrap_or(0);
        ensure!(longest <= room, Capacity, "a prompt and its answer have {longest} tokens, of {room} that are planned");
        self.read(prompt)?;
        let most = self.rows().min(room - prompt.len());
        let mut features = Vec::with_capacity(answers.len());
        let mut rest = answers;
        while let Some(first) = rest.first() {
            let mut rows = 0;
            let fits = |a: &&Tokens| {
                rows += a.rows();
                rows <= most
            };
            let n = rest.iter().take_while(fits).count();
            if n == 0 {
                features.push(self.long(prompt.len(), first)?);
                rest = &rest[1..];
            } else {
                features.extend(self.tree(&rest[..n])?);
                rest = &rest[n..];
            }
        }
        Ok(features)
    }

    fn rows(&self) -> usize {
        self.session.workspace().max_rows()
    }

    /// The session is left at the end of `prompt`; what is there of it stays.
    fn read(&mut self, prompt: &[u32]) -> Result<()> {
        let s = &mut self.session;
        let same = s.tokens().iter().zip(prompt).take_while(|(a, b)| a == b).count();
        s.truncate(same);
        self.commit(&prompt[same..])
    }

    fn commit(&mut self, tokens: &[u32]) -> Result<()> {
        for chunk in tokens.chunks(self.rows()) {
            self.session.stage(chunk, Mask::Causal, Want::Nothing)?;
            self.session.commit(&Vec::from_iter(0..chunk.len() as u32))?;
        }
        Ok(())
    }

    /// Short answers, in one pass that nothing is kept of.
    fn tree(&mut self, answers: &[Tokens]) -> Result<Vec<Vec<f32>>> {
        let (mut tokens, mut parents, mut ranges) = (Vec::new(), Vec::new(), Vec::new());
        for a in answers {
            let first = tokens.len();
            ranges.push(a.pooled(self.pooler.spec.pool, first));
            tokens.extend(a.all());
            parents.push(TreeMask::ROOT);
            parents.extend(first as u32..tokens.len() as u32 - 1);
        }
        self.session.stage(&tokens, Mask::Tree(&TreeMask::new(&parents)?), Want::Nothing)?;
        let rows = tokens.len();
        self.pooler.of(self.session.workspace().features(0, rows), rows, &ranges)
    }

    /// An answer that takes several passes.
    fn long(&mut self, at: usize, answer: &Tokens) -> Result<Vec<f32>> {
        self.commit(&Vec::from_iter(answer.all()))?;
        let feature = feature(&mut self.pooler, &self.session, at, answer);
        self.session.truncate(at);
        feature
    }
}

/// The feature of an answer whose tokens, its end among them, `session` has committed from position `at` on.
///
/// # Errors
/// Rows that are not committed; the device's.
pub fn feature<B: Train>(pooler: &mut Pooler<B>, session: &Session<B>, at: usize, answer: &Tokens) -> Result<Vec<f32>> {
    let rows = answer.rows();
    let states = session.feature_rows(0, at..at + rows)?;
    let range = answer.pooled(pooler.spec.pool, 0);
    Ok(pooler.of(states, rows, &[range])?.swap_remove(0))
}
