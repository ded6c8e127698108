// From logits to tokens.
#pragma once

// What a row of logits amounts to. A row with NaN, or whose largest is not finite, has max NaN.
RECORD(LogitStats) {
  float max;
  u32 argmax;      // the lowest id of equals
  float lse;       // log sum exp(x)
  float entropy;   // of the softmax, in nats
};

ARGS(LogitsStats) {
  In<float> logits;       // [rows, vocab] align 16
  Out<LogitStats> stats;  // [rows]
  u32 rows;               // >= 1
  u32 vocab;              // >= 1
};

// The k largest of a row, largest first, lower ids first among equals.
ARGS(TopK) {
  In<float> logits;   // [rows, vocab] align 16 - no NaN
  Out<float> values;  // [rows, k]
  Out<u32> ids;       // [rows, k]
  u32 rows;           // >= 1
  u32 vocab;          // >= 1, <= 1048576
  u32 k;              // >= 1, <= 64 - at most vocab
};

// How the token of a row is drawn: temperature, then top-k, top-p and min-p.
RECORD(Draw) {
  u64 seed;
  u64 stream;
  u64 counter;        // the draw's place in the stream: its position
  float temperature;  // 0: greedy
  float top_p;        // above 0; 1 keeps all
  float min_p;        // 0 keeps all
  u32 top_k;          // 0 keeps all
};

// A token for each row; 0xffffffff where the logits hold NaN or nothing finite.
ARGS(Sample) {
  In<float> logits;  // [rows, vocab] align 16
  In<Draw> draws;    // [rows]
  Out<u32> tokens;   // [rows]
  u32 rows;          // >= 1
  u32 vocab;         // >= 1, <= 1048576
};

// The distribution that Sample draws from; all 0 where the logits hold NaN or nothing finite.
ARGS(Distribution) {
  In<float> logits;  // [rows, vocab] align 16
  In<Draw> draws;    // [rows]
  Out<float> p;      // [rows, vocab] align 16
  u32 rows;          // >= 1
  u32 vocab;         // >= 1, <= 1048576
};

// Launches, a block for each row.
//
//   logits_stats   LogitsStats    grid (rows), block 1024
//   top_k          TopK           grid (rows), block 1024
//   sample         Sample         grid (rows), block 1024
//   distribution   Distribution   grid (rows), block 1024
