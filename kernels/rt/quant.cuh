// Weight formats: what a lane loads of 16 outputs x 64 inputs (a tile), and how that becomes fragments of mma.m16n8k16.
//
// Weights are the matrix A, rows of x the matrix B. In a fragment, lane 4 g + t owns outputs g and g + 8 (and row g of x), and of
// the 32 inputs of a block the eight inputs 8 t .. 8 t + 7: sixteen bytes of x or of bf16 weights, loaded at once. Which of the k
// slots of the block's two instructions an input takes does not matter as long as A and B agree. Q6_K, whose scales serve 16
// inputs, gives lane t the inputs 4 t .. 4 t + 3 of either half instead.
//
// Block formats enter the tensor cores as exact integers (|q| <= 128 has eight bits, as bf16 has); the product of a block is then
// scaled in f32. Minima meet the sum of x over the block, itself a product with ones. So weights are never rounded.
//
// Memory of a block format, made once at load from the file's GGUF blocks: planes of little-endian u32, each
// [strips of 16 outputs][tiles of 64 inputs][words]. Outputs behind the last and a missing second block of the last tile are zero.
// Below, `pair j` of a lane is its inputs 2 j and 2 j + 1 of the block (j < 4), `two(lo, hi)` is lo | hi << 16.
//
//   plane           words of a tile              word
//   Q8_0 quants     [block 2][lane 32][4]        word 2 i + h: bytes q[4 h], q[4 h + 2], q[4 h + 1], q[4 h + 3] of output g + 8 i
//   Q4_* quants     [lane 32][block 2][i 2]      output g + 8 i: nibble j is the first of pair j, nibble 4 + j the second
//   Q8_0, Q4_0 scales     [g 8][block 2]         two(d of output g, d of output g + 8)
//   Q4_1 scales           [g 8][d, m][block 2]   as above
//   Q4_K scales           [g 8][i 2]             bytes scale of block 0, of block 1, min of block 0, of block 1, of output g + 8 i
//   Q4_K supers (a quarter of the tiles: 256 inputs)  [g 8][i 2]   two(d, dmin) of output g + 8 i
//   Q6_K quants     as Q4_*: the low four bits of q
//   Q6_K high       [lane 32][i 2]               bits 2 (4 block + j) ..: upper two bits of the first of pair j, 16 higher of the second
//   Q6_K scales     [g 8][i 2]                   the four i8 scales of output g + 8 i, inputs 0..15 lowest
//   Q6_K supers     [g 8]                        two(d of output g, d of output g + 8)
//
// Every load of a warp is one run of 64 to 512 bytes, and a tile takes the bytes that it takes in the file (Q4_K: 148 / 144).
#pragma once

constexpr u32 TILE_OUT = 16, TILE_IN = 64;
// The inputs of an output are summed in this many slices: slice s has tiles s T / 8 .. (s + 1) T / 8 of T.
constexpr u32 SLICES = 8;

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

// Of two registers, not of an array, which would have to lie in memory where the loop over blocks is not unrolled.
DEVICE uint4 choose(int b, uint4 p, uint4 q) { return make_uint4(b ? q.x : p.x, b ? q.y : p.y, b ? q.z : p.z, b ? q.w : p.w); }

// Sum of x over a block, by a product with ones: s[0] and s[1] for rows 2 t and 2 t + 1.
DEVICE void sum_of_rows(float (&s)[4], uint4 x) {
  const u32 ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  gpu::mma_bf16_first(s, ones, x.x, x.y);
  gpu::mma_bf16(s, ones, x.z, x.w);
}

// bf16, row after row as in the file.
template <bool WHOLE, class A>
struct Bf16 {
  using Args = A;
  static __device__ __forceinline__ Args gate(const LinearGlu& a) { return {a.x, a.gate, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static __device__ __forceinline__ Args up(const LinearGlu& a) { return {a.x, a.up, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static constexpr int BATCH = 2;        // tiles that a warp of gemv.cu loads at a time
  static constexpr bool MINIMA = false;  // sums of x enter
  static constexpr bool STAGED = true;   // gemm.cu brings the weights to shared memory
  static constexpr bool HALVES = false;  // lane t has inputs 4 t .. 4 t + 3 of either half of a block
  struct Tile {
    uint4 w[2][2];  // [block][i], output g + 8 i
  };
  struct Scale {};
  struct Cursor {
    const bf16_t* row[2];
    u32 t, inputs;
    // Outputs behind the last are read as the last; nobody stores them.
    __device__ __forceinline__ void seek(const Args& a, u32 strip, u32 lane) {
      t = lane & 3, inputs = a.inputs;
      for (u32 i = 0; i < 2; i++) row[i] = a.w + (size_t)min(strip * TILE_OUT + (lane >> 2) + 8 * i, a.outputs - 1) * a.inputs;
    }
    __device__ __forceinline__ void load(Tile& tile, const Args&, u32 at) const {
      GPU_UNROLL for (int i = 0; i < 2; i++)
        GPU_UNROLL for (int b = 0; b < 2; b++) tile.w[b][i] = eight<WHOLE, true>(row[i], at * TILE_IN + 32 * b + 8 * t, inputs);
    }
  };
  static __device__ __forceinline__ uint4 load_x(const bf16_t* row, u32 block, u32 t, u32 inputs) {
    return eight<WHOLE, false>(row, 32 * block + 8 * t, inputs);
  }
  // `zero` is 0, which the compiler cannot know: of plain copies it makes new ones for every instruction.
  static __device__ __forceinline__ void expand(u32 (&f)[2][4], Scale&, const Tile& tile, int b, u32 zero) {
    const uint4 lo = choose(b, tile.w[0][0], tile.w[1][0]), hi = choose(b, tile.w[0][1], tile.w[1][1]);
    f[0][0] = lo.x ^ zero, f[0][1] = hi.x ^ zero, f[0][2] = lo.y ^ zero, f[0][3] = hi.y ^ zero;
    f[1][0] = lo.z ^ zero, f[1][1] = hi.z ^ zero, f[1][2] = lo.w ^ zero, f[1][3] = hi.w ^ zero;
  }
  static __device__ __forceinline__ void fold(float (&acc)[4], const u32 (&f)[2][4], const Scale&, uint4 x, const float (&)[4]) {
    gpu::mma_bf16(acc, f[0], x.x, x.y);
    gpu::mma_bf16(acc, f[1], x.z, x.w);
  }
};

// --- small integers as bf16 pairs ---
// 0x4300 is 128, whose last place is 1: an integer below 128 put into its low bits is added to it.

// Nibbles j and 4 + j of v, and what `above` (bits 4.. of each half) adds, less 128 + ZERO.
template <int ZERO>
DEVICE u32 nibbles(u32 v, int j, u32 above = 0) {
  constexpr u32 minus = (0xc300u + ZERO) * 0x10001u;  // -(128 + ZERO)
  return gpu::fma_bf16x2((v >> (4 * j) & 0x000f000fu) | 0x43004300u | above, 0x3f803f80u, minus);
}
// Bytes h and 2 + h of v as signed integers: 128 + (low seven bits) - (128, or 256 of the sign bit).
DEVICE u32 bytes(u32 v, int h) {
  v >>= 8 * h;
  return gpu::fma_bf16x2((v & 0x00800080u) | 0x43004300u, 0xbf80bf80u, (v & 0x007f007fu) | 0x43004300u);
}
// Pairs 0..3 of outputs g (i 0) and g + 8 (i 1) are the registers of the block's two instructions.
#define FRAGMENT(f, PAIR) \
  GPU_UNROLL for (int i = 0; i < 2; i++) GPU_UNROLL for (int j = 0; j < 4; j++) f[j >> 1][(j & 1) * 2 + i] = PAIR

// Scales of outputs g and g + 8, and what multiplies the sum of x.
struct BlockScale {
  float d[2], m[2];
};
template <bool MINIMA>
DEVICE void fold_block(float (&acc)[4], const u32 (&f)[2][4], const BlockScale& s, uint4 x, const float (&sum)[4]) {
  float p[4];
  gpu::mma_bf16_first(p, f[0], x.x, x.y);
  gpu::mma_bf16(p, f[1], x.z, x.w);
  GPU_UNROLL for (int c = 0; c < 4; c++) {
    acc[c] = fmaf(s.d[c >> 1], p[c], acc[c]);
    if (MINIMA) acc[c] = fmaf(s.m[c >> 1], sum[c & 1], acc[c]);
  }
}
// What the formats with a scale for 32 inputs share.
template <bool MIN>
struct Blocks {
  static constexpr bool MINIMA = MIN, STAGED = false, HALVES = false;
  using Scale = BlockScale;
  static __device__ __forceinline__ uint4 load_x(const bf16_t* row, u32 block, u32 t, u32 inputs) {
    return eight<true, false>(row, 32 * block + 8 * t, inputs);
  }
  static __device__ __forceinline__ void fold(float (&acc)[4], const u32 (&f)[2][4], const Scale& s, uint4 x, const float (&sum)[4]) {
    fold_block<MIN>(acc, f, s, x, sum);
  }
};

struct Q8_0 : Blocks<false> {
  using Args = LinearQ8_0;
  static __device__ __forceinline__ Args gate(const LinearGluQ8_0& a) { return {a.x, a.gate_quants, a.gate_scales, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static __device__ __forceinline__ Args up(const LinearGluQ8_0& a) { return {a.x, a.up_quants, a.up_scales, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static constexpr int BATCH = 2;
  struct Tile {
    uint4 q[2];
    uint2 d;
  };
  struct Cursor {
    u32 q, d;
    __device__ __forceinline__ void seek(const Args& a, u32 strip, u32 lane) {
      q = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 256 + lane * 4;
      d = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 16 + (lane >> 2) * 2;
    }
    __device__ __forceinline__ void load(Tile& tile, const Args& a, u32 at) const {
      GPU_UNROLL for (int b = 0; b < 2; b++) tile.q[b] = gpu::stream16(a.quants + (q + at * 256 + b * 128));
      tile.d = gpu::stream8(a.scales + (d + at * 16));
    }
  };
  static __device__ __forceinline__ void expand(u32 (&f)[2][4], Scale& s, const Tile& tile, int b, u32) {
    const uint4 q = choose(b, tile.q[0], tile.q[1]);
    const u32 w[2][2] = {{q.x, q.y}, {q.z, q.w}};
    FRAGMENT(f, bytes(w[i][j >> 1], j & 1));
    const u32 d = b ? tile.d.y : tile.d.x;
    s.d[0] = gpu::f16_low(d), s.d[1] = gpu::f16_high(d);
  }
};

struct Q4_0 : Blocks<false> {
  using Args = LinearQ4_0;
  static __device__ __forceinline__ Args gate(const LinearGluQ4_0& a) { return {a.x, a.gate_quants, a.gate_scales, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static __device__ __forceinline__ Args up(const LinearGluQ4_0& a) { return {a.x, a.up_quants, a.up_scales, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static constexpr int BATCH = 4;
  struct Tile {
    uint4 q;
    uint2 d;
  };
  struct Cursor {
    u32 q, d;
    __device__ __forceinline__ void seek(const Args& a, u32 strip, u32 lane) {
      q = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 128 + lane * 4;
      d = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 16 + (lane >> 2) * 2;
    }
    __device__ __forceinline__ void load(Tile& tile, const Args& a, u32 at) const {
      tile.q = gpu::stream16(a.quants + (q + at * 128));
      tile.d = gpu::stream8(a.scales + (d + at * 16));
    }
  };
  static __device__ __forceinline__ void expand(u32 (&f)[2][4], Scale& s, const Tile& tile, int b, u32) {
    const u32 w[2] = {b ? tile.q.z : tile.q.x, b ? tile.q.w : tile.q.y}, d = b ? tile.d.y : tile.d.x;
    FRAGMENT(f, nibbles<8>(w[i], j));
    s.d[0] = gpu::f16_low(d), s.d[1] = gpu::f16_high(d);
  }
};

struct Q4_1 : Blocks<true> {
  using Args = LinearQ4_1;
  static __device__ __forceinline__ Args gate(const LinearGluQ4_1& a) { return {a.x, a.gate_quants, a.gate_scales, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static __device__ __forceinline__ Args up(const LinearGluQ4_1& a) { return {a.x, a.up_quants, a.up_scales, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static constexpr int BATCH = 4;
  struct Tile {
    uint4 q, d;  // d: scales of the two blocks, then minima
  };
  struct Cursor {
    u32 q, d;
    __device__ __forceinline__ void seek(const Args& a, u32 strip, u32 lane) {
      q = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 128 + lane * 4;
      d = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 32 + (lane >> 2) * 4;
    }
    __device__ __forceinline__ void load(Tile& tile, const Args& a, u32 at) const {
      tile.q = gpu::stream16(a.quants + (q + at * 128));
      tile.d = gpu::stream16(a.scales + (d + at * 32));
    }
  };
  static __device__ __forceinline__ void expand(u32 (&f)[2][4], Scale& s, const Tile& tile, int b, u32) {
    const u32 w[2] = {b ? tile.q.z : tile.q.x, b ? tile.q.w : tile.q.y}, d = b ? tile.d.y : tile.d.x, m = b ? tile.d.w : tile.d.z;
    FRAGMENT(f, nibbles<0>(w[i], j));
    s.d[0] = gpu::f16_low(d), s.d[1] = gpu::f16_high(d), s.m[0] = gpu::f16_low(m), s.m[1] = gpu::f16_high(m);
  }
};

struct Q4_K : Blocks<true> {
  using Args = LinearQ4_K;
  static __device__ __forceinline__ Args gate(const LinearGluQ4_K& a) { return {a.x, a.gate_quants, a.gate_scales, a.gate_supers, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static __device__ __forceinline__ Args up(const LinearGluQ4_K& a) { return {a.x, a.up_quants, a.up_scales, a.up_supers, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static constexpr int BATCH = 4;
  struct Tile {
    uint4 q;
    uint2 s, d;
  };
  struct Cursor {
    u32 q, s, d;
    __device__ __forceinline__ void seek(const Args& a, u32 strip, u32 lane) {
      q = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 128 + lane * 4;
      s = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 16 + (lane >> 2) * 2;
      d = strip * (a.inputs / 256) * 16 + (lane >> 2) * 2;
    }
    __device__ __forceinline__ void load(Tile& tile, const Args& a, u32 at) const {
      tile.q = gpu::stream16(a.quants + (q + at * 128));
      tile.s = gpu::stream8(a.scales + (s + at * 16));
      tile.d = gpu::load8(a.supers + (d + at / 4 * 16));
    }
  };
  static __device__ __forceinline__ void expand(u32 (&f)[2][4], Scale& s, const Tile& tile, int b, u32) {
    const u32 w[2] = {b ? tile.q.z : tile.q.x, b ? tile.q.w : tile.q.y}, sub[2] = {tile.s.x >> (8 * b), tile.s.y >> (8 * b)};
    const u32 d[2] = {tile.d.x, tile.d.y};
    FRAGMENT(f, nibbles<0>(w[i], j));
    GPU_UNROLL for (int i = 0; i < 2; i++) {
      s.d[i] = gpu::f16_low(d[i]) * float(sub[i] & 255);
      s.m[i] = -gpu::f16_high(d[i]) * float(sub[i] >> 16 & 255);
    }
  }
};

struct Q6_K {
  using Args = LinearQ6_K;
  static __device__ __forceinline__ Args gate(const LinearGluQ6_K& a) { return {a.x, a.gate_quants, a.gate_high, a.gate_scales, a.gate_supers, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static __device__ __forceinline__ Args up(const LinearGluQ6_K& a) { return {a.x, a.up_quants, a.up_high, a.up_scales, a.up_supers, {}, {}, a.rows, a.inputs, a.outputs, 0}; }
  static constexpr int BATCH = 2;
  static constexpr bool MINIMA = false, STAGED = false, HALVES = true;
  struct Tile {
    uint4 q;
    uint2 high, s;
    u32 d;
  };
  struct Scale {
    float d[2][2];  // [half of the block][i]
  };
  struct Cursor {
    u32 q, high, s, d;
    __device__ __forceinline__ void seek(const Args& a, u32 strip, u32 lane) {
      q = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 128 + lane * 4;
      high = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 64 + lane * 2;
      s = strip * ((a.inputs + TILE_IN - 1) / TILE_IN) * 16 + (lane >> 2) * 2;
      d = strip * (a.inputs / 256) * 8 + (lane >> 2);
    }
    __device__ __forceinline__ void load(Tile& tile, const Args& a, u32 at) const {
      tile.q = gpu::stream16(a.quants + (q + at * 128));
      tile.high = gpu::stream8(a.high + (high + at * 64));
      tile.s = gpu::stream8(a.scales + (s + at * 16));
      tile.d = gpu::load4(a.supers + (d + at / 4 * 8));
    }
  };
  static __device__ __forceinline__ uint4 load_x(const bf16_t* row, u32 block, u32 t, u32) {
    const uint2 a = gpu::load8(row + 32 * block + 4 * t), b = gpu::load8(row + 32 * block + 16 + 4 * t);
    return make_uint4(a.x, a.y, b.x, b.y);
  }
  static __device__ __forceinline__ void expand(u32 (&f)[2][4], Scale& s, const Tile& tile, int b, u32) {
    const u32 w[2] = {b ? tile.q.z : tile.q.x, b ? tile.q.w : tile.q.y}, high[2] = {tile.high.x, tile.high.y};
    // Two bits from 8 b + 2 j to 4.
    const auto above = [&](int i, int j) {
      const int from = 8 * b + 2 * j;
      return (from < 4 ? high[i] << (4 - from) : high[i] >> (from - 4)) & 0x00300030u;
    };
    FRAGMENT(f, nibbles<32>(w[i], j, above(i, j)));
    GPU_UNROLL for (int h = 0; h < 2; h++) {
      s.d[h][0] = gpu::f16_low(tile.d) * float(int(tile.s.x << (24 - 8 * (2 * b + h))) >> 24);
      s.d[h][1] = gpu::f16_high(tile.d) * float(int(tile.s.y << (24 - 8 * (2 * b + h))) >> 24);
    }
  }
  static __device__ __forceinline__ void fold(float (&acc)[4], const u32 (&f)[2][4], const Scale& s, uint4 x, const float (&)[4]) {
    float p[4], q[4];
    gpu::mma_bf16_first(p, f[0], x.x, x.y);
    gpu::mma_bf16_first(q, f[1], x.z, x.w);
    GPU_UNROLL for (int c = 0; c < 4; c++) acc[c] = fmaf(s.d[1][c >> 1], q[c], fmaf(s.d[0][c >> 1], p[c], acc[c]));
  }
};
