//! Text that a model itself writes, for a draft head to learn from: prompts of files in, rows of token ids out.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Engine, Message};
use crate::decode::{Batch, Prompt, Sampler};
use crate::error::{Error, ErrorKind, Result, bail, ensure};
use crate::files::write_file;
use crate::rng::{Key, Rng};
use crate::train::data::for_each_line;

/// Rows that may be lost to a crash of the machine; a killed process loses only those not yet written.
const SYNC_ROWS: usize = 32;

/// What a model is to write. The rows of `OUT/gen.jsonl` are a function of these settings, the prompts, the model and the way
/// of computing (device, instructions, fast or exact); not of the width of the batch or of the times the run was killed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelfGen {
    /// Files of prompts, `.jsonl` or `.jsonl.gz`: a row has `prompt`, `question` or `turns` (of which the first is taken), and
    /// may have `kind` (else it is the file's name) and `raw` (true: the prompt is continued as it is, not as a turn of a
    /// chat). The prompts of all files are shuffled together.
    pub prompts: Vec<PathBuf>,
    /// At most so many prompts; 0: all.
    pub limit: usize,
    /// Most new tokens of each.
    pub max_tokens: usize,
    /// Share of the prompts whose continuation is drawn; that of the others is greedy.
    pub sampled_share: f64,
    /// At this temperature.
    pub temperature: f64,
    /// Seed of the order and of all draws.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SelfGenerated {
    /// Rows in the file.
    pub rows: usize,
    /// Rows that were there before.
    pub resumed: usize,
    /// Tokens that this run wrote.
    pub tokens: u64,
    /// Passes of the model that this took.
    pub forwards: u64,
}

/// A row of the prompts' files.
struct Row {
    kind: String,
    ids: Vec<u32>,
}

/// A row of `gen.jsonl`.
#[derive(Serialize, Deserialize)]
struct Written<'a> {
    n: usize,
    kind: Cow<'a, str>,
    prompt_ids: Cow<'a, [u32]>,
    ids: Cow<'a, [u32]>,
}

impl SelfGen {
    /// Writes `gen.jsonl`, a row a prompt, `{"n", "kind", "prompt_ids", "ids"}` in the order of n, and beside it `gen.json`,
    /// the settings. `ids` end with the end token where the model came to it. `width` prompts are continued at a time. With
    /// `resume`, goes on behind the rows that are there. `on` hears of rows done, rows in all, and tokens of the row.
    ///
    /// # Errors
    /// Whatever is wrong with settings and prompts, by file and line; rows of another run in `out`.
    pub fn run(
        &self,
        engine: &Engine,
        model: &str,
        out: &Path,
        width: usize,
        resume: bool,
        on: &mut dyn FnMut(usize, usize, usize),
    ) -> Result<SelfGenerated> {
        let share = self.sampled_share;
        ensure!((0.0..=1.0).contains(&share), Usage, "--sampled-share {share} is impossible: expected 0 to 1");
        ensure!(width > 0, Usage, "--batch 0 is impossible: expected 1 or more");
        ensure!(self.max_tokens > 0, Usage, "--max-tokens 0 is impossible: expected 1 or more");
        let drawn = Sampler { temperature: self.temperature as f32, ..Sampler::greedy() }.validate()?;
        let rows = self.rows(engine)?;
        let path = out.join("gen.jsonl");
        let settings = self.record(engine, model, &rows)?;
        let (file, first) = open(&path, &settings, resume, rows.len())?;

        let prompt = |(n, row): (usize, &Row)| {
            // No token is at the position of this random number.
            let sampled = Key { seed: self.seed, stream: n as u64, counter: u64::MAX }.uniform() < share;
            let sampler = if sampled { drawn } else { Sampler::greedy() };
            Prompt { ids: row.ids.clone(), sampler, stream: n as u64 }
        };
        let prompts: Vec<Prompt> = rows.iter().enumerate().skip(first).map(prompt).collect();
        let batch = Batch { width, max_tokens: self.max_tokens, eos: engine.eos(), seed: self.seed };
        let mut to = BufWriter::new(file);
        // Rows that have ended wait here for those before them.
        let (mut waiting, mut next) = (BTreeMap::new(), first);
        let stats = engine.0.model.batch(&batch, &prompts, &mut |i, ids| {
            on(next + waiting.len() + 1, rows.len(), ids.len());
            waiting.insert(first + i, ids.to_vec());
            while let Some(ids) = waiting.remove(&next) {
                let Row { kind, ids: prompt } = &rows[next];
                let row = Written { n: next, kind: kind.into(), prompt_ids: prompt.into(), ids: ids.into() };
                let line = serde_json::to_string(&row).map_err(std::io::Error::from);
                line.and_then(|l| writeln!(to, "{l}")).map_err(|e| Error::io(path.display(), e))?;
                next += 1;
                if next.is_multiple_of(SYNC_ROWS) {
                    sync(&mut to, &path)?;
                }
            }
            Ok(())
        })?;
        sync(&mut to, &path)?;
        Ok(SelfGenerated { rows: next, resumed: first, tokens: stats.tokens, forwards: stats.forwards })
    }

    /// The prompts of all files in the order of the seed.
    fn rows(&self, engine: &Engine) -> Result<Vec<Row>> {
        let most = engine.config().context.saturating_sub(self.max_tokens);
        let mut rows = Vec::new();
        for path in &self.prompts {
            for_each_line(path, |line, text| {
                let at = || format!("{}, line {line}", path.display());
                let row =
                    parse(text, path, engine).map_err(|e| Error::new(ErrorKind::Usage, e.to_string()).at(at()))?;
                let (n, new) = (row.ids.len(), self.max_tokens);
                ensure!(n > 0, Usage, "{}: an empty prompt", at());
                ensure!(n <= most, Usage, "{}: {n} tokens, and {new} new ones, exceed the model's context", at());
                rows.push(row);
                Ok(())
            })?;
        }
        ensure!(!rows.is_empty(), Usage, "no prompt: give --prompts FILE");
        Rng::stream(self.seed, u64::MAX).shuffle(&mut rows);
        if self.limit > 0 {
            rows.truncate(self.limit);
        }
        Ok(rows)
    }

    /// The settings as `gen.json` has them: what the rows depend on.
    fn record(&self, engine: &Engine, model: &str, rows: &[Row]) -> Result<Value> {
        let mut hash = Sha256::new();
        for row in rows {
            hash.update(format!("{}\0{:?}\n", row.kind, row.ids));
        }
        let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let names: Vec<_> = self.prompts.iter().filter_map(|p| p.file_name()?.to_str()).collect();
        let model = Path::new(model).file_name().and_then(|n| n.to_str()).unwrap_or(model);
        Ok(json!({
            "model": model, "weight_bytes": engine.weight_bytes(), "prompts": names, "rows": rows.len(),
            "max_tokens": self.max_tokens, "sampled_share": self.sampled_share, "temperature": self.temperature,
            "seed": self.seed, "rows_sha256": digest,
        }))
    }
}

fn parse(text: &str, path: &Path, engine: &Engine) -> Result<Row> {
    let row: Value = serde_json::from_str(text).map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))?;
    let found = [&row["prompt"], &row["question"], &row["turns"][0]].into_iter().find_map(Value::as_str);
    let Some(prompt) = found else { bail!(Usage, "no text in \"prompt\", \"question\" or \"turns\"") };
    let stem = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.split('.').next()).unwrap_or_default();
    let kind = row["kind"].as_str().unwrap_or(stem).to_owned();
    let (tokenizer, raw) = (engine.tokenizer()?, row["raw"] == true);
    let ids = match engine.chat_template()?.filter(|_| !raw) {
        Some(template) => tokenizer.encode(&template.render(&[Message::new("user", prompt)], true)?, false, true)?,
        None => tokenizer.encode(prompt, true, true)?,
    };
    Ok(Row { kind, ids })
}

/// The file to append to and the rows that it has: settings are held to those of the run that began it, a torn last line is
/// dropped.
fn open(path: &Path, settings: &Value, resume: bool, rows: usize) -> Result<(File, usize)> {
    let io = |e| Error::io(path.display(), e);
    let sidecar = path.with_extension("json");
    fs::create_dir_all(path.parent().unwrap_or(path)).map_err(io)?;
    if !path.exists() {
        write_file(&sidecar, |to| Ok(serde_json::to_writer_pretty(to, settings)?))?;
        return Ok((File::create_new(path).map_err(io)?, 0));
    }
    ensure!(resume, Usage, "{} is there: --resume goes on with it, another --out begins anew", path.display());
    let text = fs::read(&sidecar).map_err(|e| Error::io(sidecar.display(), e))?;
    let bad = |e| Error::with_source(ErrorKind::Usage, sidecar.display().to_string(), e);
    let old: Value = serde_json::from_slice(&text).map_err(bad)?;
    for (name, now) in settings.as_object().into_iter().flatten() {
        let (was, file) = (&old[name], sidecar.display());
        ensure!(was == now, Usage, "{file}: the run that began it had {name} {was}, not {now}");
    }
    let text = fs::read(path).map_err(io)?;
    let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
    let mut n = 0;
    for line in text[..whole].split_inclusive(|b| *b == b'\n') {
        let row = serde_json::from_slice::<Written>(line).ok().filter(|r| r.n == n && n < rows);
        ensure!(row.is_some(), Usage, "{}, line {}: not row {n} of this run", path.display(), n + 1);
        n += 1;
    }
    let file = File::options().append(true).open(path).map_err(io)?;
    file.set_len(whole as u64).map_err(io)?;
    Ok((file, n))
}

fn sync(to: &mut BufWriter<File>, path: &Path) -> Result<()> {
    to.flush().and_then(|()| to.get_ref().sync_data()).map_err(|e| Error::io(path.display(), e))
}
