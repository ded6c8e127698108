//! Training: what surrounds the numbers. Data, schedule, checkpoints, the curve of the loss.

pub mod checkpoint;
pub mod curve;
pub mod data;
pub mod schedule;

pub use checkpoint::Checkpoint;
pub use curve::Curve;
pub use data::{Batch, Batches, Cursor, Example, Packing};
pub use schedule::Schedule;
