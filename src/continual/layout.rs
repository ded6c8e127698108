//! Where the values of an adapter's modules lie in one flat vector: what the algorithms of this folder work on.

use std::ops::Range;

use crate::backend::Train;
use crate::error::{Result, ensure};
use crate::model::{Adapter, Param, Place};

/// A linear that is adapted, y = W x + scale B A x.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Unique among the modules, such as `layers.3.q`.
    pub name: String,
    /// Its block, from the input.
    pub layer: usize,
    /// Rows of A, columns of B.
    pub rank: usize,
    /// Columns of A.
    pub input: usize,
    /// Rows of B.
    pub output: usize,
    /// A `[rank, input]` in the flat vector.
    pub a: Range<usize>,
    /// B `[output, rank]` in the flat vector.
    pub b: Range<usize>,
}

/// The adapted modules in the order in which the forward pass meets them, and the length of the flat vector. What of it belongs
/// to no module (a classifier's head) trains with them and is looked at by no signature.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// From the input to the output.
    pub modules: Vec<Module>,
    /// Values in all.
    pub len: usize,
}

impl Layout {
    /// Of modules with these places among `len` values; names begin with `prefix`.
    pub fn new(prefix: &str, places: Vec<Place>, len: usize) -> Self {
        let module = |p: Place| {
            let (name, layer) = (format!("{prefix}.{}.{}", p.spec.layer, p.spec.role), p.spec.layer);
            Module { name, layer, rank: p.spec.rank, input: p.shape[1], output: p.shape[0], a: p.a, b: p.b }
        };
        Self { modules: places.into_iter().map(module).collect(), len }
    }

    /// Of a decoder's adapter.
    pub fn of_adapter<B: Train>(adapter: &Adapter<B>) -> Self {
        Self::new("layers", adapter.places(), adapter.params().map(Param::len).sum())
    }

    /// Refuses modules whose parts do not lie in the vector or have other sizes than their shapes say.
    ///
    /// # Errors
    /// `Shape`, naming the module.
    pub fn check(&self) -> Result<()> {
        for m in &self.modules {
            let sizes = m.a.len() == m.rank * m.input && m.b.len() == m.output * m.rank;
            let inside = m.a.end <= self.len && m.b.end <= self.len;
            ensure!(sizes && inside, Shape, "{}: A at {:?}, B at {:?} of {} values", m.name, m.a, m.b, self.len);
        }
        Ok(())
    }

    /// Modules, cut into `groups` runs of nearly equal length, those near the input first. There is at least one run, and none
    /// is empty.
    pub fn groups(&self, groups: usize) -> Vec<Range<usize>> {
        let (n, groups) = (self.modules.len(), groups.clamp(1, self.modules.len().max(1)));
        (0..groups).map(|g| g * n / groups..(g + 1) * n / groups).collect()
    }
}
