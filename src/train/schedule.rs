//! The learning rate over the steps of a run.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// How the rate goes on behind the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// It stays.
    Constant,
    /// In a straight line to the floor.
    Linear,
    /// Along half a cosine to the floor.
    Cosine,
}

/// A factor on the peak learning rate for each step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Shape of the decay.
    pub kind: Kind,
    /// Steps until the peak.
    pub warmup: u64,
    /// Steps of the whole run, warm-up included; a constant rate does not ask.
    pub total: u64,
    /// Factor at the end of the decay and from there on, in [0, 1].
    pub floor: f32,
}

impl Schedule {
    /// The same rate for every step.
    pub fn constant() -> Self {
        Self { kind: Kind::Constant, warmup: 0, total: 0, floor: 0.0 }
    }

    /// Refuses a floor that is no factor, and a decay that has no steps.
    pub fn validate(&self) -> Result<()> {
        ensure!((0.0..=1.0).contains(&self.floor), Usage, "the schedule's floor is {}; expected 0 to 1", self.floor);
        ensure!(
            self.kind == Kind::Constant || self.warmup < self.total,
            Usage,
            "{} steps of warm-up leave nothing of {} for the decay",
            self.warmup,
            self.total
        );
        Ok(())
    }

    /// The factor for step `step`, counted from 0: `(step + 1) / warmup` in the warm-up, so that no step is lost at rate 0;
    /// then, with t = (step - warmup) / (total - warmup) up to 1, `1 - (1 - floor) t` or
    /// `floor + (1 - floor) (1 + cos(pi t)) / 2`.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64;
        }
        let length = self.total.saturating_sub(self.warmup).max(1);
        let t = ((step - self.warmup) as f64 / length as f64).min(1.0);
        let left = match self.kind {
            Kind::Constant => return 1.0,
            Kind::Linear => 1.0 - t,
            Kind::Cosine => (1.0 + (std::f64::consts::PI * t).cos()) / 2.0,
        };
        let floor = self.floor as f64;
        floor + (1.0 - floor) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn values_worked_out_by_hand() {
        let near = |s: Schedule, want: &[(u64, f64)]| {
            for &(step, f) in want {
                assert!((s.factor(step) - f).abs() < 1e-12, "{s:?} at {step}: {} instead of {f}", s.factor(step));
            }
        };
        let s = Schedule { kind: Kind::Linear, warmup: 4, total: 14, floor: 0.0 };
        near(s, &[(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (5, 0.9), (9, 0.5), (13, 0.1), (14, 0.0), (99, 0.0)]);
        let cosine = Schedule { kind: Kind::Cosine, floor: 0.5, ..s };
        // Thirds of the decay: cos 60 and 120 degrees are halves.
        let thirds = Schedule { total: 10, ..cosine };
        near(thirds, &[(4, 1.0), (6, 0.5 + 0.5 * 0.75), (7, 0.75), (8, 0.5 + 0.5 * 0.25), (10, 0.5), (11, 0.5)]);
        near(Schedule { kind: Kind::Constant, ..s }, &[(0, 0.25), (3, 1.0), (4, 1.0), (1000, 1.0)]);
        near(Schedule::constant(), &[(0, 1.0), (u64::MAX, 1.0)]);
        near(Schedule { warmup: 1, total: 3, ..s }, &[(0, 1.0), (1, 1.0), (2, 0.5), (3, 0.0)]);
    }

    #[test]
    fn rises_to_the_peak_then_never_rises_and_stays_within_bounds() {
        let mut rng = Rng::new(11);
        for _ in 0..300 {
            let kind = [Kind::Constant, Kind::Linear, Kind::Cosine][rng.below(3)];
            let warmup = rng.below(40) as u64;
            let s = Schedule { kind, warmup, total: warmup + 1 + rng.below(80) as u64, floor: rng.uniform() };
            s.validate().unwrap();
            let f: Vec<f64> = (0..s.total + 20).map(|i| s.factor(i)).collect();
            let peak = warmup.saturating_sub(1) as usize;
            assert!(f.iter().all(|&x| x > 0.0 && x <= 1.0), "{s:?}");
            assert!(f[..=peak].windows(2).all(|w| w[0] < w[1]) && f[peak] == 1.0, "{s:?}");
            assert!(f[peak..].windows(2).all(|w| w[0] >= w[1]), "{s:?}");
            let end = if kind == Kind::Constant { 1.0 } else { s.floor as f64 };
            assert!((f[s.total as usize] - end).abs() < 1e-12, "{s:?}");
        }
    }

    #[test]
    fn impossible_ones_are_refused() {
        let s = Schedule { kind: Kind::Linear, warmup: 5, total: 5, floor: 0.0 };
        assert!(s.validate().unwrap_err().to_string().contains("5 steps of warm-up"));
        for floor in [-0.1, 1.5, f32::NAN] {
            assert!(Schedule { total: 6, floor, ..s }.validate().is_err());
        }
        let json = serde_json::to_string(&s).unwrap();
        assert_eq!(json, r#"{"kind":"linear","warmup":5,"total":5,"floor":0.0}"#);
        assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), s);
    }
}
