//! What this machine's cores reach: measured before the table, with the same threads.

use std::hint::black_box;
use std::time::Instant;

use crate::backend::cpu::bandwidth::read_bandwidth;
use crate::backend::cpu::lanes::{Kernel, Simd, dispatch};
use crate::backend::cpu::{Cpu, Tier};
use crate::error::Result;

/// The roofs of a CPU backend.
#[derive(Clone, Copy, Debug)]
pub struct CpuPeaks {
    /// Reading a set of half a gigabyte, bytes per second.
    pub memory: f64,
    /// Reading and writing what stays in the cores' own caches, bytes per second.
    pub cache: f64,
    /// f32 multiply-adds in registers, operations per second.
    pub f32: f64,
    /// int8 multiply-adds, operations per second. Not measured but derived from `f32`: a multiply instruction does four
    /// times as many products on int8 with VNNI, and twice as many (two instructions for four times) with AVX2.
    pub int8: f64,
    /// What large products compute in, operations per second: see [`matrix_peak`].
    pub matrix: f64,
}

impl CpuPeaks {
    /// Measures for about a second.
    ///
    /// # Errors
    /// If there is no memory for the set.
    pub fn measure(cpu: &Cpu) -> Result<Self> {
        let f32 = fma_peak(cpu);
        let int8 = f32
            * match cpu.tier() {
                Tier::Portable => 1.0,
                Tier::Avx2 => 2.0,
                Tier::Avx512 => 4.0,
            };
        let (memory, cache) = (read_bandwidth(cpu.pool(), 512 << 20)?, cache_bandwidth(cpu));
        Ok(Self { memory, cache, f32, int8, matrix: matrix_peak(cpu) })
    }
}

/// Independent chains of multiply-adds: enough to hide a latency of four cycles at two a cycle, and few enough for 16
/// registers.
const CHAINS: usize = 12;
const STEPS: usize = 100_000;

struct Fma(f32);

impl Kernel for Fma {
    /// Operations, and a value that keeps the work alive.
    type Out = (f64, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f64, f32) {
        let (a, b) = (s.splat(self.0), s.splat(1.0 - self.0));
        let mut chains = [b; CHAINS];
        for _ in 0..STEPS {
            for c in &mut chains {
                *c = s.fma(*c, a, b);
            }
        }
        let sum = chains.into_iter().fold(s.splat(0.0), |x, c| s.add(x, c));
        ((2 * S::N * CHAINS * STEPS) as f64, s.sum(sum))
    }
}

/// Best of several runs of f32 multiply-adds on all threads, operations per second.
pub fn fma_peak(cpu: &Cpu) -> f64 {
    // Several tasks a thread, so that a thread that starts late does not decide the figure.
    let tasks = cpu.pool().threads() * 4;
    let flops = dispatch(cpu.tier(), Fma(black_box(0.5))).0 * tasks as f64;
    best(flops, || {
        cpu.pool().run(tasks, |_| {
            black_box(dispatch(cpu.tier(), Fma(black_box(0.5))));
        })
    })
}

/// What the instructions that the CPU's large products use reach on all threads, operations per second: AMX or f32.
pub fn matrix_peak(cpu: &Cpu) -> f64 {
    let tasks = cpu.pool().threads() * 4;
    let one = || crate::backend::cpu::gemm::register_products(cpu.tier(), cpu.compute());
    let Some(flops) = one() else { return fma_peak(cpu) };
    best(flops * tasks as f64, || {
        cpu.pool().run(tasks, |_| {
            black_box(one());
        })
    })
}

struct Scale<'a>(&'a mut [f32], f32);

impl Kernel for Scale<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let by = s.splat(self.1);
        for x in self.0.chunks_exact_mut(S::N) {
            let v = s.mul(s.load(&*x), by);
            s.store(v, x);
        }
    }
}

/// Reads and writes of 128 KiB a thread, bytes per second: the roof of operations on a few rows of activations.
pub fn cache_bandwidth(cpu: &Cpu) -> f64 {
    const FLOATS: usize = 32 << 10;
    const ROUNDS: usize = 50;
    let mut set = vec![1.0f32; FLOATS * cpu.pool().threads()];
    let bytes = (set.len() * 4 * 2 * ROUNDS) as f64;
    best(bytes, || {
        cpu.pool().run_chunks(&mut set, FLOATS, |_, c| {
            for _ in 0..ROUNDS {
                dispatch(cpu.tier(), Scale(black_box(&mut *c), black_box(1.0)));
            }
        })
    })
}

fn best(amount: f64, mut f: impl FnMut()) -> f64 {
    let mut best = 0.0f64;
    for _ in 0..8 {
        let start = Instant::now();
        f();
        best = best.max(amount / start.elapsed().as_secs_f64());
    }
    best
}
