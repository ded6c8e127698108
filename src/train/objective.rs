//! Losses that look at whole answers: values and the factors on their rows' gradients, on the host in f64.
//!
//! The losses of single rows are [`Target`](crate::backend::Target)s.

/// ln(1 + e^x).
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// -ln sigmoid(chosen - rejected) (Bradley & Terry 1952), and its derivatives by the two rewards.
pub fn bradley_terry(chosen: f64, rejected: f64) -> (f64, [f64; 2]) {
    let gap = chosen - rejected;
    (softplus(-gap), [-sigmoid(-gap), sigmoid(-gap)])
}

/// Log-probabilities of two answers to one prompt, under the policy that learns and under its reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answers {
    /// Of the chosen and of the rejected answer, nats.
    pub policy: [f64; 2],
    /// The same under the reference.
    pub reference: [f64; 2],
}

/// -ln sigmoid(beta d), d = how much more the policy prefers the chosen answer than the reference does (Rafailov et al. 2023,
/// arXiv:2305.18290), and its derivatives by the policy's two log-probabilities: the weights of the answers' rows under
/// cross-entropy are their negatives.
pub fn dpo(answers: &Answers, beta: f64) -> (f64, [f64; 2]) {
    let Answers { policy: p, reference: r } = answers;
    let (loss, [a, b]) = bradley_terry(beta * (p[0] - r[0]), beta * (p[1] - r[1]));
    (loss, [beta * a, beta * b])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dpo_has_the_known_values() {
        let answers = |gap: f64| Answers { policy: [gap - 3.0, -2.0], reference: [-3.0, -2.0] };
        let (loss, [a, b]) = dpo(&answers(0.0), 0.1);
        assert!((loss - 2f64.ln()).abs() < 1e-12 && (a + 0.05).abs() < 1e-12 && (b - 0.05).abs() < 1e-12);
        let (loss, [a, _]) = dpo(&answers(2.0), 0.1);
        assert!((loss - 0.598139).abs() < 1e-6 && (a + 0.045017).abs() < 1e-6);
    }

    #[test]
    fn derivatives_are_differences_and_nothing_overflows() {
        for gap in [-3.0, -0.2, 0.0, 1.5] {
            let h = 1e-5;
            let at = |d: f64| bradley_terry(gap + d, 0.3).0;
            let (_, [a, b]) = bradley_terry(gap, 0.3);
            assert!(((at(h) - at(-h)) / (2.0 * h) - a).abs() < 1e-9 && a == -b);
        }
        assert_eq!(bradley_terry(1e4, -1e4), (0.0, [-0.0, 0.0]));
        assert_eq!(bradley_terry(-1e4, 1e4), (2e4, [-1.0, 1.0]));
    }
}
