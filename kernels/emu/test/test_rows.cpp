// Row operations against f64, at widths off every multiple that a kernel may like. Embeddings of block formats are checked
// against the file's own definition by the tests in Rust; here their memory is.
#include "harness.h"
#include "../../rows.cu"

using test::Array;

namespace {
struct Shape {
  u32 rows, d;
};
const Shape SHAPES[] = {{1, 1}, {1, 576}, {3, 7}, {5, 33}, {2, 64}, {7, 1030}};

double stored(double v) { return gpu::to_f32(gpu::to_bf16(float(v))); }
void randomise(Array<float>& a, test::Rng& rng) {
  a.fill([&](size_t) { return rng.normal(); });
}
void randomise(Array<bf16_t>& a, test::Rng& rng) {
  a.fill([&](size_t) { return gpu::to_bf16(rng.normal()); });
}

// Collects what a kernel gave and what it should have given.
struct Compare {
  std::vector<double> got, want, rough;
  void add(double g, double w, bool bf16) {
    got.push_back(g), want.push_back(w), rough.push_back(bf16 ? stored(w) : double(float(w)));
  }
  void add(bf16_t g, double w) { add(gpu::to_f32(g), w, true); }
  void add(float g, double w) { add(g, w, false); }
};

// Row `r` of x, its mean square, and what the norm makes of it.
double inverse(const float* x, u32 d, float eps) {
  double s = 0;
  for (u32 i = 0; i < d; i++) s += double(x[i]) * x[i];
  return 1 / sqrt(s / d + eps);
}
}  // namespace

TEST(norms) {
  for (auto [rows, d] : SHAPES) {
    test::Rng rng(d);
    Array<float> x(rows * d), w(d), r(rows * d), sum(rows * d), out(rows * d);
    Array<bf16_t> y(rows * d);
    randomise(x, rng), randomise(w, rng), randomise(r, rng);
    const float eps = 1e-5f;
    Compare norm, added, normed;
    test::launch3("rms_norm", RmsNorm{{x.p}, {w.p}, {y.p}, rows, d, eps}, rows, 256, 0, y);
    for (u32 i = 0; i < rows * d; i++) norm.add(y[i], x[i] * inverse(x.p + i / d * d, d, eps) * w[i % d]);
    test::close("rms_norm", norm.got, norm.want, norm.rough);

    sum.fill([&](size_t i) { return x[i]; });
    test::launch("add_rms_norm", AddRmsNorm{{sum.p}, {r.p}, {w.p}, {y.p}, rows, d, eps}, rows, 256, 0, 7);
    for (u32 i = 0; i < rows * d; i++) {
      CHECK(sum[i] == x[i] + r[i], "add_rms_norm: sum %u", i);
      added.add(y[i], sum[i] * inverse(sum.p + i / d * d, d, eps) * w[i % d]);
    }
    test::close("add_rms_norm", added.got, added.want, added.rough);

    out.fill([&](size_t i) { return x[i]; });
    test::launch3("add_normed", AddNormed{{out.p}, {r.p}, {w.p}, rows, d, eps}, rows, 256, 0, out);
    for (u32 i = 0; i < rows * d; i++) normed.add(out[i], x[i] + r[i] * inverse(r.p + i / d * d, d, eps) * w[i % d]);
    test::close("add_normed", normed.got, normed.want, normed.rough);
  }
}

TEST(head_norm) {
  for (auto [n, head_dim] : {Shape{1, 2}, Shape{9, 6}, Shape{5, 64}, Shape{27, 80}, Shape{3, 129}}) {
    test::Rng rng(head_dim);
    Array<float> x(n * head_dim), w(head_dim), y(n * head_dim);
    randomise(x, rng), randomise(w, rng);
    y.fill([&](size_t i) { return x[i]; });
    test::launch3("head_norm", HeadNorm{{y.p}, {w.p}, n, head_dim, 1e-6f}, (n + 7) / 8, 256, 0, y);
    Compare c;
    for (u32 i = 0; i < n * head_dim; i++) c.add(y[i], x[i] * inverse(x.p + i / head_dim * head_dim, head_dim, 1e-6f) * w[i % head_dim]);
    test::close("head_norm", c.got, c.want, c.rough);
  }
}

TEST(add_and_glu) {
  for (u32 n : {1u, 255u, 256u, 1000u}) {
    test::Rng rng(n);
    Array<float> x(n), r(n), gate(n), up(n);
    Array<bf16_t> y(n);
    randomise(x, rng), randomise(r, rng), randomise(gate, rng), randomise(up, rng);
    const std::vector<float> before(x.p, x.p + n);
    test::launch3("add", Add{{x.p}, {r.p}, n}, 2, 256, 0, x);
    for (u32 i = 0; i < n; i++) CHECK(x[i] == before[i] + r[i], "add: %u", i);
    for (u32 act = 0; act < 2; act++) {
      test::launch3("glu", Glu{{gate.p}, {up.p}, {y.p}, n, act}, 2, 256, 0, y);
      Compare c;
      for (u32 i = 0; i < n; i++) {
        const double g = gate[i], silu = g / (1 + exp(-g)), gelu = 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
        c.add(y[i], (act ? gelu : silu) * up[i]);
      }
      test::close(act ? "gelu" : "silu", c.got, c.want, c.rough);
      Array<float> sum(n);
      sum.fill([&](size_t i) { return up[i]; });
      test::launch3("add_activated", AddActivated{{sum.p}, {gate.p}, n, act}, 2, 256, 0, sum);
      Compare added;
      for (u32 i = 0; i < n; i++) {
        const double g = gate[i], silu = g / (1 + exp(-g)), gelu = 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
        added.add(sum[i], up[i] + (act ? gelu : silu));
      }
      test::close("add_activated", added.got, added.want, added.rough);
    }
  }
}

TEST(rope) {
  struct Heads {
    u32 rows, heads, head_dim;
  };
  for (auto [rows, heads, head_dim] : {Heads{1, 1, 2}, Heads{3, 3, 6}, Heads{2, 5, 64}, Heads{7, 2, 80}}) {
    test::Rng rng(head_dim);
    const u32 half = head_dim / 2, n = rows * heads * head_dim;
    Array<float> x(n), table(rows * head_dim), y(n);
    randomise(x, rng), randomise(table, rng);
    y.fill([&](size_t i) { return x[i]; });
    test::launch3("rope", Rope{{y.p}, {table.p}, rows, heads, head_dim}, rows, 256, 0, y);
    Compare c;
    for (u32 i = 0; i < n; i++) {
      const u32 r = i / (heads * head_dim), k = i % head_dim;
      const double cosine = table[r * head_dim + k % half], sine = table[r * head_dim + half + k % half];
      c.add(y[i], k < half ? x[i] * cosine - x[i + half] * sine : x[i] * cosine + x[i - half] * sine);
    }
    test::close("rope", c.got, c.want, c.rough);
  }
}

TEST(gather_and_embed) {
  for (auto [rows, d] : SHAPES) {
    const u32 from = rows + 3;
    test::Rng rng(d);
    Array<float> table(from * d), y(rows * d);
    Array<bf16_t> narrow(from * d);
    Array<u32> index(rows);
    randomise(table, rng), randomise(narrow, rng);
    index.fill([&](size_t) { return rng.bits() % from; });
    test::launch3("gather_rows", GatherRows{{table.p}, {index.p}, {y.p}, from, rows, d}, rows, 256, 0, y);
    for (u32 i = 0; i < rows * d; i++) CHECK(y[i] == table[index[i / d] * d + i % d], "gather_rows: %u", i);
    const auto bytes = [](auto& a) { return In<uint8_t>{reinterpret_cast<uint8_t*>(a.p)}; };
    test::launch3("embed_f32", Embed{bytes(table), {index.p}, {y.p}, from, rows, d, 4, 1.5f}, rows, 256, 0, y);
    for (u32 i = 0; i < rows * d; i++) CHECK(y[i] == 1.5f * table[index[i / d] * d + i % d], "embed_f32: %u", i);
    test::launch3("embed_bf16", Embed{bytes(narrow), {index.p}, {y.p}, from, rows, d, 2, 1.5f}, rows, 256, 0, y);
    for (u32 i = 0; i < rows * d; i++) CHECK(y[i] == 1.5f * gpu::to_f32(narrow[index[i / d] * d + i % d]), "embed_bf16: %u", i);
  }
}

TEST(embed_blocks_stay_inside) {
  struct Format {
    const char* name;
    u32 multiple, quants, high, scales, supers;
  };
  for (auto f : {Format{"embed_q8_0", 32, 256, 0, 16, 0}, Format{"embed_q4_0", 32, 128, 0, 16, 0}, Format{"embed_q4_1", 32, 128, 0, 32, 0},
                 Format{"embed_q4_k", 256, 128, 0, 16, 16}, Format{"embed_q6_k", 256, 128, 64, 16, 8}}) {
    for (u32 blocks : {1u, 3u}) {
      const u32 vocab = 37, d = f.multiple * blocks, rows = 3, strips = (vocab + 15) / 16, tiles = (d + 63) / 64;
      Array<u32> quants(strips * tiles * f.quants), high(strips * tiles * f.high), scales(strips * tiles * f.scales),
          supers(strips * (d / 256) * f.supers), tokens(rows);
      for (Array<u32>* a : {&quants, &high, &scales, &supers}) a->fill([](size_t) { return 0x3c003c00u; });
      tokens.fill([&](size_t i) { return i == 0 ? 0 : i == 1 ? 17 : vocab - 1; });
      Array<float> y(rows * d);
      const EmbedBlocks args{{quants.p}, {high.p},  {scales.p}, {supers.p}, {tokens.p}, {y.p},   vocab,
                             rows,       d,         f.quants,   f.high,     f.scales,   f.supers, 1.f};
      test::launch3(f.name, args, rows, 256, 0, y);
      for (u32 i = 0; i < rows * d; i++) CHECK(y[i] == y[i], "%s: %u was not written", f.name, i);
    }
  }
}

TEST(dense) {
  for (auto [rows, inputs] : SHAPES) {
    const u32 outputs = 11;
    test::Rng rng(inputs);
    Array<float> w(outputs * inputs), bias(outputs), y(rows * outputs);
    Array<bf16_t> x(rows * inputs);
    randomise(w, rng), randomise(bias, rng), randomise(x, rng);
    for (u32 has_bias = 0; has_bias < 2; has_bias++) {
      const Dense args{{reinterpret_cast<uint8_t*>(w.p)}, {x.p}, {bias.p}, {y.p}, rows, outputs, inputs, 4, has_bias};
      test::launch3("dense_f32", args, dim3((outputs + 7) / 8, rows), 256, 0, y);
      Compare c;
      for (u32 i = 0; i < rows * outputs; i++) {
        double s = has_bias ? bias[i % outputs] : 0;
        for (u32 k = 0; k < inputs; k++) s += double(w[i % outputs * inputs + k]) * gpu::to_f32(x[i / outputs * inputs + k]);
        c.add(y[i], s);
      }
      test::close("dense_f32", c.got, c.want, c.rough, 8 * sqrt(inputs));
    }
  }
}
