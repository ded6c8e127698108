//! Sparse differences of adapters: what a proximal step leaves different from its reference, and nothing else (level S3 of the
//! sparse updates).

use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// The places in which a vector differs from a reference, and its values there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// Length of both vectors.
    pub len: usize,
    /// Where they differ, ascending.
    pub places: Vec<u32>,
    /// The vector there.
    pub values: Vec<f32>,
}

impl Delta {
    /// Of `vector` from `reference`; the places are those in which the bits differ.
    ///
    /// # Errors
    /// Vectors of different lengths, or with more values than places can be numbered.
    pub fn of(vector: &[f32], reference: &[f32]) -> Result<Self> {
        let len = vector.len();
        ensure!(len == reference.len(), Shape, "{len} values, {} in the reference", reference.len());
        ensure!(u32::try_from(len).is_ok(), Capacity, "{len} values are too many for a sparse difference");
        let differs = |(i, (x, r)): (usize, (&f32, &f32))| (x.to_bits() != r.to_bits()).then_some((i as u32, *x));
        let (places, values) = vector.iter().zip(reference).enumerate().filter_map(differs).unzip();
        Ok(Self { len, places, values })
    }

    /// The vector, bit for bit.
    ///
    /// # Errors
    /// A reference of another length, a place outside it.
    pub fn apply(&self, reference: &[f32]) -> Result<Vec<f32>> {
        ensure!(self.len == reference.len(), Shape, "a difference of {} values, not {}", self.len, reference.len());
        ensure!(
            self.places.len() == self.values.len(),
            Shape,
            "{} places, {} values",
            self.places.len(),
            self.values.len()
        );
        let mut out = reference.to_vec();
        for (&i, &x) in self.places.iter().zip(&self.values) {
            ensure!((i as usize) < out.len(), Shape, "place {i} of {}", out.len());
            out[i as usize] = x;
        }
        Ok(out)
    }

    /// Share of values that are the reference's.
    pub fn sparsity(&self) -> f64 {
        if self.len == 0 { 1.0 } else { 1.0 - self.places.len() as f64 / self.len as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_gives_the_vector_back() {
        let (r, x) = ([1.0, 2.0, 0.0, -3.0], [1.0, 2.5, -0.0, -3.0]);
        let d = Delta::of(&x, &r).unwrap();
        assert_eq!((d.places.clone(), d.sparsity()), (vec![1, 2], 0.5));
        let back = d.apply(&r).unwrap();
        assert!(back.iter().zip(&x).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert!(d.apply(&r[..3]).is_err() && Delta::of(&x, &r[..3]).is_err());
        assert!(Delta { places: vec![9, 1], ..d }.apply(&r).is_err());
    }
}
