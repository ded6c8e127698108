// Statistics of logits, sampling and verification against f64 and exact counts.
#include "harness.h"
#include "../../logits.cu"
#include "../../sample.cu"
#include <algorithm>
#include <array>
#include <map>

using test::Array;
using test::Rng;

namespace {
// Rows of a kind: 0 normal, 1 many ties, 2 all equal, 3 spread over the whole range, 4 half of it -inf.
float logit(u32 kind, Rng& rng) {
  const float x = rng.normal();
  switch (kind) {
    case 1: return float(int(x * 2));
    case 2: return -1.5f;
    case 3: return x * powf(10.f, rng.uniform() * 6 - 3);
    case 4: return rng.bits() & 1 ? x : -INFINITY;
    default: return 3 * x;
  }
}
// Ids from the largest logit down, lower ids first among equals.
std::vector<u32> order(const float* x, u32 n) {
  std::vector<u32> ids(n);
  for (u32 i = 0; i < n; i++) ids[i] = i;
  std::sort(ids.begin(), ids.end(), [&](u32 a, u32 b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
  return ids;
}
}  // namespace

KERNEL(philox_probe, TopK, 32) {
  const u32 s[3] = {0, ~0u, 0x243f6a88};
  if (threadIdx.x >= 3) return;
  const u32 v = s[threadIdx.x];
  const uint4 r = threadIdx.x == 2 ? philox(make_uint2(0xa4093822, 0x299f31d0), make_uint4(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344))
                                   : philox(make_uint2(v, v), make_uint4(v, v, v, v));
  u32* to = a.ids + threadIdx.x * 4;
  to[0] = r.x, to[1] = r.y, to[2] = r.z, to[3] = r.w;
}

// Known answers published with the Random123 library.
TEST(philox) {
  Array<u32> ids(12);
  TopK args{};
  args.ids = {ids.p};
  test::launch("philox_probe", args, 1, 32);
  const u32 want[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8, 0x408f276d, 0x41c83b0e,
                      0xa20bc7c6, 0x6d5451fd, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
  for (int i = 0; i < 12; i++) CHECK(ids[i] == want[i], "word %d: %08x, not %08x", i, ids[i], want[i]);
}

TEST(logits_stats) {
  for (u32 vocab : {1u, 7u, 500u, 4100u, 16391u}) {
    const u32 rows = 5;
    Rng rng(vocab);
    Array<float> x(rows * vocab);
    x.fill([&](size_t i) { return logit(i / vocab, rng); });
    for (u32 r = 0; r < rows; r++) x[r * vocab + vocab / 2] = fmaxf(x[r * vocab + vocab / 2], -3.f);  // something finite
    Array<LogitStats> stats(rows);
    test::launch3("logits_stats", LogitsStats{{x.p}, {stats.p}, rows, vocab}, rows, 1024, 0, stats);
    for (u32 r = 0; r < rows; r++) {
      const float* row = x.p + r * vocab;
      const u32 best = order(row, vocab)[0];
      double z = 0, s = 0;
      for (u32 i = 0; i < vocab; i++) {
        const double d = double(row[i]) - row[best], e = exp(d);
        z += e, s += e > 0 ? d * e : 0;
      }
      const LogitStats& t = stats[r];
      CHECK(t.argmax == best && t.max == row[best], "row %u of %u: %u, not %u", r, vocab, t.argmax, best);
      CHECK(fabs(t.lse - (row[best] + log(z))) < 2e-6 * (1 + fabs(row[best])), "lse %g, not %g", t.lse, row[best] + log(z));
      CHECK(fabs(t.entropy - (log(z) - s / z)) < 1e-5 * (1 + log(vocab)), "entropy %g, not %g", t.entropy, log(z) - s / z);
    }
  }
  // What cannot be spoken from.
  Array<float> x(3 * 40);
  x.fill([](size_t i) { return i == 30 ? NAN : i / 40 == 1 ? -INFINITY : i == 90 ? INFINITY : 0.5f; });
  Array<LogitStats> stats(3);
  test::launch3("logits_stats", LogitsStats{{x.p}, {stats.p}, 3, 40}, 3, 1024, 0, stats);
  for (int r = 0; r < 3; r++) CHECK(std::isnan(stats[r].max), "row %d", r);
}

TEST(top_k) {
  for (u32 vocab : {1u, 5u, 64u, 777u, 5000u}) {
    const u32 rows = 5;
    Rng rng(vocab + 1);
    Array<float> x(rows * vocab);
    x.fill([&](size_t i) { return logit(i / vocab, rng); });
    for (u32 k : {1u, 20u, 64u}) {
      k = min(k, vocab);
      Array<float> values(rows * k);
      Array<u32> ids(rows * k);
      test::launch3("top_k", TopK{{x.p}, {values.p}, {ids.p}, rows, vocab, k}, rows, 1024, 0, ids);
      for (u32 r = 0; r < rows; r++) {
        const std::vector<u32> want = order(x.p + r * vocab, vocab);
        for (u32 i = 0; i < k; i++)
          CHECK(ids[r * k + i] == want[i] && values[r * k + i] == x[r * vocab + want[i]], "row %u of %u, place %u", r, vocab, i);
      }
    }
  }
}

namespace {
// What src/decode/sampler.rs keeps of a row, and how likely each is.
std::vector<double> truth(const float* x, u32 n, const Draw& d) {
  const std::vector<u32> ids = order(x, n);
  std::vector<double> p(n, 0), w;
  if (d.temperature == 0 || d.top_k == 1) return p[ids[0]] = 1, p;
  const u32 k = d.top_k ? min(d.top_k, n) : n;
  double total = 0, mass = 0, kept = 0;
  for (u32 i = 0; i < k; i++) w.push_back(exp((double(x[ids[i]]) - x[ids[0]]) / d.temperature)), total += w[i];
  for (u32 i = 0; i < k; i++) {
    if (d.top_p < 1 && mass >= d.top_p * total) break;
    mass += w[i];
    if (w[i] >= d.min_p) p[ids[i]] = w[i], kept += w[i];
  }
  for (double& v : p) v /= kept;
  return p;
}
}  // namespace

TEST(distribution) {
  const std::vector<Draw> draws = {
      {1, 0, 0, 0.f, 1.f, 0.f, 0},   {1, 0, 0, 1.f, 1.f, 0.f, 0},    {1, 0, 0, 0.7f, 1.f, 0.f, 20},  {1, 0, 0, 1.3f, 0.9f, 0.f, 0},
      {1, 0, 0, 1.f, 1.f, 0.07f, 0}, {1, 0, 0, 0.8f, 0.8f, 0.02f, 9}, {1, 0, 0, 1.f, 1e-6f, 0.f, 50}, {1, 0, 0, 2.f, 0.5f, 0.f, 1},
  };
  for (u32 vocab : {1u, 6u, 1027u, 3000u})
    for (u32 kind : {0u, 1u, 2u, 4u}) {
      const u32 rows = draws.size();
      Rng rng(vocab * 7 + kind);
      Array<float> x(rows * vocab), p(rows * vocab);
      Array<Draw> d(rows);
      x.fill([&](size_t) { return logit(kind, rng); });
      for (u32 r = 0; r < rows; r++) x[r * vocab] = 2, d[r] = draws[r];
      test::launch3("distribution", Distribution{{x.p}, {d.p}, {p.p}, rows, vocab}, rows, 1024, 0, p);
      for (u32 r = 0; r < rows; r++) {
        const std::vector<double> want = truth(x.p + r * vocab, vocab, d[r]);
        for (u32 i = 0; i < vocab; i++) {
          const float got = p[r * vocab + i];  // 0 for what is dropped, and for what is less likely than 2^-32 of the best
          CHECK(fabs(got - want[i]) < 2e-6 && (want[i] == 0 ? got == 0 : got > 0 || want[i] < 1e-9),
                "row %u, kind %u of %u, id %u: %g, not %g", r, kind, vocab, i, got, want[i]);
        }
      }
    }
}

// Each draw is the inverse of the cumulative distribution at the number that the host would have made, so that many of them cover it evenly.
TEST(sample) {
  const u32 vocab = 12, n = 1500;
  Rng rng(4);
  Array<float> x(n * vocab);
  Array<Draw> d(n);
  Array<u32> tokens(n);
  std::vector<float> row;
  for (u32 i = 0; i < vocab; i++) row.push_back(logit(0, rng) / 3);
  x.fill([&](size_t i) { return row[i % vocab]; });
  d.fill([&](size_t i) { return Draw{42, 7, i, 0.9f, 0.95f, 0.f, 10}; });
  test::launch("sample", Sample{{x.p}, {d.p}, {tokens.p}, n, vocab}, n, 32);
  const std::vector<double> p = truth(row.data(), vocab, d[0]);
  std::vector<u32> count(vocab, 0);
  for (u32 r = 0; r < n; r++) {
    CHECK(tokens[r] < vocab, "token %u", tokens[r]);
    count[tokens[r] % vocab]++;
  }
  double chi2 = 0;
  for (u32 i = 0; i < vocab; i++) {
    if (p[i] == 0) CHECK(count[i] == 0, "token %u was dropped", i);
    else chi2 += (count[i] - n * p[i]) * (count[i] - n * p[i]) / (n * p[i]);
  }
  CHECK(chi2 < 27.9, "chi-square %g with at most 9 degrees of freedom", chi2);  // p = 0.001
  // Long rows: the same token under every schedule; greedy; and no token without a finite number.
  const u32 longer = 9001;
  Array<float> y(4 * longer);
  y.fill([&](size_t i) { return i / longer == 3 ? -INFINITY : logit(0, rng); });
  y[2 * longer + 5] = NAN;
  Array<Draw> e(4);
  e.fill([&](size_t i) { return Draw{9, 1, 100 + i, i == 1 ? 0.f : 1.f, 0.99f, 0.f, 0}; });
  Array<u32> t(4);
  test::launch3("sample", Sample{{y.p}, {e.p}, {t.p}, 4, longer}, 4, 1024, 0, t);
  CHECK(t[0] < longer && t[1] == order(y.p + longer, longer)[0] && t[2] == NO_TOKEN && t[3] == NO_TOKEN, "%u %u %u %u", t[0], t[1], t[2], t[3]);
}
