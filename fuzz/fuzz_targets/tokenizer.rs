//! A `tokenizer.json` and, behind a zero byte, a text for it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quadriga::format::{Tokenizer, hf_config};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (json, text) = text.split_once('\0').unwrap_or((text, "hello wörld 12"));
    let _ = hf_config::parse(json);
    let Ok(t) = Tokenizer::from_json(json) else { return };
    for parse_special in [true, false] {
        if let Ok(ids) = t.encode(text, true, parse_special) {
            let mut stream = t.decoder(false);
            let streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
            assert_eq!(streamed + &stream.finish(), t.decode(&ids, false));
        }
    }
});
