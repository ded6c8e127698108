//! Positions for images of another size than they were trained on.

/// Weights of the four neighbours of a place `t` behind the second: the cubic of Keys 1981 with a = -3/4.
fn cubic(t: f64) -> [f64; 4] {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]
}

/// For each of `to` places its neighbours among `from`, whose centres are at half places, and their weights; what lies beyond an edge is
/// the edge.
fn taps(from: usize, to: usize) -> Vec<[(usize, f64); 4]> {
    let each = |i: usize| {
        let at = (i as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let first = at.floor();
        let weights = cubic(at - first);
        let tap = |k: usize| {
            let place = first as isize + k as isize - 1;
            (place.clamp(0, from as isize - 1) as usize, weights[k])
        };
        [tap(0), tap(1), tap(2), tap(3)]
    };
    (0..to).map(each).collect()
}

/// Rows of positions `[prefix + from, hidden]` on a grid `from` (rows, columns), for the grid `to`: bicubic, with the kernel a = -3/4 and
/// without antialiasing, as Hugging Face's ViT and DINOv2 do it. The prefix, a class token's row, stays. Where the grids are equal so
/// are the positions.
pub fn interpolate(positions: &[f32], prefix: usize, from: [usize; 2], to: [usize; 2]) -> Vec<f32> {
    if from == to {
        return positions.to_vec();
    }
    let hidden = positions.len() / (prefix + from[0] * from[1]);
    let (head, grid) = positions.split_at(prefix * hidden);
    let mut out = head.to_vec();
    let (rows, cols) = (taps(from[0], to[0]), taps(from[1], to[1]));
    let mut sum = vec![0.0f64; hidden];
    for row in &rows {
        for col in &cols {
            sum.fill(0.0);
            for &(y, v) in row {
                for &(x, u) in col {
                    let source = &grid[(y * from[1] + x) * hidden..][..hidden];
                    sum.iter_mut().zip(source).for_each(|(s, &p)| *s += v * u * f64::from(p));
                }
            }
            out.extend(sum.iter().map(|&s| s as f32));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// torch.nn.functional.interpolate of arange(4).view(2, 2) to 3x3 and of [0, 1, 4] to 1x5, mode "bicubic" with align_corners=False.
    #[test]
    fn as_in_torch() {
        let got = interpolate(&[9.0, 0.0, 1.0, 2.0, 3.0], 1, [2, 2], [3, 3]);
        let want = [
            9.0,
            -0.260_416_7,
            0.326_388_9,
            0.913_194_4,
            0.913_194_4,
            1.5,
            2.086_805_6,
            2.086_805_6,
            2.673_611_1,
            3.260_416_7,
        ];
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-5), "{got:?}");
        let got = interpolate(&[0.0, 1.0, 4.0], 0, [1, 3], [1, 5]);
        let want = [-0.096, 0.172, 1.0, 2.908, 4.288];
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-5), "{got:?}");
    }

    #[test]
    fn equal_grids_change_nothing() {
        let p: Vec<f32> = (0..18).map(|i| i as f32).collect();
        assert_eq!(interpolate(&p, 0, [3, 3], [3, 3]), p);
    }
}
