// The cache of keys and values: staged behind the committed and the staged rows, and the kept rows moved down to them.
//
//   kv_stage     cache[past + staged + i] = bf16(k[first + i]), likewise v
//   rope_stage   the same with q and k rotated on the way: (a, b) -> (a cos - b sin, b cos + a sin)
//   kv_commit    cache[past + i] = cache[past + path[i]] in all layers
//
// A thread owns 8 values of one row (staging) or 16 bytes of one column in all rows (commit). Bound by memory; for one row by the
// launch, which is why staging is one launch and rows are spread over several blocks.
#include "rt/gpu.cuh"
#include "rt/segment.cuh"

namespace kv {
DEVICE uint4 narrow(const float* x) {
  const float4 a = *reinterpret_cast<const float4*>(x), b = *reinterpret_cast<const float4*>(x + 4);
  return make_uint4(gpu::pack_bf16(a.x, a.y), gpu::pack_bf16(a.z, a.w), gpu::pack_bf16(b.x, b.y), gpu::pack_bf16(b.z, b.w));
}

// Destinations and sources of one column: a destination is never the source of a later row (path[i] >= i, strictly ascending), but
// may be that of an earlier one. So one thread walks the rows upwards and reads a few of them before it writes any.
DEVICE void compact(bf16_t* column, size_t row, const u32* path, u32 n) {
  constexpr u32 FLIGHT = 4;
  for (u32 i = 0; i < n; i += FLIGHT) {
    uint4 x[FLIGHT];
    GPU_UNROLL for (u32 j = 0; j < FLIGHT; j++)
      if (i + j < n) x[j] = *reinterpret_cast<const uint4*>(column + path[i + j] * row);
    GPU_UNROLL for (u32 j = 0; j < FLIGHT; j++)
      if (i + j < n && path[i + j] != i + j) *reinterpret_cast<uint4*>(column + (i + j) * row) = x[j];
  }
}
}  // namespace kv

KERNEL(kv_stage, KvStage, 128) {
  const u32 row = blockIdx.x, vectors = a.kv_dim / 8;
  const u32 item = blockIdx.y * blockDim.x + threadIdx.x;
  const Seg s = segment_of(a.segs, a.segments, row);
  if (row - s.first >= s.rows || item >= 2 * vectors) return;
  const bool value = item >= vectors;
  const u32 c = (value ? item - vectors : item) * 8;
  bf16_t* to = kv_keys(s, a.layer, a.kv_dim) + (size_t)(pass_begin(s) + row - s.first + (value ? s.capacity : 0)) * a.kv_dim;
  *reinterpret_cast<uint4*>(to + c) = kv::narrow((value ? a.v : a.k) + (size_t)row * a.kv_dim + c);
}

KERNEL(rope_stage, RopeStage, 128) {
  const u32 row = blockIdx.x, half = a.head_dim / 2, kv_dim = a.kv_heads * a.head_dim;
  const u32 nq = a.heads * a.head_dim / 8, nk = kv_dim / 8;  // items of q, of k and of v
  const u32 item = blockIdx.y * blockDim.x + threadIdx.x;
  const Seg s = segment_of(a.segs, a.segments, row);
  if (row - s.first >= s.rows || item >= nq + 2 * nk) return;
  bf16_t* keys = kv_keys(s, a.layer, kv_dim) + (size_t)(pass_begin(s) + row - s.first) * kv_dim;
  if (item >= nq + nk) {
    const u32 c = (item - nq - nk) * 8;
    *reinterpret_cast<uint4*>(keys + (size_t)s.capacity * kv_dim + c) = kv::narrow(a.v + (size_t)row * kv_dim + c);
    return;
  }
  // Four pairs: columns c .. c + 3 of the head's first half and of its second.
  const bool key = item >= nq;
  const u32 pair = (key ? item - nq : item) * 4, head = pair / half, c = pair % half, at = head * a.head_dim + c;
  const float* from = key ? a.k + (size_t)row * kv_dim : a.q + (size_t)row * a.heads * a.head_dim;
  const float* turn = a.table + (size_t)row * a.head_dim + c;
  const float4 x = *reinterpret_cast<const float4*>(from + at), y = *reinterpret_cast<const float4*>(from + at + half);
  const float4 cos = *reinterpret_cast<const float4*>(turn), sin = *reinterpret_cast<const float4*>(turn + half);
  const float4 u = make_float4(x.x * cos.x - y.x * sin.x, x.y * cos.y - y.y * sin.y, x.z * cos.z - y.z * sin.z,
                               x.w * cos.w - y.w * sin.w);
  const float4 w = make_float4(y.x * cos.x + x.x * sin.x, y.y * cos.y + x.y * sin.y, y.z * cos.z + x.z * sin.z,
                               y.w * cos.w + x.w * sin.w);
  if (key) {
    *reinterpret_cast<uint2*>(keys + at) = make_uint2(gpu::pack_bf16(u.x, u.y), gpu::pack_bf16(u.z, u.w));
    *reinterpret_cast<uint2*>(keys + at + half) = make_uint2(gpu::pack_bf16(w.x, w.y), gpu::pack_bf16(w.z, w.w));
  } else {
    float* q = a.q + (size_t)row * a.heads * a.head_dim;
    *reinterpret_cast<float4*>(q + at) = u;
    *reinterpret_cast<float4*>(q + at + half) = w;
  }
}

KERNEL(kv_commit, KvCommit, 128) {
  const u32 vectors = a.kv_dim / 8, item = blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= 2 * a.layers * vectors) return;
  const size_t row = (size_t)(item / vectors) * a.capacity + a.past;
  bf16_t* column = reinterpret_cast<bf16_t*>(a.kv) + row * a.kv_dim + item % vectors * 8;
  kv::compact(column, a.kv_dim, a.path, a.n);
}

KERNEL(kv_commit_batch, KvCommitBatch, 128) {
  const u32 vectors = a.kv_dim / 8, item = blockIdx.x * blockDim.x + threadIdx.x;
  if (item >= 2 * a.layers * vectors) return;
  const Seg s = a.segs[blockIdx.y];
  const size_t row = (size_t)(item / vectors) * s.capacity + s.past;
  bf16_t* column = reinterpret_cast<bf16_t*>(s.kv) + row * a.kv_dim + item % vectors * 8;
  kv::compact(column, a.kv_dim, a.path + (size_t)blockIdx.y * a.stride, a.counts[blockIdx.y]);
}
