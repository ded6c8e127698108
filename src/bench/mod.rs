//! One table of operations, read by the tests of kernels, by criterion and by `quadriga bench kernels`.
//!
//! An [`Op`] is an operation of [`Backend`](crate::backend::Backend) with its sizes; [`ops::realistic`] lists those of real
//! models, [`ops::odd`] those that try the edges. [`Prepared`] runs any of them on any backend with seeded inputs and
//! knows their [`Cost`](crate::perf::Cost). A new operation gets its line here and is tested and measured from that day.

mod cost;
mod decoding;
pub mod inputs;
pub mod ops;
pub mod peaks;
mod run;
pub mod shapes;
mod timing;
pub mod training;

pub use inputs::Storage;
pub use ops::{Case, Op};
pub use run::{Output, Prepared, Setup};
