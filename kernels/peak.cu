// The roof of arithmetic: mma.sync m16n8k16 in bf16 from registers, eight independent chains a warp, 256 threads a block. Hopper's
// warpgroup products reach about half as much again.
#include "rt/gpu.cuh"

KERNEL(mma_peak, MmaPeak, 256) {
  // Small enough that sums stay finite, and known only at run time.
  const u32 one = gpu::pack_bf16(1.f / float(a.steps), 1.f / float(a.steps));
  const u32 weights[4] = {one, one, one, one};
  float sums[8][4] = {};
  for (u32 step = 0; step < a.steps; step++) {
    GPU_UNROLL for (int i = 0; i < 8; i++) gpu::mma_bf16(sums[i], weights, one, one);
  }
  float total = 0.f;
  GPU_UNROLL for (int i = 0; i < 8; i++) total += sums[i][0] + sums[i][1] + sums[i][2] + sums[i][3];
  a.y[blockIdx.x * 256 + threadIdx.x] = total;
}
