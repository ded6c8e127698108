// Reductions of a warp and of a block, in an order that only the shape fixes.
#pragma once
constexpr unsigned FULL = 0xffffffffu;

DEVICE float warp_sum(float v) {
  GPU_UNROLL for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
  return v;
}
DEVICE float warp_max(float v) {
  GPU_UNROLL for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, o));
  return v;
}
// Sum over a block of at most 1024 threads, given to every thread. `part` holds a float for each warp; it may be used again
// behind the next barrier.
DEVICE float block_sum(float v, float* part) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  v = warp_sum(v);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? part[lane] : 0.f);
}
// Greatest over a block, alike.
DEVICE float block_max(float v, float* part) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  v = warp_max(v);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  return warp_max(lane < warps ? part[lane] : -INFINITY);
}
