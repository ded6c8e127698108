//! How a draft learns.

use serde::{Deserialize, Serialize};

use crate::error::{Result, bail, ensure};
use crate::online::{Meta, Rule};
use crate::train::Settings;
use crate::train::optim::Kind;

/// Which weights draft, of several experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deploy {
    /// The mean of all experts' weights, by how well they do.
    #[default]
    Average,
    /// Those of the best one.
    Select,
}

/// Settings of learning while serving. `Default` is what [`Learning::named`] calls `auto`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Learning {
    /// Rule and learning rate of an update.
    pub optimizer: Settings,
    /// Learning rates of the experts, as factors on the optimiser's; one expert is no ensemble.
    pub experts: Vec<f32>,
    /// How experts are weighed: by their losses on what they have not learnt from yet.
    pub meta: Rule,
    /// Which weights draft.
    pub deploy: Deploy,
    /// An optimistic rule goes on without its hint while hints are as far from the gradients as nothing would be.
    pub check_hints: bool,
    /// New rows that make an update.
    pub rows: usize,
    /// Rows of a text in front of these that the draft sees, too.
    pub context: usize,
    /// Old rows that are learnt beside the new ones, as a part of those.
    pub replay: f32,
    /// Old texts to choose from: the newest so many, and a sample of so many.
    pub remembered: [usize; 2],
    /// Unrolled steps of a head, and what each weighs of the step before.
    pub unroll: usize,
    /// Weight of each step of the step before.
    pub decay: f32,
    /// Tokens of the target's distribution that are learnt one by one; the others are one.
    pub teacher: usize,
    /// Rank of the adapter by which a small model learns, and the factor on it.
    pub rank: usize,
    /// As `rank` says.
    pub scale: f32,
    /// How much time learning may take; `None`: an update whenever there are rows enough, whatever that costs.
    pub spending: Option<Spend>,
    /// Passes for which a new version is watched, and how many tokens a pass it may give less than the one before.
    pub guard: (u32, f64),
    /// Of the choice of old rows.
    pub seed: u64,
    /// Largest file of what was learnt, MiB, and its greatest age, days.
    pub state_mb: u64,
    /// As `state_mb` says.
    pub state_days: u64,
}

/// Bounds of the time that learning takes, as parts of that of serving.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spend {
    /// Where it does not pay: for finding out whether it would.
    pub floor: f64,
    /// Where it pays.
    pub most: f64,
}

impl Default for Learning {
    fn default() -> Self {
        Self {
            optimizer: Settings { kind: Kind::AdamW, lr: 1e-4, ..Settings::default() },
            experts: vec![1.0],
            meta: Rule::FixedShare { epsilon: EPSILON, lambda: 0.01 },
            deploy: Deploy::Average,
            check_hints: true,
            rows: 1024,
            context: 64,
            replay: 0.25,
            remembered: [64, 192],
            unroll: 2,
            decay: 0.8,
            teacher: 12,
            rank: 16,
            scale: 2.0,
            spending: Some(Spend { floor: 0.005, most: 0.1 }),
            guard: (32, 0.15),
            seed: 0,
            state_mb: 2048,
            state_days: 365,
        }
    }
}

/// The paper's 10 a nat (section 5), on losses in units of [`LOSS`].
const EPSILON: f64 = 10.0 * LOSS;
/// Nats of a row that count as the largest loss.
pub(super) const LOSS: f64 = 8.0;

impl Learning {
    /// The rules by name.
    pub const NAMES: [&str; 7] = ["auto", "sgd", "optimistic", "momentum", "adam", "optimistic-adam", "ensemble"];

    /// A rule of [`Learning::NAMES`]: plain and optimistic online gradient descent, heavy ball, AdamW, optimistic AdamW, an ensemble of
    /// three AdamW with learning rates a factor of 2 apart; `auto` is what has proved best.
    ///
    /// # Errors
    /// Another name.
    pub fn named(name: &str) -> Result<Self> {
        let rule = |kind: Kind, lr: f32| {
            let base = Self::default();
            Self { optimizer: Settings { kind, lr, ..base.optimizer }, ..base }
        };
        Ok(match name {
            "auto" => Self::default(),
            "sgd" => rule(Kind::Sgd, 0.05),
            "momentum" => rule(Kind::Momentum, 0.01),
            "optimistic" => rule(Kind::Optimistic, 0.05),
            "adam" => rule(Kind::AdamW, 1e-4),
            "optimistic-adam" => rule(Kind::OptimisticAdam, 1e-4),
            "ensemble" => Self { experts: vec![0.5, 1.0, 2.0], ..Self::default() },
            other => bail!(Usage, "learning rule {other:?}: one of {}", Self::NAMES.join(", ")),
        })
    }

    /// Rows of a text that are learnt as one sequence: what passes must have room for.
    pub(crate) fn longest(&self) -> usize {
        self.rows.min(1024)
    }

    /// Refuses what nothing can learn by.
    ///
    /// # Errors
    /// `Usage`, naming the setting.
    pub fn validate(&self) -> Result<()> {
        self.optimizer.validate()?;
        let rates = (1..=16).contains(&self.experts.len()) && self.experts.iter().all(|e| *e > 0.0 && e.is_finite());
        ensure!(rates, Usage, "learning: experts {:?}: one to sixteen factors above 0", self.experts);
        ensure!(self.rows > 0 && self.context > 0, Usage, "learning: rows and context must be at least 1");
        ensure!((0.0..=4.0).contains(&self.replay), Usage, "learning: replay {} is not between 0 and 4", self.replay);
        ensure!((1..=16).contains(&self.unroll), Usage, "learning: unroll {} is not between 1 and 16", self.unroll);
        ensure!(self.decay > 0.0 && self.decay <= 1.0, Usage, "learning: decay {} is not in (0, 1]", self.decay);
        ensure!((1..=32).contains(&self.teacher), Usage, "learning: teacher {} is not between 1 and 32", self.teacher);
        ensure!((1..=256).contains(&self.rank), Usage, "learning: rank {} is not between 1 and 256", self.rank);
        ensure!(self.scale > 0.0 && self.scale.is_finite(), Usage, "learning: scale {}", self.scale);
        if let Some(Spend { floor, most }) = self.spending {
            let good = (0.0..=1.0).contains(&floor) && (floor..=1.0).contains(&most);
            ensure!(good, Usage, "learning: spending from {floor} to {most} of the time");
        }
        Meta::new(self.meta, self.experts.len()).map(drop)
    }
}
