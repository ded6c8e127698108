//! The arrows of the architecture point down only, `unsafe` stands only where the design allows it, files stay readable.

use std::path::{Path, PathBuf};

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn all() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    files
        .iter()
        .map(|p| (p.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(), std::fs::read_to_string(p).unwrap()))
        .collect()
}

/// Which top-level modules each may use besides itself; every module may use `error`.
const ARROWS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("rng", &[]),
    ("perf", &[]),
    ("online", &[]),
    ("dtype", &[]),
    ("tensor", &["dtype"]),
    // How files reach the disk; what is in them is the business of `format` and `train`.
    ("files", &["dtype"]),
    // Backends take plain settings (the activation) from the configuration, and nothing else of the model.
    ("backend", &["tensor", "dtype", "perf", "rng", "model::config"]),
    ("model", &["backend", "tensor", "dtype", "rng"]),
    ("format", &["model::config", "model::roles", "vision::config", "vision::roles", "files", "tensor", "dtype"]),
    ("decode", &["model", "backend", "tensor", "dtype", "rng"]),
    ("train", &["decode", "model", "backend", "files", "tensor", "dtype", "rng", "online"]),
    ("vision", &["train", "model", "backend", "tensor", "dtype", "rng", "files"]),
    ("speculative", &["decode", "train", "model", "backend", "files", "tensor", "dtype", "rng", "online"]),
    ("diffusion", &["decode", "train", "model", "backend", "tensor", "dtype", "rng", "online"]),
    ("continual", &["vision", "decode", "train", "model", "backend", "tensor", "dtype", "rng", "online"]),
    ("rlhf", &["decode", "train", "model", "backend", "tensor", "dtype", "rng", "online"]),
    ("bench", &["model", "backend", "tensor", "dtype", "rng", "perf"]),
    (
        "engine",
        &[
            "speculative",
            "diffusion",
            "continual",
            "rlhf",
            "decode",
            "train",
            "model",
            "format",
            "backend",
            "rng",
            "files",
            "tensor",
        ],
    ),
    (
        "cli",
        &[
            "engine", "train", "bench", "format", "decode", "model", "backend", "files", "dtype", "tensor", "rng",
            "perf",
        ],
    ),
];

/// Files in which `unsafe` may stand: kernels behind `#[target_feature]`, and the few owners of raw memory.
fn may_be_unsafe(file: &str) -> bool {
    file.starts_with("backend/cpu/lanes/")
        || file == "backend/cuda/device.rs"
        || (file.starts_with("backend/cpu/matmul/")
            && (file.contains("avx2") || file.contains("avx512") || file.ends_with("schedule.rs")))
        || ["amx", "avx2", "avx512", "pack"].iter().any(|f| file == format!("backend/cpu/gemm/{f}.rs"))
        || ["backend/cpu/pool.rs", "backend/cpu/memory.rs", "backend/cpu/attention.rs", "format/mmap.rs"]
            .contains(&file)
}

#[test]
fn arrows_point_down() {
    for (file, text) in all() {
        let module = file.split(['/', '.']).next().unwrap();
        if ["lib", "main"].contains(&module) {
            continue;
        }
        let Some((_, allowed)) = ARROWS.iter().find(|(m, _)| *m == module) else {
            panic!("{file}: module {module} has no place among the arrows");
        };
        for part in text.split("crate::").skip(1) {
            let path: String = part.chars().take_while(|c| c.is_alphanumeric() || "_:".contains(*c)).collect();
            let top = path.split("::").next().unwrap();
            let ok = top == module
                || top == "error"
                || top.is_empty()
                || top.starts_with(char::is_uppercase)
                || allowed.iter().any(|a| path == *a || path.starts_with(&format!("{a}::")));
            assert!(ok, "{file} uses crate::{path}, which lies above it or beside it");
        }
    }
}

#[test]
fn unsafe_stands_where_the_design_allows_it() {
    for (file, text) in all() {
        let code = text.lines().map(|l| l.split("//").next().unwrap());
        let found = code.clone().any(|l| l.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe"));
        assert!(!found || may_be_unsafe(&file), "{file} holds unsafe code");
        let blocks = code.filter(|l| l.contains("unsafe {") || l.contains("unsafe impl")).count();
        let reasons = text.matches("SAFETY:").count();
        assert!(reasons >= blocks, "{file}: {blocks} unsafe blocks, {reasons} reasons");
    }
}

#[test]
fn files_fit_a_readers_budget() {
    for (file, text) in all() {
        assert!(text.lines().count() <= 600, "{file} has {} lines", text.lines().count());
    }
}
