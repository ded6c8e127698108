//! How a text is unmasked: which tokens are taken after a pass, when blocks begin, what is cached.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};
use crate::model::ModelConfig;

/// By what predictions are ranked. All look at the distribution without MASK and before any temperature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rank {
    /// Probability of the likeliest token, largest first.
    Confidence,
    /// Its distance from the second's probability, largest first.
    Margin,
    /// Entropy in nats, smallest first.
    Entropy,
    /// At random.
    Random,
}

/// Which predictions of a pass become tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choose {
    /// So many each pass that `steps` passes fill the text, the same number in each block, the best first (LLaDA, Nie et al. 2025,
    /// arXiv:2502.09992). As many steps as tokens is one token a pass.
    Quota {
        /// Passes of the whole text.
        steps: usize,
        /// The order.
        by: Rank,
    },
    /// With n masks left after pass k of `steps`, n (1 - t\[k+1\] / t\[k\]) of them, t falling linearly from 1 to 1e-3 (Dream, Ye et al.
    /// 2025, arXiv:2508.15487). `Random` takes each with that probability.
    Timetable {
        /// Passes of the whole text.
        steps: usize,
        /// The order.
        by: Rank,
    },
    /// All that pass a test. At least one token each pass: the best of the first block that must advance.
    Threshold {
        /// `Confidence` (at least `at`: Fast-dLLM, Wu et al. 2025, arXiv:2505.22618) or `Entropy` (below `at`: dParallel, d3LLM).
        by: Rank,
        /// Probability, or nats.
        at: f32,
        /// Also takes the best of all candidates, and an entropy that equals the threshold: as LLaDA's d3LLM decodes.
        best: bool,
        /// Every fully activated block advances by a token, not the first one only (D2F, Wang et al. 2025, arXiv:2508.09192).
        every: bool,
    },
}

/// What is kept of earlier passes. Under full attention every cached key is an approximation: it does not know what was said since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Nothing: every pass computes all positions.
    None,
    /// What lies before the current block, from the pass that began it (Fast-dLLM). Blocks one after another only.
    Prefix,
    /// And what lies behind it.
    Dual,
    /// Blocks that have been complete for `delay` passes; until they are, and every `refresh` passes, all is computed again (d3LLM
    /// 2026, arXiv:2601.07568). With a delay of 0 this is the exact cache of block-causal models.
    Delayed {
        /// Passes.
        delay: u64,
        /// Passes between two refreshes; `None`: only while a complete block waits.
        refresh: Option<u64>,
    },
}

/// How a text is made. [`Settings::default`] is d3LLM's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Positions of a block; the last one may be shorter.
    pub block: usize,
    /// What becomes a token.
    pub choose: Choose,
    /// Percent of a block that must be decoded before the next one begins, under the threshold alone. 100: one after another.
    pub add: u32,
    /// Percent of a block that must be decoded before the next one has to advance.
    pub activate: u32,
    /// What is cached.
    pub cache: Cache,
    /// Ends at the first end token: nothing behind it is decoded.
    pub early_stop: bool,
    /// Masks behind the last begun block that a pass computes and attends to; `None`: all. Fewer is faster and, under full attention, not the same.
    pub look_ahead: Option<usize>,
    /// When a block is complete, tokens that were taken with a lower confidence become masks again, once.
    pub remask: f32,
    /// 0 takes the likeliest token, else tokens are drawn from softmax(z / temperature).
    pub temperature: f32,
    /// Draws from the fewest of the likeliest tokens whose probabilities reach this sum.
    pub top_p: f32,
    /// Seed of all draws.
    pub seed: u64,
    /// Decodes as the published code does, errors included, for comparison: MASK may be taken, a cached pass of a shifted model predicts its
    /// first position from that position's own row, a refresh cuts the cache at the last waiting block, a pass that only the end saves is counted.
    pub authors: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            block: 32,
            choose: Choose::Threshold { by: Rank::Entropy, at: 0.45, best: false, every: false },
            add: 10,
            activate: 95,
            cache: Cache::None,
            early_stop: true,
            look_ahead: None,
            remask: 0.0,
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
            authors: false,
        }
    }
}

impl Settings {
    /// d3LLM's for models of the kind of `cfg`: LLaDA's rule where logits are not shifted, Dream's where they are, and the exact cache of
    /// block-causal ones.
    pub fn for_model(cfg: &ModelConfig) -> Self {
        let (mut s, Some(d)) = (Self::default(), cfg.diffusion) else { return Self::default() };
        s.choose = Choose::Threshold { by: Rank::Entropy, at: 0.45, best: !d.shift, every: false };
        s.early_stop = !cfg.eos.is_empty();
        if let Some(block) = d.block {
            s = Self { block, cache: Cache::Delayed { delay: 0, refresh: None }, ..s };
        }
        s
    }

    /// One token a pass, blocks one after another, most confident first: the reference that all others are compared with.
    pub fn vanilla(block: usize, tokens: usize) -> Self {
        let choose = Choose::Quota { steps: tokens, by: Rank::Confidence };
        Self { block, choose, add: 100, activate: 100, ..Self::default() }
    }

    /// Blocks one after another, all tokens of at least this probability (Fast-dLLM).
    pub fn confident(block: usize, at: f32) -> Self {
        let choose = Choose::Threshold { by: Rank::Confidence, at, best: false, every: false };
        Self { block, choose, add: 100, activate: 100, ..Self::default() }
    }

    /// Whether a block begins only when the one before it is complete.
    pub fn is_sequential(&self) -> bool {
        self.add == 100 && self.activate == 100
    }

    /// Refuses what cannot be.
    ///
    /// # Errors
    /// `Usage`, naming the setting and its flag.
    pub fn validate(self) -> Result<Self> {
        ensure!(self.block > 0, Usage, "--block-size 0 is impossible: a block has at least one position");
        for (name, percent) in [("--add", self.add), ("--activate", self.activate)] {
            ensure!(percent <= 100, Usage, "{name} {percent}: expected percent, 0 to 100");
        }
        match self.choose {
            Choose::Quota { steps, .. } | Choose::Timetable { steps, .. } => {
                ensure!(steps > 0, Usage, "--steps 0 is impossible");
                ensure!(
                    self.is_sequential(),
                    Usage,
                    "a number of steps needs blocks one after another: --add 100 --activate 100"
                );
            }
            Choose::Threshold { by, at, .. } => {
                ensure!(!at.is_nan(), Usage, "the threshold is not a number");
                match by {
                    Rank::Confidence => {
                        ensure!((0.0..=1.0).contains(&at), Usage, "--confidence {at}: expected a probability, 0 to 1");
                    }
                    Rank::Entropy => {}
                    _ => ensure!(false, Usage, "a threshold is on confidence or on entropy"),
                }
            }
        }
        if matches!(self.cache, Cache::Prefix | Cache::Dual) {
            let plain = self.is_sequential() && self.look_ahead.is_none() && !self.authors;
            ensure!(plain, Usage, "--cache prefix and dual are for blocks one after another, with all masks in sight");
        }
        if let Cache::Delayed { refresh, .. } = self.cache {
            ensure!(refresh != Some(0), Usage, "--refresh 0 is impossible: leave it out for no refresh");
        }
        let remask = (0.0..=1.0).contains(&self.remask);
        ensure!(remask, Usage, "--remask {}: expected a probability, 0 to 1", self.remask);
        let warm = self.temperature >= 0.0 && self.temperature.is_finite();
        ensure!(warm, Usage, "--temperature {}: expected 0 or more", self.temperature);
        ensure!(self.top_p > 0.0 && self.top_p <= 1.0, Usage, "--top-p {}: expected above 0, at most 1", self.top_p);
        Ok(self)
    }
}
