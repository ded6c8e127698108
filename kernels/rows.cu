#include "rt/gpu.cuh"
KERNEL(rms_norm, RmsNorm, 256) {
  GPU_SMEM(float, part, [32]);
  const float* x = a.x + (size_t)blockIdx.x * a.d;
  float s = 0;
  for (u32 i = threadIdx.x; i < a.d; i += blockDim.x) s += x[i] * x[i];
  s = block_sum(s, part);
  const float f = rsqrtf(s / a.d + a.eps);
  for (u32 i = threadIdx.x; i < a.d; i += blockDim.x) a.y[(size_t)blockIdx.x * a.d + i] = gpu::to_bf16(x[i] * f * a.w[i]);
}
