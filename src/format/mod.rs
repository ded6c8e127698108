//! Files to memory: weights, configuration, tokenizer, chat template. No arithmetic on weights beyond what a file's
//! conventions ask to be undone.
//!
//! Start at [`Checkpoint`]. Nothing in a file is trusted: sizes, offsets and names are checked before use, and whatever is
//! wrong comes back as an [`Error`](crate::Error) that says where.

use std::fmt;
use std::ops::Range;

use crate::dtype::DType;

pub mod checkpoint;
pub mod gguf;
pub mod gguf_config;
pub mod hf_config;
pub mod mmap;
pub mod roles;
pub mod safetensors;

pub use checkpoint::Checkpoint;

/// The element type a file declares for a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// One that the engine reads.
    Known(DType),
    /// Another; fine as long as nobody needs the tensor.
    Other(String),
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoredType::Known(d) => d.fmt(f),
            StoredType::Other(name) => f.write_str(name),
        }
    }
}

/// A row of a file's tensor table.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    /// Name in the file.
    pub name: String,
    /// Stored type.
    pub stored: StoredType,
    /// Dimensions, row-major: the last varies fastest.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file; inside it, checked.
    pub range: Range<usize>,
}
