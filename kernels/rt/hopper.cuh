// What only Hopper has: mbarriers with transaction counts, the copy engine, warpgroup products. Part of hw.cuh; the CPU's bodies
// are in emu/hopper.h. A kernel that uses these stands in a file of its own and guards its body with `#if GPU_HOPPER`: code for
// sm_90a runs nowhere else.
#pragma once
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GPU_HOPPER 1
#else
#define GPU_HOPPER 0
#endif
namespace gpu {
// A CUtensorMap, made on the host by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// ---- mbarriers: `count` arrivals and all expected bytes complete a phase; phases alternate between parity 0 and 1 ----
__device__ __forceinline__ void mbar_init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(count) : "memory");
}
// Behind the inits, before the barrier of threads that publishes them: the copy engine sees them too.
__device__ __forceinline__ void fence_mbar_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Behind ordinary stores to shared memory that the copy engine or wgmma reads (or writes) next.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void mbar_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(bar)) : "memory");
}
__device__ __forceinline__ void mbar_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbar_arrive_expect_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
}
// Whether the phase of this parity is complete; waits a while for it.
__device__ __forceinline__ bool mbar_test(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(smem_u32(bar)), "r"(parity)
      : "memory");
  return done;
}
__device__ __forceinline__ void mbar_wait(uint64_t* bar, uint32_t parity) {
  while (!mbar_test(bar, parity)) {
  }
}

// ---- copies from global to shared memory that complete on an mbarrier ----
// Addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_load(void* s, const void* g, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_u32(s)), "l"(g),
               "r"(bytes), "r"(smem_u32(bar))
               : "memory");
}
// The map's box at (x, y[, z]), zeros outside the tensor; always the bytes of a whole box. `s` is 128-byte aligned, for the
// 128-byte swizzle 1024.
__device__ __forceinline__ void tma_load_2d(void* s, const TensorMap* map, uint64_t* bar, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(smem_u32(s)),
               "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* s, const TensorMap* map, uint64_t* bar, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
                   smem_u32(s)),
               "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
__device__ __forceinline__ void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---- warpgroup products: four warps together, d[64][N] (+)= a[64][16] b[16][N] ----
// An operand in shared memory is described by its first byte, two strides and a swizzle. With the 128-byte swizzle, and rows of
// 128 bytes (64 elements along k): sbo is the stride between groups of 8 rows, lbo is not used; 16 elements further along k is 32
// bytes further. Transposed (TRANS; rows of 64 elements along m or n): sbo is the stride between groups of 8 rows along k, lbo that
// between groups of 64 columns.
enum Swizzle : uint64_t { SWIZZLE_NONE = 0, SWIZZLE_128 = 1, SWIZZLE_64 = 2, SWIZZLE_32 = 3 };
__device__ __forceinline__ uint64_t wgmma_desc(const void* p, uint32_t lbo, uint32_t sbo, Swizzle swizzle = SWIZZLE_128) {
  return uint64_t((smem_u32(p) & 0x3ffff) >> 4) | uint64_t(lbo >> 4 & 0x3fff) << 16 | uint64_t(sbo >> 4 & 0x3fff) << 32 |
         uint64_t(swizzle) << 62;
}
// Before the first product, and whenever registers of a product were touched since the last.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The same, and none of these registers is read before it: the compiler does not know that the wait has to do with them.
template <int N, int R>
__device__ __forceinline__ void wgmma_wait(float (&d)[R]) {
  wgmma_wait<N>();
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// For each warpgroup as a whole: more or fewer registers for its threads.
template <int N>
__device__ __forceinline__ void reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// The accumulators as operands: eight at a time.
#define GPU_D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define GPU_D16(d, i) GPU_D8(d, i), GPU_D8(d, i + 8)
#define GPU_D32(d, i) GPU_D16(d, i), GPU_D16(d, i + 16)
#define GPU_D64(d, i) GPU_D32(d, i), GPU_D32(d, i + 32)
#define GPU_S16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define GPU_S32 GPU_S16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define GPU_S48 GPU_S32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define GPU_S64 GPU_S48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define GPU_S80 GPU_S64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define GPU_S96 GPU_S80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define GPU_S112 GPU_S96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define GPU_S128 GPU_S112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// One product of width n: its accumulators as a string and as operands, and the numbers of the operands behind them.
#define GPU_WGMMA(n, S, D, o0, o1, o2, o3, o4, o5, o6)                                                                            \
  template <bool TB, bool TA>                                                                                                     \
  __device__ __forceinline__ void wgmma_ss(float (&d)[n / 2], uint64_t a, uint64_t b, int accumulate) {                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\n"                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" S "}, %" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 \
                 ";\n}"                                                                                                           \
                 : D                                                                                                              \
                 : "l"(a), "l"(b), "r"(accumulate), "n"(int(TA)), "n"(int(TB)));                                                  \
  }                                                                                                                               \
  template <bool TB>                                                                                                              \
  __device__ __forceinline__ void wgmma_rs(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\n"                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" S "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %"  \
                 #o4 ", p, 1, 1, %" #o6 ";\n}"                                                                                    \
                 : D                                                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(TB)));                            \
  }
#define GPU_DN32(d) GPU_D16(d, 0)
#define GPU_DN64(d) GPU_D32(d, 0)
#define GPU_DN96(d) GPU_D32(d, 0), GPU_D16(d, 32)
#define GPU_DN128(d) GPU_D64(d, 0)
#define GPU_DN160(d) GPU_D64(d, 0), GPU_D16(d, 64)
#define GPU_DN192(d) GPU_D64(d, 0), GPU_D32(d, 64)
#define GPU_DN256(d) GPU_D64(d, 0), GPU_D64(d, 64)
GPU_WGMMA(32, GPU_S16, GPU_DN32(d), 16, 17, 18, 19, 20, 21, 22)
GPU_WGMMA(64, GPU_S32, GPU_DN64(d), 32, 33, 34, 35, 36, 37, 38)
GPU_WGMMA(96, GPU_S48, GPU_DN96(d), 48, 49, 50, 51, 52, 53, 54)
GPU_WGMMA(128, GPU_S64, GPU_DN128(d), 64, 65, 66, 67, 68, 69, 70)
GPU_WGMMA(160, GPU_S80, GPU_DN160(d), 80, 81, 82, 83, 84, 85, 86)
GPU_WGMMA(192, GPU_S96, GPU_DN192(d), 96, 97, 98, 99, 100, 101, 102)
GPU_WGMMA(256, GPU_S128, GPU_DN256(d), 128, 129, 130, 131, 132, 133, 134)
// Operands of both matrices in shared memory, or a in registers (as mma_bf16's).
template <int N, bool TRANS_B = false, bool TRANS_A = false>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
  wgmma_ss<TRANS_B, TRANS_A>(d, desc_a, desc_b, accumulate);
}
template <int N, bool TRANS_B = false>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t desc_b, bool accumulate) {
  wgmma_rs<TRANS_B>(d, a, desc_b, accumulate);
}
}  // namespace gpu
