// Operations that treat rows one by one: embedding, norms, residual sums, rotation, gating.
//
// A block owns a row (norms), a warp a head (head_norm) or a thread an element; all are bound by memory, so each reads its
// inputs once from it: a row that is passed over twice comes from the caches the second time. Threads stride by the block's
// width, so that a warp's accesses are one line whatever the alignment of a row is. Every block has 256 threads.
#include "rt/gpu.cuh"
#include "rt/activation.cuh"
#include "rt/blocks.cuh"

constexpr u32 THREADS = 256;

// One block a row.
template <class T>
DEVICE void embed(const Embed& a) {
  const u32 r = blockIdx.x;
  const T* row = reinterpret_cast<const T*>(a.table.p) + (size_t)a.tokens[r] * a.d;
  for (u32 i = threadIdx.x; i < a.d; i += THREADS) a.y[(size_t)r * a.d + i] = a.scale * widen(row[i]);
}
KERNEL(embed_bf16, Embed, THREADS) { embed<bf16_t>(a); }
KERNEL(embed_f16, Embed, THREADS) { embed<f16_t>(a); }
KERNEL(embed_f32, Embed, THREADS) { embed<float>(a); }

template <Blocks F>
DEVICE void embed_blocks(const EmbedBlocks& a) {
  const u32 r = blockIdx.x, o = a.tokens[r];
  for (u32 k = threadIdx.x; k < a.d; k += THREADS) a.y[(size_t)r * a.d + k] = a.scale * weight<F>(a, a.d, o, k);
}
KERNEL(embed_q8_0, EmbedBlocks, THREADS) { embed_blocks<Q8_0>(a); }
KERNEL(embed_q4_0, EmbedBlocks, THREADS) { embed_blocks<Q4_0>(a); }
KERNEL(embed_q4_1, EmbedBlocks, THREADS) { embed_blocks<Q4_1>(a); }
KERNEL(embed_q4_k, EmbedBlocks, THREADS) { embed_blocks<Q4_K>(a); }
KERNEL(embed_q6_k, EmbedBlocks, THREADS) { embed_blocks<Q6_K>(a); }

// One block a row.
KERNEL(gather_rows, GatherRows, THREADS) {
  const u32 r = blockIdx.x;
  const float* row = a.x + (size_t)a.index[r] * a.d;
  for (u32 i = threadIdx.x; i < a.d; i += THREADS) a.y[(size_t)r * a.d + i] = row[i];
}

KERNEL(add, Add, THREADS) {
  for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < a.n; i += gridDim.x * THREADS) a.x[i] = a.x[i] + a.r[i];
}

KERNEL(add_activated, AddActivated, THREADS) {
  for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < a.n; i += gridDim.x * THREADS) a.x[i] = a.x[i] + activate(a.act, a.r[i]);
}

// 1 / sqrt(mean(x^2) + eps) of the block's row.
DEVICE float inverse_rms(const float* x, u32 d, float eps) {
  GPU_SMEM(float, part, [32]);
  float s = 0.f;
  for (u32 i = threadIdx.x; i < d; i += THREADS) s += x[i] * x[i];
  return 1.f / sqrtf(block_sum(s, part) / float(d) + eps);
}

// One block a row.
KERNEL(rms_norm, RmsNorm, THREADS) {
  const float* x = a.x + (size_t)blockIdx.x * a.d;
  bf16_t* y = a.y + (size_t)blockIdx.x * a.d;
  const float f = inverse_rms(x, a.d, a.eps);
  for (u32 i = threadIdx.x; i < a.d; i += THREADS) y[i] = gpu::to_bf16(x[i] * f * a.w[i]);
}

// One block a row. A thread reads back only what it wrote itself, so that no barrier stands between the two passes.
KERNEL(add_rms_norm, AddRmsNorm, THREADS) {
  float* x = a.x + (size_t)blockIdx.x * a.d;
  const float* r = a.r + (size_t)blockIdx.x * a.d;
  bf16_t* y = a.y + (size_t)blockIdx.x * a.d;
  for (u32 i = threadIdx.x; i < a.d; i += THREADS) x[i] = x[i] + r[i];
  const float f = inverse_rms(x, a.d, a.eps);
  for (u32 i = threadIdx.x; i < a.d; i += THREADS) y[i] = gpu::to_bf16(x[i] * f * a.w[i]);
}

// One block a row.
KERNEL(add_normed, AddNormed, THREADS) {
  float* x = a.x + (size_t)blockIdx.x * a.d;
  const float* r = a.r + (size_t)blockIdx.x * a.d;
  const float f = inverse_rms(r, a.d, a.eps);
  for (u32 i = threadIdx.x; i < a.d; i += THREADS) x[i] += r[i] * f * a.w[i];
}

// One warp a head.
KERNEL(head_norm, HeadNorm, THREADS) {
  const u32 head = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (head >= a.n) return;
  float* x = a.x + (size_t)head * a.head_dim;
  float s = 0.f;
  for (u32 i = lane; i < a.head_dim; i += 32) s += x[i] * x[i];
  const float f = 1.f / sqrtf(warp_sum(s) / float(a.head_dim) + a.eps);
  for (u32 i = lane; i < a.head_dim; i += 32) x[i] = x[i] * f * a.w[i];
}

KERNEL(glu, Glu, THREADS) {
  for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < a.n; i += gridDim.x * THREADS) {
    const float g = a.gate[i];
    a.y[i] = gpu::to_bf16(activate(a.act, g) * a.up[i]);
  }
}

// One block a row.
KERNEL(rope, Rope, THREADS) {
  const u32 r = blockIdx.x, half = a.head_dim / 2;
  const float *cosines = a.table + (size_t)r * a.head_dim, *sines = cosines + half;
  float* x = a.x + (size_t)r * a.heads * a.head_dim;
  for (u32 i = threadIdx.x; i < a.heads * half; i += THREADS) {
    float* pair = x + i / half * a.head_dim + i % half;
    const float u = pair[0], v = pair[half], c = cosines[i % half], s = sines[i % half];
    pair[0] = u * c - v * s;
    pair[half] = v * c + u * s;
  }
}

// One warp an output and a row; blockIdx.y is the row.
template <class T>
DEVICE void dense(const Dense& a) {
  const u32 o = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x & 31, r = blockIdx.y;
  if (o >= a.outputs) return;
  const T* w = reinterpret_cast<const T*>(a.w.p) + (size_t)o * a.inputs;
  const bf16_t* x = a.x + (size_t)r * a.inputs;
  float s = 0.f;
  for (u32 i = lane; i < a.inputs; i += 32) s += widen(w[i]) * gpu::to_f32(x[i]);
  s = warp_sum(s);
  if (lane == 0) a.y[(size_t)r * a.outputs + o] = a.has_bias ? s + a.bias[o] : s;
}
KERNEL(dense_f16, Dense, THREADS) { dense<f16_t>(a); }
KERNEL(dense_f32, Dense, THREADS) { dense<float>(a); }
