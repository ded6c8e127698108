//! What the integration tests share: where real files are, and a seeded source of numbers.
#![allow(dead_code)]

pub mod files;

use std::path::PathBuf;

/// The folder of goldens made by the reference scripts: `$QUADRIGA_SHARED`, else `shared` here or beside the repository.
/// `None`, said aloud, where there is none.
pub fn shared_dir() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let from_env = std::env::var_os("QUADRIGA_SHARED").map(PathBuf::from);
    let near = [root.join("shared"), root.join("../shared"), root.join("../../shared")];
    let found = from_env.into_iter().chain(near).find(|d| d.join("golden").is_dir());
    if found.is_none() {
        eprintln!("SKIPPED: no shared folder with goldens; set QUADRIGA_SHARED");
    }
    found
}

/// A real model by the end of its file name, from `$QUADRIGA_MODELS`. `None`, said aloud, where it is not there.
pub fn model(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("QUADRIGA_MODELS").map(PathBuf::from);
    let found = folder.map(|f| f.join(name)).filter(|p| p.exists());
    if found.is_none() {
        eprintln!("SKIPPED: {name} is not in QUADRIGA_MODELS");
    }
    found
}

/// A small generator for test cases (splitmix64): the same numbers for the same seed everywhere.
pub struct Cases(pub u64);

impl Cases {
    /// The next 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// A number below `n`, 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { (self.next() % n as u64) as usize }
    }

    /// One of `list`.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Decodes base64 as the goldens hold it.
pub fn base64(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let (mut out, mut bits, mut n) = (Vec::new(), 0u32, 0);
    for c in text.bytes().filter(|c| *c != b'=') {
        bits = bits << 6 | u32::from(value(c));
        n += 6;
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
        }
    }
    out
}
