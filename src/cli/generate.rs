//! `quadriga generate`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde_json::{Value, json};

use super::flags::{Common, DecoderFlag, GenerateArgs, SamplingArgs};
use super::{drafting, out};
use crate::backend::cpu::{Tier, logits::top_k};
use crate::engine::align::{Answer, Answering, BestOf, Item};
use crate::engine::{Engine, Generate, Message, Session};
use crate::error::{Error, ErrorKind, Result, bail};

/// The best of several answers, by a learnt reward.
#[derive(Args)]
pub(super) struct BestArgs {
    /// A reward that `align` or `chat --reward` has learnt: the best of several answers by it.
    #[arg(long, value_name = "FILE")]
    pub reward: Option<PathBuf>,
    /// Answers that are written, at most.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub best_of: usize,
    /// Write no more once another answer is expected to raise the reward by less than this.
    #[arg(long, default_value_t = 0.0)]
    pub gain: f64,
    /// Standard deviations by which an uncertain reward counts less.
    #[arg(long, default_value_t = 0.0)]
    pub pessimism: f64,
}

pub(super) fn run(common: &Common, args: &GenerateArgs) -> Result<()> {
    let (how, sampler) = (how(&args.sampling)?, args.sampling.sampler()?);
    let prompt = prompt_text(args)?;
    let (engine, router) = common.routed()?;
    let (diffusion, decoder) = (engine.config().diffusion.is_some(), args.draft.decoder);
    if diffusion && decoder.is_some_and(|d| d != DecoderFlag::Diffusion) {
        bail!(Usage, "--decoder: {} is a masked diffusion model, which does not go from left to right", common.model);
    }
    if diffusion || decoder == Some(DecoderFlag::Diffusion) {
        let ids = prompt_ids(&engine, args, prompt)?;
        return super::diffusion::generate(common, args, &engine, &ids);
    }
    if let Some(reward) = &args.best.reward {
        let ids = prompt_ids(&engine, args, prompt)?;
        return best(common, args, &engine, reward, ids);
    }
    let steps = args.draft.steps(&engine)?;
    let draft = if steps.is_none() { args.draft.open(&engine)? } else { None };
    let how = match &steps {
        Some(steps) => how.steps(sampler, steps),
        None => args.draft.apply(how, sampler, draft.as_ref()),
    };
    let costs = draft.as_ref().map(|d| drafting::Costs::restore(common, &engine, d)).transpose()?;
    let ids = prompt_ids(&engine, args, prompt)?;
    if ids.is_empty() {
        bail!(Usage, "the prompt is empty: there is nothing to continue");
    }
    let room = room(&engine, &args.sampling, ids.len())?;
    let mut session = match &steps {
        Some(steps) => engine.session_for_steps(steps, room, common.seed)?,
        None => drafting::session(&engine, draft.as_ref(), room, common.seed)?,
    };
    session.push_ids(&ids)?;
    let routed = router.map(|r| r.route(&ids)).transpose()?;
    session.set_adapters(routed.as_ref().map(|r| &r.adapters))?;

    let start = Instant::now();
    session.prefill()?;
    let prefill_s = start.elapsed().as_secs_f64();
    let mut top: Vec<Value> = Vec::new();
    let best = |s: &mut Session| s.logits().map(|x| json!(top_k(Tier::detect(), x, args.top_logits)));
    if args.top_logits > 0 && args.sampling.max_tokens == 0 {
        top.push(best(&mut session)?);
    }
    let (mut text, mut out_ids) = (String::new(), Vec::new());
    let colours = drafting::Colours::new(common, draft.as_ref());
    let mut running = session.generate(how)?;
    let start = Instant::now();
    while let Some(piece) = running.next() {
        let piece = piece?;
        if let Some(id) = piece.id {
            out_ids.push(id);
            if args.top_logits > 0 {
                top.push(best(running.session())?);
            }
        }
        if !common.json {
            out::print(&colours.paint(&piece))?;
        }
        text += &piece.text;
    }
    let decode_s = start.elapsed().as_secs_f64();
    costs.iter().zip(&draft).for_each(|(c, d)| c.keep(d));
    let finish = running.finish().map_or("length", |f| f.name());
    let stats = session.stats();
    let steps = session.steps().map(|(counts, _)| counts);
    drop(session);
    args.draft.keep(draft.as_ref())?;
    // The first token falls out of the prefill: only the others cost a pass here.
    let tokens_per_s = out_ids.len().saturating_sub(1) as f64 / decode_s.max(1e-9);
    if common.json {
        return out::print_json(&json!({
            "model": common.model,
            "prompt_ids": ids,
            "ids": out_ids,
            "text": text,
            "finish": finish,
            "routed": routed.map(|r| json!({"task": r.task, "margin": out::round(r.margin, 4)})),
            "top_logits": top,
            "stats": {
                "prompt_tokens": ids.len(),
                "prefill_s": out::round(prefill_s, 6),
                "tokens": out_ids.len(),
                "decode_s": out::round(decode_s, 6),
                "tokens_per_s": out::round(tokens_per_s, 2),
                "forwards": stats.forwards,
                "tokens_per_forward": out::round(stats.tokens_per_forward(), 4),
                "accept_length": out::round(stats.accept_length(), 4),
                "drafted": stats.drafted,
                "draft_s": out::round(stats.draft_s, 6),
                "verify_s": out::round(stats.verify_s, 6),
                "commit_s": out::round(stats.commit_s, 6),
                "update_s": stats.update_s,
                "steps": steps.map(|s| json!({ "written": s.written, "judged": s.judged, "accepted": s.accepted })),
                "peak_rss_mb": out::peak_rss_mb().map(|m| out::round(m, 1)),
            },
        }));
    }
    out::print("\n")?;
    eprintln!(
        "[{} + {} tokens; load {:.2} s, prefill {:.0} tok/s, decode {:.1} tok/s; {}; ended by {finish}]",
        ids.len(),
        out_ids.len(),
        engine.load_seconds(),
        ids.len() as f64 / prefill_s.max(1e-9),
        tokens_per_s,
        engine.device(),
    );
    if let Some(r) = &routed {
        eprintln!("[routed to {} (margin {:.2})]", r.task, r.margin);
    }
    if stats.verifications > 0 {
        let share = |s: f64| 100.0 * s / decode_s.max(1e-9);
        eprintln!(
            "[draft {}: accept length {:.2}, {:.2} tokens a forward, {:.2} drafted; draft {:.0} %, verify {:.0} %, commit {:.0} %, learning {:.0} % of the time]",
            draft.as_ref().map_or(&*args.draft.draft, |d| d.name()),
            stats.accept_length(),
            stats.tokens_per_forward(),
            stats.drafted as f64 / stats.verifications as f64,
            share(stats.draft_s),
            share(stats.verify_s),
            share(stats.commit_s),
            share(stats.update_s),
        );
    }
    if let (Some(steps), Some(judge)) = (steps, &args.draft.judge) {
        let same = if judge == "tokens" { "lossless" } else { "not lossless" };
        eprintln!("[{} of {} steps accepted by {judge}: {same}]", steps.accepted, steps.judged);
    }
    Ok(())
}

/// The best of several answers.
fn best(common: &Common, args: &GenerateArgs, engine: &Engine, path: &Path, ids: Vec<u32>) -> Result<()> {
    let a = &args.best;
    let plain = args.sampling.stop.is_empty() && !args.sampling.ignore_eos && args.sampling.context.is_none();
    if !plain {
        bail!(Unsupported, "--reward: there is no --stop, --ignore-eos or --context with it");
    }
    let (reward, mut features) = super::align::read_reward(engine, path)?;
    let mut sampler = args.sampling.sampler()?;
    if sampler.is_greedy() {
        // Several greedy answers are one.
        (sampler.temperature, sampler.top_k) = (1.0, 0);
    }
    let how = Generate::default().sampler(sampler).max_tokens(args.sampling.max_tokens);
    let answering = Answering { how, each: a.best_of, width: 16, seed: common.seed };
    let best = BestOf { most: a.best_of, gain: a.gain, pessimism: a.pessimism };
    let mut item = Item { ids, ..Item::default() };
    let start = Instant::now();
    let chosen = best.run(&reward, &answering, &mut features, &mut item, 0)?;
    let seconds = start.elapsed().as_secs_f64();
    let Answer { text, tokens, cut, .. } = &item.answers[chosen.answer];
    let finish = if *cut { "length" } else { "eos" };
    if common.json {
        return out::print_json(&json!({
            "model": common.model,
            "prompt_ids": item.ids,
            "ids": tokens.ids,
            "text": text,
            "finish": finish,
            "best_of": item.answers.len(),
            "answers": item.answers.iter().map(|a| &a.text).collect::<Vec<_>>(),
            "rewards": chosen.scores,
            "kl_nats": out::round(chosen.kl, 4),
            "stats": {"prompt_tokens": item.ids.len(), "tokens": tokens.ids.len(), "decode_s": out::round(seconds, 6)},
        }));
    }
    out::print(&format!("{}\n", text.trim_end()))?;
    eprintln!(
        "[the best of {} answers by {} comparisons, at most {:.2} nats from plain sampling; {seconds:.2} s; {}]",
        item.answers.len(),
        reward.comparisons(),
        chosen.kl,
        engine.device(),
    );
    Ok(())
}

/// The generation that the flags describe.
pub(super) fn how(a: &SamplingArgs) -> Result<Generate> {
    Ok(Generate::default()
        .sampler(a.sampler()?)
        .max_tokens(a.max_tokens)
        .stop(a.stop.iter().cloned())
        .ignore_eos(a.ignore_eos))
}

/// Room for the prompt and its continuation, or as `--context` says.
fn room(engine: &Engine, a: &SamplingArgs, prompt: usize) -> Result<usize> {
    let most = engine.config().context;
    let room = a.context.unwrap_or_else(|| prompt.saturating_add(a.max_tokens).clamp(1, most));
    if prompt > room {
        bail!(Capacity, "the prompt has {prompt} tokens, the context holds {room}");
    }
    Ok(room)
}

fn prompt_text(args: &GenerateArgs) -> Result<Option<String>> {
    if let Some(file) = &args.prompt_file {
        let bytes = std::fs::read(file).map_err(|e| Error::io(file.display(), e))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let what = format!("{}: not UTF-8 at byte {}", file.display(), e.utf8_error().valid_up_to());
            Error::new(ErrorKind::Usage, what)
        });
        return text.map(Some);
    }
    Ok(args.prompt.clone().or_else(|| args.positional.clone()))
}

fn prompt_ids(engine: &Engine, args: &GenerateArgs, prompt: Option<String>) -> Result<Vec<u32>> {
    if let Some(ids) = &args.prompt_ids {
        return Ok(ids.clone());
    }
    let Some(prompt) = prompt else {
        bail!(Usage, "no prompt: give it as an argument, or by --prompt, --prompt-file or --prompt-ids");
    };
    let tokenizer = engine.tokenizer()?;
    let template = if args.raw { None } else { engine.chat_template()? };
    let Some(template) = template else {
        if args.chat {
            bail!(Tokenizer, "--chat: this model has no chat template; use --raw");
        }
        return tokenizer.encode(&prompt, true, true);
    };
    let mut messages: Vec<Message> = args.system.iter().map(|s| Message::new("system", s)).collect();
    messages.push(Message::new("user", prompt));
    tokenizer.encode(&template.render(&messages, true)?, false, true)
}
