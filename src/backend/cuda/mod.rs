//! NVIDIA GPUs: hand-written kernels behind cudarc's driver API, found at run time.
//!
//! The library needs neither CUDA nor a GPU to be built or started: the driver is opened when a device is asked for, and
//! the kernels are images inside the binary where an nvcc was found when it was built. Activations are bf16, the residual
//! stream, statistics and logits f32; keys and values bf16.
//!
//! Everything runs on one stream, in order, and a step that comes again as one CUDA graph ([`Cuda::graph_stats`]). A kernel's arguments are one struct whose contract stands in `kernels/args`;
//! its constructor is generated and checks it. A row's result never depends on how many rows are in the pass.

mod curvature;
mod device;
mod graph;
mod kernels;
mod kv;
mod memory;
mod ops;
mod pack;
mod peaks;
mod sampling;
mod train;
mod weight;

use std::fmt::Display;

pub use device::{Cuda, available, devices, free_memory};

/// Whether this binary holds kernels: an nvcc was found when it was built.
pub const KERNELS: bool = cfg!(kernels);
pub use graph::GraphStats;
pub use kv::CudaKv;
pub use memory::{CudaBuf, Dst, Src};
pub use peaks::CudaPeaks;
pub use weight::CudaWeight;

use crate::error::{Error, ErrorKind, Result};

/// What a kernel takes: scalars and device addresses, laid out as the kernel declares them.
pub trait Args: Copy {
    /// Appends it in whole words, zeros between and behind the fields.
    fn put(&self, out: &mut Vec<u64>);
}

/// Argument structs of all kernels, from `kernels/args/*.h`.
// Generated: plain rather than pretty.
#[allow(missing_docs, non_camel_case_types, unused_parens, clippy::all)]
pub mod args {
    include!(concat!(env!("OUT_DIR"), "/args.rs"));
}

mod images {
    include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));
}

/// An argument breaks its rule.
fn broken<T>(kernel: &str, argument: &str, rule: impl Display, found: impl Display) -> Result<T> {
    Err(Error::new(ErrorKind::Shape, format!("{kernel}: {argument} must be {rule}, and is {found}")))
}

/// A span breaks its contract.
fn span(kernel: &str, argument: &str, address: u64, len: usize, want: u64, align: u64) -> Result<()> {
    if len as u64 != want {
        return broken(kernel, argument, format_args!("{want} elements long"), len);
    }
    if want > 0 && !address.is_multiple_of(align) {
        return broken(kernel, argument, format_args!("aligned to {align} bytes"), format_args!("at {address:#x}"));
    }
    Ok(())
}
