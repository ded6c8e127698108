//! Kernels to fatbins, one for each file, embedded in the binary: no CUDA runtime, no C++ library, nothing to install.
//!
//! nvcc is looked for in NVCC_WHEELS (a site-packages/nvidia/cu13 folder), CUDA_HOME, CUDA_PATH, on PATH, and in
//! /usr/local/cuda. KERNELS=require makes its absence an error, KERNELS=off ignores it. KERNEL_ARCHS=80,90a builds fewer.
//! The build machine's GPU, if any, is never asked: it need not be the one that runs the binary.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

struct Nvcc {
    bin: PathBuf,
    version: (u32, u32),
    how: &'static str,
}

/// Architectures and the first compiler that knows them; the lowest is also given as PTX, for what comes later.
const ARCHS: [(&str, (u32, u32)); 6] =
    [("80", (11, 0)), ("86", (11, 1)), ("89", (11, 8)), ("90a", (12, 0)), ("100", (12, 8)), ("120", (12, 8))];

/// Builds what can be built; returns the Rust table of images.
pub fn build(kernels: &[PathBuf], out: &Path) -> String {
    for v in ["NVCC_WHEELS", "CUDA_HOME", "CUDA_PATH", "KERNEL_ARCHS", "KERNELS", "NVCC_CCBIN"] {
        println!("cargo:rerun-if-env-changed={v}");
    }
    let mode = env::var("KERNELS").unwrap_or_else(|_| "auto".into());
    let found = if mode == "off" { Err("KERNELS=off".to_owned()) } else { find() };
    let mut table = String::from("/// Images by file name.\npub static FATBINS: &[(&str, &[u8])] = &[\n");
    match found {
        Ok(nvcc) => {
            println!("cargo:rustc-cfg=kernels");
            for (stem, path) in compile(&nvcc, kernels, out) {
                table += &format!("    ({stem:?}, include_bytes!({:?})),\n", path.display().to_string());
            }
        }
        Err(why) => {
            let named = ["NVCC_WHEELS", "CUDA_HOME", "CUDA_PATH"].iter().any(|v| env::var_os(v).is_some());
            assert!(mode == "off" || (mode != "require" && !named), "CUDA kernels are wanted, but: {why}");
        }
    }
    table + "];\n"
}

fn find() -> Result<Nvcc, String> {
    // A place that is named and has none is an error, not a silent build without kernels.
    for var in ["NVCC_WHEELS", "CUDA_HOME", "CUDA_PATH"] {
        if let Some(dir) = env::var_os(var) {
            return probe(&Path::new(&dir).join("bin/nvcc"), var);
        }
    }
    probe(Path::new("nvcc"), "PATH")
        .or_else(|_| probe(Path::new("/usr/local/cuda/bin/nvcc"), "/usr/local/cuda"))
        .map_err(|_| "no nvcc in NVCC_WHEELS, CUDA_HOME, CUDA_PATH, on PATH or in /usr/local/cuda".into())
}

fn probe(bin: &Path, how: &'static str) -> Result<Nvcc, String> {
    let says = Command::new(bin).arg("--version").output().map_err(|e| format!("{how}: {}: {e}", bin.display()))?;
    let text = String::from_utf8_lossy(&says.stdout);
    let version = text.split("release ").nth(1).and_then(|s| s.split(',').next());
    let version = version.ok_or_else(|| format!("{how}: {} tells no version", bin.display()))?;
    let mut parts = version.trim().split('.').map(|n| n.parse().unwrap_or(0));
    Ok(Nvcc { bin: bin.into(), version: (parts.next().unwrap_or(0), parts.next().unwrap_or(0)), how })
}

fn compile(nvcc: &Nvcc, kernels: &[PathBuf], out: &Path) -> Vec<(String, PathBuf)> {
    let wanted = env::var("KERNEL_ARCHS").ok();
    let named = |a: &str| wanted.as_ref().is_none_or(|w| w.split(',').any(|x| x == a));
    let archs: Vec<&str> =
        ARCHS.iter().filter(|(a, since)| nvcc.version >= *since && named(a)).map(|(a, _)| *a).collect();
    let (major, minor) = nvcc.version;
    assert!(!archs.is_empty(), "KERNEL_ARCHS={wanted:?} names nothing that nvcc {major}.{minor} ({}) builds", nvcc.how);
    let mut images = Vec::new();
    for file in kernels {
        let stem = file.file_stem().and_then(|s| s.to_str()).expect("kernel files have plain names").to_owned();
        let image = out.join(format!("{stem}.fatbin"));
        let mut c = Command::new(&nvcc.bin);
        c.args(["-fatbin", "-std=c++17", "-O3", "-Xptxas", "-v,--warn-on-spills", "-Xfatbin", "-compress-all"]);
        c.args(["-t", "2", "-Ikernels"]);
        for a in &archs {
            c.arg(format!("-gencode=arch=compute_{a},code=sm_{a}"));
        }
        let base = archs[0].trim_end_matches('a');
        c.arg(format!("-gencode=arch=compute_{base},code=compute_{base}"));
        if let Some(host) = env::var_os("NVCC_CCBIN") {
            c.arg("-ccbin").arg(host);
        }
        let ran = c.arg(file).arg("-o").arg(&image).output().unwrap_or_else(|e| panic!("{}: {e}", nvcc.bin.display()));
        let log = String::from_utf8_lossy(&ran.stderr).into_owned() + &String::from_utf8_lossy(&ran.stdout);
        fs::write(out.join(format!("{stem}.ptxas.txt")), &log).expect("OUT_DIR is writable");
        assert!(ran.status.success(), "nvcc failed on {}:\n{log}", file.display());
        for line in log.lines().filter(|l| l.contains("warning") && l.contains("spill")) {
            println!("cargo:warning={stem}: {}", line.trim());
        }
        images.push((stem, image));
    }
    images
}
