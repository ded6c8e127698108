//! [`VisionTrainer`]: a vision transformer, what of it trains, an optimiser, and the room for passes.

use super::images::Images;
use super::saved::VitSaved;
use super::weights::{Masters, Vit};
use crate::backend::{Buffer, Train};
use crate::error::{Result, bail, ensure};
use crate::model::lora::{ModuleSpec, ModuleValues};
use crate::model::roles::LayerRole;
use crate::model::{Adapter, Param};
use crate::train::optim::{Optimizer, Settings, Stepped};

/// Images with the classes that they belong to.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    /// The images.
    pub images: Images,
    /// Their classes.
    pub labels: Vec<u32>,
}

impl Examples {
    /// Of an image and a label each.
    ///
    /// # Errors
    /// `Shape` for other numbers of labels than of images.
    pub fn new(images: Images, labels: Vec<u32>) -> Result<Self> {
        ensure!(images.len() == labels.len(), Shape, "{} labels for {} images", labels.len(), images.len());
        Ok(Self { images, labels })
    }

    /// These examples, in this order.
    ///
    /// # Errors
    /// `Shape` for an example that is not there.
    pub fn pick(&self, which: &[usize]) -> Result<Self> {
        let images = self.images.pick(which)?;
        Ok(Self { images, labels: which.iter().map(|&i| self.labels[i]).collect() })
    }
}

/// A tensor that trains, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedValues {
    /// The parameter's name.
    pub name: String,
    /// `[rows, cols]`; a vector has one row.
    pub shape: [usize; 2],
    /// Its values, or its gradient, row-major.
    pub values: Vec<f32>,
}

/// Where a LoRA module's matrices lie among the parameters. Modules with one input stack their A in one parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// Which linear of which block; fc1 is [`Up`](crate::model::roles::LayerRole::Up), fc2 is
    /// [`Down`](crate::model::roles::LayerRole::Down).
    pub spec: ModuleSpec,
    /// Inputs of the linear.
    pub input: usize,
    /// Its outputs.
    pub output: usize,
    /// Parameter that holds A `[rank, input]`, in its rows `a_row ..`.
    pub a: String,
    /// First row of A in it.
    pub a_row: usize,
    /// Parameter that is B `[output, rank]`.
    pub b: String,
}

impl LoraModule {
    /// A, or its gradient, among what [`VisionTrainer::values`] or [`VisionTrainer::gradient`] gave.
    pub fn a_of<'v>(&self, all: &'v [NamedValues]) -> Option<&'v [f32]> {
        let p = all.iter().find(|p| p.name == self.a)?;
        p.values.get(self.a_row * self.input..(self.a_row + self.spec.rank) * self.input)
    }

    /// B alike.
    pub fn b_of<'v>(&self, all: &'v [NamedValues]) -> Option<&'v [f32]> {
        all.iter().find(|p| p.name == self.b).map(|p| &p.values[..])
    }
}

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

    /// The adapter's modules, block by block, in the order of the forward pass.
    ///
    /// # Errors
    /// The device's.
    pub fn modules(&self) -> Result<Vec<LoraModule>> {
        let Some(adapter) = &self.adapter else { return Ok(Vec::new()) };
        Ok(adapter
            .places()
            .map(|(spec, a, a_row, b)| LoraModule {
                spec,
                input: a.shape[1],
                output: b.shape[0],
                a: a.name.clone(),
                a_row,
                b: b.name.clone(),
            })
            .collect())
    }

    /// The values of every parameter, in the order of [`VisionTrainer::params`].
    ///
    /// # Errors
    /// The device's.
    pub fn values(&self) -> Result<Vec<NamedValues>> {
        let be = self.vit.backend();
        let one = |p: &Param<B>| Ok(NamedValues { name: p.name.clone(), shape: p.shape, values: p.to_host(be)? });
        self.params().map(one).collect()
    }

    /// Gives parameters new values; those that are not named keep theirs. Nothing changes where one does not fit.
    ///
    /// # Errors
    /// `Usage` for a name that there is not, `Shape` for another number of values; the device's.
    pub fn set_values<'v>(&mut self, values: impl IntoIterator<Item = (&'v str, &'v [f32])> + Clone) -> Result<()> {
        for (name, v) in values.clone() {
            let Some(p) = self.params().find(|p| p.name == name) else { bail!(Usage, "no parameter {name} trains") };
            ensure!(p.len() == v.len(), Shape, "{name}: {} values for {:?}", v.len(), p.shape);
        }
        let Self { vit, masters, adapter, .. } = self;
        for (name, v) in values {
            for p in params_mut(masters, adapter).filter(|p| p.name == name) {
                let n = p.len();
                vit.be.upload_acc(p.w.head_mut(n), v)?;
            }
        }
        vit.refresh(masters)
    }

    /// The mean loss over examples, and its gradient by every parameter that trains. Nothing is learnt; gradients that were
    /// accumulated before are lost.
    ///
    /// # Errors
    /// As [`VisionTrainer::accumulate`].
    pub fn gradient(&mut self, examples: &Examples, allowed: &[u32]) -> Result<(Score, Vec<NamedValues>)> {
        self.clear()?;
        let score = self.accumulate(examples, allowed, 1.0)?;
        let be = self.vit.backend();
        let mut gradients = Vec::new();
        for p in self.params() {
            let Some(g) = &p.g else { continue };
            let mut values = vec![0.0; p.len()];
            be.download_acc(g.head(p.len()), &mut values)?;
            gradients.push(NamedValues { name: p.name.clone(), shape: p.shape, values });
        }
        self.clear()?;
        Ok((score, gradients))
    }

    /// Adds `weight` times the gradient of the mean loss over examples, however many, to the gradients.
    ///
    /// # Errors
    /// Examples of another size than the model's; labels that are not allowed; the device's.
    pub fn accumulate(&mut self, examples: &Examples, allowed: &[u32], weight: f32) -> Result<Score> {
        self.run(examples, allowed, Some(weight))
    }

    /// Adds values to the gradient of a parameter: that of a penalty computed elsewhere.
    ///
    /// # Errors
    /// `Usage` for a name of nothing that trains, `Shape` for another number of values; the device's.
    pub fn add_to_gradient(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let Self { vit, masters, adapter, .. } = self;
        let p = params_mut(masters, adapter).find(|p| p.name == name);
        let n = p.as_ref().map_or(0, |p| p.len());
        let Some(g) = p.and_then(|p| p.g.as_mut()) else { bail!(Usage, "no parameter {name} trains") };
        ensure!(n == values.len(), Shape, "{name}: {} values for a gradient of {n}", values.len());
        let mut b = vit.be.alloc(n)?;
        vit.be.upload_acc(b.head_mut(n), values)?;
        vit.be.add(g.head_mut(n), b.head(n))
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
        let score = self.accumulate(examples, allowed, 1.0)?;
        if !score.loss.is_finite() {
            self.clear()?;
            bail!(Diverged, "step {}: the loss is {}; lower the learning rate", self.steps() + 1, score.loss);
        }
        Ok(VisionStep { score, stepped: self.update()? })
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// The optimiser's settings.
    pub fn settings(&self) -> &Settings {
        self.optimizer.settings()
    }

    /// Begins the optimiser anew, as between tasks: states 0, first step next.
    ///
    /// # Errors
    /// Impossible settings; no memory.
    pub fn reset_optimizer(&mut self, settings: Settings) -> Result<()> {
        self.optimizer = Optimizer::new(self.vit.backend(), settings, params(&self.masters, &self.adapter))?;
        Ok(())
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
        for part in self.parts(images)? {
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
        for part in self.parts(images)? {
            self.vit.forward(&part, self.adapter.as_ref(), &mut self.saved)?;
            let n = part.len() * d;
            let mut wide = vec![B::Act::default(); n];
            self.vit.be.download(self.saved.out.head(n), &mut wide)?;
            all.extend(wide.into_iter().map(|x| crate::dtype::Real::to_f64(x) as f32));
        }
        Ok(all)
    }

    /// The pooled residual stream behind the first `blocks` blocks (0: the embedding), `[images, hidden]`, not normed.
    ///
    /// # Errors
    /// `Usage` for more blocks than there are; as [`VisionTrainer::logits`].
    pub fn features_behind(&mut self, images: &Images, blocks: usize) -> Result<Vec<f32>> {
        let (d, most) = (self.vit.cfg.hidden, self.vit.cfg.blocks);
        ensure!(blocks <= most, Usage, "features behind block {blocks} of {most}");
        let mut all = Vec::with_capacity(images.len() * d);
        for part in self.parts(images)? {
            self.vit.forward(&part, self.adapter.as_ref(), &mut self.saved)?;
            self.vit.pool(blocks, &mut self.saved)?;
            self.download(|s| &s.pooled, part.len() * d, &mut all)?;
        }
        Ok(all)
    }

    /// Forgets the gradients that were accumulated.
    ///
    /// # Errors
    /// The device's.
    pub fn clear(&mut self) -> Result<()> {
        let Self { vit, masters, adapter, .. } = self;
        for p in params_mut(masters, adapter) {
            let n = p.len();
            if let Some(g) = &mut p.g {
                vit.be.zero(g.head_mut(n))?;
            }
        }
        Ok(())
    }

    fn download(&self, what: impl Fn(&VitSaved<B>) -> &B::Buf<B::Acc>, n: usize, into: &mut Vec<f32>) -> Result<()> {
        let at = into.len();
        into.resize(at + n, 0.0);
        self.vit.be.download_acc(what(&self.saved).head(n), &mut into[at..])
    }

    /// Images in passes.
    fn parts(&self, images: &Images) -> Result<Vec<Images>> {
        let all: Vec<usize> = (0..images.len()).collect();
        all.chunks(self.saved.images).map(|part| images.pick(part)).collect()
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

/// A fresh adapter for a vision transformer, as [`Adapter::init`] makes it; it trains where it is told to ([`Adapter::train`]).
///
/// # Errors
/// A linear that no block has (a gate); no memory.
pub fn adapter<B: Train>(vit: &Vit<B>, specs: &[ModuleSpec], seed: u64) -> Result<Adapter<B>> {
    check(specs.iter())?;
    Adapter::init(vit.backend(), &vit.cfg.decoder_sizes(), specs, seed)
}

/// An adapter for a vision transformer with these values, as [`Adapter::new`] makes it.
///
/// # Errors
/// As [`adapter`]; values that do not fit.
pub fn adapter_of<B: Train>(vit: &Vit<B>, modules: &[ModuleValues]) -> Result<Adapter<B>> {
    check(modules.iter().map(|m| &m.spec))?;
    Adapter::new(vit.backend(), &vit.cfg.decoder_sizes(), modules)
}

fn check<'s>(mut specs: impl Iterator<Item = &'s ModuleSpec>) -> Result<()> {
    let gate = specs.any(|s| s.role == LayerRole::Gate);
    ensure!(!gate, Config, "a vision transformer's MLP has no gate to adapt");
    Ok(())
}
