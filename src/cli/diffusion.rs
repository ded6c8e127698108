//! Diffusion decoding on the command line: flags to settings, `generate --decoder diffusion`, and its picture in the terminal.

use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::flags::{Common, GenerateArgs, SamplingArgs};
use super::out;
use crate::engine::{Cache, Choose, Commit, DiffusionSettings, Engine, Rank, Schedule};
use crate::error::{Error, ErrorKind, Result, bail, ensure};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CacheFlag {
    None,
    Prefix,
    Dual,
    Delayed,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OrderFlag {
    Confidence,
    Margin,
    Entropy,
    Random,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum CompatFlag {
    Authors,
}

/// How a diffusion model decodes.
#[derive(Args, Clone)]
#[command(next_help_heading = "Diffusion")]
pub(super) struct DiffusionArgs {
    /// Positions of a block.
    #[arg(long)]
    pub block_size: Option<usize>,
    /// Take tokens whose entropy is below this, nats.
    #[arg(long, allow_negative_numbers = true)]
    pub threshold: Option<f32>,
    /// Take tokens of at least this probability instead, blocks one after another (Fast-dLLM).
    #[arg(long, conflicts_with = "threshold")]
    pub confidence: Option<f32>,
    /// Fill the text in so many passes, the same number of tokens in each, blocks one after another; as many as tokens: one at a time.
    #[arg(long, conflicts_with_all = ["threshold", "confidence"])]
    pub passes: Option<usize>,
    /// With --passes: as many tokens as Dream's timetable says.
    #[arg(long, requires = "passes")]
    pub timetable: bool,
    /// With --passes: which tokens come first.
    #[arg(long, requires = "passes", value_enum, default_value = "confidence")]
    pub order: OrderFlag,
    /// Percent of a block decoded before the next one begins; 100: one after another.
    #[arg(long)]
    pub add: Option<u32>,
    /// Percent of a block decoded before the next one must advance in each pass.
    #[arg(long)]
    pub activate: Option<u32>,
    /// What is cached: none, prefix and dual (blocks one after another), delayed.
    #[arg(long, value_enum)]
    pub cache: Option<CacheFlag>,
    /// Passes from a block's completion to its caching.
    #[arg(long, default_value_t = 1)]
    pub delay: u64,
    /// Compute the cached prefix again every so many passes.
    #[arg(long)]
    pub refresh: Option<u64>,
    /// Decode what lies behind the first end token too.
    #[arg(long)]
    pub no_early_stop: bool,
    /// Masks behind the last begun block that a pass sees; default: all.
    #[arg(long)]
    pub look_ahead: Option<usize>,
    /// Mask tokens again that were taken with less than this probability, once, when their block is complete.
    #[arg(long)]
    pub remask: Option<f32>,
    /// As the published code decodes, errors included.
    #[arg(long, value_enum)]
    pub compat: Option<CompatFlag>,
    /// Show the text as it is unmasked.
    #[arg(long)]
    pub show: bool,
    /// The text to fill, with <mask:N> for N unknown tokens; all else stays.
    #[arg(long)]
    pub fill: Option<String>,
}

impl DiffusionArgs {
    /// The settings for this model.
    pub fn settings(&self, engine: &Engine, sampling: Option<&SamplingArgs>, seed: u64) -> Result<DiffusionSettings> {
        let mut s = engine.diffusion_settings();
        if let Some(d) = engine.config().diffusion.and_then(|d| d.block) {
            s.block = d;
        }
        s.block = self.block_size.unwrap_or(s.block);
        let best = matches!(s.choose, Choose::Threshold { best: true, .. });
        if let Some(at) = self.threshold {
            s.choose = Choose::Threshold { by: Rank::Entropy, at, best, every: false };
        }
        if let Some(at) = self.confidence {
            s.choose = Choose::Threshold { by: Rank::Confidence, at, best: false, every: false };
            (s.add, s.activate) = (100, 100);
        }
        if let Some(steps) = self.passes {
            let by = match self.order {
                OrderFlag::Confidence => Rank::Confidence,
                OrderFlag::Margin => Rank::Margin,
                OrderFlag::Entropy => Rank::Entropy,
                OrderFlag::Random => Rank::Random,
            };
            s.choose = if self.timetable { Choose::Timetable { steps, by } } else { Choose::Quota { steps, by } };
            (s.add, s.activate) = (100, 100);
        }
        s.add = self.add.unwrap_or(s.add);
        s.activate = self.activate.unwrap_or(s.activate);
        let delayed = Cache::Delayed { delay: self.delay, refresh: self.refresh };
        s.cache = match self.cache {
            Some(CacheFlag::None) => Cache::None,
            Some(CacheFlag::Prefix) => Cache::Prefix,
            Some(CacheFlag::Dual) => Cache::Dual,
            Some(CacheFlag::Delayed) => delayed,
            None => s.cache,
        };
        s.early_stop &= !self.no_early_stop;
        s.look_ahead = self.look_ahead;
        s.remask = self.remask.unwrap_or(0.0);
        s.authors = self.compat.is_some();
        if let Some(sampling) = sampling {
            (s.temperature, s.top_p) = (sampling.temperature, sampling.top_p);
            let plain = sampling.top_k == 0 && sampling.min_p == 0.0 && sampling.repeat_penalty == 1.0;
            ensure!(
                plain,
                Usage,
                "--top-k, --min-p and --repeat-penalty are not for diffusion; --temperature and --top-p are"
            );
            s.early_stop &= !sampling.ignore_eos;
        }
        s.seed = seed;
        s.validate()
    }
}

/// What is to be filled behind the prompt.
fn blanks(engine: &Engine, args: &GenerateArgs) -> Result<Vec<u32>> {
    let mask = engine.config().diffusion.map_or(0, |d| d.mask);
    let Some(text) = &args.diffusion.fill else { return Ok(vec![mask; args.sampling.max_tokens]) };
    let (mut ids, mut rest) = (Vec::new(), text.as_str());
    while let Some((before, behind)) = rest.split_once("<mask:") {
        let (n, behind) = behind.split_once('>').unwrap_or((behind, ""));
        let n: usize = n
            .parse()
            .map_err(|_| Error::new(ErrorKind::Usage, format!("--fill: <mask:{n}> names no number of tokens")))?;
        ids.extend(engine.tokenizer()?.encode(before, false, true)?);
        ids.resize(ids.len() + n, mask);
        rest = behind;
    }
    ids.extend(engine.tokenizer()?.encode(rest, false, true)?);
    Ok(ids)
}

/// `generate --decoder diffusion`.
pub(super) fn generate(common: &Common, args: &GenerateArgs, engine: &Engine, prompt: &[u32]) -> Result<()> {
    if !args.sampling.stop.is_empty() || args.top_logits > 0 {
        bail!(Unsupported, "--stop and --top-logits are for decoders that go from left to right");
    }
    let settings = args.diffusion.settings(engine, Some(&args.sampling), common.seed)?;
    let text = blanks(engine, args)?;
    let mut texts = [engine.infill(prompt, &text, settings)?];
    let tokenizer = engine.tokenizer().ok();
    let decode = |ids: &[u32]| tokenizer.map_or_else(|| format!("{ids:?}"), |t| t.decode(ids, false));
    let mut show = (args.diffusion.show && !common.json).then(Show::new);
    let (mut said, start) = (String::new(), Instant::now());
    let stream = show.is_none() && !common.json;
    let outcome = engine.diffuse(&mut texts, &mut |_, text, commits| {
        if let Some(show) = &mut show {
            return show.draw(engine, text, commits);
        }
        // Whole characters only: what a later token may still change is held back.
        let settled = decode(text.settled());
        let sure = settled.trim_end_matches('\u{fffd}');
        if stream
            && sure.len() > said.len()
            && sure.starts_with(&*said)
            && !text.settled().iter().any(|t| engine.eos().contains(t))
        {
            out::print(&sure[said.len()..])?;
            said = sure.to_owned();
        }
        Ok(())
    })?;
    let (decode_s, outcome) = (start.elapsed().as_secs_f64(), &outcome[0]);
    let (words, counts) = (decode(&outcome.text), outcome.counts);
    let finish = if outcome.text.len() < text.len() { "eos" } else { "length" };
    let per_second = outcome.text.len() as f64 / decode_s.max(1e-9);
    if common.json {
        return out::print_json(&json!({
            "model": common.model, "prompt_ids": prompt, "ids": outcome.text, "text": words, "finish": finish, "top_logits": [],
            "ranks": texts[0].ranks(), "settings": settings,
            "stats": {
                "prompt_tokens": prompt.len(), "prefill_s": 0.0, "tokens": outcome.text.len(),
                "decode_s": out::round(decode_s, 6), "tokens_per_s": out::round(per_second, 2), "forwards": counts.passes,
                "tokens_per_forward": out::round(outcome.tokens_per_forward(), 4), "accept_length": null,
                "draft_s": 0.0, "verify_s": 0.0, "update_s": 0.0, "positions": counts.positions, "logit_rows": counts.logits,
                "refreshes": counts.refreshes, "peak_rss_mb": out::peak_rss_mb().map(|m| out::round(m, 1)),
            },
        }));
    }
    let rest = if words.starts_with(&*said) { &words[said.len()..] } else { "" };
    out::print(&format!("{}\n", if stream { rest } else { words.as_str() }))?;
    eprintln!(
        "[{} + {} tokens in {} passes: {:.2} tokens a pass; {} positions, {} rows of logits, {} refreshes; {per_second:.1} tok/s on {}; \
         blocks of {}; ended by {finish}]",
        prompt.len(),
        outcome.text.len(),
        counts.passes,
        outcome.tokens_per_forward(),
        counts.positions,
        counts.logits,
        counts.refreshes,
        engine.device(),
        settings.block,
    );
    Ok(())
}

/// The text on the terminal, drawn anew at each pass: masks as dots, new tokens coloured.
struct Show {
    lines: usize,
    live: bool,
}

impl Show {
    fn new() -> Self {
        Self { lines: 0, live: std::io::stderr().is_terminal() }
    }

    fn draw(&mut self, engine: &Engine, text: &Schedule, commits: &[Commit]) -> Result<()> {
        let (mask, tokenizer) = (text.model().mask, engine.tokenizer()?);
        let mut picture = String::new();
        for (i, &t) in text.tokens().iter().enumerate().skip(text.prompt()) {
            let word =
                if t == mask { "·".into() } else { String::from_utf8_lossy(&tokenizer.token_bytes(t)).into_owned() };
            match commits.iter().any(|c| c.position == i) && self.live {
                true => picture += &format!("\x1b[1;32m{word}\x1b[0m"),
                false => picture += &word,
            }
        }
        let io = |e| Error::io("stderr", e);
        let mut err = std::io::stderr().lock();
        if self.live && self.lines > 0 {
            write!(err, "\x1b[{}F\x1b[J", self.lines).map_err(io)?;
        }
        writeln!(err, "pass {}\n{picture}", text.counts().passes).map_err(io)?;
        self.lines = 1 + picture.split('\n').map(|l| 1 + l.chars().count() / 120).sum::<usize>();
        if self.live {
            std::thread::sleep(Duration::from_millis(40));
        }
        Ok(())
    }
}
