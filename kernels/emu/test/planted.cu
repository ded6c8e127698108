// Bugs that kernels really have, to see that the tools catch them. PLANTED=n plants the n-th; without it all is right, and no tool
// may complain. planted.sh builds this file in every mode and knows which tool must see which bug.
#include "harness.h"

using test::Array;
using test::launch3;

static const int planted = getenv("PLANTED") ? atoi(getenv("PLANTED")) : 0;

template <class T>
static void expect(const char* what, Array<T>& got, const std::function<double(size_t)>& want) {
  for (size_t i = 0; i < got.n; i++)
    if (double(got[i]) != want(i)) {
      CHECK(false, "%s: wrong values: %g at %zu, not %g", what, double(got[i]), i, want(i));
      return;
    }
}

// Copies of one tile ahead: every thread adds up a number that another thread's copy brought.
struct Tiles {
  const float* in;  // [tiles][128][4]
  float* out;
  int tiles;
};
KERNEL(tiles, Tiles, 128) {
  GPU_SMEM(float, s, [2][128][4]);
  const int t = threadIdx.x;
  const auto issue = [&](int i) {
    if (i < a.tiles) gpu::cp_async16(s[i & 1][t], a.in + (i * 128 + t) * 4);
    gpu::cp_async_commit();
  };
  issue(0);
  float sum = 0;
  for (int i = 0; i < a.tiles; i++) {
    issue(i + 1);
    if (planted != 2) gpu::cp_async_wait<1>();
    else gpu::cp_async_wait<2>();
    if (planted != 3) __syncthreads();
    sum += s[i & 1][(t + 37) % 128][1];
    if (planted != 1) __syncthreads();
  }
  gpu::cp_async_wait<0>();
  a.out[t] = sum;
}
TEST(tiles) {
  const int n = 5;
  Array<float> in(n * 128 * 4), out(128);
  in.fill([](size_t i) { return float(i % 1000); });
  launch3("tiles", Tiles{in.p, out.p, n}, 1, 128, 0, out);
  expect("tiles", out, [&](size_t t) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += in[(i * 128 + (t + 37) % 128) * 4 + 1];
    return s;
  });
}

// A sum over the block.
struct Sum {
  const float* in;
  float* out;
  int n;
};
KERNEL(sum, Sum, 128) {
  GPU_SMEM(float, part, [4]);
  float v = warp_sum(a.in[threadIdx.x]);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x / 32] = v;
  if (planted != 4) __syncthreads();
  if (threadIdx.x == 0) a.out[0] = part[0] + part[1] + part[2] + part[3];
}
TEST(sum) {
  Array<float> in(128), out(1);
  in.fill([](size_t i) { return float(i); });
  launch3("sum", Sum{in.p, out.p, 128}, 1, 128, 0, out);
  expect("sum", out, [](size_t) { return 127 * 64; });
}

// The tail of an array.
KERNEL(tail, Sum, 64) {
  for (int i = blockIdx.x * 64 + threadIdx.x; planted == 5 ? i <= a.n : i < a.n; i += gridDim.x * 64) a.out[i] = a.in[i % a.n] + 1;
}
TEST(tail) {
  Array<float> in(1000), out(1000);
  in.fill([](size_t i) { return float(i); });
  launch3("tail", Sum{in.p, out.p, 1000}, 4, 64, 0, out);
  expect("tail", out, [](size_t i) { return double(i + 1); });
}

// Rows of a tree add up those whose bit they have: 70 of them, two words each.
struct Mask {
  const unsigned long long* bits;
  const float* in;
  float* out;
};
KERNEL(mask, Mask, 96) {
  const int i = threadIdx.x;
  if (i >= 70) return;
  float sum = 0;
  for (int j = 0; j < 70; j++) {
    const int at = planted == 6 ? j & 31 : j & 63;
    if (a.bits[i * 2 + j / 64] >> at & 1) sum += a.in[j];
  }
  a.out[i] = sum;
}
TEST(mask) {
  Array<unsigned long long> bits(140);
  Array<float> in(70), out(70);
  in.fill([](size_t i) { return float(i + 1); });
  const auto sees = [](size_t i, size_t j) { return j <= i && (i - j) % 3 != 1; };
  for (size_t w = 0; w < 140; w++) {
    bits[w] = 0;
    for (size_t j = 0; j < 64 && w % 2 * 64 + j < 70; j++) bits[w] |= uint64_t(sees(w / 2, w % 2 * 64 + j)) << j;
  }
  launch3("mask", Mask{bits.p, in.p, out.p}, 1, 96, 0, out);
  expect("mask", out, [&](size_t i) {
    double s = 0;
    for (size_t j = 0; j < 70; j++) s += sees(i, j) ? double(j + 1) : 0;
    return s;
  });
}

// Accepted rows move to the front, in place: a warp for each.
struct Compact {
  const int* path;
  float* rows;  // [9][32]
};
KERNEL(compact, Compact, 256) {
  const int w = threadIdx.x / 32, l = threadIdx.x & 31;
  const float v = a.rows[a.path[w] * 32 + l];
  if (planted != 7) __syncthreads();  // all are read before any is written
  else __syncwarp();
  a.rows[w * 32 + l] = v;
}
TEST(compact) {
  Array<int> path(8);
  Array<float> rows(9 * 32);
  path.fill([](size_t i) { return int(i + 1); });
  rows.fill([](size_t i) { return float(i); });
  launch3("compact", Compact{path.p, rows.p}, 1, 256, 0, rows);
  expect("compact", rows, [](size_t i) { return i < 256 ? double(i + 32) : double(i); });
}

// A barrier under a condition, and collectives under one.
KERNEL(branch, Sum, 128) {
  if (planted == 8) {
    if (threadIdx.x < 100) __syncthreads();
  } else {
    __syncthreads();
  }
  float v = a.in[threadIdx.x];
  if (planted == 9 && (threadIdx.x & 16)) v += float(__ballot_sync(~0u, 1) & 1);
  else v = __shfl_xor_sync(~0u, v, 1);
  a.out[threadIdx.x] = v;
}
TEST(branch) {
  Array<float> in(128), out(128);
  in.fill([](size_t i) { return float(i); });
  launch3("branch", Sum{in.p, out.p, 128}, 1, 128, 0, out);
  expect("branch", out, [](size_t i) { return double(i ^ 1); });
}

// The largest of all blocks.
struct Largest {
  const int* in;
  int* out;
};
KERNEL(largest, Largest, 32) {
  const int v = a.in[blockIdx.x * 32 + threadIdx.x];
  if (planted != 10) atomicMax(a.out, v);
  else if (v > *a.out) *a.out = v;
}
TEST(largest) {
  Array<int> in(128), out(1);
  in.fill([](size_t i) { return int(i * 37 % 128); });
  out[0] = 0;
  launch3("largest", Largest{in.p, out.p}, 4, 32, 0, out);
  expect("largest", out, [](size_t) { return 127; });
}

// All blocks write, meet, and read.
struct Meet {
  uint32_t *state, *slots, *out;
};
KERNEL(meet, Meet, 64) {
  if (threadIdx.x == 0) a.slots[blockIdx.x] = blockIdx.x + 1;
  if (planted != 11) gpu::grid_sync(a.state);
  else __syncthreads();
  if (threadIdx.x == 0) a.out[blockIdx.x] = a.slots[(blockIdx.x + 1) % gridDim.x];
}
TEST(meet) {
  Array<uint32_t> state(1), slots(4), out(4);
  Meet args{state.p, slots.p, out.p};
  void* params[] = {&args};
  for (uint64_t seed : {0, 1, 2}) {
    state[0] = 0;
    slots.fill([](size_t) { return 0u; });
    EmuClosure c = test::find("meet")->bind(params);
    emu_launch_cooperative(c.run, c.state, 4, 64, 0, seed);
    c.drop(c.state);
    expect("meet", out, [](size_t i) { return double((i + 1) % 4 + 1); });
  }
}

// A copy that completes on an mbarrier, twice through the same buffer.
struct Ring {
  const float* in;  // [2][64]
  float* out;
};
KERNEL(ring, Ring, 64) {
  GPU_SMEM(float, s, [64]);
  GPU_SMEM(uint64_t, bars, [2]);
  uint64_t *full = &bars[0], *empty = &bars[1];
  if (threadIdx.x == 0) {
    gpu::mbar_init(full, 1);
    gpu::mbar_init(empty, 64);
    if (planted != 14) gpu::fence_mbar_init();
  }
  __syncthreads();
  float sum = 0;
  for (uint32_t i = 0; i < 2; i++) {
    if (threadIdx.x == 0) {
      if (planted != 16) gpu::mbar_wait(empty, (i & 1) ^ 1);
      gpu::mbar_arrive_expect_tx(full, planted == 15 ? 128 : 256);
      gpu::bulk_load(s, a.in + i * 64, 256, full);
    }
    if (planted != 12 || threadIdx.x < 32) gpu::mbar_wait(full, planted == 13 ? 1 : i & 1);
    sum += s[(threadIdx.x + 1) % 64];
    gpu::mbar_arrive(empty);
  }
  a.out[threadIdx.x] = sum;
}
TEST(ring) {
  Array<float> in(128), out(64);
  in.fill([](size_t i) { return float(i); });
  launch3("ring", Ring{in.p, out.p}, 1, 64, 0, out);
  expect("ring", out, [](size_t i) { return double((i + 1) % 64 * 2 + 64); });
}

// A warpgroup's product of a tile of ones (a) and of b[64][16] = column number; then the tile is used for something else.
struct Product {
  float* out;  // [64][64]
};
KERNEL(product, Product, 128) {
  GPU_DYN_SMEM(unsigned char, s);
  const auto at = [&](int tile, int row, int k) -> uint16_t& {
    return *reinterpret_cast<uint16_t*>(s + tile * 8192 + row * 128 + ((k * 2) ^ ((row & 7) << 4)));
  };
  const int t = threadIdx.x;
  for (int i = t; i < 64 * 64; i += 128) {
    at(0, i / 64, i % 64) = 0x3f80;
    at(1, i / 64, i % 64) = gpu::to_bf16(float(i / 64)).x;
  }
  if (planted != 20) gpu::fence_proxy_async();
  __syncthreads();
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 1;
  if (planted != 19) gpu::wgmma_fence();
  gpu::wgmma_bf16<64>(d, gpu::wgmma_desc(s, 16, 1024), gpu::wgmma_desc(s + 8192, 16, 1024), true);
  gpu::wgmma_commit();
  const float early = d[3];
  if (planted == 18) at(1, t / 2, 0) = 0;  // before the product is done with it
  gpu::wgmma_wait<0>(d);
  if (planted == 17) d[3] = early;
  for (int i = 0; i < 32; i++) a.out[(t / 4 % 8 + t / 32 * 16 + (i >> 1 & 1) * 8) * 64 + i / 4 * 8 + t % 4 * 2 + (i & 1)] = d[i];
}
TEST(product) {
  Array<float> out(64 * 64);
  launch3("product", Product{out.p}, 1, 128, 16384, out);
  expect("product", out, [](size_t i) { return double(1 + 16 * (i % 64)); });
}
