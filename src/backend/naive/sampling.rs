//! From logits to tokens, by the book.

use crate::backend::sampling::Tree;
use crate::backend::{Draw, NO_TOKEN};
use crate::rng::Key;

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

/// [`Rule::Reject`](crate::backend::Rule::Reject) for one sequence, whose distributions are `p(node)` and `q(node)`: writes the
/// path, says how long it is and which token follows.
pub(super) fn reject<'m>(
    tree: &Tree<'_>,
    p: impl Fn(usize) -> &'m [f64],
    q: impl Fn(usize) -> &'m [f64],
    key: Key,
    path: &mut [u32],
) -> (u32, u32) {
    let (mut node, mut kept) = (0, 0);
    let mut uniforms = (0..).map(|i| key.at(i).uniform());
    let mut u = || uniforms.next().unwrap_or_default();
    'down: loop {
        path[kept] = node as u32;
        kept += 1;
        let mut p = p(node).to_vec();
        let mut q = if tree.children(node).next().is_some() { q(node).to_vec() } else { Vec::new() };
        for child in tree.children(node).take_while(|_| kept < path.len()) {
            let x = tree.tokens[child] as usize;
            if u() * q[x] < p[x] {
                node = child;
                continue 'down;
            }
            let rest: Vec<f64> = p.iter().zip(&q).map(|(p, q)| (p - q).max(0.0)).collect();
            let sum: f64 = rest.iter().sum();
            // p was q but for rounding: p is right as it is.
            if sum <= 0.0 {
                break;
            }
            p = rest.into_iter().map(|r| r / sum).collect();
            q[x] = 0.0;
            let sum: f64 = q.iter().sum();
            if sum <= 0.0 {
                break;
            }
            q.iter_mut().for_each(|q| *q /= sum);
        }
        return (kept as u32, invert(&p, u()));
    }
}
