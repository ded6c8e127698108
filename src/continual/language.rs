//! [`Language`]: a language model that learns tasks whose answers are labels.

use std::ops::Range;

use sha2::{Digest, Sha256};

use super::inflora;
use super::labels::Labels;
use super::layout::Layout;
use super::learner::{Learner, Moments, Penalty, Sample, Split};
use crate::backend::{Target, Train, Visible};
use crate::error::{Result, bail, ensure};
use crate::model::roles::LayerRole;
use crate::model::{Model, Pass, Term};
use crate::train::{Report, Trainable, Trainer};

/// A prompt and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextExample {
    /// Tokens before the label.
    pub prompt: Vec<u32>,
    /// The right class, of those of the stream.
    pub class: usize,
}

/// A task of a stream, in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextTask {
    /// Its name.
    pub name: String,
    /// Its classes, of those of the stream.
    pub classes: Vec<usize>,
    /// Training and test examples.
    pub examples: [Vec<TextExample>; 2],
}

/// How a language model learns a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LanguageSettings {
    /// The residual stream at the input of this layer is what the router sees.
    pub router_layer: usize,
    /// Keeps the residual stream at the input of the lowest adapted layer, where that is not the first: layers below run once for
    /// each example instead of in every epoch and test.
    pub cache: bool,
    /// Learns that the end token follows the label. Signatures and tests do not look at it.
    pub end: bool,
    /// Most rows in a pass, unless one example has more.
    pub rows: usize,
}

/// What no training changes, of a task's training or test examples.
struct Frozen {
    /// The residual stream of each example's rows at the cut, where it is kept.
    hidden: Vec<Vec<f32>>,
    features: Vec<Vec<f32>>,
}

/// A stream's tasks in tokens, with what a model's frozen layers gave for them.
pub struct TextStream {
    tasks: Vec<TextTask>,
    labels: Vec<Vec<u32>>,
    end: u32,
    trie: Labels,
    frozen: Vec<[Option<Frozen>; 2]>,
    /// At the inputs of which layers: where the router looks, and the lowest adapted one, where that is kept.
    kept_at: [Option<usize>; 2],
}

impl TextStream {
    /// `labels` are the tokens of the stream's classes, without the end token `end`.
    ///
    /// # Errors
    /// Labels that cannot be told apart.
    pub fn new(tasks: Vec<TextTask>, labels: Vec<Vec<u32>>, end: u32) -> Result<Self> {
        let trie = Labels::new(&labels, end)?;
        let frozen = tasks.iter().map(|_| [None, None]).collect();
        Ok(Self { tasks, labels, end, trie, frozen, kept_at: [None, None] })
    }

    /// Most rows that an example has in a pass.
    pub fn longest(&self) -> usize {
        let label = self.labels.iter().map(Vec::len).max().unwrap_or(0);
        let examples = self.tasks.iter().flat_map(|t| t.examples.iter().flatten());
        examples.map(|e| e.prompt.len()).max().unwrap_or(0) + label.max(self.trie.rows().len())
    }

    /// SHA-256 of all tokens and classes, in hexadecimal: whether two streams are one.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        let mut put = |list: &[u32]| {
            hash.update((list.len() as u64).to_le_bytes());
            list.iter().for_each(|t| hash.update(t.to_le_bytes()));
        };
        self.labels.iter().for_each(|l| put(l));
        for task in &self.tasks {
            for examples in &task.examples {
                put(&[examples.len() as u32]);
                examples.iter().for_each(|e| put(&[&e.prompt[..], &[e.class as u32]].concat()));
            }
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Forgets what frozen layers gave, unless it was for these layers.
    fn keep_at(&mut self, layers: [Option<usize>; 2]) {
        if self.kept_at != layers {
            self.frozen = self.tasks.iter().map(|_| [None, None]).collect();
            self.kept_at = layers;
        }
    }
}

/// A model with an adapter that trains, and a stream's tasks.
pub struct Language<B: Train> {
    trainer: Trainer<B>,
    layout: Layout,
    roles: Vec<LayerRole>,
    stream: TextStream,
    settings: LanguageSettings,
    /// The lowest adapted layer.
    cut: usize,
}

/// The rows of some examples in one pass.
struct Rows {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    visible: Visible,
    wanted: Vec<u32>,
    /// Of the examples.
    ranges: Vec<Range<usize>>,
}

impl<B: Train> Language<B> {
    /// The trainer's passes hold the stream's longest example. What the stream keeps of frozen layers must be this model's.
    ///
    /// # Errors
    /// A trainer without an adapter that trains; a layer for the router that is not there.
    pub fn new(trainer: Trainer<B>, mut stream: TextStream, settings: LanguageSettings) -> Result<Self> {
        let Trainable::Adapter(adapter) = trainer.trainable() else {
            bail!(Usage, "a stream is learnt with an adapter");
        };
        let Some(cut) = adapter.lowest() else { bail!(Usage, "no layer of the adapter trains") };
        let (layout, roles) = (Layout::of_adapter(adapter), adapter.places().iter().map(|p| p.spec.role).collect());
        let layers = trainer.model().config().layers;
        ensure!(settings.router_layer <= layers, Usage, "the router's layer {} of {layers}", settings.router_layer);
        stream.keep_at([Some(settings.router_layer), (settings.cache && cut > 0).then_some(cut)]);
        Ok(Self { trainer, layout, roles, stream, settings, cut })
    }

    /// The model and the stream, for another adapter.
    pub fn into_parts(self) -> (Model<B>, TextStream) {
        (self.trainer.into_parts().0, self.stream)
    }

    /// The trainer.
    pub fn trainer(&self) -> &Trainer<B> {
        &self.trainer
    }

    /// Bytes of the residual streams that are kept.
    pub fn cached_bytes(&self) -> usize {
        let kept = self.stream.frozen.iter().flatten().flatten();
        kept.flat_map(|f| &f.hidden).map(|h| 4 * h.len()).sum()
    }

    fn caches(&self) -> bool {
        self.settings.cache && self.cut > 0
    }

    fn example(&self, task: usize, split: Split, index: usize) -> &TextExample {
        &self.stream.tasks[task].examples[split as usize][index]
    }

    /// Rows of an example: those of training have its label behind it, those of a test all beginnings between which labels are
    /// decided.
    fn rows_of(&self, task: usize, split: Split, index: usize) -> usize {
        let e = self.example(task, split, index);
        e.prompt.len()
            + if split == Split::Train { self.stream.labels[e.class].len() } else { self.stream.trie.rows().len() }
    }

    fn push(&self, rows: &mut Rows, task: usize, split: Split, index: usize, end: bool) -> Result<()> {
        let e = self.example(task, split, index);
        let (first, prompt) = (rows.tokens.len() as u32, e.prompt.len() as u32);
        rows.tokens.extend(&e.prompt);
        rows.positions.extend(0..prompt);
        (0..prompt).try_for_each(|i| rows.visible.push(&[[first, first + i + 1]]))?;
        let behind = first + prompt;
        if split == Split::Train {
            let label = &self.stream.labels[e.class];
            let n = label.len() as u32;
            rows.tokens.extend(label);
            rows.positions.extend(prompt..prompt + n);
            (0..n).try_for_each(|i| rows.visible.push(&[[first, behind + i + 1]]))?;
            rows.wanted.extend(behind - 1..behind + n - u32::from(!end));
        } else {
            for (token, at, seen) in self.stream.trie.rows() {
                rows.tokens.push(*token);
                rows.positions.push(prompt + at);
                let mut ranges = vec![[first, behind]];
                for s in seen {
                    match ranges.last_mut() {
                        Some(last) if last[1] == behind + s => last[1] += 1,
                        _ => ranges.push([behind + s, behind + s + 1]),
                    }
                }
                rows.visible.push(&ranges)?;
            }
            let row = |d: Option<u32>| d.map_or(behind - 1, |d| behind + d);
            rows.wanted.extend(self.stream.trie.deciding().iter().copied().map(row));
        }
        rows.ranges.push(first as usize..rows.tokens.len());
        Ok(())
    }

    /// Parts of `examples` that fit into passes, in order.
    fn parts(&self, task: usize, split: Split, examples: &[usize]) -> Vec<Range<usize>> {
        let (mut parts, mut first, mut rows) = (Vec::new(), 0, 0);
        for (i, &index) in examples.iter().enumerate() {
            let n = self.rows_of(task, split, index);
            if rows > 0 && rows + n > self.settings.rows {
                parts.push(first..i);
                (first, rows) = (i, 0);
            }
            rows += n;
        }
        parts.push(first..examples.len());
        parts
    }

    /// A pass over these examples, forward; nothing below the cut is computed again where that is kept.
    fn pass(&mut self, task: usize, split: Split, examples: &[usize], end: bool) -> Result<(Pass, Vec<Range<usize>>)> {
        let (pass, ranges) = self.plan(task, split, examples, end)?;
        if !self.caches() {
            self.trainer.forward(&pass)?;
            return Ok((pass, ranges));
        }
        self.freeze(task, split)?;
        let Some(frozen) = &self.stream.frozen[task][split as usize] else {
            bail!(Usage, "nothing is kept of task {task}")
        };
        let hidden: Vec<f32> = examples.iter().flat_map(|&i| frozen.hidden[i].iter().copied()).collect();
        self.trainer.forward_from(&pass, self.cut, &hidden)?;
        Ok((pass, ranges))
    }

    fn plan(&self, task: usize, split: Split, examples: &[usize], end: bool) -> Result<(Pass, Vec<Range<usize>>)> {
        let mut rows = Rows {
            tokens: Vec::new(),
            positions: Vec::new(),
            visible: Visible::new(),
            wanted: Vec::new(),
            ranges: Vec::new(),
        };
        examples.iter().try_for_each(|&i| self.push(&mut rows, task, split, i, end))?;
        let Rows { tokens, positions, visible, wanted, ranges } = rows;
        Ok((Pass::new(self.trainer.model().config(), tokens, positions, visible, wanted)?, ranges))
    }

    /// Runs the frozen part of the model over a task's examples, once.
    fn freeze(&mut self, task: usize, split: Split) -> Result<()> {
        if self.stream.frozen[task][split as usize].is_some() {
            return Ok(());
        }
        let (n, d) = (self.stream.tasks[task].examples[split as usize].len(), self.trainer.model().config().hidden);
        let all: Vec<usize> = (0..n).collect();
        let mut frozen = Frozen { hidden: Vec::new(), features: Vec::new() };
        for part in self.parts(task, split, &all) {
            let (pass, ranges) = self.plan(task, split, &all[part.clone()], false)?;
            let mut layers = vec![self.settings.router_layer];
            layers.extend(self.caches().then_some(self.cut));
            let found = self.trainer.hidden_at(&pass, &layers)?;
            for (rows, &i) in ranges.iter().zip(&all[part]) {
                let prompt = self.example(task, split, i).prompt.len();
                frozen.features.push(feature(&found[0][rows.start * d..(rows.start + prompt) * d], d));
                if let Some(hidden) = found.get(1) {
                    frozen.hidden.push(hidden[rows.start * d..rows.end * d].to_vec());
                }
            }
        }
        self.stream.frozen[task][split as usize] = Some(frozen);
        Ok(())
    }

    fn gradient_of(&mut self, samples: &[Sample], end: bool) -> Result<(f64, Vec<f32>)> {
        let loss = self.descend(samples, end)?;
        let gradient = self.trainer.take_gradients()?;
        ensure!(loss.is_finite(), Diverged, "the loss is {loss}");
        Ok((loss, gradient))
    }

    /// Adds the gradient of the mean loss over all labels of the samples, all of one task; returns that loss.
    fn descend(&mut self, samples: &[Sample], end: bool) -> Result<f64> {
        let Some(&Sample { task, .. }) = samples.first() else { bail!(Usage, "a step without examples") };
        ensure!(samples.iter().all(|s| s.task == task), Usage, "a step on examples of several tasks");
        let examples: Vec<usize> = samples.iter().map(|s| s.index).collect();
        let learnt = |i: usize| self.stream.labels[self.example(task, Split::Train, i).class].len() + usize::from(end);
        let total: usize = examples.iter().map(|&i| learnt(i)).sum();
        let mut loss = 0.0;
        for part in self.parts(task, Split::Train, &examples) {
            let examples = &examples[part];
            let mut ids = Vec::new();
            for &i in examples {
                ids.extend(&self.stream.labels[self.example(task, Split::Train, i).class]);
                ids.extend(end.then_some(self.stream.end));
            }
            let (pass, _) = self.pass(task, Split::Train, examples, end)?;
            let weights = vec![1.0 / total as f32; ids.len()];
            let target = |r: Range<usize>| Target::Hard(&ids[r]);
            let losses = self.trainer.backward(&pass, &[Term { target: &target, weights: &weights }], true)?;
            loss += losses[0].iter().sum::<f64>();
        }
        Ok(loss / total as f64)
    }
}

/// What the router sees of a prompt, from the residual stream of its rows: their mean, and the last one.
pub fn feature(rows: &[f32], width: usize) -> Vec<f32> {
    let n = rows.len() / width;
    let mut mean = vec![0.0f64; width];
    for row in rows.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x) / n as f64);
    }
    mean.iter().map(|m| *m as f32).chain(rows[(n - 1) * width..].iter().copied()).collect()
}

impl<B: Train> Learner for Language<B> {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn size(&self, task: usize) -> [usize; 2] {
        let [train, test] = &self.stream.tasks[task].examples;
        [train.len(), test.len()]
    }

    fn classes(&self, task: usize) -> &[usize] {
        &self.stream.tasks[task].classes
    }

    fn truth(&self, task: usize, index: usize) -> usize {
        self.example(task, Split::Test, index).class
    }

    fn values(&self) -> Result<Vec<f32>> {
        self.trainer.values()
    }

    fn set_values(&mut self, values: &[f32]) -> Result<()> {
        self.trainer.set_values(values)
    }

    fn restart(&mut self) -> Result<()> {
        self.trainer.restart()
    }

    fn moments(&self) -> Result<(u64, Moments)> {
        self.trainer.moments()
    }

    fn set_moments(&mut self, steps: u64, moments: &Moments) -> Result<()> {
        self.trainer.set_moments(steps, moments)
    }

    fn gradient(&mut self, samples: &[Sample]) -> Result<(f64, Vec<f32>)> {
        self.gradient_of(samples, self.settings.end)
    }

    /// The end token follows every label.
    fn own_gradient(&mut self, samples: &[Sample]) -> Result<(f64, Vec<f32>)> {
        self.gradient_of(samples, false)
    }

    fn step(&mut self, samples: &[Sample], penalty: Penalty<'_>) -> Result<f64> {
        let loss = self.descend(samples, self.settings.end)?;
        self.trainer.conclude_with(Report { loss, ..Report::default() }, penalty)?;
        Ok(loss)
    }

    fn predict(&mut self, task: usize, examples: &[usize], allowed: &[usize]) -> Result<Vec<usize>> {
        let choices = self.stream.trie.choices().to_vec();
        let mut predicted = Vec::with_capacity(examples.len());
        for part in self.parts(task, Split::Test, examples) {
            let (pass, _) = self.pass(task, Split::Test, &examples[part], false)?;
            let mut logits: Vec<Vec<f32>> = Vec::with_capacity(pass.wanted().len());
            self.trainer.logits(&pass, &mut |row, z| {
                let tokens = &choices[row % choices.len()];
                logits.push(tokens.iter().map(|&t| z[t as usize]).collect());
            })?;
            ensure!(!logits.iter().flatten().any(|z| z.is_nan()), Diverged, "logits are not numbers");
            for own in logits.chunks(choices.len()) {
                let Some(best) = self.stream.trie.best(own, allowed) else { bail!(Usage, "no class is allowed") };
                predicted.push(best);
            }
        }
        Ok(predicted)
    }

    fn features(&mut self, task: usize, split: Split) -> Result<Vec<Vec<f32>>> {
        self.freeze(task, split)?;
        Ok(self.stream.frozen[task][split as usize].as_ref().map(|f| f.features.clone()).unwrap_or_default())
    }

    fn input_products(&mut self, samples: &[Sample]) -> Result<Vec<Vec<f64>>> {
        let attention = |r: &LayerRole| matches!(r, LayerRole::Q | LayerRole::K | LayerRole::V);
        ensure!(self.roles.iter().all(attention), Unsupported, "inflora adapts q, k and v only");
        let d = self.trainer.model().config().hidden;
        let layers: Vec<usize> = self.layout.modules.iter().map(|m| m.layer).collect();
        let mut products: Vec<Option<Vec<f64>>> = vec![None; self.trainer.model().config().layers];
        let Some(&Sample { task, .. }) = samples.first() else { bail!(Usage, "no examples") };
        let examples: Vec<usize> = samples.iter().map(|s| s.index).collect();
        for part in self.parts(task, Split::Train, &examples) {
            let (pass, _) = self.pass(task, Split::Train, &examples[part], false)?;
            // q, k and v have one input.
            let mut distinct = layers.clone();
            distinct.dedup();
            for layer in distinct {
                let x = self.trainer.attention_input(layer, &pass)?;
                let c = products[layer].get_or_insert_with(|| vec![0.0; d * d]);
                inflora::add_products(c, &x, d);
            }
        }
        Ok(layers.iter().map(|&l| products[l].clone().unwrap_or_default()).collect())
    }

    fn length(&self, sample: Sample) -> usize {
        self.rows_of(sample.task, Split::Train, sample.index)
    }
}
