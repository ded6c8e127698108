//! Text that a model writes itself: a batch gives what sessions of their own give, a file that was cut short goes on to the
//! same bytes, bad input names its line.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use quadriga::backend::cpu::{Compute, Cpu, Tier};
use quadriga::decode::{Autoregressive, Batch, Decoder, Prompt, Sampler, Session};
use quadriga::format::Checkpoint;
use quadriga::model::Model;
use quadriga::rng::Rng;
use serde_json::Value;

fn model(name: &str) -> PathBuf {
    common::root().join("models").join(name)
}

/// One session for each prompt, one token a step.
fn alone(model: &Arc<Model<Cpu>>, prompt: &Prompt, how: &Batch) -> Vec<u32> {
    let n = prompt.ids.len();
    let mut session = Session::new(model.clone(), n + how.max_tokens, how.seed).unwrap();
    session.stream = prompt.stream;
    session.push(&prompt.ids);
    let mut decoder = Autoregressive::new(prompt.sampler);
    loop {
        decoder.step(&mut session).unwrap();
        let made = &session.tokens()[n..];
        if made.len() == how.max_tokens || how.eos.contains(&made[made.len() - 1]) {
            return made.to_vec();
        }
    }
}

#[test]
fn a_batch_writes_what_sessions_write() {
    let checkpoint = Checkpoint::open(&model("tiny-llama")).unwrap();
    let cpu = Cpu::with(2, Tier::detect(), Compute::Fast);
    let model = Arc::new(Model::load(Arc::new(cpu), &checkpoint, |_, _| {}).unwrap());
    let mut rng = Rng::new(3);
    let hot = Sampler { temperature: 0.8, ..Sampler::greedy() };
    // Prompts of one token, and longer than a pass of prefill.
    let prompts: Vec<Prompt> = [1, 70, 9, 130, 2, 33, 64, 65, 5, 17, 1, 90]
        .into_iter()
        .enumerate()
        .map(|(i, n)| {
            let ids = (0..n).map(|_| rng.below(300) as u32).collect();
            Prompt { ids, sampler: if i % 3 == 1 { hot } else { Sampler::greedy() }, stream: 100 + i as u64 }
        })
        .collect();
    let mut how = Batch { width: 1, max_tokens: 24, eos: Vec::new(), seed: 5 };
    // Some token of a continuation ends it, and others.
    how.eos.push(alone(&model, &prompts[1], &how)[7]);
    let expected: Vec<_> = prompts.iter().map(|p| alone(&model, p, &how)).collect();
    assert!(expected.iter().any(|ids| ids.len() < 24) && expected.iter().any(|ids| ids.len() == 24));
    for width in [1, 5, 24] {
        let mut made = vec![None; prompts.len()];
        let stats = Batch { width, ..how.clone() }.run(&model, &prompts, &mut |i, ids| {
            assert!(made[i].replace(ids.to_vec()).is_none(), "prompt {i} ended twice");
            Ok(())
        });
        let made: Vec<_> = made.into_iter().map(Option::unwrap).collect();
        assert_eq!(made, expected, "{width} at a time");
        assert_eq!(stats.unwrap().tokens as usize, expected.iter().map(Vec::len).sum::<usize>());
    }
}

fn quadriga(prompts: &[&Path], out: &Path, more: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_quadriga"));
    c.args(["train", "draft", "--generate-only", "--json", "-t", "2", "--device", "cpu", "--max-tokens", "12", "-m"]);
    c.arg(model("tiny-text")).arg("--out").arg(out);
    prompts.iter().for_each(|p| {
        c.arg("--prompts").arg(p);
    });
    c.args(more).stdin(Stdio::null()).output().unwrap()
}

fn json(o: &Output) -> Value {
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    serde_json::from_slice(&o.stdout).unwrap()
}

fn refused(o: &Output, words: &[&str]) {
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(2), "{err}");
    words.iter().for_each(|w| assert!(err.contains(w), "{w:?} is not in {err:?}"));
}

/// A file of each form of row, one of them packed.
fn prompts(dir: &Path) -> [PathBuf; 2] {
    let (plain, packed) = (dir.join("mine.jsonl"), dir.join("sums.jsonl.gz"));
    let rows: Vec<String> = (0..9)
        .map(|i| match i % 3 {
            0 => format!("{{\"prompt\": \"Tell me about the number {i}.\", \"kind\": \"facts\"}}\n"),
            1 => format!("{{\"prompt\": \"There once were {i} foxes\", \"raw\": true}}\n"),
            _ => format!("{{\"turns\": [\"Name {i} birds.\", \"And more.\"]}}\n"),
        })
        .collect();
    std::fs::write(&plain, rows.concat()).unwrap();
    let mut gz = flate2::write::GzEncoder::new(std::fs::File::create(&packed).unwrap(), flate2::Compression::fast());
    for i in 0..8 {
        std::io::Write::write_all(&mut gz, format!("{{\"question\": \"What is {i} plus {i}?\"}}\n").as_bytes())
            .unwrap();
    }
    gz.finish().unwrap();
    [plain, packed]
}

#[test]
fn a_file_cut_short_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let files = prompts(dir.path());
    let files = [files[0].as_path(), files[1].as_path()];
    let run = |out: &str, more: &[&str]| quadriga(&files, &dir.path().join(out), more);
    let read = |out: &str| std::fs::read(dir.path().join(out).join("gen.jsonl")).unwrap();
    let result = json(&run("whole", &["--batch", "5"]));
    assert_eq!((&result["rows"], &result["resumed"]), (&17.into(), &0.into()));
    let whole = read("whole");

    json(&run("single", &["--batch", "1"]));
    assert_eq!(read("single"), whole, "one prompt at a time");
    json(&run("greedy", &["--sampled-share", "0"]));
    let (greedy, sampled) = (read("greedy"), read("whole"));
    let differ = greedy.split(|b| *b == b'\n').zip(sampled.split(|b| *b == b'\n')).filter(|(a, b)| a != b).count();
    assert!((1..12).contains(&differ), "{differ} of 17 rows are drawn");

    // Killed before the first row, in the middle of a row, between rows, in the last one.
    let cut = dir.path().join("single/gen.jsonl");
    let second = whole.iter().position(|b| *b == b'\n').unwrap() + 1;
    for len in [0, second / 2, second, second + 9, whole.len() / 2, whole.len() - 1, whole.len()] {
        std::fs::write(&cut, &whole[..len]).unwrap();
        let result = json(&run("single", &["--batch", "4", "--resume"]));
        let kept = whole[..len].iter().filter(|b| **b == b'\n').count();
        assert_eq!((&result["rows"], &result["resumed"]), (&17.into(), &kept.into()));
        assert!(read("single") == whole, "cut to {len} bytes");
    }

    // Rows are what `generate` says.
    let rows: Vec<Value> = greedy.split(|b| *b == b'\n').filter_map(|l| serde_json::from_slice(l).ok()).collect();
    let kinds = |k: &str| rows.iter().filter(|r| r["kind"] == k).count();
    assert_eq!((kinds("facts"), kinds("mine"), kinds("sums")), (3, 6, 8));
    for prompt in [&["What is 3 plus 3?"][..], &["There once were 4 foxes", "--raw"]] {
        let mut c = Command::new(env!("CARGO_BIN_EXE_quadriga"));
        c.args(["generate", "--json", "--max-tokens", "12", "--device", "cpu", "-m"])
            .arg(model("tiny-text"))
            .args(prompt);
        let said = json(&c.output().unwrap());
        let row = rows.iter().find(|r| r["prompt_ids"] == said["prompt_ids"]).unwrap();
        assert_eq!(row["ids"], said["ids"], "{prompt:?}");
    }
}

#[test]
fn mistakes_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let [file, _] = prompts(dir.path());
    let out = dir.path().join("out");
    let run = |file: &Path, more: &[&str]| quadriga(&[file], &out, more);
    json(&run(&file, &[]));
    refused(&run(&file, &[]), &["gen.jsonl", "--resume"]);
    refused(&run(&file, &["--resume", "--seed", "1"]), &["gen.json", "seed 0, not 1"]);
    refused(&run(&file, &["--resume", "--temperature", "0.5"]), &["temperature 0.8"]);
    refused(&run(&file, &["--resume", "--limit", "4"]), &["rows 9, not 4"]);
    let written = std::fs::read_to_string(out.join("gen.jsonl")).unwrap();
    std::fs::write(out.join("gen.jsonl"), written.replacen("\"n\":3", "\"n\":4", 1)).unwrap();
    refused(&run(&file, &["--resume"]), &["gen.jsonl, line 4"]);

    std::fs::remove_dir_all(&out).unwrap();
    refused(&run(&file, &["--sampled-share", "2"]), &["--sampled-share"]);
    refused(&run(&file, &["--temperature", "-1"]), &["--temperature"]);
    refused(&run(&file, &["--batch", "0"]), &["--batch 0"]);
    for (row, what) in
        [("{\"answer\": 1}", "no text"), ("nonsense", "expected"), ("{\"prompt\": \"\", \"raw\": true}", "empty")]
    {
        let bad = dir.path().join("bad.jsonl");
        std::fs::write(&bad, format!("{{\"prompt\": \"good\"}}\n{row}\n")).unwrap();
        refused(&run(&bad, &[]), &["bad.jsonl, line 2", what]);
    }
    let long = dir.path().join("long.jsonl");
    std::fs::write(&long, format!("{{\"prompt\": \"{}\"}}\n", "far ".repeat(2000))).unwrap();
    refused(&run(&long, &[]), &["long.jsonl, line 1", "context"]);
}
