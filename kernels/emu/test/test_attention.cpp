// Attention and its cache against f64.
#include "harness.h"
#include "../../kv.cu"
#include <memory>

using test::Array;
using test::Rng;

namespace {
float round_bf16(double x) { return gpu::to_f32(gpu::to_bf16(float(x))); }

// A sequence of a pass and its cache. Rows that no step has written hold NaN.
struct Seq {
  u32 past, rows, mask = MASK_CAUSAL, block = 0;
  std::vector<int> parents = {};  // of a tree: -1 a root
  Array<bf16_t>* cache = nullptr;
  Array<u64>* bits = nullptr;
  std::vector<u32> depth = {};
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
        const u32 words = (s.rows + 63) / 64;
        s.bits = new Array<u64>(s.rows * words);
        s.bits->fill([](size_t) { return 0; });
        for (u32 i = 0; i < s.rows; i++) {
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
      (*segs)[i] = Seg{u64(s.cache->p), s.bits ? u64(s.bits->p) : 0, s.past, s.rows, first, s.mask, capacity, s.block};
      first += s.rows;
    }
  }
  bf16_t& at(u32 seq, u32 layer, u32 side, u32 row, u32 c) {
    return (*seqs[seq]->cache)[((size_t)(layer * 2 + side) * capacity + row) * kv_dim + c];
  }
};
Seq chain(u32 past, u32 rows, u32 mask = MASK_CAUSAL, u32 block = 0) { return Seq{past, rows, mask, block}; }
}  // namespace

TEST(kv_stage) {
  for (u32 kv_dim : {8u, 24u, 576u, 1024u}) {
    Rng rng(kv_dim);
    Pass pass({chain(5, 1), chain(0, 3), chain(7, 2)}, 2, kv_dim, 9, rng);
    Array<float> k(6 * kv_dim), v(6 * kv_dim);
    k.fill([&](size_t) { return rng.normal(); });
    v.fill([&](size_t) { return rng.normal(); });
    const KvStage args{{pass.segs->p}, {k.p}, {v.p}, 3, 6, 1, kv_dim};
    for (u32 q = 0; q < 3; q++) {
      std::vector<bf16_t> want(pass.seqs[q]->cache->p, pass.seqs[q]->cache->p + pass.seqs[q]->cache->n);
      test::launch3("kv_stage", args, dim3(6, (kv_dim / 4 + 127) / 128), 128, 0, *pass.seqs[q]->cache);
      const Seg g = (*pass.segs)[q];
      for (u32 i = 0; i < g.rows; i++)
        for (u32 c = 0; c < kv_dim; c++) {
          want[((size_t)2 * 9 + g.past + i) * kv_dim + c] = gpu::to_bf16(k[(g.first + i) * kv_dim + c]);
          want[((size_t)3 * 9 + g.past + i) * kv_dim + c] = gpu::to_bf16(v[(g.first + i) * kv_dim + c]);
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
    Pass pass({chain(4, 2), chain(1, 1)}, 1, kv_dim, 7, rng);
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
          const u32 r = (*pass.segs)[s].first + i, row = (*pass.segs)[s].past + i;
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
