//! Trains a small vision transformer from nothing on a table of digits, and writes it as a Hugging Face folder.
//!
//! `cargo run --release --example train_vit -- digits.csv.gz OUT [STEPS]`; the table is scikit-learn's (sklearn/datasets/data). The last fifth of
//! it is held out.

use std::path::Path;
use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::format::vit::write_vit;
use quadriga::rng::Rng;
use quadriga::train::schedule::Kind;
use quadriga::train::{Schedule, Settings};
use quadriga::vision::{Fresh, TrainedVit, Trains, VisionTrainer, Vit, VitConfig, files};

const BATCH: usize = 32;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (table, out, steps) = match &args[..] {
        [table, out] => (table, out, 600),
        [table, out, steps] if steps.parse::<u64>().is_ok() => (table, out, steps.parse().unwrap_or(0)),
        _ => {
            eprintln!("usage: train_vit digits.csv.gz OUT [STEPS]");
            std::process::exit(2);
        }
    };
    if let Err(e) = train(Path::new(table), Path::new(out), steps) {
        eprintln!("error: {e}");
        std::process::exit(2);
    }
}

fn train(table: &Path, out: &Path, steps: u64) -> quadriga::Result<()> {
    let mut all = files::csv_examples(table, [1, 8, 8], 16.0)?;
    all.images.normalize(&[0.3], &[0.38])?;
    let n = all.labels.len();
    let (first, rest): (Vec<usize>, Vec<usize>) = (0..n).partition(|i| i * 5 < n * 4);
    let held_out = all.pick(&rest)?;

    let mut config = VitConfig::new(8, 2, 32, 3, 4, 10);
    (config.channels, config.mlp) = (1, 64);
    let fresh = Fresh::new(config, 1)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let be = Arc::new(Cpu::with(threads, Tier::detect(), Compute::Exact));
    let (vit, masters) = Vit::load(be, &fresh, Trains::All)?;
    let schedule = Schedule { kind: Kind::Cosine, warmup: steps / 20, total: steps, floor: 0.02 };
    let settings = Settings { lr: 3e-3, weight_decay: 0.05, schedule, ..Settings::default() };
    let mut trainer = VisionTrainer::new(vit, masters, None, settings, BATCH)?;

    let mut rng = Rng::new(2);
    for step in 1..=steps {
        let which: Vec<usize> = (0..BATCH).map(|_| first[rng.below(first.len())]).collect();
        let done = trainer.step(&all.pick(&which)?, &[])?;
        if step % 100 == 0 || step == steps {
            let score = trainer.evaluate(&held_out, &[])?;
            let right = 100.0 * score.correct as f64 / score.examples as f64;
            println!("step {step}: loss {:.3}; held out {:.3}, {right:.1} % right", done.score.loss, score.loss);
        }
    }
    let trained = TrainedVit { vit: trainer.vit(), masters: trainer.masters(), rest: &fresh };
    write_vit(&trained, out)?;
    println!("wrote {}", out.display());
    Ok(())
}
