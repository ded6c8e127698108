//! Low-rank adapters of a decoding pass: few rows, of many adapters at once.
//!
//! Every element is one product of two vectors in f32, in an order that depends on their length alone, so that neither the rows beside
//! a row, nor how they are grouped, nor threads can change it. Packing, as [`super::gemm`] does it, would cost more than the product.

use super::lanes::{Kernel, Simd, dispatch};
use super::pool::Pool;
use super::rows::{check_equal, check_rows};
use super::{Cpu, Tier};
use crate::backend::{Group, Ranks};
use crate::error::{Result, ensure};

/// Products below which a job stays on the calling thread; a task gets at least a quarter of them.
const SMALL: usize = 32 * 1024;

/// y\[r, o\] = or += scale m\[o\] . x\[r, part\], `m` of the row's group.
#[derive(Clone, Copy)]
struct Job<'a, 'g> {
    x: &'a [f32],
    part: Ranks,
    /// Columns of y.
    width: usize,
    groups: &'a [Group<'g, Cpu>],
    add: bool,
}

/// h = A x.
pub(super) fn shrink(
    pool: &Pool,
    tier: Tier,
    h: &mut [f32],
    x: &[f32],
    ranks: usize,
    groups: &[Group<'_, Cpu>],
) -> Result<()> {
    check_rows("shrink_rows", h.len(), ranks)?;
    let rows = h.len() / ranks;
    let part = Ranks::all(x.len() / rows.max(1));
    run(pool, tier, h, rows, Job { x, part, width: ranks, groups, add: false })
}

/// y += scale B h\[part\].
pub(super) fn expand(
    pool: &Pool,
    tier: Tier,
    y: &mut [f32],
    h: &[f32],
    part: Ranks,
    groups: &[Group<'_, Cpu>],
) -> Result<()> {
    check_rows("expand_rows", h.len(), part.stride)?;
    ensure!(part.first + part.n <= part.stride, Shape, "expand_rows: {part:?}");
    let rows = h.len() / part.stride;
    run(pool, tier, y, rows, Job { x: h, part, width: y.len() / rows.max(1), groups, add: true })
}

fn run(pool: &Pool, tier: Tier, y: &mut [f32], rows: usize, job: Job<'_, '_>) -> Result<()> {
    let Job { part, width, groups, .. } = job;
    check_equal("adapters: rows of all groups", groups.iter().map(|g| g.rows).sum(), rows)?;
    check_equal("adapters: outputs", y.len(), rows * width)?;
    check_equal("adapters: inputs", job.x.len(), rows * part.stride)?;
    for g in groups.iter().filter(|g| g.rows > 0) {
        check_equal("adapters: a matrix", g.matrix.len(), width * part.n)?;
    }
    if rows == 0 {
        return Ok(());
    }
    ensure!(part.n > 0, Shape, "adapters: matrices without columns");
    let total = y.len();
    let chunk = match pool.threads() {
        1 => total,
        _ if total * part.n < SMALL => total,
        threads => total.div_ceil(4 * threads).max(SMALL / 4 / part.n),
    };
    pool.run_chunks(y, chunk, |i, y| dispatch(tier, Piece { job, first: i * chunk, y }));
    Ok(())
}

/// Elements of y from number `first` on.
struct Piece<'a, 'g, 'y> {
    job: Job<'a, 'g>,
    first: usize,
    y: &'y mut [f32],
}

impl Kernel for Piece<'_, '_, '_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Job { x, part, width, groups, add } = self.job;
        let (mut row, mut col) = (self.first / width, self.first % width);
        let (mut groups, mut end) = (groups.iter(), 0);
        let (mut matrix, mut scale) = (&[][..], 0.0);
        let mut y = self.y;
        while !y.is_empty() {
            while end <= row {
                // The groups cover all rows.
                let Some(g) = groups.next() else { return };
                (end, matrix, scale) = (end + g.rows, g.matrix, g.scale);
            }
            let (now, rest) = y.split_at_mut(y.len().min(width - col));
            let v = &x[row * part.stride + part.first..][..part.n];
            for (y, m) in now.iter_mut().zip(matrix[col * part.n..].chunks_exact(part.n)) {
                let sum = dot(s, m, v);
                *y = if add { *y + scale * sum } else { sum };
            }
            (y, row, col) = (rest, row + 1, 0);
        }
    }
}

/// a . b: four sums of lanes, so that the additions overlap, then what is left one by one.
#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let n = a.len();
    let (quads, vectors) = (n / (4 * S::N) * 4 * S::N, n / S::N * S::N);
    let mut sum = 0.0;
    if vectors > 0 {
        let mut acc = [s.splat(0.0); 4];
        for i in (0..quads).step_by(4 * S::N) {
            for (j, acc) in acc.iter_mut().enumerate() {
                let at = i + j * S::N;
                *acc = s.fma(s.load(&a[at..at + S::N]), s.load(&b[at..at + S::N]), *acc);
            }
        }
        for at in (quads..vectors).step_by(S::N) {
            acc[0] = s.fma(s.load(&a[at..at + S::N]), s.load(&b[at..at + S::N]), acc[0]);
        }
        sum = s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])));
    }
    a[vectors..].iter().zip(&b[vectors..]).fold(sum, |sum, (a, b)| sum + a * b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn normals(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..n).map(|_| rng.normal()).collect()
    }

    /// All lengths that there are: whole vectors, what is left of them, and both. The groups without rows have no matrix.
    #[test]
    fn every_rank_is_the_sum_of_its_products() {
        const SIZES: [usize; 6] = [0, 2, 0, 0, 3, 0];
        let (rows, out, pools) = (5, 67, [1, 3].map(Pool::new));
        for n in 1..=256 {
            let part = Ranks { stride: n + 5, first: 3, n };
            let (h, b, y0) = (normals(rows * part.stride, 1), normals(2 * out * n, 2), normals(rows * out, 3));
            let (first, second) = b.split_at(out * n);
            let matrix = |i: usize| [&[][..], first, &[], &[], second, &[]][i];
            let group = |i: usize| Group { rows: SIZES[i], matrix: matrix(i), scale: i as f32 / 2.0 };
            let groups: Vec<Group<'_, Cpu>> = (0..SIZES.len()).map(group).collect();
            for tier in Tier::available() {
                let [alone, shared] = [0, 1].map(|i| {
                    let mut y = y0.clone();
                    expand(&pools[i], tier, &mut y, &h, part, &groups).unwrap();
                    y
                });
                assert_eq!(alone, shared, "{tier}, rank {n}");
                for (i, (got, y)) in alone.iter().zip(&y0).enumerate() {
                    let (r, o) = (i / out, i % out);
                    let (b, scale) = if r < 2 { (first, 0.5) } else { (second, 2.0) };
                    let products = (0..n).map(|j| f64::from(b[o * n + j]) * f64::from(h[r * part.stride + 3 + j]));
                    let want = f64::from(*y) + scale * products.sum::<f64>();
                    let bound = 1e-6 * (1.0 + n as f64);
                    assert!((f64::from(*got) - want).abs() < bound, "{tier}, rank {n}: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (m, pool, tier) = (normals(12, 4), &Pool::new(1), Tier::detect());
        let group = |rows, n: usize| Group::<Cpu> { rows, matrix: &m[..n], scale: 1.0 };
        let shrunk = |h: usize, x: usize, ranks, groups: &[Group<'_, Cpu>]| {
            shrink(pool, tier, &mut vec![0.0; h], &vec![0.0; x], ranks, groups)
        };
        shrunk(6, 8, 3, &[group(2, 12)]).unwrap();
        shrunk(0, 0, 3, &[]).unwrap();
        shrunk(0, 0, 3, &[group(0, 7)]).unwrap();
        for (h, x, ranks, groups) in [
            (6, 8, 3, &[group(1, 12)][..]),
            (6, 8, 3, &[group(2, 11)]),
            (6, 9, 3, &[group(2, 12)]),
            (7, 8, 3, &[group(2, 12)]),
            (6, 8, 0, &[group(2, 12)]),
            (6, 0, 3, &[group(2, 0)]),
            (6, 8, 3, &[]),
        ] {
            assert!(shrunk(h, x, ranks, groups).is_err(), "{h} {x} {ranks}");
        }
        let expanded = |part| expand(pool, tier, &mut [0.0; 8], &[0.0; 6], part, &[group(2, 4 * part.n)]);
        expanded(Ranks { stride: 3, first: 1, n: 2 }).unwrap();
        for (first, n) in [(2, 2), (1, 0)] {
            assert!(expanded(Ranks { stride: 3, first, n }).is_err(), "{n} from {first}");
        }
    }
}
