//! Files that are whole or not there at all, and the writing of safetensors.
//!
//! Whatever kills a writer, be it `kill -9`, a full disk or a power cut, leaves the old contents or the new.

mod atomic;
mod tensors;

pub use atomic::{Folder, find_folder, write_file, write_folder};
pub use tensors::{F32Tensor, Hashing, TensorBytes, read_f32, write_tensors};
