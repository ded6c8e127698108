// Statistics of logits, sampling and verification against f64 and exact counts.
#include "harness.h"
#include "../../logits.cu"
#include "../../sample.cu"
#include "../../verify.cu"
#include <algorithm>
#include <array>
#include <functional>
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
    Array<float> stats(rows * 3);
    Array<u32> argmax(rows);
    test::launch3("logits_stats", LogitsStats{{x.p}, {stats.p}, {argmax.p}, rows, vocab}, rows, vocab == 4100 ? 1024 : 64, 0, stats);
    for (u32 r = 0; r < rows; r++) {
      const float* row = x.p + r * vocab;
      const u32 best = order(row, vocab)[0];
      double z = 0, s = 0;
      for (u32 i = 0; i < vocab; i++) {
        const double d = double(row[i]) - row[best], e = exp(d);
        z += e, s += e > 0 ? d * e : 0;
      }
      const float max = stats[3 * r], lse = stats[3 * r + 1], entropy = stats[3 * r + 2];
      CHECK(argmax[r] == best && max == row[best], "row %u of %u: %u, not %u", r, vocab, argmax[r], best);
      CHECK(fabs(lse - (row[best] + log(z))) < 2e-6 * (1 + fabs(row[best])), "lse %g, not %g", lse, row[best] + log(z));
      CHECK(fabs(entropy - (log(z) - s / z)) < 1e-5 * (1 + log(vocab)), "entropy %g, not %g", entropy, log(z) - s / z);
    }
  }
  // What cannot be spoken from.
  Array<float> x(3 * 40);
  x.fill([](size_t i) { return i == 30 ? NAN : i / 40 == 1 ? -INFINITY : i == 90 ? INFINITY : 0.5f; });
  Array<float> stats(9);
  Array<u32> argmax(3);
  test::launch3("logits_stats", LogitsStats{{x.p}, {stats.p}, {argmax.p}, 3, 40}, 3, 64, 0, argmax);
  for (int i = 0; i < 9; i++) CHECK(std::isnan(stats[i]) && argmax[i / 3] == NO_TOKEN, "statistic %d", i);
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
      const TopK args{{x.p}, {values.p}, {ids.p}, rows, vocab, k};
      if (vocab == 5000 && k == 20) test::launch("top_k", args, rows, 1024);
      else test::launch3("top_k", args, rows, 64, 0, ids);
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
      const Distribution args{{x.p}, {d.p}, {p.p}, rows, vocab};
      if (vocab == 3000) test::launch("distribution", args, rows, kind ? 64 : 1024);
      else test::launch3("distribution", args, rows, 64, 0, p);
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

namespace {
// The first id at which the law's running sum exceeds u; `near` if rounding could have moved it.
u32 invert(const std::vector<double>& p, double u, bool& near) {
  double sum = 0, total = 0;
  for (double v : p) total += v;
  u32 token = NO_TOKEN;
  near = false;
  for (u32 i = 0; i < p.size(); i++) {
    sum += p[i] / total;
    near |= p[i] > 0 && fabs(sum - u) < 1e-5 && sum < 1 - 1e-9;
    if (token == NO_TOKEN && sum > u) token = i;
  }
  return token;
}
}  // namespace

// Each draw is the inverse of the cumulative distribution at its own random number, in the order of ids, without what the row gave
// before, whatever the size of the block.
TEST(sample_inverts_the_law) {
  for (u32 vocab : {3u, 40u, 1027u, 5000u}) {
    const u32 rows = 6, n = 3;
    Rng rng(vocab + 9);
    Array<float> x(rows * vocab);
    Array<Draw> d(rows);
    Array<u32> tokens(rows * n);
    x.fill([&](size_t i) { return logit(i / vocab % 2, rng); });
    d.fill([&](size_t i) { return Draw{11, i, 500, i == 5 ? 0.f : 0.8f, i % 3 ? 1.f : 0.9f, i == 4 ? 0.01f : 0.f, i == 2 ? 20u : 0u}; });
    const Sample args{{x.p}, {d.p}, {tokens.p}, rows, vocab, n};
    if (vocab == 5000) test::launch("sample", args, rows, 1024);
    else test::launch3("sample", args, rows, vocab == 40 ? 32 : 128, 0, tokens);
    for (u32 r = 0; r < rows; r++) {
      std::vector<double> p = truth(x.p + r * vocab, vocab, d[r]);
      for (u32 i = 0; i < n; i++) {
        bool near;
        const u32 want = invert(p, double(random_bits(11, r, 500 + i) >> 11) / 9007199254740992.0, near);
        CHECK(!near && tokens[r * n + i] == want, "row %u of %u, draw %u: %u, not %u", r, vocab, i, tokens[r * n + i], want);
        if (want < vocab) p[want] = 0;
      }
    }
  }
}

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
  test::launch("sample", Sample{{x.p}, {d.p}, {tokens.p}, n, vocab, 1}, n, 32);
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
  test::launch3("sample", Sample{{y.p}, {e.p}, {t.p}, 4, longer, 1}, 4, 256, 0, t);
  CHECK(t[0] < longer && t[1] == order(y.p + longer, longer)[0] && t[2] == NO_TOKEN && t[3] == NO_TOKEN, "%u %u %u %u", t[0], t[1], t[2], t[3]);
}

TEST(verify_walk) {
  Rng rng(8);
  const u32 sequences = 37, vocab = 3, stride = 9;
  std::vector<u32> tokens, parents, picks;
  Array<Tree> trees(sequences);
  for (u32 s = 0; s < sequences; s++) {
    const u32 n = s == 0 ? 1 : s < 4 ? 128 : 1 + rng.bits() % 70;
    trees[s] = Tree{u32(tokens.size()), n};
    for (u32 i = 0; i < n; i++) {
      parents.push_back(i == 0 ? ~0u : s == 3 ? i - 1 : rng.bits() % 3 ? rng.bits() % i : i - 1);
      tokens.push_back(s == 3 ? 1 : rng.bits() % vocab);
      picks.push_back(s == 3 ? 1 : rng.bits() % vocab);
    }
  }
  const u32 nodes = tokens.size();
  Array<u32> t(nodes), p(nodes), k(nodes), path(sequences * stride), counts(sequences), next(sequences);
  for (u32 i = 0; i < nodes; i++) t[i] = tokens[i], p[i] = parents[i], k[i] = picks[i];
  test::launch3("verify_walk", VerifyWalk{{trees.p}, {t.p}, {p.p}, {k.p}, {path.p}, {counts.p}, {next.p}, sequences, nodes, stride}, (sequences + 3) / 4, 128, 0, path);
  for (u32 s = 0; s < sequences; s++) {
    const u32 f = trees[s].first;
    u32 at = 0, kept = 1;
    CHECK(path[s * stride] == 0, "sequence %u begins elsewhere", s);
    for (bool more = true; more && kept < stride;) {
      more = false;
      for (u32 c = at + 1; c < trees[s].nodes && !more; c++)
        if (p[f + c] == at && t[f + c] == k[f + at]) {
          CHECK(path[s * stride + kept] == c, "sequence %u, place %u", s, kept);
          at = c, kept++, more = true;
        }
    }
    CHECK(counts[s] == kept && next[s] == k[f + at], "sequence %u: %u kept, then %u", s, counts[s], next[s]);
  }
}

// Verification with every decision's random number from a table, by whose address `chances` goes astray.
KERNEL(siblings_probe, VerifySiblings, 512) {
  const Chance c = a.chances[blockIdx.x];
  verify::siblings(a, [&](u32 i) { return reinterpret_cast<const u64*>(c.seed)[i]; });
}

namespace {
using Law = std::vector<double>;
// What siblings_probe makes of one tree shape: the law of the first two tokens, if children are drawn from q without replacement
// and every decision's number runs through an even grid. Acceptances and residuals of these p and q are fractions that the grids
// hold exactly, so the law must come out exact.
struct Exact {
  static constexpr u32 V = 4;
  const u32 grid[3];
  std::vector<Law> p, q;  // behind the root (0), and behind token x (x + 1)

  // For each pair of first tokens. `shape` 0: a chain of two; 1: two siblings.
  Law joint(int shape) const {
    std::vector<double> weight;
    std::vector<std::array<u32, 2>> children;
    for (u32 x = 0; x < V; x++)
      for (u32 y = 0; y < V; y++) {
        const double w = shape ? (x == y ? 0 : q[0][x] * q[0][y] / (1 - q[0][x])) : q[0][x] * q[x + 1][y];
        if (w > 0) children.push_back({x, y}), weight.push_back(w);
      }
    const u32 draws = grid[0] * grid[1] * grid[2], n = children.size() * draws;
    Array<Tree> trees(n);
    Array<u32> tokens(3 * n), parents(3 * n), drafts(3 * n), path(3 * n), counts(n), next(n);
    Array<float> pp(3 * n * V), qq((V + 1) * V);
    Array<u64> random(3 * n);
    Array<Chance> chances(n);
    for (u32 i = 0; i < (V + 1) * V; i++) qq[i] = float(q[i / V][i % V]);
    for (u32 s = 0; s < n; s++) {
      const auto [x, y] = children[s / draws];
      trees[s] = Tree{3 * s, 3};
      chances[s] = Chance{u64(random.p + 3 * s), 0, 0};
      const u32 token[3] = {0, x, y}, row[3] = {0, x + 1, y + 1}, parent[3] = {~0u, 0, shape ? 0u : 1u};
      for (u32 i = 0, k = s % draws; i < 3; k /= grid[i], i++) {
        tokens[3 * s + i] = token[i], parents[3 * s + i] = parent[i], drafts[3 * s + i] = row[i];
        for (u32 v = 0; v < V; v++) pp[(3 * s + i) * V + v] = float(p[row[i]][v]);
        random[3 * s + i] = u64((k % grid[i] + 0.5) / grid[i] * 18446744073709551616.0);
      }
    }
    const VerifySiblings args{{trees.p}, {tokens.p}, {parents.p}, {drafts.p}, {pp.p}, {qq.p}, {chances.p}, {path.p}, {counts.p}, {next.p},
                              n, 3 * n, V + 1, V, 3, 0};
    test::launch("siblings_probe", args, n, 32);
    Law law(V * V, 0);
    for (u32 s = 0; s < n; s++) {
      const double w = weight[s / draws] / draws;
      std::vector<u32> out;
      for (u32 i = 1; i < counts[s]; i++) out.push_back(tokens[3 * s + path[3 * s + i]]);
      out.push_back(next[s]);
      for (u32 v = 0; v < V; v++)
        if (out.size() > 1 ? out[1] == v : true) law[out[0] * V + v] += out.size() > 1 ? w : w * p[out[0] + 1][v];
    }
    return law;
  }
  void check(const char* what, int shape) const {
    const Law law = joint(shape);
    for (u32 x = 0; x < V; x++)
      for (u32 y = 0; y < V; y++)
        CHECK(fabs(law[x * V + y] - p[0][x] * p[x + 1][y]) < 1e-6, "%s: tokens %u %u come with %.9g, not %.9g", what, x, y,
              law[x * V + y], p[0][x] * p[x + 1][y]);
  }
};
}  // namespace

TEST(verify_siblings_is_exact) {
  const Law p = {1 / 12., 2 / 12., 3 / 12., 6 / 12.}, q = {4 / 12., 4 / 12., 2 / 12., 2 / 12.};
  const Law p2 = {6 / 12., 1 / 12., 3 / 12., 2 / 12.}, q2 = {2 / 12., 4 / 12., 2 / 12., 4 / 12.};
  const Law even = {0.2, 0.2, 0.4, 0.2}, none = {0, 0.6, 0.4, 0};
  // A chain: acceptances 1/4, 1/2, 1, at both places; residuals in fifths. What comes behind two accepted tokens is not looked at.
  Exact{{4, 20, 5}, {p, p, p2, p, p2}, {q, q, q2, q, q2}}.check("chain", 0);
  // Siblings: second acceptances 4/5, then residuals of one token.
  Exact{{4, 5, 5}, {p, even, even, none, even}, {q, q, q, q, q}}.check("siblings", 1);
  Exact{{4, 5, 5}, {p2, none, even, none, even}, {q2, q, q, q, q}}.check("other siblings", 1);
  // p = q: the first child always stands.
  Exact{{3, 5, 1}, {q, even, even, even, even}, {q, q, q, q, q}}.check("equal", 1);
}

// Larger vocabularies, more siblings than lanes see at once, real random numbers: against the same rule in f64.
namespace {
// What is left of a node's p and q, and its r.
struct Left {
  std::vector<double> p, q;
  double r;
  double ratio(u32 x) const { return r * p[x] < q[x] ? r * p[x] / q[x] : p[x] > 0; }
  void reject(u32 x, bool replacement) {
    double sp = 0, sq = 0;
    for (u32 v = 0; v < p.size(); v++) sp += p[v] = fmax(0., r * p[v] - q[v]);
    for (double& v : p) v /= sp;
    r = sp / (sp + 1 - r);
    if (replacement) return;
    q[x] = 0;
    for (double v : q) sq += v;
    for (double& v : q) v /= sq;
  }
};
}  // namespace

TEST(verify_follows_the_rule) {
  const u32 sequences = 24, V = 203, nodes_each = 40, n = sequences * nodes_each, stride = 12;
  for (u32 which = 0; which < 4; which++) {
    const bool replacement = which & 1, traversal = which & 2;
    Rng rng(12 + which);
    Array<Tree> trees(sequences);
    Array<u32> tokens(n), parents(n), drafts(n), path(sequences * stride), counts(sequences), next(sequences);
    Array<float> p(n * V), q(n * V);
    Array<Chance> chances(sequences);
    for (u32 r = 0; r < n; r++) {
      double sp = 0, sq = 0;
      std::vector<double> a(V), b(V);
      for (u32 v = 0; v < V; v++) {
        const double x = rng.normal();
        a[v] = exp(2 * x), b[v] = exp(2 * x + rng.normal());
        sp += a[v], sq += b[v];
      }
      for (u32 v = 0; v < V; v++) p[r * V + v] = float(a[v] / sp), q[r * V + v] = float(b[v] / sq);
      drafts[r] = r;
    }
    auto draw = [&](const float* w, std::vector<u32> without) {
      double sum = 0, at = 0;
      auto weight = [&](u32 v) { return std::count(without.begin(), without.end(), v) ? 0. : double(w[v]); };
      for (u32 v = 0; v < V; v++) sum += weight(v);
      const double u = rng.uniform() * sum;
      for (u32 v = 0; v < V; v++)
        if ((at += weight(v)) > u) return v;
      return 0u;
    };
    for (u32 s = 0; s < sequences; s++) {
      trees[s] = Tree{s * nodes_each, nodes_each};
      chances[s] = Chance{5, s, 1000};
      std::map<u32, std::vector<u32>> drawn;
      for (u32 i = 0; i < nodes_each; i++) {
        const u32 at = s * nodes_each + i, parent = i ? rng.bits() % min(i, 4u) : ~0u;
        parents[at] = parent, tokens[at] = 0;
        if (!i) continue;
        tokens[at] = draw(q.p + (s * nodes_each + parent) * V, replacement ? std::vector<u32>{} : drawn[parent]);
        drawn[parent].push_back(tokens[at]);
      }
    }
    const VerifySiblings args{{trees.p}, {tokens.p}, {parents.p}, {drafts.p}, {p.p}, {q.p}, {chances.p}, {path.p}, {counts.p}, {next.p},
                              sequences, n, n, V, stride, replacement};
    for (u32 i = 0; i < sequences * stride; i++) path[i] = 0;
    test::launch3(traversal ? "verify_traversal" : "verify_siblings", args, sequences, 64, 0, path);
    u32 long_paths = 0;
    for (u32 s = 0; s < sequences; s++) {
      const u32 f = trees[s].first;
      auto left = [&](u32 at, double r) {
        const float *pp = p.p + (f + at) * V, *qq = q.p + (f + at) * V;
        return Left{std::vector<double>(pp, pp + V), std::vector<double>(qq, qq + V), r};
      };
      auto u = [&](u32 number) { return double(random_bits(5, s, 1000 + number) >> 11) / 9007199254740992.0; };
      std::vector<u32> want{0};
      Left end = left(0, 1);
      if (traversal) {
        std::function<bool(u32, double)> tried = [&](u32 at, double r) {
          Left l = left(at, r);
          for (u32 c = at + 1; c < nodes_each; c++) {
            if (parents[f + c] != at) continue;
            want.push_back(c);
            if (tried(c, l.ratio(tokens[f + c]))) return true;
            want.pop_back();
            l.reject(tokens[f + c], replacement);
          }
          if (u(at) < l.r) return end = l, true;
          return false;
        };
        CHECK(tried(0, 1), "node 0 of sequence %u is given up", s);
      } else {
        u32 decisions = 0;
        for (u32 c = 1; c < nodes_each; c++) {
          if (parents[f + c] != want.back()) continue;
          if (u(decisions++) < end.ratio(tokens[f + c])) want.push_back(c), end = left(c, 1);
          else end.reject(tokens[f + c], replacement);
        }
      }
      long_paths += want.size() > 2;
      CHECK(counts[s] == want.size(), "rule %u, sequence %u: %u kept, not %zu", which, s, counts[s], want.size());
      for (u32 i = 0; i < min(counts[s], (u32)want.size()); i++)
        CHECK(path[s * stride + i] == want[i], "rule %u, sequence %u, place %u: node %u, not %u", which, s, i, path[s * stride + i], want[i]);
      CHECK(next[s] < V && end.p[next[s] % V] > 1e-12, "rule %u, sequence %u: then %u", which, s, next[s]);
    }
    CHECK(long_paths > 3, "only %u long paths", long_paths);
  }
}

TEST(penalize) {
  const u32 rows = 3, vocab = 67, each = 41, n = rows * each;
  Rng rng(6);
  Array<float> x(rows * vocab);
  x.fill([&](size_t i) { return logit(i % 5 ? 0 : 4, rng); });
  const std::vector<float> was(x.p, x.p + rows * vocab);
  Array<Penalty> penalties(n);
  penalties.fill([&](size_t i) { return Penalty{u32(i / each * vocab + i % each), 1.1f + 0.3f * (i / each)}; });
  test::launch("penalize", Penalize{{x.p}, {penalties.p}, rows * vocab, n}, (n + 127) / 128, 128);
  for (u32 i = 0; i < rows * vocab; i++) {
    const float by = 1.1f + 0.3f * (i / vocab), want = was[i] > 0 ? was[i] / by : was[i] * by;
    CHECK(x[i] == (i % vocab < each ? want : was[i]), "logit %u: %g of %g", i, x[i], was[i]);
  }
}

TEST(forbid) {
  const u32 rows = 5, vocab = 67;
  for (u32 n : {1u, 30u}) {
    Rng rng(n);
    Array<float> x(rows * vocab);
    Array<u32> tokens(n);
    x.fill([&](size_t) { return logit(0, rng); });
    const std::vector<float> was(x.p, x.p + rows * vocab);
    tokens.fill([&](size_t i) { return vocab - 1 - 2 * i; });
    test::launch("forbid", Forbid{{x.p}, {tokens.p}, rows, vocab, n}, (rows * n + 127) / 128, 128);
    for (u32 i = 0; i < rows * vocab; i++) {
      const u32 back = vocab - 1 - i % vocab;
      const bool gone = back % 2 == 0 && back / 2 < n;
      CHECK(gone ? x[i] == -INFINITY : x[i] == was[i], "logit %u: %g of %g, %u tokens", i, x[i], was[i], n);
    }
  }
}
