//! `quadriga eval`.

use std::time::Instant;

use serde_json::json;

use super::flags::{Common, PplArgs};
use super::out;
use crate::error::{Error, ErrorKind, Result, bail};

pub(super) fn ppl(common: &Common, args: &PplArgs) -> Result<()> {
    if args.window < 2 {
        bail!(Usage, "--window {} is impossible: a window needs 2 tokens or more", args.window);
    }
    let file = args.file.display();
    let bytes = std::fs::read(&args.file).map_err(|e| Error::io(&file, e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::new(ErrorKind::Usage, format!("{file}: not UTF-8 at byte {at}"))
    })?;
    let engine = common.autoregressive()?;
    let mut ids = engine.tokenizer()?.encode(&text, true, false)?;
    if args.max_tokens > 0 {
        ids.truncate(args.max_tokens);
    }
    if ids.len() < 2 {
        bail!(Usage, "{file}: {} tokens; perplexity needs 2 or more", ids.len());
    }
    let window = args.window.min(engine.config().context);
    let mut session = engine.session(window.min(ids.len()), common.seed)?;
    let bar = out::bar(ids.len() as u64, "perplexity");
    let (mut sum, mut n, start) = (0.0, 0u64, Instant::now());
    for chunk in ids.chunks(window) {
        session.nll(chunk, |x| {
            sum += x;
            n += 1;
        })?;
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    let (seconds, nll) = (start.elapsed().as_secs_f64(), sum / n as f64);
    let speed = ids.len() as f64 / seconds;
    if common.json {
        return out::print_json(&json!({
            "model": common.model, "file": file.to_string(), "tokens": ids.len(), "scored": n, "window": window,
            "nll": nll, "ppl": nll.exp(), "seconds": out::round(seconds, 4), "tokens_per_s": out::round(speed, 1),
        }));
    }
    out::print(&format!("perplexity {:.4} (nll {nll:.5}) over {n} tokens, windows of {window}\n", nll.exp()))?;
    eprintln!("[{speed:.0} tok/s on {}]", engine.device());
    Ok(())
}
