// Attention and the cache of keys and values.
#pragma once

// One sequence of a pass. Its rows follow those of the sequence before it in the pass's activations; in its cache they stand behind
// the committed rows and those that earlier passes staged. Masks number all staged rows: row i of the pass is number staged + i.
RECORD(Seg) {
  u64 kv;      // address of its cache: bf16, layer after layer, keys [capacity, kv_dim] and then values alike
  u64 bits;    // address of its tree's ancestor words [staged + rows, words], or 0
  u32 past;    // committed rows
  u32 staged;  // rows that earlier passes staged
  u32 rows;    // rows of this pass
  u32 first;   // its first row in the pass
  u32 mask;    // 0 causal, 1 full, 2 tree, 3 blocks: a row sees its own block of staged rows and those before it
  u32 capacity;
  u32 block;   // for mask 3: rows of a block, 1 to 2^30
  u32 words;   // for mask 2: up(staged + rows, 64); for mask 3: rows that the first block lacks, below block
};

// Writes k and v behind the committed and the staged rows of each segment's cache.
ARGS(KvStage) {
  In<Seg> segs;    // [segments]
  In<float> k;     // [rows, kv_dim] align 16
  In<float> v;     // [rows, kv_dim] align 16
  u32 segments;    // >= 1
  u32 rows;        // >= 1
  u32 layer;
  u32 kv_dim;      // >= 8, % 8 == 0
};

// Rotates q in place, and writes rotated k, and v, behind the committed and the staged rows of each segment's cache.
ARGS(RopeStage) {
  In<Seg> segs;      // [segments]
  InOut<float> q;    // [rows, heads, head_dim] align 16
  In<float> k;       // [rows, kv_heads, head_dim] align 16
  In<float> v;       // [rows, kv_heads, head_dim] align 16
  In<float> table;   // [rows, head_dim] align 16 - cosines, then sines
  u32 segments;      // >= 1
  u32 rows;          // >= 1
  u32 layer;
  u32 heads;         // >= 1
  u32 kv_heads;      // >= 1
  u32 head_dim;      // >= 8, % 8 == 0
};

// In all layers cache row past + i becomes what row past + path[i] was. The path ascends strictly.
ARGS(KvCommit) {
  In<u32> path;    // [n]
  u64 kv;          // >= 1 - address of the cache
  u32 past;
  u32 n;           // >= 1
  u32 layers;      // >= 1
  u32 capacity;    // >= 1
  u32 kv_dim;      // >= 8, % 8 == 0
};

// The same for many sequences, straight from what verification wrote: sequence s keeps the first counts[s] of path[s].
ARGS(KvCommitBatch) {
  In<Seg> segs;    // [segments]
  In<u32> path;    // [segments, stride]
  In<u32> counts;  // [segments] - at most stride
  u32 segments;    // >= 1
  u32 stride;      // >= 1
  u32 layers;      // >= 1
  u32 kv_dim;      // >= 8, % 8 == 0
};

// y[r, h] = softmax_j(scale q[r, h].k[j]) v[j] over the cache rows j that row r sees; head h reads kv head h / group.
ARGS(Attention) {
  In<Seg> segs;         // [segments]
  In<float> q;          // [rows, kv_heads, group, head_dim] align 16
  Out<bf16_t> y;        // [rows, kv_heads, group, head_dim] align 16
  InOut<float> parts;   // [chunks, rows, kv_heads, group, head_dim] align 16 - scratch, untouched when chunks is 1
  InOut<float> stats;   // [chunks, rows, kv_heads, group, 2] align 8 - scratch, untouched when chunks is 1
  u32 segments;         // >= 1
  u32 rows;             // >= 1
  u32 layer;
  u32 kv_heads;         // >= 1
  u32 group;            // >= 1 - query heads of a kv head
  u32 head_dim;         // >= 8, % 8 == 0, <= 256
  u32 window;           // - a query at position p sees positions above p - window; 0: no window
  u32 chunk;            // >= 64, % 64 == 0 - cache rows of a block
  u32 chunks;           // >= 1 - at least up(past + staged + rows, chunk) of every segment
  u32 stages;           // >= 1, <= 2 - tiles in flight
  float scale;
};

// Launches. "up(a, b)" is a divided by b, rounded up.
//
//   kv_stage         KvStage         grid (rows, up(kv_dim / 4, 128)), block 128
//   rope_stage       RopeStage       grid (rows, up(heads * head_dim / 8 + kv_heads * head_dim / 4, 128)), block 128
//   kv_commit        KvCommit        grid (up(layers * kv_dim / 4, 128)), block 128
//   kv_commit_batch  KvCommitBatch   grid (up(layers * kv_dim / 4, 128), segments), block 128
//
//   attend_64_m16    Attention, head_dim 64, M = 16     and attend_64_m64, attend_96_m16, attend_96_m64, attend_128_m16,
//   attend_128_m64, attend_256_m16, attend_256_m32, attend_any_m16 (any head_dim of the contract); M = 16, 32 or 64 as named.
//       grid ((rows * group + segments * (M - 1)) / M, chunks, kv_heads), block 128
//       shared memory 2 * (M * ld + stages * 128 * ld + M * 72) + 24 * M bytes, ld = up(head_dim, 16) * 16 + 8
//       M = 16 while the longest segment's rows * group is at most 16; results do not depend on M, nor on stages.
//       Scratch: parts and stats as in the contract. `chunk` decides the order of sums: fix it by the shape alone, not by rows.
//   attend_merge     Attention       grid (up(rows * kv_heads * group * head_dim / 4, 128)), block 128; only when chunks > 1
//
//   prefill_64       Attention, head_dim 64, M = 128    and prefill_96, prefill_128 (M = 128), prefill_256 (M = 64)
//       grid ((rows * group + segments * (M - 1)) / M, kv_heads), block 128
//       shared memory 2 * (M + 128) * (head_dim + 8) + 8 * M bytes; no scratch, no merge: chunk, chunks and stages mean nothing.
//       For passes of many rows, when the blocks of one wave suffice without splitting keys: rows * group >= 128, say. Sums are in
//       another order than those of attend_* with several chunks.
