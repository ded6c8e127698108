// Barriers, warp collectives, ldmatrix and mma. See emu_internal.h.
#include "emu_internal.h"
#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(EMU_NO_CLONES)
#define EMU_CLONES __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define EMU_CLONES
#endif

namespace emu {
// ---- barriers ----
static void wake(Scheduler& s, Block& b, Wait w, int id) {
  for (unsigned i = 0; i < b.n; i++) {
    Fiber& f = s.fiber(b, i);
    if (f.wait == w && (w != Wait::Named || f.barrier == id)) s.set_ready(f);
  }
}

static void named_barrier(int id, int count, bool wait, const char* file, int line) {
  Fiber& f = me();
  Block& b = *f.block;
  if (id < 1 || id > 15 || count % 32 || count <= 0) emu_fail("named barrier: id 1..15 and a multiple of 32 threads", file, line);
  Block::Named& at = b.named[id];
  if (at.arrived && at.count != count) emu_fail("named barrier: threads disagree about its count", file, line);
  void* token = b.barrier_token(id);
  release(token);
  at.count = count;
  f.barrier = id;
  if (++at.arrived == count) {
    at.arrived = 0;
    b.turn[id] ^= 1;
    wake(*S, b, Wait::Named, id);
    if (S->rng) S->schedule();
  } else if (wait) {
    S->sleep(Wait::Named, file, line);
  }
  if (wait) acquire(token);
}

// ---- shuffles ----
enum ShuffleMode { Index, Xor, Down, Up };

static unsigned shuffle_source(unsigned lane, int arg, int width, int mode) {
  const int base = int(lane) & ~(width - 1);
  int from = int(lane);
  switch (mode) {
    case Index: from = base + (arg & (width - 1)); break;
    case Xor: from = int(lane) ^ arg; break;
    case Down: from = int(lane) + arg; break;
    case Up: from = int(lane) - arg; break;
  }
  // Beyond the group of `width` lanes a lane reads itself. An xor may reach into groups before its own, which CUDA allows.
  const bool outside = from >= base + width || (mode != Xor && from < base) || from < 0;
  return outside ? lane : unsigned(from);
}

// ---- mma ----
static float half_value(uint32_t h) {
  h &= 0xffff;
  const uint32_t sign = (h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  if (!e) {
    const float f = float(m) * 0x1p-24f;
    return sign ? -f : f;
  }
  const uint32_t u = sign | (e == 31 ? 0x7f800000 : (e + 112) << 23) | m << 13;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
float bf16_value(uint32_t bits) {
  bits <<= 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// m16n8k16: lane 4 g + t holds of A rows g, g + 8 and columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9; of B column g and those rows; of the
// sum rows g, g + 8 and columns 2 t, 2 t + 1. In w.in: 4 words of A, 2 of B, 4 of C.
EMU_CLONES static void mma_16816(Warp& w, bool half) {
  float a[16][16], b[16][8], d[16][8];
  const auto value = [half](uint32_t u) { return half ? half_value(u) : bf16_value(u & 0xffff); };
  for (int lane = 0; lane < 32; lane++) {
    const uint32_t* x = w.in[lane];
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
      const int r = g + (i & 1) * 8, k = t + (i >> 1) * 8;
      a[r][k] = value(x[i]), a[r][k + 1] = value(x[i] >> 16);
    }
    for (int i = 0; i < 2; i++) b[t + i * 8][g] = value(x[4 + i]), b[t + i * 8 + 1][g] = value(x[4 + i] >> 16);
    float c[4];
    memcpy(c, x + 6, sizeof c);
    d[g][t] = c[0], d[g][t + 1] = c[1], d[g + 8][t] = c[2], d[g + 8][t + 1] = c[3];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) d[i][n] += a[i][k] * b[k][n];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4 * 2;
    const float c[4] = {d[g][t], d[g][t + 1], d[g + 8][t], d[g + 8][t + 1]};
    memcpy(w.out[lane], c, sizeof c);
  }
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r brought row r of the i-th.
static void ldmatrix(Warp& w, bool trans, EmuStats& stats) {
  stats.ldmatrix++;
  for (int i = 0; i < 4; i++) {
    int banks[8] = {}, worst = 0;
    for (int r = 0; r < 8; r++) worst = std::max(worst, ++banks[w.in[i * 8 + r][4] / 16 % 8]);
    stats.ldmatrix_conflicts += unsigned(worst - 1);
    for (int lane = 0; lane < 32; lane++) {
      if (trans) {
        const int column = lane / 4, r = lane % 4 * 2;
        const auto at = [&](int row) { return w.in[i * 8 + row][column / 2] >> (column % 2 * 16) & 0xffff; };
        w.out[lane][i] = at(r) | at(r + 1) << 16;
      } else {
        w.out[lane][i] = w.in[i * 8 + lane / 4][lane % 4];
      }
    }
  }
}
}  // namespace emu

using namespace emu;
extern "C" {
void emu_syncthreads(const char* file, int line) {
  Block& b = *me().block;
  S->stats.barriers++;
  if (b.live < b.n) emu_fail("__syncthreads after some threads of the block exited", file, line);
  void* token = b.barrier_token(0);
  release(token);
  if (++b.at_barrier == b.live) {
    b.at_barrier = 0;
    b.turn[0] ^= 1;
    wake(*S, b, Wait::Block, 0);
    if (S->rng) S->schedule();
  } else {
    S->sleep(Wait::Block, file, line);
  }
  acquire(token);
}
void emu_named_barrier(int id, int count, const char* file, int line) { named_barrier(id, count, true, file, line); }
void emu_named_arrive(int id, int count, const char* file, int line) { named_barrier(id, count, false, file, line); }

void emu_grid_sync(const char* file, int line) {
  static char tokens[2];
  static thread_local unsigned turn = 0;
  Scheduler& s = *S;
  if (!s.cooperative) emu_fail("grid_sync in a launch that is not cooperative", file, line);
  if (s.live < s.n) emu_fail("grid_sync after some threads of the grid exited", file, line);
  char* token = &tokens[turn];
  release(token);
  if (++s.at_grid == s.n) {
    s.at_grid = 0;
    turn ^= 1;
    for (unsigned b = 0; b < s.resident; b++) wake(s, *s.blocks[b], Wait::Grid, 0);
    if (s.rng) s.schedule();
  } else {
    s.sleep(Wait::Grid, file, line);
  }
  acquire(token);
}

void emu_syncwarp(unsigned mask, const char* file, int line) {
  Warp& w = my_warp();
  const int first = __builtin_ctz(mask ? mask : 1);
  char* token = &w.sync[first][w.turn[first]];
  release(token);
  rendezvous(SyncWarp, mask, file, line, [first](Warp& w, unsigned) { w.turn[first] ^= 1; });
  acquire(token);
}

uint64_t emu_shfl(unsigned mask, uint64_t v, int arg, int width, int mode, const char* file, int line) {
  const unsigned lane = me().lane;
  Warp& w = my_warp();
  memcpy(w.in[lane], &v, 8);
  w.in[lane][2] = uint32_t(arg);
  if (width < 1 || width > 32 || (width & (width - 1))) emu_fail("shuffle: width is not a power of two up to 32", file, line);
  rendezvous(Shuffle + mode, mask, file, line, [=](Warp& w, unsigned m) {
    for (unsigned rest = m; rest; rest &= rest - 1) {
      const unsigned i = unsigned(__builtin_ctz(rest)), from = shuffle_source(i, int(w.in[i][2]), width, mode);
      if (!(m >> from & 1)) emu_fail("shuffle reads a lane outside the mask", file, line);
      memcpy(w.out[i], w.in[from], 8);
    }
  });
  memcpy(&v, w.out[lane], 8);
  return v;
}

unsigned emu_ballot(unsigned mask, int p, const char* file, int line) {
  const unsigned lane = me().lane;
  Warp& w = my_warp();
  w.in[lane][0] = p != 0;
  rendezvous(Ballot, mask, file, line, [](Warp& w, unsigned m) {
    unsigned bits = 0;
    for (unsigned r = m; r; r &= r - 1) bits |= w.in[__builtin_ctz(r)][0] << __builtin_ctz(r);
    for (unsigned r = m; r; r &= r - 1) w.out[__builtin_ctz(r)][0] = bits;
  });
  return w.out[lane][0];
}

uint32_t emu_reduce(unsigned mask, uint32_t v, int op, const char* file, int line) {
  const unsigned lane = me().lane;
  Warp& w = my_warp();
  w.in[lane][0] = v;
  rendezvous(Reduce + op, mask, file, line, [op](Warp& w, unsigned m) {
    uint32_t all = w.in[__builtin_ctz(m)][0];
    for (unsigned r = m & (m - 1); r; r &= r - 1) {
      const uint32_t x = w.in[__builtin_ctz(r)][0];
      switch (op) {
        case EMU_ADD: all += x; break;
        case EMU_MIN_U: all = std::min(all, x); break;
        case EMU_MAX_U: all = std::max(all, x); break;
        case EMU_MIN_S: all = uint32_t(std::min(int32_t(all), int32_t(x))); break;
        case EMU_MAX_S: all = uint32_t(std::max(int32_t(all), int32_t(x))); break;
        case EMU_AND: all &= x; break;
        case EMU_OR: all |= x; break;
        case EMU_XOR: all ^= x; break;
      }
    }
    for (unsigned r = m; r; r &= r - 1) w.out[__builtin_ctz(r)][0] = all;
  });
  return w.out[lane][0];
}

unsigned emu_match(unsigned mask, uint32_t v, const char* file, int line) {
  const unsigned lane = me().lane;
  Warp& w = my_warp();
  w.in[lane][0] = v;
  rendezvous(Match, mask, file, line, [](Warp& w, unsigned m) {
    for (unsigned r = m; r; r &= r - 1) {
      const int i = __builtin_ctz(r);
      unsigned same = 0;
      for (unsigned q = m; q; q &= q - 1) same |= unsigned(w.in[__builtin_ctz(q)][0] == w.in[i][0]) << __builtin_ctz(q);
      w.out[i][0] = same;
    }
  });
  return w.out[lane][0];
}

void emu_ldmatrix(uint32_t* out, const uint32_t* row, uintptr_t addr, int trans, const char* file, int line) {
  const unsigned lane = me().lane;
  Warp& w = my_warp();
  memcpy(w.in[lane], row, 16);
  w.in[lane][4] = uint32_t(addr);
  rendezvous(Ldmatrix + trans, ~0u, file, line, [trans](Warp& w, unsigned) { ldmatrix(w, trans, S->stats); });
  memcpy(out, w.out[lane], 16);
}

void emu_mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, int half, const char* file, int line) {
  const unsigned lane = me().lane;
  Warp& w = my_warp();
  memcpy(w.in[lane], a, 16);
  w.in[lane][4] = b0, w.in[lane][5] = b1;
  memcpy(w.in[lane] + 6, c, 16);
  rendezvous(Mma + half, ~0u, file, line, [half](Warp& w, unsigned) {
    S->stats.mma++;
    mma_16816(w, half);
  });
  memcpy(c, w.out[lane], 16);
}
}
