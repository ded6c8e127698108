// Products with weights against f64, and the promise that a row's bits depend on nothing but the row.
#include <algorithm>
#include <memory>
#include <string>
#include "harness.h"
#include "../../gemv.cu"
#include "../../gemm.cu"
#include "../../gemm_sm90.cu"

using test::Array;

namespace {
// A matrix in two shapes: widened, and a launch of an entry point that reads it as the device has it.
struct Weights {
  u32 outputs, inputs;
  std::vector<float> wide;  // [outputs, inputs]
  // On the device.
  const bf16_t* w;
  const u32 *quants, *high, *scales, *supers;
  std::function<void(const struct Entry& e, const bf16_t* x, const float* bias, Array<float>& y, u32 rows, bool thrice)> launch;
};
// The sanitizers see fewer of the same; ThreadSanitizer, for which a launch is dear, what differs in its barriers.
#if defined(__SANITIZE_THREAD__)
constexpr bool SLOW = true, RACES = true;
#elif defined(__SANITIZE_ADDRESS__)
constexpr bool SLOW = true, RACES = false;
#else
constexpr bool SLOW = false, RACES = false;
#endif
const std::vector<u32> ROWS = RACES ? std::vector<u32>{65} : SLOW ? std::vector<u32>{3, 65} : std::vector<u32>{1, 3, 9, 20, 65};

// An entry point: outputs and rows of a block, dynamic shared memory.
struct Entry {
  std::string name;
  u32 outputs, rows, smem;
  bool gemm() const { return name[0] == 'g'; }
  dim3 grid(u32 m, u32 n) const {
    const u32 o = (m + outputs - 1) / outputs, r = (n + rows - 1) / rows;
    return gemm() ? dim3(r, o) : dim3(o, r);
  }
};
std::vector<Entry> entries(const std::string& format) {
  const std::string name = "linear_" + format, gemm = "gemm_" + format;
  const u32 kb = 1024, staged = format == "bf16";
  if (RACES) return {{name + "_16", 32, 16, 0}, {gemm + "_64", 64, 64, (staged ? 64 : 32) * kb}};
  return {{name + "_8", 16, 8, 0},   {name + "_16", 32, 16, 0},
          {name + "_32", 32, 32, 0}, {name + "_64", 32, 64, 0},
          {gemm + "_64", 64, 64, (staged ? 64 : 32) * kb}, {gemm + "_128", 128, 128, (staged ? 96 : 64) * kb}};
}
template <class Args>
void run(const Entry& e, const Args& args, Array<float>& y, bool thrice) {
  const dim3 grid = e.grid(args.outputs, args.rows);
  if (thrice) test::launch3(e.name.c_str(), args, grid, 256, e.smem, y);
  else test::launch(e.name.c_str(), args, grid, 256, e.smem, 99);
}

// The map of a matrix in bf16, as gemm_sm90.cu wants it.
std::shared_ptr<Array<u64>> tensor_map(const bf16_t* p, u32 height, u32 inputs, u32 box_height) {
  const uint64_t sizes[] = {inputs, height}, strides[] = {inputs * 2};
  const uint32_t box[] = {64, box_height}, step[] = {1, 1};
  gpu::TensorMap map;
  const char* why = emu_tensor_map(&map, 9, 2, p, sizes, strides, box, step, 0, 3, 0);
  CHECK(!why, "%s", why);
  auto words = std::make_shared<Array<u64>>(16);
  memcpy(words->p, &map, sizeof map);
  return words;
}

// Every entry point at several numbers of rows: near f64, the same bits under all schedules, from all entry points, and for a row
// alone as among others.
void check(const Weights& w, const std::vector<Entry>& entries, const std::vector<u32>& counts, bool has_bias) {
  const u32 n = w.inputs, m = w.outputs, most = *std::max_element(counts.begin(), counts.end());
  test::Rng rng(n * 31 + m);
  Array<bf16_t> all(most * n);
  Array<float> bias(has_bias ? m : 0);
  all.fill([&](size_t) { return gpu::to_bf16(rng.normal()); });
  bias.fill([&](size_t) { return rng.normal(); });
  std::vector<double> want, rough;
  for (u32 r = 0; r < most; r++)
    for (u32 o = 0; o < m; o++) {
      double s = 0;
      float naive = 0;
      for (u32 i = 0; i < n; i++) {
        const float v = w.wide[o * n + i], x = gpu::to_f32(all[r * n + i]);
        s += double(v) * x, naive += v * x;
      }
      want.push_back(has_bias ? s + bias[o] : s), rough.push_back(has_bias ? naive + bias[o] : naive);
    }
  std::vector<float> first;
  for (const Entry& e : entries)
    for (u32 rows : counts) {
      if (!RACES && rows > e.rows && e.rows < 64 && rows > 9) continue;
      if (rows == 9 && e.gemm()) continue;
      Array<bf16_t> x(rows * n);
      Array<float> y(rows * m);
      std::copy(all.p, all.p + x.n, x.p);
      w.launch(e, x.p, has_bias ? bias.p : nullptr, y, rows, !RACES && rows == counts[0]);
      std::vector<double> got(y.p, y.p + y.n);
      const std::string what = e.name + " " + std::to_string(m) + " x " + std::to_string(n);
      test::close(what.c_str(), got, {want.begin(), want.begin() + y.n}, {rough.begin(), rough.begin() + y.n});
      // What was seen so far of these rows, from whichever launch.
      const size_t known = std::min(first.size(), y.n);
      CHECK(!known || !memcmp(first.data(), y.p, known * sizeof(float)), "%s: %u rows of %u x %u differ from fewer rows", e.name.c_str(), rows, m, n);
      if (y.n > first.size()) first.assign(y.p, y.p + y.n);
    }
}

template <class Args>
Weights plain(u32 outputs, u32 inputs, std::vector<std::shared_ptr<void>>& keep, u32 seed = 0) {
  auto w = std::make_shared<Array<bf16_t>>(size_t(outputs) * inputs);
  keep.push_back(w);
  test::Rng rng(outputs * 7 + inputs + seed * 1000);
  w->fill([&](size_t) { return gpu::to_bf16(rng.normal() / 8); });
  Weights out{outputs, inputs, {}, w->p, {}, {}, {}, {}, {}};
  for (size_t i = 0; i < w->n; i++) out.wide.push_back(gpu::to_f32((*w)[i]));
  bf16_t* p = w->p;
  out.launch = [=](const Entry& e, const bf16_t* x, const float* bias, Array<float>& y, u32 rows, bool thrice) {
    run(e, Args{{x}, {p}, {bias}, {y.p}, rows, inputs, outputs, bias != nullptr}, y, thrice);
  };
  return out;
}

// --- block formats: GGUF blocks of random integers, their values, and the packing of rt/quant.cuh ---
enum Format { F8_0, F4_0, F4_1, F4_K, F6_K };
struct Planes {
  std::vector<u32> quants, high, scales, supers;
};
// What the packing asks of a matrix, by output and input; zero behind the last.
struct Ints {
  u32 outputs, inputs;
  std::function<int(u32 o, u32 i)> q;                       // as stored: Q8_0 signed, others unsigned
  std::function<u32(u32 o, u32 block, int which)> halves;   // f16 bits of a 32-block: 0 d, 1 m
  std::function<u32(u32 o, u32 block, int which)> subs;     // of a K format: sub-scale, min (Q6_K: of the half `which`)
  std::function<u32(u32 o, u32 super, int which)> supers;   // f16 bits of 256: 0 d, 1 dmin
};
u32 two(u32 lo, u32 hi) { return lo | hi << 16; }

Planes pack(Format f, const Ints& m) {
  Planes p;
  const auto q = [&](u32 o, u32 i) -> u32 { return o < m.outputs && i < m.inputs ? m.q(o, i) : 0; };
  const auto half = [&](u32 o, u32 b, int which) -> u32 { return o < m.outputs && b * 32 < m.inputs ? m.halves(o, b, which) : 0; };
  const auto sub = [&](u32 o, u32 b, int which) -> u32 { return o < m.outputs ? m.subs(o, b, which) & 255 : 0; };
  const auto super = [&](u32 o, u32 s, int which) -> u32 { return o < m.outputs ? m.supers(o, s, which) : 0; };
  // Input `e` of 0..8 of lane t in a block.
  const auto input = [&](u32 t, u32 e) { return f == F6_K ? e / 4 * 16 + 4 * t + e % 4 : 8 * t + e; };
  for (u32 strip = 0; strip < (m.outputs + 15) / 16; strip++)
    for (u32 tile = 0; tile < (m.inputs + 63) / 64; tile++) {
      const u32 o0 = strip * 16, i0 = tile * 64, b0 = tile * 2;
      if (f == F8_0) {
        for (u32 b = 0; b < 2; b++)
          for (u32 lane = 0; lane < 32; lane++)
            for (u32 w = 0; w < 4; w++) {
              u32 word = 0;
              for (u32 k = 0; k < 4; k++) {
                const u32 from[4] = {0, 2, 1, 3};
                word |= (q(o0 + lane / 4 + w / 2 * 8, i0 + 32 * b + input(lane % 4, w % 2 * 4 + from[k])) & 255) << (8 * k);
              }
              p.quants.push_back(word);
            }
      } else {
        for (u32 lane = 0; lane < 32; lane++)
          for (u32 w = 0; w < 4; w++) {
            u32 word = 0;
            for (u32 e = 0; e < 8; e++) word |= (q(o0 + lane / 4 + w % 2 * 8, i0 + w / 2 * 32 + input(lane % 4, e)) & 15) << (4 * (e / 2 + e % 2 * 4));
            p.quants.push_back(word);
          }
      }
      if (f == F6_K)
        for (u32 lane = 0; lane < 32; lane++)
          for (u32 i = 0; i < 2; i++) {
            u32 word = 0;
            for (u32 b = 0; b < 2; b++)
              for (u32 e = 0; e < 8; e++) word |= q(o0 + lane / 4 + 8 * i, i0 + 32 * b + input(lane % 4, e)) >> 4 << (2 * (4 * b + e / 2) + 16 * (e % 2));
            p.high.push_back(word);
          }
      for (u32 g = 0; g < 8; g++) {
        if (f == F8_0 || f == F4_0 || f == F4_1)
          for (int which = 0; which <= (f == F4_1); which++)
            for (u32 b = 0; b < 2; b++) p.scales.push_back(two(half(o0 + g, b0 + b, which), half(o0 + g + 8, b0 + b, which)));
        else
          for (u32 i = 0; i < 2; i++) {
            u32 word = 0;
            const u32 o = o0 + g + 8 * i;
            for (u32 k = 0; k < 4; k++) word |= (f == F4_K ? sub(o, b0 + k % 2, k / 2) : sub(o, b0 + k / 2, k % 2)) << (8 * k);
            p.scales.push_back(word);
          }
      }
      if (tile % 4 == 0 && f == F4_K)
        for (u32 g = 0; g < 8; g++)
          for (u32 i = 0; i < 2; i++) p.supers.push_back(two(super(o0 + g + 8 * i, tile / 4, 0), super(o0 + g + 8 * i, tile / 4, 1)));
      if (tile % 4 == 0 && f == F6_K)
        for (u32 g = 0; g < 8; g++) p.supers.push_back(two(super(o0 + g, tile / 4, 0), super(o0 + g + 8, tile / 4, 0)));
    }
  return p;
}

Array<u32>* upload(const std::vector<u32>& v, std::vector<std::shared_ptr<void>>& keep) {
  auto a = std::make_shared<Array<u32>>(v.size());
  std::copy(v.begin(), v.end(), a->p);
  keep.push_back(a);
  return a.get();
}

Weights blocks(Format f, u32 outputs, u32 inputs, std::vector<std::shared_ptr<void>>& keep, u32 seed = 0) {
  test::Rng rng(outputs * 5 + inputs + f + seed * 1000);
  const u32 nb = (inputs + 31) / 32, ns = (inputs + 255) / 256;
  const bool k = f >= F4_K;
  // Halves between 2^-8 and 2^-5, of either sign.
  const auto half = [&] { return (rng.bits() & 0x83ff) | (7 + rng.bits() % 3) << 10; };
  std::vector<int> q(size_t(outputs) * inputs);
  std::vector<u32> h(size_t(outputs) * nb * 2), s(h.size()), super(size_t(outputs) * ns * 2);
  const int low = f == F8_0 ? -128 : 0, count = f == F8_0 ? 256 : f == F6_K ? 64 : 16;
  for (int& v : q) v = low + int(rng.bits() % count);
  for (u32& v : h) v = half();
  for (u32& v : s) v = f == F6_K ? rng.bits() & 255 : rng.bits() & 63;
  for (u32& v : super) v = half();
  Ints ints{outputs, inputs, [&](u32 o, u32 i) { return q[size_t(o) * inputs + i]; },
            [&](u32 o, u32 b, int w) { return h[(size_t(o) * nb + b) * 2 + w]; },
            [&](u32 o, u32 b, int w) { return s[(size_t(o) * nb + b) * 2 + w]; },
            [&](u32 o, u32 b, int w) { return super[(size_t(o) * ns + b) * 2 + w]; }};
  Weights w{outputs, inputs, {}, {}, {}, {}, {}, {}, {}};
  for (u32 o = 0; o < outputs; o++)
    for (u32 i = 0; i < inputs; i++) {
      const float v = float(ints.q(o, i)), d = gpu::f16_low(k ? ints.supers(o, i / 256, 0) : ints.halves(o, i / 32, 0));
      const float m = gpu::f16_low(k ? ints.supers(o, i / 256, 1) : ints.halves(o, i / 32, 1));
      const u32 s0 = ints.subs(o, i / 32, 0), s1 = ints.subs(o, i / 32, 1);
      w.wide.push_back(f == F8_0   ? d * v
                       : f == F4_0 ? d * (v - 8)
                       : f == F4_1 ? d * v + m
                       : f == F4_K ? d * s0 * v - m * s1
                                   : d * int8_t(i / 16 % 2 ? s1 : s0) * (v - 32));
    }
  const Planes p = pack(f, ints);
  const u32 *quants = upload(p.quants, keep)->p, *high = upload(p.high, keep)->p, *scales = upload(p.scales, keep)->p,
            *supers = upload(p.supers, keep)->p;
  w.quants = quants, w.high = high, w.scales = scales, w.supers = supers;
  w.launch = [=](const Entry& e, const bf16_t* x, const float* b, Array<float>& y, u32 rows, bool thrice) {
    const u32 has = b != nullptr;
    if (f == F8_0) run(e, LinearQ8_0{{x}, {quants}, {scales}, {b}, {y.p}, rows, inputs, outputs, has}, y, thrice);
    if (f == F4_0) run(e, LinearQ4_0{{x}, {quants}, {scales}, {b}, {y.p}, rows, inputs, outputs, has}, y, thrice);
    if (f == F4_1) run(e, LinearQ4_1{{x}, {quants}, {scales}, {b}, {y.p}, rows, inputs, outputs, has}, y, thrice);
    if (f == F4_K) run(e, LinearQ4_K{{x}, {quants}, {scales}, {supers}, {b}, {y.p}, rows, inputs, outputs, has}, y, thrice);
    if (f == F6_K) run(e, LinearQ6_K{{x}, {quants}, {high}, {scales}, {supers}, {b}, {y.p}, rows, inputs, outputs, has}, y, thrice);
  };
  return w;
}
}  // namespace

struct Shape {
  u32 outputs, inputs;
};
std::vector<Shape> shapes(std::vector<Shape> all) {
  if (SLOW) all.resize(RACES ? 1 : 2);
  return all;
}

TEST(linear_bf16) {
  for (Shape s : shapes({{17, 72}, {33, 648}, {1, 8}, {48, 576}, {16, 1096}})) {
    std::vector<std::shared_ptr<void>> keep;
    check(plain<Linear>(s.outputs, s.inputs, keep), entries("bf16"), ROWS, s.outputs % 2);
  }
}
TEST(linear_bf16_odd) {
  for (Shape s : {Shape{1, 1}, {5, 7}, {18, 129}, {31, 579}}) {
    std::vector<std::shared_ptr<void>> keep;
    check(plain<LinearOdd>(s.outputs, s.inputs, keep), {{"linear_bf16_odd", 16, 8, 0}}, {1, 4, 9}, s.outputs % 2);
  }
}

void check_blocks(Format f, const char* name, const std::vector<Shape>& all) {
  if (RACES && f != F4_K && f != F6_K) return;
  for (Shape s : shapes(all)) {
    std::vector<std::shared_ptr<void>> keep;
    check(blocks(f, s.outputs, s.inputs, keep), entries(name), ROWS, s.outputs % 2);
  }
}
TEST(linear_q8_0) { check_blocks(F8_0, "q8_0", {{33, 96}, {17, 576}, {1, 32}, {16, 1056}}); }
TEST(linear_q4_0) { check_blocks(F4_0, "q4_0", {{33, 96}, {17, 576}, {1, 32}, {16, 1056}}); }
TEST(linear_q4_1) { check_blocks(F4_1, "q4_1", {{33, 96}, {17, 576}, {1, 32}, {16, 1056}}); }
TEST(linear_q4_k) { check_blocks(F4_K, "q4_k", {{33, 256}, {17, 768}, {1, 512}}); }
TEST(linear_q6_k) { check_blocks(F6_K, "q6_k", {{33, 256}, {17, 768}, {1, 512}}); }

// The fused unit must give the bits of two products and the unit of their results. `other` differs from `gate` in its values only.
template <class Args>
void check_glu(const std::string& format, u32 outputs, u32 inputs, const std::function<Weights(u32)>& make,
               const std::function<Args(const Weights&, const Weights&)>& args) {
  const Weights gate = make(0), up = make(1);
  test::Rng rng(inputs);
  for (u32 act : {0u, 1u})
    for (Entry e : entries(format)) {
      if (e.gemm()) continue;
      const u32 rows = e.rows == 8 ? 9 : 5;
      Array<bf16_t> x(rows * inputs), want(rows * outputs), got(rows * outputs);
      Array<float> g(rows * outputs), u(rows * outputs);
      x.fill([&](size_t) { return gpu::to_bf16(rng.normal()); });
      gate.launch(e, x.p, nullptr, g, rows, false);
      up.launch(e, x.p, nullptr, u, rows, false);
      want.fill([&](size_t i) { return gpu::to_bf16(activate(act, g[i]) * u[i]); });
      Args a = args(gate, up);
      a.x = {x.p}, a.y = {got.p}, a.rows = rows, a.inputs = inputs, a.outputs = outputs, a.act = act;
      const std::string name = "linear_glu_" + e.name.substr(7);
      const dim3 grid((outputs + 15) / 16, (rows + e.rows - 1) / e.rows);
      if (e.rows == 8) test::launch3(name.c_str(), a, grid, 256, 0, got);
      else test::launch(name.c_str(), a, grid, 256, 0, 7);
      CHECK(!memcmp(want.p, got.p, want.n * sizeof(bf16_t)), "%s: not the bits of two products and glu", name.c_str());
    }
}
TEST(linear_glu) {
  if (RACES) return;  // the barriers of linear_*
  std::vector<std::shared_ptr<void>> keep;
  const auto of = [&](Format f, u32 n) { return [=, &keep](u32 k) { return blocks(f, 21, n, keep, k); }; };
  check_glu<LinearGlu>("bf16", 21, 136, [&](u32 k) { return plain<Linear>(21, 136, keep, k); },
                       [](const Weights& g, const Weights& u) { return LinearGlu{{}, {g.w}, {u.w}, {}, 0, 0, 0, 0}; });
  check_glu<LinearGluQ8_0>("q8_0", 21, 96, of(F8_0, 96), [](const Weights& g, const Weights& u) {
    return LinearGluQ8_0{{}, {g.quants}, {g.scales}, {u.quants}, {u.scales}, {}, 0, 0, 0, 0};
  });
  check_glu<LinearGluQ4_0>("q4_0", 21, 96, of(F4_0, 96), [](const Weights& g, const Weights& u) {
    return LinearGluQ4_0{{}, {g.quants}, {g.scales}, {u.quants}, {u.scales}, {}, 0, 0, 0, 0};
  });
  check_glu<LinearGluQ4_1>("q4_1", 21, 96, of(F4_1, 96), [](const Weights& g, const Weights& u) {
    return LinearGluQ4_1{{}, {g.quants}, {g.scales}, {u.quants}, {u.scales}, {}, 0, 0, 0, 0};
  });
  check_glu<LinearGluQ4_K>("q4_k", 21, 256, of(F4_K, 256), [](const Weights& g, const Weights& u) {
    return LinearGluQ4_K{{}, {g.quants}, {g.scales}, {g.supers}, {u.quants}, {u.scales}, {u.supers}, {}, 0, 0, 0, 0};
  });
  check_glu<LinearGluQ6_K>("q6_k", 21, 256, of(F6_K, 256), [](const Weights& g, const Weights& u) {
    return LinearGluQ6_K{{}, {g.quants}, {g.high}, {g.scales}, {g.supers}, {u.quants}, {u.high}, {u.scales}, {u.supers}, {}, 0, 0, 0, 0};
  });
}

TEST(gemm_sm90) {
  for (Shape s : shapes({{33, 72}, {258, 392}, {1, 8}, {130, 576}})) {
    std::vector<std::shared_ptr<void>> keep;
    Weights w = plain<Linear>(s.outputs, s.inputs, keep);
    const bf16_t* matrix = w.w;
    w.launch = [=](const Entry& e, const bf16_t* x, const float* bias, Array<float>& y, u32 rows, bool thrice) {
      const auto x_map = tensor_map(x, rows, s.inputs, 128), w_map = tensor_map(matrix, s.outputs, s.inputs, e.outputs);
      const LinearMapped a{{x_map->p}, {w_map->p}, {bias}, {y.p}, rows, s.inputs, s.outputs, bias != nullptr};
      const u32 grid = std::min(2u, (rows + 127) / 128 * ((s.outputs + e.outputs - 1) / e.outputs));  // fewer blocks than tiles
      if (thrice) test::launch3(e.name.c_str(), a, grid, 384, e.smem, y);
      else test::launch(e.name.c_str(), a, grid, 384, e.smem, 5);
    };
    check(w, {{"gemm_bf16_sm90_128", 128, 128, 196704}, {"gemm_bf16_sm90_256", 256, 128, 196672}}, RACES ? std::vector<u32>{200} : std::vector<u32>{3, 65, 300}, s.outputs % 2);
  }
}
