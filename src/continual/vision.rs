//! [`Pictures`]: a vision transformer that learns classes in tasks, with one head for all of them.

use super::layout::Layout;
use super::learner::{Learner, Moments, Penalty, Sample, Split};
use crate::backend::Train;
use crate::error::{Result, bail, ensure};
use crate::model::Param;
use crate::rng::Rng;
use crate::vision::{Examples, VisionTrainer, VitRole};

/// Stream of the head's first values.
const HEAD: u64 = 1 << 61;

/// Some classes and their pictures.
#[derive(Clone, Debug)]
pub struct PictureTask {
    /// Its classes.
    pub classes: Vec<usize>,
    /// Training and test examples.
    pub examples: [Examples; 2],
}

/// The pictures of a data set as tasks of `width` classes each, in the order of their numbers.
///
/// # Errors
/// A width that does not divide the classes; a task without training or without test examples.
pub fn split_classes(train: &Examples, test: &Examples, classes: usize, width: usize) -> Result<Vec<PictureTask>> {
    ensure!(width > 0 && classes.is_multiple_of(width), Usage, "{classes} classes in tasks of {width}");
    let task = |first: usize| {
        let own = first..first + width;
        let of = |all: &Examples, what: &str| {
            let which: Vec<usize> =
                (0..all.labels.len()).filter(|&i| own.contains(&(all.labels[i] as usize))).collect();
            ensure!(!which.is_empty(), Usage, "no {what} example of the classes {own:?}");
            all.pick(&which)
        };
        Ok(PictureTask { classes: own.clone().collect(), examples: [of(train, "training")?, of(test, "test")?] })
    };
    (0..classes).step_by(width).map(task).collect()
}

/// A vision transformer with an adapter and a head that train, and a stream's tasks. The head's values lie behind those of the
/// modules. The loss of a step knows the classes of the tasks up to its own.
pub struct Pictures<B: Train> {
    trainer: VisionTrainer<B>,
    layout: Layout,
    tasks: Vec<PictureTask>,
    /// Features of the bare model, of training and test examples.
    features: Vec<[Option<Vec<Vec<f32>>>; 2]>,
}

impl<B: Train> Pictures<B> {
    /// Of a trainer with an adapter. A head of zeros begins with small random weights instead: no gradient would come through it, and
    /// signatures would say nothing.
    ///
    /// # Errors
    /// A trainer without an adapter; classes that its head does not have.
    pub fn new(mut trainer: VisionTrainer<B>, tasks: Vec<PictureTask>, seed: u64) -> Result<Self> {
        let places = trainer.places();
        ensure!(!places.is_empty(), Usage, "a stream is learnt with an adapter");
        let classes = trainer.vit().config().classes;
        let most = tasks.iter().flat_map(|t| &t.classes).max().map_or(0, |c| c + 1);
        ensure!(most <= classes, Usage, "{most} classes, the head has {classes}");
        let len = trainer.params().map(Param::len).sum();
        let layout = Layout::new("blocks", places, len);
        let name = VitRole::Head.to_string();
        if let Some(span) = trainer.span(&name) {
            let mut values = trainer.values()?;
            if values[span.clone()].iter().all(|x| *x == 0.0) {
                let mut rng = Rng::stream(seed, HEAD);
                values[span].iter_mut().for_each(|x| *x = 0.02 * rng.normal());
                trainer.set_values(&values)?;
            }
        }
        let features = tasks.iter().map(|_| [None, None]).collect();
        Ok(Self { trainer, layout, tasks, features })
    }

    /// The trainer.
    pub fn trainer(&self) -> &VisionTrainer<B> {
        &self.trainer
    }

    fn examples(&self, samples: &[Sample]) -> Result<(Examples, Vec<u32>)> {
        let Some(&Sample { task, .. }) = samples.first() else { bail!(Usage, "a step without examples") };
        ensure!(samples.iter().all(|s| s.task == task), Usage, "a step on examples of several tasks");
        let which: Vec<usize> = samples.iter().map(|s| s.index).collect();
        let seen = self.tasks[..=task].iter().flat_map(|t| t.classes.iter().map(|&c| c as u32)).collect();
        Ok((self.tasks[task].examples[0].pick(&which)?, seen))
    }
}

impl<B: Train> Learner for Pictures<B> {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn size(&self, task: usize) -> [usize; 2] {
        let [train, test] = &self.tasks[task].examples;
        [train.labels.len(), test.labels.len()]
    }

    fn classes(&self, task: usize) -> &[usize] {
        &self.tasks[task].classes
    }

    fn truth(&self, task: usize, index: usize) -> usize {
        self.tasks[task].examples[1].labels[index] as usize
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
        let (examples, seen) = self.examples(samples)?;
        let (score, gradient) = self.trainer.gradient(&examples, &seen)?;
        Ok((score.loss, gradient))
    }

    fn step(&mut self, samples: &[Sample], penalty: Penalty<'_>) -> Result<f64> {
        let (examples, seen) = self.examples(samples)?;
        Ok(self.trainer.step_with(&examples, &seen, penalty)?.score.loss)
    }

    fn predict(&mut self, task: usize, examples: &[usize], allowed: &[usize]) -> Result<Vec<usize>> {
        ensure!(!allowed.is_empty(), Usage, "no class is allowed");
        let images = self.tasks[task].examples[1].images.pick(examples)?;
        let allowed: Vec<u32> = allowed.iter().map(|&c| c as u32).collect();
        Ok(self.trainer.predict(&images, &allowed)?.into_iter().map(|c| c as usize).collect())
    }

    fn features(&mut self, task: usize, split: Split) -> Result<Vec<Vec<f32>>> {
        let slot = split as usize;
        if self.features[task][slot].is_none() {
            let config = self.trainer.vit().config();
            let (d, blocks) = (config.hidden, config.blocks);
            let flat = self.trainer.features_behind(&self.tasks[task].examples[slot].images, blocks, true)?;
            self.features[task][slot] = Some(flat.chunks_exact(d).map(<[f32]>::to_vec).collect());
        }
        Ok(self.features[task][slot].clone().unwrap_or_default())
    }

    fn kinds(&self, task: usize) -> Vec<usize> {
        self.tasks[task].examples[0].labels.iter().map(|&l| l as usize).collect()
    }

    fn input_products(&mut self, samples: &[Sample]) -> Result<Vec<Vec<f64>>> {
        use crate::model::roles::LayerRole::{K, Q, V};
        let known = self.trainer.places().iter().all(|p| matches!(p.spec.role, Q | K | V));
        ensure!(known, Unsupported, "inflora adapts q, k and v only");
        let (examples, _) = self.examples(samples)?;
        let d = self.trainer.vit().config().hidden;
        let mut products: Vec<Vec<f64>> = Vec::new();
        for (i, m) in self.layout.modules.iter().enumerate() {
            // q, k and v have one input.
            if i > 0 && self.layout.modules[i - 1].layer == m.layer {
                products.push(products[i - 1].clone());
                continue;
            }
            let x = self.trainer.attention_input(&examples.images, m.layer)?;
            products.push(super::inflora::products(&x, d));
        }
        Ok(products)
    }

    fn length(&self, _: Sample) -> usize {
        self.trainer.vit().config().tokens()
    }
}
