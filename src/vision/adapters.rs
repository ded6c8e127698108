//! LoRA adapters of vision transformers: those of decoders, with fc1 for an MLP's up matrix, fc2 for its down matrix, and no gate.

use super::weights::Vit;
use crate::backend::Train;
use crate::error::{Result, ensure};
use crate::model::Adapter;
use crate::model::lora::{ModuleSpec, ModuleValues};
use crate::model::roles::LayerRole;

/// A fresh adapter for a vision transformer, as [`Adapter::init`] makes it; it trains where it is told to ([`Adapter::train`]).
///
/// # Errors
/// A linear that no block has (a gate); no memory.
pub fn adapter<B: Train>(vit: &Vit<B>, specs: &[ModuleSpec], seed: u64) -> Result<Adapter<B>> {
    check(specs.iter())?;
    Adapter::init(vit.backend(), &vit.cfg.decoder_sizes(), specs, seed)
}

/// An adapter for a vision transformer with these values, as [`Adapter::new`] makes it.
///
/// # Errors
/// As [`adapter`]; values that do not fit.
pub fn adapter_of<B: Train>(vit: &Vit<B>, modules: &[ModuleValues]) -> Result<Adapter<B>> {
    check(modules.iter().map(|m| &m.spec))?;
    Adapter::new(vit.backend(), &vit.cfg.decoder_sizes(), modules)
}

fn check<'s>(mut specs: impl Iterator<Item = &'s ModuleSpec>) -> Result<()> {
    let gate = specs.any(|s| s.role == LayerRole::Gate);
    ensure!(!gate, Config, "a vision transformer's MLP has no gate to adapt");
    Ok(())
}
