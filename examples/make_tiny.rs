//! Trains the language model of `models/tiny-text` from nothing: byte-level BPE and weights, on a text file.
//!
//! `cargo run --release --example make_tiny -- CORPUS OUT [STEPS]`, in the repository's root; models/README.md says which
//! corpus. OUT/model is the result, in F16. The bits depend on the corpus and on the CPU's instructions, not on its threads.

#[path = "from_nothing/mod.rs"]
mod from_nothing;

use std::fs;
use std::path::Path;

use from_nothing::{Shape, begin, halve};
use quadriga::Result;
use quadriga::engine::{Device, EngineOptions, TrainRun};
use quadriga::files::write_file;
use quadriga::train::run::Event;
use serde_json::json;

const SHAPE: Shape =
    Shape { vocab: 1024, hidden: 128, layers: 4, heads: 4, kv_heads: 2, ffn: 320, context: 1024, bos: 1, eos: 2 };

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (corpus, out, steps) = match &args[..] {
        [corpus, out] => (corpus, out, 1200),
        [corpus, out, steps] if steps.parse::<u64>().is_ok() => (corpus, out, steps.parse().unwrap_or(0)),
        _ => {
            eprintln!("usage: make_tiny CORPUS OUT [STEPS]");
            std::process::exit(2);
        }
    };
    if let Err(e) = make(Path::new(corpus), Path::new(out), steps) {
        eprintln!("error: {e}");
        std::process::exit(2);
    }
}

fn make(corpus: &Path, out: &Path, steps: u64) -> Result<()> {
    let io = |path: &Path| {
        let name = path.display().to_string();
        move |e| quadriga::Error::io(name, e)
    };
    fs::create_dir_all(out).map_err(io(out))?;
    let text = fs::read_to_string(corpus).map_err(io(corpus))?;
    // The end of the text is held out.
    let cut = (text.len() - text.len() / 200..).find(|&i| text.is_char_boundary(i)).unwrap_or(text.len());
    let (train, held_out) = (out.join("train.txt"), out.join("held_out.txt"));
    write_file(&train, |to| to.write_all(&text.as_bytes()[..cut]))?;
    write_file(&held_out, |to| to.write_all(&text.as_bytes()[cut..]))?;

    let init = out.join("init");
    begin(&train, &init, &SHAPE, &["<|endoftext|>", "<|im_start|>", "<|im_end|>"], true)?;
    let run = json!({
        "method": "full", "data": train, "held_out": held_out,
        "reading": {"max_length": 256},
        "optimizer": {
            "lr": 3e-3, "weight_decay": 0.01,
            "schedule": {"kind": "cosine", "warmup": 50, "total": 0, "floor": 0.05},
        },
        "plan": {"steps": steps, "batch_tokens": 4096, "save_every": 100, "seed": 1},
    });
    let run: TrainRun = serde_json::from_value(run).expect("the settings of a run");
    let options = EngineOptions::default().device(Device::Cpu);
    let outcome = run.start(&init, &out.join("run"), true, options, &mut |event| match event {
        Event::Step(step, total, report, seconds) if step % 20 == 0 => {
            eprintln!("step {step} of {total}: loss {:.4}, {:.0} tok/s", report.loss, report.tokens as f64 / seconds);
        }
        Event::HeldOut(step, loss) => eprintln!("step {step}: held-out loss {loss:.4}"),
        _ => {}
    })?;
    halve(&out.join("run/model"), &out.join("model"))?;
    println!("{}: held-out loss {:?}", out.join("model").display(), outcome.held_out);
    Ok(())
}
