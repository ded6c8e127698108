//! Training runs from files to files: a run that is killed and goes on ends with the same bits, bad data names its
//! line, a run that diverges keeps its last good checkpoint, results are read back.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn model(name: &str) -> PathBuf {
    common::root().join("models").join(name)
}

fn quadriga(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_quadriga"));
    c.args(args).args(["--device", "cpu", "-t", "2"]).stdin(Stdio::null());
    c
}

fn text(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// Sentences that a small model can learn.
fn data(dir: &Path) -> PathBuf {
    let path = dir.join("data.jsonl");
    let animals = ["cat", "dog", "owl", "fox", "bee"];
    let rows: Vec<String> = (0..60)
        .map(|i| {
            let (a, n) = (animals[i % 5], i % 7);
            format!("{{\"prompt\": \"How many legs have {n} of {a}? \", \"completion\": \"The {a} counts {n}.\"}}\n")
        })
        .collect();
    std::fs::write(&path, rows.concat()).unwrap();
    path
}

fn run(args: &[&str]) -> Output {
    quadriga(args).output().unwrap()
}

fn json(o: &Output) -> Value {
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    serde_json::from_slice(&o.stdout).unwrap()
}

fn refused(o: &Output, words: &[&str]) {
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(2), "{err}");
    let line = err.lines().find(|l| l.starts_with("error: ")).unwrap_or_else(|| panic!("no error: {err}"));
    words.iter().for_each(|w| assert!(line.contains(w), "{w:?} is not in {line:?}"));
}

fn bytes(p: &Path) -> Vec<u8> {
    std::fs::read(p).unwrap_or_else(|e| panic!("{}: {e}", p.display()))
}

/// Runs the command, kills it at some moment, again and again, each time later, until it comes to its end.
fn run_and_kill(list: &[&str]) {
    let (mut kills, start) = (0, Instant::now());
    loop {
        let mut child = quadriga(list).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // Longer each time, so that it comes to an end.
        let until = Instant::now() + Duration::from_millis(150 + 60 * kills);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if Instant::now() > until {
                break None;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        match status {
            Some(s) => {
                assert!(s.success());
                break;
            }
            None => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(300), "no end after {kills} kills");
    }
    println!("killed {kills} times");
    assert!(kills > 0, "it was done before it could be killed");
}

/// Killed at some moment, again and again, and resumed each time: the adapter and the curve are those of a run in one piece.
#[test]
fn a_killed_run_ends_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (data, tiny) = (data(dir.path()), model("tiny-llama"));
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let args = |out| {
        let list = ["-m", text(&tiny), "train", "lora", "--data", text(&data), "--held-out", text(&data), "--out", out];
        let more = ["--steps", "60", "--batch-tokens", "256", "--accumulate", "2", "--lr", "0.01", "--save-every", "3"];
        let rest = ["--eval-every", "20", "--schedule", "cosine", "--warmup", "5", "--seed", "9", "--resume", "--json"];
        [&list[..], &more, &rest].concat()
    };
    let result = json(&run(&args(text(&whole))));
    let (before, after) = (result["held_out_before"].as_f64().unwrap(), result["held_out_after"].as_f64().unwrap());
    assert!(after < 0.5 * before, "the loss went from {before} to {after}");
    run_and_kill(&args(text(&broken)));
    for file in ["adapter/adapter_model.safetensors", "loss.csv"] {
        assert!(bytes(&whole.join(file)) == bytes(&broken.join(file)), "{file} differs after kills");
    }
}

/// Answers to the questions of [`data`], of which those that count are liked better, and others of the same kind that are not learnt from.
fn preferences(dir: &Path) -> [PathBuf; 2] {
    let animals = ["cat", "dog", "owl", "fox", "bee"];
    let row = |i: usize| {
        let (a, n) = (animals[i % 5], i % 7);
        serde_json::json!({
            "prompt": format!("How many legs have {n} of {a}?"),
            "chosen": format!("The {a} counts {n}."),
            "rejected": format!("I do not know the {a}."),
        })
    };
    let write = |name: &str, rows: std::ops::Range<usize>| {
        let path = dir.join(name);
        std::fs::write(&path, rows.map(|i| format!("{}\n", row(i))).collect::<String>()).unwrap();
        path
    };
    [write("pairs.jsonl", 0..24), write("dev.jsonl", 24..35)]
}

#[test]
fn preferences_are_learnt_and_a_killed_run_ends_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let ([pairs, dev], tiny) = (preferences(dir.path()), model("tiny-llama"));
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let args = |out| {
        let list = ["-m", text(&tiny), "train", "dpo", "--data", text(&pairs), "--held-out", text(&dev), "--out", out];
        let more =
            ["--steps", "40", "--batch-tokens", "512", "--accumulate", "2", "--lr", "0.005", "--save-every", "3"];
        let rest = ["--eval-every", "15", "--top-layers", "2", "--beta", "0.2", "--seed", "9", "--resume", "--json"];
        [&list[..], &more, &rest].concat()
    };
    let result = json(&run(&args(text(&whole))));
    let number = |v: &Value| v.as_f64().unwrap_or_else(|| panic!("{result}"));
    let (before, after, held_out) = (&result["held_out_before"], &result["held_out_after"], &result["held_out"]);
    assert!((number(before) - std::f64::consts::LN_2).abs() < 1e-6 && number(after) < 0.35, "{result}");
    assert_eq!((&held_out["loss"], &held_out["pairs"], &held_out["accuracy"]), (after, &11.into(), &1.0.into()));
    let (chosen, rejected) = (number(&held_out["log_ratio_chosen"]), number(&held_out["log_ratio_rejected"]));
    assert!((number(&held_out["margin"]) - 0.2 * (chosen - rejected)).abs() < 1e-9 && chosen > rejected + 1.0);
    assert!((number(&held_out["kl"]) + (chosen + rejected) / 2.0).abs() < 1e-9);

    run_and_kill(&args(text(&broken)));
    let weights = "adapter/adapter_model.safetensors";
    for file in [weights, "loss.csv"] {
        assert!(bytes(&whole.join(file)) == bytes(&broken.join(file)), "{file} differs after kills");
    }
    // A run that is over says what it said, and its settings make the same run.
    let over = json(&run(&args(text(&broken))));
    assert_eq!((&over["held_out"], &over["loss"]), (held_out, &result["loss"]));
    let again = dir.path().join("again");
    let config = whole.join("run.json");
    json(&run(&["-m", text(&tiny), "train", "dpo", "--config", text(&config), "--out", text(&again), "--json"]));
    assert!(bytes(&whole.join(weights)) == bytes(&again.join(weights)));

    let adapter = whole.join("adapter");
    let said = ["-m", text(&tiny), "generate", "How many legs have 3 of fox?", "-n", "12", "--json"];
    let (plain, learnt) = (json(&run(&said)), json(&run(&[&said[..], &["--adapter", text(&adapter)]].concat())));
    assert_ne!(plain["ids"], learnt["ids"]);
    assert!(whole.join("loss.svg").is_file());
}

#[test]
fn bad_preferences_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let ([good, dev], tiny, out) = (preferences(dir.path()), model("tiny-llama"), dir.path().join("out"));
    let base = ["-m", text(&tiny), "train", "dpo", "--out", text(&out), "--data"];
    let refuse = |data: &str, more: &[&str], words: &[&str]| {
        refused(&run(&[&base[..], &[data], more].concat()), words);
        assert!(!out.exists(), "{words:?}: something was written");
    };
    let row = "{\"prompt\": \"p\", \"chosen\": \"one\", \"rejected\": \"two\"}\n";
    let bad = |second: &str, words: &[&str]| {
        let path = dir.path().join("bad.jsonl");
        std::fs::write(&path, format!("{row}{second}\n{row}")).unwrap();
        refuse(text(&path), &[], &[&["bad.jsonl", "line 2"], words].concat());
        refuse(text(&good), &["--held-out", text(&path)], &[&["bad.jsonl", "line 2"], words].concat());
    };
    bad("{\"prompt\": \"p\", \"chosen\": \"one\"}", &["\"rejected\" is missing"]);
    bad("{\"chosen\": \"one\", \"rejected\": \"two\"}", &["\"prompt\" is missing"]);
    bad("{\"prompt\": 1, \"chosen\": \"one\", \"rejected\": \"two\"}", &["\"prompt\"", "a number"]);
    bad("{\"prompt\": \"p\", \"chosen\": \" \", \"rejected\": \"two\"}", &["\"chosen\" is empty"]);
    bad("{\"prompt\": \"p\", \"chosen\": \"one\", \"rejected\": \"\"}", &["\"rejected\" is empty"]);
    bad("{\"prompt\": \"p\", \"chosen\": \"one\", \"rejected\": \"one\"}", &["are the same"]);
    bad("{\"prompt\": \"p\"", &["not JSON"]);
    bad("", &["blank"]);
    refuse(text(&good), &["--max-length", "12"], &["pairs.jsonl", "line 1", "--long-rows"]);
    refuse(text(&good), &["--max-length", "12", "--long-rows", "skip"], &["pairs.jsonl", "no row"]);
    refuse("notes.txt", &[], &["notes.txt", ".jsonl"]);
    refuse(text(&dir.path().join("none.jsonl")), &[], &["none.jsonl"]);
    refuse(text(&good), &["--beta", "0"], &["beta = 0"]);
    refuse(text(&good), &["--rank", "0"], &["rank 0"]);
    refuse(text(&good), &["--adapter", "somewhere"], &["--adapter"]);
    let config = dir.path().join("run.json");
    std::fs::write(&config, "{\"data\": \"x\", \"raw\": true}").unwrap();
    refuse(text(&good), &["--config", text(&config), "--chat"], &["raw", "chat"]);
    std::fs::write(&config, "{\"data\": \"x\", \"method\": \"full\"}").unwrap();
    refuse(text(&good), &["--config", text(&config)], &["run.json", "method"]);
    // A run goes on with the settings that it had.
    let args = [&base[..], &[text(&good), "--steps", "2", "--held-out", text(&dev)]].concat();
    json(&run(&[&args[..], &["--json"]].concat()));
    refused(&run(&args), &["--resume"]);
    refused(&run(&[&args[..], &["--resume", "--beta", "0.3"]].concat()), &["other settings"]);
}

#[test]
fn bad_data_and_bad_settings_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (good, tiny) = (data(dir.path()), model("tiny-llama"));
    let out = dir.path().join("out");
    let base = ["-m", text(&tiny), "train", "lora", "--out", text(&out), "--data"];
    let refuse = |data: &str, more: &[&str], words: &[&str]| {
        let args: Vec<&str> = base.iter().copied().chain([data]).chain(more.iter().copied()).collect();
        refused(&run(&args), words);
        assert!(!out.exists(), "{words:?}: something was written");
    };
    let write = |name: &str, content: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let row = "{\"text\": \"one two three four five six seven eight nine ten\"}\n";
    let bad = write("empty.jsonl", &format!("{row}\n{row}"));
    refuse(text(&bad), &[], &["empty.jsonl", "line 2"]);
    let bad = write("broken.jsonl", &format!("{row}{{\"text\": \n"));
    refuse(text(&bad), &[], &["broken.jsonl", "line 2", "JSON"]);
    let bad = write("long.jsonl", row);
    refuse(text(&bad), &["--max-length", "4"], &["long.jsonl", "line 1", "--long-rows"]);
    refuse(text(&dir.path().join("none.jsonl")), &[], &["none.jsonl"]);
    refuse(text(&good), &["--rank", "0"], &["rank 0"]);
    refuse(text(&good), &["--adapter", "somewhere"], &["--adapter"]);
    refuse(text(&good), &["--long-rows", "cut"], &["--long-rows cut", "truncate"]);
    refuse(text(&good), &["--targets", "q,head"], &["head", "gate"]);
    refuse(text(&good), &["--lr", "-1"], &["lr", "-1"]);
    refuse(text(&good), &["--optimizer", "adagrad"], &["--optimizer adagrad"]);
    refuse(text(&good), &["--recompute", "all"], &["--recompute all"]);
    refuse(text(&good), &["--accumulate", "0"], &["step of 0"]);
    refuse(text(&good), &["--schedule", "cosine", "--warmup", "5", "--steps", "5"], &["warm-up"]);
    let config = write("run.json", "{\"method\": \"full\", \"data\": \"x\", \"speed\": 9}");
    refuse(text(&good), &["--config", text(&config)], &["run.json", "speed"]);
    let gguf = model("tiny-gguf/k.gguf");
    refused(&run(&["-m", text(&gguf), "train", "full", "--data", text(&good), "--out", text(&out)]), &["Hugging Face"]);
}

/// A learning rate beyond all measure: the run stops, says why, and its last good checkpoint can be gone on from.
#[test]
fn a_diverging_run_stops_with_its_last_good_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (data, tiny, out) = (data(dir.path()), model("tiny-llama"), dir.path().join("out"));
    let args = ["-m", text(&tiny), "train", "full", "--data", text(&data), "--out", text(&out), "--optimizer", "sgd"];
    let wild = ["--lr", "1e20", "--clip", "0", "--steps", "50", "--save-every", "1"];
    let o = run(&[&args[..], &wild[..]].concat());
    refused(&o, &["loss is", "lower the learning rate", "checkpoint"]);
    let steps: Vec<_> = std::fs::read_dir(out.join("checkpoints")).unwrap().collect();
    assert!(!steps.is_empty());
    assert!(!out.join("model").exists());
    let newest = quadriga::train::Checkpoint::latest(&out.join("checkpoints")).unwrap().unwrap();
    let state = quadriga::train::Checkpoint::load(&newest).unwrap();
    assert!(state.step > 0 && state.tensors.iter().all(|t| t.2.iter().all(|x| x.is_finite())));
}

/// What was trained is a model like any other: it generates, an adapter merges into it, and its accuracy is measured.
#[test]
fn results_are_used_by_the_other_verbs() {
    let dir = tempfile::tempdir().unwrap();
    let (data, tiny, out) = (data(dir.path()), model("tiny-qwen3"), dir.path().join("out"));
    let common = ["--data", text(&data), "--out", text(&out), "--steps", "40", "--lr", "0.01", "--json"];
    let trained = json(&run(&[&["-m", text(&tiny), "train", "lora"][..], &common[..]].concat()));
    assert_eq!(trained["steps"], 40);
    for file in ["run.json", "loss.csv", "loss.svg", "adapter/adapter_config.json"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    // The settings that it wrote make the same run.
    let again = dir.path().join("again");
    let config = out.join("run.json");
    let args = ["-m", text(&tiny), "train", "lora", "--config", text(&config), "--out", text(&again), "--json"];
    json(&run(&args));
    let weights = "adapter/adapter_model.safetensors";
    assert!(bytes(&out.join(weights)) == bytes(&again.join(weights)));

    let adapter = out.join("adapter");
    let prompt = ["generate", "--raw", "How many legs have 3 of fox? ", "-n", "12", "--json"];
    let plain = json(&run(&[&["-m", text(&tiny)][..], &prompt[..]].concat()));
    let adapted = json(&run(&[&["-m", text(&tiny), "--adapter", text(&adapter)][..], &prompt[..]].concat()));
    assert_ne!(plain["ids"], adapted["ids"]);
    assert!(adapted["text"].as_str().unwrap().starts_with("The fox"), "{}", adapted["text"]);

    let tasks = dir.path().join("tasks.jsonl");
    let mut rows =
        "{\"task\": \"legs\", \"labels\": [\"The fox counts 3.\", \"The owl counts 3.\", \"No.\"]}\n".to_owned();
    rows += "{\"split\": \"test\", \"input\": \"How many legs have 3 of fox? \", \"label\": \"The fox counts 3.\"}\n";
    std::fs::write(&tasks, rows).unwrap();
    let eval = ["-m", text(&tiny), "--adapter", text(&adapter), "eval", "accuracy", text(&tasks), "--json"];
    let eval = json(&run(&eval));
    assert_eq!((&eval["tasks"], &eval["right"]), (&1.into(), &1.into()), "{eval}");

    let full = dir.path().join("full");
    let common = ["--data", text(&data), "--out", text(&full), "--steps", "20", "--lr", "0.003", "--json"];
    json(&run(&[&["-m", text(&tiny), "train", "full"][..], &common[..]].concat()));
    let new = full.join("model");
    let spoken = json(&run(&[&["-m", text(&new)][..], &prompt[..]].concat()));
    assert!(spoken["text"].as_str().unwrap().starts_with("The "), "{}", spoken["text"]);
}
