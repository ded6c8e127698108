// Backward of products with weights against f64. Weights in blocks are widened by the embedding kernels, whose values the tests in Rust
// hold to the file's definition.
#include <string>
#include "compare.h"
#include "../../rows.cu"
#include "../../train_gemm.cu"

using test::Array, test::Compare, test::randomise, test::stored;

namespace {
struct Shape {
  u32 rows, inputs, outputs;
};
const Shape SHAPES[] = {{1, 1, 1}, {5, 33, 7}, {66, 72, 40}, {3, 200, 131}, {130, 64, 70}};

template <class Args>
void check_dx(const std::string& format, Args args, const std::vector<double>& w) {
  const u32 rows = args.rows, inputs = args.inputs, outputs = args.outputs;
  test::Rng rng(inputs);
  Array<float> dy(rows * outputs), dx(rows * inputs), start(rows * inputs);
  randomise(dy, rng), randomise(start, rng);
  args.dy = {dy.p}, args.dx = {dx.p};
  std::vector<float> first;
  for (u32 tile : {64u, 128u})
    for (u32 add = 0; add < 2; add++) {
      std::copy(start.p, start.p + start.n, dx.p);
      args.add = add;
      test::launch3(("linear_bwd_x_" + format + "_" + std::to_string(tile)).c_str(), args, dim3((rows + tile - 1) / tile, (inputs + tile - 1) / tile), 256,
                    0, dx);
      Compare c;
      for (u32 r = 0; r < rows; r++)
        for (u32 i = 0; i < inputs; i++) {
          double want = add * start[r * inputs + i], rough = want;
          for (u32 o = 0; o < outputs; o++) want += dy[r * outputs + o] * w[o * inputs + i], rough += stored(dy[r * outputs + o]) * stored(w[o * inputs + i]);
          c.add(dx[r * inputs + i], want, rough);
        }
      c.close(format.c_str(), 8 * sqrt(outputs));
      if (add) continue;
      if (tile == 64) first = test::copy_of(dx);
      CHECK(!memcmp(first.data(), dx.p, dx.n * sizeof(float)), "%s: the tiles' bits differ", format.c_str());
    }
}
template <class T>
void check_plain(const char* format, T (*narrow)(float)) {
  for (auto [rows, inputs, outputs] : SHAPES) {
    test::Rng rng(outputs);
    Array<T> w(outputs * inputs);
    std::vector<double> wide;
    w.fill([&](size_t) {
      const T x = narrow(rng.normal());
      wide.push_back(widen(x));
      return x;
    });
    check_dx(format, LinearBwdX{{}, {}, {reinterpret_cast<uint8_t*>(w.p)}, rows, inputs, outputs, sizeof(T), 0}, wide);
  }
}
}  // namespace

TEST(dx_of_plain_weights) {
  check_plain<bf16_t>("bf16", [](float x) { return gpu::to_bf16(x); });
  check_plain<float>("f32", [](float x) { return x; });
  check_plain<f16_t>("f16", [](float x) {  // some values that f16 has
    return f16_t{uint16_t((x < 0 ? 0xb800 : 0x3800) + (int(fabsf(x) * 100) & 1023))};
  });
}

TEST(dx_of_blocks) {
  struct Format {
    const char* name;
    u32 multiple, quants, high, scales, supers;
  };
  for (auto f : {Format{"q8_0", 32, 256, 0, 16, 0}, Format{"q4_0", 32, 128, 0, 16, 0}, Format{"q4_1", 32, 128, 0, 32, 0},
                 Format{"q4_k", 256, 128, 0, 16, 16}, Format{"q6_k", 256, 128, 64, 16, 8}})
    for (auto [rows, blocks, outputs] : {Shape{5, 1, 37}, Shape{66, 3, 70}}) {
      const u32 inputs = f.multiple * blocks, strips = (outputs + 15) / 16, tiles = (inputs + 63) / 64;
      test::Rng rng(inputs);
      Array<u32> quants(strips * tiles * f.quants), high(strips * tiles * f.high), scales(strips * tiles * f.scales),
          supers(strips * (inputs / 256) * f.supers), tokens(outputs);
      for (Array<u32>* a : {&quants, &high}) a->fill([&](size_t) { return rng.bits(); });
      // Halves near 0.01, or the small integers of a K format.
      const auto half = [&](size_t) { return (0x2000u + rng.bits() % 1024) | (0x2000u + rng.bits() % 1024) << 16; };
      scales.fill(f.supers ? std::function<u32(size_t)>([&](size_t) { return rng.bits() & 0x3f3f3f3fu; }) : half);
      supers.fill(half);
      tokens.fill([](size_t i) { return u32(i); });
      Array<float> w(outputs * inputs);
      const EmbedBlocks embed{{quants.p}, {high.p}, {scales.p}, {supers.p}, {tokens.p}, {w.p}, outputs, outputs, inputs, f.quants, f.high, f.scales, f.supers, 1};
      test::launch(("embed_" + std::string(f.name)).c_str(), embed, outputs, 256);
      const LinearBwdXBlocks args{{}, {}, {quants.p}, {high.p}, {scales.p}, {supers.p}, rows, inputs, outputs, f.quants, f.high, f.scales, f.supers, 0};
      check_dx(f.name, args, {w.p, w.p + w.n});
    }
}

TEST(dw) {
  for (auto [rows, inputs, outputs] : SHAPES) {
    test::Rng rng(rows);
    Array<float> dy(rows * outputs), dw(outputs * inputs), start(outputs * inputs);
    Array<bf16_t> x(rows * inputs);
    randomise(dy, rng), randomise(x, rng), randomise(start, rng);
    for (u32 tile : {64u, 128u}) {
      std::copy(start.p, start.p + start.n, dw.p);
      test::launch3(tile == 64 ? "linear_bwd_w_64" : "linear_bwd_w_128", LinearBwdW{{dw.p}, {dy.p}, {x.p}, rows, inputs, outputs},
                    dim3((outputs + tile - 1) / tile, (inputs + tile - 1) / tile), 256, 0, dw);
      Compare c;
      for (u32 o = 0; o < outputs; o++)
        for (u32 i = 0; i < inputs; i++) {
          double want = start[o * inputs + i], rough = want;
          for (u32 r = 0; r < rows; r++)
            want += double(dy[r * outputs + o]) * gpu::to_f32(x[r * inputs + i]), rough += stored(dy[r * outputs + o]) * gpu::to_f32(x[r * inputs + i]);
          c.add(dw[o * inputs + i], want, rough);
        }
      c.close("linear_bwd_w", 8 * sqrt(rows));
    }
  }
}
