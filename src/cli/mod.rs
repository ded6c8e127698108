//! The command line: verbs, flags, exit codes. Text goes to stdout, everything about it to stderr.

mod accept;
mod accuracy;
mod adapt;
mod align;
mod aup;
mod aup_file;
mod aup_run;
mod bench_adapters;
mod bench_decode;
mod bench_kernels;
mod bench_online;
mod bench_reward;
mod bench_train;
mod chat;
mod diffusion;
mod drafting;
mod eval;
pub mod fetch;
mod fetch_verb;
pub mod flags;
mod generate;
mod inspect;
mod out;
pub mod registry;
mod train;
mod train_diffusion;
mod train_dpo;
mod train_draft;
mod train_head;

use std::process::ExitCode;

use clap::Parser;

use crate::error::{Error, Result};
use flags::{Bench, Cli, Command, Eval, Train};

/// Parses the arguments, runs the verb and says how it went: 0 done, 1 a negative result, 2 an error. A broken pipe is
/// success: whoever read our output had enough.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // A failure to print leaves nobody to tell.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    let level = ["warn", "info", "debug"][usize::from(cli.common.verbose).min(2)];
    let filter = tracing_subscriber::EnvFilter::try_from_env("QUADRIGA_LOG").unwrap_or_else(|_| level.into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match run(&cli) {
        Ok(code) => code,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(2)
        }
    }
}

fn is_broken_pipe(e: &Error) -> bool {
    let io = std::error::Error::source(e).and_then(|s| s.downcast_ref::<std::io::Error>());
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let common = &cli.common;
    match &cli.command {
        Command::Fetch(a) => fetch_verb::run(common, a),
        Command::Inspect(a) => inspect::run(common, a),
        Command::Generate(a) => generate::run(common, a),
        Command::Chat(a) => chat::run(common, a),
        Command::Eval(Eval::Accept(a)) => return accept::run(common, a),
        Command::Eval(Eval::Ppl(a)) => eval::ppl(common, a),
        Command::Eval(Eval::Accuracy(a)) => accuracy::run(common, a),
        Command::Eval(Eval::Aup(a)) => return aup::run(common, a),
        Command::Train(t) => match &**t {
            Train::Lora(a) => train::lora(common, a),
            Train::Full(a) => train::full(common, a),
            Train::Draft(a) => train_draft::run(common, a),
            Train::Dpo(a) => train_dpo::run(common, a),
            Train::Diffusion(a) => train_diffusion::masked(common, a),
        },
        Command::Adapt(a) => adapt::run(common, a),
        Command::Align(a) => return align::run(common, a),
        Command::Distill(a) => train_diffusion::distill(common, a),
        Command::Bench(Bench::Decode(a)) => bench_decode::run(common, a),
        Command::Bench(Bench::Kernels(a)) => bench_kernels::run(common, a),
        Command::Bench(Bench::Online(a)) => return bench_online::run(common, a),
        Command::Bench(Bench::Reward(a)) => bench_reward::run(common, a),
        Command::Bench(Bench::Train(a)) => bench_train::run(common, a),
    }?;
    Ok(ExitCode::SUCCESS)
}
