// Low-rank adapters and their backward, for rows of many adapters at once. Hu et al. 2022, arXiv:2106.09685; groups of rows as in
// Chen et al. 2023, arXiv:2310.18547.
//
// `down` (to the ranks): a block owns a tile of 8 rows and 4 ranks; its threads stride over the width, and their sums meet by
// shuffles and then warp by warp. `up` (from the ranks): a thread owns a column of the width for the 8 rows, whose factors all
// threads read from shared memory. `outer` (gradients of A and B): a thread owns a column of the width for 16 ranks, over 256 rows in
// their order; the parts are added in their order by `fold` (train_rows.cu). Everything is f32, and bound by memory at usual ranks.
#include "rt/gpu.cuh"

namespace lora {
constexpr u32 THREADS = 256, TILE = 8, FEW = 4, RANKS = 16, CHUNK = 256, DEEP = 64;

struct Tile {
  const float* matrix;
  u32 row, rows;
  float scale;
};
// The tile of the block: the last group that begins at or before it.
DEVICE Tile find(const LoraGroup* groups, u32 n) {
  const u32 tile = blockIdx.x;
  u32 lo = 0;
  while (n > 1) {
    const u32 half = n / 2;
    if (groups[lo + half].tile <= tile) lo += half, n -= half;
    else n = half;
  }
  const LoraGroup g = groups[lo];
  const u32 at = (tile - g.tile) * TILE;
  return {reinterpret_cast<const float*>(g.matrix), g.first + at, min(TILE, g.rows - at), g.scale};
}

// store(row, rank, sum over k of x[row, k] m[rank over, k along]).
template <class T, class Store>
DEVICE void down(const Tile& t, const T* x, u32 width, u32 ranks, u32 over, u32 along, Store store) {
  GPU_SMEM(float, sums, [THREADS / 32][TILE * FEW]);
  const u32 rank0 = blockIdx.y * FEW, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float acc[TILE][FEW] = {};
  for (u32 k = threadIdx.x; k < width; k += THREADS) {
    float m[FEW];
    GPU_UNROLL for (u32 i = 0; i < FEW; i++) m[i] = rank0 + i < ranks ? t.matrix[(size_t)(rank0 + i) * over + (size_t)k * along] : 0.f;
    GPU_UNROLL for (u32 r = 0; r < TILE; r++) {
      const float v = r < t.rows ? widen(x[(size_t)(t.row + r) * width + k]) : 0.f;
      GPU_UNROLL for (u32 i = 0; i < FEW; i++) acc[r][i] = fmaf(v, m[i], acc[r][i]);
    }
  }
  GPU_UNROLL for (u32 r = 0; r < TILE; r++)
    GPU_UNROLL for (u32 i = 0; i < FEW; i++) {
      const float sum = warp_sum(acc[r][i]);
      if (lane == 0) sums[warp][r * FEW + i] = sum;
    }
  __syncthreads();
  const u32 r = threadIdx.x / FEW, i = threadIdx.x % FEW;
  if (r >= t.rows || rank0 + i >= ranks) return;
  float sum = 0;
  for (u32 w = 0; w < THREADS / 32; w++) sum += sums[w][threadIdx.x];
  store(t.row + r, rank0 + i, sum);
}

// y[row, c] += scale sum over i of h[row, i] m[c over, i along].
DEVICE void up(const Tile& t, float* y, const float* h, u32 stride, u32 width, u32 ranks, u32 over, u32 along, float scale) {
  GPU_SMEM(float, factors, [DEEP][TILE]);
  const u32 c = blockIdx.y * THREADS + threadIdx.x;
  float acc[TILE] = {};
  for (u32 i0 = 0; i0 < ranks; i0 += DEEP) {
    __syncthreads();
    for (u32 n = threadIdx.x; n < DEEP * TILE; n += THREADS) {
      const u32 i = n % DEEP, r = n / DEEP;
      factors[i][r] = r < t.rows && i0 + i < ranks ? h[(size_t)(t.row + r) * stride + i0 + i] : 0.f;
    }
    __syncthreads();
    if (c < width)
      for (u32 i = i0; i < min(ranks, i0 + DEEP); i++) {
        const float m = t.matrix[(size_t)c * over + (size_t)i * along];
        GPU_UNROLL for (u32 r = 0; r < TILE; r++) acc[r] = fmaf(factors[i - i0][r], m, acc[r]);
      }
  }
  if (c < width)
    GPU_UNROLL for (u32 r = 0; r < TILE; r++)
      if (r < t.rows) y[(size_t)(t.row + r) * width + c] += scale * acc[r];
}

// parts[c over + i along] = scale sum over the rows of the chunk of wide[row, c] h[row, i].
template <class T>
DEVICE void outer(float* parts, const T* wide, const float* h, u32 rows, u32 width, u32 stride, u32 ranks, u32 over, u32 along, float scale) {
  GPU_SMEM(float, factors, [DEEP][RANKS]);
  const u32 c = blockIdx.x * THREADS + threadIdx.x, rank0 = blockIdx.y * RANKS, first = blockIdx.z * CHUNK, end = min(first + CHUNK, rows);
  float acc[RANKS] = {};
  for (u32 r0 = first; r0 < end; r0 += DEEP) {
    __syncthreads();
    for (u32 n = threadIdx.x; n < DEEP * RANKS; n += THREADS) {
      const u32 r = n / RANKS, i = n % RANKS;
      factors[r][i] = r0 + r < end && rank0 + i < ranks ? h[(size_t)(r0 + r) * stride + rank0 + i] : 0.f;
    }
    __syncthreads();
    if (c < width)
      for (u32 r = r0; r < min(end, r0 + DEEP); r++) {
        const float v = widen(wide[(size_t)r * width + c]);
        GPU_UNROLL for (u32 i = 0; i < RANKS; i++) acc[i] = fmaf(v, factors[r - r0][i], acc[i]);
      }
  }
  if (c < width)
    GPU_UNROLL for (u32 i = 0; i < RANKS; i++)
      if (rank0 + i < ranks) parts[(size_t)blockIdx.z * width * ranks + (size_t)c * over + (size_t)(rank0 + i) * along] = scale * acc[i];
}
}  // namespace lora

KERNEL(lora_shrink, LoraShrink, 256) {
  lora::down<bf16_t>(lora::find(a.groups, a.n), a.x, a.width, a.ranks, a.width, 1, [&](u32 r, u32 i, float sum) { a.h[(size_t)r * a.ranks + i] = sum; });
}
KERNEL(lora_expand_bwd, LoraExpandBwd, 256) {
  const lora::Tile t = lora::find(a.groups, a.n);
  lora::down<float>(t, a.dy, a.width, a.ranks, 1, a.ranks,
                    [&](u32 r, u32 i, float sum) { a.dh[(size_t)r * a.stride + a.first + i] = t.scale * sum; });
}
KERNEL(lora_expand, LoraExpand, 256) {
  const lora::Tile t = lora::find(a.groups, a.n);
  lora::up(t, a.y, a.h + a.first, a.stride, a.width, a.ranks, a.ranks, 1, t.scale);
}
KERNEL(lora_shrink_bwd, LoraShrinkBwd, 256) {
  lora::up(lora::find(a.groups, a.n), a.dx, a.dh, a.ranks, a.width, a.ranks, 1, a.width, 1.f);
}
KERNEL(lora_bwd_b, LoraBwdB, 256) {
  lora::outer<float>(a.parts, a.dy, a.h + a.first, a.rows, a.width, a.stride, a.ranks, a.ranks, 1, a.scale);
}
KERNEL(lora_bwd_a, LoraBwdA, 256) {
  lora::outer<bf16_t>(a.parts, a.x, a.dh, a.rows, a.width, a.ranks, a.ranks, 1, a.width, 1.f);
}
