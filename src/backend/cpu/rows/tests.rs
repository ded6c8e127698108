use super::*;
use crate::backend::cpu::Compute;
use crate::backend::{AttnSpec, Mask};
use crate::rng::Rng;

const WIDTHS: [usize; 8] = [1, 2, 7, 16, 33, 64, 576, 1538];

fn normals(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.normal()).collect()
}

fn close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((g as f64 - w).abs() <= 2e-6 * (1.0 + w.abs()), "{what} at {i}: {g} not {w}");
    }
}

fn norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f64> {
    let row = |x: &[f32]| {
        let mean = x.iter().map(|&x| (x as f64).powi(2)).sum::<f64>() / x.len() as f64;
        x.iter().zip(w).map(|(&x, &w)| x as f64 * w as f64 / (mean + eps as f64).sqrt()).collect::<Vec<_>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

/// Every op of rows at odd sizes against f64 loops; and one row at a time, on one thread, against all on two.
#[test]
fn rows_agree_with_the_definition_and_with_themselves() {
    let (one, two, mut rng, eps) = (Pool::new(1), Pool::new(2), Rng::new(21), 1e-5);
    for width in WIDTHS {
        for rows in [1, 3, 64] {
            let n = rows * width;
            let (x, r, w) = (normals(&mut rng, n), normals(&mut rng, n), normals(&mut rng, width));
            for tier in Tier::available() {
                let all = |pool: &Pool, x: &[f32], r: &[f32]| {
                    let mut out = vec![vec![0.0; x.len()]; 6];
                    rms_norm(pool, tier, &mut out[0], x, &w, eps).unwrap();
                    out[1] = x.to_vec();
                    let [_, sum, y, ..] = &mut out[..] else { unreachable!() };
                    add_rms_norm(pool, tier, y, sum, r, &w, eps).unwrap();
                    out[3] = x.to_vec();
                    add_normed(pool, tier, &mut out[3], r, &w, eps).unwrap();
                    out[4] = x.to_vec();
                    head_norm(pool, tier, &mut out[4], &w, eps).unwrap();
                    out[5] = x.to_vec();
                    add(pool, tier, &mut out[5], r).unwrap();
                    out
                };
                let got = all(&two, &x, &r);
                let plain: Vec<f64> = x.iter().zip(&r).map(|(&x, &r)| (x + r) as f64).collect();
                let normed = norm(&x, &w, eps);
                let sum: Vec<f32> = plain.iter().map(|&x| x as f32).collect();
                let residual: Vec<f64> = x.iter().zip(norm(&r, &w, eps)).map(|(&x, r)| x as f64 + r).collect();
                close(&got[0], &normed, "rms_norm");
                close(&got[1], &plain, "add_rms_norm, sum");
                close(&got[2], &norm(&sum, &w, eps), "add_rms_norm");
                close(&got[3], &residual, "add_normed");
                close(&got[4], &normed, "head_norm");
                close(&got[5], &plain, "add");
                for row in 0..rows {
                    let at = row * width..(row + 1) * width;
                    for (a, b) in got.iter().zip(all(&one, &x[at.clone()], &r[at.clone()])) {
                        assert_eq!(a[at.clone()], b, "{tier}, width {width}, row {row} of {rows}");
                    }
                }
            }
        }
    }
}

#[test]
fn gates_agree_with_the_definition() {
    let (one, two, mut rng) = (Pool::new(1), Pool::new(2), Rng::new(22));
    for n in [1, 7, 15, 16, 1536, 40_003] {
        let (gate, up) = (normals(&mut rng, n), normals(&mut rng, n));
        for tier in Tier::available() {
            for act in [Activation::Silu, Activation::GeluTanh] {
                let (mut y, mut z) = (vec![0.0; n], vec![0.0; n]);
                glu(&two, tier, &mut y, &gate, &up, act).unwrap();
                let want = gate.iter().zip(&up).map(|(&x, &u)| {
                    let x = x as f64;
                    let t = match act {
                        Activation::Silu => x / (1.0 + (-x).exp()),
                        Activation::GeluTanh => {
                            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                            x / 2.0 * (1.0 + u.tanh())
                        }
                    };
                    t * u as f64
                });
                close(&y, &want.collect::<Vec<_>>(), "glu");
                // Position does not matter: the same elements from the second on.
                glu(&one, tier, &mut z[1..], &gate[1..], &up[1..], act).unwrap();
                assert_eq!(y[1..], z[1..], "{tier} {act:?}");
            }
        }
    }
}

#[test]
fn rotation_turns_pairs_and_stages_keys() {
    let (one, two, mut rng) = (Pool::new(1), Pool::new(2), Rng::new(23));
    for (dim, q_heads, k_heads, rows) in [(2, 1, 1, 1), (6, 4, 2, 5), (64, 9, 3, 1), (64, 9, 3, 90), (80, 2, 1, 300)] {
        let (qd, kd) = (dim * q_heads, dim * k_heads);
        let positions: Vec<u32> = (0..rows).map(|_| rng.below(100_000) as u32).collect();
        let freq: Vec<f64> = (0..dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / dim as f64)).collect();
        let angles = |p: &u32| freq.iter().map(|f| *p as f64 * f).collect::<Vec<_>>();
        let row =
            |a: Vec<f64>| a.iter().map(|a| a.cos() as f32).chain(a.iter().map(|a| a.sin() as f32)).collect::<Vec<_>>();
        let table: Vec<f32> = positions.iter().flat_map(|p| row(angles(p))).collect();
        let (q, k, v) = (normals(&mut rng, rows * qd), normals(&mut rng, rows * kd), normals(&mut rng, rows * kd));
        let mut want = vec![0.0; rows * qd];
        for (r, p) in positions.iter().enumerate() {
            for h in 0..q_heads {
                for (i, f) in freq.iter().enumerate() {
                    let (a, b) = (r * qd + h * dim + i, r * qd + h * dim + i + dim / 2);
                    let (sin, cos) = (*p as f64 * f).sin_cos();
                    want[a] = q[a] as f64 * cos - q[b] as f64 * sin;
                    want[b] = q[b] as f64 * cos + q[a] as f64 * sin;
                }
            }
        }
        for tier in Tier::available() {
            let mut turned = q.clone();
            rope(&two, tier, &mut turned, &table, dim).unwrap();
            close(&turned, &want, "rope");
            let mut k1 = k.clone();
            rope(&one, tier, &mut k1, &table, dim).unwrap();
            // Two segments in one pass, and the same by the parts.
            let first = rows / 2;
            let new = || CpuKv::alloc(2, rows + 3, kd, Compute::Fast).unwrap();
            let (mut a, mut b, mut c, mut d) = (new(), new(), new(), new());
            let (mut q2, mut k2) = (q.clone(), k.clone());
            let sinks = [(3, &mut a, first), (0, &mut b, rows - first)];
            rope_stage(&two, tier, &mut q2, &mut k2, &v, &table, dim, 1, sinks).unwrap();
            assert_eq!((&q2, &k2), (&turned, &k1), "{tier}");
            c.stage(&one, tier, 1, 3, &k1[..first * kd], &v[..first * kd]).unwrap();
            d.stage(&one, tier, 1, 0, &k1[first * kd..], &v[first * kd..]).unwrap();
            let spec = AttnSpec { heads: q_heads, kv_heads: k_heads, head_dim: dim, scale: 0.3, window: None };
            let look = |kv: &CpuKv, past, rows| {
                let seg = super::super::attention::SegView { kv, past, staged: 0, rows, mask: Mask::Causal };
                let mut y = vec![0.0; rows * qd];
                super::super::attention::attention(&one, tier, &mut y, &q[..rows * qd], &[seg], 1, &spec).unwrap();
                y
            };
            assert_eq!(look(&a, 3, first), look(&c, 3, first));
            assert_eq!(look(&b, 0, rows - first), look(&d, 0, rows - first));
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (p, t, x, w) = (Pool::new(1), Tier::Portable, [1.0; 12], [1.0; 5]);
    let y = &mut [0.0; 12][..];
    assert!(rms_norm(&p, t, y, &x, &w, 0.0).is_err() && rms_norm(&p, t, y, &x, &[], 0.0).is_err());
    assert!(rms_norm(&p, t, &mut y[..8], &x, &w[..4], 0.0).is_err());
    assert!(add(&p, t, y, &x[1..]).is_err() && glu(&p, t, y, &x, &x[1..], Activation::Silu).is_err());
    assert!(gather_rows(&mut y[..4], &x, &[6], 4).is_err() && gather_rows(&mut y[..4], &x, &[0, 1], 4).is_err());
    assert!(gather_rows(&mut y[..8], &x, &[2, 0], 4).is_ok());
    assert!(rope(&p, t, y, &x[..6], 3).is_err() && rope(&p, t, y, &x[..8], 4).is_err());
    assert!(rope(&p, t, y, &x[..4], 4).is_ok());
    assert!(rms_norm(&p, t, &mut [], &[], &w, 0.0).is_ok() && rope(&p, t, &mut [], &[], 4).is_ok());
}
