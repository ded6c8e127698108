//! The embedded API in a few lines: `cargo run --release --example generate -- MODEL [PROMPT]`.

use quadriga::decode::Sampler;
use quadriga::engine::{Engine, Generate};

fn main() -> quadriga::Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "models/tiny-llama".into());
    let prompt = args.next().unwrap_or_else(|| "Once upon a time".into());
    let engine = Engine::open(model)?;
    let mut session = engine.session(engine.config().context.min(512), 7)?;
    session.push_text(&prompt)?;
    print!("{prompt}");
    let how =
        Generate::default().sampler(Sampler { temperature: 0.8, top_p: 0.95, ..Sampler::greedy() }).max_tokens(48);
    for piece in session.generate(how)? {
        print!("{}", piece?.text);
    }
    println!();
    Ok(())
}
