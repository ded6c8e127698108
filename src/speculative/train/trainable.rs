//! [`Trainable`]: a draft whose weights can learn, as the rules of learning see it.

use super::Sequence;
use crate::backend::Train;
use crate::error::Result;
use crate::model::Param;
use crate::train::checkpoint::NamedTensor;

/// What a pass over sequences found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Mean loss of a row that has something to learn, nats.
    pub loss: f64,
    /// Such rows.
    pub rows: usize,
    /// Rows whose proposals were the target's in all unrolled steps before step i.
    pub asked: Vec<u64>,
    /// Of these, how many were in step i too.
    pub right: Vec<u64>,
}

impl Measured {
    /// Tokens that a pass of the target would give with a chain of as many drafted ones as there are steps: 1 + a0 + a0 a1 + ...
    pub fn length(&self) -> f64 {
        chain_length(&self.rates())
    }

    /// In each step the share of the rows asked that were right; 0 where none was asked.
    pub fn rates(&self) -> Vec<f64> {
        self.right.iter().zip(&self.asked).map(|(r, n)| *r as f64 / (*n).max(1) as f64).collect()
    }

    /// Counts the rows of a pass: `right` says whether a row's proposal in a step is the target's, if it has such a step.
    pub(super) fn count(&mut self, rows: usize, steps: usize, right: impl Fn(usize, usize) -> Option<bool>) {
        self.asked.resize(steps, 0);
        self.right.resize(steps, 0);
        for row in 0..rows {
            for i in 0..steps {
                let Some(right) = right(row, i) else { break };
                self.asked[i] += 1;
                if !right {
                    break;
                }
                self.right[i] += 1;
            }
        }
    }
}

/// 1 + a0 + a0 a1 + ...
pub(super) fn chain_length(rates: &[f64]) -> f64 {
    let chain = rates.iter().scan(1.0, |p, a| {
        *p *= a;
        Some(*p)
    });
    1.0 + chain.sum::<f64>()
}

/// A draft's weights with what their training needs. Its loss is that of its kind.
pub trait Trainable<B: Train>: Send {
    /// Tensors that train, in a fixed order.
    fn params(&self) -> Vec<&Param<B>>;

    /// As [`Trainable::params`], to change; [`Trainable::refresh`] tells the draft.
    fn params_mut(&mut self) -> Vec<&mut Param<B>>;

    /// Brings the masters' values into what products read.
    ///
    /// # Errors
    /// The device's.
    fn refresh(&mut self) -> Result<()>;

    /// Runs `sequences`. With `learn`, the gradient of the mean loss of all their rows is added to the parameters'; without,
    /// [`Measured::asked`] and [`Measured::right`] are counted.
    ///
    /// # Errors
    /// Sequences that do not fit the draft; the device's. A loss that is not finite is no error here.
    fn pass(&mut self, sequences: &[&Sequence], learn: bool) -> Result<Measured>;

    /// Whether the mean of several drafts is the draft of the mean of their tensors. It is not where tensors are multiplied with one another,
    /// as LoRA's are.
    fn is_linear(&self) -> bool {
        true
    }

    /// All tensors that drafting needs, by their published names.
    ///
    /// # Errors
    /// The device's.
    fn to_host(&self) -> Result<Vec<NamedTensor>>;
}
