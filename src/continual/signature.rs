//! Signatures: a vector for each adapted module that tells what a task asks of it, and distances between them.

use std::ops::Range;

use super::layout::Layout;

/// One vector for each module, in the order of the layout.
pub type Signature = Vec<Vec<f32>>;

/// What of the flat vector a signature looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A, as the released code has it.
    A,
    /// B: at an adapter whose B is 0, A has no gradient.
    B,
    /// Both.
    Both,
}

/// The parts of a flat vector, module by module.
pub fn split(layout: &Layout, flat: &[f32], part: Part) -> Signature {
    let of = |m: &super::Module| match part {
        Part::A => flat[m.a.clone()].to_vec(),
        Part::B => flat[m.b.clone()].to_vec(),
        Part::Both => [&flat[m.a.clone()], &flat[m.b.clone()]].concat(),
    };
    layout.modules.iter().map(of).collect()
}

/// Divides each module's vector by its L1 norm; one of zeros stays.
pub fn normalize(signature: &mut Signature) {
    for v in signature {
        let norm: f64 = v.iter().map(|x| f64::from(x.abs())).sum();
        if norm > 0.0 {
            v.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        }
    }
}

/// sum |a - b|.
pub fn l1(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).sum()
}

/// sum a b.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Mean over modules of half the L1 distance: in \[0, 1\] between signatures that are normalized, 1 where no module's gradients
/// share a coordinate.
pub fn distance(a: &Signature, b: &Signature, modules: Range<usize>) -> f64 {
    let n = modules.len().max(1) as f64;
    a[modules.clone()].iter().zip(&b[modules]).map(|(a, b)| 0.5 * l1(a, b)).sum::<f64>() / n
}

#[cfg(test)]
mod tests {
    use super::super::Module;
    use super::*;

    #[test]
    fn distances_lie_between_0_and_1() {
        let mut a = vec![vec![1.0, -3.0, 0.0], vec![2.0]];
        let mut b = vec![vec![0.0, 0.0, 5.0], vec![2.0]];
        normalize(&mut a);
        normalize(&mut b);
        assert_eq!(a[0], [0.25, -0.75, 0.0]);
        assert_eq!(distance(&a, &b, 0..1), 1.0);
        assert_eq!(distance(&a, &b, 0..2), 0.5);
        assert_eq!(distance(&a, &a, 0..2), 0.0);
        let opposite: Signature = a.iter().map(|v| v.iter().map(|x| -x).collect()).collect();
        assert_eq!(distance(&a, &opposite, 0..2), 1.0);
        let mut zero = vec![vec![0.0]];
        normalize(&mut zero);
        assert_eq!(zero[0], [0.0]);
    }

    #[test]
    fn parts_lie_where_the_layout_says() {
        let m = Module { name: "x".into(), layer: 0, rank: 1, input: 2, output: 3, a: 1..3, b: 3..6 };
        let layout = Layout { modules: vec![m], len: 6 };
        layout.check().unwrap();
        let flat = [9.0, 1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(split(&layout, &flat, Part::A), [[1.0, 2.0]]);
        assert_eq!(split(&layout, &flat, Part::B), [[3.0, 4.0, 5.0]]);
        assert_eq!(split(&layout, &flat, Part::Both), [[1.0, 2.0, 3.0, 4.0, 5.0]]);
        assert_eq!(Layout { len: 5, ..layout }.check().unwrap_err().kind(), crate::error::ErrorKind::Shape);
    }
}
