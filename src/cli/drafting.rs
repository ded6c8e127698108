//! Flags that say what drafts, for every verb that decodes.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use sha2::{Digest, Sha256};

use super::fetch::Store;
use super::flags::{Common, DecoderFlag};
use crate::decode::Sampler;
use crate::engine::{
    Draft, DraftKind, Engine, Generate, Learning, Memory, Piece, Session, Speculation, StepJudge, StepSettings, Steps,
};
use crate::error::{Error, ErrorKind, Result, bail};
use crate::files::write_file;

#[derive(Args, Clone)]
pub(super) struct DraftArgs {
    /// ar: one pass, one token. spec: several, where a draft guesses right; the text is the same. Default: spec where a draft
    /// was made for the model, else ar.
    #[arg(long, value_enum)]
    pub decoder: Option<DecoderFlag>,
    /// What drafts: auto, off, lookup (text that occurred before), the file or folder of a draft model or head, a model that
    /// writes up to blank lines (steps:PATH), some of the model's own layers (layers:0-9,28,29), or lookup and one of these
    /// (lookup+PATH).
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
    /// The draft learns while it serves, by a rule: auto, sgd, optimistic, momentum, adam, optimistic-adam or ensemble. The text is
    /// the same.
    #[arg(long, value_name = "RULE", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    pub learn: Option<String>,
    /// Where what it learns is kept from run to run.
    #[arg(long, value_name = "FILE")]
    pub draft_state: Option<PathBuf>,
    /// With --draft steps:PATH: whole steps of the draft stand where they come to the same as the model's own. NOT LOSSLESS: what
    /// stands is the draft's text. tokens (the same tokens: this one is lossless), text (the same text), similarity:COSINE (near in
    /// the model's hidden states), ask (the model says so). Without a judge steps are verified token by token.
    #[arg(long)]
    pub judge: Option<String>,
    /// Steps that a judged draft writes ahead.
    #[arg(long, default_value_t = StepSettings::default().ahead)]
    pub steps_ahead: usize,
}

impl Default for DraftArgs {
    /// As the flags have it.
    fn default() -> Self {
        Self {
            decoder: None,
            draft: "auto".into(),
            draft_nodes: 0,
            draft_depth: 16,
            draft_width: 4,
            learn: None,
            draft_state: None,
            judge: None,
            steps_ahead: StepSettings::default().ahead,
        }
    }
}

impl DraftArgs {
    /// The steps of a judged draft, if that is what drafts.
    pub fn steps(&self, engine: &Engine) -> Result<Option<Steps>> {
        let Some(judge) = &self.judge else { return Ok(None) };
        let path = self.draft.strip_prefix("steps:").filter(|_| self.decoder != Some(DecoderFlag::Ar));
        let Some(path) = path else {
            bail!(Usage, "--judge {judge}: there are no steps to judge; give --draft steps:PATH, and no --decoder ar");
        };
        let judge = match (&**judge, judge.strip_prefix("similarity:").map(str::parse)) {
            ("tokens", _) => StepJudge::Tokens,
            ("text", _) => StepJudge::Text,
            ("ask", _) => StepJudge::Ask,
            (_, Some(Ok(cosine))) => StepJudge::Similarity(cosine),
            (other, _) => bail!(Usage, "--judge {other}: expected tokens, text, similarity:COSINE or ask"),
        };
        let settings = StepSettings { ahead: self.steps_ahead, ..StepSettings::default() };
        engine.steps(Path::new(path), judge, settings).map(Some)
    }

    /// The draft, if there is to be one, with what it has learnt earlier.
    pub fn open(&self, engine: &Engine) -> Result<Option<Draft>> {
        let draft = self.begin(engine)?;
        if let Some(state) = &self.draft_state {
            let Some(draft) = draft.as_ref().filter(|d| d.learnt().is_some()) else {
                bail!(Usage, "--draft-state {}: no draft learns here", state.display());
            };
            if state.exists() {
                draft.restore_learnt(state)?;
            }
        }
        Ok(draft)
    }

    /// How it learns, if it does.
    fn learning(&self) -> Result<Option<Learning>> {
        let rule = self.learn.as_deref().or(self.draft_state.as_ref().map(|_| "auto"));
        rule.map(Learning::named).transpose()
    }

    /// Keeps what was learnt where `--draft-state` says.
    pub fn keep(&self, draft: Option<&Draft>) -> Result<()> {
        match (&self.draft_state, draft) {
            (Some(path), Some(draft)) => draft.save_learnt(path),
            _ => Ok(()),
        }
    }

    fn begin(&self, engine: &Engine) -> Result<Option<Draft>> {
        if self.judge.is_some() {
            bail!(Unsupported, "--judge: steps are judged by the verb generate only");
        }
        let learning = self.learning()?;
        let learning = learning.as_ref();
        let spec = match self.decoder {
            Some(DecoderFlag::Diffusion) => {
                bail!(Unsupported, "--decoder diffusion is for the verbs generate and eval aup")
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
            "auto" => match learning.map_or_else(|| engine.shipped_draft(), |l| engine.learning_shipped(l)) {
                Some(draft) => return Self::beside(engine, &draft?, learning.is_some()).map(Some),
                None if learning.is_some() => {
                    bail!(Usage, "--learn: no draft head for this model; give one by --draft")
                }
                None if spec => "lookup",
                None => return Ok(None),
            },
            name => name,
        };
        if let Some(second) = name.strip_prefix("lookup+") {
            return Self::beside(engine, &Self::named(engine, second, learning)?, learning.is_some()).map(Some);
        }
        Self::named(engine, name, learning).map(Some)
    }

    /// Lookup beside `draft`; what learns remembers earlier texts, too.
    fn beside(engine: &Engine, draft: &Draft, learns: bool) -> Result<Draft> {
        match learns {
            true => engine.with_memory(draft, &Arc::new(Memory::default())),
            false => engine.with_lookup(draft),
        }
    }

    fn named(engine: &Engine, name: &str, learning: Option<&Learning>) -> Result<Draft> {
        let kind = match name {
            "lookup" => DraftKind::Lookup,
            path if Path::new(path).exists() => DraftKind::at(Path::new(path)),
            other if other.starts_with("steps:") => DraftKind::Steps(other["steps:".len()..].into()),
            other if other.starts_with("layers:") => DraftKind::Layers(layers(&other["layers:".len()..])?),
            other => bail!(Usage, "--draft {other}: neither auto, off nor lookup, and no such file or folder"),
        };
        match learning {
            Some(how) => engine.learning(&kind, how),
            None => engine.draft(&kind),
        }
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
