// Attention in training, forward and backward, against f64, for masks of every kind.
#include <string>
#include "compare.h"
#include "../../train_attention.cu"

using test::Array, test::Compare, test::randomise, test::stored;

namespace {
using Range = std::vector<u32>;
// What each row sees, and the tables made of it.
struct Mask {
  std::vector<std::vector<Range>> rows;
  std::vector<u32> ranges, ends, tiles[2], tile_ends[2];
  bool sees(u32 i, u32 j) const {
    for (const Range& r : rows[i])
      if (j >= r[0] && j < r[1]) return true;
    return false;
  }
  void finish() {
    for (auto& row : rows) {
      for (auto& r : row) ranges.push_back(r[0]), ranges.push_back(r[1]);
      ends.push_back(u32(ranges.size() / 2));
    }
    const u32 n = u32(rows.size()), tiles_n = (n + 63) / 64;
    for (int turned = 0; turned < 2; turned++)
      for (u32 x = 0; x < tiles_n; x++) {
        for (u32 y = 0; y < tiles_n; y++) {
          u32 count = 0;
          for (u32 i = x * 64; i < std::min(n, x * 64 + 64); i++)
            for (u32 j = y * 64; j < std::min(n, y * 64 + 64); j++) count += turned ? sees(j, i) : sees(i, j);
          if (count) tiles[turned].push_back(2 * y + (count == 64 * 64));
        }
        tile_ends[turned].push_back(u32(tiles[turned].size()));
      }
  }
};
Mask causal(const std::vector<u32>& lens, u32 window) {
  Mask m;
  u32 at = 0;
  for (u32 n : lens) {
    for (u32 i = 0; i < n; i++) m.rows.push_back({{at + (i + 1 > window ? i + 1 - window : 0), at + i + 1}});
    at += n;
  }
  m.finish();
  return m;
}
Mask full(u32 n) {
  Mask m;
  m.rows.assign(n, {{0, n}});
  m.finish();
  return m;
}
// Rows that see a prefix, a stretch far from it and themselves.
Mask scattered(u32 n) {
  Mask m;
  for (u32 i = 0; i < n; i++) {
    m.rows.push_back({{0, std::min(n, 1 + i % 5)}});
    if (i > 100) m.rows.back().push_back({i - 90, i - 80});
    if (i > 5) m.rows.back().push_back({i, i + 1});
  }
  m.finish();
  return m;
}
struct Heads {
  u32 kv_heads, group, dim, slice, forward, backward;
  const char* name;
};

template <class T>
void put(Array<T>& a, const std::vector<T>& v) {
  std::copy(v.begin(), v.end(), a.p);
}

// Forward and backward in f64; `rough` rounds what the kernels round. `rows` of everything as in the arguments.
struct Reference {
  std::vector<double> y, lse, dq, dk, dv;
  Reference(const Mask& m, const Heads& g, float scale, const Array<float>& q, const Array<float>& k, const Array<float>& v, const Array<float>& dy, bool rough)
      : y(q.n), lse(q.n / g.dim), dq(q.n), dk(k.n), dv(k.n) {
    const auto at = [&](const Array<float>& a, size_t i) { return rough ? stored(a.p[i]) : double(a.p[i]); };
    const auto round = [&](double x) { return rough ? stored(x) : x; };
    const u32 n = u32(m.rows.size()), heads = g.kv_heads * g.group, d = g.dim;
    for (u32 i = 0; i < n; i++)
      for (u32 h = 0; h < heads; h++) {
        const size_t qi = (size_t(i) * heads + h) * d;
        std::vector<double> s(n), dp(n);
        double most = -INFINITY, sum = 0, delta = 0;
        for (u32 j = 0; j < n; j++) {
          if (!m.sees(i, j)) continue;
          const size_t kj = (size_t(j) * g.kv_heads + h / g.group) * d;
          for (u32 c = 0; c < d; c++) s[j] += at(q, qi + c) * at(k, kj + c), dp[j] += at(dy, qi + c) * at(v, kj + c);
          s[j] *= scale, most = fmax(most, s[j]);
        }
        for (u32 j = 0; j < n; j++)
          if (m.sees(i, j)) sum += exp(s[j] - most);
        const double l = lse[i * heads + h] = most + log(sum);
        for (u32 j = 0; j < n; j++)
          if (m.sees(i, j))
            for (u32 c = 0; c < d; c++) y[qi + c] += round(exp(s[j] - most)) / sum * at(v, (size_t(j) * g.kv_heads + h / g.group) * d + c);
        for (u32 c = 0; c < d; c++) delta += at(dy, qi + c) * round(y[qi + c]);
        for (u32 j = 0; j < n; j++) {
          if (!m.sees(i, j)) continue;
          const size_t kj = (size_t(j) * g.kv_heads + h / g.group) * d;
          const double p = exp(s[j] - l), ds = round(scale * p * (dp[j] - delta));
          for (u32 c = 0; c < d; c++) dq[qi + c] += ds * at(k, kj + c), dk[kj + c] += ds * at(q, qi + c), dv[kj + c] += round(p) * at(dy, qi + c);
        }
      }
  }
};

void check(const Mask& m, const Heads& g) {
  const u32 n = u32(m.rows.size()), heads = g.kv_heads * g.group, d = g.dim, tiles = (n + 63) / 64, visits = u32(m.tiles[0].size());
  const u32 ld = (d + 15) / 16 * 16 + 8, slices = (d + g.slice - 1) / g.slice;
  const float scale = 1.f / sqrtf(float(d));
  test::Rng rng(n + d);
  Array<float> q(n * heads * d), k(n * g.kv_heads * d), v(k.n), dy(q.n), lse(n * heads), delta(n * heads), dq(q.n), dk(k.n), dv(k.n);
  Array<bf16_t> y(q.n);
  Array<u32> ranges(m.ranges.size()), ends(n), list(visits), list_ends(tiles), turned(visits), turned_ends(tiles);
  put(ranges, m.ranges), put(ends, m.ends), put(list, m.tiles[0]), put(list_ends, m.tile_ends[0]), put(turned, m.tiles[1]), put(turned_ends, m.tile_ends[1]);
  for (Array<float>* a : {&q, &k, &v, &dy}) randomise(*a, rng);
  const std::string name = g.name;
  const TrainAttend args{{q.p}, {k.p}, {v.p}, {ranges.p}, {ends.p}, {list.p}, {list_ends.p}, {y.p}, {lse.p}, n, g.kv_heads, g.group, d, u32(ranges.n / 2), visits, scale};
  const dim3 grid(tiles, heads, slices);
  const size_t shared = 2 * ((64 + g.forward) * ld + g.forward * (g.slice + 8)) + 512;
  test::launch3(("train_attend_" + name).c_str(), args, grid, 128, shared, y);
  test::launch3(("train_attend_" + name).c_str(), args, grid, 128, shared, {&lse});
  const Reference want(m, g, scale, q, k, v, dy, false), rough(m, g, scale, q, k, v, dy, true);
  const auto compare = [&](const char* what, auto& got, const std::vector<double>& want, const std::vector<double>& rough) {
    Compare c;
    for (u32 i = 0; i < got.n; i++) c.add(widen(got[i]), want[i], sizeof(got[0]) == 2 ? stored(rough[i]) : rough[i] + 5e-7);  // terms near 1, which cancel where a row sees one
    c.close((name + " " + what).c_str(), 64);
  };
  compare("y", y, want.y, rough.y), compare("lse", lse, want.lse, rough.lse);

  TrainAttendBwd back{{dq.p}, {dk.p}, {dv.p}, {delta.p}, {dy.p}, {y.p}, {lse.p}, {q.p}, {k.p}, {v.p}, {ranges.p}, {ends.p}, {list.p}, {list_ends.p}, {turned.p},
                      {turned_ends.p}, n, g.kv_heads, g.group, d, u32(ranges.n / 2), visits, scale};
  const size_t shared_bwd = 2 * (128 + 2 * g.backward) * ld;
  test::launch3("attend_delta", back, (n * heads + 3) / 4, 128, 0, {&delta});
  test::launch3(("attend_dq_" + name).c_str(), back, grid, 128, shared_bwd + 512, {&dq});
  test::launch3(("attend_dkv_" + name).c_str(), back, dim3(tiles, g.kv_heads, slices), 128, shared_bwd + 16 * g.backward, {&dk, &dv});
  compare("dq", dq, want.dq, rough.dq), compare("dk", dk, want.dk, rough.dk), compare("dv", dv, want.dv, rough.dv);
}
}  // namespace

TEST(head_sizes) {
  for (const Heads& g : {Heads{1, 2, 64, 64, 64, 32, "64"}, Heads{1, 1, 96, 96, 64, 32, "96"}, Heads{1, 1, 128, 128, 64, 32, "128"},
                         Heads{1, 1, 256, 128, 32, 16, "256"}, Heads{1, 2, 8, 64, 16, 16, "any"}, Heads{2, 1, 40, 64, 16, 16, "any"}, Heads{1, 1, 136, 64, 16, 16, "any"}})
    check(causal({3, 1, 67}, 1000), g);
}
TEST(masks) {
  const Heads g{2, 3, 64, 64, 64, 32, "64"}, any{2, 1, 24, 64, 16, 16, "any"};
  for (const Heads& heads : {g, any}) {
    check(causal({1}, 1), heads);
    check(full(64), heads);
    check(full(130), heads);
    check(causal({100, 37}, 9), heads);
    check(causal({200}, 1000), heads);
    check(scattered(200), heads);
  }
}
