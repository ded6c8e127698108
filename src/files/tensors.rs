//! Safetensors files, written tensor by tensor and read back as f32.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorBytes<'a> {
    /// Name in the file, given once.
    pub name: String,
    /// Of its elements.
    pub dtype: Dtype,
    /// Dimensions, row-major.
    pub shape: Vec<usize>,
    /// Its elements.
    pub bytes: &'a [u8],
}

impl<'a> TensorBytes<'a> {
    /// A tensor of f32.
    pub fn f32(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.into(), bytes: bytemuck::cast_slice(values) }
    }
}

/// Writes `tensors` as one safetensors file, in their order except that wider elements come first, so that all are aligned. `metadata` goes into the header.
///
/// # Errors
/// `InvalidInput` for what is no such file: bytes that do not fit the shape, a name given twice.
pub fn write_tensors(
    out: &mut dyn Write,
    tensors: &[TensorBytes<'_>],
    metadata: Option<(&str, &str)>,
) -> io::Result<()> {
    let refused = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    let mut sorted: Vec<&TensorBytes> = Vec::new();
    for t in tensors {
        if sorted.iter().any(|s| s.name == t.name) {
            return Err(refused(format!("tensor {:?} is given twice", t.name)));
        }
        sorted.push(t);
    }
    sorted.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize()));
    let mut at = 0;
    let infos = sorted.iter().map(|t| {
        let from = at;
        at += t.bytes.len();
        (t.name.clone(), TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets: (from, at) })
    });
    let metadata = metadata.map(|(k, v)| [(k.into(), v.into())].into());
    let header = Metadata::new(metadata, infos.collect()).map_err(|e| refused(e.to_string()))?;
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    sorted.iter().try_for_each(|t| out.write_all(t.bytes))
}

/// Passes bytes on and hashes them.
pub struct Hashing<T> {
    inner: T,
    hash: Sha256,
    bytes: u64,
}

impl<T> Hashing<T> {
    /// Around a reader or a writer.
    pub fn new(inner: T) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// Bytes that went through.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn count(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// The SHA-256 of all that went through, in hexadecimal.
    pub fn finish(self) -> String {
        self.hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.count(&bytes[..n]);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(bytes)?;
        self.count(&bytes[..n]);
        Ok(n)
    }
}

/// Name, shape and values.
pub type F32Tensor = (String, Vec<usize>, Vec<f32>);

/// Reads a file of f32 tensors as [`write_tensors`] writes it, in the file's order, with the SHA-256 of the file.
///
/// # Errors
/// `Weights` for a file that is cut short, too long or not of this form.
pub fn read_f32(path: &Path) -> Result<(Vec<F32Tensor>, String)> {
    let io = |e| Error::io(path.display(), e);
    let file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    read_tensors(Hashing::new(BufReader::with_capacity(1 << 20, file)), size).context(|| path.display().to_string())
}

fn read_tensors(mut file: Hashing<impl Read>, size: u64) -> Result<(Vec<F32Tensor>, String)> {
    let damaged = |e: String| Error::new(ErrorKind::Weights, format!("not a sound safetensors file: {e}"));
    let broken = |e: io::Error| damaged(e.to_string());
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(broken)?;
    let length = u64::from_le_bytes(length);
    ensure!(length <= size, Weights, "not a sound safetensors file: its header is cut short");
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(broken)?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|e| damaged(e.to_string()))?;
    let mut infos: Vec<(String, &TensorInfo)> = header.tensors().into_iter().collect();
    infos.sort_by(|(a, x), (b, y)| (x.data_offsets, a).cmp(&(y.data_offsets, b)));

    let mut at = 0;
    let mut tensors = Vec::new();
    for (name, info) in infos {
        let n = info.shape.iter().try_fold(4usize, |n, &d| n.checked_mul(d));
        let (from, to) = info.data_offsets;
        let end = n.and_then(|n| n.checked_add(at)).filter(|&end| end as u64 <= size);
        if from != at || Some(to) != end || info.dtype != Dtype::F32 {
            bail!(Weights, "tensor {name:?}: {:?} {:?} at {from}..{to} does not fit", info.dtype, info.shape);
        }
        let mut values = vec![0f32; (to - from) / 4];
        file.read_exact(bytemuck::cast_slice_mut(&mut values))
            .map_err(broken)
            .context(|| format!("tensor {name:?}"))?;
        at = to;
        tensors.push((name, info.shape.clone(), values));
    }
    ensure!(
        size == 8 + length + at as u64,
        Weights,
        "{size} bytes, of which the header explains {}",
        8 + length + at as u64
    );
    Ok((tensors, file.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<F32Tensor> {
        let odd = vec![f32::MIN_POSITIVE / 8.0, -0.0, f32::from_bits(0x7FC0_1234), f32::INFINITY, 1.0 / 3.0, -7.5];
        vec![("z".into(), vec![2, 3], odd), ("a".into(), vec![], vec![4.0]), ("empty".into(), vec![0, 5], vec![])]
    }

    fn bytes(tensors: &[F32Tensor]) -> Vec<u8> {
        let views: Vec<_> = tensors.iter().map(|(n, s, v)| TensorBytes::f32(n, s, v)).collect();
        let mut out = Vec::new();
        write_tensors(&mut out, &views, Some(("format", "pt"))).unwrap();
        out
    }

    fn read(bytes: &[u8]) -> Result<(Vec<F32Tensor>, String)> {
        read_tensors(Hashing::new(bytes), bytes.len() as u64)
    }

    #[test]
    fn what_is_written_is_read_in_order_and_bit_for_bit() {
        let (written, file) = (sample(), bytes(&sample()));
        let (tensors, hash) = read(&file).unwrap();
        let bits = |t: &[F32Tensor]| -> Vec<_> {
            let one = |(n, s, v): &F32Tensor| (n.clone(), s.clone(), v.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            t.iter().map(one).collect()
        };
        assert_eq!(bits(&tensors), bits(&written));
        let whole: String = Sha256::digest(&file).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hash, whole);
        // Sound by the library's own rules, too.
        let view = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!((view.len(), view.tensor("z").unwrap().shape()), (3, &[2usize, 3][..]));
    }

    #[test]
    fn mixed_types_are_aligned() {
        let half = TensorBytes { name: "h".into(), dtype: Dtype::F16, shape: vec![1], bytes: &[0, 60] };
        let mut out = Vec::new();
        write_tensors(&mut out, &[half.clone(), TensorBytes::f32("f", &[1], &[2.0])], None).unwrap();
        let (n, header) = safetensors::SafeTensors::read_metadata(&out).unwrap();
        assert_eq!(
            (n % 8, header.info("f").unwrap().data_offsets, header.info("h").unwrap().data_offsets),
            (0, (0, 4), (4, 6))
        );
        let refused = |t: &[TensorBytes]| write_tensors(&mut io::sink(), t, None).unwrap_err().to_string();
        assert!(refused(&[half.clone(), half.clone()]).contains("twice"));
        assert!(refused(&[TensorBytes { shape: vec![2], ..half }]).contains('h'));
    }

    #[test]
    fn damage_is_an_error_never_a_panic() {
        let file = bytes(&sample());
        for cut in 0..file.len() {
            assert!(read(&file[..cut]).is_err(), "cut at {cut}");
        }
        assert!(read(&[&file[..], b"x"].concat()).is_err());
        for at in 0..file.len() {
            for byte in [0, b' ', b'"', b',', b'0', b'9', b'[', b'}', 0xFF] {
                let mut f = file.clone();
                f[at] = byte;
                let _ = read(&f);
            }
        }
        let huge = br#"{"t":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,18446744073709551615]}}"#;
        let mut f = (huge.len() as u64).to_le_bytes().to_vec();
        f.extend(huge);
        assert!(read(&f).is_err());
    }
}
