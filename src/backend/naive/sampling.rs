//! From logits to tokens, by the book.

use crate::backend::sampling::{Left, NOTHING, ratio};
use crate::backend::{Draw, NO_TOKEN};

/// Maximum, log-sum-exp and entropy, and the lowest id of the maximum.
pub(super) fn stats(x: &[f64]) -> ([f64; 3], u32) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !max.is_finite() || x.iter().any(|x| x.is_nan()) {
        return ([f64::NAN; 3], NO_TOKEN);
    }
    let lse = max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    let entropy = x.iter().map(|x| (x - lse).exp() * (lse - x)).filter(|t| !t.is_nan()).sum();
    ([max, lse, entropy], x.iter().position(|x| *x == max).map_or(NO_TOKEN, |i| i as u32))
}

/// Ids from the largest logit down, lower ids first among equals.
pub(super) fn order(x: &[f64]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..x.len() as u32).collect();
    ids.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b)));
    ids
}

/// The probabilities that a row's token is drawn by; `None` where it holds NaN or nothing finite.
pub(super) fn law(x: &[f64], draw: &Draw) -> Option<Vec<f64>> {
    let ([max, ..], best) = stats(x);
    if best == NO_TOKEN {
        return None;
    }
    let mut p = vec![0.0; x.len()];
    if draw.is_greedy() {
        p[best as usize] = 1.0;
        return Some(p);
    }
    let mut kept: Vec<(u32, f64)> =
        order(x).into_iter().map(|i| (i, ((x[i as usize] - max) / f64::from(draw.temperature)).exp())).collect();
    if draw.top_k > 0 {
        kept.truncate(draw.top_k as usize);
    }
    if draw.top_p < 1.0 {
        let (mut mass, total) = (0.0, kept.iter().map(|k| k.1).sum::<f64>());
        kept.retain(|k| {
            let keep = mass < f64::from(draw.top_p) * total;
            mass += k.1;
            keep
        });
    }
    kept.retain(|k| k.1 >= f64::from(draw.min_p));
    let total: f64 = kept.iter().map(|k| k.1).sum();
    kept.into_iter().for_each(|(i, w)| p[i as usize] = w / total);
    Some(p)
}

/// The first id up to which `p` exceeds the fraction `u` of its sum; the last likely one if rounding leaves none.
pub(super) fn invert(p: &[f64], u: f64) -> u32 {
    let (mut sum, at) = (0.0, u * p.iter().sum::<f64>());
    let hit = p.iter().position(|p| {
        sum += p;
        sum > at
    });
    hit.or(p.iter().rposition(|p| *p > 0.0)).map_or(NO_TOKEN, |i| i as u32)
}

/// What rejections have left of a node's p and q, and its ratio.
pub(super) struct Rest {
    pub p: Vec<f64>,
    pub q: Vec<f64>,
    pub r: f64,
}

impl Left for Rest {
    fn r(&self) -> f64 {
        self.r
    }

    fn ratio(&self, x: usize) -> f64 {
        ratio(self.r * self.p[x], self.q[x])
    }

    fn reject(&mut self, x: usize, replacement: bool) -> bool {
        let rest: Vec<f64> = self.p.iter().zip(&self.q).map(|(p, q)| (self.r * p - q).max(0.0)).collect();
        let sum: f64 = rest.iter().sum();
        if sum < NOTHING {
            if self.r < 1.0 && self.p.iter().any(|p| *p > 0.0) {
                self.r = 0.0;
            }
            return false;
        }
        self.p = rest.into_iter().map(|r| r / sum).collect();
        self.r = sum / (sum + 1.0 - self.r);
        if replacement {
            return true;
        }
        self.q[x] = 0.0;
        let sum: f64 = self.q.iter().sum();
        self.q.iter_mut().for_each(|q| *q /= sum);
        sum > 0.0
    }

    fn draw(&self, u: f64) -> u32 {
        invert(&self.p, u)
    }
}
