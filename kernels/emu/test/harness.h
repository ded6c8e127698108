// What the kernel tests share: device arrays with guards, launches under several schedules, and the rule of tolerance.
//
// Every test_*.cpp is a program: TEST(name) { ... } cases, run by kernels/test.sh plain, under ASan + UBSan and under TSan.
#pragma once
#include "../../rt/gpu.cuh"
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

extern "C" void __asan_poison_memory_region(const volatile void*, size_t) __attribute__((weak));
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t) __attribute__((weak));

namespace test {
struct Case {
  const char* name;
  void (*run)();
  Case* next;
};
inline Case*& cases() {
  static Case* head = nullptr;
  return head;
}
struct Register {
  Case c;
  Register(const char* name, void (*run)()) : c{name, run, cases()} { cases() = &c; }
};
inline int& failures() {
  static int n = 0;
  return n;
}
#define TEST(name)                                    \
  static void test_##name();                          \
  static test::Register reg_##name(#name, test_##name); \
  static void test_##name()
#define CHECK(cond, ...)                                         \
  do {                                                           \
    if (!(cond)) {                                               \
      test::failures()++;                                        \
      printf("FAIL %s:%d %s: ", __FILE__, __LINE__, #cond);      \
      printf(" " __VA_ARGS__);                                   \
      printf("\n");                                              \
    }                                                            \
  } while (0)

// Repeatable random numbers.
struct Rng {
  uint64_t s;
  explicit Rng(uint64_t seed) : s(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint32_t bits() {
    s = s * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(s >> 33) ^ uint32_t(s >> 13);
  }
  float uniform() { return float(bits() >> 8) / float(1 << 24); }
  // Sum of uniforms: near enough to normal, of variance 1.
  float normal() {
    float v = 0;
    for (int i = 0; i < 12; i++) v += uniform();
    return v - 6;
  }
};

// Device memory: exactly `n` elements on the heap, so that ASan sees a step beyond them; outputs begin as NaN bits.
template <class T>
struct Array {
  T* p;
  size_t n;
  explicit Array(size_t n) : p(static_cast<T*>(aligned_alloc(256, (n * sizeof(T) + 255) / 256 * 256))), n(n) {
    memset(static_cast<void*>(p), 0xff, (n * sizeof(T) + 255) / 256 * 256);
    if (__asan_poison_memory_region) __asan_poison_memory_region(reinterpret_cast<char*>(p) + n * sizeof(T), tail());
  }
  Array(const Array&) = delete;
  ~Array() {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(reinterpret_cast<char*>(p) + n * sizeof(T), tail());
    free(p);
  }
  size_t tail() const { return (n * sizeof(T) + 255) / 256 * 256 - n * sizeof(T); }
  T& operator[](size_t i) { return p[i]; }
  void fill(const std::function<T(size_t)>& f) {
    for (size_t i = 0; i < n; i++) p[i] = f(i);
  }
};

inline EmuKernel* find(const char* name) {
  for (EmuKernel* k = emu_kernels; k; k = k->next)
    if (!strcmp(k->name, name)) return k;
  printf("no kernel %s\n", name);
  abort();
}
// One launch; seed 0 is the threads' own order, others are pseudo-random.
template <class Args>
void launch(const char* name, const Args& args, dim3 grid, dim3 block, size_t smem = 0, uint64_t seed = 0, int threads = 1) {
  void* params[] = {const_cast<Args*>(&args)};
  EmuClosure c = find(name)->bind(params);
  emu_launch(c.run, c.state, grid, block, smem, seed, threads);
  c.drop(c.state);
}
// The launch under three schedules (in order; shuffled; shuffled over two OS threads). `out` must come out the same, bit for bit.
template <class Args, class T>
void launch3(const char* name, const Args& args, dim3 grid, dim3 block, size_t smem, Array<T>& out) {
  std::vector<T> before(out.p, out.p + out.n), first;
  for (int s = 0; s < 3; s++) {
    std::copy(before.begin(), before.end(), out.p);
    launch(name, args, grid, block, smem, s ? 1234567 + s : 0, s == 2 ? 2 : 1);
    if (s == 0) first.assign(out.p, out.p + out.n);
    CHECK(!memcmp(first.data(), out.p, out.n * sizeof(T)), "%s: schedule %d differs", name, s);
  }
}
// Largest |got - want|, and the same of `rough`: naive arithmetic that rounds where the kernel's storage rounds. A kernel may be
// off twice as far as that, and `ulps` f32 roundings of the largest value more.
inline void close(const char* what, const std::vector<double>& got, const std::vector<double>& want, const std::vector<double>& rough,
                  double ulps = 8) {
  double err = 0, allowed = 0, size = 0;
  size_t at = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const double e = fabs(got[i] - want[i]);
    if (!(e <= err)) err = e, at = i;
    allowed = fmax(allowed, fabs(rough[i] - want[i]));
    size = fmax(size, fabs(want[i]));
  }
  allowed = 2 * allowed + ulps * size * 6e-8;
  CHECK(err <= allowed, "%s: off by %g at %zu (got %g, want %g), allowed %g", what, err, at, got[at], want[at], allowed);
}
}  // namespace test

int main(int argc, char** argv) {
  int ran = 0;
  for (test::Case* c = test::cases(); c; c = c->next) {
    if (argc > 1 && !strstr(c->name, argv[1])) continue;
    const int before = test::failures();
    c->run();
    printf("%s %s\n", test::failures() == before ? "ok  " : "FAIL", c->name);
    ran++;
  }
  printf("%d cases, %d failures\n", ran, test::failures());
  return test::failures() != 0 || ran == 0;
}
