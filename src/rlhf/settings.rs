//! How [`OnePass`](super::OnePass) learns.

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// What a step minimises beside (1/2η) ‖θ - θ_t‖² in the norm of the accumulated curvature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// The second-order Taylor model of the loss at θ_t: the paper's step. With a small λ it can overshoot in the first rounds.
    Explicit,
    /// The loss itself (Faury et al. 2022). At the same cost, since the loss sees θ through zᵀθ alone, and it cannot overshoot.
    Implicit,
}

/// Settings of a one-pass learner. The default suits features that were scaled to a mean square norm of 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The step.
    pub rule: Rule,
    /// Step size η. 1 is as good as the maximum-likelihood estimate in the long run; the variance of another is η² / (2η - 1) times
    /// as large, and η <= 1/2 converges more slowly than that.
    pub eta: f64,
    /// Curvature before the first comparison: 1 over the prior variance of a coordinate of θ, the ridge of the equivalent
    /// maximum-likelihood estimate.
    pub lambda: f64,
    /// B: θ is kept in the ball of this radius. A projection takes many products with P, so let it be large enough to be rare.
    pub bound: Option<f64>,
    /// γ in (0, 1]: what is left of the curvature after each comparison, 1 for a θ* that does not move. The learner looks back over
    /// about 1 / (1 - γ) comparisons. Directions in which nothing is compared are forgotten too: their variance grows by 1/γ a
    /// step, and leaves the numbers of an f64 after some 700 / (1 - γ) steps, of an f32 after 80 / (1 - γ).
    pub forget: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { rule: Rule::Implicit, eta: 1.0, lambda: 0.5, bound: None, forget: 1.0 }
    }
}

impl Settings {
    /// What lemma 1 of the paper needs for its guarantee, with ‖θ*‖ <= `bound` B and ‖z‖ <= `length` L in `d` dimensions:
    /// η = ½ ln 2 + BL + 1, λ = 84 √2 η (d L² + B L³). The paper bounds ‖φ‖ by L, but a margin can reach the bound on ‖z‖ times B. For
    /// orientation: this λ is so large that tens of thousands of comparisons hardly move θ.
    pub fn theory(bound: f64, length: f64, d: usize) -> Self {
        let eta = 0.5 * std::f64::consts::LN_2 + bound * length + 1.0;
        let lambda = 84.0 * std::f64::consts::SQRT_2 * eta * (d as f64 * length.powi(2) + bound * length.powi(3));
        Self { rule: Rule::Explicit, eta, lambda, bound: Some(bound), forget: 1.0 }
    }

    /// Refuses what no learner can use.
    ///
    /// # Errors
    /// `Config`, naming the setting.
    pub fn validate(&self) -> Result<()> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        ensure!(positive(self.eta), Config, "eta = {}: a step size is positive", self.eta);
        ensure!(positive(self.lambda), Config, "lambda = {}: a prior curvature is positive", self.lambda);
        ensure!(
            self.bound.is_none_or(positive),
            Config,
            "bound = {}: a radius is positive",
            self.bound.unwrap_or_default()
        );
        let forget = self.forget;
        ensure!(forget > 0.0 && forget <= 1.0, Config, "forget = {forget}: in (0, 1], 1 forgets nothing");
        Ok(())
    }
}
