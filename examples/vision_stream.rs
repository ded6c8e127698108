//! Split Fashion-MNIST: ten classes of pictures in five tasks, with every method of continual learning, on a small vision transformer that was
//! trained from nothing on the first five classes.
//!
//! `cargo run --release --example vision_stream -- IDX_FOLDER OUT [SEED [METHOD,...]]`; the folder holds the four IDX files of (Fashion-)MNIST,
//! packed or not. The table goes to stdout, pictures of the scores to OUT.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::continual::picture::scores_svg;
use quadriga::continual::vision::{Pictures, split_classes};
use quadriga::continual::{Learner, Method, Plan, State, Stream};
use quadriga::error::{Error, ErrorKind, Result};
use quadriga::format::vit::{VitFolder, VitOptions, write_vit};
use quadriga::model::lora::ModuleSpec;
use quadriga::model::roles::LayerRole;
use quadriga::rng::Rng;
use quadriga::train::schedule::Kind;
use quadriga::train::{Schedule, Settings};
use quadriga::vision::{Examples, Fresh, TrainedVit, Trains, VisionTrainer, Vit, VitConfig, adapter, files};

const CLASSES: usize = 10;
const BATCH: usize = 32;
/// Training and test pictures of a class in the stream, and training pictures of a class for the backbone.
const SIZES: [usize; 3] = [400, 100, 3000];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (seed, names) = match &args[..] {
        [_, _] => (Ok(0), "tree,sequential,isolated,l2,ewc,anchor,olora"),
        [_, _, seed] => (seed.parse(), "tree,sequential,isolated,l2,ewc,anchor,olora"),
        [_, _, seed, names] => (seed.parse(), names.as_str()),
        _ => usage(),
    };
    let Ok(seed) = seed else { usage() };
    if let Err(e) = run(Path::new(&args[0]), Path::new(&args[1]), seed, names) {
        eprintln!("error: {e}");
        std::process::exit(2);
    }
}

fn usage() -> ! {
    eprintln!("usage: vision_stream IDX_FOLDER OUT [SEED [METHOD,...]]");
    std::process::exit(2);
}

/// The examples of `train` or `t10k`, the same number of each class.
fn load(folder: &Path, part: &str, each: usize) -> Result<Examples> {
    let file = |what: &str| -> PathBuf {
        let plain = folder.join(format!("{part}-{what}-ubyte"));
        if plain.is_file() { plain } else { folder.join(format!("{part}-{what}-ubyte.gz")) }
    };
    let all = files::idx_examples(&file("images-idx3"), &file("labels-idx1"))?;
    let mut counts = [0; CLASSES];
    let first = |&i: &usize| {
        let count = &mut counts[all.labels[i] as usize % CLASSES];
        *count += 1;
        *count <= each
    };
    let which: Vec<usize> = (0..all.labels.len()).filter(first).collect();
    let mut some = all.pick(&which)?;
    some.images.normalize(&[0.29], &[0.35])?;
    Ok(some)
}

/// A small model from nothing, on the first half of the classes.
fn pretrain(train: &Examples, test: &Examples, out: &Path, be: &Arc<Cpu>) -> Result<()> {
    let half: Vec<u32> = (0..CLASSES as u32 / 2).collect();
    let of =
        |all: &Examples| -> Vec<usize> { (0..all.labels.len()).filter(|&i| half.contains(&all.labels[i])).collect() };
    let (train, test) = (train.pick(&of(train))?, test.pick(&of(test))?);
    let mut config = VitConfig::new(28, 4, 64, 4, 4, CLASSES);
    (config.channels, config.mlp) = (1, 128);
    let fresh = Fresh::new(config, 1)?;
    let (vit, masters) = Vit::load(be.clone(), &fresh, Trains::All)?;
    let steps = 1500;
    let schedule = Schedule { kind: Kind::Cosine, warmup: steps / 20, total: steps, floor: 0.02 };
    let settings = Settings { lr: 2e-3, weight_decay: 0.05, schedule, ..Settings::default() };
    let mut trainer = VisionTrainer::new(vit, masters, None, settings, BATCH)?;
    let mut rng = Rng::new(2);
    for _ in 0..steps {
        let which: Vec<usize> = (0..BATCH).map(|_| rng.below(train.labels.len())).collect();
        trainer.step(&train.pick(&which)?, &half)?;
    }
    let score = trainer.evaluate(&test, &half)?;
    let right = 100.0 * score.correct as f64 / score.examples as f64;
    eprintln!("[backbone: {right:.1} % of the first {} classes]", half.len());
    write_vit(&TrainedVit { vit: trainer.vit(), masters: trainer.masters(), rest: &fresh }, out)
}

fn run(folder: &Path, out: &Path, seed: u64, names: &str) -> Result<()> {
    let (train, test) = (load(folder, "train", SIZES[0])?, load(folder, "t10k", SIZES[1])?);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let be = Arc::new(Cpu::with(threads, Tier::detect(), Compute::Exact));
    std::fs::create_dir_all(out).map_err(|e| Error::io(out.display(), e))?;
    let backbone = out.join("backbone");
    if !backbone.join("config.json").is_file() {
        pretrain(&load(folder, "train", SIZES[2])?, &test, &backbone, &be)?;
    }
    let tasks = split_classes(&train, &test, CLASSES, 2)?;
    println!("method       average  BWT     learning  adapters  steps   seconds");
    for name in names.split(',') {
        let none = || Error::new(ErrorKind::Usage, format!("no method {name}: there are {}", Method::NAMES.join(", ")));
        let method = match Method::named(name).ok_or_else(none)? {
            // Fisher information of this loss is larger than a language model's.
            Method::Ewc { .. } => Method::Ewc { lambda: 1e3 },
            other => other,
        };
        let source = VitFolder::open(&backbone, VitOptions { classes: Some(CLASSES), ..VitOptions::default() })?;
        let (vit, masters) = Vit::load(be.clone(), &source, Trains::Head)?;
        let rank = if method.blocks() { 8 * tasks.len() } else { 8 };
        let spec = |layer, role| ModuleSpec { role, layer, rank, scale: 2.0 };
        let specs: Vec<ModuleSpec> = (0..vit.config().blocks)
            .flat_map(|layer| [LayerRole::Q, LayerRole::V].map(|role| spec(layer, role)))
            .collect();
        let mut lora = adapter(&vit, &specs, seed)?;
        lora.train(&*be, |_| true)?;
        let settings = Settings { lr: 3e-3, ..Settings::default() };
        let trainer = VisionTrainer::new(vit, masters, Some(lora), settings, BATCH)?;
        let mut learner = Pictures::new(trainer, tasks.clone(), seed)?;
        let plan = Plan { epochs: 3, batch: BATCH, seed, ..Plan::default() };
        let state = State::new(method.clone(), plan, tasks.len(), learner.values()?)?;
        let mut stream = Stream::new(state, &learner)?;
        let began = std::time::Instant::now();
        while stream.advance(&mut learner)?.is_some() {}
        let (state, m) = (stream.state(), stream.state().scores.measures()?);
        let adapters = if method.routes().is_some() { state.members.len() } else { 1 };
        println!(
            "{name:<11} {:6.1} %  {:+6.1}  {:6.1} %  {adapters:8}  {:5}  {:8.1}",
            100.0 * m.average,
            100.0 * m.bwt,
            100.0 * m.learning,
            state.steps,
            began.elapsed().as_secs_f64()
        );
        let title = format!("Split Fashion-MNIST, {name}: per cent right");
        let svg = scores_svg(&state.scores, &title, &|k| format!("classes {} {}", 2 * k, 2 * k + 1));
        let path = out.join(format!("{name}.svg"));
        std::fs::write(&path, svg).map_err(|e| Error::io(path.display(), e))?;
    }
    Ok(())
}
