// What each function of rt/hopper.cuh means. See selftest.cu.
#include "rt/gpu.cuh"

// mbarriers: two warps pass numbers through one slot, four times, each phase waited for by its parity. out[4][32].
struct StHopper {
  uint32_t* out;
};
KERNEL(st_mbarrier, StHopper, 64) {
#if GPU_HOPPER
  GPU_SMEM(uint64_t, bars, [2]);
  GPU_SMEM(uint32_t, slot, [32]);
  uint64_t *full = &bars[0], *empty = &bars[1];
  const int l = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    gpu::mbar_init(full, 32);
    gpu::mbar_init(empty, 32);
    gpu::fence_mbar_init();
  }
  __syncthreads();
  for (uint32_t i = 0; i < 4; i++) {
    if (threadIdx.x < 32) {
      gpu::mbar_wait(empty, (i & 1) ^ 1);  // the phase before the first counts as complete
      slot[l] = l * 10 + i;
      gpu::mbar_arrive(full);
    } else {
      while (!gpu::mbar_test(full, i & 1)) {
      }
      a.out[i * 32 + l] = slot[(l + 1) % 32];
      gpu::mbar_arrive(empty);
    }
  }
#else
  (void)a;
#endif
}

// bulk_load of two pieces onto one mbarrier. out[n], n a multiple of 8, at most 512.
struct StBulk {
  const uint32_t* in;
  uint32_t* out;
  uint32_t n;
};
KERNEL(st_bulk, StBulk, 32) {
#if GPU_HOPPER
  GPU_SMEM(uint64_t, bar, [1]);
  GPU_SMEM(uint4, s, [128]);
  if (threadIdx.x == 0) {
    gpu::mbar_init(bar, 2);
    gpu::fence_mbar_init();
    const uint32_t half = a.n / 2 * 4;
    gpu::mbar_arrive_expect_tx(bar, half);
    gpu::bulk_load(s, a.in, half, bar);
    gpu::bulk_load(s + half / 16, a.in + a.n / 2, half, bar);
    gpu::mbar_expect_tx(bar, half);
    gpu::mbar_arrive(bar);
  }
  __syncthreads();
  gpu::mbar_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < a.n; i += 32) a.out[i] = reinterpret_cast<const uint32_t*>(s)[i];
#else
  (void)a;
#endif
}

// A box of a tensor as it lies in shared memory. rank 2 or 3; out[words].
struct StTensor {
  gpu::TensorMap map;
  uint32_t* out;
  uint32_t words;
  int rank, x, y, z;
};
KERNEL(st_tensor, StTensor, 64) {
#if GPU_HOPPER
  GPU_DYN_SMEM(uint32_t, s);  // the barrier stands behind the box: nothing before it, so that it begins at a multiple of 1024
  uint64_t* bar = reinterpret_cast<uint64_t*>(s + a.words);
  if (threadIdx.x == 0) {
    gpu::tma_prefetch(&a.map);
    gpu::mbar_init(bar, 1);
    gpu::fence_mbar_init();
    gpu::mbar_arrive_expect_tx(bar, a.words * 4);
    if (a.rank == 2) gpu::tma_load_2d(s, &a.map, bar, a.x, a.y);
    else gpu::tma_load_3d(s, &a.map, bar, a.x, a.y, a.z);
  }
  __syncthreads();
  gpu::mbar_wait(bar, 0);
  for (uint32_t i = threadIdx.x; i < a.words; i += 64) a.out[i] = s[i];
#else
  (void)a;
#endif
}

// d[64][N] = c + a b, a [64][64], b [64][N], from operands that threads have laid out with the 128-byte swizzle: rows of 64
// elements along k, or (transposed) along m and n. c is the first half of the products, added up twice.
struct StWgmma {
  const uint16_t* a;   // [64][64], row after row
  const uint16_t* bt;  // [N][64], the transpose of b
  float* d;
};
#if GPU_HOPPER
// Byte of element (row, column) of rows of 64 elements of 16 bits, columns beyond 64 in further tiles of `rows` rows.
DEVICE uint32_t swizzle128(int row, int column, int rows) {
  return column / 64 * rows * 128 + row * 128 + ((column % 64 * 2) ^ ((row & 7) << 4));
}
template <int N, bool TRANS_B, bool TRANS_A, bool REGS>
DEVICE void wgmma_test(const StWgmma& a, unsigned char* s) {
  unsigned char *sa = s, *sb = s + 64 * 128;
  const int t = threadIdx.x;
  for (int i = t; i < 64 * 64; i += 128) {
    const int m = i / 64, k = i % 64;
    *reinterpret_cast<uint16_t*>(sa + (TRANS_A ? swizzle128(k, m, 64) : swizzle128(m, k, 64))) = a.a[i];
  }
  for (int i = t; i < N * 64; i += 128) {
    const int n = i / 64, k = i % 64;
    *reinterpret_cast<uint16_t*>(sb + (TRANS_B ? swizzle128(k, n, 64) : swizzle128(n, k, N))) = a.bt[i];
  }
  gpu::fence_proxy_async();
  __syncthreads();
  // Sixteen further along k: 32 bytes in rows along k, sixteen rows otherwise.
  const auto da = [&](int k) { return gpu::wgmma_desc(sa + (TRANS_A ? k * 128 : k * 2), 8192, 1024); };
  const auto db = [&](int k) { return gpu::wgmma_desc(sb + (TRANS_B ? k * 128 : k * 2), 8192, 1024); };
  const int g = t / 4 % 8 + t / 32 * 16, c = t % 4 * 2;
  float d[N / 2];
  GPU_UNROLL for (int i = 0; i < N / 2; i++) d[i] = 1000.f;  // must not be added: the first product begins anew
  uint32_t x[4][4];
  GPU_UNROLL for (int k = 0; k < 4; k++) {
    GPU_UNROLL for (int i = 0; i < 4; i++) {
      const uint16_t* p = a.a + (g + (i & 1) * 8) * 64 + k * 16 + c + (i >> 1) * 8;
      x[k][i] = p[0] | (uint32_t)p[1] << 16;
    }
  }
  const auto product = [&](int k, bool accumulate) {
    if constexpr (REGS) gpu::wgmma_bf16<N, TRANS_B>(d, x[k], db(k * 16), accumulate);
    else gpu::wgmma_bf16<N, TRANS_B, TRANS_A>(d, da(k * 16), db(k * 16), accumulate);
  };
  gpu::wgmma_fence();
  GPU_UNROLL for (int k = 0; k < 4; k++) product(k, k > 0);
  gpu::wgmma_commit();
  gpu::wgmma_wait<0>(d);
  GPU_UNROLL for (int i = 0; i < N / 2; i++) d[i] += 0.5f;
  gpu::wgmma_fence();
  GPU_UNROLL for (int k = 0; k < 2; k++) product(k, true);
  gpu::wgmma_commit();
  gpu::wgmma_wait<0>(d);
  GPU_UNROLL for (int i = 0; i < N / 2; i++) a.d[(g + (i >> 1 & 1) * 8) * N + i / 4 * 8 + c + (i & 1)] = d[i];
}
#define ST_WGMMA(name, ...)         \
  KERNEL(name, StWgmma, 128) {      \
    GPU_DYN_SMEM(unsigned char, s); \
    wgmma_test<__VA_ARGS__>(a, s);  \
  }
#else
#define ST_WGMMA(name, ...) \
  KERNEL(name, StWgmma, 128) { (void)a; }
#endif
ST_WGMMA(st_wgmma_32, 32, false, false, false)
ST_WGMMA(st_wgmma_64, 64, false, false, false)
ST_WGMMA(st_wgmma_96, 96, false, false, false)
ST_WGMMA(st_wgmma_128, 128, false, false, false)
ST_WGMMA(st_wgmma_160, 160, false, false, false)
ST_WGMMA(st_wgmma_192, 192, false, false, false)
ST_WGMMA(st_wgmma_256, 256, false, false, false)
ST_WGMMA(st_wgmma_64_tb, 64, true, false, false)
ST_WGMMA(st_wgmma_128_tb, 128, true, false, false)
ST_WGMMA(st_wgmma_256_tb, 256, true, false, false)
ST_WGMMA(st_wgmma_64_ta, 64, false, true, false)
ST_WGMMA(st_wgmma_128_ta_tb, 128, true, true, false)
ST_WGMMA(st_wgmma_64_regs, 64, false, false, true)
ST_WGMMA(st_wgmma_96_regs, 96, false, false, true)
ST_WGMMA(st_wgmma_128_regs_tb, 128, true, false, true)
ST_WGMMA(st_wgmma_256_regs_tb, 256, true, false, true)

// All of it together: one warpgroup fetches tiles of a and b through the copy engine into a ring of three, another multiplies.
// d[64][64] = a[64][k] b[64][k]^T, k a multiple of 64.
struct StPipeline {
  gpu::TensorMap a, b;
  float* d;
  uint32_t k;
};
KERNEL(st_pipeline, StPipeline, 256, 1) {
#if GPU_HOPPER
  constexpr int STAGES = 3, TILE = 64 * 128;
  GPU_DYN_SMEM(unsigned char, s);
  uint64_t *full = reinterpret_cast<uint64_t*>(s + STAGES * 2 * TILE), *empty = full + STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      gpu::mbar_init(&full[i], 1);
      gpu::mbar_init(&empty[i], 128);
    }
    gpu::fence_mbar_init();
  }
  __syncthreads();
  const uint32_t tiles = a.k / 64;
  if (threadIdx.x >= 128) {
    gpu::reg_dealloc<24>();
    if (threadIdx.x == 128) {
      for (uint32_t i = 0; i < tiles; i++) {
        const uint32_t at = i % STAGES, round = i / STAGES;
        gpu::mbar_wait(&empty[at], (round & 1) ^ 1);
        gpu::mbar_arrive_expect_tx(&full[at], 2 * TILE);
        gpu::tma_load_2d(s + at * 2 * TILE, &a.a, &full[at], int(i * 64), 0);
        gpu::tma_load_2d(s + at * 2 * TILE + TILE, &a.b, &full[at], int(i * 64), 0);
      }
    }
  } else {
    gpu::reg_alloc<240>();
    float d[32];
    GPU_UNROLL for (int i = 0; i < 32; i++) d[i] = 0;
    for (uint32_t i = 0; i < tiles; i++) {
      const uint32_t at = i % STAGES, round = i / STAGES;
      gpu::mbar_wait(&full[at], round & 1);
      const unsigned char *x = s + at * 2 * TILE, *y = x + TILE;
      gpu::wgmma_fence();
      GPU_UNROLL for (int k = 0; k < 4; k++)
        gpu::wgmma_bf16<64>(d, gpu::wgmma_desc(x + k * 32, 16, 1024), gpu::wgmma_desc(y + k * 32, 16, 1024), true);
      gpu::wgmma_commit();
      // The products of the tile before are done: its buffers may be filled again.
      gpu::wgmma_wait<1>(d);
      if (i) gpu::mbar_arrive(&empty[(i - 1) % STAGES]);
    }
    gpu::wgmma_wait<0>(d);
    const int g = threadIdx.x / 4 % 8 + threadIdx.x / 32 * 16, c = threadIdx.x % 4 * 2;
    GPU_UNROLL for (int i = 0; i < 32; i++) a.d[(g + (i >> 1 & 1) * 8) * 64 + i / 4 * 8 + c + (i & 1)] = d[i];
  }
#else
  (void)a;
#endif
}
