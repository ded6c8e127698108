// Attention and its cache against f64.
#include "harness.h"
#include "../../attention.cu"
#include "../../attention_prefill.cu"
#include "../../kv.cu"
#include <memory>
#include <string>

using test::Array;
using test::Rng;

namespace {
float round_bf16(double x) { return gpu::to_f32(gpu::to_bf16(float(x))); }

// A sequence of a pass and its cache: `rows` behind `staged` others, which `mask` and `parents` count first. Rows that no step has
// written hold NaN.
struct Seq {
  u32 past, rows, mask = MASK_CAUSAL, block = 0;
  std::vector<int> parents = {};  // of a tree: -1 a root
  u32 staged = 0;
  Array<bf16_t>* cache = nullptr;
  Array<u64>* bits = nullptr;
  std::vector<u32> depth = {};
  u32 lacks = 0;  // rows of the first block
  u32 all() const { return staged + rows; }
  ~Seq() {
    delete cache;
    delete bits;
  }
};

struct Pass {
  std::vector<std::unique_ptr<Seq>> seqs;
  u32 layers, kv_dim, capacity, rows = 0;
  std::unique_ptr<Array<Seg>> segs;

  Pass(const std::vector<Seq>& list, u32 layers, u32 kv_dim, u32 capacity, Rng& rng) : layers(layers), kv_dim(kv_dim), capacity(capacity) {
    for (const Seq& x : list) {
      seqs.emplace_back(new Seq(x));
      Seq& s = *seqs.back();
      s.cache = new Array<bf16_t>((size_t)layers * 2 * capacity * kv_dim);
      for (u32 plane = 0; plane < 2 * layers; plane++)
        for (size_t i = 0; i < (size_t)s.past * kv_dim; i++)
          (*s.cache)[(size_t)plane * capacity * kv_dim + i] = gpu::to_bf16(rng.normal());
      if (s.mask == MASK_TREE) {
        const u32 words = (s.all() + 63) / 64;
        s.bits = new Array<u64>(s.all() * words);
        s.bits->fill([](size_t) { return 0; });
        for (u32 i = 0; i < s.all(); i++) {
          const int p = s.parents[i];
          if (p >= 0)
            for (u32 w = 0; w < words; w++) (*s.bits)[i * words + w] = (*s.bits)[p * words + w];
          (*s.bits)[i * words + i / 64] |= 1ull << i % 64;
          s.depth.push_back(p < 0 ? 0 : s.depth[p] + 1);
        }
      }
      rows += s.rows;
    }
    segs.reset(new Array<Seg>(seqs.size()));
    u32 first = 0;
    for (size_t i = 0; i < seqs.size(); i++) {
      Seq& s = *seqs[i];
      (*segs)[i] = Seg{u64(s.cache->p), s.bits ? u64(s.bits->p) : 0, s.past, s.staged, s.rows, first, s.mask, capacity, s.block,
                       s.mask == MASK_BLOCKS ? s.lacks : (s.all() + 63) / 64};
      first += s.rows;
    }
  }
  bf16_t& at(u32 seq, u32 layer, u32 side, u32 row, u32 c) {
    return (*seqs[seq]->cache)[((size_t)(layer * 2 + side) * capacity + row) * kv_dim + c];
  }
};
Seq chain(u32 past, u32 rows, u32 mask = MASK_CAUSAL, u32 block = 0, u32 staged = 0) {
  return Seq{past, rows, mask, block, {}, staged};
}
Seq blocks(u32 past, u32 rows, u32 block, u32 lacks, u32 staged = 0) {
  Seq s = chain(past, rows, MASK_BLOCKS, block, staged);
  s.lacks = lacks;
  return s;
}
}  // namespace

TEST(kv_stage) {
  for (u32 kv_dim : {8u, 24u, 576u, 1024u}) {
    Rng rng(kv_dim);
    Pass pass({chain(5, 1), chain(0, 3, MASK_CAUSAL, 0, 4), chain(7, 2)}, 2, kv_dim, 9, rng);
    Array<float> k(6 * kv_dim), v(6 * kv_dim);
    k.fill([&](size_t) { return rng.normal(); });
    v.fill([&](size_t) { return rng.normal(); });
    const KvStage args{{pass.segs->p}, {k.p}, {v.p}, 3, 6, 1, kv_dim};
    for (u32 q = 0; q < 3; q++) {
      std::vector<bf16_t> want(pass.seqs[q]->cache->p, pass.seqs[q]->cache->p + pass.seqs[q]->cache->n);
      test::launch3("kv_stage", args, dim3(6, (kv_dim / 4 + 127) / 128), 128, 0, *pass.seqs[q]->cache);
      const Seg g = (*pass.segs)[q];
      const u32 at = g.past + g.staged;
      for (u32 i = 0; i < g.rows; i++)
        for (u32 c = 0; c < kv_dim; c++) {
          want[((size_t)2 * 9 + at + i) * kv_dim + c] = gpu::to_bf16(k[(g.first + i) * kv_dim + c]);
          want[((size_t)3 * 9 + at + i) * kv_dim + c] = gpu::to_bf16(v[(g.first + i) * kv_dim + c]);
        }
      CHECK(!memcmp(want.data(), pass.seqs[q]->cache->p, want.size() * 2), "cache %u of width %u", q, kv_dim);
    }
  }
}

TEST(rope_stage) {
  struct Shape { u32 heads, kv_heads, d; };
  for (Shape z : {Shape{1, 1, 8}, Shape{6, 2, 24}, Shape{9, 3, 64}, Shape{4, 1, 256}}) {
    Rng rng(z.d);
    const u32 kv_dim = z.kv_heads * z.d, q_dim = z.heads * z.d, half = z.d / 2;
    Pass pass({chain(4, 2), chain(1, 1, MASK_CAUSAL, 0, 3)}, 1, kv_dim, 7, rng);
    Array<float> q(3 * q_dim), k(3 * kv_dim), v(3 * kv_dim), table(3 * z.d);
    for (auto* x : {&q, &k, &v}) x->fill([&](size_t) { return rng.normal(); });
    for (u32 r = 0; r < 3; r++)
      for (u32 i = 0; i < half; i++) {
        const double angle = rng.uniform() * 6.28;
        table[r * z.d + i] = float(::cos(angle)), table[r * z.d + half + i] = float(::sin(angle));
      }
    std::vector<double> want, rough, got;
    auto rotated = [&](const float* x, u32 r, u32 c) {
      const u32 i = c % half;
      const double cos = table[r * z.d + i], sin = table[r * z.d + half + i];
      return c < half ? x[i] * cos - x[i + half] * sin : x[i + half] * cos + x[i] * sin;
    };
    std::vector<double> turned;
    for (u32 r = 0; r < 3; r++)
      for (u32 c = 0; c < q_dim; c++) turned.push_back(rotated(q.p + r * q_dim + c / z.d * z.d, r, c % z.d));
    const RopeStage args{{pass.segs->p}, {q.p}, {k.p}, {v.p}, {table.p}, 2, 3, 0, z.heads, z.kv_heads, z.d};
    test::launch3("rope_stage", args, dim3(3, (q_dim / 8 + kv_dim / 4 + 127) / 128), 128, 0, q);
    test::close("rotated q", std::vector<double>(q.p, q.p + q.n), turned, turned);
    for (u32 s = 0; s < 2; s++)
      for (u32 i = 0; i < (*pass.segs)[s].rows; i++)
        for (u32 c = 0; c < kv_dim; c++) {
          const u32 r = (*pass.segs)[s].first + i, row = (*pass.segs)[s].past + (*pass.segs)[s].staged + i;
          want.push_back(rotated(k.p + r * kv_dim + c / z.d * z.d, r, c % z.d));
          rough.push_back(round_bf16(want.back()));
          got.push_back(gpu::to_f32(pass.at(s, 0, 0, row, c)));
          CHECK(pass.at(s, 0, 1, row, c).x == gpu::to_bf16(v[r * kv_dim + c]).x, "value %u %u", r, c);
        }
    test::close("staged k", got, want, rough);
  }
}

TEST(kv_commit) {
  const u32 layers = 3, capacity = 40, past = 6, rows = 30;
  for (u32 kv_dim : {8u, 72u, 512u})
    for (const std::vector<u32>& path : {std::vector<u32>{0}, {29}, {0, 1, 2}, {1, 2, 3, 4, 5, 6, 7}, {0, 2, 3, 7, 8, 9, 10, 11, 29}}) {
      Rng rng(kv_dim);
      Pass pass({chain(past + rows, 0)}, layers, kv_dim, capacity, rng);
      Array<bf16_t>& cache = *pass.seqs[0]->cache;
      std::vector<bf16_t> want(cache.p, cache.p + cache.n), before = want;
      for (u32 plane = 0; plane < 2 * layers; plane++)
        for (size_t i = 0; i < path.size(); i++)
          memcpy(&want[((size_t)plane * capacity + past + i) * kv_dim], &before[((size_t)plane * capacity + past + path[i]) * kv_dim], kv_dim * 2);
      Array<u32> p(path.size()), counts(1);
      p.fill([&](size_t i) { return path[i]; });
      const u32 n = path.size(), grid = (layers * kv_dim / 4 + 127) / 128;
      test::launch3("kv_commit", KvCommit{{p.p}, u64(cache.p), past, n, layers, capacity, kv_dim}, grid, 128, 0, cache);
      CHECK(!memcmp(want.data(), cache.p, want.size() * 2), "width %u, %u rows", kv_dim, n);
      std::copy(before.begin(), before.end(), cache.p);
      counts[0] = n, (*pass.segs)[0].past = past;
      test::launch3("kv_commit_batch", KvCommitBatch{{pass.segs->p}, {p.p}, {counts.p}, 1, n, layers, kv_dim}, dim3(grid, 1), 128, 0, cache);
      CHECK(!memcmp(want.data(), cache.p, want.size() * 2), "batch: width %u, %u rows", kv_dim, n);
    }
}

namespace {
struct Spec {
  u32 kv_heads, group, d, window = 0;
  u32 q_dim() const { return kv_heads * group * d; }
  u32 kv_dim() const { return kv_heads * d; }
};

// Which entry point with M queries to a block serves a head size.
std::string entry(u32 d, u32 m) {
  const bool own = d == 64 || d == 96 || d == 128 || d == 256;
  return "attend_" + (own ? std::to_string(d) : std::string("any")) + "_m" + std::to_string(own ? m : 16);
}

struct Truth {
  std::vector<double> want, rough;
};
// The specification in f64, and the same with q, p and y rounded to bf16. It fills the staged rows of the caches, too: with noise,
// so that what nobody sees is not zero.
Truth specify(Pass& pass, const Spec& z, Array<float>& q, float scale, u32 layer) {
  Truth t;
  for (size_t n = 0; n < pass.seqs.size(); n++) {
    const Seq& s = *pass.seqs[n];
    const u32 first = (*pass.segs)[n].first;
    auto pos = [&](u32 i) { return s.past + (s.mask == MASK_TREE ? s.depth[i] : i); };
    auto sees = [&](u32 i, u32 j) {
      if (s.mask == MASK_FULL) return true;
      if (s.mask == MASK_BLOCKS) return (j + s.lacks) / s.block <= (i + s.lacks) / s.block;
      if (s.mask == MASK_CAUSAL) return j <= i;
      for (int at = i; at >= 0; at = s.parents[at])
        if (at == (int)j) return true;
      return false;
    };
    for (u32 i = s.staged; i < s.all(); i++) {
      std::vector<u32> rows;
      for (u32 j = 0; j < s.past + s.all(); j++) {
        const u32 p = j < s.past ? j : pos(j - s.past);
        if ((j < s.past || sees(i, j - s.past)) && (!z.window || p + z.window > pos(i))) rows.push_back(j);
      }
      for (u32 h = 0; h < z.kv_heads * z.group; h++) {
        const float* x = q.p + (size_t)(first + i - s.staged) * z.q_dim() + h * z.d;
        const u32 c0 = h / z.group * z.d;
        std::vector<double> exact(z.d), rough(z.d), score, coarse;
        double top = -INFINITY, sum = 0, rough_sum = 0;
        for (u32 j : rows) {
          double a = 0, b = 0;
          for (u32 c = 0; c < z.d; c++) {
            const double k = gpu::to_f32(pass.at(n, layer, 0, j, c0 + c));
            a += x[c] * k, b += round_bf16(x[c] * scale) * k;
          }
          score.push_back(a * scale), coarse.push_back(b);
          top = fmax(top, a * scale);
        }
        for (size_t k = 0; k < rows.size(); k++) {
          const double p = exp(score[k] - top), r = exp(coarse[k] - top);
          sum += p, rough_sum += r;
          for (u32 c = 0; c < z.d; c++) {
            const double v = gpu::to_f32(pass.at(n, layer, 1, rows[k], c0 + c));
            exact[c] += p * v, rough[c] += round_bf16(r) * v;
          }
        }
        for (u32 c = 0; c < z.d; c++) t.want.push_back(exact[c] / sum), t.rough.push_back(round_bf16(rough[c] / rough_sum));
      }
    }
  }
  return t;
}
void stage_noise(Pass& pass, Rng& rng) {
  for (size_t n = 0; n < pass.seqs.size(); n++)
    for (u32 layer = 0; layer < pass.layers; layer++)
      for (u32 side = 0; side < 2; side++)
        for (u32 i = 0; i < pass.seqs[n]->all(); i++)
          for (u32 c = 0; c < pass.kv_dim; c++) pass.at(n, layer, side, pass.seqs[n]->past + i, c) = gpu::to_bf16(rng.normal());
}

// What attend_* and attend_merge make of a pass.
void run_attend(Pass& pass, const Spec& z, Array<float>& q, Array<bf16_t>& y, float scale, u32 layer, u32 m, u32 chunk, u32 stages,
                u32 more_chunks = 0, bool schedules = false) {
  u32 longest = 0;
  for (auto& s : pass.seqs) longest = max(longest, s->past + s->all());
  const u32 segments = pass.seqs.size(), chunks = (longest + chunk - 1) / chunk + more_chunks, heads = z.kv_heads * z.group;
  Array<float> parts((size_t)chunks * pass.rows * heads * z.d), stats((size_t)chunks * pass.rows * heads * 2);
  const Attention args{{pass.segs->p}, {q.p}, {y.p}, {parts.p}, {stats.p}, segments, pass.rows, layer, z.kv_heads, z.group, z.d,
                       z.window, chunk, chunks, stages, scale};
  const std::string name = entry(z.d, m);
  m = atoi(name.c_str() + name.find("_m") + 2);
  const u32 ld = (z.d + 15) / 16 * 16 + 8;
  const size_t smem = 2 * (m * ld + stages * 128 * ld + m * 72) + 24 * m;
  const dim3 grid((pass.rows * z.group + segments * (m - 1)) / m, chunks, z.kv_heads);
  const u32 merge = (pass.rows * heads * z.d / 4 + 127) / 128;
  for (int run = 0; run < (schedules ? 3 : 1); run++) {
    std::vector<bf16_t> before(y.p, y.p + y.n);
    test::launch(name.c_str(), args, grid, 128, smem, run ? 77 + run : 0, run == 2 ? 2 : 1);
    if (chunks > 1) test::launch("attend_merge", args, merge, 128, 0, run ? 77 + run : 0, run == 2 ? 2 : 1);
    if (run) CHECK(!memcmp(before.data(), y.p, y.n * 2), "%s: schedule %d differs", name.c_str(), run);
  }
}
// What prefill_* makes of it.
void run_prefill(Pass& pass, const Spec& z, Array<float>& q, Array<bf16_t>& y, float scale, u32 layer) {
  const u32 segments = pass.seqs.size(), m = z.d == 256 ? 64 : 128;
  Array<float> none(pass.rows * z.q_dim() + 2);
  const Attention args{{pass.segs->p}, {q.p}, {y.p}, {none.p}, {none.p}, segments, pass.rows, layer, z.kv_heads, z.group, z.d,
                       z.window, 64, 1, 1, scale};
  const dim3 grid((pass.rows * z.group + segments * (m - 1)) / m, z.kv_heads);
  test::launch3(("prefill_" + std::to_string(z.d)).c_str(), args, grid, 128, 2 * (m + 128) * (z.d + 8) + 8 * m, y);
}
std::vector<double> widen(const Array<bf16_t>& y) {
  std::vector<double> v;
  for (size_t i = 0; i < y.n; i++) v.push_back(gpu::to_f32(y.p[i]));
  return v;
}
std::vector<int> bushy(u32 n, Rng& rng) {
  std::vector<int> p;
  for (u32 i = 0; i < n; i++) p.push_back(int(rng.bits() % (i + 1)) - 1);
  return p;
}
}  // namespace

TEST(attend) {
  Rng rng(3);
  struct Trial { Spec z; u32 m, chunk, stages; std::vector<Seq> seqs; };
  const std::vector<Trial> trials = {
      {{1, 1, 8}, 16, 64, 1, {chain(0, 1)}},
      {{2, 2, 24}, 16, 64, 2, {chain(3, 1), chain(70, 5), chain(0, 9)}},
      {{1, 5, 48, 20}, 16, 64, 2, {chain(90, 1), chain(60, 9, MASK_FULL)}},
      {{3, 3, 64}, 16, 128, 2, {chain(300, 1), chain(64, 1), chain(63, 1)}},
      {{1, 4, 64}, 64, 64, 2, {Seq{100, 32, MASK_TREE, 0, bushy(32, rng)}}},
      {{1, 2, 64}, 64, 64, 1, {Seq{70, 128, MASK_TREE, 0, bushy(128, rng)}, Seq{1, 65, MASK_TREE, 0, bushy(65, rng)}}},
      {{1, 2, 64, 3}, 64, 64, 2, {Seq{70, 40, MASK_TREE, 0, bushy(40, rng)}}},
      {{1, 2, 64}, 64, 64, 2, {Seq{30, 9, MASK_TREE, 0, bushy(79, rng), 70}, chain(5, 4, MASK_FULL, 0, 66), chain(3, 2, MASK_CAUSAL, 0, 63)}},
      {{2, 1, 32, 4}, 16, 64, 1, {Seq{7, 5, MASK_TREE, 0, bushy(70, rng), 65}, chain(0, 12, MASK_BLOCKS, 8, 20)}},
      {{1, 3, 96}, 64, 128, 2, {chain(130, 7), chain(0, 30, MASK_BLOCKS, 7)}},
      {{1, 3, 64}, 64, 64, 2, {blocks(61, 40, 32, 5), blocks(9, 7, 1u << 30, (1u << 30) - 4), blocks(3, 20, 16, 15, 50)}},
      {{2, 1, 128, 20}, 16, 64, 1, {blocks(70, 13, 6, 2)}},
      {{2, 7, 128}, 16, 128, 2, {chain(200, 1), chain(5, 3)}},
      {{1, 2, 128, 70}, 64, 64, 1, {chain(150, 40), chain(10, 20, MASK_FULL)}},
      {{1, 2, 256}, 16, 64, 1, {chain(66, 2)}},
      {{1, 4, 256}, 32, 64, 1, {chain(90, 12), chain(0, 1)}},
  };
  for (const Trial& t : trials) {
    const Spec& z = t.z;
    u32 capacity = 0, rows = 0;
    for (const Seq& s : t.seqs) capacity = max(capacity, s.past + s.all()), rows += s.rows;
    Pass pass(t.seqs, 2, z.kv_dim(), capacity + 3, rng);
    stage_noise(pass, rng);
    Array<float> q(rows * z.q_dim());
    Array<bf16_t> y(rows * z.q_dim());
    q.fill([&](size_t) { return rng.normal(); });
    const float scale = 1.3f / sqrtf(z.d);
    const Truth truth = specify(pass, z, q, scale, 1);
    run_attend(pass, z, q, y, scale, 1, t.m, t.chunk, t.stages, 0, true);
    const std::string what = entry(z.d, t.m) + " " + std::to_string(z.d) + "/" + std::to_string(rows);
    test::close(what.c_str(), widen(y), truth.want, truth.rough);
    // The same bits for any number of stages and chunks, and from the other entry point.
    for (u32 m : {16u, z.d == 256 ? 32u : 64u}) {
      Array<bf16_t> other(y.n);
      run_attend(pass, z, q, other, scale, 1, m, t.chunk, 3 - t.stages, 2);
      CHECK(!memcmp(y.p, other.p, y.n * 2), "%s: M %u, %u stages differ", what.c_str(), m, 3 - t.stages);
    }
  }
}

// A row gives the same bits alone, in a chain and beside other sequences.
TEST(attend_rows_are_independent) {
  for (const Spec& z : {Spec{1, 3, 64}, Spec{2, 2, 32, 40}}) {
    Rng rng(z.d);
    const u32 past = 118, rows = 14, layer = 0;
    Pass all({chain(5, 3), chain(past, rows), chain(0, 1)}, 1, z.kv_dim(), past + rows, rng);
    stage_noise(all, rng);
    Array<float> q(all.rows * z.q_dim());
    Array<bf16_t> y(all.rows * z.q_dim());
    q.fill([&](size_t) { return rng.normal(); });
    run_attend(all, z, q, y, 0.2f, layer, 64, 64, 2);
    for (u32 i = 0; i < rows; i += 3) {
      Pass one({chain(past + i, 1)}, 1, z.kv_dim(), past + rows, rng);
      for (u32 side = 0; side < 2; side++)
        for (u32 j = 0; j <= past + i; j++)
          for (u32 c = 0; c < z.kv_dim(); c++) one.at(0, layer, side, j, c) = all.at(1, layer, side, j, c);
      Array<float> q1(z.q_dim());
      Array<bf16_t> y1(z.q_dim());
      q1.fill([&](size_t c) { return q[(3 + i) * z.q_dim() + c]; });
      run_attend(one, z, q1, y1, 0.2f, layer, 16, 64, 1);
      CHECK(!memcmp(y1.p, y.p + (3 + i) * z.q_dim(), y1.n * 2), "row %u differs alone, head size %u", i, z.d);
    }
  }
}

TEST(prefill) {
  Rng rng(5);
  struct Trial { Spec z; std::vector<Seq> seqs; };
  const std::vector<Trial> trials = {
      {{1, 1, 64}, {chain(0, 150)}},
      {{1, 3, 64, 50}, {chain(40, 61), chain(0, 70, MASK_FULL)}},
      {{2, 2, 64}, {chain(100, 1), chain(3, 70), Seq{70, 65, MASK_TREE, 0, bushy(65, rng)}}},
      {{1, 2, 96}, {chain(33, 40, MASK_BLOCKS, 16), chain(5, 2)}},
      {{1, 2, 64, 40}, {blocks(50, 70, 32, 7), blocks(0, 9, 4, 3, 66)}},
      {{1, 4, 128}, {chain(20, 70)}},
      {{1, 1, 256, 30}, {chain(10, 70)}},
      {{1, 2, 64, 5}, {Seq{10, 65, MASK_TREE, 0, bushy(95, rng), 30}, chain(3, 9, MASK_CAUSAL, 0, 70), chain(1, 5, MASK_FULL, 0, 60)}},
  };
  for (const Trial& t : trials) {
    const Spec& z = t.z;
    u32 capacity = 0, rows = 0;
    for (const Seq& s : t.seqs) capacity = max(capacity, s.past + s.all()), rows += s.rows;
    Pass pass(t.seqs, 1, z.kv_dim(), capacity + 1, rng);
    stage_noise(pass, rng);
    Array<float> q(rows * z.q_dim());
    Array<bf16_t> y(rows * z.q_dim());
    q.fill([&](size_t) { return rng.normal(); });
    const float scale = 1.3f / sqrtf(z.d);
    const Truth truth = specify(pass, z, q, scale, 0);
    run_prefill(pass, z, q, y, scale, 0);
    test::close(("prefill " + std::to_string(z.d)).c_str(), widen(y), truth.want, truth.rough);
  }
}
