// Weight formats: what a lane loads of 16 outputs x 64 inputs (a tile), and how that becomes fragments of mma.m16n8k16.
//
// Weights are the matrix A, rows of x the matrix B. In a fragment, lane 4 g + t owns outputs g and g + 8 (and row g of x), and of
// the 32 inputs of a block the eight inputs 8 t .. 8 t + 7: sixteen bytes of x or of bf16 weights, loaded at once. Which of the k
// slots of the two instructions an input takes does not matter as long as A and B agree.
#pragma once

constexpr u32 TILE_OUT = 16, TILE_IN = 64;

// Eight elements from `k` of a row of `n`, zeros behind its end. WHOLE: n % 8 == 0 and the row is aligned.
template <bool WHOLE, bool STREAM>
DEVICE uint4 eight(const bf16_t* row, u32 k, u32 n) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if constexpr (WHOLE) {
    if (k < n) v = STREAM ? gpu::stream16(row + k) : gpu::load16(row + k);
  } else {
    const auto two = [&](u32 i) {
      return i + 1 < n ? gpu::pack_bf16(gpu::to_f32(row[i]), gpu::to_f32(row[i + 1])) : i < n ? gpu::pack_bf16(gpu::to_f32(row[i]), 0.f) : 0u;
    };
    v = make_uint4(two(k), two(k + 2), two(k + 4), two(k + 6));
  }
  return v;
}

// bf16, row after row.
template <bool WHOLE, class A>
struct Bf16 {
  using Args = A;
  static constexpr int TILES = 2;  // tiles in a batch of loads
  static constexpr bool MINIMA = false;
  struct Tile {
    uint4 w[2][2];  // [block][output g, output g + 8]
  };
  struct Scale {};
  // Outputs beyond the last are read as the last; nobody stores them.
  static __device__ __forceinline__ void load(Tile& tile, const Args& a, u32 strip, u32 at, u32 lane) {
    const u32 g = lane >> 2, t = lane & 3;
    GPU_UNROLL for (int i = 0; i < 2; i++) {
      const bf16_t* row = a.w + (size_t)min(strip * TILE_OUT + g + 8 * i, a.outputs - 1) * a.inputs;
      GPU_UNROLL for (int b = 0; b < 2; b++) tile.w[b][i] = eight<WHOLE, true>(row, at * TILE_IN + 32 * b + 8 * t, a.inputs);
    }
  }
  static __device__ __forceinline__ uint4 load_x(const bf16_t* row, u32 block, u32 t, u32 inputs) {
    return eight<WHOLE, false>(row, 32 * block + 8 * t, inputs);
  }
  static __device__ __forceinline__ void expand(u32 (&f)[2][4], Scale&, const Tile& tile, int b) {
    const uint4 lo = tile.w[b][0], hi = tile.w[b][1];
    f[0][0] = lo.x, f[0][1] = hi.x, f[0][2] = lo.y, f[0][3] = hi.y;
    f[1][0] = lo.z, f[1][1] = hi.z, f[1][2] = lo.w, f[1][3] = hi.w;
  }
  static __device__ __forceinline__ void fold(float (&acc)[4], const u32 (&f)[2][4], const Scale&, uint4 x, const float (&)[4]) {
    gpu::mma_bf16(acc, f[0], x.x, x.y);
    gpu::mma_bf16(acc, f[1], x.z, x.w);
  }
};

// Sum of x over a block of 32 inputs, by a product with ones: s[0] and s[1] for rows 2 t and 2 t + 1.
DEVICE void sum_of_rows(float (&s)[4], uint4 x) {
  const u32 ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  gpu::mma_bf16_first(s, ones, x.x, x.y);
  gpu::mma_bf16(s, ones, x.z, x.w);
}
