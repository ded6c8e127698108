//! Drafts that learn while they serve (Qian et al. 2026, arXiv:2603.12617): verification says what the target would have said, an update
//! rule moves the draft's weights, a new version drafts from the next step on. Texts stay what they are.

mod feedback;
mod guard;
mod learner;
mod live;
mod pupil;
mod settings;
mod spending;
mod state;

pub use feedback::{Episode, Feedback};
pub use learner::{LearnStats, Learner, Publisher};
pub use live::{Live, Slot};
pub use pupil::{Ear, Pupil, Verified};
pub use settings::{Deploy, Learning, Spend};
pub use spending::Spending;
