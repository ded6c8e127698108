//! What test files share.

use std::path::PathBuf;

use quadriga::backend::cuda::Cuda;

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
#[allow(dead_code)]
pub fn root() -> PathBuf {
    std::env::var_os("QUADRIGA_ROOT").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).into()
}
