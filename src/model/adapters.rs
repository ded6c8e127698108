//! Adapters of a decoding pass that are not merged into the weights: sequences with different ones, and with none, in one pass.
//!
//! A linear is computed for all rows by its weight, which is read once, and then the rows that have an adapter there get
//! scale B A x added to theirs. Consecutive rows of one matrix are one [`Group`]; consecutive groups of one rank are one call.

use std::ops::Range;
use std::sync::Arc;

use super::lora::{Adapter, Site, SiteAdapter};
use super::roles::LayerRole;
use crate::backend::{Backend, Buffer, Group, Ranks};
use crate::error::{Result, ensure};

/// Which adapter each layer of a sequence uses, or none. Adapters are shared: as long as a map is there, so are they.
pub struct AdapterMap<B: Backend> {
    layers: Vec<Option<Arc<Adapter<B>>>>,
    ranks: usize,
}

impl<B: Backend> AdapterMap<B> {
    /// One adapter in every layer that it has modules for.
    pub fn one(adapter: Arc<Adapter<B>>) -> Self {
        let ranks = adapter.most_ranks();
        Self { layers: adapter.layers.iter().map(|_| Some(adapter.clone())).collect(), ranks }
    }

    /// For a model of `layers` layers: in each of these ranges the modules that its adapter has there, elsewhere none.
    ///
    /// # Errors
    /// `Usage` for ranges that are empty, overlap or leave the model; `Shape` for an adapter of a model with other layers.
    pub fn of_ranges(layers: usize, parts: &[(Range<usize>, Arc<Adapter<B>>)]) -> Result<Self> {
        let mut map = Self { layers: vec![None; layers], ranks: 0 };
        for (range, adapter) in parts {
            let good = range.start < range.end && range.end <= layers;
            ensure!(good, Usage, "adapters: layers {range:?} of a model with {layers}");
            let has = adapter.layers.len();
            ensure!(has == layers, Shape, "adapters: one for {has} layers, in a model with {layers}");
            for (i, layer) in map.layers.iter_mut().enumerate().take(range.end).skip(range.start) {
                ensure!(layer.is_none(), Usage, "adapters: layer {i} is given two");
                *layer = Some(adapter.clone());
            }
            map.ranks = map.ranks.max(adapter.most_ranks());
        }
        Ok(map)
    }

    /// Most ranks that modules with one input have together: columns of what a pass keeps for a row.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    fn site(&self, layer: usize, site: Site) -> Option<&SiteAdapter<B>> {
        self.layers[layer].as_ref()?.layers[layer][site as usize].as_ref()
    }
}

/// The rows of a pass, sequence after sequence, with their adapters.
pub(super) struct Spans<'a, B: Backend> {
    /// Empty where no sequence has an adapter.
    spans: Vec<(usize, Option<&'a AdapterMap<B>>)>,
    /// Room for the groups of a call.
    groups: Vec<Group<'a, B>>,
}

impl<'a, B: Backend> Spans<'a, B> {
    /// Of sequences of so many rows.
    ///
    /// # Errors
    /// `Shape` for adapters of a model with other than `layers` layers.
    pub fn of(seqs: impl Iterator<Item = (usize, Option<&'a AdapterMap<B>>)> + Clone, layers: usize) -> Result<Self> {
        if seqs.clone().all(|s| s.1.is_none()) {
            return Ok(Self { spans: Vec::new(), groups: Vec::new() });
        }
        let spans: Vec<_> = seqs.filter(|s| s.0 > 0).collect();
        for map in spans.iter().filter_map(|s| s.1) {
            let n = map.layers.len();
            ensure!(n == layers, Shape, "adapters for a model of {n} layers, in one of {layers}");
        }
        let groups = Vec::with_capacity(spans.len());
        Ok(Self { spans, groups })
    }

    /// Most ranks of an input.
    pub fn ranks(&self) -> usize {
        self.spans.iter().filter_map(|s| s.1).map(|m| m.ranks).max().unwrap_or(0)
    }

    /// Whether any row is adapted here.
    pub fn has(&self, layer: usize, site: Site) -> bool {
        self.spans.iter().any(|(_, map)| map.is_some_and(|m| m.site(layer, site).is_some()))
    }

    /// h = A x of the rows that have an adapter here, one behind the other.
    pub fn shrink(
        &mut self,
        be: &B,
        h: &mut B::Buf<B::Acc>,
        x: &B::Buf<B::Act>,
        layer: usize,
        site: Site,
    ) -> Result<()> {
        let part = |s: &'a SiteAdapter<B>| {
            Some((Ranks::all(s.ranks), s.a.shape[1], Group { rows: 0, matrix: s.a.values(), scale: 1.0 }))
        };
        self.runs(layer, site, part, |run, groups| {
            let (x, h) = (x.view(run.of(run.width)), h.view_mut(run.shrunk()));
            be.shrink_rows(h, x, run.part.stride, groups)
        })
    }

    /// y, which begins at element `first`, += scale B h for the rows that have an adapter on this linear.
    pub fn expand(
        &mut self,
        be: &B,
        y: &mut B::Buf<B::Acc>,
        first: usize,
        h: &B::Buf<B::Acc>,
        layer: usize,
        role: LayerRole,
    ) -> Result<()> {
        let part = |s: &'a SiteAdapter<B>| {
            let m = s.modules.iter().find(|m| m.role == role)?;
            Some((m.part, m.b.shape[0], Group { rows: 0, matrix: m.b.values(), scale: m.scale }))
        };
        let Some(site) = Site::of(role) else { return Ok(()) };
        self.runs(layer, site, part, |run, groups| {
            let rows = run.of(run.width);
            be.expand_rows(y.view_mut(first + rows.start..first + rows.end), h.view(run.shrunk()), run.part, groups)
        })
    }

    /// Calls `call` for runs of rows with equal `part`s, as long as they can be, with their groups.
    fn runs(
        &mut self,
        layer: usize,
        site: Site,
        part: impl Fn(&'a SiteAdapter<B>) -> Option<(Ranks, usize, Group<'a, B>)>,
        mut call: impl FnMut(&Run, &[Group<'a, B>]) -> Result<()>,
    ) -> Result<()> {
        let (mut row, mut at) = (0, 0);
        let (mut run, mut last): (Option<Run>, Option<&SiteAdapter<B>>) = (None, None);
        self.groups.clear();
        for &(rows, map) in &self.spans {
            let here = map.and_then(|m| m.site(layer, site));
            let wanted = here.and_then(&part);
            if let Some(r) = run.take_if(|r| wanted.is_none_or(|w| (w.0, w.1) != (r.part, r.width))) {
                call(&r, &self.groups)?;
                self.groups.clear();
                last = None;
            }
            if let Some((part, width, group)) = wanted {
                let r = run.get_or_insert(Run { row, at, rows: 0, part, width });
                r.rows += rows;
                let same = last.zip(here).is_some_and(|(a, b)| std::ptr::eq(a, b));
                match self.groups.last_mut() {
                    Some(g) if same => g.rows += rows,
                    _ => self.groups.push(Group { rows, ..group }),
                }
                last = here;
            }
            row += rows;
            at += rows * here.map_or(0, |s| s.ranks);
        }
        run.map_or(Ok(()), |r| call(&r, &self.groups))
    }
}

/// Consecutive rows for one call.
struct Run {
    /// The first of them in the pass.
    row: usize,
    /// Where their shrunk inputs begin.
    at: usize,
    rows: usize,
    part: Ranks,
    /// Columns of what is not shrunk.
    width: usize,
}

impl Run {
    /// Its elements of rows with so many columns.
    fn of(&self, width: usize) -> Range<usize> {
        self.row * width..(self.row + self.rows) * width
    }

    fn shrunk(&self) -> Range<usize> {
        self.at..self.at + self.rows * self.part.stride
    }
}
