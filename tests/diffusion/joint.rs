//! Models whose conditionals come from a true joint table: what parallel commits may and may not do.

use quadriga::Result;
use quadriga::diffusion::{Choose, Denoise, Job, Rank, RowStat, Schedule, Settings, decode};
use quadriga::model::ModelConfig;
use quadriga::model::config::Diffusion;
use quadriga::rng::Rng;

use super::script::MASK;

/// A joint distribution of `n` tokens out of `k`, entry by entry.
struct Joint {
    n: usize,
    k: usize,
    p: Vec<f64>,
    /// Draws tokens from the conditionals instead of taking the likeliest.
    draws: Option<Rng>,
}

impl Joint {
    fn digit(&self, entry: usize, i: usize) -> u32 {
        (entry / self.k.pow(i as u32) % self.k) as u32
    }

    /// The distribution of token i given what `text` has; the prompt is one token.
    fn conditional(&self, text: &[u32], i: usize) -> Vec<f64> {
        let mut out = vec![0.0; self.k];
        let agrees = |entry: usize| (0..self.n).all(|j| text[1 + j] == MASK || text[1 + j] == self.digit(entry, j));
        for (entry, p) in self.p.iter().enumerate().filter(|(e, _)| agrees(*e)) {
            out[self.digit(entry, i) as usize] += p;
        }
        let sum: f64 = out.iter().sum();
        out.iter_mut().for_each(|p| *p /= sum);
        out
    }
}

impl Denoise for Joint {
    fn run(&mut self, jobs: &[Job<'_>]) -> Result<Vec<Vec<RowStat>>> {
        let mut found = Vec::new();
        for job in jobs {
            let mut stats = Vec::new();
            for &row in &job.pass.wanted {
                let q = self.conditional(job.text.tokens(), job.pass.position(row) - 1);
                let mut order: Vec<usize> = (0..self.k).collect();
                order.sort_by(|&a, &b| q[b].total_cmp(&q[a]));
                let entropy = -q.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>() as f32;
                let argmax = order[0] as u32;
                let token = self.draws.as_mut().map_or(argmax, |rng| {
                    let mut u = f64::from(rng.uniform());
                    let hit = q.iter().position(|p| {
                        u -= p;
                        u < 0.0
                    });
                    hit.map_or(argmax, |t| t as u32)
                });
                let (max, second) = (q[order[0]].ln() as f32, q[order[1]].max(1e-30).ln() as f32);
                stats.push(RowStat { argmax, token, max, lse: 0.0, entropy, second });
            }
            found.push(stats);
        }
        Ok(found)
    }
}

fn config() -> ModelConfig {
    let mut cfg = super::script::config(false);
    cfg.diffusion = Some(Diffusion { mask: MASK, shift: false, block: None });
    cfg
}

fn settings(by: Rank, at: f32) -> Settings {
    let choose = Choose::Threshold { by, at, best: false, every: false };
    Settings { block: 8, choose, add: 100, activate: 100, early_stop: false, ..Settings::default() }
}

/// Two tokens that are always equal and each uniform over k: below ln k a threshold never takes both at once; at it and drawn, the pair is
/// wrong in 1 - 1/k of all cases.
#[test]
fn correlated_pairs_are_not_taken_together_below_their_entropy() {
    for k in [2usize, 3, 5] {
        let p = (0..k * k).map(|e| if e % k == e / k { 1.0 / k as f64 } else { 0.0 }).collect();
        let mut joint = Joint { n: 2, k, p, draws: Some(Rng::new(5)) };
        let mut wrong = |at: f32, times: usize| {
            let (mut wrong, mut passes) = (0, 0);
            for _ in 0..times {
                let mut texts = [Schedule::new(&config(), settings(Rank::Entropy, at), &[1], 2).unwrap()];
                decode(&mut joint, &mut texts, &mut |_, _, _| Ok(())).unwrap();
                wrong += usize::from(texts[0].tokens()[1] != texts[0].tokens()[2]);
                passes += texts[0].counts().passes;
            }
            (wrong as f64 / times as f64, passes as usize)
        };
        let ln = (k as f32).ln();
        assert_eq!(wrong(ln * 0.99, 200), (0.0, 400));
        let (rate, passes) = wrong(ln * 1.01, 4000);
        assert_eq!(passes, 4000);
        let expected = 1.0 - 1.0 / k as f64;
        assert!(
            (rate - expected).abs() < 4.0 * (expected * (1.0 - expected) / 4000.0).sqrt(),
            "{rate}, not {expected}"
        );
    }
}

/// I24: where (n + 1) (1 - c) <= 1 for the n tokens of a pass, the least confident with probability c, they are those that greedy decoding one
/// by one would say (Wu et al. 2025, arXiv:2505.22618, theorem 1).
#[test]
fn confident_tokens_are_those_of_sequential_decoding() {
    let (n, k, mut together) = (4usize, 3usize, 0);
    for seed in 0..400 {
        let mut rng = Rng::new(seed);
        // A few entries have nearly all of the mass.
        let mut p: Vec<f64> = (0..k.pow(n as u32)).map(|_| f64::from(rng.uniform()).powi(2)).collect();
        for _ in 0..1 + rng.below(2) {
            let at = rng.below(p.len());
            p[at] += 200.0 * f64::from(rng.uniform());
        }
        let sum: f64 = p.iter().sum();
        let mut joint = Joint { n, k, p: p.iter().map(|x| x / sum).collect(), draws: None };
        let mut blank = vec![MASK; n + 1];
        blank[0] = 1;
        let at_once: Vec<Vec<f64>> = (0..n).map(|i| joint.conditional(&blank, i)).collect();
        let best = |q: &[f64]| (0..k).max_by(|&a, &b| q[a].total_cmp(&q[b])).unwrap();
        for m in 2..=n {
            let tau = 1.0 - 1.0 / (m + 1) as f64;
            let sure: Vec<usize> = (0..n).filter(|&i| at_once[i][best(&at_once[i])] > tau).collect();
            if sure.len() != m {
                continue;
            }
            together += 1;
            // Every order of saying them one by one gives the same tokens.
            for first in 0..m {
                let mut text = blank.clone();
                for j in 0..m {
                    let i = sure[(first + j) % m];
                    text[1 + i] = best(&joint.conditional(&text, i)) as u32;
                }
                assert!(sure.iter().all(|&i| text[1 + i] as usize == best(&at_once[i])), "seed {seed}");
            }
            // And the decoder takes them in its first pass.
            let mut texts = [Schedule::new(&config(), settings(Rank::Confidence, tau as f32), &[1], n).unwrap()];
            let mut first = None;
            decode(&mut joint, &mut texts, &mut |_, _, c| {
                first.get_or_insert_with(|| c.iter().map(|c| c.position - 1).collect::<Vec<_>>());
                Ok(())
            })
            .unwrap();
            assert_eq!(first.unwrap(), sure);
        }
    }
    assert!(together > 100, "only {together} cases");
}
