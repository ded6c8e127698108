//! Dealing the panels of a job out to threads, and what becomes of a panel's sums.
#![allow(unsafe_code)]

use super::acts::{self, Record, Wide};
use super::layout::{Aligned, BLOCK, PANEL};
use super::weight::PackedWeight;
use super::{Inputs, Job, MatmulCx, Sums, TILE_ROWS, glu, panel_sums};
use crate::backend::WeightInfo;
use crate::backend::cpu::pool::Shards;
use crate::backend::cpu::{Compute, Tier};
use crate::dtype::DType;
use crate::error::{Result, ensure};
use crate::model::config::Activation;

/// Multiply-adds below which a task is not worth handing to another thread: about two microseconds of one row.
const MIN_TASK: usize = 48 << 10;
/// Tasks a thread gets at most: enough that a slow core does not hold the others up.
const TASKS_PER_THREAD: usize = 12;
/// Rows up to which a task has little room for sums.
const FEW_ROWS: usize = 4;
/// Activations above which their quantisation is shared among the threads.
const PARALLEL_QUANTIZE: usize = 16 << 10;

/// Rows of `x`; an error where lengths do not fit.
fn rows(x: &[f32], y: usize, w: &PackedWeight) -> Result<usize> {
    let (out, cols) = (w.rows(), w.cols());
    let rows = x.len() / cols.max(1);
    ensure!(
        x.len() == rows * cols && y == rows * out,
        Shape,
        "a weight [{out}, {cols}] does not fit {} inputs and {y} outputs",
        x.len()
    );
    Ok(rows)
}

/// Runs `panel(inputs, panel number, first row, rows, room for sums)` for every panel and run of rows, on all threads.
fn deal<'w>(
    cx: &MatmulCx<'_>,
    x: &[f32],
    rows: usize,
    cols: usize,
    panels: usize,
    weights: impl Iterator<Item = &'w PackedWeight>,
    panel: impl Fn(Inputs<'_>, usize, usize, usize, [&mut Sums; 2]) + Sync,
) {
    let (mut quantize, mut wide, mut bf16) = (false, false, false);
    for w in weights.filter(|_| cx.compute == Compute::Fast) {
        quantize |= w.dtype().is_quantized();
        wide |= w.dtype() == DType::Q8_0;
        bf16 |= cx.tier == Tier::Avx512 && w.dtype() == DType::BF16;
    }
    let mut scratch = cx.scratch.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if quantize {
        let (records, wide) = scratch.resize(rows, cols, wide);
        let (blocks, wides) = (cols / BLOCK, !wide.is_empty() as usize);
        for (t, x) in x.chunks((TILE_ROWS * cols).max(1)).enumerate() {
            let (n, from) = (x.len() / cols, t * TILE_ROWS * blocks);
            let each = if x.len() > PARALLEL_QUANTIZE { blocks.div_ceil(4 * cx.pool.threads()) } else { blocks };
            let wide = Shards::new(&mut wide[wides * from..wides * (from + n * blocks)]);
            cx.pool.run_chunks(&mut records[from..from + n * blocks], each * n, |i, records| {
                // SAFETY: as the records, so the i16 values of different tasks are disjoint.
                let wide = unsafe { wide.slice(wides * i * each * n, wides * records.len()) };
                quantize_on(cx.tier, x, cols, n, i * each, records, wide);
            });
        }
    }
    if bf16 {
        let each = if x.len() > PARALLEL_QUANTIZE { x.len().div_ceil(4 * cx.pool.threads()) } else { x.len() };
        cx.pool.run_chunks(scratch.resize_bf16(x.len()), each, |i, out| {
            round_on(cx.tier, &x[i * each..i * each + out.len()], out);
        });
    }
    let (quantized, bf16s) = (quantize.then(|| scratch.view()), bf16.then(|| scratch.bf16s()));
    let inputs = Inputs { f32s: x, quantized, bf16s };
    let least = MIN_TASK.div_ceil((PANEL * cols * rows).max(1));
    let each = panels.div_ceil(cx.pool.threads() * TASKS_PER_THREAD).max(least).max(1);
    cx.pool.run(panels.div_ceil(each), |task| {
        let panels = task * each..((task + 1) * each).min(panels);
        let run = |sums: &mut [f32]| {
            let (a, b) = sums.split_at_mut(sums.len() / 2);
            for first in (0..rows).step_by(TILE_ROWS) {
                for p in panels.clone() {
                    panel(inputs, p, first, TILE_ROWS.min(rows - first), [a, b]);
                }
            }
        };
        // Clearing room for all rows would cost as much as a twentieth of a task of one row.
        if rows <= FEW_ROWS {
            run(&mut Aligned([0.0; 2 * FEW_ROWS * PANEL]).0);
        } else {
            run(&mut Aligned([0.0; 2 * TILE_ROWS * PANEL]).0);
        }
    });
}

fn quantize_on(tier: Tier, x: &[f32], cols: usize, n: usize, block: usize, records: &mut [Record], wide: &mut [Wide]) {
    match tier {
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 | Tier::Avx512 => super::kernel_avx2::quantize(x, cols, n, block, records, wide),
        _ => acts::quantize(x, cols, n, block, records, wide),
    }
}

fn round_on(tier: Tier, x: &[f32], out: &mut [u16]) {
    match tier {
        #[cfg(target_arch = "x86_64")]
        Tier::Avx512 => super::dense_avx512::round_bf16(x, out),
        _ => out.iter_mut().zip(x).for_each(|(o, &x)| *o = half::bf16::from_f32(x).to_bits()),
    }
}

/// Each job's y = W x + bias, or y += W x.
pub(super) fn linear<const N: usize>(cx: &MatmulCx<'_>, x: &[f32], jobs: [Job<'_>; N], add: bool) -> Result<()> {
    let Some(first) = jobs.first() else { return Ok(()) };
    let (rows_in_pass, cols) = (rows(x, first.y.len(), first.w)?, first.w.cols());
    for j in &jobs {
        ensure!(
            j.w.cols() == cols && rows(x, j.y.len(), j.w)? == rows_in_pass,
            Shape,
            "weights of one input have {cols} and {} columns",
            j.w.cols()
        );
        ensure!(
            j.bias.is_none_or(|b| b.len() == j.w.rows()),
            Shape,
            "a bias of {} values for {} outputs",
            j.bias.map_or(0, <[f32]>::len),
            j.w.rows()
        );
    }
    let outputs = jobs.map(|j| (j.w, j.bias, Shards::new(j.y)));
    let panels = outputs.iter().map(|o| o.0.panels_len()).sum();
    deal(cx, x, rows_in_pass, cols, panels, outputs.iter().map(|o| o.0), |x, mut p, first, n, [sums, _]| {
        let mut job = 0;
        while p >= outputs[job].0.panels_len() {
            p -= outputs[job].0.panels_len();
            job += 1;
        }
        let (w, bias, y) = &outputs[job];
        panel_sums(cx.tier, w, p, x, first, n, sums);
        let (out, at) = (w.rows(), p * PANEL);
        let width = PANEL.min(out - at);
        for (r, sums) in sums.chunks_exact(PANEL).take(n).enumerate() {
            // SAFETY: each panel and each run of rows is one task's, so no two of these overlap.
            let y = unsafe { y.slice((first + r) * out + at, width) };
            match bias {
                _ if add => y.iter_mut().zip(sums).for_each(|(y, s)| *y += s),
                Some(b) => y.iter_mut().zip(sums).zip(&b[at..]).for_each(|((y, s), b)| *y = s + b),
                None => y.copy_from_slice(&sums[..width]),
            }
        }
    });
    Ok(())
}

/// y = act(gate x) * (up x).
pub(super) fn glu(
    cx: &MatmulCx<'_>,
    y: &mut [f32],
    x: &[f32],
    gate: &PackedWeight,
    up: &PackedWeight,
    act: Activation,
) -> Result<()> {
    let rows = rows(x, y.len(), gate)?;
    let out = gate.rows();
    let y = Shards::new(y);
    deal(cx, x, rows, gate.cols(), gate.panels_len(), [gate, up].into_iter(), |x, p, first, n, [g, u]| {
        panel_sums(cx.tier, gate, p, x, first, n, g);
        panel_sums(cx.tier, up, p, x, first, n, u);
        let at = p * PANEL;
        let width = PANEL.min(out - at);
        for (r, (g, u)) in g.chunks_exact(PANEL).zip(u.chunks_exact(PANEL)).take(n).enumerate() {
            // SAFETY: as in `linear`.
            let y = unsafe { y.slice((first + r) * out + at, width) };
            glu_on(cx.tier, y, &g[..width], &u[..width], act);
        }
    });
    Ok(())
}

fn glu_on(tier: Tier, y: &mut [f32], gate: &[f32], up: &[f32], act: Activation) {
    match tier {
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 | Tier::Avx512 => super::kernel_avx2::glu(y, gate, up, act),
        _ => glu::glu(y, gate, up, act),
    }
}
