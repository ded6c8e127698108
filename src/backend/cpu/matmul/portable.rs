//! The kernels in plain Rust: the same sums as the vector tiers compute, in loops that any compiler vectorises.

use super::acts::{FINER, Quantized, Record};
use super::layout::{BLOCK, Block, PANEL};
use super::weight::PackedWeight;
use super::{Sums, TILE_ROWS};
use crate::dtype::DType;

/// One block of a panel, unpacked: integers `[input][channel]`, scales and minima `[half][channel]`.
struct Unpacked {
    q: [[f32; PANEL]; BLOCK],
    scale: [[f32; PANEL]; 2],
    min: [[f32; PANEL]; 2],
}

impl Unpacked {
    fn new(block: &Block<'_>) -> Self {
        let mut u = Self { q: [[0.0; PANEL]; BLOCK], scale: [[0.0; PANEL]; 2], min: [[0.0; PANEL]; 2] };
        for (i, q) in u.q.iter_mut().enumerate() {
            for (c, q) in q.iter_mut().enumerate() {
                *q = block.integer(i, c) as f32;
            }
        }
        for half in 0..2 {
            for c in 0..PANEL {
                (u.scale[half][c], u.min[half][c]) = block.scale(half, c);
            }
        }
        u
    }
}

/// acc += w x, lane by lane.
fn axpy(acc: &mut [f32; PANEL], w: &[f32; PANEL], x: f32) {
    for (a, w) in acc.iter_mut().zip(w) {
        *a += w * x;
    }
}

/// Integer products of the quantised rows `first..first + n` with panel `p`.
pub(super) fn fast(w: &PackedWeight, p: usize, x: Quantized<'_>, first: usize, n: usize, out: &mut Sums) {
    let panel = w.panel(p);
    let (records, wides) = x.tile(first, n);
    out[..n * PANEL].fill(0.0);
    for k in 0..w.blocks() {
        let block = Block::new(w.dtype(), panel, k);
        let u = Unpacked::new(&block);
        for (r, y) in out.as_chunks_mut::<PANEL>().0[..n].iter_mut().enumerate() {
            let Record { meta, q } = &records[k * n + r];
            for half in 0..2 {
                let mut dot = [0.0; PANEL];
                if w.dtype() == DType::Q8_0 {
                    let wide = &wides[k * n + r];
                    for i in 16 * half..16 * half + 16 {
                        let x = wide[i / 4 * 4 + [0, 2, 1, 3][i % 4]];
                        axpy(&mut dot, &u.q[i], x as f32 / FINER);
                    }
                } else {
                    // Integers below 2^24 throughout: exact in f32.
                    for (w, &x) in u.q[16 * half..16 * half + 16].iter().zip(&q[16 * half..]) {
                        axpy(&mut dot, w, x as f32);
                    }
                }
                for (((y, dot), s), m) in y.iter_mut().zip(dot).zip(u.scale[half]).zip(u.min[half]) {
                    *y += dot * (s * meta[0]) + m * meta[2 + half];
                }
            }
        }
    }
}

/// f32 products of rows `first..first + n` of `x` with panel `p` of a quantised weight.
pub(super) fn exact(w: &PackedWeight, p: usize, x: &[f32], first: usize, n: usize, out: &mut Sums) {
    let (panel, cols) = (w.panel(p), w.cols_len());
    out[..n * PANEL].fill(0.0);
    for k in 0..w.blocks() {
        let block = Block::new(w.dtype(), panel, k);
        let mut u = Unpacked::new(&block);
        for (i, q) in u.q.iter_mut().enumerate() {
            for ((q, s), m) in q.iter_mut().zip(u.scale[i / 16]).zip(u.min[i / 16]) {
                *q = *q * s + m;
            }
        }
        for (r, y) in out.as_chunks_mut::<PANEL>().0[..n].iter_mut().enumerate() {
            let x = &x[(first + r) * cols + k * BLOCK..][..BLOCK];
            u.q.iter().zip(x).for_each(|(w, &x)| axpy(y, w, x));
        }
    }
}

/// f32 products of rows `first..first + n` of `x` with panel `p` of a plain weight.
pub(super) fn dense(w: &PackedWeight, p: usize, x: &[f32], first: usize, n: usize, out: &mut Sums) {
    /// Inputs widened at a time, and the width of the partial sums.
    const CHUNK: usize = 512;
    const LANES: usize = 8;
    let cols = w.cols_len();
    let size = w.dtype().block_bytes();
    let mut wide = [0.0; CHUNK];
    for (c, row) in w.panel(p).chunks_exact(w.row_bytes().max(1)).enumerate() {
        let mut sums = [[0.0f32; LANES]; TILE_ROWS];
        for (at, bytes) in row.chunks(CHUNK * size).enumerate() {
            let wide = &mut wide[..bytes.len() / size];
            w.dtype().to_f32(bytes, wide);
            for (r, sums) in sums[..n].iter_mut().enumerate() {
                let x = &x[(first + r) * cols + at * CHUNK..][..wide.len()];
                let (ws, w_tail) = wide.as_chunks::<LANES>();
                let (xs, x_tail) = x.as_chunks::<LANES>();
                for (w, x) in ws.iter().zip(xs) {
                    for ((s, w), x) in sums.iter_mut().zip(w).zip(x) {
                        *s += w * x;
                    }
                }
                for ((s, w), x) in sums.iter_mut().zip(w_tail).zip(x_tail) {
                    *s += w * x;
                }
            }
        }
        for (r, s) in sums[..n].iter().enumerate() {
            out[r * PANEL + c] = (s[0] + s[4]) + (s[2] + s[6]) + ((s[1] + s[5]) + (s[3] + s[7]));
        }
    }
    debug_assert!(w.dtype() == DType::F32 || size == 2);
}
