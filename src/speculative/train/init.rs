//! What a head begins as, so that little data is enough: the best linear guess at the target's next residual stream, behind it the MLP and
//! the vocabulary of the target.
//!
//! With e the normed embedding of the token at t + 1 and f the features of position t, the highest tap at t + 1 is fitted as A e + B f, by
//! least squares over rows of the data. B is `fc`. A, cut to the rank that fits, is values and outputs of all key heads but the last; their
//! queries and keys are one random projection of the embedding, so that a slot sees mostly itself. The last key head, the norms of features
//! and MLP, and the MLP are those of the layer that the highest tap enters.

use super::features::Features;
use super::weights::{HeadConfig, Tensors};
use crate::backend::{Buffer, Train};
use crate::dtype::Real;
use crate::error::{Result, ensure};
use crate::model::roles::{LayerRole, Role, TensorSource};
use crate::rng::Rng;

/// Rows that are fitted to.
const ROWS: usize = 100_000;
/// Part of each variance that is added to it.
const RIDGE: f64 = 1e-3;
/// Score of a slot's own key under its query; others' are about 0.
const OWN: f32 = 10.0;
/// Of the iteration that finds the leading directions.
const ROUNDS: usize = 30;

/// Tensors of a head on the target `source`, whose features of the sequences `which` it is fitted to; `d2t` are the tokens that it knows.
///
/// # Errors
/// Features that do not determine a fit; the source's and the device's.
pub fn fitted<B: Train>(
    be: &B,
    source: &dyn TensorSource,
    cfg: &HeadConfig,
    features: &Features,
    which: &[usize],
    d2t: &[u32],
    seed: u64,
) -> Result<Tensors> {
    let target = source.config();
    let (d, spec) = (cfg.hidden, &cfg.attention);
    let layer = features.spec().taps[cfg.taps - 1].min(target.layers - 1);
    let of = |role: LayerRole| -> Result<Vec<f32>> { Ok(source.tensor(Role::Layer(layer, role))?.to_f32()) };
    let (a, b, e) = fit(be, source, cfg, features, which)?;

    let (hd, group) = (spec.head_dim, spec.heads / spec.kv_heads);
    let own = (spec.kv_heads - 1).max(1);
    let (u, v) = low_rank(&a, &e, d, (own * hd).min(d), seed);
    // Rows of [embedding, features].
    let wide = |rows: usize| vec![0f32; rows * 2 * d];
    let (mut q, mut k, mut value) = (wide(spec.q_dim()), wide(spec.kv_dim()), wide(spec.kv_dim()));
    let mut o = of(LayerRole::O)?;
    let size = (OWN / (hd as f32 * spec.scale)).sqrt();
    for j in 0..own {
        let p = orthonormal(hd, d, &mut Rng::stream(seed, j as u64));
        for r in 0..hd {
            let row: Vec<f32> = p[r * d..][..d].iter().map(|x| size * *x as f32).collect();
            k[(j * hd + r) * 2 * d..][..d].copy_from_slice(&row);
            for h in j * group..(j + 1) * group {
                q[(h * hd + r) * 2 * d..][..d].copy_from_slice(&row);
            }
            let at = j * hd + r;
            let inside = at < v.len() / d;
            for c in 0..d {
                value[at * 2 * d + c] = if inside { v[at * d + c] as f32 } else { 0.0 };
                for h in j * group..(j + 1) * group {
                    let part = if inside { u[at * d + c] / group as f64 } else { 0.0 };
                    o[c * spec.q_dim() + h * hd + r] = part as f32;
                }
            }
        }
    }
    for (to, role, first) in
        [(&mut q, LayerRole::Q, own * group), (&mut k, LayerRole::K, own), (&mut value, LayerRole::V, own)]
    {
        let from = of(role)?;
        for (to, from) in to.chunks_mut(2 * d).zip(from.chunks(d)).skip(first * hd) {
            to[d..].copy_from_slice(from);
        }
    }
    // What a layer reads from a context that is not its own would only be noise here: the last key head begins without a say.
    for row in o.chunks_mut(spec.q_dim()) {
        row[own * group * hd..].fill(0.0);
    }

    let head = source.tensor(if target.tied { Role::Embed } else { Role::Head })?;
    let mut rows = vec![0.0; d2t.len() * d];
    rows.chunks_mut(d).zip(d2t).for_each(|(row, &t)| head.row_f32(t as usize, row));
    Ok([
        ("fc.weight", b),
        ("midlayer.input_layernorm.weight", vec![1.0; d]),
        ("midlayer.hidden_norm.weight", of(LayerRole::AttnNorm)?),
        ("midlayer.self_attn.q_proj.weight", q),
        ("midlayer.self_attn.k_proj.weight", k),
        ("midlayer.self_attn.v_proj.weight", value),
        ("midlayer.self_attn.o_proj.weight", o),
        ("midlayer.post_attention_layernorm.weight", of(LayerRole::MlpNorm)?),
        ("midlayer.mlp.gate_proj.weight", of(LayerRole::Gate)?),
        ("midlayer.mlp.up_proj.weight", of(LayerRole::Up)?),
        ("midlayer.mlp.down_proj.weight", of(LayerRole::Down)?),
        ("norm.weight", source.tensor(Role::FinalNorm)?.to_f32()),
        ("lm_head.weight", rows),
    ]
    .map(|(name, values)| (name.to_owned(), values))
    .into())
}

/// A `[d, d]`, B `[d, taps d]`, and the embeddings' second moments `[d, d]`. Rows weigh the inverse of their stream's mean square, which the
/// norms behind take out too.
fn fit<B: Train>(
    be: &B,
    source: &dyn TensorSource,
    cfg: &HeadConfig,
    features: &Features,
    which: &[usize],
) -> Result<(Vec<f64>, Vec<f32>, Vec<f64>)> {
    let (d, taps) = (cfg.hidden, cfg.taps);
    let n = (1 + taps) * d;
    let embed = source.tensor(Role::Embed)?;
    let most = which.iter().map(|&i| features.rows(i)).max().unwrap_or(0);
    let (mut xs, mut gram, mut cross) = (be.alloc::<B::Act>(most * n)?, be.alloc(n * n)?, be.alloc(d * n)?);
    let (mut ys, mut xs_acc) = (be.alloc(most * d)?, be.alloc(most * n)?);
    let mut rows = 0;
    for &i in which {
        let s = features.read(i)?;
        let all = features.rows(i);
        let (mut x, mut y) = (Vec::with_capacity(all * n), Vec::with_capacity(all * d));
        let tap = |j: usize, r: usize| s.features[(j * all + r) * d..][..d].iter().map(|f| f.to_f32());
        // The first position is an attention sink unlike all others.
        for r in 1..all.max(2) - 1 {
            let square: f32 = tap(taps - 1, r + 1).map(|f| f * f).sum::<f32>() / d as f32;
            let w = (square + cfg.eps).sqrt().recip();
            let mut e = vec![0.0; d];
            embed.row_f32(s.tokens[r + 1] as usize, &mut e);
            let inverse = (e.iter().map(|e| e * e).sum::<f32>() / d as f32 + cfg.eps).sqrt().recip();
            x.extend(e.iter().map(|e| e * inverse * w));
            (0..taps).for_each(|j| x.extend(tap(j, r).map(|f| f * w)));
            y.extend(tap(taps - 1, r + 1).map(|f| f * w));
        }
        let m = y.len() / d;
        let act: Vec<B::Act> = x.iter().map(|&x| B::Act::of(x)).collect();
        be.upload(xs.head_mut(m * n), &act)?;
        be.upload_acc(xs_acc.head_mut(m * n), &x)?;
        be.upload_acc(ys.head_mut(m * d), &y)?;
        if m > 0 {
            be.linear_bwd_w(gram.head_mut(n * n), xs_acc.head(m * n), xs.head(m * n), m)?;
            be.linear_bwd_w(cross.head_mut(d * n), ys.head(m * d), xs.head(m * n), m)?;
        }
        rows += m;
        if rows >= ROWS {
            break;
        }
    }
    ensure!(rows > 0, Usage, "no rows to fit the draft's first guess to");
    let (mut g, mut c) = (vec![0f32; n * n], vec![0f32; d * n]);
    be.download_acc(gram.head(n * n), &mut g)?;
    be.download_acc(cross.head(d * n), &mut c)?;
    let mut g: Vec<f64> = g.into_iter().map(f64::from).collect();
    let e = (0..d).flat_map(|r| g[r * n..][..d].to_vec()).collect();
    let mean = (0..n).map(|i| g[i * n + i]).sum::<f64>() / n as f64;
    (0..n).for_each(|i| g[i * n + i] += RIDGE * (g[i * n + i] + RIDGE * mean));
    cholesky(&mut g, n)?;
    let mut w: Vec<f64> = c.into_iter().map(f64::from).collect();
    w.chunks_mut(n).for_each(|row| solve(&g, row));
    let a = w.chunks(n).flat_map(|row| row[..d].to_vec()).collect();
    let b = w.chunks(n).flat_map(|row| row[d..].iter().map(|&x| x as f32)).collect();
    Ok((a, b, e))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        (0..8).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f64>() + rest
}

fn axpy(y: &mut [f64], a: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// The lower triangle of a symmetric `[n, n]` becomes its factor L.
fn cholesky(g: &mut [f64], n: usize) -> Result<()> {
    for i in 0..n {
        let (above, row) = g.split_at_mut(i * n);
        for j in 0..i {
            let l = &above[j * n..][..j + 1];
            row[j] = (row[j] - dot(&row[..j], &l[..j])) / l[j];
        }
        let pivot = row[i] - dot(&row[..i], &row[..i]);
        ensure!(pivot > 0.0 && pivot.is_finite(), Diverged, "the features do not determine a fit: a pivot is {pivot}");
        row[i] = pivot.sqrt();
    }
    Ok(())
}

/// x becomes the solution of L L^T y = x.
fn solve(l: &[f64], x: &mut [f64]) {
    let n = x.len();
    for i in 0..n {
        x[i] = (x[i] - dot(&l[i * n..][..i], &x[..i])) / l[i * n + i];
    }
    for i in (0..n).rev() {
        x[i] /= l[i * n + i];
        let (before, rest) = x.split_at_mut(i);
        axpy(before, -rest[0], &l[i * n..][..i]);
    }
}

/// `rows` orthonormal rows of width `d`.
fn orthonormal(rows: usize, d: usize, rng: &mut Rng) -> Vec<f64> {
    let mut p: Vec<f64> = (0..rows * d).map(|_| f64::from(rng.normal())).collect();
    orthonormalize(&mut p, d);
    p
}

/// Modified Gram-Schmidt, twice.
fn orthonormalize(p: &mut [f64], d: usize) {
    for i in 0..p.len() / d {
        let (before, row) = p.split_at_mut(i * d);
        let row = &mut row[..d];
        for _ in 0..2 {
            before.chunks(d).for_each(|b| axpy(row, -dot(b, row), b));
        }
        let norm = dot(row, row).sqrt().max(f64::MIN_POSITIVE);
        row.iter_mut().for_each(|x| *x /= norm);
    }
}

/// U `[rank, d]` and V `[rank, d]` such that sum_j U_j V_j^T is the best A of that rank on inputs of second moments E: the leading
/// eigenvectors of A E A^T, by orthogonal iteration. Each pair shares its size.
fn low_rank(a: &[f64], e: &[f64], d: usize, rank: usize, seed: u64) -> (Vec<f64>, Vec<f64>) {
    let through = |x: &[f64], m: &[f64], transposed: bool| -> Vec<f64> {
        x.chunks(d)
            .flat_map(|x| {
                let mut y = vec![0.0; d];
                if transposed {
                    x.iter().zip(m.chunks(d)).for_each(|(x, row)| axpy(&mut y, *x, row));
                } else {
                    y.iter_mut().zip(m.chunks(d)).for_each(|(y, row)| *y = dot(row, x));
                }
                y
            })
            .collect()
    };
    let mut u = orthonormal(rank, d, &mut Rng::stream(seed, u64::MAX));
    let mut back = Vec::new();
    for _ in 0..ROUNDS {
        u = through(&through(&through(&u, a, true), e, false), a, false);
        orthonormalize(&mut u, d);
        back = through(&u, a, true);
    }
    for (u, v) in u.chunks_mut(d).zip(back.chunks_mut(d)) {
        let size = (dot(v, v) / dot(u, u).max(f64::MIN_POSITIVE)).sqrt().sqrt().max(1e-12);
        u.iter_mut().for_each(|u| *u *= size);
        v.iter_mut().for_each(|v| *v /= size);
    }
    (u, back)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symmetric_system_is_solved() {
        let n = 11;
        let mut rng = Rng::new(1);
        let r: Vec<f64> = (0..n * n).map(|_| f64::from(rng.normal())).collect();
        let g: Vec<f64> = (0..n * n).map(|at| dot(&r[at / n * n..][..n], &r[at % n * n..][..n])).collect();
        let want: Vec<f64> = (0..n).map(|i| i as f64 - 3.5).collect();
        let mut x: Vec<f64> = g.chunks(n).map(|row| dot(row, &want)).collect();
        let mut l = g;
        cholesky(&mut l, n).unwrap();
        solve(&l, &mut x);
        assert!(x.iter().zip(&want).all(|(x, w)| (x - w).abs() < 1e-7), "{x:?}");
        assert!(cholesky(&mut [1.0, 0.0, 2.0, 1.0], 2).unwrap_err().to_string().contains("pivot"));
    }

    #[test]
    fn a_matrix_of_low_rank_is_found() {
        let (d, rank) = (20, 4);
        let mut rng = Rng::new(2);
        let mut normals = |n: usize| -> Vec<f64> { (0..n).map(|_| f64::from(rng.normal())).collect() };
        let (left, right, half) = (normals(d * rank), normals(d * rank), normals(d * d));
        let at = |i: usize, j: usize| (0..rank).map(|k| left[i * rank + k] * right[j * rank + k]).sum::<f64>();
        let a: Vec<f64> = (0..d * d).map(|x| at(x / d, x % d)).collect();
        let e: Vec<f64> = (0..d * d).map(|x| dot(&half[x / d * d..][..d], &half[x % d * d..][..d])).collect();
        let (u, v) = low_rank(&a, &e, d, rank, 0);
        for (x, want) in a.iter().enumerate() {
            let got: f64 = (0..rank).map(|k| u[k * d + x / d] * v[k * d + x % d]).sum();
            assert!((got - want).abs() < 1e-9, "{got} for {want}");
        }
        let p = orthonormal(5, d, &mut Rng::new(3));
        for (i, j) in (0..5).flat_map(|i| (0..5).map(move |j| (i, j))) {
            assert!((dot(&p[i * d..][..d], &p[j * d..][..d]) - f64::from(u8::from(i == j))).abs() < 1e-12);
        }
    }
}
