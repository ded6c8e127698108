//! The kernels compiled for the CPU, with a stand-in for the CUDA driver, as one shared library that the tests load.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use std::env;

/// Builds `libquadriga_emu.so` in `out`; `EMU_SANITIZE` (address, undefined, thread) instruments the kernels.
pub fn build(kernels: &[PathBuf], out: &Path) {
    for v in ["EMU_SANITIZE", "CXX"] {
        println!("cargo:rerun-if-env-changed={v}");
    }
    let cxx = env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let sanitize = env::var("EMU_SANITIZE").ok().map(|s| format!("-fsanitize={s}"));
    // The emulator itself is never instrumented: its hooks are weak symbols.
    let own = super::with_extension(Path::new("kernels/emu"), "cpp");
    let files = own.iter().map(|f| (f, false)).chain(kernels.iter().map(|f| (f, true)));
    let mut objects = Vec::new();
    let mut running = Vec::new();
    // Any header may be in any file: one that changed makes all again, a source only itself.
    let headers = ["kernels/rt", "kernels/args", "kernels/emu"].map(Path::new);
    let newest = headers.iter().flat_map(|d| newest(d)).chain(modified(&out.join("args_check.h"))).max();
    for (file, kernel) in files {
        let name = file.file_name().and_then(|n| n.to_str()).expect("kernel files have plain names");
        let object = out.join(format!("{name}.{}o", sanitize.as_deref().unwrap_or_default()));
        let made = modified(&object);
        if made > newest && made > modified(file) {
            objects.push(object);
            continue;
        }
        let mut c = Command::new(&cxx);
        c.args(["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas"]);
        c.args(["-Ikernels", "-Ikernels/emu"]).arg("-I").arg(out);
        if kernel {
            c.args(&sanitize).args(["-x", "c++"]);
        }
        c.arg("-c").arg("-o").arg(&object).arg(file);
        running.push((file, c.spawn()));
        objects.push(object);
        if running.len() >= 2 {
            finish(running.remove(0));
        }
    }
    running.into_iter().for_each(finish);
    let library = out.join("libquadriga_emu.so");
    let mut c = Command::new(&cxx);
    c.args(["-shared", "-pthread", "-Wl,-soname,libcuda.so", "-o"]).arg(&library).args(&objects).args(&sanitize);
    assert!(c.status().is_ok_and(|s| s.success()), "linking the kernel emulator failed");
    println!("cargo:rustc-env=QUADRIGA_EMU={}", library.display());
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|m| m.modified()).ok()
}

/// When the newest header of a folder was written.
fn newest(dir: &Path) -> Option<SystemTime> {
    let headers = ["h", "cuh"].into_iter().flat_map(|e| super::with_extension(dir, e));
    headers.filter_map(|h| modified(&h)).max()
}

fn finish((file, child): (&PathBuf, std::io::Result<std::process::Child>)) {
    let mut child = child.unwrap_or_else(|e| panic!("feature emu needs a C++ compiler (g++, or CXX): {e}"));
    assert!(child.wait().is_ok_and(|s| s.success()), "{} does not compile for the emulator", file.display());
}
