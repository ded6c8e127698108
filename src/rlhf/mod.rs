//! The mathematics of online RLHF as a contextual bandit: a linear reward on fixed features, learnt from comparisons in one pass.
//!
//! The mathematics is on the host in f64 and knows no model. Two parts do: [`Extractor`] makes features of a model's hidden states,
//! [`on_device`] is where P lives. An answer is its feature vector φ of d numbers, a comparison is the
//! difference z of two of them with a label y: 1 where the first was preferred, 0 where the second was, 1/2 for a tie. Labels follow
//! Bradley & Terry: P(y = 1) = σ(zᵀθ*). [`OnePass`] follows θ* at a cost that does not depend on how many comparisons came before (Li,
//! Qian, Zhao & Zhou 2025, arXiv:2502.07193); [`Pool`], [`deploy`] and [`pessimistic`] choose what to ask and what to show by its
//! uncertainty. [`Mle`], [`Sgd`] and [`Hvp`] are what it is compared with.
//!
//! ```
//! use quadriga::rlhf::{OnePass, Second, Settings, deploy};
//! use quadriga::rng::Rng;
//!
//! let mut reward = OnePass::new(2, Settings::default())?;
//! let answers = [0.9, 0.1, -0.2, 0.7, 0.3, 0.3]; // three answers, a row each
//! let shown = deploy(&reward, &answers, 0.5, Second::Optimistic, &mut Rng::new(0))?;
//! if let Some(second) = shown.second {
//!     let phi = |j: usize| &answers[2 * j..][..2];
//!     let z: Vec<f64> = phi(shown.first).iter().zip(phi(second)).map(|(a, b)| a - b).collect();
//!     reward.update(&z, 0.0)?; // the second was better
//!     assert!(reward.reward(phi(second)) > reward.reward(phi(shown.first)));
//! }
//! # Ok::<(), quadriga::Error>(())
//! ```

mod batch;
mod cg;
mod deploy;
mod features;
mod hvp;
mod inverse;
pub mod judge;
mod link;
mod mle;
mod on_device;
mod one_pass;
mod pool;
mod progress;
mod project;
mod radius;
mod scale;
mod settings;
mod sgd;
mod vector;

pub use cg::{conjugate_gradients, released_gradients};
pub use deploy::{Second, Shown, deploy, pair_of, pessimistic};
pub use features::{Extractor, FeatureSpec, Pooler, Pooling, Tokens, feature};
pub use hvp::{Hvp, HvpSettings, Variant};
pub use inverse::{Host, Inverse, Real};
pub use link::{log_loss, proximal, sigmoid, slope};
pub use mle::Mle;
pub use on_device::{Precision, on_device};
pub use one_pass::{OnePass, State, Step};
pub use pool::{Choose, Pool};
pub use progress::{Bin, Progress, correlation, slope_loglog};
pub use project::{Projection, project};
pub use radius::{chi_square_quantile, radius_calibrated, radius_theory};
pub use scale::Scale;
pub use settings::{Rule, Settings};
pub use sgd::{Rate, Sgd};
