// What a kernel gave, and what it should have given.
#pragma once
#include "harness.h"
#include <algorithm>

namespace test {
inline double stored(double v) { return gpu::to_f32(gpu::to_bf16(float(v))); }

struct Compare {
  std::vector<double> got, want, rough;
  void add(float g, double w) { add(g, w, double(float(w))); }
  // `r`: the same by arithmetic that rounds what the kernel rounds.
  void add(float g, double w, double r) { got.push_back(g), want.push_back(w), rough.push_back(r); }
  void add(bf16_t g, double w) { add(gpu::to_f32(g), w, stored(w)); }
  void close(const char* what, double ulps = 8) const { test::close(what, got, want, rough, ulps); }
};

inline void randomise(Array<float>& a, Rng& rng) {
  a.fill([&](size_t) { return rng.normal(); });
}
inline void randomise(Array<bf16_t>& a, Rng& rng) {
  a.fill([&](size_t) { return gpu::to_bf16(rng.normal()); });
}
// The launch under three schedules from the same start; all of `out` must come out the same, bit for bit.
template <class Args>
void launch3(const char* name, const Args& args, dim3 grid, dim3 block, size_t smem, std::vector<Array<float>*> out) {
  std::vector<std::vector<float>> before, first;
  for (Array<float>* o : out) before.emplace_back(o->p, o->p + o->n);
  for (int s = 0; s < 3; s++) {
    for (size_t i = 0; i < out.size(); i++) std::copy(before[i].begin(), before[i].end(), out[i]->p);
    launch(name, args, grid, block, smem, s ? 1234567 + s : 0, s == 2 ? 2 : 1);
    for (size_t i = 0; i < out.size(); i++) {
      if (s == 0) first.emplace_back(out[i]->p, out[i]->p + out[i]->n);
      CHECK(!out[i]->n || !memcmp(first[i].data(), out[i]->p, out[i]->n * sizeof(float)), "%s: output %zu of schedule %d differs", name, i, s);
    }
  }
}
template <class T>
std::vector<T> copy_of(const Array<T>& a) {
  return std::vector<T>(a.p, a.p + a.n);
}
}  // namespace test
