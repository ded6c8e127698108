// What a row of logits says, read once.
//
//   logits_stats   max, lse = log sum e^x, entropy = lse - sum p x; and the lowest id of the largest
//   top_k          the k largest, lower ids first among equals
//
// A block owns a row. Each thread keeps (max, Z, S) with Z = sum e^(x - max), S = sum (x - max) e^(x - max); two such triples join
// exactly like the running sums of a flash attention, and entropy = log Z - S / Z. top_k counts values in bins linear between the
// row's extremes, takes all above the bin in which the k-th falls, and sorts those few; if they are too many it cuts exactly
// first. Bound by memory.
#include "rt/gpu.cuh"
#include "rt/choose.cuh"

namespace logits {
constexpr float LOG2E = 1.4426950408889634f;
DEVICE float power(float x) { return gpu::ex2(x * LOG2E); }

struct Triple {
  float max, z, s;
  u32 at;
};
DEVICE Triple join(const Triple& a, const Triple& b) {
  Triple t;
  t.max = fmaxf(a.max, b.max);
  t.at = a.max > b.max || (a.max == b.max && a.at < b.at) ? a.at : b.at;
  if (t.max == -INFINITY) return t.z = t.s = 0, t;
  const float da = a.max - t.max, db = b.max - t.max, ea = power(da), eb = power(db);
  t.z = ea * a.z + eb * b.z;
  t.s = (a.z > 0 ? ea * (a.s + da * a.z) : 0) + (b.z > 0 ? eb * (b.s + db * b.z) : 0);
  return t;
}
DEVICE Triple join_lane(const Triple& t, int o) {
  return join(t, Triple{__shfl_xor_sync(FULL, t.max, o), __shfl_xor_sync(FULL, t.z, o), __shfl_xor_sync(FULL, t.s, o),
                        __shfl_xor_sync(FULL, t.at, o)});
}
}  // namespace logits

KERNEL(logits_stats, LogitsStats, 1024, 1) {
  using namespace logits;
  GPU_SMEM(Triple, part, [32]);
  const Walk walk(a.vocab);
  Triple t{-INFINITY, 0, 0, 0};
  bool nan = false;
  walk.each(a.logits + (size_t)blockIdx.x * a.vocab, [&](u32 id, float x) {
    nan |= x != x;
    if (x > t.max) {
      const float d = t.max - x, e = power(d);
      if (t.z > 0) t.s = e * (t.s + d * t.z), t.z *= e;
      t.max = x, t.at = id;
    }
    const float d = x - t.max, e = power(d);
    if (e > 0) t.z += e, t.s += d * e;  // also not for -inf - -inf
  });
  if (nan) t.max = INFINITY;  // as good a sign: the row is useless
  for (int o = 16; o; o >>= 1) t = join_lane(t, o);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) part[warp] = t;
  __syncthreads();
  if (warp) return;
  t = lane < blockDim.x / 32 ? part[lane] : Triple{-INFINITY, 0, 0, 0};
  for (int o = 16; o; o >>= 1) t = join_lane(t, o);
  if (lane == 0) {
    const bool good = fabsf(t.max) < INFINITY;
    const float z = logf(t.z);
    float* stats = a.stats + (size_t)blockIdx.x * 3;
    stats[0] = good ? t.max : NAN, stats[1] = good ? t.max + z : NAN, stats[2] = good ? z - t.s / t.z : NAN;
    a.argmax[blockIdx.x] = good ? t.at : NO_TOKEN;
  }
}

namespace logits {
// Ascends as x descends, and from equal x with the id: 32 + 20 bits.
DEVICE u64 rank(float x, u32 id) {
  const u32 bits = __float_as_uint(x);
  return (u64)(bits >> 31 ? bits : ~bits & 0x7fffffffu) << 20 | id;
}
// Sorts a power of two of keys.
DEVICE void sort(u64* keys, u32 n) {
  for (u32 run = 2; run <= n; run *= 2)
    for (u32 gap = run / 2; gap; gap /= 2) {
      __syncthreads();
      for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        const u32 j = i ^ gap;
        if (j < i) continue;
        const u64 x = keys[i], y = keys[j];
        if ((x > y) == !(i & run)) keys[i] = y, keys[j] = x;
      }
    }
  __syncthreads();
}
}  // namespace logits

KERNEL(top_k, TopK, 1024, 1) {
  using namespace logits;
  constexpr u32 ROOM = 1024;
  GPU_SMEM(weight_t, bins, [BINS]);
  GPU_SMEM(u64, keys, [ROOM]);
  GPU_SMEM(float, ends, [2][32]);
  GPU_SMEM(Choice, choice, [1]);
  GPU_SMEM(u32, taken, [1]);
  const float* x = a.logits + (size_t)blockIdx.x * a.vocab;
  const Walk walk(a.vocab);
  const u32 k = min(a.k, a.vocab), lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u32* counts = reinterpret_cast<u32*>(bins);

  float low = INFINITY, high = -INFINITY;
  walk.each(x, [&](u32, float v) {
    high = fmaxf(high, v);
    if (v > -INFINITY) low = fminf(low, v);
  });
  high = warp_max(high), low = -warp_max(-low);
  if (lane == 0) ends[0][warp] = high, ends[1][warp] = low;
  for (u32 i = threadIdx.x; i < BINS; i += blockDim.x) counts[i] = 0;
  if (threadIdx.x == 0) *taken = 0;
  __syncthreads();
  high = warp_max(lane < blockDim.x / 32 ? ends[0][lane] : -INFINITY);
  low = -warp_max(lane < blockDim.x / 32 ? -ends[1][lane] : -INFINITY);

  // Bins that ascend as x descends. Without a finite range all values share the first, which is right, if slow.
  const float scale = BINS / (high - low);
  auto bin = [&](float v) {
    const float at = (high - v) * scale;
    return at >= 0.f ? (u32)fminf(at, BINS - 1) : 0u;
  };
  walk.each(x, [&](u32, float v) { atomicAdd(&counts[bin(v)], 1u); });
  __syncthreads();
  const u32 each = BINS / blockDim.x, first = threadIdx.x * each;
  weight_t own = 0, total;
  for (u32 i = 0; i < each; i++) own += counts[first + i];
  weight_t before = block_scan(own, *choice, total);
  if (before < k && k <= before + own) {
    u32 i = first;
    for (; before + counts[i] < k; i++) before += counts[i];
    choice->at = i, choice->rest = before + counts[i];
  }
  __syncthreads();
  const u32 last = choice->at, some = (u32)choice->rest;
  __syncthreads();
  u64 cut = ~0ull;
  if (some > ROOM)
    cut = block_cut(walk, x, 52, k, bins, *choice, [&](u32 id, float v) { return rank(v, id); },
                    [](u32, float) { return (weight_t)1; });
  walk.each(x, [&](u32 id, float v) {
    if (bin(v) <= last && rank(v, id) <= cut) keys[atomicAdd(taken, 1u)] = rank(v, id);
  });
  __syncthreads();
  const u32 n = *taken;
  u32 size = 1;
  while (size < n) size *= 2;
  for (u32 i = n + threadIdx.x; i < size; i += blockDim.x) keys[i] = ~0ull;
  sort(keys, size);
  for (u32 i = threadIdx.x; i < k; i += blockDim.x) {
    const u32 id = (u32)keys[i] & 0xfffffu;
    a.ids[(size_t)blockIdx.x * a.k + i] = id;
    a.values[(size_t)blockIdx.x * a.k + i] = x[id];
  }
}
