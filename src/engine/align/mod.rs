//! Alignment while serving: preferences in, better answers out (Li et al. 2025, arXiv:2502.07193). See `docs/rlhf.md`.

mod best;
mod cache;
mod deploy;
mod fingerprint;
mod inverse;
mod items;
mod judges;
mod reward;
pub(super) mod rollouts;
mod simulate;
mod study;

pub use best::{BestOf, Chosen, expected_gain};
pub use cache::FeatureCache;
pub use deploy::{Aligner, Deployment, Prefer, RoundAnswer, RoundRow};
pub use inverse::inverse;
pub use items::{Answer, Answering, Comparison, Features, Form, Item, read_pairs, read_prompts};
pub use judges::Scripted;
pub use reward::{RewardModel, RewardOptions};
pub use simulate::{Deployed, Scored, simulate};
pub use study::{
    Active, Ask, BASELINES, Curve, HeldOut, Mark, Questions, active, baselines, mark, marks, order, split,
};
