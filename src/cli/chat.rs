//! `quadriga chat`: interactive, multi-turn.

use std::io::{BufRead, IsTerminal, Write};

use serde_json::json;

use super::flags::{ChatArgs, Common};
use super::{drafting, generate, out};
use crate::engine::Message;
use crate::error::{Error, Result, bail};

pub(super) fn run(common: &Common, args: &ChatArgs) -> Result<()> {
    let (how, sampler) = (generate::how(&args.sampling)?, args.sampling.sampler()?);
    let engine = common.autoregressive()?;
    let draft = args.draft.open(&engine)?;
    let how = args.draft.apply(how, sampler, draft.as_ref());
    let costs = draft.as_ref().map(|d| drafting::Costs::restore(common, &engine, d)).transpose()?;
    let Some(template) = engine.chat_template()? else {
        bail!(Tokenizer, "this model has no chat template; use generate --raw");
    };
    if let Some(path) = &args.reward {
        return super::align::chat(common, args, &engine, template, path);
    }
    let context = args.sampling.context.unwrap_or_else(|| engine.config().context.min(4096));
    let mut session = drafting::session(&engine, draft.as_ref(), context, common.seed)?;
    let mut turns: Vec<Message> = args.system.iter().map(|s| Message::new("system", s)).collect();
    let ask = std::io::stdin().is_terminal() && !common.json;
    if ask {
        eprintln!("{} on {}; an empty line or ctrl-d ends.", common.model, engine.device());
    }
    let colours = drafting::Colours::new(common, draft.as_ref());
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if ask {
            eprint!("> ");
            // A prompt that cannot be shown is no reason to stop.
            let _ = std::io::stderr().flush();
        }
        let Some(line) = lines.next().transpose().map_err(|e| Error::io("stdin", e))? else { break };
        if line.trim().is_empty() {
            break;
        }
        turns.push(Message::new("user", line));
        let ids = engine.tokenizer()?.encode(&template.render(&turns, true)?, false, true)?;
        // The template is rendered anew each turn; what the cache already holds of it is kept.
        let same = ids.iter().zip(session.tokens()).take_while(|(a, b)| a == b).count();
        session.truncate(same);
        session.push_ids(&ids[same..])?;
        let mut answer = String::new();
        for piece in session.generate(how.clone())? {
            let piece = piece?;
            if !common.json {
                out::print(&colours.paint(&piece))?;
            }
            answer += &piece.text;
        }
        if common.json {
            out::print_json(&json!({ "role": "assistant", "content": answer }))?;
        } else {
            out::print("\n")?;
        }
        turns.push(Message::new("assistant", answer));
        costs.iter().zip(&draft).for_each(|(c, d)| c.keep(d));
        args.draft.keep(draft.as_ref())?;
    }
    drop(session);
    args.draft.keep(draft.as_ref())?;
    Ok(())
}
