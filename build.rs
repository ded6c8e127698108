//! Contracts to Rust and C++, kernels to fatbins where there is an nvcc, and (feature `emu`) to a stand-in for the CUDA driver.

#[path = "build/contract.rs"]
mod contract;
#[path = "build/emulator.rs"]
mod emulator;
#[path = "build/nvcc.rs"]
mod nvcc;

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rustc-check-cfg=cfg(kernels)");
    let contracts = contract::read(Path::new("kernels/args")).unwrap_or_else(|e| panic!("{e}"));
    fs::write(out.join("args.rs"), contract::to_rust(&contracts)).expect("OUT_DIR is writable");
    // Written only when it says something new: the emulator's objects depend on it.
    let (check, says) = (out.join("args_check.h"), contract::to_cpp(&contracts));
    if fs::read_to_string(&check).ok().as_ref() != Some(&says) {
        fs::write(&check, says).expect("OUT_DIR is writable");
    }
    let kernels = with_extension(Path::new("kernels"), "cu");
    let table = nvcc::build(&kernels, &out);
    fs::write(out.join("fatbins.rs"), table).expect("OUT_DIR is writable");
    if env::var_os("CARGO_FEATURE_EMU").is_some() {
        emulator::build(&kernels, &out);
    }
}

/// Files of `dir` that end in `.extension`, by name.
fn with_extension(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut files: Vec<_> =
        entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    files.sort();
    files
}
