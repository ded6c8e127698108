//! `quadriga chat --reward`: a conversation that learns what you like.

use std::io::{IsTerminal, Write};
use std::path::Path;

use serde_json::json;

use super::deploy::Person;
use crate::cli::flags::{ChatArgs, Common};
use crate::cli::out;
use crate::engine::align::{Aligner, Answering, Features, Item, RewardModel};
use crate::engine::rlhf::Second;
use crate::engine::{Engine, Generate, Message};
use crate::error::{ErrorKind, Result, ensure};
use crate::format::ChatTemplate;

pub(in crate::cli) fn chat(
    common: &Common,
    args: &ChatArgs,
    engine: &Engine,
    template: &ChatTemplate,
    path: &Path,
) -> Result<()> {
    ensure!(args.best_of > 0, Usage, "--best-of 0 is impossible: expected 1 or more");
    let plain = args.sampling.stop.is_empty() && !args.sampling.ignore_eos && args.sampling.context.is_none();
    ensure!(plain, Unsupported, "--reward: there is no --stop, --ignore-eos or --context with it");
    let mut sampler = args.sampling.sampler()?;
    if sampler.is_greedy() {
        // Several greedy answers are one.
        (sampler.temperature, sampler.top_k) = (1.0, 0);
    }
    let how = Generate::default().sampler(sampler).max_tokens(args.sampling.max_tokens);
    let reward = RewardModel::open(engine, path, None)?;
    let features = Features::new(engine, reward.options().features, None)?;
    let answering = Answering { how, each: args.best_of, width: args.best_of, seed: common.seed };
    let mut aligner = Aligner { reward, features, answering, beta: args.beta, second: Second::Optimistic };
    let mut turns: Vec<Message> = args.system.iter().map(|s| Message::new("system", s)).collect();
    let ask = std::io::stdin().is_terminal() && !common.json;
    if ask {
        let n = aligner.reward.comparisons();
        eprintln!("{} on {}; {n} comparisons learnt; an empty line or ctrl-d ends.", common.model, engine.device());
    }
    let mut you = Person::keyboard();
    loop {
        if ask {
            eprint!("> ");
            // A prompt that cannot be shown is no reason to stop.
            let _ = std::io::stderr().flush();
        }
        let Some(line) = you.line()? else { break };
        if line.trim().is_empty() {
            break;
        }
        turns.push(Message::new("user", line));
        let ids = engine.tokenizer()?.encode(&template.render(&turns, true)?, false, true)?;
        let mut item = Item { ids, ..Item::default() };
        let round = aligner.reward.rounds();
        let (shown, _) = aligner.ask(&mut item, round)?;
        let text = |i: usize| item.answers[i].text.trim_end();
        let (first, second) = (text(shown.first), shown.second.map(text));
        if !common.json {
            match second {
                None => out::print(&format!("{first}\n"))?,
                Some(second) => out::print(&format!("1: {first}\n2: {second}\n"))?,
            }
        }
        if let (true, Some(second)) = (common.json, second) {
            out::print_json(&json!({"role": "question", "answers": [first, second]}))?;
        }
        let mut over = false;
        let y = match second {
            None => None,
            Some(_) => match you.answer() {
                Err(e) if e.kind() == ErrorKind::Usage => {
                    over = true;
                    None
                }
                y => y?,
            },
        };
        let step = aligner.tell(&item, &shown, y)?;
        let taken = if y == Some(0.0) { second.unwrap_or(first) } else { first };
        if common.json {
            let probability = step.map(|s| out::round(s.probability, 4));
            out::print_json(&json!({
                "role": "assistant", "content": taken, "asked": second.is_some(), "preference": y, "probability": probability,
                "comparisons": aligner.reward.comparisons(),
            }))?;
        }
        turns.push(Message::new("assistant", taken));
        if over {
            break;
        }
    }
    aligner.reward.save()
}
