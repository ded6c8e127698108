//! `quadriga chat`: interactive, multi-turn.

use std::io::{BufRead, IsTerminal, Write};

use serde_json::json;

use super::flags::{ChatArgs, Common};
use super::{generate, out};
use crate::error::{Error, Result, bail};

pub(super) fn run(common: &Common, args: &ChatArgs) -> Result<()> {
    let how = generate::how(&args.sampling)?;
    let engine = common.engine()?;
    let Some(template) = engine.chat_template()? else {
        bail!(Tokenizer, "this model has no chat template; use generate --raw");
    };
    let context = args.sampling.context.unwrap_or_else(|| engine.config().context.min(4096));
    let mut session = engine.session(context, common.seed)?;
    let mut turns: Vec<(String, String)> = args.system.iter().map(|s| ("system".into(), s.clone())).collect();
    let ask = std::io::stdin().is_terminal() && !common.json;
    if ask {
        eprintln!("{} on {}; an empty line or ctrl-d ends.", common.model, engine.device());
    }
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
        turns.push(("user".into(), line));
        let messages: Vec<(&str, &str)> = turns.iter().map(|(r, c)| (r.as_str(), c.as_str())).collect();
        let ids = engine.tokenizer()?.encode(&template.render(&messages, true)?, false, true)?;
        // The template is rendered anew each turn; what the cache already holds of it is kept.
        let same = ids.iter().zip(session.tokens()).take_while(|(a, b)| a == b).count();
        session.truncate(same);
        session.push_ids(&ids[same..])?;
        let mut answer = String::new();
        for piece in session.generate(how.clone())? {
            let piece = piece?.text;
            if !common.json {
                out::print(&piece)?;
            }
            answer += &piece;
        }
        if common.json {
            out::print_json(&json!({ "role": "assistant", "content": answer }))?;
        } else {
            out::print("\n")?;
        }
        turns.push(("assistant".into(), answer));
    }
    Ok(())
}
