//! Low-rank adapters: y = W x + scale B A x (Hu et al. 2021, arXiv:2106.09685) on any linear of any layer, each with
//! its own rank.
//!
//! Modules that read the same input stack their A, so that one product shrinks the input for all of them.

use std::ops::Range;

use super::config::ModelConfig;
use super::roles::{LayerRole, Role};
use crate::backend::{Backend, Buffer, Group, In, Out, Ranks, Train, WeightInfo, Write};
use crate::error::{Result, ensure};
use crate::rng::Rng;

/// A tensor that training may change.
pub struct Param<B: Backend> {
    /// Unique in its set, stable from run to run.
    pub name: String,
    /// `[rows, cols]`; a vector has one row.
    pub shape: [usize; 2],
    /// Its values.
    pub w: B::Buf<B::Acc>,
    /// Its gradient; `None`: frozen.
    pub g: Option<B::Buf<B::Acc>>,
}

impl<B: Backend> Param<B> {
    /// A frozen tensor with these values.
    pub fn new(be: &B, name: String, shape: [usize; 2], values: &[f32]) -> Result<Self> {
        let n = shape[0] * shape[1];
        ensure!(values.len() == n, Shape, "{name}: {} values for {shape:?}", values.len());
        let mut w = be.alloc(n)?;
        be.upload_acc(w.head_mut(n), values)?;
        Ok(Self { name, shape, w, g: None })
    }

    /// Values in it.
    pub fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives it a gradient, or takes it away.
    pub fn train(&mut self, be: &B, yes: bool) -> Result<()> {
        self.g = match (yes, self.g.take()) {
            (false, _) => None,
            (true, Some(g)) => Some(g),
            (true, None) => Some(be.alloc(self.len())?),
        };
        Ok(())
    }

    /// All its values.
    pub fn values(&self) -> In<'_, B, B::Acc> {
        self.w.head(self.len())
    }

    /// All its values as f32, on the host.
    pub fn to_host(&self, be: &B) -> Result<Vec<f32>> {
        let mut v = vec![0.0; self.len()];
        be.download_acc(self.values(), &mut v)?;
        Ok(v)
    }

    pub(crate) fn grad(&mut self) -> Option<Out<'_, B, B::Acc>> {
        let n = self.len();
        self.g.as_mut().map(|g| g.head_mut(n))
    }
}

/// The places of a layer whose inputs adapters read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Site {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Site {
    const ALL: [Site; 4] = [Site::Qkv, Site::O, Site::GateUp, Site::Down];

    /// Where a linear reads its input.
    pub(super) fn of(role: LayerRole) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.roles().contains(&role))
    }

    fn roles(self) -> &'static [LayerRole] {
        match self {
            Site::Qkv => &[LayerRole::Q, LayerRole::K, LayerRole::V],
            Site::O => &[LayerRole::O],
            Site::GateUp => &[LayerRole::Gate, LayerRole::Up],
            Site::Down => &[LayerRole::Down],
        }
    }
}

/// What one linear's adapter is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModuleSpec {
    /// Which linear.
    pub role: LayerRole,
    /// Its layer.
    pub layer: usize,
    /// Columns of B.
    pub rank: usize,
    /// Factor on B A: alpha / rank, or alpha / sqrt(rank).
    pub scale: f32,
}

/// A linear's adapter on the host: A `[rank, in]`, B `[out, rank]`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleValues {
    /// Where it belongs.
    pub spec: ModuleSpec,
    /// `[rank, in]`.
    pub a: Vec<f32>,
    /// `[out, rank]`.
    pub b: Vec<f32>,
}

/// Where a linear's adapter lies among all values of its [`Adapter`].
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Which.
    pub spec: ModuleSpec,
    /// Of the linear, `[out, in]`.
    pub shape: [usize; 2],
    /// A `[rank, in]`.
    pub a: Range<usize>,
    /// B `[out, rank]`.
    pub b: Range<usize>,
}

pub(super) struct Module<B: Backend> {
    pub(super) role: LayerRole,
    pub(super) part: Ranks,
    pub(super) scale: f32,
    pub(super) b: Param<B>,
}

/// The adapters of the linears that read one input.
pub(crate) struct SiteAdapter<B: Backend> {
    pub(crate) ranks: usize,
    /// `[ranks, in]`: the modules' A, one below the other.
    pub(crate) a: Param<B>,
    pub(super) modules: Vec<Module<B>>,
}

/// A site's adapter, and what it shrank the site's input to.
pub(crate) type Adapted<'a, B> = (&'a SiteAdapter<B>, In<'a, B, <B as Backend>::Acc>);

/// A linear in its backward: its role, the gradient of its output, and its weight.
pub(crate) type Backward<'a, B> = (LayerRole, In<'a, B, <B as Backend>::Acc>, &'a <B as Backend>::Weight);

/// A LoRA adapter on a device.
pub struct Adapter<B: Backend> {
    pub(super) layers: Vec<[Option<SiteAdapter<B>>; 4]>,
}

impl<B: Train> Adapter<B> {
    /// From the values of each module.
    ///
    /// # Errors
    /// A module that the model does not have, or that comes twice; values that do not fit its shape.
    pub fn new(be: &B, cfg: &ModelConfig, modules: &[ModuleValues]) -> Result<Self> {
        let mut layers = Vec::with_capacity(cfg.layers);
        for layer in 0..cfg.layers {
            let mut sites = [None, None, None, None];
            for (place, site) in sites.iter_mut().zip(Site::ALL) {
                *place = SiteAdapter::new(be, cfg, layer, site, modules)?;
            }
            layers.push(sites);
        }
        for m in modules {
            let ModuleSpec { role, layer, .. } = m.spec;
            ensure!(
                LayerRole::LINEARS.contains(&role) && layer < cfg.layers,
                Config,
                "layer {layer} has no linear {role} to adapt"
            );
            let same = modules.iter().filter(|o| o.spec.role == role && o.spec.layer == layer).count();
            ensure!(same == 1, Config, "layer {layer} {role} is adapted {same} times");
        }
        Ok(Self { layers })
    }

    /// A fresh one: A uniform in +-1/sqrt(in) (Kaiming's rule with slope sqrt(5)), B 0, so that it changes nothing yet.
    pub fn init(be: &B, cfg: &ModelConfig, specs: &[ModuleSpec], seed: u64) -> Result<Self> {
        let mut values = Vec::with_capacity(specs.len());
        for &spec in specs {
            let [out, input] = Role::Layer(spec.layer, spec.role).shape(cfg).unwrap_or([0, 0]);
            // One stream for each module: the others do not change what it begins as.
            let place = LayerRole::LINEARS.iter().position(|&r| r == spec.role).unwrap_or(0);
            let mut rng = Rng::stream(seed, (spec.layer * LayerRole::LINEARS.len() + place) as u64);
            let bound = (input.max(1) as f32).powf(-0.5);
            let a = (0..spec.rank * input).map(|_| bound * (2.0 * rng.uniform() - 1.0)).collect();
            values.push(ModuleValues { spec, a, b: vec![0.0; out * spec.rank] });
        }
        Self::new(be, cfg, &values)
    }

    /// The values of every module, layer by layer.
    pub fn to_host(&self, be: &B) -> Result<Vec<ModuleValues>> {
        let mut all = Vec::new();
        for (layer, site) in self.layers.iter().enumerate().flat_map(|(i, s)| s.iter().flatten().map(move |s| (i, s))) {
            let (a, input) = (site.a.to_host(be)?, site.a.shape[1]);
            for m in &site.modules {
                let spec = ModuleSpec { role: m.role, layer, rank: m.part.n, scale: m.scale };
                let a = a[m.part.first * input..][..m.part.n * input].to_vec();
                all.push(ModuleValues { spec, a, b: m.b.to_host(be)? });
            }
        }
        Ok(all)
    }

    /// sum_i weight_i scale_i B_i A_i as one adapter, exactly: its ranks are those of all, side by side.
    pub fn mix(be: &B, cfg: &ModelConfig, parts: &[(&Self, f32)]) -> Result<Self> {
        let mut mixed: Vec<ModuleValues> = Vec::new();
        for &(adapter, weight) in parts {
            for mut m in adapter.to_host(be)? {
                m.b.iter_mut().for_each(|b| *b *= weight * m.spec.scale);
                m.spec.scale = 1.0;
                let same = |o: &&mut ModuleValues| (o.spec.layer, o.spec.role) == (m.spec.layer, m.spec.role);
                let Some(to) = mixed.iter_mut().find(same) else {
                    mixed.push(m);
                    continue;
                };
                let (old, new) = (to.spec.rank, m.spec.rank);
                let rows = to.b.chunks(old).zip(m.b.chunks(new));
                to.b = rows.flat_map(|(x, y)| x.iter().chain(y)).copied().collect();
                to.a.extend(m.a);
                to.spec.rank = old + new;
            }
        }
        Self::new(be, cfg, &mixed)
    }

    /// Its modules, with the places of their A and B in one vector that holds every tensor of [`Adapter::params`] one after
    /// another.
    pub fn places(&self) -> Vec<Place> {
        let (mut places, mut at) = (Vec::new(), 0);
        for (layer, site) in self.layers.iter().enumerate().flat_map(|(i, s)| s.iter().flatten().map(move |s| (i, s))) {
            let (first, input) = (at, site.a.shape[1]);
            at += site.a.len();
            for m in &site.modules {
                let a = first + m.part.first * input;
                let spec = ModuleSpec { role: m.role, layer, rank: m.part.n, scale: m.scale };
                let b = at..at + m.b.len();
                at = b.end;
                places.push(Place { spec, shape: [m.b.shape[0], input], a: a..a + m.part.n * input, b });
            }
        }
        places
    }

    /// Every tensor, in a fixed order.
    pub fn params(&self) -> impl Iterator<Item = &Param<B>> {
        self.layers.iter().flatten().flatten().flat_map(|s| std::iter::once(&s.a).chain(s.modules.iter().map(|m| &m.b)))
    }

    /// As [`Adapter::params`], to change.
    pub fn params_mut(&mut self) -> impl Iterator<Item = &mut Param<B>> {
        let sites = self.layers.iter_mut().flatten().flatten();
        sites.flat_map(|s| std::iter::once(&mut s.a).chain(s.modules.iter_mut().map(|m| &mut m.b)))
    }

    /// Lets the adapters of layers train or not: gradients exist only where they do, and a backward pass ends at the
    /// lowest of them.
    pub fn train(&mut self, be: &B, layers: impl Fn(usize) -> bool) -> Result<()> {
        for (i, sites) in self.layers.iter_mut().enumerate() {
            for s in sites.iter_mut().flatten() {
                s.a.train(be, layers(i))?;
                s.modules.iter_mut().try_for_each(|m| m.b.train(be, layers(i)))?;
            }
        }
        Ok(())
    }

    /// The lowest layer that trains.
    pub fn lowest(&self) -> Option<usize> {
        self.layers.iter().position(|sites| sites.iter().flatten().any(SiteAdapter::trains))
    }

    pub(crate) fn site(&self, layer: usize, site: Site) -> Option<&SiteAdapter<B>> {
        self.layers[layer][site as usize].as_ref()
    }

    pub(crate) fn site_mut(&mut self, layer: usize, site: Site) -> Option<&mut SiteAdapter<B>> {
        self.layers[layer][site as usize].as_mut()
    }

    /// Most ranks at each of the four sites: q, k and v; o; gate and up; down.
    pub(crate) fn ranks(&self) -> [usize; 4] {
        let at = |site: usize| self.layers.iter().filter_map(|l| l[site].as_ref()).map(|s| s.ranks).max().unwrap_or(0);
        [0, 1, 2, 3].map(at)
    }
}

impl<B: Backend> Adapter<B> {
    /// Most ranks that modules with one input have together.
    pub(super) fn most_ranks(&self) -> usize {
        self.layers.iter().flatten().flatten().map(|s| s.ranks).max().unwrap_or(0)
    }

    /// Bytes of its values on the device.
    pub fn bytes(&self) -> usize {
        let site = |s: &SiteAdapter<B>| s.a.len() + s.modules.iter().map(|m| m.b.len()).sum::<usize>();
        self.layers.iter().flatten().flatten().map(site).sum::<usize>() * size_of::<B::Acc>()
    }
}

impl<B: Train> SiteAdapter<B> {
    fn new(be: &B, cfg: &ModelConfig, layer: usize, site: Site, all: &[ModuleValues]) -> Result<Option<Self>> {
        let here = |r: &LayerRole| all.iter().find(|m| m.spec.layer == layer && m.spec.role == *r);
        let values: Vec<&ModuleValues> = site.roles().iter().filter_map(here).collect();
        let ranks = values.iter().map(|m| m.spec.rank).sum();
        let (mut modules, mut a, mut input, mut first) = (Vec::new(), Vec::new(), 0, 0);
        for m in &values {
            let ModuleSpec { role, rank, scale, .. } = m.spec;
            let [out, width] = Role::Layer(layer, role).shape(cfg).unwrap_or([0, 0]);
            ensure!(rank > 0, Config, "layer {layer} {role}: an adapter of rank 0");
            let fits = m.a.len() == rank * width && m.b.len() == out * rank;
            ensure!(
                fits,
                Shape,
                "layer {layer} {role}: A of {} and B of {} values for rank {rank} on [{out}, {width}]",
                m.a.len(),
                m.b.len()
            );
            let part = Ranks { stride: ranks, first, n: rank };
            let b = Param::new(be, format!("layers.{layer}.{role}.b"), [out, rank], &m.b)?;
            modules.push(Module { role, part, scale, b });
            a.extend_from_slice(&m.a);
            (input, first) = (width, first + rank);
        }
        if values.is_empty() {
            return Ok(None);
        }
        let names: Vec<String> = values.iter().map(|m| m.spec.role.to_string()).collect();
        let a = Param::new(be, format!("layers.{layer}.{}.a", names.join("+")), [ranks, input], &a)?;
        Ok(Some(Self { ranks, a, modules }))
    }

    fn trains(&self) -> bool {
        self.a.g.is_some() || self.modules.iter().any(|m| m.b.g.is_some())
    }

    /// h = A x.
    fn shrink(&self, be: &B, h: Out<'_, B, B::Acc>, x: In<'_, B, B::Act>, rows: usize) -> Result<()> {
        be.lora_shrink(h, x, self.ranks, &[Group { rows, matrix: self.a.values(), scale: 1.0 }])
    }

    /// `site`, if anything is adapted there, with its input shrunk into `h`.
    pub(crate) fn shrunk<'a>(
        be: &B,
        site: Option<&'a Self>,
        h: &'a mut B::Buf<B::Acc>,
        x: In<'_, B, B::Act>,
        rows: usize,
    ) -> Result<Option<Adapted<'a, B>>> {
        let Some(site) = site else { return Ok(None) };
        site.shrink(be, h.head_mut(rows * site.ranks), x, rows)?;
        Ok(Some((site, h.head(rows * site.ranks))))
    }

    /// y (+)= W x (+ bias), and scale B h where the linear is adapted; `site` is what its input is shrunk by, with what
    /// that gave.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn linear(
        be: &B,
        site: Option<Adapted<'_, B>>,
        role: LayerRole,
        y: &mut B::Buf<B::Acc>,
        x: In<'_, B, B::Act>,
        w: &B::Weight,
        bias: Option<&B::Buf<B::Acc>>,
        write: Write,
        rows: usize,
    ) -> Result<()> {
        let adapted = site.and_then(|(s, h)| s.modules.iter().find(|m| m.role == role).map(|m| (m, h)));
        let Some((m, h)) = adapted else {
            return be.linear_fwd(y.head_mut(rows * w.rows()), x, w, bias, write);
        };
        be.linear_lora_fwd(y, x, w, bias, write, h, m.part, Group { rows, matrix: m.b.values(), scale: m.scale })
    }

    /// Backward of linears that read one input `x`, from the gradients of their outputs: the gradients of what adapts them, `site`, if
    /// anything does, and, where `dx` is wanted, that of the input. `h` is what [`SiteAdapter::shrink`] gave.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn linears_backward<'a, const N: usize>(
        be: &B,
        site: Option<&mut Self>,
        linears: [Backward<'a, B>; N],
        x: In<'_, B, B::Act>,
        h: &B::Buf<B::Acc>,
        dh: &mut B::Buf<B::Acc>,
        dx: Option<&mut B::Buf<B::Acc>>,
        rows: usize,
    ) -> Result<()> {
        let mut lora = None;
        if let Some(site) = site {
            site.backward(be, &linears.map(|(role, dy, _)| (role, dy)), h.head(rows * site.ranks), x, dh, rows)?;
            lora = Some((dh.head(rows * site.ranks), site.ranks, site.a.values()));
        }
        match dx {
            Some(dx) => be.linears_bwd_x(dx, rows, &linears.map(|(_, dy, w)| (dy, w)), lora),
            None => Ok(()),
        }
    }

    /// From the gradients `dys` of the linears' outputs: the adapters' gradients, and in `dh` that of what
    /// [`SiteAdapter::shrink`] gave, `h`.
    fn backward(
        &mut self,
        be: &B,
        dys: &[(LayerRole, In<'_, B, B::Acc>)],
        h: In<'_, B, B::Acc>,
        x: In<'_, B, B::Act>,
        dh: &mut B::Buf<B::Acc>,
        rows: usize,
    ) -> Result<()> {
        let n = rows * self.ranks;
        for m in &mut self.modules {
            let Some((_, dy)) = dys.iter().find(|(role, _)| *role == m.role) else { continue };
            be.lora_expand_bwd(dh.head_mut(n), *dy, m.part, &[Group { rows, matrix: m.b.values(), scale: m.scale }])?;
            if let Some(g) = m.b.grad() {
                be.lora_bwd_b(g, *dy, h, m.part, m.scale)?;
            }
        }
        let ranks = self.ranks;
        match self.a.grad() {
            Some(g) => be.lora_bwd_a(g, dh.head(n), x, ranks),
            None => Ok(()),
        }
    }
}
