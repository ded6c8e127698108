//! [`Guard`]: watches whether a new version is worse than the one before.

/// What the running mean keeps of its past, pass by pass.
const KEEP: f64 = 0.98;
/// Passes behind which a fall that no chance explains is enough.
const EARLY: u32 = 8;
/// Such a fall, tokens a pass.
const COLLAPSE: f64 = 0.8;

/// What a pass showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    /// Nothing new.
    None,
    /// The version has been watched long enough and is no worse.
    Passed,
    /// It seems worse. Runs vary more than versions do: somebody should compare both on the same rows.
    Alarm,
}

/// Accepted tokens a pass, before a version and with it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Guard {
    /// Passes to watch, and the fall that is an alarm.
    rounds: u32,
    drop: f64,
    mean: Option<f64>,
    before: Option<f64>,
    left: u32,
    tokens: f64,
    drafted: u32,
}

impl Guard {
    pub fn new((rounds, drop): (u32, f64)) -> Self {
        Self { rounds, drop, mean: None, before: None, left: 0, tokens: 0.0, drafted: 0 }
    }

    /// Whether a version is being watched.
    pub fn watches(&self) -> bool {
        self.left > 0
    }

    /// A new version drafts from now on.
    pub fn begin(&mut self) {
        (self.before, self.left, self.tokens, self.drafted) = (self.mean, self.rounds, 0.0, 0);
    }

    /// The comparison is over.
    pub fn settle(&mut self) {
        self.left = 0;
    }

    /// The version before drafts again: what the watched one did is no measure for the next.
    pub fn took_back(&mut self) {
        self.mean = self.before;
    }

    /// A pass kept `kept` tokens, the target's own counted; `drafted`: something had been drafted.
    pub fn heard(&mut self, kept: usize, drafted: bool) -> Sign {
        if drafted {
            let x = kept as f64;
            self.mean = Some(self.mean.map_or(x, |m| KEEP * m + (1.0 - KEEP) * x));
        }
        if self.left == 0 {
            return Sign::None;
        }
        self.left -= 1;
        if drafted {
            self.tokens += kept as f64;
            self.drafted += 1;
        }
        let fall = self.before.map_or(0.0, |b| b - self.tokens / f64::from(self.drafted.max(1)));
        if self.drafted >= EARLY && fall > COLLAPSE {
            return Sign::Alarm;
        }
        match self.left {
            0 if fall > self.drop || self.drafted < self.rounds / 4 => Sign::Alarm,
            0 => Sign::Passed,
            _ => Sign::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(before: usize, with: usize) -> (u32, Sign) {
        let mut guard = Guard::new((32, 0.15));
        for _ in 0..200 {
            assert_eq!(guard.heard(before, true), Sign::None);
        }
        guard.begin();
        (1..=32).map(|i| (i, guard.heard(with, true))).find(|(_, s)| *s != Sign::None).unwrap()
    }

    #[test]
    fn versions_that_collapse_are_seen_early() {
        assert_eq!(watch(3, 3), (32, Sign::Passed));
        assert_eq!(watch(3, 4), (32, Sign::Passed));
        assert_eq!(watch(3, 1), (8, Sign::Alarm));
    }

    #[test]
    fn a_version_that_nobody_used_is_compared() {
        let mut guard = Guard::new((4, 0.15));
        guard.heard(2, true);
        guard.begin();
        let signs: Vec<Sign> = (0..4).map(|_| guard.heard(1, false)).collect();
        assert_eq!(signs, [Sign::None, Sign::None, Sign::None, Sign::Alarm]);
    }
}
