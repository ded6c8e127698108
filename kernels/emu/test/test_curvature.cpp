// What a one-pass reward does with its matrix, and means of rows, against f64.
#include "compare.h"
#include "../../curvature.cu"

using test::Array, test::Compare, test::randomise;

namespace {
template <class T, class Mul, class Outer>
void matrices(const char* mul, const char* outer) {
  struct Shape {
    u32 m, n, b;
  };
  for (auto [m, n, b] : {Shape{1, 1, 1}, Shape{9, 33, 2}, Shape{40, 300, 1}, Shape{7, 129, 3}}) {
    test::Rng rng(n);
    Array<T> a(m * n), x(b * n), y(b * m), p(n * n);
    a.fill([&](size_t) { return T(rng.normal()); });
    x.fill([&](size_t) { return T(rng.normal()); });
    test::launch3(mul, Mul{{y.p}, {a.p}, {x.p}, b, m, n}, (m + 7) / 8, 256, 0, y);
    Compare c;
    for (u32 k = 0; k < b; k++)
      for (u32 i = 0; i < m; i++) {
        double want = 0;
        for (u32 j = 0; j < n; j++) want += double(a[i * n + j]) * double(x[k * n + j]);
        c.add(y[k * m + i], want);
      }
    c.close(mul, 8 * sqrt(n));
    for (double scale : {1.0, 1.0 / 0.99}) {
      p.fill([&](size_t i) { return T(i % n == i / n ? 10 : 0); });
      const Outer args{{p.p}, {x.p}, scale, b, n};
      test::launch(outer, args, dim3{(n + 255) / 256, (n + 15) / 16, 1}, 256);
      Compare d;
      for (u32 i = 0; i < n; i++)
        for (u32 j = 0; j < n; j++) {
          double want = i == j ? 10 : 0;
          for (u32 k = 0; k < b; k++) want -= double(x[k * n + i]) * double(x[k * n + j]);
          d.add(p[i * n + j], scale * want);
          CHECK(p[i * n + j] == p[j * n + i], "%s: not symmetric at %u, %u", outer, i, j);
        }
      d.close(outer, 8 * sqrt(b + 1));
    }
  }
}
}  // namespace

TEST(curvature_f32) { matrices<float, MulRowsF32, SubtractOuterF32>("mul_rows_f32", "subtract_outer_f32"); }
TEST(curvature_f64) { matrices<double, MulRowsF64, SubtractOuterF64>("mul_rows_f64", "subtract_outer_f64"); }

TEST(mean_rows) {
  for (u32 d : {1u, 33u, 300u}) {
    test::Rng rng(d);
    const u32 rows = 20, count = 3;
    const u32 bounds[] = {0, 1, 3, 20, 5, 9};
    Array<float> x(rows * d), y(count * d);
    Array<u32> ranges(2 * count);
    randomise(x, rng);
    ranges.fill([&](size_t i) { return bounds[i]; });
    test::launch3("mean_rows", MeanRows{{y.p}, {x.p}, {ranges.p}, count, rows, d}, count, 256, 0, y);
    Compare c;
    for (u32 i = 0; i < count; i++)
      for (u32 j = 0; j < d; j++) {
        double want = 0;
        for (u32 r = bounds[2 * i]; r < bounds[2 * i + 1]; r++) want += double(x[r * d + j]) / (bounds[2 * i + 1] - bounds[2 * i]);
        c.add(y[i * d + j], want);
      }
    c.close("mean_rows", 8 * sqrt(rows));
  }
}
