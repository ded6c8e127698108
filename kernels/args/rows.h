// Operations that treat rows one by one. Bound by memory.
#pragma once

// y[r] = scale * table[tokens[r]], of a table of plain elements of `bytes` bytes.
ARGS(Embed) {
  In<uint8_t> table;  // [vocab, d, bytes] align 4
  In<u32> tokens;     // [rows] align 4 - below vocab
  Out<float> y;       // [rows, d] align 4
  u32 vocab;          // >= 1
  u32 rows;           // >= 1
  u32 d;              // >= 1
  u32 bytes;          // >= 2, <= 4
  float scale;
};

// The same of a table in blocks, packed as rt/quant.cuh says; words of a tile in each plane.
ARGS(EmbedBlocks) {
  In<u32> quants;  // [(vocab + 15) / 16, (d + 63) / 64, quant_words] align 4
  In<u32> high;    // [(vocab + 15) / 16, (d + 63) / 64, high_words] align 4
  In<u32> scales;  // [(vocab + 15) / 16, (d + 63) / 64, scale_words] align 4
  In<u32> supers;  // [(vocab + 15) / 16, d / 256, super_words] align 4
  In<u32> tokens;  // [rows] align 4 - below vocab
  Out<float> y;    // [rows, d] align 4
  u32 vocab;       // >= 1
  u32 rows;        // >= 1
  u32 d;           // >= 32, % 32 == 0
  u32 quant_words;
  u32 high_words;
  u32 scale_words;
  u32 super_words;
  float scale;
};

// y[i] = x[index[i]].
ARGS(GatherRows) {
  In<float> x;     // [from, d] align 4
  In<u32> index;   // [rows] align 4 - below from
  Out<float> y;    // [rows, d] align 4
  u32 from;        // >= 1
  u32 rows;        // >= 1
  u32 d;           // >= 1
};

// x += r.
ARGS(Add) {
  InOut<float> x;  // [n] align 4
  In<float> r;     // [n] align 4
  u32 n;           // >= 1
};

// x += act(r); act 0 is SiLU, 1 GELU in its tanh form.
ARGS(AddActivated) {
  InOut<float> x;  // [n] align 4
  In<float> r;     // [n] align 4
  u32 n;           // >= 1
  u32 act;         // <= 1
};

// y = x w / sqrt(mean(x^2) + eps), row by row. Zhang & Sennrich 2019, arXiv:1910.07467.
ARGS(RmsNorm) {
  In<float> x;     // [rows, d] align 4
  In<float> w;     // [d] align 4
  Out<bf16_t> y;   // [rows, d] align 2
  u32 rows;        // >= 1
  u32 d;           // >= 1
  float eps;       // >= 0
};

// x += r, then y = rms_norm(x).
ARGS(AddRmsNorm) {
  InOut<float> x;  // [rows, d] align 4
  In<float> r;     // [rows, d] align 4
  In<float> w;     // [d] align 4
  Out<bf16_t> y;   // [rows, d] align 2
  u32 rows;        // >= 1
  u32 d;           // >= 1
  float eps;       // >= 0
};

// x += rms_norm(r).
ARGS(AddNormed) {
  InOut<float> x;  // [rows, d] align 4
  In<float> r;     // [rows, d] align 4
  In<float> w;     // [d] align 4
  u32 rows;        // >= 1
  u32 d;           // >= 1
  float eps;       // >= 0
};

// Each head of x is RMS-normalised in place.
ARGS(HeadNorm) {
  InOut<float> x;  // [n, head_dim] align 4
  In<float> w;     // [head_dim] align 4
  u32 n;           // >= 1 - rows times heads
  u32 head_dim;    // >= 1
  float eps;       // >= 0
};

// y = act(gate) * up; act 0 is SiLU, 1 GELU in its tanh form.
ARGS(Glu) {
  In<float> gate;  // [n] align 4
  In<float> up;    // [n] align 4
  Out<bf16_t> y;   // [n] align 2
  u32 n;           // >= 1
  u32 act;         // <= 1
};

// Rotates every head of x in place: pair (i, i + head_dim / 2) of row r by the angle whose cosine and sine stand in table[r].
ARGS(Rope) {
  InOut<float> x;    // [rows, heads, head_dim] align 4
  In<float> table;   // [rows, head_dim] align 4
  u32 rows;          // >= 1
  u32 heads;         // >= 1
  u32 head_dim;      // >= 2, % 2 == 0
};

// y[r, o] = sum_i w[o, i] x[r, i] + bias[o], of plain weights of `bytes` bytes that no faster kernel takes.
ARGS(Dense) {
  In<uint8_t> w;      // [outputs, inputs, bytes] align 4
  In<bf16_t> x;       // [rows, inputs] align 2
  In<float> bias;     // [has_bias, outputs] align 4
  Out<float> y;       // [rows, outputs] align 4
  u32 rows;           // >= 1
  u32 outputs;        // >= 1
  u32 inputs;         // >= 1
  u32 bytes;          // >= 2, <= 4
  u32 has_bias;       // <= 1
};
