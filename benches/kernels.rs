//! The table of operations under criterion. Throughput is bytes moved where memory bounds the operation, and floating-point
//! operations, counted as elements, where arithmetic does.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::bench::{Prepared, Setup, ops};

/// Operations per byte above which a product of this table is bound by arithmetic on the machines we know.
const COMPUTE_BOUND: f64 = 20.0;

fn kernels(c: &mut Criterion) {
    // Under `cargo test` and `cargo bench -- --test` each row runs once: small and warm is enough.
    let once = std::env::args().any(|a| a == "--test") || !std::env::args().any(|a| a == "--bench");
    let cpu = Cpu::with(num_cpus::get_physical(), Tier::detect(), Compute::Fast);
    for case in ops::realistic() {
        if once && case.large {
            continue;
        }
        let id = format!("{}/{} {}", case.op.name(), case.model, case.op).replace(' ', "_");
        let mut group = c.benchmark_group("cpu");
        group.sample_size(20);
        // Inputs are made only if the row is not filtered out.
        let mut prepared: Option<Prepared<'_, Cpu>> = None;
        let working_set = if once { 0 } else { 100 << 20 };
        let setup = Setup { working_set, kv_bytes: 2, ..Setup::default() };
        if let Ok(small) = Prepared::new(&cpu, case.op, Setup { kv_bytes: 2, ..Setup::default() }) {
            let cost = small.cost();
            group.throughput(if cost.flops / cost.bytes < COMPUTE_BOUND {
                Throughput::Bytes(cost.bytes as u64)
            } else {
                Throughput::Elements(cost.flops as u64)
            });
        }
        group.bench_function(id, |b| {
            let p = prepared.get_or_insert_with(|| Prepared::new(&cpu, case.op, setup).expect("inputs"));
            b.iter(|| p.run().expect("the operation runs"));
        });
        group.finish();
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
