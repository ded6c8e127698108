// Products with weights against f64, and the promise that a row's bits depend on nothing but the row.
#include <algorithm>
#include <memory>
#include <string>
#include "harness.h"
#include "../../gemv.cu"

using test::Array;

namespace {
// A matrix in two shapes: widened, and a launch of an entry point that reads it as the device has it.
struct Weights {
  u32 outputs, inputs;
  std::vector<float> wide;  // [outputs, inputs]
  std::function<void(const char* name, const bf16_t* x, const float* bias, Array<float>& y, u32 rows, dim3 grid, bool thrice)> launch;
};
// An entry point: outputs and rows of a block.
struct Entry {
  std::string name;
  u32 outputs, rows;
};
std::vector<Entry> entries(const std::string& format) {
  const std::string name = "linear_" + format;
  return {{name + "_8", 16, 8}, {name + "_16", 32, 16}, {name + "_32", 32, 32}, {name + "_64", 32, 64}};
}
template <class Args>
void run(const char* name, const Args& args, Array<float>& y, dim3 grid, bool thrice) {
  if (thrice) test::launch3(name, args, grid, 256, 0, y);
  else test::launch(name, args, grid, 256, 0, 99);
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
      if (rows > e.rows && e.rows < 64 && rows > 9) continue;
      Array<bf16_t> x(rows * n);
      Array<float> y(rows * m);
      std::copy(all.p, all.p + x.n, x.p);
      w.launch(e.name.c_str(), x.p, has_bias ? bias.p : nullptr, y, rows, dim3((m + e.outputs - 1) / e.outputs, (rows + e.rows - 1) / e.rows), rows == counts[0]);
      std::vector<double> got(y.p, y.p + y.n);
      const std::string what = e.name + " " + std::to_string(m) + " x " + std::to_string(n);
      test::close(what.c_str(), got, {want.begin(), want.begin() + y.n}, {rough.begin(), rough.begin() + y.n});
      // What was seen so far of these rows, from whichever launch.
      const size_t known = std::min(first.size(), y.n);
      CHECK(!memcmp(first.data(), y.p, known * sizeof(float)), "%s: %u rows of %u x %u differ from fewer rows", e.name.c_str(), rows, m, n);
      if (y.n > first.size()) first.assign(y.p, y.p + y.n);
    }
}

template <class Args>
Weights plain(u32 outputs, u32 inputs, std::vector<std::shared_ptr<void>>& keep) {
  auto w = std::make_shared<Array<bf16_t>>(size_t(outputs) * inputs);
  keep.push_back(w);
  test::Rng rng(outputs * 7 + inputs);
  w->fill([&](size_t) { return gpu::to_bf16(rng.normal() / 8); });
  Weights out{outputs, inputs, {}, {}};
  for (size_t i = 0; i < w->n; i++) out.wide.push_back(gpu::to_f32((*w)[i]));
  bf16_t* p = w->p;
  out.launch = [=](const char* name, const bf16_t* x, const float* bias, Array<float>& y, u32 rows, dim3 grid, bool thrice) {
    run(name, Args{{x}, {p}, {bias}, {y.p}, rows, inputs, outputs, bias != nullptr}, y, grid, thrice);
  };
  return out;
}
}  // namespace

struct Shape {
  u32 outputs, inputs;
};

TEST(linear_bf16) {
  for (Shape s : {Shape{1, 8}, {17, 72}, {48, 576}, {33, 1096}, {16, 2048}}) {
    std::vector<std::shared_ptr<void>> keep;
    check(plain<Linear>(s.outputs, s.inputs, keep), entries("bf16"), {1, 3, 9, 20, 65}, s.outputs % 2);
  }
}
TEST(linear_bf16_odd) {
  for (Shape s : {Shape{1, 1}, {5, 7}, {18, 129}, {31, 579}}) {
    std::vector<std::shared_ptr<void>> keep;
    check(plain<LinearOdd>(s.outputs, s.inputs, keep), {{"linear_bf16_odd", 16, 8}}, {1, 4, 9}, s.outputs % 2);
  }
}
