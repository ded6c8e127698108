//! Training of masked diffusion models: the masked loss, conversion of autoregressive models, and distillation of a teacher's order
//! of unmasking (d3LLM 2026, arXiv:2601.07568).

pub mod distill;
pub mod layout;
pub mod masked;
pub mod trajectory;

pub use distill::{Distill, DistillSettings};
pub use layout::{Noisy, layout};
pub use masked::{Masked, MaskedSettings, Weighting};
pub use trajectory::{Trajectory, by_likelihood};
