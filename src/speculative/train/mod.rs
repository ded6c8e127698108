//! Training of draft heads: EAGLE-3 (Li et al. 2025, arXiv:2503.01840), a layer that continues from its target's own features.

mod backward;
mod export;
mod features;
mod forward;
mod init;
mod pass;
mod run;
mod saved;
mod trainer;
mod weights;

pub use export::{About, Store, config, read_head, write_head};
pub use features::{Continuation, FeatureSpec, Features};
pub use forward::{Embedding, Said};
pub use init::fitted;
pub use pass::{DraftVocab, HeadPass, Sequence, Teacher, extent};
pub use run::{HeadData, HeadEvent, HeadOutcome, run_head};
pub use saved::HeadSaved;
pub use trainer::{Agreement, HeadReport, HeadTrainer, step_weights};
pub use weights::{EagleHead, HeadConfig, Tensors};
