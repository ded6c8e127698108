// What a one-pass reward does with the inverse P of its curvature (u = P z, P -= v v^T), and means of rows.
//
// mul_rows: a warp owns a row of the matrix and meets all rows of x with it, so that the matrix is read from memory once. subtract_outer:
// a thread owns a column of 16 rows; neighbours in a warp read neighbours. Both triangles are kept: reads stay whole, and the update keeps
// them equal to the bit, since v_i v_j is v_j v_i, rounded alike, fused or not. mean_rows: a block owns a mean. All are bound by memory.
#include "rt/gpu.cuh"

namespace curvature {
constexpr u32 ROWS = 16;

template <class T>
DEVICE T sum_of_warp(T v) {
  GPU_UNROLL for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
  return v;
}

// Four sums a lane, so that loads do not wait for one another.
template <class T>
DEVICE T dot(const T* a, const T* x, u32 n, u32 lane) {
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  u32 i = lane;
  for (; i + 96 < n; i += 128) {
    s0 += a[i] * x[i], s1 += a[i + 32] * x[i + 32];
    s2 += a[i + 64] * x[i + 64], s3 += a[i + 96] * x[i + 96];
  }
  for (; i < n; i += 32) s0 += a[i] * x[i];
  return sum_of_warp((s0 + s1) + (s2 + s3));
}

template <class T, class A>
DEVICE void mul_rows(const A& a) {
  const u32 row = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= a.m) return;
  const T* p = a.a + (size_t)row * a.n;
  for (u32 k = 0; k < a.b; k++) {
    const T s = dot<T>(p, a.x + (size_t)k * a.n, a.n, lane);
    if (lane == 0) a.y[(size_t)k * a.m + row] = s;
  }
}

template <class T, class A>
DEVICE void subtract_outer(const A& a) {
  const u32 j = blockIdx.x * 256 + threadIdx.x, first = blockIdx.y * ROWS;
  if (j >= a.n) return;
  for (u32 i = first; i < first + ROWS && i < a.n; i++) {
    T* p = a.a + (size_t)i * a.n + j;
    T value = *p;
    for (u32 k = 0; k < a.b; k++) value -= a.v[(size_t)k * a.n + i] * a.v[(size_t)k * a.n + j];
    *p = a.scale == 1.0 ? value : T(a.scale) * value;
  }
}
}  // namespace curvature

KERNEL(mul_rows_f32, MulRowsF32, 256) { curvature::mul_rows<float>(a); }
KERNEL(mul_rows_f64, MulRowsF64, 256) { curvature::mul_rows<double>(a); }
KERNEL(subtract_outer_f32, SubtractOuterF32, 256) { curvature::subtract_outer<float>(a); }
KERNEL(subtract_outer_f64, SubtractOuterF64, 256) { curvature::subtract_outer<double>(a); }

KERNEL(mean_rows, MeanRows, 256) {
  const u32 first = a.ranges[2 * blockIdx.x], end = a.ranges[2 * blockIdx.x + 1];
  for (u32 i = threadIdx.x; i < a.d; i += 256) {
    float sum = 0;
    for (u32 r = first; r < end; r++) sum += a.x[(size_t)r * a.d + i];
    a.y[(size_t)blockIdx.x * a.d + i] = sum / float(end - first);
  }
}
