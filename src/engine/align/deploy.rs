//! [`Aligner`]: the loop of deployment. Answers are written, the best is shown and, only when it may be worth it, a second one; the
//! preference is learnt before the next prompt.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::items::{Answering, Features, Item};
use super::reward::RewardModel;
use crate::decode::DecodeStats;
use crate::error::{Error, ErrorKind, Result, ensure};
use crate::rlhf::{Second, Shown, Step, Tokens};
use crate::rng::Rng;

/// Stream of the random numbers by which a second answer is drawn, where one is.
const CHOICE: u64 = u64::MAX - 1;

/// Writes answers, chooses, and learns.
pub struct Aligner {
    /// What is learnt.
    pub reward: RewardModel,
    /// What makes features.
    pub features: Features,
    /// How answers are written.
    pub answering: Answering,
    /// Optimism: how many standard deviations of the reward a second answer may be worth asking for.
    pub beta: f64,
    /// How the second answer is chosen.
    pub second: Second,
}

impl Aligner {
    /// Answers `item`, with the random numbers of `number`, and says which of the answers to show. Answers that are the same are kept
    /// once, empty ones only where there is nothing else.
    ///
    /// # Errors
    /// A prompt without room for an answer; the device's.
    pub fn ask(&mut self, item: &mut Item, number: u64) -> Result<(Shown, DecodeStats)> {
        item.answers.clear();
        let engine = self.reward.engine().clone();
        let items = std::slice::from_mut(item);
        let stats = self.answering.run(&engine, items, number, &mut self.features, None, &mut |_| {})?;
        distinct(item);
        ensure!(!item.answers.is_empty(), Diverged, "no answer to {:?} has any text", item.prompt);
        Ok((self.choose(item, number)?, stats))
    }

    /// Which of an item's answers to show.
    ///
    /// # Errors
    /// No answers; the device's.
    pub fn choose(&self, item: &Item, number: u64) -> Result<Shown> {
        let mut rng = Rng::stream(self.answering.seed ^ number, CHOICE);
        self.reward.show(&item.features(), self.beta, self.second, &mut rng)
    }

    /// Learns from an answered round: 1 where the first of the two was preferred, 0 the second, 1/2 neither; `None` where nothing was
    /// asked or answered.
    ///
    /// # Errors
    /// As [`RewardModel::learn`].
    pub fn tell(&mut self, item: &Item, shown: &Shown, y: Option<f64>) -> Result<Option<Step>> {
        let feature = |i: usize| &item.answers[i].feature[..];
        let pair = shown.second.zip(y).map(|(second, y)| (feature(shown.first), feature(second), y));
        self.reward.learn(&item.features(), pair)
    }
}

/// Keeps one of answers that are the same, and an empty one only where there is nothing else.
fn distinct(item: &mut Item) {
    let mut seen: Vec<Vec<u32>> = Vec::new();
    let empty = item.answers.iter().find(|a| !a.feature.is_empty()).cloned();
    item.answers.retain(|a| {
        let new = !a.text.trim().is_empty() && !seen.contains(&a.tokens.ids);
        if new {
            seen.push(a.tokens.ids.clone());
        }
        new
    });
    if item.answers.is_empty() {
        item.answers.extend(empty);
    }
}

/// One answer of a round, as its row has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundAnswer {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Tokens,
    /// Its reward before the round, among the others'.
    pub reward: f64,
    /// The judge's score, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
}

/// A round, as `rounds.jsonl` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundRow {
    /// Its number, from 0.
    pub round: u64,
    /// [`RewardModel::rounds`] before it: what tells whether it is learnt.
    pub at: u64,
    /// The prompt's text.
    pub prompt: String,
    /// Different answers.
    pub answers: Vec<RoundAnswer>,
    /// The answer shown.
    pub first: usize,
    /// The one beside it, if there was one.
    pub second: Option<usize>,
    /// Probability, before, that the first is preferred to the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probability: Option<f64>,
    /// 1: the first was preferred, 0: the second, 1/2: neither.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<f64>,
    /// Seconds that writing the answers took, and learning: 0 in the file, whose row is written before.
    pub seconds: [f64; 2],
    /// Tokens a pass of the model gave.
    pub tokens_per_forward: f64,
}

impl RoundRow {
    /// How much worse than the best answer the shown ones are, by the judge: the round's regret.
    pub fn regret(&self) -> Option<f64> {
        let scores: Option<Vec<f64>> = self.answers.iter().map(|a| a.score).collect();
        let scores = scores?;
        let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let second = self.second.unwrap_or(self.first);
        Some(best - (scores[self.first] + scores[second]) / 2.0)
    }
}

/// Who prefers: hears of a round with its answers, and says 1 (the first), 0 (the second), 1/2 or nothing. A judge that scores says the
/// scores of all answers, too.
pub trait Prefer {
    /// Scores of an item's answers.
    ///
    /// # Errors
    /// A judge that cannot.
    fn scores(&mut self, item: &Item) -> Result<Option<Vec<f64>>>;

    /// A run goes on in which so many questions were asked before.
    ///
    /// # Errors
    /// A file of answers that cannot be read.
    fn skip(&mut self, _asked: usize) -> Result<()> {
        Ok(())
    }

    /// Shows the round, and asks where there is a second answer.
    ///
    /// # Errors
    /// An answer that cannot be read.
    fn prefer(&mut self, round: u64, item: &Item, shown: &Shown, scores: Option<&[f64]>) -> Result<Option<f64>>;
}

/// Rounds of deployment over a list of prompts, kept in a file.
pub struct Deployment {
    /// The file.
    path: PathBuf,
    file: File,
    /// What is in it.
    pub rows: Vec<RoundRow>,
}

impl Deployment {
    /// The rounds in `path`, which is made where it is missing. A round whose row is there and which the reward has not learnt, since the
    /// process ended between the two, is learnt now.
    ///
    /// # Errors
    /// A file that is damaged or of another reward, by name and line.
    pub fn open(path: &Path, aligner: &mut Aligner, prompt: &dyn Fn(&str) -> Result<Vec<u32>>) -> Result<Self> {
        let io = |e| Error::io(path.display(), e);
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        let (mut rows, mut reader, mut text, mut end) =
            (Vec::<RoundRow>::new(), BufReader::new(&file), Vec::new(), 0u64);
        loop {
            text.clear();
            let n = reader.read_until(b'\n', &mut text).map_err(io)?;
            if n == 0 || text.last() != Some(&b'\n') {
                break;
            }
            let line = rows.len() + 1;
            let bad = |e: String| Error::new(ErrorKind::Config, e).at(format!("{}, line {line}", path.display()));
            let row: RoundRow = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
            let n = row.answers.len();
            let sound = row.round == rows.len() as u64 && row.first < n && row.second.is_none_or(|s| s < n);
            if !sound {
                return Err(bad("not a round of this run".into()));
            }
            rows.push(row);
            end += text.len() as u64;
        }
        drop(reader);
        file.set_len(end).map_err(io)?;
        let is = aligner.reward.rounds();
        if let Some(last) = rows.last() {
            let learnt = last.at + 1 == is;
            ensure!(
                learnt || last.at == is,
                Config,
                "{}: rounds of another reward, which had been through {} rounds",
                path.display(),
                last.at
            );
            if !learnt {
                let ids = prompt(&last.prompt)?;
                let tokens: Vec<&Tokens> = last.answers.iter().map(|a| &a.tokens).collect();
                let features = aligner.features.of(&ids, &tokens)?;
                let pair =
                    last.second.zip(last.preference).map(|(s, y)| (&features[last.first][..], &features[s][..], y));
                aligner.reward.learn(&features, pair)?;
            }
        }
        Ok(Self { path: path.into(), file, rows })
    }

    /// One round for `item`: answers, question, preference, row, lesson, in this order.
    ///
    /// # Errors
    /// Those of answering, of the judge and of the files. What was answered is in the row, whatever fails behind it.
    pub fn round(&mut self, aligner: &mut Aligner, item: &mut Item, judge: &mut dyn Prefer) -> Result<&RoundRow> {
        let (round, at, start) = (self.rows.len() as u64, aligner.reward.rounds(), Instant::now());
        let (shown, stats) = aligner.ask(item, round)?;
        let generate = start.elapsed().as_secs_f64();
        let scores = judge.scores(item)?;
        let preference = judge.prefer(round, item, &shown, scores.as_deref())?;
        let preference = preference.filter(|_| shown.second.is_some());
        let feature = |i: usize| &item.answers[i].feature[..];
        let probability = shown.second.map(|s| aligner.reward.prefers(feature(shown.first), feature(s))).transpose()?;
        let rewards = aligner.reward.rewards(&item.features());
        let answer = |(i, a): (usize, &super::Answer)| RoundAnswer {
            text: a.text.clone(),
            tokens: a.tokens.clone(),
            reward: rewards[i],
            score: scores.as_ref().map(|s| s[i]),
        };
        let mut row = RoundRow {
            round,
            at,
            prompt: item.prompt.clone(),
            answers: item.answers.iter().enumerate().map(answer).collect(),
            first: shown.first,
            second: shown.second,
            probability: probability.map(|p| p.0),
            preference,
            seconds: [generate, 0.0],
            tokens_per_forward: stats.tokens_per_forward(),
        };
        let line = serde_json::to_string(&row).map_err(std::io::Error::from);
        let written = line.and_then(|l| writeln!(self.file, "{l}")).and_then(|()| self.file.sync_data());
        written.map_err(|e| Error::io(self.path.display(), e))?;
        let start = Instant::now();
        aligner.tell(item, &shown, preference)?;
        row.seconds[1] = start.elapsed().as_secs_f64();
        self.rows.push(row);
        Ok(&self.rows[self.rows.len() - 1])
    }
}
