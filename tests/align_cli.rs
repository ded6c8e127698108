//! `align` from the command line: what it leaves on disk, a killed deployment, and what is refused.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn tiny() -> String {
    common::root().join("models/tiny-text").to_str().unwrap().to_owned()
}

fn command(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_quadriga"));
    c.args(["--device", "cpu", "-t", "2", "-m", &tiny()]).args(args).stdin(Stdio::null());
    c
}

fn run(args: &[&str]) -> Output {
    command(args).output().unwrap()
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

fn prompts(dir: &Path) -> String {
    let text: String = (0..9).map(|i| format!("{{\"prompt\": \"Once there was number {i}\"}}\n")).collect();
    let path = dir.join("prompts.jsonl");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn pairs(dir: &Path) -> String {
    let row = |i: usize| {
        let (short, long) = (format!("It is {i}."), format!("It is {i}, and {i}, and then some more of it."));
        format!("{{\"prompt\": \"What is {}?\", \"chosen\": \"{short}\", \"rejected\": \"{long}\"}}\n", i % 12)
    };
    let path = dir.join("pairs.jsonl");
    fs::write(&path, (0..60).map(row).collect::<String>()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_reward_is_learnt_and_answers_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let data = pairs(dir.path());
    let base = ["align", "passive", "--data", &data, "--json", "--warmup-features", "40"];
    let with = |tail: &[&str]| base.iter().chain(tail).map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let call = |tail: &[&str]| ok(&with(tail).iter().map(String::as_str).collect::<Vec<_>>());
    let v = call(&["--out", &at("one"), "--compare", "all"]);
    assert!(v["accuracy"].as_f64().unwrap() > 0.9, "{v}");
    let curves = v["curves"].as_array().unwrap();
    assert_eq!(curves.len(), 8);
    let last = |i: usize| &curves[i]["marks"].as_array().unwrap().last().unwrap()["accuracy"];
    assert_eq!(last(0), last(1), "one pass and refit");
    for file in ["reward.safetensors", "report.json", "accuracy.svg"] {
        assert!(dir.path().join("one").join(file).is_file(), "{file}");
    }
    // Features that are there are not made again, and a finished run has nothing left to learn.
    let again = call(&["--out", &at("one"), "--resume"]);
    assert_eq!((again["features_made"].as_u64(), &again["accuracy"]), (Some(0), &v["accuracy"]));
    assert!(refused(&with(&["--out", &at("one")]).iter().map(String::as_str).collect::<Vec<_>>()).contains("--resume"));

    let reward = at("one/reward.safetensors");
    let best =
        |n: &str| ok(&["generate", "--json", "--raw", "What is it?", "--reward", &reward, "--best-of", n, "-n", "12"]);
    let (one, six) = (best("1"), best("6"));
    assert_eq!((one["best_of"].as_u64(), six["best_of"].as_u64()), (Some(1), Some(6)));
    assert_eq!(one["answers"][0], six["answers"][0]);
    let rewards: Vec<f64> = six["rewards"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect();
    let greatest = rewards.iter().copied().fold(f64::MIN, f64::max);
    assert_eq!(six["text"], six["answers"][rewards.iter().position(|r| *r == greatest).unwrap()]);

    let v = ok(&[
        "align",
        "active",
        "--data",
        &data,
        "--json",
        "--out",
        &at("active"),
        "--budget",
        "20",
        "--ask",
        "uncertainty,fisher,margin,norm,random,best-worst",
    ]);
    assert_eq!(v["runs"].as_array().unwrap().len(), 6);
    let v = ok(&[
        "align",
        "active",
        "--prompts",
        &prompts(dir.path()),
        "--judge",
        "shorter",
        "--answers",
        "3",
        "-n",
        "8",
        "--raw",
        "--json",
        "--out",
        &at("pool"),
        "--budget",
        "10",
    ]);
    assert!(v["base_and_oracle"][1].as_f64() >= v["base_and_oracle"][0].as_f64());
}

/// The rows of the rounds without times.
fn rounds(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("rounds.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row.as_object_mut().unwrap().remove("seconds");
        row
    };
    text.lines().map(row).collect()
}

#[test]
fn a_killed_deployment_loses_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let file = prompts(dir.path());
    let args = |out: &str| {
        let words = "align deploy --judge shorter --raw --answers 4 -n 10 --rounds 30 --beta 1 --warmup-features 40 --json --prompts";
        words.split(' ').chain([&*file, "--out", out]).map(String::from).collect::<Vec<_>>()
    };
    let whole = args(&at("whole"));
    let v = ok(&whole.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(v["rounds"], 30);
    assert!(v["comparisons"].as_u64().unwrap() > 5 && v["regret"].as_f64().is_some(), "{v}");
    let killed = args(&at("killed"));
    let killed: Vec<&str> = killed.iter().map(String::as_str).collect();
    let (mut kills, mut pause) = (0, 0);
    loop {
        let mut child = command(&killed).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        pause = (pause + 37) % 300;
        while begun.elapsed() < Duration::from_millis(200 + pause) && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        assert!(kills < 200, "it never ends");
    }
    assert!(kills > 0, "it was never killed");
    assert_eq!(rounds(&dir.path().join("whole")), rounds(&dir.path().join("killed")), "after {kills} kills");
    // Killed between a row and its lesson: the lesson is learnt at the next start.
    let (a, b) = (dir.path().join("whole"), dir.path().join("short"));
    fs::create_dir(&b).unwrap();
    let mut short = args(&at("short"));
    let n = short.iter().position(|w| w == "30").unwrap();
    short[n] = "12".into();
    ok(&short.iter().map(String::as_str).collect::<Vec<_>>());
    let mut log = fs::OpenOptions::new().append(true).open(b.join("rounds.jsonl")).unwrap();
    let text = fs::read_to_string(a.join("rounds.jsonl")).unwrap();
    writeln!(log, "{}", text.lines().nth(12).unwrap()).unwrap();
    short[n] = "30".into();
    ok(&short.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(rounds(&a), rounds(&b));
    let read = |folder: &Path| fs::read(folder.join("reward.safetensors")).unwrap();
    assert!(read(&a) == read(&b), "another reward");
}

#[test]
fn a_person_answers_in_a_file_and_in_a_chat() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(dir.path().join("said"), "1\n2\n\n=\n1\n").unwrap();
    let (file, said) = (prompts(dir.path()), format!("file:{}", at("said")));
    let args = [
        "align",
        "deploy",
        "--prompts",
        &file,
        "--judge",
        &said,
        "--second",
        "forced",
        "--raw",
        "--answers",
        "3",
        "-n",
        "8",
        "--json",
        "--out",
        &at("out"),
    ];
    let v = ok(&args);
    // The file ends before the prompts do: what was said is kept.
    assert_eq!((v["rounds"].as_u64(), v["comparisons"].as_u64()), (Some(5), Some(4)));
    fs::write(dir.path().join("said"), "1\nmaybe\n").unwrap();
    let other = at("other");
    let other = [&args[..args.len() - 1], &[&other]].concat();
    assert!(refused(&other).contains("said, line 2: \"maybe\" is no answer"));

    let llama = common::root().join("models/tiny-llama");
    let taste = at("taste.safetensors");
    let mut chat = Command::new(env!("CARGO_BIN_EXE_quadriga"));
    chat.args(["--device", "cpu", "-t", "2", "-m"]).arg(llama).args([
        "chat",
        "--reward",
        &taste,
        "--best-of",
        "3",
        "-n",
        "6",
        "--beta",
        "5",
        "--json",
    ]);
    let mut child = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"Hello.\n2\nAnd you?\n1\n").unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let lines: Vec<Value> =
        String::from_utf8(out.stdout).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.last().unwrap()["comparisons"], 2, "{lines:?}");
    assert!(dir.path().join("taste.safetensors").is_file());
}

#[test]
fn what_is_impossible_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (data, file) = (pairs(dir.path()), prompts(dir.path()));
    let out = dir.path().join("out").to_str().unwrap().to_owned();
    let passive = |tail: &[&str]| refused(&[&["align", "passive", "--data", &data, "--out", &out], tail].concat());
    assert!(passive(&["--held-out-share", "1"]).contains("--held-out-share"));
    assert!(passive(&["--layer", "99"]).contains("layer 99"));
    assert!(passive(&["--lambda=-1"]).contains("lambda"));
    assert!(passive(&["--compare", "magic"]).contains("magic"));
    let deploy =
        |tail: &[&str]| refused(&[&["align", "deploy", "--prompts", &file, "--out", &out, "--raw"], tail].concat());
    assert!(deploy(&["--judge", "magic"]).contains("magic"));
    assert!(deploy(&["--judge", "shorter", "--second", "third"]).contains("--second third"));
    assert!(deploy(&["--judge", "shorter", "--beta", "nan"]).contains("--beta"));
    assert!(deploy(&["--judge", "shorter", "--answers", "0"]).contains("--answers 0"));
    assert!(refused(&["generate", "--raw", "x", "--reward", &data]).contains("not a sound reward"));
    assert!(refused(&["generate", "--raw", "x", "--reward", "nowhere"]).contains("nowhere"));
}

#[test]
fn a_model_improves_by_its_reward() {
    let dir = tempfile::tempdir().unwrap();
    let file = prompts(dir.path());
    for by in ["rft", "dpo"] {
        let out = dir.path().join(by).to_str().unwrap().to_owned();
        let args = [
            "align",
            "improve",
            "--prompts",
            &file,
            "--judge",
            "shorter",
            "--by",
            by,
            "--raw",
            "--answers",
            "4",
            "-n",
            "10",
            "--comparisons",
            "60",
            "--warmup-features",
            "20",
            "--steps",
            "4",
            "--rank",
            "2",
            "--json",
            "--out",
            &out,
        ];
        let v = ok(&args);
        let rows = v["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 3);
        assert!(rows[1]["reward"].as_f64().unwrap() > 0.0, "{v}");
        assert!(dir.path().join(by).join("update/adapter/adapter_model.safetensors").is_file());
        // Stages that are done are not done again.
        assert_eq!(ok(&args)["rows"], v["rows"]);
    }
}
