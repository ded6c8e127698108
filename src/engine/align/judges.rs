//! Judges that need nobody: rules, and files of answers.

use super::deploy::Prefer;
use super::items::Item;
use crate::error::Result;
use crate::rlhf::Shown;
use crate::rlhf::judge::Bradley;
use crate::rng::Key;

/// Stream of a scripted judge's random numbers.
const JUDGE: u64 = u64::MAX - 4;

/// A rule that prefers as Bradley and Terry have it.
pub struct Scripted {
    /// The rule, and how sure it is.
    pub judge: Bradley,
    /// Seed of its doubts.
    pub seed: u64,
}

impl Scripted {
    /// The scores of an item's answers.
    ///
    /// # Errors
    /// A rule that wants a reference where the item has none.
    pub fn of(&self, item: &Item) -> Result<Vec<f64>> {
        let reference = item.reference.as_deref();
        item.answers.iter().map(|a| self.judge.judge.score(&item.prompt, &a.text, reference)).collect()
    }

    /// What it says of two scores in comparison number `n`: 1 the first, 0 the second, 1/2 neither.
    pub fn says(&self, n: u64, scores: [f64; 2]) -> f64 {
        self.judge.prefer(scores, Key { seed: self.seed, stream: JUDGE, counter: n }.uniform())
    }
}

impl Prefer for Scripted {
    fn scores(&mut self, item: &Item) -> Result<Option<Vec<f64>>> {
        self.of(item).map(Some)
    }

    fn prefer(&mut self, round: u64, _: &Item, shown: &Shown, scores: Option<&[f64]>) -> Result<Option<f64>> {
        let both = shown.second.zip(scores).map(|(s, scores)| [scores[shown.first], scores[s]]);
        Ok(both.map(|both| self.says(round, both)))
    }
}
