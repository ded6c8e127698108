// Backward of the operations that treat rows one by one, and what training does to whole tensors.
//
// A block owns a row (norms, softmax, scatter), a thread a column of 64 rows (sums over rows), a column of an embedding, or an element
// of a tensor. Sums over rows run in the order of the rows, in chunks of 64 whose sums are added in their order: the number of rows
// alone fixes it. All are bound by memory. Every block has 256 threads.
#include "rt/gpu.cuh"
#include "rt/activation.cuh"

namespace train_rows {
constexpr u32 THREADS = 256, CHUNK = 64;

// f(i) for the thread's elements of n.
template <class F>
DEVICE void each(u32 n, F f) {
  for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) f(i);
}
}  // namespace train_rows

KERNEL(rms_norm_bwd, RmsNormBwd, 256) {
  GPU_SMEM(float, part, [2][32]);
  const size_t row = (size_t)blockIdx.x * a.d;
  const float *x = a.x + row, *dy = a.dy + row;
  float squares = 0, dots = 0;
  for (u32 i = threadIdx.x; i < a.d; i += train_rows::THREADS) squares += x[i] * x[i], dots += a.w[i] * dy[i] * x[i];
  squares = block_sum(squares, part[0]);
  dots = block_sum(dots, part[1]);
  const float s = 1.f / sqrtf(squares / float(a.d) + a.eps), along = s * s * (dots / float(a.d));
  if (threadIdx.x == 0) a.inverse[blockIdx.x] = s;
  for (u32 i = threadIdx.x; i < a.d; i += train_rows::THREADS) {
    const float dx = s * (a.w[i] * dy[i] - x[i] * along);
    a.dx[row + i] = a.add ? a.dx[row + i] + dx : dx;
  }
}

KERNEL(column_sums, ColumnSums, 256) {
  using namespace train_rows;
  const u32 i = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * CHUNK, end = min(first + CHUNK, a.rows);
  if (i >= a.d) return;
  float sum = 0;
  for (u32 r = first; r < end; r++) {
    const size_t at = (size_t)r * a.d + i;
    sum += a.has_x ? a.dy[at] * (a.x[at] * a.inverse[r]) : a.dy[at];
  }
  a.parts[(size_t)blockIdx.y * a.d + i] = sum;
}

KERNEL(fold, Fold, 256) {
  train_rows::each(a.n, [&](u32 i) {
    float sum = 0;
    for (u32 c = 0; c < a.chunks; c++) sum += a.parts[(size_t)c * a.n + i];
    a.y[i] += sum;
  });
}

KERNEL(glu_bwd, GluBwd, 256) {
  train_rows::each(a.n, [&](u32 i) {
    const float dz = a.dz[i], gate = a.gate[i];
    a.dgate[i] = dz * a.up[i] * slope(a.act, gate);
    a.dup[i] = dz * activate(a.act, gate);
  });
}

KERNEL(scatter_rows, ScatterRows, 256) {
  float* to = a.dx + (size_t)a.index[blockIdx.x] * a.d;
  const float* from = a.dy + (size_t)blockIdx.x * a.d;
  for (u32 i = threadIdx.x; i < a.d; i += train_rows::THREADS) to[i] += from[i];
}

KERNEL(embed_bwd, EmbedBwd, 256) {
  const u32 i = blockIdx.y * train_rows::THREADS + threadIdx.x;
  if (i >= a.d) return;
  float& to = a.dtable[(size_t)a.tokens[blockIdx.x] * a.d + i];
  float sum = to;
  for (u32 n = a.starts[blockIdx.x]; n < a.starts[blockIdx.x + 1]; n++) sum += a.scale * a.dx[(size_t)a.order[n] * a.d + i];
  to = sum;
}

KERNEL(copy, Copy, 256) {
  train_rows::each(a.n, [&](u32 i) { a.y[i] = a.x[i]; });
}
KERNEL(zero, Zero, 256) {
  train_rows::each(a.n, [&](u32 i) { a.x[i] = 0; });
}
KERNEL(axpy, Axpy, 256) {
  train_rows::each(a.n, [&](u32 i) { a.y[i] = fmaf(a.a, a.x[i], a.y[i]); });
}
KERNEL(set_bf16, SetBf16, 256) {
  train_rows::each(a.n, [&](u32 i) { a.w[i] = gpu::to_bf16(a.values[i]); });
}

KERNEL(square_sums, SquareSums, 256) {
  GPU_SMEM(float, part, [32]);
  float sum = 0;
  train_rows::each(a.n, [&](u32 i) { sum = fmaf(a.x[i], a.x[i], sum); });
  sum = block_sum(sum, part);
  if (threadIdx.x == 0) a.parts[blockIdx.x] = sum;
}

KERNEL(softmax_rows, SoftmaxRows, 256) {
  using namespace train_rows;
  GPU_SMEM(float, part, [2][32]);
  float* x = a.x + (size_t)blockIdx.x * a.vocab;
  const float scale = 1.44269504f / a.tau;
  float most = -INFINITY, sum = 0;
  for (u32 i = threadIdx.x; i < a.vocab; i += THREADS) most = fmaxf(most, x[i]);
  most = block_max(most, part[0]);
  for (u32 i = threadIdx.x; i < a.vocab; i += THREADS) sum += x[i] = gpu::ex2((x[i] - most) * scale);
  sum = block_sum(sum, part[1]);
  for (u32 i = threadIdx.x; i < a.vocab; i += THREADS) x[i] /= sum;
}
