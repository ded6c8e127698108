//! A safetensors file: every tensor that is listed must have its bytes.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use quadriga::format::safetensors::Shards;

fuzz_target!(|data: &[u8]| {
    let Ok(shards) = Shards::parse(vec![("fuzz".into(), Arc::new(data.to_vec()))]) else { return };
    for t in shards.tensors() {
        let (entry, bytes) = shards.tensor(&t.name).expect("a listed tensor");
        assert_eq!(entry.range.len(), bytes.len());
    }
});
