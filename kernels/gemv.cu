// y[r, o] = sum_i w[o, i] x[r, i] + bias[o] for few rows, and y = act(gate) * up of two such products: the weights are read once
// for all rows of a block.
//
// A block owns MT strips of 16 outputs and 8 NT rows. Its eight warps share out the inputs: warp s has tiles s T / 8 .. (s + 1) T / 8
// of the T = ceil(inputs / 64) tiles, which it walks in order with mma.m16n8k16, loading two batches of tiles ahead. The eight
// partial sums meet in shared memory and are added in order of s. Neither the number of rows nor MT and NT enter that order, so
// y[r, o] has the same bits from every entry point here, and from gemm.cu.
//
// Bound by the reading of weights up to some 32 rows.
#include "rt/gpu.cuh"
#include "rt/activation.cuh"
#include "rt/quant.cuh"

constexpr int PAD = 4;  // the lanes of a warp write eight outputs of four rows: all banks differ

// The strips of a block: `matrix(m)` and `strip(m)` say which. Warps leave their slice of the sums in `acc`.
template <class F, int MT, int NT, class Matrix, class Strip>
DEVICE void slice_sums(float (&acc)[MT][NT][4], const bf16_t* x, u32 rows, u32 inputs, u32 zero, Matrix matrix, Strip strip) {
  // Minima and many rows take registers from the batches.
  constexpr int SHARE = NT == 8 ? 8 : F::MINIMA && MT > 1 && NT > 1 ? 2 * MT : MT, BATCH = F::BATCH > SHARE ? F::BATCH / SHARE : 1;
  const u32 lane = threadIdx.x & 31, slice = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const u32 tiles = (inputs + TILE_IN - 1) / TILE_IN, end = (slice + 1) * tiles / SLICES;
  // Rows behind the last are read as the last: a row is a column of B and cannot touch the others.
  u32 x_at[NT];
  GPU_UNROLL for (int n = 0; n < NT; n++) x_at[n] = min(8 * n + g, rows - 1) * inputs;
  typename F::Cursor w[MT];
  GPU_UNROLL for (int m = 0; m < MT; m++) w[m].seek(matrix(m), strip(m), lane);

  using Batch = typename F::Tile[BATCH][MT];
  const auto load = [&](Batch& to, u32 at) {
    GPU_UNROLL for (int i = 0; i < BATCH; i++)
      if (at + i < end)
        GPU_UNROLL for (int m = 0; m < MT; m++) w[m].load(to[i][m], matrix(m), at + i);
  };
  const auto multiply = [&](const Batch& by, u32 at) {
    GPU_UNROLL for (int i = 0; i < BATCH; i++) {
      if (at + i >= end) break;
      // Two blocks at once where the registers suffice.
#pragma unroll(NT < 4 && !(F::MINIMA && MT > 1) ? 2 : 1)
      for (int b = 0; b < 2; b++) {
        u32 f[MT][2][4];
        typename F::Scale scale[MT];
        GPU_UNROLL for (int m = 0; m < MT; m++) F::expand(f[m], scale[m], by[i][m], b, zero);
        GPU_UNROLL for (int n = 0; n < NT; n++) {
          const uint4 v = F::load_x(x + x_at[n], 2 * (at + i) + b, t, inputs);
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
}

// The slices of eight rows into shared memory, [slice][row][16 m + output].
template <int MT, int NT>
DEVICE void gather(float (*part)[8][TILE_OUT * MT + PAD], const float (&acc)[MT][NT][4], int n) {
  const u32 lane = threadIdx.x & 31, slice = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  if (n) __syncthreads();
  GPU_UNROLL for (int m = 0; m < MT; m++)
    GPU_UNROLL for (int c = 0; c < 4; c++) part[slice][2 * t + (c & 1)][m * TILE_OUT + g + 8 * (c >> 1)] = acc[m][n][c];
  __syncthreads();
}
template <int WIDTH>
DEVICE float sum_slices(const float (*part)[8][WIDTH], u32 r, u32 o) {
  float y = part[0][r][o];
  GPU_UNROLL for (u32 s = 1; s < SLICES; s++) y += part[s][r][o];
  return y;
}

template <class F, int MT, int NT>
DEVICE void linear(const typename F::Args& a) {
  GPU_SMEM(float, part, [SLICES][8][TILE_OUT * MT + PAD]);
  const u32 strips = (a.outputs + TILE_OUT - 1) / TILE_OUT, strip = blockIdx.x * MT, row0 = blockIdx.y * 8 * NT;
  float acc[MT][NT][4] = {};
  slice_sums<F, MT, NT>(
      acc, a.x + (size_t)row0 * a.inputs, a.rows - row0, a.inputs, a.has_bias >> 1, [&](int) -> const typename F::Args& { return a; },
      [&](int m) { return min(strip + m, strips - 1); });
  GPU_UNROLL for (int n = 0; n < NT; n++) {
    gather(part, acc, n);
    for (u32 i = threadIdx.x; i < 8 * TILE_OUT * MT; i += 32 * SLICES) {
      const u32 r = i / (TILE_OUT * MT), o = i % (TILE_OUT * MT), row = row0 + 8 * n + r, out = strip * TILE_OUT + o;
      const float y = sum_slices(part, r, o);
      if (row < a.rows && out < a.outputs) a.y[(size_t)row * a.outputs + out] = a.has_bias ? y + a.bias[out] : y;
    }
  }
}

// Strip 0 of a block is the gate's, strip 1 the same outputs of the other matrix.
template <class F, class Glu, int NT>
DEVICE void linear_glu(const Glu& a) {
  GPU_SMEM(float, part, [SLICES][8][TILE_OUT * 2 + PAD]);
  const u32 row0 = blockIdx.y * 8 * NT;
  const typename F::Args gate = F::gate(a), up = F::up(a);
  float acc[2][NT][4] = {};
  slice_sums<F, 2, NT>(
      acc, a.x + (size_t)row0 * a.inputs, a.rows - row0, a.inputs, a.act >> 1,
      [&](int m) -> const typename F::Args& { return m ? up : gate; }, [&](int) { return blockIdx.x; });
  GPU_UNROLL for (int n = 0; n < NT; n++) {
    gather(part, acc, n);
    const u32 i = threadIdx.x, r = i / TILE_OUT, o = i % TILE_OUT, row = row0 + 8 * n + r, out = blockIdx.x * TILE_OUT + o;
    if (r < 8 && row < a.rows && out < a.outputs)
      a.y[(size_t)row * a.outputs + out] =
          gpu::to_bf16(activate(a.act, sum_slices(part, r, o)) * sum_slices(part, r, TILE_OUT + o));
  }
}

// Name, format, strips of outputs and tiles of eight rows of a block.
#define LINEAR(name, Format, MT, NT) \
  KERNEL(name, Format::Args, 256, NT <= 2 ? 2 : 1) { linear<Format, MT, NT>(a); }
#define GLU(name, Format, Glu, NT) \
  KERNEL(name, Glu, 256, NT <= 2 ? 2 : 1) { linear_glu<Format, Glu, NT>(a); }
#define LINEARS(format, Format, Glu)          \
  LINEAR(linear_##format##_8, Format, 1, 1)   \
  LINEAR(linear_##format##_16, Format, 2, 2)  \
  LINEAR(linear_##format##_32, Format, 2, 4)  \
  LINEAR(linear_##format##_64, Format, 2, 8)  \
  GLU(linear_glu_##format##_8, Format, Glu, 1)  \
  GLU(linear_glu_##format##_16, Format, Glu, 2) \
  GLU(linear_glu_##format##_32, Format, Glu, 4) \
  GLU(linear_glu_##format##_64, Format, Glu, 8)

using Bf16Whole = Bf16<true, Linear>;
using Bf16Odd = Bf16<false, LinearOdd>;
LINEARS(bf16, Bf16Whole, LinearGlu)
LINEARS(q8_0, Q8_0, LinearGluQ8_0)
LINEARS(q4_0, Q4_0, LinearGluQ4_0)
LINEARS(q4_1, Q4_1, LinearGluQ4_1)
LINEARS(q4_k, Q4_K, LinearGluQ4_K)
LINEARS(q6_k, Q6_K, LinearGluQ6_K)
LINEAR(linear_bf16_odd, Bf16Odd, 1, 1)
