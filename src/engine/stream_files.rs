//! The files of a stream's tasks, and their texts as tokens.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::continual::{TextExample, TextStream, TextTask};
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::train::data::{Content, Encode, Header, LongRows, Record, for_each_line};

/// How a stream's files are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamReading {
    /// Most tokens of a prompt.
    pub max_length: usize,
    /// What to do with longer ones; truncated ones keep their beginning and their last token.
    pub long_rows: LongRows,
    /// At most so many training and test examples of a task, the first ones; 0: all.
    pub limits: [usize; 2],
}

impl Default for StreamReading {
    fn default() -> Self {
        Self { max_length: 512, long_rows: LongRows::Error, limits: [0, 0] }
    }
}

/// A task as its file has it.
pub(super) struct TaskFile {
    pub name: String,
    path: PathBuf,
    labels: Vec<String>,
    /// Line, prompt and label of the training and test rows.
    rows: [Vec<(usize, String, String)>; 2],
}

impl TaskFile {
    /// Reads a file: rows `{"split", "input", "label"}` or any other form of a pair; the first line may name the task and its
    /// labels, `{"task", "labels"}`, else the labels are those of the training rows.
    ///
    /// # Errors
    /// `Usage`, naming the file and, where there is one, the line: a row that is no pair, of no split or of another than train and
    /// test, a label that is not among the task's; no training or no test row.
    pub fn read(path: &Path, limits: [usize; 2]) -> Result<Self> {
        let stem = path.file_name().and_then(|n| n.to_str()).unwrap_or("task");
        let name = stem.split('.').next().unwrap_or(stem).to_owned();
        let mut file = Self { name, path: path.into(), labels: Vec::new(), rows: [Vec::new(), Vec::new()] };
        for_each_line(path, |number, text| {
            let at = || format!("{}, line {number}", path.display());
            let usage = |e: Error| Error::new(ErrorKind::Usage, e.to_string()).at(at());
            let Some(record) = Record::parse(text, number).map_err(usage)? else {
                let Header { task, labels } = Header::parse(text).map_err(usage)?;
                file.labels = labels;
                file.name = task.unwrap_or_else(|| std::mem::take(&mut file.name));
                return Ok(());
            };
            let Content::Pair { prompt, completion } = record.content else {
                bail!(Usage, "{}: a task's row is a prompt with a label", at());
            };
            let part = match record.split.as_deref() {
                Some("train") => 0,
                Some("test") => 1,
                Some(other) => bail!(Usage, "{}: the split {other:?} is neither train nor test", at()),
                None => bail!(Usage, "{}: the row does not say its split, train or test", at()),
            };
            if limits[part] == 0 || file.rows[part].len() < limits[part] {
                file.rows[part].push((number, prompt, completion));
            }
            Ok(())
        })?;
        for (rows, what) in file.rows.iter().zip(["training", "test"]) {
            ensure!(!rows.is_empty(), Usage, "{}: the task {} has no {what} row", path.display(), file.name);
        }
        if file.labels.is_empty() {
            file.labels = file.rows[0].iter().map(|r| r.2.clone()).collect();
            file.labels.sort();
            file.labels.dedup();
        }
        for (number, _, label) in file.rows.iter().flatten() {
            let known = file.labels.contains(label);
            let (at, labels) = (path.display(), &file.labels);
            ensure!(known, Usage, "{at}, line {number}: the label {label:?} is not among {labels:?}");
        }
        Ok(file)
    }
}

/// All tasks in tokens. Tasks that have a label of the same text share its class.
///
/// # Errors
/// Two tasks of one name; a prompt without tokens, or longer than allowed; labels without tokens.
pub(super) fn tokens(files: &[TaskFile], encode: &dyn Encode, reading: &StreamReading) -> Result<TextStream> {
    ensure!(!files.is_empty(), Usage, "a stream without a task");
    for (i, f) in files.iter().enumerate() {
        let twice = files[..i].iter().any(|o| o.name == f.name);
        ensure!(!twice, Usage, "{}: two tasks of the stream are called {}", f.path.display(), f.name);
    }
    let mut classes: Vec<&String> = Vec::new();
    for label in files.iter().flat_map(|f| &f.labels) {
        if !classes.contains(&label) {
            classes.push(label);
        }
    }
    let class = |label: &String| classes.iter().position(|c| *c == label).unwrap_or(0);
    let mut tasks = Vec::new();
    for f in files {
        let mut examples = [Vec::new(), Vec::new()];
        for (rows, to) in f.rows.iter().zip(&mut examples) {
            for (number, prompt, label) in rows {
                let at = || format!("{}, line {number}", f.path.display());
                let mut tokens = encode.encode(prompt, true).context(at)?;
                ensure!(!tokens.is_empty(), Usage, "{}: a prompt without tokens", at());
                let (n, most) = (tokens.len(), reading.max_length);
                if n > most {
                    match reading.long_rows {
                        LongRows::Error => bail!(Usage, "{}: a prompt of {n} tokens, of {most} allowed", at()),
                        LongRows::Skip => continue,
                        LongRows::Truncate => {
                            tokens.drain(most - 1..n - 1);
                        }
                    }
                }
                to.push(TextExample { prompt: tokens, class: class(label) });
            }
        }
        let left = examples.iter().all(|e| !e.is_empty());
        ensure!(left, Usage, "{}: no row of the task {} is short enough", f.path.display(), f.name);
        tasks.push(TextTask { name: f.name.clone(), classes: f.labels.iter().map(class).collect(), examples });
    }
    let labels: Vec<Vec<u32>> = classes.iter().map(|l| encode.encode(l, false)).collect::<Result<_>>()?;
    if let Some(i) = labels.iter().position(Vec::is_empty) {
        bail!(Usage, "the label {:?} has no token", classes[i]);
    }
    for (i, label) in labels.iter().enumerate() {
        let twin = labels[..i].iter().position(|l| l == label);
        ensure!(
            twin.is_none(),
            Usage,
            "the labels {:?} and {:?} have the same tokens",
            classes[twin.unwrap_or(0)],
            classes[i]
        );
    }
    let Some(&end) = encode.ends().first() else { bail!(Tokenizer, "this model has no end token") };
    TextStream::new(tasks, labels, end)
}
