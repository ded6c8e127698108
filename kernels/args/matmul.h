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

// Weights in blocks, packed as rt/quant.cuh says.
ARGS(LinearQ8_0) {
  In<bf16_t> x;    // [rows, inputs] align 16
  In<u32> quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 256] align 16
  In<u32> scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<float> bias;  // [has_bias, outputs] align 4
  Out<float> y;    // [rows, outputs] align 4
  u32 rows;        // >= 1
  u32 inputs;      // >= 32, % 32 == 0
  u32 outputs;     // >= 1
  u32 has_bias;    // <= 1
};

ARGS(LinearQ4_0) {
  In<bf16_t> x;    // [rows, inputs] align 16
  In<u32> quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<float> bias;  // [has_bias, outputs] align 4
  Out<float> y;    // [rows, outputs] align 4
  u32 rows;        // >= 1
  u32 inputs;      // >= 32, % 32 == 0
  u32 outputs;     // >= 1
  u32 has_bias;    // <= 1
};

ARGS(LinearQ4_1) {
  In<bf16_t> x;    // [rows, inputs] align 16
  In<u32> quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 32] align 16
  In<float> bias;  // [has_bias, outputs] align 4
  Out<float> y;    // [rows, outputs] align 4
  u32 rows;        // >= 1
  u32 inputs;      // >= 32, % 32 == 0
  u32 outputs;     // >= 1
  u32 has_bias;    // <= 1
};

ARGS(LinearQ4_K) {
  In<bf16_t> x;    // [rows, inputs] align 16
  In<u32> quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<u32> supers;  // [(outputs + 15) / 16, inputs / 256, 16] align 8
  In<float> bias;  // [has_bias, outputs] align 4
  Out<float> y;    // [rows, outputs] align 4
  u32 rows;        // >= 1
  u32 inputs;      // >= 256, % 256 == 0
  u32 outputs;     // >= 1
  u32 has_bias;    // <= 1
};

ARGS(LinearQ6_K) {
  In<bf16_t> x;    // [rows, inputs] align 16
  In<u32> quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> high;    // [(outputs + 15) / 16, (inputs + 63) / 64, 64] align 8
  In<u32> scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<u32> supers;  // [(outputs + 15) / 16, inputs / 256, 8] align 4
  In<float> bias;  // [has_bias, outputs] align 4
  Out<float> y;    // [rows, outputs] align 4
  u32 rows;        // >= 1
  u32 inputs;      // >= 256, % 256 == 0
  u32 outputs;     // >= 1
  u32 has_bias;    // <= 1
};

// y = act(gate(x)) * up(x), two matrices of one format; act 0 is SiLU, 1 GELU in its tanh form.
ARGS(LinearGlu) {
  In<bf16_t> x;     // [rows, inputs] align 16
  In<bf16_t> gate;  // [outputs, inputs] align 16
  In<bf16_t> up;    // [outputs, inputs] align 16
  Out<bf16_t> y;    // [rows, outputs] align 2
  u32 rows;         // >= 1
  u32 inputs;       // >= 8, % 8 == 0
  u32 outputs;      // >= 1
  u32 act;          // <= 1
};

ARGS(LinearGluQ8_0) {
  In<bf16_t> x;         // [rows, inputs] align 16
  In<u32> gate_quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 256] align 16
  In<u32> gate_scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<u32> up_quants;    // [(outputs + 15) / 16, (inputs + 63) / 64, 256] align 16
  In<u32> up_scales;    // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  Out<bf16_t> y;        // [rows, outputs] align 2
  u32 rows;             // >= 1
  u32 inputs;           // >= 32, % 32 == 0
  u32 outputs;          // >= 1
  u32 act;              // <= 1
};

ARGS(LinearGluQ4_0) {
  In<bf16_t> x;         // [rows, inputs] align 16
  In<u32> gate_quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> gate_scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<u32> up_quants;    // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> up_scales;    // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  Out<bf16_t> y;        // [rows, outputs] align 2
  u32 rows;             // >= 1
  u32 inputs;           // >= 32, % 32 == 0
  u32 outputs;          // >= 1
  u32 act;              // <= 1
};

ARGS(LinearGluQ4_1) {
  In<bf16_t> x;         // [rows, inputs] align 16
  In<u32> gate_quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> gate_scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 32] align 16
  In<u32> up_quants;    // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> up_scales;    // [(outputs + 15) / 16, (inputs + 63) / 64, 32] align 16
  Out<bf16_t> y;        // [rows, outputs] align 2
  u32 rows;             // >= 1
  u32 inputs;           // >= 32, % 32 == 0
  u32 outputs;          // >= 1
  u32 act;              // <= 1
};

ARGS(LinearGluQ4_K) {
  In<bf16_t> x;         // [rows, inputs] align 16
  In<u32> gate_quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> gate_scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<u32> gate_supers;  // [(outputs + 15) / 16, inputs / 256, 16] align 8
  In<u32> up_quants;    // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> up_scales;    // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<u32> up_supers;    // [(outputs + 15) / 16, inputs / 256, 16] align 8
  Out<bf16_t> y;        // [rows, outputs] align 2
  u32 rows;             // >= 1
  u32 inputs;           // >= 256, % 256 == 0
  u32 outputs;          // >= 1
  u32 act;              // <= 1
};

ARGS(LinearGluQ6_K) {
  In<bf16_t> x;         // [rows, inputs] align 16
  In<u32> gate_quants;  // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> gate_high;    // [(outputs + 15) / 16, (inputs + 63) / 64, 64] align 8
  In<u32> gate_scales;  // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<u32> gate_supers;  // [(outputs + 15) / 16, inputs / 256, 8] align 4
  In<u32> up_quants;    // [(outputs + 15) / 16, (inputs + 63) / 64, 128] align 16
  In<u32> up_high;      // [(outputs + 15) / 16, (inputs + 63) / 64, 64] align 8
  In<u32> up_scales;    // [(outputs + 15) / 16, (inputs + 63) / 64, 16] align 8
  In<u32> up_supers;    // [(outputs + 15) / 16, inputs / 256, 8] align 4
  Out<bf16_t> y;        // [rows, outputs] align 2
  u32 rows;             // >= 1
  u32 inputs;           // >= 256, % 256 == 0
  u32 outputs;          // >= 1
  u32 act;              // <= 1
};

// Weights and activations in bf16 through Hopper's copy engine. A map is what cuTensorMapEncodeTiled makes of a matrix [height,
// inputs]: BFLOAT16, rank 2, sizes {inputs, height}, stride {2 inputs}, element strides 1, 128-byte swizzle, no interleave, L2
// promotion 128 bytes, zeros outside; the box {64, 128} for x, whose height is at least `rows` (so one map serves a buffer), and
// {64, N} for w, whose height is `outputs`. Maps are copied to the device before the launch.
ARGS(LinearMapped) {
  In<u64> x_map;   // [16] align 64
  In<u64> w_map;   // [16] align 64
  In<float> bias;  // [has_bias, outputs] align 4
  Out<float> y;    // [rows, outputs] align 8
  u32 rows;        // >= 1
  u32 inputs;      // >= 8, % 8 == 0
  u32 outputs;     // >= 1
  u32 has_bias;    // <= 1
};

// Launches. Blocks of 256 threads. Every entry point takes any number of rows; the name of linear_* tells how many it serves with
// one reading of the weights. The bits of y[r, o] are the same from all entry points of one weight format.
//
//   entry             grid x               grid y                 dynamic shared memory   for
//   linear_FORMAT_8   (outputs + 15) / 16  (rows + 7) / 8         0                       1..8 rows
//   linear_FORMAT_16  (outputs + 31) / 32  (rows + 15) / 16       0                       9..16
//   linear_FORMAT_32  (outputs + 31) / 32  (rows + 31) / 32       0                       17..32
//   linear_FORMAT_64  (outputs + 31) / 32  (rows + 63) / 64       0                       33..64
//   linear_glu_FORMAT_N  (outputs + 15) / 16, else as linear_FORMAT_N
//   gemm_FORMAT_64    (rows + 63) / 64     (outputs + 63) / 64    32768, bf16 65536       more, where gemm_FORMAT_128 has few blocks
//   gemm_FORMAT_128   (rows + 127) / 128   (outputs + 127) / 128  65536, bf16 98304       more
//   linear_bf16_odd   (outputs + 15) / 16  (rows + 7) / 8         0                       LinearOdd: inputs % 8 != 0
//
//   gemm_bf16_sm90_N: LinearMapped, N is 128 or 256; 384 threads, grid min(multiprocessors, ceil(rows / 128) ceil(outputs / N)), dynamic
//   shared memory 196704 (128) or 196672 (256) bytes; sm_90a only, and bits of its own.
//
// FORMAT and arguments: bf16 Linear, q8_0 LinearQ8_0, q4_0 LinearQ4_0, q4_1 LinearQ4_1, q4_k LinearQ4_K, q6_k LinearQ6_K; LinearGlu...
// alike. N is 8, 16, 32 or 64. linear_glu_* gives the bits of two products followed by glu (rows.h).
// More than 48 KiB of dynamic shared memory must be asked for (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
