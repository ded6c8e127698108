// y[r, o] = sum_i w[o, i] x[r, i] + bias[o] for few rows: the weights are read once for all rows of a block.
//
// A block owns 16 MT outputs and 8 NT rows. Its eight warps share out the inputs: warp s has tiles s T / 8 .. (s + 1) T / 8 of the
// T = ceil(inputs / 64) tiles, which it walks in order with mma.m16n8k16, loading two batches of tiles ahead.
// The eight partial sums meet in shared memory and are added in order of s. Neither the number of rows nor MT and NT enter that
// order, so y[r, o] has the same bits from every entry point here, and from gemm.cu.
//
// Bound by the reading of weights up to some 32 rows.
#include "rt/gpu.cuh"
#include "rt/quant.cuh"

template <class F, int MT, int NT>
DEVICE void linear(const typename F::Args& a) {
  constexpr int BATCH = F::BATCH > MT && NT < 8 ? F::BATCH / MT : 1;  // eight tiles of rows fill the registers
  constexpr int PAD = 4;  // the lanes of a warp write eight outputs of four rows: all banks differ
  GPU_SMEM(float, part, [SLICES][8][TILE_OUT * MT + PAD]);
  const u32 lane = threadIdx.x & 31, slice = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const u32 strips = (a.outputs + TILE_OUT - 1) / TILE_OUT, strip = blockIdx.x * MT, row0 = blockIdx.y * 8 * NT;
  const u32 tiles = (a.inputs + TILE_IN - 1) / TILE_IN;
  const u32 end = (slice + 1) * tiles / SLICES;
  // Rows behind the last are read as the last: a row is a column of B and cannot touch the others.
  const bf16_t* x = a.x + (size_t)row0 * a.inputs;
  u32 x_at[NT];
  GPU_UNROLL for (int n = 0; n < NT; n++) x_at[n] = min(8 * n + g, a.rows - 1 - row0) * a.inputs;
  typename F::Cursor w[MT];
  GPU_UNROLL for (int m = 0; m < MT; m++) w[m].seek(a, min(strip + m, strips - 1), lane);

  using Batch = typename F::Tile[BATCH][MT];
  float acc[MT][NT][4] = {};
  const auto load = [&](Batch& to, u32 at) {
    GPU_UNROLL for (int i = 0; i < BATCH; i++)
      if (at + i < end)
        GPU_UNROLL for (int m = 0; m < MT; m++) w[m].load(to[i][m], a, at + i);
  };
  const auto multiply = [&](const Batch& by, u32 at) {
    GPU_UNROLL for (int i = 0; i < BATCH; i++) {
      if (at + i >= end) break;
      // Two blocks at once where the registers suffice.
#pragma unroll(NT < 4 ? 2 : 1)
      for (int b = 0; b < 2; b++) {
        u32 f[MT][2][4];
        typename F::Scale scale[MT];
        GPU_UNROLL for (int m = 0; m < MT; m++) F::expand(f[m], scale[m], by[i][m], b);
        GPU_UNROLL for (int n = 0; n < NT; n++) {
          const uint4 v = F::load_x(x + x_at[n], 2 * (at + i) + b, t, a.inputs);
          float s[4];
          if (F::MINIMA) sum_of_rows(s, v);
          GPU_UNROLL for (int m = 0; m < MT; m++) F::fold(acc[m][n], f[m], scale[m], v, s);
        }
      }
    }
  };
  // Two batches in flight, and no copies between registers.
  Batch even, odd;
  u32 at = slice * tiles / SLICES;
  load(even, at);
  load(odd, at + BATCH);
  for (; at < end; at += 2 * BATCH) {
    multiply(even, at);
    load(even, at + 2 * BATCH);
    multiply(odd, at + BATCH);
    load(odd, at + 3 * BATCH);
  }

  GPU_UNROLL for (int n = 0; n < NT; n++) {
    if (n) __syncthreads();
    GPU_UNROLL for (int m = 0; m < MT; m++)
      GPU_UNROLL for (int c = 0; c < 4; c++) part[slice][2 * t + (c & 1)][m * TILE_OUT + g + 8 * (c >> 1)] = acc[m][n][c];
    __syncthreads();
    for (u32 i = threadIdx.x; i < 8 * TILE_OUT * MT; i += 32 * SLICES) {
      const u32 r = i / (TILE_OUT * MT), o = i % (TILE_OUT * MT), row = row0 + 8 * n + r, out = strip * TILE_OUT + o;
      float y = part[0][r][o];
      GPU_UNROLL for (u32 s = 1; s < SLICES; s++) y += part[s][r][o];
      if (row < a.rows && out < a.outputs) a.y[(size_t)row * a.outputs + out] = a.has_bias ? y + a.bias[out] : y;
    }
  }
}

// Name, format, strips of outputs and tiles of eight rows of a block.
#define LINEAR(name, Format, MT, NT) \
  KERNEL(name, Format::Args, 256) { linear<Format, MT, NT>(a); }
#define LINEARS(format, Format)         \
  LINEAR(linear_##format##_8, Format, 1, 1)  \
  LINEAR(linear_##format##_16, Format, 2, 2) \
  LINEAR(linear_##format##_32, Format, 2, 4) \
  LINEAR(linear_##format##_64, Format, 2, 8)

using Bf16Whole = Bf16<true, Linear>;
using Bf16Odd = Bf16<false, LinearOdd>;
LINEARS(bf16, Bf16Whole)
LINEARS(q8_0, Q8_0)
LINEARS(q4_0, Q4_0)
LINEARS(q4_1, Q4_1)
LINEARS(q4_k, Q4_K)
LINEARS(q6_k, Q6_K)
LINEAR(linear_bf16_odd, Bf16Odd, 1, 1)
