// What encoders add, against f64.
#include "compare.h"
#include "../../encoder.cu"
#include "../../train_rows.cu"

using test::Array, test::Compare, test::randomise;

namespace {
struct Shape {
  u32 rows, d;
};
const Shape SHAPES[] = {{1, 1}, {1, 576}, {3, 7}, {130, 33}, {2, 64}, {65, 300}};

struct Row {
  double mean = 0, s = 0;
  Row(const float* x, u32 d, float eps) {
    for (u32 i = 0; i < d; i++) mean += double(x[i]) / d;
    for (u32 i = 0; i < d; i++) s += (x[i] - mean) * (x[i] - mean) / d;
    s = 1 / sqrt(s + eps);
  }
};
double cdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
}  // namespace

TEST(layer_norm) {
  for (auto [rows, d] : SHAPES) {
    test::Rng rng(d);
    const u32 n = rows * d, chunks = (rows + 63) / 64;
    const float eps = 1e-6f;
    Array<float> x(n), w(d), b(d), dy(n), before(n), dx(n), stats(2 * rows), parts(chunks * d), dw(d);
    Array<bf16_t> y(n);
    // A mean beside which a difference of squares would lose half of the digits.
    x.fill([&](size_t) { return 20 + rng.normal(); });
    randomise(w, rng), randomise(b, rng), randomise(dy, rng), randomise(before, rng), randomise(dw, rng);
    test::launch("layer_norm", LayerNorm{{x.p}, {w.p}, {b.p}, {y.p}, rows, d, eps}, rows, 256);
    Compare forward;
    for (u32 r = 0; r < rows; r++) {
      const Row m(x.p + r * d, d, eps);
      for (u32 i = 0; i < d; i++) forward.add(y[r * d + i], w[i] * (x[r * d + i] - m.mean) * m.s + b[i]);
    }
    forward.close("layer_norm", 8 * sqrt(d));
    for (u32 add = 0; add < 2; add++) {
      dx.fill([&](size_t i) { return before[i]; });
      const LayerNormBwd args{{dx.p}, {stats.p}, {dy.p}, {x.p}, {w.p}, rows, d, eps, add};
      test::launch3("layer_norm_bwd", args, rows, 256, 0, {&dx, &stats});
      Compare c;
      for (u32 r = 0; r < rows; r++) {
        const Row m(x.p + r * d, d, eps);
        double total = 0, along = 0;
        for (u32 i = 0; i < d; i++) {
          const double u = double(w[i]) * dy[r * d + i];
          total += u / d, along += u * (x[r * d + i] - m.mean) * m.s / d;
        }
        for (u32 i = 0; i < d; i++) {
          const double u = double(w[i]) * dy[r * d + i], h = (x[r * d + i] - m.mean) * m.s;
          const double want = add * before[r * d + i] + m.s * (u - total - h * along);
          c.add(dx[r * d + i], want, want + 2e-6 * m.s * fabs(u));  // terms may cancel, and x is twenty times as large as its spread
        }
      }
      c.close("layer_norm_bwd", 8 * sqrt(d));
    }
    const std::vector<float> old = test::copy_of(dw);
    const dim3 grid((d + 255) / 256, chunks);
    test::launch3("column_dots", ColumnDots{{dy.p}, {x.p}, {stats.p}, {parts.p}, rows, d, 1}, grid, 256, 0, {&parts});
    test::launch("fold", Fold{{parts.p}, {dw.p}, chunks, d}, 1, 256);
    Compare weights;
    for (u32 i = 0; i < d; i++) {
      double sum = old[i], rough = 0;
      for (u32 r = 0; r < rows; r++) {
        const Row m(x.p + r * d, d, eps);
        sum += dy[r * d + i] * (x[r * d + i] - m.mean) * m.s, rough += 2e-6 * fabs(dy[r * d + i]) * m.s;
      }
      weights.add(dw[i], sum, sum + rough);
    }
    weights.close("dw of layer_norm", 8 * sqrt(rows));
  }
}

TEST(gelu) {
  for (u32 n : {1u, 255u, 1000u}) {
    test::Rng rng(n);
    Array<float> x(n), dy(n), dx(n);
    Array<bf16_t> y(n);
    randomise(dy, rng);
    x.fill([&](size_t) { return 3 * rng.normal(); });
    test::launch("gelu", Gelu{{x.p}, {y.p}, n}, 2, 256);
    test::launch3("gelu_bwd", GeluBwd{{dx.p}, {dy.p}, {x.p}, n}, 2, 256, 0, {&dx});
    Compare value, slope;
    for (u32 i = 0; i < n; i++) {
      const double v = x[i];
      value.add(y[i], v * cdf(v));
      slope.add(dx[i], dy[i] * (cdf(v) + v * exp(-v * v / 2) / sqrt(2 * M_PI)));
    }
    value.close("gelu"), slope.close("gelu_bwd", 16);
  }
}

TEST(layer_scale) {
  for (auto [rows, d] : SHAPES) {
    test::Rng rng(d + 3);
    const u32 n = rows * d, chunks = (rows + 63) / 64;
    Array<float> x(n), y(n), w(d), dy(n), dx(n), parts(chunks * d), dw(d);
    randomise(x, rng), randomise(y, rng), randomise(w, rng), randomise(dy, rng);
    const std::vector<float> before = test::copy_of(y);
    test::launch3("add_scaled", AddScaled{{y.p}, {x.p}, {w.p}, rows, d}, rows, 256, 0, {&y});
    test::launch3("scale_columns", ScaleColumns{{dx.p}, {dy.p}, {w.p}, rows, d}, rows, 256, 0, {&dx});
    test::launch3("column_dots", ColumnDots{{dy.p}, {x.p}, {nullptr}, {parts.p}, rows, d, 0}, dim3((d + 255) / 256, chunks), 256, 0, {&parts});
    dw.fill([](size_t) { return 0.f; });
    test::launch("fold", Fold{{parts.p}, {dw.p}, chunks, d}, 1, 256);
    Compare sums;
    for (u32 i = 0; i < n; i++) {
      CHECK(y[i] == fmaf(w[i % d], x[i], before[i]), "add_scaled: %u", i);
      CHECK(dx[i] == w[i % d] * dy[i], "scale_columns: %u", i);
    }
    for (u32 i = 0; i < d; i++) {
      double sum = 0;
      for (u32 r = 0; r < rows; r++) sum += double(dy[r * d + i]) * x[r * d + i];
      sums.add(dw[i], sum);
    }
    sums.close("dw of add_scaled", 8 * sqrt(rows));
  }
}
