//! The four systems in one process: answers are drafted and verified (speculative decoding), a reward learns from the first comparison on
//! which of them is liked (the bandit), each user has a taste and an adapter of his own (continual learning), and a diffusion model infills.
//!
//! ```sh
//! cargo run --release --example align
//! ```

use std::path::Path;

use quadriga::decode::Sampler;
use quadriga::engine::align::{Aligner, Answering, Features, Item, RewardModel, RewardOptions};
use quadriga::engine::rlhf::Second;
use quadriga::engine::{DiffusionSettings, DraftKind, Engine, EngineOptions, Generate, Lora, PoolOptions, Speculation};
use quadriga::format::peft::{PeftAdapter, PeftTensor};
use quadriga::model::roles::Role;
use quadriga::rng::Rng;

fn main() -> quadriga::Result<()> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let engine = Engine::open_with(models.join("tiny-text"), EngineOptions::default())?;
    let folder = tempfile::tempdir().map_err(|e| quadriga::Error::io("a temporary folder", e))?;
    let pool = engine.adapter_pool(PoolOptions::default())?;
    let draft = engine.draft(&DraftKind::Lookup)?;
    let sampler = Sampler { temperature: 0.9, ..Sampler::greedy() };

    // Two users: one likes short answers, the other long ones. Each has an adapter (random here; `adapt` and `align improve` make real
    // ones) and a reward.
    for (user, likes_short) in [("ann", true), ("bo", false)] {
        pool.register(user, adapter(&engine, &folder.path().join(user), user.len() as u64)?);
        let adapters = pool.get(user)?;
        let how = Generate::default().speculative(sampler, &draft, Speculation::default()).max_tokens(24);
        let options = RewardOptions { warmup: 40, ..RewardOptions::default() };
        let features = Features::new(&engine, options.features, None)?;
        let reward = RewardModel::open(&engine, &folder.path().join(format!("{user}.safetensors")), Some(options))?;
        let answering = Answering { how: how.adapters(&adapters), each: 6, width: 6, seed: 1 };
        let mut aligner = Aligner { reward, features, answering, beta: 0.5, second: Second::Optimistic };
        let (mut asked, mut words) = (0, [0.0; 2]);
        let rounds = 40;
        for round in 0..rounds {
            let prompt = ["The king", "A ship", "In winter", "My brother"][round as usize % 4];
            let ids = engine.tokenizer()?.encode(prompt, true, true)?;
            let mut item = Item { prompt: prompt.into(), ids, ..Item::default() };
            let (shown, _) = aligner.ask(&mut item, round)?;
            let length = |i: usize| item.answers[i].text.split_whitespace().count() as f64;
            let y = shown.second.map(|second| {
                asked += 1;
                f64::from(u8::from((length(shown.first) < length(second)) == likes_short))
            });
            aligner.tell(&item, &shown, y)?;
            words[usize::from(round >= rounds / 2)] += length(shown.first) / (rounds / 2) as f64;
        }
        println!(
            "{user}: {asked} of {rounds} rounds asked; words of the answer shown {:.1}, then {:.1}; {:.0} % predicted",
            words[0],
            words[1],
            100.0 * aligner.reward.progress().accuracy()
        );
    }

    // And beside them a masked diffusion model.
    let masked = Engine::open_with(models.join("tiny-llada"), EngineOptions::default())?;
    let settings = DiffusionSettings { block: 8, ..masked.diffusion_settings() };
    let mut texts = [masked.blank(&[5, 9, 11], 16, settings)?];
    let outcome = masked.diffuse(&mut texts, &mut |_, _, _| Ok(()))?.remove(0);
    println!("diffusion: {} tokens in {} passes", outcome.text.len(), outcome.counts.passes);
    Ok(())
}

/// A small random adapter, written as files.
fn adapter(engine: &Engine, folder: &Path, seed: u64) -> quadriga::Result<std::path::PathBuf> {
    let (lora, mut rng) = (Lora { rank: 4, targets: vec!["q".into(), "v".into()], ..Lora::default() }, Rng::new(seed));
    let tensors = lora.modules(engine.config())?.into_iter().map(|spec| {
        let none = || quadriga::Error::new(quadriga::ErrorKind::Shape, "no such linear");
        let [out, input] = Role::Layer(spec.layer, spec.role).shape(engine.config()).ok_or_else(none)?;
        let mut draw = |n: usize| (0..n).map(|_| 0.05 * rng.normal()).collect::<Vec<f32>>();
        Ok(PeftTensor {
            layer: spec.layer,
            module: spec.role,
            rank: 4,
            alpha: 4.0,
            a: draw(4 * input),
            b: draw(out * 4),
        })
    });
    let tensors = tensors.collect::<quadriga::Result<Vec<_>>>()?;
    let all = PeftAdapter { rank: 4, alpha: 4.0, rank_stabilized: false, base_model: None, diffusion: None, tensors };
    all.write(folder, engine.config())?;
    Ok(folder.into())
}
