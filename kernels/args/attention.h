// Attention and the cache of keys and values.
#pragma once

// One sequence of a pass. Its staged rows follow those of the sequence before it in the pass's activations.
RECORD(Seg) {
  u64 kv;      // address of its cache: bf16, layer after layer, keys [capacity, kv_dim] and then values alike
  u64 bits;    // address of its tree's ancestor words [rows, (rows + 63) / 64], or 0
  u32 past;    // committed rows
  u32 rows;    // staged rows
  u32 first;   // its first row in the pass
  u32 mask;    // 0 causal, 1 full, 2 tree
  u32 capacity;
  u32 pad;
};
