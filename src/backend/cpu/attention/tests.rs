use super::*;
use crate::backend::TreeMask;
use crate::backend::cpu::Compute;
use crate::rng::Rng;
use half::f16;

fn normals(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.normal()).collect()
}

/// A sequence whose cache was full of NaN before its rows came.
struct Sequence {
    kv: CpuKv,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Sequence {
    fn new(pool: &Pool, rng: &mut Rng, rows: usize, spec: &AttnSpec, compute: Compute) -> Self {
        let d = spec.kv_dim();
        let (k, v) = (normals(rng, rows * d), normals(rng, rows * d));
        let mut kv = CpuKv::alloc(2, rows + rng.below(20), d, compute).unwrap();
        kv.fill(f32::NAN);
        kv.stage(pool, Tier::detect(), 1, 0, &k, &v).unwrap();
        let round = |x: &mut f32| *x = if compute == Compute::Fast { f16::from_f32(*x).to_f32() } else { *x };
        let mut s = Self { kv, k, v };
        s.k.iter_mut().chain(&mut s.v).for_each(round);
        s
    }

    fn seg<'a>(&'a self, past: usize, rows: usize, mask: Mask<'a>) -> SegView<'a> {
        SegView { kv: &self.kv, past, staged: 0, rows, mask }
    }
}

/// The definition, in f64.
fn reference(q: &[f32], seq: &Sequence, seg: &SegView<'_>, spec: &AttnSpec) -> Vec<f64> {
    let (d, kd) = (spec.head_dim, spec.kv_dim());
    let mut y = vec![0.0; q.len()];
    for r in 0..seg.rows {
        let p = seg.mask.position(seg.past, r);
        let above = |position: usize| spec.window.is_none_or(|w| position + w > p);
        let seen: Vec<usize> = (0..seg.past)
            .filter(|&j| above(j))
            .chain(
                (0..seg.rows)
                    .filter(|&j| seg.mask.sees(r, j) && above(seg.mask.position(seg.past, j)))
                    .map(|j| seg.past + j),
            )
            .collect();
        for h in 0..spec.heads {
            let (at, col) = ((r * spec.heads + h) * d, h * spec.kv_heads / spec.heads * d);
            let dot = |j: usize| (0..d).map(|c| q[at + c] as f64 * seq.k[j * kd + col + c] as f64).sum::<f64>();
            let scores: Vec<f64> = seen.iter().map(|&j| dot(j) * spec.scale as f64).collect();
            let max = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for (&j, s) in seen.iter().zip(&scores) {
                let w = (s - max).exp() / sum;
                (0..d).for_each(|c| y[at + c] += w * seq.v[j * kd + col + c] as f64);
            }
        }
    }
    y
}

fn random_tree(rng: &mut Rng, n: usize) -> Vec<u32> {
    let bushy = 1 + rng.below(8);
    let parent = |rng: &mut Rng, i: usize| match rng.below(8) {
        0 => TreeMask::ROOT,
        b if b <= bushy => rng.below(i) as u32,
        _ => i as u32 - 1,
    };
    (0..n).map(|i| if i == 0 { TreeMask::ROOT } else { parent(rng, i) }).collect()
}

fn spec(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttnSpec {
    AttnSpec { heads, kv_heads, head_dim, scale: (head_dim as f32).powf(-0.5), window }
}

fn run(pool: &Pool, tier: Tier, q: &[f32], segs: &[SegView<'_>], spec: &AttnSpec) -> Vec<f32> {
    let mut y = vec![f32::NAN; q.len()];
    attention(pool, tier, &mut y, q, segs, 1, spec).unwrap();
    y
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_mask_agrees_with_the_definition() {
    let pools = [Pool::new(1), Pool::new(2)];
    let mut rng = Rng::new(11);
    let shapes =
        [(9, 3, 64), (8, 8, 6), (4, 1, 128), (6, 2, 96), (7, 1, 80), (2, 2, 256), (16, 1, 64), (3, 3, 2), (5, 5, 18)];
    for round in 0..shapes.len() * 12 {
        let (heads, kv_heads, dim) = shapes[round % shapes.len()];
        let window = (rng.below(2) == 1).then(|| 1 + rng.below(300));
        let (spec, compute) = (spec(heads, kv_heads, dim, window), [Compute::Exact, Compute::Fast][round % 2]);
        let mut trees = Vec::new();
        let block = 1 + rng.below(40);
        let blocks = Mask::Blocks { block, offset: rng.below(block) };
        let seqs: Vec<_> = (0..1 + rng.below(3))
            .map(|_| {
                let past = [0, rng.below(40), rng.below(400)][rng.below(3)];
                let rows = [1, 1 + rng.below(8), 1 + rng.below(90)][rng.below(3)];
                trees.push(TreeMask::new(&random_tree(&mut rng, rows)).unwrap());
                (past, rows, rng.below(4), Sequence::new(&pools[0], &mut rng, past + rows, &spec, compute))
            })
            .collect();
        let segs: Vec<_> = (seqs.iter().zip(&trees))
            .map(|((past, rows, mask, s), t)| {
                s.seg(*past, *rows, [Mask::Causal, Mask::Full, Mask::Tree(t), blocks][*mask])
            })
            .collect();
        let q = normals(&mut rng, segs.iter().map(|s| s.rows).sum::<usize>() * spec.q_dim());
        for tier in Tier::available() {
            let y = run(&pools[round % 2], tier, &q, &segs, &spec);
            let mut at = 0;
            for (seg, (_, _, _, seq)) in segs.iter().zip(&seqs) {
                let n = seg.rows * spec.q_dim();
                let want = reference(&q[at..at + n], seq, seg, &spec);
                for (i, (&got, want)) in y[at..at + n].iter().zip(want).enumerate() {
                    let ok = (got as f64 - want).abs() < 3e-6;
                    assert!(ok, "{tier} {spec:?} {:?} past {} at {i}: {got} not {want}", seg.mask, seg.past);
                }
                at += n;
            }
        }
    }
}

/// Rows alone, all at once, in any split, on one thread and on two: the same bits.
#[test]
fn a_row_does_not_know_how_many_there_are() {
    let pools = [Pool::new(1), Pool::new(2), Pool::new(5)];
    let mut rng = Rng::new(12);
    for (heads, kv_heads, dim) in [(9, 3, 64), (4, 4, 96), (8, 1, 32), (2, 1, 14)] {
        for window in [None, Some(37), Some(200)] {
            let (spec, compute) = (spec(heads, kv_heads, dim, window), [Compute::Exact, Compute::Fast][rng.below(2)]);
            let total = 330;
            let seq = Sequence::new(&pools[0], &mut rng, total, &spec, compute);
            let q = normals(&mut rng, total * spec.q_dim());
            for tier in Tier::available() {
                let all = run(&pools[1], tier, &q, &[seq.seg(0, total, Mask::Causal)], &spec);
                let mut past = 0;
                while past < total {
                    let most = [1, 8, 64][rng.below(3)];
                    let rows = (1 + rng.below(most)).min(total - past);
                    let r = past * spec.q_dim()..(past + rows) * spec.q_dim();
                    let pool = &pools[rng.below(3)];
                    let y = run(pool, tier, &q[r.clone()], &[seq.seg(past, rows, Mask::Causal)], &spec);
                    assert_eq!(bits(&y), bits(&all[r]), "{tier} {spec:?}: rows {past}..{}", past + rows);
                    past += rows;
                }
            }
        }
    }
}

/// The result of a row of a tree is that of its path decoded one by one; and after the path is committed, the next row's
/// is that of a sequence that never saw a tree.
#[test]
fn a_tree_decodes_to_the_bits_of_its_paths() {
    let pools = [Pool::new(1), Pool::new(2)];
    let mut rng = Rng::new(13);
    for round in 0..60 {
        let (heads, kv_heads, dim) = [(9, 3, 64), (4, 4, 96), (8, 1, 32), (3, 1, 10)][round % 4];
        let window = (rng.below(2) == 1).then(|| 1 + rng.below(150));
        let (spec, compute) = (spec(heads, kv_heads, dim, window), [Compute::Exact, Compute::Fast][round / 4 % 2]);
        // Near the ends of chunks and blocks, where things may go wrong.
        let past =
            [rng.below(40), CHUNK - 1 - rng.below(12), 2 * CHUNK - 1 - rng.below(30), rng.below(300)][rng.below(4)];
        let most = [8, 70, 140][rng.below(3)];
        let n = 1 + rng.below(most);
        let (tree, kd, qd) = (TreeMask::new(&random_tree(&mut rng, n)).unwrap(), spec.kv_dim(), spec.q_dim());
        let tier = Tier::available().nth(rng.below(Tier::available().count())).unwrap();
        let mut seq = Sequence::new(&pools[0], &mut rng, past + n, &spec, compute);
        let q = normals(&mut rng, n * qd);
        let y = run(&pools[rng.below(2)], tier, &q, &[seq.seg(past, n, Mask::Tree(&tree))], &spec);
        for _ in 0..6 {
            let leaf = rng.below(n);
            let path: Vec<usize> = (0..=leaf).filter(|&j| tree.sees(leaf, j)).collect();
            let mut line = CpuKv::alloc(2, past + path.len() + 3, kd, compute).unwrap();
            line.fill(f32::NAN);
            line.stage(&pools[0], tier, 1, 0, &seq.k[..past * kd], &seq.v[..past * kd]).unwrap();
            for (i, &row) in path.iter().enumerate() {
                let r = (past + row) * kd..(past + row + 1) * kd;
                line.stage(&pools[0], tier, 1, past + i, &seq.k[r.clone()], &seq.v[r]).unwrap();
                let seg = SegView { kv: &line, past: past + i, staged: 0, rows: 1, mask: Mask::Causal };
                let one = run(&pools[rng.below(2)], tier, &q[row * qd..(row + 1) * qd], &[seg], &spec);
                assert_eq!(
                    bits(&one),
                    bits(&y[row * qd..(row + 1) * qd]),
                    "{tier} {spec:?}, past {past}, row {row} of {tree:?}"
                );
            }
        }
        let leaf = rng.below(n);
        let path: Vec<u32> = (0..=leaf).filter(|&j| tree.sees(leaf, j)).map(|j| j as u32).collect();
        let committed: Vec<f32> = path.iter().flat_map(|&r| seq.k[(past + r as usize) * kd..][..kd].to_vec()).collect();
        let values: Vec<f32> = path.iter().flat_map(|&r| seq.v[(past + r as usize) * kd..][..kd].to_vec()).collect();
        let mut line = CpuKv::alloc(2, past + path.len(), kd, compute).unwrap();
        line.stage(&pools[0], tier, 1, 0, &seq.k[..past * kd], &seq.v[..past * kd]).unwrap();
        line.stage(&pools[0], tier, 1, past, &committed, &values).unwrap();
        seq.kv.commit(past, &path).unwrap();
        let (q, at) = (&q[..qd], past + path.len() - 1);
        let after = |kv: &CpuKv| {
            run(&pools[1], tier, q, &[SegView { kv, past: at, staged: 0, rows: 1, mask: Mask::Causal }], &spec)
        };
        assert_eq!(bits(&after(&seq.kv)), bits(&after(&line)));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (pool, mut rng) = (Pool::new(1), Rng::new(1));
    let good = spec(4, 2, 8, None);
    let seq = Sequence::new(&pool, &mut rng, 8, &good, Compute::Fast);
    let tree = TreeMask::new(&[TreeMask::ROOT; 3]).unwrap();
    let q = vec![0.0; 8 * 32];
    let call = |n: usize, seg, layer, spec: &AttnSpec| {
        attention(&pool, Tier::Portable, &mut vec![0.0; n], &q[..n], &[seg], layer, spec).map_err(|e| e.kind())
    };
    use crate::error::ErrorKind::*;
    assert_eq!(call(2 * 32, seq.seg(6, 2, Mask::Causal), 1, &good), Ok(()));
    assert_eq!(call(3 * 32, seq.seg(6, 2, Mask::Causal), 1, &good), Err(Shape));
    assert_eq!(call(2 * 32, seq.seg(60, 2, Mask::Causal), 1, &good), Err(Capacity));
    assert_eq!(call(2 * 32, seq.seg(6, 2, Mask::Causal), 2, &good), Err(Shape));
    assert_eq!(call(2 * 32, seq.seg(6, 2, Mask::Tree(&tree)), 1, &good), Err(Shape));
    assert_eq!(call(2 * 32, seq.seg(6, 2, Mask::Blocks { block: 3, offset: 2 }), 1, &good), Ok(()));
    assert_eq!(call(2 * 32, seq.seg(6, 2, Mask::Blocks { block: 3, offset: 3 }), 1, &good), Err(Shape));
    assert_eq!(call(2 * 32, seq.seg(6, 2, Mask::Causal), 1, &spec(4, 2, 8, Some(0))), Err(Shape));
    assert_eq!(call(2 * 32, seq.seg(6, 2, Mask::Causal), 1, &spec(4, 1, 8, None)), Err(Shape));
    assert_eq!(call(2 * 30, seq.seg(6, 2, Mask::Causal), 1, &spec(5, 2, 6, None)), Err(Shape));
    assert_eq!(call(0, seq.seg(6, 0, Mask::Causal), 1, &good), Ok(()));
}
