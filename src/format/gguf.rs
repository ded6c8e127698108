//! The GGUF container, versions 2 and 3: typed metadata and a table of tensors.
//!
//! Layout, little-endian: `"GGUF"`, u32 version, u64 tensor count, u64 key count; keys (string, u32 type, value); tensors
//! (string name, u32 dimension count, u64 dimensions with the fastest first, u32 type, u64 offset); padding to the
//! alignment; data. A string is a u64 length and its bytes. Every number is checked against the bytes that are really there
//! before anything is sized or indexed by it. Arrays (a vocabulary, for one) are kept as ranges of the file and read on demand.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::mmap::Mapping;
use crate::format::{StoredType, TensorEntry};
use crate::tensor::{ByteSource, Bytes};

/// The largest `general.alignment` accepted; files in use have 32.
const MAX_ALIGNMENT: usize = 1 << 16;
/// How deep arrays of arrays may nest; the format's users nest none.
const MAX_DEPTH: usize = 4;

/// Type of a metadata value, with the format's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    U8 = 0,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn of(number: u32) -> Result<Self> {
        use Kind::*;
        const ALL: [Kind; 13] = [U8, I8, U16, I16, U32, I32, F32, Bool, Str, Array, U64, I64, F64];
        match ALL.get(number as usize) {
            Some(&k) => Ok(k),
            None => bail!(Weights, "metadata type number {number} is unknown"),
        }
    }

    /// Bytes of one value; for strings and arrays the fewest it can have.
    fn min_bytes(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 | Kind::Str => 8,
            Kind::Array => 12,
        }
    }
}

/// A metadata value: numbers as themselves, the rest as ranges of the file.
#[derive(Clone, Debug)]
enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Str(Range<usize>),
    Array(ArrayRange),
}

#[derive(Clone, Debug)]
struct ArrayRange {
    kind: Kind,
    count: usize,
    range: Range<usize>,
}

/// A parsed file. Cheap to keep: the data stay in the map.
pub struct Gguf {
    source: Arc<dyn ByteSource>,
    keys: HashMap<String, Value>,
    tensors: Vec<TensorEntry>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Maps and parses the file at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(Mapping::open(path)?).context(|| path.display().to_string())
    }

    /// Parses bytes from anywhere.
    pub fn parse(source: Arc<dyn ByteSource>) -> Result<Self> {
        let mut r = Reader { bytes: source.bytes(), at: 0 };
        ensure!(r.take(4)? == b"GGUF", Weights, "not a GGUF file (it does not start with \"GGUF\")");
        let version = r.u32()?;
        ensure!(version.swap_bytes() > 3, Weights, "a big-endian GGUF file; only little-endian ones are read");
        ensure!(matches!(version, 2 | 3), Weights, "GGUF version {version}; versions 2 and 3 are read");
        let tensor_count = r.count("tensors", 8 + 4 + 8 + 4 + 8)?;
        let key_count = r.count("metadata keys", 8 + 4 + 1)?;

        // Collections grow as entries are really found, so a false count costs nothing.
        let mut keys = HashMap::new();
        for i in 0..key_count {
            let key = r.string().context(|| format!("metadata key {i}"))?.to_owned();
            let value = r.value().context(|| format!("metadata key {key:?}"))?;
            ensure!(!keys.contains_key(&key), Weights, "metadata key {key:?} occurs twice");
            keys.insert(key, value);
        }
        let mut tensors = Vec::new();
        let mut by_name = HashMap::new();
        for i in 0..tensor_count {
            let t = r.tensor().context(|| format!("tensor {i}"))?;
            ensure!(by_name.insert(t.name.clone(), i).is_none(), Weights, "tensor {:?} occurs twice", t.name);
            tensors.push(t);
        }
        let header = r.at;
        let mut gguf = Self { source: source.clone(), keys, tensors, by_name };
        let alignment = gguf.int("general.alignment")?.unwrap_or(32);
        let alignment = usize::try_from(alignment).ok().filter(|a| a.is_power_of_two() && *a <= MAX_ALIGNMENT);
        let Some(alignment) = alignment else {
            bail!(Weights, "general.alignment is not a power of two from 1 to {MAX_ALIGNMENT}");
        };
        place(&mut gguf.tensors, header.next_multiple_of(alignment), alignment, source.bytes().len())?;
        Ok(gguf)
    }

    /// The tensor table in file order.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The entry of tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The stored bytes of an entry of this file.
    pub fn data(&self, entry: &TensorEntry) -> Bytes {
        Bytes::new(self.source.clone(), entry.range.clone())
    }

    /// Metadata keys in no order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// Whether metadata key `key` exists, of any type.
    pub fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// The string under `key`, if there is one; an error if something else is there.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Str(r)) => utf8(&self.source.bytes()[r.clone()]).map(Some).context(|| key.to_owned()),
            Some(v) => Err(wrong(key, v, "a string")),
        }
    }

    /// The integer under `key`.
    pub fn int(&self, key: &str) -> Result<Option<i128>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Int(i)) => Ok(Some(*i)),
            Some(v) => Err(wrong(key, v, "an integer")),
        }
    }

    /// The size or id under `key`.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        let fits =
            |i| usize::try_from(i).map_err(|_| Error::new(ErrorKind::Config, format!("{key}: {i} is out of range")));
        self.int(key)?.map(fits).transpose()
    }

    /// The token id under `key`; -1 in a signed field and u32::MAX mean none, as some writers put it.
    pub fn token(&self, key: &str) -> Result<Option<u32>> {
        match self.int(key)? {
            None | Some(-1) => Ok(None),
            Some(i) if i == u32::MAX as i128 => Ok(None),
            Some(i) => match u32::try_from(i) {
                Ok(id) => Ok(Some(id)),
                Err(_) => bail!(Config, "{key}: {i} is no token id"),
            },
        }
    }

    /// The number under `key`, integer or not.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Float(f)) => Ok(Some(*f)),
            Some(Value::Int(i)) => Ok(Some(*i as f64)),
            Some(v) => Err(wrong(key, v, "a number")),
        }
    }

    /// The boolean under `key`.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(v) => Err(wrong(key, v, "a boolean")),
        }
    }

    /// Whether an array is stored under `key`.
    pub fn is_array(&self, key: &str) -> bool {
        matches!(self.keys.get(key), Some(Value::Array(_)))
    }

    /// The strings of the array under `key`, borrowed from the file; each is checked to be UTF-8 as it is read.
    pub fn strings(&self, key: &str) -> Result<Option<Strings<'_>>> {
        let Some(a) = self.array(key)? else { return Ok(None) };
        ensure!(a.kind == Kind::Str, Weights, "{key}: an array of {:?}, expected strings", a.kind);
        let bytes = &self.source.bytes()[a.range.clone()];
        Ok(Some(Strings { reader: Reader { bytes, at: 0 }, left: a.count }))
    }

    /// The numbers (or booleans, as 0 and 1) of the array under `key`, borrowed from the file.
    pub fn numbers(&self, key: &str) -> Result<Option<Numbers<'_>>> {
        let Some(a) = self.array(key)? else { return Ok(None) };
        ensure!(
            !matches!(a.kind, Kind::Str | Kind::Array),
            Weights,
            "{key}: an array of {:?}, expected numbers",
            a.kind
        );
        let bytes = &self.source.bytes()[a.range.clone()];
        Ok(Some(Numbers { chunks: bytes.chunks_exact(a.kind.min_bytes()), kind: a.kind }))
    }

    fn array(&self, key: &str) -> Result<Option<&ArrayRange>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Array(a)) => Ok(Some(a)),
            Some(v) => Err(wrong(key, v, "an array")),
        }
    }
}

/// Iterates over the strings of an array.
#[derive(Clone)]
pub struct Strings<'a> {
    reader: Reader<'a>,
    left: usize,
}

impl<'a> Iterator for Strings<'a> {
    type Item = Result<&'a str>;
    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        Some(self.reader.string())
    }
    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Strings<'_> {}

/// Iterates over the numbers of an array, each as f64 (exact up to 2^53, far above any id).
#[derive(Clone)]
pub struct Numbers<'a> {
    chunks: std::slice::ChunksExact<'a, u8>,
    kind: Kind,
}

impl Iterator for Numbers<'_> {
    type Item = f64;
    fn next(&mut self) -> Option<f64> {
        let c = self.chunks.next()?;
        Some(match number(self.kind, c) {
            Value::Int(i) => i as f64,
            Value::Float(f) => f,
            _ => f64::from(c[0]),
        })
    }
    fn size_hint(&self) -> (usize, Option<usize>) {
        self.chunks.size_hint()
    }
}

impl ExactSizeIterator for Numbers<'_> {}

fn utf8(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|e| Error::with_source(ErrorKind::Weights, "a string is not UTF-8", e))
}

fn wrong(key: &str, value: &Value, want: &str) -> Error {
    let found = match value {
        Value::Int(i) => format!("the integer {i}"),
        Value::Float(f) => format!("the number {f}"),
        Value::Bool(b) => format!("the boolean {b}"),
        Value::Str(_) => "a string".into(),
        Value::Array(a) => format!("an array of {} {:?}", a.count, a.kind),
    };
    Error::new(ErrorKind::Config, format!("{key}: expected {want}, found {found}"))
}

/// One number of `kind`; `c` has exactly its bytes. Strings and arrays do not come here.
fn number(kind: Kind, c: &[u8]) -> Value {
    let mut le = [0; 8];
    le[..c.len()].copy_from_slice(c);
    let bits = u64::from_le_bytes(le);
    match kind {
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Value::Int(bits.into()),
        Kind::I8 => Value::Int((bits as i8).into()),
        Kind::I16 => Value::Int((bits as i16).into()),
        Kind::I32 => Value::Int((bits as i32).into()),
        Kind::I64 => Value::Int((bits as i64).into()),
        Kind::F32 => Value::Float(f32::from_bits(bits as u32).into()),
        Kind::F64 => Value::Float(f64::from_bits(bits)),
        Kind::Bool | Kind::Str | Kind::Array => Value::Bool(bits != 0),
    }
}

/// Turns offsets within the data into ranges of the file, and checks that they lie inside and apart.
fn place(tensors: &mut [TensorEntry], data: usize, alignment: usize, file: usize) -> Result<()> {
    for t in tensors.iter_mut() {
        let (at, n) = (t.range.start, t.range.end);
        ensure!(
            at.is_multiple_of(alignment),
            Weights,
            "tensor {:?} starts at offset {at}, not a multiple of the alignment {alignment}",
            t.name
        );
        let end = data.checked_add(at).and_then(|s| s.checked_add(n)).filter(|e| *e <= file);
        let Some(end) = end else {
            bail!(Weights, "tensor {:?} ({n} bytes at offset {at}) reaches beyond the file's {file} bytes", t.name);
        };
        t.range = end - n..end;
    }
    let mut order: Vec<&TensorEntry> = tensors.iter().collect();
    order.sort_unstable_by_key(|t| t.range.start);
    for w in order.windows(2) {
        ensure!(w[0].range.end <= w[1].range.start, Weights, "tensors {:?} and {:?} overlap", w[0].name, w[1].name);
    }
    Ok(())
}

fn dtype_of(number: u32) -> Option<DType> {
    Some(match number {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        12 => DType::Q4_K,
        13 => DType::Q5_K,
        14 => DType::Q6_K,
        30 => DType::BF16,
        _ => return None,
    })
}

/// A cursor that refuses to leave its bytes.
#[derive(Clone)]
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        ensure!(
            n <= self.left(),
            Weights,
            "the header ends early: {n} bytes needed at {}, {} left",
            self.at,
            self.left()
        );
        let taken = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut le = [0; 8];
        le.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(le))
    }

    /// A u64 count of things that take at least `each` bytes, all of which must still fit.
    fn count(&mut self, what: &str, each: usize) -> Result<usize> {
        let n = self.u64()?;
        let most = self.left() / each;
        match usize::try_from(n) {
            Ok(n) if n <= most => Ok(n),
            _ => bail!(Weights, "{n} {what} announced at {}, but only {} bytes are left", self.at - 8, self.left()),
        }
    }

    fn string_range(&mut self) -> Result<Range<usize>> {
        let n = self.count("bytes of a string", 1)?;
        self.at += n;
        Ok(self.at - n..self.at)
    }

    fn string(&mut self) -> Result<&'a str> {
        let range = self.string_range()?;
        utf8(&self.bytes[range])
    }

    fn value(&mut self) -> Result<Value> {
        match Kind::of(self.u32()?)? {
            Kind::Str => {
                let range = self.string_range()?;
                utf8(&self.bytes[range.clone()])?;
                Ok(Value::Str(range))
            }
            Kind::Array => self.array(1).map(Value::Array),
            Kind::Bool => match self.take(1)?[0] {
                b @ (0 | 1) => Ok(Value::Bool(b == 1)),
                b => bail!(Weights, "a boolean is {b}"),
            },
            kind => Ok(number(kind, self.take(kind.min_bytes())?)),
        }
    }

    /// Steps over an array and remembers where it lies.
    fn array(&mut self, depth: usize) -> Result<ArrayRange> {
        ensure!(depth <= MAX_DEPTH, Weights, "arrays nest deeper than {MAX_DEPTH}");
        let kind = Kind::of(self.u32()?)?;
        let count = self.count("array entries", kind.min_bytes())?;
        let start = self.at;
        match kind {
            Kind::Str => (0..count).try_for_each(|_| self.string_range().map(drop))?,
            Kind::Array => (0..count).try_for_each(|_| self.array(depth + 1).map(drop))?,
            // Cannot overflow: `count` of them fit in what is left.
            _ => drop(self.take(count * kind.min_bytes())?),
        }
        Ok(ArrayRange { kind, count, range: start..self.at })
    }

    /// One row of the tensor table. Until [`place`] has run, `range` holds (offset in the data, byte count).
    fn tensor(&mut self) -> Result<TensorEntry> {
        let name = self.string()?.to_owned();
        let dims = self.u32()?;
        ensure!((1..=4).contains(&dims), Weights, "{name:?} has {dims} dimensions; expected 1 to 4");
        let mut shape = Vec::with_capacity(4);
        for _ in 0..dims {
            let n = self.u64()?;
            match usize::try_from(n) {
                Ok(n) if n > 0 => shape.push(n),
                _ => bail!(Weights, "{name:?} has a dimension of {n}"),
            }
        }
        let number = self.u32()?;
        let offset = self.u64()?;
        let Some(dtype) = dtype_of(number) else {
            bail!(Unsupported, "tensor {name:?} has type number {number}; handled are {}", handled_types());
        };
        let row = dtype.row_bytes(shape[0]).context(|| name.clone())?;
        let bytes = shape[1..].iter().try_fold(row, |n, d| n.checked_mul(*d));
        let (Some(bytes), Ok(offset)) = (bytes, usize::try_from(offset)) else {
            bail!(Weights, "{name:?}: shape {shape:?} at offset {offset} overflows");
        };
        shape.reverse();
        Ok(TensorEntry { name, stored: StoredType::Known(dtype), shape, range: Range { start: offset, end: bytes } })
    }
}

fn handled_types() -> String {
    let known = (0..64).filter_map(|n| dtype_of(n).map(|d| format!("{d} ({n})")));
    known.collect::<Vec<_>>().join(", ")
}
