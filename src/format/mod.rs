//! Files to memory: GGUF, safetensors, tokenizers, chat templates. No mathematics.
