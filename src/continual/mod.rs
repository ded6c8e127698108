//! Continual learning: tasks come one after another, and what was learnt before must stay. TreeLoRA (Qian et al. 2025,
//! arXiv:2506.10355) in three readings, and the methods that it is compared with.
//!
//! A [`Stream`] works on flat vectors of an adapter's values through [`Learner`] and knows no model; [`Language`] and [`Pictures`] are
//! the learners that do.

mod delta;
pub mod inflora;
mod labels;
pub mod language;
mod layout;
mod learner;
mod methods;
pub mod metrics;
pub mod penalty;
pub mod picture;
mod router;
pub mod search;
mod settings;
pub mod signature;
mod state;
mod stream;
pub mod tree;
pub mod vision;

pub use delta::Delta;
pub use labels::Labels;
pub use language::{Language, LanguageSettings, TextExample, TextStream, TextTask};
pub use layout::{Layout, Module};
pub use learner::{Learner, Moments, OnGradient, Penalty, Sample, Split};
pub use methods::differences;
pub use router::{Ready, Router};
pub use settings::{Grouped, Method, Paper, Plan, Released, Route};
pub use state::{Member, Stage, State, TaskReport, Tensor};
pub use stream::{Event, Seconds, Stream};
pub use vision::{PictureTask, Pictures};
