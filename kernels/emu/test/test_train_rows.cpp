// Rows in training against f64: backward of norms, units and embeddings, and what is done to whole tensors.
#include "compare.h"
#include "../../train_rows.cu"

using test::Array, test::Compare, test::randomise;

namespace {
struct Shape {
  u32 rows, d;
};
const Shape SHAPES[] = {{1, 1}, {1, 576}, {3, 7}, {130, 33}, {2, 64}, {65, 300}};

double inverse(const float* x, u32 d, float eps) {
  double s = 0;
  for (u32 i = 0; i < d; i++) s += double(x[i]) * x[i];
  return 1 / sqrt(s / d + eps);
}
}  // namespace

TEST(rms_norm_bwd) {
  for (auto [rows, d] : SHAPES) {
    test::Rng rng(d);
    const u32 n = rows * d, chunks = (rows + 63) / 64;
    const float eps = 1e-5f;
    Array<float> x(n), w(d), dy(n), before(n), dx(n), inv(rows), parts(chunks * d), dw(d);
    randomise(x, rng), randomise(w, rng), randomise(dy, rng), randomise(before, rng), randomise(dw, rng);
    for (u32 add = 0; add < 2; add++) {
      dx.fill([&](size_t i) { return before[i]; });
      test::launch3("rms_norm_bwd", RmsNormBwd{{dx.p}, {inv.p}, {dy.p}, {x.p}, {w.p}, rows, d, eps, add}, rows, 256, 0, {&dx, &inv});
      Compare c;
      for (u32 r = 0; r < rows; r++) {
        const double s = inverse(x.p + r * d, d, eps);
        double mean = 0;
        for (u32 i = 0; i < d; i++) mean += double(w[i]) * dy[r * d + i] * x[r * d + i] / d;
        for (u32 i = r * d; i < (r + 1) * d; i++) {
          const double u = double(w[i - r * d]) * dy[i], want = add * before[i] + s * (u - x[i] * s * s * mean);
          c.add(dx[i], want, want + 2e-7 * s * u);  // terms may cancel: at d = 1 all of them do
        }
      }
      c.close("rms_norm_bwd", 8 * sqrt(d));
    }
    const std::vector<float> old = test::copy_of(dw);
    const dim3 grid((d + 255) / 256, chunks);
    test::launch3("column_sums", ColumnSums{{dy.p}, {x.p}, {inv.p}, {parts.p}, rows, d, 1}, grid, 256, 0, parts);
    test::launch3("fold", Fold{{parts.p}, {dw.p}, chunks, d}, 2, 256, 0, dw);
    Compare weights, bias;
    for (u32 i = 0; i < d; i++) {
      double sum = old[i];
      for (u32 r = 0; r < rows; r++) sum += double(dy[r * d + i]) * x[r * d + i] * inverse(x.p + r * d, d, eps);
      weights.add(dw[i], sum);
    }
    weights.close("dw of rms_norm", 8 * sqrt(rows));
    test::launch3("column_sums", ColumnSums{{dy.p}, {nullptr}, {nullptr}, {parts.p}, rows, d, 0}, grid, 256, 0, parts);
    dw.fill([](size_t) { return 0.f; });
    test::launch("fold", Fold{{parts.p}, {dw.p}, chunks, d}, 1, 256);
    for (u32 i = 0; i < d; i++) {
      double sum = 0;
      for (u32 r = 0; r < rows; r++) sum += dy[r * d + i];
      bias.add(dw[i], sum);
    }
    bias.close("column_sums", 8 * sqrt(rows));
  }
}

TEST(glu_bwd) {
  for (u32 n : {1u, 255u, 1000u}) {
    test::Rng rng(n);
    Array<float> dz(n), gate(n), up(n), dgate(n), dup(n);
    randomise(dz, rng), randomise(up, rng);
    gate.fill([&](size_t) { return 3 * rng.normal(); });
    for (u32 act = 0; act < 2; act++) {
      const GluBwd args{{dgate.p}, {dup.p}, {dz.p}, {gate.p}, {up.p}, n, act};
      test::launch3("glu_bwd", args, 2, 256, 0, {&dgate, &dup});
      Compare g, u;
      for (u32 i = 0; i < n; i++) {
        const double x = gate[i], s = 1 / (1 + exp(-x)), c = sqrt(2 / M_PI), t = tanh(c * (x + 0.044715 * x * x * x));
        const double value = act ? 0.5 * x * (1 + t) : x * s;
        const double slope = act ? 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x) : s * (1 + x * (1 - s));
        g.add(dgate[i], dz[i] * up[i] * slope), u.add(dup[i], dz[i] * value);
      }
      g.close(act ? "gelu, dgate" : "silu, dgate", 16), u.close(act ? "gelu, dup" : "silu, dup");
    }
  }
}

TEST(scatter_and_embed) {
  for (auto [rows, d] : SHAPES) {
    test::Rng rng(d + 1);
    const u32 into = rows + 5;
    Array<float> dx(into * d), dy(rows * d);
    Array<u32> index(rows);
    randomise(dx, rng), randomise(dy, rng);
    index.fill([&](size_t i) { return u32((i * 7 + 3) % into); });
    const bool distinct_rows = into % 7 != 0;
    const std::vector<float> before = test::copy_of(dx);
    if (distinct_rows) {
      test::launch3("scatter_rows", ScatterRows{{dx.p}, {dy.p}, {index.p}, into, rows, d}, rows, 256, 0, dx);
      std::vector<float> want = before;
      for (u32 i = 0; i < rows * d; i++) want[index[i / d] * d + i % d] += dy[i];
      for (u32 i = 0; i < into * d; i++) CHECK(dx[i] == want[i], "scatter_rows: %u", i);
    }
    // Tokens r % 3, in the order of the rows.
    const u32 distinct = rows < 3 ? rows : 3;
    Array<u32> tokens(distinct), starts(distinct + 1), order(rows);
    u32 at = 0;
    for (u32 t = 0; t < distinct; t++) {
      tokens[t] = t * 2, starts[t] = at;
      for (u32 r = t; r < rows; r += 3) order[at++] = r;
    }
    starts[distinct] = at;
    dx.fill([&](size_t i) { return before[i]; });
    const EmbedBwd args{{dx.p}, {dy.p}, {tokens.p}, {starts.p}, {order.p}, into, rows, distinct, d, 1.5f};
    test::launch3("embed_bwd", args, dim3(distinct, (d + 255) / 256), 256, 0, dx);
    std::vector<double> want(before.begin(), before.end());
    for (u32 i = 0; i < rows * d; i++) want[i / d % 3 * 2 * d + i % d] += 1.5 * dy[i];
    Compare c;
    for (u32 i = 0; i < into * d; i++) c.add(dx[i], want[i]);
    c.close("embed_bwd", 8 * sqrt(rows));
  }
}

TEST(whole_tensors) {
  for (u32 n : {1u, 257u, 5000u}) {
    test::Rng rng(n);
    Array<float> x(n), y(n), parts(3);
    Array<bf16_t> w(n);
    randomise(x, rng), randomise(y, rng);
    const std::vector<float> before = test::copy_of(y);
    test::launch3("axpy", Axpy{{y.p}, {x.p}, n, 0.7f}, 3, 256, 0, y);
    for (u32 i = 0; i < n; i++) CHECK(y[i] == fmaf(0.7f, x[i], before[i]), "axpy: %u", i);
    test::launch3("copy", Copy{{y.p}, {x.p}, n}, 3, 256, 0, y);
    for (u32 i = 0; i < n; i++) CHECK(y[i] == x[i], "copy: %u", i);
    test::launch3("set_bf16", SetBf16{{w.p}, {x.p}, n}, 3, 256, 0, w);
    for (u32 i = 0; i < n; i++) CHECK(gpu::to_f32(w[i]) == test::stored(x[i]), "set_bf16: %u", i);
    test::launch3("zero", Zero{{y.p}, n}, 3, 256, 0, y);
    for (u32 i = 0; i < n; i++) CHECK(y[i] == 0, "zero: %u", i);
    test::launch3("square_sums", SquareSums{{x.p}, {parts.p}, n, 3}, 3, 256, 0, parts);
    double want = 0;
    for (u32 i = 0; i < n; i++) want += double(x[i]) * x[i];
    Compare c;
    c.add(parts[0] + parts[1] + parts[2], want);
    c.close("square_sums", 32);
  }
}

TEST(softmax_rows) {
  for (auto [rows, vocab] : SHAPES) {
    test::Rng rng(vocab);
    Array<float> x(rows * vocab);
    x.fill([&](size_t) { return 5 * rng.normal(); });
    const std::vector<float> z = test::copy_of(x);
    test::launch3("softmax_rows", SoftmaxRows{{x.p}, rows, vocab, 0.7f}, rows, 256, 0, x);
    Compare c;
    for (u32 r = 0; r < rows; r++) {
      double most = -INFINITY, sum = 0;
      for (u32 i = 0; i < vocab; i++) most = fmax(most, z[r * vocab + i]);
      for (u32 i = 0; i < vocab; i++) sum += exp((z[r * vocab + i] - most) / 0.7f);
      for (u32 i = 0; i < vocab; i++) c.add(x[r * vocab + i], exp((z[r * vocab + i] - most) / 0.7f) / sum);
    }
    c.close("softmax_rows", 32);
  }
}
