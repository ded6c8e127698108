//! What a decoder of your own works with: stage a tree of tokens, read every row's logits, commit the path you like.
//! `cargo run --release --example tree -- MODEL`.

use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::backend::{Mask, TreeMask};
use quadriga::decode::sampler::argmax;
use quadriga::format::Checkpoint;
use quadriga::model::{KvCache, Model, Sequence, Want, Workspace};

fn main() -> quadriga::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "models/tiny-llama".into());
    let backend = Arc::new(Cpu::with(2, Tier::detect(), Compute::Fast));
    let model = Model::load(backend, &Checkpoint::open(path.as_ref())?, |_, _| {})?;
    let (be, cfg) = (model.backend(), model.config());
    let mut cache = KvCache::new(be, cfg, 64)?;
    let mut ws = Workspace::new(be, cfg, 16, 16)?;

    let prompt = [17, 4, 99];
    model.forward(&mut [Sequence::new(&mut cache, &prompt, Mask::Causal, Want::Last)], &mut ws)?;
    cache.commit_first(prompt.len())?;

    // Two guesses for the next token, and two guesses behind the first.
    let tree = TreeMask::new(&[TreeMask::ROOT, TreeMask::ROOT, 0, 0])?;
    let tokens = [5, 6, 7, 8];
    let seq = Sequence::new(&mut cache, &tokens, Mask::Tree(&tree), Want::All);
    let rows = model.forward(&mut [seq], &mut ws)?;
    let mut logits = vec![0.0; cfg.vocab];
    for (row, token) in tokens.iter().enumerate().take(rows) {
        ws.logits(be, row, &mut logits)?;
        println!("behind node {row} (token {token}): {}", argmax(&logits)?);
    }
    cache.commit(be, &[0, 3])?;
    println!("{} tokens committed", cache.len());
    Ok(())
}
