//! The table of operations of [`Train`](crate::backend::Train), as the parent module's is of
//! [`Backend`](crate::backend::Backend): [`lists::odd`] tries the edges, [`lists::realistic`] has the sizes of real steps, and
//! [`PreparedTrain`] runs any of them on any backend with seeded inputs and knows their [`Cost`](crate::perf::Cost).

mod cost;
mod inputs;
pub mod lists;
mod ops;
mod run;

pub use inputs::TrainSetup;
pub use ops::{Loss, Rule, See, SelfAttn, TrainOp};
pub use run::{EPS, L1, PreparedTrain, SCALE, TAU};
