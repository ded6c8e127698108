// Operations that treat rows one by one: embedding, norms, residual sums, rotation, gating.
//
// A block owns a row (norms), a warp a head (head_norm) or a thread an element; all are bound by memory, so each reads its
// inputs once from it: a row that is passed over twice comes from the caches the second time. Threads stride by the block's
// width, so that a warp's accesses are one line whatever the alignment of a row is. Every block has 256 threads.
#include "rt/gpu.cuh"
#include "rt/activation.cuh"

constexpr u32 THREADS = 256;

DEVICE float widen(bf16_t v) { return gpu::to_f32(v); }
DEVICE float widen(f16_t v) { return gpu::to_f32(v); }
DEVICE float widen(float v) { return v; }

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

enum Blocks { Q8_0, Q4_0, Q4_1, Q4_K, Q6_K };

// Input k of output o, from the planes of rt/quant.cuh.
template <Blocks F>
DEVICE float weight(const EmbedBlocks& a, u32 o, u32 k) {
  const u32 tiles = (a.d + 63) / 64, tile = o / 16 * tiles + k / 64, g = o % 8, i = o / 8 % 2, block = k / 32 % 2, n = k % 32;
  const u32* quants = a.quants + (size_t)tile * a.quant_words;
  const u32* scales = a.scales + (size_t)tile * a.scale_words;
  const auto half = [&](u32 word) { return i ? gpu::f16_high(word) : gpu::f16_low(word); };
  if (F == Q8_0) {
    const u32 lane = 4 * g + n / 8, byte = n % 4 == 1 ? 2 : n % 4 == 2 ? 1 : n % 4;
    const u32 word = quants[(block * 32 + lane) * 4 + 2 * i + n / 4 % 2];
    return half(scales[g * 2 + block]) * float(int(word << (24 - 8 * byte)) >> 24);
  }
  // Which of the lane's eight inputs it is, in pairs.
  const u32 lane = 4 * g + (F == Q6_K ? n % 16 / 4 : n / 8), at = F == Q6_K ? n / 16 * 4 + n % 4 : n % 8;
  const u32 nibble = at % 2 * 4 + at / 2;
  const u32 q = quants[(lane * 2 + block) * 2 + i] >> (4 * nibble) & 15;
  if (F == Q4_0) return half(scales[g * 2 + block]) * float(int(q) - 8);
  if (F == Q4_1) return half(scales[g * 4 + block]) * float(q) + half(scales[g * 4 + 2 + block]);
  const u32* supers = a.supers + (size_t)(o / 16 * (a.d / 256) + k / 256) * a.super_words;
  const u32 sub = scales[g * 2 + i];
  if (F == Q4_K) {
    const u32 d = supers[g * 2 + i];
    const float scale = gpu::f16_low(d) * float(sub >> (8 * block) & 255), min = gpu::f16_high(d) * float(sub >> (16 + 8 * block) & 255);
    return scale * float(q) - min;
  }
  const u32 high = a.high[(size_t)tile * a.high_words + lane * 2 + i] >> (2 * (4 * block + at / 2) + 16 * (at % 2)) & 3;
  const float scale = half(supers[g]) * float(int(sub << (24 - 8 * (2 * block + n / 16))) >> 24);
  return scale * float(int(q | high << 4) - 32);
}
template <Blocks F>
DEVICE void embed_blocks(const EmbedBlocks& a) {
  const u32 r = blockIdx.x, o = a.tokens[r];
  for (u32 k = threadIdx.x; k < a.d; k += THREADS) a.y[(size_t)r * a.d + k] = a.scale * weight<F>(a, o, k);
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
