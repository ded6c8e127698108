//! Attention in training: which tiles of rows look into which, and the launches.

use std::sync::Arc;

use half::bf16;

use super::super::device::{Slot, Stream, lock};
use super::super::kernels::{self as k, Kernel};
use super::super::memory::{CudaBuf, Dst, Src};
use super::super::{Cuda, args};
use crate::backend::{AttnSpec, Buffer, Visible};
use crate::error::{Result, ensure};

/// Rows of a tile.
const TILE: usize = 64;
/// Masks whose tables are kept: layers of a pass take turns with a few.
const KEPT: usize = 4;

/// What the kernels know of a mask, on the device.
pub(in super::super) struct Sight {
    visible: Visible,
    ranges: CudaBuf<u32>,
    ends: CudaBuf<u32>,
    /// By query tile, and by key tile.
    tiles: [(CudaBuf<u32>, CudaBuf<u32>); 2],
}

impl Sight {
    fn new(stream: &Arc<Stream>, visible: &Visible) -> Result<Self> {
        let (ranges, ends) = visible.parts();
        let table = |lists: &[Vec<u32>]| -> Result<_> {
            let ends = lists.iter().scan(0, |n, list| {
                *n += list.len() as u32;
                Some(*n)
            });
            Ok((CudaBuf::of(stream, &lists.concat())?, CudaBuf::of(stream, &ends.collect::<Vec<_>>())?))
        };
        let [queries, keys] = tiles(visible);
        Ok(Self {
            visible: visible.clone(),
            ranges: CudaBuf::of(stream, ranges.as_flattened())?,
            ends: CudaBuf::of(stream, ends)?,
            tiles: [table(&queries)?, table(&keys)?],
        })
    }

    fn sights(&self) -> u32 {
        (self.ranges.len() / 2) as u32
    }
}

/// Of each tile of rows the tiles that its rows look into, ascending: twice the number, and 1 more where all rows see all. Then
/// the same from the other side.
fn tiles(visible: &Visible) -> [Vec<Vec<u32>>; 2] {
    let n = visible.rows().div_ceil(TILE);
    let (mut queries, mut keys) = (vec![Vec::new(); n], vec![Vec::new(); n]);
    for (tile, list) in queries.iter_mut().enumerate() {
        // Changes, from tile to tile, of how many ranges reach into it and of how many rows see all of it.
        let (mut reach, mut whole) = (vec![0i64; n + 1], vec![0i64; n + 1]);
        let rows = tile * TILE..visible.rows().min((tile + 1) * TILE);
        for &[first, end] in rows.flat_map(|i| visible.row(i)) {
            let (first, end) = (first as usize, end as usize);
            reach[first / TILE] += 1;
            reach[(end - 1) / TILE + 1] -= 1;
            if first.div_ceil(TILE) < end / TILE {
                whole[first.div_ceil(TILE)] += 1;
                whole[end / TILE] -= 1;
            }
        }
        let (mut reached, mut all) = (0, 0);
        for (key, seen) in keys.iter_mut().enumerate() {
            reached += reach[key];
            all += whole[key];
            if reached > 0 {
                let all = u32::from(all == TILE as i64);
                list.push(2 * key as u32 + all);
                seen.push(2 * tile as u32 + all);
            }
        }
    }
    [queries, keys]
}

/// The kernels of a head size.
struct Head {
    forward: Kernel<args::TrainAttend>,
    dq: Kernel<args::TrainAttendBwd>,
    dkv: Kernel<args::TrainAttendBwd>,
    /// Columns that a block makes, and rows that it takes at a time, forward and backward.
    slice: usize,
    take: [usize; 2],
}

impl Head {
    fn of(dim: usize) -> Self {
        macro_rules! head {
            ($forward:ident, $dq:ident, $dkv:ident, $slice:literal, $take:expr) => {
                Head { forward: k::$forward, dq: k::$dq, dkv: k::$dkv, slice: $slice, take: $take }
            };
        }
        match dim {
            64 => head!(TRAIN_ATTEND_64, ATTEND_DQ_64, ATTEND_DKV_64, 64, [64, 32]),
            96 => head!(TRAIN_ATTEND_96, ATTEND_DQ_96, ATTEND_DKV_96, 96, [64, 32]),
            128 => head!(TRAIN_ATTEND_128, ATTEND_DQ_128, ATTEND_DKV_128, 128, [64, 32]),
            256 => head!(TRAIN_ATTEND_256, ATTEND_DQ_256, ATTEND_DKV_256, 128, [32, 16]),
            _ => head!(TRAIN_ATTEND_ANY, ATTEND_DQ_ANY, ATTEND_DKV_ANY, 64, [16, 16]),
        }
    }
}

impl Cuda {
    /// The tables of a mask, sent unless they are there.
    fn sight(&self, visible: &Visible) -> Result<Arc<Sight>> {
        let mut kept = lock(&self.sights);
        if let Some(at) = kept.iter().position(|s| s.visible == *visible) {
            let sight = kept.remove(at);
            kept.push(sight.clone());
            return Ok(sight);
        }
        let sight = Arc::new(Sight::new(&self.stream, visible)?);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(sight.clone());
        Ok(sight)
    }

    fn fits(&self, shared: usize, spec: &AttnSpec) -> Result<usize> {
        let most = self.stream.shared_memory();
        ensure!(shared <= most, Shape, "heads of {} exceed the GPU's shared memory of {most} bytes", spec.head_dim);
        Ok(shared)
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn run_attend(
        &self,
        y: Dst<'_, bf16>,
        lse: Dst<'_, f32>,
        q: Src<'_, f32>,
        k: Src<'_, f32>,
        v: Src<'_, f32>,
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        let rows = lse.len() / spec.heads;
        visible.check(rows)?;
        if rows == 0 {
            return Ok(());
        }
        let (d, group, s) = (spec.head_dim, spec.heads / spec.kv_heads, self.sight(visible)?);
        let (tiles, tile_ends) = &s.tiles[0];
        let args = args::TrainAttend::new(
            q,
            k,
            v,
            s.ranges.all(),
            s.ends.all(),
            tiles.all(),
            tile_ends.all(),
            y,
            lse,
            rows as u32,
            spec.kv_heads as u32,
            group as u32,
            d as u32,
            s.sights(),
            tiles.len() as u32,
            spec.scale,
        )?;
        let head = Head::of(d);
        let (w, ld) = (head.take[0], d.div_ceil(16) * 16 + 8);
        let shared = self.fits(2 * ((TILE + w) * ld + w * (head.slice + 8)) + 512, spec)?;
        let grid = [rows.div_ceil(TILE), spec.heads, d.div_ceil(head.slice)];
        self.launch(head.forward, args, grid, 128, shared)
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn run_attend_bwd(
        &self,
        [dq, dk, dv]: [Dst<'_, f32>; 3],
        dy: Src<'_, f32>,
        y: Src<'_, bf16>,
        lse: Src<'_, f32>,
        [q, k, v]: [Src<'_, f32>; 3],
        visible: &Visible,
        spec: &AttnSpec,
    ) -> Result<()> {
        let rows = lse.len() / spec.heads;
        visible.check(rows)?;
        if rows == 0 {
            return Ok(());
        }
        let (d, group, s) = (spec.head_dim, spec.heads / spec.kv_heads, self.sight(visible)?);
        let [(tiles, tile_ends), (turned, turned_ends)] = &s.tiles;
        let mut small = self.small();
        let delta = small.room(&self.stream, Slot::Stats, rows * spec.heads)?;
        let args = args::TrainAttendBwd::new(
            dq,
            dk,
            dv,
            delta,
            dy,
            y,
            lse,
            q,
            k,
            v,
            s.ranges.all(),
            s.ends.all(),
            tiles.all(),
            tile_ends.all(),
            turned.all(),
            turned_ends.all(),
            rows as u32,
            spec.kv_heads as u32,
            group as u32,
            d as u32,
            s.sights(),
            tiles.len() as u32,
            spec.scale,
        )?;
        let head = Head::of(d);
        let (w, ld) = (head.take[1], d.div_ceil(16) * 16 + 8);
        let shared = 2 * (2 * TILE + 2 * w) * ld;
        let (blocks, slices) = (rows.div_ceil(TILE), d.div_ceil(head.slice));
        let (queries, keys) = (self.fits(shared + 512, spec)?, self.fits(shared + 16 * w, spec)?);
        self.launch(k::ATTEND_DELTA, args, [(rows * spec.heads).div_ceil(4), 1, 1], 128, 0)?;
        self.launch(head.dq, args, [blocks, spec.heads, slices], 128, queries)?;
        self.launch(head.dkv, args, [blocks, spec.kv_heads, slices], 128, keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::TreeMask;

    #[test]
    fn tiles_are_those_that_are_seen() {
        let mut split = Visible::new();
        (0..150).for_each(|i| split.push(&[[0, 30], [30, 64], [130 + i / 75, 140]]).unwrap());
        let tree =
            TreeMask::new(&(0..150).map(|i| if i % 7 == 0 { TreeMask::ROOT } else { i - 1 }).collect::<Vec<_>>());
        let masks = [
            Visible::causal(&[100, 60, 200]),
            Visible::causal(&[300]).windowed(&(0..300).collect::<Vec<_>>(), 70).unwrap(),
            Visible::full(&[128, 64]),
            Visible::blocks(&[200], 32),
            Visible::tree(&tree.unwrap()),
            split,
        ];
        for mask in masks {
            let rows = mask.rows();
            for (side, lists) in tiles(&mask).into_iter().enumerate() {
                for (x, list) in lists.into_iter().enumerate() {
                    let mut want = Vec::new();
                    for y in 0..rows.div_ceil(TILE) {
                        let (queries, keys) = if side == 0 { (x, y) } else { (y, x) };
                        let of = |tile: usize| tile * TILE..(tile + 1) * TILE;
                        let sees = |i: usize, j: usize| i < rows && j < rows && mask.sees(i, j);
                        let seen = of(queries).flat_map(|i| of(keys).map(move |j| (i, j))).filter(|&(i, j)| sees(i, j));
                        match seen.count() {
                            0 => {}
                            n => want.push((2 * y + usize::from(n == TILE * TILE)) as u32),
                        }
                    }
                    // What two ranges of a row cover together may be taken for covered in part: it is only slower.
                    let both = mask.row(0).len() > 1;
                    let list: Vec<u32> = if both { list.iter().map(|n| n & !1).collect() } else { list };
                    let want: Vec<u32> = if both { want.iter().map(|n| n & !1).collect() } else { want };
                    assert_eq!(list, want, "{rows} rows, side {side}, tile {x}");
                }
            }
        }
    }

    /// Heads wider than those of the table of ops: the host's sizes of shared memory and slices.
    #[cfg(feature = "emu")]
    #[test]
    fn wide_heads() {
        use crate::backend::{Backend, Train, naive::Naive};
        fn run<B: Train>(be: &B, spec: &AttnSpec, mask: &Visible) -> Vec<Vec<f32>> {
            let (rows, q, kv) = (mask.rows(), mask.rows() * spec.q_dim(), mask.rows() * spec.kv_dim());
            let mut rng = crate::rng::Rng::new(spec.head_dim as u64);
            let mut input = |n: usize| {
                // Values that bf16 has.
                let x: Vec<f32> = (0..n).map(|_| bf16::from_f32(rng.normal()).to_f32()).collect();
                let mut b = be.alloc(n).unwrap();
                be.upload_acc(b.head_mut(n), &x).unwrap();
                b
            };
            let (qs, ks, vs, dy) = (input(q), input(kv), input(kv), input(q));
            let (mut y, mut lse) = (be.alloc(q).unwrap(), be.alloc(rows * spec.heads).unwrap());
            let (mut dq, mut dk, mut dv) = (be.alloc(q).unwrap(), be.alloc(kv).unwrap(), be.alloc(kv).unwrap());
            let n = rows * spec.heads;
            be.attend(y.head_mut(q), lse.head_mut(n), qs.head(q), ks.head(kv), vs.head(kv), mask, spec).unwrap();
            be.attend_bwd(
                dq.head_mut(q),
                dk.head_mut(kv),
                dv.head_mut(kv),
                dy.head(q),
                y.head(q),
                lse.head(n),
                qs.head(q),
                ks.head(kv),
                vs.head(kv),
                mask,
                spec,
            )
            .unwrap();
            let get = |(b, n): (&B::Buf<B::Acc>, usize)| {
                let mut out = vec![0.0; n];
                be.download_acc(b.head(n), &mut out).unwrap();
                out
            };
            [(&lse, n), (&dq, q), (&dk, kv), (&dv, kv)].into_iter().map(get).collect()
        }
        let cuda = Cuda::emulated().unwrap();
        for head_dim in [136, 256] {
            let spec = AttnSpec { heads: 2, kv_heads: 1, head_dim, scale: 0.06, window: None };
            let mask = Visible::causal(&[3, 70]);
            for (want, got) in run(&Naive, &spec, &mask).into_iter().zip(run(&cuda, &spec, &mask)) {
                let size = want.iter().fold(0f32, |m, x| m.max(x.abs()));
                let error = want.iter().zip(got).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(error <= size / 64.0, "heads of {head_dim}: off by {error} of {size}");
            }
        }
        let far = AttnSpec { heads: 1, kv_heads: 1, head_dim: 1 << 12, scale: 1.0, window: None };
        let (mut y, mut lse) = (cuda.alloc::<bf16>(1 << 12).unwrap(), cuda.alloc::<f32>(1).unwrap());
        let x = cuda.alloc::<f32>(1 << 12).unwrap();
        let all = || x.all();
        let e = cuda.attend(y.all_mut(), lse.all_mut(), all(), all(), all(), &Visible::full(&[1]), &far).unwrap_err();
        assert!(e.to_string().contains("shared memory"), "{e}");
    }
}
