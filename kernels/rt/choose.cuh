// How a block picks among the values of a row: a walk over it, the cut behind the smallest keys of a given weight, and a draw in
// proportion to weights. Weights are integers, so no order of summation can change a bit.
#pragma once
typedef unsigned long long weight_t;

constexpr u32 NO_TOKEN = 0xffffffffu;

// Which values of a row of n a thread visits: quads if rows keep them aligned, else single values. Each warp has a run of them to
// itself, so that the sums of warps are those of ids in order.
struct Walk {
  u32 n;
  u32 wide;  // 4 or 1
  u32 run;   // units of a warp
  __device__ __forceinline__ explicit Walk(u32 n) : n(n), wide(n % 4 ? 1 : 4) {
    const u32 warps = blockDim.x / 32;
    run = (n / wide + warps * 32 - 1) / (warps * 32) * 32;
  }
  __device__ __forceinline__ u32 first(u32 warp) const { return min(warp * run, n / wide); }
  __device__ __forceinline__ u32 warp_of(u32 id) const { return id / wide / run; }

  // f(id, x[id]) for what the thread visits, several loads in flight.
  template <class F>
  __device__ __forceinline__ void each(const float* x, F f) const {
    const u32 warp = threadIdx.x / 32, end = first(warp + 1);
    u32 i = first(warp) + threadIdx.x % 32;
    if (wide == 4) {
      const float4* quads = reinterpret_cast<const float4*>(x);
      auto visit = [&](u32 at, const float4& v) { f(at * 4, v.x), f(at * 4 + 1, v.y), f(at * 4 + 2, v.z), f(at * 4 + 3, v.w); };
      for (; i + 96 < end; i += 128) {
        float4 v[4];
        GPU_UNROLL for (int j = 0; j < 4; j++) v[j] = quads[i + j * 32];
        GPU_UNROLL for (int j = 0; j < 4; j++) visit(i + j * 32, v[j]);
      }
      for (; i < end; i += 32) visit(i, quads[i]);
    } else {
#pragma unroll 8
      for (; i < end; i += 32) f(i, x[i]);
    }
  }
};

DEVICE weight_t shuffle_up(weight_t v, int by) {
  const u32 lo = __shfl_up_sync(FULL, (u32)v, by), hi = __shfl_up_sync(FULL, (u32)(v >> 32), by);
  return lo | (weight_t)hi << 32;
}

// The upper half of a product.
DEVICE u64 mul_high(u64 a, u64 b) {
  const u64 a0 = (u32)a, a1 = a >> 32, b0 = (u32)b, b1 = b >> 32, mid = a1 * b0 + (a0 * b0 >> 32), low = a0 * b1 + (u32)mid;
  return a1 * b1 + (mid >> 32) + (low >> 32);
}

struct Choice {
  weight_t warp[33];  // sums of the warps before, and of all
  weight_t rest;
  u32 at;
};

// Sum of v over the threads before, and over all in `total`. A barrier stands at its begin, none at its end.
DEVICE weight_t block_scan(weight_t v, Choice& c, weight_t& total) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  weight_t upto = v;
  GPU_UNROLL for (int o = 1; o < 32; o *= 2) {
    const weight_t below = shuffle_up(upto, o);
    if (lane >= (u32)o) upto += below;
  }
  __syncthreads();
  if (lane == 31) c.warp[warp] = upto;
  __syncthreads();
  if (threadIdx.x == 0) {
    weight_t sum = 0;
    for (u32 w = 0; w < warps; w++) {
      const weight_t own = c.warp[w];
      c.warp[w] = sum, sum += own;
    }
    c.warp[32] = sum;
  }
  __syncthreads();
  total = c.warp[32];
  return c.warp[warp] + upto - v;
}

// An id drawn in proportion to weight(id, x[id]) by 64 random bits: the first up to which the weights exceed bits / 2^64 of all.
// NO_TOKEN if all weigh nothing. `own` are a thread's summands of its warp's sum of weights.
template <class W>
DEVICE u32 block_draw(const Walk& walk, const float* x, weight_t own, u64 random, Choice& c, W weight) {
  weight_t total;
  block_scan(own, c, total);
  if (total == 0) return NO_TOKEN;
  const weight_t r = mul_high(random, total);
  const u32 warp = threadIdx.x / 32;
  const weight_t before = c.warp[warp], behind = warp + 1 < blockDim.x / 32 ? c.warp[warp + 1] : total;
  if (threadIdx.x % 32 == 0 && before <= r && r < behind) c.at = warp, c.rest = r - before;
  __syncthreads();
  const u32 owner = c.at, end = walk.first(owner + 1);  // the warp's run once more, a unit for each thread of the block
  weight_t rest = c.rest;
  for (u32 unit = walk.first(owner) + threadIdx.x;; unit += blockDim.x) {
    u32 id = unit * walk.wide;
    weight_t w = 0;
    if (unit < end)
      for (u32 i = 0; i < walk.wide; i++) w += weight(id + i, x[id + i]);
    weight_t upto = block_scan(w, c, total);
    if (upto <= rest && rest - upto < w) {
      while ((upto += weight(id, x[id])) <= rest) id++;
      c.at = id;
    }
    if (rest < total) break;
    rest -= total;
  }
  __syncthreads();
  return c.at;
}

constexpr u32 BINS = 4096;

// The smallest key such that the values up to it weigh at least `target` together; all ones if all together weigh less. Keys have
// `bits` bits; key(id, x) may be ~0 for a value that does not take part. Twelve bits a round, each round one walk.
template <class K, class W>
DEVICE u64 block_cut(const Walk& walk, const float* x, u32 bits, weight_t target, weight_t* bins, Choice& c, K key, W weight) {
  u64 prefix = 0;
  for (int shift = (int)(bits + 11) / 12 * 12 - 12; shift >= 0; shift -= 12) {
    for (u32 i = threadIdx.x; i < BINS; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    walk.each(x, [&](u32 id, float v) {
      const u64 k = key(id, v);
      if (k != ~0ull && k >> shift >> 12 == prefix) atomicAdd(&bins[k >> shift & (BINS - 1)], weight(id, v));
    });
    __syncthreads();
    const u32 each = BINS / blockDim.x, first = threadIdx.x * each;
    weight_t own = 0, total;
    for (u32 i = 0; i < each; i++) own += bins[first + i];
    weight_t before = block_scan(own, c, total);
    if (total < target) return ~0ull;  // in the first round only
    if (before < target && target - before <= own) {
      u32 i = 0;
      for (; target - before > bins[first + i]; i++) before += bins[first + i];
      c.at = first + i, c.rest = target - before;
    }
    __syncthreads();
    prefix = prefix << 12 | c.at, target = c.rest;
    const bool whole = target == bins[c.at];
    __syncthreads();
    if (whole) return ((prefix + 1) << shift) - 1;
  }
  return prefix;
}
