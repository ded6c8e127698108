//! Keys and values of one sequence, laid out for attention.
//!
//! A layer is a run of blocks of [`BLOCK`] rows. A block holds its keys transposed, `[kv_dim, 16]`, so that sixteen scores
//! are computed in the lanes of vectors, and behind them its values, `[16, kv_dim]`. A head is a range of columns in both.
//! What a sequence has not reached has never been touched, so it takes address space but no memory.

use half::f16;

use super::lanes::tiles::BLOCK;
use super::lanes::{Element, Kernel, Simd, dispatch};
use super::pool::Pool;
use super::{Compute, Tier};
use crate::error::{Error, ErrorKind, Result, ensure};

/// Elements below which a job is not worth waking another thread.
const SMALL: usize = 16 * 1024;

/// The cache of one sequence: keys and values of all layers, f32 or f16.
pub struct CpuKv {
    store: Store,
    layers: usize,
    capacity: usize,
    kv_dim: usize,
    blocks: usize,
}

enum Store {
    F32(Zeroed<f32>),
    F16(Zeroed<u16>),
}

/// Zeros from the operating system, which gives memory only to the pages that are written. Aligned by an offset: an
/// allocation of higher alignment would be zeroed by hand, hence touched.
struct Zeroed<T> {
    data: Vec<T>,
    at: usize,
    len: usize,
}

impl<T> Zeroed<T> {
    /// Of zeros with [`Self::SLACK`] to spare.
    fn new(data: Vec<T>) -> Self {
        let at = data.as_ptr().align_offset(64).min(Self::SLACK);
        Self { len: data.len() - Self::SLACK, data, at }
    }
    const SLACK: usize = 64 / size_of::<T>();
    fn get(&self) -> &[T] {
        &self.data[self.at..self.at + self.len]
    }
    fn get_mut(&mut self) -> &mut [T] {
        &mut self.data[self.at..self.at + self.len]
    }
}

/// One layer's blocks and [`BLOCK`] elements more.
#[derive(Clone, Copy)]
pub(super) enum Layer<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

macro_rules! with_store {
    ($store:expr, $x:ident => $e:expr) => {
        match $store {
            Store::F32(z) => {
                let $x: &mut [f32] = z.get_mut();
                $e
            }
            Store::F16(z) => {
                let $x: &mut [f16] = bytemuck::cast_slice_mut(z.get_mut());
                $e
            }
        }
    };
}

impl CpuKv {
    /// An empty cache of `capacity` rows and `kv_dim` columns for each of keys and values: f32 under [`Compute::Exact`], f16
    /// under [`Compute::Fast`].
    ///
    /// # Errors
    /// A size that no address space holds.
    pub fn alloc(layers: usize, capacity: usize, kv_dim: usize, compute: Compute) -> Result<Self> {
        let blocks = capacity.div_ceil(BLOCK);
        let len = (blocks * 2 * BLOCK).checked_mul(kv_dim).and_then(|n| n.checked_mul(layers)?.checked_add(BLOCK));
        let Some(len) = len.filter(|n| *n < isize::MAX as usize / 8) else {
            let what = format!("a cache of {layers} layers, {capacity} rows and {kv_dim} columns is too large");
            return Err(Error::new(ErrorKind::Capacity, what));
        };
        let store = match compute {
            Compute::Exact => Store::F32(Zeroed::new(vec![0.0; len + Zeroed::<f32>::SLACK])),
            Compute::Fast => Store::F16(Zeroed::new(vec![0; len + Zeroed::<u16>::SLACK])),
        };
        Ok(Self { store, layers, capacity, kv_dim, blocks })
    }

    /// Rows that it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Columns of keys, and of values.
    pub fn kv_dim(&self) -> usize {
        self.kv_dim
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Bytes that one row takes in all layers.
    pub fn row_bytes(&self) -> usize {
        let element = if matches!(self.store, Store::F32(_)) { 4 } else { 2 };
        2 * self.layers * self.kv_dim * element
    }

    fn layer_len(&self) -> usize {
        self.blocks * 2 * BLOCK * self.kv_dim
    }

    pub(super) fn layer(&self, layer: usize) -> Layer<'_> {
        let n = self.layer_len();
        let r = layer * n..(layer + 1) * n + BLOCK;
        match &self.store {
            Store::F32(z) => Layer::F32(&z.get()[r]),
            Store::F16(z) => Layer::F16(&bytemuck::cast_slice(z.get())[r]),
        }
    }

    /// Rows `at..` of a layer become the rows of `k` and `v`, both `[rows, kv_dim]`.
    ///
    /// # Errors
    /// Rows beyond the capacity, no such layer, or lengths that do not fit.
    pub fn stage(&mut self, pool: &Pool, tier: Tier, layer: usize, at: usize, k: &[f32], v: &[f32]) -> Result<()> {
        let (dim, cap) = (self.kv_dim, self.capacity);
        ensure!(layer < self.layers, Shape, "layer {layer} of a cache of {} layers", self.layers);
        ensure!(
            k.len() == v.len() && k.len().is_multiple_of(dim.max(1)),
            Shape,
            "{} keys and {} values are not rows of {dim} columns",
            k.len(),
            v.len()
        );
        let rows = k.len() / dim.max(1);
        if rows == 0 {
            return Ok(());
        }
        ensure!(rows <= cap && at <= cap - rows, Capacity, "{rows} rows behind row {at} of a cache of {cap} rows");
        let (first, last, len) = (at / BLOCK, (at + rows - 1) / BLOCK, 2 * BLOCK * dim);
        let base = layer * self.layer_len();
        with_store!(&mut self.store, data => {
            let blocks = &mut data[base + first * len..base + (last + 1) * len];
            let fill = |i: usize, block: &mut [_]| {
                let from = ((first + i) * BLOCK).max(at);
                let to = ((first + i + 1) * BLOCK).min(at + rows);
                let r = (from - at) * dim..(to - at) * dim;
                dispatch(tier, Fill { block, k: &k[r.clone()], v: &v[r], lane: from % BLOCK, dim });
            };
            if k.len() < SMALL {
                blocks.chunks_mut(len).enumerate().for_each(|(i, b)| fill(i, b));
            } else {
                pool.run_chunks(blocks, len, fill);
            }
        });
        Ok(())
    }

    /// In all layers row `past + i` becomes what row `past + rows[i]` was. `rows` ascends strictly, so nothing is overwritten
    /// that is still to be read.
    ///
    /// # Errors
    /// Rows that do not ascend strictly or lie beyond the capacity.
    pub fn commit(&mut self, past: usize, rows: &[u32]) -> Result<()> {
        ensure!(rows.is_sorted_by(|a, b| a < b), Shape, "rows to commit do not ascend strictly: {rows:?}");
        if let Some(&last) = rows.last() {
            let (last, cap) = (last as usize, self.capacity);
            ensure!(last < cap && past < cap - last, Capacity, "row {past} + {last} of a cache of {cap} rows");
        }
        let (dim, n) = (self.kv_dim, self.layer_len());
        if n == 0 {
            return Ok(());
        }
        with_store!(&mut self.store, data => {
            for layer in data.chunks_exact_mut(n).take(self.layers) {
                for (i, &row) in rows.iter().enumerate() {
                    copy_row(layer, past + row as usize, past + i, dim);
                }
            }
        });
        Ok(())
    }

    /// Copies the first `len` rows of all layers of `src`; the capacities may differ.
    ///
    /// # Errors
    /// Caches of different shape or element type, or more rows than either holds.
    pub fn copy_from(&mut self, src: &Self, len: usize) -> Result<()> {
        ensure!(
            self.layers == src.layers && self.kv_dim == src.kv_dim,
            Shape,
            "a cache of {} layers and {} columns cannot be copied to one of {} and {}",
            src.layers,
            src.kv_dim,
            self.layers,
            self.kv_dim
        );
        let cap = self.capacity.min(src.capacity);
        ensure!(len <= cap, Capacity, "{len} rows to copy between caches of which one holds {cap}");
        let (to, from, n) = (self.layer_len(), src.layer_len(), len.div_ceil(BLOCK) * 2 * BLOCK * self.kv_dim);
        for l in 0..self.layers {
            let (to, from) = (l * to..l * to + n, l * from..l * from + n);
            match (&mut self.store, &src.store) {
                (Store::F32(a), Store::F32(b)) => a.get_mut()[to].copy_from_slice(&b.get()[from]),
                (Store::F16(a), Store::F16(b)) => a.get_mut()[to].copy_from_slice(&b.get()[from]),
                _ => {
                    return Err(Error::new(
                        ErrorKind::Shape,
                        "caches of f32 and of f16 cannot be copied to each other",
                    ));
                }
            }
        }
        Ok(())
    }

    /// Every element becomes `x`, for tests that nothing is read that was not written.
    #[cfg(test)]
    pub(super) fn fill(&mut self, x: f32) {
        match &mut self.store {
            Store::F32(z) => z.data.fill(x),
            Store::F16(z) => z.data.fill(f16::from_f32(x).to_bits()),
        }
    }
}

/// Copies one row inside a layer.
fn copy_row<E: Copy>(layer: &mut [E], from: usize, to: usize, dim: usize) {
    if from == to {
        return;
    }
    let block = |row: usize| row / BLOCK * 2 * BLOCK * dim;
    let (f, t) = (block(from) + from % BLOCK, block(to) + to % BLOCK);
    for c in 0..dim {
        layer[t + c * BLOCK] = layer[f + c * BLOCK];
    }
    let value = |row: usize| block(row) + (BLOCK + row % BLOCK) * dim;
    layer.copy_within(value(from)..value(from) + dim, value(to));
}

/// Rows into one block, from row `lane` of it on.
struct Fill<'a, E> {
    block: &'a mut [E],
    k: &'a [f32],
    v: &'a [f32],
    lane: usize,
    dim: usize,
}

impl<E: Element> Kernel for Fill<'_, E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (keys, values) = self.block.split_at_mut(BLOCK * self.dim);
        let mut narrow = [E::default(); 16];
        for (i, row) in self.k.chunks_exact(self.dim).enumerate() {
            let lane = self.lane + i;
            for (x, keys) in row.chunks(S::N).zip(keys.chunks_mut(S::N * BLOCK)) {
                s.store(s.load_part(x, 0.0), &mut narrow);
                for (keys, &x) in keys.chunks_exact_mut(BLOCK).zip(&narrow) {
                    keys[lane] = x;
                }
            }
        }
        let values = &mut values[self.lane * self.dim..];
        for (x, y) in self.v.chunks(S::N).zip(values.chunks_mut(S::N)) {
            if x.len() == S::N && y.len() == S::N {
                s.store(s.load(x), y);
            } else {
                s.store(s.load_part(x, 0.0), &mut narrow);
                y[..x.len()].copy_from_slice(&narrow[..x.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Row `row` of a layer, keys then values.
    fn row(kv: &CpuKv, layer: usize, row: usize) -> Vec<f32> {
        let (d, at) = (kv.kv_dim, row / BLOCK * 2 * BLOCK * kv.kv_dim);
        let index =
            (0..d).map(|c| at + c * BLOCK + row % BLOCK).chain((0..d).map(|c| at + (BLOCK + row % BLOCK) * d + c));
        match kv.layer(layer) {
            Layer::F32(x) => index.map(|i| x[i]).collect(),
            Layer::F16(x) => index.map(|i| x[i].to_f32()).collect(),
        }
    }

    fn rounded(x: f32, compute: Compute) -> f32 {
        if compute == Compute::Exact { x } else { f16::from_f32(x).to_f32() }
    }

    /// Random programs of stage, commit and copy against vectors of rows.
    #[test]
    fn a_cache_is_a_list_of_rows() {
        let mut rng = Rng::new(5);
        let pool = Pool::new(2);
        for (dim, compute) in [(6, Compute::Exact), (96, Compute::Fast), (50, Compute::Fast), (640, Compute::Exact)] {
            for tier in Tier::available() {
                let (layers, cap) = (3, 100);
                let mut kv = CpuKv::alloc(layers, cap, dim, compute).unwrap();
                kv.fill(f32::NAN);
                let mut model: Vec<Vec<Vec<f32>>> = vec![Vec::new(); layers];
                for _ in 0..30 {
                    let past = model[0].len();
                    let n = (1 + rng.below(50)).min(cap - past);
                    if n < 2 {
                        model.iter_mut().for_each(|m| m.truncate(7));
                        continue;
                    }
                    let pick: Vec<u32> = (0..n as u32).filter(|_| rng.below(3) > 0).collect();
                    for (l, m) in model.iter_mut().enumerate() {
                        let k: Vec<f32> = (0..n * dim).map(|_| rng.normal()).collect();
                        let v: Vec<f32> = (0..n * dim).map(|_| rng.normal()).collect();
                        kv.stage(&pool, tier, l, past, &k, &v).unwrap();
                        m.extend(pick.iter().map(|&r| {
                            let r = r as usize * dim..(r as usize + 1) * dim;
                            k[r.clone()].iter().chain(&v[r]).map(|&x| rounded(x, compute)).collect()
                        }));
                    }
                    kv.commit(past, &pick).unwrap();
                    for (l, m) in model.iter().enumerate() {
                        m.iter().enumerate().for_each(|(r, x)| assert_eq!(&row(&kv, l, r), x, "{tier} {dim} {l} {r}"));
                    }
                    let mut other = CpuKv::alloc(layers, cap + 40, dim, compute).unwrap();
                    other.copy_from(&kv, model[0].len()).unwrap();
                    for (l, m) in model.iter().enumerate() {
                        m.iter().enumerate().for_each(|(r, x)| assert_eq!(&row(&other, l, r), x));
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let pool = Pool::new(1);
        let mut kv = CpuKv::alloc(2, 20, 8, Compute::Fast).unwrap();
        let x = vec![0.0; 16 * 8];
        let mut stage =
            |layer, at, k: &[f32], v: &[f32]| kv.stage(&pool, Tier::Portable, layer, at, k, v).map_err(|e| e.kind());
        assert_eq!(stage(0, 4, &x, &x), Ok(()));
        assert_eq!(stage(0, 5, &x, &x), Err(ErrorKind::Capacity));
        assert_eq!(stage(0, usize::MAX, &x, &x), Err(ErrorKind::Capacity));
        assert_eq!(stage(2, 0, &x, &x), Err(ErrorKind::Shape));
        assert_eq!(stage(0, 0, &x[1..], &x), Err(ErrorKind::Shape));
        assert!(kv.commit(0, &[1, 1]).is_err() && kv.commit(10, &[10]).is_err() && kv.commit(10, &[9]).is_ok());
        assert!(kv.copy_from(&CpuKv::alloc(2, 20, 8, Compute::Exact).unwrap(), 1).is_err());
        assert!(kv.copy_from(&CpuKv::alloc(2, 30, 8, Compute::Fast).unwrap(), 21).is_err());
        assert!(CpuKv::alloc(usize::MAX, 64, 64, Compute::Fast).is_err());
    }

    /// Only the rows that were written take memory.
    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_touched_as_rows_arrive() {
        let resident = || {
            let s = std::fs::read_to_string("/proc/self/statm").unwrap();
            s.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let (pool, before) = (Pool::new(1), resident());
        let mut kv = CpuKv::alloc(8, 1 << 17, 1024, Compute::Exact).unwrap();
        let x = vec![1.0; 1024];
        kv.stage(&pool, Tier::detect(), 7, 0, &x, &x).unwrap();
        assert!(resident() < before + (1 << 30), "8 GiB were touched");
        assert_eq!(kv.row_bytes(), 8 * 2 * 1024 * 4);
    }
}
