//! Rewards on a device without a model.

use std::sync::Arc;

use crate::backend::Train;
use crate::engine::{EngineOptions, OnDevice, on_device};
use crate::error::Result;
use crate::rlhf::{self, Inverse, Precision};

struct Job {
    width: usize,
    precision: Precision,
}

impl OnDevice for Job {
    type Out = Box<dyn Inverse>;
    fn run<B: Train>(self, be: B, _: &EngineOptions) -> Result<Self::Out> {
        rlhf::on_device(Arc::new(be), self.width, self.precision)
    }
}

/// A matrix for an [`OnePass`](rlhf::OnePass) of features of this width that come from elsewhere, where `options` say.
///
/// # Errors
/// The device's.
pub fn inverse(options: &EngineOptions, width: usize, precision: Precision) -> Result<Box<dyn Inverse>> {
    on_device(options.again(), Job { width, precision })
}
