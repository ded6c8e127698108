//! The machine's memory read bandwidth: the roof of decoding.

use std::hint::black_box;
use std::time::Instant;

use super::Tier;
use super::lanes::{Kernel, Simd, dispatch};
use super::memory::Arena;
use super::pool::Pool;
use crate::error::Result;

/// Sums in flight, enough to keep the loads going.
const SUMS: usize = 8;

struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); SUMS];
        for line in self.0.chunks_exact(SUMS * S::N) {
            for (sum, x) in sums.iter_mut().zip(line.chunks_exact(S::N)) {
                *sum = s.add(*sum, s.load(x));
            }
        }
        s.sum(sums.into_iter().fold(s.splat(0.0), |a, b| s.add(a, b)))
    }
}

/// Bytes per second that the pool's threads read together from a set of `bytes` bytes on large pages: the best of several
/// passes, each dealt out in pieces so that no thread waits for a slow one.
///
/// # Errors
/// If the system has no memory for the set.
pub fn read_bandwidth(pool: &Pool, bytes: usize) -> Result<f64> {
    const PIECE: usize = 4 << 20;
    let mut set = Arena::default().alloc(bytes)?;
    // Touched, else every page is the one zero page.
    pool.run_chunks(&mut set, PIECE, |_, c| c.fill(0x3F));
    let pieces: Vec<&[u8]> = set.chunks_exact(PIECE).collect();
    let mut best = 0.0f64;
    for _ in 0..6 {
        let start = Instant::now();
        pool.run(pieces.len(), |i| {
            black_box(dispatch(Tier::detect(), Sum(bytemuck::cast_slice(pieces[i]))));
        });
        best = best.max((pieces.len() * PIECE) as f64 / start.elapsed().as_secs_f64());
    }
    Ok(best)
}
