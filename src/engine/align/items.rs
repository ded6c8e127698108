//! Prompts with answers, and comparisons of them: from files, and from the model itself.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::cache::FeatureCache;
use super::rollouts::{Rolled, Rollouts};
use crate::decode::DecodeStats;
use crate::engine::erased::{AnyExtractor, Decode};
use crate::engine::{Engine, Finish, Generate, Message};
use crate::error::{Error, ErrorKind, Result, bail, ensure};
use crate::rlhf::{FeatureSpec, Tokens};
use crate::train::data::for_each_line;

/// An answer with what a reward sees of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Tokens,
    /// Whether it was cut at the most tokens.
    pub cut: bool,
    /// phi, `[hidden]`; empty until it is made.
    pub feature: Vec<f32>,
}

/// A prompt with answers to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Item {
    /// The prompt's text.
    pub prompt: String,
    /// Its tokens, in the model's chat form.
    pub ids: Vec<u32>,
    /// The right answer, where the file has one.
    pub reference: Option<String>,
    /// Different answers.
    pub answers: Vec<Answer>,
}

impl Item {
    /// The features of all answers.
    pub fn features(&self) -> Vec<Vec<f32>> {
        self.answers.iter().map(|a| a.feature.clone()).collect()
    }
}

/// That of two answers to a prompt one was preferred.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Which prompt.
    pub item: usize,
    /// The preferred answer and the other one.
    pub answers: [usize; 2],
}

/// Makes prompts and answers of text, as tokens: the one place where that is done, for learning, scoring and generating alike.
#[derive(Clone)]
pub struct Form {
    engine: Engine,
    raw: bool,
    system: Option<String>,
    end: Option<u32>,
}

impl Form {
    /// In the model's chat form where it has one, unless `raw`.
    ///
    /// # Errors
    /// No tokenizer.
    pub fn new(engine: &Engine, raw: bool, system: Option<String>) -> Result<Self> {
        engine.tokenizer()?;
        Ok(Self { engine: engine.clone(), raw, system, end: engine.end() })
    }

    /// The token that ends an answer.
    pub fn end(&self) -> Option<u32> {
        self.end
    }

    /// The tokens of a prompt, up to where its answer begins.
    ///
    /// # Errors
    /// An empty prompt; the template's.
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let tokenizer = self.engine.tokenizer()?;
        let ids = match self.engine.chat_template()?.filter(|_| !self.raw) {
            Some(template) => {
                let system = self.system.iter().map(|s| Message::new("system", s));
                let turns: Vec<_> = system.chain([Message::new("user", text)]).collect();
                tokenizer.encode(&template.render(&turns, true)?, false, true)?
            }
            None => tokenizer.encode(text, true, true)?,
        };
        ensure!(!text.is_empty() && !ids.is_empty(), Usage, "an empty prompt");
        Ok(ids)
    }

    /// The tokens of an answer.
    ///
    /// # Errors
    /// An empty answer.
    pub fn answer(&self, text: &str) -> Result<Answer> {
        ensure!(!text.trim().is_empty(), Usage, "an empty answer");
        let ids = self.engine.tokenizer()?.encode(text, false, false)?;
        Ok(Answer { text: text.into(), tokens: Tokens { ids, end: self.end }, ..Answer::default() })
    }
}

fn at(path: &Path, line: usize) -> impl Fn(Error) -> Error {
    let place = format!("{}, line {line}", path.display());
    move |e| Error::new(ErrorKind::Usage, e.to_string()).at(place.clone())
}

fn parse(text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| Error::new(ErrorKind::Usage, e.to_string()))
}

fn field<'a>(row: &'a Value, names: &[&str]) -> Result<&'a str> {
    let found = names.iter().find_map(|n| row[n].as_str());
    found.ok_or_else(|| Error::new(ErrorKind::Usage, format!("no text in \"{}\"", names.join("\" or \""))))
}

/// Pairs of a `.jsonl` or `.jsonl.gz`, a row `{"prompt", "chosen", "rejected"}`. Rows of one prompt become one item.
///
/// # Errors
/// A row without these texts, with an empty answer or twice the same, or longer than the model's context, by file and line.
pub fn read_pairs(path: &Path, form: &Form, limit: usize) -> Result<(Vec<Item>, Vec<Comparison>)> {
    let context = form.engine.config().context;
    let (mut items, mut of, mut pairs): (Vec<Item>, HashMap<String, usize>, Vec<Comparison>) = Default::default();
    for_each_line(path, |line, text| {
        if limit > 0 && pairs.len() >= limit {
            return Ok(());
        }
        let mut row = |text| -> Result<()> {
            let row = parse(text)?;
            let (prompt, chosen) = (field(&row, &["prompt"])?, field(&row, &["chosen"])?);
            let rejected = field(&row, &["rejected"])?;
            ensure!(chosen != rejected, Usage, "\"chosen\" and \"rejected\" are the same text: nothing is preferred");
            let item = match of.get(prompt) {
                Some(&i) => i,
                None => {
                    let ids = form.prompt(prompt)?;
                    items.push(Item { prompt: prompt.into(), ids, ..Item::default() });
                    of.insert(prompt.into(), items.len() - 1);
                    items.len() - 1
                }
            };
            let mut answers = [0; 2];
            for (to, text) in answers.iter_mut().zip([chosen, rejected]) {
                let known = items[item].answers.iter().position(|a| a.text == text);
                *to = match known {
                    Some(i) => i,
                    None => {
                        let answer = form.answer(text)?;
                        let n = items[item].ids.len() + answer.tokens.rows();
                        ensure!(
                            n <= context,
                            Usage,
                            "prompt and answer have {n} tokens, the model's context {context}"
                        );
                        items[item].answers.push(answer);
                        items[item].answers.len() - 1
                    }
                };
            }
            pairs.push(Comparison { item, answers });
            Ok(())
        };
        row(text).map_err(at(path, line))
    })?;
    ensure!(!pairs.is_empty(), Usage, "{}: no pairs", path.display());
    Ok((items, pairs))
}

/// Prompts of a `.jsonl` or `.jsonl.gz`: `prompt`, `question` or the first of `turns`; `answer`, where there is one, is the
/// reference of judges that want one. A prompt that comes again is taken once.
///
/// # Errors
/// A row without text, by file and line.
pub fn read_prompts(path: &Path, form: &Form, limit: usize) -> Result<Vec<Item>> {
    let (mut items, mut seen): (Vec<Item>, HashSet<String>) = Default::default();
    for_each_line(path, |line, text| {
        if limit > 0 && items.len() >= limit {
            return Ok(());
        }
        let mut row = |text| -> Result<()> {
            let row = parse(text)?;
            let prompt = row["turns"][0].as_str().map_or_else(|| field(&row, &["prompt", "question"]), Ok)?;
            if seen.insert(prompt.into()) {
                let reference = row["answer"].as_str().map(String::from);
                items.push(Item { prompt: prompt.into(), ids: form.prompt(prompt)?, reference, ..Item::default() });
            }
            Ok(())
        };
        row(text).map_err(at(path, line))
    })?;
    ensure!(!items.is_empty(), Usage, "{}: no prompts", path.display());
    Ok(items)
}

/// Makes features, or finds them in a cache.
pub struct Features {
    engine: Engine,
    spec: FeatureSpec,
    made: Option<(usize, Box<dyn AnyExtractor>)>,
    /// Where they are kept.
    pub cache: Option<FeatureCache>,
}

impl Features {
    /// Features made as `spec` says, kept in the folder `cache`, if there is to be one.
    ///
    /// # Errors
    /// As [`FeatureCache::open`].
    pub fn new(engine: &Engine, spec: FeatureSpec, cache: Option<&Path>) -> Result<Self> {
        let cache = cache.map(|folder| FeatureCache::open(folder, engine, spec)).transpose()?;
        Ok(Self { engine: engine.clone(), spec, made: None, cache })
    }

    /// The features of answers to a prompt, `[hidden]` each.
    ///
    /// # Errors
    /// An empty prompt or answer, more tokens than the context; the device's, the cache's.
    pub fn of(&mut self, prompt: &[u32], answers: &[&Tokens]) -> Result<Vec<Vec<f32>>> {
        let mut features: Vec<Option<Vec<f32>>> = match &mut self.cache {
            Some(cache) => answers.iter().map(|a| cache.get(prompt, a)).collect::<Result<_>>()?,
            None => vec![None; answers.len()],
        };
        let missing: Vec<usize> = (0..answers.len()).filter(|&i| features[i].is_none()).collect();
        if !missing.is_empty() {
            let wanted: Vec<Tokens> = missing.iter().map(|&i| answers[i].clone()).collect();
            let longest = prompt.len() + wanted.iter().map(Tokens::rows).max().unwrap_or(0);
            if self.made.as_ref().is_none_or(|(room, _)| *room < longest) {
                let room = longest.next_power_of_two().max(512).min(self.engine.config().context.max(longest));
                self.made = Some((room, self.engine.0.model.extractor(self.spec, room)?));
            }
            let Some((_, extractor)) = &mut self.made else { bail!(Device, "no extractor") };
            for (i, feature) in missing.into_iter().zip(extractor.of(prompt, &wanted)?) {
                self.keep(prompt, answers[i], &feature)?;
                features[i] = Some(feature);
            }
        }
        Ok(features.into_iter().flatten().collect())
    }

    /// Keeps a feature that came about otherwise.
    pub(crate) fn keep(&mut self, prompt: &[u32], answer: &Tokens, feature: &[f32]) -> Result<()> {
        self.cache.as_mut().map_or(Ok(()), |cache| cache.put(prompt, answer, feature))
    }

    /// Makes those that `items` lack. `on` hears of items done.
    ///
    /// # Errors
    /// As [`Features::of`].
    pub fn fill(&mut self, items: &mut [Item], on: &mut dyn FnMut(usize)) -> Result<()> {
        for (i, item) in items.iter_mut().enumerate() {
            let missing: Vec<usize> = (0..item.answers.len()).filter(|&k| item.answers[k].feature.is_empty()).collect();
            let tokens: Vec<&Tokens> = missing.iter().map(|&k| &item.answers[k].tokens).collect();
            let features = self.of(&item.ids, &tokens)?;
            for (k, feature) in missing.into_iter().zip(features) {
                item.answers[k].feature = feature;
            }
            on(i + 1);
        }
        Ok(())
    }
}

/// How answers are written.
#[derive(Clone)]
pub struct Answering {
    /// Sampler, most tokens, drafts, adapters.
    pub how: Generate,
    /// Answers to each prompt.
    pub each: usize,
    /// In the making at a time.
    pub width: usize,
    /// Seed of all draws.
    pub seed: u64,
}

/// A row of a file of answers.
#[derive(Serialize, Deserialize)]
struct Written {
    item: usize,
    answer: usize,
    /// Of the prompt, the model and how it was answered.
    key: String,
    cut: bool,
    text: String,
    ids: Vec<u32>,
    end: Option<u32>,
}

impl Answering {
    /// Writes answers to every item that has none, with features as `features` makes them. `first` is the number of the first item among
    /// all whose random numbers these are. With a `file`, answers that are there are taken from it and others appended. `on` hears of
    /// answers done.
    ///
    /// # Errors
    /// A prompt that leaves no room for an answer; rows of other items in the file; the device's.
    pub fn run(
        &self,
        engine: &Engine,
        items: &mut [Item],
        first: u64,
        features: &mut Features,
        file: Option<&Path>,
        on: &mut dyn FnMut(usize),
    ) -> Result<DecodeStats> {
        let keys = self.keys(engine, items, first)?;
        let mut to = file.map(|path| self.read(path, items, &keys, on)).transpose()?;
        let todo: Vec<usize> = (0..items.len()).filter(|&i| items[i].answers.len() < self.each).collect();
        todo.iter().for_each(|&i| items[i].answers.clear());
        let prompts: Vec<Vec<u32>> = todo.iter().map(|&i| items[i].ids.clone()).collect();
        let numbers: Vec<u64> = todo.iter().map(|&i| first + i as u64).collect();
        let (eos, tokenizer) = (engine.eos(), engine.tokenizer()?);
        let job = Rollouts {
            prompts: &prompts,
            numbers: &numbers,
            each: self.each,
            from: 0,
            how: &self.how,
            eos: &eos,
            end: engine.end(),
            seed: self.seed,
            width: self.width,
            spec: Some(features.spec),
        };
        let mut done: Vec<Vec<Option<Answer>>> = vec![vec![None; self.each]; todo.len()];
        let mut count = (items.len() - todo.len()) * self.each;
        let stats = engine.0.model.rollouts(&job, &mut |p, k, rolled| {
            let Rolled { tokens, finish, feature } = rolled;
            let (text, cut) = (tokenizer.decode(&tokens.ids, true), finish == Finish::Length);
            if let Some(f) = &feature {
                features.keep(&prompts[p], &tokens, f)?;
            }
            if let (Some(file), Some(path)) = (&mut to, file) {
                let Tokens { ids, end } = tokens.clone();
                let (item, key) = (todo[p], keys[todo[p]].clone());
                let row = Written { item, answer: k, key, cut, text: text.clone(), ids, end };
                let line = serde_json::to_string(&row).map_err(std::io::Error::from);
                line.and_then(|l| writeln!(file, "{l}")).map_err(|e| Error::io(path.display(), e))?;
            }
            done[p][k] = Some(Answer { text, tokens, cut, feature: feature.unwrap_or_default() });
            count += 1;
            on(count);
            Ok(())
        })?;
        if let (Some(file), Some(path)) = (&to, file) {
            file.sync_data().map_err(|e| Error::io(path.display(), e))?;
        }
        for (i, answers) in todo.into_iter().zip(done) {
            items[i].answers = answers.into_iter().flatten().collect();
        }
        features.fill(items, &mut |_| {})?;
        Ok(stats)
    }

    /// `count` more answers to an item, behind those that it has: the same that it would have got at once.
    ///
    /// # Errors
    /// As [`Answering::run`].
    pub fn more(
        &self,
        engine: &Engine,
        item: &mut Item,
        number: u64,
        count: usize,
        features: &mut Features,
    ) -> Result<()> {
        let (eos, tokenizer, from) = (engine.eos(), engine.tokenizer()?, item.answers.len());
        let prompts = std::slice::from_ref(&item.ids);
        let (numbers, spec, width) = (&[number], Some(features.spec), self.width);
        let (how, end, seed) = (&self.how, engine.end(), self.seed);
        let job = Rollouts { prompts, numbers, each: count, from, how, eos: &eos, end, seed, width, spec };
        let mut new = vec![Answer::default(); count];
        engine.0.model.rollouts(&job, &mut |_, k, rolled| {
            let Rolled { tokens, finish, feature } = rolled;
            let (text, cut) = (tokenizer.decode(&tokens.ids, true), finish == Finish::Length);
            new[k - from] = Answer { text, tokens, cut, feature: feature.unwrap_or_default() };
            Ok(())
        })?;
        item.answers.extend(new);
        features.fill(std::slice::from_mut(item), &mut |_| {})
    }

    /// What an item's answers depend on, as a hash.
    fn keys(&self, engine: &Engine, items: &[Item], first: u64) -> Result<Vec<String>> {
        let model = engine.fingerprint()?;
        let sampler = match &self.how.decode {
            Decode::Autoregressive(s) | Decode::Speculative(s, ..) | Decode::Steps(s, _) => *s,
        };
        let of = |(i, item): (usize, &Item)| {
            let number = first + i as u64;
            let all = format!("{model} {sampler:?} {} {} {number} {:?}", self.how.max_tokens, self.seed, item.ids);
            Sha256::digest(all).iter().take(8).map(|b| format!("{b:02x}")).collect()
        };
        Ok(items.iter().enumerate().map(of).collect())
    }

    /// Takes what the file has; a torn last line is cut off.
    fn read(&self, path: &Path, items: &mut [Item], keys: &[String], on: &mut dyn FnMut(usize)) -> Result<File> {
        let io = |e| Error::io(path.display(), e);
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        let mut found: Vec<Vec<Option<Answer>>> = vec![vec![None; self.each]; items.len()];
        let (mut reader, mut text, mut end, mut count) = (BufReader::new(&file), Vec::new(), 0u64, 0);
        for line in 1.. {
            text.clear();
            let n = reader.read_until(b'\n', &mut text).map_err(io)?;
            if n == 0 || text.last() != Some(&b'\n') {
                break;
            }
            let row: Written = serde_json::from_slice(&text).map_err(|e| {
                Error::new(ErrorKind::Usage, e.to_string()).at(format!("{}, line {line}", path.display()))
            })?;
            let known = keys.get(row.item) == Some(&row.key);
            let place = found.get_mut(row.item).and_then(|i| i.get_mut(row.answer)).filter(|_| known);
            let Some(place) = place else {
                let what = "an answer of another run: to another prompt, by another model, or written otherwise";
                bail!(Usage, "{}, line {line}: {what}", path.display());
            };
            let tokens = Tokens { ids: row.ids, end: row.end };
            *place = Some(Answer { text: row.text, tokens, cut: row.cut, feature: Vec::new() });
            end += n as u64;
            count += 1;
        }
        drop(reader);
        file.set_len(end).map_err(io)?;
        for (item, answers) in items.iter_mut().zip(found) {
            item.answers = answers.into_iter().flatten().collect();
        }
        on(count);
        Ok(file)
    }
}
