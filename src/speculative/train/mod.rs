//! Training of drafts: EAGLE-3 (Li et al. 2025, arXiv:2503.01840), a layer that continues from its target's own features, from files to
//! files; and whatever learns while it serves, as [`Trainable`].

mod backward;
mod eagle1;
mod eagle3;
mod export;
mod features;
mod forward;
mod hydra;
mod init;
mod layer;
mod logits;
mod pass;
mod run;
mod saved;
mod small_lora;
mod trainable;
mod trainer;
mod weights;

pub use eagle1::Eagle1;
pub use eagle3::Eagle3;
pub use export::{About, Store, config, read_head, write_head};
pub use features::{Continuation, FeatureSpec, Features};
pub use forward::{Embedding, Said};
pub use hydra::Hydra;
pub use init::fitted;
pub use pass::{DraftVocab, HeadPass, Sequence, Teacher, extent};
pub use run::{HeadData, HeadEvent, HeadOutcome, run_head};
pub use saved::HeadSaved;
pub use small_lora::{Names, SmallModelLora};
pub use trainable::{Measured, Trainable};
pub use trainer::{Agreement, HeadReport, HeadTrainer, step_weights};
pub use weights::{EagleHead, HeadConfig, Tensors};
