//! `quadriga align`: learn what people prefer, and answer so.

mod active;
mod chat;
mod demo;
mod deploy;
mod improve;
mod passive;
mod report;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::drafting::DraftArgs;
use super::flags::Common;
use crate::decode::Sampler;
use crate::engine::align::{Answering, Features, Form, RewardModel, RewardOptions};
use crate::engine::rlhf::judge::{Bradley, Judge};
use crate::engine::rlhf::{FeatureSpec, Pooling, Precision, Rule, Second, Settings};
use crate::engine::{Draft, Engine, Generate};
use crate::error::{Error, ErrorKind, Result, ensure};

pub(super) use chat::chat;

/// The stages.
#[derive(Subcommand)]
pub(in crate::cli) enum Align {
    Passive(passive::PassiveArgs),
    Active(active::ActiveArgs),
    Deploy(Box<deploy::DeployArgs>),
    Improve(Box<improve::ImproveArgs>),
    Demo(demo::DemoArgs),
}

pub(super) fn run(common: &Common, align: &Align) -> Result<ExitCode> {
    match align {
        Align::Passive(a) => passive::run(common, a),
        Align::Active(a) => active::run(common, a),
        Align::Deploy(a) => deploy::run(common, a),
        Align::Improve(a) => improve::run(common, a),
        Align::Demo(a) => return demo::run(common, a),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// How a reward is made; the defaults are those that work (docs/rlhf.md).
#[derive(Args, Clone)]
pub(in crate::cli) struct RewardArgs {
    /// Which hidden states make a feature: mean (of the answer's tokens: better for what is said) or last (the end token's: better for
    /// length and endings).
    #[arg(long, default_value = "mean", value_parser = ["mean", "last"])]
    pub pool: String,
    /// Layer at whose input hidden states are read, 0 the embedding; default: behind the last layer and the final norm.
    #[arg(long)]
    pub layer: Option<usize>,
    /// Divide features by their norm.
    #[arg(long)]
    pub unit: bool,
    /// The one-pass step: implicit (cannot overshoot) or explicit (the paper's).
    #[arg(long, default_value = "implicit", value_parser = ["implicit", "explicit"])]
    pub step: String,
    /// Step size; 1 is as good as refitting everything, in the long run.
    #[arg(long, default_value_t = Settings::default().eta)]
    pub eta: f64,
    /// Ridge: 1 over the prior variance of a weight.
    #[arg(long, default_value_t = Settings::default().lambda)]
    pub lambda: f64,
    /// Keep the weights' norm within this.
    #[arg(long)]
    pub bound: Option<f64>,
    /// Forgetting factor of tastes that change, a comparison: 1 never forgets, 0.99 remembers some hundred.
    #[arg(long, default_value_t = 1.0)]
    pub forget: f64,
    /// Features that the scale is learnt from before it is frozen.
    #[arg(long, default_value_t = RewardOptions::default().warmup)]
    pub warmup_features: u64,
    /// Of the matrix: f64 or f32 (half the memory).
    #[arg(long, default_value = "f64", value_parser = ["f64", "f32"])]
    pub precision: String,
}

impl RewardArgs {
    pub fn options(&self) -> RewardOptions {
        let pool = if self.pool == "last" { Pooling::Last } else { Pooling::Mean };
        let rule = if self.step == "explicit" { Rule::Explicit } else { Rule::Implicit };
        let precision = if self.precision == "f32" { Precision::F32 } else { Precision::F64 };
        let Self { eta, lambda, bound, forget, .. } = *self;
        RewardOptions {
            features: FeatureSpec { pool, layer: self.layer, unit: self.unit },
            learner: Settings { rule, eta, lambda, bound, forget },
            warmup: self.warmup_features,
            precision,
        }
    }
}

/// How answers are written.
#[derive(Args, Clone)]
pub(in crate::cli) struct AnswerArgs {
    /// Answers to each prompt.
    #[arg(long, default_value_t = 8)]
    pub answers: usize,
    /// Most tokens of an answer.
    #[arg(long, short = 'n', default_value_t = 64)]
    pub max_tokens: usize,
    /// 0 is greedy: all answers are the same then.
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probabilities reach this sum.
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f32,
    /// Answers in the making at a time.
    #[arg(long, default_value_t = 16)]
    pub width: usize,
    /// Prompts as they are, not in the model's chat form.
    #[arg(long)]
    pub raw: bool,
    /// System message of the chat form.
    #[arg(long, conflicts_with = "raw")]
    pub system: Option<String>,
}

impl AnswerArgs {
    fn sampler(&self) -> Result<Sampler> {
        let Self { temperature, top_k, top_p, .. } = *self;
        Sampler { temperature, top_k, top_p, ..Sampler::greedy() }.validate()
    }

    pub fn form(&self, engine: &Engine) -> Result<Form> {
        Form::new(engine, self.raw, self.system.clone())
    }

    /// With `draft`, where one was asked for: a batch of answers fills the passes by itself.
    pub fn answering(
        &self,
        engine: &Engine,
        draft: Option<&DraftArgs>,
        seed: u64,
    ) -> Result<(Answering, Option<Draft>)> {
        ensure!(self.answers > 0, Usage, "--answers 0 is impossible: expected 1 or more");
        ensure!(self.width > 0, Usage, "--width 0 is impossible: expected 1 or more");
        let sampler = self.sampler()?;
        let how = Generate::default().sampler(sampler).max_tokens(self.max_tokens);
        let open = draft.map(|d| d.open(engine)).transpose()?.flatten();
        let how = match draft {
            Some(d) => d.apply(how, sampler, open.as_ref()),
            None => how,
        };
        Ok((Answering { how, each: self.answers, width: self.width, seed }, open))
    }
}

/// Where features are kept: beside the results, unless told otherwise.
fn features(engine: &Engine, spec: FeatureSpec, out: &Path, cache: Option<&PathBuf>) -> Result<Features> {
    let default = out.join("features");
    Features::new(engine, spec, Some(cache.map_or(&*default, |p| &**p)))
}

/// The folder of the results.
fn folder(out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|e| Error::io(out.display(), e))
}

fn judge(name: &str, strength: f64) -> Result<Bradley> {
    let judge = Judge::parse(name)?;
    ensure!(!strength.is_nan() && strength > 0.0, Usage, "--strength {strength} is impossible: expected more than 0");
    Ok(Bradley::new(judge, strength))
}

fn second(name: &str) -> Result<Second> {
    let parsed = match name.split_once(':') {
        None => match name {
            "optimistic" => Some(Second::Optimistic),
            "forced" => Some(Second::Forced),
            "runner-up" => Some(Second::Runnerup),
            "worst" => Some(Second::Worst),
            "random" => Some(Second::Random),
            "pair" => Some(Second::Pair),
            _ => None,
        },
        Some(("rank", k)) => k.parse().ok().filter(|&k| k >= 2).map(Second::Rank),
        Some(("quantile", q)) => q.parse().ok().filter(|q| *q >= 1.0).map(Second::Quantile),
        Some(_) => None,
    };
    parsed.ok_or_else(|| {
        let what =
            "expected optimistic, forced, runner-up, worst, random, pair, rank:K (2 or more) or quantile:Q (1 or more)";
        Error::new(ErrorKind::Usage, format!("--second {name}: {what}"))
    })
}

/// The reward of `--reward`, as it is, for verbs that only score.
pub(in crate::cli) fn read_reward(engine: &Engine, path: &Path) -> Result<(RewardModel, Features)> {
    let reward = RewardModel::read(engine, path)?;
    let features = Features::new(engine, reward.options().features, None)?;
    Ok((reward, features))
}
