//! The logistic link, its loss, and the one scalar equation of the implicit step.

/// σ(w) = 1 / (1 + e^-w). The exponential is only ever taken of a number that is not positive, so nothing overflows.
pub fn sigmoid(w: f64) -> f64 {
    let e = (-w.abs()).exp();
    if w >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) }
}

/// σ'(w) = σ(w) (1 - σ(w)), to full relative precision in both tails: there 1 - σ would cancel.
pub fn slope(w: f64) -> f64 {
    let e = (-w.abs()).exp();
    e / ((1.0 + e) * (1.0 + e))
}

/// log(1 + e^margin) - y margin: the loss of a comparison, nats, with margin = zᵀθ.
pub fn log_loss(margin: f64, y: f64) -> f64 {
    margin.max(0.0) + (-margin.abs()).exp().ln_1p() - y * margin
}

/// The root m' of m' + reach (σ(m') - y) = margin, reach = η zᵀPz >= 0: the margin behind an implicit step (Faury et al. 2022).
/// The left side is monotone in m', so Newton's method within a bracket finds it to the last bits.
pub fn proximal(margin: f64, reach: f64, y: f64) -> f64 {
    let explicit = margin - reach * (sigmoid(margin) - y);
    let (mut low, mut high) = (margin.min(explicit), margin.max(explicit));
    let mut x = margin;
    for _ in 0..200 {
        let excess = x - margin + reach * (sigmoid(x) - y);
        if excess > 0.0 {
            high = x
        } else {
            low = x
        }
        let newton = x - excess / (1.0 + reach * slope(x));
        let next = if low < newton && newton < high { newton } else { 0.5 * (low + high) };
        if (next - x).abs() <= f64::EPSILON * x.abs() {
            return next;
        }
        x = next;
    }
    x
}
