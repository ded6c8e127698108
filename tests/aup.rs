//! AUP against values of the released function and against the published leaderboard; `quadriga eval aup`.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use quadriga::engine::{AupCurve, AupSettings, Point, aup};
use quadriga::rng::Rng;
use serde_json::{Value, json};

/// The points behind the published tables.
const TABLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/aup/d3llm.yaml");

fn points(pairs: &[(f64, f64)]) -> Vec<Point> {
    pairs.iter().map(|&(tpf, accuracy)| Point { tpf, accuracy }).collect()
}

fn of(pairs: &[(f64, f64)], best: f64) -> quadriga::Result<f64> {
    aup(&points(pairs), best, AupSettings::default())
}

fn error(pairs: &[(f64, f64)], best: f64) -> String {
    of(pairs, best).unwrap_err().to_string()
}

/// Values that the function which the authors released gave for these points.
#[test]
fn values_of_the_released_function() {
    type Case = (&'static [(f64, f64)], f64, f64);
    let cases: &[Case] = &[
        (&[(1.0, 80.0), (2.0, 78.0), (4.0, 76.0)], 80.0, 293.9597941087451),
        (&[(1.0, 50.0), (3.0, 48.0)], 80.0, 80.68994553970319),
        (&[(2.0, 70.0), (1.0, 72.0), (5.0, 66.0), (6.0, 67.5)], 75.0, 347.21747730249643),
        (&[(1.0, 63.0)], 80.0, 63.0),
        (&[(1.0, 80.0), (3.0, 80.0)], 80.0, 240.0),
        (&[(1.0, 80.0), (2.0, 74.0), (3.0, 78.0), (4.0, 76.0)], 80.0, 301.25289100459287),
        (&[(1.0, 80.0), (2.0, 75.0)], 80.0, 151.088591931765),
    ];
    for (pairs, best, expected) in cases {
        let found = of(pairs, *best).unwrap();
        assert!((found - expected).abs() < 1e-9, "{pairs:?}: {found}, expected {expected}");
    }
    let e = error(&[(1.0, 80.0), (2.0, 78.0), (4.0, 74.0)], 80.0);
    assert!(["from 80 at TPF 1", "to 74 at TPF 4", "by 6 points"].iter().all(|w| e.contains(w)), "{e}");
}

struct Published {
    family: &'static str,
    methods: &'static [&'static str],
    tasks: &'static [(&'static str, &'static [f64])],
    /// Of AUP over the tasks, divided by 5.
    means: &'static [f64],
    /// Half a unit of the last digit of `tasks`.
    rounding: f64,
}

/// The AUP columns of dLLM_Results.csv of the blog post "text-diffusion". That file has one more figure for MBPP of Dream-Coder, 186.36, which is
/// a misprint: the points beside it, and those released with the code, give 186.18. Its column of accuracies at TPF 1 (which no table of the post
/// shows) has 38.80 and 74.91 for D2F on MBPP and Long-GSM8K, where its own AUP follows from the 39.10 and 76.00 of the released points.
const PUBLISHED: &[Published] = &[
    Published {
        family: "LLaDA",
        methods: &["Qwen2.5-7B-it", "LLaDA", "Fast-dLLM", "D2F", "dParallel", "d3LLM"],
        tasks: &[
            ("GSM8K-CoT", &[74.1, 72.55, 205.7811, 213.7564, 358.1422, 637.6549]),
            ("MATH", &[41.15, 32.2, 47.1873, 48.9958, 64.5356, 107.6419]),
            ("MBPP", &[63.6, 41.72, 56.6011, 52.9606, 60.4513, 88.356]),
            ("HumanEval", &[67.73, 38.28, 54.0245, 61.9823, 83.6855, 96.6405]),
            ("Long-GSM8K", &[82.56, 78.58, 175.3744, 176.948, 309.0756, 441.1296]),
        ],
        means: &[65.8, 52.7, 107.8, 110.9, 175.2, 274.3],
        rounding: 5e-5,
    },
    Published {
        family: "Dream",
        methods: &["Qwen2.5-7B-it", "EAGLE-3", "Dream", "Fast-dLLM", "Fast-dLLM v2", "dParallel", "d3LLM"],
        tasks: &[
            ("GSM8K-CoT", &[74.1, 318.9862, 83.94, 116.4864, 176.1064, 245.7335, 391.3278]),
            ("MATH", &[41.15, 142.0584, 39.63, 55.2169, 126.6553, 77.9471, 97.4967]),
            ("MBPP-it", &[63.8, 298.5704, 57.2, 63.5892, 114.1151, 107.9665, 141.4058]),
            ("HumanEval-it", &[72.25, 344.8057, 55.2, 63.5012, 128.9414, 98.7677, 129.4756]),
            ("Long-GSM8K", &[82.56, 422.2056, 78.95, 130.3502, 207.246, 262.3936, 348.6435]),
        ],
        means: &[66.8, 305.3, 63.0, 85.8, 150.6, 158.6, 221.7],
        rounding: 5e-5,
    },
    Published {
        family: "Dream-Coder",
        methods: &["Qwen2.5-Coder", "Dream-Coder", "d3LLM"],
        tasks: &[
            ("HumanEval", &[86.6, 82.9, 208.36]),
            ("HumanEval+", &[82.3, 76.8, 171.72]),
            ("MBPP", &[83.5, 79.9, 186.18]),
            ("MBPP+", &[70.1, 68.8, 170.92]),
        ],
        means: &[],
        rounding: 5e-3,
    },
];

/// All 77 rows, by the command line: reader, best accuracy, metric and means.
#[test]
fn the_published_leaderboard() {
    let out = json(&["--tasks", "5", TABLES]);
    let families = out["families"].as_array().unwrap();
    assert_eq!(families.len(), PUBLISHED.len());
    let (mut rows, mut means) = (0, 0);
    for (family, expected) in families.iter().zip(PUBLISHED) {
        assert_eq!(family["family"], expected.family);
        assert_eq!(family["tasks"].as_array().unwrap().len(), expected.tasks.len());
        for (task, (name, aups)) in family["tasks"].as_array().unwrap().iter().zip(expected.tasks) {
            assert_eq!(task["task"], *name);
            let methods = task["methods"].as_array().unwrap();
            assert_eq!(methods.len(), aups.len());
            for ((m, method), aup) in methods.iter().zip(expected.methods).zip(*aups) {
                assert_eq!(m["method"], *method);
                let found = m["aup"].as_f64().unwrap();
                let off = (found - aup).abs();
                assert!(off < expected.rounding + 1e-9, "{} {name} {method}: {found}, {aup}", expected.family);
                rows += 1;
            }
        }
        for (mean, published) in family["means"].as_array().unwrap().iter().zip(expected.means) {
            let found = mean["mean"].as_f64().unwrap();
            assert!((found - published).abs() < 0.05 + 1e-9, "{}: {found}, {published}", mean["method"]);
            means += 1;
        }
    }
    assert_eq!((rows, means), (77, 13));
}

#[test]
fn which_points_count() {
    // The limit is below the first point, not below the best; a point on it stays, also where 64.4 - 59.4 is a little more than 5.
    let curve = |pairs: &[(f64, f64)]| AupCurve::new(&points(pairs), 90.0, AupSettings::default()).unwrap();
    let c = curve(&[(3.0, 64.4), (1.0, 64.4), (2.0, 59.3999), (4.0, 59.4)]);
    let kept: Vec<Point> = c.kept.iter().map(|w| w.point).collect();
    assert_eq!(kept, points(&[(1.0, 64.4), (3.0, 64.4), (4.0, 59.4)]));
    assert_eq!(c.dropped, points(&[(2.0, 59.3999)]));
    assert!(c.area().is_ok());
    for w in &c.kept {
        assert!((w.weight - (-3.0 * (1.0 - w.point.accuracy / 90.0)).exp()).abs() < 1e-15);
        assert_eq!(w.height(), w.point.accuracy * w.weight);
    }
    // Only the end of a curve refuses it, and there a dropped point does.
    assert!(curve(&[(1.0, 64.4), (2.0, 10.0), (3.0, 64.4)]).area().is_ok());
    assert!(curve(&[(1.0, 64.4), (2.0, 64.4), (3.0, 59.3999)]).area().is_err());
    // At the same tokens per pass the most accurate counts: at the beginning, in between, at the end.
    let ties = [(1.0, 60.0), (1.0, 62.0), (2.0, 61.0), (2.0, 61.0), (2.0, 60.0), (3.0, 60.0), (3.0, 20.0)];
    assert_eq!(of(&ties, 70.0).unwrap(), of(&[(1.0, 62.0), (2.0, 61.0), (3.0, 60.0)], 70.0).unwrap());
    assert_eq!(curve(&ties).dropped.len(), 4);
    // Nothing right at all is worth nothing.
    assert_eq!(of(&[(1.0, 0.0), (2.0, 0.0)], 0.0).unwrap(), 0.0);
}

#[test]
fn impossible_points_are_refused_by_number() {
    let none = error(&[], 80.0);
    assert!(none.contains("no points"), "{none}");
    for (bad, word) in [
        ((0.0, 50.0), "TPF 0"),
        ((-1.0, 50.0), "TPF -1"),
        ((f64::NAN, 50.0), "TPF NaN"),
        ((f64::INFINITY, 50.0), "TPF inf"),
        ((2.0, -0.1), "accuracy -0.1"),
        ((2.0, 100.1), "accuracy 100.1"),
        ((2.0, f64::NAN), "accuracy NaN"),
    ] {
        let e = error(&[(1.0, 50.0), bad, (3.0, 50.0)], 80.0);
        assert!(e.contains("point 2") && e.contains(word), "{e}");
    }
    for best in [f64::NAN, -1.0, 100.5] {
        assert!(error(&[(1.0, 50.0)], best).contains("best accuracy"));
    }
    for settings in [AupSettings { alpha: -1.0, offset: 5.0 }, AupSettings { alpha: 3.0, offset: f64::NAN }] {
        assert!(aup(&points(&[(1.0, 50.0)]), 80.0, settings).is_err());
    }
    assert!(of(&[(1.0, 0.0), (2.0, 100.0)], 0.0).is_ok());
}

/// A random curve that keeps all of its points.
fn curve(rng: &mut Rng) -> Vec<(f64, f64)> {
    let (n, top) = (2 + rng.below(6), 20.0 + 70.0 * f64::from(rng.uniform()));
    let (mut pairs, mut tpf) = (Vec::new(), 0.0);
    for i in 0..n {
        tpf += 0.1 + 3.0 * f64::from(rng.uniform());
        pairs.push((tpf, if i == 0 { top } else { top - 4.9 + 9.0 * f64::from(rng.uniform()) }));
    }
    pairs
}

/// Area of a curve that is not weighed.
fn plain(pairs: &[(f64, f64)]) -> f64 {
    let trapezoids = pairs.windows(2).map(|w| (w[1].0 - w[0].0) * (w[0].1 + w[1].1) / 2.0);
    pairs[0].0 * pairs[0].1 + trapezoids.sum::<f64>()
}

#[test]
fn more_is_never_worth_less() {
    let rng = &mut Rng::new(5);
    for _ in 0..500 {
        let pairs = curve(rng);
        let most = pairs.iter().map(|p| p.1).fold(0.0, f64::max);
        let best = most + (100.0 - most) * f64::from(rng.uniform());
        let base = of(&pairs, best).unwrap();
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9 * b;

        // The order of points does not matter, to the bit.
        let mut mixed = pairs.clone();
        (1..mixed.len()).rev().for_each(|i| mixed.swap(i, rng.below(i + 1)));
        assert_eq!(of(&mixed, best).unwrap(), base);
        // Another unit of tokens is another unit of AUP.
        let twice: Vec<_> = pairs.iter().map(|&(t, y)| (2.0 * t, y)).collect();
        assert!(close(of(&twice, best).unwrap(), 2.0 * base));
        // Between its first rectangle and the plain area, which it is without weights: by alpha, or where all are the best.
        assert!(base > pairs[0].0 * pairs[0].1 && base <= plain(&pairs) * (1.0 + 1e-12), "{pairs:?}");
        let unweighted = AupSettings { alpha: 0.0, ..AupSettings::default() };
        assert!(close(aup(&points(&pairs), best, unweighted).unwrap(), plain(&pairs)));
        assert!(close(of(&pairs, pairs.iter().map(|p| p.1).fold(100.0, f64::min)).unwrap(), plain(&pairs)));
        // Harder weights and better rivals take away.
        let harder = AupSettings { alpha: 3.5, ..AupSettings::default() };
        assert!(aup(&points(&pairs), best, harder).unwrap() < base);
        assert!(of(&pairs, best + 0.5 * (100.0 - best)).unwrap() < base);
        // Accuracy behind the first point, and tokens per pass at the end, add.
        let i = 1 + rng.below(pairs.len() - 1);
        let mut better = pairs.clone();
        better[i].1 += 0.5;
        assert!(of(&better, best).unwrap() > base);
        let mut faster = pairs.clone();
        faster.last_mut().unwrap().0 += 0.5;
        assert!(of(&faster, best).unwrap() > base);
        // A point that is too low changes nothing before the end, and leaves nothing at the end.
        let mut low = pairs.clone();
        low.push(((pairs[0].0 + pairs[1].0) / 2.0, pairs[0].1 - 5.1));
        assert_eq!(of(&low, best).unwrap(), base);
        low.last_mut().unwrap().0 = pairs.last().unwrap().0 + 1.0;
        assert!(of(&low, best).is_err());
    }
}

fn quadriga(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quadriga"));
    command.args(["eval", "aup"]).args(args).current_dir(folder).stdin(Stdio::null()).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = quadriga(Path::new("."), &[&["--json"], args].concat());
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Writes a file into a folder.
fn put(folder: &Path, name: &str, text: &str) {
    std::fs::write(folder.join(name), text).unwrap();
}

#[test]
fn json_and_yaml_say_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(TABLES).unwrap();
    let tables: Value = yaml_serde::from_str(&text).unwrap();
    put(dir.path(), "tables.json", &serde_json::to_string_pretty(&tables).unwrap());
    // JSON with tabs is a file of its own kind only by its name.
    put(dir.path(), "t.json", "{\n\t\"Caf\\u00e9\": {\"a\\/b\": [[1, 50]]}\n}");
    let run = |args: &[&str]| {
        let out = quadriga(dir.path(), args);
        assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    for how in [&[][..], &["--json"]] {
        assert_eq!(run(&[how, &["tables.json"]].concat()), run(&[how, &[TABLES]].concat()));
    }
    let text = run(&["tables.json"]);
    assert!(text.starts_with("LLaDA\nAUP ") && text.contains("\nDream-Coder\n"), "{text}");
    let row = |family: &str, method: &str| {
        let board = text.split("\n\n").find(|b| b.starts_with(&format!("{family}\n"))).unwrap();
        let row = board.lines().find(|l| l.starts_with(&format!("{method} "))).unwrap();
        row[method.len()..].split_whitespace().map(String::from).collect::<Vec<_>>()
    };
    assert_eq!(row("LLaDA", "d3LLM"), ["637.65", "107.64", "88.36", "96.64", "441.13", "274.28"]);
    // Four tasks: divided by 4 unless told.
    assert_eq!(row("Dream-Coder", "d3LLM"), ["208.36", "171.72", "186.18", "170.92", "184.29"]);
    assert_eq!(row("LLaDA", "best accuracy"), ["74.98", "41.15", "63.60", "67.73", "82.56"]);
    assert!(run(&["t.json"]).contains("a/b"));
}

#[test]
fn a_refused_curve_is_a_negative_result() {
    let dir = tempfile::tempdir().unwrap();
    let text = "\
sums: # of no family
  best: 100
  slow: [[1, 80]]
  bold: [[1, 80], [4, 74]]
  wise: [[1, 80], [2, 74], [3, 78]]
words: {wise: [[1, 50]], slow: [[1, 50]]}
";
    put(dir.path(), "t.yaml", text);
    let out = quadriga(dir.path(), &["t.yaml"]);
    let table = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(1), "{table}");
    let line =
        |start: &str| table.lines().find(|l| l.starts_with(start)).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(line("bold "), ["bold", "refused", "-", "-"]);
    assert_eq!(line("slow "), ["slow", "80.00", "50.00", "65.00"]);
    let why =
        "bold on sums: accuracy falls from 80 at TPF 1 to 74 at TPF 4, by 6 points: with more than 5 there is no AUP";
    assert!(table.lines().any(|l| l == why), "{table}");
    assert!(table.contains("bold: 1 of 2 tasks"), "{table}");

    let out = quadriga(dir.path(), &["t.yaml", "--json"]);
    assert_eq!(out.status.code(), Some(1));
    let out: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&out["refused"], &out["families"][0]["family"]), (&json!(1), &Value::Null));
    let sums = &out["families"][0]["tasks"][0];
    assert_eq!((&sums["task"], &sums["best"]), (&json!("sums"), &json!(100.0)));
    let [slow, bold, wise] = [0, 1, 2].map(|i| &sums["methods"][i]);
    assert_eq!((&slow["aup"], &slow["refused"]), (&json!(80.0), &Value::Null));
    assert_eq!(bold["aup"], Value::Null);
    assert!(bold["refused"].as_str().unwrap().contains("to 74 at TPF 4"));
    assert_eq!(wise["dropped"], json!([[2.0, 74.0]]));
    let expected = of(&[(1.0, 80.0), (3.0, 78.0)], 100.0).unwrap();
    assert_eq!(wise["aup"].as_f64().unwrap(), expected);
    assert_eq!((&wise["points"][1][0], &wise["points"][1][1]), (&json!(3.0), &json!(78.0)));
    assert!((wise["points"][1][2].as_f64().unwrap() - (-0.66f64).exp()).abs() < 1e-12);
    let means = &out["families"][0]["means"];
    assert_eq!(means[1], json!({"method": "bold", "mean": null, "tasks": 1}));
    assert_eq!(means[2]["mean"].as_f64().unwrap(), (expected + 50.0) / 2.0);
    // With a wider limit it stands.
    assert_eq!(quadriga(dir.path(), &["t.yaml", "--offset", "6"]).status.code(), Some(0));
}

#[test]
fn files_are_put_together() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "a.yaml", "F: {t: {slow: [[1, 80]]}}");
    put(dir.path(), "b.json", r#"{"F": {"t": {"fast": [[1, 70], [2, 70]]}, "u": {"fast": [[1, 7]]}}}"#);
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let out = json(&[&at("a.yaml"), &at("b.json")]);
    let family = &out["families"][0];
    assert_eq!((out["families"].as_array().unwrap().len(), &family["divisor"]), (1, &json!(2)));
    // By the best accuracy of both files.
    let fast = of(&[(1.0, 70.0), (2.0, 70.0)], 80.0).unwrap();
    assert_eq!(family["tasks"][0]["methods"][1]["aup"].as_f64().unwrap(), fast);
    // What a method lacks counts as nothing.
    assert_eq!(family["means"][0], json!({"method": "slow", "mean": 40.0, "tasks": 1}));
}

#[test]
fn bad_files_are_named_with_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |args: &[&str], words: &[&str]| {
        let out = quadriga(dir.path(), args);
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {text}");
        assert!(words.iter().all(|w| text.contains(w)), "{args:?}: {text}, expected {words:?}");
        assert!(out.stdout.is_empty() && !text.contains("panicked"), "{args:?}: {text}");
    };
    let cases: &[(&str, &str, &[&str])] = &[
        ("empty.yaml", "", &["expected TASK", "null"]),
        ("list.json", "[[1, 2]]", &["expected TASK", "found [[1, 2]]"]),
        ("none.json", "{}", &["no tasks"]),
        ("long.yaml", "t: {m: {n: [[1, 2, 3, 4]]}}", &["t: m: n: point 1: expected", "found [1, 2, 3, ..]"]),
        ("methods.yaml", "t: {}", &["t: ", "no methods"]),
        ("number.yaml", "t: 5", &["t: expected METHOD", "found 5"]),
        ("points.yaml", "t: {m: []}", &["t: m: no points"]),
        ("pair.yaml", "t: {m: [1, 80]}", &["t: m: point 1: expected [TPF, accuracy]", "found 1"]),
        ("three.yaml", "t: {m: [[1, 80], [1, 2, 3]]}", &["t: m: point 2: expected", "found [1, 2, 3]"]),
        ("text.yaml", "t: {m: [[1, '80']]}", &["t: m: point 1: expected", r#"found [1, "80"]"#]),
        ("tpf.yaml", "f: {t: {m: [[1, 80], [0, 80]]}}", &["f: t: m: point 2: TPF 0"]),
        ("nan.yaml", "t: {m: [[1, .nan]]}", &["t: m: point 1: accuracy NaN"]),
        ("percent.yaml", "t: {m: [[1, 180]]}", &["t: m: point 1: accuracy 180"]),
        ("best.yaml", "t: {best: 101, m: [[1, 80]]}", &["t: best: 101"]),
        (
            "best2.yaml",
            "t: {best: [[1, 80]], m: [[1, 80]]}",
            &["t: best: expected the task's best accuracy, found [[1, 80]]"],
        ),
        ("best3.yaml", "f: {best: 80, t: {m: [[1, 80]]}}", &["f: best: expected METHOD"]),
        ("twice.yaml", "t:\n  m: [[1, 80]]\n  m: [[1, 81]]", &["m comes twice", "line"]),
        ("twice.json", "{\"t\": {\"m\": [[1, 80]],\n \"m\": [[1, 81]]}}", &["m comes twice", "line 2"]),
        ("broken.json", "{\"t\":\n {\"m\": [[1, 80]}}", &["line 2"]),
        ("broken.yaml", "t:\n  m: [[1, 80]\n", &["line"]),
        ("two.yaml", "t: {m: [[1, 80]]}\n---\nt: {n: [[1, 80]]}\n", &["more than one document"]),
    ];
    for (name, text, words) in cases {
        put(dir.path(), name, text);
        fails(&[name], &[&[*name], *words].concat());
    }
    fails(&["nowhere.yaml"], &["nowhere.yaml", "not readable"]);
    fails(&[], &["FILES", "required", "--data"]);
    put(dir.path(), "a.yaml", "t: {best: 80, m: [[1, 80]]}");
    put(dir.path(), "b.yaml", "t: {best: 81, n: [[1, 80]]}");
    put(dir.path(), "c.yaml", "t: {m: [[1, 80]]}\nu: {m: [[1, 80]]}");
    fails(&["a.yaml", "b.yaml"], &["b.yaml: t: best: 81 here, 80"]);
    fails(&["a.yaml", "c.yaml"], &["c.yaml: t: m: also in an earlier file"]);
    fails(&["c.yaml", "--tasks", "1"], &["--tasks 1", "2 tasks"]);
    fails(&["c.yaml", "--alpha", "-1"], &["alpha -1"]);
    fails(&["c.yaml", "--svg", "no/where.svg"], &["no/where-t.svg"]);
    // Fractions where percent belong are possible, but not likely.
    put(dir.path(), "f.yaml", "t: {m: [[1, 0.8]]}");
    let out = quadriga(dir.path(), &["f.yaml"]);
    assert!(out.status.success() && String::from_utf8_lossy(&out.stderr).contains("percent"));
}

#[test]
fn pictures_have_a_line_for_each_method() {
    let dir = tempfile::tempdir().unwrap();
    let text = "F: {a/b: {m: [[1, 80], [3, 79]], <&>: [[1, 70]]}, A-B: {m: [[1, 80], [2, 79]]}}";
    put(dir.path(), "t.yaml", text);
    assert!(quadriga(dir.path(), &["t.yaml", "--svg", "out.svg"]).status.success());
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let (first, second) = (read("out-F-a-b.svg"), read("out-F-A-B-2.svg"));
    assert_eq!((first.matches("<polyline").count(), first.matches("<circle").count()), (1, 1));
    assert!(first.contains("a/b in F") && first.contains("&lt;&amp;>"), "{first}");
    assert_eq!((second.matches("<polyline").count(), second.matches("<circle").count()), (1, 0));
    put(dir.path(), "one.yaml", "t: {m: [[1, 80], [3, 79]]}");
    assert!(quadriga(dir.path(), &["one.yaml", "--svg", "one.svg"]).status.success());
    assert!(read("one.svg").ends_with("</svg>\n"));
}
