//! A GGUF file from the parser through configuration and tokenizer to its tensors.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use quadriga::format::gguf::Gguf;
use quadriga::format::{ChatTemplate, Tokenizer, gguf_config};

fuzz_target!(|data: &[u8]| {
    let Ok(g) = Gguf::parse(Arc::new(data.to_vec())) else { return };
    for t in g.tensors() {
        assert_eq!(g.data(t).len(), t.range.len());
    }
    let _ = gguf_config::model_config(&g);
    let _ = ChatTemplate::from_gguf(&g, "fuzz");
    if let Ok(t) = Tokenizer::from_gguf(&g) {
        let _ = t.encode("hello wörld 12", true, true).map(|ids| t.decode(&ids, false));
    }
});
