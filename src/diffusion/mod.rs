//! Masked diffusion language models: decoding (d3LLM and what it is compared with), training and distillation.

pub mod aup;
mod choose;
pub mod decoder;
pub mod denoiser;
pub mod pass;
pub mod probe;
pub mod schedule;
pub mod settings;
pub mod train;

pub use decoder::{OnPass, Outcome, decode};
pub use denoiser::{Denoise, Job, ModelDenoiser, RowStat};
pub use pass::{Commit, Counts, Pass};
pub use probe::{Stale, Staleness};
pub use schedule::Schedule;
pub use settings::{Cache, Choose, Rank, Settings};
