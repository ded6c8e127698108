//! Statistics of logits on the host, for samplers and for algorithms that need probabilities.

use super::Tier;
use super::lanes::math::exp;
use super::lanes::{Kernel, Simd, dispatch};

/// Statistics of one row of logits. Not-a-numbers are never the maximum; where there is one, sums are not numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitsStats {
    /// The greatest logit, -inf of an empty row.
    pub max: f32,
    /// Where it is; the lowest of equals, 0 if there is none.
    pub argmax: u32,
    /// Natural logarithm of the sum of e^x.
    pub lse: f64,
    /// Entropy of softmax(x), in nats.
    pub entropy: f64,
}

/// [`LogitsStats`] of a row; sums in f64.
pub fn logits_stats(tier: Tier, row: &[f32]) -> LogitsStats {
    dispatch(tier, Stats(row))
}

struct Stats<'a>(&'a [f32]);

impl Kernel for Stats<'_> {
    type Out = LogitsStats;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> LogitsStats {
        let max = greatest(s, self.0);
        let argmax = self.0.iter().position(|&x| x == max).unwrap_or(0) as u32;
        // With t = x - max: lse = max + ln(sum e^t) and entropy = ln(sum e^t) - sum(t e^t) / sum(e^t).
        let (mut sum, mut moment) = ([0.0f64; 16], [0.0f64; 16]);
        for x in self.0.chunks(16) {
            let (mut t, mut e) = ([f32::NEG_INFINITY; 16], [0.0f32; 16]);
            t[..x.len()].copy_from_slice(x);
            for (t, e) in t.chunks_exact_mut(S::N).zip(e.chunks_exact_mut(S::N)) {
                let v = s.sub(s.load(t), s.splat(max));
                s.store(v, t);
                s.store(exp(s, v), e);
            }
            for i in 0..16 {
                sum[i] += e[i] as f64;
                // What has no weight has no part in the entropy, though its t be infinite.
                moment[i] += if e[i] == 0.0 { 0.0 } else { t[i] as f64 * e[i] as f64 };
            }
        }
        let (sum, moment): (f64, f64) = (sum.iter().sum(), moment.iter().sum());
        LogitsStats { max, argmax, lse: max as f64 + sum.ln(), entropy: (sum.ln() - moment / sum).max(0.0) }
    }
}

/// The greatest value, -inf if there is none.
#[inline(always)]
pub(super) fn greatest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut best = [s.splat(f32::NEG_INFINITY); 4];
    for quad in x.chunks(4 * S::N) {
        for (best, x) in best.iter_mut().zip(quad.chunks(S::N)) {
            let x = if x.len() == S::N { s.load(x) } else { s.load_part(x, f32::NEG_INFINITY) };
            *best = s.max(x, *best);
        }
    }
    s.greatest(s.max(s.max(best[0], best[1]), s.max(best[2], best[3])))
}

/// The `k` greatest logits with their ids, greatest first, the lower id first among equals. Fewer if the row has fewer;
/// not-a-numbers are left out.
pub fn top_k(tier: Tier, row: &[f32], k: usize) -> Vec<(u32, f32)> {
    dispatch(tier, Top(row, k.min(row.len())))
}

struct Top<'a>(&'a [f32], usize);

impl Kernel for Top<'_> {
    type Out = Vec<(u32, f32)>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<(u32, f32)> {
        let Top(row, k) = self;
        if k == 0 {
            return Vec::new();
        }
        // Candidates above the least of the best k so far are collected and thinned out when they are twice as many as
        // wanted; runs without any are skipped by their maximum.
        let most = 2 * k + 64;
        let mut best = Vec::with_capacity(most + 64);
        let mut bar = f32::NEG_INFINITY;
        let mut full = false;
        for (i, run) in row.chunks(64).enumerate() {
            if full && greatest(s, run) <= bar {
                continue;
            }
            let ids = (i * 64) as u32..;
            best.extend(ids.zip(run.iter().copied()).filter(|&(_, x)| if full { x > bar } else { !x.is_nan() }));
            if best.len() >= most {
                thin(&mut best, k);
                full = true;
                bar = best[k - 1].1;
            }
        }
        thin(&mut best, k);
        best.sort_unstable_by(order);
        best
    }
}

/// Greater first, then the lower id.
pub(super) fn order(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal).then(a.0.cmp(&b.0))
}

/// Leaves the best `k`, the last of them last.
fn thin(best: &mut Vec<(u32, f32)>, k: usize) {
    if best.len() > k {
        best.select_nth_unstable_by(k - 1, order);
        best.truncate(k);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn statistics_agree_with_the_definition() {
        let mut rng = Rng::new(31);
        for n in [1, 2, 15, 17, 1000, 49_152] {
            for scale in [0.0, 1.0, 10.0, 200.0] {
                let x: Vec<f32> = (0..n).map(|_| rng.normal() * scale + 5.0).collect();
                let max = x.iter().copied().fold(f32::MIN, f32::max);
                let sum: f64 = x.iter().map(|&x| (x as f64 - max as f64).exp()).sum();
                let lse = max as f64 + sum.ln();
                let entropy: f64 = x.iter().map(|&x| (x as f64 - lse).exp() * (lse - x as f64)).sum();
                for tier in Tier::available() {
                    let s = logits_stats(tier, &x);
                    assert_eq!((s.max, s.argmax as usize), (max, x.iter().position(|&x| x == max).unwrap()));
                    assert!((s.lse - lse).abs() < 2e-7 && (s.entropy - entropy).abs() < 2e-6, "{tier} {n}: {s:?}");
                }
            }
        }
    }

    #[test]
    fn masked_and_broken_logits() {
        for tier in Tier::available() {
            let s = logits_stats(tier, &[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 1.0]);
            assert_eq!((s.max, s.argmax), (1.0, 1));
            assert!((s.lse - (1.0 + 2f64.ln())).abs() < 1e-12 && (s.entropy - 2f64.ln()).abs() < 1e-12);
            let s = logits_stats(tier, &[f32::NAN, 3.0]);
            assert!(s.max == 3.0 && s.argmax == 1 && s.lse.is_nan());
            assert_eq!(logits_stats(tier, &[]).max, f32::NEG_INFINITY);
        }
    }

    #[test]
    fn the_best_k_in_order() {
        let mut rng = Rng::new(32);
        for n in [0, 1, 5, 64, 100, 3000] {
            for distinct in [3, 50, 1 << 20] {
                let mut x: Vec<f32> = (0..n).map(|_| rng.below(distinct) as f32).collect();
                if n > 60 {
                    (x[3], x[40], x[50]) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
                }
                let mut want: Vec<(u32, f32)> = (0..).zip(x.iter().copied()).filter(|p| !p.1.is_nan()).collect();
                want.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                for k in [0, 1, 2, 7, 64, 400, 5000] {
                    for tier in Tier::available() {
                        assert_eq!(top_k(tier, &x, k), want[..k.min(want.len())], "{tier} {n} {distinct} {k}");
                    }
                }
            }
        }
    }
}
