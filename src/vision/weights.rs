//! Weights on a device, by role; [`Vit`] binds them to their configuration. What trains has a master beside the matrix that products
//! read.

use std::collections::HashMap;
use std::sync::Arc;

use super::config::VitConfig;
use super::positions::interpolate;
use super::roles::{BlockRole, VitRole, VitSource};
use crate::backend::{Backend, Buffer, In, Linear, Out, Train};
use crate::error::{Context, Result, ensure};
use crate::model::Param;
use crate::rng::Rng;
use crate::tensor::HostTensor;

type Vector<B> = <B as Backend>::Buf<<B as Backend>::Acc>;

/// Weight and bias of a LayerNorm.
pub(super) type Norm<B> = [Vector<B>; 2];

/// Weights of one block.
pub(super) struct Block<B: Backend> {
    pub(super) norm1: Norm<B>,
    pub(super) q: Linear<B>,
    pub(super) k: Linear<B>,
    pub(super) v: Linear<B>,
    pub(super) o: Linear<B>,
    pub(super) scale1: Option<Vector<B>>,
    pub(super) norm2: Norm<B>,
    pub(super) fc1: Linear<B>,
    pub(super) fc2: Linear<B>,
    pub(super) scale2: Option<Vector<B>>,
}

/// What of a model's own weights trains. Adapters are beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trains {
    /// The head's weight and bias.
    Head,
    /// Every tensor.
    All,
}

/// A vision transformer on a device.
pub struct Vit<B: Backend> {
    pub(super) be: Arc<B>,
    pub(super) cfg: VitConfig,
    pub(super) patch: Linear<B>,
    pub(super) class: Option<Vector<B>>,
    pub(super) positions: Vector<B>,
    pub(super) blocks: Vec<Block<B>>,
    pub(super) norm: Norm<B>,
    pub(super) head: Linear<B>,
}

/// Masters of the tensors that train, by role, each with its gradient.
pub struct Masters<B: Backend> {
    params: Vec<(VitRole, Param<B>)>,
    index: HashMap<VitRole, usize>,
}

impl<B: Train> Masters<B> {
    /// The gradient of `role`, where it trains.
    pub(super) fn grad(&mut self, role: VitRole) -> Option<Out<'_, B, B::Acc>> {
        let &i = self.index.get(&role)?;
        let (n, p) = (self.params[i].1.len(), &mut self.params[i].1);
        p.g.as_mut().map(|g| g.head_mut(n))
    }

    /// Lets tensors train or not: gradients exist only where they do, and a backward pass ends at the lowest of them.
    ///
    /// # Errors
    /// No memory.
    pub fn train(&mut self, be: &B, which: impl Fn(VitRole) -> bool) -> Result<()> {
        self.params.iter_mut().try_for_each(|(role, p)| p.train(be, which(*role)))
    }

    /// Whether `role` has a gradient.
    pub(super) fn trains(&self, role: VitRole) -> bool {
        self.get(role).is_some_and(|p| p.g.is_some())
    }

    /// How far down a backward pass has to go: to this block, `blocks` where only the last norm trains. `None`: no further than the head.
    pub(super) fn lowest(&self, blocks: usize) -> Option<usize> {
        let place = |role: &VitRole| match *role {
            VitRole::Head | VitRole::HeadBias => None,
            VitRole::Norm | VitRole::NormBias => Some(blocks),
            VitRole::Block(i, _) => Some(i),
            _ => Some(0),
        };
        self.params.iter().filter(|(_, p)| p.g.is_some()).filter_map(|(r, _)| place(r)).min()
    }

    /// Whether anything below the first block trains.
    pub(super) fn embedding_trains(&self) -> bool {
        use VitRole::*;
        [Patch, PatchBias, ClassToken, Positions].into_iter().any(|r| self.trains(r))
    }

    /// Every tensor, in a fixed order.
    pub fn params(&self) -> impl Iterator<Item = (VitRole, &Param<B>)> {
        self.params.iter().map(|(r, p)| (*r, p))
    }

    /// As [`Masters::params`], to change; [`Vit::refresh`] tells the model.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.params.iter_mut().map(|(_, p)| p)
    }

    /// The master of `role`, where it trains.
    pub fn get(&self, role: VitRole) -> Option<&Param<B>> {
        self.index.get(&role).map(|&i| &self.params[i].1)
    }
}

impl<B: Train> Vit<B> {
    /// Brings the weights of `source` to the device, with masters of those that train.
    ///
    /// # Errors
    /// The source's and the device's, by the tensor's role.
    pub fn load(be: Arc<B>, source: &dyn VitSource, trains: Trains) -> Result<(Self, Masters<B>)> {
        let from = source.config();
        let cfg = VitConfig { trained_image: from.image, ..from.clone() };
        let trained = |role| trains == Trains::All || matches!(role, VitRole::Head | VitRole::HeadBias);
        let mut masters = Masters { params: Vec::new(), index: HashMap::new() };
        for role in VitRole::all(&cfg).filter(|&r| trained(r)) {
            let shape = role.shape(&cfg).unwrap_or([0, 0]);
            let mut p = Param::new(&*be, role.to_string(), shape, &fitted(source, role)?)?;
            p.train(&be, true)?;
            masters.index.insert(role, masters.params.len());
            masters.params.push((role, p));
        }
        let values = |role: VitRole| -> Result<([usize; 2], Vec<f32>)> {
            let shape = role.shape(&cfg).unwrap_or([0, 0]);
            let values = fitted(source, role)?;
            let n = shape[0] * shape[1];
            ensure!(values.len() == n, Shape, "{role}: {} values for {shape:?}", values.len());
            Ok((shape, values))
        };
        let matrix = |role: VitRole| -> Result<B::Weight> {
            if trained(role) {
                let [rows, cols] = role.shape(&cfg).unwrap_or([0, 0]);
                return be.trainable(rows, cols).context(|| role.to_string());
            }
            let ([rows, cols], v) = values(role)?;
            be.weight(HostTensor::from_f32(rows, cols, &v)?).context(|| role.to_string())
        };
        let vector = |role: VitRole| -> Result<Vector<B>> {
            let (_, v) = values(role)?;
            let mut b = be.alloc(v.len())?;
            be.upload_acc(b.head_mut(v.len()), &v)?;
            Ok(b)
        };
        let optional = |role: VitRole| role.shape(&cfg).map(|_| vector(role)).transpose();
        let linear = |w, b| -> Result<Linear<B>> { Ok(Linear { w: matrix(w)?, bias: optional(b)? }) };
        let mut blocks = Vec::with_capacity(cfg.blocks);
        for i in 0..cfg.blocks {
            use BlockRole::*;
            let at = |r| VitRole::Block(i, r);
            blocks.push(Block {
                norm1: [vector(at(Norm1))?, vector(at(Norm1Bias))?],
                q: linear(at(Q), at(QBias))?,
                k: linear(at(K), at(KBias))?,
                v: linear(at(V), at(VBias))?,
                o: linear(at(O), at(OBias))?,
                scale1: optional(at(Scale1))?,
                norm2: [vector(at(Norm2))?, vector(at(Norm2Bias))?],
                fc1: linear(at(Fc1), at(Fc1Bias))?,
                fc2: linear(at(Fc2), at(Fc2Bias))?,
                scale2: optional(at(Scale2))?,
            });
        }
        let patch = linear(VitRole::Patch, VitRole::PatchBias)?;
        let (class, positions) = (optional(VitRole::ClassToken)?, vector(VitRole::Positions)?);
        let norm = [vector(VitRole::Norm)?, vector(VitRole::NormBias)?];
        let head = linear(VitRole::Head, VitRole::HeadBias)?;
        be.weights_done();
        let mut vit = Self { be: be.clone(), patch, class, positions, blocks, norm, head, cfg };
        vit.refresh(&masters)?;
        Ok((vit, masters))
    }

    /// Brings the masters' values into what the passes read.
    ///
    /// # Errors
    /// The device's.
    pub fn refresh(&mut self, masters: &Masters<B>) -> Result<()> {
        let be = self.be.clone();
        for (role, p) in masters.params() {
            match self.place(role) {
                Some(Place::Matrix(w)) => be.set_weight(w, p.values())?,
                Some(Place::Vector(v)) => be.copy(v.head_mut(p.len()), p.values())?,
                None => {}
            }
        }
        Ok(())
    }

    fn place(&mut self, role: VitRole) -> Option<Place<'_, B>> {
        use BlockRole::*;
        use Place::{Matrix, Vector};
        let (i, role) = match role {
            VitRole::Patch => return Some(Matrix(&mut self.patch.w)),
            VitRole::PatchBias => return self.patch.bias.as_mut().map(Vector),
            VitRole::ClassToken => return self.class.as_mut().map(Vector),
            VitRole::Positions => return Some(Vector(&mut self.positions)),
            VitRole::Norm => return Some(Vector(&mut self.norm[0])),
            VitRole::NormBias => return Some(Vector(&mut self.norm[1])),
            VitRole::Head => return Some(Matrix(&mut self.head.w)),
            VitRole::HeadBias => return self.head.bias.as_mut().map(Vector),
            VitRole::Block(i, role) => (i, role),
        };
        let b = &mut self.blocks[i];
        match role {
            Norm1 => Some(Vector(&mut b.norm1[0])),
            Norm1Bias => Some(Vector(&mut b.norm1[1])),
            Q => Some(Matrix(&mut b.q.w)),
            QBias => b.q.bias.as_mut().map(Vector),
            K => Some(Matrix(&mut b.k.w)),
            KBias => b.k.bias.as_mut().map(Vector),
            V => Some(Matrix(&mut b.v.w)),
            VBias => b.v.bias.as_mut().map(Vector),
            O => Some(Matrix(&mut b.o.w)),
            OBias => b.o.bias.as_mut().map(Vector),
            Scale1 => b.scale1.as_mut().map(Vector),
            Norm2 => Some(Vector(&mut b.norm2[0])),
            Norm2Bias => Some(Vector(&mut b.norm2[1])),
            Fc1 => Some(Matrix(&mut b.fc1.w)),
            Fc1Bias => b.fc1.bias.as_mut().map(Vector),
            Fc2 => Some(Matrix(&mut b.fc2.w)),
            Fc2Bias => b.fc2.bias.as_mut().map(Vector),
            Scale2 => b.scale2.as_mut().map(Vector),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &VitConfig {
        &self.cfg
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.be
    }
}

/// The values of a role, positions interpolated for the model's images.
fn fitted(source: &dyn VitSource, role: VitRole) -> Result<Vec<f32>> {
    let (values, c) = (source.values(role)?, source.config());
    if role != VitRole::Positions {
        return Ok(values);
    }
    let want = role.shape(&c.trained()).unwrap_or([0, 0]);
    ensure!(values.len() == want[0] * want[1], Shape, "{role}: {} values for {want:?}", values.len());
    Ok(interpolate(&values, usize::from(c.class_token), c.trained().grid(), c.grid()))
}

enum Place<'a, B: Backend> {
    Matrix(&'a mut B::Weight),
    Vector(&'a mut Vector<B>),
}

/// The values of a buffer of `n`.
pub(super) fn all<B: Backend>(v: &Vector<B>) -> In<'_, B, B::Acc> {
    v.head(v.len())
}

/// Weights to begin a training from, as those of arXiv:2010.11929 began in its authors' code: linears uniform in +-sqrt(6 / (in + out)), the
/// patch embedding normal with deviation 1 / sqrt(in) and positions with 0.02, both cut off at two deviations; norms 1; class token,
/// biases and head 0. LayerScale begins as 1e-5, as in its paper.
pub struct Fresh {
    cfg: VitConfig,
    seed: u64,
}

impl Fresh {
    /// Of this shape: equal seeds, equal weights.
    ///
    /// # Errors
    /// A configuration of no model.
    pub fn new(cfg: VitConfig, seed: u64) -> Result<Self> {
        Ok(Self { cfg: cfg.validate()?, seed })
    }
}

impl VitSource for Fresh {
    fn config(&self) -> &VitConfig {
        &self.cfg
    }

    fn values(&self, role: VitRole) -> Result<Vec<f32>> {
        use BlockRole::*;
        let [rows, cols] = role.shape(&self.cfg).unwrap_or([0, 0]);
        let n = rows * cols;
        let constant = match role {
            VitRole::Norm | VitRole::Block(_, Norm1 | Norm2) => Some(1.0),
            VitRole::Block(_, Scale1 | Scale2) => Some(1e-5),
            VitRole::Head => Some(0.0),
            VitRole::Positions => None,
            r => (!r.is_matrix()).then_some(0.0),
        };
        if let Some(c) = constant {
            return Ok(vec![c; n]);
        }
        // One stream for each tensor: the others do not change what it begins as.
        let place = VitRole::all(&self.cfg).position(|r| r == role).unwrap_or(0);
        let mut rng = Rng::stream(self.seed, place as u64);
        let deviation = match role {
            VitRole::Positions => 0.02,
            VitRole::Patch => (cols as f32).powf(-0.5),
            _ => {
                let bound = (6.0 / (rows + cols) as f32).sqrt();
                return Ok((0..n).map(|_| bound * (2.0 * rng.uniform() - 1.0)).collect());
            }
        };
        let mut cut = || loop {
            let x = rng.normal();
            if x.abs() <= 2.0 {
                return deviation * x;
            }
        };
        Ok((0..n).map(|_| cut()).collect())
    }
}

/// A trained model as tensors of a file: the masters, and for what did not train the source that it was loaded from. Adapters are
/// not part of it.
pub struct TrainedVit<'a, B: Backend> {
    /// The model.
    pub vit: &'a Vit<B>,
    /// What trained.
    pub masters: &'a Masters<B>,
    /// What did not.
    pub rest: &'a dyn VitSource,
}

impl<B: Train> VitSource for TrainedVit<'_, B> {
    fn config(&self) -> &VitConfig {
        &self.vit.cfg
    }

    fn values(&self, role: VitRole) -> Result<Vec<f32>> {
        match self.masters.get(role) {
            Some(p) => p.to_host(&self.vit.be),
            None => fitted(self.rest, role),
        }
    }
}
