// Kernels that pin down what each wrapper in gpu.cuh means. Run them on the emulator in CI and, whenever there is a GPU, on the
// GPU: equal outputs are the proof that emulator and hardware agree (the reference values are computed in selftest.cpp / Rust).
#include "rt/gpu.cuh"
// one warp: D[16][8] = A[16][16] * B[16][8] + C, B given as Bt[8][16]; f16 != 0 selects half
extern "C" __global__ void st_mma(const uint16_t* A, const uint16_t* Bt, const float* C, float* D, int f16) {
  const int l = threadIdx.x, g = l / 4, t = l % 4 * 2; uint32_t a[4], b[2]; float c[4];
  for (int i = 0; i < 4; i++) { const uint16_t* p = A + (g + (i & 1) * 8) * 16 + t + (i >> 1) * 8; a[i] = p[0] | (uint32_t)p[1] << 16; }
  for (int i = 0; i < 2; i++) { const uint16_t* p = Bt + g * 16 + t + i * 8; b[i] = p[0] | (uint32_t)p[1] << 16; }
  for (int i = 0; i < 4; i++) c[i] = C[(g + (i >> 1) * 8) * 8 + t + (i & 1)];
  if (f16) gpu::mma_f16(c, a, b[0], b[1]); else gpu::mma_bf16(c, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) D[(g + (i >> 1) * 8) * 8 + t + (i & 1)] = c[i];
}
GPU_EXPORT(st_mma)
// out[lane][8]: registers of ldmatrix.x4 and ldmatrix.x4.trans on a 32x8 b16 tile holding 0..255
extern "C" __global__ void st_ldmatrix(uint32_t* out) {
  GPU_SMEM(uint16_t, tile, [32][8]);
  for (int i = 0; i < 8; i++) tile[threadIdx.x][i] = (uint16_t)(threadIdx.x * 8 + i);
  __syncwarp();
  uint32_t r[4], s[4]; gpu::ldmatrix_x4(r, tile[threadIdx.x]); gpu::ldmatrix_x4_trans(s, tile[threadIdx.x]);
  for (int i = 0; i < 4; i++) { out[threadIdx.x * 8 + i] = r[i]; out[threadIdx.x * 8 + 4 + i] = s[i]; }
}
GPU_EXPORT(st_ldmatrix)
extern "C" __global__ void st_warp(int* out) {
  const int l = threadIdx.x & 31; int* o = out + threadIdx.x * 8;
  o[0] = __shfl_sync(~0u, l * 10, l / 2); o[1] = __shfl_xor_sync(~0u, l, 5); o[2] = __shfl_down_sync(~0u, l, 3); o[3] = __shfl_up_sync(~0u, l, 3);
  o[4] = __shfl_down_sync(~0u, l, 5, 8); o[5] = (int)__ballot_sync(~0u, l % 3 == 0); o[6] = __any_sync(~0u, l == 31) + 2 * __all_sync(~0u, l < 32);
  if (l < 16) o[7] = __shfl_xor_sync(0xffffu, l, 8); else o[7] = __shfl_xor_sync(0xffff0000u, l, 1);
}
GPU_EXPORT(st_warp)
extern "C" __global__ void st_cp(const uint32_t* in, uint32_t* out, int n) {
  GPU_SMEM(uint32_t, s, [32 * 4]);
  gpu::cp_async16(&s[threadIdx.x * 4], in + threadIdx.x * 4, (int)threadIdx.x < n); gpu::cp_async_commit(); gpu::cp_async_wait<0>(); __syncthreads();
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = s[(threadIdx.x * 4 + i + 4) % 128];
}
GPU_EXPORT(st_cp)
// named barrier: warps 0-1 and warps 2-3 run separate pipelines of their own
extern "C" __global__ void st_bar(int* out) {
  GPU_SMEM(int, s, [128]);
  const int t = threadIdx.x, half = t / 64;
  for (int i = 0; i < 4; i++) {
    s[t] = t * 10 + i; gpu::bar_sync(1 + half, 64);
    out[i * 128 + t] = s[half * 64 + (t + 1) % 64]; gpu::bar_sync(1 + half, 64);
  }
}
GPU_EXPORT(st_bar)
