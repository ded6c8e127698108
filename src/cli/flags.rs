//! Flags as data: clap derives parser, help and completions from these structs.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::drafting::DraftArgs;
use super::fetch;
use super::out::load_bar;
use super::train::{RunArgs, set};
use super::train_draft::TrainDraftArgs;
use crate::backend::cpu::{Compute, Tier};
use crate::decode::Sampler;
use crate::dtype::DType;
use crate::engine::{Device, Engine, EngineOptions, Lora, PoolOptions, TaskRouter};
use crate::error::{Error, ErrorKind, Result, bail};
use crate::format::checkpoint::{is_archive, unpack_archive};

/// A from-scratch LLM engine: generate, chat, measure.
#[derive(Parser)]
#[command(name = "quadriga", version, about, max_term_width = 120)]
pub struct Cli {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Args)]
pub(super) struct Common {
    /// Model: a registered name, a GGUF file, a Hugging Face folder, or a wheel or zip that holds a GGUF.
    #[arg(long, short, global = true, default_value = super::registry::DEFAULT)]
    pub model: String,
    /// A LoRA adapter on top of the model: a PEFT folder. For generate also the folder of an adapt run: the prompt says which adapter.
    #[arg(long, global = true)]
    pub adapter: Option<PathBuf>,
    /// Where to run; auto takes a usable GPU, else the CPU. naive is the f64 specification, for tiny models.
    #[arg(long, global = true, value_enum, default_value = "auto")]
    pub device: DeviceFlag,
    /// CPU threads; 0: one for each physical core.
    #[arg(long, short, global = true, default_value_t = 0)]
    pub threads: usize,
    /// fast: activations in int8 against quantised weights; exact: f32 throughout.
    #[arg(long, global = true, value_enum, default_value = "fast")]
    pub compute: ComputeFlag,
    /// CPU instructions below the best found, for comparisons.
    #[arg(long, global = true, value_enum)]
    pub tier: Option<TierFlag>,
    /// Hand every kernel to a GPU by itself instead of repeated steps as CUDA graphs; the results are the same.
    #[arg(long, global = true)]
    pub no_graphs: bool,
    /// Seed of every random number.
    #[arg(long, global = true, default_value_t = 0)]
    pub seed: u64,
    /// One JSON object on stdout, and nothing else there.
    #[arg(long, global = true)]
    pub json: bool,
    /// More messages; twice for all.
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum DeviceFlag {
    Auto,
    Cpu,
    Cuda,
    Naive,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum ComputeFlag {
    Fast,
    Exact,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum TierFlag {
    Portable,
    Avx2,
    Avx512,
}

#[derive(Subcommand)]
pub(super) enum Command {
    /// Bring a registered model, or hf:OWNER/NAME, into the models folder.
    Fetch(FetchArgs),
    /// Show configuration, tensors, memory plan and devices.
    Inspect(InspectArgs),
    /// Continue a prompt.
    Generate(Box<GenerateArgs>),
    /// Talk to a model, turn by turn.
    Chat(ChatArgs),
    /// Measure quality.
    #[command(subcommand)]
    Eval(Eval),
    /// Measure speed.
    #[command(subcommand)]
    Bench(Bench),
    /// Train on JSONL or text.
    #[command(subcommand)]
    Train(Box<Train>),
    Adapt(Box<super::adapt::AdaptArgs>),
    /// Learn what people prefer, and answer so.
    #[command(subcommand)]
    Align(Box<super::align::Align>),
    /// Teach a diffusion model to say several tokens at once, in the order in which it unmasks them; result: OUT/model, or
    /// OUT/adapter.
    Distill(Box<super::train_diffusion::DistillArgs>),
}

#[derive(Subcommand)]
pub(super) enum Eval {
    /// Perplexity of a text file.
    Ppl(PplArgs),
    /// What a draft gains: accept length and speed beside plain decoding, by category of prompts. Exit status 1 if any text
    /// differs.
    Accept(Box<AcceptArgs>),
    /// Share of tasks in which the right label is the likeliest, or the answer is the right one.
    Accuracy(AccuracyArgs),
    Aup(Box<super::aup::AupArgs>),
}

#[derive(Subcommand)]
pub(super) enum Train {
    /// A low-rank adapter on frozen weights, quantised ones too; result: OUT/adapter, a PEFT folder.
    Lora(LoraArgs),
    /// All weights of a Hugging Face folder; result: OUT/model, such a folder.
    Full(TrainArgs),
    /// An EAGLE-3 draft head: the model answers prompts, the head learns from what it said; result: OUT/draft, in the published
    /// layout.
    Draft(TrainDraftArgs),
    /// A low-rank adapter that prefers the chosen of two answers to the rejected one (DPO); result: OUT/adapter, a PEFT folder.
    #[command(
        mut_arg("data", |a| a.help("Pairs to learn from: .jsonl or .jsonl.gz with prompt, chosen and rejected")),
        mut_arg("max_length", |a| a.help("Most tokens of a prompt with its longer answer")),
        mut_arg("chat", |a| a.help("Refuse a model without a chat form; where there is one, prompts are turns of it anyway"))
    )]
    Dpo(super::train_dpo::DpoArgs),
    /// A masked diffusion model, from one or from an autoregressive model; result: OUT/model, or OUT/adapter.
    Diffusion(super::train_diffusion::TrainDiffusionArgs),
}

#[derive(Subcommand)]
pub(super) enum Bench {
    /// Prefill, decode and the cost of a pass of n rows and of a tree, beside what memory and arithmetic reach.
    Decode(BenchDecodeArgs),
    /// Every kernel at the sizes of real models, beside the roof that bounds it.
    Kernels(BenchKernelsArgs),
    /// Steps of training over random tokens, beside what matrix products reach.
    Train(BenchTrainArgs),
    Reward(super::bench_reward::BenchRewardArgs),
    /// A stream of prompts, one kind after another, with drafts that learn beside one that does not. Exit status 1 if any text differs.
    Online(Box<super::bench_online::BenchOnlineArgs>),
}

#[derive(Args)]
pub(super) struct FetchArgs {
    /// A registered name, or hf:OWNER/NAME.
    #[arg(default_value = super::registry::DEFAULT)]
    pub name: String,
}

#[derive(Args)]
pub(super) struct InspectArgs {
    /// List every tensor.
    #[arg(long)]
    pub tensors: bool,
    /// Context length of the memory plan.
    #[arg(long, default_value_t = 2048)]
    pub context: usize,
}

#[derive(Args)]
pub(super) struct SamplingArgs {
    /// Most new tokens.
    #[arg(long, short = 'n', default_value_t = 256)]
    pub max_tokens: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probabilities reach this sum.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the best.
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
    /// Make tokens of the last 64 less likely; 1 changes nothing.
    #[arg(long, default_value_t = 1.0)]
    pub repeat_penalty: f32,
    /// Stop before this string; may be given several times.
    #[arg(long)]
    pub stop: Vec<String>,
    /// Go on behind end-of-text tokens.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Most tokens of prompt and continuation together; default: as many as are needed, within what the model allows.
    #[arg(long)]
    pub context: Option<usize>,
}

impl SamplingArgs {
    pub fn sampler(&self) -> Result<Sampler> {
        let (temperature, top_k, top_p) = (self.temperature, self.top_k, self.top_p);
        Sampler { temperature, top_k, top_p, min_p: self.min_p, repeat_penalty: self.repeat_penalty }.validate()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum DecoderFlag {
    Ar,
    Spec,
    Diffusion,
}

#[derive(Args)]
pub(super) struct GenerateArgs {
    /// The prompt.
    #[arg(value_name = "PROMPT")]
    pub positional: Option<String>,
    /// The prompt, as a flag.
    #[arg(long, conflicts_with = "positional")]
    pub prompt: Option<String>,
    /// The prompt from a file.
    #[arg(long, conflicts_with_all = ["positional", "prompt"])]
    pub prompt_file: Option<PathBuf>,
    /// The prompt as token ids: 1,2,3.
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["positional", "prompt", "prompt_file"])]
    pub prompt_ids: Option<Vec<u32>>,
    /// Put the prompt into the model's chat template (the default where the model has one).
    #[arg(long, conflicts_with = "raw")]
    pub chat: bool,
    /// Take the prompt as it is.
    #[arg(long)]
    pub raw: bool,
    /// System message of the chat template.
    #[arg(long, conflicts_with = "raw")]
    pub system: Option<String>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    #[command(flatten)]
    pub diffusion: super::diffusion::DiffusionArgs,
    /// With --json: the K best logits of every position.
    #[arg(long, default_value_t = 0)]
    pub top_logits: usize,
    #[command(flatten)]
    pub best: super::generate::BestArgs,
}

#[derive(Args)]
pub(super) struct ChatArgs {
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
    /// System message.
    #[arg(long)]
    pub system: Option<String>,
    /// Learn your taste: of several answers the best is shown and, where it may be worth asking, a second one. What is learnt stays in
    /// this file, after each answer.
    #[arg(long, value_name = "FILE")]
    pub reward: Option<PathBuf>,
    /// With --reward: answers that are written.
    #[arg(long, value_name = "N", default_value_t = 8, requires = "reward")]
    pub best_of: usize,
    /// With --reward: how many standard deviations of its reward a second answer may be worth asking for.
    #[arg(long, default_value_t = 0.3, requires = "reward")]
    pub beta: f64,
}

#[derive(Args)]
pub(super) struct AcceptArgs {
    /// .jsonl or .jsonl.gz files of prompts: rows with prompt, question or turns (the first is asked), and perhaps a category.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// At most so many prompts of each file, evenly from all of it; 0: all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// Prompts as they are, not in the model's chat template.
    #[arg(long)]
    pub raw: bool,
    /// With --json: the tokens of every text.
    #[arg(long)]
    pub rows: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    pub draft: DraftArgs,
}

#[derive(Args)]
pub(super) struct PplArgs {
    /// A UTF-8 text file.
    pub file: PathBuf,
    /// Tokens that are scored together; each but a window's first is predicted from those before it in the window.
    #[arg(long, default_value_t = 2048)]
    pub window: usize,
    /// At most so many tokens of the file; 0: all.
    #[arg(long, default_value_t = 0)]
    pub max_tokens: usize,
}

#[derive(Args)]
pub(super) struct BenchDecodeArgs {
    /// A model of these sizes with random weights, instead of --model: tiny, smollm2-135m, qwen3-0.6b, llama-3.2-1b,
    /// llama-3-8b, qwen2.5-7b.
    #[arg(long, conflicts_with = "model")]
    pub shape: Option<String>,
    /// Type of the random weights: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k.
    #[arg(long, requires = "shape", default_value = "bf16")]
    pub weights: String,
    /// Tokens of the prefill measurement.
    #[arg(long, default_value_t = 512)]
    pub prompt_tokens: usize,
    /// Tokens of the decode measurement, from an empty context.
    #[arg(long, default_value_t = 128)]
    pub new_tokens: usize,
    /// Context behind which passes of n rows are measured.
    #[arg(long, default_value_t = 256)]
    pub depth: usize,
    /// Measurements of each kind; medians are reported.
    #[arg(long, default_value_t = 5)]
    pub reps: usize,
    /// Context length that memory is planned for.
    #[arg(long, default_value_t = 2048)]
    pub context: usize,
    /// Also measures 1, 4 and 8 sequences with so many random LoRA adapters on all linears, beside the base model.
    #[arg(long, default_value_t = 0)]
    pub adapters: usize,
    /// Their rank.
    #[arg(long, default_value_t = 16, requires = "adapters")]
    pub adapter_rank: usize,
}

#[derive(Args)]
pub(super) struct BenchKernelsArgs {
    /// Only kernels or models whose name holds this, or one of these: llama-3-8b,attention.
    #[arg(long, value_delimiter = ',')]
    pub filter: Vec<String>,
    /// Also the sizes of models that need gigabytes: Llama-3-8B, Llama-3.2-1B, Qwen2.5-7B, Qwen3-0.6B.
    #[arg(long)]
    pub large: bool,
    /// The operations of training instead of those of decoding.
    #[arg(long)]
    pub training: bool,
    /// Type of all weights, instead of those in which each model is mostly met: bf16, q8_0, q4_0, q4_1, q4_k, q6_k, ...
    #[arg(long)]
    pub weights: Option<String>,
    /// Timed batches of each kernel; the median and the 10th and 90th percentile are reported.
    #[arg(long, default_value_t = 25)]
    pub samples: usize,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum AccuracyBy {
    /// The likeliest of the file's labels behind the prompt.
    Label,
    /// What the model says, greedily: what stands behind its last ####, or all of it, must be the answer's.
    Generate,
}

#[derive(Args)]
pub(super) struct AccuracyArgs {
    /// A .jsonl or .jsonl.gz of tasks: prompt and completion, question and answer, or input and label; rows of
    /// `--split` where rows name theirs.
    pub file: PathBuf,
    /// Which rows.
    #[arg(long, default_value = "test")]
    pub split: String,
    /// How an answer is found.
    #[arg(long, value_enum, default_value = "label")]
    pub by: AccuracyBy,
    /// At most so many rows; 0: all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    /// Most new tokens of an answer.
    #[arg(long, default_value_t = 256)]
    pub max_tokens: usize,
    /// Prompts as turns of the model's chat form.
    #[arg(long)]
    pub chat: bool,
}

#[derive(Args)]
pub(super) struct LoraArgs {
    #[command(flatten)]
    pub shape: LoraShape,
    #[command(flatten)]
    pub train: TrainArgs,
}

/// Which adapter.
#[derive(Args)]
pub(super) struct LoraShape {
    /// Columns of B.
    #[arg(long)]
    pub rank: Option<usize>,
    /// The update is scaled by alpha / rank.
    #[arg(long)]
    pub alpha: Option<f32>,
    /// Scale by alpha / sqrt(rank) instead.
    #[arg(long)]
    pub rslora: bool,
    /// Which linears: q,k,v,o,gate,up,down.
    #[arg(long, value_delimiter = ',')]
    pub targets: Option<Vec<String>>,
    /// Only so many of the upper layers; the backward pass ends there. 0: all.
    #[arg(long)]
    pub top_layers: Option<usize>,
}

impl LoraShape {
    /// Sets what was given.
    pub fn apply(&self, lora: &mut Lora) {
        set(&mut lora.rank, &self.rank);
        set(&mut lora.alpha, &self.alpha);
        set(&mut lora.targets, &self.targets);
        set(&mut lora.top_layers, &self.top_layers);
        lora.rank_stabilized |= self.rslora;
    }
}

#[derive(Args)]
pub(super) struct TrainArgs {
    /// Training data: .jsonl or .jsonl.gz with text, prompt and completion, or messages; or a text file.
    #[arg(long, required_unless_present = "config")]
    pub data: Option<PathBuf>,
    /// Data to measure on, never trained on.
    #[arg(long)]
    pub held_out: Option<PathBuf>,
    /// Folder of the results, checkpoints and the curve.
    #[arg(long)]
    pub out: PathBuf,
    /// Settings as an earlier run wrote them (OUT/run.json); flags override them.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Go on from the newest checkpoint in OUT.
    #[arg(long)]
    pub resume: bool,
    #[command(flatten)]
    pub run: RunArgs,
    /// adamw, sgd, momentum, optimistic, optimistic-adam.
    #[arg(long)]
    pub optimizer: Option<String>,
    /// Most tokens of an example; windows of a text file.
    #[arg(long)]
    pub max_length: Option<usize>,
    /// Longer rows: error, truncate or skip.
    #[arg(long)]
    pub long_rows: Option<String>,
    /// Prompts and completions as turns of the model's chat form.
    #[arg(long)]
    pub chat: bool,
    /// At most so many examples.
    #[arg(long)]
    pub limit: Option<usize>,
    /// What the backward pass computes again: nothing, pointwise or layer.
    #[arg(long)]
    pub recompute: Option<String>,
}

#[derive(Args)]
pub(super) struct BenchTrainArgs {
    /// All weights instead of a LoRA adapter.
    #[arg(long)]
    pub full: bool,
    /// Rank of the adapter on all linears.
    #[arg(long, default_value_t = 8)]
    pub rank: usize,
    /// Tokens of a step.
    #[arg(long, default_value_t = 512)]
    pub tokens: usize,
    /// Steps that are timed.
    #[arg(long, default_value_t = 7)]
    pub steps: usize,
    /// What the backward pass computes again: nothing, pointwise or layer.
    #[arg(long)]
    pub recompute: Option<String>,
    /// Instead: what a LoRA step on q and v costs as it gets sparser, with adapters in so many of the upper layers.
    #[arg(long, value_name = "TOP_LAYERS", conflicts_with_all = ["full", "recompute"])]
    pub levers: Option<usize>,
}

/// The type that `--weights` names.
pub(super) fn weights_type(name: &str) -> Result<DType> {
    let found = DType::ALL.into_iter().find(|d| d.to_string().eq_ignore_ascii_case(name));
    let all = || DType::ALL.map(|d| d.to_string().to_lowercase()).join(", ");
    found.ok_or_else(|| Error::new(ErrorKind::Usage, format!("--weights {name}: no such type; there are {}", all())))
}

impl Common {
    /// Opens `--model` on `--device`, with a progress bar on a terminal.
    pub fn engine(&self) -> Result<Engine> {
        Engine::open_with(self.path()?, self.options()?)
    }

    /// [`Common::engine`], and the router of the run that `--adapter` names, where it names one.
    pub fn routed(&self) -> Result<(Engine, Option<TaskRouter>)> {
        let Some(run) = self.adapter.as_ref().filter(|a| TaskRouter::is_run(a)) else {
            return Ok((self.engine()?, None));
        };
        let engine = Engine::open_with(self.path()?, self.bare()?)?;
        let router = engine.task_router(run, PoolOptions::default())?;
        Ok((engine, Some(router)))
    }

    /// [`Common::engine`] for what goes from left to right.
    pub fn autoregressive(&self) -> Result<Engine> {
        let engine = self.engine()?;
        if engine.config().diffusion.is_some() {
            bail!(
                Usage,
                "{}: a masked diffusion model, which does not go from left to right; generate and eval aup decode it",
                self.model
            );
        }
        Ok(engine)
    }

    /// The file or folder of `--model`: brought if it has to be, unpacked if it is a wheel or a zip.
    pub fn path(&self) -> Result<PathBuf> {
        let path = fetch::resolve(&self.model, true, fetch::Progress::Stderr)?;
        if path.is_file() && is_archive(&path)? {
            return unpack_archive(&path, fetch::Store::open()?.dir());
        }
        Ok(path)
    }

    pub fn compute(&self) -> Compute {
        match self.compute {
            ComputeFlag::Fast => Compute::Fast,
            ComputeFlag::Exact => Compute::Exact,
        }
    }

    /// The instructions asked for.
    pub fn tier(&self) -> Option<Tier> {
        self.tier.map(|t| match t {
            TierFlag::Portable => Tier::Portable,
            TierFlag::Avx2 => Tier::Avx2,
            TierFlag::Avx512 => Tier::Avx512,
        })
    }

    /// Device, threads and way of computing, with a progress bar, and the adapter.
    pub fn options(&self) -> Result<EngineOptions> {
        let o = self.bare()?;
        let Some(folder) = &self.adapter else { return Ok(o) };
        let at = folder.display();
        if TaskRouter::is_run(folder) {
            bail!(
                Usage,
                "--adapter {at}: a run of several adapters, which only generate routes to; name one of {at}/adapters"
            );
        }
        Ok(o.adapter(folder))
    }

    /// [`Common::options`] without the adapter.
    fn bare(&self) -> Result<EngineOptions> {
        let device = match self.device {
            DeviceFlag::Auto => Device::Auto,
            DeviceFlag::Cpu => Device::Cpu,
            DeviceFlag::Cuda => Device::Cuda,
            DeviceFlag::Naive => Device::Naive,
        };
        if self.threads > 1024 {
            bail!(Usage, "--threads {} is impossible: expected 0 to 1024", self.threads);
        }
        let mut o = EngineOptions::default()
            .device(device)
            .threads(self.threads)
            .compute(self.compute())
            .without_graphs(self.no_graphs);
        if let Some(t) = self.tier() {
            o = o.tier(t);
        }
        let bar = load_bar();
        Ok(o.progress(move |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            if done == total {
                bar.finish_and_clear();
            }
        }))
    }
}
