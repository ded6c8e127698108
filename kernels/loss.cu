// Losses of rows, and their gradients in place.
//
// A block owns a row and passes over it three times at most: for the largest and the sum of exponentials, which make q from
// then on; for the sums of the loss; and to write the gradient. Threads keep a running maximum and what was summed below it, which
// join like those of a flash attention. The k tokens of kind 5 are put aside (-inf in the row meanwhile), so that the rest is a sum of
// its own and not a difference that cancels. Bound by memory.
#include "rt/gpu.cuh"

namespace loss {
constexpr float LOG2E = 1.44269504f;
constexpr double TAIL_FLOOR = 1e-8, TAIL_LEAST = 1e-6;  // src/backend/train.rs, TAIL
enum Kind { HARD, SOFT, FORWARD_KL, REVERSE_KL, TOTAL_VARIATION, TOP_K, ENTROPY };

// Largest, the lowest place of it, and sums of e = exp((z - max) / tau) and of e (z - max) / tau.
struct Sums {
  float max, e, ez;
  u32 at;
};
DEVICE Sums join(const Sums& x, const Sums& y, float rate) {
  Sums s;
  s.max = fmaxf(x.max, y.max);
  s.at = x.max > y.max || (x.max == y.max && x.at < y.at) ? x.at : y.at;
  if (s.max == -INFINITY) return s.e = s.ez = 0, s;
  const float dx = (x.max - s.max) * rate, dy = (y.max - s.max) * rate, ex = gpu::ex2(dx * LOG2E), ey = gpu::ex2(dy * LOG2E);
  s.e = ex * x.e + ey * y.e;
  s.ez = (x.e > 0 ? ex * (x.ez + dx * x.e) : 0) + (y.e > 0 ? ey * (y.ez + dy * y.e) : 0);
  return s;
}
DEVICE Sums block_join(Sums s, float rate, Sums* part) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const auto lanes = [&] {
    for (int o = 16; o; o >>= 1)
      s = join(s, Sums{__shfl_xor_sync(FULL, s.max, o), __shfl_xor_sync(FULL, s.e, o), __shfl_xor_sync(FULL, s.ez, o), __shfl_xor_sync(FULL, s.at, o)},
               rate);
  };
  lanes();
  if (lane == 0) part[warp] = s;
  __syncthreads();
  s = lane < blockDim.x / 32 ? part[lane] : Sums{-INFINITY, 0, 0, ~0u};
  lanes();
  return s;
}
}  // namespace loss

KERNEL(loss_rows, LossRows, 1024, 1) {
  using namespace loss;
  GPU_SMEM(Sums, part, [32]);
  GPU_SMEM(float, sums, [2][32]);
  GPU_SMEM(float, aside, [1024]);
  float* z = a.logits + (size_t)blockIdx.x * a.vocab;
  const float* p = a.p + (a.has_p ? (size_t)blockIdx.x * a.vocab : 0);
  const u32* ids = a.ids + (size_t)blockIdx.x * a.k;
  const float* top = a.top + (a.has_top ? (size_t)blockIdx.x * a.k : 0);
  const float weight = a.weights[blockIdx.x], rate = a.kind == ENTROPY ? 1.f / a.tau : 1.f;
  const auto each = [&](auto f) {
    for (u32 j = threadIdx.x; j < a.vocab; j += blockDim.x) f(j);
  };
  // Called by all threads; value is the loss as thread 0 has it.
  const auto finish = [&](float value, auto gradient) {
    if (threadIdx.x == 0) a.loss[blockIdx.x] = value;
    each([&](u32 j) { z[j] = weight == 0.f ? 0.f : weight * gradient(j); });
  };

  if (a.kind == TOP_K) {
    for (u32 i = threadIdx.x; i < a.k; i += blockDim.x) aside[i] = z[ids[i]], z[ids[i]] = -INFINITY;
    __syncthreads();
  }
  Sums own{-INFINITY, 0, 0, ~0u};
  each([&](u32 j) {
    const float x = z[j];
    if (x == -INFINITY) return;
    if (x > own.max || x != x) {
      const float d = (own.max - x) * rate, e = gpu::ex2(d * LOG2E);
      if (own.e > 0) own.ez = e * (own.ez + d * own.e), own.e *= e;
      own.max = x, own.at = j;
    }
    const float d = (x - own.max) * rate, e = gpu::ex2(d * LOG2E);
    own.e += e, own.ez += d * e;
  });
  const Sums all = block_join(own, rate, part);
  // ln q and q, without the rounding of a large lse.
  const float log_e = logf(all.e);
  const auto log_of = [&](u32 j) { return (z[j] - all.max) - log_e; };
  const auto prob = [&](u32 j) { return gpu::ex2((z[j] - all.max) * LOG2E) / all.e; };

  if (a.kind == HARD) {
    const u32 id = ids[0];
    const float value = -log_of(id);
    __syncthreads();  // read before it is written
    finish(value, [&](u32 j) { return prob(j) - (j == id ? 1.f : 0.f); });
  } else if (a.kind == ENTROPY) {
    if (all.at != ids[0]) return finish(0.f, [](u32) { return 0.f; });
    const float entropy = log_e - all.ez / all.e;
    finish(entropy, [&](u32 j) {
      const float log_p = (z[j] - all.max) * rate - log_e, q = gpu::ex2(log_p * LOG2E);
      return q > 0 ? -q * (log_p + entropy) * rate : 0.f;
    });
  } else if (a.kind == TOP_K) {
    // The rest of the row, then the k: every thread in the same order.
    float max = all.max, e = all.e;
    double mass = 0, value = 0;
    for (u32 i = 0; i < a.k; i++) max = fmaxf(max, aside[i]);
    e *= all.max == -INFINITY ? 0.f : gpu::ex2((all.max - max) * LOG2E);
    const float rest = e;
    for (u32 i = 0; i < a.k; i++) e += gpu::ex2((aside[i] - max) * LOG2E), mass += top[i];
    const float log_sum = logf(e), q_tail = rest / e;
    for (u32 i = 0; i < a.k; i++)
      if (top[i] != 0.f) value -= double(top[i]) * ((aside[i] - max) - log_sum);
    const double p_tail = 1. - mass;
    const bool counts = a.tail && p_tail >= TAIL_LEAST, moves = counts && q_tail > TAIL_FLOOR;
    if (counts) value -= p_tail * double(logf(fmaxf(q_tail, float(TAIL_FLOOR))));
    // total q - p of what is in the sum, and the tail's own share of the rest.
    const float total = float(mass + (moves ? p_tail : 0.)), share = moves ? float(p_tail) / q_tail : 0.f;
    finish(float(value), [&](u32 j) { return (total - share) * (gpu::ex2((z[j] - max) * LOG2E) / e); });
    __syncthreads();
    for (u32 i = threadIdx.x; i < a.k; i += blockDim.x) {
      const float q = gpu::ex2((aside[i] - max) * LOG2E) / e;
      z[ids[i]] = weight == 0.f ? 0.f : weight * (total * q - top[i]);
    }
  } else {
    // Two sums of a kind: the loss, and what the gradient takes off.
    float value = 0, sum = 0;
    each([&](u32 j) {
      const float log_q = log_of(j), q = prob(j), pj = p[j];
      if (a.kind == SOFT || a.kind == FORWARD_KL) {
        if (pj != 0.f) value += pj * (a.kind == SOFT ? -log_q : logf(pj) - log_q);
        sum += pj;
      } else if (a.kind == REVERSE_KL) {
        if (q > 0) value += q * (log_q - logf(pj));
      } else {
        value += 0.5f * fabsf(q - pj);
        if (q != pj) sum += q > pj ? 0.5f * q : -0.5f * q;
      }
    });
    value = block_sum(value, sums[0]);
    sum = block_sum(sum, sums[1]);
    finish(value, [&](u32 j) {
      const float log_q = log_of(j), q = prob(j), pj = p[j];
      if (a.kind == SOFT || a.kind == FORWARD_KL) return sum * q - pj;
      if (a.kind == REVERSE_KL) return q > 0 ? q * (log_q - logf(pj) - value) : 0.f;
      return q * ((q == pj ? 0.f : q > pj ? 0.5f : -0.5f) - sum);
    });
  }
}

KERNEL(smooth_l1, SmoothL1, 256) {
  GPU_SMEM(float, part, [32]);
  const size_t row = (size_t)blockIdx.x * a.d;
  const float weight = a.weights[blockIdx.x] / float(a.d);
  float sum = 0;
  for (u32 i = threadIdx.x; i < a.d; i += 256) {
    const float e = a.x[row + i] - a.target[row + i], size = fabsf(e);
    sum += size < 1.f ? 0.5f * e * e : size - 0.5f;
    a.dx[row + i] = weight * fminf(fmaxf(e, -1.f), 1.f);
  }
  sum = block_sum(sum, part);
  if (threadIdx.x == 0) a.loss[blockIdx.x] = sum / float(a.d);
}
