//! The kernel in plain Rust, in loops that any compiler vectorises.

use super::Block;
use super::pack::{LANES, Out, Tile};

/// Rows and columns of a tile of sums.
const ROWS: usize = 4;
const COLS: usize = 8;

pub(super) fn multiply(block: &Block<'_>, out: &Out<'_>) {
    block.each(ROWS, COLS, |i, j| {
        let a = &block.a[i / LANES * block.steps..][..block.steps];
        let b = &block.b[j / LANES * block.steps..][..block.steps];
        let mut sums = [[0.0f32; COLS]; ROWS];
        for (Tile(a), Tile(b)) in a.iter().zip(b) {
            let a: [&[f32]; ROWS] = std::array::from_fn(|r| &a[(i % LANES + r) * LANES..][..LANES]);
            for (k, b) in b.as_chunks::<LANES>().0.iter().enumerate() {
                let b = &b[j % LANES..][..COLS];
                for (sums, a) in sums.iter_mut().zip(a) {
                    sums.iter_mut().zip(b).for_each(|(s, b)| *s += a[k] * b);
                }
            }
        }
        out.put::<COLS>(block, i, j, sums.as_flattened());
    });
}

/// 16 lines of 16 words, `stride` apart, as they are or transposed.
pub(super) fn words(x: &[f32], stride: usize, transpose: bool, tile: &mut Tile) {
    for (l, x) in x.chunks(stride).take(LANES).enumerate() {
        for (w, &x) in x[..LANES].iter().enumerate() {
            tile.0[if transpose { w * LANES + l } else { l * LANES + w }] = x;
        }
    }
}
