//! A chat template and a short conversation.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quadriga::format::{ChatTemplate, Message};

fuzz_target!(|data: &[u8]| {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let Ok(template) = ChatTemplate::new("fuzz", source, "<s>", "</s>") else { return };
    let _ = template.render(&[Message::new("system", "be kind"), Message::new("user", "hi")], true);
});
