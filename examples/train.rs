//! Trains a LoRA adapter on a text file and shows what it changed.
//!
//! `cargo run --release --example train -- MODEL TEXT OUT`

use std::path::Path;

use quadriga::engine::{Device, Engine, EngineOptions, Generate, TrainRun};
use quadriga::train::run::Event;

fn main() -> quadriga::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, out] = &args[..] else {
        eprintln!("usage: train MODEL TEXT OUT");
        std::process::exit(2);
    };
    let settings = serde_json::json!({
        "method": {"lora": {"rank": 8}},
        "data": text,
        "reading": {"max_length": 128},
        "optimizer": {"lr": 0.003},
        "plan": {"steps": 20, "batch_tokens": 256},
    });
    let run: TrainRun = serde_json::from_value(settings).expect("the settings of a run");
    let options = || EngineOptions::default().device(Device::Cpu);
    run.start(Path::new(model), Path::new(out), false, options(), &mut |event| {
        if let Event::Step(step, total, report, _) = event {
            println!("step {step} of {total}: loss {:.4}", report.loss);
        }
    })?;
    for adapter in [None, Some(Path::new(out).join("adapter"))] {
        let options = match &adapter {
            Some(folder) => options().adapter(folder),
            None => options(),
        };
        let engine = Engine::open_with(model, options)?;
        let mut session = engine.session(64, 0)?;
        session.push_text("In the beginning")?;
        let pieces = session.generate(Generate::default().max_tokens(16))?;
        let text: String = pieces.map(|p| p.map(|p| p.text)).collect::<quadriga::Result<_>>()?;
        println!("{}: {text}", if adapter.is_some() { "trained" } else { "before" });
    }
    Ok(())
}
