//! Makes data of narrow tasks whose answers can be checked, and an untrained model for them: what `scripts/make-diffusion.sh` begins with.
//!
//! `cargo run --release --example make_diffusion -- OUT [ROWS [large]]`, in the repository's root; the script runs the
//! whole recipe. `make_diffusion halve MODEL OUT` writes a model in F16. OUT/train.jsonl and OUT/dev.jsonl share no prompt. The same seed writes the same bytes.
//!
//! Three kinds of rows: sums with working, lists to be sorted, and word problems in the manner of GSM8K with a line for each step
//! and `#### answer` at the end. Digits are tokens of their own.

#[path = "from_nothing/mod.rs"]
mod from_nothing;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use from_nothing::{Shape, begin, halve};
use quadriga::Result;
use quadriga::files::write_file;
use quadriga::rng::Rng;
use serde_json::json;

const DEV: usize = 600;

const SMALL: Shape =
    Shape { vocab: 512, hidden: 128, layers: 6, heads: 4, kv_heads: 4, ffn: 352, context: 512, bos: 0, eos: 0 };
const LARGE: Shape = Shape { hidden: 512, layers: 12, heads: 8, kv_heads: 8, ffn: 1408, ..SMALL };

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (out, rows, shape) = match &args[..] {
        [verb, from, to] if verb == "halve" => {
            if let Err(e) = halve(Path::new(from), Path::new(to)) {
                eprintln!("error: {e}");
                std::process::exit(2);
            }
            return;
        }
        [out] => (out, 40_000, SMALL),
        [out, rows] if rows.parse::<usize>().is_ok() => (out, rows.parse().unwrap_or(0), SMALL),
        [out, rows, large] if large == "large" => (out, rows.parse().unwrap_or(0), LARGE),
        _ => {
            eprintln!("usage: make_diffusion OUT [ROWS [large]] or make_diffusion halve MODEL OUT");
            std::process::exit(2);
        }
    };
    if let Err(e) = make(Path::new(out), rows, &shape) {
        eprintln!("error: {e}");
        std::process::exit(2);
    }
}

/// A prompt and its answer.
type Task = (String, String);

/// `13+48-7=`: a line for each step, then the value.
fn sum(rng: &mut Rng) -> Task {
    let n = 2 + rng.below(3);
    let mut value = 2 + rng.below(48);
    let (mut prompt, mut answer) = (format!("Compute {value}"), String::new());
    for _ in 1..n {
        let before = value;
        let (sign, by) = match rng.below(3) {
            0 if value > 2 => ('-', 1 + rng.below(value - 1)),
            1 if value <= 20 => ('*', 2 + rng.below(3)),
            _ => ('+', 1 + rng.below(40)),
        };
        value = match sign {
            '-' => value - by,
            '*' => value * by,
            _ => value + by,
        };
        // Left to right, as the steps are written.
        let _ = write!(prompt, " {sign} {by}");
        let _ = writeln!(answer, "{before} {sign} {by} = {value}");
    }
    (prompt + " from left to right.\n", format!("{answer}#### {value}"))
}

fn list(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")
}

fn sort(rng: &mut Rng) -> Task {
    let mut numbers: Vec<usize> = (0..4 + rng.below(6)).map(|_| rng.below(100)).collect();
    let prompt = format!("Sort {}.\n", list(&numbers));
    numbers.sort_unstable();
    (prompt, format!("#### {}", list(&numbers)))
}

fn story(rng: &mut Rng) -> Task {
    let pick = |rng: &mut Rng, from: &[&'static str]| from[rng.below(from.len())];
    let name = pick(rng, &["Ann", "Ben", "Carla", "David", "Eva", "Frank", "Grace", "Henry"]);
    let thing = pick(rng, &["apples", "books", "coins", "marbles", "stamps", "cards", "shells", "pencils"]);
    let mut have = 5 + rng.below(40);
    let mut prompt = format!("{name} has {have} {thing}.");
    let mut answer = String::new();
    for _ in 0..2 + rng.below(2) {
        let before = have;
        match rng.below(4) {
            0 if have > 3 => {
                let n = 1 + rng.below(have - 2);
                have -= n;
                let how = pick(rng, &["gives away", "loses", "sells"]);
                let _ = write!(prompt, " {name} {how} {n} of them.");
                let _ = writeln!(answer, "{name} {how} {n}: {before} - {n} = {have} {thing}.");
            }
            1 if have <= 12 => {
                let n = 2 + rng.below(3);
                have *= n;
                let _ = write!(prompt, " Then {name} gets {n} times as many.");
                let _ = writeln!(answer, "{n} times as many: {before} * {n} = {have} {thing}.");
            }
            2 if have.is_multiple_of(2) => {
                have /= 2;
                let _ = write!(prompt, " Half of them are lost.");
                let _ = writeln!(answer, "Half is lost: {before} / 2 = {have} {thing}.");
            }
            _ => {
                let n = 2 + rng.below(30);
                have += n;
                let how = pick(rng, &["buys", "finds", "wins"]);
                let _ = write!(prompt, " {name} {how} {n} more.");
                let _ = writeln!(answer, "{name} {how} {n}: {before} + {n} = {have} {thing}.");
            }
        }
    }
    let _ = writeln!(prompt, " How many {thing} does {name} have?");
    (prompt, format!("{answer}#### {have}"))
}

fn make(out: &Path, rows: usize, shape: &Shape) -> Result<()> {
    fs::create_dir_all(out).map_err(|e| quadriga::Error::io(out.display(), e))?;
    let (mut rng, mut seen, mut tasks) = (Rng::new(7), HashSet::new(), Vec::new());
    while tasks.len() < rows + DEV {
        let (kind, make): (&str, fn(&mut Rng) -> Task) =
            [("sum", sum as fn(&mut Rng) -> Task), ("sort", sort), ("story", story)][tasks.len() % 3];
        let (prompt, completion) = make(&mut rng);
        if seen.insert(prompt.clone()) {
            tasks.push(json!({"prompt": prompt, "completion": completion, "category": kind}));
        }
    }
    let (dev, train) = tasks.split_at(DEV);
    for (name, rows) in [("train", train), ("dev", dev)] {
        write_file(&out.join(format!("{name}.jsonl")), |to| rows.iter().try_for_each(|r| writeln!(to, "{r}")))?;
    }
    let text = |r: &serde_json::Value| {
        format!("{}{}", r["prompt"].as_str().unwrap_or(""), r["completion"].as_str().unwrap_or(""))
    };
    let corpus = out.join("corpus.txt");
    write_file(&corpus, |to| train.iter().take(6000).try_for_each(|r| writeln!(to, "{}", text(r))))?;
    // Token 3 is kept for the mask.
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"];
    begin(&corpus, &out.join("init"), shape, &special, false)?;
    println!("{}: {} rows, {DEV} for development", out.display(), train.len());
    Ok(())
}
