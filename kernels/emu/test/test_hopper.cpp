// What every function of rt/hopper.cuh must do, computed here in plain C++.
#include "device.h"
#include "../../selftest_hopper.cu"

using test::Buffer;
using test::run_kernel;

enum { UINT8 = 0, FLOAT32 = 7, BFLOAT16 = 9 };  // of CUtensorMapDataType

static bool here() {
  test::Gpu* g = test::Gpu::get();
  if (g && !g->hopper()) printf("skip: not a Hopper GPU\n");
  return !g || g->hopper();
}
static uint16_t bf16_of(int v) { return uint16_t(__float_as_uint(float(v)) >> 16); }

TEST(mbarrier) {
  if (!here()) return;
  Buffer<uint32_t> o(128);
  run_kernel("st_mbarrier", StHopper{o.arg()}, 1, 64, 0, false, o);
  for (int i = 0; i < 4; i++)
    for (int l = 0; l < 32; l++) CHECK(o[i * 32 + l] == uint32_t((l + 1) % 32 * 10 + i));
}

TEST(bulk) {
  if (!here()) return;
  for (uint32_t n : {8u, 72u, 512u}) {
    Buffer<uint32_t> in(n), o(n);
    in.fill([](size_t i) { return uint32_t(i * 7 + 1); });
    run_kernel("st_bulk", StBulk{in.arg(), o.arg(), n}, 1, 32, 0, false, o, in);
    for (uint32_t i = 0; i < n; i++) CHECK(o[i] == i * 7 + 1, "%u of %u", i, n);
  }
}

// Boxes inside and across every edge. Element (x, y, z) is a number of its own; what lies outside is zero. A 16-byte piece c of
// row r stands at piece c ^ (what the swizzle takes of r).
template <class T>
static void tensor(int type, int swizzle, std::vector<uint64_t> dims, std::vector<uint32_t> box) {
  const int rank = int(dims.size());
  const uint64_t pitch = (dims[0] * sizeof(T) + 15) / 16 * 16 + 16, plane = pitch * dims[1], planes = rank > 2 ? dims[2] : 1;
  Buffer<unsigned char> in(plane * planes);
  const auto value = [](uint64_t x, uint64_t y, uint64_t z) { return T(1 + x + y * 19 + z * 83); };
  for (uint64_t z = 0; z < planes; z++)
    for (uint64_t y = 0; y < dims[1]; y++)
      for (uint64_t x = 0; x < dims[0]; x++) {
        const T v = value(x, y, z);
        memcpy(&in[z * plane + y * pitch + x * sizeof(T)], &v, sizeof v);
      }
  const gpu::TensorMap map = test::tensor_map(type, in.arg(), dims, {pitch, plane}, box, swizzle);
  const uint32_t row = box[0] * uint32_t(sizeof(T)), depth = rank > 2 ? box[2] : 1, bytes = row * box[1] * depth;
  const int places[5][3] = {{0, 0, 0}, {3, 2, 1}, {-2, -1, -1}, {int(dims[0]) - 3, int(dims[1]) - 2, int(planes) - 1}, {1000, 0, 0}};
  for (const auto& at : places) {
    Buffer<uint32_t> o(bytes / 4);
    run_kernel("st_tensor", StTensor{map, o.arg(), bytes / 4, rank, at[0], at[1], at[2]}, 1, 64, bytes + 8, false, o, in);
    for (uint32_t z = 0; z < depth; z++)
      for (uint32_t y = 0; y < box[1]; y++)
        for (uint32_t x = 0; x < box[0]; x++) {
          const int64_t gx = at[0] + int64_t(x), gy = at[1] + int64_t(y), gz = rank > 2 ? at[2] + int64_t(z) : 0;
          const bool inside = gx >= 0 && gy >= 0 && gz >= 0 && gx < int64_t(dims[0]) && gy < int64_t(dims[1]) && gz < int64_t(planes);
          const T want = inside ? value(uint64_t(gx), uint64_t(gy), uint64_t(gz)) : T(0);
          uint32_t byte = (z * box[1] + y) * row + x * uint32_t(sizeof(T));
          // 128-byte swizzle: bits 4 to 6 take bits 7 to 9; 64: 4 and 5 take 7 and 8; 32: 4 takes 7.
          const uint32_t mask = swizzle == 3 ? 0x70 : swizzle == 2 ? 0x30 : swizzle == 1 ? 0x10 : 0;
          byte ^= byte >> 3 & mask;
          T got;
          memcpy(&got, reinterpret_cast<unsigned char*>(o.p) + byte, sizeof got);
          CHECK(got == want, "swizzle %d, rank %d, box at %d %d %d, element %u %u %u: %g, not %g", swizzle, rank, at[0], at[1], at[2], x, y, z,
                double(got), double(want));
        }
  }
}
TEST(tensor_maps) {
  if (!here()) return;
  tensor<uint16_t>(BFLOAT16, 0, {40, 9}, {24, 5});
  tensor<uint16_t>(BFLOAT16, 3, {70, 20}, {64, 16});
  tensor<uint16_t>(BFLOAT16, 2, {70, 20}, {32, 16});
  tensor<uint16_t>(BFLOAT16, 1, {70, 20}, {16, 16});
  tensor<uint16_t>(BFLOAT16, 3, {72, 10, 5}, {64, 8, 3});
  tensor<float>(FLOAT32, 0, {11, 6, 3}, {8, 4, 2});
  tensor<float>(FLOAT32, 3, {50, 20}, {32, 16});
  tensor<uint8_t>(UINT8, 3, {200, 9}, {128, 8});
}

static void products(const char* name, int n) {
  Buffer<uint16_t> a(64 * 64), bt(size_t(n) * 64);
  Buffer<float> d(64 * size_t(n));
  const auto av = [](int i) { return (i * 37 + 11) % 17 - 8; };
  const auto bv = [](int i) { return (i * 53 + 7 + i / 64) % 13 - 6; };
  for (int i = 0; i < 64 * 64; i++) a[size_t(i)] = bf16_of(av(i));
  for (int i = 0; i < n * 64; i++) bt[size_t(i)] = bf16_of(bv(i));
  run_kernel(name, StWgmma{a.arg(), bt.arg(), d.arg()}, 1, 128, 64 * 128 + size_t(n) * 128, false, d, a, bt);
  for (int m = 0; m < 64; m++)
    for (int j = 0; j < n; j++) {
      int sum = 0;
      for (int k = 0; k < 64; k++) sum += av(m * 64 + k) * bv(j * 64 + k) * (k < 32 ? 2 : 1);
      const float got = d[size_t(m) * size_t(n) + size_t(j)];
      CHECK(got == float(sum) + 0.5f, "%s at %d, %d: %g, not %g", name, m, j, got, sum + 0.5);
    }
}
TEST(wgmma) {
  if (!here()) return;
  products("st_wgmma_32", 32);
  products("st_wgmma_64", 64);
  products("st_wgmma_96", 96);
  products("st_wgmma_128", 128);
  products("st_wgmma_160", 160);
  products("st_wgmma_192", 192);
  products("st_wgmma_256", 256);
}
TEST(wgmma_transposed) {
  if (!here()) return;
  products("st_wgmma_64_tb", 64);
  products("st_wgmma_128_tb", 128);
  products("st_wgmma_256_tb", 256);
  products("st_wgmma_64_ta", 64);
  products("st_wgmma_128_ta_tb", 128);
}
TEST(wgmma_registers) {
  if (!here()) return;
  products("st_wgmma_64_regs", 64);
  products("st_wgmma_96_regs", 96);
  products("st_wgmma_128_regs_tb", 128);
  products("st_wgmma_256_regs_tb", 256);
}

TEST(pipeline) {
  if (!here()) return;
  for (uint32_t k : {64u, 128u, 640u}) {
    Buffer<uint16_t> a(64 * k), b(64 * k);
    Buffer<float> d(64 * 64);
    const auto av = [](uint32_t i) { return int(i * 37 % 7) - 3; };
    const auto bv = [](uint32_t i) { return int(i * 53 % 5) - 2; };
    for (uint32_t i = 0; i < 64 * k; i++) a[i] = bf16_of(av(i)), b[i] = bf16_of(bv(i));
    const auto map = [&](const Buffer<uint16_t>& m) { return test::tensor_map(BFLOAT16, m.arg(), {k, 64}, {k * 2}, {64, 64}, 3); };
    run_kernel("st_pipeline", StPipeline{map(a), map(b), d.arg(), k}, 1, 256, 3 * 2 * 64 * 128 + 48, false, d, a, b);
    for (uint32_t m = 0; m < 64; m++)
      for (uint32_t n = 0; n < 64; n++) {
        int sum = 0;
        for (uint32_t i = 0; i < k; i++) sum += av(m * k + i) * bv(n * k + i);
        CHECK(d[m * 64 + n] == float(sum), "k %u at %u, %u: %g, not %d", k, m, n, d[m * 64 + n], sum);
      }
  }
}
