// What a one-pass reward does with the inverse of its curvature, and means of rows. Launches: end of this file.
#pragma once

// y[k, i] = sum_j a[i, j] x[k, j].
ARGS(MulRowsF32) {
  Out<float> y;         // [b, m] align 4
  In<float> a;          // [m, n] align 4
  In<float> x;          // [b, n] align 4
  u32 b;                // >= 1
  u32 m;                // >= 1
  u32 n;                // >= 1
};
ARGS(MulRowsF64) {
  Out<double> y;        // [b, m] align 8
  In<double> a;         // [m, n] align 8
  In<double> x;         // [b, n] align 8
  u32 b;                // >= 1
  u32 m;                // >= 1
  u32 n;                // >= 1
};

// a[i, j] = scale (a[i, j] - sum_k v[k, i] v[k, j]). Sherman & Morrison 1950; the order of the sum is that of k.
ARGS(SubtractOuterF32) {
  InOut<float> a;       // [n, n] align 4
  In<float> v;          // [b, n] align 4
  double scale;         // > 0
  u32 b;                // <= 65536
  u32 n;                // >= 1
};
ARGS(SubtractOuterF64) {
  InOut<double> a;      // [n, n] align 8
  In<double> v;         // [b, n] align 8
  double scale;         // > 0
  u32 b;                // <= 65536
  u32 n;                // >= 1
};

// y[i] = mean of rows ranges[i, 0] .. ranges[i, 1] of x. Ranges are not empty and inside x (the caller checks).
ARGS(MeanRows) {
  Out<float> y;         // [count, d] align 4
  In<float> x;          // [rows, d] align 4
  In<u32> ranges;       // [count, 2] align 4
  u32 count;            // >= 1
  u32 rows;             // >= 1
  u32 d;                // >= 1
};

// Launches. "up(a, b)" is a divided by b, rounded up.
//
//   mul_rows_*         MulRows*         grid (up(m, 8)), block 256
//   subtract_outer_*   SubtractOuter*   grid (up(n, 256), up(n, 16)), block 256
//   mean_rows          MeanRows         grid (count), block 256
