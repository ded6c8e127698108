//! Diffusion from the command line, as a new user would: conversion, distillation, decoding, measuring, and what is refused.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quadriga")).args(["--device", "cpu"]).args(args).output().unwrap()
}

fn ok(args: &[&str]) -> Value {
    let out = run(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{args:?}: {e}: {}", String::from_utf8_lossy(&out.stdout)))
}

fn refused(args: &[&str]) -> String {
    let out = run(args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
    said
}

fn rows(path: &Path, n: usize) {
    let row = |i: usize| format!("{{\"prompt\": \"say {i}: \", \"completion\": \"{}\"}}\n", "ab".repeat(1 + i % 5));
    fs::write(path, (0..n).map(row).collect::<String>()).unwrap();
}

#[test]
fn from_an_autoregressive_model_to_a_distilled_one() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let tiny = common::root().join("models/tiny-llama").to_str().unwrap().to_owned();
    let (data, held) = (at("train.jsonl"), at("dev.jsonl"));
    rows(Path::new(&data), 24);
    rows(Path::new(&held), 6);
    let base = ["--data", &data, "--held-out", &held, "--answer-length", "16", "--batch-tokens", "128", "--json"];
    let with = |head: &[&str], tail: &[&str]| {
        let args: Vec<&str> = head.iter().chain(&base).chain(tail).copied().collect();
        ok(&args)
    };

    // A model without a mask cannot be trained as one, decoded as one, or distilled.
    let what = refused(&["train", "diffusion", "-m", &tiny, "--data", &data, "--out", &at("no"), "--steps", "1"]);
    assert!(what.contains("no mask token") && what.contains("--mask-token"), "{what}");
    let what = refused(&["generate", "-m", &tiny, "--decoder", "diffusion", "--raw", "a", "-n", "4"]);
    assert!(what.contains("no mask token"), "{what}");
    let what =
        refused(&["train", "diffusion", "-m", &tiny, "--data", &data, "--out", &at("no"), "--mask-token", "<|no|>"]);
    assert!(what.contains("--mask-token <|no|>"), "{what}");
    let what = refused(&[
        "train",
        "diffusion",
        "-m",
        &tiny,
        "--data",
        &data,
        "--out",
        &at("no"),
        "--mask-token",
        "383",
        "--anneal",
        "2",
        "--steps",
        "1",
    ]);
    assert!(what.contains("--anneal 2"), "{what}");

    let convert = ["--mask-token", "383", "--anneal", "0.5", "--lr", "3e-3", "--beta2", "0.95"];
    let tail: Vec<&str> = convert.iter().chain(&["--steps", "60", "--save-every", "20"]).copied().collect();
    let whole = with(&["train", "diffusion", "-m", &tiny, "--out", &at("whole")], &tail);
    let bound = &whole["held_out_bound"];
    assert!(bound["after"].as_f64().unwrap() < 0.5 * bound["before"].as_f64().unwrap(), "{whole}");
    let config: Value = serde_json::from_slice(&fs::read(dir.path().join("whole/model/config.json")).unwrap()).unwrap();
    assert_eq!(config["diffusion"]["mask_token_id"], 383);
    assert_eq!(config["diffusion"]["shift"], true);
    assert!(dir.path().join("whole/loss.svg").is_file());

    // Stopped and resumed, the same bytes.
    fs::create_dir_all(dir.path().join("again/checkpoints")).unwrap();
    let first = fs::read_dir(dir.path().join("whole/checkpoints")).unwrap().map(|e| e.unwrap().path()).min().unwrap();
    let copy = dir.path().join("again/checkpoints").join(first.file_name().unwrap());
    fs::create_dir_all(&copy).unwrap();
    for file in fs::read_dir(&first).unwrap() {
        let file = file.unwrap().path();
        fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
    }
    let tail: Vec<&str> = tail.iter().chain(&["--resume"]).copied().collect();
    with(&["train", "diffusion", "-m", &tiny, "--out", &at("again")], &tail);
    let weights = |run: &str| fs::read(dir.path().join(run).join("model/model.safetensors")).unwrap();
    assert!(weights("again") == weights("whole"));

    // Distillation records what the teacher did first, once.
    let model = at("whole/model");
    let distil = ["--steps", "12", "--window", "8,16", "--lr", "1e-3"];
    let student = with(&["distill", "-m", &model, "--out", &at("student")], &distil);
    assert!(student["loss"].as_f64().unwrap().is_finite());
    let lines = fs::read_to_string(dir.path().join("student/trajectories.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 24);
    for line in lines.lines() {
        let t: Value = serde_json::from_str(line).unwrap();
        let mut ranks: Vec<u64> = t["ranks"].as_array().unwrap().iter().map(|r| r.as_u64().unwrap()).collect();
        ranks.sort_unstable();
        assert_eq!(ranks, (0..16).collect::<Vec<_>>(), "one token a pass, each with its rank");
    }
    // Cut, the file is completed to the same.
    let cut: String = lines.lines().take(7).map(|l| format!("{l}\n")).collect();
    fs::write(dir.path().join("cut.jsonl"), cut).unwrap();
    with(&["distill", "-m", &model, "--out", &at("student2"), "--trajectories", &at("cut.jsonl")], &distil);
    assert_eq!(fs::read_to_string(dir.path().join("cut.jsonl")).unwrap().lines().count(), 24);
    assert!(weights("student") == weights("student2"));
    fs::write(dir.path().join("bad.jsonl"), "{\"example\": 99, \"text\": [], \"ranks\": [], \"correct\": true}\n")
        .unwrap();
    let what =
        refused(&["distill", "-m", &model, "--data", &data, "--out", &at("no2"), "--trajectories", &at("bad.jsonl")]);
    assert!(what.contains("bad.jsonl, line 1") && what.contains("example 99"), "{what}");
    with(&["distill", "-m", &model, "--out", &at("trims"), "--likelihood", &tiny], &distil);
    with(&["distill", "-m", &model, "--out", &at("control"), "--random"], &distil);
    assert!(weights("control") != weights("student"));

    // Decoding: as a diffusion model unless told otherwise.
    let say = |more: &[&str]| {
        let args: Vec<&str> =
            ["generate", "-m", &model, "--raw", "say 3: ", "-n", "16", "--json"].iter().chain(more).copied().collect();
        ok(&args)
    };
    let one = say(&["--passes", "16", "--no-early-stop"]);
    assert_eq!(one["stats"]["forwards"], 16);
    let fast = say(&["--threshold", "5", "--no-early-stop", "--block-size", "8"]);
    assert_eq!(fast["stats"]["forwards"], 2);
    assert!(fast["stats"]["positions"].as_u64() < one["stats"]["positions"].as_u64());
    let cached = say(&["--threshold", "0.2", "--cache", "delayed", "--block-size", "4"]);
    assert!(cached["stats"]["positions"].as_u64().unwrap() > 0);
    let filled = say(&["--fill", "ab<mask:3>ab<mask:2>"]);
    let text = filled["text"].as_str().unwrap();
    assert!(text.starts_with("ab"), "{text}");
    for (flags, what) in [
        (&["--block-size", "0"][..], "--block-size 0"),
        (&["--confidence", "1.5"], "--confidence 1.5"),
        (&["--cache", "dual"], "--cache"),
        (&["--fill", "no mask"], "no mask to fill"),
        (&["--fill", "<mask:x>"], "<mask:x>"),
        (&["--top-k", "3"], "--top-k"),
        (&["--decoder", "ar"], "masked diffusion model"),
        (&["-n", "0"], "no mask to fill"),
    ] {
        let args: Vec<&str> =
            ["generate", "-m", &model, "--raw", "say 3: ", "-n", "16"].iter().chain(flags).copied().collect();
        let said = if flags[0] == "-n" {
            refused(&["generate", "-m", &model, "--raw", "a", "-n", "0"])
        } else {
            refused(&args)
        };
        assert!(said.contains(what), "{flags:?}: {said}");
    }
    let long = refused(&["generate", "-m", &model, "--raw", "a", "-n", "100000"]);
    assert!(long.contains("context"), "{long}");

    let text = at("text.txt");
    fs::write(&text, "some text to be scored").unwrap();
    for verb in [&["eval", "ppl", &text][..], &["eval", "accept", &held], &["chat"]] {
        let args: Vec<&str> = verb.iter().chain(&["-m", &model]).copied().collect();
        assert!(refused(&args).contains("masked diffusion model"), "{verb:?}");
    }

    // Points of the model and of its twin go into one table, which the same verb reads.
    let table = at("points.json");
    let measure = |model: &str, method: &str, more: &[&str]| {
        let args: Vec<&str> = [
            "eval",
            "aup",
            "-m",
            model,
            "--data",
            &held,
            "--answer-length",
            "16",
            "--points",
            &table,
            "--method",
            method,
            "--json",
        ]
        .iter()
        .chain(more)
        .copied()
        .collect();
        let out = run(&args);
        serde_json::from_slice::<Value>(&out.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&out.stderr)))
    };
    let points = measure(&model, "vanilla", &["--passes", "16"]);
    let p = &points["points"][0];
    let (tokens, passes) = (p["tokens"].as_f64().unwrap(), p["forwards"].as_f64().unwrap());
    assert!((p["tokens_per_forward"].as_f64().unwrap() - tokens / passes).abs() < 1e-3);
    let points = measure(&model, "d3llm", &["--thresholds", "0.1,5", "--width", "3"]);
    assert_eq!(points["points"].as_array().unwrap().len(), 2);
    let twin = measure(&tiny, "twin", &[]);
    let p = &twin["points"][0];
    let (tokens, passes) = (p["tokens"].as_u64().unwrap(), p["forwards"].as_u64().unwrap());
    assert!((tokens..=tokens + 6).contains(&passes), "a pass a token, and one for each end token: {p}");
    let read: Value = serde_json::from_slice(&fs::read(&table).unwrap()).unwrap();
    assert_eq!(read["dev"].as_object().unwrap().len(), 3);
}
