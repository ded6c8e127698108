//! How a stream is learnt: the methods with every choice that they leave open, and the plan that all of them share.

use serde::{Deserialize, Serialize};

use super::search::Width;
use crate::error::{Result, ensure};

/// Who says which task a request belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// The router, from the frozen model's features.
    Router,
    /// The test itself: an upper bound, not a method.
    Oracle,
}

/// The paper's algorithm (Qian et al. 2025, arXiv:2506.10355), ambiguities resolved: mode P.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Paper {
    /// Strength of the L1 pull, in units of the learning rate.
    pub tau: f32,
    /// Most edges from the root to a leaf; at most the number of modules.
    pub depth: usize,
    /// Of the confidence bounds. Costs are halved L1 distances of normalized gradients, in \[0, 1\].
    pub width: Width,
    /// 0: costs compare with the gradient that the earlier task ended with. Else every so many rounds one more backward pass, at the
    /// earlier tasks' adapters, compares on the same examples, and only those rounds observe.
    pub query: u64,
}

impl Default for Paper {
    fn default() -> Self {
        Self { tau: 0.3, depth: 64, width: Width::Fixed(2.0), query: 0 }
    }
}

/// The released code's algorithm, for comparison only: mode C.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Released {
    /// Strength of its penalty, reached at the end of every epoch.
    pub lambda: f64,
}

impl Default for Released {
    fn default() -> Self {
        Self { lambda: 0.5 }
    }
}

/// Ours: signatures at one anchor, groups that share an adapter, a router at inference: mode R.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Grouped {
    /// Training examples of a task that make its signature; 0: all.
    pub probe: usize,
    /// Tasks of a group are all nearer to one another than this.
    pub share: f64,
    /// A task as near to one that was learnt as this is that task again: its adapter serves unchanged. 0: never.
    pub gate: f64,
    /// Runs of modules by which the tree's first levels are split, those near the input first; deeper levels go by the last one.
    pub depth: usize,
    /// Strength of the L1 pull of a shared adapter towards what it was before the task; 0: none.
    pub tau: f32,
    /// A new group's adapter begins as the nearest group's instead of as a fresh one.
    pub warm: bool,
}

impl Default for Grouped {
    fn default() -> Self {
        Self { probe: 48, share: 0.6, gate: 0.2, depth: 1, tau: 0.0, warm: false }
    }
}

/// How tasks are kept apart or held together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// One adapter, no penalty: SeqLoRA.
    Sequential,
    /// An adapter for each task.
    Isolated(Route),
    /// One adapter and a quadratic pull by Fisher information towards where the last task ended.
    Ewc {
        /// Strength.
        lambda: f32,
    },
    /// One adapter and a quadratic pull of all values alike towards where the last task ended.
    L2 {
        /// Strength.
        lambda: f32,
    },
    /// Ranks of its own for each task, the older ones frozen, A orthogonal to theirs: O-LoRA.
    Olora {
        /// Strength.
        lambda: f32,
    },
    /// Ranks of its own for each task, whose A spans the task's inputs outside those of older tasks and is frozen (Liang & Li 2024,
    /// arXiv:2404.00228): InfLoRA.
    Inflora {
        /// Share of the inputs' energy that counts as a task's inputs.
        energy: f64,
    },
    /// One adapter and the L1 pull towards where the last task ended: no tree.
    Anchor {
        /// Strength, in units of the learning rate.
        tau: f32,
    },
    /// One adapter and the L1 pull towards an earlier task's, drawn anew for each module and step.
    Random {
        /// Strength, in units of the learning rate.
        tau: f32,
    },
    /// Mode P.
    Paper(Paper),
    /// Mode C.
    Released(Released),
    /// Mode R.
    Tree(Grouped),
}

impl Method {
    /// Its short name, as on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Method::Sequential => "sequential",
            Method::Isolated(Route::Router) => "isolated",
            Method::Isolated(Route::Oracle) => "oracle",
            Method::Ewc { .. } => "ewc",
            Method::L2 { .. } => "l2",
            Method::Olora { .. } => "olora",
            Method::Inflora { .. } => "inflora",
            Method::Anchor { .. } => "anchor",
            Method::Random { .. } => "random",
            Method::Paper(_) => "paper",
            Method::Released(_) => "released",
            Method::Tree(_) => "tree",
        }
    }

    /// A method by its short name, with settings to begin with.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "sequential" => Method::Sequential,
            "isolated" => Method::Isolated(Route::Router),
            "oracle" => Method::Isolated(Route::Oracle),
            "ewc" => Method::Ewc { lambda: 1e4 },
            "l2" => Method::L2 { lambda: 1.0 },
            "olora" => Method::Olora { lambda: 0.5 },
            "inflora" => Method::Inflora { energy: 0.95 },
            "anchor" => Method::Anchor { tau: 0.3 },
            "random" => Method::Random { tau: 0.3 },
            "paper" => Method::Paper(Paper::default()),
            "released" => Method::Released(Released::default()),
            "tree" => Method::Tree(Grouped::default()),
            _ => return None,
        })
    }

    /// Short names of all.
    pub const NAMES: [&str; 12] = [
        "tree",
        "sequential",
        "isolated",
        "oracle",
        "ewc",
        "l2",
        "olora",
        "inflora",
        "anchor",
        "random",
        "paper",
        "released",
    ];

    /// Whether each task has ranks of its own in one adapter: the learner's adapter then has as many times the rank.
    pub fn blocks(&self) -> bool {
        matches!(self, Method::Olora { .. } | Method::Inflora { .. })
    }

    /// Whether a step's gradient is looked at or added to.
    pub fn adds_to_gradients(&self) -> bool {
        self.blocks() || matches!(self, Method::Ewc { .. } | Method::L2 { .. } | Method::Paper(_) | Method::Released(_))
    }

    /// Whether tasks have adapters, of which a request gets one.
    pub fn routes(&self) -> Option<Route> {
        match self {
            Method::Isolated(route) => Some(*route),
            Method::Tree(_) => Some(Route::Router),
            _ => None,
        }
    }

    /// Strength of the method's L1 pull.
    pub fn tau(&self) -> f32 {
        match self {
            Method::Anchor { tau } | Method::Random { tau } => *tau,
            Method::Paper(p) => p.tau,
            Method::Tree(t) => t.tau,
            _ => 0.0,
        }
    }

    /// Refuses what no run can use.
    ///
    /// # Errors
    /// `Usage`, naming the setting.
    pub fn validate(&self) -> Result<()> {
        let name = self.name();
        let strength = |what: &str, x: f64| {
            ensure!(x >= 0.0 && x.is_finite(), Usage, "{name}: {what} = {x} is impossible");
            Ok(())
        };
        strength("tau", f64::from(self.tau()))?;
        match self {
            Method::Ewc { lambda } | Method::L2 { lambda } | Method::Olora { lambda } => {
                strength("lambda", f64::from(*lambda))
            }
            Method::Released(r) => strength("lambda", r.lambda),
            Method::Inflora { energy } => {
                ensure!(*energy > 0.0 && *energy < 1.0, Usage, "inflora: energy = {energy} is impossible");
                Ok(())
            }
            Method::Paper(Paper { depth, width: Width::Fixed(w) | Width::Scaled(w), .. }) => {
                ensure!(*depth > 0, Usage, "paper: a tree of depth 0");
                strength("width", *w)
            }
            Method::Tree(t) => {
                ensure!(t.depth > 0, Usage, "tree: depth 0");
                let unit = (0.0..=1.0).contains(&t.share) && (0.0..=1.0).contains(&t.gate);
                ensure!(unit, Usage, "tree: share = {} and gate = {} must lie between 0 and 1", t.share, t.gate);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// What every method does alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// Times that a task's examples are seen.
    pub epochs: u64,
    /// Examples of a step.
    pub batch: usize,
    /// Ends a task once the mean loss of its last 8 steps is below this, nats; 0: never.
    pub stop_loss: f64,
    /// Order of the examples; the methods' draws.
    pub seed: u64,
    /// Scores tasks that are still to come too: whole rows, for forward transfer.
    pub square: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self { epochs: 4, batch: 8, stop_loss: 0.0, seed: 0, square: false }
    }
}

impl Plan {
    /// Refuses what no run can use.
    ///
    /// # Errors
    /// `Usage`, naming the setting.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.epochs > 0, Usage, "epochs = 0: nothing would be learnt");
        ensure!(self.batch > 0, Usage, "a step of 0 examples");
        ensure!(
            self.stop_loss >= 0.0 && self.stop_loss.is_finite(),
            Usage,
            "stop_loss = {} is impossible",
            self.stop_loss
        );
        Ok(())
    }
}
