// What encoders add: LayerNorm, GELU without tanh, residual sums with LayerScale, and their backward.
//
// A block owns a row (norms, scales), a thread a column of 64 rows (sums over rows) or an element (GELU). Variances are taken about the
// mean, in a second pass over the row, which comes from the caches: a sum of squares minus a square would lose what a large mean hides.
// All are bound by memory. Every block has 256 threads.
#include "rt/gpu.cuh"

namespace encoder {
constexpr u32 THREADS = 256, CHUNK = 64;

struct Moments {
  float mean, inverse;
};
// Mean and 1 / sqrt(variance + eps) of the block's row; `part` is for two sums.
DEVICE Moments moments(const float* x, u32 d, float eps, float (*part)[32]) {
  float sum = 0, squares = 0;
  for (u32 i = threadIdx.x; i < d; i += THREADS) sum += x[i];
  const float mean = block_sum(sum, part[0]) / float(d);
  for (u32 i = threadIdx.x; i < d; i += THREADS) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.f / sqrtf(block_sum(squares, part[1]) / float(d) + eps)};
}

// Phi(x); erfc keeps the digits of a small tail.
DEVICE float normal_cdf(float x) { return 0.5f * erfcf(-0.70710678f * x); }
}  // namespace encoder

KERNEL(layer_norm, LayerNorm, 256) {
  GPU_SMEM(float, part, [2][32]);
  const float* x = a.x + (size_t)blockIdx.x * a.d;
  bf16_t* y = a.y + (size_t)blockIdx.x * a.d;
  const encoder::Moments m = encoder::moments(x, a.d, a.eps, part);
  for (u32 i = threadIdx.x; i < a.d; i += encoder::THREADS) y[i] = gpu::to_bf16((x[i] - m.mean) * m.inverse * a.w[i] + a.b[i]);
}

KERNEL(layer_norm_bwd, LayerNormBwd, 256) {
  using namespace encoder;
  GPU_SMEM(float, part, [4][32]);
  const size_t row = (size_t)blockIdx.x * a.d;
  const float *x = a.x + row, *dy = a.dy + row;
  const Moments m = moments(x, a.d, a.eps, part);
  float total = 0, dots = 0;
  for (u32 i = threadIdx.x; i < a.d; i += THREADS) {
    const float u = a.w[i] * dy[i];
    total += u, dots += u * ((x[i] - m.mean) * m.inverse);
  }
  total = block_sum(total, part[2]) / float(a.d);
  dots = block_sum(dots, part[3]) / float(a.d);
  if (threadIdx.x == 0) a.stats[2 * blockIdx.x] = m.mean, a.stats[2 * blockIdx.x + 1] = m.inverse;
  for (u32 i = threadIdx.x; i < a.d; i += THREADS) {
    const float dx = m.inverse * (a.w[i] * dy[i] - total - (x[i] - m.mean) * m.inverse * dots);
    a.dx[row + i] = a.add ? a.dx[row + i] + dx : dx;
  }
}

KERNEL(column_dots, ColumnDots, 256) {
  using namespace encoder;
  const u32 i = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * CHUNK, end = min(first + CHUNK, a.rows);
  if (i >= a.d) return;
  float sum = 0;
  for (u32 r = first; r < end; r++) {
    const size_t at = (size_t)r * a.d + i;
    sum += a.dy[at] * (a.has_stats ? (a.x[at] - a.stats[2 * r]) * a.stats[2 * r + 1] : a.x[at]);
  }
  a.parts[(size_t)blockIdx.y * a.d + i] = sum;
}

KERNEL(gelu, Gelu, 256) {
  using namespace encoder;
  for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < a.n; i += gridDim.x * THREADS) a.y[i] = gpu::to_bf16(a.x[i] * normal_cdf(a.x[i]));
}

KERNEL(gelu_bwd, GeluBwd, 256) {
  using namespace encoder;
  for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < a.n; i += gridDim.x * THREADS) {
    const float x = a.x[i], density = 0.39894228f * gpu::ex2(-0.72134752f * x * x);
    a.dx[i] = a.dy[i] * (normal_cdf(x) + x * density);
  }
}

KERNEL(add_scaled, AddScaled, 256) {
  const size_t row = (size_t)blockIdx.x * a.d;
  for (u32 i = threadIdx.x; i < a.d; i += encoder::THREADS) a.y[row + i] = fmaf(a.w[i], a.x[row + i], a.y[row + i]);
}

KERNEL(scale_columns, ScaleColumns, 256) {
  const size_t row = (size_t)blockIdx.x * a.d;
  for (u32 i = threadIdx.x; i < a.d; i += encoder::THREADS) a.dx[row + i] = a.w[i] * a.dy[row + i];
}
