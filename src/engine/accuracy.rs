//! Which label of a task is the likeliest: all labels behind one prompt in one pass.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::{EngineOptions, OnDevice, Texts, on_device, read_adapter};
use crate::backend::{Target, Train, Visible};
use crate::error::{Context, Error, ErrorKind, Result, ensure};
use crate::format::Checkpoint;
use crate::model::{Adapter, Head, Model, Pass, Recompute, Saved};
use crate::train::data::Encode;

/// A prompt, and which of the labels is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelTask {
    /// What stands before the label.
    pub prompt: String,
    /// Index among the labels.
    pub label: usize,
}

/// How the tasks of a file went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Accuracy {
    /// Tasks.
    pub tasks: usize,
    /// Those in which the right label was the likeliest.
    pub right: usize,
    /// Of every label, how often it was right and how often it was chosen.
    pub labels: Vec<[usize; 2]>,
}

/// Scores every label behind every prompt by the sum of its tokens' log-probabilities. `on` hears of each task that is done.
///
/// # Errors
/// Files, adapter or device, by name; a prompt without tokens.
pub fn label_accuracy(
    model: &Path,
    adapter: Option<&Path>,
    tasks: &[LabelTask],
    labels: &[String],
    options: EngineOptions,
    on: &mut dyn FnMut(),
) -> Result<Accuracy> {
    let checkpoint = Checkpoint::open(model)?;
    let texts = Texts::new(checkpoint.tokenizer()?, checkpoint.chat_template()?);
    on_device(options, Job { checkpoint: &checkpoint, adapter, texts, tasks, labels, on })
}

struct Job<'a> {
    checkpoint: &'a Checkpoint,
    adapter: Option<&'a Path>,
    texts: Texts,
    tasks: &'a [LabelTask],
    labels: &'a [String],
    on: &'a mut dyn FnMut(),
}

/// The rows of a prompt with all labels behind it: each label has the prompt's last token as its own first row, whose
/// successors it predicts, and sees no other label.
fn branches(prompt: &[u32], labels: &[Vec<u32>]) -> Result<(Vec<u32>, Vec<u32>, Visible)> {
    let (last, shared) = (prompt[prompt.len() - 1], &prompt[..prompt.len() - 1]);
    let (mut tokens, n) = (shared.to_vec(), shared.len() as u32);
    let (mut positions, mut visible): (Vec<u32>, _) = ((0..n).collect(), Visible::causal(&[shared.len()]));
    for label in labels {
        let first = tokens.len() as u32;
        for (i, t) in (0..).zip(std::iter::once(last).chain(label[..label.len() - 1].iter().copied())) {
            tokens.push(t);
            positions.push(n + i);
            let own = [first, first + i + 1];
            let seen = [[0, n], own];
            visible.push(&seen[usize::from(n == 0)..])?;
        }
    }
    Ok((tokens, positions, visible))
}

impl OnDevice for Job<'_> {
    type Out = Accuracy;
    fn run<B: Train>(self, be: B, options: &EngineOptions) -> Result<Accuracy> {
        let progress = |done, total| options.progress.iter().for_each(|p| p(done, total));
        let model = Model::load(Arc::new(be), self.checkpoint, progress).context(|| "weights".into())?;
        let cfg = model.config().clone();
        let adapter =
            self.adapter.map(|folder| Adapter::new(model.backend(), &cfg, &read_adapter(folder, &cfg)?)).transpose()?;
        let encode = |text: &str, start| self.texts.encode(text, start);
        let labels: Vec<Vec<u32>> = self.labels.iter().map(|l| encode(l, false)).collect::<Result<_>>()?;
        ensure!(labels.iter().all(|l| !l.is_empty()), Usage, "a label without tokens");
        let prompts: Vec<Vec<u32>> = self.tasks.iter().map(|t| encode(&t.prompt, true)).collect::<Result<_>>()?;
        let (longest, all) = (prompts.iter().map(Vec::len).max(), labels.iter().map(Vec::len).sum::<usize>());
        let rows = longest.ok_or_else(|| Error::new(ErrorKind::Usage, "no task"))? + all;
        // Nothing is kept for a backward pass.
        let lowest = cfg.layers - 1;
        let mut saved = Saved::new(model.backend(), &cfg, rows, all, adapter.as_ref(), lowest, Recompute::Layer)?;
        let mut head = Head::new(&model, all, 64)?;
        let (ids, weights): (Vec<u32>, _) = (labels.concat(), vec![0.0; all]);
        let mut out = Accuracy { labels: vec![[0; 2]; labels.len()], ..Accuracy::default() };
        for (task, prompt) in self.tasks.iter().zip(&prompts) {
            ensure!(!prompt.is_empty(), Usage, "a prompt without tokens");
            let (tokens, positions, visible) = branches(prompt, &labels)?;
            let wanted: Vec<u32> = (prompt.len() as u32 - 1..tokens.len() as u32).collect();
            let pass = Pass::new(&cfg, tokens, positions, visible, wanted)?;
            model.forward_saved(&pass, adapter.as_ref(), &mut saved)?;
            let target = |r: Range<usize>| Target::Hard(&ids[r]);
            let losses = model.head(&pass, &saved, &mut head, target, &weights, false, None)?;
            let mut rest = &losses[..];
            let nll: Vec<f64> = labels
                .iter()
                .map(|l| {
                    let (own, others) = rest.split_at(l.len());
                    rest = others;
                    own.iter().sum()
                })
                .collect();
            let best = (0..nll.len()).min_by(|&a, &b| nll[a].total_cmp(&nll[b])).unwrap_or(0);
            out.tasks += 1;
            out.right += usize::from(best == task.label);
            out.labels[task.label][0] += 1;
            out.labels[best][1] += 1;
            (self.on)();
        }
        Ok(out)
    }
}
