//! Writing beside the target, syncing, renaming.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, TempDir};

use crate::error::{Error, Result, bail, ensure};

/// Writes the file `path` through `write`: to a temporary name in the same folder, synced, then renamed. An error leaves what
/// was there before.
pub fn write_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let io = |e| Error::io(path.display(), e);
    let (parent, prefix) = (parent(path), beside(path, ".tmp-")?);
    let mut builder = Builder::new();
    let temp = with_mode(builder.prefix(&prefix), 0o666).tempfile_in(parent).map_err(io)?;
    fill(temp.as_file(), write).map_err(io)?;
    temp.persist(path).map_err(|e| io(e.error))?;
    sync_folder(parent).map_err(io)
}

/// A folder in the making; see [`write_folder`].
pub struct Folder<'a> {
    target: &'a Path,
    temp: TempDir,
}

impl Folder<'_> {
    /// Writes file `name` into it. Errors name the file by the place where it was to be.
    pub fn write(&self, name: &str, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
        let file = File::create_new(self.temp.path().join(name)).and_then(|f| fill(&f, write));
        file.map_err(|e| Error::io(self.target.join(name).display(), e))
    }
}

/// Writes the folder `path` through `write`. All its files are made in `NAME.tmp-..` beside it and synced before the folder
/// gets its name; an old one is first renamed to `NAME.old` and removed at last. Between these two renames, and only there,
/// the folder is to be found under that name: readers ask [`find_folder`]. One writer at a time.
///
/// # Errors
/// A file that cannot be written, by name. `Usage` where the old folder holds something that the new one does not: it is
/// more than a former version, and stays as it is.
pub fn write_folder(path: &Path, write: impl FnOnce(&Folder) -> Result<()>) -> Result<()> {
    let io = |e| Error::io(path.display(), e);
    let (parent, prefix) = (parent(path), beside(path, ".tmp-")?);
    let old = parent.join(beside(path, ".old")?);
    fs::create_dir_all(parent).map_err(io)?;
    tidy(path, &old, parent, &prefix).map_err(io)?;

    let mut builder = Builder::new();
    let temp = with_mode(builder.prefix(&prefix), 0o777).tempdir_in(parent).map_err(io)?;
    let folder = Folder { target: path, temp };
    write(&folder)?;
    let temp = folder.temp;
    sync_folder(temp.path()).map_err(io)?;

    let replaces = path.exists();
    if replaces {
        for entry in fs::read_dir(path).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            let known = temp.path().join(&name).exists();
            ensure!(known, Usage, "{} holds {name:?}, which replacing it would delete", path.display());
        }
        fs::rename(path, &old).map_err(io)?;
    }
    if let Err(e) = fs::rename(temp.path(), path) {
        if replaces {
            fs::rename(&old, path).map_err(io)?;
        }
        return Err(io(e));
    }
    let _ = temp.keep();
    sync_folder(parent).map_err(io)?;
    if replaces {
        fs::remove_dir_all(&old).map_err(io)?;
    }
    Ok(())
}

/// Where the folder `path` is: there, or where a writer killed in the middle of replacing it left the old one.
pub fn find_folder(path: &Path) -> PathBuf {
    match beside(path, ".old") {
        Ok(old) if !path.exists() && parent(path).join(&old).is_dir() => parent(path).join(old),
        _ => path.into(),
    }
}

/// Clears away what killed writers left.
fn tidy(path: &Path, old: &Path, parent: &Path, prefix: &OsString) -> io::Result<()> {
    if old.is_dir() {
        if path.exists() { fs::remove_dir_all(old)? } else { fs::rename(old, path)? }
    }
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn fill(file: &File, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, file);
    write(&mut out)?;
    out.flush()?;
    file.sync_all()
}

/// The name of `path` with `end` appended.
fn beside(path: &Path, end: &str) -> Result<OsString> {
    let Some(name) = path.file_name() else { bail!(Usage, "{} is not a name to write to", path.display()) };
    let mut name = name.to_owned();
    name.push(end);
    Ok(name)
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What is written is for everyone whom the user's umask lets read it, unlike other temporary files.
fn with_mode<'a, 'b, 'c>(builder: &'c mut Builder<'a, 'b>, mode: u32) -> &'c mut Builder<'a, 'b> {
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// A rename is on disk once its folder is; elsewhere than on Unix folders cannot be synced.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};
    use std::time::Duration;

    fn entries(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn put(path: &Path, text: &str) -> Result<()> {
        write_folder(path, |f| {
            f.write("a", |w| w.write_all(text.as_bytes()))?;
            f.write("b", |w| w.write_all(text.repeat(1000).as_bytes()))
        })
    }

    /// The text that both files agree on.
    fn get(path: &Path) -> String {
        let path = find_folder(path);
        let text = fs::read_to_string(path.join("a")).unwrap();
        assert_eq!(fs::read_to_string(path.join("b")).unwrap(), text.repeat(1000));
        text
    }

    #[test]
    fn a_writer_that_fails_leaves_the_old_and_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("x.txt"), dir.path().join("f"));
        write_file(&file, |w| w.write_all(b"old")).unwrap();
        put(&folder, "old").unwrap();
        let broken = |w: &mut dyn Write| w.write_all(b"ne").and(Err(io::Error::from(io::ErrorKind::StorageFull)));
        let e = write_file(&file, broken).unwrap_err().to_string();
        assert!(e.contains("x.txt: ") && e.contains("no storage space"), "{e}");
        let e = write_folder(&folder, |f| f.write("a", |w| w.write_all(b"n")).and(f.write("b", broken))).unwrap_err();
        assert!(e.to_string().contains("f/b: "), "{e}");
        assert_eq!((fs::read_to_string(&file).unwrap(), get(&folder)), ("old".into(), "old".into()));
        assert_eq!(entries(dir.path()), ["f", "x.txt"]);
        write_file(&file, |w| w.write_all(b"new")).unwrap();
        put(&folder, "new").unwrap();
        assert_eq!((fs::read_to_string(&file).unwrap(), get(&folder)), ("new".into(), "new".into()));
        assert_eq!(entries(dir.path()), ["f", "x.txt"]);
    }

    #[test]
    fn only_a_former_version_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("f");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("thesis.tex"), "x").unwrap();
        let e = put(&folder, "new").unwrap_err();
        assert!(e.kind() == crate::ErrorKind::Usage && e.to_string().contains("thesis.tex"), "{e}");
        assert_eq!((entries(dir.path()), entries(&folder)), (vec!["f".into()], vec!["thesis.tex".into()]));
        assert!(put(Path::new("/"), "x").is_err() && write_file(Path::new(".."), |_| Ok(())).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn files_are_as_readable_as_any() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("plain"), "").unwrap();
        write_file(&dir.path().join("x"), |_| Ok(())).unwrap();
        put(&dir.path().join("f"), "x").unwrap();
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o666;
        assert_eq!((mode("x"), mode("f/a"), mode("f")), (mode("plain"), mode("plain"), mode("plain")));
    }

    /// Runs one test of this binary in a child, through a shell, with the folder to work on in its environment.
    #[cfg(unix)]
    fn child(script: &str, test: &str, dir: &Path) -> Command {
        let mut command = Command::new("sh");
        let exe = std::env::current_exe().unwrap();
        let name = format!("files::atomic::tests::{test}");
        command.args(["-c", &format!("{script} exec \"$0\" --exact {name} --nocapture")]).arg(exe);
        command.env("QUADRIGA_TEST_FOLDER", dir).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    #[cfg(unix)]
    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        // In the child files may grow to 4 KiB.
        if let Some(dir) = std::env::var_os("QUADRIGA_TEST_FOLDER") {
            println!("error: {}", put(&Path::new(&dir).join("f"), &"new".repeat(100)).unwrap_err());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        put(&dir.path().join("f"), "old").unwrap();
        let script = "trap '' XFSZ; ulimit -f 8;";
        let out = child(script, "a_full_disk_is_an_error_that_names_the_file", dir.path()).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && text.contains("f/b: File too large"), "{out:?}");
        assert_eq!((get(&dir.path().join("f")), entries(dir.path())), ("old".into(), vec!["f".into()]));
    }

    #[cfg(unix)]
    #[test]
    fn a_writer_killed_at_any_moment_leaves_a_whole_folder() {
        if let Some(dir) = std::env::var_os("QUADRIGA_TEST_FOLDER") {
            for i in 0u64.. {
                // No writer writes what another did.
                put(&Path::new(&dir).join("f"), &format!("{}: {i},", std::process::id())).unwrap();
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("f");
        put(&folder, "first").unwrap();
        for i in 0..12 {
            let before = get(&folder);
            let mut child =
                child("", "a_writer_killed_at_any_moment_leaves_a_whole_folder", dir.path()).spawn().unwrap();
            // Until it writes; then for a moment more.
            while fs::read_to_string(folder.join("a")).is_ok_and(|now| now == before) {
                assert!(child.try_wait().unwrap().is_none(), "the writer ended by itself");
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_micros(1700 * i));
            child.kill().unwrap();
            child.wait().unwrap();
            assert_ne!(get(&folder), before);
        }
        // The moment between the renames, made by hand.
        put(&folder, "last").unwrap();
        fs::rename(&folder, dir.path().join("f.old")).unwrap();
        fs::create_dir(dir.path().join("f.tmp-1")).unwrap();
        assert_eq!(get(&folder), "last");
        put(&folder, "next").unwrap();
        assert_eq!((get(&folder), entries(dir.path())), ("next".into(), vec!["f".into()]));
    }
}
