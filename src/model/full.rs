//! Training of a model's own weights: masters in full precision beside the matrices that products read.

use std::collections::HashMap;
use std::sync::Arc;

use super::lora::Param;
use super::roles::{LayerRole, Role, TensorSource};
use super::weights::Model;
use crate::backend::{Backend, Buffer, Linear, Out, Train};
use crate::dtype::DType;
use crate::error::{Context, Result, ensure};
use crate::tensor::HostTensor;

/// Masters of a model's tensors, by role, each with its gradient.
pub struct Full<B: Backend> {
    params: Vec<(Role, Param<B>)>,
    index: HashMap<Role, usize>,
}

impl<B: Train> Full<B> {
    /// The master of `role`.
    pub(super) fn grad(&mut self, role: Role) -> Option<Out<'_, B, B::Acc>> {
        let &i = self.index.get(&role)?;
        self.params[i].1.grad()
    }

    /// Every tensor, in a fixed order.
    pub fn params(&self) -> impl Iterator<Item = (Role, &Param<B>)> {
        self.params.iter().map(|(r, p)| (*r, p))
    }

    /// As [`Full::params`], to change; [`Model::refresh`] tells the model.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        self.params.iter_mut().map(|(_, p)| p)
    }
}

impl<B: Train> Model<B> {
    /// A model whose weights can be trained, and their masters.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_trainable(
        be: Arc<B>,
        source: &dyn TensorSource,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(Self, Full<B>)> {
        let cfg = source.config();
        let total = Role::all(cfg).count();
        let (mut params, mut index) = (Vec::with_capacity(total), HashMap::new());
        for role in Role::all(cfg) {
            let t = source.tensor(role)?;
            let mut p = Param::new(&*be, role.to_string(), [t.rows, t.cols], &t.to_f32())?;
            t.data.release();
            p.train(&be, true)?;
            index.insert(role, params.len());
            params.push((role, p));
            progress(params.len(), total);
        }
        let mut model = Self::load_with(be, source, |be, role, [rows, cols]| {
            be.trainable(rows, cols).context(|| role.to_string())
        })?;
        let full = Full { params, index };
        model.refresh(&full)?;
        Ok((model, full))
    }

    /// Brings the masters' values into the matrices that products read.
    ///
    /// # Errors
    /// The device's; weights that another model shares ([`Model::of_layers`], [`Model::merged`]).
    pub fn refresh(&mut self, full: &Full<B>) -> Result<()> {
        ensure!(!self.weights.shared(), Unsupported, "weights that another model shares cannot be trained");
        for (role, p) in full.params() {
            let be = self.be.clone();
            match self.place(role) {
                Some(Place::Matrix(w)) => be.set_weight(w, p.values())?,
                Some(Place::Vector(v)) => be.copy(v.head_mut(p.len()), p.values())?,
                None => {}
            }
        }
        Ok(())
    }

    fn place(&mut self, role: Role) -> Option<Place<'_, B>> {
        use LayerRole::*;
        fn matrix<W, B: Backend<Weight = W>>(w: &mut Arc<W>) -> Option<Place<'_, B>> {
            Arc::get_mut(w).map(Place::Matrix)
        }
        fn vector<B: Backend>(v: &mut Arc<B::Buf<B::Acc>>) -> Option<Place<'_, B>> {
            Arc::get_mut(v).map(Place::Vector)
        }
        fn linear<B: Backend>(l: &mut Arc<Linear<B>>, bias: bool) -> Option<Place<'_, B>> {
            let l = Arc::get_mut(l)?;
            if bias { l.bias.as_mut().map(Place::Vector) } else { Some(Place::Matrix(&mut l.w)) }
        }
        let w = &mut self.weights;
        let (i, role) = match role {
            Role::Embed => return matrix(&mut w.embed),
            Role::Head => return w.head.as_mut().and_then(matrix),
            Role::FinalNorm => return vector(&mut w.final_norm),
            Role::Layer(i, role) => (i, role),
        };
        let l = &mut w.layers[i];
        match role {
            AttnNorm => vector(&mut l.attn_norm),
            MlpNorm => vector(&mut l.mlp_norm),
            Q | QBias => linear(&mut l.q, role == QBias),
            K | KBias => linear(&mut l.k, role == KBias),
            V | VBias => linear(&mut l.v, role == VBias),
            QNorm => l.qk_norm.as_mut().and_then(|n| vector(&mut n[0])),
            KNorm => l.qk_norm.as_mut().and_then(|n| vector(&mut n[1])),
            PostAttnNorm => l.post_norms.as_mut().and_then(|n| vector(&mut n[0])),
            PostMlpNorm => l.post_norms.as_mut().and_then(|n| vector(&mut n[1])),
            O => matrix(&mut l.o),
            Gate => matrix(&mut l.gate),
            Up => matrix(&mut l.up),
            Down => matrix(&mut l.down),
        }
    }
}

enum Place<'a, B: Backend> {
    Matrix(&'a mut B::Weight),
    Vector(&'a mut B::Buf<B::Acc>),
}

/// The trained model as tensors of a file.
pub struct Trained<'a, B: Backend> {
    /// Its configuration.
    pub model: &'a Model<B>,
    /// Its weights.
    pub full: &'a Full<B>,
}

impl<B: Train> TensorSource for Trained<'_, B> {
    fn config(&self) -> &super::ModelConfig {
        self.model.config()
    }

    fn tensor(&self, role: Role) -> Result<HostTensor> {
        let missing = || crate::error::Error::new(crate::error::ErrorKind::Weights, format!("{role} is not trained"));
        let p = self.full.index.get(&role).map(|&i| &self.full.params[i].1).ok_or_else(missing)?;
        let values = p.to_host(self.model.backend())?;
        HostTensor::new(DType::F32, p.shape[0], p.shape[1], bytemuck::cast_slice(&values).to_vec().into())
    }
}
