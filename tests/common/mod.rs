//! What test files share.
#![allow(dead_code)]

use std::path::PathBuf;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::cuda::Cuda;
use quadriga::rng::Key;

/// The GPU that CUDA tests run on: the emulated one with feature `emu`, else the machine's; without either they are skipped.
pub fn gpu() -> Option<Cuda> {
    #[cfg(feature = "emu")]
    return Some(Cuda::emulated().unwrap());
    #[cfg(not(feature = "emu"))]
    {
        if quadriga::backend::cuda::available() {
            return Some(Cuda::open(0).unwrap());
        }
        eprintln!("SKIPPED: no GPU, or no CUDA kernels in this build; --features emu runs them on the CPU");
        None
    }
}

/// The folder that holds `models/`: the repository, or what `QUADRIGA_ROOT` names where a test has been carried to another
/// machine.
pub fn root() -> PathBuf {
    std::env::var_os("QUADRIGA_ROOT").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}

/// The CPU with every tier's instructions and two threads.
pub fn cpus() -> impl Iterator<Item = Cpu> {
    Tier::available().map(|tier| Cpu::with(2, tier, Compute::Exact))
}

/// A key for every cell of a grid, the first dimension fastest, such that the uniform number of `key.at(i)` lies well inside of
/// cell i of `grid[i]`. Where all steps of a law fall on the grid, these keys stand for all random numbers.
pub fn grid_keys(grid: &[usize]) -> Vec<Key> {
    let mut keys = vec![None; grid.iter().product()];
    let mut missing = keys.len();
    for stream in 0.. {
        let key = Key { seed: 1, stream, counter: 0 };
        let (mut cell, mut size, mut inside) = (0, 1, true);
        for (i, &n) in grid.iter().enumerate() {
            let at = key.at(i as u64).uniform() * n as f64;
            inside &= (0.05..0.95).contains(&at.fract());
            cell += size * at as usize;
            size *= n;
        }
        if inside && keys[cell].is_none() {
            keys[cell] = Some(key);
            missing -= 1;
        }
        if missing == 0 {
            break;
        }
    }
    keys.into_iter().flatten().collect()
}
