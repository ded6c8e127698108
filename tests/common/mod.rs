//! What test files share.
#![allow(dead_code)]

use std::path::PathBuf;
use std::sync::OnceLock;

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

/// Numbers within [from, to), of place `number` behind a key.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    pub number: u64,
    pub from: f64,
    pub to: f64,
}

/// A key whose numbers fall into all `cells` (of the first eight), near their lower or their higher ends: what decides alike at both
/// ends has its steps where the cells have theirs.
pub fn key_in(cells: &[Cell], high: bool) -> Key {
    const STREAMS: u64 = 1 << 21;
    static NUMBERS: OnceLock<Vec<[f64; 8]>> = OnceLock::new();
    let key = |stream| Key { seed: 1, stream, counter: 0 };
    let numbers = NUMBERS.get_or_init(|| {
        let of = |stream| std::array::from_fn(|i| Key::at(key(stream), i as u64).uniform());
        (0..STREAMS).map(of).collect()
    });
    let near: f64 = [0.5, 0.01, 0.04, 0.1, 0.2][cells.len().min(4)];
    let windows: Vec<(usize, f64, f64)> = cells
        .iter()
        .map(|c| {
            let size = near.min((c.to - c.from) / 2.0);
            let from = if high { c.to - size } else { c.from + size / 50.0 };
            (c.number as usize, from, from + size * 0.98)
        })
        .collect();
    let hit = numbers.iter().position(|u| windows.iter().all(|&(i, from, to)| (from..to).contains(&u[i])));
    key(hit.unwrap_or_else(|| panic!("none of {STREAMS} streams has numbers in {windows:?}")) as u64)
}
