// What each function of rt/hw.cuh means, one small kernel for each. emu/test/test_selftest.cpp knows what must come out, and runs
// them on the emulator or, given a compiled image, on a GPU: equal results are the proof that the two agree.
#include "rt/gpu.cuh"

// d = c + a b, all row after row except b, which is given as its transpose. which: 0 bf16, 1 f16, 2 bf16 without c.
struct StMma {
  const uint16_t *a, *bt;
  const float* c;
  float* d;
  int which;
};
KERNEL(st_mma, StMma, 32) {
  const int l = threadIdx.x, g = l / 4, t = l % 4 * 2;
  uint32_t x[4], y[2];
  float c[4];
  for (int i = 0; i < 4; i++) {
    const uint16_t* p = a.a + (g + (i & 1) * 8) * 16 + t + (i >> 1) * 8;
    x[i] = p[0] | (uint32_t)p[1] << 16;
  }
  for (int i = 0; i < 2; i++) {
    const uint16_t* p = a.bt + g * 16 + t + i * 8;
    y[i] = p[0] | (uint32_t)p[1] << 16;
  }
  for (int i = 0; i < 4; i++) c[i] = a.c[(g + (i >> 1) * 8) * 8 + t + (i & 1)];
  if (a.which == 0) gpu::mma_bf16(c, x, y[0], y[1]);
  else if (a.which == 1) gpu::mma_f16(c, x, y[0], y[1]);
  else gpu::mma_bf16_first(c, x, y[0], y[1]);
  for (int i = 0; i < 4; i++) a.d[(g + (i >> 1) * 8) * 8 + t + (i & 1)] = c[i];
}

// out[lane][8]: the registers of ldmatrix_x4 and of ldmatrix_x4_trans on a [32][8] tile of 0, 1, 2, ...
struct StOut {
  uint32_t* out;
};
KERNEL(st_ldmatrix, StOut, 32) {
  GPU_SMEM(uint16_t, tile, [32][8]);
  for (int i = 0; i < 8; i++) tile[threadIdx.x][i] = (uint16_t)(threadIdx.x * 8 + i);
  __syncwarp();
  uint32_t r[4], s[4];
  gpu::ldmatrix_x4(r, tile[threadIdx.x]);
  gpu::ldmatrix_x4_trans(s, tile[threadIdx.x]);
  for (int i = 0; i < 4; i++) a.out[threadIdx.x * 8 + i] = r[i], a.out[threadIdx.x * 8 + 4 + i] = s[i];
}

// out[thread][24], two warps.
KERNEL(st_warp, StOut, 64) {
  const int l = threadIdx.x & 31;
  uint32_t* o = a.out + threadIdx.x * 24;
  o[0] = __shfl_sync(~0u, l * 10, l / 2);
  o[1] = __shfl_xor_sync(~0u, l, 5);
  o[2] = __shfl_down_sync(~0u, l, 3);
  o[3] = __shfl_up_sync(~0u, l, 3);
  o[4] = __shfl_down_sync(~0u, l, 5, 8);
  o[5] = __shfl_xor_sync(~0u, l, 24, 8);
  o[6] = __ballot_sync(~0u, l % 3 == 0);
  o[7] = __any_sync(~0u, l == 31) + 2 * __all_sync(~0u, l < 32) + 4 * __any_sync(~0u, l == 32) + 8 * __all_sync(~0u, l != 7);
  if (l < 16) o[8] = __shfl_xor_sync(0xffffu, l, 8);
  else o[8] = __shfl_xor_sync(0xffff0000u, l, 1);
  const unsigned long long wide = __shfl_xor_sync(~0u, (unsigned long long)l << 40 | l, 1);
  o[9] = (uint32_t)wide, o[10] = (uint32_t)(wide >> 32);
  const double real = __shfl_down_sync(~0u, 1.5 * l, 2);
  o[11] = (uint32_t)(real * 2);
  const unsigned u = 0x80000000u * (l & 1) + l;
  o[12] = __reduce_add_sync(~0u, u), o[13] = __reduce_min_sync(~0u, u), o[14] = __reduce_max_sync(~0u, u);
  o[15] = __reduce_min_sync(~0u, l - 9), o[16] = __reduce_max_sync(~0u, l - 9), o[17] = __reduce_add_sync(~0u, l - 9);
  o[18] = __reduce_and_sync(~0u, u | 0x10), o[19] = __reduce_or_sync(~0u, u), o[20] = __reduce_xor_sync(~0u, u);
  o[21] = __match_any_sync(~0u, (unsigned)l % 5);
  if (l >= 8) o[22] = __reduce_add_sync(0xffffff00u, (unsigned)l);
  else o[22] = 0;
  o[23] = __popc(l) + 100 * __ffs(l) + 10000 * __clz(l);
}

// cp_async16 of the first n threads, zeros for the others; out is the tile shifted by four words.
struct StCopy {
  const uint32_t* in;
  uint32_t* out;
  int n;
};
KERNEL(st_cp, StCopy, 32) {
  GPU_SMEM(uint32_t, s, [32 * 4]);
  gpu::cp_async16(&s[threadIdx.x * 4], a.in + threadIdx.x * 4, (int)threadIdx.x < a.n);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; i++) a.out[threadIdx.x * 4 + i] = s[(threadIdx.x * 4 + i + 4) % 128];
}

// bar_sync: warps 0 and 1, and warps 2 and 3, run pipelines of their own. out[4][128].
KERNEL(st_bar, StOut, 128) {
  GPU_SMEM(uint32_t, s, [128]);
  const int t = threadIdx.x, half = t / 64;
  for (int i = 0; i < 4; i++) {
    s[t] = t * 10 + i;
    gpu::bar_sync(1 + half, 64);
    a.out[i * 128 + t] = s[half * 64 + (t + 1) % 64];
    gpu::bar_sync(1 + half, 64);
  }
}
// bar_arrive: warp 0 makes numbers, warp 1 takes them. out[4][32].
KERNEL(st_arrive, StOut, 64) {
  GPU_SMEM(uint32_t, s, [2][32]);
  const int l = threadIdx.x & 31;
  if (threadIdx.x < 32) {
    for (int i = 0; i < 4; i++) {
      if (i >= 2) gpu::bar_sync(3 + (i & 1), 64);  // the buffer is free again
      s[i & 1][l] = l * 10 + i;
      gpu::bar_arrive(1 + (i & 1), 64);
    }
  } else {
    for (int i = 0; i < 4; i++) {
      gpu::bar_sync(1 + (i & 1), 64);
      a.out[i * 32 + l] = s[i & 1][(l + 1) % 32];
      if (i < 2) gpu::bar_arrive(3 + (i & 1), 64);
    }
  }
}

// Numbers. in[32] words, out[32][12].
KERNEL(st_numbers, StCopy, 32) {
  const uint32_t w = a.in[threadIdx.x], next = a.in[(threadIdx.x + 1) % 32];
  uint32_t* o = a.out + threadIdx.x * 12;
  const auto bits = [](bf16_t v) { return (uint32_t)*reinterpret_cast<uint16_t*>(&v); };
  const auto half = [](uint32_t v) {
    uint16_t h = (uint16_t)v;
    return *reinterpret_cast<f16_t*>(&h);
  };
  o[0] = bits(gpu::to_bf16(__uint_as_float(w)));
  o[1] = gpu::pack_bf16(__uint_as_float(w), __uint_as_float(next));
  o[2] = __float_as_uint(gpu::f16_low(w));
  o[3] = __float_as_uint(gpu::f16_high(w));
  o[4] = __float_as_uint(gpu::to_f32(half(w)));
  o[5] = gpu::fma_bf16x2(0x3fc04049u, 0x40003e99u, 0x3f803f81u);  // by lane-independent constants
  o[6] = (uint32_t)__dp4a((int)w, (int)next, 7);
  o[7] = __dp4a(w, next, 7u);
  o[8] = __umulhi(w, next);
  o[9] = __float_as_uint(gpu::ex2((float)((int)threadIdx.x - 16)));
  o[10] = __float_as_uint(gpu::as_f32(w));
  o[11] = __popcll((unsigned long long)w << 32 | next);
}

// Loads of every kind: out[lane][20] from in[32 * 4].
KERNEL(st_loads, StCopy, 32) {
  GPU_SMEM(uint4, s, [32]);
  const uint32_t* p = a.in + threadIdx.x * 4;
  uint32_t* o = a.out + threadIdx.x * 20;
  gpu::prefetch_l2(p);
  const uint4 x = gpu::load16(p), y = gpu::stream16(p);
  const uint2 z = gpu::load8(p + 2), w = gpu::stream8(p + 2);
  s[threadIdx.x] = __ldg(reinterpret_cast<const uint4*>(p));
  __syncwarp();
  const uint4 q = gpu::shared16(&s[31 - threadIdx.x]);
  const uint2 h = gpu::shared8(&s[threadIdx.x]);
  o[0] = x.x, o[1] = x.y, o[2] = x.z, o[3] = x.w;
  o[4] = y.x, o[5] = y.y, o[6] = y.z, o[7] = y.w;
  o[8] = z.x, o[9] = z.y, o[10] = w.x, o[11] = w.y;
  o[12] = q.x, o[13] = q.y, o[14] = q.z, o[15] = q.w;
  o[16] = h.x, o[17] = h.y;
  __stcs(o + 18, __ldcs(p));
  __stcg(o + 19, gpu::load4(p + 1));
}

// A cooperative launch: each block writes, all meet, each reads its neighbour's; three times. out[3][gridDim]; state[0] begins as 0.
struct StGrid {
  uint32_t *state, *slots, *out;
};
KERNEL(st_grid, StGrid, 64) {
  for (int i = 0; i < 3; i++) {
    if (threadIdx.x == 5) a.slots[blockIdx.x] = blockIdx.x * 10 + i;
    gpu::grid_sync(a.state);
    if (threadIdx.x == 9) a.out[i * gridDim.x + blockIdx.x] = a.slots[(blockIdx.x + 1) % gridDim.x];
    gpu::grid_sync(a.state);
  }
}
// The last block to come adds up what all have written. slots[gridDim], out[1]; state[0] begins as 0.
KERNEL(st_last, StGrid, 64) {
  GPU_SMEM(uint32_t, last, [1]);
  if (threadIdx.x == 40) a.slots[blockIdx.x] = blockIdx.x + 1;
  __syncthreads();
  if (threadIdx.x == 0) last[0] = gpu::atomic_add_acq_rel(a.state, 1) == gridDim.x - 1;
  __syncthreads();
  if (last[0] && threadIdx.x == 1) {
    uint32_t sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += a.slots[i];
    a.out[0] = sum;
  }
}
