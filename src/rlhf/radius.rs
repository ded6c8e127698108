//! How wide the confidence ellipsoid ‖θ* - θ_t‖_H <= β is.

use super::settings::Settings;
use crate::error::{Result, ensure};

/// β_t of the paper's proof of lemma 1, valid for all t at once with probability 1 - `delta`, for `settings` of
/// [`Settings::theory`] with ‖z‖ <= `length` L and ‖θ*‖ <= `bound` B in `d` dimensions, after `t` comparisons:
///
/// β² = 22 η (3 ln(1 + 2t) + 2 + BL) ln(2 √(1 + 2t) / δ) + 4η + 2 √6 η c d ln(1 + 2tL² / (dλ)) + 4λB², c = 7η/6.
///
/// Its constants are for proofs: hundreds, where the distance is about √d. See [`radius_calibrated`].
pub fn radius_theory(settings: &Settings, length: f64, bound: f64, d: usize, t: u64, delta: f64) -> f64 {
    let (eta, lambda, d, t) = (settings.eta, settings.lambda, d as f64, t as f64);
    let c = 7.0 * eta / 6.0;
    let noise = 22.0 * eta * (3.0 * (2.0 * t).ln_1p() + 2.0 + bound * length);
    let noise = noise * (2.0 * (1.0 + 2.0 * t).sqrt() / delta).ln();
    let width = 2.0 * 6.0f64.sqrt() * eta * c * d * (2.0 * t * length * length / (d * lambda)).ln_1p();
    (noise + 4.0 * eta + width + 4.0 * lambda * bound * bound).sqrt()
}

/// β = β₀ √χ²(d, 1 - δ) + √λ B₀: what the distance is in practice for η = 1, scaled by `beta0` (1 is the whole ellipsoid, less
/// asks less), and the pull of the prior towards 0 where ‖θ*‖ is about `prior` B₀.
///
/// NaN of arguments that are impossible (d = 0, δ outside (0, 1), another below 0), which whoever takes a radius refuses.
pub fn radius_calibrated(beta0: f64, d: usize, lambda: f64, prior: f64, delta: f64) -> f64 {
    let quantile = chi_square_quantile(d, 1.0 - delta).unwrap_or(f64::NAN);
    if beta0 < 0.0 || prior < 0.0 { f64::NAN } else { beta0 * quantile.sqrt() + lambda.sqrt() * prior }
}

/// The x below which a χ² variable of `d` degrees of freedom lies with `probability`, by Newton's method
/// within a bracket on the incomplete gamma function.
///
/// # Errors
/// `Usage`: d = 0, or a probability outside (0, 1).
pub fn chi_square_quantile(d: usize, probability: f64) -> Result<f64> {
    ensure!(d > 0, Usage, "a χ² of 0 degrees of freedom");
    ensure!(probability > 0.0 && probability < 1.0, Usage, "a quantile of {probability}");
    let (mut low, mut high) = (0.0, d as f64 + 10.0);
    while chi_square(d, high) < probability {
        high *= 2.0;
    }
    let mut x = d as f64;
    for _ in 0..200 {
        let excess = chi_square(d, x) - probability;
        if excess > 0.0 {
            high = x
        } else {
            low = x
        }
        let newton = x - excess / density(d, x);
        let next = if low < newton && newton < high { newton } else { 0.5 * (low + high) };
        if (next - x).abs() <= 1e-15 * x {
            return Ok(next);
        }
        x = next;
    }
    Ok(x)
}

/// ln of x^(d/2) e^(-x/2) / (2^(d/2) Γ(d/2 + 1)).
fn log_term(d: usize, x: f64) -> f64 {
    // Γ(d/2 + 1) by its recurrence from Γ(1) or Γ(1/2): d is a whole number.
    let root = if d.is_multiple_of(2) { 0.0 } else { 0.5 * std::f64::consts::PI.ln() };
    let log_gamma: f64 = (1..=d).rev().step_by(2).map(|k| (0.5 * k as f64).ln()).sum::<f64>() + root;
    0.5 * d as f64 * (0.5 * x).ln() - 0.5 * x - log_gamma
}

fn density(d: usize, x: f64) -> f64 {
    log_term(d, x).exp() * 0.5 * d as f64 / x
}

/// P(χ²_d <= x): the regularised incomplete gamma function, by its series, whose terms are all positive.
fn chi_square(d: usize, x: f64) -> f64 {
    if x <= 0.0 {
        return 0.0;
    }
    let (mut term, mut sum, mut k) = (1.0, 1.0, 0.5 * d as f64);
    while term > 1e-17 * sum {
        k += 1.0;
        term *= 0.5 * x / k;
        sum += term;
    }
    (log_term(d, x) + f64::ln(sum)).exp().min(1.0)
}
