//! [`Spending`]: learning may cost what it brings.

use super::settings::Spend;

/// Rows that the guess counts as with which a text of an unknown kind begins.
const PRIOR_ROWS: f64 = 1500.0;
/// The guess: how much longer accepted runs become.
const PRIOR_GAIN: f64 = 0.08;
/// What is spent of what would break even if runs longer by a factor made text faster by the same. They do not: longer drafts cost longer
/// passes.
const PART: f64 = 0.25;
/// Rows after which older evidence counts half.
const MEMORY: f64 = 6000.0;
/// Seconds of serving whose share may be spent at once.
const SAVED_UP: f64 = 10.0;
/// By how many standard deviations the loss must exceed its running mean for the text to count as of another kind.
const SURPRISE: f64 = 4.0;

/// How much time updates may take. The break-even rule: an update of c seconds that makes accepted runs longer by a factor 1 + g
/// pays where it comes in no less than c/g seconds of serving; g is estimated from what the weights that learn and those that began
/// say about the same new rows. A quarter of what would break even is spent.
#[derive(Clone, Debug, PartialEq)]
pub struct Spending {
    bounds: Spend,
    /// Rows, and their number times the gain.
    evidence: (f64, f64),
    /// Seconds that may be spent now.
    purse: f64,
    /// Running mean and variance of the loss.
    loss: Option<(f64, f64)>,
}

impl Spending {
    /// Begins with a guess in favour of learning.
    pub fn new(bounds: Spend) -> Self {
        Self { bounds, evidence: (PRIOR_ROWS, PRIOR_ROWS * PRIOR_GAIN), purse: 0.0, loss: None }
    }

    /// By how much accepted runs are longer, as far as one knows.
    pub fn gain(&self) -> f64 {
        self.evidence.1 / self.evidence.0
    }

    /// The part of the time of serving that may be spent.
    pub fn share(&self) -> f64 {
        (PART * self.gain()).clamp(self.bounds.floor, self.bounds.most)
    }

    /// Serving took so long.
    pub fn served(&mut self, seconds: f64) {
        self.purse = (self.purse + self.share() * seconds).min(self.bounds.most * SAVED_UP);
    }

    /// Learning took so long.
    pub fn spent(&mut self, seconds: f64) {
        self.purse -= seconds;
    }

    /// Whether something may be spent.
    pub fn allows(&self) -> bool {
        self.purse >= 0.0
    }

    /// Of `rows` new rows, the runs were longer by a factor 1 + gain with what was learnt.
    pub fn observe_gain(&mut self, rows: f64, gain: f64) {
        let keep = 0.5f64.powf(rows / MEMORY);
        let (n, sum) = self.evidence;
        self.evidence = (keep * n + rows, keep * sum + rows * gain.clamp(-1.0, 1.0));
    }

    /// The mean loss of new rows before they were learnt. Where it jumps, the text is of another kind, and what is known about gains counts
    /// no more than a guess.
    pub fn observe_loss(&mut self, loss: f64) {
        let Some((mean, var)) = &mut self.loss else {
            self.loss = Some((loss, 0.05));
            return;
        };
        let off = loss - *mean;
        if off > SURPRISE * var.sqrt() {
            self.evidence = (PRIOR_ROWS, PRIOR_ROWS * PRIOR_GAIN.max(self.evidence.1 / self.evidence.0));
        }
        *mean += 0.2 * off;
        *var = 0.8 * (*var + 0.2 * off * off);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Spend = Spend { floor: 0.01, most: 0.1 };

    #[test]
    fn time_is_spent_where_it_pays() {
        let mut s = Spending::new(BOUNDS);
        assert!((s.share() - 0.02).abs() < 1e-12, "a guess in favour");
        for _ in 0..40 {
            s.observe_gain(500.0, 0.0);
        }
        assert!(s.share() < 0.0101, "{}", s.share());
        for _ in 0..120 {
            s.observe_gain(500.0, 0.24);
        }
        assert!((s.share() - 0.06).abs() < 0.002, "{}", s.share());
    }

    #[test]
    fn no_more_is_spent_than_was_saved_up() {
        let mut s = Spending::new(BOUNDS);
        (0..40).for_each(|_| s.observe_gain(500.0, 1.0));
        let (mut served, mut spent) = (0.0, 0.0);
        for _ in 0..10_000 {
            s.served(0.01);
            served += 0.01;
            if s.allows() {
                s.spent(0.25);
                spent += 0.25;
            }
            assert!(spent <= 0.1 * served + 0.25 + 1e-9, "{spent} of {served}");
        }
        assert!(spent > 0.09 * served, "{spent} of {served}");
    }

    #[test]
    fn another_kind_of_text_makes_it_guess_again() {
        let mut s = Spending::new(BOUNDS);
        for i in 0..60 {
            s.observe_gain(500.0, 0.0);
            s.observe_loss(2.0 + 0.1 * f64::from(i % 2));
        }
        assert!(s.share() < 0.011);
        s.observe_loss(3.5);
        assert!(s.share() > 0.019, "{}", s.share());
    }
}
