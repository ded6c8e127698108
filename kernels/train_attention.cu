// Attention in training, forward and backward, over the rows of packed sequences. Dao 2023, arXiv:2307.08691.
//
// A block owns 64 rows, a warp 16, and walks over the tiles of 64 rows that its table lists, W rows at a time: forward and dq own
// queries and walk over keys, dkv owns keys and walks over the queries of every head of its group, in the order of heads and rows, so
// that nothing is added atomically. Operands are rounded to bf16 on their way to shared memory; scores and probabilities stay in
// registers, where the accumulators of one product are the operands of the next. dkv computes the transposes S^T = K Q^T and
// dP^T = V dY^T for that. Wide heads are cut into slices of the results' columns, whose blocks compute the scores anew.
//
// A pair of tiles in which all see all needs no mask; elsewhere a row's bits come from its ranges. Tiles begin at fixed rows and what
// is not seen weighs exactly 0. Bound by the tensor cores, and by the latency of unpipelined loads where few blocks run.
#include "rt/gpu.cuh"
#include "rt/segment.cuh"

namespace train_attention {
constexpr u32 OWN = 64, THREADS = 128;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// Rows r0 .. r0 + n of a head of f32, columns c0 .. c0 + cols, to shared memory as bf16; 0 behind `rows` and behind `d`.
DEVICE void stage(bf16_t* to, u32 ld, const float* from, size_t stride, u32 r0, u32 n, u32 rows, u32 c0, u32 cols, u32 d) {
  const u32 pieces = cols / 8;
  for (u32 i = threadIdx.x; i < n * pieces; i += THREADS) {
    const u32 r = i / pieces, c = i % pieces * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (r0 + r < rows && c0 + c < d) {
      const float* p = from + (r0 + r) * stride + c0 + c;
      const float4 x = *reinterpret_cast<const float4*>(p), y = *reinterpret_cast<const float4*>(p + 4);
      v = make_uint4(gpu::pack_bf16(x.x, x.y), gpu::pack_bf16(x.z, x.w), gpu::pack_bf16(y.x, y.y), gpu::pack_bf16(y.z, y.w));
    }
    *reinterpret_cast<uint4*>(to + r * ld + c) = v;
  }
}

// Which of rows j0 .. j0 + 63 row i sees, a bit each; none for rows behind the last.
template <class Args>
DEVICE u64 seen(const Args& a, u32 i, u32 j0) {
  u64 see = 0;
  if (i >= a.rows) return see;
  for (u32 n = i ? a.ends[i - 1] : 0; n < a.ends[i]; n++) {
    const int first = (int)a.ranges[2 * n] - (int)j0, end = (int)a.ranges[2 * n + 1] - (int)j0;
    if (first >= 64) break;
    see |= low_bits(end) & ~low_bits(first);
  }
  return see;
}

// x[16 own rows][W] = A B^T over `steps` times 16 columns.
template <int STEPS, int W>
DEVICE void scores(float (&x)[W / 8][4], const bf16_t* a_lane, const bf16_t* b_lane, u32 ld, u32 steps) {
  GPU_UNROLL for (int n = 0; n < W / 8; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0;
  const auto step = [&](u32 kk) {
    u32 fa[4];
    gpu::ldmatrix_x4(fa, a_lane + kk * 16);
    GPU_UNROLL for (int n = 0; n < W / 16; n++) {
      u32 fb[4];
      gpu::ldmatrix_x4(fb, b_lane + n * 16 * ld + kk * 16);
      gpu::mma_bf16(x[2 * n], fa, fb[0], fb[1]);
      gpu::mma_bf16(x[2 * n + 1], fa, fb[2], fb[3]);
    }
  };
  if constexpr (STEPS > 0) {
    GPU_UNROLL for (u32 kk = 0; kk < STEPS; kk++) step(kk);
  } else {
    for (u32 kk = 0; kk < steps; kk++) step(kk);
  }
}

// acc[16 own rows][S] += X B, of W rows of B, which has `cols` columns at most.
template <int W, int S>
DEVICE void gather(float (&acc)[S / 8][4], const float (&x)[W / 8][4], const bf16_t* b_lane, u32 ld, u32 cols) {
  GPU_UNROLL for (int kk = 0; kk < W / 16; kk++) {
    u32 fx[4];
    GPU_UNROLL for (int i = 0; i < 4; i++) fx[i] = gpu::pack_bf16(x[2 * kk + i / 2][i % 2 * 2], x[2 * kk + i / 2][i % 2 * 2 + 1]);
    GPU_UNROLL for (int n = 0; n < S / 16; n++) {
      if (n * 16u >= cols) break;
      u32 fb[4];
      gpu::ldmatrix_x4_trans(fb, b_lane + kk * 16 * ld + n * 16);
      gpu::mma_bf16(acc[2 * n], fx, fb[0], fb[1]);
      gpu::mma_bf16(acc[2 * n + 1], fx, fb[2], fb[3]);
    }
  }
}

// Where a lane's addresses begin: of A and of transposed B by halves of 16 rows, of B by pairs of 8.
DEVICE u32 by_halves(u32 ld) { return (threadIdx.x & 15) * ld + (threadIdx.x & 31) / 16 * 8; }
DEVICE u32 by_pairs(u32 ld) { return ((threadIdx.x & 31) / 16 * 8 + (threadIdx.x & 7)) * ld + (threadIdx.x >> 3 & 1) * 8; }

// f(first row of a tile, whether all see all) for what the table lists of tile t.
template <class F>
DEVICE void visit(const u32* tiles, const u32* ends, u32 t, F f) {
  for (u32 n = t ? ends[t - 1] : 0; n < ends[t]; n++) f(tiles[n] / 2 * OWN, tiles[n] & 1);
}

// Row (of 16) and column that element e of a lane's part n belongs to.
DEVICE u32 row_of(int e) { return (threadIdx.x & 31) / 4 + e / 2 * 8; }
DEVICE u32 col_of(int n, int e) { return n * 8 + threadIdx.x % 4 * 2 + e % 2; }

template <int S>
DEVICE void store(float* to, size_t stride, u32 row0, u32 rows, u32 c0, u32 d, const float (&acc)[S / 8][4]) {
  GPU_UNROLL for (int n = 0; n < S / 8; n++) GPU_UNROLL for (int h = 0; h < 2; h++) {
    const u32 row = row0 + row_of(2 * h), c = c0 + col_of(n, 0);
    if (row < rows && c < d) *reinterpret_cast<float2*>(to + row * stride + c) = make_float2(acc[n][2 * h], acc[n][2 * h + 1]);
  }
}

template <int D, int S, int W>
DEVICE void forward(const TrainAttend& a) {
  const u32 d = D ? D : a.head_dim, wide = (d + 15) / 16 * 16, ld = wide + 8, warp = threadIdx.x / 32, c0 = blockIdx.z * S;
  // The last tiles of a causal sequence are the longest: they begin first.
  const u32 tile = gridDim.x - 1 - blockIdx.x, i0 = tile * OWN, own = warp * 16, heads = a.kv_heads * a.group, head = blockIdx.y;
  const size_t q_stride = (size_t)heads * d, kv_stride = (size_t)a.kv_heads * d;
  const float *q = a.q + head * d, *keys = a.k + head / a.group * d, *values = a.v + head / a.group * d;
  GPU_DYN_SMEM(bf16_t, sq);
  bf16_t *sk = sq + OWN * ld, *sv = sk + W * ld;
  u64* see = reinterpret_cast<u64*>(sv + W * (S + 8));
  stage(sq, ld, q, q_stride, i0, OWN, a.rows, 0, wide, d);

  float acc[S / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  const float scale = a.scale * LOG2E;
  visit(a.tiles, a.tile_ends, tile, [&](u32 tile0, bool all) {
    for (u32 w = 0; w < OWN && tile0 + w < a.rows; w += W) {
      __syncthreads();
      stage(sk, ld, keys, kv_stride, tile0 + w, W, a.rows, 0, wide, d);
      stage(sv, S + 8, values, kv_stride, tile0 + w, W, a.rows, c0, S, d);
      if (!all && w == 0 && threadIdx.x < OWN) see[threadIdx.x] = seen(a, i0 + threadIdx.x, tile0);
      __syncthreads();
      float x[W / 8][4];
      scores<D / 16, W>(x, sq + own * ld + by_halves(ld), sk + by_pairs(ld), ld, wide / 16);
      GPU_UNROLL for (int h = 0; h < 2; h++) {
        float best = top[h];
        const u64 word = all ? ~0ull : see[own + row_of(2 * h)] >> w;
        GPU_UNROLL for (int n = 0; n < W / 8; n++) GPU_UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) {
          x[n][e] = word >> col_of(n, e) & 1 ? x[n][e] * scale : -INFINITY;
          best = fmaxf(best, x[n][e]);
        }
        best = fmaxf(best, __shfl_xor_sync(FULL, best, 1));
        best = fmaxf(best, __shfl_xor_sync(FULL, best, 2));
        const float zero = best == -INFINITY ? 0.f : best, fade = gpu::ex2(top[h] - zero);
        top[h] = best;
        float part = 0;
        GPU_UNROLL for (int n = 0; n < W / 8; n++) GPU_UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) part += x[n][e] = gpu::ex2(x[n][e] - zero);
        sum[h] = sum[h] * fade + part;
        GPU_UNROLL for (int n = 0; n < S / 8; n++) acc[n][2 * h] *= fade, acc[n][2 * h + 1] *= fade;
      }
      gather<W, S>(acc, x, sv + by_halves(S + 8), S + 8, S);
    }
  });

  GPU_UNROLL for (int h = 0; h < 2; h++) {
    float l = sum[h];
    l += __shfl_xor_sync(FULL, l, 1);
    l += __shfl_xor_sync(FULL, l, 2);
    const u32 row = i0 + own + row_of(2 * h);
    if (row >= a.rows) continue;
    const float inverse = 1.f / l;
    if (threadIdx.x % 4 == 0 && c0 == 0) a.lse[(size_t)row * heads + head] = top[h] * LN2 + logf(l);
    GPU_UNROLL for (int n = 0; n < S / 8; n++)
      if (c0 + col_of(n, 0) < d)
        *reinterpret_cast<u32*>(a.y + row * q_stride + head * d + c0 + col_of(n, 0)) = gpu::pack_bf16(acc[n][2 * h] * inverse, acc[n][2 * h + 1] * inverse);
  }
}

template <int D, int S, int W>
DEVICE void dq(const TrainAttendBwd& a) {
  const u32 d = D ? D : a.head_dim, wide = (d + 15) / 16 * 16, ld = wide + 8, warp = threadIdx.x / 32, c0 = blockIdx.z * S;
  const u32 tile = gridDim.x - 1 - blockIdx.x, i0 = tile * OWN, own = warp * 16, heads = a.kv_heads * a.group, head = blockIdx.y;
  const size_t q_stride = (size_t)heads * d, kv_stride = (size_t)a.kv_heads * d;
  const float *keys = a.k + head / a.group * d, *values = a.v + head / a.group * d;
  GPU_DYN_SMEM(bf16_t, sq);
  bf16_t *sdy = sq + OWN * ld, *sk = sdy + OWN * ld, *sv = sk + W * ld;
  u64* see = reinterpret_cast<u64*>(sv + W * ld);
  stage(sq, ld, a.q + head * d, q_stride, i0, OWN, a.rows, 0, wide, d);
  stage(sdy, ld, a.dy + head * d, q_stride, i0, OWN, a.rows, 0, wide, d);
  float lse[2], delta[2], acc[S / 8][4] = {};
  GPU_UNROLL for (int h = 0; h < 2; h++) {
    const u32 row = min(i0 + own + row_of(2 * h), a.rows - 1);
    lse[h] = a.lse[(size_t)row * heads + head] * LOG2E, delta[h] = a.delta[(size_t)row * heads + head];
  }
  const float scale = a.scale * LOG2E;
  visit(a.tiles, a.tile_ends, tile, [&](u32 tile0, bool all) {
    for (u32 w = 0; w < OWN && tile0 + w < a.rows; w += W) {
      __syncthreads();
      stage(sk, ld, keys, kv_stride, tile0 + w, W, a.rows, 0, wide, d);
      stage(sv, ld, values, kv_stride, tile0 + w, W, a.rows, 0, wide, d);
      if (!all && w == 0 && threadIdx.x < OWN) see[threadIdx.x] = seen(a, i0 + threadIdx.x, tile0);
      __syncthreads();
      float x[W / 8][4], dp[W / 8][4];
      scores<D / 16, W>(x, sq + own * ld + by_halves(ld), sk + by_pairs(ld), ld, wide / 16);
      scores<D / 16, W>(dp, sdy + own * ld + by_halves(ld), sv + by_pairs(ld), ld, wide / 16);
      GPU_UNROLL for (int h = 0; h < 2; h++) {
        const u64 word = all ? ~0ull : see[own + row_of(2 * h)] >> w;
        GPU_UNROLL for (int n = 0; n < W / 8; n++) GPU_UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) {
          const float p = gpu::ex2(x[n][e] * scale - lse[h]);
          x[n][e] = word >> col_of(n, e) & 1 ? a.scale * p * (dp[n][e] - delta[h]) : 0.f;
        }
      }
      gather<W, S>(acc, x, sk + c0 + by_halves(ld), ld, D ? S : wide - c0);
    }
  });
  store<S>(a.dq + head * d, q_stride, i0 + own, a.rows, c0, d, acc);
}

template <int D, int S, int W>
DEVICE void dkv(const TrainAttendBwd& a) {
  const u32 d = D ? D : a.head_dim, wide = (d + 15) / 16 * 16, ld = wide + 8, warp = threadIdx.x / 32, c0 = blockIdx.z * S;
  const u32 tile = blockIdx.x, j0 = tile * OWN, own = warp * 16, heads = a.kv_heads * a.group, kv_head = blockIdx.y;
  const size_t q_stride = (size_t)heads * d, kv_stride = (size_t)a.kv_heads * d;
  GPU_DYN_SMEM(bf16_t, sk);
  bf16_t *sv = sk + OWN * ld, *sq = sv + OWN * ld, *sdy = sq + W * ld;
  u64* see = reinterpret_cast<u64*>(sdy + W * ld);
  float *lse = reinterpret_cast<float*>(see + W), *delta = lse + W;
  stage(sk, ld, a.k + kv_head * d, kv_stride, j0, OWN, a.rows, 0, wide, d);
  stage(sv, ld, a.v + kv_head * d, kv_stride, j0, OWN, a.rows, 0, wide, d);
  float dk[S / 8][4] = {}, dv[S / 8][4] = {};
  const float scale = a.scale * LOG2E;
  for (u32 head = kv_head * a.group; head < (kv_head + 1) * a.group; head++)
    visit(a.turned, a.turned_ends, tile, [&](u32 tile0, bool all) {
      for (u32 w = 0; w < OWN && tile0 + w < a.rows; w += W) {
        __syncthreads();
        stage(sq, ld, a.q + head * d, q_stride, tile0 + w, W, a.rows, 0, wide, d);
        stage(sdy, ld, a.dy + head * d, q_stride, tile0 + w, W, a.rows, 0, wide, d);
        if (threadIdx.x < W) {
          const u32 row = tile0 + w + threadIdx.x;
          const size_t at = (size_t)min(row, a.rows - 1) * heads + head;
          see[threadIdx.x] = all ? ~0ull : seen(a, row, j0);
          lse[threadIdx.x] = a.lse[at] * LOG2E, delta[threadIdx.x] = a.delta[at];
        }
        __syncthreads();
        float p[W / 8][4], ds[W / 8][4];
        scores<D / 16, W>(p, sk + own * ld + by_halves(ld), sq + by_pairs(ld), ld, wide / 16);
        scores<D / 16, W>(ds, sv + own * ld + by_halves(ld), sdy + by_pairs(ld), ld, wide / 16);
        GPU_UNROLL for (int n = 0; n < W / 8; n++) GPU_UNROLL for (int e = 0; e < 4; e++) {
          const u32 i = col_of(n, e);
          p[n][e] = see[i] >> (own + row_of(e)) & 1 ? gpu::ex2(p[n][e] * scale - lse[i]) : 0.f;
          ds[n][e] = a.scale * p[n][e] * (ds[n][e] - delta[i]);
        }
        gather<W, S>(dv, p, sdy + c0 + by_halves(ld), ld, D ? S : wide - c0);
        gather<W, S>(dk, ds, sq + c0 + by_halves(ld), ld, D ? S : wide - c0);
      }
    });
  store<S>(a.dk + kv_head * d, kv_stride, j0 + own, a.rows, c0, d, dk);
  store<S>(a.dv + kv_head * d, kv_stride, j0 + own, a.rows, c0, d, dv);
}
}  // namespace train_attention

// A warp a row of a head. dy is rounded as the products round it.
KERNEL(attend_delta, TrainAttendBwd, 128) {
  const u32 i = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (i >= a.rows * a.kv_heads * a.group) return;
  float sum = 0;
  for (u32 c = lane; c < a.head_dim; c += 32) {
    const size_t at = (size_t)i * a.head_dim + c;
    sum += gpu::to_f32(gpu::to_bf16(a.dy[at])) * gpu::to_f32(a.y[at]);
  }
  sum = warp_sum(sum);
  if (lane == 0) a.delta[i] = sum;
}

#define HEAD(name, D, S, FORWARD, BACKWARD)                                                                            \
  KERNEL(train_attend_##name, TrainAttend, 128) { train_attention::forward<D, S, FORWARD>(a); }                       \
  KERNEL(attend_dq_##name, TrainAttendBwd, 128) { train_attention::dq<D, S, BACKWARD>(a); }                           \
  KERNEL(attend_dkv_##name, TrainAttendBwd, 128, 2) { train_attention::dkv<D, S, BACKWARD>(a); }
HEAD(64, 64, 64, 64, 32)
HEAD(96, 96, 96, 64, 32)
HEAD(128, 128, 128, 64, 32)
HEAD(256, 256, 128, 32, 16)
HEAD(any, 0, 64, 16, 16)
