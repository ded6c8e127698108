// What training needs beyond a forward pass: backward of rows, losses, optimisers. Launches: end of this file.
#pragma once

// Of y = rms_norm(x): with u = w dy and s = 1 / sqrt(mean(x^2) + eps), dx (+)= s (u - x s^2 mean(u x)). Zhang & Sennrich 2019,
// arXiv:1910.07467.
ARGS(RmsNormBwd) {
  InOut<float> dx;      // [rows, d] align 4
  Out<float> inverse;   // [rows] align 4 - s, as ColumnSums takes it
  In<float> dy;         // [rows, d] align 4
  In<float> x;          // [rows, d] align 4
  In<float> w;          // [d] align 4
  u32 rows;             // >= 1
  u32 d;                // >= 1
  float eps;            // >= 0
  u32 add;              // <= 1 - whether dx keeps what it was
};

// parts[c, i] = sum over rows c * 64 .. of dy[r, i], each times x[r, i] inverse[r] if there is an x: a bias, or the weight of a norm.
ARGS(ColumnSums) {
  In<float> dy;         // [rows, d] align 4
  In<float> x;          // [has_x, rows, d] align 4
  In<float> inverse;    // [has_x, rows] align 4
  Out<float> parts;     // [(rows + 63) / 64, d] align 4
  u32 rows;             // >= 1
  u32 d;                // >= 1
  u32 has_x;            // <= 1
};

// y += the sum of the parts, in their order.
ARGS(Fold) {
  In<float> parts;      // [chunks, n] align 4
  InOut<float> y;       // [n] align 4
  u32 chunks;           // >= 1
  u32 n;                // >= 1
};

// Of z = act(gate) up: dgate = dz up act'(gate), dup = dz act(gate); act 0 is SiLU, 1 GELU in its tanh form.
ARGS(GluBwd) {
  Out<float> dgate;     // [n] align 4
  Out<float> dup;       // [n] align 4
  In<float> dz;         // [n] align 4
  In<float> gate;       // [n] align 4
  In<float> up;         // [n] align 4
  u32 n;                // >= 1
  u32 act;              // <= 1
};

// dx[index[i]] += dy[i].
ARGS(ScatterRows) {
  InOut<float> dx;      // [into, d] align 4
  In<float> dy;         // [rows, d] align 4
  In<u32> index;        // [rows] align 4 - below into, all different
  u32 into;             // >= 1
  u32 rows;             // >= 1
  u32 d;                // >= 1
};

// dtable[tokens[t]] += scale dx[r] for the rows r = order[starts[t]] .. order[starts[t + 1] - 1], in that order.
ARGS(EmbedBwd) {
  InOut<float> dtable;  // [vocab, d] align 4
  In<float> dx;         // [rows, d] align 4
  In<u32> tokens;       // [distinct] align 4 - below vocab, all different
  In<u32> starts;       // [(distinct + 1)] align 4 - ascending to rows
  In<u32> order;        // [rows] align 4 - below rows
  u32 vocab;            // >= 1
  u32 rows;             // >= 1
  u32 distinct;         // >= 1
  u32 d;                // >= 1
  float scale;
};

// y = x.
ARGS(Copy) {
  Out<float> y;         // [n] align 4
  In<float> x;          // [n] align 4
  u32 n;                // >= 1
};

// x = 0.
ARGS(Zero) {
  Out<float> x;         // [n] align 4
  u32 n;                // >= 1
};

// y += a x.
ARGS(Axpy) {
  InOut<float> y;       // [n] align 4
  In<float> x;          // [n] align 4
  u32 n;                // >= 1
  float a;
};

// Parts of sum x^2.
ARGS(SquareSums) {
  In<float> x;          // [n] align 4
  Out<float> parts;     // [blocks] align 4
  u32 n;                // >= 1
  u32 blocks;           // >= 1 - of the launch
};

// w = values, rounded.
ARGS(SetBf16) {
  Out<bf16_t> w;        // [n] align 2
  In<float> values;     // [n] align 4
  u32 n;                // >= 1
};

// x = softmax(x / tau), row by row.
ARGS(SoftmaxRows) {
  InOut<float> x;       // [rows, vocab] align 4
  u32 rows;             // >= 1
  u32 vocab;            // >= 1
  float tau;            // > 0
};

// One step of an optimiser, in place. With g' = scale g and prox(w) = r + soft(w - r, l1), r the reference or 0:
//   no states   u = g': SGD
//   m           u = m = beta1 m + g': momentum
//   m, v        u = correct1 m / (sqrt(correct2 v) + eps): AdamW. Loshchilov & Hutter 2019, arXiv:1711.05101
// w = prox(w - lr (u + decay w)); with an anchor: anchor = prox(anchor - lr (u + decay anchor)), w = anchor - lr u, optimistic descent.
// Rakhlin & Sridharan 2013, arXiv:1208.3728.
ARGS(Optimize) {
  InOut<float> w;       // [n] align 4
  In<float> g;          // [n] align 4
  InOut<float> m;       // [has_m, n] align 4
  InOut<float> v;       // [has_v, n] align 4
  InOut<float> anchor;  // [has_anchor, n] align 4
  In<float> reference;  // [has_reference, n] align 4
  u32 n;                // >= 1
  u32 has_m;            // <= 1
  u32 has_v;            // <= 1
  u32 has_anchor;       // <= 1
  u32 has_reference;    // <= 1
  float lr;
  float decay;
  float scale;
  float l1;             // >= 0
  float beta1;
  float beta2;
  float eps;
  float correct1;       // - 1 / (1 - beta1^step)
  float correct2;       // - 1 / (1 - beta2^step)
};

// The loss of each row of logits z, q = softmax(z), which become its gradient times the row's weight, 0 where that is 0.
//   kind 0  -ln q[id]                         kind 4  1/2 sum |p - q|
//   kind 1  -sum p ln q                       kind 5  -sum p ln q over k tokens, and with `tail` the rest as one more
//   kind 2  sum p ln(p / q)                   kind 6  entropy of softmax(z / tau) where the likeliest token is id, else 0
//   kind 3  sum q ln(q / p)
ARGS(LossRows) {
  InOut<float> logits;  // [rows, vocab] align 4
  Out<float> loss;      // [rows] align 4
  In<float> weights;    // [rows] align 4
  In<u32> ids;          // [rows, k] align 4 - below vocab; those of a row differ
  In<float> top;        // [has_top, rows, k] align 4 - kind 5: p of the ids
  In<float> p;          // [has_p, rows, vocab] align 4 - kinds 1 to 4
  u32 rows;             // >= 1
  u32 vocab;            // >= 1
  u32 k;                // <= 1024 - 1 for kinds 0 and 6, 0 for kinds 1 to 4
  u32 kind;             // <= 6
  u32 has_top;          // <= 1
  u32 has_p;            // <= 1
  u32 tail;             // <= 1
  float tau;            // > 0
};

// Mean over a row of d^2/2 where |d| < 1, else |d| - 1/2, d = x - target; dx is its gradient by x times the row's weight.
ARGS(SmoothL1) {
  Out<float> loss;      // [rows] align 4
  Out<float> dx;        // [rows, d] align 4
  In<float> x;          // [rows, d] align 4
  In<float> target;     // [rows, d] align 4
  In<float> weights;    // [rows] align 4
  u32 rows;             // >= 1
  u32 d;                // >= 1
};

// Rows that use one matrix of an adapter. Groups follow one another in a pass and are cut into tiles of 8 rows, the last of a group
// shorter; tiles are numbered through all groups.
RECORD(LoraGroup) {
  u64 matrix;   // address of A, [ranks, width], or B, [width, ranks]: f32
  u32 first;    // its first row
  u32 rows;     // at least 1
  u32 tile;     // its first tile
  float scale;  // on products with B
};

// h[r] = A x[r].
ARGS(LoraShrink) {
  In<LoraGroup> groups;  // [n] align 8
  In<bf16_t> x;          // [rows, width] align 2
  Out<float> h;          // [rows, ranks] align 4
  u32 n;                 // >= 1
  u32 rows;              // >= 1
  u32 width;             // >= 1
  u32 ranks;             // >= 1
};

// y[r] += scale B h[r, first ..], of `ranks` columns of h from `first` on.
ARGS(LoraExpand) {
  In<LoraGroup> groups;  // [n] align 8
  In<float> h;           // [rows, stride] align 4
  InOut<float> y;        // [rows, width] align 4
  u32 n;                 // >= 1
  u32 rows;              // >= 1
  u32 width;             // >= 1
  u32 stride;            // >= 1
  u32 first;             // - first + ranks <= stride
  u32 ranks;             // >= 1
};

// dh[r, first ..] = scale B^T dy[r].
ARGS(LoraExpandBwd) {
  In<LoraGroup> groups;  // [n] align 8
  In<float> dy;          // [rows, width] align 4
  InOut<float> dh;       // [rows, stride] align 4
  u32 n;                 // >= 1
  u32 rows;              // >= 1
  u32 width;             // >= 1
  u32 stride;            // >= 1
  u32 first;             // - first + ranks <= stride
  u32 ranks;             // >= 1
};

// dx[r] += A^T dh[r].
ARGS(LoraShrinkBwd) {
  In<LoraGroup> groups;  // [n] align 8
  In<float> dh;          // [rows, ranks] align 4
  InOut<float> dx;       // [rows, width] align 4
  u32 n;                 // >= 1
  u32 rows;              // >= 1
  u32 width;             // >= 1
  u32 ranks;             // >= 1
};

// Parts of db[o, i] = scale sum_r dy[r, o] h[r, first + i], of 256 rows each.
ARGS(LoraBwdB) {
  In<float> dy;          // [rows, width] align 4
  In<float> h;           // [rows, stride] align 4
  Out<float> parts;      // [(rows + 255) / 256, width, ranks] align 4
  u32 rows;              // >= 1
  u32 width;             // >= 1
  u32 stride;            // >= 1
  u32 first;             // - first + ranks <= stride
  u32 ranks;             // >= 1
  float scale;
};

// Parts of da[i, c] = sum_r dh[r, i] x[r, c], of 256 rows each.
ARGS(LoraBwdA) {
  In<float> dh;          // [rows, ranks] align 4
  In<bf16_t> x;          // [rows, width] align 2
  Out<float> parts;      // [(rows + 255) / 256, ranks, width] align 4
  u32 rows;              // >= 1
  u32 width;             // >= 1
  u32 ranks;             // >= 1
};

// dx[r, i] (+)= sum_o dy[r, o] w[o, i], of plain weights of `bytes` bytes.
ARGS(LinearBwdX) {
  InOut<float> dx;   // [rows, inputs] align 4
  In<float> dy;      // [rows, outputs] align 4
  In<uint8_t> w;     // [outputs, inputs, bytes] align 4
  u32 rows;          // >= 1
  u32 inputs;        // >= 1
  u32 outputs;       // >= 1
  u32 bytes;         // >= 2, <= 4
  u32 add;           // <= 1 - whether dx keeps what it was
};

// The same of weights in blocks, packed as rt/quant.cuh says; words of a tile in each plane.
ARGS(LinearBwdXBlocks) {
  InOut<float> dx;   // [rows, inputs] align 4
  In<float> dy;      // [rows, outputs] align 4
  In<u32> quants;    // [(outputs + 15) / 16, (inputs + 63) / 64, quant_words] align 4
  In<u32> high;      // [(outputs + 15) / 16, (inputs + 63) / 64, high_words] align 4
  In<u32> scales;    // [(outputs + 15) / 16, (inputs + 63) / 64, scale_words] align 4
  In<u32> supers;    // [(outputs + 15) / 16, inputs / 256, super_words] align 4
  u32 rows;          // >= 1
  u32 inputs;        // >= 32, % 32 == 0
  u32 outputs;       // >= 1
  u32 quant_words;
  u32 high_words;
  u32 scale_words;
  u32 super_words;
  u32 add;           // <= 1
};

// dw[o, i] += sum_r dy[r, o] x[r, i].
ARGS(LinearBwdW) {
  InOut<float> dw;   // [outputs, inputs] align 4
  In<float> dy;      // [rows, outputs] align 4
  In<bf16_t> x;      // [rows, inputs] align 2
  u32 rows;          // >= 1
  u32 inputs;        // >= 1
  u32 outputs;       // >= 1
};

// Attention of packed rows: y[i, h] = sum_j p_ij v[j], p = softmax_j(scale q[i, h].k[j]) over the rows j that row i sees, and lse, the
// logarithm of the softmax's denominator. Head h reads kv head h / group. Tiles are of 64 rows; the table of a query tile lists the
// key tiles in which any of its rows sees any, ascending: twice the tile's number, and 1 more where all rows see all.
ARGS(TrainAttend) {
  In<float> q;         // [rows, kv_heads, group, head_dim] align 16
  In<float> k;         // [rows, kv_heads, head_dim] align 16
  In<float> v;         // [rows, kv_heads, head_dim] align 16
  In<u32> ranges;      // [sights, 2] align 4 - rows seen: first, one behind the last; row after row, ascending and apart
  In<u32> ends;        // [rows] align 4 - ranges up to and with each row's
  In<u32> tiles;       // [visits] align 4
  In<u32> tile_ends;   // [(rows + 63) / 64] align 4 - entries up to and with each query tile's
  Out<bf16_t> y;       // [rows, kv_heads, group, head_dim] align 4
  Out<float> lse;      // [rows, kv_heads, group] align 4
  u32 rows;            // >= 1
  u32 kv_heads;        // >= 1
  u32 group;           // >= 1 - query heads of a kv head
  u32 head_dim;        // >= 8, % 8 == 0
  u32 sights;          // >= 1
  u32 visits;          // >= 1
  float scale;
};

// Its backward. With p_ij = exp(scale q_i.k_j - lse_i), D_i = dy_i.y_i, s_ij = scale p_ij (dy_i.v_j - D_i): dq_i = sum_j s_ij k_j,
// dk_j = sum_i s_ij q_i, dv_j = sum_i p_ij dy_i, keys and values over the heads that share them. Dao 2023, arXiv:2307.08691.
ARGS(TrainAttendBwd) {
  Out<float> dq;       // [rows, kv_heads, group, head_dim] align 8
  Out<float> dk;       // [rows, kv_heads, head_dim] align 8
  Out<float> dv;       // [rows, kv_heads, head_dim] align 8
  InOut<float> delta;  // [rows, kv_heads, group] align 4 - D
  In<float> dy;        // [rows, kv_heads, group, head_dim] align 16
  In<bf16_t> y;        // [rows, kv_heads, group, head_dim] align 2
  In<float> lse;       // [rows, kv_heads, group] align 4
  In<float> q;         // [rows, kv_heads, group, head_dim] align 16
  In<float> k;         // [rows, kv_heads, head_dim] align 16
  In<float> v;         // [rows, kv_heads, head_dim] align 16
  In<u32> ranges;      // [sights, 2] align 4
  In<u32> ends;        // [rows] align 4
  In<u32> tiles;       // [visits] align 4
  In<u32> tile_ends;   // [(rows + 63) / 64] align 4
  In<u32> turned;      // [visits] align 4 - the same by key tile: twice the query tile's number, ascending, and 1 more where all see all
  In<u32> turned_ends; // [(rows + 63) / 64] align 4
  u32 rows;            // >= 1
  u32 kv_heads;        // >= 1
  u32 group;           // >= 1
  u32 head_dim;        // >= 8, % 8 == 0
  u32 sights;          // >= 1
  u32 visits;          // >= 1
  float scale;
};

// Launches. "up(a, b)" is a divided by b, rounded up; "any" is any number of blocks, 256 threads each: threads stride over what is left.
//
//   rms_norm_bwd   RmsNormBwd    grid (rows), block 256
//   column_sums    ColumnSums    grid (up(d, 256), up(rows, 64)), block 256
//   fold           Fold          grid any, block 256
//   glu_bwd        GluBwd        grid any, block 256
//   scatter_rows   ScatterRows   grid (rows), block 256
//   embed_bwd      EmbedBwd      grid (distinct, up(d, 256)), block 256
//   copy           Copy          grid any, block 256; and zero, axpy, set_bf16
//   square_sums    SquareSums    grid (blocks), block 256; fix `blocks` by n alone
//   softmax_rows   SoftmaxRows   grid (rows), block 256
//   optimize       Optimize      grid any, block 256
//   loss_rows      LossRows      grid (rows), block 1024 or any smaller power of two from 32; fix it by vocab alone
//   smooth_l1      SmoothL1      grid (rows), block 256
//   lora_shrink, lora_expand_bwd     grid (tiles, up(ranks, 4)), block 256
//   lora_expand, lora_shrink_bwd     grid (tiles, up(width, 256)), block 256
//   lora_bwd_b, lora_bwd_a           grid (up(width, 256), up(ranks, 16), up(rows, 256)), block 256; then fold over the parts
//   linear_bwd_x_FORMAT_T     grid (up(rows, T), up(inputs, T)), block 256; LinearBwdX for bf16, f16, f32, LinearBwdXBlocks for q8_0, q4_0,
//                             q4_1, q4_k, q6_k. T is 64 or 128, with the same bits; operands are rounded to bf16.
//   linear_bwd_w_T            LinearBwdW, grid (up(outputs, T), up(inputs, T)), block 256, alike
//
//   train_attend_D    TrainAttend, D: 64, 96, 128, 256 or any, for that head_dim; grid (up(rows, 64), kv_heads * group, slices), block 128
//       shared memory 2 * ((64 + W) * ld + W * (S + 8)) + 512 bytes, ld = up(head_dim, 16) * 16 + 8
//   attend_delta      TrainAttendBwd; grid (up(rows * kv_heads * group, 4)), block 128; before the other two
//   attend_dq_D       TrainAttendBwd; grid as train_attend_D; shared memory 2 * (128 + 2 * W) * ld + 512
//   attend_dkv_D      TrainAttendBwd; grid (up(rows, 64), kv_heads, slices), block 128; shared memory 2 * (128 + 2 * W) * ld + 16 * W
//       A block makes S columns of its results, slices = up(head_dim, S), and takes W rows at a time:
//       D            64   96   128   256   any
//       S            64   96   128   128   64
//       W, forward   64   64   64    32    16
//       W, backward  32   32   32    16    16
