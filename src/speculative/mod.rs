//! Speculative decoding: a cheap draft proposes a tree of tokens, one pass of the target reads it, verification keeps what the
//! target would have said (Leviathan et al. 2023, arXiv:2211.17192; Miao et al. 2024, arXiv:2305.09781; Li et al. 2024,
//! arXiv:2406.16858). What comes out is what the target alone would have said: under greedy decoding token by token, under
//! sampling with the same seed likewise, whatever the draft proposed.

pub mod adapt;
mod automaton;
mod batch;
mod choices;
mod cost;
mod decoder;
mod draft;
pub mod heads;
mod lookup;
mod memory;
mod mixed;
mod plan;
mod rates;
mod sequoia;
mod shapes;
mod small_model;
pub mod steps;
pub mod train;
mod tree;

pub use batch::SpeculativeBatch;
pub use cost::{CostModel, Curve};
pub use decoder::Speculative;
pub use draft::{Budget, Draft};
pub use lookup::Lookup;
pub use memory::Memory;
pub use mixed::Mixed;
pub use plan::Plan;
pub use sequoia::sequoia;
pub use shapes::{Pool, Shape, merge, prune};
pub use small_model::SmallModel;
pub use tree::DraftTree;
