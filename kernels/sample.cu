// From a row of logits to a token.
//
//   x is kept if it is among the top_k largest, and the kept before it have less than top_p of the mass, and p(x) >= min_p p(best);
//   P(token) is proportional to 2^-e, e = (max - x) log2(e) / temperature, over the kept; equals count in the order of their ids
//   further tokens of a row are drawn from what the ones before leave
//
// A block owns a row. Everything is integers once e is: e in steps of 2^-22, weights 2^-e in steps of 2^-32 (what is less likely is
// dropped), so sums are exact, no order of addition matters and a draw is a function of (seed, stream, counter) and the row alone.
// top-k and top-p are cuts in the order of (e, id): twelve of its bits a walk over the row, by a histogram of counts or of weights,
// whose first bins are even in the logits so that a warp's additions seldom meet. The draw inverts the sums of weights in the order
// of ids. Bound by the walks, which hit L2: two without cuts, up to four more for each.
//
// penalize and forbid change single logits before that, a thread each.
#include "rt/gpu.cuh"
#include "rt/choose.cuh"
#include "rt/philox.cuh"

namespace sampling {
constexpr int FRACTION = 22, LEVEL_BITS = 27, ID_BITS = 20;  // e below 32 has 5 + 22 bits
constexpr u32 NEVER = 0xffffffffu;

struct Row {
  float max, slope;  // log2(e) / temperature
  u64 cut;           // last kept of (e, id)

  // e in steps of 2^-22; NEVER from 32 on.
  __device__ __forceinline__ u32 level(float x) const {
    const float e = x == max ? 0.f : (max - x) * slope;
    return e < 32.f ? min((u32)(e * (1 << FRACTION) + 0.5f), (1u << LEVEL_BITS) - 1) : NEVER;
  }
  __device__ __forceinline__ u64 key(u32 id, float x) const {
    const u32 l = level(x);
    return l == NEVER ? ~0ull : (u64)l << ID_BITS | id;
  }
  __device__ __forceinline__ weight_t weight(u32 level) const {
    return (weight_t)(gpu::ex2(-(float)level / (1 << FRACTION)) * 4294967296.f);
  }
  __device__ __forceinline__ weight_t kept(u32 id, float x) const {
    const u32 l = level(x);
    return l != NEVER && ((u64)l << ID_BITS | id) <= cut ? weight(l) : 0;
  }
};

struct Space {
  weight_t bins[BINS];
  Choice choice;
  float max[32];
  u32 at[32];
};

// Finds what is kept of a row: the lowest id of the largest alone where slope is infinite. False if it holds NaN or nothing finite.
DEVICE bool prepare(const Walk& walk, const float* x, const Draw& d, Space& s, Row& row) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float max = -INFINITY;
  u32 at = 0;
  bool nan = false;
  walk.each(x, [&](u32 id, float v) {
    nan |= v != v;
    if (v > max) max = v, at = id;
  });
  if (nan) max = INFINITY;  // as good a sign: the row is useless
  auto join = [&](float m, u32 i) {
    if (m > max || (m == max && i < at)) max = m, at = i;
  };
  for (int o = 16; o; o >>= 1) join(__shfl_xor_sync(FULL, max, o), __shfl_xor_sync(FULL, at, o));
  if (lane == 0) s.max[warp] = max, s.at[warp] = at;
  __syncthreads();
  max = lane < blockDim.x / 32 ? s.max[lane] : -INFINITY, at = lane < blockDim.x / 32 ? s.at[lane] : 0;
  for (int o = 16; o; o >>= 1) join(__shfl_xor_sync(FULL, max, o), __shfl_xor_sync(FULL, at, o));
  if (!(fabsf(max) < INFINITY)) return false;

  row.max = max, row.slope = 1.4426950408889634f / d.temperature, row.cut = ~0ull - 1;
  if (row.slope == INFINITY || d.top_k == 1) {
    row.slope = INFINITY, row.cut = at;  // level 0 is for the largest alone, and of equals for the lowest id
    return true;
  }
  const u32 bits = LEVEL_BITS + ID_BITS;
  auto key = [&](u32 id, float v) {
    const u64 k = row.key(id, v);
    return k <= row.cut ? k : ~0ull;
  };
  if (d.top_k && d.top_k < walk.n)
    row.cut = min(row.cut, block_cut(walk, x, bits, d.top_k, s.bins, s.choice, key, [](u32, float) { return (weight_t)1; }));
  if (d.top_p < 1) {
    weight_t own = 0, total;
    walk.each(x, [&](u32 id, float v) { own += row.kept(id, v); });
    block_scan(own, s.choice, total);
    const weight_t share = (weight_t)((double)d.top_p * (double)total), enough = share ? share : 1;
    row.cut = min(row.cut, block_cut(walk, x, bits, enough, s.bins, s.choice, key, [&](u32 id, float v) { return row.kept(id, v); }));
  }
  if (d.min_p > 0) {
    const float e = -log2f(d.min_p);
    if (e < 32.f) row.cut = min(row.cut, (((u64)(e * (1 << FRACTION) + 0.5f) + 1) << ID_BITS) - 1);
  }
  return true;
}
}  // namespace sampling

KERNEL(sample, Sample, 1024, 1) {
  using namespace sampling;
  constexpr u32 MOST = 64;  // of a row
  GPU_SMEM(Space, space, [1]);
  GPU_SMEM(u32, taken, [MOST]);
  const float* x = a.logits + (size_t)blockIdx.x * a.vocab;
  const Draw& d = a.draws[blockIdx.x];
  const Walk walk(a.vocab);
  Row row;
  const bool ok = prepare(walk, x, d, *space, row);
  u32* tokens = a.tokens + (size_t)blockIdx.x * a.n;
  if (!ok || row.slope == INFINITY) {
    for (u32 i = threadIdx.x; i < a.n; i += blockDim.x) tokens[i] = ok && i == 0 ? (u32)row.cut : NO_TOKEN;
    return;
  }
  weight_t own = 0;
  walk.each(x, [&](u32 id, float v) { own += row.kept(id, v); });
  for (u32 i = 0; i < a.n; i++) {
    const u32 token = block_draw(walk, x, own, random_bits(d.seed, d.stream, d.counter + i), space->choice, [&](u32 id, float v) {
      bool left = true;
      for (u32 j = 0; j < i; j++) left &= taken[j] != id;
      return left ? row.kept(id, v) : 0;
    });
    // Modulo 2^64, so that the warp's sum is right though this thread's may not be.
    if (threadIdx.x % 32 == 0 && token != NO_TOKEN && walk.warp_of(token) == threadIdx.x / 32) own -= row.kept(token, x[token]);
    if (threadIdx.x == 0) tokens[i] = taken[i] = token;
    __syncthreads();
  }
}

KERNEL(distribution, Distribution, 1024, 1) {
  using namespace sampling;
  GPU_SMEM(Space, space, [1]);
  const float* x = a.logits + (size_t)blockIdx.x * a.vocab;
  float* p = a.p + (size_t)blockIdx.x * a.vocab;
  const Walk walk(a.vocab);
  Row row;
  const bool ok = prepare(walk, x, a.draws[blockIdx.x], *space, row);
  weight_t own = 0, total = 0;
  if (ok) {
    walk.each(x, [&](u32 id, float v) { own += row.kept(id, v); });
    block_scan(own, space->choice, total);
  }
  const float unit = ok ? 1.f / (float)total : 0.f;
  walk.each(x, [&](u32 id, float v) { p[id] = ok ? (float)row.kept(id, v) * unit : 0.f; });
}

KERNEL(penalize, Penalize, 128) {
  const u32 i = blockIdx.x * 128 + threadIdx.x;
  if (i >= a.n) return;
  const Penalty& penalty = a.penalties[i];
  float& x = a.logits[penalty.at];
  x = x > 0.f ? x / penalty.factor : x * penalty.factor;
}

KERNEL(forbid, Forbid, 128) {
  const u32 i = blockIdx.x * 128 + threadIdx.x;
  if (i < a.rows * a.n) a.logits[(size_t)(i / a.n) * a.vocab + a.tokens[i % a.n]] = -INFINITY;
}
