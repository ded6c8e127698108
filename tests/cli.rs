//! The binary as a user meets it: JSON that stays fixed, exit codes, errors that name what is wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models")
}

fn quadriga(args: &[&str]) -> Output {
    quadriga_with(args, &[])
}

fn quadriga_with(args: &[&str], env: &[(&str, &Path)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quadriga"))
        .args(args)
        .envs(env.iter().copied())
        .current_dir(models())
        .env("QUADRIGA_MODELS", models().join("nowhere"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn json(args: &[&str]) -> Value {
    json_with(args, &[])
}

fn json_with(args: &[&str], env: &[(&str, &Path)]) -> Value {
    let out = quadriga_with(args, env);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// The command fails with exit code 2 and one sentence that holds all of `words`.
fn fails(args: &[&str], words: &[&str]) {
    let out = quadriga(args);
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{args:?}: {text}");
    assert!(words.iter().all(|w| text.contains(w)), "{args:?}: {text}");
    assert!(out.stdout.is_empty() && !text.contains("panicked"), "{args:?}: {text}");
}

#[test]
fn generate_json_follows_the_golden() {
    let golden: Value =
        serde_json::from_slice(&std::fs::read(models().join("tiny-llama/golden.json")).unwrap()).unwrap();
    let case = &golden["cases"][1];
    let ids: Vec<String> = case["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let ids = ids.join(",");
    let base = ["generate", "-m", "tiny-llama", "--prompt-ids", &ids, "--json", "--ignore-eos", "--compute", "exact"];
    let out = json(&[&base[..], &["-n", "24", "--top-logits", "5"]].concat());
    assert_eq!(out["prompt_ids"], case["ids"]);
    assert_eq!(out["ids"], case["greedy"]);
    assert_eq!(out["finish"], "length");
    assert_eq!(out["top_logits"].as_array().unwrap().len(), 24);
    let (first, want) = (&out["top_logits"][0], &case["top5"][4]);
    for i in 0..5 {
        assert_eq!(first[i][0], want[i][0]);
        assert!((first[i][1].as_f64().unwrap() - want[i][1].as_f64().unwrap()).abs() < 1e-3);
    }
    for key in ["prompt_tokens", "prefill_s", "tokens", "decode_s", "tokens_per_s", "forwards", "tokens_per_forward"] {
        assert!(out["stats"][key].is_number(), "{key}");
    }
    let none = json(&[&base[..], &["-n", "0", "--top-logits", "3"]].concat());
    assert_eq!((none["ids"].as_array().unwrap().len(), none["top_logits"].as_array().unwrap().len()), (0, 1));
}

#[test]
fn seeds_reproduce_and_threads_do_not_matter() {
    let run = |seed: &str, threads: &str| {
        let sampling = ["--temperature", "1.5", "--top-p", "0.9", "-n", "20", "--ignore-eos"];
        let args =
            ["generate", "-m", "tiny-gguf/legacy.gguf", "--raw", "one two", "--json", "--seed", seed, "-t", threads];
        json(&[&args[..], &sampling].concat())["ids"].clone()
    };
    assert_eq!(run("1", "1"), run("1", "2"));
    assert_ne!(run("1", "1"), run("2", "1"));
}

#[test]
fn inspect_and_bench_speak_json() {
    let out = json(&["inspect", "-m", "tiny-gemma3", "--json"]);
    assert_eq!(out["config"]["family"], "gemma3");
    assert!(out["tensors"].as_array().unwrap().len() > 10 && out["memory"]["kv_bytes"].is_number());
    let out =
        json(&["eval", "ppl", "README.md", "-m", "tiny-llama", "--window", "64", "--max-tokens", "200", "--json"]);
    assert!(out["ppl"].as_f64().unwrap() > 1.0 && out["tokens"] == 200);
}

/// What `bench decode` promises, on a model with random weights.
fn check_bench(device: &str, env: &[(&str, &Path)], weights: &[&str]) {
    for weights in weights {
        let sizes = ["--prompt-tokens", "3", "--new-tokens", "2", "--depth", "1", "--context", "65", "--reps", "1"];
        let args = ["bench", "decode", "--shape", "tiny", "--weights", weights, "--device", device, "--json"];
        let out = json_with(&[&args[..], &sizes].concat(), env);
        assert!(out["device"].as_str().unwrap().starts_with(device), "{}", out["device"]);
        for key in ["load_s", "weights_bytes", "read_gb_s", "prefill_tokens_per_s", "decode_tokens_per_s"] {
            assert!(out[key].as_f64().unwrap() > 0.0, "{key} of {weights}: {}", out[key]);
        }
        for rows in ["1", "2", "4", "8", "16", "32", "64"] {
            assert!(out["forward_ms"][rows].as_f64().unwrap() > 0.0, "{weights}: {rows} rows");
        }
        assert!(out["tree_ms"]["32"].as_f64().unwrap() > 0.0, "{weights}");
        assert!(out["prefill_tflop_s"].is_number() && out["matrix_tflop_s"].is_object());
    }
}

#[test]
fn bench_decode_needs_no_weights() {
    check_bench("cpu", &[], &["bf16", "q8_0", "q4_0", "q4_1", "q4_k", "q6_k"]);
    let shape = |s, w| ["bench", "decode", "--device", "cpu", "--shape", s, "--weights", w];
    fails(&shape("gpt-17", "bf16"), &["gpt-17", "llama-3-8b"]);
    fails(&shape("tiny", "q3_k"), &["q3_k", "q4_k"]);
    fails(&shape("smollm2-135m", "q4_k"), &["SmolLM2-135M", "576", "256"]);
    let huge = [&shape("tiny", "bf16")[..], &["--context", "100000000000"]].concat();
    fails(&huge, &["tiny needs 0.0 GB for weights in BF16", "GB of memory are free"]);
}

/// The binary finds the stand-in for the driver as it would find the driver.
#[cfg(feature = "emu")]
#[test]
fn cuda_benches_run_on_an_emulated_device() {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(env!("QUADRIGA_EMU"), folder.path().join("libcuda.so")).unwrap();
    let env = [("LD_LIBRARY_PATH", folder.path())];
    check_bench("cuda", &env, &["bf16", "q4_k"]);
    let says = |args: &[&str]| String::from_utf8_lossy(&quadriga_with(args, &env).stderr).into_owned();
    let big = says(&["bench", "decode", "--device", "cuda", "--shape", "llama-3-8b"]);
    assert!(big.contains("Llama-3-8B needs 16.1 GB") && big.contains("of the GPU's memory are free"), "{big}");
    let args = ["bench", "kernels", "--device", "cuda", "--filter", "gather_rows", "--samples", "1", "--json"];
    let row = json_with(&args, &env);
    assert!(row["us"].as_f64().unwrap() > 0.0 && row["device"] == "cuda gpu-emu (CPU fibers)", "{row}");
}

#[test]
fn mistakes_are_named() {
    fails(&["generate", "-m", "gpt-17", "x"], &["gpt-17", "smollm2-135m"]);
    fails(&["generate", "-m", "tiny-llama"], &["no prompt"]);
    fails(&["generate", "-m", "tiny-llama", "--raw", ""], &["empty"]);
    fails(&["generate", "-m", "tiny-llama", "--prompt-ids", "384"], &["384", "vocabulary"]);
    fails(&["generate", "-m", "tiny-llama", "--raw", "a b c d", "--context", "3"], &["prompt", "context"]);
    fails(&["generate", "-m", "tiny-llama", "--raw", "x", "--context", "99999999"], &["99999999"]);
    fails(&["generate", "-m", "tiny-llama", "x", "--temperature", "-1"], &["--temperature"]);
    fails(&["generate", "-m", "tiny-llama", "x", "--top-p", "2"], &["--top-p"]);
    fails(&["generate", "-m", "tiny-llama", "x", "--threads", "99999"], &["--threads"]);
    fails(&["generate", "-m", "tiny-llama", "x", "--device", "cuda"], &["--device cpu"]);
    fails(&["generate", "-m", "tiny-llama", "--prompt-file", "missing.txt"], &["missing.txt"]);
    fails(&["generate", "-m", "tiny-mistral", "text"], &["tokenizer"]);
    fails(&["generate", "-m", "README.md", "x"], &["README.md"]);
    fails(&["eval", "ppl", "tiny-llama/model.safetensors", "-m", "tiny-llama"], &["UTF-8"]);
    fails(&["generate", "-m", "tiny-llama", "x", "--frobnicate"], &["--frobnicate"]);
}

#[test]
fn a_closed_pipe_is_success() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_quadriga"))
        .args(["generate", "-m", "tiny-llama", "--raw", "x", "-n", "400", "--ignore-eos", "--context", "500"])
        .current_dir(models())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn help_names_every_verb() {
    let out = quadriga(&["--help"]);
    let text = String::from_utf8_lossy(&out.stdout);
    for verb in ["fetch", "inspect", "generate", "chat", "eval", "bench"] {
        assert!(text.contains(verb), "{verb}");
    }
    assert_eq!(out.status.code(), Some(0));
}
