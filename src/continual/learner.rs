//! What a stream of tasks is learnt by: a model with an adapter on it, and the tasks' examples.

use super::layout::Layout;
use crate::error::Result;
pub use crate::train::{Moments, OnGradient, Penalty};

/// A training example: its task, and its place among that task's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Number of the task in the stream.
    pub task: usize,
    /// Place.
    pub index: usize,
}

/// Where features for the router come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Training examples.
    Train,
    /// Test examples.
    Test,
}

/// A model with one adapter, its optimiser, and the examples of a stream's tasks. Values, gradients and references are flat vectors
/// as its [`Layout`] says. Classes are numbered over the whole stream; tasks may share them.
pub trait Learner {
    /// Where modules lie.
    fn layout(&self) -> &Layout;
    /// Training and test examples of a task.
    fn size(&self, task: usize) -> [usize; 2];
    /// Classes of a task.
    fn classes(&self, task: usize) -> &[usize];
    /// The right class of a test example.
    fn truth(&self, task: usize, index: usize) -> usize;
    /// All that trains.
    ///
    /// # Errors
    /// The device's.
    fn values(&self) -> Result<Vec<f32>>;
    /// Sets all that trains; the optimiser stays as it was.
    ///
    /// # Errors
    /// Another number of values; the device's.
    fn set_values(&mut self, values: &[f32]) -> Result<()>;
    /// Lets the optimiser begin anew.
    ///
    /// # Errors
    /// The device's.
    fn restart(&mut self) -> Result<()>;
    /// The optimiser's steps and states.
    ///
    /// # Errors
    /// The device's.
    fn moments(&self) -> Result<(u64, Moments)>;
    /// Sets them.
    ///
    /// # Errors
    /// A state that is missing or of another size.
    fn set_moments(&mut self, steps: u64, moments: &Moments) -> Result<()>;
    /// The loss of a step on these examples and its gradient; nothing changes.
    ///
    /// # Errors
    /// The device's.
    fn gradient(&mut self, samples: &[Sample]) -> Result<(f64, Vec<f32>)>;
    /// The same without what all tasks have in common: what a signature is made of.
    ///
    /// # Errors
    /// The device's.
    fn own_gradient(&mut self, samples: &[Sample]) -> Result<(f64, Vec<f32>)> {
        self.gradient(samples)
    }
    /// One step on these examples; the loss before it.
    ///
    /// # Errors
    /// `Diverged` where loss or gradient is not finite: nothing has changed then.
    fn step(&mut self, samples: &[Sample], penalty: Penalty<'_>) -> Result<f64>;
    /// The likeliest of the allowed classes for each of these test examples of a task.
    ///
    /// # Errors
    /// The device's.
    fn predict(&mut self, task: usize, examples: &[usize], allowed: &[usize]) -> Result<Vec<usize>>;
    /// Features of each example of a task that no training changes.
    ///
    /// # Errors
    /// The device's.
    fn features(&mut self, task: usize, split: Split) -> Result<Vec<Vec<f32>>>;
    /// Which training examples of a task the router keeps a centroid of together; empty: all.
    fn kinds(&self, _task: usize) -> Vec<usize> {
        Vec::new()
    }
    /// For each module, the sum over the rows of these examples of x x^T, `[input, input]`, x its input.
    ///
    /// # Errors
    /// The device's.
    fn input_products(&mut self, samples: &[Sample]) -> Result<Vec<Vec<f64>>>;
    /// Tokens (or image patches) of a training example.
    fn length(&self, sample: Sample) -> usize;
}
