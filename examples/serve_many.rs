//! Many requests in one batch, each with the text it would have alone:
//! `cargo run --release --example serve_many -- [MODEL] [REQUESTS]`.

use std::collections::BTreeMap;
use std::time::Instant;

use quadriga::decode::Sampler;
use quadriga::engine::{DraftKind, Engine, Generate, Request, ServingOptions, Speculation};

fn main() -> quadriga::Result<()> {
    let mut args = std::env::args().skip(1);
    let engine = Engine::open(args.next().unwrap_or("models/tiny-text".into()))?;
    let requests: u64 = args.next().and_then(|n| n.parse().ok()).unwrap_or(12);
    let draft = engine.draft(&DraftKind::Lookup)?;
    let mut serving = engine.serving(ServingOptions::default().sequences(4).context(256))?;

    let (mut texts, start) = (BTreeMap::<Request, String>::new(), Instant::now());
    let (mut sent, mut passes, mut tokens) = (0, 0, 0);
    while sent < requests || serving.pending() != (0, 0) {
        // One more comes every third pass; every other one speculates.
        if sent < requests && passes % 3 == 0 {
            let sampler = Sampler { temperature: 0.7, ..Sampler::greedy() };
            let how = match sent % 2 {
                0 => Generate::default().sampler(sampler),
                _ => Generate::default().speculative(sampler, &draft, Speculation::default().nodes(6)),
            };
            serving.submit_text("The", how.max_tokens(40).stop(["\n"]), sent)?;
            sent += 1;
        }
        for reply in serving.step()? {
            let text = texts.entry(reply.request).or_default();
            reply.pieces.iter().for_each(|piece| *text += &piece.text);
            if let Some(finish) = reply.finish {
                tokens += reply.stats.tokens;
                println!("{:>3} ({}): The{text}", reply.request.0, finish.name());
            }
        }
        passes += 1;
    }
    println!("[{tokens} tokens in {passes} passes, {:.2} s]", start.elapsed().as_secs_f64());
    Ok(())
}
