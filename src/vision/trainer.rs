//! [`VisionTrainer`]: a vision transformer, what of it trains, an optimiser, and the room for passes.

use std::ops::Range;

use super::images::{Examples, Images};
use super::saved::VitSaved;
use super::weights::{Masters, Vit};
use crate::backend::{Buffer, Train};
use crate::error::{Result, bail, ensure};
use crate::model::{Adapter, Param, Place};
use crate::train::flat;
use crate::train::optim::{Moments, Optimizer, Penalty, Settings, Stepped};

/// How well labels were predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Mean cross-entropy over the allowed classes, nats.
    pub loss: f64,
    /// Examples whose likeliest allowed class is their label.
    pub correct: usize,
    /// Examples.
    pub examples: usize,
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VisionStep {
    /// Before the step.
    pub score: Score,
    /// The optimiser's part.
    pub stepped: Stepped,
}

/// A vision transformer that trains: its masters (the head, or everything), and an adapter where there is one.
///
/// Classes are `allowed` by a list of their numbers; an empty list allows all. The others' logits are -inf: they are never predicted,
/// and neither loss nor gradient knows of them.
pub struct VisionTrainer<B: Train> {
    vit: Vit<B>,
    masters: Masters<B>,
    adapter: Option<Adapter<B>>,
    optimizer: Optimizer<B>,
    saved: VitSaved<B>,
}

impl<B: Train> VisionTrainer<B> {
    /// Passes of up to `images` images. Masters and adapter train where they have gradients ([`Masters::train`],
    /// [`Adapter::train`]).
    ///
    /// # Errors
    /// Impossible settings; no memory.
    pub fn new(
        vit: Vit<B>,
        masters: Masters<B>,
        adapter: Option<Adapter<B>>,
        settings: Settings,
        images: usize,
    ) -> Result<Self> {
        let be = vit.backend();
        let of_adapter = adapter.as_ref().and_then(|a| a.lowest());
        let lowest = masters.lowest(vit.cfg.blocks).into_iter().chain(of_adapter).min().unwrap_or(vit.cfg.blocks);
        let saved = VitSaved::new(be, &vit.cfg, images, adapter.as_ref(), lowest)?;
        let optimizer = Optimizer::new(be, settings, params(&masters, &adapter))?;
        Ok(Self { vit, masters, adapter, optimizer, saved })
    }

    /// The model.
    pub fn vit(&self) -> &Vit<B> {
        &self.vit
    }

    /// Masters of the model's own weights that train.
    pub fn masters(&self) -> &Masters<B> {
        &self.masters
    }

    /// The adapter.
    pub fn adapter(&self) -> Option<&Adapter<B>> {
        self.adapter.as_ref()
    }

    /// Every tensor that may train, in a fixed order: the adapter's, then the model's own.
    pub fn params(&self) -> impl Iterator<Item = &Param<B>> {
        params(&self.masters, &self.adapter)
    }

    /// The adapter's modules, block by block, in the order of the forward pass, with the places of their A and B among
    /// [`VisionTrainer::values`]. Of an MLP fc1 is [`Up`](crate::model::roles::LayerRole::Up), fc2 [`Down`](crate::model::roles::LayerRole::Down).
    pub fn places(&self) -> Vec<Place> {
        // The adapter's tensors come first.
        self.adapter.as_ref().map(|a| a.places()).unwrap_or_default()
    }

    /// Where a parameter lies among [`VisionTrainer::values`] and gradients.
    pub fn span(&self, name: &str) -> Option<Range<usize>> {
        let mut at = 0;
        for p in self.params() {
            if p.name == name {
                return Some(at..at + p.len());
            }
            at += p.len();
        }
        None
    }

    /// The values of all parameters, one after another in the order of [`VisionTrainer::params`].
    ///
    /// # Errors
    /// The device's.
    pub fn values(&self) -> Result<Vec<f32>> {
        flat::values(self.vit.backend(), self.params())
    }

    /// Sets the values of all parameters; the optimiser stays as it is.
    ///
    /// # Errors
    /// `Shape` for another number of values; the device's.
    pub fn set_values(&mut self, values: &[f32]) -> Result<()> {
        let Self { vit, masters, adapter, .. } = self;
        flat::set_values(&*vit.be, params_mut(masters, adapter), values)?;
        vit.refresh(masters)
    }

    /// Sets the values of one parameter.
    ///
    /// # Errors
    /// `Usage` for a name that there is not, `Shape` for another number of values; the device's.
    pub fn set(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let Self { vit, masters, adapter, .. } = self;
        let Some(p) = params_mut(masters, adapter).find(|p| p.name == name) else {
            bail!(Usage, "there is no parameter {name}");
        };
        let n = p.len();
        ensure!(n == values.len(), Shape, "{name}: {} values for {:?}", values.len(), p.shape);
        vit.be.upload_acc(p.w.head_mut(n), values)?;
        vit.refresh(masters)
    }

    /// The mean loss over examples, and its gradient as [`VisionTrainer::values`] lists, 0 for what is frozen. Nothing is learnt; gradients that were
    /// accumulated before are lost.
    ///
    /// # Errors
    /// As [`VisionTrainer::accumulate`].
    pub fn gradient(&mut self, examples: &Examples, allowed: &[u32]) -> Result<(Score, Vec<f32>)> {
        self.clear_gradients()?;
        let score = self.accumulate(examples, allowed, 1.0)?;
        let gradient = flat::gradients(self.vit.backend(), self.params())?;
        self.clear_gradients()?;
        Ok((score, gradient))
    }

    /// Adds `weight` times the gradient of the mean loss over examples, however many, to the gradients.
    ///
    /// # Errors
    /// Examples of another size than the model's; labels that are not allowed; the device's.
    pub fn accumulate(&mut self, examples: &Examples, allowed: &[u32], weight: f32) -> Result<Score> {
        self.run(examples, allowed, Some(weight))
    }

    /// Moves the parameters by the gradients that were accumulated, and forgets those.
    ///
    /// # Errors
    /// `Diverged` where they are not finite: nothing has changed then.
    pub fn update(&mut self) -> Result<Stepped> {
        let Self { vit, masters, adapter, optimizer, .. } = self;
        let stepped = optimizer.step(&*vit.be, params_mut(masters, adapter))?;
        vit.refresh(masters)?;
        Ok(stepped)
    }

    /// One step on the mean loss over examples.
    ///
    /// # Errors
    /// As [`VisionTrainer::accumulate`]; `Diverged` where loss or gradient is not finite: nothing has changed then.
    pub fn step(&mut self, examples: &Examples, allowed: &[u32]) -> Result<VisionStep> {
        self.step_with(examples, allowed, Penalty::default())
    }

    /// [`VisionTrainer::step`] with a penalty on the values.
    ///
    /// # Errors
    /// As [`VisionTrainer::accumulate`] and [`Optimizer::conclude`].
    pub fn step_with(&mut self, examples: &Examples, allowed: &[u32], penalty: Penalty<'_>) -> Result<VisionStep> {
        let score = self.accumulate(examples, allowed, 1.0)?;
        let Self { vit, masters, adapter, optimizer, .. } = self;
        let mut params: Vec<_> = params_mut(masters, adapter).collect();
        let stepped = optimizer.conclude(&*vit.be, &mut params, score.loss, penalty)?;
        drop(params);
        vit.refresh(masters)?;
        Ok(VisionStep { score, stepped })
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// Begins the optimiser anew with the same settings, as between tasks.
    ///
    /// # Errors
    /// The device's.
    pub fn restart(&mut self) -> Result<()> {
        let Self { vit, masters, adapter, optimizer, .. } = self;
        optimizer.restart(&*vit.be, params(masters, adapter))
    }

    /// Steps and states of the optimiser, by name.
    ///
    /// # Errors
    /// The device's.
    pub fn moments(&self) -> Result<(u64, Moments)> {
        self.optimizer.moments(self.vit.backend(), self.params())
    }

    /// Sets them.
    ///
    /// # Errors
    /// A state that is missing or of another size.
    pub fn set_moments(&mut self, steps: u64, moments: &Moments) -> Result<()> {
        let Self { vit, masters, adapter, optimizer, .. } = self;
        optimizer.set_moments(&*vit.be, params(masters, adapter), steps, moments)
    }

    /// Loss and accuracy; nothing is learnt.
    ///
    /// # Errors
    /// As [`VisionTrainer::accumulate`].
    pub fn evaluate(&mut self, examples: &Examples, allowed: &[u32]) -> Result<Score> {
        self.run(examples, allowed, None)
    }

    /// Logits, `[images, classes]`; -inf where a class is not allowed.
    ///
    /// # Errors
    /// Images of another size than the model's; the device's.
    pub fn logits(&mut self, images: &Images, allowed: &[u32]) -> Result<Vec<f32>> {
        let forbidden = self.forbidden(allowed)?;
        let classes = self.vit.cfg.classes;
        let mut all = Vec::with_capacity(images.len() * classes);
        for part in self.parts(images) {
            self.vit.forward(&part, self.adapter.as_ref(), &mut self.saved)?;
            self.vit.logits(&forbidden, &mut self.saved)?;
            self.download(|s| &s.logits, part.len() * classes, &mut all)?;
        }
        Ok(all)
    }

    /// The likeliest allowed class of each image; the first among equals.
    ///
    /// # Errors
    /// As [`VisionTrainer::logits`]; `Diverged` where logits are not numbers.
    pub fn predict(&mut self, images: &Images, allowed: &[u32]) -> Result<Vec<u32>> {
        let logits = self.logits(images, allowed)?;
        ensure!(!logits.iter().any(|z| z.is_nan()), Diverged, "logits are not numbers");
        Ok(likeliest(&logits, self.vit.cfg.classes))
    }

    /// What the head reads of each image, `[images, hidden]`: pooled and normed.
    ///
    /// # Errors
    /// As [`VisionTrainer::logits`].
    pub fn features(&mut self, images: &Images) -> Result<Vec<f32>> {
        let d = self.vit.cfg.hidden;
        let mut all = Vec::with_capacity(images.len() * d);
        for part in self.parts(images) {
            self.vit.forward(&part, self.adapter.as_ref(), &mut self.saved)?;
            self.vit.wide(&self.saved.out, part.len() * d, &mut all)?;
        }
        Ok(all)
    }

    /// The pooled residual stream behind the first `blocks` blocks (0: the embedding), `[images, hidden]`, not normed; with the adapter,
    /// or `bare`: then nothing that trains beside the model's own blocks changes it.
    ///
    /// # Errors
    /// `Usage` for more blocks than there are; as [`VisionTrainer::logits`].
    pub fn features_behind(&mut self, images: &Images, blocks: usize, bare: bool) -> Result<Vec<f32>> {
        let (d, most) = (self.vit.cfg.hidden, self.vit.cfg.blocks);
        ensure!(blocks <= most, Usage, "features behind block {blocks} of {most}");
        let mut all = Vec::with_capacity(images.len() * d);
        for part in self.parts(images) {
            self.vit.forward(&part, self.adapter.as_ref().filter(|_| !bare), &mut self.saved)?;
            self.vit.pool(blocks, &mut self.saved)?;
            self.download(|s| &s.pooled, part.len() * d, &mut all)?;
        }
        Ok(all)
    }

    /// The input of a block's q, k and v, `[images * tokens, hidden]`.
    ///
    /// # Errors
    /// `Usage` for a block that there is not; as [`VisionTrainer::logits`].
    pub fn attention_input(&mut self, images: &Images, block: usize) -> Result<Vec<f32>> {
        ensure!(block < self.vit.cfg.blocks, Usage, "block {block} of {}", self.vit.cfg.blocks);
        let row = self.vit.cfg.tokens() * self.vit.cfg.hidden;
        let mut all = Vec::with_capacity(images.len() * row);
        for part in self.parts(images) {
            self.vit.forward(&part, self.adapter.as_ref(), &mut self.saved)?;
            let h = self.vit.attention_input(block, &mut self.saved)?;
            self.vit.wide(h, part.len() * row, &mut all)?;
        }
        Ok(all)
    }

    /// Forgets the gradients that were accumulated.
    ///
    /// # Errors
    /// The device's.
    fn clear_gradients(&mut self) -> Result<()> {
        let Self { vit, masters, adapter, .. } = self;
        flat::clear(&*vit.be, params_mut(masters, adapter))
    }

    fn download(&self, what: impl Fn(&VitSaved<B>) -> &B::Buf<B::Acc>, n: usize, into: &mut Vec<f32>) -> Result<()> {
        let at = into.len();
        into.resize(at + n, 0.0);
        self.vit.be.download_acc(what(&self.saved).head(n), &mut into[at..])
    }

    /// Images in passes.
    fn parts<'i>(&self, images: &'i Images) -> impl Iterator<Item = Images> + use<'i, B> {
        let most = self.saved.images;
        (0..images.len()).step_by(most).map(move |first| images.part(first, most))
    }

    fn forbidden(&self, allowed: &[u32]) -> Result<Vec<u32>> {
        let classes = self.vit.cfg.classes as u32;
        if let Some(c) = allowed.iter().find(|&&c| c >= classes) {
            bail!(Usage, "class {c} of {classes}");
        }
        Ok((0..classes).filter(|c| !allowed.is_empty() && !allowed.contains(c)).collect())
    }

    /// Losses of examples; adds `weight` times the gradient of their mean, if there is one.
    fn run(&mut self, examples: &Examples, allowed: &[u32], weight: Option<f32>) -> Result<Score> {
        let (n, classes) = (examples.labels.len(), self.vit.cfg.classes);
        ensure!(n > 0, Usage, "no examples");
        ensure!(n == examples.images.len(), Shape, "{n} labels for {} images", examples.images.len());
        let forbidden = self.forbidden(allowed)?;
        let bad = examples.labels.iter().find(|&&l| l as usize >= classes || forbidden.contains(&l));
        if let Some(label) = bad {
            bail!(Usage, "class {label} is the label of an example, and is not allowed");
        }
        let mut score = Score { examples: n, ..Score::default() };
        let all: Vec<usize> = (0..n).collect();
        for part in all.chunks(self.saved.images) {
            let Examples { images, labels } = examples.pick(part)?;
            self.vit.forward(&images, self.adapter.as_ref(), &mut self.saved)?;
            self.vit.logits(&forbidden, &mut self.saved)?;
            let mut logits = Vec::new();
            self.download(|s| &s.logits, part.len() * classes, &mut logits)?;
            score.correct += likeliest(&logits, classes).iter().zip(&labels).filter(|(a, b)| a == b).count();
            let weights = vec![weight.unwrap_or(0.0) / n as f32; part.len()];
            score.loss += self.vit.loss(&labels, &weights, &mut self.saved)?.iter().sum::<f64>() / n as f64;
            if weight.is_some() {
                self.vit.backward(&mut self.saved, &mut self.masters, self.adapter.as_mut())?;
            }
        }
        Ok(score)
    }
}

fn likeliest(logits: &[f32], classes: usize) -> Vec<u32> {
    let best = |row: &[f32]| (0..classes).fold(0, |best, j| if row[j] > row[best] { j } else { best }) as u32;
    logits.chunks_exact(classes).map(best).collect()
}

fn params<'a, B: Train>(
    masters: &'a Masters<B>,
    adapter: &'a Option<Adapter<B>>,
) -> impl Iterator<Item = &'a Param<B>> {
    adapter.iter().flat_map(|a| a.params()).chain(masters.params().map(|(_, p)| p))
}

fn params_mut<'a, B: Train>(
    masters: &'a mut Masters<B>,
    adapter: &'a mut Option<Adapter<B>>,
) -> impl Iterator<Item = &'a mut Param<B>> {
    adapter.iter_mut().flat_map(|a| a.params_mut()).chain(masters.params_mut())
}
