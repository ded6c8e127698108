// What only Hopper has, on the CPU: mbarriers, the copy engine, warpgroup products. The GPU's bodies are in rt/hopper.cuh.
//
// A copy poisons its destination with NaN when it is issued and is made when somebody waits for it; the accumulators of a product
// are NaN until they are waited for. These functions are compiled with the kernel, so that the sanitizers see what they touch.
#pragma once
#define GPU_HOPPER 1

struct alignas(64) EmuTensorMap {
  uint64_t magic;
  const char* base;
  uint64_t stride[5];  // bytes
  uint32_t last[5];    // largest coordinate
  uint16_t box[5];
  uint8_t rank, size, swizzle;
};
static_assert(sizeof(EmuTensorMap) == 128, "as large as CUtensorMap");
#define EMU_TENSOR_MAP 0x70614d726f736e54ull

struct EmuCopy {
  char* dst;
  const char* src;   // of a plain copy
  uint32_t bytes;
  int rank;          // 0: plain
  int at[3];
  EmuTensorMap map;
};
struct EmuWgmma {
  int n;
  bool trans_a, trans_b, accumulate, a_in_registers;
  uint64_t desc_a, desc_b;
  const uint32_t* a_regs;
  uint64_t a[2];             // this lane's chunk of A, and its chunks of B
  const void* at_a[1];
  uint64_t b[32];
  const void* at_b[16];
  int chunks_b;
};
struct EmuSeen {
  const void* at;
  uint64_t value[2];
};
enum { EMU_MBAR_DONE, EMU_MBAR_COPY, EMU_MBAR_NOT_YET };
extern "C" {
void emu_mbar_init(void* bar, unsigned count, const char* f, int l);
void emu_mbar_arrive(void* bar, unsigned arrivals, unsigned tx, const char* f, int l);
int emu_mbar_wait(void* bar, unsigned parity, int block, EmuCopy* next, const char* f, int l);
void emu_fence(int mbarriers_only);
void emu_copy_issue(void* bar, const EmuCopy* copy, const char* f, int l);
const char* emu_tensor_map(EmuTensorMap* out, int type, unsigned rank, const void* base, const uint64_t* dims, const uint64_t* strides,
                           const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int fill);
void emu_wgmma_fence(const char* f, int l);
void emu_wgmma(float* d, const EmuWgmma* op, const char* f, int l);
void emu_wgmma_commit();
const EmuSeen* emu_wgmma_operand(int keep);
void emu_wgmma_wait(int keep, const char* f, int l);
}

namespace gpu {
using TensorMap = EmuTensorMap;

// ---- mbarriers ----
// The word itself holds a mark, so that one that is not there yet, or was overwritten, is noticed (and TSan sees who wrote it).
constexpr uint64_t MBARRIER = 0x726569727261426dull;
static inline void mbar_check(const uint64_t* bar, const char* f, int l) {
  if (*bar != MBARRIER) emu_fail("mbarrier not initialised, or overwritten", f, l);
}
static inline void mbar_init(uint64_t* bar, uint32_t count, EMU_SITE) {
  emu_mbar_init(bar, count, f_, l_);
  *bar = MBARRIER;
}
static inline void fence_mbar_init() { emu_fence(1); }
static inline void fence_proxy_async() { emu_fence(0); }
static inline void mbar_arrive(uint64_t* bar, EMU_SITE) {
  mbar_check(bar, f_, l_);
  emu_mbar_arrive(bar, 1, 0, f_, l_);
}
static inline void mbar_expect_tx(uint64_t* bar, uint32_t bytes, EMU_SITE) {
  mbar_check(bar, f_, l_);
  emu_mbar_arrive(bar, 0, bytes, f_, l_);
}
static inline void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes, EMU_SITE) {
  mbar_check(bar, f_, l_);
  emu_mbar_arrive(bar, 1, bytes, f_, l_);
}

// Swizzles are by address: with a pattern of 16 << s bytes, bits 4.. of an address take an exclusive or with bits 7.. .
static inline uint32_t swizzled(uint32_t at, int swizzle) { return at ^ ((at >> 7 & ((1u << swizzle) - 1)) << 4); }

static __attribute__((noinline)) void emu_run_copy(const EmuCopy& c, const char* f, int l) {
  if (!c.rank) {
    for (uint32_t i = 0; i < c.bytes; i += 16) *reinterpret_cast<b128*>(c.dst + i) = *reinterpret_cast<const b128*>(c.src + i);
    return;
  }
  const EmuTensorMap& m = c.map;
  const uint32_t base = emu_smem_offset(c.dst, f, l), row = m.box[0] * m.size;
  uint32_t at = base;
  for (int z = 0; z < (m.rank > 2 ? m.box[2] : 1); z++)
    for (int y = 0; y < (m.rank > 1 ? m.box[1] : 1); y++)
      for (uint32_t chunk = 0; chunk < row; chunk += 16, at += 16) {
        char* to = static_cast<char*>(emu_smem_at(swizzled(at, m.swizzle)));
        const int64_t x0 = c.at[0] + int64_t(chunk / m.size), gy = m.rank > 1 ? int64_t(c.at[1]) + y : 0, gz = m.rank > 2 ? int64_t(c.at[2]) + z : 0;
        const bool line = gy >= 0 && gz >= 0 && gy <= int64_t(m.last[1]) && gz <= int64_t(m.last[2]);
        *reinterpret_cast<b128*>(to) = b128{0, 0};  // outside the tensor: zeros
        for (int i = 0; line && i < 16 / m.size; i++) {
          const int64_t x = x0 + i;
          if (x < 0 || x > int64_t(m.last[0])) continue;
          const char* from = m.base + uint64_t(x) * m.size + uint64_t(gy) * m.stride[1] + uint64_t(gz) * m.stride[2];
          for (int byte = 0; byte < m.size; byte++) to[i * m.size + byte] = from[byte];
        }
      }
}
static inline bool emu_mbar(uint64_t* bar, uint32_t parity, bool block, const char* f, int l) {
  mbar_check(bar, f, l);
  EmuCopy c;
  int state;
  while ((state = emu_mbar_wait(bar, parity, block, &c, f, l)) == EMU_MBAR_COPY) emu_run_copy(c, f, l);
  return state == EMU_MBAR_DONE;
}
static inline bool mbar_test(uint64_t* bar, uint32_t parity, EMU_SITE) { return emu_mbar(bar, parity, false, f_, l_); }
static inline void mbar_wait(uint64_t* bar, uint32_t parity, EMU_SITE) { emu_mbar(bar, parity, true, f_, l_); }

// ---- copies ----
static inline void emu_issue(const EmuCopy& c, uint64_t* bar, const char* f, int l) {
  mbar_check(bar, f, l);
  emu_smem_offset(c.dst + (c.bytes - 1), f, l);
  for (uint32_t i = 0; i < c.bytes; i += 16) *reinterpret_cast<b128*>(c.dst + i) = b128{~0ull, ~0ull};
  emu_copy_issue(bar, &c, f, l);
}
static inline void bulk_load(void* s, const void* g, uint32_t bytes, uint64_t* bar, EMU_SITE) {
  EmuCopy c{};
  c.dst = static_cast<char*>(s), c.src = static_cast<const char*>(g), c.bytes = bytes;
  emu_issue(c, bar, f_, l_);
}
static inline void emu_tensor_load(void* s, const TensorMap* map, uint64_t* bar, int rank, int x, int y, int z, const char* f, int l) {
  EmuCopy c{};
  c.dst = static_cast<char*>(s), c.rank = rank, c.at[0] = x, c.at[1] = y, c.at[2] = z, c.map = *map;
  c.bytes = c.map.size;
  for (int i = 0; i < rank; i++) c.bytes *= c.map.box[i];
  emu_issue(c, bar, f, l);
}
static inline void tma_load_2d(void* s, const TensorMap* map, uint64_t* bar, int x, int y, EMU_SITE) {
  emu_tensor_load(s, map, bar, 2, x, y, 0, f_, l_);
}
static inline void tma_load_3d(void* s, const TensorMap* map, uint64_t* bar, int x, int y, int z, EMU_SITE) {
  emu_tensor_load(s, map, bar, 3, x, y, z, f_, l_);
}
static inline void tma_prefetch(const TensorMap*) {}

// ---- warpgroup products ----
enum Swizzle : uint64_t { SWIZZLE_NONE = 0, SWIZZLE_128 = 1, SWIZZLE_64 = 2, SWIZZLE_32 = 3 };
static inline uint64_t wgmma_desc(const void* p, uint32_t lbo, uint32_t sbo, Swizzle swizzle = SWIZZLE_128, EMU_SITE) {
  const uint32_t at = emu_smem_offset(p, f_, l_);
  if ((at | lbo | sbo) % 16) emu_fail("wgmma operand: address and strides must be multiples of 16", f_, l_);
  return uint64_t(at >> 4) | uint64_t(lbo >> 4 & 0x3fff) << 16 | uint64_t(sbo >> 4 & 0x3fff) << 32 | uint64_t(swizzle) << 62;
}
// Where eight elements stand. `mn_major` false: row `r`, elements 8 c .. of k. True: element r of k, rows 8 c .. .
static inline const b128* emu_chunk(uint64_t desc, bool mn_major, int r, int c, const char* f, int l) {
  const uint32_t start = uint32_t(desc & 0x3fff) << 4, lbo = uint32_t(desc >> 16 & 0x3fff) << 4, sbo = uint32_t(desc >> 32 & 0x3fff) << 4;
  const int mode = int(desc >> 62), bits = mode ? 4 - mode : 0;  // a pattern of 16 << bits bytes, `8 rows` of it
  const uint32_t width = 16u << bits, per = 1u << bits;
  if ((start >> 7 & ((1u << bits) - 1))) emu_fail("wgmma operand does not begin at its swizzle pattern", f, l);
  uint32_t at = start;
  if (!mn_major) at += uint32_t(r) / 8 * sbo + uint32_t(r) % 8 * width + (mode ? uint32_t(c) * 16 : uint32_t(c) * lbo);
  else if (mode) at += uint32_t(c) % per * 16 + uint32_t(c) / per * lbo + uint32_t(r) % 8 * width + uint32_t(r) / 8 * sbo;
  else at += uint32_t(c) * sbo + uint32_t(r) % 8 * 16 + uint32_t(r) / 8 * lbo;
  return static_cast<const b128*>(emu_smem_at(swizzled(at, bits)));
}
template <int N>
static __attribute__((noinline)) void emu_wgmma_gather(float (&d)[N / 2], EmuWgmma& op, const char* f, int l) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "n of wgmma");
  const int lane = int(emu_cur->lane), warp = int(emu_cur->warp % 4);
  op.n = N;
  const auto chunk = [&](uint64_t desc, bool mn_major, int r, int c, uint64_t* to) {
    const b128* p = emu_chunk(desc, mn_major, r, c, f, l);
    const b128 v = *p;
    to[0] = v.a, to[1] = v.b;
    return static_cast<const void*>(p);
  };
  if (!op.a_in_registers) {  // the warp's 16 of the 64 rows
    op.at_a[0] = op.trans_a ? chunk(op.desc_a, true, lane / 2, warp * 2 + lane % 2, op.a)
                            : chunk(op.desc_a, false, warp * 16 + lane / 2, lane % 2, op.a);
  }
  op.chunks_b = 0;
  for (int c = lane; c < 2 * N; c += 32) {
    op.at_b[op.chunks_b] = op.trans_b ? chunk(op.desc_b, true, c / (N / 8), c % (N / 8), op.b + op.chunks_b * 2)
                                      : chunk(op.desc_b, false, c / 2, c % 2, op.b + op.chunks_b * 2);
    op.chunks_b++;
  }
  emu_wgmma(d, &op, f, l);
}
// d[64][N] (+)= a[64][16] b[16][N]. TRANS: the operand's rows are along k in memory ("mn-major").
template <int N, bool TRANS_B = false, bool TRANS_A = false>
static inline void wgmma_bf16(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate, EMU_SITE) {
  EmuWgmma op{};
  op.trans_a = TRANS_A, op.trans_b = TRANS_B, op.accumulate = accumulate, op.desc_a = desc_a, op.desc_b = desc_b;
  emu_wgmma_gather<N>(d, op, f_, l_);
}
template <int N, bool TRANS_B = false>
static inline void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate, EMU_SITE) {
  EmuWgmma op{};
  op.trans_b = TRANS_B, op.accumulate = accumulate, op.desc_b = desc_b, op.a_in_registers = true, op.a_regs = a;
  emu_wgmma_gather<N>(d, op, f_, l_);
}
static inline void wgmma_fence(EMU_SITE) { emu_wgmma_fence(f_, l_); }
static inline void wgmma_commit() { emu_wgmma_commit(); }
template <int N>
static inline void wgmma_wait(EMU_SITE) {
  while (const EmuSeen* s = emu_wgmma_operand(N)) {
    const b128 now = *static_cast<const b128*>(s->at);
    if (now.a != s->value[0] || now.b != s->value[1]) emu_fail("shared memory changed under a wgmma in flight", f_, l_);
  }
  emu_wgmma_wait(N, f_, l_);
}
template <int N, int R>
static inline void wgmma_wait(float (&)[R], EMU_SITE) {
  wgmma_wait<N>(f_, l_);
}
// Registers are not counted here.
template <int N>
static inline void reg_alloc() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg");
}
template <int N>
static inline void reg_dealloc() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg");
}
}  // namespace gpu
