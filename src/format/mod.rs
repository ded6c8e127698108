//! Files to memory: weights, configuration, tokenizer, chat template. No arithmetic on weights beyond what a file's
//! conventions ask to be undone.
//!
//! Start at [`Checkpoint`]. Nothing in a file is trusted: sizes, offsets and names are checked before use, and whatever is
//! wrong comes back as an [`Error`](crate::Error) that says where.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::dtype::DType;
use crate::error::{Result, bail};

mod bpe;
pub mod chat_template;
pub mod checkpoint;
mod diffusion_config;
pub mod draft_head;
pub mod gguf;
pub mod gguf_config;
pub mod hf_config;
pub mod mmap;
pub mod peft;
pub mod roles;
pub mod safetensors;
pub mod tokenizer;
mod tokenizer_gguf;
mod tokenizer_json;
pub mod vit;
mod vit_names;
pub mod write_model;

pub use chat_template::{ChatTemplate, Message};
pub use checkpoint::Checkpoint;
pub use draft_head::DraftHead;
pub use tokenizer::{Decoder, Tokenizer};

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

/// A JSON object as pairs in the file's order, so that a key given twice is seen.
pub(crate) struct Pairs<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Object<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Object<V> {
            type Value = Pairs<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<V>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        d.deserialize_map(Object(PhantomData))
    }
}

/// Fails with what is wrong with the tensors of the model at `path`, the first few of it in full, if anything is.
fn refuse(path: &Path, mut wrong: Vec<String>) -> Result<()> {
    const SHOWN: usize = 8;
    if wrong.is_empty() {
        return Ok(());
    }
    let more = wrong.len().saturating_sub(SHOWN);
    wrong.truncate(SHOWN);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    bail!(Weights, "{}: {}{more}", path.display(), wrong.join("; "));
}
