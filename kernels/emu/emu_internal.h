// What the parts of the emulator share: fibers, blocks and the scheduler.
//
//   emu.cpp        fibers, schedules, shared memory, launches
//   emu_warp.cpp   barriers, warp collectives, ldmatrix, mma
//   emu_async.cpp  cp.async, mbarriers, tensor maps
//   emu_wgmma.cpp  warpgroup products
//
// None of them is ever compiled with -fsanitize: the sanitizers' hooks are weak symbols, so one object serves all builds.
// Whatever touches a kernel's memory therefore stands in emu.h and hopper.h, which are compiled with the kernel.
#pragma once
#include "emu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <bitset>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <memory>
#include <vector>

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
__attribute__((weak)) void __asan_poison_memory_region(void const volatile*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile*, size_t);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void* __libc_malloc(size_t);
__attribute__((weak)) void __libc_free(void*);
}

namespace emu {
inline void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}
inline void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}

// Memory that the sanitizers do not see: TSan takes a `new` in one fiber and its `delete` in another for accesses of a kernel.
// Vectors that several fibers extend are lists, because a growing vector moves its elements, which TSan would see too.
template <class T>
struct Quiet {
  using value_type = T;
  Quiet() = default;
  template <class U>
  Quiet(const Quiet<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(__libc_malloc ? __libc_malloc(n * sizeof(T)) : malloc(n * sizeof(T))); }
  void deallocate(T* p, size_t) { __libc_free ? __libc_free(p) : free(p); }
  bool operator==(const Quiet&) const { return true; }
  bool operator!=(const Quiet&) const { return false; }
};
template <class T>
using Vec = std::vector<T, Quiet<T>>;
template <class T>
using List = std::list<T, Quiet<T>>;

// A machine stack that can be left and taken up again.
struct Stack {
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
  void* sp = nullptr;
#else
  void* context = nullptr;  // ucontext_t
#endif
};

enum class Wait : uint8_t { Ready, Block, Named, Warp, Mbarrier, Grid, Done };

struct Product {                        // what all four warps of a warpgroup must agree on
  uint64_t key[4];
  const char* file;
  int line;
  Product* next = nullptr;
};

// ---- wgmma: results that a thread has issued and not waited for ----
struct Accumulators {
  float* regs;               // the kernel's array, NaN until the results are handed out
  Vec<float> value;  // what it will hold
  unsigned group;            // the last group that adds to it
};
struct Retired {             // what was handed out since the last fence: to see that nobody changed it without one
  float* regs;
  Vec<float> value;
};
struct Operand {             // 16 bytes of shared memory that a product in flight reads
  const void* at;
  uint64_t value[2];
  unsigned group;
};
struct Wgmma {
  Vec<Accumulators> pending;
  Vec<Retired> retired;
  Vec<Operand> operands;
  size_t checked = 0;         // operands that were read again
  unsigned group = 0;         // groups committed
  unsigned done = 0;          // groups handed out
  bool open = false;          // products issued and not committed
  bool fenced = false;        // a wgmma.fence since the registers were last free to change
  Product* last = nullptr;    // this warp's last product in its warpgroup's sequence
};

struct Block;
struct Fiber : EmuThread {
  Stack stack;
  char* base = nullptr;       // lowest usable byte of its stack
  void* tsan = nullptr;
  void* fake = nullptr;       // ASan's fake stack while it sleeps
  Block* block = nullptr;
  unsigned index = 0;         // in the scheduler
  unsigned number = 0;        // in its block
  Wait wait = Wait::Ready;
  const char* file = "";      // where it waits
  int line = 0;
  int barrier = 0;            // the named barrier it waits at
  const void* mbarrier = nullptr;
  Vec<EmuCp> cp;      // cp.async copies issued
  Vec<size_t> groups; // how many of them each committed group ends at
  size_t head = 0;            // how many are done
  Wgmma wgmma;
};

// The lanes gathered at one collective.
struct Gathering {
  unsigned mask, arrived;
  int kind;
  const char* file;
  int line;
};
struct Warp {
  unsigned alive = 0;
  Gathering at[32] = {};                // by the lowest lane of the mask
  alignas(64) uint32_t in[32][16] = {};
  alignas(64) uint32_t out[32][4] = {};
  const void* wide[32] = {};            // operands too large for `in`
  char sync[32][2] = {};                // TSan tokens of __syncwarp, by the lowest lane of the mask and by turns
  uint8_t turn[32] = {};
};

struct Mbarrier {
  char* at = nullptr;
  unsigned count = 0, pending = 0, phase = 0;
  int64_t tx = 0;                       // bytes expected and not yet arrived
  uint32_t handed = 0;                  // bytes of the copy that a waiter is making
  char sync[2] = {};                    // TSan tokens, by parity
  bool fenced = false;                  // made visible to the copy engine since init
  List<EmuCopy> copies;                 // issued, made when somebody waits
};

constexpr size_t ARENA = 256 << 10;     // shared memory of a block, and room for redzones
constexpr int TOKENS = 33;              // TSan tokens of a block: two for each barrier (0 is __syncthreads), start

struct Block {
  struct Site {
    const void* id;
    size_t offset;
  };
  struct Named {
    int arrived = 0, count = 0;
  };
  unsigned first = 0, n = 0, live = 0;  // its fibers
  unsigned at_barrier = 0;
  Named named[16];
  std::vector<Warp> warps;
  char* arena = nullptr;
  List<Site> sites;                     // static shared arrays
  size_t used = 0;
  char* sync = nullptr;
  List<Mbarrier> mbarriers;
  std::bitset<ARENA / 16> by_copy;      // 16-byte pieces that the copy engine wrote
  unsigned proxy_fences = 0;
  std::vector<List<Product>> products;  // by warpgroup
  uint8_t turn[16] = {};                // by barrier
  // A barrier takes two tokens by turns. With one, a thread that leaves late would also acquire what a fast one released at the
  // same barrier's next turn, and races between the two turns would go unseen.
  void* barrier_token(int id) { return sync + id * 2 + turn[id]; }
  void* start_token() { return sync + 32; }
};

struct Scheduler {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> blocks;  // resident ones: one, or all of a cooperative launch
  std::vector<uint64_t> ready;                 // a bit for each fiber
  unsigned n = 0, live = 0, resident = 0, at_grid = 0;
  bool cooperative = false;
  Fiber* cur = nullptr;
  Stack main;
  void* main_tsan = nullptr;
  void* main_fake = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0, stack_size = 0, dyn = 0;
  EmuBody body = nullptr;
  void* arg = nullptr;
  uint64_t rng = 0;                            // 0: threads run in order
  unsigned spins = 0;                          // yields since anything else happened
  EmuStats stats{};

  uint64_t random() {
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17;
    return rng;
  }
  void set_ready(Fiber& f) {
    ready[f.index >> 6] |= 1ull << (f.index & 63);
    f.wait = Wait::Ready;
    spins = 0;
  }
  void clear_ready(const Fiber& f) { ready[f.index >> 6] &= ~(1ull << (f.index & 63)); }
  Fiber& fiber(const Block& b, unsigned i) { return *fibers[b.first + i]; }
  // The current fiber waits, is done, or lets others go first.
  void schedule();
  // The current fiber sleeps until set_ready.
  void sleep(Wait w, const char* file, int line);
  // Under a random schedule, sometimes lets others go first.
  void shuffle() {
    if (rng && (random() & 3) == 0) schedule();
  }
  void dump();
};
extern thread_local Scheduler* S;

inline Fiber& me() { return *S->cur; }
inline Warp& my_warp() { return me().block->warps[me().warp]; }

// Rendezvous of the lanes in `mask`: the last one runs op(warp, mask) for all. Gives no memory order, as in CUDA.
template <class F>
void rendezvous(int kind, unsigned mask, const char* file, int line, F&& op) {
  Fiber& f = me();
  Block& b = *f.block;
  Warp& w = b.warps[f.warp];
  const unsigned bit = 1u << f.lane, left = b.n - f.warp * 32;
  S->stats.collectives++;
  if (!(mask & bit)) emu_fail("lane calls a collective whose mask does not include it", file, line);
  if (left < 32) mask &= (1u << left) - 1;
  if (mask & ~w.alive) emu_fail("collective names lanes that have exited", file, line);
  Gathering& g = w.at[__builtin_ctz(mask)];
  if (!g.arrived) {
    g.mask = mask, g.kind = kind, g.file = file, g.line = line;
  } else if (g.kind != kind || g.mask != mask || g.line != line || g.file != file) {
    fprintf(stderr, "gpu-emu: other lanes wait at %s:%d mask %08x\n", g.file, g.line, g.mask);
    emu_fail("divergent warp collective", file, line);
  }
  g.arrived |= bit;
  if (g.arrived != mask) return S->sleep(Wait::Warp, file, line);
  g.arrived = 0;
  op(w, mask);
  for (unsigned m = mask & ~bit; m; m &= m - 1) S->set_ready(S->fiber(b, f.warp * 32 + __builtin_ctz(m)));
  S->shuffle();
}

// Kinds of rendezvous: lanes that meet must ask for the same.
enum Kind { SyncWarp, Shuffle, Ballot = Shuffle + 4, Reduce, Match = Reduce + 8, Ldmatrix, Mma = Ldmatrix + 2, WgmmaFence = Mma + 8, WgmmaIssue, WgmmaWait };

float bf16_value(uint32_t bits);
// Ends of a thread and of a block: copies or products that nobody waited for.
void check_thread_end(Fiber& f);
void check_block_end(Block& b);
}  // namespace emu
