//! The machine's memory read bandwidth: the roof of decoding.

use std::hint::black_box;
use std::time::Instant;

use super::memory::Arena;
use super::pool::Pool;
use crate::error::Result;

/// Bytes per second that the pool's threads read together from a set of `bytes` bytes on large pages: the best of several
/// passes, each dealt out in pieces so that no thread waits for a slow one.
///
/// # Errors
/// If the system has no memory for the set.
pub fn read_bandwidth(pool: &Pool, bytes: usize) -> Result<f64> {
    const PIECE: usize = 4 << 20;
    let mut set = Arena::default().alloc(bytes)?;
    // Touched, else every page is the one zero page.
    pool.run_chunks(&mut set, PIECE, |i, c| c.fill(i as u8));
    let pieces: Vec<&[u8]> = set.chunks_exact(PIECE).collect();
    let mut best = 0.0f64;
    for _ in 0..6 {
        let start = Instant::now();
        pool.run(pieces.len(), |i| {
            let words: &[[u64; 16]] = bytemuck::cast_slice(pieces[i]);
            let mut sum = [0u64; 16];
            for w in words {
                for (s, w) in sum.iter_mut().zip(w) {
                    *s = s.wrapping_add(*w);
                }
            }
            black_box(sum);
        });
        best = best.max((pieces.len() * PIECE) as f64 / start.elapsed().as_secs_f64());
    }
    Ok(best)
}
