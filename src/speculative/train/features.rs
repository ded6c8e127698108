//! What the frozen target makes of the training data, computed once and kept on disk: features and teacher of every sequence.
//!
//! A folder holds `features.json`, which says of what they are, and files of up to [`ROWS`] sequences: first all their tokens, then
//! features and teachers, little-endian. A file whose tokens are not those of the data is made anew, so that the work can be stopped at
//! any time and data can be added.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::bf16;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::pass::{Sequence, Teacher, extent};
use crate::backend::{Backend, Buffer, Mask};
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::files::write_file;
use crate::model::{self, KvCache, Model, Want, Workspace};

/// Sequences of a file.
const ROWS: usize = 128;
/// Tokens of a pass of the target, where no sequence is longer.
const PASS: usize = 512;

/// A prompt and what the target said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continuation {
    /// Its number.
    pub n: u64,
    /// Tokens of the prompt, chat form included.
    pub prompt_ids: Vec<u32>,
    /// Tokens of the continuation.
    pub ids: Vec<u32>,
}

impl Continuation {
    /// Reads files of JSON lines. A last line without its end is still being written, and left out; so is what is too short to be trained
    /// on, or longer than `longest` tokens.
    ///
    /// # Errors
    /// `Usage` with file and line for a row that is none.
    pub fn read(files: &[PathBuf], longest: usize) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for path in files {
            let text = fs::read_to_string(path).map_err(|e| Error::io(path.display(), e))?;
            let whole = &text[..text.rfind('\n').map_or(0, |i| i + 1)];
            for (i, line) in whole.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
                let row: Self = serde_json::from_str(line)
                    .map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))
                    .context(|| format!("{}, line {}", path.display(), i + 1))?;
                let n = row.prompt_ids.len() + row.ids.len();
                if n <= longest && extent(row.prompt_ids.len(), n).is_some() {
                    all.push(row);
                }
            }
        }
        ensure!(!all.is_empty(), Usage, "no continuation of {} files can be trained on", files.len());
        Ok(all)
    }

    fn tokens(&self) -> Vec<u32> {
        [&self.prompt_ids[..], &self.ids].concat()
    }
}

/// Of what features are.
#[derive(Clone, Debug, PartialEq)]
pub struct FeatureSpec {
    /// Layers of the target whose inputs they are; as many as it has layers: what the last gives.
    pub taps: Vec<usize>,
    /// Tokens that a teacher names.
    pub k: usize,
}

/// Where one sequence is kept.
struct Entry {
    file: usize,
    at: u64,
    prompt: usize,
    tokens: Vec<u32>,
}

/// Features on disk.
pub struct Features {
    dir: PathBuf,
    spec: FeatureSpec,
    hidden: usize,
    entries: Vec<Entry>,
}

impl Features {
    /// Those of `rows`: what `dir` does not have is computed. `on` hears how many tokens are done, of how many.
    ///
    /// # Errors
    /// `Usage` where `dir` holds features of another kind or another target; the device's and the disk's.
    pub fn of<B: Backend>(
        target: &Model<B>,
        target_name: &str,
        rows: &[Continuation],
        dir: &Path,
        spec: FeatureSpec,
        on: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let cfg = target.config();
        let inside = spec.taps.iter().all(|&t| t <= cfg.layers) && !spec.taps.is_empty();
        ensure!(inside, Usage, "taps {:?} of a model of {} layers", spec.taps, cfg.layers);
        fs::create_dir_all(dir).map_err(|e| Error::io(dir.display(), e))?;
        let what = json!({
            "version": 1, "taps": spec.taps, "teacher": spec.k, "target": target_name,
            "vocab": cfg.vocab, "hidden": cfg.hidden, "layers": cfg.layers,
        });
        let meta = dir.join("features.json");
        if meta.exists() {
            let text = fs::read(&meta).map_err(|e| Error::io(meta.display(), e))?;
            let same = serde_json::from_slice::<serde_json::Value>(&text).is_ok_and(|old| old == what);
            ensure!(
                same,
                Usage,
                "{} holds features of another kind or another target: use another folder",
                dir.display()
            );
        } else {
            write_file(&meta, |to| Ok(serde_json::to_writer_pretty(to, &what)?))?;
        }
        let mut features = Self { dir: dir.into(), spec, hidden: cfg.hidden, entries: Vec::new() };
        let longest = rows.iter().map(|r| r.prompt_ids.len() + r.ids.len()).max().unwrap_or(1);
        let mut room: Option<Room<B>> = None;
        let total: usize = rows.iter().map(|r| r.prompt_ids.len() + r.ids.len()).sum();
        let mut done = 0;
        for (file, rows) in rows.chunks(ROWS).enumerate() {
            if !features.has(file, rows) {
                if room.is_none() {
                    room = Some(Room::new(target, longest.max(PASS), &features.spec)?);
                }
                let room = room.as_mut().expect("made above");
                features.write(target, room, file, rows, &mut |n| on(done + n, total))?;
            }
            done += rows.iter().map(|r| r.prompt_ids.len() + r.ids.len()).sum::<usize>();
            on(done, total);
            features.enter(file, rows);
        }
        Ok(features)
    }

    /// Of what they are.
    pub fn spec(&self) -> &FeatureSpec {
        &self.spec
    }

    /// Sequences.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Rows of sequence `i`.
    pub fn rows(&self, i: usize) -> usize {
        self.entries[i].tokens.len() - 2
    }

    fn path(&self, file: usize) -> PathBuf {
        self.dir.join(format!("rows-{file:06}.bin"))
    }

    /// Tokens of a file's sequences, as it begins.
    fn head(rows: &[Continuation]) -> Vec<u32> {
        let mut head = vec![rows.len() as u32];
        for r in rows {
            head.extend([r.prompt_ids.len() as u32, (r.prompt_ids.len() + r.ids.len()) as u32]);
            head.extend(r.prompt_ids.iter().chain(&r.ids));
        }
        head
    }

    fn bytes(&self, prompt: usize, tokens: usize) -> u64 {
        let [rows, slots] = extent(prompt, tokens).expect("short ones are not read");
        (2 * self.spec.taps.len() * rows * self.hidden + 8 * slots * self.spec.k) as u64
    }

    /// Whether a file is there, whole, and of these rows.
    fn has(&self, file: usize, rows: &[Continuation]) -> bool {
        let head = Self::head(rows);
        let all: u64 = rows.iter().map(|r| self.bytes(r.prompt_ids.len(), r.prompt_ids.len() + r.ids.len())).sum();
        let Ok(mut f) = File::open(self.path(file)) else { return false };
        let mut found = vec![0u8; 4 * head.len()];
        let whole = f.metadata().is_ok_and(|m| m.len() == found.len() as u64 + all);
        whole && f.read_exact(&mut found).is_ok() && found == bytemuck::cast_slice::<u32, u8>(&head)
    }

    fn enter(&mut self, file: usize, rows: &[Continuation]) {
        let mut at = 4 * Self::head(rows).len() as u64;
        for r in rows {
            let (prompt, tokens) = (r.prompt_ids.len(), r.tokens());
            let size = self.bytes(prompt, tokens.len());
            self.entries.push(Entry { file, at, prompt, tokens });
            at += size;
        }
    }

    fn write<B: Backend>(
        &self,
        target: &Model<B>,
        room: &mut Room<B>,
        file: usize,
        rows: &[Continuation],
        on: &mut dyn FnMut(usize),
    ) -> Result<()> {
        let (mut sequences, mut at, mut done) = (Vec::with_capacity(rows.len()), 0, 0);
        while at < rows.len() {
            let (mut n, mut tokens) = (0, 0);
            while at + n < rows.len() {
                let more = rows[at + n].prompt_ids.len() + rows[at + n].ids.len();
                if n > 0 && tokens + more > room.ws.max_rows() {
                    break;
                }
                (n, tokens) = (n + 1, tokens + more);
            }
            sequences.extend(teach(target, room, &rows[at..at + n], &self.spec)?);
            at += n;
            done += tokens;
            on(done);
        }
        write_file(&self.path(file), |to| {
            to.write_all(bytemuck::cast_slice(&Self::head(rows)))?;
            sequences.iter().try_for_each(|s: &Sequence| {
                to.write_all(bytemuck::cast_slice(&s.features))?;
                to.write_all(bytemuck::cast_slice(&s.teacher.ids))?;
                to.write_all(bytemuck::cast_slice(&s.teacher.p))
            })
        })
    }

    /// Sequence `i`.
    ///
    /// # Errors
    /// A file that is gone.
    pub fn read(&self, i: usize) -> Result<Sequence> {
        let Entry { file, at, prompt, ref tokens } = self.entries[i];
        let path = self.path(file);
        let io = |e| Error::io(path.display(), e);
        let [rows, slots] = extent(prompt, tokens.len()).expect("short ones are not read");
        let mut f = File::open(&path).map_err(io)?;
        f.seek(SeekFrom::Start(at)).map_err(io)?;
        let mut features = vec![bf16::ZERO; self.spec.taps.len() * rows * self.hidden];
        let (mut ids, mut p) = (vec![0u32; slots * self.spec.k], vec![0f32; slots * self.spec.k]);
        f.read_exact(bytemuck::cast_slice_mut(&mut features)).map_err(io)?;
        f.read_exact(bytemuck::cast_slice_mut(&mut ids)).map_err(io)?;
        f.read_exact(bytemuck::cast_slice_mut(&mut p)).map_err(io)?;
        Ok(Sequence { prompt, tokens: tokens.clone(), features, teacher: Teacher { k: self.spec.k, ids, p } })
    }

    /// Removes the files, and the folder if nothing else is in it.
    ///
    /// # Errors
    /// The disk's.
    pub fn remove(self) -> Result<()> {
        let files = self.entries.last().map_or(0, |e| e.file + 1);
        for path in (0..files).map(|i| self.path(i)).chain([self.dir.join("features.json")]) {
            fs::remove_file(&path).map_err(|e| Error::io(path.display(), e))?;
        }
        // Whatever else is there is not ours.
        let _ = fs::remove_dir(&self.dir);
        Ok(())
    }

    /// The tokens that the target said in sequence `i`.
    pub fn said(&self, i: usize) -> &[u32] {
        &self.entries[i].tokens[self.entries[i].prompt..]
    }
}

/// What passes of the target need.
struct Room<B: Backend> {
    ws: Workspace<B>,
    caches: Vec<KvCache<B>>,
    values: B::Buf<B::Acc>,
    ids: B::Buf<u32>,
    stats: B::Buf<B::Acc>,
    argmax: B::Buf<u32>,
}

impl<B: Backend> Room<B> {
    fn new(target: &Model<B>, rows: usize, spec: &FeatureSpec) -> Result<Self> {
        let be = target.backend();
        let (k, ws) = (spec.k, Workspace::with_taps(be, target.config(), rows, rows, &spec.taps)?);
        let (values, ids) = (be.alloc(rows * k)?, be.alloc(rows * k)?);
        Ok(Self { ws, caches: Vec::new(), values, ids, stats: be.alloc(3 * rows)?, argmax: be.alloc(rows)? })
    }
}

/// One pass of the target over `rows`.
fn teach<B: Backend>(
    target: &Model<B>,
    room: &mut Room<B>,
    rows: &[Continuation],
    spec: &FeatureSpec,
) -> Result<Vec<Sequence>> {
    let (be, cfg, k) = (target.backend(), target.config(), spec.k);
    // Nothing is asked of what follows the last token.
    let tokens: Vec<Vec<u32>> = rows.iter().map(|r| r.tokens()).collect();
    while room.caches.len() < rows.len() {
        room.caches.push(KvCache::new(be, cfg, room.ws.max_rows())?);
    }
    let wanted: Vec<Vec<u32>> =
        rows.iter().zip(&tokens).map(|(r, t)| (r.prompt_ids.len() as u32..t.len() as u32 - 1).collect()).collect();
    let mut seqs: Vec<_> = room
        .caches
        .iter_mut()
        .zip(tokens.iter().zip(&wanted))
        .map(|(cache, (t, w))| {
            cache.truncate(0);
            model::Sequence::new(cache, &t[..t.len() - 1], Mask::Causal, Want::Rows(w))
        })
        .collect();
    let all: usize = seqs.iter().map(|s| s.tokens.len()).sum();
    let n = target.forward(&mut seqs, &mut room.ws)?;
    let mut stream = vec![0f32; all * cfg.hidden];
    let mut streams = Vec::with_capacity(spec.taps.len());
    for tap in 0..spec.taps.len() {
        be.download_acc(room.ws.features(tap, all), &mut stream)?;
        streams.push(stream.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
    }
    let logits = room.ws.logit_rows(n);
    be.top_k(room.values.head_mut(n * k), room.ids.head_mut(n * k), logits, cfg.vocab, k)?;
    be.logits_stats(room.stats.head_mut(3 * n), room.argmax.head_mut(n), logits, cfg.vocab)?;
    let (mut values, mut ids, mut stats) = (vec![0f32; n * k], vec![0u32; n * k], vec![0f32; 3 * n]);
    be.download_acc(room.values.head(n * k), &mut values)?;
    be.download(room.ids.head(n * k), &mut ids)?;
    be.download_acc(room.stats.head(3 * n), &mut stats)?;
    for (row, s) in values.chunks_mut(k).zip(stats.chunks(3)) {
        row.iter_mut().for_each(|v| *v = (*v - s[1]).exp());
    }
    let (mut at, mut slot, mut all) = (0, 0, Vec::with_capacity(rows.len()));
    for (r, tokens) in rows.iter().zip(tokens) {
        let prompt = r.prompt_ids.len();
        let [n, slots] = extent(prompt, tokens.len()).expect("short ones are not read");
        let features = streams.iter().flat_map(|s| &s[at * cfg.hidden..(at + n) * cfg.hidden]).copied().collect();
        let of = slot * k..(slot + slots) * k;
        let teacher = Teacher { k, ids: ids[of.clone()].to_vec(), p: values[of].to_vec() };
        at += tokens.len() - 1;
        slot += slots;
        all.push(Sequence { prompt, tokens, features, teacher });
    }
    Ok(all)
}
