// What every function of rt/hw.cuh must do, computed here in plain C++.
#include "device.h"
#include "../../selftest.cu"

using test::Buffer;
using test::run_kernel;

static float from_bf16(uint32_t h) { return __uint_as_float(h << 16); }
// Small integers are the upper half of their f32.
static uint16_t bf16_of(int v) { return uint16_t(__float_as_uint(float(v)) >> 16); }
static uint16_t f16_of(int v) {
  if (!v) return 0;
  const int e = 31 - __builtin_clz(unsigned(abs(v)));
  return uint16_t((v < 0) << 15 | (e + 15) << 10 | ((abs(v) << (10 - e)) & 1023));
}

TEST(mma) {
  for (int which = 0; which < 3; which++) {
    Buffer<uint16_t> a(256), bt(128);
    Buffer<float> c(128), d(128);
    const auto av = [](int i) { return (i * 37 + 11) % 41 - 20; };
    const auto bv = [](int i) { return (i * 53 + 7) % 31 - 15; };
    for (int i = 0; i < 256; i++) a[i] = which == 1 ? f16_of(av(i)) : bf16_of(av(i));
    for (int i = 0; i < 128; i++) bt[i] = which == 1 ? f16_of(bv(i)) : bf16_of(bv(i)), c[i] = float(i % 13);
    run_kernel("st_mma", StMma{a.arg(), bt.arg(), c.arg(), d.arg(), which}, 1, 32, 0, false, d, a, bt, c);
    for (int m = 0; m < 16; m++)
      for (int n = 0; n < 8; n++) {
        int sum = which == 2 ? 0 : (m * 8 + n) % 13;
        for (int k = 0; k < 16; k++) sum += av(m * 16 + k) * bv(n * 16 + k);
        CHECK(d[m * 8 + n] == float(sum), "kind %d at %d, %d: %g, not %d", which, m, n, d[m * 8 + n], sum);
      }
  }
}

TEST(ldmatrix) {
  Buffer<uint32_t> o(256);
  run_kernel("st_ldmatrix", StOut{o.arg()}, 1, 32, 0, false, o);
  for (unsigned l = 0; l < 32; l++)
    for (unsigned i = 0; i < 4; i++) {
      const unsigned e = (i * 8 + l / 4) * 8 + l % 4 * 2, t = (i * 8 + l % 4 * 2) * 8 + l / 4;
      CHECK(o[l * 8 + i] == (e | (e + 1) << 16));
      CHECK(o[l * 8 + 4 + i] == (t | (t + 8) << 16));
    }
}

TEST(warp) {
  Buffer<uint32_t> o(64 * 24);
  run_kernel("st_warp", StOut{o.arg()}, 1, 64, 0, false, o);
  unsigned sum = 0, all = ~0u, any = 0, odd = 0, low = ~0u, high = 0;
  for (unsigned l = 0; l < 32; l++) {
    const unsigned u = 0x80000000u * (l & 1) + l;
    sum += u, all &= u | 0x10, any |= u, odd ^= u, low = std::min(low, u), high = std::max(high, u);
  }
  for (int t = 0; t < 64; t++) {
    const int l = t & 31;
    const uint32_t* x = &o[t * 24];
    unsigned same = 0, upper = 0;
    for (int i = 0; i < 32; i++) same |= unsigned(i % 5 == l % 5) << i, upper += i >= 8 ? i : 0;
    const uint32_t want[24] = {
        uint32_t(l / 2 * 10), uint32_t(l ^ 5), uint32_t(l + 3 < 32 ? l + 3 : l), uint32_t(l >= 3 ? l - 3 : l),
        uint32_t(l % 8 + 5 < 8 ? l + 5 : l), uint32_t((l ^ 24) < (l & ~7) + 8 ? l ^ 24 : l), 0x49249249u, 3,
        uint32_t(l < 16 ? l ^ 8 : l ^ 1), uint32_t(l ^ 1), uint32_t(l ^ 1) << 8, uint32_t(3 * (l + 2 < 32 ? l + 2 : l)),
        sum, low, high, uint32_t(-9), 22, uint32_t(496 - 32 * 9), all, any, odd, same, l >= 8 ? upper : 0,
        uint32_t(__builtin_popcount(unsigned(l)) + 100 * __builtin_ffs(l) + 10000 * (l ? __builtin_clz(unsigned(l)) : 32))};
    for (int i = 0; i < 24; i++) CHECK(x[i] == want[i], "thread %d, value %d: %u, not %u", t, i, x[i], want[i]);
  }
}

TEST(cp_async) {
  for (int n : {0, 20, 32}) {
    Buffer<uint32_t> in(size_t(n) * 4 + 4), o(128);
    in.fill([](size_t i) { return uint32_t(i + 1); });
    run_kernel("st_cp", StCopy{in.arg(), o.arg(), n}, 1, 32, 0, false, o, in);
    for (int i = 0; i < 128; i++) {
      const int j = (i + 4) % 128;
      CHECK(o[i] == (j < n * 4 ? uint32_t(j + 1) : 0u));
    }
  }
}

TEST(barriers) {
  Buffer<uint32_t> o(512);
  run_kernel("st_bar", StOut{o.arg()}, 1, 128, 0, false, o);
  for (int i = 0; i < 4; i++)
    for (int t = 0; t < 128; t++) CHECK(o[i * 128 + t] == uint32_t((t / 64 * 64 + (t + 1) % 64) * 10 + i));
  Buffer<uint32_t> r(128);
  run_kernel("st_arrive", StOut{r.arg()}, 1, 64, 0, false, r);
  for (int i = 0; i < 4; i++)
    for (int l = 0; l < 32; l++) CHECK(r[i * 32 + l] == uint32_t((l + 1) % 32 * 10 + i));
}

static float half_of(uint32_t h) {
  const int e = int(h >> 10 & 31), m = int(h & 1023);
  const float v = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(float(1024 + m), e - 25) : ldexpf(float(m), -24);
  return h & 0x8000 ? -v : v;
}
// Nearest by comparing distances, ties to even.
static uint32_t nearest_bf16(uint32_t w) {
  const float f = __uint_as_float(w);
  if (std::isnan(f)) return 0x7fff;
  const uint32_t lo = w >> 16, hi = lo + 1;
  const double v = std::isinf(f) ? HUGE_VAL : fabs(double(f)), a = fabs(double(from_bf16(lo)));
  const double b = (hi & 0x7fff) == 0x7f80 ? 0x1p128 : fabs(double(from_bf16(hi)));  // the next step beyond the largest
  if (std::isinf(f)) return lo;
  return v - a < b - v ? lo : v - a > b - v ? hi : lo + (lo & 1);
}
static bool same_float(uint32_t bits, float want) {
  return std::isnan(want) ? std::isnan(__uint_as_float(bits)) : bits == __float_as_uint(want);
}

TEST(numbers) {
  Buffer<uint32_t> in(32), o(32 * 12);
  static const uint32_t words[32] = {0,          0x80000000, 0x3f800000, 0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0x7f800000,
                                     0xff800000, 0x7fc00000, 0x7f7fffff, 0x00000001, 0x00008000, 0x00018000, 0x80017fff, 0xc2f6e979,
                                     0x12345678, 0x89abcdef, 0x03ff0400, 0x83ff8400, 0x7bff7c00, 0xfbfffc00, 0x7c017e00, 0x00010200,
                                     0x40490fdb, 0x3eaaaaab, 0xbf7f8000, 0x4b7fffff, 0xdeadbeef, 0x01010101, 0xffffffff, 0x7f7f7f7f};
  for (int i = 0; i < 32; i++) in[i] = words[i];
  run_kernel("st_numbers", StCopy{in.arg(), o.arg(), 0}, 1, 32, 0, false, o, in);
  for (int t = 0; t < 32; t++) {
    const uint32_t w = words[t], next = words[(t + 1) % 32], *x = &o[t * 12];
    const auto bf16_is = [](uint32_t got, uint32_t want) { return want == 0x7fff ? (got & 0x7fff) > 0x7f80 : got == want; };
    CHECK(bf16_is(x[0], nearest_bf16(w)), "to_bf16(%08x) = %04x, not %04x", w, x[0], nearest_bf16(w));
    CHECK(bf16_is(x[1] & 0xffff, nearest_bf16(w)) && bf16_is(x[1] >> 16, nearest_bf16(next)), "pack_bf16(%08x, %08x) = %08x", w, next, x[1]);
    CHECK(same_float(x[2], half_of(w & 0xffff)), "f16_low(%08x) = %08x", w, x[2]);
    CHECK(same_float(x[3], half_of(w >> 16)), "f16_high(%08x) = %08x", w, x[3]);
    CHECK(same_float(x[4], half_of(w & 0xffff)));
    // Low: 3.140625 * 0.298828125 + 1.0078125, high: 1.5 * 2 + 1.
    const float low = from_bf16(0x4049) * from_bf16(0x3e99) + from_bf16(0x3f81);
    CHECK(x[5] == ((nearest_bf16(__float_as_uint(4.f)) << 16) | nearest_bf16(__float_as_uint(low))), "fma_bf16x2 = %08x", x[5]);
    int s = 7;
    unsigned u = 7;
    for (int i = 0; i < 4; i++) {
      s += int(int8_t(w >> 8 * i)) * int(int8_t(next >> 8 * i));
      u += (w >> 8 * i & 255) * (next >> 8 * i & 255);
    }
    CHECK(x[6] == uint32_t(s) && x[7] == u);
    CHECK(x[8] == uint32_t(uint64_t(w) * next >> 32));
    CHECK(fabs(__uint_as_float(x[9]) * ldexpf(1, 16 - t) - 1) < 1e-6, "2^%d = %g", t - 16, __uint_as_float(x[9]));
    CHECK(x[10] == w || std::isnan(__uint_as_float(w)));
    CHECK(x[11] == uint32_t(__builtin_popcount(w) + __builtin_popcount(next)));
  }
}

TEST(loads) {
  Buffer<uint32_t> in(128), o(32 * 20);
  in.fill([](size_t i) { return uint32_t(i * 2654435761u); });
  run_kernel("st_loads", StCopy{in.arg(), o.arg(), 0}, 1, 32, 0, false, o, in);
  for (int l = 0; l < 32; l++) {
    const uint32_t *p = &in[l * 4], *q = &in[(31 - l) * 4], *x = &o[l * 20];
    const uint32_t want[20] = {p[0], p[1], p[2], p[3], p[0], p[1], p[2], p[3], p[2], p[3], p[2], p[3], q[0], q[1], q[2], q[3], p[0], p[1], p[0], p[1]};
    CHECK(!memcmp(x, want, sizeof want), "lane %d", l);
  }
}

TEST(grid) {
  constexpr unsigned BLOCKS = 7;
  Buffer<uint32_t> state(1), slots(BLOCKS), o(3 * BLOCKS);
  state[0] = 0;
  run_kernel("st_grid", StGrid{state.arg(), slots.arg(), o.arg()}, BLOCKS, 64, 0, true, o, state, slots);
  for (unsigned i = 0; i < 3; i++)
    for (unsigned b = 0; b < BLOCKS; b++) CHECK(o[i * BLOCKS + b] == (b + 1) % BLOCKS * 10 + i);
  for (uint64_t seed : {0, 5, 6}) {
    Buffer<uint32_t> sum(1);
    state[0] = 0;
    StGrid args{state.arg(), slots.arg(), sum.arg()};
    if (test::Gpu* g = test::Gpu::get()) {
      state.upload();
      g->launch("st_last", &args, BLOCKS, 64, 0, false);
      sum.download();
    } else {
      test::launch("st_last", args, BLOCKS, 64, 0, seed, seed == 6 ? 2 : 1);
    }
    CHECK(sum[0] == BLOCKS * (BLOCKS + 1) / 2);
  }
}
