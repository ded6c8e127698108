// Low-rank adapters of several groups, and their gradients, against f64.
#include "compare.h"
#include "../../lora.cu"
#include "../../train_rows.cu"

using test::Array, test::Compare, test::randomise;

namespace {
struct Shape {
  std::vector<u32> groups;  // rows of each
  u32 width, ranks, stride, first;
};
const Shape SHAPES[] = {{{1}, 1, 1, 1, 0}, {{1, 1, 1}, 33, 4, 9, 3}, {{9, 2, 17}, 300, 5, 5, 0}, {{300}, 70, 18, 40, 22}, {{8, 3}, 513, 67, 70, 2}};

// The pass of a shape: the groups' matrices one after another, and which of them each row uses.
struct Pass {
  u32 rows = 0, tiles = 0;
  Array<float> matrix;
  Array<LoraGroup> groups;
  std::vector<u32> of;
  Pass(const Shape& s, test::Rng& rng) : matrix(s.groups.size() * s.width * s.ranks), groups(s.groups.size()) {
    randomise(matrix, rng);
    for (u32 g = 0; g < s.groups.size(); g++) {
      groups[g] = {reinterpret_cast<u64>(matrix.p + g * s.width * s.ranks), rows, s.groups[g], tiles, 0.5f + float(g)};
      of.insert(of.end(), s.groups[g], g);
      rows += s.groups[g], tiles += (s.groups[g] + 7) / 8;
    }
  }
  // Entry `at` of the matrix of a row.
  double m(u32 row, u32 at) { return matrix.p[of[row] * (matrix.n / groups.n) + at]; }
  double scale(u32 row) { return groups[of[row]].scale; }
};
}  // namespace

TEST(to_the_ranks) {
  for (const Shape& s : SHAPES) {
    test::Rng rng(s.width);
    Pass p(s, rng);
    const u32 rows = p.rows, n = u32(p.groups.n);
    const dim3 grid(p.tiles, (s.ranks + 3) / 4);
    Array<bf16_t> x(rows * s.width);
    Array<float> h(rows * s.ranks), dy(rows * s.width), dh(rows * s.stride);
    randomise(x, rng), randomise(dy, rng), randomise(dh, rng);
    const std::vector<float> before = test::copy_of(dh);
    test::launch3("lora_shrink", LoraShrink{{p.groups.p}, {x.p}, {h.p}, n, rows, s.width, s.ranks}, grid, 256, 0, h);
    test::launch3("lora_expand_bwd", LoraExpandBwd{{p.groups.p}, {dy.p}, {dh.p}, n, rows, s.width, s.stride, s.first, s.ranks}, grid, 256, 0, dh);
    Compare shrink, back;
    for (u32 r = 0; r < rows; r++) {
      for (u32 i = 0; i < s.ranks; i++) {
        double a = 0, b = 0;
        for (u32 k = 0; k < s.width; k++) a += p.m(r, i * s.width + k) * gpu::to_f32(x[r * s.width + k]), b += p.m(r, k * s.ranks + i) * dy[r * s.width + k];
        shrink.add(h[r * s.ranks + i], a), back.add(dh[r * s.stride + s.first + i], p.scale(r) * b);
      }
      for (u32 i = 0; i < s.stride; i++)
        CHECK((i >= s.first && i < s.first + s.ranks) || dh[r * s.stride + i] == before[r * s.stride + i], "column %u of others", i);
    }
    shrink.close("lora_shrink", 8 * sqrt(s.width)), back.close("lora_expand_bwd", 8 * sqrt(s.width));
  }
}

TEST(from_the_ranks) {
  for (const Shape& s : SHAPES) {
    test::Rng rng(s.width + 1);
    Pass p(s, rng);
    const u32 rows = p.rows, n = u32(p.groups.n);
    const dim3 grid(p.tiles, (s.width + 255) / 256);
    Array<float> h(rows * s.stride), y(rows * s.width), dh(rows * s.ranks), dx(rows * s.width);
    randomise(h, rng), randomise(y, rng), randomise(dh, rng), randomise(dx, rng);
    const std::vector<float> y0 = test::copy_of(y), dx0 = test::copy_of(dx);
    test::launch3("lora_expand", LoraExpand{{p.groups.p}, {h.p}, {y.p}, n, rows, s.width, s.stride, s.first, s.ranks}, grid, 256, 0, y);
    test::launch3("lora_shrink_bwd", LoraShrinkBwd{{p.groups.p}, {dh.p}, {dx.p}, n, rows, s.width, s.ranks}, grid, 256, 0, dx);
    Compare expand, back;
    for (u32 r = 0; r < rows; r++)
      for (u32 c = 0; c < s.width; c++) {
        double a = 0, b = 0;
        for (u32 i = 0; i < s.ranks; i++) a += p.m(r, c * s.ranks + i) * h[r * s.stride + s.first + i], b += p.m(r, i * s.width + c) * dh[r * s.ranks + i];
        expand.add(y[r * s.width + c], y0[r * s.width + c] + p.scale(r) * a), back.add(dx[r * s.width + c], dx0[r * s.width + c] + b);
      }
    expand.close("lora_expand", 8 * sqrt(s.ranks)), back.close("lora_shrink_bwd", 8 * sqrt(s.ranks));
  }
}

TEST(gradients_of_a_and_b) {
  for (const Shape& s : SHAPES) {
    test::Rng rng(s.width + 2);
    const u32 rows = s.groups[0] + 250 * (s.width < 100), chunks = (rows + 255) / 256, n = s.width * s.ranks;
    const dim3 grid((s.width + 255) / 256, (s.ranks + 15) / 16, chunks);
    Array<bf16_t> x(rows * s.width);
    Array<float> dy(rows * s.width), h(rows * s.stride), dh(rows * s.ranks), parts(chunks * n), db(n), da(n);
    randomise(x, rng), randomise(dy, rng), randomise(h, rng), randomise(dh, rng), randomise(da, rng), randomise(db, rng);
    const std::vector<float> a0 = test::copy_of(da), b0 = test::copy_of(db);
    test::launch3("lora_bwd_b", LoraBwdB{{dy.p}, {h.p}, {parts.p}, rows, s.width, s.stride, s.first, s.ranks, 0.7f}, grid, 256, 0, parts);
    test::launch("fold", Fold{{parts.p}, {db.p}, chunks, n}, 2, 256);
    test::launch3("lora_bwd_a", LoraBwdA{{dh.p}, {x.p}, {parts.p}, rows, s.width, s.ranks}, grid, 256, 0, parts);
    test::launch("fold", Fold{{parts.p}, {da.p}, chunks, n}, 2, 256);
    Compare b, a;
    for (u32 c = 0; c < s.width; c++)
      for (u32 i = 0; i < s.ranks; i++) {
        double sb = 0, sa = 0;
        for (u32 r = 0; r < rows; r++) sb += double(dy[r * s.width + c]) * h[r * s.stride + s.first + i], sa += double(dh[r * s.ranks + i]) * gpu::to_f32(x[r * s.width + c]);
        b.add(db[c * s.ranks + i], b0[c * s.ranks + i] + double(0.7f) * sb), a.add(da[i * s.width + c], a0[i * s.width + c] + sa);
      }
    b.close("lora_bwd_b", 8 * sqrt(rows)), a.close("lora_bwd_a", 8 * sqrt(rows));
  }
}
