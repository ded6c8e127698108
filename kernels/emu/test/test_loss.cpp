// Losses, their gradients, and the steps of optimisers, against f64.
#include "compare.h"
#include "../../loss.cu"
#include "../../optim.cu"

using test::Array, test::Compare, test::randomise;

namespace {
using Row = std::vector<double>;

Row softmax(const Row& z, double tau) {
  double most = -INFINITY, sum = 0;
  for (double x : z) most = fmax(most, x);
  Row p;
  for (double x : z) p.push_back(exp((x - most) / tau)), sum += p.back();
  for (double& x : p) x /= sum;
  return p;
}

// Loss and gradient of one row as the contract states them.
double loss_of(const LossRows& a, u32 r, const Row& z, Row& grad) {
  const Row q = softmax(z, 1);
  const u32 n = a.vocab;
  const auto p = [&](u32 j) { return double(a.p[r * n + j]); };
  double value = 0, sum = 0;
  grad.assign(n, 0);
  switch (a.kind) {
    case loss::HARD:
      for (u32 j = 0; j < n; j++) grad[j] = q[j] - (j == a.ids[r]);
      return -log(q[a.ids[r]]);
    case loss::SOFT:
    case loss::FORWARD_KL:
      for (u32 j = 0; j < n; j++) {
        if (p(j) != 0) value += p(j) * ((a.kind == loss::SOFT ? 0 : log(p(j))) - log(q[j]));
        sum += p(j);
      }
      for (u32 j = 0; j < n; j++) grad[j] = sum * q[j] - p(j);
      return value;
    case loss::REVERSE_KL:
      for (u32 j = 0; j < n; j++) value += q[j] * log(q[j] / p(j));
      for (u32 j = 0; j < n; j++) grad[j] = q[j] * (log(q[j] / p(j)) - value);
      return value;
    case loss::TOTAL_VARIATION:
      for (u32 j = 0; j < n; j++) value += 0.5 * fabs(q[j] - p(j)), sum += q[j] * (q[j] > p(j) ? 0.5 : -0.5);
      for (u32 j = 0; j < n; j++) grad[j] = q[j] * ((q[j] > p(j) ? 0.5 : -0.5) - sum);
      return value;
    case loss::TOP_K: {
      Row full(n, 0);
      std::vector<bool> rest(n, true);
      double q_tail = 0, total = 0;
      for (u32 i = 0; i < a.k; i++) full[a.ids[r * a.k + i]] = a.top[r * a.k + i], rest[a.ids[r * a.k + i]] = false, total += a.top[r * a.k + i];
      for (u32 j = 0; j < n; j++) {
        if (full[j] != 0) value -= full[j] * log(q[j]);
        if (rest[j]) q_tail += q[j];
        grad[j] = total * q[j] - full[j];
      }
      const double p_tail = 1 - total;
      if (a.tail && p_tail >= loss::TAIL_LEAST) {
        value -= p_tail * log(fmax(q_tail, loss::TAIL_FLOOR));
        if (q_tail > loss::TAIL_FLOOR)
          for (u32 j = 0; j < n; j++) grad[j] += p_tail * q[j] - (rest[j] ? p_tail * q[j] / q_tail : 0);
      }
      return value;
    }
    default: {
      u32 best = 0;
      for (u32 j = 1; j < n; j++)
        if (z[j] > z[best]) best = j;
      if (best != a.ids[r]) return 0;
      const Row t = softmax(z, a.tau);
      for (double x : t)
        if (x != 0) value -= x * log(x);
      for (u32 j = 0; j < n; j++) grad[j] = t[j] == 0 ? 0 : -(t[j] * log(t[j]) + t[j] * value) / a.tau;
      return value;
    }
  }
}
}  // namespace

TEST(loss_rows) {
  const char* names[] = {"hard", "soft", "forward kl", "reverse kl", "total variation", "top k", "entropy"};
  for (u32 vocab : {2u, 33u, 1030u}) {
    for (u32 kind = 0; kind < 7; kind++) {
      for (u32 tail = 0; tail < (kind == loss::TOP_K ? 2u : 1u); tail++) {
        test::Rng rng(vocab + kind);
        const u32 rows = 4, k = kind == loss::TOP_K ? (vocab < 8 ? 1 : 8) : kind == loss::HARD || kind == loss::ENTROPY ? 1 : 0;
        const bool has_p = kind >= loss::SOFT && kind <= loss::TOTAL_VARIATION;
        Array<float> logits(rows * vocab), value(rows), weights(rows), top(kind == loss::TOP_K ? rows * k : 0), p(has_p ? rows * vocab : 0);
        Array<u32> ids(rows * k);
        logits.fill([&](size_t) { return 3 * rng.normal(); });
        weights.fill([](size_t i) { return i == 1 ? 0.f : 0.5f + float(i); });
        for (u32 r = 0; r < rows; r++) {
          const Row q = softmax([&] {
            Row x;
            for (u32 j = 0; j < vocab; j++) x.push_back(2 * rng.normal());
            return x;
          }(), 1);
          for (u32 j = 0; has_p && j < vocab; j++) p[r * vocab + j] = float(kind == loss::SOFT && j % 3 == 1 ? 0 : q[j]);
          u32 best = 0;
          for (u32 j = 0; j < vocab; j++)
            if (logits[r * vocab + j] > logits[r * vocab + best]) best = j;
          for (u32 i = 0; i < k; i++) {
            ids[r * k + i] = kind == loss::ENTROPY ? (r == 2 ? (best + 1) % vocab : best) : (r + i * 5) % vocab;
            if (kind == loss::TOP_K) top[r * k + i] = 0.9f / float(k);
          }
        }
        const LossRows args{{logits.p}, {value.p}, {weights.p}, {ids.p}, {top.p}, {p.p}, rows, vocab, k, kind, kind == loss::TOP_K, has_p, tail, 0.8f};
        Compare l, g;
        std::vector<Row> grads(rows);
        std::vector<double> want(rows);
        for (u32 r = 0; r < rows; r++) want[r] = loss_of(args, r, Row(logits.p + r * vocab, logits.p + (r + 1) * vocab), grads[r]);
        test::launch3("loss_rows", args, rows, vocab > 1000 ? 256 : 32, 0, {&logits, &value});
        for (u32 r = 0; r < rows; r++) {
          l.add(value[r], want[r]);
          for (u32 j = 0; j < vocab; j++) g.add(logits[r * vocab + j], weights[r] * grads[r][j], weights[r] * (grads[r][j] + 2e-7));  // of terms near 1
          CHECK(weights[r] != 0 || logits[r * vocab] == 0, "row %u weighs nothing", r);
        }
        l.close(names[kind], 64), g.close(names[kind], 64);
      }
    }
  }
}

TEST(a_tail_at_its_floor) {
  const u32 vocab = 5;
  Array<float> logits(vocab), value(1), weights(1), top(2);
  Array<u32> ids(2);
  weights[0] = 1, ids[0] = 3, ids[1] = 1, top[0] = 0.5f, top[1] = 0.3f;
  logits.fill([](size_t j) { return j == 3 || j == 1 ? 30.f : 0.f; });
  const LossRows args{{logits.p}, {value.p}, {weights.p}, {ids.p}, {top.p}, {nullptr}, 1, vocab, 2, loss::TOP_K, 1, 0, 1, 1.f};
  Row grad;
  const double want = loss_of(args, 0, Row(logits.p, logits.p + vocab), grad);
  test::launch3("loss_rows", args, 1, 32, 0, {&logits, &value});
  Compare c;
  c.add(value[0], want);
  c.close("tail at its floor");
  Compare g;
  for (u32 j = 0; j < vocab; j++) g.add(logits[j], grad[j], grad[j] + 2e-7);
  g.close("gradient there");
}

TEST(smooth_l1) {
  for (u32 d : {1u, 33u, 700u}) {
    const u32 rows = 3;
    test::Rng rng(d);
    Array<float> x(rows * d), target(rows * d), weights(rows), value(rows), dx(rows * d);
    randomise(x, rng), randomise(target, rng), randomise(weights, rng);
    const SmoothL1 args{{value.p}, {dx.p}, {x.p}, {target.p}, {weights.p}, rows, d};
    test::launch3("smooth_l1", args, rows, 256, 0, {&dx, &value});
    Compare l, g;
    for (u32 r = 0; r < rows; r++) {
      double sum = 0;
      for (u32 i = r * d; i < (r + 1) * d; i++) {
        const double e = double(x[i]) - target[i];
        sum += (fabs(e) < 1 ? 0.5 * e * e : fabs(e) - 0.5) / d;
        g.add(dx[i], weights[r] * fmax(-1, fmin(1, e)) / d);
      }
      l.add(value[r], sum);
    }
    l.close("smooth_l1", 16), g.close("smooth_l1, dx", 16);
  }
}

TEST(optimize) {
  // States of a rule: m, v, anchor.
  const u32 rules[][3] = {{0, 0, 0}, {1, 0, 0}, {1, 1, 0}, {0, 0, 1}, {1, 1, 1}};
  for (auto [m, v, anchor] : rules) {
    for (u32 l1 = 0; l1 < 3; l1++) {  // none, towards 0, towards a reference
      const u32 n = 300, near = l1 == 2;
      test::Rng rng(m + 2 * v + 4 * anchor + l1);
      Array<float> w(n), g(n), first(m * n), second(v * n), at(anchor * n), ref(near * n);
      for (Array<float>* x : {&w, &g, &first, &at}) randomise(*x, rng);
      second.fill([&](size_t) { return rng.uniform(); });
      ref.fill([&](size_t i) { return w[i] + 0.01f * rng.normal(); });
      const Optimize args{{w.p}, {g.p}, {first.p}, {second.p}, {at.p}, {ref.p}, n, m, v, anchor, near, 0.1f, 0.01f, 0.5f, l1 ? 0.05f : 0.f,
                          0.9f, 0.95f, 1e-6f, float(1 / (1 - pow(0.9f, 3))), float(1 / (1 - pow(0.95f, 3)))};
      std::vector<double> want[4];
      for (u32 i = 0; i < n; i++) {
        double u = 0.5 * g[i];
        if (m) u = double(args.beta1) * first[i] + (v ? 1 - double(args.beta1) : 1) * u, want[1].push_back(u);
        if (v) {
          const double half = 0.5 * g[i], square = double(args.beta2) * second[i] + (1 - double(args.beta2)) * half * half;
          want[2].push_back(square);
          u = u / (1 - pow(double(args.beta1), 3)) / (sqrt(square / (1 - pow(double(args.beta2), 3))) + double(args.eps));
        }
        const double from = anchor ? at[i] : w[i], r = near ? ref[i] : 0;
        double x = from - double(args.lr) * (u + double(args.decay) * from);
        if (l1) x = r + copysign(fmax(fabs(x - r) - double(args.l1), 0), x - r);
        if (anchor) want[3].push_back(x), x -= double(args.lr) * u;
        want[0].push_back(x);
      }
      Array<float>* all[] = {&w, &first, &second, &at};
      test::launch3("optimize", args, 2, 256, 0, {all, all + 4});
      for (u32 s = 0; s < 4; s++) {
        Compare c;
        for (u32 i = 0; i < all[s]->n; i++) c.add((*all[s])[i], want[s][i]);
        c.close(s == 0 ? "w" : s == 1 ? "m" : s == 2 ? "v" : "anchor", 16);
      }
    }
  }
}
