//! Vision transformers, forward and backward, on any backend that trains: [`Vit`] and its [`VisionTrainer`].
//!
//! Images are packed as sequences whose rows see one another; nothing is masked. Weights come through [`VitSource`], from
//! `format::vit` or fresh. LoRA is that of decoders ([`Adapter`](crate::model::Adapter)) on q, k, v, o and the two
//! linears of the MLP. `docs/vision.md` says what is computed and how it is tested.

#[cfg(doctest)]
#[doc = include_str!("../../docs/vision.md")]
struct Guide;

mod adapters;
mod backward;
pub mod config;
pub mod files;
mod forward;
pub mod images;
pub mod positions;
pub mod roles;
mod saved;
mod trainer;
mod weights;

pub use adapters::{adapter, adapter_of};
pub use config::{Pool, VitConfig};
pub use images::{Examples, Images, Scaling};
pub use roles::{BlockRole, VitRole, VitSource};
pub use saved::VitSaved;
pub use trainer::{Score, VisionStep, VisionTrainer};
pub use weights::{Fresh, Masters, TrainedVit, Trains, Vit};
