//! Gated activations of a run of values, in loops that the compiler vectorises.

use crate::model::config::Activation;

/// e^x to about two units in the last place (Cody-Waite reduction, the polynomial of Cephes' `expf`); NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    const MAGIC: f32 = 12_582_912.0;
    let biased = x * std::f32::consts::LOG2_E + MAGIC;
    let n = biased - MAGIC;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    f32::from_bits(p.to_bits().wrapping_add(biased.to_bits() << 23))
}

/// y\[i\] = act(gate\[i\]) * up\[i\].
#[inline(always)]
pub(in crate::backend::cpu) fn glu(y: &mut [f32], gate: &[f32], up: &[f32], act: Activation) {
    let values = y.iter_mut().zip(gate).zip(up);
    match act {
        Activation::Silu => values.for_each(|((y, &g), &u)| *y = g / (1.0 + exp(-g)) * u),
        // (1 + tanh z) / 2 is the logistic function of 2z.
        Activation::GeluTanh => values.for_each(|((y, &g), &u)| {
            const C: f32 = 2.0 * 0.797_884_6;
            *y = g / (1.0 + exp(-C * (g + 0.044_715 * g * g * g))) * u;
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_follow_their_definitions() {
        let g: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.03).collect();
        let up = vec![1.5; g.len()];
        let mut y = vec![0.0; g.len()];
        for act in [Activation::Silu, Activation::GeluTanh] {
            glu(&mut y, &g, &up, act);
            for (&g, &y) in g.iter().zip(&y) {
                let x = g as f64;
                let want = 1.5
                    * match act {
                        Activation::Silu => x / (1.0 + (-x).exp()),
                        _ => {
                            x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
                        }
                    };
                assert!((y as f64 - want).abs() <= 1e-6 * want.abs().max(1e-3), "{act:?}({g}): {y}, {want}");
            }
        }
        glu(&mut y[..1], &[f32::NAN], &[1.0], Activation::Silu);
        assert!(y[0].is_nan());
    }
}
