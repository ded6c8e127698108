//! What the command line needs beyond the engine: models by name, and where they are kept.

pub mod fetch;
pub mod registry;
