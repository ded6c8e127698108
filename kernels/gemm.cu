// y[r, o] = sum_i w[o, i] x[r, i] + bias[o] for many rows.
//
// A block of eight warps, four along the outputs and two along the rows, owns 64 MT outputs x 16 NT rows, a warp 16 MT x 8 NT of
// them. Rows of x, and weights if they are bf16, come to shared memory by cp.async, 64 inputs (a tile) a stage, some stages ahead;
// weights in blocks come from memory straight to the registers of the warps that unpack them. What lanes own and how
// integers become exact bf16 is told in rt/quant.cuh.
//
// The inputs are summed as gemv.cu sums them: eight slices, each a chain of mma.m16n8k16 in order, then the slices in order. Hence
// the same bits; the price is a second set of sums in registers. Bound by the tensor cores.
#include "rt/gpu.cuh"
#include "rt/quant.cuh"

// A row in shared memory is 128 bytes, all banks. Sixteen bytes read by eight lanes, or eight by sixteen, touch two or four rows:
// exchanging the pieces by the two lowest bits of the row sends them to different banks.
DEVICE u32 piece_at(u32 row, u32 piece) { return row * 64 + (piece ^ ((row & 1) << 2 | (row & 2))) * 8; }

// A lane's part of x for a block, as F::load_x takes it from memory.
template <bool HALVES>
DEVICE uint4 x_of(const bf16_t* tile, u32 row, u32 b, u32 t) {
  if constexpr (HALVES) {
    const uint2 lo = gpu::shared8(tile + piece_at(row, 4 * b + t / 2) + t % 2 * 4);
    const uint2 hi = gpu::shared8(tile + piece_at(row, 4 * b + 2 + t / 2) + t % 2 * 4);
    return make_uint4(lo.x, lo.y, hi.x, hi.y);
  } else {
    return gpu::shared16(tile + piece_at(row, 4 * b + t));
  }
}

template <class F, int MT, int NT, int STAGES>
DEVICE void product(const typename F::Args& a) {
  constexpr u32 OUTS = 64 * MT, ROWS = 16 * NT, STAGE = (F::STAGED ? OUTS + ROWS : ROWS) * TILE_IN;
  GPU_DYN_SMEM(bf16_t, smem);  // [STAGES][ROWS (+ OUTS)][64]
  GPU_SMEM(float, sums, [2][2][F::MINIMA ? ROWS : 1]);  // of x, by tile and block
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const u32 row0 = blockIdx.x * ROWS, out0 = blockIdx.y * OUTS;
  const u32 warp_row = warp / 4 * 8 * NT, warp_out = warp % 4 * TILE_OUT * MT;
  const u32 strips = (a.outputs + TILE_OUT - 1) / TILE_OUT, tiles = (a.inputs + TILE_IN - 1) / TILE_IN;

  // Thread i copies piece i % 8 of rows i / 8, i / 8 + 32, ... Rows and outputs behind the last are read as the last, inputs as zero.
  const auto copy = [&](bf16_t* to, const bf16_t* from, u32 first, u32 last, u32 count, u32 at) {
    const u32 piece = threadIdx.x & 7, k = at * TILE_IN + 8 * piece;
    GPU_UNROLL for (u32 i = 0; i < count; i += 32) {
      const u32 r = i + (threadIdx.x >> 3);
      const bf16_t* source = from + (size_t)min(first + r, last - 1) * a.inputs;
      gpu::cp_async16(to + piece_at(r, piece), source + (k < a.inputs ? k : 0), k < a.inputs);
    }
  };
  const auto stage = [&](u32 at) {
    if (at < tiles) {
      bf16_t* to = smem + at % STAGES * STAGE;
      copy(to, a.x, row0, a.rows, ROWS, at);
      if constexpr (F::STAGED) copy(to + ROWS * TILE_IN, a.w, out0, a.outputs, OUTS, at);
    }
    gpu::cp_async_commit();
  };
  // Warp w sums rows 2 NT w .. of a tile that has arrived.
  const auto sum = [&](u32 at) {
    for (u32 n = warp; n < 2 * NT; n += 8)
      GPU_UNROLL for (u32 b = 0; b < 2; b++) {
        float s[4];
        sum_of_rows(s, x_of<F::HALVES>(smem + at % STAGES * STAGE, 8 * n + g, b, t));
        if (g == 0) sums[at & 1][b][8 * n + 2 * t] = s[0], sums[at & 1][b][8 * n + 2 * t + 1] = s[1];
      }
  };

  typename F::Cursor w[MT];
  typename F::Tile now[MT];
  GPU_UNROLL for (int m = 0; m < MT; m++) w[m].seek(a, min((out0 + warp_out) / TILE_OUT + m, strips - 1), lane);
  const auto load = [&](u32 at) {
    if constexpr (!F::STAGED)
      GPU_UNROLL for (int m = 0; m < MT; m++) w[m].load(now[m], a, at);
  };

  float total[MT][NT][4] = {}, acc[MT][NT][4] = {};
  load(0);
  for (u32 s = 0; s + 1 < STAGES; s++) stage(s);
  if constexpr (F::MINIMA) {
    gpu::cp_async_wait<STAGES - 2>();
    __syncthreads();
    sum(0);
  }
  u32 slice = 0;
  for (u32 at = 0; at < tiles; at++) {
    gpu::cp_async_wait<F::MINIMA ? STAGES - 3 : STAGES - 2>();
    __syncthreads();  // this tile has arrived, and all are done with the one before it
    stage(at + STAGES - 1);
    if constexpr (F::MINIMA)
      if (at + 1 < tiles) sum(at + 1);
    const bf16_t* x = smem + at % STAGES * STAGE;
#pragma unroll 1
    for (u32 b = 0; b < 2; b++) {
      u32 f[MT][2][4];
      typename F::Scale scale[MT];
      if constexpr (F::STAGED)
        GPU_UNROLL for (int m = 0; m < MT; m++)
          GPU_UNROLL for (int i = 0; i < 2; i++)
            now[m].w[0][i] = gpu::shared16(x + ROWS * TILE_IN + piece_at(warp_out + TILE_OUT * m + g + 8 * i, 4 * b + t));
      GPU_UNROLL for (int m = 0; m < MT; m++) F::expand(f[m], scale[m], now[m], F::STAGED ? 0 : b, a.has_bias >> 1);
      if (b && at + 1 < tiles) load(at + 1);  // half a tile ahead: into the registers that are free now
      GPU_UNROLL for (int n = 0; n < NT; n++) {
        const uint4 v = x_of<F::HALVES>(x, warp_row + 8 * n + g, b, t);
        float s[4];
        if constexpr (F::MINIMA) {
          const uint2 two = gpu::shared8(&sums[at & 1][b][warp_row + 8 * n + 2 * t]);
          s[0] = gpu::as_f32(two.x), s[1] = gpu::as_f32(two.y);
        }
        GPU_UNROLL for (int m = 0; m < MT; m++) F::fold(acc[m][n], f[m], scale[m], v, s);
      }
    }
    while ((slice + 1) * tiles / SLICES < at + 1) slice++;  // narrow: some slices are empty
    if ((slice + 1) * tiles / SLICES == at + 1)
      GPU_UNROLL for (int m = 0; m < MT; m++)
        GPU_UNROLL for (int n = 0; n < NT; n++)
          GPU_UNROLL for (int c = 0; c < 4; c++) total[m][n][c] += acc[m][n][c], acc[m][n][c] = 0;
  }
  gpu::cp_async_wait<0>();

  GPU_UNROLL for (int m = 0; m < MT; m++)
    GPU_UNROLL for (int i = 0; i < 2; i++) {
      const u32 out = out0 + warp_out + TILE_OUT * m + g + 8 * i;
      if (out >= a.outputs) continue;
      const float bias = a.has_bias ? a.bias[out] : 0.f;
      GPU_UNROLL for (int n = 0; n < NT; n++)
        GPU_UNROLL for (int c = 0; c < 2; c++) {
          const u32 row = row0 + warp_row + 8 * n + 2 * t + c;
          if (row < a.rows) a.y[(size_t)row * a.outputs + out] = total[m][n][2 * i + c] + bias;
        }
    }
}

#define PRODUCT(name, Format, MT, NT, STAGES) \
  KERNEL(name, Format::Args, 256) { product<Format, MT, NT, STAGES>(a); }
#define PRODUCTS(format, Format)              \
  PRODUCT(gemm_##format##_64, Format, 1, 4, 4) \
  PRODUCT(gemm_##format##_128, Format, 2, 8, Format::STAGED ? 3 : 4)

using Bf16Rows = Bf16<true, Linear>;
PRODUCTS(bf16, Bf16Rows)
PRODUCTS(q8_0, Q8_0)
PRODUCTS(q4_0, Q4_0)
PRODUCTS(q4_1, Q4_1)
PRODUCTS(q4_k, Q4_K)
PRODUCTS(q6_k, Q6_K)
