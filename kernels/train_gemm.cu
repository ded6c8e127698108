// Backward of products with weights: by their inputs, dx[r, i] (+)= sum_o dy[r, o] w[o, i], and by their weights,
// dw[o, i] += sum_r dy[r, o] x[r, i].
//
// Both are c[m, n] = sum_k a[m, k] b[k, n]. A block owns T x T of c, its eight warps T / 2 x T / 4 each. Tiles of 32 k go through
// registers, where they are rounded to bf16 and weights in blocks are unpacked, to shared memory, one ahead of the products;
// ldmatrix turns what lies across (b, and dy of dw). k runs in one order, which does not depend on T: a row's dx is the same in any
// company. Bound by the tensor cores for large passes, by unpacking for weights in blocks.
#include "rt/gpu.cuh"
#include "rt/blocks.cuh"

namespace train_gemm {
constexpr u32 THREADS = 256, DEEP = 32;

// Eight aligned elements, rounded to bf16.
DEVICE uint4 whole_eight(const float* p) {
  const float4 x = *reinterpret_cast<const float4*>(p), y = *reinterpret_cast<const float4*>(p + 4);
  return make_uint4(gpu::pack_bf16(x.x, x.y), gpu::pack_bf16(x.z, x.w), gpu::pack_bf16(y.x, y.y), gpu::pack_bf16(y.z, y.w));
}
DEVICE uint4 whole_eight(const bf16_t* p) { return gpu::load16(p); }
DEVICE uint4 whole_eight(const f16_t* p) {
  const auto two = [](u32 h) { return gpu::pack_bf16(gpu::f16_low(h), gpu::f16_high(h)); };
  const uint4 v = gpu::load16(p);
  return make_uint4(two(v.x), two(v.y), two(v.z), two(v.w));
}

// A matrix by rows. eight(r, c): elements c .. c + 7 of row r as bf16, zeros outside.
template <class T>
struct Rows {
  const T* p;
  u32 rows, cols;
  bool whole;
  __device__ __forceinline__ Rows(const void* from, u32 rows, u32 cols)
      : p(static_cast<const T*>(from)), rows(rows), cols(cols), whole(cols % 8 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {}
  __device__ __forceinline__ uint4 eight(u32 r, u32 c) const {
    if (r >= rows || c >= cols) return make_uint4(0, 0, 0, 0);
    const T* q = p + (size_t)r * cols + c;
    if (whole) return whole_eight(q);
    const auto two = [&](u32 i) { return gpu::pack_bf16(c + i < cols ? widen(q[i]) : 0.f, c + i + 1 < cols ? widen(q[i + 1]) : 0.f); };
    return make_uint4(two(0), two(2), two(4), two(6));
  }
};
template <Blocks F>
struct Packed {
  const LinearBwdXBlocks& a;
  __device__ __forceinline__ uint4 eight(u32 r, u32 c) const {
    if (r >= a.outputs || c >= a.inputs) return make_uint4(0, 0, 0, 0);
    const auto two = [&](u32 i) { return gpu::pack_bf16(weight<F>(a, a.inputs, r, c + i), weight<F>(a, a.inputs, r, c + i + 1)); };
    return make_uint4(two(0), two(2), two(4), two(6));
  }
};

// store(m, n, sum). TURNED: `a` has rows of m for each k.
template <int T, bool TURNED, class A, class B, class Store>
DEVICE void product(u32 deep, const A& a, const B& b, Store store) {
  constexpr u32 MT = T / 32, NT = T / 32, PIECES = T / 64, LD = T + 8, LDA = TURNED ? LD : DEEP + 8, SIZE_A = TURNED ? DEEP * LD : T * LDA;
  GPU_SMEM(uint4, sa, [2][SIZE_A / 8]);  // of eight bf16
  GPU_SMEM(uint4, sb, [2][DEEP * LD / 8]);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, m0 = blockIdx.x * T, n0 = blockIdx.y * T;
  const u32 warp_m = warp / 4 * (T / 2), warp_n = warp % 4 * (T / 4), tiles = (deep + DEEP - 1) / DEEP;

  // Eight elements of a row each: their places in a tile of DEEP rows (`across`) or of DEEP columns.
  uint4 ra[PIECES], rb[PIECES];
  const auto across = [&](u32 i, u32& row, u32& col) { row = (threadIdx.x + i * THREADS) / (T / 8), col = (threadIdx.x + i * THREADS) % (T / 8) * 8; };
  const auto along = [&](u32 i, u32& row, u32& col) { row = (threadIdx.x + i * THREADS) / 4, col = (threadIdx.x + i * THREADS) % 4 * 8; };
  const auto load = [&](u32 k0) {
    GPU_UNROLL for (u32 i = 0; i < PIECES; i++) {
      u32 row, col;
      across(i, row, col);
      rb[i] = b.eight(k0 + row, n0 + col);
      if (!TURNED) along(i, row, col);
      ra[i] = TURNED ? a.eight(k0 + row, m0 + col) : a.eight(m0 + row, k0 + col);
    }
  };
  const auto put = [&](u32 buffer) {
    GPU_UNROLL for (u32 i = 0; i < PIECES; i++) {
      u32 row, col;
      across(i, row, col);
      sb[buffer][(row * LD + col) / 8] = rb[i];
      if (!TURNED) along(i, row, col);
      sa[buffer][(row * LDA + col) / 8] = ra[i];
    }
  };

  float acc[MT][NT][4] = {};
  load(0);
  put(0);
  __syncthreads();
  for (u32 t = 0; t < tiles; t++) {
    if (t + 1 < tiles) load((t + 1) * DEEP);
    GPU_UNROLL for (u32 k = 0; k < DEEP; k += 16) {
      u32 fa[MT][4];
      GPU_UNROLL for (u32 m = 0; m < MT; m++) {
        if (TURNED) gpu::ldmatrix_x4_trans(fa[m], &sa[t & 1][((k + (lane >> 4) * 8 + (lane & 7)) * LDA + warp_m + m * 16) / 8 + (lane >> 3 & 1)]);
        else gpu::ldmatrix_x4(fa[m], &sa[t & 1][((warp_m + m * 16 + (lane & 15)) * LDA + k) / 8 + (lane >> 4)]);
      }
      GPU_UNROLL for (u32 n = 0; n < NT / 2; n++) {
        u32 fb[4];
        gpu::ldmatrix_x4_trans(fb, &sb[t & 1][((k + (lane & 15)) * LD + warp_n + n * 16) / 8 + (lane >> 4)]);
        GPU_UNROLL for (u32 m = 0; m < MT; m++) {
          gpu::mma_bf16(acc[m][2 * n], fa[m], fb[0], fb[1]);
          gpu::mma_bf16(acc[m][2 * n + 1], fa[m], fb[2], fb[3]);
        }
      }
    }
    if (t + 1 < tiles) put((t + 1) & 1);  // which all have been done with since the last barrier
    __syncthreads();
  }
  GPU_UNROLL for (u32 m = 0; m < MT; m++)
    GPU_UNROLL for (u32 n = 0; n < NT; n++)
      GPU_UNROLL for (u32 c = 0; c < 4; c++)
        store(m0 + warp_m + m * 16 + lane / 4 + c / 2 * 8, n0 + warp_n + n * 8 + lane % 4 * 2 + c % 2, acc[m][n][c]);
}

template <int T, class Args, class W>
DEVICE void by_input(const Args& a, const W& w) {
  product<T, false>(a.outputs, Rows<float>(a.dy, a.rows, a.outputs), w, [&](u32 r, u32 i, float v) {
    if (r >= a.rows || i >= a.inputs) return;
    float& dx = a.dx[(size_t)r * a.inputs + i];
    dx = a.add ? dx + v : v;
  });
}
template <int T>
DEVICE void by_weight(const LinearBwdW& a) {
  product<T, true>(a.rows, Rows<float>(a.dy, a.rows, a.outputs), Rows<bf16_t>(a.x, a.rows, a.inputs), [&](u32 o, u32 i, float v) {
    if (o < a.outputs && i < a.inputs) a.dw[(size_t)o * a.inputs + i] += v;
  });
}
}  // namespace train_gemm

#define PLAIN(format, Type)                                                                                                                     \
  KERNEL(linear_bwd_x_##format##_64, LinearBwdX, 256) { train_gemm::by_input<64>(a, train_gemm::Rows<Type>(a.w, a.outputs, a.inputs)); }    \
  KERNEL(linear_bwd_x_##format##_128, LinearBwdX, 256) { train_gemm::by_input<128>(a, train_gemm::Rows<Type>(a.w, a.outputs, a.inputs)); }
#define BLOCKS(format, F)                                                                                                    \
  KERNEL(linear_bwd_x_##format##_64, LinearBwdXBlocks, 256) { train_gemm::by_input<64>(a, train_gemm::Packed<F>{a}); }    \
  KERNEL(linear_bwd_x_##format##_128, LinearBwdXBlocks, 256) { train_gemm::by_input<128>(a, train_gemm::Packed<F>{a}); }
PLAIN(bf16, bf16_t)
PLAIN(f16, f16_t)
PLAIN(f32, float)
BLOCKS(q8_0, Q8_0)
BLOCKS(q4_0, Q4_0)
BLOCKS(q4_1, Q4_1)
BLOCKS(q4_k, Q4_K)
BLOCKS(q6_k, Q6_K)
KERNEL(linear_bwd_w_64, LinearBwdW, 256) { train_gemm::by_weight<64>(a); }
KERNEL(linear_bwd_w_128, LinearBwdW, 256) { train_gemm::by_weight<128>(a); }
