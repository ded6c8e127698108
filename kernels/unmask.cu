// Which masked positions of a diffusion model's texts get their tokens.
//
//   cost   entropy, or lse - max = -ln p(best): the less, the surer; equals rank by their position
//   taken  what costs less than `limit`, the `best` first of all, and, if that is nothing in [forced_from, forced_to), the
//          first there, which gets its argmax
//   then   behind the first end token in [fill_from, fill_to) all becomes the first of the end tokens
//
// A block owns a sequence, a thread every 256th of its rows and tokens. Ranks are those of keys (cost, row), of which a block finds the
// least: no order of additions, the same bits everywhere. Bound by latency.
#include "rt/gpu.cuh"
#include "rt/choose.cuh"

namespace selection {
constexpr u64 NONE = ~0ull;

// The least of all threads' keys, given to every thread.
DEVICE u64 block_least(u64 key, u64* part) {
  GPU_UNROLL for (int o = 16; o; o >>= 1) {
    const u32 lo = __shfl_xor_sync(FULL, (u32)key, o), hi = __shfl_xor_sync(FULL, (u32)(key >> 32), o);
    key = min(key, (u64)hi << 32 | lo);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = key;
  __syncthreads();
  for (u32 w = 0; w < blockDim.x / 32; w++) key = min(key, part[w]);
  return key;
}

// Ascends as x does.
DEVICE u32 ascending(float x) {
  const u32 bits = __float_as_uint(x + 0.f);  // one zero
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
}  // namespace selection

KERNEL(unmask, Unmask, 256) {
  using namespace selection;
  GPU_SMEM(u64, part, [8]);
  const Masked t = a.texts[blockIdx.x];
  const u32 *picks = a.picks + t.first, *argmax = a.argmax + t.first, *positions = a.positions + t.first;
  const float* stats = a.stats + (size_t)t.first * 3;
  u32 *taken = a.taken + t.first, *tokens = a.tokens + t.text;
  auto cost = [&](u32 r) { return t.score ? stats[3 * r + 1] - stats[3 * r] : stats[3 * r + 2]; };
  auto key = [&](u32 r) {
    const float c = cost(r);
    return c == c && picks[r] != NO_TOKEN && argmax[r] != NO_TOKEN ? (u64)ascending(c) << 32 | r : NONE;
  };
  // The least key from `from` on, of the rows at positions from p0 up to p1.
  auto first = [&](u64 from, u32 p0, u32 p1) {
    u64 least = NONE;
    for (u32 r = threadIdx.x; r < t.rows; r += blockDim.x)
      if (positions[r] >= p0 && positions[r] < p1) {
        const u64 k = key(r);
        if (k >= from) least = min(least, k);
      }
    return block_least(least, part);
  };
  // Rows and what is taken of them are a thread's own until tokens are written.
  auto owns = [&](u64 k) { return (u32)k % blockDim.x == threadIdx.x; };

  for (u32 r = threadIdx.x; r < t.rows; r += blockDim.x) taken[r] = key(r) != NONE && cost(r) < t.limit ? picks[r] : NO_TOKEN;
  u64 from = 0;
  for (u32 n = 0; n < t.best; n++) {
    const u64 k = first(from, 0, ~0u);
    if (k == NONE) break;
    if (owns(k)) taken[(u32)k] = picks[(u32)k];
    from = k + 1;
  }
  u64 some = NONE;
  for (u32 r = threadIdx.x; r < t.rows; r += blockDim.x)
    if (positions[r] >= t.forced_from && positions[r] < t.forced_to && taken[r] != NO_TOKEN) some = 0;
  if (block_least(some, part) == NONE) {
    const u64 k = first(0, t.forced_from, t.forced_to);
    if (k != NONE && owns(k)) taken[(u32)k] = argmax[(u32)k];
  }
  for (u32 r = threadIdx.x; r < t.rows; r += blockDim.x)
    if (taken[r] != NO_TOKEN) tokens[positions[r]] = taken[r];
  __syncthreads();

  auto ends = [&](u32 token) {
    bool yes = false;
    for (u32 i = 0; i < a.ends; i++) yes |= token == a.eos[i];
    return yes;
  };
  u64 end = NONE;
  for (u32 i = t.fill_from + threadIdx.x; i < t.fill_to; i += blockDim.x)
    if (ends(tokens[i])) end = min(end, (u64)i);
  end = block_least(end, part);
  if (end == NONE) return;
  for (u32 i = (u32)end + 1 + threadIdx.x; i < t.fill_to; i += blockDim.x) tokens[i] = a.eos[0];
}
