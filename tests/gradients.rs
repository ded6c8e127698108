//! The specification's backward operations against central differences of its forward ones, in f64, at the sizes of the table.

use quadriga::backend::host::HostBuf;
use quadriga::backend::naive::Naive;
use quadriga::backend::{Backend, Group, Ranks, Train, Write};
use quadriga::bench::training::{EPS, Loss, PreparedTrain, SCALE, TrainOp, TrainSetup, lists};
use quadriga::rng::Rng;

const H: f64 = 1e-5;
const TOLERANCE: f64 = 1e-6;

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn size(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(x.abs()))
}

fn normals(rng: &mut Rng, n: usize) -> Vec<f64> {
    (0..n).map(|_| rng.normal().into()).collect()
}

/// Compares `grad` with what `f` does around `x`: along two random directions, which see every element, and along some elements.
/// `terms` is the size of what the gradient is a sum of, where that may cancel.
fn agrees(what: &str, grad: &[f64], x: &[f64], terms: f64, mut f: impl FnMut(&[f64]) -> f64) {
    assert_eq!(grad.len(), x.len(), "{what}");
    let mut rng = Rng::new(x.len() as u64);
    let n = x.len();
    let unit = 1.0 / (n as f64).sqrt();
    let mut directions: Vec<Vec<f64>> =
        (0..2).map(|_| (0..n).map(|_| if rng.below(2) == 0 { unit } else { -unit }).collect()).collect();
    for _ in 0..n.min(8) {
        let mut one = vec![0.0; n];
        one[rng.below(n)] = 1.0;
        directions.push(one);
    }
    for d in directions {
        let mut at = |h: f64| f(&x.iter().zip(&d).map(|(x, d)| x + h * d).collect::<Vec<_>>());
        let (numeric, analytic) = ((at(H) - at(-H)) / (2.0 * H), dot(grad, &d));
        let error = (numeric - analytic).abs() / size(grad).max(terms);
        assert!(error < TOLERANCE, "{what}: {analytic:.9e}, and {numeric:.9e} by differences");
    }
}

/// The operations of the table that take moments in f64, prepared.
fn table(wanted: impl Fn(&TrainOp) -> bool) -> Vec<(TrainOp, PreparedTrain<'static, Naive>)> {
    let ops = lists::odd().into_iter().filter(wanted).enumerate();
    let all = ops.map(|(i, op)| {
        let setup = TrainSetup { seed: i as u64, ..TrainSetup::default() };
        (op, PreparedTrain::new(&Naive, op, setup).unwrap())
    });
    let short: Vec<_> = all.filter(|(_, p)| p.cost().flops < 2e6).collect();
    assert!(!short.is_empty(), "the table has no such operation");
    short
}

/// What a run adds to a buffer.
fn added(p: &mut PreparedTrain<'_, Naive>, i: usize) -> Vec<f64> {
    let before = p.acc(i).to_vec();
    p.run().unwrap();
    p.acc(i).iter().zip(before).map(|(after, before)| after - before).collect()
}

#[test]
fn linear() {
    for (op, mut p) in table(|op| matches!(op, TrainOp::LinearBwdW { .. })) {
        let TrainOp::LinearBwdW { rows, input, output } = op else { unreachable!() };
        let (dw, dy, x) = (added(&mut p, 0), p.acc(1).to_vec(), p.act(0).to_vec());
        let weights = normals(&mut Rng::new(1), input * output);
        let value = |w: &[f64], x: &[f64]| {
            let mut m = Naive.trainable(output, input).unwrap();
            Naive.set_weight(&mut m, w).unwrap();
            let mut y = vec![f64::NAN; rows * output];
            Naive.linear_fwd(&mut y, x, &m, None, Write::Set).unwrap();
            dot(&y, &dy)
        };
        agrees(&format!("linear by W, {op}"), &dw, &weights, 0.0, |w| value(w, &x));

        let mut m = Naive.trainable(output, input).unwrap();
        Naive.set_weight(&mut m, &weights).unwrap();
        let mut dx = vec![f64::NAN; rows * input];
        Naive.linear_bwd_x(&mut dx, &dy, &m, Write::Set).unwrap();
        agrees(&format!("linear by x, {op}"), &dx, &x, 0.0, |x| value(&weights, x));
        let once = dx.clone();
        Naive.linear_bwd_x(&mut dx, &dy, &m, Write::Add).unwrap();
        assert!(dx.iter().zip(&once).all(|(twice, once)| *twice == 2.0 * once), "{op} does not add");

        let bias = normals(&mut Rng::new(2), output);
        let mut db = vec![0.0; output];
        Naive.column_sums(&mut db, &dy).unwrap();
        agrees(&format!("linear by its bias, {op}"), &db, &bias, 0.0, |b| {
            let (mut y, mut buf) = (vec![0.0; rows * output], Naive.alloc(output).unwrap());
            buf.copy_from_slice(b);
            Naive.linear_fwd(&mut y, &x, &m, Some(&buf), Write::Set).unwrap();
            dot(&y, &dy)
        });
    }
}

#[test]
fn rms_norm() {
    for (op, mut p) in table(|op| matches!(op, TrainOp::RmsNormBwd { dw: true, write: Write::Add, .. })) {
        let before = p.acc(1).to_vec();
        let dx = added(&mut p, 0);
        let dw: Vec<f64> = p.acc(1).iter().zip(before).map(|(after, before)| after - before).collect();
        let (dy, x, w) = (p.acc(2).to_vec(), p.acc(3).to_vec(), p.acc(4).to_vec());
        let value = |x: &[f64], w: &[f64]| {
            let (mut y, mut buf) = (vec![0.0; x.len()], Naive.alloc(w.len()).unwrap());
            buf.copy_from_slice(w);
            Naive.rms_norm(&mut y, x, &buf, EPS).unwrap();
            dot(&y, &dy)
        };
        agrees(&format!("rms_norm by x, {op}"), &dx, &x, size(&dw), |x| value(x, &w));
        agrees(&format!("rms_norm by w, {op}"), &dw, &w, 0.0, |w| value(&x, w));
    }
}

fn buf(values: &[f64]) -> HostBuf<f64> {
    let mut b = Naive.alloc(values.len()).unwrap();
    b.copy_from_slice(values);
    b
}

#[test]
fn layer_norm() {
    // One column is its own mean: nothing moves.
    let adds = |op: &TrainOp| matches!(op, TrainOp::LayerNormBwd { dw: true, write: Write::Add, d, .. } if *d > 1);
    for (op, mut p) in table(adds) {
        let before = p.acc(1).to_vec();
        let dx = added(&mut p, 0);
        let dw: Vec<f64> = p.acc(1).iter().zip(before).map(|(after, before)| after - before).collect();
        let (dy, x, w) = (p.acc(2).to_vec(), p.acc(3).to_vec(), p.acc(4).to_vec());
        let b = normals(&mut Rng::new(3), w.len());
        let value = |x: &[f64], w: &[f64], b: &[f64]| {
            let mut y = vec![0.0; x.len()];
            Naive.layer_norm(&mut y, x, &buf(w), &buf(b), EPS).unwrap();
            dot(&y, &dy)
        };
        agrees(&format!("layer_norm by x, {op}"), &dx, &x, size(&dw), |x| value(x, &w, &b));
        agrees(&format!("layer_norm by w, {op}"), &dw, &w, 0.0, |w| value(&x, w, &b));
        let mut db = vec![0.0; w.len()];
        Naive.column_sums(&mut db, &dy).unwrap();
        agrees(&format!("layer_norm by b, {op}"), &db, &b, 0.0, |b| value(&x, &w, b));
    }
}

#[test]
fn gelu_and_layer_scale() {
    for (op, mut p) in table(|op| matches!(op, TrainOp::GeluBwd { .. })) {
        p.run().unwrap();
        let [dx, dy, x] = [0, 1, 2].map(|i| p.acc(i).to_vec());
        agrees(&format!("gelu by x, {op}"), &dx, &x, 0.0, |x| {
            let mut y = vec![0.0; x.len()];
            Naive.gelu(&mut y, x).unwrap();
            dot(&y, &dy)
        });
    }
    for (op, mut p) in table(|op| matches!(op, TrainOp::AddScaledBwd { dw: true, .. })) {
        let dw = added(&mut p, 1);
        let [dx, _, dy, x, w] = [0, 1, 2, 3, 4].map(|i| p.acc(i).to_vec());
        let value = |x: &[f64], w: &[f64]| {
            let mut y = vec![1.0; x.len()];
            Naive.add_scaled(&mut y, x, &buf(w)).unwrap();
            dot(&y, &dy)
        };
        agrees(&format!("add_scaled by x, {op}"), &dx, &x, 0.0, |x| value(x, &w));
        agrees(&format!("add_scaled by w, {op}"), &dw, &w, 0.0, |w| value(&x, w));
    }
}

#[test]
fn glu() {
    for (op, mut p) in table(|op| matches!(op, TrainOp::GluBwd { .. })) {
        let TrainOp::GluBwd { act, .. } = op else { unreachable!() };
        p.run().unwrap();
        let [dgate, dup, dz, gate, up] = [0, 1, 2, 3, 4].map(|i| p.acc(i).to_vec());
        let value = |gate: &[f64], up: &[f64]| {
            let mut z = vec![0.0; dz.len()];
            Naive.glu(&mut z, gate, up, act).unwrap();
            dot(&z, &dz)
        };
        agrees(&format!("glu by its gate, {op}"), &dgate, &gate, 0.0, |gate| value(gate, &up));
        agrees(&format!("glu by up, {op}"), &dup, &up, 0.0, |up| value(&gate, up));
    }
}

#[test]
fn attention() {
    for (op, mut p) in table(|op| matches!(op, TrainOp::AttendBwd(_))) {
        let TrainOp::AttendBwd(a) = op else { unreachable!() };
        let visible = a.visible().unwrap();
        let [dy, mut lse, q, k, v] = [3, 4, 5, 6, 7].map(|i| p.acc(i).to_vec());
        let forward = |q: &[f64], k: &[f64], v: &[f64], lse: &mut [f64]| {
            let mut y = vec![f64::NAN; dy.len()];
            Naive.attend(&mut y, lse, q, k, v, &visible, &a.spec).unwrap();
            y
        };
        // The table's are rounded to f32.
        let y = forward(&q, &k, &v, &mut lse);
        p.acc(4).copy_from_slice(&lse);
        p.act(0).copy_from_slice(&y);
        p.run().unwrap();
        let [dq, dk, dv] = [0, 1, 2].map(|i| p.acc(i).to_vec());
        let terms = size(&dv);
        agrees(&format!("attend by q, {op}"), &dq, &q, terms, |q| dot(&forward(q, &k, &v, &mut lse), &dy));
        agrees(&format!("attend by k, {op}"), &dk, &k, terms, |k| dot(&forward(&q, k, &v, &mut lse), &dy));
        agrees(&format!("attend by v, {op}"), &dv, &v, terms, |v| dot(&forward(&q, &k, v, &mut lse), &dy));
    }
}

#[test]
fn rows_of_tables() {
    for (op, mut p) in table(|op| matches!(op, TrainOp::ScatterRows { .. })) {
        let TrainOp::ScatterRows { into, d, .. } = op else { unreachable!() };
        let (dx, dy, ids) = (added(&mut p, 0), p.acc(1).to_vec(), p.ids().to_vec());
        agrees(&format!("gather_rows, {op}"), &dx, &normals(&mut Rng::new(1), into * d), 0.0, |x| {
            let mut y = vec![0.0; dy.len()];
            Naive.gather_rows(&mut y, x, &ids, d).unwrap();
            dot(&y, &dy)
        });
    }
    for (op, mut p) in table(|op| matches!(op, TrainOp::EmbedBwd { .. })) {
        let TrainOp::EmbedBwd { vocab, d, .. } = op else { unreachable!() };
        let (dtable, dx, ids) = (added(&mut p, 0), p.acc(1).to_vec(), p.ids().to_vec());
        agrees(&format!("embed, {op}"), &dtable, &normals(&mut Rng::new(1), vocab * d), 0.0, |table| {
            let (mut y, mut m) = (vec![0.0; dx.len()], Naive.trainable(vocab, d).unwrap());
            Naive.set_weight(&mut m, table).unwrap();
            Naive.embed(&mut y, &m, &ids, SCALE).unwrap();
            dot(&y, &dx)
        });
    }
}

/// Groups over matrices that follow one another in `all`.
fn groups<'a>(rows: &[usize], all: &'a [f64]) -> Vec<Group<'a, Naive>> {
    let each = all.len() / rows.len();
    let parts = rows.iter().zip(all.chunks_exact(each)).enumerate();
    parts.map(|(i, (&rows, matrix))| Group { rows, matrix, scale: 1.0 + i as f32 / 4.0 }).collect()
}

/// Of y += scale B A x for several groups, of which one works on a part of what it shrinks to.
#[test]
fn lora() {
    for (op, _) in table(|op| matches!(op, TrainOp::LoraExpandBwd { .. })) {
        let TrainOp::LoraExpandBwd { groups: of, output, part } = op else { unreachable!() };
        let (rows, ranks, input) = (of.iter().sum::<usize>(), part.stride, 5);
        let mut rng = Rng::new(rows as u64);
        let mut draw = |n: usize| normals(&mut rng, n);
        let (x, a, b) = (draw(rows * input), draw(of.len() * ranks * input), draw(of.len() * output * part.n));
        let dy = draw(rows * output);
        let shrink = |x: &[f64], a: &[f64]| {
            let mut h = vec![f64::NAN; rows * ranks];
            Naive.lora_shrink(&mut h, x, ranks, &groups(of, a)).unwrap();
            h
        };
        let value = |x: &[f64], a: &[f64], b: &[f64]| {
            let mut y = vec![0.0; rows * output];
            Naive.lora_expand(&mut y, &shrink(x, a), part, &groups(of, b)).unwrap();
            dot(&y, &dy)
        };
        let (h, mut dh, mut dx) = (shrink(&x, &a), vec![0.0; rows * ranks], vec![0.0; rows * input]);
        Naive.lora_expand_bwd(&mut dh, &dy, part, &groups(of, &b)).unwrap();
        Naive.lora_shrink_bwd(&mut dx, &dh, ranks, &groups(of, &a)).unwrap();
        agrees(&format!("lora by x, {op}"), &dx, &x, 0.0, |x| value(x, &a, &b));

        let (mut da, mut db, mut at) = (vec![0.0; a.len()], vec![0.0; b.len()], 0);
        let (each_a, each_b) = (ranks * input, output * part.n);
        for (i, g) in groups(of, &b).iter().enumerate() {
            let (dy, h) = (&dy[at * output..][..g.rows * output], &h[at * ranks..][..g.rows * ranks]);
            let (dh, x) = (&dh[at * ranks..][..g.rows * ranks], &x[at * input..][..g.rows * input]);
            // Nothing tells widths where there are no rows.
            if g.rows == 0 {
                continue;
            }
            Naive.lora_bwd_b(&mut db[i * each_b..][..each_b], dy, h, part, g.scale).unwrap();
            Naive.lora_bwd_a(&mut da[i * each_a..][..each_a], dh, x, ranks).unwrap();
            at += g.rows;
        }
        agrees(&format!("lora by A, {op}"), &da, &a, 0.0, |a| value(&x, a, &b));
        agrees(&format!("lora by B, {op}"), &db, &b, 0.0, |b| value(&x, &a, b));
    }
}

/// Other parts of what modules share stay as they are.
#[test]
fn a_part_leaves_the_others() {
    let (part, b, dy) = (Ranks { stride: 5, first: 2, n: 2 }, [1.0, 2.0, 3.0, 4.0], [1.0, -1.0]);
    let mut dh = [9.0; 5];
    Naive.lora_expand_bwd(&mut dh, &dy, part, &[Group { rows: 1, matrix: &b, scale: 0.5 }]).unwrap();
    assert_eq!(dh, [9.0, 9.0, -1.0, -1.0, 9.0]);
}

#[test]
fn losses() {
    for (op, mut p) in table(|op| matches!(op, TrainOp::LossRows { .. })) {
        let TrainOp::LossRows { vocab, loss, .. } = op else { unreachable!() };
        let logits = p.acc(1).to_vec();
        p.run().unwrap();
        let (grad, weights) = (p.acc(1).to_vec(), p.weights().to_vec());
        for (r, (g, w)) in grad.chunks_exact(vocab).zip(&weights).enumerate() {
            assert!(*w != 0.0 || g.iter().all(|g| *g == 0.0), "{op}: row {r} weighs nothing and has a gradient");
        }
        assert!(p.acc(0).iter().all(|l| l.is_finite()), "{op}");
        if loss == Loss::Entropy {
            assert!(p.acc(0).iter().enumerate().all(|(r, l)| (r % 3 == 1) == (*l == 0.0)), "{op}: {:?}", p.acc(0));
        }
        // A loss that is constant has no gradient: what it is measured by is the weight.
        let terms = weights.iter().fold(0.0f32, |m, w| m.max(*w)).into();
        agrees(&format!("loss_rows, {op}"), &grad, &logits, terms, |z| {
            p.acc(1).copy_from_slice(z);
            p.run().unwrap();
            weights.iter().zip(p.acc(0).iter()).map(|(w, l)| f64::from(*w) * l).sum()
        });
    }
}

#[test]
fn smooth_l1() {
    for (op, mut p) in table(|op| matches!(op, TrainOp::SmoothL1 { .. })) {
        p.run().unwrap();
        let (dx, x, weights) = (p.acc(1).to_vec(), p.acc(2).to_vec(), p.weights().to_vec());
        agrees(&format!("smooth_l1, {op}"), &dx, &x, 0.0, |x| {
            p.acc(2).copy_from_slice(x);
            p.run().unwrap();
            weights.iter().zip(p.acc(0).iter()).map(|(w, l)| f64::from(*w) * l).sum()
        });
    }
}
