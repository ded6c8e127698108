//! Lines of a file, packed or not.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use crate::error::{Error, ErrorKind, Result, bail};

/// Whether the name of `path` says that it holds one JSON record a line (`.jsonl`), not one text (`.txt`); either may be
/// packed (`.gz`).
///
/// # Errors
/// `Usage` for any other name.
pub fn is_lines(path: &Path) -> Result<bool> {
    let inner = if is_packed(path) { path.with_extension("") } else { path.into() };
    match inner.extension().and_then(OsStr::to_str) {
        Some("jsonl") => Ok(true),
        Some("txt") => Ok(false),
        _ => bail!(Usage, "{}: expected a .jsonl, .jsonl.gz, .txt or .txt.gz file", path.display()),
    }
}

fn is_packed(path: &Path) -> bool {
    path.extension() == Some(OsStr::new("gz"))
}

fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let file = BufReader::new(File::open(path).map_err(|e| Error::io(path.display(), e))?);
    Ok(if is_packed(path) { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(file) })
}

/// An error of reading: the data's fault where it is packed badly.
fn failed(path: &Path, e: io::Error) -> Error {
    use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    if is_packed(path) && matches!(e.kind(), UnexpectedEof | InvalidData | InvalidInput) {
        return Error::with_source(ErrorKind::Usage, format!("{}: cut short, or not a gzip file", path.display()), e);
    }
    Error::io(path.display(), e)
}

/// The whole text of a file.
pub fn read_all(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(|e| failed(path, e))?;
    String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        Error::new(ErrorKind::Usage, format!("{}, line {line}: not UTF-8", path.display()))
    })
}

/// Calls `each` with the number, from 1, and the text of each line. Blank lines at the end are passed over.
///
/// # Errors
/// `Usage` for a blank line before others, bytes that are not UTF-8 and a packed file that is cut short; those of `each`.
pub fn for_each_line(path: &Path, mut each: impl FnMut(usize, &str) -> Result<()>) -> Result<()> {
    let mut file = open(path)?;
    let (mut bytes, mut line, mut blank) = (Vec::new(), 0, None);
    loop {
        bytes.clear();
        if file.read_until(b'\n', &mut bytes).map_err(|e| failed(path, e))? == 0 {
            return Ok(());
        }
        line += 1;
        let Ok(text) = std::str::from_utf8(&bytes) else {
            bail!(Usage, "{}, line {line}: not UTF-8", path.display());
        };
        let text = text.trim();
        if text.is_empty() {
            blank = blank.or(Some(line));
            continue;
        }
        if let Some(blank) = blank {
            bail!(Usage, "{}, line {blank}: blank, but rows follow", path.display());
        }
        each(line, text)?;
    }
}
