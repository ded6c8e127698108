//! [`RewardModel`]: what is learnt of a taste, and the one file that it lives in.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bytemuck::{cast_slice, pod_collect_to_vec};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::engine::Engine;
use crate::error::{Context, Error, ErrorKind, Result, bail, ensure};
use crate::files::{TensorBytes, write_file, write_tensors};
use crate::rlhf::{FeatureSpec, OnePass, Precision, Progress, Scale, Second, Settings, Shown, State, Step, deploy};
use crate::rng::Rng;

/// Comparisons between two snapshots: those in between are in the log.
const SNAPSHOT: usize = 64;
/// Version of the file.
const FORMAT: u32 = 1;

/// How a reward begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardOptions {
    /// What it sees of an answer.
    pub features: FeatureSpec,
    /// How it learns.
    pub learner: Settings,
    /// Features that the scale is learnt from before it is frozen. Until then every comparison so far is learnt anew whenever the scale
    /// has changed.
    pub warmup: u64,
    /// Of the inverse of the curvature.
    pub precision: Precision,
}

impl Default for RewardOptions {
    /// Mean-pooled states, the implicit step, 256 features of warm-up, f64.
    fn default() -> Self {
        let (features, learner) = (FeatureSpec::default(), Settings::default());
        Self { features, learner, warmup: 256, precision: Precision::F64 }
    }
}

/// What of a reward is plain data.
#[derive(Clone, Serialize, Deserialize)]
struct Header {
    format: u32,
    /// Of the model whose states the features are.
    model: String,
    options: RewardOptions,
    /// Rounds that are in it.
    rounds: u64,
    progress: Progress,
}

/// What a round brought: features for the scale, and a comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Round {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    seen: Vec<Vec<f32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pair: Option<Pair>,
}

/// A comparison: features of the two answers, and 1 where the first was preferred, 0 where the second was, 1/2 for a tie.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Pair(Vec<f32>, Vec<f32>, f64);

/// A learnt taste: a linear head on the features of one model's answers, learnt one comparison at a time at a cost that does not grow
/// (Li et al. 2025, arXiv:2502.07193), and what it knows of its own uncertainty.
///
/// With a file ([`RewardModel::open`]) a comparison is on disk before it is learnt; whatever ends the process loses none.
pub struct RewardModel {
    engine: Engine,
    header: Header,
    scale: Scale,
    learner: OnePass,
    /// Comparisons of the warm-up.
    kept: Vec<Pair>,
    store: Option<Store>,
}

struct Store {
    path: PathBuf,
    log: File,
    /// Rounds in the log.
    logged: usize,
}

impl RewardModel {
    /// One that has learnt nothing, in memory.
    ///
    /// # Errors
    /// Impossible settings, a layer that the model lacks; the device's.
    pub fn new(engine: &Engine, options: RewardOptions) -> Result<Self> {
        let (layers, d) = (engine.config().layers, engine.config().hidden);
        let tap = options.features.tap(layers);
        ensure!(tap <= layers, Usage, "features at the input of layer {tap}: the model has {layers}");
        ensure!(options.warmup >= 2, Usage, "a warm-up of {} features: a scale needs 2 at least", options.warmup);
        let learner = fresh(engine, &options)?;
        let header =
            Header { format: FORMAT, model: engine.fingerprint()?, rounds: 0, progress: Progress::default(), options };
        let scale = Scale::new(d, header.options.warmup);
        Ok(Self { engine: engine.clone(), header, scale, learner, kept: Vec::new(), store: None })
    }

    /// The reward in `path`, with what its log has beyond it; `options` are those of a new one, where there is none, and where there is
    /// one they have to be its own, if given. From now on it is kept there.
    ///
    /// # Errors
    /// A file that is damaged, of another model, with other options, or in use by another process, by name.
    pub fn open(engine: &Engine, path: &Path, options: Option<RewardOptions>) -> Result<Self> {
        let log_path = log_path(path);
        let io = |e| Error::io(log_path.display(), e);
        let opened = OpenOptions::new().read(true).append(true).create(true).open(&log_path);
        let log = opened.map_err(io)?;
        if log.try_lock().is_err() {
            bail!(Usage, "{}: in use by another process", path.display());
        }
        let mut reward = if path.exists() {
            let reward = Self::load(engine, path)?;
            if let Some(options) = options {
                let was = &reward.header.options;
                ensure!(*was == options, Usage, "{}: made with {was:?}, not {options:?}", path.display());
            }
            reward
        } else {
            let reward = Self::new(engine, options.unwrap_or_default())?;
            reward.snapshot(path)?;
            reward
        };
        let logged = reward.replay(&log, &log_path)?;
        reward.store = Some(Store { path: path.into(), log, logged });
        Ok(reward)
    }

    /// The reward in `path` as it is there, log included; nothing is written.
    ///
    /// # Errors
    /// No such file; as [`RewardModel::open`].
    pub fn read(engine: &Engine, path: &Path) -> Result<Self> {
        let mut reward = Self::load(engine, path)?;
        let log = log_path(path);
        if let Ok(file) = File::open(&log) {
            reward.replay(&file, &log)?;
        }
        Ok(reward)
    }

    /// The model's engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// How it was made.
    pub fn options(&self) -> &RewardOptions {
        &self.header.options
    }

    /// Comparisons that it has learnt.
    pub fn comparisons(&self) -> u64 {
        self.learner.steps()
    }

    /// How its predictions went, each made before the comparison was learnt.
    pub fn progress(&self) -> &Progress {
        &self.header.progress
    }

    /// The learner.
    pub fn learner(&self) -> &OnePass {
        &self.learner
    }

    /// A learner for the same features, on the same device, that has learnt nothing.
    ///
    /// # Errors
    /// Impossible settings; the device's.
    pub fn untaught(&self, settings: Settings) -> Result<OnePass> {
        let inverse = self.engine.0.model.inverse(self.scale.width(), self.header.options.precision)?;
        OnePass::with(inverse, settings)
    }

    /// The scale of its features.
    pub fn scale(&self) -> &Scale {
        &self.scale
    }

    /// A feature as the learner sees it.
    pub fn scaled(&self, feature: &[f32]) -> Vec<f64> {
        self.scale.apply(feature)
    }

    /// The features of several answers, one after another, as the learner sees them.
    pub fn rows(&self, features: &[Vec<f32>]) -> Vec<f64> {
        features.iter().flat_map(|f| self.scale.apply(f)).collect()
    }

    /// Rewards of answers to one prompt. They are comparable among these, not across prompts.
    pub fn rewards(&self, features: &[Vec<f32>]) -> Vec<f64> {
        features.iter().map(|f| self.learner.reward(&self.scale.apply(f))).collect()
    }

    /// Probability that the first answer is preferred to the second, and how uncertain the margin is: one standard deviation.
    ///
    /// # Errors
    /// The device's.
    pub fn prefers(&self, first: &[f32], second: &[f32]) -> Result<(f64, f64)> {
        let z = self.scale.difference(first, second);
        Ok((crate::rlhf::sigmoid(self.learner.reward(&z)), self.learner.variance(&z)?.sqrt()))
    }

    /// Which answer to show, and which beside it, if it is worth asking: see [`deploy`]. In the warm-up the scale counts these answers
    /// already: without them the first ones of all would all be alike.
    ///
    /// # Errors
    /// No answers, features of another width or not finite; the device's.
    pub fn show(&self, features: &[Vec<f32>], beta: f64, second: Second, rng: &mut Rng) -> Result<Shown> {
        if self.scale.is_frozen() {
            return deploy(&self.learner, &self.rows(features), beta, second, rng);
        }
        let mut scale = self.scale.clone();
        features.iter().try_for_each(|f| scale.observe(f))?;
        let (learner, _) = self.relearn(&scale)?;
        let rows: Vec<f64> = features.iter().flat_map(|f| scale.apply(f)).collect();
        deploy(&learner, &rows, beta, second, rng)
    }

    /// A learner that has learnt the warm-up's comparisons under `scale`, and its last step.
    fn relearn(&self, scale: &Scale) -> Result<(OnePass, Option<Step>)> {
        let mut learner = fresh(&self.engine, &self.header.options)?;
        let mut step = None;
        for Pair(a, b, y) in &self.kept {
            step = Some(learner.update(&scale.difference(a, b), *y)?);
        }
        Ok((learner, step))
    }

    /// Learns the scale from features of answers that nobody compared. Nothing once it is frozen.
    ///
    /// # Errors
    /// Features of another width or not finite; the file's.
    pub fn observe(&mut self, features: &[Vec<f32>]) -> Result<()> {
        match self.scale.is_frozen() || features.is_empty() {
            true => Ok(()),
            false => self.learn(features, None).map(|_| ()),
        }
    }

    /// Learns that of two answers with these features the first was preferred (`y` = 1), or the second (0), or neither (1/2). What it
    /// returns has the prediction before. In the warm-up the scale learns from them, too.
    ///
    /// # Errors
    /// A feature of another width or not finite, a `y` outside 0 to 1; the file's, nothing is learnt then.
    pub fn tell(&mut self, first: &[f32], second: &[f32], y: f64) -> Result<Step> {
        let seen = if self.scale.is_frozen() { Vec::new() } else { vec![first.to_vec(), second.to_vec()] };
        let step = self.learn(&seen, Some((first, second, y)))?;
        step.ok_or_else(|| Error::new(ErrorKind::Shape, "a comparison gave no step"))
    }

    /// Both in one round: either all of it is learnt, or nothing.
    ///
    /// # Errors
    /// As [`RewardModel::observe`] and [`RewardModel::tell`].
    pub fn learn(&mut self, seen: &[Vec<f32>], pair: Option<(&[f32], &[f32], f64)>) -> Result<Option<Step>> {
        let seen = if self.scale.is_frozen() { Vec::new() } else { seen.to_vec() };
        self.round(Round { seen, pair: pair.map(|(a, b, y)| Pair(a.to_vec(), b.to_vec(), y)) })
    }

    /// Rounds that it has been through: calls that learnt, or might have.
    pub fn rounds(&self) -> u64 {
        self.header.rounds
    }

    fn round(&mut self, round: Round) -> Result<Option<Step>> {
        self.check(&round)?;
        let line = line(self.header.rounds, &round)?;
        // What fails behind the line takes it back: no line is left that was not learnt, and none that is not whole.
        let before = match &mut self.store {
            None => None,
            Some(Store { path, log, .. }) => {
                let io = |e| Error::io(log_path(path).display(), e);
                let before = log.metadata().map_err(io)?.len();
                if let Err(e) = log.write_all(line.as_bytes()).and_then(|()| log.sync_data()) {
                    let _ = log.set_len(before);
                    return Err(io(e));
                }
                Some(before)
            }
        };
        let step = self.apply(round);
        let Some(store) = self.store.as_mut().filter(|_| before.is_some()) else { return step };
        match &step {
            Ok(_) => store.logged += 1,
            Err(_) => drop(store.log.set_len(before.unwrap_or(0))),
        }
        if store.logged >= SNAPSHOT && step.is_ok() {
            // The round is learnt and in the log; what could not be written now is written after the next one.
            if let Err(e) = self.save() {
                tracing::warn!("{e}");
            }
        }
        step
    }

    fn check(&self, round: &Round) -> Result<()> {
        let d = self.scale.width();
        let pair = round.pair.iter().flat_map(|p| [&p.0, &p.1]);
        for f in round.seen.iter().chain(pair) {
            ensure!(f.len() == d, Shape, "a feature of width {}, expected {d}", f.len());
            ensure!(f.iter().all(|x| x.is_finite()), Diverged, "a feature is not finite");
        }
        let y = round.pair.as_ref().map_or(0.5, |p| p.2);
        ensure!((0.0..=1.0).contains(&y), Usage, "a preference of {y}: expected 0 to 1");
        Ok(())
    }

    /// Learns a round; an error changes nothing.
    fn apply(&mut self, round: Round) -> Result<Option<Step>> {
        let y = round.pair.as_ref().map(|p| p.2);
        let (scale, kept) = ((!self.scale.is_frozen()).then(|| self.scale.clone()), self.kept.len());
        let step = self.advance(round);
        match step {
            Ok(step) => {
                self.header.rounds += 1;
                if let Some((step, y)) = step.as_ref().zip(y) {
                    self.header.progress.push(step.probability, y)?;
                }
                if self.scale.is_frozen() {
                    self.kept.clear();
                }
                Ok(step)
            }
            Err(e) => {
                self.kept.truncate(kept);
                self.scale = scale.unwrap_or_else(|| self.scale.clone());
                Err(e)
            }
        }
    }

    fn advance(&mut self, Round { seen, pair }: Round) -> Result<Option<Step>> {
        let (warm, asked) = (!self.scale.is_frozen(), pair.is_some());
        seen.iter().try_for_each(|f| self.scale.observe(f))?;
        if warm && !seen.is_empty() {
            self.kept.extend(pair);
            let (learner, step) = self.relearn(&self.scale)?;
            self.learner = learner;
            return Ok(step.filter(|_| asked));
        }
        let step =
            pair.as_ref().map(|Pair(a, b, y)| self.learner.update(&self.scale.difference(a, b), *y)).transpose()?;
        if warm {
            self.kept.extend(pair);
        }
        Ok(step)
    }

    /// Writes it down whole, and empties the log.
    ///
    /// # Errors
    /// The file's: what was there before stays, and the log with it. `Usage` for a reward that has no file.
    pub fn save(&mut self) -> Result<()> {
        let Some(store) = &self.store else { bail!(Usage, "this reward has no file") };
        self.snapshot(&store.path)?;
        let path = store.path.clone();
        if let Some(store) = &mut self.store {
            // Rounds that are in the snapshot are passed over by their numbers, should this fail.
            let emptied = store.log.set_len(0).and_then(|()| store.log.sync_data());
            emptied.map_err(|e| Error::io(log_path(&path).display(), e))?;
            store.logged = 0;
        }
        Ok(())
    }

    /// Writes a copy.
    ///
    /// # Errors
    /// The file's.
    pub fn snapshot(&self, path: &Path) -> Result<()> {
        let state = self.learner.state()?;
        let sound = state.inverse.iter().chain(&state.theta).all(|x| x.is_finite());
        ensure!(sound, Diverged, "{}: the reward has left the finite numbers: forget less", path.display());
        let (mean, squares) = self.scale.parts();
        let kept: Vec<f32> = self.kept.iter().flat_map(|p| [&p.0[..], &p.1].concat()).collect();
        let labels: Vec<f64> = self.kept.iter().map(|p| p.2).collect();
        let d = self.scale.width();
        let f64s = |name: &str, shape: &[usize], v| {
            let bytes: &[u8] = cast_slice::<f64, u8>(v);
            TensorBytes { name: name.into(), dtype: Dtype::F64, shape: shape.into(), bytes }
        };
        let tensors = [
            f64s("inverse", &[d, d], &state.inverse),
            f64s("theta", &[d], &state.theta),
            f64s("theta_sum", &[d], &state.sum),
            f64s("mean", &[d], mean),
            f64s("squares", &[d], squares),
            f64s("warmup_labels", &[labels.len()], &labels),
            TensorBytes::f32("warmup_pairs", &[labels.len(), 2, d], &kept),
        ];
        let mut hash = Sha256::new();
        tensors.iter().for_each(|t| hash.update(t.bytes));
        let scalars = State { inverse: Vec::new(), theta: Vec::new(), sum: Vec::new(), ..state.clone() };
        let json = serde_json::json!({
            "header": self.header, "state": scalars, "seen": self.scale.seen, "sha256": hex(&hash.finalize()),
        });
        write_file(path, |to| write_tensors(to, &tensors, Some((KEY, &json.to_string()))))
    }

    fn load(engine: &Engine, path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|e| Error::io(path.display(), e))?;
        Self::parse(engine, &bytes).context(|| path.display().to_string())
    }

    fn parse(engine: &Engine, bytes: &[u8]) -> Result<Self> {
        let damaged = |e: &dyn std::fmt::Display| Error::new(ErrorKind::Config, format!("not a sound reward: {e}"));
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(&e))?;
        let json = metadata.metadata().as_ref().and_then(|m| m.get(KEY)).cloned();
        let json = json.ok_or_else(|| damaged(&"a safetensors file of something else"))?;
        let json: serde_json::Value = serde_json::from_str(&json).map_err(|e| damaged(&e))?;
        let header: Header = serde_json::from_value(json["header"].clone()).map_err(|e| damaged(&e))?;
        let state: State = serde_json::from_value(json["state"].clone()).map_err(|e| damaged(&e))?;
        ensure!(header.format == FORMAT, Config, "a reward of format {}; this version reads {FORMAT}", header.format);
        let is = engine.fingerprint()?;
        let (was, d) = (&header.model, engine.config().hidden);
        ensure!(
            *was == is,
            Config,
            "a reward of another model: its features are those of {was}, this model (with its adapter and tokenizer) is {is}"
        );
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| damaged(&e))?;
        let mut hash = Sha256::new();
        let mut tensor = |name: &str, dtype: Dtype| -> Result<Vec<u8>> {
            let t = tensors.tensor(name).map_err(|e| damaged(&format!("tensor {name}: {e}")))?;
            ensure!(t.dtype() == dtype, Config, "tensor {name} is {:?}, expected {dtype:?}", t.dtype());
            hash.update(t.data());
            Ok(t.data().to_vec())
        };
        let f64s = |bytes: Vec<u8>| -> Vec<f64> { pod_collect_to_vec(&bytes) };
        let inverse = f64s(tensor("inverse", Dtype::F64)?);
        let [theta, sum] = [f64s(tensor("theta", Dtype::F64)?), f64s(tensor("theta_sum", Dtype::F64)?)];
        let [mean, squares] = [f64s(tensor("mean", Dtype::F64)?), f64s(tensor("squares", Dtype::F64)?)];
        let labels = f64s(tensor("warmup_labels", Dtype::F64)?);
        let pairs: Vec<f32> = pod_collect_to_vec(&tensor("warmup_pairs", Dtype::F32)?);
        ensure!(json["sha256"] == hex(&hash.finalize()), Config, "not a sound reward: its checksum is another");
        let fits = inverse.len() == d * d && [&theta, &sum, &mean, &squares].iter().all(|v| v.len() == d);
        ensure!(fits && pairs.len() == labels.len() * 2 * d, Config, "not a sound reward: tensors of other shapes");
        let kept = pairs.chunks_exact(2 * d).zip(labels);
        let kept = kept.map(|(p, y)| Pair(p[..d].to_vec(), p[d..].to_vec(), y)).collect();
        let inner = engine.0.model.inverse(d, header.options.precision)?;
        let learner = OnePass::restore(State { inverse, theta, sum, ..state }, Some(inner))?;
        let seen = json["seen"].as_u64().ok_or_else(|| damaged(&"no number of features seen"))?;
        let scale = Scale::of_parts(header.options.warmup, seen, mean, squares);
        Ok(Self { engine: engine.clone(), header, scale, learner, kept, store: None })
    }

    /// Applies what the log has beyond the snapshot; the number of its lines. A last line that is not whole was never acknowledged.
    fn replay(&mut self, mut log: &File, path: &Path) -> Result<usize> {
        let io = |e| Error::io(path.display(), e);
        log.seek(SeekFrom::Start(0)).map_err(io)?;
        let (mut reader, mut text, mut end, mut lines) = (BufReader::new(log), Vec::new(), 0u64, 0);
        loop {
            text.clear();
            let n = reader.read_until(b'\n', &mut text).map_err(io)?;
            if n == 0 {
                break;
            }
            let Some((number, round)) = parse_line(&text) else {
                let rest = reader.fill_buf().map_err(io)?;
                ensure!(rest.is_empty(), Config, "{}: line {} is damaged", path.display(), lines + 1);
                drop(reader);
                // Fails on a file that was opened for reading, where it does not matter.
                let _ = log.set_len(end);
                return Ok(lines);
            };
            end += n as u64;
            lines += 1;
            if number < self.header.rounds {
                continue;
            }
            let wanted = self.header.rounds;
            ensure!(number == wanted, Config, "{}: round {number} follows {wanted} others", path.display());
            self.check(&round)
                .and_then(|()| self.apply(round))
                .context(|| format!("{}: line {lines}", path.display()))?;
        }
        Ok(lines)
    }
}

/// Key of the header in the file's metadata.
const KEY: &str = "quadriga_reward";

fn fresh(engine: &Engine, options: &RewardOptions) -> Result<OnePass> {
    let inverse = engine.0.model.inverse(engine.config().hidden, options.precision)?;
    OnePass::with(inverse, options.learner.clone())
}

fn log_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".log");
    path.with_file_name(name)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A round as a line of the log: checksum, number, JSON.
fn line(number: u64, round: &Round) -> Result<String> {
    let json = serde_json::to_string(round).map_err(|e| Error::with_source(ErrorKind::Config, "a round", e))?;
    let body = format!("{number} {json}");
    Ok(format!("{} {body}\n", hex(&Sha256::digest(&body)[..8])))
}

fn parse_line(line: &[u8]) -> Option<(u64, Round)> {
    let text = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (sum, body) = text.split_once(' ')?;
    if hex(&Sha256::digest(body)[..8]) != sum {
        return None;
    }
    let (number, json) = body.split_once(' ')?;
    Some((number.parse().ok()?, serde_json::from_str(json).ok()?))
}
