//! Every format, tier and kind of arithmetic against f64, and rows against themselves in other company.

use half::{bf16, f16};

use super::acts::Acts;
use super::*;
use crate::backend::cpu::memory::Arena;
use crate::dtype::DType;
use crate::rng::Rng;
use crate::tensor::HostTensor;

/// Blocks of random integers with scales of a sane size, or normal values.
pub(in crate::backend::cpu) fn tensor(dtype: DType, rows: usize, cols: usize, seed: u64) -> HostTensor {
    let mut rng = Rng::new(seed);
    let size = dtype.block_bytes();
    let mut data = vec![0u8; rows * dtype.row_bytes(cols).unwrap()];
    for b in data.chunks_exact_mut(size) {
        match dtype {
            DType::F32 => b.copy_from_slice(&rng.normal().to_le_bytes()),
            DType::F16 => b.copy_from_slice(&f16::from_f32(rng.normal()).to_le_bytes()),
            DType::BF16 => b.copy_from_slice(&bf16::from_f32(rng.normal()).to_le_bytes()),
            _ => {
                b.iter_mut().for_each(|b| *b = rng.next_u32() as u8);
                let mut scale = |at: usize, by: f32| {
                    b[at..at + 2].copy_from_slice(&f16::from_f32(rng.normal() * by).to_le_bytes());
                };
                match dtype {
                    DType::Q6_K => scale(208, 1e-3),
                    DType::Q4_K | DType::Q5_K => [0, 2].into_iter().for_each(|at| scale(at, 1e-3)),
                    DType::Q4_1 | DType::Q5_1 => [0, 2].into_iter().for_each(|at| scale(at, 0.02)),
                    _ => scale(0, 0.02),
                }
            }
        }
    }
    HostTensor::new(dtype, rows, cols, data.into()).unwrap()
}

pub(in crate::backend::cpu) fn inputs(rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::stream(seed, 1);
    (0..rows * cols).map(|i| rng.normal() * (1.0 + (i / 50 % 7) as f32)).collect()
}

fn columns(dtype: DType) -> &'static [usize] {
    match dtype.block_len() {
        1 => &[7, 64, 1061],
        32 => &[32, 96, 608],
        _ => &[256, 768],
    }
}

/// Every setting that this machine runs: `f(name, context)`.
fn settings(f: impl Fn(&str, MatmulCx<'_>)) {
    let scratch = Scratch::default();
    for threads in [1, 2] {
        let pool = Pool::new(threads);
        for tier in Tier::available() {
            for compute in [Compute::Exact, Compute::Fast] {
                let cx = MatmulCx { pool: &pool, tier, compute, scratch: &scratch };
                f(&format!("{tier}, {compute:?}, {threads} threads"), cx);
            }
        }
    }
}

pub(in crate::backend::cpu) fn pack(t: &HostTensor) -> PackedWeight {
    PackedWeight::pack(t.clone(), &Pool::new(2), &Arena::default()).unwrap()
}

#[test]
fn packed_rows_are_bit_equal_to_the_file() {
    for dtype in DType::ALL {
        for (&cols, rows) in columns(dtype).iter().zip([1, 16, 37]) {
            let t = tensor(dtype, rows, cols, 7);
            let w = pack(&t);
            let (mut want, mut got) = (vec![0.0; cols], vec![0.0; cols]);
            for r in 0..rows {
                t.row_f32(r, &mut want);
                w.row_f32(r, &mut got);
                assert!(want.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()), "{dtype}, row {r}");
            }
            assert!(rows < 16 || w.bytes() * 16 <= t.data.len() * 17 * rows.div_ceil(16) * 16 / rows, "{dtype} grew");
        }
    }
}

/// x as the integer kernels see it: int8, or for 8-bit weights i16.
fn rounded(x: &[f32], cols: usize, wide: bool) -> Vec<f64> {
    let mut acts = Acts::default();
    x.chunks_exact(cols)
        .flat_map(|x| {
            let (records, wides) = acts.resize(1, cols, wide);
            acts::quantize(x, cols, 1, 0, records, wides);
            let integer = |i: usize| match wide {
                true => wides[i / 32][i % 32 / 4 * 4 + [0, 2, 1, 3][i % 4]] as f64 / acts::FINER as f64,
                false => records[i / 32].q[i % 32] as f64,
            };
            (0..cols).map(|i| integer(i) * records[i / 32].meta[0] as f64).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn products_agree_with_f64() {
    for dtype in DType::ALL {
        for (&cols, out) in columns(dtype).iter().zip([5, 16, 37]) {
            let t = tensor(dtype, out, cols, 3);
            let (w, wide) = (pack(&t), t.to_f32());
            for rows in [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33] {
                let x = inputs(rows, cols, rows as u64);
                settings(|name, cx| {
                    let integers = cx.compute == Compute::Fast && dtype.is_quantized();
                    let halves = cx.compute == Compute::Fast && dtype == DType::BF16 && cx.tier == Tier::Avx512;
                    let seen: Vec<f64> = match (integers, halves) {
                        (true, _) => rounded(&x, cols, dtype == DType::Q8_0),
                        (_, true) => x.iter().map(|&x| bf16::from_f32(x).to_f64()).collect(),
                        _ => x.iter().map(|&x| x as f64).collect(),
                    };
                    let mut y = vec![f32::NAN; rows * out];
                    linear(&cx, &mut y, &x, &w, None).unwrap();
                    for (at, &y) in y.iter().enumerate() {
                        let (r, o) = (at / out * cols, at % out * cols);
                        let (mut want, mut close, mut size, mut rounding) = (0.0, 0.0, 0.0, 0.0);
                        for (b, w) in wide[o..o + cols].chunks(32).enumerate() {
                            let span = r + b * 32..r + b * 32 + w.len();
                            let (x, seen) = (&x[span.clone()], &seen[span]);
                            let max = w.iter().fold(0.0, |a: f64, w| a.max(w.abs() as f64));
                            for ((&w, &x), &s) in w.iter().zip(x).zip(seen) {
                                want += w as f64 * x as f64;
                                close += w as f64 * s;
                                size += max * x.abs() as f64;
                                rounding += w.abs() as f64 * (x as f64 - s).abs();
                            }
                        }
                        let y = y as f64;
                        assert!(
                            (y - close).abs() <= 1e-6 * size,
                            "{dtype} [{out}, {cols}], {rows} rows, {name}: {y}, want {close} of size {size}"
                        );
                        assert!((y - want).abs() <= rounding + 1e-6 * size, "{dtype}, {name}: {y} far from {want}");
                    }
                });
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_company() {
    let mut rng = Rng::new(11);
    for dtype in DType::ALL {
        for (&cols, out) in columns(dtype).iter().zip([16, 21, 40]) {
            let w = pack(&tensor(dtype, out, cols, 5));
            let rows = 130;
            let x = inputs(rows, cols, 9);
            let mut run = || (rng.below(rows - 64), 1 + rng.below(64));
            let starts: Vec<(usize, usize)> = (0..12).map(|_| run()).collect();
            let whole = std::sync::Mutex::new(std::collections::HashMap::new());
            settings(|name, cx| {
                let mut all = vec![0.0; rows * out];
                linear(&cx, &mut all, &x, &w, None).unwrap();
                let bits: Vec<u32> = all.iter().map(|y| y.to_bits()).collect();
                let key = (cx.tier.to_string(), cx.compute == Compute::Fast);
                let known = whole.lock().unwrap().entry(key).or_insert_with(|| bits.clone()).clone();
                assert!(known == bits, "{dtype}, {name}: threads change the result");
                for &(first, n) in &starts {
                    let mut y = vec![0.0; n * out];
                    linear(&cx, &mut y, &x[first * cols..(first + n) * cols], &w, None).unwrap();
                    let same = y.iter().zip(&bits[first * out..]).all(|(a, b)| a.to_bits() == *b);
                    assert!(same, "{dtype} [{out}, {cols}], {name}: {n} rows from {first}");
                }
            });
        }
    }
}

#[test]
fn fused_forms_are_their_parts() {
    let (rows, cols) = (5, 256);
    let x = inputs(rows, cols, 2);
    let weights: Vec<PackedWeight> = [(DType::Q4_K, 40), (DType::BF16, 17), (DType::Q8_0, 33)]
        .map(|(dtype, out)| pack(&tensor(dtype, out, cols, 1)))
        .into();
    let (gate, up) = (pack(&tensor(DType::Q5_1, 50, cols, 1)), pack(&tensor(DType::Q6_K, 50, cols, 2)));
    let bias: Vec<f32> = (0..40).map(|i| i as f32 * 0.1).collect();
    settings(|name, cx| {
        let single = |w: &PackedWeight| {
            let mut y = vec![0.0; rows * w.rows()];
            linear(&cx, &mut y, &x, w, None).unwrap();
            y
        };
        let mut many: Vec<Vec<f32>> = weights.iter().map(|w| vec![0.0; rows * w.rows()]).collect();
        let [a, b, c] = &mut many[..] else { unreachable!() };
        let jobs = [
            Job { w: &weights[0], bias: Some(&bias), y: a },
            Job { w: &weights[1], bias: None, y: b },
            Job { w: &weights[2], bias: None, y: c },
        ];
        linear_many(&cx, &x, jobs).unwrap();
        let mut biased = single(&weights[0]);
        biased.chunks_exact_mut(40).for_each(|y| y.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
        assert!(many[0] == biased && many[1] == single(&weights[1]) && many[2] == single(&weights[2]), "{name}");

        let mut added = vec![0.5; rows * 33];
        linear_add(&cx, &mut added, &x, &weights[2]).unwrap();
        assert!(added.iter().zip(&many[2]).all(|(a, y)| *a == 0.5 + y), "{name}");

        for act in [Activation::Silu, Activation::GeluTanh] {
            let (mut y, mut want) = (vec![0.0; rows * 50], vec![0.0; rows * 50]);
            linear_glu(&cx, &mut y, &x, &gate, &up, act).unwrap();
            glu::glu(&mut want, &single(&gate), &single(&up), act);
            assert!(y == want, "{name}");
        }
    });
}

#[test]
fn any_bytes_are_multiplied_without_a_panic() {
    let mut rng = Rng::new(3);
    for dtype in DType::ALL {
        let (rows, cols, out) = (6, 256, 19);
        let mut data = vec![0u8; out * dtype.row_bytes(cols).unwrap()];
        data.iter_mut().for_each(|b| *b = rng.next_u32() as u8 | 0x7C);
        let w = pack(&HostTensor::new(dtype, out, cols, data.into()).unwrap());
        let mut x = inputs(rows, cols, 4);
        x[3] = f32::NAN;
        x[300] = f32::INFINITY;
        settings(|_, cx| {
            let mut y = vec![0.0; rows * out];
            linear(&cx, &mut y, &x, &w, None).unwrap();
            assert!(y[..2 * out].iter().all(|y| !y.is_finite()), "{dtype}: a bad input is hidden");
        });
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn tiers_quantize_alike() {
    if Tier::detect() < Tier::Avx2 {
        return;
    }
    let mut x = inputs(1, 96, 1);
    x[70] = f32::NAN;
    let (mut a, mut b) = (Acts::default(), Acts::default());
    let (records, wides) = a.resize(1, 96, true);
    acts::quantize(&x, 96, 1, 0, records, wides);
    let (others, other_wides) = b.resize(1, 96, true);
    kernel_avx2::quantize(&x, 96, 1, 0, others, other_wides);
    assert!(bytemuck::cast_slice::<_, u8>(&records[..2]) == bytemuck::cast_slice::<_, u8>(&others[..2]));
    assert_eq!(wides[..2], other_wides[..2]);
    assert!(records[2].meta[0].is_nan() && others[2].meta[0].is_nan());
}

#[test]
fn lengths_that_do_not_fit_are_errors() {
    let (pool, scratch) = (Pool::new(1), Scratch::default());
    let cx = MatmulCx { pool: &pool, tier: Tier::detect(), compute: Compute::Fast, scratch: &scratch };
    let (w, v) = (pack(&tensor(DType::Q4_0, 8, 64, 1)), pack(&tensor(DType::F32, 8, 32, 1)));
    assert!(linear(&cx, &mut [0.0; 8], &[0.0; 63], &w, None).is_err());
    assert!(linear(&cx, &mut [0.0; 9], &[0.0; 64], &w, None).is_err());
    assert!(linear(&cx, &mut [0.0; 8], &[0.0; 64], &w, Some(&[0.0; 7])).is_err());
    assert!(linear_glu(&cx, &mut [0.0; 8], &[0.0; 64], &w, &v, Activation::Silu).is_err());
    assert!(linear(&cx, &mut [], &[], &w, None).is_ok());
}
