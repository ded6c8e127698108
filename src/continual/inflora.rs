//! InfLoRA's spaces (Liang & Li 2024, arXiv:2404.00228): where a task's inputs lie, outside those of older tasks.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::error::{Result, ensure};

/// P C P with P = I - U^T U, and its eigenvectors with their eigenvalues, largest first.
fn outside(c: &[f64], basis: &[f32], d: usize) -> Result<Vec<(f64, Vec<f64>)>> {
    ensure!(c.len() == d * d && basis.len().is_multiple_of(d.max(1)), Shape, "{} products for inputs of {d}", c.len());
    let c = DMatrix::from_row_slice(d, d, c);
    let u = DMatrix::from_row_iterator(basis.len() / d, d, basis.iter().map(|x| f64::from(*x)));
    let p = DMatrix::identity(d, d) - u.transpose() * u;
    let eigen = SymmetricEigen::new(&p * c * &p);
    let mut pairs: Vec<(f64, Vec<f64>)> = (0..d)
        .map(|i| (eigen.eigenvalues[i].max(0.0), eigen.eigenvectors.column(i).iter().copied().collect()))
        .collect();
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    // A vector and its opposite are the same direction: the largest entry is positive.
    for (_, v) in &mut pairs {
        let top = v.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(1.0);
        if top < 0.0 {
            v.iter_mut().for_each(|x| *x = -*x);
        }
    }
    Ok(pairs)
}

/// sum over rows of x x^T, `[d, d]`.
pub fn products(rows: &[f32], d: usize) -> Vec<f64> {
    let mut c = vec![0.0; d * d];
    add_products(&mut c, rows, d);
    c
}

/// [`products`], added to `c`.
pub fn add_products(c: &mut [f64], rows: &[f32], d: usize) {
    for row in rows.chunks_exact(d) {
        for (c, x) in c.chunks_exact_mut(d).zip(row) {
            let x = f64::from(*x);
            c.iter_mut().zip(row).for_each(|(c, y)| *c += x * f64::from(*y));
        }
    }
}

/// `rank` rows that span most of what inputs with the products `c` (`[d, d]`, sum of x x^T) have outside `basis`, as long as rows
/// of a fresh A are in the mean.
///
/// # Errors
/// Shapes that do not fit.
pub fn design(c: &[f64], basis: &[f32], d: usize, rank: usize) -> Result<Vec<f32>> {
    let pairs = outside(c, basis, d)?;
    ensure!(rank <= d, Shape, "rank {rank} of inputs of {d}");
    let length = 3f64.powf(-0.5);
    // Where the inputs have nothing left outside the basis, any direction could be one of the basis: those rows are 0.
    let least = 1e-9 * pairs.first().map_or(0.0, |p| p.0);
    let row = |(value, v): &(f64, Vec<f64>)| {
        let factor = if *value > least { length } else { 0.0 };
        v.iter().map(|x| (factor * x) as f32).collect::<Vec<_>>()
    };
    Ok(pairs[..rank].iter().flat_map(row).collect())
}

/// Extends an orthonormal basis (rows of `d`) until it holds the share `energy` of the products' trace.
///
/// # Errors
/// Shapes that do not fit.
pub fn extend(basis: &mut Vec<f32>, c: &[f64], d: usize, energy: f64) -> Result<()> {
    let pairs = outside(c, basis, d)?;
    let total: f64 = (0..d).map(|i| c[i * d + i]).sum();
    let left: f64 = pairs.iter().map(|p| p.0).sum();
    let mut held = total - left;
    for (value, v) in pairs {
        if held >= energy * total || basis.len() >= d * d {
            break;
        }
        held += value;
        basis.extend(v.iter().map(|x| *x as f32));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn of(rows: &[Vec<f32>]) -> Vec<f64> {
        products(&rows.concat(), rows[0].len())
    }

    #[test]
    fn designed_rows_span_the_new_inputs_and_leave_the_old_alone() {
        let mut rng = Rng::new(1);
        let d = 12;
        let mut inside = |from: usize, to: usize| -> Vec<f32> {
            (0..d).map(|i| if (from..to).contains(&i) { rng.normal() } else { 0.0 }).collect()
        };
        let old: Vec<_> = (0..40).map(|_| inside(0, 4)).collect();
        let new: Vec<_> = (0..40).map(|_| inside(2, 7)).collect();
        let mut basis = Vec::new();
        extend(&mut basis, &of(&old), d, 0.9999).unwrap();
        assert_eq!(basis.len(), 4 * d);
        let rows = design(&of(&new), &basis, d, 3).unwrap();
        for row in rows.chunks(d) {
            let norm: f32 = row.iter().map(|x| x * x).sum();
            assert!((norm - 1.0 / 3.0).abs() < 1e-5);
            // Outside the old inputs, inside the new ones.
            assert!(row.iter().enumerate().all(|(i, x)| (4..7).contains(&i) || x.abs() < 1e-5), "{row:?}");
        }
        let more = design(&of(&new), &basis, d, 5).unwrap();
        assert!(more[3 * d..].iter().all(|x| *x == 0.0) && more[..3 * d] == rows[..]);
        extend(&mut basis, &of(&new), d, 0.9999).unwrap();
        assert_eq!(basis.len(), 7 * d);
        let again = basis.clone();
        extend(&mut basis, &of(&new), d, 0.9999).unwrap();
        assert_eq!(basis, again);
        assert!(design(&[0.0; 3], &[], 2, 1).is_err());
    }
}
