// Row operations against f64.
#include "harness.h"
#include "../../rows.cu"

using test::Array;

TEST(rms_norm) {
  for (u32 d : {1u, 7u, 64u, 576u, 1030u}) {
    const u32 rows = 3;
    test::Rng rng(d);
    Array<float> x(rows * d), w(d);
    Array<bf16_t> y(rows * d);
    x.fill([&](size_t) { return rng.normal(); });
    w.fill([&](size_t) { return rng.normal(); });
    test::launch3("rms_norm", RmsNorm{{x.p}, {w.p}, {y.p}, rows, d, 1e-5f}, rows, 256, 0, y);
    std::vector<double> got, want, rough;
    for (u32 r = 0; r < rows; r++) {
      double s = 0;
      for (u32 i = 0; i < d; i++) s += double(x[r * d + i]) * x[r * d + i];
      for (u32 i = 0; i < d; i++) {
        const double v = x[r * d + i] * double(w[i]) / sqrt(s / d + 1e-5f);
        want.push_back(v);
        rough.push_back(gpu::to_f32(gpu::to_bf16(float(v))));
        got.push_back(gpu::to_f32(y[r * d + i]));
      }
    }
    test::close("rms_norm", got, want, rough);
  }
}
