//! Flags that say what drafts, for every verb that decodes.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::Args;
use sha2::{Digest, Sha256};

use super::fetch::Store;
use super::flags::{Common, DecoderFlag};
use crate::decode::Sampler;
use crate::engine::{Draft, DraftKind, Engine, Generate, Piece, Session, Speculation};
use crate::error::{Error, ErrorKind, Result, bail};
use crate::files::write_file;

#[derive(Args, Clone)]
pub(super) struct DraftArgs {
    /// ar: one pass, one token. spec: several, where a draft guesses right; the text is the same. Default: spec where a draft
    /// was made for the model, else ar.
    #[arg(long, value_enum)]
    pub decoder: Option<DecoderFlag>,
    /// What drafts: auto, off, lookup (text that occurred before), the file or folder of a draft model or head, some of the
    /// model's own layers (layers:0-9,28,29), or lookup and one of these (lookup+PATH).
    #[arg(long, default_value = "auto")]
    pub draft: String,
    /// Most drafted tokens of a pass; 0: as many as pay, by measured cost.
    #[arg(long, default_value_t = 0)]
    pub draft_nodes: usize,
    /// Most drafted tokens in a row.
    #[arg(long, default_value_t = 16)]
    pub draft_depth: usize,
    /// Most alternatives at a place; 1 drafts a chain.
    #[arg(long, default_value_t = 4)]
    pub draft_width: usize,
}

impl DraftArgs {
    /// The draft, if there is to be one.
    pub fn open(&self, engine: &Engine) -> Result<Option<Draft>> {
        let spec = match self.decoder {
            Some(DecoderFlag::Diffusion) => {
                bail!(Unsupported, "--decoder diffusion is not built yet; use --decoder ar or spec")
            }
            Some(DecoderFlag::Ar) => return Ok(None),
            Some(DecoderFlag::Spec) => true,
            None => false,
        };
        if self.draft_width == 0 || self.draft_depth == 0 {
            bail!(Usage, "--draft-width and --draft-depth must be at least 1; --draft off drafts nothing");
        }
        let name = match &*self.draft {
            "off" => return Ok(None),
            "auto" => match engine.shipped_draft() {
                Some(draft) => return engine.with_lookup(&draft?).map(Some),
                None if spec => "lookup",
                None => return Ok(None),
            },
            name => name,
        };
        if let Some(second) = name.strip_prefix("lookup+") {
            return engine.with_lookup(&Self::named(engine, second)?).map(Some);
        }
        Self::named(engine, name).map(Some)
    }

    fn named(engine: &Engine, name: &str) -> Result<Draft> {
        let kind = match name {
            "lookup" => DraftKind::Lookup,
            path if Path::new(path).exists() => DraftKind::at(Path::new(path)),
            other if other.starts_with("layers:") => DraftKind::Layers(layers(&other["layers:".len()..])?),
            other => bail!(Usage, "--draft {other}: neither auto, off nor lookup, and no such file or folder"),
        };
        engine.draft(&kind)
    }

    /// `how`, with `draft` if there is one.
    pub fn apply(&self, how: Generate, sampler: Sampler, draft: Option<&Draft>) -> Generate {
        let speculation = Speculation::default().depth(self.draft_depth).width(self.draft_width);
        let speculation = if self.draft_nodes == 0 { speculation } else { speculation.nodes(self.draft_nodes) };
        match draft {
            Some(draft) => how.speculative(sampler, draft, speculation),
            None => how.sampler(sampler),
        }
    }
}

/// Numbers and spans, as in 0-9,28,29.
fn layers(list: &str) -> Result<Vec<usize>> {
    let bad =
        || Error::new(ErrorKind::Usage, format!("--draft layers:{list}: expected numbers and spans, as in 0-9,28,29"));
    let number = |s: &str| s.parse::<usize>().map_err(|_| bad());
    let mut all = Vec::new();
    for part in list.split(',') {
        match part.split_once('-') {
            Some((a, b)) => all.extend(number(a)?..=number(b)?),
            None => all.push(number(part)?),
        }
    }
    Ok(all)
}

/// A session for `draft`, or a plain one.
pub(super) fn session(engine: &Engine, draft: Option<&Draft>, capacity: usize, seed: u64) -> Result<Session> {
    match draft {
        Some(draft) => engine.session_for(draft, capacity, seed),
        None => engine.session(capacity, seed),
    }
}

/// With -v, accepted text in the colour of what drafted it; the model's own stays as it is.
pub(super) struct Colours(bool);

impl Colours {
    pub fn new(common: &Common, draft: Option<&Draft>) -> Self {
        let colours = common.verbose > 0 && draft.is_some() && !common.json;
        Self(colours && (std::io::stdout().is_terminal() || std::env::var_os("CLICOLOR_FORCE").is_some()))
    }

    pub fn paint<'a>(&self, piece: &'a Piece) -> Cow<'a, str> {
        match piece.source {
            Some(source) if self.0 && !piece.text.is_empty() => {
                format!("\x1b[{}m{}\x1b[0m", 32 + source % 5, piece.text).into()
            }
            _ => Cow::Borrowed(&piece.text),
        }
    }
}

/// Measured costs, kept from run to run beside the models: they belong to a processor, a model, a draft and a number of threads.
pub(super) struct Costs(PathBuf);

impl Costs {
    /// Tells `draft` what was measured earlier, if anything was. What cannot be read is measured again.
    pub fn restore(common: &Common, engine: &Engine, draft: &Draft) -> Result<Self> {
        let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processor.lines().find(|l| l.starts_with("model name")).unwrap_or_default();
        let (version, bytes) = (env!("CARGO_PKG_VERSION"), engine.weight_bytes());
        let of = [version, processor, engine.device(), &common.model, &bytes.to_string(), draft.name()].join("\n");
        let name: String = Sha256::digest(of).iter().take(8).map(|b| format!("{b:02x}")).collect();
        let path = Store::open()?.dir().join(format!("costs-{name}.json"));
        if let Ok(json) = std::fs::read_to_string(&path) {
            draft.set_costs(&json).unwrap_or_else(|e| tracing::debug!("{}: {e}", path.display()));
        }
        Ok(Self(path))
    }

    /// Keeps what was measured since. A folder that cannot be written costs half a second in the next run, nothing else.
    pub fn keep(&self, draft: &Draft) {
        let Some(json) = draft.costs_json().filter(|_| !self.0.exists()) else { return };
        if let Err(e) = write_file(&self.0, |to| to.write_all(json.as_bytes())) {
            tracing::debug!("{e}");
        }
    }
}
