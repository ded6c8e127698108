//! Through the binary.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::folder;

fn quadriga(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quadriga"))
        .args(["-m", "tiny-llama", "--device", "cpu", "-t", "2"])
        .args(args)
        .current_dir(folder(""))
        .env("QUADRIGA_MODELS", folder("nowhere"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn json(args: &[&str]) -> Value {
    let out = quadriga(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[track_caller]
fn refused(args: &[&str], words: &[&str]) {
    let out = quadriga(args);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args:?}: {text}");
    assert!(words.iter().all(|w| text.contains(w)) && !text.contains("panicked"), "{args:?}: {text}");
}

fn text(p: &Path) -> &str {
    p.to_str().unwrap()
}

#[test]
fn generation_learns_from_run_to_run() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("draft.state");
    let base = ["generate", "--raw", "The cat counts to seven and the dog", "-n", "60", "--ignore-eos", "--json"];
    let plain = json(&base);
    for draft in ["tiny-drafts/hydra", "lookup+tiny-drafts/eagle3", "tiny-llama"] {
        let learning = ["--draft", draft, "--draft-nodes", "4", "--learn=adam", "--draft-state", text(&state)];
        let mut files = Vec::new();
        for _ in 0..2 {
            let said = json(&[&base[..], &learning[..]].concat());
            assert_eq!(said["ids"], plain["ids"], "{draft}");
            files.push(std::fs::read(&state).unwrap());
        }
        assert!(files[0] != files[1], "{draft}");
        let other = ["--draft", draft, "--draft-nodes", "4", "--learn=sgd", "--draft-state", text(&state)];
        refused(&[&base[..], &other[..]].concat(), &["draft.state", "another rule"]);
        std::fs::write(&state, "nothing").unwrap();
        refused(&[&base[..], &learning[..]].concat(), &["draft.state"]);
        std::fs::remove_file(&state).unwrap();
    }
    let with = |more: &[&str], words: &[&str]| refused(&[&base[..], more].concat(), words);
    with(&["--draft", "tiny-drafts/hydra", "--learn=magic"], &["magic", "optimistic-adam"]);
    with(&["--draft", "tiny-drafts/medusa", "--learn"], &["Medusa"]);
    with(&["--draft", "lookup", "--learn"], &["Lookup does not learn"]);
    with(&["--learn"], &["--learn", "--draft"]);
    with(&["--draft", "off", "--draft-state", text(&state)], &["draft.state", "no draft learns"]);
}

#[test]
fn streams_are_compared_and_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let (stream, out) = (dir.path().join("stream.jsonl"), dir.path().join("out"));
    let rows: Vec<String> = (0..8)
        .map(|i| {
            let kind = ["x", "y"][i / 4];
            format!("{{\"prompt\": \"How many legs have {i} of {kind}?\", \"category\": \"{kind}\"}}\n")
        })
        .collect();
    std::fs::write(&stream, rows.concat()).unwrap();
    let (x, y) = (format!("{}@x", text(&stream)), format!("{}@y:0-3", text(&stream)));
    let base = |out: &str, streams: &[&str], methods: &str, more: &[&str]| -> Vec<String> {
        let fixed = ["--draft", "tiny-drafts/hydra", "--raw", "-n", "20", "--json", "--out", out, "--methods", methods];
        ["bench", "online"].iter().chain(streams).chain(&fixed).chain(more).map(|s| s.to_string()).collect()
    };
    fn refs(all: &[String]) -> Vec<&str> {
        all.iter().map(String::as_str).collect()
    }
    let methods = "sgd,memory+ensemble,memory";
    let args = base(text(&out), &[&x, &y], methods, &[]);
    let found = json(&refs(&args));
    assert_eq!((&found["prompts"], &found["unequal"]), (&7.into(), &0.into()), "{found}");
    // Four methods, offline counted; two parts and all.
    assert_eq!(found["segments"].as_array().unwrap().len(), 12, "{found}");
    for file in ["stream.csv", "summary.json", "progress.json", "accept.svg", "sgd.state", "memory-ensemble.state"] {
        assert!(out.join(file).is_file(), "{file}");
    }
    let csv = || std::fs::read_to_string(out.join("stream.csv")).unwrap();
    assert_eq!(csv().lines().count(), 1 + 7 * 4);
    assert!(csv().lines().skip(1).all(|l| l.contains(",true,")));
    refused(&refs(&args), &["progress.json", "--resume"]);
    // On with more prompts: what was done stays. Not on with others, nor by other methods.
    let old = csv();
    let more = json(&refs(&base(text(&out), &[&x, &y, &x], methods, &["--resume"])));
    assert_eq!((&more["prompts"], &more["unequal"]), (&11.into(), &0.into()), "{more}");
    assert!(csv().starts_with(&old) && csv().lines().count() == 1 + 11 * 4);
    refused(
        &refs(&base(text(&out), &[&x, text(&stream)], methods, &["--resume"])),
        &["progress.json", "other prompts"],
    );
    refused(&refs(&base(text(&out), &[&x, &y, &x], "sgd", &["--resume"])), &["progress.json", "other methods"]);
    // Chunks: one update behind each.
    let chunks = dir.path().join("chunks");
    let found = json(&refs(&base(text(&chunks), &[&x], "adam", &["--chunk", "2"])));
    assert_eq!((&found["learnt"][0]["updates"], &found["unequal"]), (&2.into(), &0.into()), "{found}");

    let new = dir.path().join("new");
    let wrong = |streams: &[&str], methods: &str, words: &[&str]| {
        refused(&refs(&base(text(&new), streams, methods, &[])), words);
        assert!(!new.exists(), "{words:?}");
    };
    wrong(&[&x], "magic", &["magic", "optimistic"]);
    wrong(&[&x], "memorysgd", &["memorysgd", "memory+RULE"]);
    wrong(&[&format!("{}@z", text(&stream))], "sgd", &["@z", "no prompts"]);
    wrong(&[&format!("{}:3-99", text(&stream))], "sgd", &["3 to 99 of 8"]);
    wrong(&[&format!("{}:a-b", text(&stream))], "sgd", &["a-b is no FROM-TO"]);
    wrong(&["nowhere.jsonl"], "sgd", &["nowhere.jsonl"]);
}
