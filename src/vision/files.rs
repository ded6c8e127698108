//! Files of images: IDX as MNIST has it, and tables of pixels. Names that end in `.gz` are unpacked.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::images::{Examples, Images};
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};

/// Upper bound of an unpacked file: twenty times the largest in use.
const MAX_FILE: u64 = 1 << 30;

/// All of a file.
fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |e| Error::io(path.display(), e);
    let file = BufReader::new(File::open(path).map_err(io)?);
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|e| e == "gz") {
        MultiGzDecoder::new(file).take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| {
            Error::with_source(ErrorKind::Usage, format!("{}: cut short, or not a gzip file", path.display()), e)
        })?;
    } else {
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(io)?;
    }
    ensure!(bytes.len() as u64 <= MAX_FILE, Capacity, "{}: more than {MAX_FILE} bytes", path.display());
    Ok(bytes)
}

/// Dimensions and values of an IDX file of unsigned bytes: two zeros, the type 8, the number of dimensions, each of them in four bytes
/// with the highest first, then the values.
fn idx(bytes: &[u8]) -> Result<(Vec<usize>, &[u8])> {
    let Some((&[zero, other, kind, dims], rest)) = bytes.split_first_chunk::<4>() else {
        bail!(Usage, "{} bytes are no IDX file", bytes.len());
    };
    ensure!(zero == 0 && other == 0, Usage, "not an IDX file: it begins with {zero:#04x} {other:#04x}");
    ensure!(kind == 8, Unsupported, "IDX elements of type {kind:#04x}; only unsigned bytes (0x08) are read");
    let n = 4 * usize::from(dims);
    ensure!(dims > 0 && rest.len() >= n, Usage, "an IDX file of {dims} dimensions that ends within them");
    let (head, values) = rest.split_at(n);
    let dims: Vec<usize> = head.chunks_exact(4).map(|d| d.iter().fold(0, |n, &b| n << 8 | usize::from(b))).collect();
    let want = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    ensure!(want == Some(values.len()), Usage, "{} values where the dimensions are {dims:?}", values.len());
    Ok((dims, values))
}

/// Images of an IDX file `[n, height, width]` (or `[n, channels, height, width]`), 0 to 1: those of MNIST and Fashion-MNIST.
///
/// # Errors
/// `Io`, and `Usage` for a file that is cut short, too long or of another kind, by name.
pub fn idx_images(path: &Path) -> Result<Images> {
    let bytes = read(path)?;
    let images = || -> Result<Images> {
        let (dims, values) = idx(&bytes)?;
        let shape = match dims[..] {
            [_, h, w] => [1, h, w],
            [_, c, h, w] => [c, h, w],
            _ => bail!(Usage, "images have three or four dimensions, this file {dims:?}"),
        };
        Images::new(shape, values.iter().map(|&v| f32::from(v) / 255.0).collect())
    };
    images().context(|| path.display().to_string())
}

/// Labels of an IDX file `[n]`.
///
/// # Errors
/// As [`idx_images`].
pub fn idx_labels(path: &Path) -> Result<Vec<u32>> {
    let bytes = read(path)?;
    let labels = || -> Result<Vec<u32>> {
        let (dims, values) = idx(&bytes)?;
        ensure!(dims.len() == 1, Usage, "labels have one dimension, this file {dims:?}");
        Ok(values.iter().map(|&v| v.into()).collect())
    };
    labels().context(|| path.display().to_string())
}

/// Examples of an IDX file of images and one of labels.
///
/// # Errors
/// As [`idx_images`]; files of different lengths.
pub fn idx_examples(images: &Path, labels: &Path) -> Result<Examples> {
    let (found, classes) = (idx_images(images)?, idx_labels(labels)?);
    Examples::new(found, classes).context(|| format!("{} and {}", images.display(), labels.display()))
}

/// Examples of a table without a header, a line an image: its pixels, 0 to `most`, channel by channel and row by row, then its label.
/// Pixels become 0 to 1. scikit-learn's `digits.csv.gz` is such a table: `shape` [1, 8, 8], `most` 16.
///
/// # Errors
/// `Io`; `Usage` for a line with other numbers of values, or values that are none, by file and line.
pub fn csv_examples(path: &Path, shape: [usize; 3], most: f32) -> Result<Examples> {
    ensure!(most > 0.0 && most.is_finite(), Usage, "pixels from 0 to {most}");
    let bytes = read(path)?;
    let one: usize = shape.iter().product();
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for (i, line) in bytes.split(|&b| b == b'\n').enumerate() {
        let place = || format!("{}, line {}", path.display(), i + 1);
        let Ok(line) = std::str::from_utf8(line) else { bail!(Usage, "{}: not UTF-8", place()) };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let values: Vec<&str> = line.split(',').map(str::trim).collect();
        let n = values.len();
        ensure!(n == one + 1, Usage, "{}: {n} values; expected {one} pixels and a label", place());
        for value in &values[..one] {
            match value.parse::<f32>() {
                Ok(x) if (0.0..=most).contains(&x) => pixels.push(x / most),
                _ => bail!(Usage, "{}: {value:?} is no pixel from 0 to {most}", place()),
            }
        }
        // Some tables have their labels as decimal numbers.
        match values[one].parse::<f64>() {
            Ok(x) if x >= 0.0 && x < f64::from(u32::MAX) && x.fract() == 0.0 => labels.push(x as u32),
            _ => bail!(Usage, "{}: {:?} is no label", place(), values[one]),
        }
    }
    ensure!(!labels.is_empty(), Usage, "{}: no images", path.display());
    Examples::new(Images::new(shape, pixels)?, labels)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut z = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        z.write_all(bytes).unwrap();
        z.finish().unwrap()
    }

    const IMAGES: &[u8] = &[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0, 51, 255, 102];
    const LABELS: &[u8] = &[0, 0, 8, 1, 0, 0, 0, 2, 7, 3];

    #[test]
    fn idx_files_packed_and_not() {
        for pack in [false, true] {
            let wrap = |b: &[u8]| if pack { packed(b) } else { b.to_vec() };
            let suffix = if pack { ".gz" } else { "" };
            let (_a, images) = file(&format!("images{suffix}"), &wrap(IMAGES));
            let (_b, labels) = file(&format!("labels{suffix}"), &wrap(LABELS));
            let ex = idx_examples(&images, &labels).unwrap();
            assert_eq!((ex.images.shape(), ex.images.len()), ([1, 1, 2], 2));
            assert_eq!((ex.images.pixels(), &ex.labels[..]), (&[0.0, 0.2, 1.0, 0.4][..], &[7, 3][..]));
        }
    }

    #[test]
    fn damaged_idx_files_are_refused_by_name() {
        for cut in 0..IMAGES.len() {
            let (_d, path) = file("cut", &IMAGES[..cut]);
            let e = idx_images(&path).unwrap_err().to_string();
            assert!(e.contains("cut"), "{e}");
        }
        let refused = |bytes: &[u8], says: &str| {
            let (_d, path) = file("images", bytes);
            let e = idx_images(&path).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains("images"), "{e}");
        };
        refused(&[IMAGES, &[1]].concat(), "5 values where the dimensions are [2, 1, 2]");
        refused(LABELS, "images have three or four dimensions");
        refused(b"PNG and more", "not an IDX file");
        refused(&[0, 0, 0x0d, 1, 0, 0, 0, 0], "elements of type 0x0d");
        refused(&[0, 0, 8, 3, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255], "0 values");
        let (_d, path) = file("images.gz", &packed(IMAGES)[..20]);
        assert!(idx_images(&path).unwrap_err().to_string().contains("cut short, or not a gzip file"));
        let (_a, images) = file("images", IMAGES);
        let (_b, labels) = file("labels", &[0, 0, 8, 1, 0, 0, 0, 1, 7]);
        assert!(idx_examples(&images, &labels).unwrap_err().to_string().contains("1 labels for 2 images"));
        assert_eq!(idx_images(Path::new("not there")).unwrap_err().kind(), ErrorKind::Io);
    }

    #[test]
    fn tables_of_pixels() {
        let (_d, path) = file("t.csv.gz", &packed(b"0,4,8,16,3\n16.0, 0,0,0,1.0\r\n\n"));
        let ex = csv_examples(&path, [1, 2, 2], 16.0).unwrap();
        assert_eq!((ex.images.pixels(), &ex.labels[..]), (&[0.0, 0.25, 0.5, 1.0, 1.0, 0.0, 0.0, 0.0][..], &[3, 1][..]));
        let refused = |text: &str, says: &str| {
            let (_d, path) = file("t.csv", text.as_bytes());
            let e = csv_examples(&path, [1, 2, 2], 16.0).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains("t.csv"), "{e}");
        };
        refused("0,4,8,16,3\n0,4,8,3\n", "line 2: 4 values; expected 4 pixels and a label");
        refused("0,4,8,17,3\n", "line 1: \"17\" is no pixel from 0 to 16");
        refused("0,4,x,16,3\n", "\"x\" is no pixel");
        refused("0,4,NaN,16,3\n", "\"NaN\" is no pixel");
        refused("0,4,8,16,-1\n", "\"-1\" is no label");
        refused("\n", "no images");
    }
}
