//! Many adapters in one batch: `cargo run --release --example many_adapters -- MODEL ADAPTER...` with PEFT folders of that model.
//! Without arguments, two random adapters of a tiny model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use quadriga::engine::{Engine, Generate, PoolOptions, Request, ServingOptions};
use quadriga::format::peft::{PeftAdapter, PeftTensor};
use quadriga::model::ModelConfig;
use quadriga::model::roles::{LayerRole, Role};
use quadriga::rng::Rng;

fn main() -> quadriga::Result<()> {
    let mut args = std::env::args().skip(1);
    let engine = Engine::open(args.next().unwrap_or("models/tiny-text".into()))?;
    let mut folders: Vec<PathBuf> = args.map(PathBuf::from).collect();
    let dir = tempfile::tempdir().map_err(|e| quadriga::Error::io("a temporary folder", e))?;
    if folders.is_empty() {
        folders = ["first", "second"].map(|name| dir.path().join(name)).into();
        for (seed, folder) in folders.iter().enumerate() {
            random(engine.config(), seed as u64, folder)?;
        }
    }

    // At most 256 MB of adapters on the device; those that were used last stay.
    let pool = engine.adapter_pool(PoolOptions::default().bytes(256 << 20))?;
    let names: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
    for (name, folder) in names.iter().zip(&folders) {
        pool.register(name, folder);
        pool.prefetch(name)?;
    }

    let mut serving = engine.serving(ServingOptions::default().sequences(4).context(256))?;
    let how = || Generate::default().max_tokens(24).stop(["\n"]);
    let mut titles = BTreeMap::<Request, String>::new();
    titles.insert(serving.submit_text("The", how(), 0)?, "the model alone".into());
    for name in &names {
        titles.insert(serving.submit_text("The", how().adapters(&pool.get(name)?), 0)?, name.clone());
    }
    if let [first, second, ..] = &names[..] {
        // Lower layers of one, upper layers of the other; and a sum.
        let layers = engine.config().layers;
        let both = pool.layers(&[(0..layers / 2, first), (layers / 2..layers, second)])?;
        titles.insert(serving.submit_text("The", how().adapters(&both), 0)?, "layers of two".into());
        let sum = pool.mix(&[(first, 0.5), (second, 0.5)])?;
        titles.insert(serving.submit_text("The", how().adapters(&sum), 0)?, "half of each".into());
    }

    let mut texts = BTreeMap::<Request, String>::new();
    while serving.pending() != (0, 0) {
        for reply in serving.step()? {
            let text = texts.entry(reply.request).or_default();
            reply.pieces.iter().for_each(|piece| *text += &piece.text);
        }
    }
    for (request, text) in texts {
        println!("{}: The{text}", titles[&request]);
    }
    for name in &names {
        println!("[{name}: {:?}]", pool.stats(name));
    }
    Ok(())
}

/// Writes an adapter of rank 4 with random values on q and v.
fn random(cfg: &ModelConfig, seed: u64, folder: &Path) -> quadriga::Result<()> {
    let mut rng = Rng::new(seed);
    let mut tensors = Vec::new();
    for layer in 0..cfg.layers {
        for module in [LayerRole::Q, LayerRole::V] {
            let [out, input] = Role::Layer(layer, module).shape(cfg).unwrap_or([0, 0]);
            let mut draw = |n: usize| (0..n).map(|_| 0.3 * rng.normal()).collect();
            tensors.push(PeftTensor { layer, module, rank: 4, alpha: 8.0, a: draw(4 * input), b: draw(out * 4) });
        }
    }
    PeftAdapter { rank: 4, alpha: 8.0, rank_stabilized: false, base_model: None, diffusion: None, tensors }
        .write(folder, cfg)
}
