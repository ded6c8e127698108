// Warpgroup products. See emu_internal.h.
//
// A product is computed when it is issued, into a hidden copy of the accumulators; the registers themselves are NaN until a wait
// hands the results out. The operands in shared memory are read again at that wait: they must not have changed in between.
#include "emu_internal.h"
#include <cmath>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(EMU_NO_CLONES)
#define EMU_CLONES __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define EMU_CLONES
#endif

namespace emu {
// What a lane brings, through Warp::wide.
struct Part {
  const EmuWgmma* op;
  float* d;                  // its hidden accumulators
};

// d[16][n] += a[16][16] b[16][n], n a multiple of 8.
EMU_CLONES static void multiply(float* d, const float* a, const float* b, int n) {
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++) {
      const float x = a[i * 16 + k];
      for (int j = 0; j < n; j++) d[i * n + j] += x * b[k * n + j];
    }
}

static float element(const uint64_t* chunk, int i) { return bf16_value(uint32_t(chunk[i / 4] >> (i % 4 * 16)) & 0xffff); }

// The warp's 16 rows. Chunks (8 elements) are dealt to lanes in order: chunk c stands with lane c % 32, at place c / 32.
static void product(Warp& w) {
  const Part* part[32];
  for (int lane = 0; lane < 32; lane++) part[lane] = static_cast<const Part*>(w.wide[lane]);
  const EmuWgmma& op = *part[0]->op;
  const int n = op.n;
  float a[16 * 16], b[16 * 256], d[16 * 256];
  const auto chunk = [&](bool of_b, int c) { return (of_b ? part[c % 32]->op->b : part[c % 32]->op->a) + c / 32 * 2; };
  if (op.a_in_registers) {
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++)
          a[(g + (i & 1) * 8) * 16 + t + (i >> 1) * 8 + h] = bf16_value(part[lane]->op->a_regs[i] >> (h * 16) & 0xffff);
    }
  } else {
    for (int c = 0; c < 32; c++)
      for (int i = 0; i < 8; i++) {
        // Along k: chunk c is half a row. Along m: half a column.
        if (op.trans_a) a[(c % 2 * 8 + i) * 16 + c / 2] = element(chunk(false, c), i);
        else a[c / 2 * 16 + c % 2 * 8 + i] = element(chunk(false, c), i);
      }
  }
  for (int c = 0; c < 2 * n; c++)
    for (int i = 0; i < 8; i++) {
      if (op.trans_b) b[c / (n / 8) * n + c % (n / 8) * 8 + i] = element(chunk(true, c), i);
      else b[(c % 2 * 8 + i) * n + c / 2] = element(chunk(true, c), i);
    }
  // Lane 4 g + t: rows g and g + 8, of every eight columns 2 t and 2 t + 1.
  const auto each = [&](auto&& f) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < n / 2; i++)
        f(part[lane]->d[i], d[(lane / 4 + (i >> 1 & 1) * 8) * n + i / 4 * 8 + lane % 4 * 2 + (i & 1)]);
  };
  if (op.accumulate) each([](float mine, float& all) { all = mine; });
  else memset(d, 0, sizeof(float) * 16 * size_t(n));
  multiply(d, a, b, n);
  each([](float& mine, float all) { mine = all; });
}

static void check_warpgroup(const EmuWgmma& op, const char* file, int line) {
  Fiber& f = me();
  Block& b = *f.block;
  if (b.n % 128) emu_fail("wgmma in a block that is not whole warpgroups", file, line);
  List<Product>& sequence = b.products[f.warp / 4];
  const Product p{{uint64_t(op.n) | uint64_t(op.trans_a) << 16 | uint64_t(op.trans_b) << 17 | uint64_t(op.a_in_registers) << 18, op.desc_a,
                   op.desc_b, uint64_t(op.accumulate)}, file, line};
  Wgmma& w = f.wgmma;
  Product* next = w.last ? w.last->next : sequence.empty() ? nullptr : &sequence.front();
  if (!next) {
    next = &sequence.emplace_back(p);
    if (w.last) w.last->next = next;
  }
  w.last = next;
  const Product& q = *next;
  if (memcmp(p.key, q.key, sizeof p.key) || p.line != q.line) {
    fprintf(stderr, "gpu-emu: other warps of the group are at %s:%d\n", q.file, q.line);
    emu_fail("warps of a warpgroup issue different wgmma", file, line);
  }
}

static Accumulators& accumulators(Wgmma& w, float* regs, int count, const char* file, int line) {
  for (Accumulators& a : w.pending) {
    if (a.regs == regs && int(a.value.size()) == count) return a;
    if (regs < a.regs + a.value.size() && a.regs < regs + count) emu_fail("wgmma: accumulators overlap others in flight", file, line);
  }
  if (!w.fenced) {
    bool known = false;
    for (const Retired& r : w.retired)
      if (r.regs == regs && int(r.value.size()) == count) known = !memcmp(r.value.data(), regs, size_t(count) * sizeof(float));
    if (!known) emu_fail("wgmma: registers changed without a wgmma.fence", file, line);
  }
  w.pending.push_back({regs, Vec<float>(regs, regs + count), 0});
  return w.pending.back();
}
}  // namespace emu

using namespace emu;
extern "C" {
void emu_wgmma_fence(const char* file, int line) {
  me().wgmma.fenced = true;
  me().wgmma.retired.clear();
  rendezvous(WgmmaFence, ~0u, file, line, [](Warp&, unsigned) {});
}

void emu_wgmma(float* regs, const EmuWgmma* op, const char* file, int line) {
  Fiber& f = me();
  Wgmma& state = f.wgmma;
  const int count = op->n / 2;
  if (f.lane == 0) check_warpgroup(*op, file, line);
  Accumulators& acc = accumulators(state, regs, count, file, line);
  acc.group = state.group;
  state.open = true;
  const auto read = [&](const void* const* at, const uint64_t* chunks, int n) {
    for (int i = 0; i < n; i++) {
      if (!f.block->by_copy[emu_smem_offset(at[i], file, line) / 16] && !f.block->proxy_fences)
        emu_fail("wgmma reads shared memory that threads wrote, without a proxy fence", file, line);
      state.operands.push_back({at[i], {chunks[i * 2], chunks[i * 2 + 1]}, state.group});
    }
  };
  if (!op->a_in_registers) read(op->at_a, op->a, 1);
  read(op->at_b, op->b, op->chunks_b);
  Part part{op, acc.value.data()};
  Warp& w = my_warp();
  w.wide[f.lane] = &part;
  for (int i = 0; i < count; i++) regs[i] = NAN;
  rendezvous(WgmmaIssue, ~0u, file, line, [](Warp& w, unsigned) {
    S->stats.wgmma++;
    product(w);
  });
}

void emu_wgmma_commit() {
  Wgmma& w = me().wgmma;
  w.group++;
  w.open = false;
}

// The next operand of the groups that a wait retires, to be read again; null: all are.
const EmuSeen* emu_wgmma_operand(int keep) {
  Wgmma& w = me().wgmma;
  if (w.checked == w.operands.size()) return nullptr;
  const Operand& o = w.operands[w.checked];
  if (int64_t(o.group) >= int64_t(w.group) - keep) return nullptr;
  w.checked++;
  static thread_local EmuSeen seen;
  seen = {o.at, {o.value[0], o.value[1]}};
  return &seen;
}

void emu_wgmma_wait(int keep, const char* file, int line) {
  Wgmma& w = me().wgmma;
  rendezvous(WgmmaWait, ~0u, file, line, [](Warp&, unsigned) {});
  w.operands.erase(w.operands.begin(), w.operands.begin() + ptrdiff_t(w.checked));
  w.checked = 0;
  const int64_t done = int64_t(w.group) - keep;  // groups below this are complete
  for (size_t i = 0; i < w.pending.size();) {
    Accumulators& a = w.pending[i];
    if (int64_t(a.group) >= done) {
      i++;
      continue;
    }
    memcpy(a.regs, a.value.data(), a.value.size() * sizeof(float));
    w.retired.push_back({a.regs, std::move(a.value)});
    w.pending.erase(w.pending.begin() + ptrdiff_t(i));
  }
  if (!w.open) w.fenced = false;
}
}
