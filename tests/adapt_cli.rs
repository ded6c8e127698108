//! A stream of tasks from the command line: what it leaves on disk, a killed run, and what is refused.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quadriga")).args(["--device", "cpu"]).args(args).output().unwrap()
}

fn ok(args: &[&str]) -> Value {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
}

fn refused(args: &[&str]) -> String {
    let out = run(args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
    said
}

/// A task whose prompts begin with its name; the last letter says the label.
fn task(dir: &Path, name: &str, labels: [&str; 2]) -> String {
    let mut text = format!("{{\"task\": \"{name}\", \"labels\": {labels:?}}}\n");
    for (split, n) in [("train", 12), ("test", 6)] {
        for i in 0..n {
            let (mark, label) = (["x", "y"][i % 2], labels[i % 2]);
            text += &format!("{{\"split\": \"{split}\", \"input\": \"{name} {i} {mark}\", \"label\": \"{label}\"}}\n");
        }
    }
    let path = dir.join(format!("{name}.jsonl"));
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn tiny() -> String {
    common::root().join("models/tiny-llama").to_str().unwrap().to_owned()
}

#[test]
fn a_stream_leaves_adapters_scores_and_a_tree() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (a, b) = (task(dir.path(), "first", ["up", "down"]), task(dir.path(), "second", ["one", "two"]));
    let m = tiny();
    let base = ["adapt", "-m", &m, &a, &b, "--epochs", "2", "--batch", "4", "--top-layers", "1", "--json"];
    let with = |tail: &[&str]| ok(&base.iter().chain(tail).copied().collect::<Vec<_>>());
    let v = with(&["--out", &at("tree"), "--share", "0"]);
    assert_eq!((v["adapters"].as_u64(), v["steps"].as_u64()), (Some(2), Some(12)));
    assert_eq!(v["scores"][1].as_array().unwrap().len(), 2);
    for file in ["run.json", "stream.json", "scores.csv", "scores.svg", "tree.svg", "tree.txt", "router.json"] {
        assert!(dir.path().join("tree").join(file).is_file(), "{file}");
    }
    let csv = fs::read_to_string(dir.path().join("tree/scores.csv")).unwrap();
    assert!(csv.starts_with("after,first,second\nfirst,") && csv.lines().count() == 3, "{csv}");
    // Adapters are PEFT folders like any other.
    let adapter = at("tree/adapters/second");
    let v = ok(&["eval", "accuracy", &b, "-m", &m, "--adapter", &adapter, "--split", "test", "--json"]);
    assert_eq!(v["tasks"].as_u64(), Some(6));

    // Prompts find their adapter.
    let run_folder = at("tree");
    for (prompt, task) in [("first 77 x\n", "first"), ("second 77 y\n", "second")] {
        let how = ["generate", "-m", &m, "--raw", prompt, "-n", "4", "--json", "--compute", "exact", "--adapter"];
        let routed = ok(&[&how[..], &[&run_folder]].concat());
        assert_eq!(routed["routed"]["task"].as_str(), Some(task), "{prompt}");
        // Beside the weights or in them: the same tokens.
        let merged = ok(&[&how[..], &[&format!("{run_folder}/adapters/{task}")]].concat());
        assert_eq!(routed["ids"], merged["ids"]);
    }
    let said = refused(&["eval", "ppl", &b, "-m", &m, "--adapter", &run_folder]);
    assert!(said.contains("only generate routes"), "{said}");
    let other = common::root().join("models/tiny-qwen2");
    let said = refused(&["generate", "-m", other.to_str().unwrap(), "--raw", "a", "--adapter", &run_folder]);
    assert!(said.contains("router.json"), "{said}");

    let v = with(&["--out", &at("olora"), "--method", "olora", "--rank", "2"]);
    let config = fs::read_to_string(dir.path().join("olora/adapter/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    // Two tasks of rank 2 each, with the factor of one.
    assert_eq!((config["r"].as_u64(), config["lora_alpha"].as_f64()), (Some(4), Some(64.0)));
    assert!(v["reports"][1]["penalty"].as_f64().unwrap() > 0.0);

    // A finished run is not overwritten, and its settings can be used again.
    assert!(refused(&[&base[..], &["--out", &at("tree")]].concat()).contains("--resume"));
    let again = ok(&["adapt", "-m", &m, "--config", &at("tree/run.json"), "--out", &at("again"), "--json"]);
    let first: Value = serde_json::from_slice(&fs::read(dir.path().join("tree/stream.json")).unwrap()).unwrap();
    assert_eq!((&again["scores"], &again["reports"]), (&first["scores"], &first["reports"]));
}

#[test]
fn a_killed_stream_goes_on_to_the_same_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (a, b, m) = (task(dir.path(), "first", ["up", "down"]), task(dir.path(), "second", ["one", "two"]), tiny());
    let args = |out: &str, more: &[&str]| -> Vec<String> {
        let mut v: Vec<String> =
            ["--device", "cpu", "adapt", "-m", &m, &a, &b, "--epochs", "40", "--batch", "2"].map(String::from).into();
        v.extend(["--save-every", "3", "--share", "0", "--json", "--out", out].map(String::from));
        v.extend(more.iter().map(|s| s.to_string()));
        v
    };
    let binary = || Command::new(env!("CARGO_BIN_EXE_quadriga"));
    assert!(binary().args(args(&at("whole"), &[])).output().unwrap().status.success());
    let mut child =
        binary().args(args(&at("killed"), &[])).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Killed as soon as there is anything to go on from.
    let (began, checkpoints) = (Instant::now(), dir.path().join("killed/checkpoints"));
    while !checkpoints.is_dir() && child.try_wait().unwrap().is_none() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    let ended = child.wait().unwrap();
    assert!(checkpoints.is_dir() && ended.code().is_none(), "it ended before it could be killed: {ended}");
    let out = binary().args(args(&at("killed"), &["--resume"])).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    for task in ["first", "second"] {
        let file = format!("adapters/{task}/adapter_model.safetensors");
        let read = |run: &str| fs::read(dir.path().join(run).join(&file)).unwrap();
        assert!(read("whole") == read("killed"), "{task}");
    }
    let rows = |run: &str| fs::read_to_string(dir.path().join(run).join("scores.csv")).unwrap();
    assert_eq!(rows("whole"), rows("killed"));
    // Other settings do not go on with it.
    let said =
        refused(&args(&at("killed"), &["--resume", "--lr", "0.5"])[2..].iter().map(String::as_str).collect::<Vec<_>>());
    assert!(said.contains("other settings"), "{said}");
    // Nor do other examples; and a refused run leaves the settings of the first as they were.
    let run = |name: &str| fs::read_to_string(dir.path().join(name).join("run.json")).unwrap();
    assert_eq!(run("killed"), run("whole"));
    task(dir.path(), "second", ["two", "one"]);
    let again = args(&at("killed"), &["--resume"]);
    let said = refused(&again[2..].iter().map(String::as_str).collect::<Vec<_>>());
    assert!(said.contains("other examples"), "{said}");
}

#[test]
fn bad_input_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (good, m, out) = (task(dir.path(), "good", ["up", "down"]), tiny(), at("out"));
    let write = |name: &str, text: &str| {
        fs::write(dir.path().join(name), text).unwrap();
        at(name)
    };
    let bad = |args: &[&str]| refused(&[&["adapt", "-m", &m, "--out", &out][..], args].concat());
    let row =
        |split: &str, label: &str| format!("{{\"split\": \"{split}\", \"input\": \"a\", \"label\": \"{label}\"}}\n");

    let twins = ["a b", "a/b"].map(|name| {
        let path = dir.path().join(format!("{}.jsonl", name.len() + usize::from(name.contains('/'))));
        let text = fs::read_to_string(&good).unwrap().replace("\"good\"", &format!("{name:?}"));
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    });
    // Names that are no names of files are adapters of their own even so.
    let to = at("twins");
    let how = ["adapt", "-m", &m, "--out", &to, "--epochs", "1", "--method", "isolated", "--json"];
    ok(&[&how[..], &[&twins[0], &twins[1]]].concat());
    assert_eq!(fs::read_dir(dir.path().join("twins/adapters")).unwrap().count(), 2);

    let unseen = write("unseen.jsonl", &(row("train", "up") + &row("test", "sideways")));
    let said = bad(&[&unseen]);
    assert!(said.contains("unseen.jsonl, line 2") && said.contains("sideways"), "{said}");
    let empty = write("empty.jsonl", "");
    assert!(bad(&[&good, &empty]).contains("empty.jsonl: the task empty has no training row"));
    let untested = write("untested.jsonl", &row("train", "up"));
    assert!(bad(&[&untested]).contains("no test row"));
    let split = write("split.jsonl", &row("dev", "up"));
    assert!(bad(&[&split]).contains("neither train nor test"));
    let broken = write("broken.jsonl", "{\"split\": \"train\", \"input\n");
    assert!(bad(&[&broken]).contains("broken.jsonl, line 1"));
    assert!(bad(&[&good, &good]).contains("two tasks of the stream are called good"));
    assert!(bad(&[&at("missing.jsonl")]).contains("missing.jsonl"));
    assert!(bad(&[&good, "--method", "magic"]).contains("--method magic"));
    assert!(bad(&[&good, "--method", "ewc", "--share", "0.5"]).contains("--share does not belong"));
    assert!(bad(&[&good, "--share", "3"]).contains("share = 3"));
    assert!(bad(&[&good, "--max-length", "3"]).contains("a prompt of"));
    assert!(bad(&[&good, "--targets", "nose"]).contains("nose"));
    assert!(bad(&[&good, "--method", "inflora", "--targets", "down"]).contains("q, k and v"));
    assert!(!dir.path().join("out/adapters").exists());
}
