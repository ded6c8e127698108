// Products with weights: y[r, o] = sum_i w[o, i] x[r, i] + bias[o], in f32. Launches: end of this file.
#pragma once

// Weights in bf16, as the file has them.
ARGS(Linear) {
  In<bf16_t> x;    // [rows, inputs] align 16
  In<bf16_t> w;    // [outputs, inputs] align 16
  In<float> bias;  // [has_bias, outputs] align 4
  Out<float> y;    // [rows, outputs] align 4
  u32 rows;        // >= 1
  u32 inputs;      // >= 8, % 8 == 0
  u32 outputs;     // >= 1
  u32 has_bias;    // <= 1
};

// The same for any width, slower.
ARGS(LinearOdd) {
  In<bf16_t> x;    // [rows, inputs] align 2
  In<bf16_t> w;    // [outputs, inputs] align 2
  In<float> bias;  // [has_bias, outputs] align 4
  Out<float> y;    // [rows, outputs] align 4
  u32 rows;        // >= 1
  u32 inputs;      // >= 1
  u32 outputs;     // >= 1
  u32 has_bias;    // <= 1
};

// Launches. Every entry point takes any number of rows; its name tells how many it serves with one reading of the weights.
// No dynamic shared memory unless it is named. The bits of y[r, o] are the same from all entry points of one weight format.
//
//   entry           args       block  grid
//   linear_bf16_8   Linear       256  (outputs + 15) / 16, (rows + 7) / 8      1..8 rows
//   linear_bf16_16  Linear       256  (outputs + 31) / 32, (rows + 15) / 16    9..16
//   linear_bf16_32  Linear       256  (outputs + 31) / 32, (rows + 31) / 32    17..32
//   linear_bf16_64  Linear       256  (outputs + 31) / 32, (rows + 63) / 64    33..64
//   linear_bf16_odd LinearOdd    256  (outputs + 15) / 16, (rows + 7) / 8      inputs % 8 != 0
