//! Training: data, objectives, optimisers and their schedule, the trainer, checkpoints, the curve of the loss.

pub mod chart;
pub mod checkpoint;
pub mod curve;
pub mod data;
pub(crate) mod flat;
pub mod objective;
pub mod optim;
pub mod preference;
pub mod run;
pub mod schedule;
mod trainer;

pub use checkpoint::Checkpoint;
pub use curve::Curve;
pub use data::{Batch, Batches, Cursor, Example, Packing};
pub use optim::{Moments, OnGradient, Optimizer, Penalty, Settings};
pub use run::Plan;
pub use schedule::Schedule;
pub use trainer::{Report, Trainable, Trainer};
