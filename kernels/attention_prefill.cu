// Attention of many rows: prompts, and blocks of diffusion models; any mask.
//
//   y[r, h] = sum_j p_j v[j] / sum_j p_j,  p_j = 2^(scale log2(e) q[r, h].k[j] - max),  over the cache rows j that r sees
//
// As in attention.cu the queries are staged rows x heads of one kv head. A block owns M = 64 W of them, a warp 16 W, and walks over
// the cache in tiles of 64 rows; S = Q K^T and P stay in registers, K and V come by cp.async one tile ahead: the next keys while
// P V runs, the next values while Q K^T does. W = 2 halves what a warp reads of shared memory for each product, which bounds it
// otherwise; head size 256 has registers for W = 1 only. Bound by the tensor cores. Dao 2023, arXiv:2307.08691.
//
// Tiles begin at fixed cache rows and a key that is not seen weighs exactly 0, so a row's result is the same, bit for bit, in any
// company. It is not that of attention.cu with several chunks, whose sums are split elsewhere.
#include "rt/gpu.cuh"
#include "rt/segment.cuh"

namespace prefill {
constexpr int TILE = 64, WARPS = 4;

// A tile of keys or values to shared memory; rows from `total` on become 0. SIDE threads share a row.
template <int D>
DEVICE void fetch(bf16_t* to, const bf16_t* from, u32 kv_dim, u32 j0, u32 total) {
  constexpr int SIDE = D == 96 ? 4 : D / 8, ROWS = 32 * WARPS / SIDE, LD = D + 8;
  const int r0 = threadIdx.x / SIDE, c0 = threadIdx.x % SIDE * 8;
  GPU_UNROLL for (int c = 0; c < D; c += SIDE * 8) {
    const bf16_t* g = from + (size_t)(j0 + r0) * kv_dim + c0 + c;
#pragma unroll 4
    for (int r = r0; r < r0 + TILE; r += ROWS, g += ROWS * kv_dim) {
      const bool there = j0 + r < total;
      gpu::cp_async16(to + r * LD + c0 + c, there ? g : from, there);
    }
  }
  gpu::cp_async_commit();
}

template <int D, int W>
DEVICE void body(const Attention& a) {
  constexpr int M = 64 * W, LD = D + 8, KEYS = TILE / 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Seg s;
  u32 q0;
  // The last tiles of a causal segment are the longest: they begin first.
  if (!find_tile<M>(a.segs, a.segments, a.group, gridDim.x - 1 - blockIdx.x, s, q0)) return;
  const u32 head = blockIdx.y, queries = s.rows * a.group, total = pass_end(s), kv_dim = a.kv_heads * D;
  const bool tree = s.mask == MASK_TREE;

  // Cache rows that any query of the block sees, and those that all queries of the warp see.
  const u32 w0 = q0 + warp * 16 * W, last = s.rows - 1;
  const u32 i0 = q0 / a.group, i1 = min(last, (q0 + M - 1) / a.group);
  const u32 wi0 = min(last, w0 / a.group), wi1 = min(last, (w0 + 16 * W - 1) / a.group);
  const u32 begin = window_begin(s.past + (tree ? 0 : s.staged + i0), a.window) / TILE * TILE, end = sight_end(s, i1);
  const u32 all_begin = window_begin(pass_begin(s) + wi1, a.window), all_end = tree ? s.past : sight_end(s, wi0);
  const u32 tiles = (end - begin + TILE - 1) / TILE;

  GPU_DYN_SMEM(bf16_t, smem);
  bf16_t *sq = smem, *sk = sq + M * LD, *sv = sk + TILE * LD;
  u64* see = reinterpret_cast<u64*>(sv + TILE * LD);  // [M], which keys of the tile a query sees
  const bf16_t* keys = kv_keys(s, a.layer, kv_dim) + head * D;
  const bf16_t* values = keys + (size_t)s.capacity * kv_dim;
  fetch<D>(sk, keys, kv_dim, begin, total);
  fetch<D>(sv, values, kv_dim, begin, total);
  {  // Queries, scaled so that exponentials are powers of 2.
    const float scale = a.scale * 1.4426950408889634f;
    const u32 heads = a.kv_heads * a.group;
    for (u32 i = threadIdx.x; i < M * D / 4; i += 32 * WARPS) {
      const u32 r = i / (D / 4), c = i % (D / 4) * 4, n = q0 + r;
      float4 x = make_float4(0, 0, 0, 0);
      if (n < queries) {
        const size_t at = (size_t)(s.first + n / a.group) * heads + head * a.group + n % a.group;
        x = *reinterpret_cast<const float4*>(a.q + at * D + c);
      }
      *reinterpret_cast<uint2*>(sq + r * LD + c) =
          make_uint2(gpu::pack_bf16(x.x * scale, x.y * scale), gpu::pack_bf16(x.z * scale, x.w * scale));
    }
  }

  float acc[W][D / 8][4] = {}, top[W][2], sum[W][2] = {};
  GPU_UNROLL for (int m = 0; m < W; m++) top[m][0] = top[m][1] = -INFINITY;
  const bf16_t* q_lane = sq + (warp * 16 * W + (lane & 15)) * LD + (lane >> 4) * 8;
  const bf16_t* k_lane = sk + ((lane >> 4) * 8 + (lane & 7)) * LD + (lane >> 3 & 1) * 8;
  const bf16_t* v_lane = sv + (lane & 15) * LD + (lane >> 4) * 8;

  gpu::cp_async_wait<1>();
  __syncthreads();  // queries and the first keys are here
  for (u32 t = 0; t < tiles; t++) {
    const u32 j0 = begin + t * TILE;
    const bool masked = j0 + TILE > all_end || j0 < all_begin;
    if (masked) {  // a warp's own queries: no other warp reads these
      if (lane < 16 * W) {
        const u32 n = w0 + lane;
        see[warp * 16 * W + lane] = sight(s, min(n / a.group, last), a.window, j0);
      }
      __syncwarp();
    }

    float x[W][KEYS][4] = {};
    GPU_UNROLL for (int kk = 0; kk < D / 16; kk++) {
      uint32_t qf[W][4];
      GPU_UNROLL for (int m = 0; m < W; m++) gpu::ldmatrix_x4(qf[m], q_lane + m * 16 * LD + kk * 16);
      GPU_UNROLL for (int n = 0; n < KEYS / 2; n++) {
        uint32_t kf[4];
        gpu::ldmatrix_x4(kf, k_lane + n * 16 * LD + kk * 16);
        GPU_UNROLL for (int m = 0; m < W; m++) {
          gpu::mma_bf16(x[m][2 * n], qf[m], kf[0], kf[1]);
          gpu::mma_bf16(x[m][2 * n + 1], qf[m], kf[2], kf[3]);
        }
      }
    }
    gpu::cp_async_wait<0>();
    __syncthreads();  // this tile's values are here, its keys are done with
    if (t + 1 < tiles) fetch<D>(sk, keys, kv_dim, j0 + TILE, total);

    bool moved = false;
    float fade[W][2];
    GPU_UNROLL for (int m = 0; m < W; m++) GPU_UNROLL for (int h = 0; h < 2; h++) {
      if (masked) {
        const u64 word = see[warp * 16 * W + m * 16 + h * 8 + lane / 4] >> lane % 4 * 2;
        GPU_UNROLL for (int n = 0; n < KEYS; n++) GPU_UNROLL for (int e = 0; e < 2; e++)
          if (!(word >> (n * 8 + e) & 1)) x[m][n][2 * h + e] = -INFINITY;
      }
      float best = top[m][h];
      GPU_UNROLL for (int n = 0; n < KEYS; n++) best = fmaxf(best, fmaxf(x[m][n][2 * h], x[m][n][2 * h + 1]));
      best = fmaxf(best, __shfl_xor_sync(FULL, best, 1));
      best = fmaxf(best, __shfl_xor_sync(FULL, best, 2));
      const float zero = best == -INFINITY ? 0.f : best;  // nothing seen so far: all powers are those of -inf
      fade[m][h] = gpu::ex2(top[m][h] - zero);
      moved |= top[m][h] != best;
      top[m][h] = best;
      float part = 0;
      GPU_UNROLL for (int n = 0; n < KEYS; n++) GPU_UNROLL for (int e = 0; e < 2; e++) {
        x[m][n][2 * h + e] = gpu::ex2(x[m][n][2 * h + e] - zero);
        part += x[m][n][2 * h + e];
      }
      sum[m][h] = sum[m][h] * fade[m][h] + part;
    }
    if (__any_sync(FULL, moved)) {  // seldom, after the first tiles; fade is exactly 1 otherwise
      GPU_UNROLL for (int m = 0; m < W; m++) GPU_UNROLL for (int n = 0; n < D / 8; n++) GPU_UNROLL for (int e = 0; e < 4; e++)
        acc[m][n][e] *= fade[m][e / 2];
    }
    GPU_UNROLL for (int kk = 0; kk < TILE / 16; kk++) {
      uint32_t pf[W][4];
      GPU_UNROLL for (int m = 0; m < W; m++) GPU_UNROLL for (int i = 0; i < 4; i++)
        pf[m][i] = gpu::pack_bf16(x[m][2 * kk + i / 2][i % 2 * 2], x[m][2 * kk + i / 2][i % 2 * 2 + 1]);
      GPU_UNROLL for (int n = 0; n < D / 16; n++) {
        uint32_t vf[4];
        gpu::ldmatrix_x4_trans(vf, v_lane + kk * 16 * LD + n * 16);
        GPU_UNROLL for (int m = 0; m < W; m++) {
          gpu::mma_bf16(acc[m][2 * n], pf[m], vf[0], vf[1]);
          gpu::mma_bf16(acc[m][2 * n + 1], pf[m], vf[2], vf[3]);
        }
      }
    }
    if (t + 1 < tiles) {
      gpu::cp_async_wait<0>();
      __syncthreads();  // the next keys are here, this tile's values are done with
      fetch<D>(sv, values, kv_dim, j0 + TILE, total);
    }
  }

  GPU_UNROLL for (int m = 0; m < W; m++) GPU_UNROLL for (int h = 0; h < 2; h++) {
    float l = sum[m][h];
    l += __shfl_xor_sync(FULL, l, 1);
    l += __shfl_xor_sync(FULL, l, 2);
    const u32 n = w0 + m * 16 + h * 8 + lane / 4;
    if (n >= queries) continue;
    const float inverse = 1.f / l;
    const size_t at = (size_t)(s.first + n / a.group) * a.kv_heads * a.group + head * a.group + n % a.group;
    GPU_UNROLL for (int c = 0; c < D / 8; c++)
      *reinterpret_cast<uint32_t*>(a.y + at * D + c * 8 + lane % 4 * 2) =
          gpu::pack_bf16(acc[m][c][2 * h] * inverse, acc[m][c][2 * h + 1] * inverse);
  }
}
}  // namespace prefill

KERNEL(prefill_64, Attention, 128, 2) { prefill::body<64, 2>(a); }
KERNEL(prefill_96, Attention, 128, 2) { prefill::body<96, 2>(a); }
KERNEL(prefill_128, Attention, 128, 2) { prefill::body<128, 2>(a); }
KERNEL(prefill_256, Attention, 128, 2) { prefill::body<256, 1>(a); }
