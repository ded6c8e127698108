// Attention of few rows over long caches: decoding, token trees, short blocks; any mask.
//
//   y[r, h] = sum_j p_j v[j] / sum_j p_j,  p_j = 2^(scale log2(e) q[r, h].k[j] - max),  over the cache rows j that r sees
//
// The queries of one sequence that share a kv head (staged rows x heads of the group) are the rows of a matrix product, so K and V
// are read once for all of them: that is what makes 32 nodes of a tree cost about what one token does. A block owns M of these
// queries, one kv head and `chunk` cache rows, which it takes in tiles of 64. In Q K^T each of its four warps owns 16 of the 64
// keys, in P V 16-column slices of the head; in between only maxima and P cross the warps. Chunks leave (max, sum, unscaled
// output) in scratch and attend_merge adds them in ascending order. Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
// arXiv:2205.14135.
//
// Chunks and tiles begin at fixed cache rows and a key that is not seen weighs exactly 0, so a row's result is the same, bit for
// bit, in any company and for any M. Bound by memory: K and V of the cache, once.
#include "rt/gpu.cuh"
#include "rt/segment.cuh"

namespace attend {
constexpr int TILE = 64, WARPS = 4, PLD = TILE + 8;

// Rows of bf16 in shared memory are padded by 16 bytes: the 8 rows of an ldmatrix then fall on different banks.
DEVICE int padded(int d) { return (d + 15) / 16 * 16 + 8; }

template <int D, int MT>
struct Block {
  static constexpr int M = 16 * MT, SLICES = D ? (D / 16 + WARPS - 1) / WARPS : 4;  // 16-column slices of a warp
  int d, ld;
  u32 kv_dim, total;
  bf16_t *q, *k, *v, *p;
  float* across;  // [WARPS][M], what the warps tell one another
  u64* see;       // [M], which keys of the tile a query sees

  // A tile of keys or values to shared memory; rows beyond the last and columns beyond d become 0. SIDE threads share
  // a row.
  __device__ __forceinline__ void fetch(bf16_t* to, const bf16_t* from, u32 j0) {
    constexpr int SIDE = D == 0 ? 2 : D == 96 ? 4 : D / 8, ROWS = 32 * WARPS / SIDE;
    const int r0 = threadIdx.x / SIDE, c0 = threadIdx.x % SIDE * 8, columns = D ? D : (d + 15) / 16 * 16;
    for (int c = c0; c < columns; c += SIDE * 8) {
      const bf16_t* g = from + (size_t)(j0 + r0) * kv_dim + c;
      bf16_t* at = to + r0 * ld + c;
#pragma unroll 4
      for (int r = r0; r < r0 + TILE; r += ROWS, g += ROWS * kv_dim, at += ROWS * ld) {
        const bool there = j0 + r < total && (D || c < d);
        gpu::cp_async16(at, there ? g : from, there);
      }
    }
    gpu::cp_async_commit();
  }
};

template <int D, int MT>
DEVICE void body(const Attention& a) {
  using B = Block<D, MT>;
  constexpr int M = B::M, SLICES = B::SLICES;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Seg s;
  u32 q0;
  if (!find_tile<M>(a.segs, a.segments, a.group, blockIdx.x, s, q0)) return;
  const u32 head = blockIdx.z, queries = s.rows * a.group;
  const u32 i0 = q0 / a.group, i1 = min(s.rows - 1, (q0 + M - 1) / a.group);  // staged rows of this tile
  const bool tree = s.mask == MASK_TREE;

  // Cache rows that any of them sees, and those that all of them see.
  const u32 begin = window_begin(s.past + (tree ? 0 : s.staged + i0), a.window), end = sight_end(s, i1);
  const u32 all_begin = window_begin(pass_begin(s) + i1, a.window), all_end = tree ? s.past : sight_end(s, i0);
  const u32 c0 = blockIdx.y * a.chunk;
  if (c0 >= end || c0 + a.chunk <= begin) return;
  const u32 from = max(c0, begin / TILE * TILE), tiles = (min(c0 + a.chunk, end) - from + TILE - 1) / TILE;

  GPU_DYN_SMEM(bf16_t, smem);
  B b;
  b.d = D ? D : a.head_dim;
  b.ld = padded(b.d);
  b.kv_dim = a.kv_heads * b.d;
  b.total = pass_end(s);
  const int stages = a.stages, size = TILE * b.ld;
  b.q = smem, b.k = b.q + M * b.ld, b.v = b.k + stages * size, b.p = b.v + stages * size;
  b.across = reinterpret_cast<float*>(b.p + M * PLD);
  b.see = reinterpret_cast<u64*>(b.across + WARPS * M);
  const bf16_t* keys = kv_keys(s, a.layer, b.kv_dim) + head * b.d;
  const bf16_t* values = keys + (size_t)s.capacity * b.kv_dim;
  const int steps = (b.d + 15) / 16;

  // Groups of copies are K0 V0 K1 V1 ..., one for each tile even where there is none, so that waits can count them.
  for (u32 t = 0; t < (u32)stages; t++) {
    if (t < tiles) {
      b.fetch(b.k + t * size, keys, from + t * TILE);
      b.fetch(b.v + t * size, values, from + t * TILE);
    } else {
      gpu::cp_async_commit();
      gpu::cp_async_commit();
    }
  }
  {  // Queries, scaled so that exponentials are powers of 2.
    const float scale = a.scale * 1.4426950408889634f;
    const u32 quads = steps * 4, heads = a.kv_heads * a.group;
    for (u32 i = threadIdx.x; i < M * quads; i += 32 * WARPS) {
      const u32 r = i / quads, c = i % quads * 4, n = q0 + r;
      float4 x = make_float4(0, 0, 0, 0);
      if (n < queries && c < (u32)b.d) {
        const size_t at = (size_t)(s.first + n / a.group) * heads + head * a.group + n % a.group;
        x = *reinterpret_cast<const float4*>(a.q + at * b.d + c);
      }
      *reinterpret_cast<uint2*>(b.q + r * b.ld + c) =
          make_uint2(gpu::pack_bf16(x.x * scale, x.y * scale), gpu::pack_bf16(x.z * scale, x.w * scale));
    }
  }

  float acc[MT][SLICES][2][4] = {}, top[MT][2], sum[MT][2] = {};
  GPU_UNROLL for (int m = 0; m < MT; m++) top[m][0] = top[m][1] = -INFINITY;
  for (u32 t = 0; t < tiles; t++) {
    const u32 j0 = from + t * TILE, stage = stages == 2 ? t & 1 : 0;
    const bf16_t *k = b.k + stage * size, *v = b.v + stage * size;
    const bool masked = j0 + TILE > all_end || j0 < all_begin;
    if (masked && threadIdx.x < M)
      b.see[threadIdx.x] = sight(s, min((q0 + threadIdx.x) / a.group, s.rows - 1), a.window, j0);
    if (t == 0) stages == 2 ? gpu::cp_async_wait<3>() : gpu::cp_async_wait<1>();
    else stages == 2 ? gpu::cp_async_wait<2>() : gpu::cp_async_wait<0>();
    __syncthreads();  // this tile's keys and masks are here; the values of the one before are done with
    if (t) {
      const u32 next = t + stages - 1;
      if (next < tiles) b.fetch(b.v + (stages == 2 ? next & 1 : 0) * size, values, from + next * TILE);
      else gpu::cp_async_commit();
    }

    float x[MT][2][4] = {};
    GPU_UNROLL for (int kk = 0; kk < (D ? D / 16 : 16); kk++) {
      if (!D && kk >= steps) break;
      uint32_t kf[4];
      gpu::ldmatrix_x4(kf, k + (warp * 16 + (lane >> 4) * 8 + (lane & 7)) * b.ld + kk * 16 + (lane >> 3 & 1) * 8);
      GPU_UNROLL for (int m = 0; m < MT; m++) {
        uint32_t qf[4];
        gpu::ldmatrix_x4(qf, b.q + (m * 16 + (lane & 15)) * b.ld + kk * 16 + (lane >> 4) * 8);
        gpu::mma_bf16(x[m][0], qf, kf[0], kf[1]);
        gpu::mma_bf16(x[m][1], qf, kf[2], kf[3]);
      }
    }
    GPU_UNROLL for (int m = 0; m < MT; m++) GPU_UNROLL for (int h = 0; h < 2; h++) {
      const int r = m * 16 + h * 8 + lane / 4;
      if (masked) {
        const u32 see = (u32)(b.see[r] >> (warp * 16)) >> lane % 4 * 2;
        GPU_UNROLL for (int n = 0; n < 2; n++) GPU_UNROLL for (int e = 0; e < 2; e++)
          if (!(see >> (n * 8 + e) & 1)) x[m][n][2 * h + e] = -INFINITY;
      }
      float best = fmaxf(fmaxf(x[m][0][2 * h], x[m][0][2 * h + 1]), fmaxf(x[m][1][2 * h], x[m][1][2 * h + 1]));
      best = fmaxf(best, __shfl_xor_sync(FULL, best, 1));
      best = fmaxf(best, __shfl_xor_sync(FULL, best, 2));
      if (lane % 4 == 0) b.across[warp * M + r] = best;
    }
    __syncthreads();  // maxima of all warps are here; this tile's keys are done with
    if (t + stages < tiles) b.fetch(b.k + stage * size, keys, j0 + stages * TILE);
    else gpu::cp_async_commit();

    GPU_UNROLL for (int m = 0; m < MT; m++) GPU_UNROLL for (int h = 0; h < 2; h++) {
      const int r = m * 16 + h * 8 + lane / 4;
      float best = top[m][h];
      GPU_UNROLL for (int w = 0; w < WARPS; w++) best = fmaxf(best, b.across[w * M + r]);
      const float zero = best == -INFINITY ? 0.f : best;  // nothing seen so far: all powers are those of -inf
      const float fade = gpu::ex2(top[m][h] - zero);
      top[m][h] = best;
      GPU_UNROLL for (int n = 0; n < 2; n++) GPU_UNROLL for (int e = 0; e < 2; e++)
        x[m][n][2 * h + e] = gpu::ex2(x[m][n][2 * h + e] - zero);
      sum[m][h] = sum[m][h] * fade + ((x[m][0][2 * h] + x[m][0][2 * h + 1]) + (x[m][1][2 * h] + x[m][1][2 * h + 1]));
      GPU_UNROLL for (int n = 0; n < 2; n++)
        *reinterpret_cast<uint32_t*>(b.p + r * PLD + warp * 16 + n * 8 + lane % 4 * 2) =
            gpu::pack_bf16(x[m][n][2 * h], x[m][n][2 * h + 1]);
      GPU_UNROLL for (int c = 0; c < SLICES; c++) GPU_UNROLL for (int n = 0; n < 2; n++) GPU_UNROLL for (int e = 0; e < 2; e++)
        acc[m][c][n][2 * h + e] *= fade;
    }
    stages == 2 ? gpu::cp_async_wait<3>() : gpu::cp_async_wait<1>();
    __syncthreads();  // P and this tile's values are here
    GPU_UNROLL for (int kk = 0; kk < TILE / 16; kk++) {
      uint32_t pf[MT][4];
      GPU_UNROLL for (int m = 0; m < MT; m++)
        gpu::ldmatrix_x4(pf[m], b.p + (m * 16 + (lane & 15)) * PLD + kk * 16 + (lane >> 4) * 8);
      GPU_UNROLL for (int c = 0; c < SLICES; c++) {
        const int slice = c * WARPS + warp;
        if ((D == 0 || D % 64) && slice >= steps) break;
        uint32_t vf[4];
        gpu::ldmatrix_x4_trans(vf, v + (kk * 16 + (lane & 15)) * b.ld + slice * 16 + (lane >> 4) * 8);
        GPU_UNROLL for (int m = 0; m < MT; m++) {
          gpu::mma_bf16(acc[m][c][0], pf[m], vf[0], vf[1]);
          gpu::mma_bf16(acc[m][c][1], pf[m], vf[2], vf[3]);
        }
      }
    }
  }
  gpu::cp_async_wait<0>();

  GPU_UNROLL for (int m = 0; m < MT; m++) GPU_UNROLL for (int h = 0; h < 2; h++) {
    sum[m][h] += __shfl_xor_sync(FULL, sum[m][h], 1);
    sum[m][h] += __shfl_xor_sync(FULL, sum[m][h], 2);
    if (lane % 4 == 0) b.across[warp * M + m * 16 + h * 8 + lane / 4] = sum[m][h];  // maxima were read two barriers ago
  }
  __syncthreads();
  GPU_UNROLL for (int m = 0; m < MT; m++) GPU_UNROLL for (int h = 0; h < 2; h++) {
    const int r = m * 16 + h * 8 + lane / 4;
    const u32 n = q0 + r;
    if (n >= queries) continue;
    const float l = (b.across[r] + b.across[M + r]) + (b.across[2 * M + r] + b.across[3 * M + r]);
    const size_t heads = a.kv_heads * a.group;
    const size_t at = (size_t)(s.first + n / a.group) * heads + head * a.group + n % a.group;  // which row and head
    const size_t part = (size_t)blockIdx.y * a.rows * heads + at;
    const float inverse = 1.f / l;
    if (a.chunks > 1 && warp == 0 && lane % 4 == 0)
      *reinterpret_cast<float2*>(a.stats + part * 2) = make_float2(top[m][h], l);
    GPU_UNROLL for (int c = 0; c < SLICES; c++) GPU_UNROLL for (int w = 0; w < 2; w++) {
      const int col = (c * WARPS + warp) * 16 + w * 8 + lane % 4 * 2;
      if (col >= b.d) continue;
      const float u0 = acc[m][c][w][2 * h], u1 = acc[m][c][w][2 * h + 1];
      if (a.chunks > 1) *reinterpret_cast<float2*>(a.parts + part * b.d + col) = make_float2(u0, u1);
      else *reinterpret_cast<uint32_t*>(a.y + at * b.d + col) = gpu::pack_bf16(u0 * inverse, u1 * inverse);
    }
  }
}
}  // namespace attend

KERNEL(attend_64_m16, Attention, 128, 4) { attend::body<64, 1>(a); }
KERNEL(attend_64_m64, Attention, 128, 2) { attend::body<64, 4>(a); }
KERNEL(attend_96_m16, Attention, 128, 4) { attend::body<96, 1>(a); }
KERNEL(attend_96_m64, Attention, 128, 2) { attend::body<96, 4>(a); }
KERNEL(attend_128_m16, Attention, 128, 4) { attend::body<128, 1>(a); }
KERNEL(attend_128_m64, Attention, 128, 2) { attend::body<128, 4>(a); }
KERNEL(attend_256_m16, Attention, 128, 4) { attend::body<256, 1>(a); }
KERNEL(attend_256_m32, Attention, 128, 2) { attend::body<256, 2>(a); }
KERNEL(attend_any_m16, Attention, 128, 4) { attend::body<0, 1>(a); }

// y = sum_c w_c parts_c / sum_c w_c l_c, w_c = 2^(m_c - max m). A thread owns four columns of one row and head.
KERNEL(attend_merge, Attention, 128) {
  const u32 quads = a.head_dim / 4, heads = a.kv_heads * a.group;
  const u32 item = blockIdx.x * blockDim.x + threadIdx.x, row = item / quads / heads;
  if (row >= a.rows) return;
  const Seg s = segment_of(a.segs, a.segments, row);
  const u32 i = row - s.first;
  if (i >= s.rows) return;
  const size_t at = item / quads, stride = (size_t)a.rows * heads;
  const u32 lo = window_begin(position(s, i), a.window) / a.chunk, hi = (sight_end(s, i) - 1) / a.chunk;
  const float2* stats = reinterpret_cast<const float2*>(a.stats.p) + at;
  const float4* parts = reinterpret_cast<const float4*>(a.parts.p) + at * quads + item % quads;
  float top = -INFINITY, sum = 0;
  float4 y = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (u32 c = lo; c <= hi; c++) top = fmaxf(top, stats[c * stride].x);
#pragma unroll 4
  for (u32 c = lo; c <= hi; c++) {
    const float2 u = stats[c * stride];
    const float4 x = parts[c * stride * quads];
    const float w = gpu::ex2(u.x - top);
    sum += w * u.y;
    y.x += w * x.x, y.y += w * x.y, y.z += w * x.z, y.w += w * x.w;
  }
  const float inverse = 1.f / sum;
  *reinterpret_cast<uint2*>(a.y + (size_t)item * 4) =
      make_uint2(gpu::pack_bf16(y.x * inverse, y.y * inverse), gpu::pack_bf16(y.z * inverse, y.w * inverse));
}
