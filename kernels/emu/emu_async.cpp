// cp.async, mbarriers and the copy engine: what is issued now and done when somebody waits. See emu_internal.h.
#include "emu_internal.h"

namespace emu {
static Mbarrier* find(Block& b, const void* at) {
  for (auto& m : b.mbarriers)
    if (m.at == at) return &m;
  return nullptr;
}
static Mbarrier& mbarrier(const void* at, const char* file, int line) {
  Mbarrier* m = find(*me().block, at);
  if (!m) emu_fail("mbarrier that was not initialised", file, line);
  return *m;
}

static void wake(Block& b, const Mbarrier& m) {
  for (unsigned i = 0; i < b.n; i++) {
    Fiber& f = S->fiber(b, i);
    if (f.wait == Wait::Mbarrier && f.mbarrier == m.at) S->set_ready(f);
  }
}

// Nothing is missing but bytes of copies that were issued: a waiter may make them.
static bool only_copies_missing(const Mbarrier& m) {
  int64_t bytes = m.handed;
  for (const EmuCopy& c : m.copies) bytes += c.bytes;
  return m.pending == 0 && bytes == m.tx && bytes > 0;
}

static void settle(Block& b, Mbarrier& m) {
  if (m.pending == 0 && m.tx == 0) {
    m.phase ^= 1;
    m.pending = m.count;
    wake(b, m);
  } else if (only_copies_missing(m)) {
    wake(b, m);
  }
}

void check_thread_end(Fiber& f) {
  if (f.head < f.cp.size()) emu_fail("thread exits with cp.async copies not waited for", f.file, f.line);
  if (!f.wgmma.pending.empty()) emu_fail("thread exits with wgmma results not waited for", f.file, f.line);
}

void check_block_end(Block& b) {
  for (auto& m : b.mbarriers)
    if (!m.copies.empty()) emu_fail("block ends with copies into its shared memory not waited for", nullptr, 0);
  for (unsigned g = 0; g < b.products.size(); g++)
    for (unsigned w = g * 4; w < g * 4 + 4 && w < b.warps.size(); w++)
      if (S->fiber(b, w * 32).wgmma.last != (b.products[g].empty() ? nullptr : &b.products[g].back())) emu_fail("warps of a warpgroup issued different numbers of wgmma", nullptr, 0);
}
}  // namespace emu

using namespace emu;
extern "C" {
// ---- cp.async ----
void emu_cp_push(void* dst, const void* src, int ok) {
  me().cp.push_back({dst, src, ok});
  S->stats.cp_bytes += 16;
}
void emu_cp_commit() {
  Fiber& f = me();
  f.groups.push_back(f.cp.size());
}
int emu_cp_pop(int keep, EmuCp* out) {
  Fiber& f = me();
  const size_t groups = f.groups.size();
  const size_t end = groups > size_t(keep) ? f.groups[groups - 1 - size_t(keep)] : 0;
  if (f.head < end) {
    *out = f.cp[f.head++];
    return 1;
  }
  if (f.head == f.cp.size() && !f.cp.empty() && keep == 0) f.cp.clear(), f.groups.clear(), f.head = 0;
  return 0;
}

// ---- mbarriers ----
void emu_mbar_init(void* at, unsigned count, const char* file, int line) {
  Block& b = *me().block;
  if (uintptr_t(at) % 8) emu_fail("mbarrier not aligned to 8 bytes", file, line);
  if (count < 1 || count >= 1u << 20) emu_fail("mbarrier: count of 1 to 2^20 - 1", file, line);
  emu_smem_offset(at, file, line);
  Mbarrier* m = find(b, at);
  if (m && !m->copies.empty()) emu_fail("mbarrier initialised again while copies are under way", file, line);
  if (!m) m = &b.mbarriers.emplace_back();
  m->at = static_cast<char*>(at);
  m->count = m->pending = count;
  m->phase = 0, m->tx = 0, m->fenced = false;
}

void emu_mbar_arrive(void* at, unsigned arrivals, unsigned tx, const char* file, int line) {
  Block& b = *me().block;
  Mbarrier& m = mbarrier(at, file, line);
  if (arrivals > m.pending) emu_fail("more arrivals at an mbarrier than its count", file, line);
  release(&m.sync[m.phase & 1]);
  m.tx += tx;
  if (m.tx >= 1 << 20) emu_fail("mbarrier: more than 2^20 - 1 bytes expected", file, line);
  m.pending -= arrivals;
  settle(b, m);
  S->shuffle();
}

int emu_mbar_wait(void* at, unsigned parity, int block, EmuCopy* next, const char* file, int line) {
  Fiber& f = me();
  Block& b = *f.block;
  Mbarrier& m = mbarrier(at, file, line);
  if (m.handed) {  // the caller made the copy that it was handed
    m.tx -= m.handed, m.handed = 0;
    release(&m.sync[m.phase & 1]);
    settle(b, m);
  }
  for (;;) {
    if ((m.phase & 1) != (parity & 1)) {
      acquire(&m.sync[parity & 1]);
      S->shuffle();
      return EMU_MBAR_DONE;
    }
    if (only_copies_missing(m)) {
      acquire(&m.sync[m.phase & 1]);
      *next = m.copies.front();
      m.copies.pop_front();
      m.handed = next->bytes;
      const uint32_t first = emu_smem_offset(next->dst, file, line) / 16;
      for (uint32_t i = 0; i < next->bytes / 16; i++) b.by_copy[first + i] = true;
      return EMU_MBAR_COPY;
    }
    if (!block) {
      emu_yield();
      return EMU_MBAR_NOT_YET;
    }
    f.mbarrier = at;
    S->sleep(Wait::Mbarrier, file, line);
  }
}

void emu_fence(int mbarriers_only) {
  Block& b = *me().block;
  for (auto& m : b.mbarriers) m.fenced = true;
  if (!mbarriers_only) b.proxy_fences++;
}

// ---- the copy engine ----
void emu_copy_issue(void* at, const EmuCopy* copy, const char* file, int line) {
  Block& b = *me().block;
  Mbarrier& m = mbarrier(at, file, line);
  if (!m.fenced) emu_fail("copy onto an mbarrier without a fence behind its init", file, line);
  const uint32_t to = emu_smem_offset(copy->dst, file, line);
  if (to + copy->bytes > ARENA) emu_fail("copy beyond shared memory", file, line);
  if (copy->rank) {
    if (copy->map.magic != EMU_TENSOR_MAP) emu_fail("not a tensor map", file, line);
    if (int(copy->map.rank) != copy->rank) emu_fail("tensor map of another rank", file, line);
    if (to % 128) emu_fail("tensor copy to an address that is not 128-byte aligned", file, line);
  } else if ((uintptr_t(copy->src) | to | copy->bytes) % 16) {
    emu_fail("bulk copy: addresses and size must be multiples of 16", file, line);
  }
  S->stats.bulk_bytes += copy->bytes;
  release(&m.sync[m.phase & 1]);
  m.copies.push_back(*copy);
  settle(b, m);
}

// cuTensorMapEncodeTiled's rules; what is broken, or null.
const char* emu_tensor_map(EmuTensorMap* out, int type, unsigned rank, const void* base, const uint64_t* dims, const uint64_t* strides,
                           const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int fill) {
  static const int sizes[13] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (uintptr_t(out) % 64) return "the map is not aligned to 64 bytes";
  if (type < 0 || type > 12) return "unknown type";
  if (rank < 1 || rank > 5) return "rank is not 1 to 5";
  if (interleave) return "interleaving is not emulated";
  if (swizzle < 0 || swizzle > 3) return "unknown swizzle";
  if (fill) return "only zeros are emulated as fill";
  if (uintptr_t(base) % 16) return "the address is not aligned to 16 bytes";
  EmuTensorMap m{};
  m.magic = EMU_TENSOR_MAP, m.rank = uint8_t(rank), m.size = uint8_t(sizes[type]), m.swizzle = uint8_t(swizzle);
  m.base = static_cast<const char*>(base);
  for (unsigned i = 0; i < rank; i++) {
    if (!dims[i] || dims[i] > 1ull << 32) return "a dimension is not 1 to 2^32";
    if (!box[i] || box[i] > 256) return "a side of the box is not 1 to 256";
    if (step[i] != 1) return "only steps of 1 are emulated";
    if (i && (strides[i - 1] % 16 || strides[i - 1] >= 1ull << 40)) return "a stride is not a multiple of 16 below 2^40";
    m.last[i] = uint32_t(dims[i] - 1), m.box[i] = uint16_t(box[i]), m.stride[i] = i ? strides[i - 1] : m.size;
  }
  const unsigned row = box[0] * m.size;
  if (row % 16) return "a row of the box is not a multiple of 16 bytes";
  if (swizzle && row > 16u << swizzle) return "a row of the box is wider than the swizzle";
  *out = m;
  return nullptr;
}
}
