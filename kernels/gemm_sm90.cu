// y[r, o] = sum_i w[o, i] x[r, i] + bias[o] for many rows on Hopper: warpgroup products fed by the copy engine.
//
// A block stays on its multiprocessor and walks over output tiles of 128 rows x N outputs, all row tiles of one stretch of outputs
// first, so that weights are read from memory once. Of its three warpgroups the last only starts copies: one thread keeps a ring
// of stages, 64 inputs of x and of w each, filled as far ahead as the ring is long, also across tiles. The other two own 64 rows
// each and multiply straight from shared memory, D[64 rows][N outputs], one chain over the inputs. Bound by the tensor cores.
//
// A row's bits do not depend on the other rows, but they are not those of gemv.cu and gemm.cu: those add eight slices.
#include "rt/gpu.cuh"

#if GPU_HOPPER
template <int N, u32 STAGES>
DEVICE void product_sm90(const LinearMapped& a) {
  constexpr u32 ROWS = 128, DEPTH = 64;
  constexpr u32 X = ROWS * DEPTH * 2, W = N * DEPTH * 2, STAGE = X + W;  // bytes; multiples of 1024 as the swizzle wants
  GPU_DYN_SMEM(unsigned char, smem);  // [STAGES][x, w], then the barriers: nothing stands before it
  uint64_t *full = reinterpret_cast<uint64_t*>(smem + STAGES * STAGE), *empty = full + STAGES;
  const auto* x_map = reinterpret_cast<const gpu::TensorMap*>(a.x_map.p);
  const auto* w_map = reinterpret_cast<const gpu::TensorMap*>(a.w_map.p);
  const u32 row_tiles = (a.rows + ROWS - 1) / ROWS, tiles = row_tiles * ((a.outputs + N - 1) / N);
  const u32 depth = (a.inputs + DEPTH - 1) / DEPTH, lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < STAGES; i++) {
      gpu::mbar_init(&full[i], 1);
      gpu::mbar_init(&empty[i], 8);  // the consumers' warps
    }
    gpu::fence_mbar_init();
  }
  __syncthreads();

  u32 step = 0;  // stages of the ring so far, over all tiles
  if (threadIdx.x >= 256) {
    gpu::reg_dealloc<40>();
    if (threadIdx.x != 256) return;
    gpu::tma_prefetch(x_map);
    gpu::tma_prefetch(w_map);
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x)
      for (u32 k = 0; k < depth; k++, step++) {
        const u32 at = step % STAGES;
        unsigned char* s = smem + at * STAGE;
        gpu::mbar_wait(&empty[at], (step / STAGES & 1) ^ 1);
        gpu::mbar_arrive_expect_tx(&full[at], STAGE);  // what lies outside the matrices comes as zeros
        gpu::tma_load_2d(s, x_map, &full[at], int(k * DEPTH), int(tile % row_tiles * ROWS));
        gpu::tma_load_2d(s + X, w_map, &full[at], int(k * DEPTH), int(tile / row_tiles * N));
      }
    return;
  }
  gpu::reg_alloc<232>();
  const auto release = [&](u32 of) {
    __syncwarp();
    if (lane == 0) gpu::mbar_arrive(&empty[of % STAGES]);
  };
  const u32 group = threadIdx.x >> 7, g = lane >> 2, t = lane & 3;
  float d[N / 2];
  for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (u32 k = 0; k < depth; k++, step++) {
      const unsigned char *x = smem + step % STAGES * STAGE + group * (X / 2), *w = smem + step % STAGES * STAGE + X;
      gpu::mbar_wait(&full[step % STAGES], step / STAGES & 1);
      gpu::wgmma_fence();
      GPU_UNROLL for (u32 i = 0; i < DEPTH / 16; i++)
        gpu::wgmma_bf16<N>(d, gpu::wgmma_desc(x + i * 32, 16, 1024), gpu::wgmma_desc(w + i * 32, 16, 1024), k + i > 0);
      gpu::wgmma_commit();
      // The products of the stage before are done: it may be filled again.
      gpu::wgmma_wait<1>();
      if (k) release(step - 1);
    }
    gpu::wgmma_wait<0>(d);
    release(step - 1);
    const u32 row0 = tile % row_tiles * ROWS + (threadIdx.x >> 5) * 16 + g, out0 = tile / row_tiles * N + 2 * t;
    GPU_UNROLL for (u32 n = 0; n < N / 8; n++) {
      const u32 out = out0 + 8 * n;
      const float b0 = a.has_bias && out < a.outputs ? a.bias[out] : 0.f;
      const float b1 = a.has_bias && out + 1 < a.outputs ? a.bias[out + 1] : 0.f;
      GPU_UNROLL for (u32 i = 0; i < 2; i++) {
        const u32 row = row0 + 8 * i;
        if (row >= a.rows || out >= a.outputs) continue;
        float* y = a.y + (size_t)row * a.outputs + out;
        const float y0 = d[4 * n + 2 * i] + b0, y1 = d[4 * n + 2 * i + 1] + b1;
        if (a.outputs % 2 == 0) {
          *reinterpret_cast<float2*>(y) = make_float2(y0, y1);
        } else {
          y[0] = y0;
          if (out + 1 < a.outputs) y[1] = y1;
        }
      }
    }
  }
}
#define PRODUCT_SM90(name, N, STAGES) \
  KERNEL(name, LinearMapped, 384, 1) { product_sm90<N, STAGES>(a); }
#else
#define PRODUCT_SM90(name, N, STAGES) \
  KERNEL(name, LinearMapped, 384, 1) { (void)a; }
#endif
PRODUCT_SM90(gemm_bf16_sm90_128, 128, 6)
PRODUCT_SM90(gemm_bf16_sm90_256, 256, 4)
